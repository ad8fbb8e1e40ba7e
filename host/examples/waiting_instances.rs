//! What a turn costs in memory while it waits for an operation.
//!
//! `cargo run --release -p turnhouse --example waiting_instances [COUNT] [WORKER.wasm]` (a worker that calls `host.echo` with a long delay)

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use turnhouse::gate::Grant;
use turnhouse::limits::Limits;
use turnhouse::sandbox::{
    Attachments, Control, GuestLimits, Input, InputJson, Job, Output, Refused, Said, Sandbox, SandboxConfig, Stop,
};

/// Waits for an answer that takes ten minutes.
const WAITER: &str = r#"(module
  (import "turnhouse_v1" "call" (func $call (param i32 i32 i32 i32) (result i32)))
  (import "turnhouse_v1" "recv" (func $recv (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 0) "host.echo{\"delay_ms\":600000}")
  (func (export "_start")
    (drop (call $recv (call $call (i32.const 0) (i32.const 9) (i32.const 9) (i32.const 19))
      (i32.const 1024) (i32.const 1024) (i32.const -1)))))"#;

struct Nobody;

#[async_trait]
impl Output for Nobody {
    fn say(&self, _said: Said) -> bool {
        true
    }

    async fn ready(&self) {}

    async fn begin_effect(&self, _said: Said) -> Result<(), Refused> {
        Err(Refused)
    }
}

fn resident_kib() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap_or_default();
    Ok(line.split_whitespace().nth(1).unwrap_or("0").parse()?)
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let count: usize = arguments.next().map_or(Ok(5000), |text| text.parse())?;
    let wasm = match arguments.next() {
        Some(path) => std::fs::read(path)?,
        None => wat::parse_str(WAITER)?,
    };
    let limits = Limits { host_running_max: count, operation_timeout_ms: 900_000, ..Limits::default() };
    let sandbox = Sandbox::new(&SandboxConfig::new(limits.clone()))?;
    let worker = Arc::new(sandbox.handle().block_on(sandbox.compile(Bytes::from(wasm)))?);
    let limits = Arc::new(GuestLimits::from(&limits));
    let output: Arc<dyn Output> = Arc::new(Nobody);
    let long = Duration::from_secs(900);
    let before = resident_kib()?;
    let begun = Instant::now();
    let mut controls = Vec::new();
    let mut turns = Vec::new();
    for _ in 0..count {
        let control = Arc::new(Control::new(long, long, long));
        let job = Job {
            org: "acme".parse().expect("an org"),
            input: Input {
                json: InputJson(Arc::new(|| Bytes::from_static(b"{}"))),
                text: Bytes::from_static(b"600000"),
                snapshot: None,
                environment: Vec::new(),
                arguments: vec!["worker".to_owned()],
                dry_run: false,
                attachments: Attachments::default(),
            },
            grant: Grant::Private,
            directory: None,
            limits: limits.clone(),
            control: control.clone(),
            output: output.clone(),
        };
        controls.push(control);
        let (sandbox, worker) = (sandbox.clone(), worker.clone());
        turns.push(sandbox.clone().spawn(async move { sandbox.run(&worker, job).await }));
    }
    std::thread::sleep(Duration::from_secs(3));
    assert!(turns.iter().all(|turn| !turn.is_finished()), "all of them wait");
    let each = (resident_kib()?.saturating_sub(before)) as f64 / count as f64;
    println!("{count} waiting guests: {each:.1} KiB each, after {:.1} s", begun.elapsed().as_secs_f64());
    let stopped = Instant::now();
    for control in &controls {
        control.stop(Stop::Ended);
    }
    sandbox.handle().block_on(futures_util::future::join_all(turns));
    println!("all gone {:.1} ms after they were stopped", stopped.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
