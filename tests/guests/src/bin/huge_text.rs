//! Passes 48 MiB of text to the host, again and again: brackets without end to `emit`; with "reply" in its message to `reply`, with "call" to `call`, with
//! "log" text of two bytes a character to `log`, with "delta" to `emit` as a delta. With "once" it replies with the result of the first.

use turnhouse_test_guests::{
    raw::{self, span, turnhouse},
    says,
};

fn main() {
    let message = raw::message();
    let said = |word: &str| says(&message, word);
    let text = if said("log") || said("delta") { "é".repeat(24 << 20) } else { "[".repeat(48 << 20) };
    let ((ptr, len), (own, own_len)) = (span(text.as_bytes()), span(b"x.own"));
    let ((delta, delta_len), (op, op_len)) = (span(b"output.delta"), span(b"host.echo"));
    loop {
        let result = if said("reply") {
            turnhouse::reply(ptr, len)
        } else if said("call") {
            turnhouse::call(op, op_len, ptr, len)
        } else if said("log") {
            turnhouse::log(2, ptr, len)
        } else if said("delta") {
            turnhouse::emit(delta, delta_len, ptr, len)
        } else {
            turnhouse::emit(own, own_len, ptr, len)
        };
        if said("once") {
            raw::say(&format!("result {result}"));
            return;
        }
    }
}
