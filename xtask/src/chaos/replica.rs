//! One replica: the real program on a port of its own, which is the same after each start, and its ways to the database.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::link::{Link, Weather};
use super::service;
use crate::postgres;

/// On a busy machine, with a database that comes back at the same time.
const START_MAX: Duration = Duration::from_secs(90);
/// More than its own bound on draining.
const DRAIN_MAX: Duration = Duration::from_secs(20);

/// How every replica of a run is started.
#[derive(Debug, Clone)]
pub struct Program {
    pub path: PathBuf,
    /// `TURNHOUSE_…` variables.
    pub settings: Vec<(String, String)>,
    /// A library that makes the clock wrong.
    pub skew: Option<PathBuf>,
}

pub struct Replica {
    pub name: String,
    pub address: SocketAddr,
    pub pooled: bool,
    program: Program,
    data_dir: PathBuf,
    /// What says where the database is; nothing where that is a file of its own.
    database: Option<(String, String)>,
    link: Link,
    process: Option<Child>,
}

impl Replica {
    pub fn new(index: usize, program: Program, scratch: &Path) -> Result<Replica> {
        let name = format!("replica-{index}");
        let data_dir = scratch.join(&name);
        std::fs::create_dir(&data_dir)?;
        let address = service::free_address()?;
        Ok(Replica {
            name,
            address,
            pooled: false,
            program,
            data_dir,
            database: None,
            link: Link::new(),
            process: None,
        })
    }

    /// From now on it reaches its database over its link: at this address, which may be a pooler's.
    pub async fn connect(&mut self, database: SocketAddr, pooled: bool) -> Result<()> {
        let url = super::database::Database::url(self.link.open(database).await?);
        self.pooled = pooled;
        self.database = Some(("TURNHOUSE_DATABASE_URL".to_owned(), url));
        Ok(())
    }

    pub fn log(&self) -> PathBuf {
        self.data_dir.with_extension("log")
    }

    /// A command of the program with this replica's settings, and with nobody else's.
    pub fn command(&self, arguments: &[&str]) -> Command {
        // Where there is `setpriv`, it goes with us, also when we are killed.
        let mut command = match postgres::which("setpriv") {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig=KILL", "--"]).arg(&self.program.path);
                command
            }
            None => Command::new(&self.program.path),
        };
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TURNHOUSE_")) {
            command.env_remove(name);
        }
        command.args(arguments).arg("--data-dir").arg(&self.data_dir);
        command.envs(self.program.settings.iter().map(|(name, value)| (name, value)));
        command.envs(self.database.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts it and waits until it says that it serves. `kill` is a point at which it is to end itself.
    pub async fn start(&mut self, clock_ms: i64, kill: Option<(&str, u64)>) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(self.log())?;
        let mut command =
            self.command(&["serve", "--json", "--log-format", "json", "--listen", &self.address.to_string()]);
        command.env("TURNHOUSE_METRICS_LISTEN", "127.0.0.1:0");
        if let (Some(skew), true) = (&self.program.skew, clock_ms != 0) {
            command.env("LD_PRELOAD", skew).env("CHAOS_CLOCK_OFFSET_MS", clock_ms.to_string());
        }
        if let Some((point, times)) = kill {
            command.env("TURNHOUSE_TEST_KILL", format!("{point}:{times}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).process_group(0).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", self.name))?;
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        match timeout(START_MAX, lines.next_line()).await {
            Ok(Ok(Some(_))) => {}
            Ok(_) => {
                let status = child.wait().await?;
                bail!("it ended before it served, {status}; {}", service::log_tail(&self.log()))
            }
            Err(_) => bail!("it did not serve within {START_MAX:?}; {}", service::log_tail(&self.log())),
        }
        // A host that goes on writing must not meet a closed pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        self.process = Some(child);
        Ok(())
    }

    pub fn running(&self) -> bool {
        self.process.is_some()
    }

    /// `kill -9`.
    pub async fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("it is not running")?;
        process.kill().await.context("cannot kill it")
    }

    /// Waits until it has ended itself; kills it when it does not within `patience`. Whether it ended itself.
    pub async fn ends(&mut self, patience: Duration) -> Result<bool> {
        let mut process = self.process.take().context("it is not running")?;
        let ended = timeout(patience, process.wait()).await;
        if ended.is_err() {
            process.kill().await.context("cannot kill it")?;
        }
        Ok(ended.is_ok())
    }

    /// SIGTERM, and waits until it has left. What it left with, or `None` when it had to be killed.
    pub async fn drain(&mut self) -> Result<Option<ExitStatus>> {
        let mut process = self.process.take().context("it is not running")?;
        service::signal(&process, Signal::TERM)?;
        match timeout(DRAIN_MAX, process.wait()).await {
            Ok(status) => Ok(Some(status?)),
            Err(_) => {
                process.kill().await?;
                Ok(None)
            }
        }
    }

    /// SIGSTOP or SIGCONT.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        service::signal(self.process.as_ref().context("it is not running")?, signal)
    }

    /// How it ended, if it has while nobody asked it to.
    pub fn ended_by_itself(&mut self) -> Result<Option<ExitStatus>> {
        let Some(process) = &mut self.process else { return Ok(None) };
        let status = process.try_wait()?;
        if status.is_some() {
            self.process = None;
        }
        Ok(status)
    }

    pub fn weather(&self, weather: Weather) {
        self.link.set(weather);
    }
}
