//! Calls the host 100 000 times (or as often as its message says), each call reading one byte, and replies with the count.

use turnhouse_test_guests::{
    number,
    raw::{self, address, turnhouse},
};

fn main() {
    let count = number(&raw::message(), 100_000);
    let mut byte = [0u8];
    let at = address(byte.as_mut_ptr());
    for _ in 0..count {
        turnhouse::message_read(at, 1);
    }
    raw::say(&count.to_string());
}
