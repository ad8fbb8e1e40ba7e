//! The same turns on PostgreSQL by one, two and three replicas, and by others that keep a turn durable: one run, one machine, one load tool.
//!
//! Who takes part starts alone on an empty database of one server whose commits are on the disk (Restate on its own store, which fsyncs), is
//! warmed up, measured, and stopped; they take turns, each first in another round. A turn is a message posted to a conversation, and it counts
//! once its reply is durable and has arrived: Turnhouse's as the end of the turn's stream, a peer's as the body of its answer, which is less to
//! read. Every client has a conversation and waits for each reply before it goes on.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::peers::{self, Installed, PEERS, Peer};
use super::replicas::{self, Replicas};
use super::report::{Goal, Report};
use super::{Bench, say};
use crate::load::{Load, Sample};
use crate::postgres::Server;
use crate::setup;

/// What a turn does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Repeats its message.
    Echo,
    /// Saves another state of 8 KiB.
    Snapshot,
}

/// Name, work, clients.
const ROWS: &[(&str, Work, usize)] = &[
    ("1 client", Work::Echo, 1),
    ("16 clients", Work::Echo, 16),
    (RATE_ROW, Work::Echo, 64),
    (STATE_ROW, Work::Snapshot, 64),
];
const RATE_ROW: &str = "64 clients";
const STATE_ROW: &str = "64 clients, 8 KiB of state";
const WARM_UP_CLIENTS: usize = 64;
/// Of each work. For just-in-time compilers, pools and plans: Restate doubles its rate in its first three seconds.
const WARM_UP: Duration = Duration::from_secs(4);
const REPLICAS: [usize; 3] = [1, 2, 3];

/// Who takes part.
#[derive(Clone, Copy)]
enum Contender {
    Replicas(usize),
    Peer(&'static Peer),
}

impl Contender {
    fn all() -> impl Iterator<Item = Contender> {
        REPLICAS.into_iter().map(Contender::Replicas).chain(PEERS.iter().map(Contender::Peer))
    }

    fn name(self) -> String {
        match self {
            Contender::Replicas(1) => "postgres, 1 replica".to_owned(),
            Contender::Replicas(count) => format!("postgres, {count} replicas"),
            Contender::Peer(peer) => format!("peers, {}", peer.name),
        }
    }

    fn row(self, row: &str) -> String {
        format!("{}, {row}", self.name())
    }

    /// Counts the turns that ended, in its database; `None`: it has a store of its own.
    fn ended_turns(self) -> Option<&'static str> {
        match self {
            Contender::Replicas(_) => Some("SELECT count(*) FROM turns WHERE outcome = 'completed'"),
            Contender::Peer(peer) => peer.ended_turns,
        }
    }

    fn wanted(self, bench: &Bench) -> bool {
        ROWS.iter().any(|(row, ..)| bench.wants(&self.row(row)))
    }
}

/// A contender at work.
enum Running {
    Replicas(Replicas),
    Peer(Box<peers::Running>),
}

impl Running {
    fn conversations(&self, work: Work, label: &str, clients: usize, measured: Duration) -> Load {
        match self {
            Running::Replicas(replicas) => replicas.conversations(work, label, clients, measured),
            Running::Peer(peer) => peer.conversations(work, label, clients, measured),
        }
    }

    fn blame<T>(&self, result: Result<T>) -> Result<T> {
        match self {
            Running::Replicas(replicas) => replicas.blame(result),
            Running::Peer(peer) => peer.blame(result),
        }
    }

    async fn stop(self) -> Result<()> {
        match self {
            Running::Replicas(replicas) => replicas.stop().await,
            Running::Peer(peer) => (*peer).stop().await,
        }
    }
}

pub async fn run(bench: &mut Bench) -> Result<()> {
    let mut contenders: Vec<Contender> = Contender::all().filter(|contender| contender.wanted(bench)).collect();
    // A peer's figure says little alone.
    if contenders.iter().all(|contender| matches!(contender, Contender::Peer(_))) && !contenders.is_empty() {
        contenders.insert(0, Contender::Replicas(1));
    }
    if contenders.is_empty() && !replicas::wanted(bench) {
        return Ok(());
    }
    let server = match Server::start_durable(&setup::target_dir()) {
        Ok(server) => Arc::new(server),
        Err(error) => {
            for contender in contenders {
                bench.report.skip(&contender.name(), &format!("{error:#}"));
            }
            return Ok(());
        }
    };
    measure_all(bench, &server, contenders).await?;
    replicas::run(bench, &server).await
}

async fn measure_all(bench: &mut Bench, server: &Server, mut contenders: Vec<Contender>) -> Result<()> {
    let mut installed = None;
    if contenders.iter().any(|contender| matches!(contender, Contender::Peer(_))) {
        match peers::install().await {
            Ok(peers) => installed = Some(peers),
            Err(error) => contenders.retain(|contender| match contender {
                Contender::Peer(_) => {
                    bench.report.skip(&contender.name(), &format!("{error:#}"));
                    false
                }
                Contender::Replicas(_) => true,
            }),
        }
    }
    // What lives for half a minute is vacuumed in it.
    server.query("postgres", "ALTER SYSTEM SET autovacuum_naptime = '5s'")?;
    server.query("postgres", "SELECT pg_reload_conf()")?;
    let runs = bench.runs.min(3);
    for run in 0..runs {
        for contender in contenders.clone() {
            say(&format!("{}, run {} of {runs}", contender.name(), run + 1));
            let database = format!("run_{run}");
            server.query("postgres", &format!("CREATE DATABASE {database}"))?;
            let measured = measure(bench, server, &database, contender, installed.as_ref()).await;
            replicas::drop_database(server, &database)?;
            match measured {
                Ok(samples) => {
                    for (row, sample) in samples {
                        let row = contender.row(row);
                        bench.report.add(&row, "rate", "turns/s", sample.per_second);
                        bench.report.add(&row, "p50", "ms", sample.latency.quantile_ms(0.5));
                        bench.report.add(&row, "p99", "ms", sample.latency.quantile_ms(0.99));
                    }
                }
                // Half a row would be compared with whole ones. Ours is a failure, which the others' figures outlive.
                Err(error) => {
                    bench.report.skip(&contender.name(), &format!("{error:#}"));
                    bench.failed |= matches!(contender, Contender::Replicas(_));
                    contenders.retain(|other| other.name() != contender.name());
                }
            }
        }
        if !contenders.is_empty() {
            contenders.rotate_left(1);
        }
    }
    server.query("postgres", "ALTER SYSTEM RESET autovacuum_naptime")?;
    server.query("postgres", "SELECT pg_reload_conf()")?;
    bench.report.goal(&Contender::Replicas(1).row(RATE_ROW), "rate", Goal::AtLeast(3_000.0));
    Ok(())
}

/// One contender's run of every row, from its start to its end.
async fn measure(
    bench: &Bench,
    server: &Server,
    database: &str,
    contender: Contender,
    installed: Option<&Installed>,
) -> Result<Vec<(&'static str, Sample)>> {
    let url = server.database(database);
    let running = match contender {
        Contender::Replicas(count) => {
            let modules = ["echo", "snapshot_8k"];
            Running::Replicas(Replicas::start(bench, &url, count, &modules, &[("org_running_max", 1_000)]).await?)
        }
        Contender::Peer(peer) => {
            let installed = installed.context("the peers are not installed")?;
            Running::Peer(Box::new(peer.start(installed, &url).await?))
        }
    };
    let samples = running.blame(rows(bench, server, database, &running).await);
    // What was answered is there.
    let checked = samples.and_then(|samples| {
        if let Some(statement) = contender.ended_turns() {
            let ended: u64 = server.query(database, statement)?.parse()?;
            let answered: u64 = samples.iter().map(|(_, sample)| sample.latency.count()).sum();
            ensure!(ended >= answered, "{answered} turns were answered, and {ended} are in the database");
        }
        Ok(samples)
    });
    // However it went, nothing of it runs beside the next.
    let stopped = running.stop().await;
    let samples = checked?;
    stopped.map(|()| samples)
}

async fn rows(
    bench: &Bench,
    server: &Server,
    database: &str,
    running: &Running,
) -> Result<Vec<(&'static str, Sample)>> {
    for work in [Work::Echo, Work::Snapshot] {
        if let Running::Peer(peer) = running {
            peer.probe(work).await?;
        }
        running.conversations(work, "warm", WARM_UP_CLIENTS, WARM_UP).run().await?;
    }
    // As a database that has run for a while: with statistics, and with nothing of others and the warm-up left to write.
    server.query(database, "VACUUM ANALYZE")?;
    server.query(database, "CHECKPOINT")?;
    rustix::fs::sync();
    let mut samples = Vec::new();
    for (at, (row, work, clients)) in ROWS.iter().enumerate() {
        let load = running.conversations(*work, &format!("row-{at}"), *clients, bench.run);
        samples.push((*row, load.run().await?));
    }
    Ok(samples)
}

/// One replica against each peer, and more replicas against one.
pub fn ratios(report: &Report) -> Vec<(String, f64)> {
    let mut ratios = Vec::new();
    let one = Contender::Replicas(1);
    for row in [RATE_ROW, STATE_ROW] {
        let Some(own) = report.median(&one.row(row), "rate") else { continue };
        for other in Contender::all() {
            let (Some(rate), false) = (report.median(&other.row(row), "rate"), other.name() == one.name()) else {
                continue;
            };
            ratios.push(match other {
                Contender::Replicas(count) => {
                    let goal = if count == 2 { " (goal: ≥ 0.9)" } else { "" };
                    (format!("{row}: {} ÷ 1{goal}", other.name()), rate / own)
                }
                Contender::Peer(peer) => {
                    let goal = if peer.name.starts_with("Restate") { 3 } else { 1 };
                    (format!("{row}: {} ÷ {} (goal: > {goal})", one.name(), peer.name), own / rate)
                }
            });
        }
    }
    ratios
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_replica_is_held_against_everyone_else() {
        let mut report = Report::default();
        assert!(ratios(&report).is_empty());
        report.add("postgres, 1 replica, 64 clients", "rate", "turns/s", 3_000.0);
        report.add("postgres, 2 replicas, 64 clients", "rate", "turns/s", 2_850.0);
        report.add("peers, Restate, 64 clients", "rate", "turns/s", 1_000.0);
        let ratios = ratios(&report);
        assert_eq!(ratios.len(), 2, "{ratios:?}");
        assert!(ratios[0].0.contains("2 replicas") && (ratios[0].1 - 0.95).abs() < 1e-9, "{ratios:?}");
        assert!(ratios[1].0.contains("Restate (goal: > 3)") && (ratios[1].1 - 3.0).abs() < 1e-9, "{ratios:?}");
    }
}
