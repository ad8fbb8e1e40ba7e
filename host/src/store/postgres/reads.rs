//! Turns and their logs as they are read, each in one statement: one moment, one round trip.

use std::str::FromStr;

use bytes::Bytes;
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::PostgresStore;
use crate::caller::Owned;
use crate::clock::Timestamp;
use crate::event::{Event, EventBatch, EventId};
use crate::ids::{AgentId, ConversationId, OrgId, ReplicaId, RunId, TurnId};
use crate::lease::{Epoch, Lease};
use crate::store::{Direction, EventPage, Page, Result, StoreError, TurnRecord};
use crate::turn::{CancelledBy, TurnState, Usage};

/// A live turn's state is its marker's, an ended one's its own.
macro_rules! turn_columns {
    () => {
        "SELECT t.org_id, t.turn_id, t.agent_id, t.conversation_id, t.run_id, t.private, t.seq, coalesce(t.outcome, m.state),
       coalesce(t.attempts, m.attempt), coalesce(t.end_epoch, m.epoch), t.first_epoch, t.worker, t.version, t.message, t.dry_run,
       t.reply, t.replaces_deltas, t.failure, t.cancelled_by, t.cpu_ms, t.wall_ms, t.memory_peak_bytes, t.host_calls,
       t.accepted_at, t.started_at, t.ended_at, t.user_id, t.tail_seq, t.tail,
       t.bytes_in, t.bytes_out, t.instance_ms"
    };
}

macro_rules! turn_tables {
    () => {
        "
  FROM turns t LEFT JOIN turn_markers m ON m.org_id = t.org_id AND m.turn_id = t.turn_id"
    };
}

statements! {
    TURN = concat!("-- turn\n", turn_columns!(), turn_tables!(), "
 WHERE t.org_id = $1 AND t.turn_id = $2");
    /// All of an org, by age.
    TURNS_OF_ORG = concat!("-- turns_of_org\n", turn_columns!(), turn_tables!(), "
 WHERE t.org_id = $1 AND t.turn_id > $2 ORDER BY t.turn_id LIMIT $3");
    /// Only turns that have a place; private ones when asked for.
    TURNS_FORWARD = concat!("-- turns_forward\n", turn_columns!(), turn_tables!(), "
 WHERE t.org_id = $1 AND t.agent_id = $2 AND t.conversation_id = $3 AND t.seq > $4 AND ($5 OR NOT t.private) ORDER BY t.seq LIMIT $6");
    TURNS_BACKWARD = concat!("-- turns_backward\n", turn_columns!(), turn_tables!(), "
 WHERE t.org_id = $1 AND t.agent_id = $2 AND t.conversation_id = $3 AND t.seq < $4 AND ($5 OR NOT t.private) ORDER BY t.seq DESC LIMIT $6");
    /// Turn and log of one moment. `f` is the row in which the cursor lies, or the last before it: it can go on behind the cursor.
    EVENTS = concat!("-- events\n", turn_columns!(), ", e.epochs, e.seqs, e.bodies", turn_tables!(), "
  LEFT JOIN LATERAL (SELECT x.epoch, x.first_seq FROM turn_events x WHERE x.org_id = $1 AND x.turn_id = $2 AND (x.epoch, x.first_seq) <= ($3, $4)
                      ORDER BY x.epoch DESC, x.first_seq DESC LIMIT 1) f ON true
  LEFT JOIN LATERAL (SELECT array_agg(y.epoch) AS epochs, array_agg(y.first_seq) AS seqs, array_agg(y.body) AS bodies
                       FROM (SELECT x.epoch, x.first_seq, x.body FROM turn_events x
                              WHERE x.org_id = $1 AND x.turn_id = $2 AND (x.epoch, x.first_seq) >= (coalesce(f.epoch, 0), coalesce(f.first_seq, 0))
                              ORDER BY x.epoch, x.first_seq LIMIT $5) y) e ON true
 WHERE t.org_id = $1 AND t.turn_id = $2");
    RUNNING = "-- running
SELECT org_id, turn_id, epoch, deadline_at FROM turn_markers WHERE holder = $1 AND state = 'running'";
    /// Those that nobody holds under this epoch any more.
    STALE = "-- stale
SELECT a.turn_id FROM unnest($1::text[], $2::uuid[], $3::int[]) AS a (org_id, turn_id, epoch) WHERE NOT EXISTS (
  SELECT 1 FROM turn_markers m WHERE m.org_id = a.org_id AND m.turn_id = a.turn_id AND m.epoch = a.epoch AND m.state = 'running')";
}

/// Rows of the log that are read at once; behind them, a page says that there is more.
const EVENT_ROWS: usize = 64;

impl PostgresStore {
    pub(super) async fn read_turn(&self, org: &OrgId, turn: TurnId) -> Result<Option<Owned<TurnRecord>>> {
        let row = self.row_of(org, self.query(TURN).bind(org.as_str()).bind(turn.0)).await?;
        row.map(|row| turn_record(&row).map(|turn| Owned::new(org.clone(), turn.user.clone(), turn))).transpose()
    }

    pub(super) async fn read_events(
        &self,
        org: &OrgId,
        turn: TurnId,
        after: Option<EventId>,
        bytes_max: usize,
    ) -> Result<Option<EventPage>> {
        let (epoch, seq) = match after {
            Some(EventId::At(epoch, seq)) => (i32::try_from(epoch).unwrap_or(i32::MAX), i64::from(seq)),
            _ => (-1, 0),
        };
        // One more than a page has tells whether there are more.
        let rows_max = if after == Some(EventId::End) { 0 } else { EVENT_ROWS + 1 };
        let asked = self.query(EVENTS).bind(org.as_str()).bind(turn.0).bind(epoch).bind(seq).bind(limit(rows_max));
        let Some(row) = self.row_of(org, asked).await? else { return Ok(None) };
        let mut page = EventPage { turn: turn_record(&row)?, events: Vec::new(), more: false };
        if after == Some(EventId::End) {
            return Ok(Some(page));
        }
        let epochs: Vec<i32> = row.try_get::<Option<_>, _>(32)?.unwrap_or_default();
        let seqs: Vec<i64> = row.try_get::<Option<_>, _>(33)?.unwrap_or_default();
        let bodies: Vec<Vec<u8>> = row.try_get::<Option<_>, _>(34)?.unwrap_or_default();
        let mut bytes = 0;
        for (place, ((epoch, seq), body)) in epochs.into_iter().zip(seqs).zip(&bodies).enumerate() {
            if place == EVENT_ROWS || (bytes >= bytes_max && !page.events.is_empty()) {
                page.more = true;
                return Ok(Some(page));
            }
            bytes += append(&mut page.events, natural(epoch)?, natural(seq)?, body, after)?;
        }
        let tail: Option<&[u8]> = row.try_get(28)?;
        if let Some(tail) = tail {
            if bytes >= bytes_max && !page.events.is_empty() {
                page.more = true;
            } else {
                let seq = natural(row.try_get::<i64, _>(27)?)?;
                append(&mut page.events, page.turn.epoch, seq, tail, after)?;
            }
        }
        Ok(Some(page))
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) async fn read_turns(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        after: Option<i64>,
        direction: Direction,
        with_private: bool,
        limit: usize,
    ) -> Result<Page<TurnRecord>> {
        let (statement, from) = match direction {
            Direction::Forward => (TURNS_FORWARD, after.unwrap_or(i64::MIN)),
            Direction::Backward => (TURNS_BACKWARD, after.unwrap_or(i64::MAX)),
        };
        let asked = self
            .query(statement)
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .bind(from)
            .bind(with_private)
            .bind(one_more(limit));
        page(&self.rows_of(org, asked).await?, limit, turn_record)
    }

    pub(super) async fn read_running(&self, replica: ReplicaId) -> Result<Vec<Lease>> {
        let rows = self.rows_hostwide(self.query(RUNNING).bind(replica.0)).await?;
        rows.iter()
            .map(|row| {
                Ok(Lease {
                    org: id(row, 0)?,
                    turn: TurnId(row.try_get(1)?),
                    epoch: small(row, 2)?,
                    deadline: Timestamp(row.try_get(3)?),
                })
            })
            .collect()
    }

    pub(super) async fn read_stale(&self, leases: &[Lease]) -> Result<Vec<TurnId>> {
        if leases.is_empty() {
            return Ok(Vec::new());
        }
        let orgs: Vec<&str> = leases.iter().map(|lease| lease.org.as_str()).collect();
        let turns: Vec<Uuid> = leases.iter().map(|lease| lease.turn.0).collect();
        let epochs: Vec<i32> = leases.iter().map(|lease| i32::try_from(lease.epoch).unwrap_or(i32::MAX)).collect();
        let rows = self.rows_hostwide(self.query(STALE).bind(orgs).bind(turns).bind(epochs)).await?;
        rows.iter().map(|row| Ok(TurnId(row.try_get(0)?))).collect()
    }
}

/// Adds what lies behind `after`; how many bytes that was.
fn append(events: &mut Vec<Event>, epoch: Epoch, seq: u32, body: &[u8], after: Option<EventId>) -> Result<usize> {
    let batch = EventBatch::decode(seq, body).map_err(|error| StoreError::Corrupt(format!("events: {error}")))?;
    let mut bytes = 0;
    for event in batch.into_events(epoch).filter(|event| after.is_none_or(|after| event.id > after)) {
        bytes += event.data.get().len() + event.kind.len();
        events.push(event);
    }
    Ok(bytes)
}

/// As many rows as the database can count.
pub(super) fn limit(rows: usize) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}

/// One more than asked for tells whether there are more.
pub(super) fn one_more(rows: usize) -> i64 {
    limit(rows.saturating_add(1))
}

/// Rows of a query that asked for [`one_more`].
pub(super) fn page<T>(rows: &[PgRow], limit: usize, item: impl Fn(&PgRow) -> Result<T>) -> Result<Page<T>> {
    let items = rows.iter().take(limit).map(item).collect::<Result<_>>()?;
    Ok(Page { items, more: rows.len() > limit })
}

/// A stored name.
pub(super) fn id<T: FromStr>(row: &PgRow, column: usize) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    let text: &str = row.try_get(column)?;
    text.parse().map_err(|error| StoreError::Corrupt(format!("stored id {text:?}: {error}")))
}

/// A stored name, where there is one.
pub(super) fn id_or_none<T: FromStr>(row: &PgRow, column: usize) -> Result<Option<T>>
where
    T::Err: std::fmt::Display,
{
    row.try_get::<Option<&str>, _>(column)?.map(|_| id(row, column)).transpose()
}

fn natural(of: impl TryInto<u32>) -> Result<u32> {
    of.try_into().map_err(|_| StoreError::Corrupt("a stored number is out of its range".to_owned()))
}

/// A stored `int` that is never negative.
pub(super) fn small(row: &PgRow, column: usize) -> Result<u32> {
    natural(row.try_get::<i32, _>(column)?)
}

/// The same, where there is one.
fn small_or_none(row: &PgRow, column: usize) -> Result<Option<u32>> {
    row.try_get::<Option<i32>, _>(column)?.map(natural).transpose()
}

pub(super) fn turn_record(row: &PgRow) -> Result<TurnRecord> {
    let corrupt = |what: &str| StoreError::Corrupt(format!("a turn's {what}"));
    let state = match row.try_get::<Option<&str>, _>(7)? {
        Some("waiting" | "ready") => TurnState::Queued,
        Some("running") => TurnState::Running,
        Some("completed") => TurnState::Completed,
        Some("failed") => TurnState::Failed,
        Some("cancelled") => TurnState::Cancelled,
        // Neither ended nor owed: whoever made this row has lost a turn.
        other => return Err(corrupt(&format!("state is {other:?}"))),
    };
    let usage = match row.try_get::<Option<f64>, _>(19)? {
        None => None,
        Some(cpu_ms) => Some(Usage {
            cpu_ms,
            wall_ms: row.try_get(20)?,
            memory_peak_bytes: row.try_get::<i64, _>(21)?.unsigned_abs(),
            host_calls: row.try_get::<i64, _>(22)?.unsigned_abs(),
            bytes_in: row.try_get::<Option<i64>, _>(29)?.unwrap_or_default().unsigned_abs(),
            bytes_out: row.try_get::<Option<i64>, _>(30)?.unwrap_or_default().unsigned_abs(),
            instance_ms: row.try_get::<Option<f64>, _>(31)?.unwrap_or_default(),
        }),
    };
    let failure = row.try_get::<Option<&str>, _>(17)?;
    let cancelled_by = row.try_get::<Option<&str>, _>(18)?;
    Ok(TurnRecord {
        org: id(row, 0)?,
        id: TurnId(row.try_get(1)?),
        user: id(row, 26)?,
        agent: id(row, 2)?,
        conversation: id_or_none(row, 3)?,
        run_id: row.try_get::<Option<Uuid>, _>(4)?.map(RunId),
        private: row.try_get(5)?,
        seq: row.try_get(6)?,
        state,
        attempt: small(row, 8)?,
        epoch: small(row, 9)?,
        first_epoch: small_or_none(row, 10)?,
        worker: id_or_none(row, 11)?.zip(small_or_none(row, 12)?),
        message: Bytes::from(row.try_get::<Vec<u8>, _>(13)?),
        dry_run: row.try_get(14)?,
        reply: row.try_get::<Option<Vec<u8>>, _>(15)?.map(Bytes::from),
        replaces_deltas: row.try_get::<Option<bool>, _>(16)?.unwrap_or(false),
        failure: failure
            .map(serde_json::from_str)
            .transpose()
            .map_err(|error| corrupt(&format!("failure: {error}")))?,
        cancelled_by: cancelled_by
            .map(|by| CancelledBy::parse(by).ok_or_else(|| corrupt(&format!("canceller is {by:?}"))))
            .transpose()?,
        usage,
        accepted_at: Timestamp(row.try_get(23)?),
        started_at: row.try_get::<Option<i64>, _>(24)?.map(Timestamp),
        ended_at: row.try_get::<Option<i64>, _>(25)?.map(Timestamp),
    })
}
