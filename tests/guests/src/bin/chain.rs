//! Its state is a count and a hash over every message of its conversation that was answered: each reply shows what came before it, so that whoever has
//! the replies can tell whether they form one chain.
//!
//! The message is `<manner> <pieces> <pause_ms> <tag>`: `say 3 20 c1-7` answers in three pieces with a pause of 20 ms before each; `spin` and `trap` do so
//! after the state was saved, and must leave none; `mute` saves and says nothing.

use std::{thread, time::Duration};

use turnhouse_guest::{self as th, Turn, WorkerResult};

fn main() {
    th::run(worker);
}

fn worker(turn: Turn) -> WorkerResult {
    let message = turn.text();
    let (count, before) = match turn.state_bytes()? {
        Some(state) => read(str::from_utf8(&state)?).ok_or("the state is none of mine")?,
        None => (0, 0),
    };
    let (count, after) = (count + 1, next(before, message));
    turn.save_bytes(format!("{count} {after:016x}").as_bytes())?;
    let mut words = message.split_whitespace();
    let manner = words.next().unwrap_or_default();
    let mut number = || words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    let (pieces, pause_ms): (u64, u64) = (number(), number());
    if manner == "mute" {
        return Ok(());
    }
    turn.say(&format!("{count} {before:016x} {after:016x}"))?;
    for piece in 0..pieces {
        thread::sleep(Duration::from_millis(pause_ms));
        turn.say(&format!(" {piece}"))?;
    }
    match manner {
        "spin" => loop {
            std::hint::spin_loop();
        },
        "trap" => panic!("as asked"),
        _ => Ok(()),
    }
}

fn read(state: &str) -> Option<(u64, u64)> {
    let (count, hash) = state.split_once(' ')?;
    Some((count.parse().ok()?, u64::from_str_radix(hash, 16).ok()?))
}

/// FNV-1a over the hash so far and the message. `cargo xtask chaos` computes the same.
fn next(before: u64, message: &str) -> u64 {
    let bytes = before.to_le_bytes().into_iter().chain(message.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use turnhouse_guest::testing;

    use super::*;

    #[test]
    fn a_reply_names_what_came_before_it() {
        let first = testing::turn("say 2 0 a").run(worker);
        let after = format!("{:016x}", next(0, "say 2 0 a"));
        assert_eq!(first.text(), format!("1 0000000000000000 {after} 0 1"));
        let second = testing::turn("say 0 0 b").state_bytes(first.saved.unwrap()).run(worker);
        assert!(second.text().starts_with(&format!("2 {after} ")), "{}", second.text());
    }

    #[test]
    fn the_hash_is_the_one_that_the_checker_knows() {
        assert_eq!(next(0, "say 0 0 a"), 0xcf93_71b5_5431_f4f3);
    }
}
