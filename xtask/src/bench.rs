//! `cargo xtask bench`: what the parts can do, what the whole does, and how near it comes, in one run on one machine.
//!
//! Durability is on throughout (`synchronous=FULL` on the disk that holds `target`; `synchronous_commit=on` on PostgreSQL). Every figure is the
//! median of several short runs, and the runs of different rows alternate, so that a machine that drifts drifts for all of them. The host is
//! the real program in a process of its own, on the same cores as the load tool.

mod contest;
mod deadline;
mod history;
mod machine;
mod modules;
mod parts;
mod peers;
mod replicas;
mod report;
mod tenants;
mod throughput;
mod waiting;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::api::{self, Api, message, turns_path};
use crate::host::{Host, Role, Start};
use crate::load::{Answer, Load, Requests, request};
use crate::setup::{self, Built, Profile};
use report::Report;

/// What the command line asks for.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Length of one run of a load, in seconds
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// One short run of each, and a short history: to see that it works, not to quote
    #[arg(long)]
    quick: bool,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only rows with this in their names: parts, echo, snapshot, pool, deadline, tenants, waiting, modules, history, postgres, peers
    #[arg(long, value_name = "ROW")]
    only: Option<String>,
}

/// What every row needs.
struct Bench {
    built: Built,
    /// Length of one run of a load.
    run: Duration,
    runs: usize,
    quick: bool,
    only: Option<String>,
    report: Report,
    /// Something of ours could not be measured.
    failed: bool,
}

/// Runs it here when this is the release build, else builds and starts that one: a load tool without optimisation would measure itself.
pub async fn run(options: Options) -> Result<ExitCode> {
    setup::ensure_wasm_target()?;
    if cfg!(debug_assertions) {
        let program = setup::build_bin(Profile::Release, "xtask")?;
        let status =
            Command::new(program).args(std::env::args_os().skip(1)).current_dir(std::env::current_dir()?).status()?;
        return Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)));
    }
    let mut bench = Bench {
        built: setup::build(Profile::Release)?,
        run: Duration::from_secs_f64(
            if options.quick { options.seconds.min(1.0) } else { options.seconds }.clamp(0.2, 60.0),
        ),
        runs: if options.quick { 1 } else { 5 },
        quick: options.quick,
        only: options.only,
        report: Report::default(),
        failed: false,
    };
    // What the builds have written must not reach the disk while it is measured: a commit of ours would wait for it.
    rustix::fs::sync();
    parts::run(&mut bench).await?;
    throughput::run(&mut bench).await?;
    throughput::pool(&mut bench).await?;
    deadline::run(&mut bench).await?;
    tenants::run(&mut bench).await?;
    waiting::run(&mut bench).await?;
    modules::run(&mut bench).await?;
    history::run(&mut bench).await?;
    contest::run(&mut bench).await?;

    let machine = machine::describe();
    let ratios = [parts::ratios(&bench.report), contest::ratios(&bench.report)].concat();
    println!("\n{machine}\n\n{}", bench.report.table());
    if !ratios.is_empty() {
        println!("{}", parts::ratio_table(&ratios));
    }
    for (row, reason) in bench.report.skipped() {
        println!("skipped: {row}: {reason}");
    }
    if let Some(file) = &options.json {
        let ratios: serde_json::Map<_, _> = ratios.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
        let all = json!({"machine": machine, "quick": bench.quick, "run_seconds": bench.run.as_secs_f64(),
                         "figures": bench.report.json(), "ratios": ratios, "skipped": bench.report.skipped()});
        std::fs::write(file, format!("{all:#}\n")).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(if bench.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

impl Bench {
    /// Whether a row was asked for.
    fn wants(&self, row: &str) -> bool {
        self.only.as_ref().is_none_or(|only| row.contains(only.as_str()))
    }

    /// A host of its own for a row, on a fresh directory that goes with it.
    async fn host(&self, modules: &[&str], settings: &[(&str, u64)]) -> Result<Running> {
        let scratch = setup::scratch_dir("bench")?;
        let start = Start {
            program: self.built.program.clone(),
            data_dir: scratch.path().join("data"),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            role: Role::Dev { modules: modules.iter().map(|name| self.built.guest(name)).collect::<Result<_>>()? },
            settings: limits(settings),
        };
        let host = start.run().await?;
        Ok(Running { api: Api::of(&host), host, start, _scratch: scratch })
    }
}

/// A host and where it lives.
struct Running {
    host: Host,
    api: Api,
    start: Start,
    _scratch: tempfile::TempDir,
}

impl Running {
    /// Another org on this host, that has deployed a module; it is its agent's name, too.
    async fn neighbour(&self, org: &str, module: &Path) -> Result<Api> {
        let data_dir = self.start.data_dir.to_str().context("the data directory's path is not UTF-8")?;
        let module = module.to_str().context("the module's path is not UTF-8")?;
        command(&self.start.program, &["orgs", "create", org, "--data-dir", data_dir]).await?;
        let owner = ["--user", "owner", "--scopes", "admin", "--data-dir", data_dir];
        let key = command(&self.start.program, &[&["keys", "create", "--org", org], &owner[..]].concat()).await?;
        let api = Api { address: self.api.address, key: api::text(&key, "/api_key")?.to_owned() };
        command(&self.start.program, &["deploy", module, "--url", &self.host.url, "--api-key", &api.key]).await?;
        Ok(api)
    }

    /// Adds the host's own words to an error of its row.
    fn blame<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let log = self.start.log_tail();
            if log.is_empty() { error } else { error.context(log) }
        })
    }

    /// Clients that each hold a conversation of their own with `agent` and read every turn to its end.
    fn conversations(&self, agent: &str, label: &str, clients: usize, measured: Duration) -> Load {
        conversations(&self.api, agent, label, clients, measured)
    }

    /// One client that asks `/healthz` again and again, with a short rest.
    fn gateway(&self, measured: Duration) -> Load {
        let bytes = request("GET", "/healthz", "", &[], b"");
        let requests: Requests = Rc::new(move |_, _, out: &mut Vec<u8>| out.extend_from_slice(&bytes));
        let mut load = Load::new(self.api.address, 1, measured, Answer::Status(200), requests);
        load.pause = Duration::from_millis(2);
        load
    }
}

/// Runs a command of the program, as an operator would beside a host; what it prints as JSON.
async fn command(program: &Path, arguments: &[&str]) -> Result<Value> {
    let mut command = tokio::process::Command::new(program);
    command.arg("--json").args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`turnhouse {}` ended with {}\n{said}", arguments[0], output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn conversations(api: &Api, agent: &str, label: &str, clients: usize, measured: Duration) -> Load {
    let prebuilt: Vec<Vec<u8>> =
        (0..clients).map(|client| turn_request(api, agent, &format!("{label}-{client}"))).collect();
    let requests: Requests = Rc::new(move |client, _, out: &mut Vec<u8>| out.extend_from_slice(&prebuilt[client]));
    Load::new(api.address, clients, measured, Answer::Event("turn.completed"), requests)
}

/// Submits a short message; the answer is the turn's stream.
fn turn_request(api: &Api, agent: &str, conversation: &str) -> Vec<u8> {
    let body = message("What is the capital of France?").to_string();
    request("POST", &turns_path(agent, conversation), &api.key, &["Accept: text/event-stream"], body.as_bytes())
}

/// Limits by their names, as the variables that set them.
fn limits(limits: &[(&str, u64)]) -> Vec<(String, String)> {
    limits
        .iter()
        .map(|(name, value)| (format!("TURNHOUSE_LIMITS__{}", name.to_uppercase()), value.to_string()))
        .collect()
}

fn say(what: &str) {
    eprintln!("  {what}");
}
