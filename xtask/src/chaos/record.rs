//! What the clients saw, and what was done to the servers meanwhile: the record that the checker judges. Data only; clients and faults write it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Instant;

use serde_json::Value;

/// Milliseconds since the run began.
pub type At = u64;

/// An event's id, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EventId {
    At(u32, u32),
    End,
}

impl EventId {
    pub fn parse(text: &str) -> Option<EventId> {
        if text == "end" {
            return Some(EventId::End);
        }
        let (epoch, seq) = text.split_once('.')?;
        Some(EventId::At(epoch.parse().ok()?, seq.parse().ok()?))
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EventId::At(epoch, seq) => write!(f, "{epoch}.{seq}"),
            EventId::End => f.write_str("end"),
        }
    }
}

/// An event on one of a turn's streams.
#[derive(Debug, Clone)]
pub struct Seen {
    pub at: At,
    /// Counts the streams of its turn; a stream that begins anew has a number of its own.
    pub stream: u32,
    pub replica: usize,
    pub id: EventId,
    pub kind: Box<str>,
    pub data: Box<str>,
}

impl Seen {
    pub fn is_terminal(&self) -> bool {
        matches!(&*self.kind, "turn.completed" | "turn.failed" | "turn.cancelled")
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_default()
    }
}

/// One stream of a turn's events.
#[derive(Debug, Clone, Default)]
pub struct Stream {
    /// The event that it was asked to go on after.
    pub after: Option<EventId>,
}

/// A turn's resource as it was read at some time.
#[derive(Debug, Clone)]
pub struct Read {
    pub at: At,
    pub replica: usize,
    /// What of it may not change once the turn has ended.
    pub end: End,
}

/// How a turn stands, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub state: String,
    /// The reply's text, the failure's code, or who cancelled.
    pub what: String,
}

impl End {
    /// Of a turn's resource.
    pub fn of_turn(turn: &Value) -> End {
        let state = turn["state"].as_str().unwrap_or_default().to_owned();
        let what = match state.as_str() {
            "completed" => &turn["reply"]["text"],
            "failed" => &turn["failure"]["code"],
            "cancelled" => &turn["cancelled_by"],
            _ => &Value::Null,
        };
        End { what: what.as_str().unwrap_or_default().to_owned(), state }
    }

    /// Of a terminal event.
    pub fn of_event(event: &Seen) -> End {
        let data = event.json();
        let (state, what) = match &*event.kind {
            "turn.completed" => ("completed", &data["reply"]["text"]),
            "turn.failed" => ("failed", &data["code"]),
            _ => ("cancelled", &data["by"]),
        };
        End { state: state.to_owned(), what: what.as_str().unwrap_or_default().to_owned() }
    }

    pub fn is_final(&self) -> bool {
        matches!(self.state.as_str(), "completed" | "failed" | "cancelled")
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.state)?;
        if self.what.is_empty() { Ok(()) } else { write!(f, " ({})", self.what) }
    }
}

/// What a message asks its worker to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Answer.
    Say,
    /// Loop until it is stopped.
    Spin,
    /// Trap after the state was saved.
    Trap,
    /// Save, and say nothing.
    Mute,
}

impl Manner {
    pub fn word(self) -> &'static str {
        match self {
            Manner::Say => "say",
            Manner::Spin => "spin",
            Manner::Trap => "trap",
            Manner::Mute => "mute",
        }
    }
}

/// `org/conversation`: every org has the same agent and the same conversations.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LaneId {
    pub org: String,
    pub conversation: String,
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.conversation)
    }
}

/// One message, and everything that was seen of its turn.
#[derive(Debug, Clone)]
pub struct Turn {
    pub lane: LaneId,
    /// How often its conversation had been deleted before.
    pub generation: u32,
    pub text: String,
    pub key: String,
    pub manner: Manner,
    pub on_busy: &'static str,
    /// A turn of the same conversation that was known to be accepted before this was first sent.
    pub after: Option<usize>,
    pub sent_at: At,
    /// How often it was sent.
    pub sends: u32,
    /// When the host said that it is accepted.
    pub accepted_at: Option<At>,
    pub id: Option<String>,
    pub streams: Vec<Stream>,
    pub events: Vec<Seen>,
    pub reads: Vec<Read>,
    /// The client asked for its end, by name or by an interrupting message.
    pub cancelled_at: Option<At>,
    /// Its conversation was deleted: it may be gone.
    pub deleted_at: Option<At>,
    /// The host does not know it any more.
    pub gone_at: Option<At>,
}

impl Turn {
    pub fn new(lane: LaneId, key: String, text: String, manner: Manner, sent_at: At) -> Turn {
        Turn {
            lane,
            generation: 0,
            text,
            key,
            manner,
            on_busy: "enqueue",
            after: None,
            sent_at,
            sends: 0,
            accepted_at: None,
            id: None,
            streams: Vec::new(),
            events: Vec::new(),
            reads: Vec::new(),
            cancelled_at: None,
            deleted_at: None,
            gone_at: None,
        }
    }

    /// What its client was told of its end.
    pub fn told(&self) -> Option<End> {
        self.events.iter().find(|event| event.is_terminal()).map(End::of_event)
    }

    /// Where a stream that follows on from those before would go on.
    pub fn cursor(&self) -> Option<EventId> {
        self.events.last().map(|event| event.id)
    }

    /// Nothing more can be learned of it.
    pub fn is_over(&self) -> bool {
        self.gone_at.is_some() || self.told().is_some()
    }
}

/// Something that was done to a server.
#[derive(Debug, Clone)]
pub struct Disturbance {
    pub lane: super::plan::Lane,
    pub kind: &'static str,
    pub what: String,
    pub from: At,
    /// When everything stood again; `None` while it does not.
    pub to: Option<At>,
}

/// A rule that did not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// `T1`, `S3`, …
    pub rule: &'static str,
    pub what: String,
    /// The turns that it is about, by their place in the record.
    pub turns: Vec<usize>,
}

/// Everything that was seen.
#[derive(Debug)]
pub struct Record {
    pub began: Instant,
    pub turns: Vec<Turn>,
    pub lanes: BTreeMap<LaneId, Vec<usize>>,
    pub disturbances: Vec<Disturbance>,
    pub violations: Vec<Violation>,
    /// How often clients did what, for the summary.
    pub counts: BTreeMap<&'static str, u64>,
    /// How often an answer was of this status.
    pub statuses: BTreeMap<String, u64>,
    by_id: HashMap<String, usize>,
}

impl Record {
    pub fn new() -> Record {
        Record {
            began: Instant::now(),
            turns: Vec::new(),
            lanes: BTreeMap::new(),
            disturbances: Vec::new(),
            violations: Vec::new(),
            counts: BTreeMap::new(),
            statuses: BTreeMap::new(),
            by_id: HashMap::new(),
        }
    }

    pub fn now(&self) -> At {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A message is about to be sent.
    pub fn begin(&mut self, turn: Turn) -> usize {
        let place = self.turns.len();
        self.lanes.entry(turn.lane.clone()).or_default().push(place);
        self.turns.push(turn);
        place
    }

    /// The host has said that it accepted the message, and as which turn.
    pub fn accepted(&mut self, place: usize, id: &str) {
        let now = self.now();
        let turn = &mut self.turns[place];
        turn.accepted_at.get_or_insert(now);
        match &turn.id {
            None => turn.id = Some(id.to_owned()),
            Some(known) if known == id => return,
            Some(known) => {
                let what = format!("key {} was turn {known} and is now turn {id}", turn.key);
                self.violation("T1", what, vec![place]);
                return;
            }
        }
        if let Some(other) = self.by_id.insert(id.to_owned(), place) {
            let what = format!("two messages were accepted as one turn, {id}");
            self.violation("T1", what, vec![other, place]);
        }
    }

    pub fn violation(&mut self, rule: &'static str, what: String, turns: Vec<usize>) {
        let violation = Violation { rule, what, turns };
        // The same turn may be judged more than once.
        if !self.violations.contains(&violation) {
            eprintln!("  violation of {rule}: {}", violation.what);
            self.violations.push(violation);
        }
    }

    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub fn find(&self, id: &str) -> Option<usize> {
        self.by_id.get(id).copied()
    }
}
