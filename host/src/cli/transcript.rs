//! A turn's events as a person reads them: the reply on stdout, all else on stderr.
//!
//! On a terminal the reply streams. Where it goes to a program or a file it is written once, whole, when the turn has completed: deltas can be
//! taken back (`turn.restarted`, `replaces_deltas`), and what is in a pipe cannot.

use std::io::{self, IsTerminal as _, Write};

use serde_json::Value;

use super::CliError;
use super::output::{Style, printable};
use turnhouse::content::{Content, Part};

/// How a turn ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// With a reply.
    Completed,
    /// Without one.
    Failed { code: String, detail: String },
    /// On request.
    Cancelled { by: String },
}

impl Ending {
    /// What an event says of its turn's end, if it is the last.
    pub fn of(kind: &str, data: &Value) -> Option<Ending> {
        let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
        match kind {
            "turn.completed" => Some(Ending::Completed),
            "turn.failed" => Some(Ending::Failed { code: text("code"), detail: text("detail") }),
            "turn.cancelled" => Some(Ending::Cancelled { by: text("by") }),
            _ => None,
        }
    }

    /// `Ok` only for a reply.
    pub fn into_result(self) -> Result<(), CliError> {
        match self {
            Ending::Completed => Ok(()),
            Ending::Failed { code, detail } => Err(CliError::failed(format!("the turn failed: {code}")).help(detail)),
            Ending::Cancelled { by } => Err(CliError::failed(format!("the turn was cancelled, by {by}"))),
        }
    }
}

/// Writes one turn.
pub struct Transcript<O, E> {
    out: O,
    err: E,
    /// Whether deltas are shown as they come.
    streams: bool,
    style: Style,
    /// Whether something of the reply is on the screen.
    shown: bool,
    /// Whether the cursor stands at the beginning of a line.
    at_line_start: bool,
    /// Ends a whole reply with a newline even where no terminal is.
    newline: bool,
}

impl Transcript<io::Stdout, io::Stderr> {
    /// To the process's own streams.
    pub fn stdio() -> Self {
        let streams = io::stdout().is_terminal();
        Transcript::new(io::stdout(), io::stderr(), streams, Style::of(&io::stderr()))
    }
}

impl<O: Write, E: Write> Transcript<O, E> {
    fn new(out: O, err: E, streams: bool, style: Style) -> Self {
        Transcript { out, err, streams, style, shown: false, at_line_start: true, newline: streams }
    }

    /// Ends every reply with a newline, so that several can be told apart.
    #[must_use]
    pub fn in_lines(mut self) -> Self {
        self.newline = true;
        self
    }

    /// Shows one event; how the turn ended, when this event says so.
    pub fn event(&mut self, kind: &str, data: &Value) -> io::Result<Option<Ending>> {
        let text = |name: &str| data[name].as_str().unwrap_or_default().to_owned();
        match kind {
            "output.delta" => self.delta(&text("text"))?,
            "status" => self.remark(&text("text"))?,
            "turn.restarted" => {
                let void = if self.shown { "; what stands above is void" } else { "" };
                self.remark(&format!("the turn begins again, its host was lost{void}"))?;
                self.shown = false;
            }
            // Where the reply is written once and whole, nothing has to be caught up.
            "resync" if self.streams => {
                self.remark("older events are gone; what was said so far:")?;
                self.shown = false;
                self.delta(&text("text"))?;
            }
            "snapshot.rejected" => self.remark(&format!(
                "the state was not saved: {} bytes, the limit is {}",
                data["bytes"], data["limit_bytes"]
            ))?,
            "operation.started" | "operation.finished" => {
                let name = text("name");
                self.remark(&format!("{} {name}", kind.trim_start_matches("operation.")))?;
            }
            "turn.completed" => {
                self.completed(&data["reply"], data["replaces_deltas"] == true)?;
            }
            "turn.failed" | "turn.cancelled" => self.new_line()?,
            own if own.starts_with("x.") => self.remark(&format!("{own} {data}"))?,
            // `turn.accepted`, `turn.started`, and what a newer host may tell.
            _ => {}
        }
        Ok(Ending::of(kind, data))
    }

    /// A line of the worker's log.
    pub fn log(&mut self, line: &str) -> io::Result<()> {
        self.remark(line)
    }

    fn delta(&mut self, text: &str) -> io::Result<()> {
        if !self.streams || text.is_empty() {
            return Ok(());
        }
        let text = printable(text);
        self.shown = true;
        self.at_line_start = text.ends_with('\n');
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    fn completed(&mut self, reply: &Value, replaces_deltas: bool) -> io::Result<()> {
        if self.shown && replaces_deltas {
            self.remark("the reply replaces what stands above:")?;
        }
        if !self.shown || replaces_deltas {
            let text = content_text(reply);
            // For a program the reply is what the worker wrote, byte for byte.
            let text = if self.streams { printable(&text) } else { text };
            self.out.write_all(text.as_bytes())?;
            self.at_line_start = text.ends_with('\n');
        }
        if self.newline {
            self.new_line()?;
        }
        self.out.flush()
    }

    fn remark(&mut self, text: &str) -> io::Result<()> {
        if self.streams {
            self.new_line()?;
        }
        writeln!(self.err, "{}", self.style.dim(&printable(text)))
    }

    fn new_line(&mut self) -> io::Result<()> {
        if !self.at_line_start {
            self.at_line_start = true;
            self.out.write_all(b"\n")?;
            self.out.flush()?;
        }
        Ok(())
    }
}

/// A message or a reply as text: its texts; its JSON and the names of its blobs on lines of their own.
pub fn content_text(reply: &Value) -> String {
    let Ok(content) = serde_json::from_value::<Content>(reply.clone()) else { return reply.to_string() };
    let Content::Parts(content) = &content else { return content.joined_text().into_owned() };
    let mut text = String::new();
    for part in &content.parts {
        match part {
            Part::Text { text: piece } => text.push_str(piece),
            Part::Json { data } => text.push_str(&format!("{}{data}\n", separator(&text))),
            Part::Blob { media_type, base64 } => {
                let bytes = base64.trim_end_matches('=').len() * 3 / 4;
                text.push_str(&format!("{}[{media_type}, {bytes} bytes]\n", separator(&text)));
            }
            Part::Attachment { attachment_id, name } => {
                let name = name.clone().unwrap_or_else(|| attachment_id.to_string());
                text.push_str(&format!("{}[attachment {name}]\n", separator(&text)));
            }
        }
    }
    text
}

fn separator(text: &str) -> &'static str {
    if text.is_empty() || text.ends_with('\n') { "" } else { "\n" }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn written(streams: bool, events: &[(&str, Value)]) -> (String, String, Option<Ending>) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut transcript = Transcript::new(&mut out, &mut err, streams, Style::plain());
        let mut ending = None;
        for (kind, data) in events {
            ending = transcript.event(kind, data).unwrap();
        }
        (String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap(), ending)
    }

    #[test]
    fn a_terminal_sees_the_reply_stream_once() {
        let events = [
            ("status", json!({"text": "thinking"})),
            ("output.delta", json!({"text": "a"})),
            ("output.delta", json!({"text": "b\u{1b}"})),
            ("turn.completed", json!({"reply": {"text": "ab\u{1b}"}, "replaces_deltas": false})),
        ];
        let (out, err, ending) = written(true, &events);
        assert_eq!((out.as_str(), err.as_str(), ending), ("ab\u{fffd}\n", "thinking\n", Some(Ending::Completed)));
    }

    #[test]
    fn a_pipe_gets_the_reply_whole_and_verbatim() {
        let events = [
            ("output.delta", json!({"text": "draft"})),
            ("turn.restarted", json!({"attempt": 2})),
            ("output.delta", json!({"text": "draft"})),
            ("turn.completed", json!({"reply": {"text": "final\u{1b}"}, "replaces_deltas": true})),
        ];
        let (out, err, _) = written(false, &events);
        assert_eq!((out.as_str(), err.as_str()), ("final\u{1b}", "the turn begins again, its host was lost\n"));
    }

    #[test]
    fn a_reply_that_replaces_what_was_shown_says_so() {
        let events = [
            ("output.delta", json!({"text": "draft"})),
            ("turn.completed", json!({"reply": {"text": "final"}, "replaces_deltas": true})),
        ];
        let (out, err, _) = written(true, &events);
        assert_eq!(out, "draft\nfinal\n");
        assert!(err.contains("replaces"));
    }

    #[test]
    fn a_failed_turn_is_an_error_with_its_detail() {
        let (out, _, ending) = written(
            true,
            &[
                ("output.delta", json!({"text": "a"})),
                ("turn.failed", json!({"code": "no_reply", "detail": "say something"})),
            ],
        );
        assert_eq!(out, "a\n");
        let error = ending.unwrap().into_result().unwrap_err().render(Style::plain());
        assert_eq!(error, "error: the turn failed: no_reply\n  help: say something");
    }

    #[test]
    fn parts_that_are_no_text_have_lines_of_their_own() {
        let reply = json!({"parts": [{"type": "text", "text": "see"}, {"type": "json", "data": {"a": 1}},
            {"type": "blob", "media_type": "image/png", "base64": "AAAA"}]});
        assert_eq!(content_text(&reply), "see\n{\"a\":1}\n[image/png, 3 bytes]\n");
    }
}
