//! Many deployed modules on one host: what they cost in memory, below and beyond the number that a host holds at once, and how soon the first turn of one comes from the cache on disk after a restart.

use std::ops::Range;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use tokio::process::Command;
use tokio::task::JoinSet;

use super::report::Goal;
use super::{Bench, Running, say};
use crate::api::Api;
use crate::load::Histogram;

const MIB: f64 = 1024.0 * 1024.0;
/// Deploys at once: a compiler each.
const AT_ONCE: usize = 2;
/// Modules that a host holds in memory at once, the ones that it has by itself among them (`SandboxConfig::workers_loaded_max`).
const LOADED_MAX: usize = 512;
/// Not against the bound itself: until about the first thousand the store's page cache (64 MiB) fills with what was uploaded, too.
const FLAT: &str = "memory, 1 500 ÷ 1 000";

/// Turns at once.
const POOL: u64 = 64;

/// So many modules, and what the host's memory is then called.
struct Step {
    modules: usize,
    figure: &'static str,
}

/// Half of the modules that are held, as many, twice and three times as many.
const STEPS: &[Step] = &[
    Step { modules: LOADED_MAX / 2, figure: "memory, 256" },
    Step { modules: LOADED_MAX, figure: "memory, 512 (the bound)" },
    Step { modules: 1_000, figure: "memory, 1 000" },
    Step { modules: 1_500, figure: "memory, 1 500" },
];
const STEPS_QUICK: &[Step] = &[Step { modules: 25, figure: "memory, 25" }, Step { modules: 50, figure: "memory, 50" }];

/// First turns that are timed.
const FIRST_TURNS: usize = 100;

pub async fn run(bench: &mut Bench) -> Result<()> {
    let (steps, row) =
        if bench.quick { (STEPS_QUICK, "modules, 50 deployed") } else { (STEPS, "modules, 1500 deployed") };
    let count = steps.last().expect("a step").modules;
    if !bench.wants(row) {
        return Ok(());
    }
    say(row);
    // A small pool: each module's first turn takes a slot that was never used, while there is one, and what a pool keeps of its slots is bounded by its size.
    let limits =
        [("org_agents_max", 2_000), ("org_workers_max", 2_000), ("host_running_max", POOL), ("org_running_max", POOL)];
    let mut running = bench.host(&["echo"], &limits).await?;
    let wasm = std::fs::read(bench.built.guest("echo")?)?;
    let scratch = tempfile::tempdir()?;
    let before = running.host.memory()?.held;
    bench.report.add(row, "memory, none", "MiB", before as f64 / MIB);
    let begun = Instant::now();
    let mut held = Vec::new();
    let mut deployed = 0;
    for step in steps {
        let batch = deployed..step.modules;
        let done = deploy_all(&bench.built.program, &running, &wasm, scratch.path(), batch.clone()).await;
        running.blame(done)?;
        // Each has its turn, so that it is not merely deployed.
        for at in batch {
            first_turn(&running.api, &name(at)).await?;
        }
        deployed = step.modules;
        held.push(running.host.memory()?.held);
        bench.report.add(row, step.figure, "MiB", *held.last().expect("just pushed") as f64 / MIB);
    }
    bench.report.add(row, "deploys, each with a turn", "modules/s", count as f64 / begun.elapsed().as_secs_f64());
    if let [_, bound, beyond, far] = held[..] {
        let each = bound.saturating_sub(before) as f64 / 1024.0 / LOADED_MAX as f64;
        bench.report.add(row, "memory, each that is loaded", "KiB", each);
        bench.report.add(row, FLAT, "×", far as f64 / beyond as f64);
        bench.report.goal(row, FLAT, Goal::AtMost(1.1));
    }

    running.host.stop().await?;
    running.host = running.start.run().await?;
    running.api = Api::of(&running.host);
    // A module that was there at the start, so that the path itself is warm.
    first_turn(&running.api, "echo").await?;
    let mut first = Histogram::new();
    for at in (0..count).step_by((count / FIRST_TURNS).max(1)) {
        let begun = Instant::now();
        first_turn(&running.api, &name(at)).await?;
        first.record(begun.elapsed());
    }
    bench.report.add(row, "first turn after a restart, p50", "ms", first.quantile_ms(0.5));
    bench.report.add(row, "first turn after a restart, p99", "ms", first.quantile_ms(0.99));
    bench.report.goal(row, "first turn after a restart, p50", Goal::AtMost(5.0));
    running.host.stop().await
}

fn name(at: usize) -> String {
    format!("m-{at}")
}

/// The same program so many times, each with a section of its own, so that each is another module.
async fn deploy_all(program: &Path, running: &Running, wasm: &[u8], scratch: &Path, which: Range<usize>) -> Result<()> {
    let mut deploys = JoinSet::new();
    for at in which {
        if deploys.len() == AT_ONCE {
            deploys.join_next().await.context("nothing runs")???;
        }
        let name = name(at);
        let file = scratch.join(format!("{name}.wasm"));
        std::fs::write(&file, with_section(wasm, &name))?;
        let mut deploy = Command::new(program);
        deploy.arg("deploy").arg(&file).args(["--worker", &name, "--agent", &name]);
        deploy.args(["--url", &running.host.url, "--api-key", &running.api.key]);
        deploy.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        deploys.spawn(async move {
            let status = deploy.status().await?;
            ensure!(status.success(), "a deploy ended with {status}");
            anyhow::Ok(())
        });
    }
    while let Some(done) = deploys.join_next().await {
        done??;
    }
    Ok(())
}

/// A custom section at the end: it changes the module's digest and nothing else.
fn with_section(wasm: &[u8], name: &str) -> Vec<u8> {
    let length = u8::try_from(name.len()).expect("a short name");
    assert!(length < 0x7f, "its length is one byte of LEB128");
    [wasm, &[0, length + 1, length], name.as_bytes()].concat()
}

async fn first_turn(api: &Api, agent: &str) -> Result<()> {
    let turn = api.submit(agent, "first", "hi", &["Prefer: wait=30"]).await?.expect(200)?;
    ensure!(turn["state"] == "completed", "expected the turn to complete, saw {turn}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_added_whole() {
        let module = b"\0asm\x01\0\0\0";
        assert_eq!(with_section(module, "m-1"), b"\0asm\x01\0\0\0\0\x04\x03m-1");
    }
}
