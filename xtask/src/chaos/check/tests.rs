//! Shows that the checker finds what it is there for: a history in which all is well, and the same history broken in one place.

use super::super::record::{EventId, Manner, Read, Seen, Stream, Turn};
use super::super::rules::next_hash;
use super::super::tables::{ConversationRow, EventsRow, KeyRow, LoadRow, MarkerRow};
use super::*;

const BOUNDS: Bounds = Bounds { attempts_max: 3, hot_bytes_max: 1 << 20 };

/// What a run leaves behind.
struct World {
    record: Record,
    tables: Tables,
}

impl World {
    /// Two orgs with the same conversation: in each, three messages that are answered, one that traps, one that is cancelled while it runs elsewhere.
    fn whole() -> World {
        let mut world = World { record: Record::new(), tables: Tables::default() };
        for org in ["ants", "bees"] {
            let (mut state, mut parent, mut after) = ((0, 0), format!("root-{org}"), None);
            for (seq, manner) in (0..).zip([Manner::Say, Manner::Trap, Manner::Say, Manner::Say, Manner::Say]) {
                let last = seq == 4;
                let text = format!("{} 0 0 {org}.c1-{seq}", manner.word());
                let lane = LaneId { org: org.into(), conversation: "c1".into() };
                let at = 1_000 * seq as u64;
                let mut turn = Turn::new(lane, format!("c1-{seq}"), text.clone(), manner, at);
                turn.after = after;
                let place = world.record.begin(turn);
                let id = format!("{org}-turn-{seq}");
                world.record.accepted(place, &id);
                let hash = next_hash(state.1, &text);
                let reply = format!("{} {:016x} {hash:016x}", state.0 + 1, state.1);
                let (outcome, reply, failure, cancelled_by) = match (manner, last) {
                    (Manner::Trap, _) => ("failed", None, Some("worker_trapped"), None),
                    (_, true) => ("cancelled", None, None, Some("user")),
                    _ => ("completed", Some(reply), None, None),
                };
                let turn = &mut world.record.turns[place];
                turn.cancelled_at = last.then_some(at + 5);
                turn.streams = vec![Stream::default(), Stream { after: Some(EventId::At(1, 0)) }];
                let delta = serde_json::json!({"text": reply.as_deref().unwrap_or("…")}).to_string();
                let end = match outcome {
                    "completed" => serde_json::json!({"reply": {"text": reply}, "replaces_deltas": false}),
                    "failed" => serde_json::json!({"code": failure}),
                    _ => serde_json::json!({"by": cancelled_by}),
                };
                let kinds = [
                    (0, "0.0", "turn.accepted", "{}".to_owned()),
                    (0, "1.0", "turn.started", r#"{"attempt":1}"#.to_owned()),
                    (1, "1.1", "output.delta", r#"{"text":"void"}"#.to_owned()),
                    (1, "2.0", "turn.restarted", r#"{"attempt":2}"#.to_owned()),
                    (1, "2.1", "output.delta", delta),
                    (1, "end", &format!("turn.{outcome}"), end.to_string()),
                ];
                for (stream, id, kind, data) in kinds {
                    let id = EventId::parse(id).unwrap();
                    turn.events.push(Seen {
                        at: at + 10,
                        stream,
                        replica: 0,
                        id,
                        kind: kind.into(),
                        data: data.into(),
                    });
                }
                let end = turn.told().unwrap();
                turn.reads.push(Read { at: at + 20, replica: 1, end });
                world.tables.turns.push(TurnRow {
                    org: org.into(),
                    id: id.clone(),
                    conversation: Some("c1".into()),
                    seq: Some(seq),
                    run: Some(id.clone()),
                    text: Some(text),
                    outcome: Some(outcome.into()),
                    reply: reply.clone(),
                    failure: failure.map(Into::into),
                    cancelled_by: cancelled_by.map(Into::into),
                    started_at: Some(10_000 * seq + 1),
                    ended_at: Some(10_000 * seq + 9),
                    end_epoch: Some(2),
                    attempts: Some(2),
                });
                for epoch in [1, 2] {
                    world.tables.events.push(EventsRow {
                        org: org.into(),
                        turn: id.clone(),
                        epoch,
                        first: 1,
                        count: 1,
                    });
                }
                let key = format!("c1-{seq}");
                world.tables.keys.push(KeyRow { org: org.into(), conversation: "c1".into(), key, turn: id.clone() });
                if reply.is_some() {
                    state = (state.0 + 1, hash);
                    world.tables.snapshots.push(SnapshotRow {
                        org: org.into(),
                        conversation: "c1".into(),
                        run: id.clone(),
                        parent: std::mem::replace(&mut parent, id.clone()),
                        turn: id,
                        state: Some(format!("{} {hash:016x}", state.0)),
                    });
                }
                after = Some(place);
            }
            world.tables.conversations.push(ConversationRow {
                org: org.into(),
                conversation: "c1".into(),
                next_seq: 5,
                generation: format!("root-{org}"),
                head: parent,
                deleted: false,
            });
            world.tables.load.push(LoadRow { org: org.into(), waiting: 0, ready: 0, running: 0, markers: 0 });
        }
        world
    }

    /// The rules that do not hold.
    fn broken(&self) -> Vec<&'static str> {
        let mut found = record(&self.record);
        found.extend(tables(&self.record, &self.tables, BOUNDS));
        let mut rules: Vec<&'static str> = self.record.violations.iter().chain(&found).map(|v| v.rule).collect();
        rules.sort_unstable();
        rules.dedup();
        rules
    }

    fn row(&mut self, id: &str) -> &mut TurnRow {
        self.tables.turns.iter_mut().find(|row| row.id == id).unwrap()
    }

    fn turn(&mut self, id: &str) -> &mut Turn {
        let place = self.record.find(id).unwrap();
        &mut self.record.turns[place]
    }
}

/// The history with one thing changed must break this rule, perhaps among others.
#[track_caller]
fn breaks(rule: &str, change: impl FnOnce(&mut World)) {
    let mut world = World::whole();
    change(&mut world);
    let broken = world.broken();
    assert!(broken.contains(&rule), "expected a violation of {rule}, found {broken:?}");
}

#[test]
fn a_history_in_which_all_is_well_breaks_nothing() {
    let world = World::whole();
    assert_eq!(world.broken(), Vec::<&str>::new());
    assert_eq!(unchanged(&world.tables, &world.tables), vec![]);
}

#[test]
fn a_second_terminal_event_is_found() {
    breaks("T1", |world| {
        let turn = world.turn("ants-turn-0");
        let mut again = turn.events.last().unwrap().clone();
        (again.kind, again.data) = ("turn.cancelled".into(), r#"{"by":"user"}"#.into());
        turn.events.push(again);
    });
}

#[test]
fn a_lost_turn_is_found_by_its_client_and_in_the_tables() {
    breaks("T1", |world| {
        let turn = world.turn("ants-turn-0");
        turn.events.pop();
        turn.reads.clear();
    });
    breaks("T1", |world| world.tables.turns.retain(|row| row.id != "ants-turn-4"));
    breaks("T1", |world| {
        let row = world.row("ants-turn-4");
        (row.outcome, row.cancelled_by) = (None, None);
    });
}

#[test]
fn a_message_that_became_two_turns_is_found() {
    breaks("T1", |world| {
        let mut again = world.row("ants-turn-4").clone();
        again.id = "another".into();
        world.tables.turns.push(again);
    });
    breaks("T1", |world| {
        let place = world.record.find("ants-turn-4").unwrap();
        world.record.accepted(place, "another");
    });
    breaks("T1", |world| world.tables.keys[0].turn = "another".into());
}

#[test]
fn an_end_that_changed_afterwards_is_found() {
    breaks("T2", |world| world.turn("ants-turn-1").reads[0].end.state = "completed".into());
    breaks("T2", |world| world.row("ants-turn-4").cancelled_by = Some("admin".into()));
    breaks("T2", |world| world.turn("ants-turn-2").reads[0].end.state = "running".into());
}

#[test]
fn what_was_written_after_everything_had_ended_is_found() {
    let world = World::whole();
    let mut later = world.tables.clone();
    later.events.push(EventsRow { org: "ants".into(), turn: "ants-turn-0".into(), epoch: 1, first: 9, count: 1 });
    assert_eq!(unchanged(&world.tables, &later)[0].rule, "R2");
    breaks("R2", |world| world.tables.events[0].epoch = 3);
}

#[test]
fn a_forked_chain_is_found() {
    // Two runs of one parent, as two replicas that both thought the conversation theirs would leave it.
    breaks("S3", |world| {
        let parent = world.tables.snapshots[1].parent.clone();
        world.tables.snapshots[2].parent = parent;
    });
    // A turn that began from an older state than the one before it had left.
    breaks("S3", |world| {
        let text = world.row("ants-turn-3").text.clone().unwrap();
        let reply = format!("1 {:016x} {:016x}", 0, next_hash(0, &text));
        world.row("ants-turn-3").reply = Some(reply.clone());
        let turn = world.turn("ants-turn-3");
        let data = serde_json::json!({"reply": {"text": reply}, "replaces_deltas": true}).to_string();
        turn.events.last_mut().unwrap().data = data.into();
        turn.reads.clear();
    });
    breaks("S3", |world| world.tables.conversations[0].head = "ants-turn-0".into());
}

#[test]
fn a_snapshot_of_a_turn_that_failed_is_found() {
    breaks("S4", |world| {
        let mut snapshot = world.tables.snapshots[0].clone();
        (snapshot.run, snapshot.turn, snapshot.parent) =
            ("ants-turn-1".into(), "ants-turn-1".into(), "somewhere".into());
        world.tables.snapshots.push(snapshot);
    });
    breaks("S7", |world| world.tables.snapshots[0].state = Some("7 0000000000000000".into()));
}

#[test]
fn a_reply_to_another_message_is_found() {
    breaks("S3", |world| world.turn("ants-turn-0").text = "say 0 0 ants.something-else".into());
}

#[test]
fn turns_out_of_order_are_found() {
    breaks("T9", |world| {
        world.row("ants-turn-2").seq = Some(3);
        world.row("ants-turn-3").seq = Some(2);
    });
    breaks("T9", |world| world.row("ants-turn-3").started_at = Some(1));
    breaks("T9", |world| {
        // Seen by the client alone: the second was accepted when the first had not been sent yet.
        let (first, second) = (world.record.find("ants-turn-0").unwrap(), world.record.find("ants-turn-2").unwrap());
        world.record.turns[first].after = Some(second);
        world.record.turns[second].after = None;
        world.tables.turns.clear();
    });
}

#[test]
fn another_orgs_message_is_found() {
    breaks("O1", |world| world.row("ants-turn-0").org = "bees".into());
    breaks("O1", |world| world.row("ants-turn-0").text = Some("what nobody sent".into()));
    breaks("S3", |world| {
        let foreign = world.turn("bees-turn-0").events.last().unwrap().data.clone();
        world.turn("ants-turn-0").events.last_mut().unwrap().data = foreign;
    });
}

#[test]
fn events_that_come_twice_or_in_disorder_are_found() {
    breaks("E2", |world| {
        let turn = world.turn("ants-turn-0");
        let again = turn.events[2].clone();
        turn.events.insert(3, again);
    });
    breaks("E2", |world| {
        // The second stream was asked to go on after what it then begins with.
        world.turn("ants-turn-0").streams[1].after = Some(EventId::At(1, 1));
    });
    breaks("E1", |world| {
        let turn = world.turn("ants-turn-0");
        turn.streams.push(Stream::default());
        let mut other = turn.events[1].clone();
        (other.stream, other.data) = (2, r#"{"attempt":9}"#.into());
        let mut first = turn.events[0].clone();
        first.stream = 2;
        turn.events.extend([first, other]);
    });
    breaks("E1", |world| world.tables.events[1] = world.tables.events[0].clone());
}

#[test]
fn a_replica_whose_clock_decides_is_found() {
    breaks("R3", |world| {
        let turn = world.turn("ants-turn-0");
        turn.streams.push(Stream::default());
        turn.events[0].data = r#"{"accepted_at":"2026-11-25T17:38:05.834Z"}"#.into();
        let data = r#"{"accepted_at":"2026-11-25T17:28:05.834Z"}"#.into();
        let again = Seen { stream: 2, data, ..turn.events[0].clone() };
        turn.events.push(again);
    });
}

#[test]
fn an_event_that_a_reconnect_lost_is_found() {
    breaks("E3", |world| {
        // The reply's own delta.
        world.turn("ants-turn-0").events.remove(4);
    });
}

#[test]
fn a_resync_explains_what_comes_again_and_nothing_else() {
    let mut world = World::whole();
    let turn = world.turn("ants-turn-0");
    let mut resync = turn.events[2].clone();
    (resync.kind, resync.data, resync.id) =
        ("resync".into(), r#"{"state":"running","text":""}"#.into(), EventId::At(1, 0));
    let again = turn.events[2].clone();
    turn.streams.push(Stream { after: Some(EventId::At(1, 1)) });
    for event in &mut turn.events[3..] {
        event.stream = 2;
    }
    (resync.stream, resync.at) = (2, 0);
    turn.events.insert(3, Seen { stream: 2, ..again });
    turn.events.insert(3, resync);
    assert_eq!(world.broken(), Vec::<&str>::new());
    breaks("E5", |world| {
        let turn = world.turn("ants-turn-0");
        (turn.events[2].kind, turn.events[2].data) = ("resync".into(), "{}".into());
    });
}

#[test]
fn a_marker_that_is_left_and_a_count_that_is_wrong_are_found() {
    breaks("R9", |world| {
        let (org, turn, state) = ("ants".into(), "ants-turn-0".into(), "running".into());
        world.tables.markers.push(MarkerRow { org, turn, state, attempt: 1 });
    });
    breaks("O3", |world| world.tables.load[0].running = 1);
    breaks("hot table", |world| world.tables.hot_bytes = 2 << 20);
    breaks("T10", |world| world.row("ants-turn-0").attempts = Some(4));
}

#[test]
fn an_end_that_nobody_asked_for_is_found() {
    breaks("T4", |world| world.turn("ants-turn-4").cancelled_at = None);
    breaks("T4", |world| {
        let turn = world.turn("ants-turn-1");
        turn.events.last_mut().unwrap().data = r#"{"code":"internal"}"#.into();
    });
}

#[test]
fn what_a_deletion_leaves_is_found() {
    breaks("S8", |world| world.tables.conversations[0].deleted = true);
}
