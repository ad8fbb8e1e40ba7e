//! Writes nothing to its standard output, for ever; with "read" in its message it reads nothing from its input, with "vectors" each write has a quarter of
//! a million empty vectors, with "emit" it says nothing through the host's function. None of it is progress.

use turnhouse_test_guests::{
    raw::{self, address, span, turnhouse, wasi},
    says,
};

fn main() {
    let message = raw::message();
    let (reads, emits) = (says(&message, "read"), says(&message, "emit"));
    let vectors = vec![[0u32; 2]; if says(&message, "vectors") { 250_000 } else { 1 }];
    let (at, count) = (address(vectors.as_ptr()), vectors.len() as i32);
    let (delta, delta_len) = span(b"output.delta");
    let mut done = 0u32;
    let done_at = address(&raw mut done);
    loop {
        if emits {
            turnhouse::emit(delta, delta_len, 0, 0);
        } else if reads {
            wasi::fd_read(0, at, count, done_at);
        } else {
            wasi::fd_write(1, at, count, done_at);
        }
    }
}
