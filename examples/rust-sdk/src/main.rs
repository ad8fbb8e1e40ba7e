//! Remembers how many messages there were and the name that it was told. Its state is two lines, count and name, as in every other example:
//! each goes on where another left off. A worker that shares its state with nobody saves any `serde` type instead, with `turn.save`.

use std::fmt;

use turnhouse_guest::{self as th, Turn, WorkerResult};

fn main() {
    th::run(worker);
}

fn worker(turn: Turn) -> WorkerResult {
    let mut memory = match turn.state_bytes()? {
        // An error ends the turn, and the state stays as it was: better than to answer as if nothing had been said.
        Some(state) => Memory::parse(&String::from_utf8(state)?)?,
        None => Memory::default(),
    };
    let answer = memory.answer(turn.text());
    // Counts only if the turn completes. Without a conversation there is nowhere to save, which is no error: see `th::Saved`.
    turn.save_bytes(memory.to_string().as_bytes())?;
    turn.say(&answer)?;
    Ok(())
}

#[derive(Debug, Default, PartialEq)]
struct Memory {
    count: u64,
    /// Empty until it is told.
    name: String,
}

impl Memory {
    fn parse(state: &str) -> Result<Memory, Box<dyn std::error::Error>> {
        let mut lines = state.split('\n');
        let (Some(count), Some(name)) = (lines.next(), lines.next()) else {
            return Err("the state is not two lines, count and name".into());
        };
        Ok(Memory { count: count.parse()?, name: name.to_owned() })
    }

    fn answer(&mut self, message: &str) -> String {
        self.count += 1;
        let (count, name) = (self.count, &mut self.name);
        if let Some(told) = message.strip_prefix("my name is ") {
            // A name is one line of the state.
            *name = told.split('\n').next().unwrap_or_default().to_owned();
            format!("Hello {name}, this is message {count}.")
        } else if message != "what is my name?" {
            format!("You said: {message}; this is message {count}.")
        } else if name.is_empty() {
            format!("I do not know your name; this is message {count}.")
        } else {
            format!("You are {name}; this is message {count}.")
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}", self.count, self.name)
    }
}

#[cfg(test)]
mod tests {
    use turnhouse_guest::testing;

    use super::*;

    #[test]
    fn it_remembers_a_name_and_counts() {
        let first = testing::turn("my name is Ada").run(worker);
        assert_eq!(first.text(), "Hello Ada, this is message 1.");
        assert_eq!(first.saved.as_deref(), Some(&b"1\nAda\n"[..]));

        let second = testing::turn("what is my name?").state_bytes("1\nAda\n").run(worker);
        assert_eq!(second.text(), "You are Ada; this is message 2.");
    }

    #[test]
    fn a_state_that_it_cannot_read_ends_the_turn() {
        let report = testing::turn("hello").state_bytes("Ada").run(worker);
        assert!(report.error.is_some());
        assert_eq!(report.saved, None);
    }
}
