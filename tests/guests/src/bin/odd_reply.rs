//! Replies with what is text and still odd: NULs; with "ansi" in its message escape sequences, with "lines" what would break a stream of events, with
//! "bidi" characters that turn the text around, with "deep" JSON in 100 000 brackets, which is refused. With "stdout" it prints it instead.

use std::io::Write as _;

use turnhouse_test_guests::{
    raw::{self, span, turnhouse},
    says,
};

const ODD: [(&str, &str); 3] = [
    ("ansi", "\u{1b}[2J\u{1b}[31mred\u{1b}]0;title\u{7}\u{9b}5n"),
    ("lines", "a\r\n\r\nevent: turn.completed\ndata: {}\r\n\n\u{2028}\u{85}id: end\n\n"),
    ("bidi", "\u{202e}desrever\u{2066}\u{feff}"),
];

fn main() {
    let message = raw::message();
    if says(&message, "deep") {
        let json = format!(r#"{{"parts":[{{"type":"json","data":{}1{}}}]}}"#, "[".repeat(100_000), "]".repeat(100_000));
        let (ptr, len) = span(json.as_bytes());
        raw::say(&format!("result {}", turnhouse::reply(ptr, len)));
        return;
    }
    let odd = ODD.iter().find(|(word, _)| says(&message, word)).map_or("a\0b\0\0c", |(_, odd)| odd);
    if says(&message, "stdout") {
        let _ = std::io::stdout().write_all(odd.as_bytes());
        raw::say(odd);
        return;
    }
    let json = serde_json::json!({ "text": odd }).to_string();
    let (ptr, len) = span(json.as_bytes());
    assert_eq!(turnhouse::reply(ptr, len), 0);
}
