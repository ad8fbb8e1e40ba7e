//! Saves a state of 8 KiB that is different in every turn and hard to compress, and replies with the number of the turn.

use turnhouse_guest::{self as th, Turn};

const STATE_BYTES: usize = 8 * 1024;

fn main() {
    th::run(|turn: Turn| {
        let before = match turn.state_bytes()? {
            Some(state) => u64::from_le_bytes(*state.first_chunk().ok_or("the state is too short")?),
            None => 0,
        };
        let count = before + 1;
        let mut state = Vec::with_capacity(STATE_BYTES);
        state.extend_from_slice(&count.to_le_bytes());
        let mut word = count.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        while state.len() < STATE_BYTES {
            // xorshift64: its only zero is the seed zero, and the seed is odd times the count.
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            state.extend_from_slice(&word.to_le_bytes());
        }
        turn.save_bytes(&state)?;
        turn.say(&count.to_string())?;
        Ok(())
    });
}
