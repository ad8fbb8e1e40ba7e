//! A host as a process of its own: the real program, started as a user would start it.
//!
//! Whoever holds a [`Host`] ends it, by its pid; dropping it kills it.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Compiling the workers' modules is part of a first start.
const START_MAX: Duration = Duration::from_secs(120);
/// A little more than the host's own drain.
const STOP_MAX: Duration = Duration::from_secs(30);

/// How to start a host.
#[derive(Debug, Clone)]
pub struct Start {
    pub program: PathBuf,
    pub data_dir: PathBuf,
    pub listen: SocketAddr,
    pub role: Role,
    /// `TURNHOUSE_…` variables.
    pub settings: Vec<(String, String)>,
}

/// What a host is started as.
#[derive(Debug, Clone)]
pub enum Role {
    /// `turnhouse dev`, with an org and a key of its own. The modules are deployed as workers and agents of their files' names; the first is the default.
    Dev { modules: Vec<PathBuf> },
    /// `turnhouse serve` on a database that it may share, which holds the org of this key.
    Replica { database_url: String, api_key: String },
}

/// A running host.
#[derive(Debug)]
pub struct Host {
    child: Child,
    pub pid: u32,
    pub address: SocketAddr,
    pub url: String,
    pub api_key: String,
}

impl Start {
    fn log(&self) -> PathBuf {
        self.data_dir.with_extension("log")
    }

    /// Starts it and waits until it says that it is ready.
    pub async fn run(&self) -> Result<Host> {
        let log = std::fs::File::options().create(true).append(true).open(self.log())?;
        let mut command = Command::new(&self.program);
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
            command.env_remove(name);
        }
        match &self.role {
            Role::Dev { modules } => command.arg("dev").args(modules),
            Role::Replica { database_url, .. } => command.args(["serve", "--database-url", database_url]),
        };
        command
            .args(["--json", "--listen", &self.listen.to_string(), "--data-dir"])
            .arg(&self.data_dir)
            .env("TURNHOUSE_METRICS_LISTEN", "127.0.0.1:0")
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C in a terminal is for us; the host is asked to leave, once.
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        let pid = child.id().context("the host ended at once")?;
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let line = match timeout(START_MAX, lines.next_line()).await {
            Ok(Ok(Some(line))) => line,
            Ok(_) => bail!("the host ended before it was ready\n{}", self.log_tail()),
            Err(_) => bail!("the host was not ready after {START_MAX:?}\n{}", self.log_tail()),
        };
        // A host that goes on writing must not meet a closed pipe. The task ends with the host.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let api_key = match &self.role {
            Role::Dev { .. } => None,
            Role::Replica { api_key, .. } => Some(api_key.as_str()),
        };
        let ready =
            Ready::parse(&line, api_key).with_context(|| format!("expected the host's ready line, saw {line:?}"))?;
        Ok(Host { child, pid, address: ready.address, url: ready.url, api_key: ready.api_key })
    }

    /// What the host wrote to its log last.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(20)..];
        if last.is_empty() { String::new() } else { format!("the host's log ends so:\n  {}", last.join("\n  ")) }
    }
}

/// What `turnhouse dev --json` and `turnhouse serve --json` say when they are ready.
struct Ready {
    address: SocketAddr,
    url: String,
    api_key: String,
}

impl Ready {
    /// `api_key`: the one that we know; else the line has it.
    fn parse(line: &str, api_key: Option<&str>) -> Result<Ready> {
        let line: Value = serde_json::from_str(line)?;
        let text = |name: &str| line[name].as_str().map(str::to_owned).with_context(|| format!("no `{name}` in it"));
        let url = text("url")?.trim_end_matches('/').to_owned();
        let address = url.strip_prefix("http://").context("the url is no http:// one")?.parse()?;
        let api_key = api_key.map_or_else(|| text("api_key"), |key| Ok(key.to_owned()))?;
        Ok(Ready { address, url, api_key })
    }
}

fn is_ours(name: &OsString) -> bool {
    name.to_string_lossy().starts_with("TURNHOUSE_")
}

impl Host {
    /// `kill -9`: no warning, nothing is written any more.
    pub async fn kill(mut self) -> Result<()> {
        self.child.kill().await.context("cannot kill the host")
    }

    /// Asks it to finish its turns and leave.
    pub async fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).context("the host has no pid")?;
        if self.child.try_wait()?.is_none() {
            kill_process(pid, Signal::TERM).context("cannot signal the host")?;
        }
        match timeout(STOP_MAX, self.child.wait()).await {
            Ok(status) => {
                let status = status?;
                ensure!(status.success(), "expected the host to leave with exit code 0 after SIGTERM, saw {status}");
                Ok(())
            }
            Err(_) => {
                self.child.kill().await.ok();
                bail!("the host had not left {STOP_MAX:?} after SIGTERM");
            }
        }
    }

    /// Resolves when the host ends by itself.
    pub async fn ended(&mut self) -> std::io::Result<std::process::ExitStatus> {
        self.child.wait().await
    }

    /// Memory that the process holds now, in bytes.
    pub fn memory(&self) -> Result<Memory> {
        Memory::of(Path::new(&format!("/proc/{}", self.pid)))
    }
}

/// A process' memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Each page once, however often it is mapped: the guests of one module share the pages that they only read.
    pub held: u64,
    /// Each page as often as it is mapped, which is what most tools show.
    pub resident: u64,
}

impl Memory {
    fn of(process: &Path) -> Result<Memory> {
        Ok(Memory {
            held: bytes(&process.join("smaps_rollup"), "Pss:")?,
            resident: bytes(&process.join("status"), "VmRSS:")?,
        })
    }
}

fn bytes(file: &Path, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(file).context("the memory of a process is read from Linux's /proc")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in it"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ready_line_names_address_and_key() {
        let ready = Ready::parse(r#"{"url":"http://127.0.0.1:8787","org":"dev","api_key":"th_1"}"#, None).unwrap();
        assert_eq!((ready.address.port(), ready.api_key.as_str()), (8787, "th_1"));
        assert_eq!(ready.url, "http://127.0.0.1:8787");
        for bad in ["", "listening", "{}", r#"{"url":"https://x","api_key":"y"}"#, r#"{"url":"http://127.0.0.1:1"}"#] {
            assert!(Ready::parse(bad, None).is_err(), "{bad}");
        }
        let replica =
            Ready::parse(r#"{"url":"http://127.0.0.1:1","metrics":"http://127.0.0.1:2"}"#, Some("th_2")).unwrap();
        assert_eq!((replica.address.port(), replica.api_key.as_str()), (1, "th_2"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_uses_memory() {
        let memory = Memory::of(Path::new("/proc/self")).unwrap();
        assert!(memory.held > 100_000 && memory.resident > 100_000, "{memory:?}");
    }
}
