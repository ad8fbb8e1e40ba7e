//! The checker: holds the record and the tables against what must always be so. Pure.
//!
//! The record's own rules are in [`super::rules`]; here is what takes the tables, or two readings of them.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::record::{End, LaneId, Record, Violation};
use super::rules::{self, Link};
use super::tables::{SnapshotRow, Tables, TurnRow};

/// What the run was set to.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub attempts_max: i64,
    /// Of the hot table with its indexes.
    pub hot_bytes_max: i64,
}

/// Two turns' times may be taken in one order and written in the other, by as much as a statement waits for a lock.
const CLOCK_SLACK_MS: i64 = 2_000;

/// What is wrong with the record alone.
pub fn record(record: &Record) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (place, turn) in record.turns.iter().enumerate() {
        let wrong = rules::of_turn(turn).into_iter();
        violations.extend(wrong.map(|(rule, what)| Violation { rule, what, turns: vec![place] }));
    }
    for lane in record.lanes.keys() {
        violations.extend(rules::of_lane(record, lane));
    }
    violations
}

/// What is wrong with the tables of servers that have nothing to do any more, given the record.
pub fn tables(record: &Record, tables: &Tables, bounds: Bounds) -> Vec<Violation> {
    let mut check = Check { record, violations: Vec::new() };
    check.quiet(tables, bounds);
    check.turns(tables, bounds);
    check.conversations(tables);
    check.events(tables);
    check.keys(tables);
    check.violations
}

/// What changed between two readings although nothing was going on: R2 and T2.
pub fn unchanged(before: &Tables, after: &Tables) -> Vec<Violation> {
    let mut changed = Vec::new();
    let mut compare = |what: &str, same: bool| {
        if !same {
            changed.push(Violation {
                rule: "R2",
                what: format!("{what} changed after everything had ended"),
                turns: vec![],
            });
        }
    };
    fn set<T: std::fmt::Debug>(rows: &[T]) -> HashSet<String> {
        rows.iter().map(|row| format!("{row:?}")).collect()
    }
    compare("turns", set(&before.turns) == set(&after.turns));
    compare("snapshots", set(&before.snapshots) == set(&after.snapshots));
    compare("conversations", set(&before.conversations) == set(&after.conversations));
    compare("turn_events", set(&before.events) == set(&after.events));
    changed
}

struct Check<'a> {
    record: &'a Record,
    violations: Vec<Violation>,
}

impl Check<'_> {
    fn wrong(&mut self, rule: &'static str, what: String, turns: Vec<usize>) {
        self.violations.push(Violation { rule, what, turns });
    }

    fn place(&self, turn: &str) -> Vec<usize> {
        self.record.find(turn).into_iter().collect()
    }

    /// R9: nothing is owed, nothing is counted, and the hot table is small.
    fn quiet(&mut self, tables: &Tables, bounds: Bounds) {
        for marker in &tables.markers {
            let what =
                format!("the marker of turn {} is left, {}, attempt {}", marker.turn, marker.state, marker.attempt);
            self.wrong("R9", what, self.place(&marker.turn));
        }
        for load in &tables.load {
            if (load.waiting, load.ready, load.running) != (0, 0, 0) || load.markers != 0 {
                let what = format!(
                    "org_load of {} says {} waiting, {} ready, {} running, where {} markers are left",
                    load.org, load.waiting, load.ready, load.running, load.markers
                );
                self.wrong("O3", what, vec![]);
            }
        }
        if tables.hot_bytes > bounds.hot_bytes_max {
            let what = format!("turn_markers takes {} bytes, over {}", tables.hot_bytes, bounds.hot_bytes_max);
            self.wrong("hot table", what, vec![]);
        }
    }

    /// T1, T2, O1 and the bound on attempts.
    fn turns(&mut self, tables: &Tables, bounds: Bounds) {
        let rows = tables.turns_by_id();
        let by_text: HashMap<&str, usize> =
            self.record.turns.iter().enumerate().map(|(place, turn)| (turn.text.as_str(), place)).collect();
        let mut times: HashMap<usize, Vec<&str>> = HashMap::new();
        for row in &tables.turns {
            let Some(&place) = row.text.as_deref().and_then(|text| by_text.get(text)) else {
                let what = format!("turn {} has the message {:?}, which nobody sent", row.id, row.text);
                self.wrong("O1", what, vec![]);
                continue;
            };
            times.entry(place).or_default().push(&row.id);
            let turn = &self.record.turns[place];
            if turn.lane.org != row.org || Some(&turn.lane.conversation) != row.conversation.as_ref() {
                let what = format!("a message to {} is in {}/{:?}", turn.lane, row.org, row.conversation);
                self.wrong("O1", what, vec![place]);
            }
            if row.outcome.is_none() {
                self.wrong("T1", format!("turn {} has no end", row.id), vec![place]);
            }
            if row.attempts.is_some_and(|attempts| attempts > bounds.attempts_max) {
                let what = format!("turn {} was attempted {:?} times of {}", row.id, row.attempts, bounds.attempts_max);
                self.wrong("T10", what, vec![place]);
            }
        }
        for (place, turn) in self.record.turns.iter().enumerate() {
            let ids = times.get(&place).map(Vec::as_slice).unwrap_or_default();
            if ids.len() > 1 {
                let what = format!("one message is {} turns: {}", ids.len(), ids.join(", "));
                self.wrong("T1", what, vec![place]);
            }
            let Some(id) = &turn.id else { continue };
            let Some(row) = rows.get(id.as_str()) else {
                if turn.deleted_at.is_none() {
                    self.wrong("T1", format!("turn {id} was accepted and is in no table"), vec![place]);
                }
                continue;
            };
            let end = end_of(row);
            if let Some(told) = turn.told().filter(|told| *told != end) {
                self.wrong("T2", format!("turn {id} was told as {told}, and its row says {end}"), vec![place]);
            }
        }
    }

    /// S3, S4, S7, S8 and T9.
    fn conversations(&mut self, tables: &Tables) {
        let mut turns: BTreeMap<LaneId, Vec<&TurnRow>> = BTreeMap::new();
        for turn in &tables.turns {
            if let Some(conversation) = &turn.conversation {
                let lane = LaneId { org: turn.org.clone(), conversation: conversation.clone() };
                turns.entry(lane).or_default().push(turn);
            }
        }
        let mut snapshots: BTreeMap<LaneId, Vec<&SnapshotRow>> = BTreeMap::new();
        for snapshot in &tables.snapshots {
            let lane = LaneId { org: snapshot.org.clone(), conversation: snapshot.conversation.clone() };
            snapshots.entry(lane).or_default().push(snapshot);
        }
        for conversation in &tables.conversations {
            let lane = LaneId { org: conversation.org.clone(), conversation: conversation.conversation.clone() };
            let mut turns = turns.remove(&lane).unwrap_or_default();
            turns.sort_by_key(|turn| turn.seq);
            let snapshots = snapshots.remove(&lane).unwrap_or_default();
            if conversation.deleted && !(turns.is_empty() && snapshots.is_empty()) {
                let what = format!("{lane} is deleted, with {} turns and {} snapshots", turns.len(), snapshots.len());
                self.wrong("S8", what, vec![]);
            }
            if let Some(turn) = turns.iter().find(|turn| turn.seq >= Some(conversation.next_seq)) {
                self.wrong("T9", format!("turn {} of {lane} has a place that is yet to come", turn.id), vec![]);
            }
            self.order(&lane, &turns);
            self.replies(&lane, &turns);
            self.chain(&lane, &conversation.generation, &conversation.head, &turns, &snapshots);
        }
        for lane in turns.keys().chain(snapshots.keys()) {
            self.wrong("S3", format!("{lane} has turns or snapshots and no row of its own"), vec![]);
        }
    }

    /// T9: one at a time, in the order of acceptance, which is also what their clients know of it.
    fn order(&mut self, lane: &LaneId, turns: &[&TurnRow]) {
        for pair in turns.windows(2) {
            let places = || [self.place(&pair[0].id), self.place(&pair[1].id)].concat();
            if pair[0].seq == pair[1].seq {
                let what = format!("turns {} and {} of {lane} have one place", pair[0].id, pair[1].id);
                self.wrong("T9", what, places());
            }
        }
        let mut ended = (i64::MIN, "");
        for turn in turns {
            if turn.started_at.is_some_and(|started| started + CLOCK_SLACK_MS < ended.0) {
                let what =
                    format!("turn {} of {lane} started before turn {}, accepted earlier, had ended", turn.id, ended.1);
                self.wrong("T9", what, [self.place(ended.1), self.place(&turn.id)].concat());
            }
            if let Some(at) = turn.ended_at.filter(|&at| at > ended.0) {
                ended = (at, &turn.id);
            }
        }
        let seqs: HashMap<usize, i64> =
            turns.iter().filter_map(|turn| Some((self.record.find(&turn.id)?, turn.seq?))).collect();
        for (&place, &seq) in &seqs {
            let after = self.record.turns[place].after;
            if let Some(&earlier) = after.and_then(|earlier| seqs.get(&earlier))
                && earlier > seq
            {
                let what = format!("{lane}: place {earlier} was accepted before place {seq} was sent");
                self.wrong("T9", what, after.into_iter().chain([place]).collect());
            }
        }
    }

    /// S3 and S4: the replies, in the order of their places, follow from each other.
    fn replies(&mut self, lane: &LaneId, turns: &[&TurnRow]) {
        let mut previous: Option<(Link, &str)> = None;
        for turn in turns.iter().filter(|turn| turn.outcome.as_deref() == Some("completed")) {
            let Some(link) = turn.reply.as_deref().and_then(Link::parse) else {
                self.wrong(
                    "S3",
                    format!("turn {} of {lane} has the reply {:?}", turn.id, turn.reply),
                    self.place(&turn.id),
                );
                continue;
            };
            let (count, state) = previous.map_or((0, 0), |(link, _)| (link.count, link.after));
            if (link.count, link.before) != (count + 1, state) {
                let what = format!(
                    "turn {} of {lane} is number {} and began at {:016x}; before it were {count} turns, which left {state:016x}",
                    turn.id, link.count, link.before
                );
                let before = previous.map(|(_, id)| self.place(id)).unwrap_or_default();
                self.wrong("S3", what, [before, self.place(&turn.id)].concat());
            }
            previous = Some((link, &turn.id));
        }
    }

    /// S3 and S7: from the head, parents lead over every snapshot to the root; each is its turn's, and its turn completed.
    fn chain(&mut self, lane: &LaneId, root: &str, head: &str, turns: &[&TurnRow], snapshots: &[&SnapshotRow]) {
        let rows: HashMap<&str, &TurnRow> = turns.iter().map(|turn| (turn.id.as_str(), *turn)).collect();
        let mut children: HashMap<&str, &SnapshotRow> = HashMap::new();
        let mut by_run: HashMap<&str, &SnapshotRow> = HashMap::new();
        for snapshot in snapshots {
            let place = self.place(&snapshot.turn);
            if let Some(other) = children.insert(&snapshot.parent, snapshot) {
                let what = format!("runs {} and {} of {lane} have one parent", other.run, snapshot.run);
                self.wrong("S3", what, [self.place(&other.turn), place.clone()].concat());
            }
            by_run.insert(&snapshot.run, snapshot);
            let row = rows.get(snapshot.turn.as_str());
            if row.and_then(|row| row.outcome.as_deref()) != Some("completed") {
                let what = format!("snapshot {} of {lane} is of a turn that did not complete", snapshot.run);
                self.wrong("S4", what, place.clone());
            }
            if row.is_some_and(|row| row.run.as_deref() != Some(&snapshot.run)) {
                self.wrong(
                    "S7",
                    format!("snapshot {} of {lane} is of another run than its turn", snapshot.run),
                    place.clone(),
                );
            }
            let link = row.and_then(|row| Link::parse(row.reply.as_deref()?));
            if let (Some(state), Some(link)) = (&snapshot.state, link)
                && *state != format!("{} {:016x}", link.count, link.after)
            {
                let what =
                    format!("snapshot {} of {lane} is {state:?}, and its turn's reply says {link:x?}", snapshot.run);
                self.wrong("S7", what, place);
            }
        }
        let (mut at, mut steps) = (head, 0);
        while at != root && steps <= snapshots.len() {
            let Some(snapshot) = by_run.get(at) else { break };
            (at, steps) = (snapshot.parent.as_str(), steps + 1);
        }
        let completed = turns.iter().filter(|turn| turn.outcome.as_deref() == Some("completed")).count();
        if at != root || steps != snapshots.len() || steps != completed {
            let what = format!(
                "from the head of {lane}, {steps} snapshots lead to {}; there are {}, and {completed} completed turns",
                if at == root { "its root" } else { "nowhere" },
                snapshots.len()
            );
            self.wrong("S3", what, vec![]);
        }
    }

    /// E1 and R2: the log's rows of a turn and an epoch do not overlap, and nothing was written by who came after the end.
    fn events(&mut self, tables: &Tables) {
        let turns = tables.turns_by_id();
        let mut rows: Vec<_> = tables.events.iter().collect();
        rows.sort_by_key(|row| (&row.turn, row.epoch, row.first));
        for pair in rows.windows(2) {
            if (&pair[0].turn, pair[0].epoch) == (&pair[1].turn, pair[1].epoch)
                && pair[1].first < pair[0].first + pair[0].count
            {
                let what = format!("event {}.{} of turn {} is there twice", pair[1].epoch, pair[1].first, pair[1].turn);
                self.wrong("E1", what, self.place(&pair[1].turn));
            }
        }
        for row in rows {
            let end_epoch = turns.get(row.turn.as_str()).map(|turn| turn.end_epoch.unwrap_or(i64::MAX));
            if end_epoch.is_none_or(|end| row.epoch > end) {
                let what = format!("event {}.{} of turn {} is of nobody's epoch", row.epoch, row.first, row.turn);
                self.wrong("R2", what, self.place(&row.turn));
            }
        }
    }

    /// T1: a key is its turn's.
    fn keys(&mut self, tables: &Tables) {
        let mut keys: HashMap<(&str, &str, &str), &str> = HashMap::new();
        for row in &tables.keys {
            keys.insert((&row.org, &row.conversation, &row.key), &row.turn);
        }
        for (place, turn) in self.record.turns.iter().enumerate() {
            let key = (turn.lane.org.as_str(), turn.lane.conversation.as_str(), turn.key.as_str());
            let (Some(id), None) = (turn.id.as_deref(), turn.deleted_at) else { continue };
            if keys.get(&key) != Some(&id) {
                let what =
                    format!("key {} of {} is of {:?}; its client was given {id}", turn.key, turn.lane, keys.get(&key));
                self.wrong("T1", what, vec![place]);
            }
        }
    }
}

/// How a row says that its turn ended.
fn end_of(row: &TurnRow) -> End {
    let what = match row.outcome.as_deref() {
        Some("completed") => &row.reply,
        Some("failed") => &row.failure,
        _ => &row.cancelled_by,
    };
    End { state: row.outcome.clone().unwrap_or_default(), what: what.clone().unwrap_or_default() }
}

#[cfg(test)]
mod tests;
