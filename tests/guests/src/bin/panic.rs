//! Panics with a message of as many bytes as its own message says, else with that message.

use turnhouse_test_guests::{message, number};

fn main() {
    let message = message();
    match number(&message, 0) {
        0 => panic!("{message}"),
        bytes => panic!("{}", "p".repeat(bytes as usize)),
    }
}
