//! Replies, then exits with the code that its message says.

use turnhouse_test_guests::{message, number};

fn main() {
    let code = number(&message(), 0);
    println!("exiting with {code}");
    std::process::exit(code as i32);
}
