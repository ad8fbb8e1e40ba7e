//! How late a deadline reaches its client while 100 guests spin, and what the gateway does for others meanwhile.
//!
//! Lateness is the moment at which the client reads the terminal event, on its wall clock, less the moment at which the turn's time was over:
//! `started_at` of the turn's resource plus `turn_timeout_ms`. Host and client share a clock here. `started_at` has whole milliseconds, so what is
//! reported is up to 1 ms too large, never too small. `ended_at` tells how much of it passed before the host ended the turn; the rest is its commit and
//! the way to the client.

use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use super::report::Goal;
use super::{Bench, Running, say};
use crate::api::{self, Api};
use crate::load::Histogram;

const ROW: &str = "deadline, 100 spinning guests";
const SPINNERS: usize = 100;
const TURN_TIMEOUT_MS: u64 = 2_000;
/// Turns that each spinner has in one run.
const ROUNDS: usize = 3;
/// A deadline later than this is a fault, not a figure.
const LATE_MAX: Duration = Duration::from_secs(60);

pub async fn run(bench: &mut Bench) -> Result<()> {
    if !bench.wants(ROW) {
        return Ok(());
    }
    let running = bench.host(&["echo", "spin"], &[]).await?;
    let settings = json!({"worker": "spin", "limits": {"turn_timeout_ms": TURN_TIMEOUT_MS}});
    let put = running.api.send("PUT", "/v1/agents/spin", &[], Some(&settings)).await?;
    ensure!(matches!(put.status, 200 | 201), "cannot set the time of the agent spin: {} {}", put.status, put.body);
    for run in 0..bench.runs.min(3) {
        say(&format!("{ROW}, run {}", run + 1));
        let (late, gateway, echo) = running.blame(once(&running, run).await)?;
        for (name, histogram) in [
            ("late p50", &late.told),
            ("of that, until ended p50", &late.ended),
            ("gateway p50", &gateway),
            ("echo turn p50", &echo),
        ] {
            bench.report.add(ROW, name, "ms", histogram.quantile_ms(0.5));
        }
        for (name, histogram) in [
            ("late p99", &late.told),
            ("of that, until ended p99", &late.ended),
            ("gateway p99", &gateway),
            ("echo turn p99", &echo),
        ] {
            bench.report.add(ROW, name, "ms", histogram.quantile_ms(0.99));
        }
    }
    bench.report.goal(ROW, "late p99", Goal::AtMost(5.0));
    bench.report.goal(ROW, "gateway p99", Goal::AtMost(5.0));
    running.host.stop().await
}

/// How late deadlines were.
struct Late {
    /// When the client knew.
    told: Histogram,
    /// When the host had ended the turn.
    ended: Histogram,
}

impl Late {
    fn new() -> Late {
        Late { told: Histogram::new(), ended: Histogram::new() }
    }
}

/// One run: lateness, the gateway's latency, an honest turn's latency.
async fn once(running: &Running, run: usize) -> Result<(Late, Histogram, Histogram)> {
    let whole = Duration::from_millis(TURN_TIMEOUT_MS * ROUNDS as u64);
    let mut gateway = running.gateway(whole - Duration::from_secs(1));
    // Not before all spin.
    gateway.warm_up = Duration::from_secs(1);
    let mut echo = running.conversations("echo", &format!("honest-{run}"), 1, gateway.measured);
    echo.warm_up = gateway.warm_up;
    echo.pause = gateway.pause;
    let local = LocalSet::new();
    let spinners = local.run_until(async {
        let api = Rc::new(running.api.clone());
        let mut spinning = JoinSet::new();
        for at in 0..SPINNERS {
            spinning.spawn_local(spinner(api.clone(), run, at));
        }
        let mut late = Late::new();
        while let Some(done) = spinning.join_next().await {
            let spinner = done.context("a spinner panicked")??;
            late.told.merge(&spinner.told);
            late.ended.merge(&spinner.ended);
        }
        Ok::<_, anyhow::Error>(late)
    });
    let (late, gateway, echo) = tokio::try_join!(spinners, gateway.run(), echo.run())?;
    Ok((late, gateway.latency, echo.latency))
}

/// One conversation whose every turn runs into its deadline. The first turns begin one after another, so that the deadlines are spread evenly.
async fn spinner(api: Rc<Api>, run: usize, at: usize) -> Result<Late> {
    tokio::time::sleep(Duration::from_millis(TURN_TIMEOUT_MS / 2 * at as u64 / SPINNERS as u64)).await;
    let mut late = Late::new();
    for _ in 0..ROUNDS {
        let accepted = api.submit("spin", &format!("spin-{run}-{at}"), "spin", &[]).await?.expect(202)?;
        let turn = api::text(&accepted, "/turn_id")?;
        let told = timeout(LATE_MAX, terminal(&api, turn)).await.context("a spinning guest was not ended")??;
        let resource = api.get(&format!("/v1/turns/{turn}")).await?.expect(200)?;
        let over = millis_of(api::text(&resource, "/started_at")?)? + TURN_TIMEOUT_MS;
        let ended = millis_of(api::text(&resource, "/ended_at")?)?;
        late.told.record(told.saturating_sub(Duration::from_millis(over)));
        late.ended.record(Duration::from_millis(ended.saturating_sub(over)));
    }
    Ok(late)
}

/// The wall clock when the client has read that the turn's time is over.
async fn terminal(api: &Api, turn: &str) -> Result<Duration> {
    let mut events = api.events(turn, None).await?;
    let mut told = None;
    while let Some(event) = events.event().await? {
        if event.is_terminal() {
            told = Some(SystemTime::now().duration_since(UNIX_EPOCH)?);
            let data: Value = serde_json::from_str(event.data)?;
            ensure!(data["code"] == "turn_timeout", "expected turn_timeout, saw {}: {data}", event.kind);
        }
    }
    told.context("the stream ended without a terminal event")
}

fn millis_of(rfc3339: &str) -> Result<u64> {
    let time = OffsetDateTime::parse(rfc3339, &Rfc3339).with_context(|| format!("{rfc3339:?} is no time"))?;
    u64::try_from(time.unix_timestamp_nanos() / 1_000_000).context("a time before 1970")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_to_the_millisecond() {
        assert_eq!(millis_of("1970-01-01T00:00:01.234Z").unwrap(), 1_234);
        assert_eq!(millis_of("1970-01-01T00:00:01Z").unwrap(), 1_000);
        assert!(millis_of("yesterday").is_err());
    }
}
