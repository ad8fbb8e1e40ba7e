//! Slot → claim → run. Holds what runs on this host, hears from the journal what was claimed and what has ended, and drains.
//!
//! It decides nothing about a turn: the claim is the store's statement, the gate's word and the run are [`crate::runner`]'s, the election is the
//! commit's.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::erase::Leaving;
use crate::event::{self, Event};
use crate::events::{LiveTurn, LiveTurns};
use crate::host::STORE_PATIENCE;
use crate::ids::{AgentId, OrgId, ReplicaId, TurnId};
use crate::journal::{Asked, Journal, JournalError, Observer};
use crate::lease::Lease;
use crate::limits::Limits;
use crate::meters::Meters;
use crate::private_dirs::PrivateDirs;
use crate::registry::Registry;
use crate::runner;
use crate::sandbox::{Control, Sandbox, Stop};
use crate::slots::{Slot, Slots};
use crate::store::{
    ClaimRequest, Claimed, Commit, CommitResult, Ended, Fenced, Hint, OverdueReason, Requeue, RunningBound, Store,
    StoreError,
};
use crate::supervisor::Soon;
use crate::sweep;
use crate::turn::{Failure, Outcome, Usage};
use crate::turnstile::Turnstile;
use crate::watch::Watch;

/// At most so many turns are claimed by one statement.
const CLAIM_MAX: usize = 64;

/// How long a running turn is given back before the drain's end, so that giving back is done in time.
const HAND_BACK_MS: u64 = 3_000;

/// What runs here, and what it runs with.
pub struct Dispatch {
    /// Lets messages in.
    pub turnstile: Turnstile,
    /// Room for instances.
    pub slots: Slots,
    /// Writes.
    pub journal: Journal,
    /// Events of live turns.
    pub live: Arc<LiveTurns>,
    /// Agents and workers.
    pub registry: Arc<Registry>,
    /// Where guests run.
    pub sandbox: Arc<Sandbox>,
    /// Where those in file mode keep their files; on the embedded store alone.
    pub private_dirs: Option<Arc<PrivateDirs>>,
    /// Bounds.
    pub limits: Arc<Limits>,
    /// Time.
    pub clock: Clock,
    /// Turns whose clocks run out soon.
    pub soon: Soon,
    /// Turns that are read here and run elsewhere.
    pub watch: Arc<Watch>,
    /// What hints were about.
    pub hinted: Hinted,
    /// Orgs that are being deleted.
    pub leaving: Leaving,
    /// A batch had no answer: what it claimed may be held and not run.
    pub claims_in_doubt: AtomicBool,
    /// Whether other hosts use the store.
    shared: bool,
    running: DashMap<TurnId, Arc<Running>>,
    /// Metrics by org and agent.
    pub meters: Meters,
    replica: RwLock<ReplicaId>,
    draining: CancellationToken,
    /// Claims are refused for a moment: the replica's lease is in doubt.
    suspended: AtomicBool,
}

/// One turn that runs here.
#[derive(Debug)]
pub struct Running {
    /// The right to write for it.
    pub lease: Lease,
    /// The incarnation whose it is.
    pub holder: ReplicaId,
    /// Its agent.
    pub agent: AgentId,
    /// What its wall clock was set to.
    pub turn_timeout_ms: u64,
    /// Its clocks, and the way to stop it.
    pub control: Arc<Control>,
    /// It has ended, and what it used is told with its end.
    accounted: AtomicBool,
}

impl Running {
    /// Its wall clock is its lease's, as a span of time from when the claim was asked for: the store's clock may be another than ours. The others
    /// are the operator's until its agent is known.
    fn new(claimed: &Claimed, limits: &Limits, asked: Asked) -> Running {
        let turn_timeout_ms = claimed.lease.remaining_ms(claimed.started_at);
        let control = Control::new(
            Duration::from_millis(turn_timeout_ms).saturating_sub(asked.at.elapsed()),
            Duration::from_millis(limits.idle_timeout_ms),
            Duration::from_millis(limits.cpu_timeout_ms),
        );
        Running {
            lease: claimed.lease.clone(),
            holder: asked.holder,
            agent: claimed.agent.clone(),
            turn_timeout_ms,
            control: Arc::new(control),
            accounted: AtomicBool::new(false),
        }
    }
}

impl Dispatch {
    /// Nothing runs yet.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        journal: Journal,
        live: Arc<LiveTurns>,
        registry: Arc<Registry>,
        sandbox: Arc<Sandbox>,
        private_dirs: Option<Arc<PrivateDirs>>,
        limits: Arc<Limits>,
        clock: Clock,
        replica: ReplicaId,
        shared: bool,
    ) -> Arc<Dispatch> {
        Arc::new(Dispatch {
            turnstile: Turnstile::default(),
            slots: Slots::new(limits.host_running_max),
            journal,
            live,
            registry,
            sandbox,
            private_dirs,
            limits,
            clock,
            soon: Soon::default(),
            watch: Arc::default(),
            hinted: Hinted::default(),
            leaving: Leaving::default(),
            claims_in_doubt: AtomicBool::new(false),
            shared,
            running: DashMap::new(),
            meters: Meters::default(),
            replica: RwLock::new(replica),
            draining: CancellationToken::new(),
            suspended: AtomicBool::new(false),
        })
    }

    /// This process' incarnation now.
    pub fn replica(&self) -> ReplicaId {
        *self.replica.read()
    }

    /// Whether new turns may be started: not while draining, nor while the lease is in doubt.
    pub fn may_claim(&self) -> bool {
        !self.draining.is_cancelled() && !self.suspended.load(Ordering::Acquire)
    }

    /// Whether a turn that was just claimed may begin here: its incarnation must still be ours.
    pub fn may_run(&self, running: &Running) -> bool {
        self.may_claim() && running.holder == self.replica()
    }

    /// Whether it drains.
    pub fn draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// A slot for a turn that is just coming in, and for whom it would be claimed.
    pub fn slot_for_accept(&self) -> Option<(Slot, ReplicaId, RunningBound)> {
        if !self.may_claim() {
            return None;
        }
        Some((self.slots.try_take()?, self.replica(), RunningBound(self.limits.org_running_max)))
    }

    /// Claims ready turns into free slots for as long as the host takes any.
    pub async fn claim_ready(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.draining.cancelled() => return,
                () = self.slots.woken() => {}
            }
            while self.slots.backlog() && self.may_claim() {
                let slots = tokio::select! {
                    () = self.draining.cancelled() => return,
                    slots = self.slots.take(CLAIM_MAX) => slots,
                };
                match self.claim(slots).await {
                    Ok(true) => {}
                    // Nothing is claimable now; what makes it so (a slot, a promotion, the sweeper) wakes us.
                    Ok(false) => break,
                    Err(error) => {
                        tracing::warn!(%error, "could not claim");
                        tokio::time::sleep(Duration::from_millis(self.limits.backoff_ms)).await;
                    }
                }
            }
        }
    }

    /// Whether anything was claimed.
    async fn claim(&self, slots: Vec<Slot>) -> Result<bool, JournalError> {
        let request = ClaimRequest {
            holder: self.replica(),
            slots: slots.len(),
            org_running_max: RunningBound(self.limits.org_running_max),
            backoff_ms: self.limits.backoff_ms,
            backoff_ms_max: self.limits.backoff_ms_max,
        };
        let outcome = self.journal.claim(request, slots).await?;
        let any = outcome.started > 0 || !outcome.refused.is_empty();
        for claimed in outcome.refused {
            self.refused(claimed).await;
        }
        Ok(any)
    }

    /// An envelope that the gate refused: it waits, or has been refused too often.
    async fn refused(&self, claimed: Claimed) {
        let Some((refusal, times)) = claimed.refused else { return };
        tracing::warn!(org = %claimed.lease.org, turn = %claimed.lease.turn, reason = refusal.as_str(), times, "the gate refused an envelope");
        metrics::counter!("turnhouse_gate_refusals_total", "reason" => refusal.as_str()).increment(1);
        if times >= self.limits.gate_refusals_max {
            self.fail(&claimed.lease, Failure::gate_refused(refusal)).await;
        }
    }

    /// Ends a turn with a failure, under its lease. Losing the election is fine: it has ended.
    pub async fn fail(&self, lease: &Lease, failure: Failure) {
        self.end(lease.org.clone(), lease.turn, Some(lease.epoch), Outcome::Failed(failure)).await;
    }

    /// Ends a turn from outside its run. Whether this call did.
    pub async fn end(&self, org: OrgId, turn: TurnId, epoch: Option<u32>, outcome: Outcome) -> bool {
        if let Some(live) = self.live.get(turn) {
            live.flush(&self.journal);
        }
        // What it used until now: its guest may be gone only later, and nobody waits for that.
        let usage = self.tracked(turn).map(|running| running.control.usage());
        let commit = Commit { org, turn, epoch, outcome, snapshot: None, tail: Default::default(), usage };
        match runner::commit_until_written(self, commit).await {
            Some(CommitResult::Won(_)) => true,
            Some(CommitResult::Lost | CommitResult::SnapshotConflict) => {
                // It has ended, or is somebody else's: what is here of it is of no use. Under any epoch only its end can have been in the way.
                if let Some(running) =
                    self.tracked(turn).filter(|running| epoch.is_none_or(|held| running.lease.epoch == held))
                {
                    self.lost(&running.lease);
                }
                false
            }
            None => false,
        }
    }

    /// What a guest used whose turn ended without it. That it could not be told is no reason to keep anybody waiting.
    pub async fn account(&self, running: &Running, usage: &Usage) {
        if running.accounted.load(Ordering::Acquire) {
            return;
        }
        let lease = &running.lease;
        self.meters.add(&lease.org, &running.agent, usage);
        let told = self.registry.add_usage(&lease.org, &running.agent, lease.turn, usage, self.clock.now());
        match tokio::time::timeout(STORE_PATIENCE, told).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "what a turn used is not counted"),
            Err(_late) => tracing::warn!("what a turn used is not counted: the store does not answer"),
        }
    }

    /// A turn is no longer this lease's: its guest stops, and its readers go to the log.
    pub fn lost(&self, lease: &Lease) {
        if let Some(running) = self.tracked(lease.turn).filter(|running| running.lease.epoch == lease.epoch) {
            running.control.stop(Stop::Ended);
        }
        self.live.forget_run(lease);
        self.watch.wake(lease.turn);
    }

    /// What runs here.
    pub fn running(&self) -> Vec<Arc<Running>> {
        self.running.iter().map(|entry| entry.value().clone()).collect()
    }

    /// A turn that runs here.
    pub fn tracked(&self, turn: TurnId) -> Option<Arc<Running>> {
        self.running.get(&turn).map(|running| running.clone())
    }

    /// A run begins to be tracked.
    fn track(&self, running: Arc<Running>) {
        self.soon.watch(&running);
        self.running.insert(running.lease.turn, running);
    }

    /// A run is over; its instance is gone.
    pub fn untrack(&self, lease: &Lease) {
        self.running.remove_if(&lease.turn, |_, running| running.lease.epoch == lease.epoch);
    }

    /// The replica's lease is lost, or may be soon: whatever runs here stops before somebody else may take it over.
    pub fn step_down(&self) {
        self.suspended.store(true, Ordering::Release);
        self.running().iter().for_each(|running| self.lost(&running.lease));
    }

    /// A new incarnation may claim again.
    pub fn resume_as(&self, replica: ReplicaId) {
        *self.replica.write() = replica;
        self.suspended.store(false, Ordering::Release);
        self.slots.note_backlog();
    }

    /// Claims nothing more; waits for what runs, and gives back what does not end in time, without spending an attempt (R6).
    pub async fn drain(&self) {
        self.draining.cancel();
        let patience = Duration::from_millis(self.limits.drain_timeout_ms.saturating_sub(HAND_BACK_MS));
        if tokio::time::timeout(patience, self.slots.all_free()).await.is_ok() {
            return;
        }
        let left = self.running();
        tracing::info!(turns = left.len(), "giving running turns back");
        let give_back = left.into_iter().map(|running| async move {
            if let Some(live) = self.live.get(running.lease.turn) {
                live.flush(&self.journal);
            }
            // Its guest goes on until it is given back, and its reply is as good as ever. After that nobody asks for it.
            let _ = tokio::time::timeout(Duration::from_millis(HAND_BACK_MS / 3), self.give_back(&running, 0)).await;
            self.lost(&running.lease);
        });
        futures_util::future::join_all(give_back).await;
        if tokio::time::timeout(Duration::from_millis(HAND_BACK_MS / 3), self.slots.all_free()).await.is_err() {
            tracing::warn!(slots = self.slots.in_use(), "instances did not stop in time");
        }
    }

    /// Back to the queue, not before `delay_ms` from now, as if it had never been claimed: tried until that is written, or its guest is stopped by
    /// somebody who knows better. What has begun an effect ends instead: nobody runs it again (R1).
    pub async fn give_back(&self, running: &Running, delay_ms: u64) {
        let requeue = Requeue { lease: running.lease.clone(), delay_ms };
        loop {
            let requeued = tokio::select! {
                requeued = self.journal.requeue(requeue.clone()) => requeued,
                _ = running.control.until_stopped() => break,
            };
            match requeued {
                Ok(Fenced::Done) => break,
                Ok(Fenced::Stale) => {
                    // Where it is another's already, this epoch ends nothing.
                    let failure = sweep::failure(OverdueReason::HostLost, &self.limits);
                    self.fail(&running.lease, failure).await;
                    break;
                }
                Err(JournalError::Unavailable(_)) => {
                    tokio::time::sleep(Duration::from_millis(self.limits.backoff_ms)).await;
                }
                Err(error) => {
                    tracing::warn!(turn = %running.lease.turn, %error, "a turn could not be given back; its next host takes it over");
                    break;
                }
            }
        }
        self.lost(&running.lease);
    }

    /// Gives back what the store says this incarnation holds and nobody here runs: claims whose answer was lost, also those of a moment ago
    /// (R9). `known`: what was so at the last look, since a claim's answer may just be on its way. What is so now.
    pub async fn settle_claims(&self, store: &dyn Store, known: &[Lease]) -> Result<Vec<Lease>, StoreError> {
        let held = store.running_turns(self.replica()).await?;
        let is_run = |lease: &Lease| self.tracked(lease.turn).is_some_and(|running| running.lease.epoch == lease.epoch);
        let (settled, unknown): (Vec<Lease>, Vec<Lease>) =
            held.into_iter().filter(|lease| !is_run(lease)).partition(|lease| known.contains(lease));
        for lease in settled {
            tracing::warn!(turn = %lease.turn, "the answer to a claim was lost; its turn goes back");
            self.journal.requeue(Requeue { lease, delay_ms: 0 }).await.map_err(StoreError::from)?;
        }
        Ok(unknown)
    }

    /// Hears what may have changed. Polling is the truth; this only saves its interval.
    pub async fn hear(self: Arc<Self>, mut hints: broadcast::Receiver<Hint>) {
        loop {
            match hints.recv().await {
                Ok(Hint::Ready) => self.slots.note_backlog(),
                Ok(Hint::Turn(turn)) => {
                    if let Some(running) = self.tracked(turn) {
                        self.hinted.note([running.lease.clone()]);
                    }
                    self.watch.wake(turn);
                }
                // Some were missed, and whoever polls finds what they were about; what runs here is few enough to look at now.
                Err(broadcast::error::RecvError::Lagged(_)) => {
                    self.slots.note_backlog();
                    self.hinted.note(self.running().iter().map(|running| running.lease.clone()));
                }
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    }
}

impl Observer for Arc<Dispatch> {
    fn not_accepted(&self, turn: TurnId) {
        self.live.forget(turn);
    }

    fn queued(&self, turn: TurnId) {
        if self.shared {
            // It begins wherever a slot is free; if that is here, it comes back.
            self.live.forget(turn);
        }
    }

    fn ended(&self, ended: &Ended) {
        self.live.end(ended.turn, event::terminal(&ended.outcome, ended.usage.as_ref()));
        self.watch.wake(ended.turn);
        if ended.was_running
            && let Some(running) = self.tracked(ended.turn)
        {
            running.accounted.fetch_or(ended.usage.is_some(), Ordering::AcqRel);
            // Its own runner has its outcome by now; anybody else's guest must go.
            running.control.stop(Stop::Ended);
        }
        record(ended, &self.meters);
    }

    fn claimed(&self, claimed: Claimed, slot: Slot, asked: Asked) {
        // Watched from here on, not from when a guests' thread first comes to it.
        let running = Arc::new(Running::new(&claimed, &self.limits, asked));
        if asked.holder != self.replica() {
            // The answer has outlived its incarnation.
            let lease = claimed.lease;
            self.live.forget(lease.turn);
            return self.journal.requeue_soon(Requeue { lease, delay_ms: 0 });
        }
        self.track(running.clone());
        // Told here, before whoever submitted it hears that it was accepted: both events then leave in one write.
        let live = self.live.begin(&claimed.lease, first_event(&claimed));
        self.watch.wake(claimed.lease.turn);
        self.sandbox.spawn(runner::run(Arc::clone(self), claimed, running, live, slot));
    }

    fn backlog(&self) {
        self.slots.note_backlog();
    }

    fn appended(&self, live: &Arc<LiveTurn>, bytes: usize, lease: &Lease, fenced: Fenced) {
        if fenced == Fenced::Stale {
            self.lost(lease);
        }
        live.appended(bytes);
    }

    fn in_doubt(&self) {
        self.claims_in_doubt.store(true, Ordering::Release);
    }
}

/// Turns that run here and that a hint was about: they may have been ended elsewhere.
#[derive(Default)]
pub struct Hinted {
    leases: Mutex<HashMap<TurnId, Lease>>,
    more: Notify,
}

impl Hinted {
    fn note(&self, leases: impl IntoIterator<Item = Lease>) {
        self.leases.lock().extend(leases.into_iter().map(|lease| (lease.turn, lease)));
        self.more.notify_one();
    }

    /// Waits until there are some.
    pub async fn more(&self) {
        self.more.notified().await;
    }

    /// All of them, once.
    pub fn take(&self) -> Vec<Lease> {
        self.leases.lock().drain().map(|(_, lease)| lease).collect()
    }
}

/// The metrics of a turn's end.
fn record(ended: &Ended, meters: &Meters) {
    let (state, code) = match &ended.outcome {
        Outcome::Failed(failure) => ("failed", failure.code.as_str()),
        outcome => (outcome.state().as_str(), ""),
    };
    metrics::counter!("turnhouse_turns_total", "state" => state, "code" => code).increment(1);
    metrics::histogram!("turnhouse_turn_duration_seconds")
        .record(ended.ended_at.since_ms(ended.accepted_at) as f64 / 1_000.0);
    if let Some(usage) = &ended.usage {
        meters.add(&ended.org, &ended.agent, usage);
    }
}

/// What a claim tells.
fn first_event(claimed: &Claimed) -> Event {
    match (&claimed.worker, claimed.restarted) {
        (Some((worker, version)), false) => event::started(claimed.lease.epoch, claimed.attempt, worker, *version),
        _ => event::restarted(claimed.lease.epoch, claimed.attempt),
    }
}
