//! Waits for a `host.echo` that answers after n ms, n from its message (1 000 if it has none); replies with the frames. Kept small: thousands wait at once.

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::number;

fn main() {
    th::run(|turn: Turn| {
        let request = serde_json::json!({ "frames": ["waited"], "delay_ms": number(turn.text(), 1_000) });
        let mut echo = turn.call("host.echo", &request)?;
        echo.recv()?.ok_or("no head")?;
        while let Some(frame) = echo.recv()? {
            turn.say(str::from_utf8(&frame)?)?;
        }
        Ok(())
    });
}
