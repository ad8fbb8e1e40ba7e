//! What a guest may have of memory and tables, and what it asked for.

use std::sync::Arc;

use wasmtime::ResourceLimiter;

use super::Control;
use super::engine::TABLES_MAX;

/// One guest's. It remembers a refusal: a trap or an exit after one is `worker_out_of_memory`.
#[derive(Debug)]
pub(super) struct Limiter {
    control: Arc<Control>,
    memory_bytes_max: usize,
    table_elements_max: usize,
    pub(super) refused: bool,
}

impl Limiter {
    pub(super) fn new(control: Arc<Control>, memory_bytes_max: usize, table_elements_max: usize) -> Limiter {
        Limiter { control, memory_bytes_max, table_elements_max, refused: false }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, _current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        let allowed = desired <= self.memory_bytes_max && maximum.is_none_or(|maximum| desired <= maximum);
        if allowed {
            self.control.grew_to(desired);
        } else {
            self.refused = true;
        }
        Ok(allowed)
    }

    fn memory_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        tracing::debug!(error = format!("{error:#}"), "a guest's memory could not grow");
        self.refused = true;
        Ok(())
    }

    fn table_growing(&mut self, _current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        let allowed = desired <= self.table_elements_max && maximum.is_none_or(|maximum| desired <= maximum);
        self.refused |= !allowed;
        Ok(allowed)
    }

    fn instances(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        TABLES_MAX as usize
    }

    fn memories(&self) -> usize {
        1
    }
}
