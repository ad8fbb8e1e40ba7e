//! The hot path: a batch of the journal is one call of the function `write_batch`, one round trip that commits by itself. What the function
//! decides, and under which locks, is told in `migrations/postgres/0002_functions.sql`; here items become its arguments and its rows answers.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Serialize;
use sqlx::Row;
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use uuid::Uuid;

use super::PostgresStore;
use crate::admission::{OnBusy, Refusal};
use crate::clock::Timestamp;
use crate::gate::{Envelope, GateRefusal, SessionMode};
use crate::ids::{OrgId, RunId, TurnId};
use crate::lease::{Epoch, Lease};
use crate::store::{
    Accept, AcceptResult, Append, ClaimRequest, Claimed, Commit, CommitResult, Ended, Fenced, Head, Requeue, Result,
    Snapshot, Write, Written,
};
use crate::turn::{CancelledBy, Outcome};

/// How often a batch is tried again that the database gave up for another's sake (a deadlock, a lock held too long).
const TRIES: u32 = 4;

/// What one host's writer remembers between batches. Only hints: the database decides.
#[derive(Debug, Default)]
pub(super) struct Hot {
    /// The org that its claims served last.
    pub(super) cursor: Option<String>,
    /// Live turns of all orgs: as last counted, and moved by what this host has written since.
    pub(super) live: i64,
}

const WRITE_BATCH: &str =
    "SELECT * FROM write_batch($1::bigint, $2::text[], $3::jsonb, $4::bytea[], $5::int, $6::bigint, $7::text)";

/// One item as the function takes it. What it does not need is left out. Numbers that name a body count from 1.
#[derive(Debug, Default, Serialize)]
struct Item<'a> {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    org: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    turn: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<Epoch>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    accept: Option<AcceptItem<'a>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    claim: Option<ClaimItem>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    events: Option<EventsItem>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    requeue: Option<RequeueItem>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    commit: Option<CommitItem<'a>>,
}

#[derive(Debug, Serialize)]
struct AcceptItem<'a> {
    agent: &'a str,
    run: Option<Uuid>,
    env_org: Option<&'a str>,
    conv: Option<&'a str>,
    mode: &'static str,
    usr: &'a str,
    sees_all: bool,
    dry: bool,
    key: Option<Cow<'a, str>>,
    hash: Option<usize>,
    msg: usize,
    on_busy: &'static str,
    conv_max: i64,
    org_max: i64,
    host_max: i64,
    admission_ms: i64,
    queue_ms: i64,
    turn_ms: i64,
    attempts_max: u32,
    holder: Option<Uuid>,
    running_max: Option<i64>,
}

#[derive(Debug, Serialize)]
struct ClaimItem {
    holder: Uuid,
    slots: i64,
    running_max: i64,
    backoff_ms: i64,
    backoff_ms_max: i64,
}

#[derive(Debug, Serialize)]
struct EventsItem {
    first_seq: u32,
    body: Option<usize>,
    effect: bool,
}

#[derive(Debug, Serialize)]
struct RequeueItem {
    delay_ms: i64,
}

#[derive(Debug, Serialize)]
struct CommitItem<'a> {
    outcome: &'static str,
    reply: Option<usize>,
    replaces: Option<bool>,
    failure: Option<String>,
    cancelled_by: Option<&'static str>,
    first_seq: Option<u32>,
    body: Option<usize>,
    #[serde(flatten)]
    usage: Option<UsageItem>,
    #[serde(flatten)]
    snapshot: Option<SnapshotItem<'a>>,
}

#[derive(Debug, Serialize)]
struct UsageItem {
    cpu_ms: f64,
    wall_ms: f64,
    memory: i64,
    calls: i64,
    bytes_in: i64,
    bytes_out: i64,
    instance_ms: f64,
}

#[derive(Debug, Serialize)]
struct SnapshotItem<'a> {
    parent: Uuid,
    permit_run: Uuid,
    permit_org: &'a str,
    permit_conv: &'a str,
    snapshot: usize,
}

/// Payloads of a batch, by number from 1: they travel beside the items, in their own bytes.
#[derive(Default)]
struct Bodies<'a>(Vec<Cow<'a, [u8]>>);

impl<'a> Bodies<'a> {
    fn add(&mut self, body: impl Into<Cow<'a, [u8]>>) -> usize {
        self.0.push(body.into());
        self.0.len()
    }
}

impl PostgresStore {
    /// One batch of the journal: an answer an item.
    pub(super) async fn write_batch(&self, batch: Vec<Write>, now: Timestamp) -> Result<Vec<Written>> {
        let mut answers = Vec::with_capacity(batch.len());
        // Parts of the batch that are still to be written, the next one last. An item that breaks its part is found by halving, and fails alone.
        let mut parts = vec![&batch[..]];
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            match self.call(part, now).await {
                Ok(written) => {
                    if let Some(hints) = &self.hints {
                        hints.after(part, &written);
                    }
                    answers.extend(written);
                }
                Err(error) if is_an_items(&error) => {
                    let why = error.to_string();
                    if let [_alone] = part {
                        answers.push(Written::Failed(why));
                        continue;
                    }
                    tracing::warn!(error = why, items = part.len(), "an item broke its batch; writing its halves");
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(answers)
    }

    /// Tried again where the database gave it up for another's sake: nothing of it was written then.
    async fn call(&self, batch: &[Write], now: Timestamp) -> Result<Vec<Written>, sqlx::Error> {
        let mut tries = 1;
        loop {
            match self.call_once(batch, now).await {
                Err(sqlx::Error::Database(error))
                    if tries < TRIES && matches!(error.code().as_deref(), Some("40001" | "40P01" | "55P03")) =>
                {
                    tracing::warn!(%error, "a batch gave way to another; trying again");
                    tries += 1;
                }
                done => return done,
            }
        }
    }

    async fn call_once(&self, batch: &[Write], now: Timestamp) -> Result<Vec<Written>, sqlx::Error> {
        let mut bodies = Bodies::default();
        let items: Vec<Item<'_>> = batch.iter().map(|item| describe(item, &mut bodies)).collect::<Result<_, _>>()?;
        let mut orgs: Vec<&str> = items.iter().filter_map(|item| item.org).collect();
        orgs.sort_unstable();
        orgs.dedup();
        let bodies: Vec<&[u8]> = bodies.0.iter().map(|body| &body[..]).collect();
        let (cursor, live) = {
            let hot = self.hot.lock();
            (hot.cursor.clone(), hot.live)
        };
        let asked = self
            .query(WRITE_BATCH)
            .bind(self.clock.of(now))
            .bind(orgs)
            .bind(Json(&items))
            .bind(bodies)
            .bind(self.snapshots_kept)
            .bind(live)
            .bind(cursor);
        let rows = self.rows_for_journal(asked).await?;
        let mut answers = Vec::with_capacity(batch.len());
        let mut rows = rows.into_iter().peekable();
        let (mut came, mut served) = (0, None);
        for (place, item) in (1_i32..).zip(batch) {
            let mut own = Vec::new();
            while let Some(row) = rows.next_if(|row| row.try_get::<i32, _>("ord").is_ok_and(|ord| ord == place)) {
                own.push(row);
            }
            let answer = answer(item, &own)?;
            came += moved(&answer);
            if let Written::Claim(claimed) = &answer
                && let Some(last) = claimed.last()
            {
                served = Some(last.lease.org.as_str().to_owned());
            }
            answers.push(answer);
        }
        let mut hot = self.hot.lock();
        hot.live = hot.live.saturating_add(came).max(0);
        if served.is_some() {
            hot.cursor = served;
        }
        Ok(answers)
    }
}

/// By how many live turns an answer changes their number.
fn moved(answer: &Written) -> i64 {
    match answer {
        Written::Accept(AcceptResult::Accepted { interrupted, .. }) => 1 - bigint(interrupted.len()),
        Written::Commit(CommitResult::Won(_)) => -1,
        _ => 0,
    }
}

/// Whether the item is to blame and not the database: data that it cannot hold, or a constraint that is broken.
fn is_an_items(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| ["22", "23", "P0"].iter().any(|class| code.starts_with(class)))
        }
        sqlx::Error::Encode(_) | sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } => true,
        _ => false,
    }
}

fn bigint(of: impl TryInto<i64>) -> i64 {
    of.try_into().unwrap_or(i64::MAX)
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, sqlx::Error> {
    serde_json::to_vec(value).map_err(|error| sqlx::Error::Encode(error.into()))
}

fn describe<'a>(item: &'a Write, bodies: &mut Bodies<'a>) -> Result<Item<'a>, sqlx::Error> {
    Ok(match item {
        Write::Accept(accept) => accept_item(accept, bodies),
        Write::Claim(claim) => Item { kind: "claim", claim: Some(claim_item(claim)), ..Item::default() },
        Write::Append(append) => append_item(append, false, bodies),
        Write::BeginEffect(append) => append_item(append, true, bodies),
        Write::Commit(commit) => commit_item(commit, bodies)?,
        Write::Requeue(Requeue { lease, delay_ms }) => {
            Item { requeue: Some(RequeueItem { delay_ms: bigint(*delay_ms) }), ..held("requeue", lease) }
        }
    })
}

/// What is written under a lease.
fn held<'a>(kind: &'static str, lease: &'a Lease) -> Item<'a> {
    Item { kind, org: Some(lease.org.as_str()), turn: Some(lease.turn.0), epoch: Some(lease.epoch), ..Item::default() }
}

fn accept_item<'a>(accept: &'a Accept, bodies: &mut Bodies<'a>) -> Item<'a> {
    let envelope = &accept.envelope;
    let item = AcceptItem {
        agent: accept.agent.as_str(),
        run: envelope.run_id.map(|run| run.0),
        env_org: envelope.org.as_ref().map(OrgId::as_str),
        conv: envelope.conversation.as_ref().map(|id| id.as_str()),
        mode: envelope.mode.as_str(),
        usr: accept.user.as_str(),
        sees_all: accept.sees_all,
        dry: accept.dry_run,
        key: accept.key.as_ref().map(|(key, _)| storable(key)),
        hash: accept.key.as_ref().map(|(_, hash)| bodies.add(&hash[..])),
        msg: bodies.add(&accept.message[..]),
        on_busy: match accept.on_busy {
            OnBusy::Enqueue => "enqueue",
            OnBusy::Reject => "reject",
            OnBusy::Interrupt => "interrupt",
        },
        conv_max: bigint(accept.bounds.conversation_queue_max),
        org_max: bigint(accept.bounds.org_queue_max),
        host_max: bigint(accept.bounds.host_queue_max),
        admission_ms: bigint(accept.clocks.admission_timeout_ms),
        queue_ms: bigint(accept.clocks.queue_timeout_ms),
        turn_ms: bigint(accept.clocks.turn_timeout_ms),
        attempts_max: accept.attempts_max,
        holder: accept.claim_for.map(|(holder, _)| holder.0),
        running_max: accept.claim_for.map(|(_, bound)| bigint(bound.0)),
    };
    Item {
        kind: "accept",
        org: Some(accept.org.as_str()),
        turn: Some(accept.turn.0),
        accept: Some(item),
        ..Item::default()
    }
}

fn claim_item(claim: &ClaimRequest) -> ClaimItem {
    ClaimItem {
        holder: claim.holder.0,
        slots: bigint(claim.slots),
        running_max: bigint(claim.org_running_max.0),
        backoff_ms: bigint(claim.backoff_ms),
        backoff_ms_max: bigint(claim.backoff_ms_max),
    }
}

fn append_item<'a>(append: &'a Append, effect: bool, bodies: &mut Bodies<'a>) -> Item<'a> {
    let body = (!append.batch.is_empty()).then(|| bodies.add(append.batch.encode()));
    let events = EventsItem { first_seq: append.batch.first_seq, body, effect };
    Item { events: Some(events), ..held("append", &append.lease) }
}

fn commit_item<'a>(commit: &'a Commit, bodies: &mut Bodies<'a>) -> Result<Item<'a>, sqlx::Error> {
    let (mut reply, mut replaces, mut failure, mut by) = (None, None, None, None);
    match &commit.outcome {
        Outcome::Completed { reply: content, replaces_deltas } => {
            reply = Some(bodies.add(json(content)?));
            replaces = Some(*replaces_deltas);
        }
        Outcome::Failed(why) => failure = Some(String::from_utf8_lossy(&json(why)?).into_owned()),
        Outcome::Cancelled { by: who } => by = Some(who.as_str()),
    }
    let tail = (!commit.tail.is_empty()).then(|| (commit.tail.first_seq, bodies.add(commit.tail.encode())));
    let item = CommitItem {
        outcome: commit.outcome.state().as_str(),
        reply,
        replaces,
        failure,
        cancelled_by: by,
        first_seq: tail.map(|(first_seq, _)| first_seq),
        body: tail.map(|(_, body)| body),
        usage: commit.usage.map(|usage| UsageItem {
            cpu_ms: usage.cpu_ms,
            wall_ms: usage.wall_ms,
            memory: bigint(usage.memory_peak_bytes),
            calls: bigint(usage.host_calls),
            bytes_in: bigint(usage.bytes_in),
            bytes_out: bigint(usage.bytes_out),
            instance_ms: usage.instance_ms,
        }),
        snapshot: commit.snapshot.as_ref().map(|staged| SnapshotItem {
            parent: staged.parent,
            permit_run: staged.permit.run_id().0,
            permit_org: staged.permit.org().as_str(),
            permit_conv: staged.permit.conversation().as_str(),
            snapshot: bodies.add(&staged.body[..]),
        }),
    };
    Ok(Item {
        kind: "commit",
        org: Some(commit.org.as_str()),
        turn: Some(commit.turn.0),
        epoch: commit.epoch,
        commit: Some(item),
        ..Item::default()
    })
}

/// A caller's own text as the database can hold it: a NUL byte, which it cannot, is written as `\0`. Two texts never become one.
fn storable(text: &str) -> Cow<'_, str> {
    if text.contains(['\0', '\\']) {
        Cow::Owned(text.replace('\\', "\\\\").replace('\0', "\\0"))
    } else {
        Cow::Borrowed(text)
    }
}

/// What the rows say of an item.
fn answer(item: &Write, rows: &[PgRow]) -> Result<Written, sqlx::Error> {
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

fn refusal(row: &PgRow) -> Result<Refusal, sqlx::Error> {
    Ok(match row.try_get("refusal")? {
        "not_found" => Refusal::NotFound,
        "idempotency_mismatch" => Refusal::IdempotencyMismatch,
        "conversation_busy" => Refusal::ConversationBusy { active: TurnId(row.try_get("turn")?) },
        "conversation_queue_full" => Refusal::ConversationQueueFull,
        "org_queue_full" => Refusal::OrgQueueFull,
        "host_queue_full" => Refusal::HostQueueFull,
        other => return Err(odd(format!("{other:?} is no refusal"))),
    })
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

fn worker(row: &PgRow) -> Result<Option<(crate::ids::WorkerName, u32)>, sqlx::Error> {
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
fn odd(what: impl Into<String>) -> sqlx::Error {
    sqlx::Error::Decode(what.into().into())
}
