//! What the tests' guests share: reading their message, numbers in it, and the raw imports for those that misuse them.
//!
//! Each program in `src/bin` shows the host one behaviour, and says which in its first line. Where a program takes settings, they are the
//! numbers and words of its message. They are built by `turnhouse-workers`; natively they only have to compile.

pub mod raw;

use std::io::Read as _;

/// The message of a plain guest: its standard input.
pub fn message() -> String {
    let mut message = String::new();
    std::io::stdin().read_to_string(&mut message).expect("the message is UTF-8");
    message
}

/// The numbers in a message, in order.
pub fn numbers(message: &str) -> impl Iterator<Item = u64> {
    message.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok())
}

/// The first number in a message.
pub fn number(message: &str, otherwise: u64) -> u64 {
    numbers(message).next().unwrap_or(otherwise)
}

/// Whether the message has this word.
pub fn says(message: &str, word: &str) -> bool {
    message.split_whitespace().any(|said| said == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_from_a_message() {
        assert_eq!(numbers("3 times, every 20ms").collect::<Vec<_>>(), [3, 20]);
        assert_eq!((number("reply 7", 1), number("reply", 1)), (7, 1));
        assert!(says("1000 deltas", "deltas") && !says("1000 deltas", "delta"));
    }
}
