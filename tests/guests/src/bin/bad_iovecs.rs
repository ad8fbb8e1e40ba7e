//! Passes arrays of absurd length, or vectors outside its memory, to `fd_write` and `fd_read`: which trick, 0 to 7, is the number in its message. Replies
//! with the errno, where the host does not trap.

use turnhouse_test_guests::{
    message, number,
    raw::{address, memory_bytes, wasi},
};

const STDIN: i32 = 0;
const STDERR: i32 = 2;

fn main() {
    let mut count = 0u32;
    let count_at = address(&raw mut count);
    let over_the_end = memory_bytes().wrapping_sub(1) as u32;
    // Two vectors, (pointer, length): over the end of the memory, and as far out as can be.
    let wild = [over_the_end, 1024, 0xffff_ffff, 0xffff_ffff];
    let wild_at = address(wild.as_ptr());
    let good = [address(b"e".as_ptr()), 1];
    let errno = match number(&message(), 0) {
        0 => wasi::fd_write(STDERR, wild_at, -1, count_at),
        1 => wasi::fd_write(STDERR, wild_at, 0x1000_0000, count_at),
        2 => wasi::fd_write(STDERR, wild_at, 2, count_at),
        3 => wasi::fd_write(STDERR, -8, 1, count_at),
        4 => wasi::fd_write(STDERR, address(good.as_ptr()), 1, -2),
        5 => wasi::fd_read(STDIN, wild_at, -1, count_at),
        6 => wasi::fd_read(STDIN, wild_at, 2, count_at),
        _ => wasi::fd_read(STDIN, -8, 1, count_at),
    };
    println!("errno {errno}");
}
