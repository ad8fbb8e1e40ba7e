//! How many fresh instances a second the sandbox alone runs: no store, no HTTP.
//!
//! `cargo run --release -p turnhouse --example raw_instances [WORKER.wasm] [SECONDS] [KEEP_RESIDENT_KIB] [THREADS] [TASKS]`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use turnhouse::gate::Grant;
use turnhouse::limits::Limits;
use turnhouse::sandbox::{
    Attachments, Control, GuestLimits, Input, InputJson, Job, Output, Refused, Said, Sandbox, SandboxConfig,
};

/// Copies standard input to standard output, a buffer at a time.
const ECHO: &str = r#"(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.const 8192))
    (loop $more
      (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
      (if (i32.load (i32.const 8)) (then
        (i32.store (i32.const 16) (i32.const 1024))
        (i32.store (i32.const 20) (i32.load (i32.const 8)))
        (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 24)))
        (br $more))))))"#;

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

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let wasm = match arguments.next().filter(|path| path != "-") {
        Some(path) => std::fs::read(path)?,
        None => wat::parse_str(ECHO)?,
    };
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (seconds, keep_kib, threads, tasks) = (number(3)?, number(256)?, number(2)?, number(64)?);
    let sandbox = Sandbox::new(&SandboxConfig {
        memory_keep_resident_bytes: keep_kib * 1024,
        threads,
        ..SandboxConfig::new(Limits::default())
    })?;
    let worker = Arc::new(sandbox.handle().block_on(sandbox.compile(Bytes::from(wasm)))?);
    let limits = Arc::new(GuestLimits::from(&Limits::default()));
    let output: Arc<dyn Output> = Arc::new(Nobody);
    let over = Arc::new(AtomicBool::new(false));
    let begun = Instant::now();
    let running: Vec<_> = (0..tasks)
        .map(|_| {
            let (sandbox, worker, limits, output, over) =
                (sandbox.clone(), worker.clone(), limits.clone(), output.clone(), over.clone());
            sandbox.clone().spawn(async move {
                let mut times = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let control = Arc::new(Control::new(
                        Duration::from_secs(60),
                        Duration::from_secs(30),
                        Duration::from_secs(10),
                    ));
                    let job = Job {
                        org: "acme".parse().expect("an org"),
                        input: Input {
                            json: InputJson(Arc::new(|| Bytes::from_static(b"{}"))),
                            text: Bytes::from_static(b"a message of some forty bytes to be echoed"),
                            snapshot: None,
                            environment: vec![
                                ("TURNHOUSE_TURN_ID".to_owned(), "0193d1f0-0000-7000-8000-000000000000".to_owned()),
                                ("TURNHOUSE_AGENT_ID".to_owned(), "echo".to_owned()),
                            ],
                            arguments: vec!["echo".to_owned()],
                            dry_run: false,
                            attachments: Attachments::default(),
                        },
                        grant: Grant::Private,
                        directory: None,
                        limits: limits.clone(),
                        control,
                        output: output.clone(),
                    };
                    let began = Instant::now();
                    let finished = sandbox.run(&worker, job).await;
                    times.push(began.elapsed());
                    finished.reply.expect("the worker answers");
                    tokio::task::yield_now().await;
                }
                times
            })
        })
        .collect();
    std::thread::sleep(Duration::from_secs(seconds as u64));
    over.store(true, Ordering::Relaxed);
    let mut times: Vec<Duration> = Vec::new();
    for task in running {
        times.extend(sandbox.handle().block_on(task)?);
    }
    let elapsed = begun.elapsed();
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    println!(
        "{} instances in {:.2} s: {:.0}/s on {threads} threads, {keep_kib} KiB kept; p50 {:.1} µs, p99 {:.1} µs",
        times.len(),
        elapsed.as_secs_f64(),
        times.len() as f64 / elapsed.as_secs_f64(),
        at(0.5),
        at(0.99),
    );
    Ok(())
}
