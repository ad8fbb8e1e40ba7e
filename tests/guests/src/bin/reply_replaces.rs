//! Streams a draft, then replies with something else.

use turnhouse_guest::{self as th, Turn};

fn main() {
    th::run(|turn: Turn| {
        turn.say("a draft")?;
        turn.reply("the reply")?;
        // Not a part of the reply, since this guest speaks through the host's functions.
        println!("to the log");
        Ok(())
    });
}
