//! Small guests in text form, one behaviour each, and what becomes of them.

mod attachments;
mod cache;
mod calls;
mod canaries;
mod depth;
mod ends;
mod modules;
mod operations;
mod private_dir;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::gate::{self, Envelope, Grant, SessionMode};
use crate::ids::{ConversationId, RunId};

const FD_WRITE: &str =
    r#"(import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))"#;

/// One sandbox for all tests with the default bounds.
fn sandbox() -> Arc<Sandbox> {
    static SANDBOX: OnceLock<Arc<Sandbox>> = OnceLock::new();
    SANDBOX.get_or_init(|| sandbox_with(Limits { host_running_max: 64, ..Limits::default() })).clone()
}

fn sandbox_with(limits: Limits) -> Arc<Sandbox> {
    Sandbox::new(&SandboxConfig { threads: 2, ..SandboxConfig::new(limits) }).unwrap()
}

/// What a guest said, and how its reader behaves.
#[derive(Default)]
struct Heard {
    events: Mutex<Vec<(String, Value)>>,
    /// Answers `false` to every event, and counts how often it was waited for.
    behind: bool,
    waited: AtomicUsize,
    refuses_effects: bool,
}

#[async_trait]
impl Output for Heard {
    fn say(&self, said: Said) -> bool {
        assert!(!said.data.get().contains('\n'), "events are one line: {said:?}");
        self.events.lock().push((said.kind.into_owned(), serde_json::from_str(said.data.get()).unwrap()));
        !self.behind
    }

    async fn ready(&self) {
        self.waited.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
    }

    async fn begin_effect(&self, said: Said) -> Result<(), Refused> {
        if self.refuses_effects {
            return Err(Refused);
        }
        self.say(said);
        Ok(())
    }
}

/// One turn of a guest in a test.
struct Turn {
    sandbox: Arc<Sandbox>,
    limits: GuestLimits,
    text: &'static str,
    snapshot: Option<Bytes>,
    grant: Grant,
    directory: Option<PrivateDir>,
    dry_run: bool,
    attachments: Attachments,
    turn_timeout_ms: u64,
    idle_timeout_ms: u64,
    cpu_timeout_ms: u64,
    heard: Heard,
}

struct Ended {
    finished: Finished,
    events: Vec<(String, Value)>,
    waited: usize,
}

fn shared() -> Grant {
    gate::decide(&Envelope {
        run_id: Some(RunId::new()),
        org: Some(OrgId::parse("acme").unwrap()),
        conversation: Some(ConversationId::parse("c").unwrap()),
        mode: SessionMode::Snapshot,
    })
    .unwrap()
}

impl Turn {
    fn new() -> Turn {
        let sandbox = sandbox();
        Turn {
            limits: GuestLimits::from(&sandbox.limits),
            sandbox,
            text: "hello",
            snapshot: None,
            grant: shared(),
            directory: None,
            dry_run: false,
            attachments: Attachments::default(),
            turn_timeout_ms: 20_000,
            idle_timeout_ms: 20_000,
            cpu_timeout_ms: 10_000,
            heard: Heard::default(),
        }
    }

    fn run(self, wat: &str) -> Ended {
        self.run_while(wat, |_| {})
    }

    /// Runs it while `meanwhile` has its control.
    fn run_while(self, wat: &str, meanwhile: impl FnOnce(&Control)) -> Ended {
        let wasm = Bytes::from(wat::parse_str(wat).unwrap_or_else(|error| panic!("{error}\n{wat}")));
        // Compiled before the turn's clocks start.
        let worker = self.sandbox.handle().block_on(self.sandbox.compile(wasm)).unwrap();
        let ms = Duration::from_millis;
        let control =
            Arc::new(Control::new(ms(self.turn_timeout_ms), ms(self.idle_timeout_ms), ms(self.cpu_timeout_ms)));
        let heard = Arc::new(self.heard);
        let job = Job {
            org: "acme".parse().expect("an org"),
            input: Input {
                json: InputJson(Arc::new(|| Bytes::from_static(br#"{"turn":"t"}"#))),
                text: Bytes::from_static(self.text.as_bytes()),
                snapshot: self.snapshot,
                environment: vec![("TURNHOUSE_TURN_ID".to_owned(), "t".to_owned())],
                arguments: vec!["worker".to_owned()],
                dry_run: self.dry_run,
                attachments: self.attachments,
            },
            grant: self.grant,
            directory: self.directory,
            limits: Arc::new(self.limits),
            control: control.clone(),
            output: heard.clone(),
        };
        let sandbox = self.sandbox.clone();
        let task = self.sandbox.spawn(async move { sandbox.run(&worker, job).await });
        meanwhile(&control);
        let finished = self.sandbox.handle().block_on(async {
            tokio::time::timeout(Duration::from_secs(60), task).await.expect("the guest ends").expect("no panic")
        });
        let events = std::mem::take(&mut *heard.events.lock());
        Ended { finished, events, waited: heard.waited.load(Ordering::Relaxed) }
    }
}

impl Ended {
    fn failure(&self) -> &Failure {
        self.finished.reply.as_ref().expect_err("the turn fails")
    }

    fn code(&self) -> FailureCode {
        self.failure().code
    }

    fn text(&self) -> String {
        self.finished.reply.as_ref().expect("the turn completes").content.joined_text().into_owned()
    }

    fn deltas(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter(|(kind, _)| kind == "output.delta")
            .map(|(_, data)| data["text"].as_str().unwrap())
            .collect()
    }

    fn of_kind(&self, kind: &str) -> Vec<&Value> {
        self.events.iter().filter(|(k, _)| k == kind).map(|(_, data)| data).collect()
    }
}

/// A program whose `_start` is `body`, with `fd_write` and a helper `$write fd ptr len`.
fn program(body: &str) -> String {
    format!(
        r#"(module {FD_WRITE}
          (memory (export "memory") 1)
          (func $write (param $fd i32) (param $ptr i32) (param $len i32)
            (i32.store (i32.const 0) (local.get $ptr))
            (i32.store (i32.const 4) (local.get $len))
            (drop (call $fd_write (local.get $fd) (i32.const 0) (i32.const 1) (i32.const 8))))
          (data (i32.const 100) "hello\c3\a9\ff\f0\9f\a6\80")
          (func (export "_start") {body}))"#
    )
}
