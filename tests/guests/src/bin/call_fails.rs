//! Calls a `host.echo` that fails, and replies with what it is told; with "give up" in its message, fails with it.

use turnhouse_guest::{self as th, Turn};

fn main() {
    th::run(|turn: Turn| {
        let request = serde_json::json!({ "frames": ["a"], "delay_ms": 1, "fail": true });
        let mut echo = turn.call("host.echo", &request)?;
        loop {
            match echo.recv() {
                Ok(Some(frame)) => turn.say(&format!("frame {}; ", String::from_utf8_lossy(&frame)))?,
                Ok(None) => return Ok(turn.say("ended")?),
                Err(error) if turn.text() == "give up" => return Err(error.into()),
                Err(th::Error::Operation(failure)) => {
                    return Ok(turn.say(&format!("code {} retryable {}", failure.code, failure.retryable))?);
                }
                Err(error) => return Ok(turn.say(&format!("error {error:?}"))?),
            }
        }
    });
}
