//! Runs one guest, from a compiled module to a [`Finished`]: engine, limits, host calls, trap → outcome.
//!
//! It knows nothing of stores, HTTP or who the tenant is. The runner gives it a [`Job`] and is told how it ended; what the guest says goes to
//! the job's [`Output`] while it runs; who must be able to end it from outside (deadline, cancel, lost lease) holds its [`Control`].
//!
//! ```text
//! wasm ──inspect──► ──compile──► Worker ──run(Job)──► Store, instance, `_start` ──► Finished
//!        inspect.rs   compiler.rs         run.rs      guest.rs, host_calls/, stdio.rs  outcome.rs
//!                     bulk.rs, cache.rs, load.rs      operations/, limiter.rs, private_dir/
//! ```
//! Guests run on a runtime of their own, whose threads give way to the gateway's; nothing of theirs runs anywhere else.

pub mod attachments;

pub mod control;

pub mod job;

mod engine;

mod ticker;

mod inspect;

mod module;

mod bulk;

pub mod compiler;

mod cache;

mod load;

mod guest;

mod limiter;

mod run_queue;

mod speech;

mod stdio;

mod host_calls;

pub mod private_dir;

pub mod operations;

mod run;

mod outcome;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use wasmtime::{Engine, Linker, Store};

pub use attachments::{Attachments, PieceSource};
pub use cache::CacheConfig;
pub use control::{Control, Stop};
pub use engine::Allocator;
pub use inspect::{Inspection, ModuleRefusal};
pub use job::{Finished, GuestLimits, Input, InputJson, Job, Output, Refused, Reply, Said};
pub use load::LoadError;
pub use module::Worker;
pub use private_dir::PrivateDir;

use crate::ids::OrgId;
use crate::limits::Limits;
use crate::turn::{Failure, FailureCode, Usage};
use cache::ModuleCache;
use guest::Guest;
use inspect::Importable;
use operations::Registry;
use run_queue::RunQueue;
use ticker::Ticker;

/// Threads of the guests' runtime that may block, beside those that compile.
const BLOCKING_THREADS_SPARE: usize = 4;

/// Cranelift recurses; guests themselves have stacks of their own.
const THREAD_STACK_BYTES: usize = 8 * 1024 * 1024;

/// How the sandbox is set up.
#[derive(Debug, Clone)]
pub struct SandboxConfig {
    /// The operator's bounds: of guests, of modules and of the pool.
    pub limits: Limits,
    /// Where compiled modules are kept; `None` keeps them in memory alone.
    pub cache: Option<CacheConfig>,
    /// This program's file, where modules are to be compiled in a process of its own for each; `None` compiles them here.
    pub compiler: Option<PathBuf>,
    /// Threads that run guests; 0 is one for each processor.
    pub threads: usize,
    /// How far these threads give way to the gateway's (Linux: 0 to 19).
    pub nice: i32,
    /// Kept of a guest's memory for the next one. What a guest dirties beyond it costs system calls and page faults.
    pub memory_keep_resident_bytes: usize,
    /// Whether native stacks are cleared between two guests.
    pub stack_zeroing: bool,
    /// Compiled modules in memory; a large one counts as several of 2 MiB.
    pub workers_loaded_max: u64,
}

impl SandboxConfig {
    /// For these bounds, on this machine, without a cache on disk.
    pub fn new(limits: Limits) -> SandboxConfig {
        SandboxConfig {
            limits,
            cache: None,
            compiler: None,
            threads: 0,
            nice: 5,
            memory_keep_resident_bytes: 256 * 1024,
            stack_zeroing: true,
            workers_loaded_max: 512,
        }
    }
}

/// As what a loaded module counts at least.
const WORKER_BYTES: u64 = 2 << 20;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Of the engine's settings, or of the platform.
    #[error("the WebAssembly engine cannot start: {0}")]
    Engine(String),
    /// Threads or the runtime.
    #[error("the guests' threads cannot start")]
    Threads(#[source] std::io::Error),
    /// The directory or the key of compiled modules.
    #[error("the cache of compiled modules cannot be opened")]
    Cache(#[source] std::io::Error),
}

/// The engine, its guests' runtime, and the workers that are loaded. One per process.
pub struct Sandbox {
    limits: Limits,
    engine: Engine,
    allocator: Allocator,
    linker: Arc<Linker<Guest>>,
    importable: Arc<Importable>,
    registry: Arc<Registry>,
    cache: Option<Arc<ModuleCache>>,
    compiler: Option<PathBuf>,
    loaded: moka::future::Cache<(OrgId, [u8; 32]), Arc<Worker>>,
    compiling: Arc<Semaphore>,
    ticker: Ticker,
    queue: Arc<RunQueue>,
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
}

impl Sandbox {
    /// Makes the engine, its ticker and the guests' runtime.
    pub fn new(config: &SandboxConfig) -> Result<Arc<Sandbox>, SandboxError> {
        Sandbox::with_operations(config, Registry::standard())
    }

    /// The same, with other operations behind `call`.
    pub fn with_operations(config: &SandboxConfig, registry: Registry) -> Result<Arc<Sandbox>, SandboxError> {
        let engine_error = |error: wasmtime::Error| SandboxError::Engine(format!("{error:#}"));
        let (engine, allocator) = engine::build(config).map_err(engine_error)?;
        let mut linker = Linker::new(&engine);
        wasmtime_wasi::p1::add_to_linker_async(&mut linker, |guest: &mut Guest| &mut guest.wasi)
            .map_err(engine_error)?;
        host_calls::add_to_linker(&mut linker).map_err(engine_error)?;
        private_dir::add_to_linker(&mut linker).map_err(engine_error)?;
        let importable = Arc::new(importable(&engine, &linker));
        let cache = match &config.cache {
            Some(cache) => Some(Arc::new(ModuleCache::open(cache, &engine).map_err(SandboxError::Cache)?)),
            None => None,
        };
        let threads = threads(config);
        let runtime = runtime(config, threads).map_err(SandboxError::Threads)?;
        Ok(Arc::new(Sandbox {
            limits: config.limits.clone(),
            allocator,
            linker: Arc::new(linker),
            importable,
            registry: Arc::new(registry),
            cache,
            compiler: config.compiler.clone(),
            loaded: moka::future::Cache::builder()
                .weigher(|_, worker: &Arc<Worker>| worker.code_bytes().clamp(WORKER_BYTES, u64::from(u32::MAX)) as u32)
                .max_capacity(config.workers_loaded_max.saturating_mul(WORKER_BYTES))
                .build(),
            compiling: Arc::new(Semaphore::new(config.limits.compiles_concurrent_max)),
            ticker: Ticker::start(&engine).map_err(SandboxError::Threads)?,
            queue: RunQueue::new(threads),
            handle: runtime.handle().clone(),
            runtime: Mutex::new(Some(runtime)),
            engine,
        }))
    }

    /// Where instances come from.
    pub fn allocator(&self) -> Allocator {
        self.allocator
    }

    /// Whether guests can be interrupted. When not, no turn may be started.
    pub fn ticker_alive(&self) -> bool {
        self.ticker.alive()
    }

    /// How many guests could run and wait for a thread.
    pub fn guests_waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// Spawns a turn's future on the guests' runtime. The caller owns the task and awaits it.
    pub fn spawn<F>(&self, turn: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.handle.spawn(turn)
    }

    /// The guests' runtime.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends the guests' runtime: what still runs there is dropped at its next yield, or left behind after `within`. Blocks; never call it
    /// from an async task.
    pub fn shutdown(&self, within: Duration) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_timeout(within);
        }
    }

    /// Runs one guest to its end. To be awaited on the guests' runtime ([`Sandbox::spawn`]); dropping the future ends the guest.
    pub async fn run(&self, worker: &Worker, job: Job) -> Finished {
        if !self.ticker_alive() {
            tracing::error!("the epoch ticker has stopped: guests could not be interrupted, and are refused");
            return not_started(Failure::new(
                FailureCode::Internal,
                "the host cannot run workers just now; send it again",
            ));
        }
        run::run(worker, self.registry.clone(), self.queue.seat(&job.org), job).await
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Without waiting: it may be dropped inside a task.
        if let Some(runtime) = self.runtime.get_mut().take() {
            runtime.shutdown_background();
        }
    }
}

fn not_started(failure: Failure) -> Finished {
    Finished { reply: Err(failure), snapshot: None, usage: Usage::default(), log: Vec::new(), log_bytes_dropped: 0 }
}

/// Every function that the linker has, with its type. The listing wants a store of guests; nothing is ever instantiated in it.
fn importable(engine: &Engine, linker: &Linker<Guest>) -> Importable {
    let mut store = Store::new(engine, Guest::nobody());
    let functions: Vec<_> = linker
        .iter(&mut store)
        .filter_map(|(module, name, item)| Some((module.to_owned(), name.to_owned(), item.into_func()?)))
        .collect();
    Importable::new(functions.into_iter().map(|(module, name, function)| (module, name, function.ty(&store))))
}

fn threads(config: &SandboxConfig) -> usize {
    match config.threads {
        0 => std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
        threads => threads,
    }
}

fn runtime(config: &SandboxConfig, threads: usize) -> std::io::Result<Runtime> {
    let number = AtomicUsize::new(0);
    let nice = config.nice;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(config.limits.compiles_concurrent_max + BLOCKING_THREADS_SPARE)
        .thread_stack_size(THREAD_STACK_BYTES)
        .thread_name_fn(move || format!("guest-{}", number.fetch_add(1, Ordering::Relaxed)))
        // A turn that begins goes before guests that spin on: these yield every millisecond, and by default the queue of what is new would
        // be looked at only every few dozen yields.
        .global_queue_interval(1)
        .on_thread_start(move || give_way(nice))
        .enable_all()
        .build()
}

/// Makes this thread give way to the gateway's.
#[cfg(target_os = "linux")]
fn give_way(nice: i32) {
    // On Linux a priority is a thread's, and no process id means the calling thread.
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        tracing::warn!(error = error.to_string(), "a guest thread's priority could not be lowered");
    }
    // By default a sleep may last 50 µs longer than asked, which is more than all of `BREATH`.
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1_000));
}

#[cfg(not(target_os = "linux"))]
fn give_way(_nice: i32) {}

/// How long a guests' thread pauses where its guest yields.
const BREATH: Duration = Duration::from_micros(30);

/// Leaves the processor to whoever else wants it, once a tick, if only for a moment.
///
/// Priority does not do that. On Linux (6.6 and later) a thread that has just had more than its share is not eligible while any other runs, and the
/// lighter that other, the longer: a kernel's worker that owed 4 ms was kept from its processor by one spinning guest of low priority for 617 ms,
/// and with it every write of the journal. Where a guests' thread really sleeps, nobody else has to be eligible to be next. It costs guests
/// that never wait 3 % of their speed, and brings the lateness of deadlines with 100 of them from hundreds of ms to 4 (p99).
pub(crate) fn breathe() {
    std::thread::sleep(BREATH);
}
