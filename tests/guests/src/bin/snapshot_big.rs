//! Saves a small state, then one of n bytes, n from its message, and replies with what it was told.

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::number;

fn main() {
    th::run(|turn: Turn| {
        turn.save_bytes(b"small")?;
        let told = turn.save_bytes(&vec![b's'; number(turn.text(), 1024) as usize]);
        turn.say(&format!("{told:?}"))?;
        Ok(())
    });
}
