//! Loops for ever on a host function that does nothing; with "clock" in its message, on one of WASI's.

use std::time::Instant;

use turnhouse_test_guests::{message, raw::turnhouse, says};

fn main() {
    let on_clock = says(&message(), "clock");
    loop {
        if on_clock {
            let _ = Instant::now();
        } else {
            turnhouse::abi_revision();
        }
    }
}
