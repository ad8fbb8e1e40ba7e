//! Counts the turns of its conversation in its state, and replies with the count.

use turnhouse_guest::{self as th, Turn};

fn main() {
    th::run(|turn: Turn| {
        let before: u64 = match turn.state_bytes()? {
            Some(state) => str::from_utf8(&state)?.parse()?,
            None => 0,
        };
        let count = (before + 1).to_string();
        turn.save_bytes(count.as_bytes())?;
        turn.say(&count)?;
        Ok(())
    });
}
