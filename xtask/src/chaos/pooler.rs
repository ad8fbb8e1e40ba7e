//! PgBouncer in transaction mode, between the database and some of the replicas.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio::process::Child;

use super::database;
use super::service;
use crate::postgres::User;

const START_MAX: Duration = Duration::from_secs(20);

pub struct Pooler {
    user: Option<User>,
    program: PathBuf,
    directory: PathBuf,
    pub address: SocketAddr,
    server: Option<Child>,
}

impl Pooler {
    /// Starts one in front of the database at `upstream`, with its files in `scratch`.
    pub async fn make(user: Option<User>, program: PathBuf, scratch: &Path, upstream: SocketAddr) -> Result<Pooler> {
        let directory = scratch.join("pgbouncer");
        service::make_dir(user, &directory)?;
        let address = service::free_address()?;
        // `auth_type = any` signs everybody in as the one user whom the database's line names. What it refuses of a connection's parameters is
        // as Debian leaves it.
        let settings = format!(
            "[databases]\n{name} = host={host} port={upstream_port} dbname={name} user={role}\n\n\
             [pgbouncer]\nlisten_addr = {listen}\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
             default_pool_size = 20\nmax_client_conn = 500\nserver_login_retry = 1\nserver_connect_timeout = 3\nquery_wait_timeout = 10\n\
             log_connections = 0\nlog_disconnections = 0\n",
            name = database::NAME,
            role = database::ROLE,
            host = upstream.ip(),
            upstream_port = upstream.port(),
            listen = address.ip(),
            port = address.port(),
        );
        std::fs::write(directory.join("pgbouncer.ini"), settings)?;
        let mut pooler = Pooler { user, program, directory, address, server: None };
        pooler.start().await?;
        Ok(pooler)
    }

    fn log(&self) -> PathBuf {
        self.directory.with_extension("log")
    }

    /// Starts it and waits until it listens.
    pub async fn start(&mut self) -> Result<()> {
        let mut command = service::command(self.user, &self.program);
        command.arg("--quiet").arg(self.directory.join("pgbouncer.ini"));
        let server = self.server.insert(service::start(command, &self.log())?);
        let begun = Instant::now();
        while TcpStream::connect(self.address).await.is_err() {
            if let Some(status) = server.try_wait()? {
                self.server = None;
                anyhow::bail!("PgBouncer ended at its start, {status}; {}", service::log_tail(&self.log()));
            }
            ensure!(begun.elapsed() < START_MAX, "PgBouncer did not listen within {START_MAX:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Every connection through it breaks.
    pub async fn crash(&mut self) -> Result<()> {
        let server = self.server.take().context("PgBouncer is not running")?;
        service::end(server, Signal::KILL).await
    }
}
