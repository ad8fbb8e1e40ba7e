//! The state of one guest: what its store owns, and what its streams and operations share with it.
//!
//! Made by `run` for one turn and dropped with it. Nothing here survives a guest or is shared between two.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use wasmtime::ModuleExport;
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{WasiCtxBuilder, WasiView as _};

use super::attachments::{Attachments, Reading};
use super::limiter::Limiter;
use super::operations::{Operations, Registry};
use super::outcome::End;
use super::private_dir::{Leaving, PrivateDir};
use super::speech::{Speech, Stdout};
use super::stdio::{Stdin, Writer};
use super::{Control, GuestLimits, Input, InputJson, Job, Output, Refused, Said};
use crate::content::Content;
use crate::gate::Grant;
use crate::ids::OrgId;
use crate::limits::Limits;

/// Entries of the WASI table beyond file descriptors: what one `poll_oneoff` may wait for.
const WASI_TABLE_SPARE: usize = 1000;

/// What a guest's streams, its operations and the future that drives it share.
pub(super) struct Shared {
    pub(super) speech: Mutex<Speech>,
    pub(super) operations: Mutex<Operations>,
    pub(super) output: Arc<dyn Output>,
    pub(super) control: Arc<Control>,
}

impl Shared {
    /// Waits while the reader is behind. Bounded by the turn: whoever drives the guest drops it at its deadline.
    pub(super) async fn until_heard(&self) {
        if self.speech.lock().pressed {
            self.output.ready().await;
            self.speech.lock().pressed = false;
        }
    }
}

/// What the store of one guest owns.
pub(super) struct Guest {
    pub(super) wasi: WasiP1Ctx,
    pub(super) shared: Arc<Shared>,
    /// `None` in the store that lists the linker, which runs nothing.
    pub(super) memory: Option<ModuleExport>,
    pub(super) registry: Arc<Registry>,
    pub(super) input: GuestInput,
    pub(super) attachments: Reading,
    pub(super) grant: Grant,
    pub(super) directory: Option<PrivateDir>,
    pub(super) limits: Arc<GuestLimits>,
    pub(super) limiter: Limiter,
    pub(super) snapshot: Option<Bytes>,
    pub(super) reply: Option<Content>,
}

/// What the guest may read.
pub(super) struct GuestInput {
    make_json: InputJson,
    json: Option<Bytes>,
    pub(super) text: Bytes,
    pub(super) snapshot: Option<Bytes>,
    pub(super) dry_run: bool,
}

impl GuestInput {
    /// The input as JSON, made when it is first asked for.
    pub(super) fn json(&mut self) -> Bytes {
        self.json.get_or_insert_with(|| (self.make_json.0)()).clone()
    }
}

impl Guest {
    pub(super) fn new(job: Job, memory: Option<ModuleExport>, stdout: Stdout, registry: Arc<Registry>) -> Guest {
        let Job { org: _, input, grant, mut directory, limits, control, output } = job;
        let shared = Arc::new(Shared {
            speech: Mutex::new(Speech::new(output.clone(), control.clone(), limits.clone())),
            operations: Mutex::new(Operations::new(limits.clone(), control.clone())),
            output,
            control,
        });
        let mut builder = directory.as_mut().map_or_else(WasiCtxBuilder::new, |dir| dir.enter(limits.fds_max));
        builder
            .args(&input.arguments)
            .envs(&input.environment)
            .stdin(Stdin { text: Mutex::new(input.text.clone()), control: shared.control.clone() })
            .stdout(Writer { shared: shared.clone(), to: stdout })
            .stderr(Writer { shared: shared.clone(), to: Stdout::Log })
            .max_random_size(limits.random_bytes_max)
            .allow_tcp(false)
            .allow_udp(false);
        let mut wasi = builder.build_p1();
        wasi.ctx().table.set_max_capacity(limits.fds_max + WASI_TABLE_SPARE);
        Guest {
            wasi,
            memory,
            registry,
            input: GuestInput {
                make_json: input.json,
                json: None,
                text: input.text,
                // Said twice, here and by the runner: a private turn reads nothing shared.
                snapshot: if matches!(grant, Grant::Shared(_)) { input.snapshot } else { None },
                dry_run: input.dry_run,
            },
            attachments: Reading::new(input.attachments, limits.attachment_read_bytes_max, limits.operation_timeout_ms),
            grant,
            directory,
            limiter: Limiter::new(shared.control.clone(), limits.memory_bytes_max, limits.table_elements_max),
            limits,
            shared,
            snapshot: None,
            reply: None,
        }
    }

    /// The state of a store in which nothing runs.
    pub(super) fn nobody() -> Guest {
        let ever = Duration::from_secs(1);
        let job = Job {
            org: OrgId::parse("nobody").expect("it is an id"),
            input: Input {
                json: InputJson(Arc::new(Bytes::new)),
                text: Bytes::new(),
                snapshot: None,
                environment: Vec::new(),
                arguments: Vec::new(),
                dry_run: true,
                attachments: Attachments::default(),
            },
            grant: Grant::Private,
            directory: None,
            limits: Arc::new(GuestLimits::from(&Limits::default())),
            control: Arc::new(Control::new(ever, ever, ever)),
            output: Arc::new(Silence),
        };
        Guest::new(job, None, Stdout::Log, Arc::default())
    }

    /// What may still be going on in its directory once it is gone.
    pub(super) fn leave_directory(&mut self) -> Leaving {
        self.directory.as_ref().map(|dir| dir.leave(&mut self.wasi)).unwrap_or_default()
    }

    /// Counts one call of a `turnhouse_v1` function.
    pub(super) fn count_call(&mut self) -> Result<(), End> {
        if self.shared.control.count_host_call() > self.limits.host_calls_max {
            return Err(End::HostCallLimit { host_calls_max: self.limits.host_calls_max });
        }
        Ok(())
    }
}

/// Where nobody listens.
struct Silence;

#[async_trait]
impl Output for Silence {
    fn say(&self, _said: Said) -> bool {
        true
    }

    async fn ready(&self) {}

    async fn begin_effect(&self, _said: Said) -> Result<(), Refused> {
        Err(Refused)
    }
}
