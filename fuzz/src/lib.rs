//! One turn of any module in a real sandbox with tiny bounds, and what must be true of its end whatever the module does.
//!
//! A panic anywhere ends the process: libFuzzer's hook sees those of other threads, too.

pub mod guest;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use turnhouse::attachment::{Attachment, AttachmentId, PIECE_BYTES};
use turnhouse::gate::{self, Envelope, Grant, SessionMode};
use turnhouse::ids::{ConversationId, OrgId, RunId};
use turnhouse::limits::Limits;
use turnhouse::sandbox::private_dir::{PrivateDir, Quota, tree};
use turnhouse::sandbox::{
    Attachments, Control, Finished, GuestLimits, Input, InputJson, Job, Output, PieceSource, Refused, Said, Sandbox,
    SandboxConfig, Worker,
};
use turnhouse::turn::FailureCode;

/// Bounds small enough that an input soon meets them, and that none of them takes long.
fn limits() -> Limits {
    Limits {
        host_running_max: 2,
        memory_bytes_max: 1 << 20,
        table_elements_max: 1_000,
        module_bytes_max: 16 * 1024,
        module_functions_max: 200,
        compile_timeout_ms: 5_000,
        reply_bytes_max: 2_000,
        log_bytes_max: 1_000,
        emit_bytes_max: 500,
        // Fewer than the calls of an input, or no input would ever meet it.
        emit_events_max: 6,
        host_calls_max: 1_000,
        random_bytes_max: 1_000,
        snapshot_bytes_max: 1_000,
        operations_max: 8,
        operations_concurrent_max: 3,
        operation_request_bytes_max: 400,
        operation_response_bytes_max: 400,
        operation_frame_bytes_max: 100,
        operation_timeout_ms: 10,
        ..Limits::default()
    }
}

/// The only sandbox of the process.
pub fn sandbox() -> &'static Arc<Sandbox> {
    static SANDBOX: OnceLock<Arc<Sandbox>> = OnceLock::new();
    SANDBOX.get_or_init(|| {
        let config = SandboxConfig { threads: 1, nice: 0, ..SandboxConfig::new(limits()) };
        Sandbox::new(&config).expect("a sandbox")
    })
}

/// How a turn is begun.
#[derive(Debug, Clone, Copy)]
pub struct Begun {
    pub shared: bool,
    pub snapshot: bool,
    pub dry_run: bool,
    /// With a private directory.
    pub files: bool,
}

/// What a private directory may hold.
const QUOTA: Quota = Quota { bytes_max: 5_000, files_max: 6 };

/// A private directory, and beside it what is none of its guest's business.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Home {
        let home = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(home.path().join("private")).expect("it is empty");
        std::fs::write(home.path().join("beside"), "another's").expect("it can be written");
        Home(home)
    }

    fn open(&self) -> PrivateDir {
        PrivateDir::open(&self.0.path().join("private"), QUOTA).expect("it is there")
    }

    /// Nothing is over the quota, and nothing outside was touched.
    fn check(&self) {
        let private = std::fs::File::open(self.0.path().join("private")).expect("it is still there");
        let held = tree::measure(private).expect("it can be counted");
        assert!(held.bytes <= QUOTA.bytes_max && held.files <= QUOTA.files_max, "{held:?}");
        assert_eq!(std::fs::read(self.0.path().join("beside")).expect("it is still there"), b"another's");
        assert_eq!(std::fs::read_dir(self.0.path()).expect("it can be listed").count(), 2, "nothing was added");
    }
}

#[derive(Default)]
struct Heard(Mutex<Vec<(String, String)>>);

#[async_trait::async_trait]
impl Output for Heard {
    fn say(&self, said: Said) -> bool {
        let mut heard = self.0.lock().expect("nobody panicked");
        heard.push((said.kind.into_owned(), said.data.get().to_owned()));
        // Its reader is behind, every now and then.
        !heard.len().is_multiple_of(7)
    }

    async fn ready(&self) {}

    async fn begin_effect(&self, said: Said) -> Result<(), Refused> {
        self.say(said);
        Ok(())
    }
}

/// Runs a turn, and holds its end against everything that is promised of one.
///
/// # Panics
/// When a promise is broken.
pub fn run(worker: &Worker, text: Vec<u8>, begun: Begun) -> Finished {
    let limits = limits();
    let grant = if begun.shared { shared() } else { Grant::Private };
    let ms = Duration::from_millis;
    let heard = Arc::<Heard>::default();
    let home = begun.files.then(Home::new);
    let job = Job {
        org: "fuzz".parse().expect("it is an id"),
        directory: home.as_ref().map(Home::open),
        input: Input {
            json: InputJson(Arc::new(|| Bytes::from_static(br#"{"turn_id":"t"}"#))),
            text: text.into(),
            snapshot: begun.snapshot.then(|| Bytes::from_static(b"the state before")),
            environment: vec![("TURNHOUSE_TURN_ID".to_owned(), "t".to_owned())],
            arguments: vec!["worker".to_owned()],
            dry_run: begun.dry_run,
            attachments: attachments(),
        },
        grant,
        limits: Arc::new(GuestLimits::from(&limits)),
        control: Arc::new(Control::new(ms(60), ms(20), ms(30))),
        output: heard.clone(),
    };
    let sandbox = sandbox();
    let finished = sandbox.handle().block_on(sandbox.run(worker, job));
    let said = std::mem::take(&mut *heard.0.lock().expect("nobody panicked"));
    check(&finished, &said, begun, &limits);
    home.iter().for_each(Home::check);
    finished
}

/// One attachment of two pieces, of which the second cannot be read.
struct FirstPiece;

#[async_trait::async_trait]
impl PieceSource for FirstPiece {
    async fn piece(&self, _id: AttachmentId, piece: u32) -> Option<Bytes> {
        (piece == 0).then(|| vec![0x5a; PIECE_BYTES].into())
    }
}

fn attachments() -> Attachments {
    let id = guest::ATTACHMENT.parse().expect("it is an id");
    let attachment = Attachment { id, media_type: "text/plain".to_owned(), bytes: PIECE_BYTES as u64 + 1 };
    Attachments::new(vec![attachment], Arc::new(FirstPiece))
}

fn shared() -> Grant {
    let envelope = Envelope {
        run_id: Some(RunId::new()),
        org: Some(OrgId::parse("acme").expect("an org")),
        conversation: Some(ConversationId::parse("c").expect("a conversation")),
        mode: SessionMode::Snapshot,
    };
    gate::decide(&envelope).expect("all three are there")
}

fn check(finished: &Finished, said: &[(String, String)], begun: Begun, limits: &Limits) {
    match &finished.reply {
        Ok(reply) => {
            let text = reply.content.joined_text();
            assert!(
                !reply.content.is_empty() && text.len() <= limits.reply_bytes_max,
                "a reply of {} bytes",
                text.len()
            );
        }
        Err(failure) => {
            let ours = [FailureCode::Internal, FailureCode::HostLost, FailureCode::ModuleUnavailable];
            assert!(!ours.contains(&failure.code), "the host's fault: {failure:?}");
            assert!(!failure.detail.is_empty() && failure.detail.len() < 2_000, "{failure:?}");
            assert!(!failure.detail.contains(['\n', '\0', '\u{1b}']), "{failure:?}");
        }
    }
    assert!(begun.shared || finished.snapshot.is_none(), "a snapshot without a permit");
    assert!(finished.snapshot.as_ref().is_none_or(|state| state.len() <= limits.snapshot_bytes_max));
    assert!(finished.log.len() <= limits.log_bytes_max, "a log of {} bytes", finished.log.len());
    let of_operations = said.iter().filter(|(kind, _)| kind.starts_with("operation.")).count();
    assert!(of_operations as u64 <= 2 * limits.operations_max, "{of_operations} events of operations");
    // What was gathered is told at the end.
    assert!((said.len() - of_operations) as u64 <= limits.emit_events_max + 2, "{} events", said.len());
    for (kind, data) in said {
        let known = ["output.delta", "status", "operation.started", "operation.finished", "snapshot.rejected"];
        assert!(known.contains(&kind.as_str()) || kind.starts_with("x."), "an event of kind {kind:?}");
        assert!(!data.contains('\n'), "{data:?}");
        serde_json::from_str::<serde::de::IgnoredAny>(data).expect("an event's data is JSON");
    }
}
