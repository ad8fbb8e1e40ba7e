//! Remembers what it is told. Its state is the list of notes, saved at the end of each turn and found again at the start of the next.
//!
//! "remember the milk" (or just "the milk") adds a note, "what do you know?" lists them, "forget the milk" drops the notes that mention the milk,
//! "forget" drops all.

use serde::{Deserialize, Serialize};
use turnhouse_guest::{self as th, Error, Turn, WorkerResult};

/// When there are more, the oldest goes.
const NOTES_MAX: usize = 500;

fn main() {
    th::run(worker);
}

fn worker(turn: Turn) -> WorkerResult {
    let mut notes: Notes = turn.state()?.unwrap_or_default();
    let answer = notes.hear(turn.text());
    // Saved before anything is said: what the client reads as "noted" is then really staged.
    match turn.save(&notes) {
        Ok(_) => {}
        Err(Error::TooBig) => {
            turn.say("That is more than I can keep. I left my notes as they were.")?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    }
    for line in answer {
        turn.say(&line)?;
    }
    Ok(())
}

/// The state. With `default`, a field that a later version adds does not make older states unreadable.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Notes {
    notes: Vec<String>,
}

impl Notes {
    /// Does what the message asks and answers in pieces, which the caller streams.
    fn hear(&mut self, message: &str) -> Vec<String> {
        let message = message.trim();
        if message.is_empty() {
            return vec!["Tell me something, and I will remember it.".into()];
        }
        if is_question(message) {
            return self.list();
        }
        if let Some(what) = after_word(message, "forget") {
            return vec![self.forget(what)];
        }
        let note = after_word(message, "remember").filter(|note| !note.is_empty()).unwrap_or(message);
        self.remember(note)
    }

    fn remember(&mut self, note: &str) -> Vec<String> {
        let mut answer = vec![];
        if self.notes.len() == NOTES_MAX {
            let oldest = self.notes.remove(0);
            answer.push(format!("My book is full, so I let go of the oldest note: {oldest}\n"));
        }
        self.notes.push(note.to_owned());
        answer.push("Noted. ".into());
        answer.push(format!("I now know {}.", things(self.notes.len())));
        answer
    }

    fn forget(&mut self, what: &str) -> String {
        let before = self.notes.len();
        match what {
            "" | "everything" | "all" => self.notes.clear(),
            _ => self.notes.retain(|note| !note.to_lowercase().contains(&what.to_lowercase())),
        }
        match before - self.notes.len() {
            0 => "There was nothing to forget.".into(),
            gone => format!("Forgotten: {}. {} left.", things(gone), things(self.notes.len())),
        }
    }

    fn list(&self) -> Vec<String> {
        if self.notes.is_empty() {
            return vec!["Nothing yet. Tell me something, and I will remember it.".into()];
        }
        let heading = format!("I know {}:", things(self.notes.len()));
        let lines = self.notes.iter().enumerate().map(|(at, note)| format!("\n{}. {note}", at + 1));
        std::iter::once(heading).chain(lines).collect()
    }
}

fn is_question(message: &str) -> bool {
    let message = message.to_lowercase();
    ["what do you know", "what do you remember", "list"].contains(&message.trim_end_matches(['?', '!', '.', ' ']))
}

/// What follows the word that the message begins with, without the dot at its end.
fn after_word<'a>(message: &'a str, word: &str) -> Option<&'a str> {
    let (first, rest) = message.split_once(char::is_whitespace).unwrap_or((message.trim_end_matches(['.', '!']), ""));
    first.trim_end_matches([':', ',']).eq_ignore_ascii_case(word).then(|| rest.trim().trim_end_matches('.'))
}

fn things(count: usize) -> String {
    match count {
        1 => "1 thing".into(),
        count => format!("{count} things"),
    }
}

#[cfg(test)]
mod tests {
    use turnhouse_guest::testing;

    use super::*;

    fn notes(notes: &[&str]) -> Notes {
        Notes { notes: notes.iter().map(|note| note.to_string()).collect() }
    }

    #[test]
    fn what_is_told_is_remembered_and_listed() {
        let first = testing::turn("Remember the milk.").run(worker);
        assert_eq!(first.text(), "Noted. I now know 1 thing.");
        assert_eq!(first.deltas.len(), 2, "the answer streams");
        let second = testing::turn("the door is blue").state_bytes(first.saved.unwrap()).run(worker);
        let third = testing::turn("What do you know?").state_bytes(second.saved.unwrap()).run(worker);
        assert_eq!(third.text(), "I know 2 things:\n1. the milk\n2. the door is blue");
    }

    #[test]
    fn forgetting_takes_what_is_named_or_everything() {
        let known = notes(&["the milk", "the Milky Way", "the door"]);
        let report = testing::turn("forget milk").state(&known).run(worker);
        assert_eq!(report.text(), "Forgotten: 2 things. 1 thing left.");
        assert_eq!(report.state(), Some(notes(&["the door"])));
        let report = testing::turn("Forget!").state(&known).run(worker);
        assert_eq!(report.state(), Some(notes(&[])));
        assert_eq!(testing::turn("forget cheese").state(&known).run(worker).text(), "There was nothing to forget.");
    }

    #[test]
    fn a_note_that_only_looks_like_a_command_is_noted() {
        for message in ["remember", "forgetful people", "what do you know about milk?"] {
            let report = testing::turn(message).run(worker);
            assert_eq!(report.state(), Some(notes(&[message])));
        }
    }

    #[test]
    fn a_full_book_lets_go_of_the_oldest_note() {
        let full = Notes { notes: (0..NOTES_MAX).map(|at| format!("note {at}")).collect() };
        let report = testing::turn("one more").state(&full).run(worker);
        assert!(report.text().starts_with("My book is full, so I let go of the oldest note: note 0\n"));
        assert_eq!(report.state::<Notes>().unwrap().notes.len(), NOTES_MAX);
    }

    #[test]
    fn notes_that_are_too_big_to_save_are_said_to_be_so() {
        let report = testing::turn("a long story").state_bytes_max(10).run(worker);
        assert!(report.text().starts_with("That is more than I can keep."));
        assert_eq!(report.saved, None);
    }

    #[test]
    fn a_private_turn_answers_all_the_same() {
        assert_eq!(testing::turn("remember me").private().run(worker).text(), "Noted. I now know 1 thing.");
    }

    #[test]
    fn a_state_that_cannot_be_read_fails_the_turn_and_stays() {
        let report = testing::turn("hello").state_bytes(*b"\x00").run(worker);
        assert!(report.error.is_some());
        assert_eq!(report.saved, None);
    }
}
