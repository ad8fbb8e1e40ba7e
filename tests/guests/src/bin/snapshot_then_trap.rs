//! Saves its message as its state and traps; if its message is "read", replies with the state instead.

use turnhouse_guest::{self as th, Turn};

fn main() {
    th::run(|turn: Turn| {
        if turn.text() == "read" {
            let state = turn.state_bytes()?;
            turn.say(&format!("{:?}", state.map(|state| String::from_utf8_lossy(&state).into_owned())))?;
            return Ok(());
        }
        turn.save_bytes(turn.text().as_bytes())?;
        turn.say("saved")?;
        std::process::abort();
    });
}
