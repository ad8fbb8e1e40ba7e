//! Runs one guest, from a compiled module to a [`Finished`]: engine, limits, host calls, trap → outcome.
//!
//! It knows nothing of stores, HTTP or who the tenant is. The runner gives it a [`Job`] and is told how it ended; what the guest says goes to
//! the job's [`Output`] while it runs; who must be able to end it from outside (deadline, cancel, lost lease) holds its [`Control`].
//!
//! ```text
//! wasm ──inspect──► ──compile──► Worker ──run(Job)──► Store, instance, `_start` ──► Finished
//!        inspect.rs   module.rs           run.rs      guest.rs, host_calls/, stdio.rs  outcome.rs
//!                     cache.rs (load)                 operations/, limiter.rs
//! ```
//! Guests run on a runtime of their own, whose threads give way to the gateway's; nothing of theirs runs anywhere else.

pub mod control;

pub mod job;

mod engine;

mod ticker;

mod inspect;

mod module;

mod cache;

mod guest;

mod limiter;

mod speech;

mod stdio;

mod host_calls;

pub mod operations;

mod run;

mod outcome;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use wasmtime::{Engine, Linker, Module, Store};

pub use cache::CacheConfig;
pub use control::{Control, Stop};
pub use engine::Allocator;
pub use inspect::{Inspection, ModuleRefusal};
pub use job::{Finished, GuestLimits, Input, InputJson, Job, Output, Refused, Reply, Said};
pub use module::Worker;

use crate::ids::OrgId;
use crate::limits::Limits;
use crate::turn::{Failure, FailureCode, Usage};
use cache::{CacheName, Found, ModuleCache};
use guest::Guest;
use inspect::Importable;
use operations::Registry;
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
    /// Threads that run guests.
    pub threads: usize,
    /// How far these threads give way to the gateway's (Linux: 0 to 19).
    pub nice: i32,
    /// Kept of a guest's memory for the next one. What a guest dirties beyond it costs system calls and page faults.
    pub memory_keep_resident_bytes: usize,
    /// Whether native stacks are cleared between two guests.
    pub stack_zeroing: bool,
    /// Compiled modules in memory.
    pub workers_loaded_max: u64,
}

impl SandboxConfig {
    /// For these bounds, on this machine, without a cache on disk.
    pub fn new(limits: Limits) -> SandboxConfig {
        SandboxConfig {
            limits,
            cache: None,
            threads: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
            nice: 10,
            memory_keep_resident_bytes: 512 * 1024,
            stack_zeroing: true,
            workers_loaded_max: 512,
        }
    }
}

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

/// Why a worker could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The module cannot be a worker here.
    #[error(transparent)]
    Refused(#[from] ModuleRefusal),
    /// Its bytes could not be had.
    #[error("the module's bytes cannot be read")]
    Fetch(#[source] anyhow::Error),
    /// They are not those of the digest.
    #[error("the module's bytes are not those that were uploaded")]
    Digest,
}

/// The engine, its guests' runtime, and the workers that are loaded. One per process.
pub struct Sandbox {
    limits: Limits,
    engine: Engine,
    allocator: Allocator,
    linker: Arc<Linker<Guest>>,
    importable: Importable,
    registry: Arc<Registry>,
    cache: Option<Arc<ModuleCache>>,
    loaded: moka::future::Cache<(OrgId, [u8; 32]), Arc<Worker>>,
    compiling: Arc<Semaphore>,
    ticker: Ticker,
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
        let importable = importable(&engine, &linker);
        let cache = match &config.cache {
            Some(cache) => Some(Arc::new(ModuleCache::open(cache, &engine).map_err(SandboxError::Cache)?)),
            None => None,
        };
        let runtime = runtime(config).map_err(SandboxError::Threads)?;
        Ok(Arc::new(Sandbox {
            limits: config.limits.clone(),
            allocator,
            linker: Arc::new(linker),
            importable,
            registry: Arc::new(registry),
            cache,
            loaded: moka::future::Cache::new(config.workers_loaded_max),
            compiling: Arc::new(Semaphore::new(config.limits.compiles_concurrent_max)),
            ticker: Ticker::start(&engine).map_err(SandboxError::Threads)?,
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

    /// Reads a module's structure without compiling anything: cheap, and the first thing that an upload meets.
    pub fn inspect(&self, wasm: &[u8]) -> Result<Inspection, ModuleRefusal> {
        inspect::inspect(wasm, &self.importable, &self.limits)
    }

    /// Inspects, validates and compiles, on a thread of its own, bounded in number and time.
    pub async fn compile(&self, wasm: Bytes) -> Result<Worker, ModuleRefusal> {
        let module = self.compile_module(wasm).await?;
        Worker::link(&self.linker, &module)
    }

    async fn compile_module(&self, wasm: Bytes) -> Result<Module, ModuleRefusal> {
        self.inspect(&wasm)?;
        let timeout_ms = self.limits.compile_timeout_ms;
        let engine = self.engine.clone();
        let compiling = self.compiling.clone();
        let compiled = tokio::time::timeout(Duration::from_millis(timeout_ms), async move {
            let permit = compiling.acquire_owned().await.expect("the semaphore is never closed");
            self.handle
                .spawn_blocking(move || {
                    // Held until the compiler is done, even when nobody waits for it any more: it cannot be interrupted.
                    let _permit = permit;
                    module::compile(&engine, &wasm)
                })
                .await
        });
        match compiled.await {
            Err(_) => Err(ModuleRefusal::CompileTimeout { timeout_ms }),
            Ok(Ok(result)) => result,
            Ok(Err(error)) => {
                tracing::error!(error = error.to_string(), "the compiler failed on a module");
                Err(ModuleRefusal::TooComplex(
                    "the compiler failed on the module; build it with another toolchain version".to_owned(),
                ))
            }
        }
    }

    /// The worker of an org's module: from memory, from the cache on disk, or compiled from `wasm`, which is asked only then. Any number of
    /// callers at once make it once.
    pub async fn load<F, Fut>(&self, org: &OrgId, digest: [u8; 32], wasm: F) -> Result<Arc<Worker>, Arc<LoadError>>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = anyhow::Result<Bytes>>,
    {
        let make = async {
            let cached = self.cache.as_ref().map(|cache| (cache.clone(), cache.name(org, &digest)));
            if let Some((cache, name)) = cached.clone()
                && let Some(module) = self.load_cached(cache, name).await
            {
                return Ok(Arc::new(Worker::link(&self.linker, &module)?));
            }
            let wasm = wasm().await.map_err(LoadError::Fetch)?;
            if <[u8; 32]>::from(Sha256::digest(&wasm)) != digest {
                return Err(LoadError::Digest);
            }
            let module = self.compile_module(wasm).await?;
            if let Some((cache, name)) = cached {
                self.keep_cached(cache, name, module.clone()).await;
            }
            Ok(Arc::new(Worker::link(&self.linker, &module)?))
        };
        self.loaded.try_get_with((org.clone(), digest), make).await
    }

    async fn load_cached(&self, cache: Arc<ModuleCache>, name: CacheName) -> Option<Module> {
        let engine = self.engine.clone();
        let read = self.handle.spawn_blocking(move || {
            let found = match cache.read(&name) {
                Found::Hit(content) => match deserialize(&engine, &content) {
                    Ok(module) => Ok(module),
                    Err(error) => {
                        tracing::warn!(error = format!("{error:#}"), "an authentic compiled module is not this engine's");
                        Err("rejected")
                    }
                },
                Found::Miss => Err("miss"),
                Found::Rejected => {
                    tracing::warn!("a compiled module in the cache was not written by this host, or is damaged; it is compiled anew");
                    Err("rejected")
                }
            };
            if found.as_ref().err() == Some(&"rejected") {
                cache.forget(&name);
            }
            found
        });
        let found = read.await.unwrap_or(Err("miss"));
        let result = found.as_ref().err().copied().unwrap_or("hit");
        metrics::counter!("turnhouse_module_cache_total", "result" => result).increment(1);
        found.ok()
    }

    async fn keep_cached(&self, cache: Arc<ModuleCache>, name: CacheName, module: Module) {
        let written = self.handle.spawn_blocking(move || -> anyhow::Result<()> {
            cache.write(&name, &module.serialize()?)?;
            Ok(())
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(
                error = format!("{error:#}"),
                "a compiled module could not be kept; it will be compiled again at the next start"
            );
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
        run::run(worker, self.registry.clone(), job).await
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

fn runtime(config: &SandboxConfig) -> std::io::Result<Runtime> {
    let number = AtomicUsize::new(0);
    let nice = config.nice;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads.max(1))
        .max_blocking_threads(config.limits.compiles_concurrent_max + BLOCKING_THREADS_SPARE)
        .thread_stack_size(THREAD_STACK_BYTES)
        .thread_name_fn(move || format!("guest-{}", number.fetch_add(1, Ordering::Relaxed)))
        .on_thread_start(move || lower_priority(nice))
        .enable_all()
        .build()
}

/// Makes this thread give way to the gateway's.
#[cfg(target_os = "linux")]
fn lower_priority(nice: i32) {
    // On Linux a priority is a thread's, and no process id means the calling thread.
    if let Err(error) = rustix::process::setpriority_process(None, nice) {
        tracing::warn!(error = error.to_string(), "a guest thread's priority could not be lowered");
    }
}

#[cfg(not(target_os = "linux"))]
fn lower_priority(_nice: i32) {}

/// The one place where bytes become native code.
#[allow(
    unsafe_code,
    reason = "the bytes carry a MAC of this host's key over their name and content: this host's compiler wrote them"
)]
fn deserialize(engine: &Engine, authentic: &[u8]) -> wasmtime::Result<Module> {
    // SAFETY: `ModuleCache::read` has verified that `Module::serialize` of a process with this host's key made exactly these bytes, for an
    // engine of the same compatibility hash; they are read into memory before they are verified and cannot change after.
    unsafe { Module::deserialize(engine, authentic) }
}
