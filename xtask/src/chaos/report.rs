//! What a run has to say: the table at its end, and the history of whatever broke.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::record::{Record, Turn, Violation};
use super::takeovers::{self, Stall, Takeover};

/// Of the violations, so many are told with their histories.
const HISTORIES_MAX: usize = 8;
/// Events of one turn that a history shows.
const EVENTS_MAX: usize = 60;

/// What was found out besides the record.
#[derive(Debug)]
pub struct Findings<'a> {
    pub takeovers: &'a [Takeover],
    pub stalls: &'a [Stall],
    /// Those that count against the bound.
    pub judged: Vec<&'a Takeover>,
    pub stops_with_takeover: usize,
    pub lease_ttl_ms: u64,
    pub hot_bytes: Option<i64>,
    pub looks: u64,
}

/// The summary.
pub fn summary(record: &Record, findings: &Findings<'_>) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(out, "  {name:<34} {value}");
    };
    let mut faults: BTreeMap<&str, u64> = BTreeMap::new();
    for disturbance in &record.disturbances {
        *faults.entry(disturbance.kind).or_default() += 1;
    }
    for (kind, times) in &faults {
        line(kind, times.to_string());
    }
    let clocks = record.disturbances.iter().filter(|d| d.what.contains("clock")).count();
    line("starts with a wrong clock", clocks.to_string());

    let accepted: Vec<&Turn> = record.turns.iter().filter(|turn| turn.id.is_some()).collect();
    let mut ends: BTreeMap<String, u64> = BTreeMap::new();
    for turn in &accepted {
        let end = match turn.told() {
            Some(end) if end.state == "completed" => end.state,
            Some(end) => end.to_string(),
            None if turn.gone_at.is_some() => "gone with its conversation".to_owned(),
            None => "never heard of again".to_owned(),
        };
        *ends.entry(end).or_default() += 1;
    }
    let sends: u64 = record.turns.iter().map(|turn| u64::from(turn.sends)).sum();
    line("messages", format!("{}, sent {sends} times", record.turns.len()));
    line("turns accepted", accepted.len().to_string());
    for (end, times) in &ends {
        line(&format!("  {end}"), times.to_string());
    }
    let of_kind = |kind: &str| -> usize {
        record.turns.iter().map(|turn| turn.events.iter().filter(|event| &*event.kind == kind).count()).sum()
    };
    line("restarts heard of", of_kind("turn.restarted").to_string());
    line("resyncs", of_kind("resync").to_string());
    let streams: usize = record.turns.iter().map(|turn| turn.streams.len()).sum();
    let events: usize = record.turns.iter().map(|turn| turn.events.len()).sum();
    line("streams, events", format!("{streams}, {events}"));
    for (what, times) in &record.counts {
        line(what, times.to_string());
    }
    let statuses: Vec<String> = record.statuses.iter().map(|(status, times)| format!("{status}: {times}")).collect();
    line("answers", statuses.join(", "));
    if findings.looks > 0 {
        line("looks at the markers", findings.looks.to_string());
        let longest = findings.stalls.iter().map(|stall| stall.to - stall.from).max().unwrap_or(0);
        line("times the disk let commits wait", format!("{}, longest {longest} ms", findings.stalls.len()));
        line("turns taken over", findings.takeovers.len().to_string());
        line("SIGSTOPs with a takeover", findings.stops_with_takeover.to_string());
        line("last turn taken over, after expiry", percentiles(findings.takeovers.iter()));
        let judged = findings.judged.iter().copied();
        line("  with a replica and a way to it", percentiles(judged));
        line("lease_ttl_ms", findings.lease_ttl_ms.to_string());
    }
    if let Some(bytes) = findings.hot_bytes {
        line("turn_markers with its indexes", format!("{} KiB", bytes / 1024));
    }
    line("violations", record.violations.len().to_string());
    out
}

fn percentiles<'a>(takeovers: impl Iterator<Item = &'a Takeover>) -> String {
    let latencies = takeovers::latencies(takeovers);
    if latencies.is_empty() {
        return "none".to_owned();
    }
    let at = |percent: f64| percentile(&latencies, percent);
    format!(
        "p50 {} ms, p95 {} ms, p99 {} ms, longest {} ms, of {} lost replicas",
        at(50.0),
        at(95.0),
        at(99.0),
        at(100.0),
        latencies.len()
    )
}

/// Of sorted figures.
pub fn percentile(sorted: &[u64], percent: f64) -> u64 {
    let place = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(0)
}

/// The violations, by rule, and the histories of the first of them.
pub fn violations(record: &Record) -> String {
    let mut out = String::new();
    let mut rules: BTreeMap<&str, Vec<&Violation>> = BTreeMap::new();
    for violation in &record.violations {
        rules.entry(violation.rule).or_default().push(violation);
    }
    for (rule, violations) in &rules {
        let _ = writeln!(out, "{rule}: {} times", violations.len());
        for violation in violations.iter().take(5) {
            let _ = writeln!(out, "  {}", violation.what);
        }
    }
    // One of each rule first: the fifth of a kind says less than the first of another.
    let mut told: Vec<&Violation> = Vec::new();
    for round in 0..HISTORIES_MAX {
        told.extend(rules.values().filter_map(|violations| violations.get(round)).copied());
    }
    for violation in told.into_iter().take(HISTORIES_MAX) {
        let _ = writeln!(out, "\n{} — {}", violation.rule, violation.what);
        for &place in &violation.turns {
            history(&mut out, record, place);
        }
    }
    out
}

/// One turn as its client saw it, between what was done to the servers meanwhile.
fn history(out: &mut String, record: &Record, place: usize) {
    let turn = &record.turns[place];
    let id = turn.id.as_deref().unwrap_or("never accepted");
    let _ = writeln!(out, "  turn {id} of {}, generation {}, key {}", turn.lane, turn.generation, turn.key);
    let mut lines: Vec<(u64, String)> = Vec::new();
    lines.push((turn.sent_at, format!("sent, {} times in all, {}: {:?}", turn.sends, turn.on_busy, turn.text)));
    let marks = [
        (turn.accepted_at, "accepted"),
        (turn.cancelled_at, "its end was asked for"),
        (turn.deleted_at, "the deletion of its conversation was asked for"),
        (turn.gone_at, "answered with 404"),
    ];
    lines.extend(marks.into_iter().filter_map(|(at, what)| Some((at?, what.to_owned()))));
    for (index, event) in turn.events.iter().enumerate() {
        if index < EVENTS_MAX / 2 || index + EVENTS_MAX / 2 >= turn.events.len() {
            let data: String = event.data.chars().take(120).collect();
            let after = turn.streams.get(event.stream as usize).and_then(|stream| stream.after);
            let from = after.map_or_else(|| "the start".to_owned(), |id| id.to_string());
            let what = format!(
                "{} {} {data}  (stream {} after {from}, replica {})",
                event.id, event.kind, event.stream, event.replica
            );
            lines.push((event.at, what));
        }
    }
    lines.extend(turn.reads.iter().map(|read| (read.at, format!("read on replica {}: {}", read.replica, read.end))));
    let (from, to) = (
        lines.iter().map(|(at, _)| *at).min().unwrap_or(0).saturating_sub(2_000),
        lines.iter().map(|(at, _)| *at).max().unwrap_or(0) + 2_000,
    );
    for disturbance in &record.disturbances {
        if disturbance.from <= to && disturbance.to.is_none_or(|end| end >= from) {
            let until = disturbance.to.map_or_else(|| "the end".to_owned(), |end| format!("{end} ms"));
            lines.push((
                disturbance.from,
                format!("-- {}: {}; stands again at {until}", disturbance.lane, disturbance.what),
            ));
        }
    }
    lines.sort_by_key(|(at, _)| *at);
    for (at, what) in lines {
        let _ = writeln!(out, "    {at:>8} ms  {what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_figures_themselves() {
        let figures: Vec<u64> = (1..=100).collect();
        assert_eq!([50.0, 95.0, 99.0, 100.0].map(|percent| percentile(&figures, percent)), [50, 95, 99, 100]);
        assert_eq!(percentile(&[7], 50.0), 7);
        assert_eq!(percentile(&[], 50.0), 0);
    }
}
