//! Tells the same status for ever, every 10 ms (or as its message says). That is no progress.

use std::{thread, time::Duration};

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::number;

fn main() {
    th::run(|turn: Turn| {
        let pause = Duration::from_millis(number(turn.text(), 10));
        loop {
            // Also when it has no events left.
            let _ = turn.status("still working");
            thread::sleep(pause);
        }
    });
}
