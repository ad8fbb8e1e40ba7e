//! How late a deadline reaches its client while 100 guests use up all that they can get, and what the host does for others meanwhile.
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
use super::{Bench, Running, conversations, say};
use crate::api::{self, Api};
use crate::load::Histogram;

/// Guests that never end by themselves, of which there are a hundred at once.
struct Crowd {
    row: &'static str,
    guest: &'static str,
    /// What each is told.
    says: &'static str,
}

/// The plainest; and what of the hostile suite is worst for others, each in its own way: memory without end, and host calls without end.
const CROWDS: &[Crowd] = &[
    Crowd { row: "deadline, 100 spinning guests", guest: "spin", says: "spin" },
    Crowd { row: "deadline, 100 guests that fill their memory", guest: "bulk", says: "fill" },
    Crowd { row: "deadline, 100 guests that copy their memory", guest: "bulk", says: "copy" },
    Crowd { row: "deadline, 100 guests that poll what is ready", guest: "poll_tricks", says: "9" },
    Crowd { row: "deadline, 100 guests that write nothing", guest: "empty_io", says: "vectors" },
    Crowd { row: "deadline, 100 guests that flood their log", guest: "stderr_flood", says: "go" },
    Crowd { row: "deadline, 100 guests that pass huge texts", guest: "huge_text", says: "log" },
];
const GUESTS: usize = 100;
const TURN_TIMEOUT_MS: u64 = 2_000;
/// Turns that each of them has in one run.
const ROUNDS: usize = 3;
/// A deadline later than this is a fault, not a figure.
const LATE_MAX: Duration = Duration::from_secs(60);

pub async fn run(bench: &mut Bench) -> Result<()> {
    for crowd in CROWDS {
        if bench.wants(crowd.row) {
            measure(bench, crowd).await?;
        }
    }
    Ok(())
}

async fn measure(bench: &mut Bench, crowd: &'static Crowd) -> Result<()> {
    let row = crowd.row;
    // As many calls as there is time for: what is measured is the clock.
    let settings = [("host_calls_max", u32::MAX.into())];
    let running = bench.host(&["echo", crowd.guest], &settings).await?;
    let neighbour = running.blame(running.neighbour("neighbour", &bench.built.guest("echo")?).await)?;
    let settings = json!({"worker": crowd.guest, "limits": {"turn_timeout_ms": TURN_TIMEOUT_MS}});
    let put = running.api.send("PUT", &format!("/v1/agents/{}", crowd.guest), &[], Some(&settings)).await?;
    ensure!(
        matches!(put.status, 200 | 201),
        "cannot set the time of the agent {}: {} {}",
        crowd.guest,
        put.status,
        put.body
    );
    for run in 0..bench.runs.min(3) {
        say(&format!("{row}, run {}", run + 1));
        let seen = running.blame(once(&running, &neighbour, crowd, run).await)?;
        for (p50, p99, histogram) in [
            ("late p50", "late p99", &seen.late.told),
            ("of that, until ended p50", "of that, until ended p99", &seen.late.ended),
            ("gateway p50", "gateway p99", &seen.gateway),
            ("echo of another org p50", "echo of another org p99", &seen.other_org),
            ("echo of the same org p50", "echo of the same org p99", &seen.same_org),
        ] {
            bench.report.add(row, p50, "ms", histogram.quantile_ms(0.5));
            bench.report.add(row, p99, "ms", histogram.quantile_ms(0.99));
        }
    }
    bench.report.goal(row, "late p99", Goal::AtMost(5.0));
    bench.report.goal(row, "gateway p99", Goal::AtMost(5.0));
    running.host.stop().await
}

/// What one run has seen.
struct Seen {
    late: Late,
    gateway: Histogram,
    /// Turns of an honest guest.
    other_org: Histogram,
    same_org: Histogram,
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
async fn once(running: &Running, neighbour: &Api, crowd: &'static Crowd, run: usize) -> Result<Seen> {
    let whole = Duration::from_millis(TURN_TIMEOUT_MS * ROUNDS as u64);
    let mut gateway = running.gateway(whole - Duration::from_secs(1));
    // Not before all are at it.
    gateway.warm_up = Duration::from_secs(1);
    let [other_org, same_org] = [neighbour, &running.api].map(|api| {
        let mut echo = conversations(api, "echo", &format!("honest-{run}"), 1, gateway.measured);
        echo.warm_up = gateway.warm_up;
        echo.pause = gateway.pause;
        echo
    });
    let local = LocalSet::new();
    let guests = local.run_until(async {
        let api = Rc::new(running.api.clone());
        let mut busy = JoinSet::new();
        for at in 0..GUESTS {
            busy.spawn_local(conversation(api.clone(), crowd, run, at));
        }
        let mut late = Late::new();
        while let Some(done) = busy.join_next().await {
            let guest = done.context("a client panicked")??;
            late.told.merge(&guest.told);
            late.ended.merge(&guest.ended);
        }
        Ok::<_, anyhow::Error>(late)
    });
    let (late, gateway, other_org, same_org) =
        tokio::try_join!(guests, gateway.run(), other_org.run(), same_org.run())?;
    Ok(Seen { late, gateway: gateway.latency, other_org: other_org.latency, same_org: same_org.latency })
}

/// One conversation whose every turn runs into its deadline. The first turns begin one after another, so that the deadlines are spread evenly.
async fn conversation(api: Rc<Api>, crowd: &'static Crowd, run: usize, at: usize) -> Result<Late> {
    tokio::time::sleep(Duration::from_millis(TURN_TIMEOUT_MS / 2 * at as u64 / GUESTS as u64)).await;
    let mut late = Late::new();
    for _ in 0..ROUNDS {
        let accepted = api.submit(crowd.guest, &format!("busy-{run}-{at}"), crowd.says, &[]).await?.expect(202)?;
        let turn = api::text(&accepted, "/turn_id")?;
        let told = timeout(LATE_MAX, terminal(&api, turn)).await.context("a guest was not ended")??;
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
