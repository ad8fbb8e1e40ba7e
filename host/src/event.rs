//! What a client sees of a turn: events, their ids and their order. Pure.
//!
//! An id is `<epoch>.<seq>`, compared as a pair of numbers. `turn.accepted` is `0.0`; what a claim tells (`turn.started`, `turn.restarted`)
//! is `<epoch>.0`; what the guest says follows from `<epoch>.1`. The epoch changes with every owner, so no id is ever used twice (E1). The
//! terminal event's id is `end`, after every pair: whoever ends a turn need not know the last seq that a client saw.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::clock::Timestamp;
use crate::content::Content;
use crate::ids::{AgentId, ConversationId, TurnId, WorkerName};
use crate::lease::Epoch;
use crate::turn::{Outcome, Usage};

/// Where an event stands in its turn's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EventId {
    /// `<epoch>.<seq>`.
    At(Epoch, u32),
    /// The terminal event's: after every pair.
    End,
}

impl EventId {
    /// `turn.accepted`.
    pub const ACCEPTED: EventId = EventId::At(0, 0);
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EventId::At(epoch, seq) => write!(f, "{epoch}.{seq}"),
            EventId::End => f.write_str("end"),
        }
    }
}

impl FromStr for EventId {
    type Err = ();

    /// Only the form that `Display` writes.
    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "end" {
            return Ok(EventId::End);
        }
        let (epoch, seq) = text.split_once('.').ok_or(())?;
        let number = |digits: &str| -> Result<u32, ()> {
            let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
            if plain { digits.parse().map_err(|_| ()) } else { Err(()) }
        };
        Ok(EventId::At(number(epoch)?, number(seq)?))
    }
}

/// One event of a turn.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its place.
    pub id: EventId,
    /// `output.delta`, `status`, ….
    pub kind: Cow<'static, str>,
    /// One line of JSON.
    pub data: Box<RawValue>,
}

/// Consecutive events of one epoch, as one row of the log keeps them: `(epoch, first_seq)`, then one pair of kind and data each.
#[derive(Debug, Clone, Default)]
pub struct EventBatch {
    /// The seq of the first.
    pub first_seq: u32,
    /// In order, without gaps.
    pub events: Vec<(Cow<'static, str>, Box<RawValue>)>,
}

impl EventBatch {
    /// Whether there is nothing to keep.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// What its events say, in bytes.
    pub fn bytes(&self) -> usize {
        self.events.iter().map(|(kind, data)| kind.len() + data.get().len()).sum()
    }

    /// As stored: `[["output.delta",{"text":"hi"}],…]`.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(&self.events).expect("strings and raw JSON serialise")
    }

    /// From what [`EventBatch::encode`] wrote.
    pub fn decode(first_seq: u32, body: &[u8]) -> Result<EventBatch, serde_json::Error> {
        Ok(EventBatch { first_seq, events: serde_json::from_slice(body)? })
    }

    /// Its events with their ids.
    pub fn into_events(self, epoch: Epoch) -> impl Iterator<Item = Event> {
        (self.first_seq..).zip(self.events).map(move |(seq, (kind, data))| Event {
            id: EventId::At(epoch, seq),
            kind,
            data,
        })
    }
}

/// Serialises a value that always can be: strings, numbers and maps of them.
pub fn raw<T: serde::Serialize + ?Sized>(value: &T) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).expect("plain data serialises")
}

/// `turn.accepted {turn_id, agent_id, conversation_id, accepted_at}`.
pub fn accepted(turn: TurnId, agent: &AgentId, conversation: Option<&ConversationId>, accepted_at: Timestamp) -> Event {
    #[derive(Serialize)]
    struct Data<'a> {
        turn_id: TurnId,
        agent_id: &'a AgentId,
        conversation_id: Option<&'a ConversationId>,
        accepted_at: Timestamp,
    }
    let data = raw(&Data { turn_id: turn, agent_id: agent, conversation_id: conversation, accepted_at });
    Event { id: EventId::ACCEPTED, kind: "turn.accepted".into(), data }
}

/// `turn.started {attempt, worker, version}`: the first claim's.
pub fn started(epoch: Epoch, attempt: u32, worker: &WorkerName, version: u32) -> Event {
    #[derive(Serialize)]
    struct Data<'a> {
        attempt: u32,
        worker: &'a WorkerName,
        version: u32,
    }
    Event { id: EventId::At(epoch, 0), kind: "turn.started".into(), data: raw(&Data { attempt, worker, version }) }
}

/// `turn.restarted {attempt}`: every later claim's. The deltas so far are void.
pub fn restarted(epoch: Epoch, attempt: u32) -> Event {
    #[derive(Serialize)]
    struct Data {
        attempt: u32,
    }
    Event { id: EventId::At(epoch, 0), kind: "turn.restarted".into(), data: raw(&Data { attempt }) }
}

/// The terminal event: `turn.completed {reply, usage, replaces_deltas}`, `turn.failed {code, detail, retryable, …}` or `turn.cancelled {by}`.
pub fn terminal(outcome: &Outcome, usage: Option<&Usage>) -> Event {
    #[derive(Serialize)]
    struct Completed<'a> {
        reply: &'a Content,
        usage: Option<&'a Usage>,
        replaces_deltas: bool,
    }
    let (kind, data) = match outcome {
        Outcome::Completed { reply, replaces_deltas } => {
            ("turn.completed", raw(&Completed { reply, usage, replaces_deltas: *replaces_deltas }))
        }
        Outcome::Failed(failure) => ("turn.failed", raw(failure)),
        Outcome::Cancelled { by } => ("turn.cancelled", raw(&serde_json::json!({ "by": by }))),
    };
    Event { id: EventId::End, kind: kind.into(), data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e1_ids_are_pairs_in_order_and_end_comes_last() {
        let ids: Vec<EventId> =
            ["0.0", "1.0", "1.2", "1.10", "2.0", "end"].iter().map(|t| t.parse().unwrap()).collect();
        assert!(ids.is_sorted());
        assert_eq!(
            ids.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["0.0", "1.0", "1.2", "1.10", "2.0", "end"]
        );
        for bad in ["", "1", "1.", ".1", "1.01", "+1.1", "1.-1", "1.1.1", "END", "4294967296.0"] {
            assert!(bad.parse::<EventId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_batch_comes_back_as_it_went() {
        let batch = EventBatch {
            first_seq: 3,
            events: vec![
                ("output.delta".into(), raw(&serde_json::json!({"text": "a\n\u{0}"}))),
                ("status".into(), raw(&serde_json::json!({"text": "b"}))),
            ],
        };
        let events: Vec<Event> = EventBatch::decode(3, &batch.encode()).unwrap().into_events(2).collect();
        assert_eq!(events.len(), 2);
        assert_eq!(events[1].id, EventId::At(2, 4));
        assert_eq!(events[0].data.get(), r#"{"text":"a\n\u0000"}"#);
        assert_eq!(events[1].kind, "status");
    }
}
