//! One claimed turn, end to end: gate → prepare → instance → commit. The only module that knows both the store and the sandbox.
//!
//! Runs on the guests' runtime and holds the turn's slot until the instance is gone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tracing::Instrument as _;

use crate::agent::Agent;
use crate::agent::NO_FILE_MODE;
use crate::clock::Clock;
use crate::dispatch::{Dispatch, Running};
use crate::event;
use crate::events::LiveTurn;
use crate::gate::{self, Grant, SessionMode};
use crate::input::{self, History};
use crate::journal::JournalError;
use crate::kill_point;
use crate::lease::Lease;
use crate::private_dirs::{Lent, Unlent};
use crate::sandbox::{Attachments, Control, Finished, GuestLimits, Job, Output, Refused, Said, Worker};
use crate::slots::Slot;
use crate::store::{Claimed, Commit, CommitResult, Fenced, StagedSnapshot, StoreError};
use crate::turn::{Failure, FailureCode, Outcome};

/// How long a commit waits before it is tried again while the store does not answer.
const COMMIT_AGAIN_MS: u64 = 100;

/// Runs a claimed turn and ends it, or gives it back.
pub async fn run(dispatch: Arc<Dispatch>, claimed: Claimed, running: Arc<Running>, live: Arc<LiveTurn>, slot: Slot) {
    kill_point::pass("after_claim");
    let tracked = Tracked { dispatch: &dispatch, running: &running };
    let span = span(&claimed);
    step_through(&dispatch, claimed, &running, live).instrument(span).await;
    drop(tracked);
    drop(slot);
}

/// Under which whatever is logged of a turn stands: whose it is, and nothing of what it says.
fn span(claimed: &Claimed) -> tracing::Span {
    let conversation = claimed.envelope.conversation.as_ref().map(tracing::field::display);
    let (lease, agent) = (&claimed.lease, &claimed.agent);
    tracing::info_span!("turn", org = %lease.org, %agent, conversation, turn = %lease.turn, epoch = lease.epoch)
}

/// Ends the tracking of a run, also where the guests' runtime ends before it.
struct Tracked<'a> {
    dispatch: &'a Dispatch,
    running: &'a Running,
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        self.dispatch.untrack(&self.running.lease);
    }
}

async fn step_through(dispatch: &Arc<Dispatch>, claimed: Claimed, running: &Running, live: Arc<LiveTurn>) {
    let (lease, control) = (&running.lease, &running.control);
    if control.answered() {
        // It has ended before a thread came to it.
        return;
    }
    if !dispatch.may_run(running) {
        // The claim was in flight when the drain began, or the incarnation that it was for has stepped down.
        return dispatch.give_back(running, 0).await;
    }
    let grant = match gate::decide(&claimed.envelope) {
        Ok(grant) => grant,
        Err(refusal) => {
            // The store's column says the same; that it did not here is our bug, and no instance is made all the same.
            tracing::error!(turn = %lease.turn, reason = refusal.as_str(), "the store let a turn start that the gate refuses");
            return dispatch.fail(lease, Failure::gate_refused(refusal)).await;
        }
    };
    let prepared = tokio::select! {
        prepared = prepare(dispatch, &claimed) => prepared,
        // The store takes its time; whoever stopped the turn meanwhile has ended it, or will.
        _ = control.until_stopped() => return,
    };
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(Unprepared::Failed(failure)) => return dispatch.fail(lease, failure).await,
        Err(Unprepared::Store(error)) => {
            tracing::warn!(turn = %lease.turn, %error, "a turn could not be prepared and goes back");
            // Whoever claims it next asks the same store: not as fast as it can say no.
            return dispatch.give_back(running, dispatch.limits.backoff_ms).await;
        }
    };
    let own = &prepared.agent.settings.limits;
    control.set_timeouts(
        Duration::from_millis(own.idle_timeout_ms.unwrap_or(dispatch.limits.idle_timeout_ms)),
        Duration::from_millis(own.cpu_timeout_ms.unwrap_or(dispatch.limits.cpu_timeout_ms)),
    );

    let mut directory = match private_directory(dispatch, &claimed, control).await {
        Ok(directory) => directory,
        // Whoever stopped it has ended it, or will.
        Err(Unlent::Stopped) => return,
        Err(Unlent::Io(error)) => {
            tracing::error!(turn = %lease.turn, %error, "a private directory could not be opened");
            let detail = "the conversation's private directory could not be opened; the host's log says why";
            return dispatch.fail(lease, Failure::new(FailureCode::Internal, detail)).await;
        }
        Err(Unlent::NotHere) => {
            return dispatch.fail(lease, Failure::new(FailureCode::Internal, NO_FILE_MODE)).await;
        }
    };

    let parent = claimed.head.as_ref().map(|head| head.parent);
    // The guest reads this machine's clock; the lease's own deadline may be by another.
    let left = control.deadline().saturating_duration_since(Instant::now());
    let deadline = Clock::system().now().plus_ms(u64::try_from(left.as_millis()).unwrap_or(u64::MAX));
    let job = Job {
        org: lease.org.clone(),
        limits: prepared.limits,
        grant: grant.clone(),
        directory: directory.as_mut().and_then(Lent::take),
        control: control.clone(),
        output: Arc::new(LiveOutput { dispatch: dispatch.clone(), live: live.clone() }),
        input: input::of(claimed, &prepared.agent, prepared.history, prepared.attachments, deadline),
    };
    let finished = dispatch.sandbox.run(&prepared.worker, job).await;
    kill_point::pass("after_run");
    let usage = finished.usage;
    let ended = !control.answered() && commit(dispatch, lease, grant, parent, finished, &live).await;
    if !ended {
        dispatch.account(running, &usage).await;
    }
    if let Some(directory) = directory {
        directory.leave().await;
    }
}

/// In file mode a turn has a directory of its own instead of a snapshot.
async fn private_directory(dispatch: &Dispatch, claimed: &Claimed, control: &Control) -> Result<Option<Lent>, Unlent> {
    match claimed.envelope.mode {
        SessionMode::Snapshot => Ok(None),
        SessionMode::File => match &dispatch.private_dirs {
            Some(dirs) => dirs.lend(claimed, control).await.map(Some),
            None => Err(Unlent::NotHere),
        },
    }
}

/// What a turn needs before its instance is made.
struct Prepared {
    agent: Arc<Agent>,
    worker: Arc<Worker>,
    limits: Arc<GuestLimits>,
    history: History,
    attachments: Attachments,
}

enum Unprepared {
    Failed(Failure),
    Store(StoreError),
}

impl From<StoreError> for Unprepared {
    fn from(error: StoreError) -> Unprepared {
        Unprepared::Store(error)
    }
}

async fn prepare(dispatch: &Dispatch, claimed: &Claimed) -> Result<Prepared, Unprepared> {
    let unavailable = |detail: String| Unprepared::Failed(Failure::new(FailureCode::ModuleUnavailable, detail));
    let org = &claimed.lease.org;
    let agent = dispatch.registry.agent_at(org, &claimed.agent, claimed.agent_revision).await?;
    let (Some((agent, limits)), Some((name, version))) = (agent, &claimed.worker) else {
        return Err(unavailable(format!(
            "agent {} has been deleted; make it again with `turnhouse deploy`",
            claimed.agent
        )));
    };
    let worker = match dispatch.registry.worker(&dispatch.sandbox, org, name, *version).await? {
        Ok(worker) => worker,
        Err(why) => {
            return Err(unavailable(format!("worker {name} version {version} cannot be run: {why}; deploy it again")));
        }
    };
    if let Some(head) = &claimed.head
        && let Some(snapshot) = &head.snapshot
        && snapshot.body.is_none()
    {
        let detail = format!(
            "the conversation's snapshot, of run {}, cannot be read; DELETE its snapshot to start from an empty state",
            snapshot.run_id
        );
        return Err(Unprepared::Failed(Failure::new(FailureCode::SnapshotUnreadable, detail)));
    }
    let history = dispatch.registry.history(claimed, &agent).await?;
    let attachments = dispatch.registry.attachments(claimed, &history).await?;
    Ok(Prepared { agent, worker, limits, history, attachments })
}

/// The turn's end, as the guest brought it about. Whether this was its end.
async fn commit(
    dispatch: &Dispatch,
    lease: &Lease,
    grant: Grant,
    parent: Option<uuid::Uuid>,
    finished: Finished,
    live: &Arc<LiveTurn>,
) -> bool {
    if !finished.log.is_empty() {
        tracing::debug!(target: "turnhouse::guest", turn = %lease.turn, dropped = finished.log_bytes_dropped, log = %String::from_utf8_lossy(&finished.log));
    }
    let snapshot = match (&finished.reply, grant, parent, finished.snapshot) {
        (Ok(_), Grant::Shared(permit), Some(parent), Some(body)) => Some(StagedSnapshot { permit, parent, body }),
        _ => None,
    };
    let outcome = match finished.reply {
        Ok(reply) => Outcome::Completed { reply: reply.content, replaces_deltas: reply.replaces_deltas },
        Err(failure) => Outcome::Failed(failure),
    };
    match &outcome {
        Outcome::Failed(failure) => tracing::debug!(code = failure.code.as_str(), "a turn failed"),
        _ => tracing::debug!("a turn has its reply"),
    }
    let commit = Commit {
        org: lease.org.clone(),
        turn: lease.turn,
        epoch: Some(lease.epoch),
        outcome,
        snapshot,
        tail: live.close(lease.epoch),
        usage: Some(finished.usage),
    };
    let won = matches!(commit_until_written(dispatch, commit).await, Some(CommitResult::Won(_)));
    if !won {
        // Whoever reads here finds in the log how it ended, or who has it now.
        dispatch.lost(lease);
    }
    won
}

/// Ends a turn, however long the store is away: the reply is kept here until it is back. `None` when the host stops first, or the store refuses the
/// write itself; the lease's expiry or the sweeper ends the turn then.
pub async fn commit_until_written(dispatch: &Dispatch, mut commit: Commit) -> Option<CommitResult> {
    loop {
        match dispatch.journal.commit(commit.clone()).await {
            Ok(CommitResult::SnapshotConflict) => {
                // The conversation was reset while the turn ran: its reply stands, its state is of a chain that is gone.
                let dropped = commit.snapshot.take().expect("only a snapshot can conflict");
                let data =
                    event::raw(&serde_json::json!({ "bytes": dropped.body.len(), "reason": "conversation_reset" }));
                commit.tail.events.push(("snapshot.rejected".into(), data));
            }
            Ok(result) => return Some(result),
            Err(JournalError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(COMMIT_AGAIN_MS)).await,
            Err(error @ (JournalError::Rejected(_) | JournalError::Closed)) => {
                tracing::error!(turn = %commit.turn, %error, "a turn could not be ended");
                return None;
            }
        }
    }
}

/// Sends what the guest says to its live turn, and through it to the log.
struct LiveOutput {
    dispatch: Arc<Dispatch>,
    live: Arc<LiveTurn>,
}

#[async_trait]
impl Output for LiveOutput {
    fn say(&self, said: Said) -> bool {
        self.dispatch.live.say(&self.live, &self.dispatch.journal, said)
    }

    async fn ready(&self) {
        self.live.room(self.dispatch.limits.reader_buffer_bytes_max).await;
    }

    async fn begin_effect(&self, said: Said) -> Result<(), Refused> {
        let append = self.dispatch.live.say_first(&self.live, said).ok_or(Refused)?;
        match self.dispatch.journal.begin_effect(append).await {
            Ok(Fenced::Done) => Ok(()),
            Ok(Fenced::Stale) | Err(_) => Err(Refused),
        }
    }
}
