//! A message comes in: the facts are read, [`admission::decide`] is asked, and turn, place and marker are written, all in one transaction.
//! Where a slot is held for it, the turn starts in the same write.

use rusqlite::{OptionalExtension, params};
use uuid::Uuid;

use super::agent_load::HELD;
use super::claim::{Start, parsed};
use super::commit::Ending;
use super::counts::Stage;
use super::writer::{Fault, Tried, Tx};
use crate::admission::{self, Decision, Facts, QueueBounds};
use crate::gate::{self, Grant, SessionMode};
use crate::ids::{AgentId, ConversationId, OrgId, TurnId};
use crate::lease::Lease;
use crate::quota::Exceeded;
use crate::store::{Accept, AcceptResult, Claimed, Collect, Ended, Head};
use crate::turn::{CancelledBy, Outcome};

statements! {
    /// One probe for all that admission and a start ask of a lane.
    ACCEPT_LANE = "-- accept_lane
SELECT user_id, generation, head_run, next_seq, deleted_at IS NOT NULL,
       (SELECT m.turn_id FROM turn_markers m WHERE m.org_id = ?1 AND m.agent_id = ?2 AND m.conversation_id = ?3
           AND m.state IN ('ready', 'running') AND m.seq IS NOT NULL),
       (SELECT count(*) FROM turn_markers m WHERE m.org_id = ?1 AND m.agent_id = ?2 AND m.conversation_id = ?3 AND m.state = 'waiting')
  FROM conversations WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3";
    /// The lane's live turns; those that wait first, so that ending them one by one makes none of them ready.
    LANE_LIVE = "-- lane_live
SELECT turn_id, state FROM turn_markers WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND state = 'waiting'
UNION ALL
SELECT turn_id, state FROM turn_markers WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3
   AND state IN ('ready', 'running') AND seq IS NOT NULL";
    /// The stored turn and hash: a mismatch must not look like an attachment.
    ACCEPT_KEY = "-- accept_key
SELECT turn_id, request_hash FROM idempotency_keys WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND idem_key = ?4";
    ACCEPT_KEY_NEW = "-- accept_key_new
INSERT INTO idempotency_keys (org_id, agent_id, conversation_id, idem_key, turn_id, request_hash, created_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    /// No row: it was accepted before, and this is the journal's own retry.
    ACCEPT_TURN = "-- accept_turn
INSERT INTO turns (org_id, turn_id, agent_id, conversation_id, seq, run_id, private, user_id, dry_run, accepted_at, message,
                   first_epoch, started_at, worker, version)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)
ON CONFLICT (org_id, turn_id) DO NOTHING";
    /// The last that waits in a lane, if it collects.
    ACCEPT_JOINS = "-- accept_joins
SELECT m.turn_id, m.collected, t.message,
       (SELECT coalesce(sum(a.bytes), 0) FROM attachment_refs f JOIN attachments a ON a.org_id = f.org_id AND a.digest = f.digest
         WHERE f.org_id = m.org_id AND f.turn_id = m.turn_id)
  FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id
 WHERE m.org_id = ?1 AND m.agent_id = ?2 AND m.conversation_id = ?3 AND m.state = 'waiting' AND t.dry_run = ?4
   AND m.seq = (SELECT max(l.seq) FROM turn_markers l WHERE l.org_id = ?1 AND l.agent_id = ?2 AND l.conversation_id = ?3 AND l.state = 'waiting')";
    JOIN_MESSAGE = "-- join_message
UPDATE turns SET message = ?3 WHERE org_id = ?1 AND turn_id = ?2";
    JOIN_MARKER = "-- join_marker
UPDATE turn_markers SET collected = collected + ?3 WHERE org_id = ?1 AND turn_id = ?2";
    ACCEPT_KNOWN = "-- accept_known
SELECT 1 FROM turns WHERE org_id = ?1 AND turn_id = ?2";
    /// A conversation begins with its first turn. One that was deleted begins again: another owner, another root, places go on.
    LANE_NEW = "-- lane_new
INSERT INTO conversations (org_id, agent_id, conversation_id, user_id, created_at, next_seq, generation, head_run)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7)
ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE
   SET user_id = excluded.user_id, created_at = excluded.created_at, deleted_at = NULL, next_seq = max(next_seq, excluded.next_seq)";
    ACCEPT_SEQ = "-- accept_seq
UPDATE conversations SET next_seq = ?4 + 1 WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND next_seq = ?4";
    ACCEPT_MARKER = "-- accept_marker
INSERT INTO turn_markers (org_id, turn_id, agent_id, env_org, conversation_id, run_id, mode, seq, state, epoch, attempt, attempts_max, holder,
                          not_before, deadline_at, admission_ms, turn_ms, collected)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)";
}

/// A conversation's row, and who is live in it.
pub(super) struct Lane {
    pub(super) user: String,
    pub(super) generation: Uuid,
    pub(super) head_run: Uuid,
    pub(super) next_seq: i64,
    pub(super) deleted: bool,
    pub(super) active: Option<TurnId>,
    pub(super) waiting: usize,
}

/// `0`: places begin at 1.
const FIRST_SEQ: i64 = 1;

impl Tx<'_> {
    pub(super) fn accept(&mut self, accept: &Accept) -> Tried<AcceptResult> {
        let (org, agent, turn) = (&accept.org, &accept.agent, accept.turn);
        let envelope = &accept.envelope;
        let conversation = envelope.conversation.as_ref();
        let lane = match conversation {
            Some(conversation) => self.lane(org, agent, conversation)?,
            None => None,
        };
        // Only an envelope that names its org and its conversation has a place in one.
        let laned = conversation.filter(|_| envelope.org.is_some());
        let key_scope = conversation.map_or("", ConversationId::as_str);
        let keyed = match &accept.key {
            Some((key, hash)) => self
                .conn
                .prepare_cached(ACCEPT_KEY)?
                .query_row(params![org.as_str(), agent.as_str(), key_scope, key], |row| {
                    Ok((uuid(row, 0)?, row.get_ref(1)?.as_blob()? == hash))
                })
                .optional()?
                .map(|(turn, same)| (TurnId(turn), same)),
            None => None,
        };
        // A turn belongs to whom its conversation belongs to, also when an admin speaks in it.
        let user = match &lane {
            Some(lane) if laned.is_some() && !lane.deleted => parsed(&lane.user)?,
            _ => accept.user.clone(),
        };
        let limited = self.limited(org)?;
        let load = self.agent_load(org, agent)?;
        let bounds = QueueBounds {
            org_queue_max: limited.own.queue_max.map_or(accept.bounds.org_queue_max, |max| max as usize),
            ..accept.bounds
        };
        let mut facts = Facts {
            foreign: lane
                .as_ref()
                .is_some_and(|lane| !lane.deleted && lane.user != accept.user.as_str() && !accept.sees_all),
            keyed,
            attachment_missing: self.misses_attachment(accept)?,
            lane_live: 0,
            lane_active: None,
            joins: None,
            exceeded: None,
            agent_queue: load.as_ref().and_then(|load| Some((load.live as usize, load.own.queue_max? as usize))),
            org_live: self.counts.org(org).live(),
            host_live: self.counts.host().live(),
        };
        if let (Some(conversation), Some(lane)) = (laned, &lane) {
            facts.lane_live = lane.waiting + usize::from(lane.active.is_some());
            facts.lane_active = lane.active;
            if lane.active.is_none() && lane.waiting > 0 {
                facts.lane_active = self.lane_live(org, agent, conversation)?.first().copied();
            }
        }
        let open = match (laned, &accept.collect) {
            (Some(conversation), Some(collect)) if facts.lane_live > 0 => {
                self.open_turn(accept, conversation, collect)?
            }
            _ => None,
        };
        facts.joins = open.as_ref().map(|(turn, _)| *turn);
        let exceeded = limited.meters.exceeded(&self.quota.narrowed(&limited.own), self.now).or_else(|| {
            let load = load.as_ref()?;
            load.meters.exceeded(&load.quota(), self.now).map(Exceeded::of_the_agent)
        });
        // What was accepted before is not refused: this is the journal's own retry.
        if exceeded.is_some() && !self.is_known(org, turn)? {
            facts.exceeded = exceeded;
        }
        let interrupt = match admission::decide(&facts, accept.on_busy, &bounds) {
            Err(refusal) => return Ok(AcceptResult::Refused(refusal)),
            Ok(Decision::Attach(turn)) => return Ok(AcceptResult::Attached(turn)),
            Ok(Decision::Join(turn)) => {
                let (_, message) = open.expect("it was found");
                self.join(accept, turn, &message)?;
                self.refer(accept, turn, user.as_str())?;
                self.take_token(org)?;
                self.agent_takes(org, agent, None)?;
                return Ok(AcceptResult::Joined(turn));
            }
            Ok(Decision::Accept { interrupt }) => interrupt,
        };
        let mut interrupted = Vec::new();
        if let (true, Some(conversation)) = (interrupt, laned) {
            // Its own retry must not interrupt itself.
            if self.is_known(org, turn)? {
                return Ok(AcceptResult::Attached(turn));
            }
            interrupted = self.end_lane(org, agent, conversation, CancelledBy::Interrupt)?;
        }
        let behind = facts.lane_live > 0 && !interrupt;
        let seq = laned.map(|_| lane.as_ref().map_or(FIRST_SEQ, |lane| lane.next_seq));
        let grant = gate::decide(envelope);
        let held = !behind && self.agent_load(org, agent)?.is_some_and(|load| load.is_full());

        let start = match accept.claim_for {
            Some((holder, bound))
                if !behind
                    && !held
                    && grant.is_ok()
                    && self.has_room(org, bound.0)?
                    && self.may_claim(holder)?
                    && !self.is_older_ready(bound.0)? =>
            {
                Some(Start::new(self, org, agent, holder)?)
            }
            _ => None,
        };
        let stage = match (&start, behind) {
            (Some(_), _) => Stage::Running,
            (None, true) => Stage::Waiting,
            (None, false) => Stage::Ready,
        };
        let deadline = self.now.plus_ms(match stage {
            _ if held => accept.clocks.queue_timeout_ms,
            Stage::Waiting => accept.clocks.queue_timeout_ms,
            Stage::Ready => accept.clocks.admission_timeout_ms,
            Stage::Running => accept.clocks.turn_timeout_ms,
        });
        let collects = accept.collect.as_ref().filter(|_| stage == Stage::Waiting).map(|collect| &collect.message);
        let epoch = u32::from(start.is_some());
        let run_id = envelope.run_id.as_ref().map(|run| run.as_bytes());
        let worker = start.as_ref().and_then(|start| start.worker.as_ref());
        let new = self.conn.prepare_cached(ACCEPT_TURN)?.execute(params![
            org.as_str(),
            turn.as_bytes(),
            agent.as_str(),
            conversation.map(ConversationId::as_str),
            seq,
            run_id,
            !matches!(grant, Ok(Grant::Shared(_)) | Err(_)),
            user.as_str(),
            accept.dry_run,
            self.now.0,
            collects.map_or(&accept.message[..], |message| &message.whole[..]),
            start.as_ref().map(|_| epoch),
            start.as_ref().map(|_| self.now.0),
            worker.map(|(name, _)| name.as_str()),
            worker.map(|(_, version)| version),
        ])?;
        if new == 0 {
            return Ok(AcceptResult::Attached(turn));
        }
        self.take_token(org)?;
        self.agent_takes(org, agent, Some(!behind && !held))?;
        let mut head_run = None;
        if let (Some(conversation), Some(seq)) = (laned, seq) {
            head_run = self.take_place(accept, conversation, lane.as_ref(), seq)?;
        }
        self.remember_key(accept, turn)?;
        self.refer(accept, turn, user.as_str())?;
        self.conn.prepare_cached(ACCEPT_MARKER)?.execute(params![
            org.as_str(),
            turn.as_bytes(),
            agent.as_str(),
            envelope.org.as_ref().map(OrgId::as_str),
            conversation.map(ConversationId::as_str),
            run_id,
            envelope.mode.as_str(),
            seq,
            stage.as_str(),
            epoch,
            accept.attempts_max,
            start.as_ref().map(|start| start.holder.as_bytes()),
            if held { HELD.0 } else { self.now.0 },
            deadline.0,
            millis(accept.clocks.admission_timeout_ms),
            millis(accept.clocks.turn_timeout_ms),
            collects.map_or(0, |message| message.parts),
        ])?;
        self.shift(org, None, Some(stage));
        let claimed = match start {
            None => None,
            Some(start) => {
                let head: Option<Head> = match (&grant, head_run, laned) {
                    (Ok(Grant::Shared(_)), Some((generation, head_run)), Some(conversation)) => {
                        Some(self.head(org, agent, conversation, generation, head_run)?)
                    }
                    _ => None,
                };
                Some(Box::new(Claimed {
                    lease: Lease { org: org.clone(), turn, epoch, deadline },
                    envelope: envelope.clone(),
                    refused: None,
                    agent: agent.clone(),
                    worker: start.worker,
                    agent_revision: start.agent_revision,
                    user,
                    attempt: 1,
                    restarted: false,
                    first_epoch: epoch,
                    message: accept.message.clone(),
                    dry_run: accept.dry_run,
                    accepted_at: self.now,
                    started_at: self.now,
                    seq,
                    head,
                    generation: head_run
                        .filter(|_| envelope.mode == SessionMode::File)
                        .map(|(generation, _)| generation),
                }))
            }
        };
        Ok(AcceptResult::Accepted { interrupted, claimed })
    }

    fn is_known(&self, org: &OrgId, turn: TurnId) -> Tried<bool> {
        Ok(self.conn.prepare_cached(ACCEPT_KNOWN)?.exists(params![org.as_str(), turn.as_bytes()])?)
    }

    /// The turn that this message may join, and that turn's message.
    fn open_turn(
        &self,
        accept: &Accept,
        conversation: &ConversationId,
        collect: &Collect,
    ) -> Tried<Option<(TurnId, Vec<u8>)>> {
        let mut statement = self.conn.prepare_cached(ACCEPT_JOINS)?;
        let lane = params![accept.org.as_str(), accept.agent.as_str(), conversation.as_str(), accept.dry_run];
        let last = statement.query_row(lane, |row| {
            let (message, files_bytes) = (row.get::<_, Vec<u8>>(2)?, row.get::<_, i64>(3)?);
            let fits = collect.fits(row.get(1)?, message.len(), files_bytes.unsigned_abs());
            Ok(fits.then_some((TurnId(uuid(row, 0)?), message)))
        });
        Ok(last.optional()?.flatten())
    }

    /// Makes a message part of a turn that waits.
    fn join(&self, accept: &Accept, turn: TurnId, message: &[u8]) -> Tried<()> {
        let Some(collect) = &accept.collect else { return Ok(()) };
        let org = accept.org.as_str();
        let joined = collect.message.join(message);
        self.conn.prepare_cached(JOIN_MESSAGE)?.execute(params![org, turn.as_bytes(), joined])?;
        self.conn.prepare_cached(JOIN_MARKER)?.execute(params![org, turn.as_bytes(), collect.message.adds()])?;
        self.remember_key(accept, turn)
    }

    /// The same request again is this turn.
    fn remember_key(&self, accept: &Accept, turn: TurnId) -> Tried<()> {
        let Some((key, hash)) = &accept.key else { return Ok(()) };
        self.conn.prepare_cached(ACCEPT_KEY_NEW)?.execute(params![
            accept.org.as_str(),
            accept.agent.as_str(),
            accept.envelope.conversation.as_ref().map_or("", ConversationId::as_str),
            key,
            turn.as_bytes(),
            &hash[..],
            self.now.0
        ])?;
        Ok(())
    }

    /// A conversation's row, also that of a deleted one.
    pub(super) fn lane(&self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Tried<Option<Lane>> {
        let mut statement = self.conn.prepare_cached(ACCEPT_LANE)?;
        let lane = statement.query_row(params![org.as_str(), agent.as_str(), conversation.as_str()], |row| {
            Ok(Lane {
                user: row.get(0)?,
                generation: uuid(row, 1)?,
                head_run: uuid(row, 2)?,
                next_seq: row.get(3)?,
                deleted: row.get(4)?,
                active: row.get_ref(5)?.as_blob_or_null()?.and_then(TurnId::from_slice),
                waiting: row.get::<_, u32>(6)? as usize,
            })
        });
        Ok(lane.optional()?)
    }

    fn lane_live(&self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Tried<Vec<TurnId>> {
        let mut statement = self.conn.prepare_cached(LANE_LIVE)?;
        let rows = statement
            .query_map(params![org.as_str(), agent.as_str(), conversation.as_str()], |row| Ok(TurnId(uuid(row, 0)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Ends every live turn of a lane.
    pub(super) fn end_lane(
        &mut self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        by: CancelledBy,
    ) -> Tried<Vec<Ended>> {
        let live = self.lane_live(org, agent, conversation)?;
        let outcome = Outcome::Cancelled { by };
        live.into_iter().filter_map(|turn| self.end(&Ending::of(org, turn, &outcome)).transpose()).collect()
    }

    /// Gives out `seq`; generation and head of the chain.
    fn take_place(
        &mut self,
        accept: &Accept,
        conversation: &ConversationId,
        lane: Option<&Lane>,
        seq: i64,
    ) -> Tried<Option<(Uuid, Uuid)>> {
        let (org, agent) = (&accept.org, &accept.agent);
        match lane {
            Some(lane) if !lane.deleted => {
                let given = self.conn.prepare_cached(ACCEPT_SEQ)?.execute(params![
                    org.as_str(),
                    agent.as_str(),
                    conversation.as_str(),
                    seq
                ])?;
                if given != 1 {
                    return Err(Fault::Corrupt(format!("place {seq} of a conversation was given out twice")));
                }
                Ok(Some((lane.generation, lane.head_run)))
            }
            _ => {
                let generation = lane.map_or_else(Uuid::now_v7, |lane| lane.generation);
                self.begin_lane(org, agent, conversation, accept.user.as_str(), seq + 1, generation)?;
                Ok(Some((generation, generation)))
            }
        }
    }

    /// Makes a lane, or begins a deleted one again.
    pub(super) fn begin_lane(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        user: &str,
        next_seq: i64,
        generation: Uuid,
    ) -> Tried<()> {
        self.conn.prepare_cached(LANE_NEW)?.execute(params![
            org.as_str(),
            agent.as_str(),
            conversation.as_str(),
            user,
            self.now.0,
            next_seq,
            generation.as_bytes()
        ])?;
        Ok(())
    }
}

/// A UUID's 16 bytes.
pub(super) fn uuid(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Uuid> {
    row.get::<_, [u8; 16]>(column).map(Uuid::from_bytes)
}

/// Milliseconds as SQLite counts them; small enough that a sum with a time is still an integer.
pub(super) fn millis(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX).min(1 << 52)
}
