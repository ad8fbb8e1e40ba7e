//! Asks for a GiB of random bytes (or as many as its message says) at the start of a buffer of one page, and replies with WASI's errno.

use turnhouse_test_guests::{
    message, number,
    raw::{address, wasi},
};

fn main() {
    let bytes = number(&message(), 1 << 30);
    let mut page = vec![0u8; (bytes as usize).min(65_536)];
    println!("errno {}", wasi::random_get(address(page.as_mut_ptr()), bytes as u32 as i32));
}
