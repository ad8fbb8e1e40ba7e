//! Polls a `host.echo` of 200 ms (or as its message says), waits for it for 10 ms, then without limit; replies with the three answers.

use std::time::Duration;

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::number;

fn main() {
    th::run(|turn: Turn| {
        let request = serde_json::json!({ "frames": ["late"], "delay_ms": number(turn.text(), 200) });
        let mut echo = turn.call("host.echo", &request)?;
        let polled = echo.try_recv();
        let waited_any = th::wait_any([&echo], Some(Duration::from_millis(5)));
        let waited = echo.recv_timeout(Duration::from_millis(5));
        let head = echo.recv()?.map(|frame| String::from_utf8_lossy(&frame).into_owned());
        let frame = echo.recv()?.map(|frame| String::from_utf8_lossy(&frame).into_owned());
        let end = echo.recv()?;
        turn.say(&format!("{polled:?} {waited_any:?} {waited:?} {head:?} {frame:?} {end:?}"))?;
        Ok(())
    });
}
