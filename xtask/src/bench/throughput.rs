//! Durable turns a second and their latency, by the number of clients.

use anyhow::Result;

use super::report::Goal;
use super::{Bench, say};

/// Name, agent, clients.
const ROWS: &[(&str, &str, usize)] = &[
    ("echo, 1 client", "echo", 1),
    ("echo, 16 clients", "echo", 16),
    ("echo, 64 clients", "echo", 64),
    ("echo, 256 clients", "echo", 256),
    ("snapshot of 8 KiB, 64 clients", "snapshot_8k", 64),
];

/// At half, full and ten times a small pool: the same rate, and no cliff.
const POOL: usize = 64;
const POOL_ROWS: &[(&str, usize)] =
    &[("pool of 64, 32 clients", POOL / 2), ("pool of 64, 64 clients", POOL), ("pool of 64, 640 clients", POOL * 10)];

/// The rows with a small pool.
pub async fn pool(bench: &mut Bench) -> Result<()> {
    let rows: Vec<_> = POOL_ROWS.iter().filter(|(row, _)| bench.wants(row)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    let running = bench.host(&["echo"], &[("host_running_max", POOL as u64), ("org_running_max", POOL as u64)]).await?;
    for run in 0..bench.runs.min(3) {
        for (row, clients) in &rows {
            say(&format!("{row}, run {}", run + 1));
            let load = running.conversations("echo", &format!("pool-{clients}-{run}"), *clients, bench.run);
            let sample = running.blame(load.run().await)?;
            bench.report.add(row, "rate", "turns/s", sample.per_second);
            bench.report.add(row, "p99", "ms", sample.latency.quantile_ms(0.99));
        }
    }
    running.host.stop().await
}

pub async fn run(bench: &mut Bench) -> Result<()> {
    let rows: Vec<_> = ROWS.iter().filter(|(row, _, _)| bench.wants(row)).collect();
    if rows.is_empty() {
        return Ok(());
    }
    // 256 clients may have 256 turns running at once, and each module's first turn should not be one of them.
    let running = bench.host(&["echo", "snapshot_8k"], &[("org_running_max", 1_000)]).await?;
    for run in 0..bench.runs {
        for (row, agent, clients) in &rows {
            say(&format!("{row}, run {} of {}", run + 1, bench.runs));
            let load = running.conversations(agent, &format!("{agent}-{clients}-{run}"), *clients, bench.run);
            let sample = running.blame(load.run().await)?;
            bench.report.add(row, "rate", "turns/s", sample.per_second);
            bench.report.add(row, "p50", "ms", sample.latency.quantile_ms(0.5));
            bench.report.add(row, "p99", "ms", sample.latency.quantile_ms(0.99));
        }
    }
    bench.report.goal("echo, 1 client", "p50", Goal::AtMost(1.0));
    bench.report.goal("echo, 64 clients", "rate", Goal::AtLeast(8_000.0));
    bench.report.goal("snapshot of 8 KiB, 64 clients", "rate", Goal::AtLeast(5_000.0));
    running.host.stop().await
}
