//! PostgreSQL for one run: a cluster in a directory of its own, durable as in production, that can be stopped in the middle of whatever it does.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio::process::{Child, Command};

use super::service;
use crate::postgres::User;

/// Recovery from the log included.
const START_MAX: Duration = Duration::from_secs(60);
/// Its superuser; who may connect is decided by the address alone: loopback.
pub const ROLE: &str = "turnhouse";
pub const NAME: &str = "turnhouse";

/// A server and its files.
pub struct Database {
    user: Option<User>,
    programs: PathBuf,
    directory: PathBuf,
    pub address: SocketAddr,
    server: Option<Child>,
}

impl Database {
    /// Makes a cluster in `scratch` and starts it.
    pub async fn make(user: Option<User>, programs: PathBuf, scratch: &Path) -> Result<Database> {
        let directory = scratch.join("postgres");
        service::make_dir(user, &directory)?;
        let mut initdb = service::command(user, &programs.join("initdb"));
        initdb.arg("--pgdata").arg(&directory);
        initdb.args(["--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C", "--username", ROLE]);
        service::output(&mut initdb).await?;
        let mut database = Database { user, programs, directory, address: service::free_address()?, server: None };
        database.start().await?;
        database.psql("postgres", &format!("CREATE DATABASE {NAME}")).await?;
        Ok(database)
    }

    fn log(&self) -> PathBuf {
        self.directory.with_extension("log")
    }

    /// Starts the server and waits until it answers.
    pub async fn start(&mut self) -> Result<()> {
        let mut postgres = service::command(self.user, &self.programs.join("postgres"));
        postgres.arg("-D").arg(&self.directory);
        let port = self.address.port().to_string();
        // Everything that makes a commit durable is on, as it is by default; said all the same, because the run means nothing without.
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=on",
            "synchronous_commit=on",
            "full_page_writes=on",
            "max_connections=200",
            "log_min_messages=warning",
            "log_line_prefix=%m [%p] %a %r ",
            // Who waited for whom, for whoever looks for the reason of a late takeover.
            "log_lock_waits=on",
            "deadlock_timeout=250ms",
            &format!("port={port}"),
        ] {
            postgres.args(["-c", setting]);
        }
        let server = service::start(postgres, &self.log())?;
        let server = self.server.insert(server);
        let begun = Instant::now();
        loop {
            if let Some(status) = server.try_wait()? {
                self.server = None;
                anyhow::bail!("PostgreSQL ended at its start, {status}; {}", service::log_tail(&self.log()));
            }
            let mut ready = Command::new(self.programs.join("pg_isready"));
            ready.args(["--quiet", "--host=127.0.0.1", "--port", &port]);
            if service::output(&mut ready).await.is_ok() {
                return Ok(());
            }
            ensure!(begun.elapsed() < START_MAX, "PostgreSQL did not answer within {START_MAX:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// `pg_ctl stop -m immediate`: every backend ends where it is, nothing is written any more.
    pub async fn crash(&mut self) -> Result<()> {
        let server = self.server.take().context("PostgreSQL is not running")?;
        service::end(server, Signal::QUIT).await
    }

    /// A psql that connects to `database` directly, past every link and pooler.
    pub fn psql_command(&self, database: &str) -> Command {
        let mut psql = Command::new(self.programs.join("psql"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
            psql.env_remove(name);
        }
        psql.args(["--no-psqlrc", "--quiet", "--no-align", "--tuples-only", "--set=ON_ERROR_STOP=1"]);
        psql.args([
            "--host=127.0.0.1",
            "--port",
            &self.address.port().to_string(),
            "--username",
            ROLE,
            "--dbname",
            database,
        ]);
        psql.kill_on_drop(true);
        psql
    }

    /// Runs statements; what they print.
    pub async fn psql(&self, database: &str, sql: &str) -> Result<String> {
        service::output(self.psql_command(database).args(["--command", sql])).await
    }

    /// Where a client that knows no more finds it, reached at `address`.
    pub fn url(address: SocketAddr) -> String {
        format!("postgres://{ROLE}@{address}/{NAME}")
    }
}
