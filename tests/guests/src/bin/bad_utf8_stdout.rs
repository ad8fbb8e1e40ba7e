//! Replies, on its standard output, with bytes that are not UTF-8.

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    std::io::stdout().write_all(b"caf\xe9 \xf0\x9f")
}
