//! Whether a turn costs the same when the store holds a million finished ones.
//!
//! The history is made of real turns, as fast as they go. Two hosts, one with a short history and one with a long, are then measured in turns, with so few
//! turns that the short history stays short.

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::report::{Goal, number};
use super::{Bench, say, turn_request};
use crate::api::Api;
use crate::load::{Answer, Load, Requests};

const SHORT: u64 = 1_000;
const LONG: u64 = 1_000_000;
const LONG_QUICK: u64 = 20_000;
/// Conversations get this long.
const TURNS_PER_CONVERSATION: u64 = 100;
const FILL_CLIENTS: usize = 64;
/// A host that is slower than 1 700 turns/s does not get to a million.
const FILL_MAX: Duration = Duration::from_secs(600);
/// Clients, and turns of one run.
const LOADS: [(usize, u64); 2] = [(1, 300), (16, 1_600)];

pub async fn run(bench: &mut Bench) -> Result<()> {
    if !bench.wants("history") {
        return Ok(());
    }
    let long = if bench.quick { LONG_QUICK } else { LONG };
    let short_host = bench.host(&["echo"], &[]).await?;
    let long_host = bench.host(&["echo"], &[]).await?;
    let began = Instant::now();
    say(&format!("history: making {} and {} finished turns", number(SHORT as f64), number(long as f64)));
    short_host.blame(fill(&short_host.api, SHORT).await)?;
    let filled = long_host.blame(fill(&long_host.api, long).await)?;
    say(&format!("history: made {} in {:.0} s", number(filled as f64), began.elapsed().as_secs_f64()));
    let names = [(&short_host, SHORT), (&long_host, filled)].map(|(host, turns)| (host, number(turns as f64)));
    let runs = bench.runs.max(3);
    for run in 0..runs {
        for (clients, turns) in LOADS {
            let mut p50 = [0.0; 2];
            // Each host is first in every other run: who comes second finds the machine awake.
            for at in if run % 2 == 0 { [0, 1] } else { [1, 0] } {
                let (host, history) = &names[at];
                let mut load =
                    host.conversations("echo", &format!("h-{clients}-{run}"), clients, Duration::from_secs(20));
                load.warm_up = Duration::ZERO;
                load.requests_max = Some(turns);
                let sample = host.blame(load.run().await)?;
                p50[at] = sample.latency.quantile_ms(0.5);
                bench.report.add(&row(history, clients), "p50", "ms", p50[at]);
                bench.report.add(&row(history, clients), "p99", "ms", sample.latency.quantile_ms(0.99));
            }
            bench.report.add(&ratio_row(clients), "p50, long ÷ short", "×", p50[1] / p50[0]);
        }
    }
    for (clients, _) in LOADS {
        bench.report.goal(&ratio_row(clients), "p50, long ÷ short", Goal::AtMost(1.2));
    }
    short_host.host.stop().await?;
    long_host.host.stop().await
}

fn row(history: &str, clients: usize) -> String {
    format!("history of {history} turns, {clients} client{}", if clients == 1 { "" } else { "s" })
}

fn ratio_row(clients: usize) -> String {
    format!("history, {clients} client{}", if clients == 1 { "" } else { "s" })
}

/// Runs so many turns, or as many as time allows; returns how many.
pub async fn fill(api: &Api, turns: u64) -> Result<u64> {
    let (address, api) = (api.address, api.clone());
    let requests: Requests = Rc::new(move |client, n, out: &mut Vec<u8>| {
        let conversation = format!("fill-{client}-{}", n / TURNS_PER_CONVERSATION);
        out.extend_from_slice(&turn_request(&api, "echo", &conversation));
    });
    let mut load = Load::new(address, FILL_CLIENTS, FILL_MAX, Answer::Event("turn.completed"), requests);
    load.warm_up = Duration::ZERO;
    load.requests_max = Some(turns);
    Ok(load.run().await?.latency.count())
}
