//! `emit`: deltas, statuses and a guest's own events, told while it runs.

use std::borrow::Cow;

use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use wasmtime::{Caller, Linker};

use super::{Answer, Errno, MODULE, answer, enter, range, text};
use crate::sandbox::Said;
use crate::sandbox::guest::Guest;
use crate::sandbox::outcome::End;

/// Of `x.<name>`, after the prefix.
const OWN_NAME_BYTES_MAX: usize = 48;

pub(super) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.func_wrap_async(
        MODULE,
        "emit",
        |mut caller: Caller<'_, Guest>, (kind_ptr, kind_len, ptr, len): (u32, u32, u32, u32)| {
            Box::new(async move {
                let told = answer(emit(&mut caller, (kind_ptr, kind_len), (ptr, len)));
                let shared = &caller.data().shared;
                if shared.speech.lock().pressed {
                    shared.clone().until_heard().await;
                }
                told
            })
        },
    )?;
    Ok(())
}

enum Kind<'a> {
    Delta,
    Status,
    Own(&'a str),
}

impl Kind<'_> {
    fn parse(name: &[u8]) -> Result<Kind<'_>, Errno> {
        match name {
            b"output.delta" => Ok(Kind::Delta),
            b"status" => Ok(Kind::Status),
            _ => {
                let own = name.strip_prefix(b"x.").ok_or(Errno::Inval)?;
                let valid = (1..=OWN_NAME_BYTES_MAX).contains(&own.len())
                    && own.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_.-".contains(b));
                // The length first: what is too long for a name is not looked through.
                if !valid {
                    return Err(Errno::Inval);
                }
                std::str::from_utf8(name).map(Kind::Own).map_err(|_| Errno::Inval)
            }
        }
    }
}

fn emit(caller: &mut Caller<'_, Guest>, kind: (u32, u32), data: (u32, u32)) -> Answer {
    let (memory, guest) = enter(caller)?;
    let kind = range(memory, kind.0, kind.1)?;
    let data = range(memory, data.0, data.1)?;
    let kind = Kind::parse(&memory[kind])?;
    let data = text(memory, data, guest.limits.emit_bytes_max)?;
    if let Kind::Own(_) = kind {
        // In place: nothing is allocated for what may yet be refused.
        serde_json::from_str::<IgnoredAny>(data).map_err(|_| Errno::Inval)?;
    }
    if data.len() > guest.limits.emit_bytes_max {
        return Err(Errno::TooBig.into());
    }
    guest.shared.control.count_out(data.len());
    let mut speech = guest.shared.speech.lock();
    let delta = matches!(kind, Kind::Delta);
    if delta && data.is_empty() {
        return Ok(0);
    }
    if let Err(bound) = speech.room(if delta { data.len() } else { 0 }) {
        speech.refuse(bound, delta)?;
        let errno = if matches!(bound, End::EmitLimit { .. }) { Errno::Nobufs } else { Errno::TooBig };
        return Err(errno.into());
    }
    match kind {
        Kind::Delta => speech.delta(data),
        Kind::Status => speech.status(data),
        Kind::Own(name) => {
            let data = RawValue::from_string(one_line(data)).map_err(|_| Errno::Inval)?;
            speech.emit(Said { kind: Cow::Owned(name.to_owned()), data });
        }
    }
    Ok(0)
}

/// Valid JSON without the white space between its tokens: one line, with every number and key as the guest wrote it.
fn one_line(json: &str) -> String {
    let mut in_string = false;
    let mut escaped = false;
    json.chars()
        .filter(|c| {
            if in_string {
                in_string = escaped || *c != '"';
                escaped = !escaped && *c == '\\';
                return true;
            }
            in_string = *c == '"';
            !matches!(c, ' ' | '\t' | '\n' | '\r')
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_becomes_one_line_and_nothing_else_of_it_changes() {
        let json = "{ \"a b\\\" \\\\\" :\n [1.0000000000000000001,\t\"x\\n y\"],\r\n\"a b\": null }";
        assert_eq!(one_line(json), r#"{"a b\" \\":[1.0000000000000000001,"x\n y"],"a b":null}"#);
    }

    #[test]
    fn kinds_are_the_two_named_ones_and_own_names() {
        for good in ["output.delta", "status", "x.a", "x.tool-call_1.done"] {
            assert!(Kind::parse(good.as_bytes()).is_ok(), "{good}");
        }
        let long = format!("x.{}", "a".repeat(49));
        for bad in ["", "x.", "x.A", "x.a b", "y.a", "output", "status ", "turn.completed", "x.\u{e9}", &long] {
            assert!(Kind::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
