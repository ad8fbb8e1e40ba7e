//! Turnhouse on PostgreSQL: one or more replicas of the real program on one database, on this machine. And two rows of their own: how many connections 1 000
//! waiting turns hold, and how large the table of live turns grows.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use super::contest::Work;
use super::report::{Goal, number};
use super::{Bench, command, history, limits, say, waiting};
use crate::api::{self, Api};
use crate::host::{Host, Role, Start};
use crate::load::Load;
use crate::postgres::Server;
use crate::setup;

const WAITING_ROW: &str = "postgres: 1000 waiting turns";
const WAITING: usize = 1_000;
const TURNS: u64 = 1_000_000;
const TURNS_QUICK: u64 = 20_000;
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
const MIB: f64 = 1024.0 * 1024.0;

/// Replicas that share a database.
pub struct Replicas {
    hosts: Vec<(Host, Start)>,
    api: Api,
    _scratch: tempfile::TempDir,
}

impl Replicas {
    /// Makes an org in an empty database, starts the hosts, and deploys the modules on one of them.
    pub async fn start(
        bench: &Bench,
        url: &str,
        count: usize,
        modules: &[&str],
        settings: &[(&str, u64)],
    ) -> Result<Replicas> {
        let scratch = setup::scratch_dir("bench")?;
        let program = &bench.built.program;
        let admin_dir = scratch.path().join("admin").to_string_lossy().into_owned();
        let beside = ["--database-url", url, "--data-dir", &admin_dir];
        command(program, &[&["orgs", "create", "bench"], &beside[..]].concat()).await?;
        let owner = ["keys", "create", "--org", "bench", "--user", "owner", "--scopes", "turns,deploy,admin"];
        let key = command(program, &[&owner, &beside[..]].concat()).await?;
        let key = api::text(&key, "/api_key")?;
        let mut hosts = Vec::new();
        for at in 0..count {
            let start = Start {
                program: program.clone(),
                data_dir: scratch.path().join(format!("replica-{at}")),
                listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
                role: Role::Replica { database_url: url.to_owned(), api_key: key.to_owned() },
                settings: limits(settings),
            };
            hosts.push((start.run().await?, start));
        }
        let replicas = Replicas { api: Api::of(&hosts[0].0), hosts, _scratch: scratch };
        for name in modules {
            let module = bench.built.guest(name)?.to_string_lossy().into_owned();
            let deploy = ["deploy", &module, "--worker", name, "--agent", name, "--api-key", key, "--url"];
            let deployed = command(program, &[&deploy[..], &[&replicas.hosts[0].0.url]].concat()).await;
            replicas.blame(deployed)?;
        }
        Ok(replicas)
    }

    /// Clients that each hold a conversation of their own and read every turn to its end, shared out among the replicas.
    pub fn conversations(&self, work: Work, label: &str, clients: usize, measured: Duration) -> Load {
        let agent = match work {
            Work::Echo => "echo",
            Work::Snapshot => "snapshot_8k",
        };
        let mut load = super::conversations(&self.api, agent, label, clients, measured);
        load.addresses = self.hosts.iter().map(|(host, _)| host.address).collect();
        load
    }

    /// Adds the hosts' own words to an error of their row.
    pub fn blame<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let logs: Vec<String> =
                self.hosts.iter().map(|(_, start)| start.log_tail()).filter(|log| !log.is_empty()).collect();
            if logs.is_empty() { error } else { error.context(logs.join("\n")) }
        })
    }

    pub async fn stop(self) -> Result<()> {
        for (host, _) in self.hosts {
            host.stop().await?;
        }
        Ok(())
    }
}

/// Whether one of this module's own rows was asked for.
pub fn wanted(bench: &Bench) -> bool {
    bench.wants(WAITING_ROW) || bench.wants(&hot_row(bench))
}

fn hot_row(bench: &Bench) -> String {
    format!("postgres: hot table, {} turns", number(if bench.quick { TURNS_QUICK } else { TURNS } as f64))
}

pub async fn run(bench: &mut Bench, server: &Arc<Server>) -> Result<()> {
    if bench.wants(WAITING_ROW) {
        connections(bench, server).await?;
    }
    let row = hot_row(bench);
    if bench.wants(&row) { hot_table(bench, server, &row).await } else { Ok(()) }
}

/// No connection is held while a guest runs or waits.
async fn connections(bench: &mut Bench, server: &Server) -> Result<()> {
    say(WAITING_ROW);
    let database = "waiting";
    server.query("postgres", &format!("CREATE DATABASE {database}"))?;
    let settings = [("host_running_max", 2_000), ("org_running_max", 2_000)];
    let replicas = Replicas::start(bench, &server.database(database), 1, &["wait_echo"], &settings).await?;
    let used = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}' AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    );
    let held = async {
        waiting::warm(&replicas.api).await?;
        waiting::hold(&replicas.api, WAITING, async || Ok(server.query(database, &used)?.parse::<f64>()?)).await
    };
    let held = held.await;
    bench.report.add(WAITING_ROW, "connections of the host", "", replicas.blame(held)?);
    bench.report.goal(WAITING_ROW, "connections of the host", Goal::AtMost(10.0));
    replicas.stop().await?;
    drop_database(server, database)
}

/// The table of live turns, with its indexes, while many turns pass through it.
async fn hot_table(bench: &mut Bench, server: &Arc<Server>, row: &str) -> Result<()> {
    say(row);
    let database = "hot";
    server.query("postgres", &format!("CREATE DATABASE {database}"))?;
    let replicas =
        Replicas::start(bench, &server.database(database), 1, &["echo"], &[("org_running_max", 1_000)]).await?;
    let watcher = server.clone();
    let size = move || {
        let bytes = watcher.query(database, "SELECT pg_total_relation_size('turn_markers')")?.parse::<f64>()?;
        anyhow::Ok(bytes / MIB)
    };
    let mut largest = 0.0_f64;
    let watch = async {
        loop {
            // In a thread of its own: the load tool's must not wait for it.
            largest = largest.max(tokio::task::spawn_blocking(size.clone()).await??);
            tokio::time::sleep(SAMPLE_EVERY).await;
        }
    };
    let turns = if bench.quick { TURNS_QUICK } else { TURNS };
    let filled: Result<u64> = tokio::select! {
        filled = history::fill(&replicas.api, turns) => filled,
        stopped = watch => stopped,
    };
    bench.report.add(row, "turns", "", replicas.blame(filled)? as f64);
    let end = size()?;
    bench.report.add(row, "table and indexes, at the end", "MiB", end);
    bench.report.add(row, "table and indexes, largest", "MiB", largest.max(end));
    bench.report.goal(row, "table and indexes, largest", Goal::AtMost(10.0));
    replicas.stop().await?;
    drop_database(server, database)
}

/// Frees the disk for the next.
pub fn drop_database(server: &Server, database: &str) -> Result<()> {
    server.query("postgres", &format!("DROP DATABASE {database} WITH (FORCE)")).map(drop)
}
