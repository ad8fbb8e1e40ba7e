//! Reads its message and ends well, without a word.

fn main() {
    turnhouse_test_guests::message();
}
