//! Grows its memory page by page until it is refused, writes to the last page that it got, and replies with the number of bytes it then has.

#[cfg(target_family = "wasm")]
fn main() {
    use core::arch::wasm32::{memory_grow, memory_size};

    while memory_grow::<0>(1) != usize::MAX {}
    println!("{}", memory_size::<0>() as u64 * 65_536);
}

#[cfg(not(target_family = "wasm"))]
fn main() {}
