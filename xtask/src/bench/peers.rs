//! Others that keep a turn durable, as processes of their own: installed from npm into `target/peers`, never bundled, each behind a driver of `xtask/peers`
//! that says what it does and why it is an equal.
//!
//! It measures nothing; `contest` does. Whatever cannot be installed or started is an error here, and a skipped row with its reason there.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

use super::contest::Work;
use crate::api::message;
use crate::load::{Answer, Connection, Load, Requests, request};
use crate::setup;

/// A quarter of a gigabyte, from wherever the registry is.
const INSTALL_MAX: Duration = Duration::from_secs(600);
const START_MAX: Duration = Duration::from_secs(60);
const STOP_MAX: Duration = Duration::from_secs(10);
/// graphile-worker asks for it.
const NODE_MIN: (u32, u32) = (22, 18);

/// One that Turnhouse is held against.
#[derive(Debug)]
pub struct Peer {
    pub name: &'static str,
    driver: &'static str,
    environment: &'static [(&'static str, &'static str)],
    /// Counts the turns that ended, in its database; `None`: it has a store of its own.
    pub ended_turns: Option<&'static str>,
}

/// Processes and pools are what was fastest here of those that were tried; see docs/performance.md.
pub const PEERS: &[Peer] = &[
    // As it comes, which is how its documentation has it in production; and as it is fastest on two cores.
    Peer { name: "Restate", driver: "restate.js", environment: &[("PEER_PARTITIONS", "24")], ended_turns: None },
    Peer {
        name: "Restate with 4 partitions",
        driver: "restate.js",
        environment: &[("PEER_PARTITIONS", "4")],
        ended_turns: None,
    },
    Peer {
        name: "DBOS",
        driver: "dbos.js",
        environment: &[("PEER_PROCESSES", "1"), ("PEER_POOL", "10")],
        ended_turns: Some("SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'"),
    },
    Peer {
        name: "graphile-worker",
        driver: "graphile.js",
        environment: &[("PEER_PROCESSES", "1"), ("PEER_POOL", "10"), ("PEER_JOBS", "24")],
        ended_turns: Some("SELECT count(*) FROM turns WHERE outcome = 'completed'"),
    },
];

/// Where the drivers and what they need lie.
#[derive(Debug)]
pub struct Installed {
    dir: PathBuf,
    node: PathBuf,
}

/// Installs what `package-lock.json` names, unless it is there, and the node to run it.
pub async fn install() -> Result<Installed> {
    let dir = setup::target_dir().join("peers");
    fs::create_dir_all(&dir)?;
    for file in fs::read_dir(setup::root().join("xtask/peers"))?.flatten().filter(|file| file.path().is_file()) {
        fs::copy(file.path(), dir.join(file.file_name()))?;
    }
    let lock = fs::read_to_string(dir.join("package-lock.json"))?;
    let stamp = dir.join("installed");
    if fs::read_to_string(&stamp).ok().as_ref() != Some(&lock) {
        eprintln!("Installing the peers from npm into {}.", dir.display());
        let mut npm = Command::new("npm");
        // No scripts: one of them would only report the installation to its author.
        npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]);
        npm.current_dir(&dir).stdin(Stdio::null()).kill_on_drop(true);
        let output = timeout(INSTALL_MAX, npm.output()).await.context("npm does not end")?.context("cannot run npm")?;
        let said = String::from_utf8_lossy(&output.stderr);
        // What went wrong comes first, and where the log of it lies last.
        let said = said.lines().map(|line| line.trim_start_matches("npm error").trim()).take(4).collect::<Vec<_>>();
        ensure!(output.status.success(), "npm ci failed: {}", said.join("; "));
        fs::write(stamp, lock)?;
    }
    let node = node(&dir.join("node_modules")).await?;
    Ok(Installed { dir, node })
}

/// The one that npm carries for this machine, or the path's.
async fn node(modules: &Path) -> Result<PathBuf> {
    let mut bundled = fs::read_dir(modules)?.flatten().map(|entry| entry.path().join("bin/node"));
    let node = bundled.find(|node| node.is_file()).unwrap_or_else(|| "node".into());
    let output = Command::new(&node).arg("--version").output().await.context("cannot run node")?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let version = version(&text).with_context(|| format!("expected a version of node, saw {text:?}"))?;
    ensure!(version >= NODE_MIN, "node is {text}, and the peers need {}.{}", NODE_MIN.0, NODE_MIN.1);
    Ok(node)
}

fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix('v')?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// A peer and its door.
pub struct Running {
    child: Child,
    /// Closing it, by being dropped too, ends the driver and what the driver has started. A killed driver could end nothing.
    stdin: ChildStdin,
    address: SocketAddr,
    /// What follows the conversation in a path.
    after: String,
    log: PathBuf,
    _scratch: tempfile::TempDir,
}

impl Peer {
    /// Starts it on an empty database or directory and waits until it serves.
    pub async fn start(&self, installed: &Installed, database_url: &str) -> Result<Running> {
        let scratch = setup::scratch_dir("peer")?;
        let log = scratch.path().join("log");
        let data_dir = scratch.path().join("data");
        fs::create_dir(&data_dir)?;
        let mut command = Command::new(&installed.node);
        command
            .arg(installed.dir.join(self.driver))
            .env("NODE_ENV", "production")
            .env("PEER_DATABASE_URL", database_url)
            .env("PEER_DATA_DIR", &data_dir)
            // Who wants to try others sets the same variables.
            .envs(self.environment.iter().copied().filter(|(name, _)| std::env::var_os(name).is_none()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&log)?)
            .process_group(0);
        let mut child = command.spawn().context("cannot start node")?;
        let stdin = child.stdin.take().expect("stdin is piped");
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let line = match timeout(START_MAX, lines.next_line()).await {
            Ok(line) => line?.with_context(|| format!("it ended before it was ready{}", log_tail(&log)))?,
            Err(_) => bail!("it was not ready after {START_MAX:?}{}", log_tail(&log)),
        };
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let ready: Value =
            serde_json::from_str(&line).with_context(|| format!("expected its address, saw {line:?}"))?;
        let text = |name: &str| ready[name].as_str().with_context(|| format!("no `{name}` in {line}"));
        let (address, after) = (text("address")?.parse()?, text("after")?.to_owned());
        Ok(Running { child, stdin, address, after, log, _scratch: scratch })
    }
}

impl Running {
    /// Clients that each hold a conversation of their own and wait for every reply.
    pub fn conversations(&self, work: Work, label: &str, clients: usize, measured: Duration) -> Load {
        let prebuilt: Vec<Vec<u8>> = (0..clients).map(|client| self.turn(work, &format!("{label}-{client}"))).collect();
        let requests: Requests = Rc::new(move |client, _, out: &mut Vec<u8>| out.extend_from_slice(&prebuilt[client]));
        Load::new(self.address, clients, measured, Answer::Status(200), requests)
    }

    fn turn(&self, work: Work, conversation: &str) -> Vec<u8> {
        let name = match work {
            Work::Echo => "echo",
            Work::Snapshot => "snapshot",
        };
        let body = message("What is the capital of France?").to_string();
        request("POST", &format!("/{name}/{conversation}{}", self.after), "", &[], body.as_bytes())
    }

    /// Two turns of a conversation: the second must know of the first, or what is measured is no conversation.
    pub async fn probe(&self, work: Work) -> Result<()> {
        let mut connection = Connection::open(self.address).await?;
        for seq in 1..=2 {
            let head = connection.send(&self.turn(work, &format!("probe-{work:?}"))).await?;
            let body = connection.body().await?;
            let text = String::from_utf8_lossy(&body);
            let reply: Value = serde_json::from_slice(&body).unwrap_or_default();
            ensure!(head.status == 200 && reply["seq"] == seq, "expected turn {seq}, saw {} {text}", head.status);
            let said = if work == Work::Echo { "What is the capital of France?".to_owned() } else { seq.to_string() };
            ensure!(reply["reply"] == said, "expected the reply {said:?}, saw {text}");
        }
        Ok(())
    }

    /// Adds its own words to an error of its row.
    pub fn blame<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| anyhow::anyhow!("{error:#}{}", log_tail(&self.log)))
    }

    pub async fn stop(self) -> Result<()> {
        let Running { mut child, stdin, .. } = self;
        drop(stdin);
        if timeout(STOP_MAX, child.wait()).await.is_err() {
            child.kill().await?;
        }
        Ok(())
    }
}

fn log_tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(5)..];
    if last.is_empty() { String::new() } else { format!("; its log ends so:\n  {}", last.join("\n  ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert_eq!(version("v24.21.0"), Some((24, 21)));
        assert!(version("v22.9.0").unwrap() < NODE_MIN && version("v24.1.0").unwrap() > NODE_MIN);
        assert_eq!(version("nonsense"), None);
    }

    #[test]
    fn every_peer_has_its_driver() {
        for peer in PEERS {
            let driver = setup::root().join("xtask/peers").join(peer.driver);
            assert!(driver.is_file(), "{}", driver.display());
        }
    }
}
