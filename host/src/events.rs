//! Wakes readers. The store's log is the truth; what is here is only nearer.
//!
//! Every live turn that this host has accepted or runs has a [`LiveTurn`]: the newest stretch of its events, delivered to local readers at once,
//! and those of them that are not written yet. They are gathered for up to `delta_batch_ms` or `delta_batch_bytes` and appended as one row; what is
//! left when the turn ends goes into its commit. Memory is bounded: a reader that is further behind reads the log.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::event::{Event, EventBatch, EventId};
use crate::ids::{OrgId, TurnId};
use crate::journal::Journal;
use crate::lease::{Epoch, Lease};
use crate::sandbox::Said;
use crate::store::Append;

/// The live turns of this host.
pub struct LiveTurns {
    turns: DashMap<TurnId, Arc<LiveTurn>>,
    flusher: mpsc::UnboundedSender<(Instant, Arc<LiveTurn>)>,
    bounds: Bounds,
}

/// How much is held, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// How long events are gathered before they are written.
    pub batch_ms: u64,
    /// How many bytes of them.
    pub batch_bytes: usize,
    /// What is kept for readers; the same again may be unwritten before the guest is made to wait.
    pub buffer_bytes_max: usize,
}

/// One live turn's newest events.
pub struct LiveTurn {
    /// Its org.
    pub org: OrgId,
    /// The turn.
    pub turn: TurnId,
    state: Mutex<State>,
    wake: Notify,
    room: Notify,
}

#[derive(Default)]
struct State {
    /// Everything after this is in `events`; `None`: everything is.
    floor: Option<EventId>,
    events: VecDeque<Event>,
    event_bytes: usize,
    /// Of whoever speaks now; `None` before the start and after the end.
    lease: Option<Lease>,
    /// Of the run that spoke last.
    epoch: Option<Epoch>,
    next_seq: u32,
    unwritten: EventBatch,
    unwritten_bytes: usize,
    in_flight_bytes: usize,
    flush_due: bool,
    ended: bool,
    gone: bool,
}

/// What a reader finds.
pub enum Found {
    /// Events after its cursor, at least one. The terminal one is the last there will be.
    Events(Vec<Event>),
    /// Nothing yet: wait.
    Nothing,
    /// Its cursor lies before what is kept here: read the log.
    InStore,
    /// The turn is no longer this host's: only the log will tell more.
    Gone,
}

impl LiveTurns {
    /// The table, and the task that writes what has been gathered long enough. It ends when the table is dropped.
    pub fn new(bounds: Bounds, journal: Journal) -> (Arc<LiveTurns>, impl Future<Output = ()> + Send + 'static) {
        let (flusher, due) = mpsc::unbounded_channel();
        (Arc::new(LiveTurns { turns: DashMap::new(), flusher, bounds }), flush_when_due(due, journal))
    }

    /// The turn, if it is live here.
    pub fn get(&self, turn: TurnId) -> Option<Arc<LiveTurn>> {
        self.turns.get(&turn).map(|live| live.clone())
    }

    /// Whether no turn is live here.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// A turn that is being accepted: its log begins here.
    pub fn accept(&self, org: &OrgId, accepted: Event, turn: TurnId) -> Arc<LiveTurn> {
        let live = Arc::new(LiveTurn::new(org.clone(), turn));
        live.state.lock().push(accepted, usize::MAX);
        self.turns.insert(turn, live.clone());
        live
    }

    /// A turn that this host begins to run: its own, or one whose beginning only the log has.
    pub fn begin(&self, lease: &Lease, first: Event) -> Arc<LiveTurn> {
        let live = self
            .turns
            .entry(lease.turn)
            .or_insert_with(|| {
                let live = LiveTurn::new(lease.org.clone(), lease.turn);
                live.state.lock().floor = Some(EventId::At(lease.epoch - 1, u32::MAX));
                Arc::new(live)
            })
            .clone();
        {
            let mut state = live.state.lock();
            state.lease = Some(lease.clone());
            state.epoch = Some(lease.epoch);
            state.next_seq = 1;
            state.unwritten = EventBatch { first_seq: 1, events: Vec::new() };
            state.unwritten_bytes = 0;
            state.push(first, self.bounds.buffer_bytes_max);
        }
        live.wake.notify_waiters();
        live
    }

    /// Forgets a turn that was not accepted, or that is no longer this host's: its readers go to the log.
    pub fn forget(&self, turn: TurnId) {
        if let Some((_, live)) = self.turns.remove(&turn) {
            live.gone();
        }
    }

    /// Forgets the turn as the run under this lease had it; what has begun here again since stays.
    pub fn forget_run(&self, lease: &Lease) {
        let of_this_run = |live: &Arc<LiveTurn>| live.state.lock().epoch == Some(lease.epoch);
        if let Some((_, live)) = self.turns.remove_if(&lease.turn, |_, live| of_this_run(live)) {
            live.gone();
        }
    }

    /// Tells the terminal event, after its commit. Nothing follows.
    pub fn end(&self, turn: TurnId, terminal: Event) {
        if let Some((_, live)) = self.turns.remove(&turn) {
            let mut state = live.state.lock();
            state.lease = None;
            state.ended = true;
            state.push(terminal, usize::MAX);
            drop(state);
            live.wake.notify_waiters();
            live.room.notify_waiters();
        }
    }

    /// Takes an event of the guest. `false`: too much is unwritten; await [`LiveTurn::room`].
    pub fn say(&self, live: &Arc<LiveTurn>, journal: &Journal, said: Said) -> bool {
        let mut state = live.state.lock();
        let Some(lease) = &state.lease else { return true };
        let epoch = lease.epoch;
        state.say(epoch, said, self.bounds.buffer_bytes_max);
        if state.unwritten_bytes >= self.bounds.batch_bytes {
            flush(live, &mut state, journal);
        } else if !state.flush_due {
            state.flush_due = true;
            let due = Instant::now() + Duration::from_millis(self.bounds.batch_ms);
            let _ = self.flusher.send((due, live.clone()));
        }
        let room = state.unwritten_bytes + state.in_flight_bytes < self.bounds.buffer_bytes_max;
        drop(state);
        live.wake.notify_waiters();
        room
    }

    /// Takes an event that must be durable before what it announces: with everything that was said before it.
    pub fn say_first(&self, live: &Arc<LiveTurn>, said: Said) -> Option<Append> {
        let mut state = live.state.lock();
        let lease = state.lease.clone()?;
        state.say(lease.epoch, said, self.bounds.buffer_bytes_max);
        let append = Append { lease, batch: state.take_unwritten().0 };
        drop(state);
        live.wake.notify_waiters();
        Some(append)
    }
}

impl LiveTurn {
    fn new(org: OrgId, turn: TurnId) -> LiveTurn {
        LiveTurn { org, turn, state: Mutex::default(), wake: Notify::new(), room: Notify::new() }
    }

    fn gone(&self) {
        let mut state = self.state.lock();
        state.lease = None;
        state.gone = true;
        drop(state);
        self.wake.notify_waiters();
        self.room.notify_waiters();
    }

    /// Events after `after`. Enable a [`LiveTurn::changed`] *before* asking.
    pub fn after(&self, after: Option<EventId>) -> Found {
        let state = self.state.lock();
        if state.gone {
            return Found::Gone;
        }
        if state.floor.is_some_and(|floor| after < Some(floor)) {
            return Found::InStore;
        }
        let known = match after {
            None => 0,
            Some(after) => state.events.partition_point(|event| event.id <= after),
        };
        if known == state.events.len() {
            return Found::Nothing;
        }
        Found::Events(state.events.range(known..).cloned().collect())
    }

    /// Whether this turn has told an event of this id, kept or not: seqs of an epoch have no gaps.
    pub fn has_told(&self, id: EventId) -> bool {
        let state = self.state.lock();
        let same_epoch = |event: &&Event| match (event.id, id) {
            (EventId::At(told, _), EventId::At(epoch, _)) => told == epoch,
            _ => event.id == id,
        };
        state.events.iter().rev().find(same_epoch).is_some_and(|last| last.id >= id)
    }

    /// Resolves at the next change after it was enabled.
    pub fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.wake.notified()
    }

    /// Resolves when the guest may go on after `say` said `false`.
    pub async fn room(&self, bounds: usize) {
        loop {
            let notified = self.room.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            {
                let state = self.state.lock();
                if state.lease.is_none() || state.unwritten_bytes + state.in_flight_bytes < bounds {
                    return;
                }
            }
            notified.await;
        }
    }

    /// So many bytes are written, or nobody's any more.
    pub fn appended(&self, bytes: usize) {
        let mut state = self.state.lock();
        state.in_flight_bytes = state.in_flight_bytes.saturating_sub(bytes);
        drop(state);
        self.room.notify_waiters();
    }

    /// Closes the guest's side and hands out what is not written yet, for the commit.
    pub fn close(&self, epoch: Epoch) -> EventBatch {
        let mut state = self.state.lock();
        match &state.lease {
            Some(lease) if lease.epoch == epoch => {
                state.lease = None;
                state.take_unwritten().0
            }
            _ => EventBatch::default(),
        }
    }

    /// Writes what is gathered now: before somebody else ends the turn.
    pub fn flush(self: &Arc<Self>, journal: &Journal) {
        flush(self, &mut self.state.lock(), journal);
    }
}

fn flush(live: &Arc<LiveTurn>, state: &mut State, journal: &Journal) {
    state.flush_due = false;
    let Some(lease) = state.lease.clone() else { return };
    if state.unwritten.is_empty() {
        return;
    }
    let (batch, bytes) = state.take_unwritten();
    state.in_flight_bytes += bytes;
    journal.append(Append { lease, batch }, live.clone(), bytes);
}

impl State {
    fn push(&mut self, event: Event, bytes_max: usize) {
        self.event_bytes += weight(&event);
        self.events.push_back(event);
        while self.event_bytes > bytes_max && self.events.len() > 1 {
            let oldest = self.events.pop_front().expect("there are two");
            self.event_bytes -= weight(&oldest);
            self.floor = Some(oldest.id);
        }
    }

    fn say(&mut self, epoch: Epoch, said: Said, bytes_max: usize) {
        let event = Event { id: EventId::At(epoch, self.next_seq), kind: said.kind.clone(), data: said.data.clone() };
        self.next_seq += 1;
        self.unwritten_bytes += weight(&event);
        self.unwritten.events.push((said.kind, said.data));
        self.push(event, bytes_max);
    }

    fn take_unwritten(&mut self) -> (EventBatch, usize) {
        let next = EventBatch { first_seq: self.next_seq, events: Vec::new() };
        (std::mem::replace(&mut self.unwritten, next), std::mem::take(&mut self.unwritten_bytes))
    }
}

/// What an event costs in memory, roughly.
fn weight(event: &Event) -> usize {
    event.data.get().len() + 64
}

async fn flush_when_due(mut queue: mpsc::UnboundedReceiver<(Instant, Arc<LiveTurn>)>, journal: Journal) {
    while let Some((at, live)) = queue.recv().await {
        tokio::time::sleep_until(at).await;
        live.flush(&journal);
    }
}
