//! What a turn costs that waits for a host operation: memory of the host, with 1 000 and 5 000 of them at once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::task::{JoinSet, LocalSet};

use super::report::Goal;
use super::{Bench, Running, say};
use crate::api::{self, Api};
use crate::host::Memory;

const COUNTS: [usize; 2] = [1_000, 5_000];
/// How long the guests wait: all must have begun, and be measured, before the first is done.
const WAIT: Duration = Duration::from_secs(25);
const MEASURED: Duration = Duration::from_secs(2);
/// Connections that submit and look.
const CLIENTS: usize = 32;
const MIB: f64 = 1024.0 * 1024.0;

pub async fn run(bench: &mut Bench) -> Result<()> {
    for count in COUNTS {
        let row = format!("{count} waiting turns");
        if !bench.wants(&row) {
            continue;
        }
        say(&row);
        let settings = [("host_running_max", 6_000), ("org_running_max", 6_000), ("conversation_queue_max", 20)];
        let running = bench.host(&["echo", "wait_echo"], &settings).await?;
        let measured = running.blame(measure(&running, count).await)?;
        let Measured { idle, waiting, .. } = measured;
        bench.report.add(&row, "memory, all", "MiB", waiting.held as f64 / MIB);
        bench.report.add(&row, "memory, idle host", "MiB", idle.held as f64 / MIB);
        let each = waiting.held.saturating_sub(idle.held) as f64 / count as f64 / 1024.0;
        bench.report.add(&row, "memory, each", "KiB", each);
        bench.report.add(
            &row,
            "resident set, shared pages counted for each guest",
            "MiB",
            waiting.resident as f64 / MIB,
        );
        bench.report.add(&row, "gateway p99", "ms", measured.gateway_p99_ms);
        running.host.stop().await?;
    }
    bench.report.goal("5000 waiting turns", "memory, all", Goal::AtMost(400.0));
    bench.report.goal("5000 waiting turns", "gateway p99", Goal::AtMost(5.0));
    Ok(())
}

struct Measured {
    idle: Memory,
    waiting: Memory,
    gateway_p99_ms: f64,
}

async fn measure(running: &Running, count: usize) -> Result<Measured> {
    warm(&running.api).await?;
    let idle = running.host.memory()?;
    let (gateway, waiting) = hold(&running.api, count, async || {
        let gateway = running.gateway(MEASURED).run().await?;
        Ok((gateway, running.host.memory()?))
    })
    .await?;
    Ok(Measured { idle, waiting, gateway_p99_ms: gateway.latency.quantile_ms(0.99) })
}

/// One turn, so that modules are loaded and pools are warm.
pub async fn warm(api: &Api) -> Result<()> {
    let warm = api.submit("wait_echo", "warm", "1", &["Prefer: wait=30"]).await?.expect(200)?;
    ensure!(warm["state"] == "completed", "expected the first turn to complete, saw {warm}");
    Ok(())
}

/// Has so many turns wait at once, does something meanwhile, and sees that every one of them is answered.
pub async fn hold<T>(api: &Api, count: usize, meanwhile: impl AsyncFnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    let turns = LocalSet::new().run_until(submit_all(api, count)).await?;
    let found = meanwhile().await?;
    let states = LocalSet::new().run_until(states(api, turns.clone())).await?;
    ensure!(begun.elapsed() < WAIT, "submitting {count} turns took {:?}, as long as they wait", begun.elapsed());
    let waiting = states.iter().filter(|state| *state == "running").count();
    ensure!(
        waiting == count,
        "expected {count} running turns, saw {waiting}; another is {:?}",
        odd(&states, "running")
    );
    // They must not only wait but also be answered.
    let until = Instant::now() + WAIT + Duration::from_secs(30);
    loop {
        let states = LocalSet::new().run_until(self::states(api, turns.clone())).await?;
        if states.iter().all(|state| state == "completed") {
            return Ok(found);
        }
        ensure!(Instant::now() < until, "expected every turn to complete, saw one {:?}", odd(&states, "completed"));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn odd<'a>(states: &'a [String], usual: &str) -> Option<&'a String> {
    states.iter().find(|state| *state != usual)
}

/// Submits the turns, each to a conversation of its own, and returns their ids.
async fn submit_all(api: &Api, count: usize) -> Result<Vec<String>> {
    let wait_ms = WAIT.as_millis().to_string();
    in_parallel((0..count).collect(), |at: usize| {
        let (api, wait_ms) = (api.clone(), wait_ms.clone());
        async move {
            let accepted = api.submit("wait_echo", &format!("w-{at}"), &wait_ms, &[]).await?.expect(202)?;
            Ok(api::text(&accepted, "/turn_id")?.to_owned())
        }
    })
    .await
}

async fn states(api: &Api, turns: Vec<String>) -> Result<Vec<String>> {
    in_parallel(turns, |turn: String| {
        let api = api.clone();
        async move {
            let resource = api.get(&format!("/v1/turns/{turn}")).await?.expect(200)?;
            Ok(api::text(&resource, "/state")?.to_owned())
        }
    })
    .await
}

/// Does something with each item, [`CLIENTS`] at a time; the results are in no particular order.
async fn in_parallel<I, F>(items: Vec<I>, each: impl Fn(I) -> F) -> Result<Vec<String>>
where
    F: Future<Output = Result<String>> + 'static,
{
    let mut running = JoinSet::new();
    let mut results = Vec::with_capacity(items.len());
    for item in items {
        if running.len() == CLIENTS {
            results.push(running.join_next().await.context("nothing runs")?.context("a client panicked")??);
        }
        running.spawn_local(each(item));
    }
    while let Some(done) = running.join_next().await {
        results.push(done.context("a client panicked")??);
    }
    Ok(results)
}
