//! Says "tick" n times with a pause of m ms before each; n and m from its message ("10 ticks every 100").

use std::{thread, time::Duration};

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::numbers;

fn main() {
    th::run(|turn: Turn| {
        let mut numbers = numbers(turn.text());
        let (ticks, pause_ms) = (numbers.next().unwrap_or(10), numbers.next().unwrap_or(100));
        for _ in 0..ticks {
            thread::sleep(Duration::from_millis(pause_ms));
            turn.say("tick ")?;
        }
        Ok(())
    });
}
