//! The import module `turnhouse_v1`, as a guest sees it: registration, the memory it points into, and the order of errors.
//!
//! Guest input is hostile: every pointer and length is checked in 64 bits against the memory as it is now, nothing is allocated before it is
//! bounded, and no view of the memory lives across an await. Host functions run on what the guest's native stack has left: no recursion, no
//! big arrays. `input.rs`, `attachments.rs`, `speak.rs` and `operate.rs` hold the functions.

mod attachments;
mod input;
mod operate;
mod speak;

use std::ops::Range;

use wasmtime::{Caller, Linker};
use wasmtime_wasi::I32Exit;

use super::guest::Guest;
use super::outcome::End;

/// The module's name.
pub(super) const MODULE: &str = "turnhouse_v1";

/// Importing one of these makes a module speak through the host's functions instead of standard output.
pub(super) const SPEAKING: [&str; 2] = ["emit", "reply"];

/// Functions are only ever added; this counts how often.
const ABI_REVISION: i32 = 2;

/// WASI preview 1's numbers; a guest sees them negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Errno {
    TooBig = 1,
    #[expect(dead_code, reason = "part of the ABI; no operation is denied by settings yet")]
    Acces = 2,
    Again = 6,
    Badf = 8,
    Fault = 21,
    Ilseq = 25,
    Inval = 28,
    Io = 29,
    Mfile = 33,
    Nobufs = 42,
    Noent = 44,
    Nosys = 52,
    Perm = 63,
    TimedOut = 73,
}

/// Why a host function has no result: the guest is told, or the guest ends.
#[derive(Debug)]
enum Refusal {
    Errno(Errno),
    End(wasmtime::Error),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Refusal {
        Refusal::Errno(errno)
    }
}

impl From<End> for Refusal {
    fn from(end: End) -> Refusal {
        Refusal::End(end.into())
    }
}

impl From<wasmtime::Error> for Refusal {
    fn from(error: wasmtime::Error) -> Refusal {
        Refusal::End(error)
    }
}

type Answer = Result<i32, Refusal>;

fn answer(answer: Answer) -> wasmtime::Result<i32> {
    match answer {
        Ok(value) => Ok(value),
        Err(Refusal::Errno(errno)) => Ok(-(errno as i32)),
        Err(Refusal::End(error)) => Err(error),
    }
}

/// Adds `turnhouse_v1`, and corrects two functions of WASI.
pub(super) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    input::add_to_linker(linker)?;
    attachments::add_to_linker(linker)?;
    speak::add_to_linker(linker)?;
    operate::add_to_linker(linker)?;
    linker.func_wrap(MODULE, "abi_revision", |mut caller: Caller<'_, Guest>| -> wasmtime::Result<i32> {
        caller.data_mut().count_call()?;
        Ok(ABI_REVISION)
    })?;
    correct_wasi(linker)
}

fn correct_wasi(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    const WASI: &str = "wasi_snapshot_preview1";
    linker.allow_shadowing(true);
    // The stock function answers a code of 126 or more with an error that no longer has the code.
    linker.func_wrap(WASI, "proc_exit", |code: i32| -> wasmtime::Result<()> { Err(I32Exit(code).into()) })?;
    // The stock function collects byte by byte, and ends the guest with an error that names no limit.
    linker.func_wrap(
        WASI,
        "random_get",
        |mut caller: Caller<'_, Guest>, ptr: u32, len: u32| -> wasmtime::Result<i32> {
            let random_bytes_max = caller.data().limits.random_bytes_max;
            if u64::from(len) > random_bytes_max {
                return Err(End::RandomLimit { random_bytes_max }.into());
            }
            let (memory, _) = view(&mut caller)?;
            let Ok(range) = range(memory, ptr, len) else { return Ok(Errno::Fault as i32) };
            getrandom::fill(&mut memory[range]).map_err(|error| wasmtime::Error::msg(error.to_string()))?;
            Ok(0)
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

/// The guest's memory as it is now, and its state.
pub(super) fn view<'a>(caller: &'a mut Caller<'_, Guest>) -> wasmtime::Result<(&'a mut [u8], &'a mut Guest)> {
    let export = caller.data().memory;
    let memory = export
        .and_then(|export| caller.get_module_export(&export))
        .and_then(wasmtime::Extern::into_memory)
        .ok_or_else(|| wasmtime::Error::msg("the module's memory was checked at upload and is gone"))?;
    Ok(memory.data_and_store_mut(caller))
}

/// Counts the call and gives the view.
fn enter<'a>(caller: &'a mut Caller<'_, Guest>) -> wasmtime::Result<(&'a mut [u8], &'a mut Guest)> {
    caller.data_mut().count_call()?;
    view(caller)
}

/// The bytes that a guest points at. With length 0 the pointer is ignored.
fn range(memory: &[u8], ptr: u32, len: u32) -> Result<Range<usize>, Errno> {
    if len == 0 {
        return Ok(0..0);
    }
    let end = u64::from(ptr) + u64::from(len);
    if end > memory.len() as u64 {
        return Err(Errno::Fault);
    }
    Ok(ptr as usize..end as usize)
}

/// A text that is over its limit is read all the same up to this size, so that what is no text, or no JSON, is told as that. One over this, too, is
/// refused unread: to look through all that a guest's memory can hold would keep its thread from everybody else for a third of a second.
const READ_BYTES_MIN: usize = 1024 * 1024;

/// The text that a guest points at; `bytes_max` is the most that may yet be accepted of it.
fn text(memory: &[u8], range: Range<usize>, bytes_max: usize) -> Result<&str, Errno> {
    hold_against(range.len(), bytes_max)?;
    std::str::from_utf8(&memory[range]).map_err(|_| Errno::Ilseq)
}

/// Refuses what is too large even to be read.
fn hold_against(len: usize, bytes_max: usize) -> Result<(), Errno> {
    if len > bytes_max.max(READ_BYTES_MIN) { Err(Errno::TooBig) } else { Ok(()) }
}

/// Copies what fits into the guest's buffer, counts it, and answers how much there is.
fn hand_in(guest: &Guest, memory: &mut [u8], into: Range<usize>, bytes: &[u8]) -> i32 {
    let copied = into.len().min(bytes.len());
    guest.shared.control.count_in(copied);
    memory[into.start..into.start + copied].copy_from_slice(&bytes[..copied]);
    length(bytes.len())
}

/// A length as a result. All that is copied to guests is bounded far below 2³¹.
fn length(len: usize) -> i32 {
    i32::try_from(len).unwrap_or(i32::MAX)
}
