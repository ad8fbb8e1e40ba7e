//! `turnhouse run`: one turn of a worker in this process, for its author. No server, no database; the sandbox, its limits and the gate are the host's own.
//!
//! Without `--state` it is a private turn: it reads no state and can save none. With it, the file is the conversation's snapshot: read before,
//! written after, and only when the turn completes. With `--dir` it is a turn in file mode, whose private directory is the author's to look into.

use std::io::{IsTerminal as _, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use parking_lot::Mutex;
use serde_json::json;
use turnhouse::agent::{Agent, AgentSettings};
use turnhouse::clock::{Clock, Timestamp};
use turnhouse::content::{Content, ContentLimits};
use turnhouse::gate::{self, Envelope, Grant, SessionMode};
use turnhouse::ids::{AgentId, ConversationId, OrgId, RunId, TurnId, UserId, WorkerName};
use turnhouse::input;
use turnhouse::lease::Lease;
use turnhouse::limits::Limits;
use turnhouse::sandbox::{
    Attachments, Control, Finished, GuestLimits, Input, Job, Output as GuestOutput, PrivateDir, Refused, Said,
};
use turnhouse::store::{Claimed, Head, Snapshot};

use super::agents::variable;
use super::database::load_config;
use super::deploy::{read_module, worker_name};
use super::files::Files;
use super::inspect::{one_guest_sandbox, refused};
use super::output::{Output, note};
use super::transcript::{Ending, Transcript};
use super::{CliError, Result};

mod state;

use state::StateFile;

const EXAMPLES: &str = "\
Examples:
  turnhouse run greeter.wasm --message hello
  turnhouse run greeter.wasm --message hello --state state.json
  turnhouse run diary.wasm --message hello --dir ./diary
  turnhouse run reader.wasm --message count --attachment report.txt
  echo hello | turnhouse run greeter.wasm
  turnhouse run greeter.wasm --input message.json --env TONE=dry --json

Exit code 0 with a reply on stdout; 1 with the outcome on stderr.";

/// Run one turn of a worker in this process: no server, no database
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The module
    wasm: PathBuf,

    /// The message; stdin when neither this nor --input is given
    #[arg(long, short, value_name = "TEXT", conflicts_with = "input")]
    message: Option<String>,

    /// A file with the message as JSON, {"text": …} or {"parts": […]}
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,

    /// A file beside the message, as an attachment of it; may be given several times
    #[arg(long, value_name = "FILE")]
    attachment: Vec<PathBuf>,

    /// The worker's state: read from this file, and written to it when the turn completes
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,

    /// The worker's private directory, as in session mode "file": it is made if it is not there, and keeps what the worker leaves in it
    #[arg(long, value_name = "DIR", conflicts_with = "state")]
    dir: Option<PathBuf>,

    /// A variable of the worker's environment
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,

    /// The conversation's id that the worker is told
    #[arg(long, value_name = "ID", default_value = "local")]
    conversation: ConversationId,

    /// Operations with outside effects are skipped
    #[arg(long)]
    dry_run: bool,
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let wasm = read_module(&args.wasm)?;
    let worker = worker_name(&args.wasm)?;
    let limits = load_config(None, Vec::new())?.limits;
    let settings = settings(worker, &args.env, &limits)?;
    let state = args.state.as_deref().map(|path| StateFile::open(path, limits.snapshot_bytes_max)).transpose()?;
    let files = Files::read(&args.attachment, limits.attachment_bytes_max)?;
    let message = message(&args, &files, &limits)?;
    let directory = args.dir.as_deref().map(|path| private_dir(path, &limits)).transpose()?;
    let mode = if directory.is_some() { SessionMode::File } else { SessionMode::Snapshot };

    let sandbox = one_guest_sandbox(limits.clone())?;
    let compiled = Box::pin(sandbox.compile(wasm)).await.map_err(|refusal| refused(&refusal))?;

    let now = Clock::system().now();
    let turn = Turn::new(settings, args.conversation, mode, &message, args.dry_run, state.as_ref(), now, &limits)?;
    let timeout = Duration::from_millis;
    let control = Arc::new(Control::new(
        timeout(limits.turn_timeout_ms),
        timeout(limits.idle_timeout_ms),
        timeout(limits.cpu_timeout_ms),
    ));
    let terminal = Arc::new(Terminal { transcript: Mutex::new(Transcript::stdio()), silent: output.json });
    let job = Job {
        org: turn.claimed.lease.org.clone(),
        input: turn.input(files.attachments()),
        grant: turn.grant.clone(),
        directory,
        limits: Arc::new(GuestLimits::from(&limits)),
        control: control.clone(),
        output: terminal.clone(),
    };
    let running = {
        let sandbox = sandbox.clone();
        sandbox.clone().spawn(async move { sandbox.run(&compiled, job).await })
    };
    let finished = tokio::select! {
        finished = running => finished.context("the sandbox failed; this is a bug")?,
        never = watch(&control) => match never {},
    };
    tokio::task::spawn_blocking(move || sandbox.shutdown(Duration::ZERO)).await.context("cannot end the sandbox")?;

    // The state first: once the reply is out, the turn has happened.
    if let (Ok(_), Some(state), Some(bytes)) = (&finished.reply, &state, &finished.snapshot) {
        state.write(bytes)?;
    }
    show_log(&finished, &mut terminal.transcript.lock()).context("cannot write")?;
    let (kind, data) = terminal_event(&finished);
    if output.json {
        output.json(&turn.resource(&finished, Clock::system().now()));
    } else {
        terminal.transcript.lock().event(kind, &data).context("cannot write")?;
    }
    Ending::of(kind, &data).context("the turn has no end; this is a bug")?.into_result()
}

/// What an agent's owner could set, within the same bounds.
fn settings(worker: WorkerName, env: &[(String, String)], limits: &Limits) -> Result<AgentSettings> {
    let mut settings = AgentSettings::of(worker);
    settings.environment.extend(env.iter().cloned());
    settings.check(limits).map_err(|error| CliError::usage(error.to_string()))?;
    Ok(settings)
}

/// The author's directory, made if it is not there, within the host's bounds.
fn private_dir(path: &Path, limits: &Limits) -> Result<PrivateDir> {
    std::fs::create_dir_all(path)
        .and_then(|()| PrivateDir::open(path, limits.into()))
        .map_err(|error| CliError::usage(format!("cannot use {} as a private directory: {error}", path.display())))
}

/// The message, from where the arguments say, held against the gateway's bounds.
fn message(args: &Args, files: &Files, limits: &Limits) -> Result<Content> {
    let content = if let Some(text) = &args.message {
        Content::text(text)
    } else if let Some(path) = &args.input {
        let json =
            std::fs::read(path).map_err(|error| CliError::usage(format!("cannot read {}: {error}", path.display())))?;
        serde_json::from_slice(&json).map_err(|_| {
            CliError::usage(format!("{} holds no message", path.display()))
                .help(r#"a message is {"text": …} or {"parts": [{"type": "text", "text": …}, …]}, not both"#)
        })?
    } else {
        if std::io::stdin().is_terminal() {
            note("reading the message from stdin; end it with Ctrl-D, or use --message");
        }
        let mut bytes = Vec::new();
        // One byte more than allowed tells that it is too much, without reading all of it.
        let max = limits.message_text_bytes_max as u64 + 1;
        std::io::stdin().lock().take(max).read_to_end(&mut bytes).context("cannot read stdin")?;
        Content::text(String::from_utf8(bytes).map_err(|_| CliError::usage("the message is not UTF-8"))?)
    };
    let content = files.beside(content);
    let bounds = ContentLimits {
        text_bytes_max: limits.message_text_bytes_max,
        parts_max: limits.message_parts_max,
        blob_bytes_max: limits.message_blob_bytes_max,
    };
    content.check(&bounds).map_err(|error| CliError::usage(format!("the message is refused: {error}")))?;
    Ok(content)
}

/// A turn that no store knows, as a claim would hand it to the runner: what the worker is told is then made by the host's own code.
struct Turn {
    claimed: Claimed,
    agent: Arc<Agent>,
    grant: Grant,
}

impl Turn {
    #[allow(clippy::too_many_arguments)]
    fn new(
        settings: AgentSettings,
        conversation: ConversationId,
        mode: SessionMode,
        message: &Content,
        dry_run: bool,
        state: Option<&StateFile>,
        now: Timestamp,
        limits: &Limits,
    ) -> Result<Turn> {
        let (turn, worker) = (TurnId::new(), settings.worker.clone());
        let org = OrgId::parse("local").context("the made-up org")?;
        // The ids are made up, the decision is not: a permit comes from the gate alone.
        let envelope = Envelope {
            run_id: state.map(|_| RunId::from(turn)),
            org: Some(org.clone()),
            conversation: Some(conversation),
            mode,
        };
        let grant = gate::decide(&envelope).map_err(|refusal| CliError::failed(refusal.to_string()))?;
        // Which run wrote the file is not known; that some run did, is.
        let snapshot = state.and_then(StateFile::bytes).map(|body| Snapshot {
            run_id: RunId::new(),
            worker: worker.clone(),
            version: 1,
            body: Some(body),
        });
        let agent = AgentId::parse(worker.as_str()).context("the file's name is no agent's")?;
        let claimed = Claimed {
            lease: Lease { org, turn, epoch: 1, deadline: now.plus_ms(limits.turn_timeout_ms) },
            envelope,
            refused: None,
            agent: agent.clone(),
            worker: Some((worker, 1)),
            agent_revision: 1,
            user: UserId::parse("local").context("the made-up user")?,
            attempt: 1,
            restarted: false,
            first_epoch: 1,
            message: serde_json::to_vec(message).context("the message is JSON")?.into(),
            dry_run,
            accepted_at: now,
            started_at: now,
            seq: Some(1),
            head: Some(Head { parent: turn.0, snapshot }),
            generation: None,
        };
        let agent = Arc::new(Agent { id: agent, settings, revision: 1, created_at: now, updated_at: now });
        Ok(Turn { claimed, agent, grant })
    }

    fn input(&self, attachments: Attachments) -> Input {
        input::of(self.claimed.clone(), &self.agent, Vec::new(), attachments, self.claimed.lease.deadline)
    }

    /// The turn as `GET /v1/turns/{turn}` would show it.
    fn resource(&self, finished: &Finished, now: Timestamp) -> serde_json::Value {
        let (state, reply, failure) = match &finished.reply {
            Ok(reply) => ("completed", json!(reply.content), json!(null)),
            Err(failure) => ("failed", json!(null), json!(failure)),
        };
        let Claimed { lease, envelope, agent, accepted_at, started_at, .. } = &self.claimed;
        json!({
            "id": lease.turn, "agent_id": agent, "conversation_id": envelope.conversation, "run_id": envelope.run_id, "state": state,
            "attempt": 1, "worker": self.agent.settings.worker, "version": null, "reply": reply, "failure": failure,
            "usage": finished.usage, "accepted_at": accepted_at, "started_at": started_at, "ended_at": now,
        })
    }
}

/// What the host's supervisor does: ends the guest when a clock has run out. Never resolves; the guest's end is the turn's.
async fn watch(control: &Control) -> std::convert::Infallible {
    loop {
        match control.check(Instant::now()) {
            // A little later than the clock says, and not sooner than a moment from now: an operation in flight moves it.
            Ok(next) => tokio::time::sleep_until((next.max(Instant::now()) + Duration::from_millis(2)).into()).await,
            Err(why) => {
                control.stop(why);
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The event that would end the turn's stream.
fn terminal_event(finished: &Finished) -> (&'static str, serde_json::Value) {
    match &finished.reply {
        Ok(reply) => ("turn.completed", json!({"reply": reply.content, "replaces_deltas": reply.replaces_deltas})),
        Err(failure) => ("turn.failed", json!(failure)),
    }
}

fn show_log<O: std::io::Write, E: std::io::Write>(
    finished: &Finished,
    transcript: &mut Transcript<O, E>,
) -> std::io::Result<()> {
    for line in String::from_utf8_lossy(&finished.log).lines() {
        transcript.log(line)?;
    }
    if finished.log_bytes_dropped > 0 {
        transcript.log(&format!("(the log is over its limit: {} bytes are missing)", finished.log_bytes_dropped))?;
    }
    Ok(())
}

/// Where the guest's events go: the person before the terminal.
struct Terminal {
    transcript: Mutex<Transcript<std::io::Stdout, std::io::Stderr>>,
    silent: bool,
}

#[async_trait::async_trait]
impl GuestOutput for Terminal {
    fn say(&self, said: Said) -> bool {
        if !self.silent
            && let Ok(data) = serde_json::from_str(said.data.get())
        {
            // A terminal that is gone does not end a turn; its reply will say so.
            let _ = self.transcript.lock().event(&said.kind, &data);
        }
        true
    }

    async fn ready(&self) {}

    async fn begin_effect(&self, said: Said) -> Result<(), Refused> {
        self.say(said);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(state: Option<&StateFile>) -> Turn {
        let settings = settings("greeter".parse().unwrap(), &[("A".into(), "1".into())], &Limits::default()).unwrap();
        let message = Content::text("hi");
        let conversation = "local".parse().unwrap();
        Turn::new(
            settings,
            conversation,
            SessionMode::Snapshot,
            &message,
            false,
            state,
            Timestamp(1_000),
            &Limits::default(),
        )
        .unwrap()
    }

    #[test]
    fn s1_only_a_turn_with_a_state_file_may_write_state() {
        assert_eq!(turn(None).grant, Grant::Private);
        let directory = tempfile::tempdir().unwrap();
        let state = StateFile::open(&directory.path().join("none"), 10).unwrap();
        let Grant::Shared(permit) = turn(Some(&state)).grant else { panic!("no permit") };
        assert_eq!(permit.conversation().as_str(), "local");
    }

    #[test]
    fn a_worker_is_told_what_a_host_would_tell_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state.json");
        std::fs::write(&path, "{}").unwrap();
        let input = turn(Some(&StateFile::open(&path, 10).unwrap())).input(Attachments::default());
        let told: serde_json::Value = serde_json::from_slice(&(input.json.0)()).unwrap();
        assert_eq!(told["message"], json!({"text": "hi"}));
        assert_eq!(told["snapshot"]["worker"], "greeter");
        assert_eq!(told["environment"], json!({"A": "1"}));
        assert_eq!(input.snapshot.as_deref(), Some(&b"{}"[..]));
        let told: serde_json::Value =
            serde_json::from_slice(&(turn(None).input(Attachments::default()).json.0)()).unwrap();
        assert!(told["run_id"].is_null() && told["snapshot"].is_null());
    }

    #[test]
    fn settings_that_a_host_refuses_are_refused_here() {
        let env = [("TURNHOUSE_X".to_owned(), "1".to_owned())];
        assert!(settings("greeter".parse().unwrap(), &env, &Limits::default()).is_err());
    }
}
