//! How a guest's end becomes an outcome: every trap, exit, limit and clock, with its code, the figure and the setting to change.

use std::fmt::Write as _;

use wasmtime::{PoolConcurrencyLimitError, Trap, WasmBacktrace};
use wasmtime_wasi::I32Exit;

use super::operations::OperationError;
use super::{Control, GuestLimits, Stop};
use crate::turn::{Failure, FailureCode};

/// A trap's message, and what it says of where it happened: a guest chooses its function names.
const TRAP_MESSAGE_CHARS_MAX: usize = 400;

/// Functions named in a trap's message.
const TRAP_FRAMES_MAX: usize = 3;

/// An end that a host call brings about; it unwinds the guest as an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    #[error("the reply is over its limit of {reply_bytes_max} bytes")]
    ReplyLimit { reply_bytes_max: usize },
    #[error("more than {emit_events_max} events")]
    EmitLimit { emit_events_max: u64 },
    #[error("more than {host_calls_max} host calls")]
    HostCallLimit { host_calls_max: u64 },
    #[error("more than {random_bytes_max} random bytes in one call")]
    RandomLimit { random_bytes_max: u64 },
    /// The lease was gone when an effect was about to begin.
    #[error("the turn is no longer this host's")]
    LeaseLost,
}

/// What is known of a guest when it ends, beside the error that ended it.
pub(super) struct Circumstances<'a> {
    pub(super) control: &'a Control,
    pub(super) limits: &'a GuestLimits,
    /// Memory or a table was refused to it.
    pub(super) growth_refused: bool,
    /// A piece of its reply was refused, and no whole reply came after.
    pub(super) cut: Option<End>,
    /// Its last operation failed, and none succeeded after it.
    pub(super) provider: Option<&'a OperationError>,
}

/// The failure of a guest that ended by itself with an error. `None`: it exited with 0 and nothing of its reply is missing.
pub(super) fn failure(error: &wasmtime::Error, around: &Circumstances<'_>) -> Option<Failure> {
    let own = own_failure(error, around)?;
    Some(blame_provider(own, around.provider))
}

/// The failure of a guest that exited with 0, if anything of its reply is missing.
pub(super) fn cut(around: &Circumstances<'_>) -> Option<Failure> {
    around.cut.map(|end| blame_provider(end_failure(end), around.provider))
}

/// The failure of a guest that was stopped from outside.
pub(super) fn stopped(why: Stop, around: &Circumstances<'_>) -> Failure {
    blame_provider(stop_failure(why, around.control), around.provider)
}

/// The failure of a guest that exited with 0 and said nothing.
pub(super) fn no_reply(provider: Option<&OperationError>) -> Failure {
    let own = Failure::new(
        FailureCode::NoReply,
        "the worker exited with 0 and had said nothing; write the answer to standard output, or call `reply`",
    );
    blame_provider(own, provider)
}

/// Where the last provider operation failed, its code is the turn's: the guest's own end only followed from it.
fn blame_provider(own: Failure, provider: Option<&OperationError>) -> Failure {
    let Some((error, code)) = provider.and_then(|error| error.provider_code().map(|code| (error, code))) else {
        return own;
    };
    let mut failure = Failure::new(code, error.detail.clone());
    failure.retryable = error.retryable;
    failure.cause = Some(format!("{}: {}", own.code.as_str(), own.detail));
    failure.facts = own.facts;
    match error.retry_after_ms {
        Some(ms) => failure.with("retry_after_ms", ms),
        None => failure,
    }
}

fn own_failure(error: &wasmtime::Error, around: &Circumstances<'_>) -> Option<Failure> {
    if let Some(why) = around.control.stopped() {
        return Some(stop_failure(why, around.control));
    }
    if let Some(end) = error.downcast_ref::<End>() {
        return Some(end_failure(*end));
    }
    // What was refused to a guest is why it gave up.
    let refused = if around.growth_refused { Some(out_of_memory(around.limits)) } else { around.cut.map(end_failure) };
    if let Some(I32Exit(code)) = error.downcast_ref::<I32Exit>() {
        return match (code, refused) {
            (0, _) => around.cut.map(end_failure),
            (code, Some(failure)) => Some(failure.with("exit_code", *code)),
            (code, None) => Some(exit(*code)),
        };
    }
    if error.is::<PoolConcurrencyLimitError>() {
        tracing::error!(error = format!("{error:#}"), "the pool of instances was full although a permit was held");
        return Some(Failure::new(FailureCode::Internal, "the host had no free instance for the turn; send it again"));
    }
    let trap = error.downcast_ref::<Trap>();
    if let Some(Trap::StackOverflow) = trap {
        return Some(Failure::new(
            FailureCode::WorkerStackOverflow,
            "the worker's calls nested deeper than limits.wasm_stack_bytes_max allows; end the recursion, or have the operator raise it",
        ));
    }
    Some(refused.unwrap_or_else(|| {
        Failure::new(FailureCode::WorkerTrapped, format!("the worker trapped: {}", trap_message(error, trap)))
    }))
}

fn exit(code: i32) -> Failure {
    Failure::new(FailureCode::WorkerExit, format!("the worker exited with code {code}; the turn's log may say why"))
        .with("exit_code", code)
}

fn out_of_memory(limits: &GuestLimits) -> Failure {
    Failure::new(
        FailureCode::WorkerOutOfMemory,
        format!(
            "the worker asked for more than its {} bytes of memory or {} table elements and failed on it; raise limits.memory_bytes_max on the agent",
            limits.memory_bytes_max, limits.table_elements_max
        ),
    )
}

fn end_failure(end: End) -> Failure {
    match end {
        End::EmitLimit { emit_events_max } => Failure::new(
            FailureCode::OutputLimit,
            format!(
                "the worker emitted more than {emit_events_max} events; emit fewer and larger ones, or have the operator raise limits.emit_events_max"
            ),
        ),
        End::ReplyLimit { reply_bytes_max } => Failure::new(
            FailureCode::OutputLimit,
            format!("the worker's reply went over {reply_bytes_max} bytes; raise limits.reply_bytes_max on the agent"),
        ),
        End::HostCallLimit { host_calls_max } => Failure::new(
            FailureCode::HostCallLimit,
            format!(
                "the worker made more than {host_calls_max} host calls; have the operator raise limits.host_calls_max"
            ),
        ),
        End::RandomLimit { random_bytes_max } => Failure::new(
            FailureCode::WorkerTrapped,
            format!(
                "the worker asked for more than {random_bytes_max} random bytes in one call; ask for fewer at a time"
            ),
        ),
        End::LeaseLost => Failure::new(FailureCode::HostLost, "the turn was taken over by another host"),
    }
}

fn stop_failure(why: Stop, control: &Control) -> Failure {
    let ms = |time: std::time::Duration| time.as_millis();
    match why {
        // Nobody reads it: the turn has its end already.
        Stop::Ended => Failure::new(FailureCode::Internal, "the turn ended elsewhere"),
        Stop::TurnTimeout => Failure::new(
            FailureCode::TurnTimeout,
            format!(
                "the turn took longer than {} ms; raise limits.turn_timeout_ms on the agent",
                ms(control.deadline() - control.started())
            ),
        ),
        Stop::IdleTimeout => Failure::new(
            FailureCode::IdleTimeout,
            "the worker made no progress for too long (no output, no new status, no answer of an operation); raise limits.idle_timeout_ms on the agent",
        ),
        Stop::CpuTimeout => Failure::new(
            FailureCode::CpuTimeout,
            format!(
                "the worker used more than {} ms of CPU time; raise limits.cpu_timeout_ms on the agent",
                ms(control.cpu_timeout())
            ),
        ),
    }
}

/// What happened and the innermost functions, on one bounded line.
fn trap_message(error: &wasmtime::Error, trap: Option<&Trap>) -> String {
    let mut message = match trap {
        Some(trap) => trap.to_string(),
        None => error.root_cause().to_string(),
    };
    if let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() {
        let names = backtrace.frames().iter().take(TRAP_FRAMES_MAX).map(|frame| match frame.func_name() {
            Some(name) => name.chars().take(100).collect(),
            None => format!("function {}", frame.func_index()),
        });
        for (index, name) in names.enumerate() {
            let _ = write!(message, "{}{name}", if index == 0 { " in " } else { " < " });
        }
    }
    message.chars().take(TRAP_MESSAGE_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
