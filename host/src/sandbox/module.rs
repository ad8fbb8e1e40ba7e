//! A worker's module, compiled and linked: what a turn is instantiated from.

use wasmtime::{InstancePre, Linker, Module, ModuleExport};

use super::guest::Guest;
use super::host_calls::{MODULE, SPEAKING};
use super::inspect::ModuleRefusal;

/// A compiled module with its imports resolved. Cheap to instantiate, any number of times at once.
pub struct Worker {
    pub(super) pre: InstancePre<Guest>,
    pub(super) start: ModuleExport,
    pub(super) memory: ModuleExport,
    speaks: bool,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("speaks", &self.speaks).finish_non_exhaustive()
    }
}

impl Worker {
    /// How large its native code and its data are in memory.
    pub(super) fn code_bytes(&self) -> u64 {
        let range = self.pre.module().image_range();
        range.end.addr().saturating_sub(range.start.addr()) as u64
    }

    /// Links a compiled module that was inspected before it was compiled.
    pub(super) fn link(linker: &Linker<Guest>, module: &Module) -> Result<Worker, ModuleRefusal> {
        let export = |name: &str| {
            module.get_export_index(name).ok_or_else(|| {
                ModuleRefusal::NotCommand(format!("the module exports no `{name}`; build a program with `main`"))
            })
        };
        let speaks = module.imports().any(|import| import.module() == MODULE && SPEAKING.contains(&import.name()));
        Ok(Worker {
            start: export("_start")?,
            memory: export("memory")?,
            speaks,
            pre: linker
                .instantiate_pre(module)
                .map_err(|error| ModuleRefusal::ImportUnknown(format!("the module cannot be linked: {error:#}")))?,
        })
    }

    /// It speaks through `emit` and `reply`; its standard output goes to the log.
    pub fn speaks(&self) -> bool {
        self.speaks
    }
}
