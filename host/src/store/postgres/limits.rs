//! An org's own limits, and the meters that are held against them: in its row of `org_load`, which every batch that touches the org locks. And those of its
//! agents that have bounds, in `agent_load`.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::reads::id;
use super::{BEGIN, BEGIN_LARGE, PostgresStore};
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::ids::{AgentId, OrgId, TurnId};
use crate::quota::{FULL_MEASURED_EVERY_MS, LimitsChange, MEASURED_EVERY_MS, Meters, OwnLimits, TURN_BYTES};
use crate::store::{AgentUse, LiveCounts, OrgUse, Result};
use crate::turn::Usage;

statements! {
    LIMITS = "-- limits
SELECT l.submits_per_second, l.submit_burst, l.running_max, l.queue_max, l.cpu_ms_per_hour, l.storage_bytes_max
  FROM org_load l JOIN orgs o ON o.org_id = l.org_id WHERE l.org_id = $1 AND o.deleting_at IS NULL FOR NO KEY UPDATE OF l";
    LIMITS_SET = "-- limits_set
UPDATE org_load SET submits_per_second = $2, submit_burst = $3, running_max = $4, queue_max = $5, cpu_ms_per_hour = $6, storage_bytes_max = $7
 WHERE org_id = $1";
    ORG_USE = "-- org_use
SELECT l.submits_per_second, l.submit_burst, l.running_max, l.queue_max, l.cpu_ms_per_hour, l.storage_bytes_max, l.tokens, l.tokens_at, l.cpu_ms, l.cpu_hour,
       l.storage_bytes, l.waiting, l.ready, l.running, coalesce($2::bigint, turnhouse_now())
  FROM org_load l JOIN orgs o ON o.org_id = l.org_id WHERE l.org_id = $1 AND o.deleting_at IS NULL";
    USED = "-- used
SELECT add_usage($1::bigint, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)";
    /// As last measured. $2: what an org may store that has no limit of its own.
    STORAGE_FULL = "-- storage_full
SELECT coalesce(storage_bytes_max, $2) FROM org_load
 WHERE org_id = $1 AND coalesce(storage_bytes_max, $2) > 0 AND storage_bytes >= coalesce(storage_bytes_max, $2)";
    AGENT_LIMIT = "-- agent_limit
SELECT limit_agent($1::bigint, $2, $3, $4, $5, $6, $7, $8, $9)";
    AGENT_USE = "-- agent_use
SELECT submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, storage_bytes_max, tokens, tokens_at, cpu_ms, cpu_hour, storage_bytes, live, active,
       coalesce($3::bigint, turnhouse_now())
  FROM agent_load WHERE org_id = $1 AND agent_id = $2";
    /// $1 the time, $2 and $3 measured before then, the latter of orgs that have stored what they may, $4 what an org may that has no limit of its own. Of those that have
    /// a limit the one that was measured longest ago; whoever asks is to measure it, and nobody else for a while.
    STORAGE_NEXT = "-- storage_next
UPDATE org_load SET storage_at = $1 WHERE org_id = (
  SELECT org_id FROM org_load
   WHERE (storage_at <= $2 OR storage_at <= $3 AND storage_bytes >= coalesce(storage_bytes_max, $4)) AND (coalesce(storage_bytes_max, $4) > 0 OR limited_agents > 0)
   ORDER BY storage_at LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED)
RETURNING org_id, limited_agents";
    /// By agent, also of one with bounds that has nothing left; what is no agent's under NULL. $2: what a turn takes beside its bodies. Lengths are read without the bytes.
    STORAGE = "-- storage
SELECT agent_id, sum(bytes)::bigint FROM (
  SELECT agent_id, sum($2 + octet_length(message) + coalesce(octet_length(reply), 0) + coalesce(octet_length(tail), 0)) FROM turns WHERE org_id = $1 GROUP BY agent_id
  UNION ALL SELECT agent_id, sum(octet_length(body)) FROM snapshots WHERE org_id = $1 GROUP BY agent_id
  UNION ALL SELECT NULL, sum(octet_length(body)) FROM turn_events WHERE org_id = $1
  UNION ALL SELECT NULL, sum(bytes) FROM attachments WHERE org_id = $1
  UNION ALL SELECT agent_id, count(*) * $2 FROM conversations WHERE org_id = $1 AND deleted_at IS NULL GROUP BY agent_id
  UNION ALL SELECT agent_id, sum(coalesce(octet_length(title), 0) + coalesce(octet_length(metadata), 0)) FROM conversation_notes WHERE org_id = $1 GROUP BY agent_id
  UNION ALL SELECT agent_id, 0 FROM agent_load WHERE org_id = $1
  UNION ALL SELECT NULL, sum(octet_length(wasm)) FROM modules WHERE org_id = $1) s (agent_id, bytes) GROUP BY agent_id";
    STORAGE_SET = "-- storage_set
UPDATE org_load SET storage_bytes = $2 WHERE org_id = $1 AND storage_bytes <> $2";
    STORAGE_SET_AGENT = "-- storage_set_agent
UPDATE agent_load SET storage_bytes = $3 WHERE org_id = $1 AND agent_id = $2";
}

impl PostgresStore {
    pub(super) async fn write_limits(
        &self,
        org: &OrgId,
        change: &LimitsChange,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<OwnLimits>> {
        let mut tx = self.begin_of(org, BEGIN).await?;
        let Some(row) = self.query(LIMITS).bind(org.as_str()).fetch_optional(&mut *tx).await? else { return Ok(None) };
        let before = own(&row)?;
        let after = before.with(change);
        if after == before {
            return Ok(Some(after));
        }
        let set = self
            .query(LIMITS_SET)
            .bind(org.as_str())
            .bind(after.submits_per_second)
            .bind(after.submit_burst.map(int))
            .bind(after.running_max.map(int))
            .bind(after.queue_max.map(int))
            .bind(after.cpu_ms_per_hour.map(bigint))
            .bind(after.storage_bytes_max.map(bigint));
        set.execute(&mut *tx).await?;
        self.note(&mut tx, Some(org.as_str()), &[Act::org_limits(&before, &after)], by, now).await?;
        tx.commit().await?;
        Ok(Some(after))
    }

    /// What a guest used whose turn ended without it.
    pub(super) async fn write_usage(
        &self,
        org: &OrgId,
        agent: &AgentId,
        turn: TurnId,
        usage: &Usage,
        now: Timestamp,
    ) -> Result<bool> {
        let asked = self
            .query(USED)
            .bind(self.clock.of(now))
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(turn.0)
            .bind(usage.cpu_ms)
            .bind(usage.wall_ms)
            .bind(bigint(usage.memory_peak_bytes))
            .bind(bigint(usage.host_calls))
            .bind(bigint(usage.bytes_in))
            .bind(bigint(usage.bytes_out))
            .bind(usage.instance_ms)
            .bind(bigint(self.quota.cpu_ms_per_hour));
        Ok(self.call_one_of(org, asked).await?.try_get(0)?)
    }

    /// What the org may store, if it has stored that much.
    pub(super) async fn storage_full(&self, tx: &mut PgConnection, org: &str) -> Result<Option<i64>> {
        let asked = self.query(STORAGE_FULL).bind(org.to_owned()).bind(bigint(self.quota.storage_bytes_max));
        Ok(asked.fetch_optional(tx).await?.map(|row| row.try_get(0)).transpose()?)
    }

    pub(super) async fn read_use(&self, org: &OrgId, now: Timestamp) -> Result<Option<OrgUse>> {
        let Some(row) = self.row_of(org, self.query(ORG_USE).bind(org.as_str()).bind(self.clock.of(now))).await? else {
            return Ok(None);
        };
        let count = |column: usize| row.try_get::<i32, _>(column).map(|count| u64::from(count.unsigned_abs()));
        Ok(Some(OrgUse {
            own: own(&row)?,
            meters: meters(&row)?,
            live: LiveCounts { waiting: count(11)?, ready: count(12)?, running: count(13)? },
            at: Timestamp(row.try_get(14)?),
        }))
    }

    /// Sets the bounds of an agent's own, in a transaction that holds nothing after the org's row.
    pub(super) async fn limit_agent(
        &self,
        tx: &mut PgConnection,
        org: &str,
        agent: &str,
        own: &OwnLimits,
        now: Timestamp,
    ) -> Result<()> {
        let set = self
            .query(AGENT_LIMIT)
            .bind(self.clock.of(now))
            .bind(org.to_owned())
            .bind(agent.to_owned())
            .bind(own.submits_per_second)
            .bind(own.submit_burst.map(int))
            .bind(own.running_max.map(int))
            .bind(own.queue_max.map(int))
            .bind(own.cpu_ms_per_hour.map(bigint))
            .bind(own.storage_bytes_max.map(bigint));
        set.fetch_one(tx).await?;
        Ok(())
    }

    /// Measures what an org has stored whose turn it is; `None`: it is nobody's.
    pub(super) async fn measure_next(&self, now: Timestamp) -> Result<Option<OrgId>> {
        // Its own clock will do: it is no deadline of anything.
        let host_max = bigint(self.quota.storage_bytes_max);
        let before = |ms: u64| now.0.saturating_sub_unsigned(ms);
        let asked = self
            .query(STORAGE_NEXT)
            .bind(now.0)
            .bind(before(MEASURED_EVERY_MS))
            .bind(before(FULL_MEASURED_EVERY_MS))
            .bind(host_max);
        let Some(row) = self.row_hostwide(asked).await? else { return Ok(None) };
        let org: OrgId = id(&row, 0)?;
        let (mut whole, mut agents) = (0_i64, Vec::new());
        // Of an org with much this takes longer than any other statement may.
        let mut tx = self.begin_hostwide(BEGIN_LARGE).await?;
        let rows = self.query(STORAGE).bind(org.as_str()).bind(TURN_BYTES).fetch_all(&mut *tx).await?;
        tx.commit().await?;
        for row in rows {
            let bytes = row.try_get::<Option<i64>, _>(1)?.unwrap_or(0);
            whole = whole.saturating_add(bytes);
            if let Some(agent) = row.try_get::<Option<String>, _>(0)? {
                agents.push((agent, bytes));
            }
        }
        self.change_hostwide(self.query(STORAGE_SET).bind(org.as_str()).bind(whole)).await?;
        if row.try_get::<i32, _>(1)? > 0 {
            for (agent, bytes) in agents {
                let set = self.query(STORAGE_SET_AGENT).bind(org.as_str()).bind(agent).bind(bytes);
                self.change_hostwide(set).await?;
            }
        }
        Ok(Some(org))
    }

    pub(super) async fn read_agent_use(
        &self,
        org: &OrgId,
        agent: &AgentId,
        now: Timestamp,
    ) -> Result<Option<AgentUse>> {
        let asked = self.query(AGENT_USE).bind(org.as_str()).bind(agent.as_str()).bind(self.clock.of(now));
        let Some(row) = self.row_of(org, asked).await? else { return Ok(None) };
        let count = |column: usize| row.try_get::<i32, _>(column).map(|count| u64::from(count.unsigned_abs()));
        Ok(Some(AgentUse {
            own: own(&row)?,
            meters: meters(&row)?,
            live: count(11)?,
            active: count(12)?,
            at: Timestamp(row.try_get(13)?),
        }))
    }
}

/// What is used, as it stands behind the limits.
fn meters(row: &PgRow) -> Result<Meters> {
    let bucket = row.try_get::<Option<f64>, _>(6)?.zip(row.try_get::<Option<i64>, _>(7)?.map(Timestamp));
    let storage_bytes = row.try_get::<i64, _>(10)?.unsigned_abs();
    Ok(Meters { bucket, cpu_ms: row.try_get(8)?, cpu_hour: row.try_get(9)?, storage_bytes })
}

fn own(row: &PgRow) -> Result<OwnLimits> {
    let whole = |column: usize| row.try_get::<Option<i32>, _>(column).map(|value| value.map(i32::unsigned_abs));
    Ok(OwnLimits {
        submits_per_second: row.try_get(0)?,
        submit_burst: whole(1)?,
        running_max: whole(2)?,
        queue_max: whole(3)?,
        cpu_ms_per_hour: row.try_get::<Option<i64>, _>(4)?.map(i64::unsigned_abs),
        storage_bytes_max: row.try_get::<Option<i64>, _>(5)?.map(i64::unsigned_abs),
    })
}

fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn int(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}
