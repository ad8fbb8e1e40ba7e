//! Replies, saves a state and traps; with "exit" in its message it exits with 7 instead, with "spin" it loops for ever.

use turnhouse_test_guests::{
    raw::{self, span, turnhouse},
    says,
};

fn main() {
    let message = raw::message();
    let ((reply, reply_len), (state, state_len)) = (span(br#"{"text":"a whole reply"}"#), span(b"state"));
    assert_eq!(turnhouse::reply(reply, reply_len), 0);
    turnhouse::snapshot_write(state, state_len);
    if says(&message, "exit") {
        std::process::exit(7);
    }
    while says(&message, "spin") {
        std::hint::spin_loop();
    }
    std::process::abort();
}
