//! Servers as children of this process: started, signalled, ended, each by its own pid.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::postgres::{self, User};

/// A command of a server: as a user that it agrees to run as, and gone when we are.
pub fn command(user: Option<User>, program: &Path) -> Command {
    let mut command = postgres::run_as(user.as_ref(), program);
    command.current_dir("/");
    command.into()
}

/// Makes a directory that the servers may write.
pub fn make_dir(user: Option<User>, path: &Path) -> Result<()> {
    std::fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
    if let Some(User { uid, gid }) = user {
        std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
    }
    Ok(())
}

/// Runs a command to its end; its standard output.
pub async fn output(command: &mut Command) -> Result<String> {
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
    let output = output.with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        bail!("{name} failed, {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{name} writes no UTF-8"))
}

/// A loopback address that was free a moment ago.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// Starts a server that writes to `log`. It is killed when the child is dropped.
pub fn start(mut command: Command, log: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
    // Ctrl-C in a terminal is for us.
    command.process_group(0);
    let name = command.as_std().get_program().to_string_lossy().into_owned();
    command.spawn().with_context(|| format!("cannot start {name}"))
}

/// Signals a child, by its own pid.
pub fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    kill_process(pid.context("it has ended already")?, signal).context("cannot signal it")
}

/// Signals a server and waits until it has ended.
pub async fn end(mut child: Child, how: Signal) -> Result<()> {
    if child.try_wait()?.is_none() {
        signal(&child, how)?;
    }
    let ended = tokio::time::timeout(std::time::Duration::from_secs(30), child.wait()).await;
    ensure!(ended.is_ok(), "it did not end within 30 s of a signal");
    Ok(())
}

/// The end of a log, for an error's message.
pub fn log_tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    format!("{} ends so:\n  {}", log.display(), lines[lines.len().saturating_sub(15)..].join("\n  "))
}
