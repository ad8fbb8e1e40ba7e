//! The functions of the host that this worker calls, as safe functions on slices. Declare only what you call: `turnhouse.h` has the others.
#![allow(
    unsafe_code,
    reason = "imported functions are unsafe to call; each call below passes a live slice's pointer and length"
)]

/// −(WASI errno), the same for every function of the host.
pub type Errno = i32;

const NOENT: Errno = -44;
const PERM: Errno = -63;

mod imports {
    #[link(wasm_import_module = "turnhouse_v1")]
    unsafe extern "C" {
        pub fn message_read(ptr: *mut u8, cap: usize) -> i32;
        pub fn snapshot_read(ptr: *mut u8, cap: usize) -> i32;
        pub fn snapshot_write(ptr: *const u8, len: usize) -> i32;
        pub fn emit(kind_ptr: *const u8, kind_len: usize, ptr: *const u8, len: usize) -> i32;
    }
}

/// The message's text.
pub fn message() -> Result<Vec<u8>, Errno> {
    read_whole(imports::message_read)
}

/// What the last turn saved; `None` in the first.
pub fn state() -> Result<Option<Vec<u8>>, Errno> {
    match read_whole(imports::snapshot_read) {
        Err(NOENT) => Ok(None),
        read => read.map(Some),
    }
}

/// Saves the state for the next turn; it counts if this turn completes.
pub fn save(state: &[u8]) -> Result<(), Errno> {
    // SAFETY: the host reads `len` bytes at `ptr` and keeps no pointer.
    match check(unsafe { imports::snapshot_write(state.as_ptr(), state.len()) }) {
        // A turn without a conversation has nowhere to save, and can answer all the same.
        Err(PERM) => Ok(()),
        result => result,
    }
}

/// Streams the reply. An event is at most 64 KiB: longer text goes out in pieces.
pub fn say(text: &str) -> Result<(), Errno> {
    const KIND: &str = "output.delta";
    let mut rest = text;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.floor_char_boundary(32 * 1024));
        // SAFETY: as in `save`.
        check(unsafe { imports::emit(KIND.as_ptr(), KIND.len(), piece.as_ptr(), piece.len()) })?;
        rest = after;
    }
    Ok(())
}

/// A read copies what fits and returns the whole size: so it is asked for the size first.
fn read_whole(read: unsafe extern "C" fn(*mut u8, usize) -> i32) -> Result<Vec<u8>, Errno> {
    // SAFETY: with length 0 the host ignores the pointer.
    let size = unsafe { read(std::ptr::null_mut(), 0) };
    let mut bytes = vec![0; usize::try_from(size).map_err(|_| size)?];
    // SAFETY: the host writes at most `len` bytes at `ptr`, which is ours.
    check(unsafe { read(bytes.as_mut_ptr(), bytes.len()) })?;
    Ok(bytes)
}

fn check(result: i32) -> Result<(), Errno> {
    if result < 0 { Err(result) } else { Ok(()) }
}
