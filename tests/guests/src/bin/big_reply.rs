//! Replies with n bytes, n from its message; with "deltas" it streams them, a second number being the size of each.

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::{numbers, says};

fn main() {
    th::run(|turn: Turn| {
        let mut numbers = numbers(turn.text());
        let bytes = numbers.next().unwrap_or(1024) as usize;
        if !says(turn.text(), "deltas") {
            return Ok(turn.reply(&"r".repeat(bytes))?);
        }
        let each = numbers.next().unwrap_or(1024).max(1) as usize;
        let delta = "d".repeat(each);
        let mut left = bytes;
        while left > 0 {
            let now = left.min(each);
            turn.say(&delta[..now])?;
            left -= now;
        }
        Ok(())
    });
}
