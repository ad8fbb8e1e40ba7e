//! Replies with the turn's input as the host wrote it, JSON and all.

use turnhouse_test_guests::raw::{self, address, turnhouse};

fn main() {
    let total = turnhouse::input_read(0, 0);
    let mut json = vec![0u8; usize::try_from(total).expect("the host tells the size")];
    turnhouse::input_read(address(json.as_mut_ptr()), total);
    raw::say(str::from_utf8(&json).expect("JSON is UTF-8"));
}
