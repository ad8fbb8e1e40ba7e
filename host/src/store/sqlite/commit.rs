//! The one way in which a turn ends. Success, failure, cancel, interrupt, deadline and lost host all come through [`Tx::end`]: whoever deletes
//! the marker has ended the turn, and everything else of the end stands in the same transaction. No other function deletes markers (S9).

use rusqlite::{OptionalExtension, params};
use uuid::Uuid;

use super::accept::uuid;
use super::agent_load::HELD;
use super::claim::parsed;
use super::counts::Stage;
use super::writer::{Fault, Tried, Tx};
use crate::clock::Timestamp;
use crate::event::EventBatch;
use crate::ids::{AgentId, ConversationId, OrgId, RunId, TurnId};
use crate::lease::Epoch;
use crate::store::{Commit, CommitResult, Ended, StagedSnapshot};
use crate::turn::{Outcome, Usage};

/// A longer tail goes to the log, so that a turn's row stays a row.
const TAIL_BYTES_MAX: usize = 16 * 1024;

statements! {
    /// The marker decides; epoch and permit are tested against what it says now.
    COMMIT_ELECT = "-- commit_elect
SELECT m.agent_id, m.conversation_id, m.run_id, m.mode, m.seq, m.state, m.epoch, m.attempt, t.accepted_at, t.worker, t.version, m.not_before
  FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id
 WHERE m.org_id = ?1 AND m.turn_id = ?2";
    COMMIT_TURN = "-- commit_turn
UPDATE turns SET outcome = ?3, ended_at = ?4, end_epoch = ?5, attempts = ?6, reply = ?7, replaces_deltas = ?8, failure = ?9, cancelled_by = ?10,
       cpu_ms = ?11, wall_ms = ?12, memory_peak_bytes = ?13, host_calls = ?14, tail_seq = ?15, tail = ?16, bytes_in = ?17, bytes_out = ?18, instance_ms = ?19
 WHERE org_id = ?1 AND turn_id = ?2 AND outcome IS NULL";
    COMMIT_TAIL = "-- commit_tail
INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT (org_id, turn_id, epoch, first_seq) DO NOTHING";
    /// The election itself.
    COMMIT_DELETE = "-- commit_delete
DELETE FROM turn_markers WHERE org_id = ?1 AND turn_id = ?2 AND epoch = ?3";
    /// The lane's next, by place; its admission clock begins anew (T5).
    PROMOTE = "-- promote
UPDATE turn_markers SET state = 'ready', not_before = iif(?5, 9007199254740991, ?4), deadline_at = iif(?5, deadline_at, ?4 + admission_ms)
 WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND state = 'waiting'
   AND seq = (SELECT min(w.seq) FROM turn_markers w WHERE w.org_id = ?1 AND w.agent_id = ?2 AND w.conversation_id = ?3 AND w.state = 'waiting')";
    /// The head, and which runs still have their bytes.
    SNAPSHOT_CHAIN = "-- snapshot_chain
SELECT head_run, generation, kept_runs FROM conversations WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3";
    SNAPSHOT_KNOWN = "-- snapshot_known
SELECT 1 FROM snapshots WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND run_id = ?4";
    SNAPSHOT_NEW = "-- snapshot_new
INSERT INTO snapshots (org_id, agent_id, conversation_id, run_id, parent_run, turn_id, worker, version, at, body)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
    SNAPSHOT_HEAD = "-- snapshot_head
UPDATE conversations SET head_run = ?5, kept_runs = ?6
 WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND head_run = ?4";
    /// The row stays: it is a link of the chain.
    SNAPSHOT_DROP = "-- snapshot_drop
UPDATE snapshots SET body = NULL WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND run_id = ?4";
}

/// How a turn is to end.
pub(super) struct Ending<'a> {
    org: &'a OrgId,
    turn: TurnId,
    epoch: Option<Epoch>,
    outcome: &'a Outcome,
    tail: Option<&'a EventBatch>,
    usage: Option<Usage>,
}

impl<'a> Ending<'a> {
    /// Whatever the epoch is, and without anything that only its runner knows.
    pub(super) fn of(org: &'a OrgId, turn: TurnId, outcome: &'a Outcome) -> Ending<'a> {
        Ending { org, turn, epoch: None, outcome, tail: None, usage: None }
    }
}

/// The marker at the moment of the election, and what its turn's row adds.
struct Elected {
    agent: AgentId,
    conversation: Option<ConversationId>,
    run_id: Option<Uuid>,
    shares: bool,
    seq: Option<i64>,
    stage: Stage,
    /// Ready, and its agent has no room for it.
    held: bool,
    epoch: Epoch,
    attempt: u32,
    accepted_at: Timestamp,
    worker: Option<(String, u32)>,
}

impl Tx<'_> {
    pub(super) fn end_turn(&mut self, commit: &Commit) -> Tried<CommitResult> {
        let ending = Ending {
            org: &commit.org,
            turn: commit.turn,
            epoch: commit.epoch,
            outcome: &commit.outcome,
            tail: Some(&commit.tail).filter(|tail| !tail.is_empty()),
            usage: commit.usage,
        };
        let Some(elected) = self.elect(&ending)? else { return Ok(CommitResult::Lost) };
        if let Some(staged) = &commit.snapshot
            && !self.write_snapshot(&ending, &elected, staged)?
        {
            return Ok(CommitResult::SnapshotConflict);
        }
        Ok(CommitResult::Won(Box::new(self.finish(&ending, elected)?)))
    }

    /// Ends a turn that is still live; `None` when it is not, or has another epoch.
    pub(super) fn end(&mut self, ending: &Ending<'_>) -> Tried<Option<Ended>> {
        match self.elect(ending)? {
            Some(elected) => self.finish(ending, elected).map(Some),
            None => Ok(None),
        }
    }

    fn elect(&self, ending: &Ending<'_>) -> Tried<Option<Elected>> {
        let mut statement = self.conn.prepare_cached(COMMIT_ELECT)?;
        let mut rows = statement.query(params![ending.org.as_str(), ending.turn.as_bytes()])?;
        let Some(row) = rows.next()? else { return Ok(None) };
        let epoch: Epoch = row.get(6)?;
        let stage = row.get_ref(5)?.as_str().ok().and_then(Stage::parse);
        let stage = stage.ok_or_else(|| Fault::Corrupt("unknown marker state".to_owned()))?;
        // A reply comes only from an instance, and only a running turn has one.
        let replies = matches!(ending.outcome, Outcome::Completed { .. });
        if ending.epoch.is_some_and(|held| held != epoch)
            || (replies && (stage != Stage::Running || ending.epoch.is_none()))
        {
            return Ok(None);
        }
        let run_id: Option<[u8; 16]> = row.get(2)?;
        let conversation: Option<String> = row.get(1)?;
        let worker: Option<String> = row.get(9)?;
        Ok(Some(Elected {
            agent: parsed(row.get_ref(0)?.as_str().unwrap_or_default())?,
            conversation: conversation.map(|id| parsed(&id)).transpose()?,
            run_id: run_id.map(Uuid::from_bytes),
            shares: row.get_ref(3)?.as_str() == Ok("snapshot"),
            seq: row.get(4)?,
            stage,
            held: stage == Stage::Ready && row.get::<_, i64>(11)? == HELD.0,
            epoch,
            attempt: row.get(7)?,
            accepted_at: Timestamp(row.get(8)?),
            worker: worker.zip(row.get(10)?),
        }))
    }

    /// Writes the end, deletes the marker and makes the conversation's next turn ready. The only function that deletes markers.
    fn finish(&mut self, ending: &Ending<'_>, elected: Elected) -> Tried<Ended> {
        let (org, turn) = (ending.org, ending.turn);
        let mut tail = ending.tail.map(|tail| (tail.first_seq, tail.encode()));
        if let Some((first_seq, body)) = tail.take_if(|(_, body)| body.len() > TAIL_BYTES_MAX) {
            self.conn.prepare_cached(COMMIT_TAIL)?.execute(params![
                org.as_str(),
                turn.as_bytes(),
                elected.epoch,
                first_seq,
                body
            ])?;
        }
        let (mut reply, mut replaces, mut failure, mut cancelled_by) = (None, None, None, None);
        match ending.outcome {
            Outcome::Completed { reply: content, replaces_deltas } => {
                reply = Some(json(content)?);
                replaces = Some(*replaces_deltas);
            }
            Outcome::Failed(why) => failure = Some(String::from_utf8_lossy(&json(why)?).into_owned()),
            Outcome::Cancelled { by } => cancelled_by = Some(by.as_str()),
        }
        let ended = self.conn.prepare_cached(COMMIT_TURN)?.execute(params![
            org.as_str(),
            turn.as_bytes(),
            ending.outcome.state().as_str(),
            self.now.0,
            elected.epoch,
            elected.attempt,
            reply,
            replaces,
            failure,
            cancelled_by,
            ending.usage.map(|usage| usage.cpu_ms),
            ending.usage.map(|usage| usage.wall_ms),
            ending.usage.map(|usage| count(usage.memory_peak_bytes)),
            ending.usage.map(|usage| count(usage.host_calls)),
            tail.as_ref().map(|(first_seq, _)| first_seq),
            tail.as_ref().map(|(_, body)| body),
            ending.usage.map(|usage| count(usage.bytes_in)),
            ending.usage.map(|usage| count(usage.bytes_out)),
            ending.usage.map(|usage| usage.instance_ms),
        ])?;
        crate::kill_point::pass("mid_commit");
        let deleted =
            self.conn.prepare_cached(COMMIT_DELETE)?.execute(params![org.as_str(), turn.as_bytes(), elected.epoch])?;
        if (ended, deleted) != (1, 1) {
            return Err(Fault::Corrupt(format!("turn {turn} ended {ended} times and its marker {deleted} times")));
        }
        self.shift(org, Some(elected.stage), None);
        if let Some(usage) = ending.usage {
            self.use_cpu(org, usage.cpu_ms)?;
        }
        let load = self.agent_load(org, &elected.agent)?;
        if let Some(mut load) = load.clone() {
            load.live = load.live.saturating_sub(1);
            load.active = load.active.saturating_sub(u64::from(elected.stage != Stage::Waiting && !elected.held));
            if let Some(usage) = ending.usage {
                let quota = load.quota();
                load.meters.use_cpu(&quota, usage.cpu_ms, self.now);
            }
            self.set_agent_load(org, &elected.agent, &load)?;
        }
        let mut promoted = match (&elected.conversation, elected.seq, elected.stage) {
            // Mostly nobody waits, and then there is nobody to look for.
            (Some(conversation), Some(_), Stage::Ready | Stage::Running) if self.counts.org(org).waiting > 0 => {
                self.promote(org, &elected.agent, conversation)?
            }
            _ => false,
        };
        if load.is_some() {
            // Also what was just made ready is held until there is room for it.
            promoted = self.release_held(org, &elected.agent)?;
        }
        Ok(Ended {
            org: org.clone(),
            turn,
            agent: elected.agent,
            outcome: ending.outcome.clone(),
            usage: ending.usage,
            was_running: elected.stage == Stage::Running,
            accepted_at: elected.accepted_at,
            ended_at: self.now,
            promoted,
        })
    }

    /// Makes the next turn of a lane ready that has no active one. Of an agent with bounds it is held, until [`Tx::release_held`] has found room.
    pub(super) fn promote(&mut self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Tried<bool> {
        let held = self.agent_load(org, agent)?.is_some();
        let promoted = self.conn.prepare_cached(PROMOTE)?.execute(params![
            org.as_str(),
            agent.as_str(),
            conversation.as_str(),
            self.now.0,
            held
        ])? == 1;
        if promoted {
            self.shift(org, Some(Stage::Waiting), Some(Stage::Ready));
        }
        Ok(promoted)
    }

    /// `false`: it may not be written, or not on this head.
    fn write_snapshot(&mut self, ending: &Ending<'_>, elected: &Elected, staged: &StagedSnapshot) -> Tried<bool> {
        let permit = &staged.permit;
        let (Some(conversation), Some(_), Some(run), Some((worker, version))) =
            (&elected.conversation, elected.seq, elected.run_id, &elected.worker)
        else {
            return Ok(false);
        };
        let granted = elected.shares
            && matches!(ending.outcome, Outcome::Completed { .. })
            && permit.run_id() == RunId(run)
            && permit.org() == ending.org
            && permit.conversation() == conversation;
        if !granted {
            return Ok(false);
        }
        let (org, agent, id) = (ending.org.as_str(), elected.agent.as_str(), conversation.as_str());
        let chain = self
            .conn
            .prepare_cached(SNAPSHOT_CHAIN)?
            .query_row(params![org, agent, id], |row| Ok((uuid(row, 0)?, uuid(row, 1)?, row.get::<_, Vec<u8>>(2)?)))
            .optional()?;
        let Some((head, generation, mut kept)) = chain else { return Ok(false) };
        if head != staged.parent || run == head || run == generation {
            return Ok(false);
        }
        if self.conn.prepare_cached(SNAPSHOT_KNOWN)?.exists(params![org, agent, id, run.as_bytes()])? {
            return Ok(false);
        }
        self.conn.prepare_cached(SNAPSHOT_NEW)?.execute(params![
            org,
            agent,
            id,
            run.as_bytes(),
            head.as_bytes(),
            ending.turn.as_bytes(),
            worker,
            version,
            self.now.0,
            &staged.body[..]
        ])?;
        kept.extend_from_slice(run.as_bytes());
        // More than one when the bound was lowered since.
        let surplus = kept.len().saturating_sub(self.snapshots_kept.saturating_mul(16));
        for old in kept.drain(..surplus).as_slice().chunks_exact(16) {
            self.conn.prepare_cached(SNAPSHOT_DROP)?.execute(params![org, agent, id, old])?;
        }
        let moved = self.conn.prepare_cached(SNAPSHOT_HEAD)?.execute(params![
            org,
            agent,
            id,
            head.as_bytes(),
            run.as_bytes(),
            kept
        ])?;
        if moved != 1 {
            return Err(Fault::Corrupt("a conversation's head moved inside the transaction that moves it".to_owned()));
        }
        Ok(true)
    }
}

fn count(of: u64) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}

fn json<T: serde::Serialize>(value: &T) -> Tried<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Fault::Corrupt(error.to_string()))
}
