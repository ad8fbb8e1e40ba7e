//! A marker changes its owner: the first start, the start after a requeue and the takeover from a dead replica are one function. A row that the
//! gate's column refuses comes back to its claimer and goes on waiting; nothing starts for it.

use std::collections::VecDeque;

use bytes::Bytes;
use rusqlite::{OptionalExtension, params};
use uuid::Uuid;

use super::accept::uuid;
use super::counts::Stage;
use super::writer::{Fault, Tried, Tx};
use crate::clock::Timestamp;
use crate::event::{EventBatch, raw};
use crate::gate::{Envelope, GateRefusal, SessionMode};
use crate::ids::{AgentId, ConversationId, OrgId, ReplicaId, RunId, TurnId, UserId, WorkerName};
use crate::lease::{EPOCH_MAX, Epoch, Lease};
use crate::store::{ClaimRequest, Claimed, Head, Snapshot};

statements! {
    /// Only the living and not draining may hold anything.
    CLAIM_HOLDER = "-- claim_holder
SELECT 1 FROM replicas WHERE replica_id = ?1 AND expires_at > ?2 AND draining = 0";
    /// What the dead held and may be run again: attempts are left, no effect had begun, its own time is not over.
    CLAIM_ORPHANS = "-- claim_orphans
SELECT m.org_id, m.turn_id FROM replicas d CROSS JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
 WHERE d.expires_at <= ?1 AND m.attempt < m.attempts_max AND m.effects = 0 AND m.deadline_at > ?1 AND m.epoch < ?2 LIMIT ?3";
    /// An org's next. What is overdue is the sweeper's.
    CLAIM_NEXT = "-- claim_next
SELECT turn_id FROM turn_markers
 WHERE org_id = ?1 AND state = 'ready' AND not_before <= ?2 AND deadline_at > ?2 AND epoch < ?3 ORDER BY not_before LIMIT 1";
    /// The marker, its turn's row and its agent as they are now.
    CLAIM_READ = "-- claim_read
SELECT m.agent_id, m.env_org, m.conversation_id, m.run_id, m.mode, m.seq, m.state, m.epoch, m.attempt, m.refusals, m.refusal, m.deadline_at, m.turn_ms,
       t.user_id, t.dry_run, t.accepted_at, t.message, t.first_epoch, t.worker, t.version
  FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id
 WHERE m.org_id = ?1 AND m.turn_id = ?2";
    CLAIM_AGENT = "-- claim_agent
SELECT worker, version, revision FROM agents WHERE org_id = ?1 AND agent_id = ?2";
    CLAIM_START = "-- claim_start
UPDATE turn_markers SET state = 'running', holder = ?4, epoch = ?3 + 1, attempt = attempt + 1, deadline_at = ?5
 WHERE org_id = ?1 AND turn_id = ?2 AND epoch = ?3";
    /// Back to the queue with a new owner number: its claimer may end it, nobody else's lease is worth anything. No attempt is spent.
    CLAIM_REFUSED = "-- claim_refused
UPDATE turn_markers SET epoch = ?3 + 1, refusals = refusals + 1, not_before = ?4 WHERE org_id = ?1 AND turn_id = ?2 AND epoch = ?3";
    /// Worker and version are fixed here, for all attempts.
    CLAIM_FIRST = "-- claim_first
UPDATE turns SET first_epoch = ?3, started_at = ?4, worker = ?5, version = ?6 WHERE org_id = ?1 AND turn_id = ?2 AND first_epoch IS NULL";
    CLAIM_RESTARTED = "-- claim_restarted
INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body) VALUES (?1, ?2, ?3, 0, ?4)";
    /// A point look-up: the chain is never walked.
    HEAD_SNAPSHOT = "-- head_snapshot
SELECT worker, version, body FROM snapshots WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND run_id = ?4";
    HEAD_RUN = "-- head_run
SELECT generation, head_run FROM conversations WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3";
}

/// What a first start fixes.
pub(super) struct Start {
    pub(super) holder: ReplicaId,
    pub(super) worker: Option<(WorkerName, u32)>,
    pub(super) agent_revision: u64,
}

impl Start {
    /// Reads the agent as it is now.
    pub(super) fn new(tx: &Tx<'_>, org: &OrgId, agent: &AgentId, holder: ReplicaId) -> Tried<Start> {
        let mut statement = tx.conn.prepare_cached(CLAIM_AGENT)?;
        let found = statement
            .query_row(params![org.as_str(), agent.as_str()], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, u32>(1)?, row.get::<_, u32>(2)?.into()))
            })
            .optional()?;
        let Some((worker, version, agent_revision)) = found else {
            return Ok(Start { holder, worker: None, agent_revision: 0 });
        };
        Ok(Start { holder, worker: Some((parsed(&worker)?, version)), agent_revision })
    }
}

/// A marker with what its turn's row adds.
struct Candidate {
    agent: AgentId,
    envelope: Envelope,
    seq: Option<i64>,
    stage: Stage,
    epoch: Epoch,
    attempt: u32,
    refusals: u32,
    refusal: Option<GateRefusal>,
    deadline: Timestamp,
    turn_ms: u64,
    user: UserId,
    dry_run: bool,
    accepted_at: Timestamp,
    message: Bytes,
    first_epoch: Option<Epoch>,
    worker: Option<(WorkerName, u32)>,
}

impl Tx<'_> {
    pub(super) fn claim(&mut self, request: &ClaimRequest) -> Tried<Vec<Claimed>> {
        let mut claimed = Vec::new();
        if request.slots == 0 || !self.may_claim(request.holder)? {
            return Ok(claimed);
        }
        // What was running already counts against its org's bound already.
        for (org, turn) in self.orphans(request.slots)? {
            claimed.push(self.start(request, &org, turn)?);
        }
        // One an org and round, so that nobody's backlog delays another's single turn beyond its share (O5).
        let orgs: Vec<OrgId> = self.counts.ready_round(self.cursor.as_ref()).cloned().collect();
        let mut round = VecDeque::from(orgs);
        while claimed.len() < request.slots {
            let Some(org) = round.pop_front() else { break };
            if !self.has_room(&org, request.org_running_max.0)? {
                continue;
            }
            let Some(turn) = self.next_ready(&org)? else { continue };
            claimed.push(self.start(request, &org, turn)?);
            *self.cursor = Some(org.clone());
            round.push_back(org);
        }
        Ok(claimed)
    }

    /// Whether this replica is live and not draining.
    pub(super) fn may_claim(&mut self, replica: ReplicaId) -> Tried<bool> {
        if let Some((asked, may)) = self.holder
            && asked == replica
        {
            return Ok(may);
        }
        let may = self.conn.prepare_cached(CLAIM_HOLDER)?.exists(params![replica.as_bytes(), self.now.0])?;
        self.holder = Some((replica, may));
        Ok(may)
    }

    /// Whether a turn of any org that may still start one is ready: what comes in now must not be started before it.
    pub(super) fn is_older_ready(&mut self, org_running_max: usize) -> Tried<bool> {
        if let Some(known) = self.older_ready {
            return Ok(known);
        }
        let mut found = false;
        for org in self.counts.ready_orgs() {
            if self.has_room(org, org_running_max)? && self.next_ready(org)?.is_some() {
                found = true;
                break;
            }
        }
        found = found || !self.orphans(1)?.is_empty();
        self.older_ready = Some(found);
        Ok(found)
    }

    fn next_ready(&self, org: &OrgId) -> Tried<Option<TurnId>> {
        let mut statement = self.conn.prepare_cached(CLAIM_NEXT)?;
        let next = statement.query_row(params![org.as_str(), self.now.0, EPOCH_MAX], |row| Ok(TurnId(uuid(row, 0)?)));
        Ok(next.optional()?)
    }

    fn orphans(&self, limit: usize) -> Tried<Vec<(OrgId, TurnId)>> {
        let mut statement = self.conn.prepare_cached(CLAIM_ORPHANS)?;
        let mut rows = statement.query(params![self.now.0, EPOCH_MAX, i64::try_from(limit).unwrap_or(i64::MAX)])?;
        let mut orphans = Vec::new();
        while let Some(row) = rows.next()? {
            orphans.push((parsed(&row.get::<_, String>(0)?)?, TurnId(uuid(row, 1)?)));
        }
        Ok(orphans)
    }

    /// Gives one marker to `request.holder`, or hands a refused one back to the queue.
    fn start(&mut self, request: &ClaimRequest, org: &OrgId, turn: TurnId) -> Tried<Claimed> {
        let candidate = self.candidate(org, turn)?;
        let epoch = candidate.epoch + 1;
        if let Some(refusal) = candidate.refusal {
            let backoff =
                request.backoff_ms.checked_shl(candidate.refusals).unwrap_or(u64::MAX).min(request.backoff_ms_max);
            self.conn.prepare_cached(CLAIM_REFUSED)?.execute(params![
                org.as_str(),
                turn.as_bytes(),
                candidate.epoch,
                self.now.plus_ms(backoff).0
            ])?;
            let (attempt, refusals) = (candidate.attempt, candidate.refusals + 1);
            let deadline = candidate.deadline;
            return Ok(self.claimed(
                candidate,
                org,
                turn,
                epoch,
                attempt,
                deadline,
                Some((refusal, refusals)),
                0,
                None,
            ));
        }
        let deadline = self.now.plus_ms(candidate.turn_ms);
        let updated = self.conn.prepare_cached(CLAIM_START)?.execute(params![
            org.as_str(),
            turn.as_bytes(),
            candidate.epoch,
            request.holder.as_bytes(),
            deadline.0
        ])?;
        if updated != 1 {
            return Err(Fault::Corrupt(format!("marker {turn} changed inside the transaction that claims it")));
        }
        self.shift(org, Some(candidate.stage), Some(Stage::Running));
        let attempt = candidate.attempt + 1;
        let now = Start::new(self, org, &candidate.agent, request.holder)?;
        let mut candidate = candidate;
        if candidate.first_epoch.is_none() {
            candidate.worker = now.worker;
            self.conn.prepare_cached(CLAIM_FIRST)?.execute(params![
                org.as_str(),
                turn.as_bytes(),
                epoch,
                self.now.0,
                candidate.worker.as_ref().map(|(name, _)| name.as_str()),
                candidate.worker.as_ref().map(|(_, version)| version)
            ])?;
        } else {
            let batch = EventBatch {
                first_seq: 0,
                events: vec![("turn.restarted".into(), raw(&serde_json::json!({ "attempt": attempt })))],
            };
            self.conn.prepare_cached(CLAIM_RESTARTED)?.execute(params![
                org.as_str(),
                turn.as_bytes(),
                epoch,
                batch.encode()
            ])?;
        }
        let shared = candidate.envelope.mode == SessionMode::Snapshot && candidate.envelope.run_id.is_some();
        let head = match (&candidate.envelope.conversation, candidate.seq) {
            (Some(conversation), Some(_)) if shared => {
                let (generation, run) = self.chain(org, &candidate.agent, conversation)?;
                Some(self.head(org, &candidate.agent, conversation, generation, run)?)
            }
            _ => None,
        };
        let generation = match (&candidate.envelope.conversation, candidate.seq, candidate.envelope.mode) {
            (Some(conversation), Some(_), SessionMode::File) => {
                Some(self.chain(org, &candidate.agent, conversation)?.0)
            }
            _ => None,
        };
        let claimed = self.claimed(candidate, org, turn, epoch, attempt, deadline, None, now.agent_revision, head);
        Ok(Claimed { generation, ..claimed })
    }

    #[allow(clippy::too_many_arguments)]
    fn claimed(
        &self,
        candidate: Candidate,
        org: &OrgId,
        turn: TurnId,
        epoch: Epoch,
        attempt: u32,
        deadline: Timestamp,
        refused: Option<(GateRefusal, u32)>,
        agent_revision: u64,
        head: Option<Head>,
    ) -> Claimed {
        Claimed {
            lease: Lease { org: org.clone(), turn, epoch, deadline },
            envelope: candidate.envelope,
            refused,
            agent: candidate.agent,
            worker: candidate.worker,
            agent_revision,
            user: candidate.user,
            attempt,
            restarted: candidate.first_epoch.is_some(),
            first_epoch: candidate.first_epoch.unwrap_or(epoch),
            message: candidate.message,
            dry_run: candidate.dry_run,
            accepted_at: candidate.accepted_at,
            started_at: self.now,
            seq: candidate.seq,
            head,
            generation: None,
        }
    }

    fn candidate(&self, org: &OrgId, turn: TurnId) -> Tried<Candidate> {
        let mut statement = self.conn.prepare_cached(CLAIM_READ)?;
        let mut rows = statement.query(params![org.as_str(), turn.as_bytes()])?;
        let Some(row) = rows.next()? else {
            return Err(Fault::Corrupt(format!("marker {turn} has no turn")));
        };
        let optional = |column: usize| row.get::<_, Option<String>>(column);
        let mode = match row.get_ref(4)?.as_str() {
            Ok("snapshot") => SessionMode::Snapshot,
            Ok("file") => SessionMode::File,
            other => return Err(Fault::Corrupt(format!("{other:?} is no session mode"))),
        };
        let refusal = match optional(10)?.as_deref() {
            None => None,
            Some("missing_org") => Some(GateRefusal::MissingOrg),
            Some("missing_conversation") => Some(GateRefusal::MissingConversation),
            Some(other) => return Err(Fault::Corrupt(format!("{other:?} is no refusal of the gate"))),
        };
        let worker = match (optional(18)?, row.get::<_, Option<u32>>(19)?) {
            (Some(name), Some(version)) => Some((parsed(&name)?, version)),
            _ => None,
        };
        Ok(Candidate {
            agent: parsed(&row.get::<_, String>(0)?)?,
            envelope: Envelope {
                org: optional(1)?.map(|org| parsed(&org)).transpose()?,
                conversation: optional(2)?.map(|id| parsed(&id)).transpose()?,
                run_id: row.get::<_, Option<[u8; 16]>>(3)?.map(|run| RunId(Uuid::from_bytes(run))),
                mode,
            },
            seq: row.get(5)?,
            stage: row
                .get_ref(6)?
                .as_str()
                .ok()
                .and_then(Stage::parse)
                .ok_or_else(|| Fault::Corrupt("unknown marker state".to_owned()))?,
            epoch: row.get(7)?,
            attempt: row.get(8)?,
            refusals: row.get(9)?,
            refusal,
            deadline: Timestamp(row.get(11)?),
            turn_ms: row.get::<_, i64>(12)?.unsigned_abs(),
            user: parsed(&row.get::<_, String>(13)?)?,
            dry_run: row.get(14)?,
            accepted_at: Timestamp(row.get(15)?),
            message: Bytes::from(row.get::<_, Vec<u8>>(16)?),
            first_epoch: row.get(17)?,
            worker,
        })
    }

    /// Generation and head of a conversation's chain.
    pub(super) fn chain(&self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Tried<(Uuid, Uuid)> {
        let mut statement = self.conn.prepare_cached(HEAD_RUN)?;
        Ok(statement.query_row(params![org.as_str(), agent.as_str(), conversation.as_str()], |row| {
            Ok((uuid(row, 0)?, uuid(row, 1)?))
        })?)
    }

    /// What a turn of this conversation starts from. A head without its row or bytes is told as such: it never silently starts fresh (S6).
    pub(super) fn head(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        generation: Uuid,
        head_run: Uuid,
    ) -> Tried<Head> {
        if head_run == generation {
            return Ok(Head { parent: generation, snapshot: None });
        }
        let mut statement = self.conn.prepare_cached(HEAD_SNAPSHOT)?;
        let mut rows =
            statement.query(params![org.as_str(), agent.as_str(), conversation.as_str(), head_run.as_bytes()])?;
        let Some(row) = rows.next()? else {
            return Err(Fault::Corrupt(format!("run {head_run}, the head of a conversation, has no snapshot")));
        };
        let snapshot = Snapshot {
            run_id: RunId(head_run),
            worker: parsed(row.get_ref(0)?.as_str().unwrap_or_default())?,
            version: row.get(1)?,
            body: row.get::<_, Option<Vec<u8>>>(2)?.map(Bytes::from),
        };
        Ok(Head { parent: head_run, snapshot: Some(snapshot) })
    }
}

/// A stored id.
pub(super) fn parsed<T: std::str::FromStr>(text: &str) -> Tried<T>
where
    T::Err: std::fmt::Display,
{
    text.parse().map_err(|error| Fault::Corrupt(format!("stored id {text:?}: {error}")))
}
