//! Follows a turn's events from a cursor to its terminal event: a first connection, a reconnect and a reader on another replica are the same code.
//!
//! It registers for wake-ups *before* it reads, reads what is near ([`LiveTurn`]) or else the log, and repeats. `turn.accepted`, `turn.started` and the
//! terminal event are not in the log: they follow from the turn's row.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::content::Content;
use crate::event::{self, Event, EventId};
use crate::events::{Found, LiveTurn};
use crate::host::Host;
use crate::ids::{OrgId, TurnId};
use crate::store::{EventPage, StoreError, TurnRecord};
use crate::submit::Submitted;
use crate::turn::{CancelledBy, Failure, FailureCode, Outcome, TurnState};
use crate::watch::Watching;

/// How long a turn that runs here, and whose log lags behind what was told here, is waited for before the log is read again.
const POLL: Duration = Duration::from_millis(500);

/// How long after one look into the log the next one comes at the earliest: hints of a turn that says much come faster than anybody reads.
const READ_GAP: Duration = Duration::from_millis(20);

/// How long a store that does not answer is waited for before a stream is given up, and how often it is asked.
const STORE_PATIENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_millis(500));

/// How long the log is given to show an event that a client has seen already: another host tells its readers before it writes.
const UNWRITTEN: (Duration, Duration) = (Duration::from_millis(600), Duration::from_millis(50));

/// How much of the log is read at a time.
const PAGE_BYTES: usize = 128 * 1024;

/// A reader of one turn. Dropping it delays and cancels nothing.
pub struct Reader {
    host: Host,
    org: OrgId,
    turn: TurnId,
    cursor: Option<EventId>,
    /// The cursor came from a client and is not yet known to be the log's.
    unproven: bool,
    live: Option<Arc<LiveTurn>>,
    /// Its place among those who wait for turns that do not run here.
    watching: Option<Watching>,
    read_at: Option<Instant>,
    ready: VecDeque<Event>,
}

impl Reader {
    /// Reads after `after`, or from the start. The caller has checked that the turn is theirs to see.
    pub fn new(host: &Host, org: OrgId, turn: TurnId, after: Option<EventId>) -> Reader {
        let live = host.dispatch.live.get(turn);
        let host = host.clone();
        let (watching, read_at, ready) = (None, None, VecDeque::new());
        Reader { host, org, turn, cursor: after, unproven: after.is_some(), live, watching, read_at, ready }
    }

    /// Reads what has just been submitted, from the start.
    pub fn of_submitted(host: &Host, org: OrgId, submitted: &Submitted) -> Reader {
        let live = submitted.live.clone();
        Reader { live, ..Reader::new(host, org, submitted.turn, None) }
    }

    /// Whose turn it reads.
    pub fn of(&self) -> (&OrgId, TurnId) {
        (&self.org, self.turn)
    }

    /// The next event if it is at hand: several that are ready can be sent as one chunk.
    pub fn next_ready(&mut self) -> Option<Event> {
        let event = self.ready.pop_front()?;
        self.cursor = Some(event.id);
        Some(event)
    }

    /// The next event; after the terminal one `None`. Cancel-safe. An event of kind `resync` carries the id from which it resumes.
    pub async fn next(&mut self) -> Result<Option<Event>, StoreError> {
        loop {
            if let Some(event) = self.next_ready() {
                return Ok(Some(event));
            }
            if self.cursor == Some(EventId::End) {
                return Ok(None);
            }
            if self.live.is_none() {
                self.live = self.host.dispatch.live.get(self.turn);
            }
            if let (true, Some(cursor)) = (self.unproven, self.cursor) {
                let resync = self.resync(cursor).await?;
                self.unproven = false;
                self.ready.extend(resync);
                continue;
            }
            let Some(live) = self.live.clone() else {
                self.read_from_afar().await?;
                continue;
            };
            self.watching = None;
            let changed = live.changed();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match live.after(self.cursor) {
                Found::Events(events) => self.ready.extend(events),
                Found::Nothing => {
                    // A wake-up can be had; this is for the case that one was lost.
                    if tokio::time::timeout(POLL * 20, changed).await.is_err() {
                        self.read_log().await?;
                    }
                }
                Found::InStore => {
                    if !self.read_log().await? {
                        self.live = None;
                        let _ = tokio::time::timeout(POLL, changed).await;
                    }
                }
                Found::Gone => self.live = None,
            }
        }
    }

    /// The turn does not run here: reads the log, or waits until reading it may pay. Registers for wake-ups *before* it reads.
    async fn read_from_afar(&mut self) -> Result<(), StoreError> {
        let watching = match &mut self.watching {
            Some(watching) => watching,
            none => none.insert(self.host.dispatch.watch.turn(&self.org, self.turn)),
        };
        watching.seen();
        if let Some(read_at) = self.read_at {
            tokio::time::sleep_until((read_at + READ_GAP).into()).await;
        }
        // It may have begun here just before we registered.
        self.live = self.host.dispatch.live.get(self.turn);
        if self.live.is_none() && !self.read_log().await? {
            self.read_at = Some(Instant::now());
            if let Some(watching) = &mut self.watching {
                watching.news().await;
            }
        }
        Ok(())
    }

    /// The log after a cursor, however long the store is away, within reason: whoever reads here would only come back.
    async fn page(&self, after: Option<EventId>) -> Result<Option<EventPage>, StoreError> {
        let until = Instant::now() + STORE_PATIENCE.0;
        loop {
            match self.host.store.events(&self.org, self.turn, after, PAGE_BYTES).await {
                Err(StoreError::Unavailable(_)) if Instant::now() < until && !self.host.draining() => {
                    tokio::time::sleep(STORE_PATIENCE.1).await;
                }
                answer => return answer,
            }
        }
    }

    /// Reads a stretch of the log. Whether there was anything new.
    async fn read_log(&mut self) -> Result<bool, StoreError> {
        let Some(page) = self.page(self.cursor).await? else {
            // Deleted with its conversation while we read: that is how it ended.
            self.ready.push_back(event::terminal(&Outcome::Cancelled { by: CancelledBy::Deleted }, None));
            return Ok(true);
        };
        let before = self.ready.len();
        self.ready.extend(after(&page, self.cursor));
        Ok(self.ready.len() > before)
    }

    /// A client's cursor that nothing has (E5): where the turn stands at the greatest id before it, from which the reader goes on.
    async fn resync(&self, cursor: EventId) -> Result<Option<Event>, StoreError> {
        // Told here, and perhaps not written yet: the log will have it.
        if self.live.as_ref().is_some_and(|live| live.has_told(cursor)) {
            return Ok(None);
        }
        let until = Instant::now() + UNWRITTEN.0;
        let mut known = Known::default();
        let mut from = None;
        loop {
            let Some(page) = self.page(from).await? else {
                return Ok(None);
            };
            if is_of_the_run(cursor, &page.turn) && !page.more && self.live.is_none() && Instant::now() < until {
                let last = page.events.last().map(|event| event.id);
                if last < Some(cursor) && from < Some(cursor) {
                    // Perhaps told by the host that runs it, and not written yet.
                    tokio::time::sleep(UNWRITTEN.1).await;
                    continue;
                }
            }
            known.state = Some(page.turn.state);
            let events = after(&page, from);
            from = page.events.last().map(|event| event.id);
            if events.into_iter().any(|event| known.take(&event, cursor)) {
                return Ok(None);
            }
            if !page.more {
                break;
            }
        }
        if let Some(live) = &self.live
            && let Found::Events(events) = live.after(known.last)
            && events.iter().any(|event| known.take(event, cursor))
        {
            return Ok(None);
        }
        #[derive(Serialize)]
        struct Data {
            state: Option<TurnState>,
            text: String,
        }
        let data = event::raw(&Data { state: known.state, text: known.text });
        Ok(Some(Event { id: known.last.unwrap_or(EventId::ACCEPTED), kind: "resync".into(), data }))
    }
}

/// Whether it may be about to be written: what is said now is of the marker's epoch.
fn is_of_the_run(cursor: EventId, turn: &TurnRecord) -> bool {
    matches!(cursor, EventId::At(epoch, _) if epoch == turn.epoch) && turn.state == TurnState::Running
}

/// What is known of a turn up to a cursor.
#[derive(Default)]
struct Known {
    state: Option<TurnState>,
    text: String,
    last: Option<EventId>,
}

impl Known {
    /// Takes an event; whether it is the cursor's own.
    fn take(&mut self, event: &Event, cursor: EventId) -> bool {
        if event.id <= cursor && Some(event.id) > self.last {
            self.last = Some(event.id);
            match event.kind.as_ref() {
                "turn.restarted" => self.text.clear(),
                "output.delta" => self.text.push_str(&delta_text(event)),
                _ => {}
            }
        }
        event.id == cursor
    }
}

fn delta_text(event: &Event) -> String {
    #[derive(serde::Deserialize)]
    struct Delta {
        text: String,
    }
    serde_json::from_str::<Delta>(event.data.get()).map(|delta| delta.text).unwrap_or_default()
}

/// What follows `cursor`: the log's stretch, and around it what follows from the turn's row.
fn after(page: &EventPage, cursor: Option<EventId>) -> Vec<Event> {
    let turn = &page.turn;
    let mut events = Vec::with_capacity(page.events.len() + 3);
    events.push(event::accepted(turn.id, &turn.agent, turn.conversation.as_ref(), turn.accepted_at));
    if let (Some(epoch), Some((worker, version))) = (turn.first_epoch, &turn.worker) {
        events.push(event::started(epoch, 1, worker, *version));
    }
    events.extend(page.events.iter().cloned());
    if let (Some(terminal), false) = (terminal(turn), page.more) {
        events.push(terminal);
    }
    events.retain(|event| Some(event.id) > cursor);
    events.sort_by_key(|event| event.id);
    events
}

/// The terminal event of a turn that has ended, as its row tells it.
pub fn terminal(turn: &TurnRecord) -> Option<Event> {
    let outcome = match turn.state {
        TurnState::Queued | TurnState::Running => return None,
        TurnState::Completed => {
            let reply = turn.reply.as_deref().and_then(|reply| serde_json::from_slice::<Content>(reply).ok());
            match reply {
                Some(reply) => Outcome::Completed { reply, replaces_deltas: turn.replaces_deltas },
                None => Outcome::Failed(Failure::new(FailureCode::Internal, "the stored reply cannot be read")),
            }
        }
        TurnState::Failed => Outcome::Failed(
            turn.failure
                .clone()
                .unwrap_or_else(|| Failure::new(FailureCode::Internal, "the stored failure cannot be read")),
        ),
        TurnState::Cancelled => Outcome::Cancelled { by: turn.cancelled_by.unwrap_or(CancelledBy::User) },
    };
    Some(event::terminal(&outcome, turn.usage.as_ref()))
}
