//! What a guest reads and stages: `input_read`, `message_read`, `snapshot_read`, `snapshot_write`, `reply`, `log`.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Serialize;
use serde::de::IgnoredAny;
use wasmtime::{Caller, Linker};

use super::{Answer, Errno, MODULE, answer, enter, hand_in, range, text};
use crate::content::{Content, ContentLimits, Part, json_weight};
use crate::event::raw;
use crate::gate::Grant;
use crate::sandbox::Said;
use crate::sandbox::guest::Guest;

/// Parts of one reply: as many as a message may have by default.
const REPLY_PARTS_MAX: usize = 32;
/// How much memory a reply's JSON may become, which is not to be told from its length: `[{"":0},{"":0},…]` is a hundred times that.
const REPLY_JSON_WEIGHT_MAX: usize = 1 << 18;

/// JSON may write one byte of text as six (`\u0000`), and needs a frame around it.
const JSON_BYTES_PER_BYTE: usize = 6;
const JSON_FRAME_BYTES: usize = 16 * 1024;

const LEVELS: [&str; 5] = ["trace", "debug", "info", "warn", "error"];

pub(super) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.func_wrap(MODULE, "input_read", |mut caller: Caller<'_, Guest>, ptr: u32, cap: u32| {
        answer(input_read(&mut caller, ptr, cap))
    })?;
    linker.func_wrap(MODULE, "message_read", |mut caller: Caller<'_, Guest>, ptr: u32, cap: u32| {
        answer(message_read(&mut caller, ptr, cap))
    })?;
    linker.func_wrap(MODULE, "snapshot_read", |mut caller: Caller<'_, Guest>, ptr: u32, cap: u32| {
        answer(snapshot_read(&mut caller, ptr, cap))
    })?;
    linker.func_wrap(MODULE, "snapshot_write", |mut caller: Caller<'_, Guest>, ptr: u32, len: u32| {
        answer(snapshot_write(&mut caller, ptr, len))
    })?;
    linker.func_wrap(MODULE, "reply", |mut caller: Caller<'_, Guest>, ptr: u32, len: u32| {
        answer(reply(&mut caller, ptr, len))
    })?;
    linker.func_wrap(MODULE, "log", |mut caller: Caller<'_, Guest>, level: u32, ptr: u32, len: u32| {
        answer(log(&mut caller, level, ptr, len))
    })?;
    Ok(())
}

fn input_read(caller: &mut Caller<'_, Guest>, ptr: u32, cap: u32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let into = range(memory, ptr, cap)?;
    let json = guest.input.json();
    Ok(hand_in(guest, memory, into, &json))
}

fn message_read(caller: &mut Caller<'_, Guest>, ptr: u32, cap: u32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let into = range(memory, ptr, cap)?;
    Ok(hand_in(guest, memory, into, &guest.input.text))
}

fn snapshot_read(caller: &mut Caller<'_, Guest>, ptr: u32, cap: u32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let into = range(memory, ptr, cap)?;
    let snapshot = guest.input.snapshot.as_ref().ok_or(Errno::Noent)?;
    Ok(hand_in(guest, memory, into, snapshot))
}

#[derive(Serialize)]
struct SnapshotRejected {
    bytes: usize,
    limit_bytes: usize,
}

fn snapshot_write(caller: &mut Caller<'_, Guest>, ptr: u32, len: u32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let from = range(memory, ptr, len)?;
    // The permit is the proof: only the gate makes one.
    let Grant::Shared(_permit) = &guest.grant else { return Err(Errno::Perm.into()) };
    let limit_bytes = guest.limits.snapshot_bytes_max;
    if from.len() > limit_bytes {
        let mut speech = guest.shared.speech.lock();
        // It is the guest who has it told: it counts as one of the guest's events.
        match speech.room(0) {
            Ok(()) => {
                let data = raw(&SnapshotRejected { bytes: from.len(), limit_bytes });
                speech.emit(Said { kind: Cow::Borrowed("snapshot.rejected"), data });
            }
            Err(bound) => speech.refuse(bound, false)?,
        }
        return Err(Errno::TooBig.into());
    }
    guest.shared.control.count_out(from.len());
    guest.snapshot = Some(Bytes::copy_from_slice(&memory[from]));
    Ok(0)
}

fn reply(caller: &mut Caller<'_, Guest>, ptr: u32, len: u32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let from = range(memory, ptr, len)?;
    let reply_bytes_max = guest.limits.reply_bytes_max;
    let json_bytes_max = reply_bytes_max.saturating_mul(JSON_BYTES_PER_BYTE).saturating_add(JSON_FRAME_BYTES);
    let json = text(memory, from, json_bytes_max)?;
    if json.len() > json_bytes_max {
        // Too big to be parsed into anything; what is no JSON at all is still told apart first, in place.
        serde_json::from_str::<IgnoredAny>(json).map_err(|_| Errno::Inval)?;
        return Err(Errno::TooBig.into());
    }
    if json_weight(json) > REPLY_JSON_WEIGHT_MAX {
        serde_json::from_str::<IgnoredAny>(json).map_err(|_| Errno::Inval)?;
        return Err(Errno::TooBig.into());
    }
    let content: Content = serde_json::from_str(json).map_err(|_| Errno::Inval)?;
    if !content.attachments().is_empty() {
        return Err(Errno::Inval.into());
    }
    let bounds =
        ContentLimits { text_bytes_max: usize::MAX, parts_max: REPLY_PARTS_MAX, blob_bytes_max: reply_bytes_max };
    let bytes = content_bytes(&content);
    let over = bytes > reply_bytes_max;
    // An empty reply may be staged: the turn then ends as `no_reply`, unless another follows.
    if !content.is_empty() && !over {
        content.check(&bounds).map_err(|_| Errno::Inval)?;
    }
    if over {
        return Err(Errno::TooBig.into());
    }
    guest.shared.control.count_out(json.len());
    guest.reply = Some(content);
    Ok(0)
}

/// The bytes of texts, JSON and blobs as they will be stored.
fn content_bytes(content: &Content) -> usize {
    match content {
        Content::Text(content) => content.text.len(),
        Content::Parts(content) => content
            .parts
            .iter()
            .map(|part| match part {
                Part::Text { text } => text.len(),
                Part::Json { data } => data.to_string().len(),
                Part::Blob { media_type, base64 } => media_type.len() + base64.len(),
                Part::Attachment { .. } => 0,
            })
            .sum(),
    }
}

fn log(caller: &mut Caller<'_, Guest>, level: u32, ptr: u32, len: u32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let from = range(memory, ptr, len)?;
    let level = LEVELS.get(level as usize).ok_or(Errno::Inval)?;
    let line = beginning(&memory[from.clone()], guest.limits.log_bytes_max)?;
    guest.shared.control.count_out(line.len());
    let mut speech = guest.shared.speech.lock();
    speech.log(level.as_bytes());
    speech.log(b": ");
    speech.log(line.as_bytes());
    speech.drop_log(from.len() - line.len());
    speech.log(b"\n");
    Ok(0)
}

/// As much of a line as there can be room for, in whole characters. What is dropped in any case is not looked through.
fn beginning(line: &[u8], bytes_max: usize) -> Result<&str, Errno> {
    let cut = &line[..line.len().min(bytes_max)];
    match std::str::from_utf8(cut) {
        Ok(text) => Ok(text),
        Err(error) if error.error_len().is_none() && cut.len() < line.len() => {
            std::str::from_utf8(&cut[..error.valid_up_to()]).map_err(|_| Errno::Ilseq)
        }
        Err(_) => Err(Errno::Ilseq),
    }
}
