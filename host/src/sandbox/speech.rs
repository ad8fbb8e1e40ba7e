//! What one guest says, gathered and bounded: deltas, the log, and whether its reader is behind.
//!
//! Standard output, standard error and the host calls all end here. It owns the text of the deltas (which is the reply, unless the guest
//! calls `reply`) and the log. It does not wait: who is told that the reader is behind awaits [`Output::ready`].

use std::borrow::Cow;
use std::sync::Arc;

use serde::Serialize;

use super::outcome::End;
use super::{Control, GuestLimits, Output, Said};
use crate::event::raw;

/// Deltas of standard output are told as they are written; a guest that writes byte by byte is gathered to this many bytes, once it has
/// used up `emit_events_max`.
const GATHER_BYTES: usize = 4096;

/// Refused events after which a guest that goes on emitting is ended.
const REFUSALS_MAX: u32 = 1000;

/// Where a guest's standard output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stdout {
    /// To the reply: a program without the host's functions.
    Reply,
    /// To the log: the guest speaks through `emit` and `reply`.
    Log,
}

pub(super) struct Speech {
    output: Arc<dyn Output>,
    control: Arc<Control>,
    limits: Arc<GuestLimits>,
    /// The deltas joined.
    said: String,
    /// The deltas of standard output that have not been told: from here to the end of `said`.
    told: usize,
    /// The beginning of a character whose rest has not been written yet.
    partial: Vec<u8>,
    /// Deltas and emitted events.
    events: u64,
    status: Option<String>,
    log: Vec<u8>,
    log_bytes_dropped: u64,
    /// A piece of the reply was refused: what is said is not all of it.
    cut: Option<End>,
    refusals: u32,
    /// The reader is behind: await `Output::ready` before going on.
    pub(super) pressed: bool,
}

/// A guest's words at its end.
pub(super) struct Spoken {
    pub(super) said: String,
    pub(super) log: Vec<u8>,
    pub(super) log_bytes_dropped: u64,
    /// See [`Speech::refuse`].
    pub(super) cut: Option<End>,
}

#[derive(Serialize)]
struct Text<'a> {
    text: &'a str,
}

impl Speech {
    pub(super) fn new(output: Arc<dyn Output>, control: Arc<Control>, limits: Arc<GuestLimits>) -> Speech {
        Speech {
            output,
            control,
            limits,
            said: String::new(),
            told: 0,
            partial: Vec::new(),
            events: 0,
            status: None,
            log: Vec::new(),
            log_bytes_dropped: 0,
            cut: None,
            refusals: 0,
            pressed: false,
        }
    }

    /// Whether there is room for one more of the guest's events, or which bound there is none for.
    pub(super) fn room(&self, delta_bytes: usize) -> Result<(), End> {
        if self.events >= self.limits.emit_events_max {
            return Err(End::EmitLimit { emit_events_max: self.limits.emit_events_max });
        }
        self.hold_against_reply_limit(delta_bytes)
    }

    /// Notes that the guest was refused an event. One that goes on regardless is ended; one that leaves it at a cut reply has failed.
    pub(super) fn refuse(&mut self, bound: End, was_delta: bool) -> Result<(), End> {
        if was_delta {
            self.cut.get_or_insert(bound);
        }
        self.refusals += 1;
        if self.refusals > REFUSALS_MAX { Err(bound) } else { Ok(()) }
    }

    /// Tells an event of the host's own.
    pub(super) fn tell<T: Serialize + ?Sized>(&mut self, kind: &'static str, data: &T) {
        self.say(Said { kind: Cow::Borrowed(kind), data: raw(data) });
    }

    /// Tells an event of the host's own, made elsewhere.
    pub(super) fn host_event(&mut self, said: Said) {
        self.say(said);
    }

    /// Tells an event that counts as the guest's.
    pub(super) fn emit(&mut self, said: Said) {
        self.events += 1;
        self.say(said);
    }

    /// Tells a status; a new one is progress.
    pub(super) fn status(&mut self, text: &str) {
        if self.status.as_deref() != Some(text) {
            self.status = Some(text.to_owned());
            self.control.progress();
        }
        self.events += 1;
        self.tell("status", &Text { text });
    }

    /// Tells a piece of the reply, for which there is room.
    pub(super) fn delta(&mut self, text: &str) {
        self.said.push_str(text);
        self.tell_deltas();
    }

    /// Takes bytes of standard output of a plain program. Bytes that are not UTF-8 become U+FFFD; a character may span writes.
    pub(super) fn stdout(&mut self, bytes: &[u8]) -> Result<(), End> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.control.progress();
        let joined;
        let mut rest = if self.partial.is_empty() {
            bytes
        } else {
            joined = [std::mem::take(&mut self.partial).as_slice(), bytes].concat();
            joined.as_slice()
        };
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.take_stdout(text)?;
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.take_stdout(std::str::from_utf8(valid).expect("checked up to here"))?;
                    let Some(invalid) = error.error_len() else {
                        // At most three bytes: the character's beginning.
                        self.partial.extend_from_slice(after);
                        break;
                    };
                    self.take_stdout("\u{FFFD}")?;
                    rest = &after[invalid..];
                }
            }
        }
        if self.events < self.limits.emit_events_max || self.said.len() - self.told >= GATHER_BYTES {
            self.tell_deltas();
        }
        Ok(())
    }

    fn take_stdout(&mut self, text: &str) -> Result<(), End> {
        self.hold_against_reply_limit(text.len())?;
        self.said.push_str(text);
        Ok(())
    }

    fn hold_against_reply_limit(&self, more: usize) -> Result<(), End> {
        if self.said.len() + more > self.limits.reply_bytes_max {
            return Err(End::ReplyLimit { reply_bytes_max: self.limits.reply_bytes_max });
        }
        Ok(())
    }

    fn tell_deltas(&mut self) {
        if self.told < self.said.len() {
            let data = raw(&Text { text: &self.said[self.told..] });
            self.told = self.said.len();
            self.control.progress();
            self.emit(Said { kind: Cow::Borrowed("output.delta"), data });
        }
    }

    fn say(&mut self, said: Said) {
        if !self.output.say(said) {
            self.pressed = true;
        }
    }

    /// Keeps what fits of the bytes, and counts the rest.
    pub(super) fn log(&mut self, bytes: &[u8]) {
        let room = self.limits.log_bytes_max - self.log.len();
        let kept = room.min(bytes.len());
        self.log.extend_from_slice(&bytes[..kept]);
        self.log_bytes_dropped += (bytes.len() - kept) as u64;
    }

    /// Counts bytes that were meant for the log and are not even looked at.
    pub(super) fn drop_log(&mut self, bytes: usize) {
        self.log_bytes_dropped += bytes as u64;
    }

    /// The guest has ended: an unfinished character is told as U+FFFD, what was gathered is told.
    pub(super) fn finish(&mut self) -> Spoken {
        if !std::mem::take(&mut self.partial).is_empty() && self.take_stdout("\u{FFFD}").is_err() {
            tracing::debug!("an unfinished character did not fit into the reply");
        }
        self.tell_deltas();
        Spoken {
            said: std::mem::take(&mut self.said),
            log: std::mem::take(&mut self.log),
            log_bytes_dropped: self.log_bytes_dropped,
            cut: self.cut,
        }
    }
}
