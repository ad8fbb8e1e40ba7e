//! Writes to its standard error for ever, whatever becomes of it.

use std::io::Write as _;

fn main() {
    let chunk = [b'e'; 16 * 1024];
    loop {
        let _ = std::io::stderr().write_all(&chunk);
    }
}
