//! Emits for ever, whatever it is told: deltas of 1 KiB; with "status" in its message statuses, with "events" events of its own.

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::says;

fn main() {
    th::run(|turn: Turn| {
        let text = "f".repeat(1024);
        let (statuses, events) = (says(turn.text(), "status"), says(turn.text(), "events"));
        let mut count = 0_u64;
        loop {
            count += 1;
            let _ = match (statuses, events) {
                (true, _) => turn.status(&count.to_string()),
                (_, true) => turn.emit("x.flood", &text),
                _ => turn.say(&text),
            };
        }
    });
}
