//! What tenants cost each other: whether one that floods the host delays another, and whether a turn costs the same where there are ten thousand of them.

use std::process::Stdio;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use super::report::{Goal, number};
use super::{Bench, conversations, say, setup, turn_request};
use crate::api::Api;
use crate::load::{Answer, Histogram, Load, Requests};
use crate::setup::Profile;

const FLOOD: &str = "tenants, one org floods";
const FLOOD_CLIENTS: usize = 64;
/// Of the other org's client, between two messages.
const PAUSE: Duration = Duration::from_millis(2);

const MANY_ORGS: usize = 10_000;
const MANY_ORGS_QUICK: usize = 1_000;
const AGENTS_EACH: usize = 100;
/// Orgs that speak, in turns.
const SPEAKING: usize = 100;
const MIB: f64 = 1024.0 * 1024.0;

pub async fn run(bench: &mut Bench) -> Result<()> {
    flood(bench).await?;
    many(bench).await
}

/// One client of an org, alone and while another org has as many messages on their way as the host takes at its best rate.
async fn flood(bench: &mut Bench) -> Result<()> {
    if !bench.wants(FLOOD) {
        return Ok(());
    }
    let running = bench.host(&["echo"], &[]).await?;
    let other = running.blame(running.neighbour("neighbour", &bench.built.guest("echo")?).await)?;
    let measured = bench.run.max(Duration::from_secs(2));
    for run in 0..bench.runs.max(3) {
        say(&format!("{FLOOD}, run {}", run + 1));
        let honest = |label: &str, measured| {
            let mut load = conversations(&other, "echo", &format!("{label}-{run}"), 1, measured);
            load.pause = PAUSE;
            load
        };
        let alone = running.blame(honest("alone", measured).run().await)?.latency;
        let mut flood = running.conversations("echo", &format!("flood-{run}"), FLOOD_CLIENTS, measured);
        flood.warm_up = Duration::from_millis(500);
        let mut beside = honest("beside", measured);
        beside.warm_up = flood.warm_up;
        let (flood, beside) = tokio::join!(flood.run(), beside.run());
        let (flood, beside) = (running.blame(flood)?, running.blame(beside)?.latency);
        let mut add = |figure: &'static str, unit: &'static str, value| bench.report.add(FLOOD, figure, unit, value);
        add("the other alone, p50", "ms", alone.quantile_ms(0.5));
        add("the other alone, p99", "ms", alone.quantile_ms(0.99));
        add("the other meanwhile, p50", "ms", beside.quantile_ms(0.5));
        add("the other meanwhile, p99", "ms", beside.quantile_ms(0.99));
        add("the flood's own p99", "ms", flood.latency.quantile_ms(0.99));
        add("the flood", "turns/s", flood.per_second);
        add(RATIO, "×", beside.quantile_ms(0.99) / alone.quantile_ms(0.99));
    }
    bench.report.goal(FLOOD, RATIO, Goal::AtMost(3.0));
    running.host.stop().await
}

const RATIO: &str = "the other's p99, meanwhile ÷ alone";

/// Two hosts, one with as many orgs as speak and one agent each, and one with many of both.
async fn many(bench: &mut Bench) -> Result<()> {
    let orgs = if bench.quick { MANY_ORGS_QUICK } else { MANY_ORGS };
    let name = |orgs: usize, agents: usize| {
        format!("tenants, {} orgs with {agents} agent{} each", number(orgs as f64), if agents == 1 { "" } else { "s" })
    };
    let rows = [name(SPEAKING, 1), name(orgs, AGENTS_EACH)];
    if !rows.iter().any(|row| bench.wants(row)) {
        return Ok(());
    }
    let fill = setup::build_example(Profile::Release, "turnhouse", "many_orgs")?;
    let mut hosts = Vec::new();
    for (row, orgs, agents) in [(&rows[0], SPEAKING, 1), (&rows[1], orgs, AGENTS_EACH)] {
        say(row);
        let mut running = bench.host(&["echo"], &[]).await?;
        running.host.stop().await?;
        let output = Command::new(&fill)
            .arg(&running.start.data_dir)
            .args([orgs, agents, SPEAKING].map(|count| count.to_string()))
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .output()
            .await?;
        ensure!(output.status.success(), "the orgs could not be made: {}", output.status);
        let keys = String::from_utf8(output.stdout).context("a key is text")?;
        let began = Instant::now();
        running.host = running.start.run().await?;
        bench.report.add(row, "start until ready", "ms", began.elapsed().as_secs_f64() * 1_000.0);
        running.api = Api::of(&running.host);
        let keys: Vec<Api> =
            keys.lines().map(|key| Api { address: running.api.address, key: key.to_owned() }).collect();
        ensure!(keys.len() == SPEAKING, "expected {SPEAKING} keys, saw {}", keys.len());
        // Each speaks once, so that what is measured is no first turn of a module.
        running.blame(speak(&keys, "first", 1, SPEAKING as u64, Duration::from_secs(60)).await)?;
        hosts.push((row, running, keys));
    }
    let mut p50 = [const { Vec::new() }; 2];
    for run in 0..bench.runs.max(3) {
        // Each host is first in every other run: who comes second finds the machine awake.
        for at in if run % 2 == 0 { [0, 1] } else { [1, 0] } {
            let (row, running, keys) = &hosts[at];
            let latency = running.blame(speak(keys, &format!("run-{run}"), 1, u64::MAX, bench.run).await)?;
            bench.report.add(row, "p50", "ms", latency.quantile_ms(0.5));
            bench.report.add(row, "p99", "ms", latency.quantile_ms(0.99));
            p50[at].push(latency.quantile_ms(0.5));
        }
    }
    for (few, many) in p50[0].iter().zip(&p50[1]) {
        bench.report.add(&rows[1], "p50, ÷ few", "×", many / few);
    }
    for (row, running, _) in hosts {
        bench.report.add(row, "memory", "MiB", running.host.memory()?.held as f64 / MIB);
        running.host.stop().await?;
    }
    Ok(())
}

/// Turns of one org after another, each in a conversation of its own that goes on.
async fn speak(keys: &[Api], label: &str, clients: usize, turns: u64, measured: Duration) -> Result<Histogram> {
    let prebuilt: Vec<Vec<u8>> = keys.iter().map(|api| turn_request(api, "echo", label)).collect();
    let requests: Requests =
        Rc::new(move |_, n, out: &mut Vec<u8>| out.extend_from_slice(&prebuilt[n as usize % prebuilt.len()]));
    let mut load = Load::new(keys[0].address, clients, measured, Answer::Event("turn.completed"), requests);
    if turns < u64::MAX {
        load.requests_max = Some(turns);
        load.warm_up = Duration::ZERO;
    }
    Ok(load.run().await?.latency)
}
