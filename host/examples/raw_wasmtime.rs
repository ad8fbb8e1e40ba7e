//! How many fresh instances a second wasmtime alone runs, with the host's settings and nothing of the host around them: what the sandbox is held against.
//!
//! `cargo run --release -p turnhouse --example raw_wasmtime WORKER.wasm [SECONDS] [KEEP_RESIDENT_KIB] [THREADS] [TASKS]`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use wasmtime::{Config, Engine, InstanceAllocationStrategy, Linker, Module, PoolingAllocationConfig, Store};
use wasmtime_wasi::WasiCtxBuilder;
use wasmtime_wasi::p1::{WasiP1Ctx, add_to_linker_async};
use wasmtime_wasi::p2::pipe::{MemoryInputPipe, MemoryOutputPipe};

const MIB: usize = 1024 * 1024;
const SLOTS: u32 = 1_016;

fn engine(keep_resident_bytes: usize) -> anyhow::Result<Engine> {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_core_instances(SLOTS)
        .total_memories(SLOTS)
        .total_tables(SLOTS)
        .total_stacks(SLOTS)
        .max_memory_size(64 * MIB)
        .linear_memory_keep_resident(keep_resident_bytes)
        .table_keep_resident(64 * 1024)
        .async_stack_keep_resident(16 * 1024)
        .max_unused_warm_slots(SLOTS)
        .decommit_batch_size(16);
    let mut config = Config::new();
    config
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool))
        .epoch_interruption(true)
        .max_wasm_stack(512 * 1024)
        .async_stack_size(2 * MIB)
        .async_stack_zeroing(true)
        .gc_support(false);
    Ok(Engine::new(&config)?)
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let wasm = std::fs::read(arguments.next().context("name a module")?)?;
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (seconds, keep_kib, threads, tasks) = (number(3)?, number(256)?, number(2)?, number(64)?);
    let engine = engine(keep_kib * 1024)?;
    let mut linker: Linker<WasiP1Ctx> = Linker::new(&engine);
    add_to_linker_async(&mut linker, |wasi| wasi)?;
    let worker = linker.instantiate_pre(&Module::new(&engine, wasm)?)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let (over, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let begun = Instant::now();
    let running: Vec<_> = (0..tasks)
        .map(|_| {
            let (engine, worker, over, count) = (engine.clone(), worker.clone(), over.clone(), count.clone());
            runtime.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let stdout = MemoryOutputPipe::new(MIB);
                    let wasi = WasiCtxBuilder::new()
                        .args(&["echo"])
                        .env("TURNHOUSE_AGENT_ID", "echo")
                        .stdin(MemoryInputPipe::new("a message of some forty bytes to be echoed"))
                        .stdout(stdout.clone())
                        .build_p1();
                    let mut store = Store::new(&engine, wasi);
                    store.set_epoch_deadline(u64::MAX / 2);
                    let instance = worker.instantiate_async(&mut store).await?;
                    instance.get_typed_func::<(), ()>(&mut store, "_start")?.call_async(&mut store, ()).await?;
                    anyhow::ensure!(!stdout.contents().is_empty(), "the worker answers");
                    count.fetch_add(1, Ordering::Relaxed);
                    drop(store);
                    tokio::task::yield_now().await;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    std::thread::sleep(Duration::from_secs(seconds as u64));
    over.store(true, Ordering::Relaxed);
    for task in running {
        runtime.block_on(task)??;
    }
    let (count, elapsed) = (count.load(Ordering::Relaxed), begun.elapsed().as_secs_f64());
    println!(
        "{count} instances in {elapsed:.2} s: {:.0}/s on {threads} threads, {keep_kib} KiB kept",
        count as f64 / elapsed
    );
    Ok(())
}
