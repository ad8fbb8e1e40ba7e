//! Opens files in its private directory until it may not, keeps them open, and replies with how many there are and what it was told.

use std::fs::File;

fn main() {
    let mut open = Vec::new();
    let error = loop {
        // One file over and over: what runs out is descriptors, not files.
        match File::options().create(true).append(true).open("/file") {
            Ok(file) => open.push(file),
            Err(error) => break error,
        }
    };
    println!("{} open, then: {error}", open.len());
}
