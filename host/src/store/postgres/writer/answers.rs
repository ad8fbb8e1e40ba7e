//! What `write_batch` answers: the rows of an item, read as what became of it.

use bytes::Bytes;
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use crate::admission::Refusal;
use crate::clock::Timestamp;
use crate::gate::{Envelope, GateRefusal, SessionMode};
use crate::ids::{OrgId, RunId, TurnId, WorkerName};
use crate::lease::Lease;
use crate::quota::{Exceeded, LimitName, LimitOf};
use crate::store::{
    Accept, AcceptResult, Claimed, CommitResult, Ended, Fenced, Head, Result, Snapshot, Write, Written,
};
use crate::turn::{CancelledBy, Outcome};

/// What the rows say of an item.
pub(super) fn answer(item: &Write, rows: &[PgRow]) -> Result<Written, sqlx::Error> {
    if let Write::Claim(_) = item {
        return Ok(Written::Claim(rows.iter().map(claimed).collect::<Result<_, _>>()?));
    }
    let Some((last, before)) = rows.split_last() else {
        return Err(odd("an item has no answer"));
    };
    let kind: &str = last.try_get("kind")?;
    Ok(match item {
        Write::Accept(accept) => Written::Accept(accepted(accept, kind, last, before)?),
        Write::Append(_) | Write::BeginEffect(_) => Written::Append(fenced(kind)?),
        Write::Requeue(_) => Written::Requeue(fenced(kind)?),
        Write::Commit(commit) => Written::Commit(match kind {
            "won" => CommitResult::Won(Box::new(Ended {
                usage: commit.usage,
                ..ended(&commit.org, commit.turn, &commit.outcome, last)?
            })),
            "lost" => CommitResult::Lost,
            "conflict" => CommitResult::SnapshotConflict,
            other => return Err(odd(format!("{other:?} answers no commit"))),
        }),
        Write::Claim(_) => unreachable!("answered above"),
    })
}

fn fenced(kind: &str) -> Result<Fenced, sqlx::Error> {
    match kind {
        "done" => Ok(Fenced::Done),
        "stale" => Ok(Fenced::Stale),
        other => Err(odd(format!("{other:?} answers no fenced write"))),
    }
}

fn ended(org: &OrgId, turn: TurnId, outcome: &Outcome, row: &PgRow) -> Result<Ended, sqlx::Error> {
    Ok(Ended {
        org: org.clone(),
        turn,
        agent: id(row, "agent")?,
        outcome: outcome.clone(),
        usage: None,
        was_running: row.try_get::<&str, _>("was")? == "running",
        accepted_at: Timestamp(row.try_get("accepted_at")?),
        ended_at: Timestamp(row.try_get("at")?),
        promoted: row.try_get("promoted")?,
    })
}

fn accepted(accept: &Accept, kind: &str, row: &PgRow, before: &[PgRow]) -> Result<AcceptResult, sqlx::Error> {
    let claimed = match kind {
        "attached" => return Ok(AcceptResult::Attached(TurnId(row.try_get("turn")?))),
        "joined" => return Ok(AcceptResult::Joined(TurnId(row.try_get("turn")?))),
        "refused" => return Ok(AcceptResult::Refused(refusal(row)?)),
        "accepted" => None,
        "started" => Some(Box::new(started(accept, row)?)),
        other => return Err(odd(format!("{other:?} answers no accept"))),
    };
    let outcome = Outcome::Cancelled { by: CancelledBy::Interrupt };
    let interrupted = before
        .iter()
        .map(|row| ended(&accept.org, TurnId(row.try_get("turn")?), &outcome, row))
        .collect::<Result<_, _>>()?;
    Ok(AcceptResult::Accepted { interrupted, claimed })
}

/// Why a message, or a conversation that was to be made, was refused, as a row says it.
pub(in crate::store::postgres) fn refusal(row: &PgRow) -> Result<Refusal, sqlx::Error> {
    Ok(match row.try_get("refusal")? {
        "not_found" => Refusal::NotFound,
        "idempotency_mismatch" => Refusal::IdempotencyMismatch,
        "attachment_not_found" => Refusal::AttachmentNotFound,
        "conversation_busy" => Refusal::ConversationBusy { active: TurnId(row.try_get("turn")?) },
        "conversation_queue_full" => Refusal::ConversationQueueFull,
        "org_queue_full" => Refusal::OrgQueueFull { max: row.try_get::<f64, _>("limit_max")? as usize },
        "cpu_ms_per_hour" => Refusal::Exceeded(exceeded(LimitName::CpuMsPerHour, row)?),
        "submits_per_second" => Refusal::Exceeded(exceeded(LimitName::SubmitsPerSecond, row)?),
        "storage_bytes_max" => Refusal::Exceeded(exceeded(LimitName::StorageBytesMax, row)?),
        "agent_queue_full" => Refusal::AgentQueueFull { max: row.try_get::<f64, _>("limit_max")? as usize },
        "agent_cpu_ms_per_hour" => Refusal::Exceeded(exceeded(LimitName::CpuMsPerHour, row)?.of_the_agent()),
        "agent_storage_bytes_max" => Refusal::Exceeded(exceeded(LimitName::StorageBytesMax, row)?.of_the_agent()),
        "agent_submits_per_second" => Refusal::Exceeded(exceeded(LimitName::SubmitsPerSecond, row)?.of_the_agent()),
        "host_queue_full" => Refusal::HostQueueFull,
        other => return Err(odd(format!("{other:?} is no refusal"))),
    })
}

fn exceeded(limit: LimitName, row: &PgRow) -> Result<Exceeded, sqlx::Error> {
    let wait_ms: Option<i64> = row.try_get("wait_ms")?;
    Ok(Exceeded { of: LimitOf::Org, limit, max: row.try_get("limit_max")?, wait_ms: wait_ms.map(i64::unsigned_abs) })
}

/// A turn that was accepted and started in one write: what the host has just sent does not come back.
fn started(accept: &Accept, row: &PgRow) -> Result<Claimed, sqlx::Error> {
    let at = Timestamp(row.try_get("at")?);
    Ok(Claimed {
        lease: Lease {
            org: accept.org.clone(),
            turn: accept.turn,
            epoch: 1,
            deadline: Timestamp(row.try_get("deadline")?),
        },
        envelope: accept.envelope.clone(),
        refused: None,
        agent: accept.agent.clone(),
        worker: worker(row)?,
        agent_revision: revision(row)?,
        user: id(row, "usr")?,
        attempt: 1,
        restarted: false,
        first_epoch: 1,
        message: accept.message.clone(),
        dry_run: accept.dry_run,
        accepted_at: at,
        started_at: at,
        seq: row.try_get("seq")?,
        head: head(row, accept.envelope.mode)?,
        generation: generation(row, accept.envelope.mode)?,
    })
}

fn claimed(row: &PgRow) -> Result<Claimed, sqlx::Error> {
    let mode = match row.try_get("mode")? {
        "snapshot" => SessionMode::Snapshot,
        "file" => SessionMode::File,
        other => return Err(odd(format!("{other:?} is no session mode"))),
    };
    let refused = match row.try_get::<Option<&str>, _>("refusal")? {
        None => None,
        Some("missing_org") => Some(GateRefusal::MissingOrg),
        Some("missing_conversation") => Some(GateRefusal::MissingConversation),
        Some(other) => return Err(odd(format!("{other:?} is no refusal of the gate"))),
    };
    let refused = refused.map(|why| Ok::<_, sqlx::Error>((why, unsigned(row.try_get("refusals")?)))).transpose()?;
    let started = refused.is_none();
    Ok(Claimed {
        lease: Lease {
            org: id(row, "org")?,
            turn: TurnId(row.try_get("turn")?),
            epoch: unsigned(row.try_get("epoch")?),
            deadline: Timestamp(row.try_get("deadline")?),
        },
        envelope: Envelope {
            run_id: row.try_get::<Option<Uuid>, _>("run")?.map(RunId),
            org: optional(row, "env_org")?,
            conversation: optional(row, "conversation")?,
            mode,
        },
        refused,
        agent: id(row, "agent")?,
        worker: worker(row)?,
        agent_revision: revision(row)?,
        user: id(row, "usr")?,
        attempt: unsigned(row.try_get("attempt")?),
        restarted: row.try_get("restarted")?,
        first_epoch: unsigned(row.try_get("first_epoch")?),
        message: Bytes::from(row.try_get::<Vec<u8>, _>("message")?),
        dry_run: row.try_get("dry_run")?,
        accepted_at: Timestamp(row.try_get("accepted_at")?),
        started_at: Timestamp(row.try_get("at")?),
        seq: row.try_get("seq")?,
        head: if started { head(row, mode)? } else { None },
        generation: if started { generation(row, mode)? } else { None },
    })
}

fn worker(row: &PgRow) -> Result<Option<(WorkerName, u32)>, sqlx::Error> {
    let version: Option<i32> = row.try_get("version")?;
    Ok(optional(row, "worker")?.zip(version.map(unsigned)))
}

fn revision(row: &PgRow) -> Result<u64, sqlx::Error> {
    Ok(u64::try_from(row.try_get::<i64, _>("revision")?).unwrap_or(0))
}

fn generation(row: &PgRow, mode: SessionMode) -> Result<Option<Uuid>, sqlx::Error> {
    if mode == SessionMode::File { row.try_get("generation") } else { Ok(None) }
}

/// What a turn starts from; `None` where it shares nothing.
fn head(row: &PgRow, mode: SessionMode) -> Result<Option<Head>, sqlx::Error> {
    let (Some(parent), SessionMode::Snapshot) = (row.try_get::<Option<Uuid>, _>("head")?, mode) else {
        return Ok(None);
    };
    if Some(parent) == row.try_get::<Option<Uuid>, _>("generation")? {
        return Ok(Some(Head { parent, snapshot: None }));
    }
    let version: Option<i32> = row.try_get("snapshot_version")?;
    let snapshot = match (optional(row, "snapshot_worker")?, version) {
        (Some(worker), Some(version)) => Snapshot {
            run_id: RunId(parent),
            worker,
            version: unsigned(version),
            body: row.try_get::<Option<Vec<u8>>, _>("snapshot")?.map(Bytes::from),
        },
        // The chain's end has no row: told like one without bytes, so that the turn fails instead of starting afresh.
        _ => {
            tracing::error!(run = %parent, "the head of a conversation has no snapshot");
            let (worker, version) = worker(row)?.ok_or_else(|| odd("a turn without worker stands on a snapshot"))?;
            Snapshot { run_id: RunId(parent), worker, version, body: None }
        }
    };
    Ok(Some(Head { parent, snapshot: Some(snapshot) }))
}

fn id<T: std::str::FromStr>(row: &PgRow, column: &str) -> Result<T, sqlx::Error>
where
    T::Err: std::fmt::Display,
{
    let text: &str = row.try_get(column)?;
    text.parse().map_err(|error| odd(format!("stored id {text:?}: {error}")))
}

fn optional<T: std::str::FromStr>(row: &PgRow, column: &str) -> Result<Option<T>, sqlx::Error>
where
    T::Err: std::fmt::Display,
{
    match row.try_get::<Option<&str>, _>(column)? {
        Some(_) => id(row, column).map(Some),
        None => Ok(None),
    }
}

fn unsigned(of: i32) -> u32 {
    u32::try_from(of).unwrap_or(0)
}

/// The database holds or says what it should not.
pub(super) fn odd(what: impl Into<String>) -> sqlx::Error {
    sqlx::Error::Decode(what.into().into())
}
