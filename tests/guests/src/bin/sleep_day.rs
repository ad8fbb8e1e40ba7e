//! Sleeps for a day in one `poll_oneoff`.

use std::{thread, time::Duration};

fn main() {
    thread::sleep(Duration::from_secs(24 * 60 * 60));
    println!("good morning");
}
