//! What is overdue, and what a crash left standing. The finding reads; ending a turn is the commit's, which decides.

use rusqlite::params;
use sqlx::Row;

use super::SqliteStore;
use super::reads::id;
use super::writer::{Tried, Tx};
use crate::clock::Timestamp;
use crate::gate::GateRefusal;
use crate::ids::{AgentId, ConversationId, OrgId, ReplicaId, TurnId};
use crate::lease::EPOCH_MAX;
use crate::store::{Overdue, OverdueReason, Result, StoreError, SweepFindings};

statements! {
    SWEEP_DEADLINES = "-- sweep_deadlines
SELECT org_id, turn_id, epoch, iif(state = 'ready' AND not_before = 9007199254740991, 'waiting', state) FROM turn_markers WHERE deadline_at <= ?1 ORDER BY deadline_at LIMIT ?2";
    /// What the dead held and may not be run again.
    SWEEP_LOST = "-- sweep_lost
SELECT m.org_id, m.turn_id, m.epoch, iif(m.effects, 'host_lost', 'attempts_exhausted')
  FROM replicas d CROSS JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
 WHERE d.expires_at <= ?1 AND (m.effects = 1 OR m.attempt >= m.attempts_max OR m.epoch >= ?3) AND m.deadline_at > ?1 LIMIT ?2";
    SWEEP_REFUSED = "-- sweep_refused
SELECT org_id, turn_id, epoch, refusal FROM turn_markers WHERE refusals > 0 AND refusals >= ?1 AND state = 'ready' AND deadline_at > ?2 LIMIT ?3";
    /// Handed round for ever: the bound on epochs.
    SWEEP_WORN = "-- sweep_worn
SELECT org_id, turn_id, epoch, 'attempts_exhausted' FROM turn_markers
 WHERE epoch >= 1000000 AND epoch >= ?3 AND state = 'ready' AND deadline_at > ?1 LIMIT ?2";
    /// Lanes with waiting turns and no active one: never seen, but nothing else would mend them. Over the waiting alone, in the order of lanes.
    SWEEP_STUCK = "-- sweep_stuck
SELECT DISTINCT w.org_id, w.agent_id, w.conversation_id FROM turn_markers w INDEXED BY markers_waiting WHERE w.state = 'waiting' AND NOT EXISTS (
  SELECT 1 FROM turn_markers a WHERE a.org_id = w.org_id AND a.agent_id = w.agent_id AND a.conversation_id = w.conversation_id
     AND a.state IN ('ready', 'running') AND a.seq IS NOT NULL) LIMIT ?1";
    SWEEP_ACTIVE = "-- sweep_active
SELECT 1 FROM turn_markers WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND state IN ('ready', 'running') AND seq IS NOT NULL";
    /// Whether a free slot would find something: the same conditions as the claim's.
    SWEEP_READY = "-- sweep_ready
SELECT EXISTS (SELECT 1 FROM turn_markers WHERE state = 'ready' AND not_before <= ?1 AND deadline_at > ?1 AND epoch < ?2)
    OR EXISTS (SELECT 1 FROM replicas d CROSS JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
                WHERE d.expires_at <= ?1 AND m.attempt < m.attempts_max AND m.effects = 0 AND m.deadline_at > ?1 AND m.epoch < ?2)";
    /// Incarnations that are dead and hold nothing any more.
    SWEEP_REPLICAS = "-- sweep_replicas
DELETE FROM replicas WHERE expires_at <= ?1 AND NOT EXISTS (SELECT 1 FROM turn_markers m WHERE m.holder = replica_id AND m.state = 'running')";
    SWEEP_DEAD = "-- sweep_dead
SELECT EXISTS (SELECT 1 FROM replicas WHERE expires_at <= ?1
                  AND NOT EXISTS (SELECT 1 FROM turn_markers m WHERE m.holder = replica_id AND m.state = 'running'))";
    /// On the embedded store no other host lives. Not `<= now` again: who has expired stays expired since then.
    EXPIRE_OTHERS = "-- expire_others
UPDATE replicas SET expires_at = ?2 WHERE replica_id <> ?1 AND expires_at > ?2";
    FORGET_KEYS = "-- forget_keys
DELETE FROM idempotency_keys WHERE (org_id, agent_id, conversation_id, idem_key) IN (
  SELECT org_id, agent_id, conversation_id, idem_key FROM idempotency_keys WHERE created_at < ?1 ORDER BY created_at LIMIT ?2)";
}

impl SqliteStore {
    pub(super) async fn find_overdue(
        &self,
        now: Timestamp,
        gate_refusals_max: u32,
        limit: usize,
    ) -> Result<SweepFindings> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut findings = SweepFindings::default();
        let deadlines = sqlx::query(SWEEP_DEADLINES).bind(now.0).bind(limit);
        let lost = sqlx::query(SWEEP_LOST).bind(now.0).bind(limit).bind(EPOCH_MAX);
        let refused = sqlx::query(SWEEP_REFUSED).bind(gate_refusals_max.max(1)).bind(now.0).bind(limit);
        let worn = sqlx::query(SWEEP_WORN).bind(now.0).bind(limit).bind(EPOCH_MAX);
        for query in [deadlines, lost, refused, worn] {
            for row in query.fetch_all(&self.readers).await? {
                let why = match row.try_get::<&str, _>(3)? {
                    "waiting" => OverdueReason::QueueTimeout,
                    "ready" => OverdueReason::AdmissionTimeout,
                    "running" => OverdueReason::TurnTimeout,
                    "host_lost" => OverdueReason::HostLost,
                    "attempts_exhausted" => OverdueReason::AttemptsExhausted,
                    "missing_org" => OverdueReason::GateRefused(GateRefusal::MissingOrg),
                    "missing_conversation" => OverdueReason::GateRefused(GateRefusal::MissingConversation),
                    other => return Err(StoreError::Corrupt(format!("{other:?} is no reason to end a turn"))),
                };
                let turn = TurnId::from_slice(row.try_get(1)?)
                    .ok_or_else(|| StoreError::Corrupt("a turn id is not 16 bytes".to_owned()))?;
                findings.overdue.push(Overdue { org: id(&row, 0)?, turn, epoch: row.try_get(2)?, why });
            }
        }
        findings.overdue.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        let dead: bool = sqlx::query(SWEEP_DEAD).bind(now.0).fetch_one(&self.readers).await?.try_get(0)?;
        if dead {
            self.write_with(now, |tx| Ok(tx.conn.prepare_cached(SWEEP_REPLICAS)?.execute(params![tx.now.0])?)).await?;
        }
        let ready = sqlx::query(SWEEP_READY).bind(now.0).bind(EPOCH_MAX).fetch_one(&self.readers).await?;
        findings.ready = ready.try_get(0)?;
        Ok(findings)
    }

    pub(super) async fn repair_stuck(&self, now: Timestamp, limit: usize) -> Result<()> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut stuck: Vec<(OrgId, AgentId, ConversationId)> = Vec::new();
        for row in sqlx::query(SWEEP_STUCK).bind(limit).fetch_all(&self.readers).await? {
            stuck.push((id(&row, 0)?, id(&row, 1)?, id(&row, 2)?));
        }
        if stuck.is_empty() {
            return Ok(());
        }
        self.write_with(now, move |tx| tx.repair(&stuck)).await
    }
}

impl Tx<'_> {
    /// Looks again, inside the transaction, and mends.
    fn repair(&mut self, stuck: &[(OrgId, AgentId, ConversationId)]) -> Tried<()> {
        for (org, agent, conversation) in stuck {
            let lane = params![org.as_str(), agent.as_str(), conversation.as_str()];
            if !self.conn.prepare_cached(SWEEP_ACTIVE)?.exists(lane)? && self.promote(org, agent, conversation)? {
                self.release_held(org, agent)?;
                tracing::error!(%org, %agent, %conversation, "a conversation's next turn had not been made ready");
            }
        }
        Ok(())
    }

    pub(super) fn forget_keys(&self, before: Timestamp, limit: usize) -> Tried<usize> {
        Ok(self
            .conn
            .prepare_cached(FORGET_KEYS)?
            .execute(params![before.0, i64::try_from(limit).unwrap_or(i64::MAX)])?)
    }

    /// Expires whoever else is registered.
    pub(super) fn expire_others(&self, except: ReplicaId) -> Tried<u64> {
        Ok(self.conn.prepare_cached(EXPIRE_OTHERS)?.execute(params![except.as_bytes(), self.now.0])? as u64)
    }
}
