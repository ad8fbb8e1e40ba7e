//! The import module `turnhouse_v1`, function by function, as safe calls on slices.
//!
//! The only unsafe code of the crate. It owns the declarations and the slice → (ptr, len) step, nothing else: what a negative result
//! means is in `error.rs`. Native builds use `testing/fake.rs`, which has the same functions, in its place.
//!
//! The linker drops every import that a worker never reaches. That matters: a module that imports `emit` or `reply` speaks
//! through them and its stdout goes to the log, so nothing that every worker runs may refer to those two.
#![allow(
    unsafe_code,
    reason = "calls to imported functions are unsafe in Rust; each call below passes a pointer and the length of a live slice"
)]

mod imports {
    #[link(wasm_import_module = "turnhouse_v1")]
    unsafe extern "C" {
        pub safe fn abi_revision() -> i32;
        pub fn input_read(ptr: *mut u8, cap: usize) -> i32;
        pub fn message_read(ptr: *mut u8, cap: usize) -> i32;
        pub fn snapshot_read(ptr: *mut u8, cap: usize) -> i32;
        pub fn snapshot_write(ptr: *const u8, len: usize) -> i32;
        pub fn emit(kind_ptr: *const u8, kind_len: usize, ptr: *const u8, len: usize) -> i32;
        pub fn reply(ptr: *const u8, len: usize) -> i32;
        pub fn log(level: i32, ptr: *const u8, len: usize) -> i32;
        pub fn call(op_ptr: *const u8, op_len: usize, req_ptr: *const u8, req_len: usize) -> i32;
        pub fn recv(handle: i32, ptr: *mut u8, cap: usize, timeout_ms: i32) -> i32;
        pub fn error_read(handle: i32, ptr: *mut u8, cap: usize) -> i32;
        pub fn wait(handles_ptr: *const i32, count: usize, timeout_ms: i32) -> i32;
        pub safe fn close(handle: i32) -> i32;
        pub fn attachment_read(id_ptr: *const u8, id_len: usize, offset: u32, ptr: *mut u8, cap: usize) -> i32;
    }
}

pub(crate) use imports::{abi_revision, close};

pub(crate) fn input_read(into: &mut [u8]) -> i32 {
    // SAFETY: the host writes at most `into.len()` bytes at `into`, which is ours until the call returns. So in each function below.
    unsafe { imports::input_read(into.as_mut_ptr(), into.len()) }
}

pub(crate) fn message_read(into: &mut [u8]) -> i32 {
    // SAFETY: as in `input_read`.
    unsafe { imports::message_read(into.as_mut_ptr(), into.len()) }
}

pub(crate) fn snapshot_read(into: &mut [u8]) -> i32 {
    // SAFETY: as in `input_read`.
    unsafe { imports::snapshot_read(into.as_mut_ptr(), into.len()) }
}

pub(crate) fn attachment_read(id: &str, offset: u32, into: &mut [u8]) -> i32 {
    // SAFETY: as in `input_read`; the host reads the id before it writes, and the guest is suspended while it waits for its store.
    unsafe { imports::attachment_read(id.as_ptr(), id.len(), offset, into.as_mut_ptr(), into.len()) }
}

pub(crate) fn snapshot_write(state: &[u8]) -> i32 {
    // SAFETY: the host reads `state.len()` bytes at `state` and keeps no pointer. So in each function below that takes `&[u8]`.
    unsafe { imports::snapshot_write(state.as_ptr(), state.len()) }
}

pub(crate) fn emit(kind: &str, payload: &[u8]) -> i32 {
    // SAFETY: as in `snapshot_write`.
    unsafe { imports::emit(kind.as_ptr(), kind.len(), payload.as_ptr(), payload.len()) }
}

pub(crate) fn reply(json: &[u8]) -> i32 {
    // SAFETY: as in `snapshot_write`.
    unsafe { imports::reply(json.as_ptr(), json.len()) }
}

pub(crate) fn log(level: i32, line: &str) -> i32 {
    // SAFETY: as in `snapshot_write`.
    unsafe { imports::log(level, line.as_ptr(), line.len()) }
}

pub(crate) fn call(operation: &str, request: &[u8]) -> i32 {
    // SAFETY: as in `snapshot_write`; the host copies the request before it returns.
    unsafe { imports::call(operation.as_ptr(), operation.len(), request.as_ptr(), request.len()) }
}

pub(crate) fn recv(handle: i32, into: &mut [u8], timeout_ms: i32) -> i32 {
    // SAFETY: as in `input_read`; the guest is suspended while the host waits, so nobody else touches `into`.
    unsafe { imports::recv(handle, into.as_mut_ptr(), into.len(), timeout_ms) }
}

pub(crate) fn error_read(handle: i32, into: &mut [u8]) -> i32 {
    // SAFETY: as in `input_read`.
    unsafe { imports::error_read(handle, into.as_mut_ptr(), into.len()) }
}

pub(crate) fn wait(handles: &[i32], timeout_ms: i32) -> i32 {
    // SAFETY: the host reads `handles.len()` little-endian i32, which is how wasm stores them.
    unsafe { imports::wait(handles.as_ptr(), handles.len(), timeout_ms) }
}
