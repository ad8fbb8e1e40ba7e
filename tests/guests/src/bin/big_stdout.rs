//! Writes n bytes to its standard output, n from its message.

use std::io::Write as _;

use turnhouse_test_guests::{message, number};

fn main() -> std::io::Result<()> {
    let bytes = number(&message(), 1024) as usize;
    std::io::stdout().write_all(&vec![b's'; bytes])
}
