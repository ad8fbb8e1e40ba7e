//! Turns and their logs as they are read, over connections that cannot write.

use std::str::FromStr;

use bytes::Bytes;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
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
       t.bytes_in, t.bytes_out, t.instance_ms
  FROM turns t LEFT JOIN turn_markers m ON m.org_id = t.org_id AND m.turn_id = t.turn_id"
    };
}

statements! {
    TURN = concat!("-- turn\n", turn_columns!(), "
 WHERE t.org_id = ?1 AND t.turn_id = ?2");
    /// All of an org, by age.
    TURNS_OF_ORG = concat!("-- turns_of_org\n", turn_columns!(), "
 WHERE t.org_id = ?1 AND t.turn_id > ?2 ORDER BY t.turn_id LIMIT ?3");
    /// Only turns that have a place; private ones when asked for.
    TURNS_FORWARD = concat!("-- turns_forward\n", turn_columns!(), "
 WHERE t.org_id = ?1 AND t.agent_id = ?2 AND t.conversation_id = ?3 AND t.seq > ?4 AND (?5 OR t.private = 0) ORDER BY t.seq LIMIT ?6");
    TURNS_BACKWARD = concat!("-- turns_backward\n", turn_columns!(), "
 WHERE t.org_id = ?1 AND t.agent_id = ?2 AND t.conversation_id = ?3 AND t.seq < ?4 AND (?5 OR t.private = 0) ORDER BY t.seq DESC LIMIT ?6");
    /// The row in which a cursor lies, or the last before it: it can go on behind the cursor.
    EVENTS_FROM = "-- events_from
SELECT epoch, first_seq FROM turn_events WHERE org_id = ?1 AND turn_id = ?2 AND (epoch, first_seq) <= (?3, ?4)
 ORDER BY epoch DESC, first_seq DESC LIMIT 1";
    EVENTS = "-- events
SELECT epoch, first_seq, body FROM turn_events WHERE org_id = ?1 AND turn_id = ?2 AND (epoch, first_seq) >= (?3, ?4)
 ORDER BY epoch, first_seq LIMIT ?5";
    RUNNING = "-- running
SELECT org_id, turn_id, epoch, deadline_at FROM turn_markers WHERE holder = ?1 AND state = 'running'";
    /// ?1 [{org, turn, epoch}]: those that nobody holds under this epoch any more.
    STALE = "-- stale
SELECT e.value->>'turn' FROM json_each(?1) e WHERE NOT EXISTS (
  SELECT 1 FROM turn_markers m WHERE m.org_id = e.value->>'org' AND m.turn_id = unhex(e.value->>'turn')
     AND m.epoch = e.value->>'epoch' AND m.state = 'running')";
}

/// Rows of the log that are read at once; a page of `bytes_max` may take several.
const EVENT_ROWS: i64 = 64;

impl SqliteStore {
    pub(super) async fn read_turn(&self, org: &OrgId, turn: TurnId) -> Result<Option<Owned<TurnRecord>>> {
        let row = sqlx::query(TURN).bind(org.as_str()).bind(turn.as_bytes()).fetch_optional(&self.readers).await?;
        row.map(|row| turn_record(&row).map(|turn| Owned::new(org.clone(), turn.user.clone(), turn))).transpose()
    }

    /// Turn and log of one moment, hence in one transaction.
    pub(super) async fn read_events(
        &self,
        org: &OrgId,
        turn: TurnId,
        after: Option<EventId>,
        bytes_max: usize,
    ) -> Result<Option<EventPage>> {
        let mut tx = self.readers.begin().await?;
        let row = sqlx::query(TURN).bind(org.as_str()).bind(turn.as_bytes()).fetch_optional(&mut *tx).await?;
        let Some(row) = row else { return Ok(None) };
        let mut page = EventPage { turn: turn_record(&row)?, events: Vec::new(), more: false };
        if after == Some(EventId::End) {
            return Ok(Some(page));
        }
        let (mut epoch, mut seq): (Epoch, u32) = (0, 0);
        if let Some(EventId::At(after_epoch, after_seq)) = after {
            let from = sqlx::query(EVENTS_FROM)
                .bind(org.as_str())
                .bind(turn.as_bytes())
                .bind(after_epoch)
                .bind(after_seq)
                .fetch_optional(&mut *tx)
                .await?;
            if let Some(from) = from {
                (epoch, seq) = (from.try_get(0)?, from.try_get(1)?);
            }
        }
        let mut bytes = 0;
        loop {
            let rows = sqlx::query(EVENTS)
                .bind(org.as_str())
                .bind(turn.as_bytes())
                .bind(epoch)
                .bind(seq)
                .bind(EVENT_ROWS)
                .fetch_all(&mut *tx)
                .await?;
            let full = i64::try_from(rows.len()).is_ok_and(|rows| rows == EVENT_ROWS);
            for row in rows {
                (epoch, seq) = (row.try_get(0)?, row.try_get(1)?);
                let body: &[u8] = row.try_get(2)?;
                if bytes >= bytes_max && !page.events.is_empty() {
                    page.more = true;
                    return Ok(Some(page));
                }
                bytes += append(&mut page.events, epoch, seq, body, after)?;
            }
            if !full {
                break;
            }
            seq += 1;
        }
        let tail: Option<&[u8]> = row.try_get(28)?;
        if let Some(tail) = tail {
            if bytes >= bytes_max && !page.events.is_empty() {
                page.more = true;
            } else {
                append(&mut page.events, page.turn.epoch, row.try_get(27)?, tail, after)?;
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
        let rows = sqlx::query(statement)
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .bind(from)
            .bind(with_private)
            .bind(one_more(limit))
            .fetch_all(&self.readers)
            .await?;
        page(&rows, limit, turn_record)
    }

    pub(super) async fn read_running(&self, replica: ReplicaId) -> Result<Vec<Lease>> {
        let rows = sqlx::query(RUNNING).bind(replica.as_bytes()).fetch_all(&self.readers).await?;
        rows.iter()
            .map(|row| {
                Ok(Lease {
                    org: id(row, 0)?,
                    turn: TurnId(uuid(row, 1)?),
                    epoch: row.try_get(2)?,
                    deadline: Timestamp(row.try_get(3)?),
                })
            })
            .collect()
    }

    pub(super) async fn read_stale(&self, leases: &[Lease]) -> Result<Vec<TurnId>> {
        if leases.is_empty() {
            return Ok(Vec::new());
        }
        let asked: Vec<_> = leases
            .iter()
            .map(|lease| {
                serde_json::json!({"org": lease.org, "turn": lease.turn.0.simple().to_string(), "epoch": lease.epoch})
            })
            .collect();
        let rows =
            sqlx::query(STALE).bind(serde_json::Value::Array(asked).to_string()).fetch_all(&self.readers).await?;
        rows.iter()
            .map(|row| {
                let turn: &str = row.try_get(0)?;
                turn.parse().map(TurnId).map_err(|_| StoreError::Corrupt(format!("{turn:?} is no turn")))
            })
            .collect()
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

/// One more than asked for tells whether there are more.
pub(super) fn one_more(limit: usize) -> i64 {
    i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX)
}

/// Rows of a query that asked for [`one_more`].
pub(super) fn page<T>(rows: &[SqliteRow], limit: usize, item: impl Fn(&SqliteRow) -> Result<T>) -> Result<Page<T>> {
    let items = rows.iter().take(limit).map(item).collect::<Result<_>>()?;
    Ok(Page { items, more: rows.len() > limit })
}

/// A stored name.
pub(super) fn id<T: FromStr>(row: &SqliteRow, column: usize) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    let text: &str = row.try_get(column)?;
    text.parse().map_err(|error| StoreError::Corrupt(format!("stored id {text:?}: {error}")))
}

/// A stored name, where there is one.
pub(super) fn id_or_none<T: FromStr>(row: &SqliteRow, column: usize) -> Result<Option<T>>
where
    T::Err: std::fmt::Display,
{
    row.try_get::<Option<&str>, _>(column)?.map(|_| id(row, column)).transpose()
}

/// Sixteen stored bytes.
pub(super) fn uuid(row: &SqliteRow, column: usize) -> Result<uuid::Uuid> {
    let bytes: &[u8] = row.try_get(column)?;
    uuid::Uuid::from_slice(bytes).map_err(|error| StoreError::Corrupt(error.to_string()))
}

pub(super) fn turn_record(row: &SqliteRow) -> Result<TurnRecord> {
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
        id: TurnId(uuid(row, 1)?),
        user: id(row, 26)?,
        agent: id(row, 2)?,
        conversation: id_or_none(row, 3)?,
        run_id: row.try_get::<Option<&[u8]>, _>(4)?.and_then(RunId::from_slice),
        private: row.try_get(5)?,
        seq: row.try_get(6)?,
        state,
        attempt: row.try_get(8)?,
        epoch: row.try_get(9)?,
        first_epoch: row.try_get(10)?,
        worker: id_or_none(row, 11)?.zip(row.try_get(12)?),
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
