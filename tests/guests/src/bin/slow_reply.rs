//! Sleeps for as many ms as its message says, then replies with the message.

use std::{thread, time::Duration};

use turnhouse_test_guests::{message, number};

fn main() {
    let message = message();
    thread::sleep(Duration::from_millis(number(&message, 100)));
    print!("{message}");
}
