//! Passes text that is not UTF-8, and JSON that is not JSON, to the host's functions; replies with the results.

use turnhouse_test_guests::raw::{self, span, turnhouse};

fn main() {
    let (bad, bad_len) = span(b"caf\xe9");
    let (json, json_len) = span(br#"{"text":"#);
    let (delta, delta_len) = span(b"output.delta");
    let (own, own_len) = span(b"x.own");
    let (upper, upper_len) = span(b"x.OWN");
    let (reserved, reserved_len) = span(b"turn.completed");
    let (good, good_len) = span(br#"{"text":"good"}"#);
    let results = [
        ("emit_text_utf8", turnhouse::emit(delta, delta_len, bad, bad_len)),
        ("emit_kind_utf8", turnhouse::emit(bad, bad_len, good, good_len)),
        ("emit_own_utf8", turnhouse::emit(own, own_len, bad, bad_len)),
        ("emit_own_json", turnhouse::emit(own, own_len, json, json_len)),
        ("emit_own_name", turnhouse::emit(upper, upper_len, good, good_len)),
        ("emit_reserved", turnhouse::emit(reserved, reserved_len, good, good_len)),
        ("reply_utf8", turnhouse::reply(bad, bad_len)),
        ("reply_json", turnhouse::reply(json, json_len)),
        ("log_utf8", turnhouse::log(2, bad, bad_len)),
        ("log_level", turnhouse::log(5, good, good_len)),
        ("call_utf8", turnhouse::call(bad, bad_len, good, good_len)),
        ("emit_own_good", turnhouse::emit(own, own_len, good, good_len)),
    ];
    for (what, result) in results {
        raw::say(&format!("{what} {result}\n"));
    }
}
