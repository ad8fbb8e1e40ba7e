//! What is overdue, and what a crash left standing. The finding reads without a lock; ending a turn is the commit's, which decides.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;
use uuid::Uuid;

use super::reads::{id, limit as rows_max, small};
use super::{ANSWER_TIMEOUT, PostgresStore, silent};
use crate::clock::Timestamp;
use crate::gate::GateRefusal;
use crate::ids::{AgentId, ConversationId, OrgId, TurnId};
use crate::lease::EPOCH_MAX;
use crate::store::{LiveCounts, Overdue, OverdueReason, Result, StoreError, SweepFindings};

/// Dead rows of the table of live turns from which a sweep vacuums it: about a megabyte with the indexes.
pub(super) const DEAD_MAX: i64 = 5_000;

/// Rest between two times at least.
const VACUUM_REST: Duration = Duration::from_secs(1);

statements! {
    /// $1 the time, $2 how many, $3 the gate's refusals, $4 the bound on epochs: past their deadlines; what the dead held and may not be run again; what the
    /// gate refused too often; what was handed round for ever. Each part in its own order of an index, and the first of all in the order of deadlines.
    SWEEP_OVERDUE = "-- sweep_overdue
WITH n AS MATERIALIZED (SELECT coalesce($1::bigint, turnhouse_now()) AS now)
(SELECT m.org_id, m.turn_id, m.epoch, CASE WHEN m.state = 'ready' AND m.not_before = 9007199254740991 THEN 'waiting' ELSE m.state END
   FROM turn_markers m WHERE m.deadline_at <= (SELECT now FROM n) ORDER BY m.deadline_at LIMIT $2)
UNION ALL
(SELECT m.org_id, m.turn_id, m.epoch, CASE WHEN m.effects THEN 'host_lost' ELSE 'attempts_exhausted' END
   FROM replicas d JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
  WHERE d.expires_at <= (SELECT now FROM n) AND (m.effects OR m.attempt >= m.attempts_max OR m.epoch >= $4) AND m.deadline_at > (SELECT now FROM n) LIMIT $2)
UNION ALL
(SELECT m.org_id, m.turn_id, m.epoch, m.refusal FROM turn_markers m
  WHERE m.refusals > 0 AND m.refusals >= $3 AND m.state = 'ready' AND m.deadline_at > (SELECT now FROM n) LIMIT $2)
UNION ALL
(SELECT m.org_id, m.turn_id, m.epoch, 'attempts_exhausted' FROM turn_markers m
  WHERE m.epoch >= 1000000 AND m.epoch >= $4 AND m.state = 'ready' AND m.deadline_at > (SELECT now FROM n) LIMIT $2)";
    /// Lanes with waiting turns and no active one: never seen, but nothing else would mend them.
    SWEEP_STUCK = "-- sweep_stuck
SELECT DISTINCT w.org_id, w.agent_id, w.conversation_id FROM turn_markers w WHERE w.state = 'waiting' AND NOT EXISTS (
  SELECT 1 FROM turn_markers a WHERE a.org_id = w.org_id AND a.agent_id = w.agent_id AND a.conversation_id = w.conversation_id
     AND a.state IN ('ready', 'running') AND a.seq IS NOT NULL) LIMIT $1";
    SWEEP_REPAIR = "-- sweep_repair
SELECT repair_lane($1::bigint, $2, $3, $4)";
    /// Whether a free slot would find something: the same conditions as the claim's.
    SWEEP_READY = "-- sweep_ready
WITH n AS MATERIALIZED (SELECT coalesce($1::bigint, turnhouse_now()) AS now)
SELECT EXISTS (SELECT 1 FROM turn_markers m
                WHERE m.state = 'ready' AND m.not_before <= (SELECT now FROM n) AND m.deadline_at > (SELECT now FROM n) AND m.epoch < $2)
    OR EXISTS (SELECT 1 FROM replicas d JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
                WHERE d.expires_at <= (SELECT now FROM n) AND m.attempt < m.attempts_max AND NOT m.effects AND m.deadline_at > (SELECT now FROM n) AND m.epoch < $2)";
    /// Incarnations that are long dead and hold nothing any more. Long: a claim that was under way when they died has ended since, so that none of its
    /// markers names a holder whom nobody knows.
    SWEEP_REPLICAS = "-- sweep_replicas
DELETE FROM replicas d WHERE d.expires_at <= coalesce($1::bigint, turnhouse_now()) - 60000
   AND NOT EXISTS (SELECT 1 FROM turn_markers m WHERE m.holder = d.replica_id AND m.state = 'running')";
    FORGET_KEYS = "-- forget_keys
DELETE FROM idempotency_keys WHERE (org_id, agent_id, conversation_id, idem_key) IN (
  SELECT org_id, agent_id, conversation_id, idem_key FROM idempotency_keys WHERE created_at < $1 ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)";
    /// Dead rows of the table of live turns; none where this role may not vacuum it.
    SWEEP_DEAD = "-- sweep_dead
SELECT CASE WHEN pg_has_role(c.relowner, 'USAGE') THEN pg_stat_get_dead_tuples(c.oid) ELSE 0 END FROM pg_class c WHERE c.oid = 'turn_markers'::regclass";
    /// Never cut short: that would need the table for itself.
    SWEEP_VACUUM = "-- sweep_vacuum
VACUUM (SKIP_LOCKED, TRUNCATE false, PARALLEL 0) turn_markers";
    LIVE = "-- live
SELECT coalesce(sum(waiting), 0)::bigint, coalesce(sum(ready), 0)::bigint, coalesce(sum(running), 0)::bigint FROM org_load";
}

impl PostgresStore {
    pub(super) async fn find_overdue(
        &self,
        now: Timestamp,
        gate_refusals_max: u32,
        limit: usize,
    ) -> Result<SweepFindings> {
        let at = self.clock.of(now);
        let epoch_max = i32::try_from(EPOCH_MAX).unwrap_or(i32::MAX);
        let refusals_max = i32::try_from(gate_refusals_max.max(1)).unwrap_or(i32::MAX);
        let mut findings = SweepFindings::default();
        let asked = self.query(SWEEP_OVERDUE).bind(at).bind(rows_max(limit)).bind(refusals_max).bind(epoch_max);
        for row in self.rows_hostwide(asked).await? {
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
            let turn = TurnId(row.try_get::<Uuid, _>(1)?);
            findings.overdue.push(Overdue { org: id(&row, 0)?, turn, epoch: small(&row, 2)?, why });
        }
        findings.overdue.truncate(limit);
        self.change_hostwide(self.query(SWEEP_REPLICAS).bind(at)).await?;
        if let Err(error) = self.vacuum_markers().await {
            tracing::warn!(%error, "could not vacuum the table of live turns");
        }
        findings.ready = self.one_hostwide(self.query(SWEEP_READY).bind(at).bind(epoch_max)).await?.try_get(0)?;
        Ok(findings)
    }

    pub(super) async fn repair_stuck(&self, now: Timestamp, limit: usize) -> Result<()> {
        for row in self.rows_hostwide(self.query(SWEEP_STUCK).bind(rows_max(limit))).await? {
            let (org, agent, conversation): (OrgId, AgentId, ConversationId) =
                (id(&row, 0)?, id(&row, 1)?, id(&row, 2)?);
            let asked = self.query(SWEEP_REPAIR).bind(self.clock.of(now)).bind(org.as_str()).bind(agent.as_str());
            if self.one_hostwide(asked.bind(conversation.as_str())).await?.try_get(0)? {
                tracing::error!(%org, %agent, %conversation, "a conversation's next turn had not been made ready");
            }
        }
        Ok(())
    }

    /// Every turn leaves a dead row in this small table, and the server's own autovacuum looks only once in `autovacuum_naptime`, a minute by default:
    /// by then there would be some hundred thousand. It runs beside the sweep, whose deadlines do not wait for it, and only once at a time.
    async fn vacuum_markers(&self) -> Result<()> {
        let Ok(alone) = Arc::clone(&self.vacuuming).try_lock_owned() else { return Ok(()) };
        let dead: i64 = self.one_hostwide(self.query(SWEEP_DEAD)).await?.try_get(0)?;
        if dead < DEAD_MAX {
            return Ok(());
        }
        let pool = self.pool.clone();
        tokio::spawn(async move {
            let _alone = alone;
            // By itself, and not through `change`: it cannot run in a transaction.
            let vacuumed = async {
                let mut connection = pool.acquire().await?;
                match tokio::time::timeout(ANSWER_TIMEOUT, sqlx::raw_sql(SWEEP_VACUUM).execute(&mut *connection)).await
                {
                    Ok(done) => done.map(drop),
                    Err(_) => {
                        // A server that says nothing must keep neither the pool's connection nor the next vacuum.
                        drop(connection.detach());
                        Err(silent())
                    }
                }
            };
            let began = tokio::time::Instant::now();
            match vacuumed.await {
                Ok(()) => metrics::counter!("turnhouse_vacuums_total").increment(1),
                Err(error) => tracing::warn!(%error, "could not vacuum the table of live turns"),
            }
            // While an old transaction keeps the rows, all of this is in vain: it may cost a tenth of a core at most.
            tokio::time::sleep(VACUUM_REST.max(began.elapsed() * 9)).await;
        });
        Ok(())
    }

    pub(super) async fn forget_keys_before(&self, before: Timestamp, limit: usize) -> Result<usize> {
        let forgotten = self.change_hostwide(self.query(FORGET_KEYS).bind(before.0).bind(rows_max(limit))).await?;
        Ok(usize::try_from(forgotten).unwrap_or(usize::MAX))
    }

    pub(super) async fn read_live_counts(&self) -> Result<LiveCounts> {
        let row = self.one_hostwide(self.query(LIVE)).await?;
        let count = |column: usize| row.try_get::<i64, _>(column).map(i64::unsigned_abs);
        Ok(LiveCounts { waiting: count(0)?, ready: count(1)?, running: count(2)? })
    }
}
