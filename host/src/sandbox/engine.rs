//! The engine's settings: what a guest may use of WebAssembly, and where its instances come from.
//!
//! It owns no instance. [`build`] is called once per process; where the address space has no room for the pool, the engine allocates on
//! demand instead, which is slower and bounded by the host's permits alone.

use serde::{Deserialize, Serialize};
use wasmtime::{
    Config, Enabled, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig, Strategy,
    WasmBacktraceDetails,
};

use super::SandboxConfig;
use crate::limits::Limits;

/// Tables of one module. Toolchains emit one; the pool reserves room for each.
pub(super) const TABLES_MAX: u32 = 4;

/// Host-side bookkeeping of one instance: globals, imports, functions whose address is taken.
const INSTANCE_BYTES_MAX: usize = 1024 * 1024;

/// Kept of a native stack between two guests; calls deeper than this are decommitted.
const STACK_KEEP_RESIDENT_BYTES: usize = 16 * 1024;

/// Each freed slot is reset by itself. Of a small guest nothing is to be reset; of large ones a batch is one long step that lets nobody else run: with sixteen
/// of 60 MiB, deadlines were answered 19 ms late (p99) where now it is 9.
const DECOMMIT_BATCH: usize = 1;

/// Slots beyond the host's permits: a guest's slot is given back a moment after its permit may be.
const SLOTS_SPARE: u32 = 16;

/// Where instances come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Allocator {
    /// Reserved at the start, reset between guests.
    Pooling,
    /// Mapped and unmapped per guest.
    OnDemand,
}

/// Makes the engine, falling back to the on-demand allocator where the pool's address space cannot be had.
pub(super) fn build(sandbox: &SandboxConfig) -> wasmtime::Result<(Engine, Allocator)> {
    let slots = u32::try_from(sandbox.limits.host_running_max).unwrap_or(u32::MAX - SLOTS_SPARE) + SLOTS_SPARE;
    let mut pooled = common(&sandbox.limits)?;
    // Native stacks pass from one tenant's guest to another's.
    pooled.async_stack_zeroing(sandbox.stack_zeroing);
    pooled.allocation_strategy(InstanceAllocationStrategy::Pooling(pool(sandbox, slots)));
    match Engine::new(&pooled) {
        Ok(engine) => Ok((engine, Allocator::Pooling)),
        Err(error) => {
            tracing::warn!(
                slots,
                error = format!("{error:#}"),
                "no address space for the pool of instances, so that each is now mapped on demand, which is several times slower; \
                 lift `ulimit -v` or lower limits.host_running_max or limits.memory_bytes_max"
            );
            Ok((Engine::new(&on_demand(common(&sandbox.limits)?))?, Allocator::OnDemand))
        }
    }
}

/// An engine that runs nothing, whose code runs in a host's with these limits and this allocator.
pub(super) fn for_compiling(limits: &Limits, allocator: Allocator) -> wasmtime::Result<Engine> {
    let config = common(limits)?;
    match allocator {
        // A pool has no part in how code looks, and takes more address space than a compiler is given.
        Allocator::Pooling => Engine::new(&config),
        Allocator::OnDemand => Engine::new(&on_demand(config)),
    }
}

fn on_demand(mut config: Config) -> Config {
    // What made the pool impossible would forbid a reservation of 4 GiB per guest as well.
    config
        .allocation_strategy(InstanceAllocationStrategy::OnDemand)
        .memory_reservation(0)
        .memory_reservation_for_growth(1 << 20)
        .memory_guard_size(64 * 1024)
        .memory_may_move(true);
    config
}

fn common(limits: &Limits) -> wasmtime::Result<Config> {
    let mut config = Config::new();
    // Winch is not meant for untrusted guests.
    config.strategy(Strategy::Cranelift).cranelift_opt_level(OptLevel::Speed);
    // A compilation stays on the thread that was given to it, at that thread's priority.
    config.parallel_compilation(false);
    config.epoch_interruption(true);
    config.memory_init_cow(true);
    config.max_wasm_stack(limits.wasm_stack_bytes_max).async_stack_size(limits.async_stack_bytes);
    // Names of functions are enough; a guest's debug information is hostile input that nothing needs parsed.
    config.wasm_backtrace_details(WasmBacktraceDetails::Disable).generate_address_map(false);
    config.gc_support(false);
    config
        .wasm_threads(false)
        .wasm_shared_everything_threads(false)
        .wasm_memory64(false)
        .wasm_multi_memory(false)
        .wasm_exceptions(false)
        .wasm_gc(false)
        .wasm_function_references(false)
        .wasm_component_model(false)
        .wasm_stack_switching(false)
        .wasm_custom_page_sizes(false)
        .wasm_wide_arithmetic(false)
        // Its results differ between processors.
        .wasm_relaxed_simd(false);
    Ok(config)
}

fn pool(sandbox: &SandboxConfig, slots: u32) -> PoolingAllocationConfig {
    let limits = &sandbox.limits;
    let mut pool = PoolingAllocationConfig::new();
    pool.total_core_instances(slots)
        .total_memories(slots)
        // As many as there can be: a guest with all the tables that it may have must not leave another without the one that it needs.
        .total_tables(slots.saturating_mul(TABLES_MAX))
        .total_stacks(slots)
        .total_component_instances(0)
        .total_gc_heaps(0)
        .max_memories_per_module(1)
        .max_tables_per_module(TABLES_MAX)
        .max_core_instance_size(INSTANCE_BYTES_MAX)
        .max_memory_size(limits.memory_bytes_max)
        .table_elements(limits.table_elements_max)
        .linear_memory_keep_resident(sandbox.memory_keep_resident_bytes)
        .table_keep_resident(64 * 1024)
        .async_stack_keep_resident(STACK_KEEP_RESIDENT_BYTES)
        .max_unused_warm_slots(slots)
        .decommit_batch_size(DECOMMIT_BATCH)
        // Wrong on this line of wasmtime where a process has many mappings; mended upstream in 50.
        .pagemap_scan(Enabled::No);
    pool
}
