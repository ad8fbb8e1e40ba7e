//! What must hold of the record alone, without a look at the tables: of each turn as its client saw it, and of each conversation. Pure.

use std::collections::HashMap;

use serde_json::Value;
use time::format_description::well_known::Rfc3339;
use time::{Duration, OffsetDateTime};

use super::record::{End, EventId, LaneId, Manner, Record, Seen, Turn, Violation};

/// FNV-1a over the hash so far and the message, as the worker `chain` computes it.
pub fn next_hash(before: u64, message: &str) -> u64 {
    let bytes = before.to_le_bytes().into_iter().chain(message.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// What a reply says of its conversation's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    pub count: u64,
    pub before: u64,
    pub after: u64,
}

impl Link {
    /// The first three words of a reply.
    pub fn parse(reply: &str) -> Option<Link> {
        let mut words = reply.split_whitespace();
        let count = words.next()?.parse().ok()?;
        let mut hash = || u64::from_str_radix(words.next()?, 16).ok();
        Some(Link { count, before: hash()?, after: hash()? })
    }
}

/// Between when a message was received and when that was written. More than a batch waits for its database, much less than a clock is wrong.
const ACCEPTANCE_SLACK: Duration = Duration::seconds(30);

/// How a turn may fail that nobody is to blame for: a host was lost, or there was no time for it.
const BAD_LUCK: [&str; 7] = [
    "host_lost",
    "host_draining",
    "attempts_exhausted",
    "admission_timeout",
    "queue_timeout",
    "turn_timeout",
    "idle_timeout",
];

/// Everything that is wrong with one turn, as its client saw it: which rule, and how.
pub fn of_turn(turn: &Turn) -> Vec<(&'static str, String)> {
    let mut wrong = Vec::new();
    events(turn, &mut wrong);
    ends(turn, &mut wrong);
    acceptance(turn, &mut wrong);
    wrong
}

/// E1, E2, E3 and T1 on the streams of a turn.
fn events(turn: &Turn, wrong: &mut Vec<(&'static str, String)>) {
    let mut known: HashMap<EventId, (&str, &str)> = HashMap::new();
    let mut text = String::new();
    let (mut cursor, mut stream) = (None, u32::MAX);
    let mut started = false;
    for event in &turn.events {
        if event.stream != stream {
            // A stream goes on where its client's last one ended, or begins anew.
            stream = event.stream;
            cursor = turn.streams.get(stream as usize).and_then(|stream| stream.after);
            if cursor.is_none() {
                (text, started) = (String::new(), false);
            }
        }
        let data = event.json();
        if &*event.kind == "resync" {
            if Some(event.id) > cursor {
                wrong.push(("E5", format!("resync goes on from {}, after what was asked for", event.id)));
            }
            cursor = Some(event.id);
            text = data["text"].as_str().unwrap_or_default().to_owned();
            continue;
        }
        if Some(event.id) <= cursor {
            let at = cursor.map(|id| id.to_string()).unwrap_or_default();
            wrong.push(("E2", format!("event {} came after event {at} on stream {stream}", event.id)));
        }
        if cursor == Some(EventId::End) {
            wrong.push(("T1", format!("event {} came after the end", event.id)));
        }
        cursor = Some(event.id);
        let (kind, body) = (&*event.kind, &*event.data);
        if let Some(&(had_kind, had_body)) = known.get(&event.id)
            && (had_kind, stable(had_kind, had_body)) != (kind, stable(kind, body))
        {
            wrong.push(("E1", format!("event {} was {had_kind} {had_body} and is {kind} {body}", event.id)));
        }
        known.insert(event.id, (kind, body));
        match kind {
            "turn.accepted" if event.id != EventId::At(0, 0) => {
                wrong.push(("E1", format!("turn.accepted has the id {}", event.id)));
            }
            "turn.started" if started => wrong.push(("E1", "turn.started came twice".to_owned())),
            "turn.started" => started = true,
            "turn.restarted" => text.clear(),
            "output.delta" => text.push_str(data["text"].as_str().unwrap_or_default()),
            "turn.completed" if data["replaces_deltas"] == false => {
                let reply = data["reply"]["text"].as_str().unwrap_or_default();
                if reply != text {
                    wrong.push(("E3", format!("the deltas are {text:?} and the reply is {reply:?}")));
                }
            }
            _ => {}
        }
        if event.is_terminal() != (event.id == EventId::End) {
            wrong.push(("E1", format!("{kind} has the id {}", event.id)));
        }
    }
    for (index, stream) in (0..).zip(&turn.streams) {
        let of_it: Vec<&Seen> = turn.events.iter().filter(|event| event.stream == index).collect();
        let ends = of_it.iter().filter(|event| event.is_terminal()).count();
        // None at all is lawful: a host that leaves, or whose store does, lets its streams end, and their clients come back.
        if ends > 1 {
            wrong.push(("T1", format!("stream {index} has {ends} terminal events")));
        }
        let first = of_it.first().map(|event| &*event.kind);
        if stream.after.is_none() && first.is_some_and(|kind| kind != "turn.accepted") {
            wrong.push(("E2", format!("stream {index} from the start begins with {}", first.unwrap_or_default())));
        }
    }
}

/// What of an event may not change: what was said. Usage may be measured more than once, and the time of acceptance is judged for itself.
fn stable(kind: &str, body: &str) -> String {
    let mut data: Value = serde_json::from_str(body).unwrap_or_default();
    match kind {
        "turn.completed" => data["reply"].to_string(),
        "turn.accepted" => {
            data["accepted_at"].take();
            data.to_string()
        }
        _ => body.to_owned(),
    }
}

/// R3: one turn was accepted at one time, whichever replica says it and whatever its clock does.
fn acceptance(turn: &Turn, wrong: &mut Vec<(&'static str, String)>) {
    let accepted = turn.events.iter().filter(|event| &*event.kind == "turn.accepted");
    let times: Vec<OffsetDateTime> = accepted
        .filter_map(|event| OffsetDateTime::parse(event.json()["accepted_at"].as_str()?, &Rfc3339).ok())
        .collect();
    if let (Some(first), Some(last)) = (times.iter().min(), times.iter().max())
        && *last - *first > ACCEPTANCE_SLACK
    {
        wrong.push(("R3", format!("it was accepted at {first}, and at {last}")));
    }
}

/// T1, T2, T4, T8 and R1 on how a turn ended.
fn ends(turn: &Turn, wrong: &mut Vec<(&'static str, String)>) {
    let told: Vec<End> = turn.events.iter().filter(|event| event.is_terminal()).map(End::of_event).collect();
    if let Some(pair) = told.windows(2).find(|pair| pair[0] != pair[1]) {
        wrong.push(("T1", format!("it ended twice: {}; {}", pair[0], pair[1])));
    }
    let first = told.first().or_else(|| turn.reads.iter().map(|read| &read.end).find(|end| end.is_final()));
    let Some(end) = first else {
        if turn.id.is_some() && turn.gone_at.is_none() {
            wrong.push(("T1", "it was accepted and its client heard no end".to_owned()));
        }
        return;
    };
    let ended_at = turn.events.iter().find(|event| event.is_terminal()).map(|event| event.at);
    for read in &turn.reads {
        let after_the_end = ended_at.is_some_and(|at| read.at >= at);
        if (read.end.is_final() || after_the_end) && read.end != *end {
            let (at, replica) = (read.at, read.replica);
            wrong.push(("T2", format!("it ended {end}; at {at} ms replica {replica} says {}", read.end)));
        }
    }
    if let Some(fault) = unexpected(turn, end) {
        wrong.push(fault);
    }
}

/// Whether a turn may end so.
fn unexpected(turn: &Turn, end: &End) -> Option<(&'static str, String)> {
    let lawful = match (end.state.as_str(), turn.manner) {
        ("completed", Manner::Say) => match Link::parse(&end.what) {
            Some(link) if next_hash(link.before, &turn.text) == link.after => true,
            _ => return Some(("S3", format!("the reply {:?} is none to this message", end.what))),
        },
        ("failed", manner) => {
            let code = end.what.as_str();
            BAD_LUCK.contains(&code)
                || match manner {
                    Manner::Say => false,
                    Manner::Spin => code == "cpu_timeout",
                    Manner::Trap => code == "worker_trapped" || code == "worker_exit",
                    Manner::Mute => code == "no_reply",
                }
        }
        ("cancelled", _) => match end.what.as_str() {
            "deleted" => turn.deleted_at.is_some(),
            "user" | "interrupt" | "admin" => turn.cancelled_at.is_some(),
            _ => false,
        },
        _ => false,
    };
    (!lawful).then(|| ("T4", format!("a turn that was told to {} ended {end}", turn.manner.word())))
}

/// S3, S4, T9 of a conversation as its client saw it: the replies of each generation form one chain from nothing, in the order of acceptance.
pub fn of_lane(record: &Record, lane: &LaneId) -> Vec<Violation> {
    let mut violations = Vec::new();
    let places = record.lanes.get(lane).map(Vec::as_slice).unwrap_or_default();
    let mut generations: HashMap<u32, Vec<(Link, usize)>> = HashMap::new();
    for &place in places {
        let turn = &record.turns[place];
        let told = turn.told().filter(|end| end.state == "completed");
        if let Some(link) = told.and_then(|end| Link::parse(&end.what)) {
            generations.entry(turn.generation).or_default().push((link, place));
        }
    }
    for (generation, mut links) in generations {
        links.sort_by_key(|(link, _)| link.count);
        // What a deletion took along was in the chain as well, and nobody heard of it.
        let lost = places.iter().map(|&place| &record.turns[place]);
        let lost = lost.filter(|turn| turn.generation == generation && turn.told().is_none()).count() as u64;
        let mut previous = Link { count: 0, before: 0, after: 0 };
        let mut previous_place = None;
        for &(link, place) in &links {
            let turns: Vec<usize> = previous_place.into_iter().chain([place]).collect();
            if link.count == previous.count {
                let what = format!("two turns of {lane} are number {} of their chain", link.count);
                violations.push(Violation { rule: "S3", what, turns });
            } else if link.count == previous.count + 1 && link.before != previous.after {
                let what = format!(
                    "turn number {} of {lane} begins at {:016x}, and the one before it left {:016x}",
                    link.count, link.before, previous.after
                );
                violations.push(Violation { rule: "S3", what, turns });
            } else if link.count > previous.count + 1 + lost {
                let what =
                    format!("between turn number {} and {} of {lane} some are missing", previous.count, link.count);
                violations.push(Violation { rule: "S3", what, turns });
            }
            (previous, previous_place) = (link, Some(place));
        }
        let counts: HashMap<usize, u64> = links.iter().map(|&(link, place)| (place, link.count)).collect();
        for &(link, place) in &links {
            // Acceptance is known to be in this order only where the client waited for it.
            let mut before = record.turns[place].after;
            while let Some(earlier) = before {
                if record.turns[earlier].generation != generation {
                    break;
                }
                if let Some(&count) = counts.get(&earlier) {
                    if count > link.count {
                        let what = format!("turn number {} of {lane} was accepted before number {}", count, link.count);
                        violations.push(Violation { rule: "T9", what, turns: vec![earlier, place] });
                    }
                    break;
                }
                before = record.turns[earlier].after;
            }
        }
    }
    violations
}
