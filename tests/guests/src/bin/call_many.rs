//! Starts n `host.echo`s, n from its message; at once, or with "sequential" one after the other. A second number is the delay of each in ms. Replies
//! with how many were started, how many answered, and why the first that was refused was.

use turnhouse_guest::{self as th, Turn};
use turnhouse_test_guests::{numbers, says};

fn main() {
    th::run(|turn: Turn| {
        let mut numbers = numbers(turn.text());
        let count = numbers.next().unwrap_or(8);
        let request = serde_json::json!({ "frames": ["a"], "delay_ms": numbers.next().unwrap_or(1) });
        let sequential = says(turn.text(), "sequential");
        let (mut open, mut started, mut answered, mut refused) = (vec![], 0, 0, None);
        for _ in 0..count {
            match turn.call("host.echo", &request) {
                Ok(echo) => {
                    started += 1;
                    open.push(echo);
                }
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
            if sequential {
                answered += answers(open.drain(..))?;
            }
        }
        while !open.is_empty() {
            let first = th::wait_any(&open, None)?;
            answered += answers(open.drain(first..=first))?;
        }
        turn.say(&format!("started {started} answered {answered} refused {refused:?}"))?;
        Ok(())
    });
}

fn answers(operations: impl Iterator<Item = th::Operation>) -> Result<u32, th::Error> {
    let mut answered = 0;
    for mut operation in operations {
        while operation.recv()?.is_some() {}
        answered += 1;
    }
    Ok(answered)
}
