//! How soon a lost replica's turns are somebody else's: found by looking at the markers ten times a second.
//!
//! A marker whose holder has expired and that then has another holder, or is ready again, or gone, was taken over. What is measured begins at the expiry:
//! the replica was lost at most one TTL before that.
//!
//! Commits that wait for a disk which stands still for a moment are seen in the same looks: no replica can take anything over meanwhile.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::database;
use super::plan::Lane;
use super::record::{At, Disturbance};
use super::stage::Stage;

/// The database's clock and this process' are one machine's; times are told apart by when the run began.
#[derive(Debug, Deserialize)]
struct Look {
    now: i64,
    /// turn, epoch, holder
    markers: Vec<(String, u32, String)>,
    /// replica, expires_at
    replicas: Vec<(String, i64)>,
    /// Process and transaction of each commit that waits for the log to be on the disk.
    flushing: Vec<(i32, String)>,
}

const LOOK: &str = "SELECT json_build_object('now', turnhouse_now(),
    'markers', (SELECT coalesce(json_agg(json_build_array(turn_id, epoch, holder)), '[]') FROM turn_markers WHERE state = 'running'),
    'replicas', (SELECT coalesce(json_agg(json_build_array(replica_id, expires_at)), '[]') FROM replicas),
    'flushing', (SELECT coalesce(json_agg(json_build_array(pid, backend_xid::text)), '[]') FROM pg_stat_activity
                  WHERE backend_xid IS NOT NULL AND wait_event IN ('WALSync', 'WALWrite', 'WALInitSync', 'WALInitWrite')))";

/// A commit that waits for the disk for so long stands for many.
const STALL_MS: u64 = 200;

/// A marker that went from a lost holder to whatever came next.
#[derive(Debug, Clone)]
pub struct Takeover {
    pub holder: String,
    /// When its holder's lease had ended, and when the marker was seen not to be its any more.
    pub expired: At,
    pub taken: At,
}

impl Takeover {
    pub fn latency_ms(&self) -> u64 {
        self.taken.saturating_sub(self.expired)
    }
}

/// For so long no commit came to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    pub from: At,
    pub to: At,
}

/// What was seen so far. Pure but for its clock, which is the database's.
#[derive(Debug, Default)]
pub struct Watch {
    /// Milliseconds since 1970 at which the run began.
    began: i64,
    held: HashMap<String, (u32, String)>,
    expires: HashMap<String, i64>,
    looked: i64,
    /// Since when they have been seen to wait.
    flushing: HashMap<(i32, String), At>,
    pub takeovers: Vec<Takeover>,
    pub stalls: Vec<Stall>,
    pub looks: u64,
}

impl Watch {
    pub fn new(began: i64) -> Watch {
        Watch { began, ..Watch::default() }
    }

    fn look(&mut self, look: Look) {
        self.looks += 1;
        let at = |time: i64| u64::try_from(time - self.began).unwrap_or(0);
        let now = at(look.now);
        let waits = look.flushing.into_iter();
        let flushing: HashMap<(i32, String), At> =
            waits.map(|waits| (waits.clone(), self.flushing.get(&waits).copied().unwrap_or(now))).collect();
        if let Some(&from) = flushing.values().min()
            && now - from >= STALL_MS
        {
            match self.stalls.last_mut().filter(|last| last.to >= from) {
                Some(last) => last.to = now,
                None => self.stalls.push(Stall { from, to: now }),
            }
        }
        self.flushing = flushing;
        for (replica, expires) in &look.replicas {
            self.expires.insert(replica.clone(), *expires);
        }
        let held: HashMap<String, (u32, String)> =
            look.markers.into_iter().map(|(turn, epoch, holder)| (turn, (epoch, holder))).collect();
        for (turn, (epoch, holder)) in &self.held {
            if held.get(turn).is_some_and(|(now, _)| now == epoch) {
                continue;
            }
            // An end by its own holder comes before the expiry, as far as anybody can tell who looks this often.
            let Some(&expired) = self.expires.get(holder) else { continue };
            if expired < self.looked {
                let (expired, taken) = (at(expired), now);
                self.takeovers.push(Takeover { holder: holder.clone(), expired, taken });
            }
        }
        self.held = held;
        self.looked = look.now;
    }
}

/// Looks until it is dropped.
pub async fn keep_looking(stage: Rc<Stage>, watch: Rc<RefCell<Watch>>) {
    let Some(database) = &stage.database else { return };
    loop {
        let mut command = {
            // Held while the database is away: there is nothing to see then.
            let database = database.lock().await;
            database.psql_command(database::NAME)
        };
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Ok(mut psql) = command.spawn() {
            let (mut input, output) = (psql.stdin.take().expect("piped"), psql.stdout.take().expect("piped"));
            let asked = input.write_all(format!("{LOOK} \\watch 0.1\n").as_bytes()).await;
            let mut lines = BufReader::new(output).lines();
            while let (Ok(()), Ok(Some(line))) = (&asked, lines.next_line().await) {
                if let Ok(look) = serde_json::from_str(&line) {
                    watch.borrow_mut().look(look);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Takeovers that a replica was there for: it, the database, its disk and the way to it were undisturbed from before the expiry to `within_ms` after it.
pub fn undisturbed<'a>(
    Watch { takeovers, stalls, .. }: &'a Watch,
    disturbances: &[Disturbance],
    pooled: &[bool],
    within_ms: u64,
) -> Vec<&'a Takeover> {
    const BEFORE_MS: u64 = 1_500;
    let quiet = |lane: Lane, from: At, to: At| {
        disturbances.iter().all(|d| d.lane != lane || d.from > to || d.to.is_some_and(|end| end < from))
    };
    let there = |takeover: &&Takeover| {
        let (from, to) = (takeover.expired.saturating_sub(BEFORE_MS), takeover.expired + within_ms);
        quiet(Lane::Database, from, to)
            && stalls.iter().all(|stall| stall.from > to || stall.to < from)
            && pooled.iter().enumerate().any(|(index, &pooled)| {
                quiet(Lane::Replica(index), from, to) && (!pooled || quiet(Lane::Pooler, from, to))
            })
    };
    takeovers.iter().filter(there).collect()
}

/// The lost replicas of which a turn was taken over later than that, for whoever looks for the reason.
pub fn later_than(takeovers: &[&Takeover], ms: u64) -> String {
    let mut longest: BTreeMap<(At, &str), u64> = BTreeMap::new();
    for takeover in takeovers.iter().filter(|takeover| takeover.latency_ms() > ms) {
        let longest = longest.entry((takeover.expired, &takeover.holder)).or_default();
        *longest = takeover.latency_ms().max(*longest);
    }
    let told = longest.into_iter().map(|((expired, holder), late)| {
        let at_s = expired as f64 / 1_000.0;
        format!("\n    {at_s:.1} s: the lease of {holder} ended; its last turn was taken over {late} ms later")
    });
    told.collect()
}

/// How long the last turn of each lost replica took, sorted: one replica that was lost is one case, however many turns it had.
pub fn latencies<'a>(takeovers: impl IntoIterator<Item = &'a Takeover>) -> Vec<u64> {
    let mut longest: HashMap<&str, u64> = HashMap::new();
    for takeover in takeovers {
        let longest = longest.entry(&takeover.holder).or_default();
        *longest = takeover.latency_ms().max(*longest);
    }
    let mut latencies: Vec<u64> = longest.into_values().collect();
    latencies.sort_unstable();
    latencies
}

/// How many of the stops outlasted their lease such that a turn was taken over meanwhile.
pub fn stops_with_takeover(takeovers: &[Takeover], disturbances: &[Disturbance]) -> usize {
    let stops = disturbances.iter().filter(|d| d.kind == "SIGSTOP");
    stops
        .filter(|stop| {
            let to = stop.to.unwrap_or(At::MAX);
            takeovers.iter().any(|takeover| takeover.expired >= stop.from && takeover.taken <= to)
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(now: i64, markers: &[(&str, u32, &str)], replicas: &[(&str, i64)]) -> Look {
        Look {
            now,
            markers: markers.iter().map(|(t, e, h)| (t.to_string(), *e, h.to_string())).collect(),
            replicas: replicas.iter().map(|(r, at)| (r.to_string(), *at)).collect(),
            flushing: vec![],
        }
    }

    #[test]
    fn a_marker_that_leaves_an_expired_holder_was_taken_over() {
        let mut watch = Watch::new(1_000);
        watch.look(look(1_000, &[("t", 1, "a"), ("u", 1, "b")], &[("a", 2_000), ("b", 2_000)]));
        watch.look(look(1_900, &[("t", 1, "a")], &[("a", 2_000), ("b", 4_000)]));
        assert!(watch.takeovers.is_empty(), "u ended under its own holder");
        watch.look(look(2_100, &[("t", 1, "a")], &[("a", 2_000), ("b", 4_000)]));
        watch.look(look(2_300, &[("t", 2, "b")], &[("b", 4_000)]));
        assert_eq!(watch.takeovers.len(), 1);
        assert_eq!(watch.takeovers[0].latency_ms(), 300);
    }

    #[test]
    fn only_what_somebody_was_there_for_counts_against_the_bound() {
        let takeovers = vec![Takeover { holder: "a".into(), expired: 10_000, taken: 14_000 }];
        let mut watch = Watch { takeovers, ..Watch::default() };
        let lost = |lane, from, to| Disturbance { lane, kind: "kill -9", what: String::new(), from, to };
        let one = [lost(Lane::Replica(0), 8_000, None)];
        assert_eq!(undisturbed(&watch, &one, &[false, false], 1_000).len(), 1);
        let both = [lost(Lane::Replica(0), 8_000, None), lost(Lane::Replica(1), 9_000, Some(10_500))];
        assert_eq!(undisturbed(&watch, &both, &[false, false], 1_000).len(), 0);
        let database = [lost(Lane::Database, 10_900, Some(12_000))];
        assert_eq!(undisturbed(&watch, &database, &[false], 1_000).len(), 0);
        let pooler = [lost(Lane::Pooler, 10_900, Some(12_000))];
        assert_eq!(undisturbed(&watch, &pooler, &[true], 1_000).len(), 0);
        assert_eq!(undisturbed(&watch, &pooler, &[true, false], 1_000).len(), 1);
        watch.stalls = vec![Stall { from: 10_900, to: 12_000 }];
        assert_eq!(undisturbed(&watch, &one, &[false, false], 1_000).len(), 0);
        watch.stalls = vec![Stall { from: 7_000, to: 8_000 }, Stall { from: 11_100, to: 12_000 }];
        assert_eq!(undisturbed(&watch, &one, &[false, false], 1_000).len(), 1);
    }

    #[test]
    fn a_commit_that_is_seen_to_wait_again_and_again_is_a_stall_of_the_disk() {
        let mut watch = Watch::new(1_000);
        let mut look = |now, flushing: &[(i32, &str)]| {
            let flushing = flushing.iter().map(|(pid, xid)| (*pid, xid.to_string())).collect();
            watch.look(Look { flushing, ..look(now, &[], &[]) });
        };
        // Many commits, each of which is through by the next look.
        (0..5).for_each(|n| look(2_000 + n * 100, &[(7, &n.to_string())]));
        look(3_000, &[(7, "50")]);
        look(3_100, &[(7, "50"), (8, "51")]);
        look(3_200, &[(7, "50"), (8, "51")]);
        look(3_300, &[(8, "51")]);
        look(3_400, &[]);
        assert_eq!(watch.stalls, [Stall { from: 2_000, to: 2_300 }]);
    }
}
