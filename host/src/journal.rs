//! Gathers writes into batches: whatever is pending when the last batch is durable goes into the next, in one transaction.
//!
//! There is no artificial delay: one client alone pays one commit's time, many clients share one. Only where other hosts' batches were in the way
//! ([`Store::gather`]), what would wait in the database waits here. The journal has a thread of its own, so
//! that a blocking store delays nobody else. What a batch brings about (turns that ended, turns that were claimed) is told to an
//! [`Observer`] right there, before whoever waits for the answer wakes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::clock::Clock;
use crate::events::LiveTurn;
use crate::ids::{ReplicaId, TurnId};
use crate::kill_point;
use crate::lease::Lease;
use crate::slots::Slot;
use crate::store::{
    Accept, AcceptResult, Append, ClaimRequest, Claimed, Commit, CommitResult, Ended, Fenced, Requeue, Store,
    StoreError, Write, Written,
};

/// At most so many writes share a transaction.
const BATCH_MAX: usize = 256;

/// Nor are more bytes gathered than this: one write alone may be larger. What a statement may take is bounded in time and in bytes.
const BATCH_BYTES_MAX: usize = 16 << 20;

/// Before what live turns have said is tried again where nothing else is to be written.
const AGAIN: Duration = Duration::from_millis(50);

/// A batch of so many writes means that there are several clients.
const BUSY: usize = 4;

/// Why a write has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JournalError {
    /// The store did not take the batch; nothing of it was written. Try again.
    #[error("the store is unavailable: {0}")]
    Unavailable(Arc<str>),
    /// The item alone was refused by a constraint: our bug.
    #[error("the store refused the write: {0}")]
    Rejected(String),
    /// The journal has ended with the host.
    #[error("the host has stopped")]
    Closed,
}

impl From<JournalError> for StoreError {
    fn from(error: JournalError) -> StoreError {
        StoreError::Unavailable(error.to_string())
    }
}

/// What batches bring about. Called on the journal's thread: quick, and never waiting.
pub trait Observer: Send + Sync + 'static {
    /// A message was not accepted as this turn.
    fn not_accepted(&self, turn: TurnId);
    /// A turn was accepted, and waits for whichever host comes first.
    fn queued(&self, turn: TurnId);
    /// A turn has ended, durably.
    fn ended(&self, ended: &Ended);
    /// A turn was claimed into a slot.
    fn claimed(&self, claimed: Claimed, slot: Slot, asked: Asked);
    /// Turns were accepted, promoted or given back, and no slot has come for them yet.
    fn backlog(&self);
    /// An append of a running turn was answered.
    fn appended(&self, live: &Arc<LiveTurn>, bytes: usize, lease: &Lease, fenced: Fenced);
    /// A batch has no answer, though it may have been written: what it claimed is perhaps held without anybody knowing.
    fn in_doubt(&self);
}

/// A claim as it was asked for. Its answer may be late: what it granted began no earlier than `at`, and the incarnation may be no more.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The incarnation that claimed.
    pub holder: ReplicaId,
    /// When the store was asked.
    pub at: Instant,
}

type Answer<T> = oneshot::Sender<Result<T, JournalError>>;

/// Who waits for an answer. Slots are those that the write may fill.
enum Waiter {
    Accept(Answer<AcceptResult>, TurnId, Option<(Slot, ReplicaId)>),
    Claim(Answer<ClaimOutcome>, ReplicaId, Vec<Slot>),
    Commit(Answer<CommitResult>),
    Fenced(Answer<Fenced>),
    /// The live turn's own append.
    Live(Arc<LiveTurn>, usize, Append),
}

/// What a claim found.
#[derive(Debug, Default)]
pub struct ClaimOutcome {
    /// How many turns it started.
    pub started: usize,
    /// Envelopes that the gate's column refused: they hold no slot, and it is the claimer's to judge whether they were refused too often.
    pub refused: Vec<Claimed>,
}

/// A handle to the journal.
#[derive(Clone)]
pub struct Journal {
    entries: mpsc::UnboundedSender<(Write, Waiter)>,
}

/// The journal before it runs.
pub struct Pending {
    entries: mpsc::UnboundedReceiver<(Write, Waiter)>,
}

impl Journal {
    /// The handle, and what [`Pending::run`] makes a thread of once its observer exists.
    pub fn new() -> (Journal, Pending) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Journal { entries: sender }, Pending { entries: receiver })
    }

    async fn write<T>(&self, write: Write, waiter: impl FnOnce(Answer<T>) -> Waiter) -> Result<T, JournalError> {
        let (answer, answered) = oneshot::channel();
        self.entries.send((write, waiter(answer))).map_err(|_| JournalError::Closed)?;
        answered.await.unwrap_or(Err(JournalError::Closed))
    }

    /// Accepts a message; a claim that comes with it fills `slot`.
    pub async fn accept(&self, accept: Accept, slot: Option<Slot>) -> Result<AcceptResult, JournalError> {
        let turn = accept.turn;
        let room = slot.zip(accept.claim_for.map(|(holder, _)| holder));
        self.write(Write::Accept(Box::new(accept)), |answer| Waiter::Accept(answer, turn, room)).await
    }

    /// Claims ready turns into `slots`.
    pub async fn claim(&self, request: ClaimRequest, slots: Vec<Slot>) -> Result<ClaimOutcome, JournalError> {
        self.write(Write::Claim(request), |answer| Waiter::Claim(answer, request.holder, slots)).await
    }

    /// Ends a turn, unless somebody else has.
    pub async fn commit(&self, commit: Commit) -> Result<CommitResult, JournalError> {
        self.write(Write::Commit(Box::new(commit)), Waiter::Commit).await
    }

    /// Gives a turn back.
    pub async fn requeue(&self, requeue: Requeue) -> Result<Fenced, JournalError> {
        self.write(Write::Requeue(requeue), Waiter::Fenced).await
    }

    /// Gives a turn back, and waits for nothing: whoever holds it is dead anyway, and this only saves time.
    pub fn requeue_soon(&self, requeue: Requeue) {
        let (answer, _unheard) = oneshot::channel();
        let _ = self.entries.send((Write::Requeue(requeue), Waiter::Fenced(answer)));
    }

    /// Makes the start of an effect durable.
    pub async fn begin_effect(&self, append: Append) -> Result<Fenced, JournalError> {
        self.write(Write::BeginEffect(append), Waiter::Fenced).await
    }

    /// Appends a live turn's events; the observer hears what became of it.
    pub fn append(&self, append: Append, live: Arc<LiveTurn>, bytes: usize) {
        let again = append.clone();
        let _ = self.entries.send((Write::Append(append), Waiter::Live(live, bytes, again)));
    }
}

impl Pending {
    /// Starts the thread. It ends when every handle is gone, after the last pending write.
    pub fn run<O: Observer>(
        mut self,
        store: Arc<dyn Store>,
        clock: Clock,
        observer: O,
    ) -> std::io::Result<std::thread::JoinHandle<()>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
            let mut pending: Vec<(Write, Waiter)> = Vec::with_capacity(BATCH_MAX);
            // What live turns have said and a batch that failed did not write. It goes before all that came later: an end must not overtake it.
            let mut unsaid: Vec<(Write, Waiter)> = Vec::new();
            let mut busy = false;
            let mut open = true;
            while open {
                let first = if unsaid.is_empty() {
                    Ok(self.entries.blocking_recv())
                } else {
                    runtime.block_on(async { tokio::time::timeout(AGAIN, self.entries.recv()).await })
                };
                open = !matches!(first, Ok(None));
                pending.append(&mut unsaid);
                pending.extend(first.ok().flatten());
                // Several hosts on one org's lock take turns. What is sent before its turn has come holds less, and costs as much.
                std::thread::sleep(store.gather());
                gather(&mut self.entries, &mut pending, busy);
                pending.retain(|(_, waiter)| still_wanted(waiter, &observer));
                if pending.is_empty() {
                    continue;
                }
                busy = pending.len() >= BUSY;
                metrics::histogram!("turnhouse_journal_batch_writes").record(pending.len() as f64);
                pending.sort_by_key(|(write, _)| place(write));
                let (writes, waiters): (Vec<Write>, Vec<Waiter>) = pending.drain(..).unzip();
                let (accepts, commits) =
                    (any(&writes, |w| matches!(w, Write::Accept(_))), any(&writes, |w| matches!(w, Write::Commit(_))));
                let asked_at = Instant::now();
                let written = runtime.block_on(store.write(writes, clock.now()));
                if accepts {
                    kill_point::pass("after_accept");
                }
                if commits {
                    kill_point::pass("after_commit");
                }
                unsaid = settle(written, waiters, asked_at, &observer);
            }
        })
    }
}

/// Takes what is pending. Under load it lets the other threads have their say first, for as long as that brings more: a batch costs one
/// flush of the disk, however large it is. This is no delay in time: where nobody else can run, nothing is waited for.
fn gather(entries: &mut mpsc::UnboundedReceiver<(Write, Waiter)>, pending: &mut Vec<(Write, Waiter)>, busy: bool) {
    let mut bytes: usize = pending.iter().map(|(write, _)| write.bytes()).sum();
    loop {
        let before = pending.len();
        while pending.len() < BATCH_MAX
            && bytes < BATCH_BYTES_MAX
            && let Ok(next) = entries.try_recv()
        {
            bytes += next.0.bytes();
            pending.push(next);
        }
        if !busy || pending.len() == before || pending.len() == BATCH_MAX || bytes >= BATCH_BYTES_MAX {
            return;
        }
        std::thread::yield_now();
    }
}

/// In which order a batch is written; what is alike keeps its own. Nobody has an answer yet, so nobody can tell. What is said goes before the ends that it
/// must not miss, ends make room for messages, and claims find all that there is. Stores write like things that stand together at once.
fn place(write: &Write) -> u8 {
    match write {
        Write::Append(_) | Write::BeginEffect(_) => 0,
        Write::Commit(_) | Write::Requeue(_) => 1,
        Write::Accept(_) => 2,
        Write::Claim(_) => 3,
    }
}

/// A message whose sender has given up waiting for a store that did not answer is not accepted behind their back.
fn still_wanted<O: Observer>(waiter: &Waiter, observer: &O) -> bool {
    match waiter {
        Waiter::Accept(answer, turn, _) if answer.is_closed() => {
            observer.not_accepted(*turn);
            false
        }
        _ => true,
    }
}

fn any(writes: &[Write], is: impl Fn(&Write) -> bool) -> bool {
    cfg!(debug_assertions) && writes.iter().any(is)
}

/// Tells everyone what became of a batch; hands back what live turns have said where nothing of it was written.
fn settle<O: Observer>(
    written: Result<Vec<Written>, StoreError>,
    waiters: Vec<Waiter>,
    asked_at: Instant,
    observer: &O,
) -> Vec<(Write, Waiter)> {
    match written {
        Ok(written) => {
            assert_eq!(written.len(), waiters.len(), "one answer an item");
            for (written, waiter) in written.into_iter().zip(waiters) {
                settle_one(written, waiter, asked_at, observer);
            }
            Vec::new()
        }
        Err(error) => {
            tracing::error!(%error, writes = waiters.len(), "a batch was not written");
            metrics::counter!("turnhouse_store_errors_total").increment(1);
            let failed = JournalError::Unavailable(error.to_string().into());
            observer.in_doubt();
            let mut unsaid = Vec::new();
            for waiter in waiters {
                match waiter {
                    Waiter::Live(live, bytes, append) => {
                        unsaid.push((Write::Append(append.clone()), Waiter::Live(live, bytes, append)));
                    }
                    waiter => fail(waiter, &failed, observer),
                }
            }
            unsaid
        }
    }
}

fn fail<O: Observer>(waiter: Waiter, error: &JournalError, observer: &O) {
    let error = error.clone();
    // Whoever has gone away in the meantime wants no answer.
    match waiter {
        Waiter::Accept(answer, turn, _) => {
            observer.not_accepted(turn);
            drop(answer.send(Err(error)));
        }
        Waiter::Claim(answer, _, _) => drop(answer.send(Err(error))),
        Waiter::Commit(answer) => drop(answer.send(Err(error))),
        Waiter::Fenced(answer) => drop(answer.send(Err(error))),
        Waiter::Live(live, bytes, append) => observer.appended(&live, bytes, &append.lease, Fenced::Stale),
    }
}

fn settle_one<O: Observer>(written: Written, waiter: Waiter, asked_at: Instant, observer: &O) {
    match (written, waiter) {
        (Written::Accept(mut result), Waiter::Accept(answer, turn, room)) => {
            if let AcceptResult::Accepted { interrupted, claimed } = &mut result {
                interrupted.iter().for_each(|ended| observer.ended(ended));
                if interrupted.iter().any(|ended| ended.promoted) {
                    observer.backlog();
                }
                match (claimed.take(), room) {
                    (Some(claimed), Some((slot, holder))) => {
                        observer.claimed(*claimed, slot, Asked { holder, at: asked_at });
                    }
                    (Some(claimed), None) => unreachable!("{} was claimed without a slot", claimed.lease.turn),
                    (None, _unused) => {
                        observer.queued(turn);
                        observer.backlog();
                    }
                }
            } else {
                observer.not_accepted(turn);
            }
            let _ = answer.send(Ok(result));
        }
        (Written::Claim(claimed), Waiter::Claim(answer, holder, slots)) => {
            let mut slots = slots.into_iter();
            let mut outcome = ClaimOutcome::default();
            for claimed in claimed {
                if claimed.refused.is_some() {
                    outcome.refused.push(claimed);
                } else {
                    outcome.started += 1;
                    let slot = slots.next().expect("no more is claimed than there are slots");
                    observer.claimed(claimed, slot, Asked { holder, at: asked_at });
                }
            }
            let _ = answer.send(Ok(outcome));
        }
        (Written::Commit(result), Waiter::Commit(answer)) => {
            if let CommitResult::Won(ended) = &result {
                observer.ended(ended);
                if ended.promoted {
                    observer.backlog();
                }
            }
            let _ = answer.send(Ok(result));
        }
        (Written::Requeue(fenced) | Written::Append(fenced), Waiter::Fenced(answer)) => {
            let _ = answer.send(Ok(fenced));
        }
        (Written::Append(fenced), Waiter::Live(live, bytes, append)) => {
            observer.appended(&live, bytes, &append.lease, fenced);
        }
        (Written::Failed(why), waiter) => {
            tracing::error!(why, "a write was refused by the store");
            fail(waiter, &JournalError::Rejected(why), observer);
        }
        (written, _) => unreachable!("a write was answered with {written:?}"),
    }
}
