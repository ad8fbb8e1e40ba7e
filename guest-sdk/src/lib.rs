//! What the author of a Turnhouse worker imports.
//!
//! A worker is a program for `wasm32-wasip1` that runs once per message: a *turn*. It starts fresh each time, in milliseconds less than one;
//! what it must remember it [saves](Turn::save). This crate gives it the turn: the message, the state, streaming, the reply, the
//! host's operations. It knows nothing of the host's inside and depends on `serde` only.
//!
//! ```no_run
//! use turnhouse_guest::{self as th, Turn};
//!
//! fn main() {
//!     th::run(|turn: Turn| {
//!         let mut notes: Vec<String> = turn.state()?.unwrap_or_default();
//!         notes.push(turn.text().to_owned());
//!         turn.status("thinking")?;
//!         for note in &notes {
//!             turn.say(note)?;
//!         }
//!         turn.save(&notes)?;
//!         Ok(())
//!     })
//! }
//! ```
//!
//! Build it with `cargo build --release --target wasm32-wasip1`, run it with `turnhouse run worker.wasm --message hello`. Link workers with a small
//! stack: in `.cargo/config.toml`, under `[target.wasm32-wasip1]`, `rustflags = ["-C", "link-arg=-zstack-size=131072"]`. What an instance
//! touches must be reset after each turn, and Rust's usual stack of 1 MiB is most of it.
//!
//! # What becomes the reply
//! - What the worker [says](Turn::say) streams, and joined it is the reply.
//! - A [`reply`](Turn::reply) replaces that; the last one wins.
//! - A worker that never names `say`, `status`, `emit` or `reply` replies through its standard output instead. One that does has its
//!   standard output in the turn's log, where `println!` is a way to debug.
//! - No reply at all, or an empty one, is a failed turn (`no_reply`).
//!
//! # How it ends
//! [`run`] returns when the closure gave `Ok`. On `Err` the error goes to the turn's log and the program exits with code 1; a panic is a trap. Either way the turn failed
//! and its state stays as it was: what was saved counts only with a completed turn. The host stops a turn that is cancelled or past a deadline without the worker noticing.
//!
//! # Testing
//! Off wasm, in `cargo test`, the same closure runs against a host that lives in the test's thread: see [`testing`].
//!
//! ```
//! use turnhouse_guest::{Turn, WorkerResult, testing};
//!
//! fn greeter(turn: Turn) -> WorkerResult {
//!     let met: u32 = turn.state()?.unwrap_or(0) + 1;
//!     turn.say(&format!("hello {}, for the {met}. time", turn.text()))?;
//!     turn.save(&met)?;
//!     Ok(())
//! }
//!
//! let report = testing::turn("Ada").state(&41).run(greeter);
//! assert_eq!(report.text(), "hello Ada, for the 42. time");
//! assert_eq!(report.state::<u32>(), Some(42));
//! ```

#![warn(missing_docs)]

mod turn;

mod attachment;

mod operation;

mod message;

mod error;

mod base64;

#[cfg(target_family = "wasm")]
mod sys;

#[cfg(not(target_family = "wasm"))]
pub mod testing;

#[cfg(not(target_family = "wasm"))]
use testing::fake as sys;

pub use attachment::Attachment;
pub use error::{Error, OperationError};
pub use message::{Input, Message, Origin, Part, Past, Role};
pub use operation::{Operation, wait_any};
pub use turn::{Level, Saved, Turn, WorkerResult, run};

/// How many functions of the interface this host knows, as a number that only grows: 1 is all but attachments, 2 is all that this crate calls.
pub fn abi_revision() -> u32 {
    sys::abi_revision().unsigned_abs()
}

/// The README's Rust is compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
