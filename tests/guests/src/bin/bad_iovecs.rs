//! Passes arrays of absurd length and vectors outside its memory to `fd_write` and `fd_read`, then replies. A host may trap on any of them.

use turnhouse_test_guests::raw::{address, memory_bytes, wasi};

const STDIN: i32 = 0;
const STDERR: i32 = 2;

fn main() {
    let mut count = 0u32;
    let count_at = address(&raw mut count);
    let end = memory_bytes() as u32;
    let wild = [end - 1, 1024, 0xffff_ffff, 0xffff_ffff];
    let wild_at = address(wild.as_ptr());
    let results = [
        wasi::fd_write(STDERR, wild_at, -1, count_at),
        wasi::fd_write(STDERR, wild_at, 0x1000_0000, count_at),
        wasi::fd_write(STDERR, wild_at, 2, count_at),
        wasi::fd_write(STDERR, -8, 1, count_at),
        wasi::fd_write(STDERR, wild_at, 1, -2),
        wasi::fd_read(STDIN, wild_at, -1, count_at),
        wasi::fd_read(STDIN, wild_at, 2, count_at),
        wasi::fd_read(STDIN, -8, 1, count_at),
    ];
    println!("errnos {results:?}");
}
