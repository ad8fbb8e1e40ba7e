//! Fills nearly all the memory that it may have in one instruction, again and again; with "copy" in its message it copies one half of it over the other. Between
//! two such instructions no clock is looked at.

use std::hint::black_box;

use turnhouse_test_guests::{message, says};

/// Of the 64 MiB that a guest has by default.
const BYTES: usize = 60 << 20;

fn main() {
    let copies = says(&message(), "copy");
    let mut memory = vec![0u8; BYTES];
    loop {
        if copies {
            let (from, to) = black_box(&mut memory[..]).split_at_mut(BYTES / 2);
            to.copy_from_slice(from);
        } else {
            black_box(&mut memory[..]).fill(165);
        }
    }
}
