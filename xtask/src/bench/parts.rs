//! The parts alone, and how near the whole comes to them.
//!
//! What needs the host's library or a server is an example, run as a process of its own: this crate stays light, and a part has the cores to
//! itself as the whole has. Each prints one line of JSON.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::report::{Report, columns, number};
use super::{Bench, say, setup};
use crate::api::message;
use crate::load::{Answer, Histogram, Load, Requests, request};
use crate::setup::Profile;

const INSTANCE: &str = "parts: a fresh instance of echo";
const HTTP_JSON: &str = "parts: HTTP, JSON, 64 clients";
const HTTP_STREAM: &str = "parts: HTTP, a turn's stream, 64 clients";
const STORE: &str = "parts: the store's batches";
const SYNC: &str = "parts: one fdatasync of 4 KiB";
const CLIENTS: usize = 64;
/// Beyond its measuring, for a part to start and end.
const GRACE: Duration = Duration::from_secs(60);

pub async fn run(bench: &mut Bench) -> Result<()> {
    let (instance, store) = (bench.wants(INSTANCE), bench.wants(STORE));
    let http: Vec<_> =
        [(HTTP_JSON, "/json"), (HTTP_STREAM, "/stream")].into_iter().filter(|(row, _)| bench.wants(row)).collect();
    let instance = if instance { Some(setup::build_example(Profile::Release, "xtask", "raw_instance")?) } else { None };
    let store = if store { Some(setup::build_example(Profile::Release, "turnhouse", "raw_store")?) } else { None };
    let server = if http.is_empty() { None } else { Some(RawHttp::start().await?) };
    for run in 0..bench.runs {
        say(&format!("parts, run {} of {}", run + 1, bench.runs));
        if let Some(program) = &instance {
            let wasm = bench.built.guest("echo")?;
            let line = measure(bench, program, &[&wasm]).await?;
            bench.report.add(INSTANCE, "rate", "turns/s", field(&line, "per_second")?);
            bench.report.add(INSTANCE, "p50", "ms", field(&line, "p50_ms")?);
        }
        if let Some(server) = &server {
            for (row, path) in &http {
                let sample = server.load(path, bench.run).run().await?;
                bench.report.add(row, "rate", "requests/s", sample.per_second);
                bench.report.add(row, "p50", "ms", sample.latency.quantile_ms(0.5));
            }
        }
        if let Some(program) = &store {
            let scratch = setup::scratch_dir("bench")?;
            let line = measure(bench, program, &[&scratch.path().join("raw.db")]).await?;
            bench.report.add(STORE, "rate", "turns/s", field(&line, "per_second")?);
        }
        if bench.wants(SYNC) {
            bench.report.add(SYNC, "p50", "ms", fdatasync_p50_ms()?);
        }
    }
    Ok(())
}

/// Runs a part's program and returns what it says last.
async fn measure(bench: &Bench, program: &Path, arguments: &[&PathBuf]) -> Result<Value> {
    let child = Command::new(program)
        .args(arguments)
        .arg(bench.run.as_secs_f64().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let output = timeout(bench.run * 4 + GRACE, child.wait_with_output())
        .await
        .with_context(|| format!("{} does not end", program.display()))??;
    ensure!(output.status.success(), "{} ended with {}", program.display(), output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().with_context(|| format!("{} said nothing", program.display()))?;
    serde_json::from_str(last).with_context(|| format!("{} said {last:?}, which is no JSON", program.display()))
}

fn field(line: &Value, name: &str) -> Result<f64> {
    line[name].as_f64().with_context(|| format!("expected a number `{name}`, saw {line}"))
}

/// A server with a route and nothing behind it.
struct RawHttp {
    address: SocketAddr,
    _child: Child,
}

impl RawHttp {
    async fn start() -> Result<RawHttp> {
        let program = setup::build_example(Profile::Release, "xtask", "raw_http")?;
        // It ends when its standard input does, so it does not outlive this process.
        let mut command = Command::new(&program);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
        let line = timeout(GRACE, lines.next_line()).await.context("the raw server does not start")??;
        let address = line.context("the raw server ended at once")?.parse()?;
        Ok(RawHttp { address, _child: child })
    }

    fn load(&self, path: &str, measured: Duration) -> Load {
        let body = message("What is the capital of France?").to_string();
        let bytes = request("POST", path, "th_none", &["Accept: text/event-stream"], body.as_bytes());
        let requests: Requests = Rc::new(move |_, _, out: &mut Vec<u8>| out.extend_from_slice(&bytes));
        let answer = if path == "/stream" { Answer::Event("turn.completed") } else { Answer::Status(200) };
        Load::new(self.address, CLIENTS, measured, answer, requests)
    }
}

fn fdatasync_p50_ms() -> Result<f64> {
    let scratch = setup::scratch_dir("bench")?;
    let mut file = std::fs::File::create(scratch.path().join("sync"))?;
    let mut times = Histogram::new();
    for _ in 0..300 {
        file.write_all(&[7; 4096])?;
        let begun = Instant::now();
        file.sync_data()?;
        times.record(begun.elapsed());
    }
    Ok(times.quantile_ms(0.5))
}

/// The whole at 64 clients against each part, and against all of them one after another on the same cores.
pub fn ratios(report: &Report) -> Vec<(String, f64)> {
    let mut ratios = Vec::new();
    let Some(whole) = report.median("echo, 64 clients", "rate") else { return ratios };
    let parts = [INSTANCE, HTTP_STREAM, STORE].map(|row| (row, report.median(row, "rate")));
    for (row, rate) in parts {
        if let Some(rate) = rate {
            ratios.push((format!("echo, 64 clients ÷ {row}"), whole / rate));
        }
    }
    if let [(_, Some(a)), (_, Some(b)), (_, Some(c))] = parts {
        let sum = 1.0 / a + 1.0 / b + 1.0 / c;
        ratios.push(("time of a turn beyond the sum of its parts (goal: < 0.4)".to_owned(), 1.0 / whole / sum - 1.0));
    }
    ratios
}

pub fn ratio_table(ratios: &[(String, f64)]) -> String {
    let head = ["ratio", "value"].map(str::to_owned);
    let lines: Vec<_> =
        std::iter::once(head).chain(ratios.iter().map(|(name, value)| [name.clone(), number(*value)])).collect();
    columns(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_is_held_against_each_part_and_their_sum() {
        let mut report = Report::default();
        assert!(ratios(&report).is_empty());
        report.add("echo, 64 clients", "rate", "turns/s", 10_000.0);
        for (row, rate) in [(INSTANCE, 60_000.0), (HTTP_STREAM, 60_000.0), (STORE, 20_000.0)] {
            report.add(row, "rate", "turns/s", rate);
        }
        let ratios = ratios(&report);
        assert_eq!(ratios.len(), 4);
        assert!((ratios[2].1 - 0.5).abs() < 1e-9);
        // 100 µs against 16.7 + 16.7 + 50.
        assert!((ratios[3].1 - 0.2).abs() < 1e-9, "{ratios:?}");
    }

    #[test]
    fn a_disk_takes_some_time() {
        assert!(fdatasync_p50_ms().unwrap() > 0.0);
    }
}
