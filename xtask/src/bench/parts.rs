//! The parts alone, and how near the whole comes to them.
//!
//! What needs the host's library or a server is an example, run as a process of its own: this crate stays light, and a part has the cores to
//! itself as the whole has.

use std::ffi::OsStr;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::report::{Report, columns, number};
use super::{Bench, say, setup};
use crate::api::message;
use crate::load::{Answer, Histogram, Load, Requests, request};
use crate::setup::Profile;

/// A warm turn inside the host: no HTTP, no store.
const INSTANCE: &str = "parts: a fresh instance of echo";
const RAW: &str = "parts: wasmtime alone, a fresh instance of echo";
const HTTP_JSON: &str = "parts: HTTP, JSON, 64 clients";
const HTTP_STREAM: &str = "parts: HTTP, a turn's stream, 64 clients";
const STORE: &str = "parts: the store's batches of 64";
const STORE_SNAPSHOT: &str = "parts: the same with a snapshot of 8 KiB";
const AUTH: &str = "parts: who is calling and what is theirs, one thread";
const SYNC: &str = "parts: one fdatasync of 4 KiB";
const CLIENTS: usize = 64;
/// As in a host's configuration when nothing is set.
const KEEP_RESIDENT_KIB: &str = "256";
/// The store's part runs so many turns a second of measuring: about what it does.
const STORE_TURNS_PER_SECOND: f64 = 12_000.0;
/// Beyond its measuring, for a part to start and end.
const GRACE: Duration = Duration::from_secs(60);

pub async fn run(bench: &mut Bench) -> Result<()> {
    let http = [(HTTP_JSON, "/json"), (HTTP_STREAM, "/stream")].into_iter().filter(|(row, _)| bench.wants(row));
    let http: Vec<_> = http.collect();
    let stores = [(STORE, "0"), (STORE_SNAPSHOT, "8192")].into_iter().filter(|(row, _)| bench.wants(row));
    let stores: Vec<_> = stores.collect();
    if http.is_empty()
        && stores.is_empty()
        && !bench.wants(INSTANCE)
        && !bench.wants(RAW)
        && !bench.wants(AUTH)
        && !bench.wants(SYNC)
    {
        return Ok(());
    }
    let example = |wanted: bool, name: &str| {
        wanted.then(|| setup::build_example(Profile::Release, "turnhouse", name)).transpose()
    };
    let instances = [(INSTANCE, "raw_instances"), (RAW, "raw_wasmtime")]
        .into_iter()
        .map(|(row, name)| anyhow::Ok((row, example(bench.wants(row), name)?)))
        .collect::<Result<Vec<_>>>()?;
    let auth = example(bench.wants(AUTH), "raw_auth")?;
    let store = example(!stores.is_empty(), "raw_store")?;
    let server = if http.is_empty() { None } else { Some(RawHttp::start().await?) };
    for run in 0..bench.runs {
        say(&format!("parts, run {} of {}", run + 1, bench.runs));
        for (row, program) in &instances {
            let Some(program) = program else { continue };
            let wasm = bench.built.guest("echo")?;
            let seconds = (bench.run.as_secs_f64().ceil() as u64).to_string();
            let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).to_string();
            let arguments = [wasm.as_os_str(), seconds.as_ref(), KEEP_RESIDENT_KIB.as_ref(), cores.as_ref()];
            bench.report.add(row, "rate", "turns/s", measure(bench, program, &arguments).await?);
        }
        if let Some(program) = &auth {
            let seconds = (bench.run.as_secs_f64().ceil() as u64).to_string();
            bench.report.add(AUTH, "rate", "checks/s", measure(bench, program, &[seconds.as_ref()]).await?);
        }
        if let Some(server) = &server {
            for (row, path) in &http {
                let sample = server.load(path, bench.run).run().await?;
                bench.report.add(row, "rate", "requests/s", sample.per_second);
                bench.report.add(row, "p50", "ms", sample.latency.quantile_ms(0.5));
            }
        }
        if let Some(program) = &store {
            for (row, snapshot_bytes) in &stores {
                let scratch = setup::scratch_dir("bench")?;
                let turns = ((bench.run.as_secs_f64() * STORE_TURNS_PER_SECOND) as u64).to_string();
                let clients = CLIENTS.to_string();
                let arguments = [turns.as_ref(), snapshot_bytes.as_ref(), clients.as_ref(), scratch.path().as_os_str()];
                bench.report.add(row, "rate", "turns/s", measure(bench, program, &arguments).await?);
            }
        }
        if bench.wants(SYNC) {
            bench.report.add(SYNC, "p50", "ms", fdatasync_p50_ms()?);
        }
    }
    Ok(())
}

/// Runs a part's program and returns the rate that it reports.
async fn measure(bench: &Bench, program: &Path, arguments: &[&OsStr]) -> Result<f64> {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let output = timeout(bench.run * 10 + GRACE, child.wait_with_output())
        .await
        .with_context(|| format!("{} does not end", program.display()))??;
    ensure!(output.status.success(), "{} ended with {}", program.display(), output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    rate(&text).with_context(|| format!("expected {} to report a rate, saw {text:?}", program.display()))
}

/// The number before the first `/s` or ` turns/s`.
fn rate(text: &str) -> Option<f64> {
    let (before, _) = text.split_once("/s")?;
    let before = before.strip_suffix(" turns").unwrap_or(before);
    before.rsplit(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
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
    if let Some(checks) = report.median(AUTH, "rate") {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get) as f64;
        let share = whole / checks / cores;
        ratios.push(("authentication and ownership, of all that a turn costs (goal: < 0.05)".to_owned(), share));
    }
    if let (Some(sandbox), Some(alone)) = (report.median(INSTANCE, "rate"), report.median(RAW, "rate")) {
        ratios
            .push(("a warm turn inside the host ÷ wasmtime alone, in time (goal: ≤ 1.5)".to_owned(), alone / sandbox));
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
    fn a_rate_is_read_from_a_parts_words() {
        assert_eq!(rate("9 instances in 3.01 s: 61234/s on 2 threads; p50 1.0 µs"), Some(61_234.0));
        assert_eq!(
            rate("36000 turns, snapshots of 0 bytes, 64 conversations: 12345 turns/s, slowest write 9ms"),
            Some(12_345.0)
        );
        assert_eq!(rate("nothing"), None);
    }

    #[test]
    fn a_disk_takes_some_time() {
        assert!(fdatasync_p50_ms().unwrap() > 0.0);
    }
}
