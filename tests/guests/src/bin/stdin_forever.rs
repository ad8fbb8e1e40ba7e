//! Reads its standard input for ever, also when it has ended.

use std::io::Read as _;

fn main() {
    let mut byte = [0];
    loop {
        let _ = std::io::stdin().read(&mut byte);
    }
}
