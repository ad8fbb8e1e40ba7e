//! Writes to its standard output for ever, whatever becomes of it.

use std::io::Write as _;

fn main() {
    let chunk = [b'a'; 16 * 1024];
    loop {
        let _ = std::io::stdout().write_all(&chunk);
    }
}
