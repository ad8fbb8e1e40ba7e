//! Tells a story word by word, with a pause after each word. Shows streaming: many deltas over some seconds, statuses between.
//!
//! "story 40 words at 50 ms" sets length and pace; what is not said is 60 words and 50 ms.

use std::thread;
use std::time::Duration;

use turnhouse_guest::{self as th, Turn, WorkerResult};

const WORDS_USUAL: u64 = 60;
const WORDS_MAX: u64 = 2_000;
const PACE_MS_USUAL: u64 = 50;
const PACE_MS_MAX: u64 = 5_000;
/// Longer stories are told faster: a turn has 60 s by default, and an end is better than a good pace.
const STORY_MS_MAX: u64 = 50_000;

/// Told again from the beginning when more words are asked for.
const STORY: &str = "Once, on the last rock before the open sea, there stood a lighthouse whose keeper had forgotten why it was built. \
    Every evening she climbed the ninety steps, lit the lamp, and wrote one line in the log: nobody came. \
    One night the fog was so thick that the light could not see its own foot. \
    Then a small voice called from below, asking which way the harbour was. \
    The keeper answered, and the voice went on, and after it another, and another, until morning. \
    That day she wrote a longer line: they were always there, it was only that nobody had asked. \
    And she climbed down, cleaned the glass, and slept until it was time to begin again.";

fn main() {
    th::run(worker);
}

fn worker(turn: Turn) -> WorkerResult {
    let plan = Plan::from_message(turn.text());
    turn.status("remembering how it begins")?;
    for (told, word) in STORY.split_whitespace().cycle().take(plan.words as usize).enumerate() {
        // Between two words, so that the last one is not followed by silence.
        if told > 0 {
            thread::sleep(Duration::from_millis(plan.pace_ms));
        }
        if told as u64 == plan.words / 3 {
            turn.status("in the middle of it")?;
        }
        if told as u64 == plan.words * 2 / 3 {
            turn.status("coming to the end")?;
        }
        let space = if told > 0 { " " } else { "" };
        turn.say(&format!("{space}{word}"))?;
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
struct Plan {
    words: u64,
    pace_ms: u64,
}

impl Plan {
    /// The number before "word" or "words" and the number before "ms", within bounds.
    fn from_message(message: &str) -> Plan {
        let words = number_before(message, &["word", "words"]).unwrap_or(WORDS_USUAL).clamp(1, WORDS_MAX);
        let pace_ms = number_before(message, &["ms"]).unwrap_or(PACE_MS_USUAL).min(PACE_MS_MAX);
        Plan { words, pace_ms: pace_ms.min(STORY_MS_MAX / words) }
    }
}

/// `7 units` or `7units`. A number too large for 64 bits is the largest.
fn number_before(message: &str, units: &[&str]) -> Option<u64> {
    let message = message.to_lowercase();
    let mut number = None;
    for word in message.split(|c: char| !c.is_alphanumeric()) {
        let (digits, unit) = word.split_at(word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len()));
        if !digits.is_empty() {
            number = Some(digits.parse().unwrap_or(u64::MAX));
        }
        if units.contains(&unit) && number.is_some() {
            return number;
        }
        if !unit.is_empty() {
            number = None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use turnhouse_guest::testing;

    use super::*;

    #[test]
    fn the_story_has_as_many_words_as_asked_and_streams_them() {
        let report = testing::turn("story 200 words at 0 ms").run(worker);
        let text = report.text();
        assert_eq!(text.split(' ').count(), 200);
        assert!(text.starts_with("Once, on the last rock"));
        assert_eq!(report.deltas.len(), 200);
        assert_eq!(report.statuses, ["remembering how it begins", "in the middle of it", "coming to the end"]);
    }

    #[test]
    fn one_word_is_a_story_too() {
        assert_eq!(testing::turn("1 word").run(worker).text(), "Once,");
    }

    #[test]
    fn length_and_pace_are_read_from_the_message_within_bounds() {
        for (message, words, pace_ms) in [
            ("tell me a story", 60, 50),
            ("story 40 words at 50 ms", 40, 50),
            ("at 20ms, 10 Words!", 10, 20),
            ("0 words", 1, 50),
            ("99999999999999999999999 words at 99999999999999999999999 ms", 2_000, 25),
            ("3 words at 60000 ms", 3, 5_000),
            ("7 dwarfs and some words", 60, 50),
        ] {
            assert_eq!(Plan::from_message(message), Plan { words, pace_ms }, "{message}");
        }
    }
}
