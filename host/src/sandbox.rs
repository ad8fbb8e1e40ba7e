//! Runs one guest, from a compiled module to a [`Finished`]: engine, limits, host calls, trap → outcome.
//!
//! It knows nothing of stores, HTTP or who the tenant is. The runner gives it a [`Job`] and is told how it ended; what the guest says goes to
//! the job's [`Output`] while it runs; who must be able to end it from outside (deadline, cancel, lost lease) holds its [`Control`].

pub mod control;

pub mod job;

pub use control::{Control, Stop};
pub use job::{Finished, GuestLimits, Input, InputJson, Job, Output, Refused, Reply, Said};

/// Placeholder until the sandbox lands.
#[derive(Debug, thiserror::Error)]
#[error("refused")]
pub struct ModuleRefusal;
