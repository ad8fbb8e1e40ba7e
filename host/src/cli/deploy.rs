//! `turnhouse deploy`: uploads a module as the next version of a worker, then makes the agent or moves its pin.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use serde_json::json;

use super::agents::{Change, change};
use super::client::{Client, Server};
use super::output::{Output, bytes_bar};
use super::{CliError, Result};
use turnhouse::ids::{AgentId, WorkerName};

const EXAMPLES: &str = "\
Examples:
  turnhouse deploy greeter.wasm
  turnhouse deploy target/wasm32-wasip1/release/greeter.wasm --agent support --default";

/// Upload a worker and point an agent at it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The module
    wasm: PathBuf,

    /// The worker of which this is the next version; the file's name when none is given
    #[arg(long)]
    worker: Option<WorkerName>,

    /// The agent that is to run it; the worker's name when none is given. Its other settings stay
    #[arg(long)]
    agent: Option<AgentId>,

    /// Conversations that name no agent get this one
    #[arg(long)]
    default: bool,

    #[command(flatten)]
    server: Server,
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let wasm = read_module(&args.wasm)?;
    let worker = args.worker.map_or_else(|| worker_name(&args.wasm), Ok)?;
    let agent = match args.agent {
        Some(agent) => agent,
        None => AgentId::parse(worker.as_str()).context("the worker's name is no agent's")?,
    };
    let client = Client::new(&args.server)?;
    let bar = bytes_bar(&format!("uploading {worker}"), wasm.len() as u64);
    let total = wasm.len() as u64;
    let moving = bar.clone();
    let sent = move |bytes| {
        moving.set_position(bytes);
        if bytes == total {
            moving.set_message("compiling");
        }
    };
    let uploaded = client.upload(&format!("v1/workers/{worker}"), wasm, sent).await;
    bar.finish_and_clear();
    let version = uploaded?;
    let number = version["version"].as_u64().and_then(|n| u32::try_from(n).ok());
    let number = number.context("the host did not say which version it is")?;
    let pin =
        Change { worker: Some(worker.clone()), version: Some(number), default: args.default, ..Change::default() };
    let settings = change(&client, &agent, &pin).await.map_err(|error| {
        error.context(format!("{worker} version {number} is uploaded, but agent {agent} still runs what it ran"))
    })?;
    if output.json {
        output.json(&json!({"worker": version, "agent": settings}));
    } else {
        output.say(&format!("agent {agent} runs {worker} version {number}"));
        output.say(&format!("talk to it: turnhouse chat {agent}"));
    }
    Ok(())
}

/// A module's bytes.
pub fn read_module(path: &Path) -> Result<Bytes> {
    match std::fs::read(path) {
        Ok(wasm) => Ok(Bytes::from(wasm)),
        Err(error) => Err(CliError::usage(format!("cannot read {}: {error}", path.display()))
            .help("a Rust worker is built by `cargo build --release --target wasm32-wasip1`, into target/wasm32-wasip1/release")),
    }
}

/// The worker's name that a file's name gives.
pub fn worker_name(path: &Path) -> Result<WorkerName> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    WorkerName::parse(stem).map_err(|error| {
        CliError::usage(format!("the file's name {stem:?} is no worker's name: {error}"))
            .help("rename the file, or name the worker with `turnhouse deploy --worker`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_named_for_its_file() {
        assert_eq!(worker_name(Path::new("target/x/greeter.wasm")).unwrap().as_str(), "greeter");
        assert_eq!(worker_name(Path::new("my_worker-2.wasm")).unwrap().as_str(), "my_worker-2");
        for bad in ["", "..", "a b.wasm", "-x.wasm"] {
            assert!(worker_name(Path::new(bad)).is_err(), "{bad}");
        }
    }
}
