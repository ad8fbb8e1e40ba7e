//! An org's own limits, and the meters that are held against them: in its row of `org_load`, which every batch that touches the org locks. And those of its
//! agents that have bounds, in `agent_load`.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::{BEGIN, PostgresStore};
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::ids::{AgentId, OrgId};
use crate::quota::{LimitsChange, Meters, OwnLimits};
use crate::store::{AgentUse, LiveCounts, OrgUse, Result};

statements! {
    LIMITS = "-- limits
SELECT l.submits_per_second, l.submit_burst, l.running_max, l.queue_max, l.cpu_ms_per_hour
  FROM org_load l JOIN orgs o ON o.org_id = l.org_id WHERE l.org_id = $1 AND o.deleting_at IS NULL FOR NO KEY UPDATE OF l";
    LIMITS_SET = "-- limits_set
UPDATE org_load SET submits_per_second = $2, submit_burst = $3, running_max = $4, queue_max = $5, cpu_ms_per_hour = $6 WHERE org_id = $1";
    ORG_USE = "-- org_use
SELECT l.submits_per_second, l.submit_burst, l.running_max, l.queue_max, l.cpu_ms_per_hour, l.tokens, l.tokens_at, l.cpu_ms, l.cpu_hour,
       l.waiting, l.ready, l.running, coalesce($2::bigint, turnhouse_now())
  FROM org_load l JOIN orgs o ON o.org_id = l.org_id WHERE l.org_id = $1 AND o.deleting_at IS NULL";
    AGENT_LIMIT = "-- agent_limit
SELECT limit_agent($1::bigint, $2, $3, $4, $5, $6, $7, $8)";
    AGENT_USE = "-- agent_use
SELECT submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, tokens, tokens_at, cpu_ms, cpu_hour, live, active,
       coalesce($3::bigint, turnhouse_now())
  FROM agent_load WHERE org_id = $1 AND agent_id = $2";
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
            .bind(after.cpu_ms_per_hour.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)));
        set.execute(&mut *tx).await?;
        self.note(&mut tx, Some(org.as_str()), &[Act::org_limits(&before, &after)], by, now).await?;
        tx.commit().await?;
        Ok(Some(after))
    }

    pub(super) async fn read_use(&self, org: &OrgId, now: Timestamp) -> Result<Option<OrgUse>> {
        let Some(row) = self.row_of(org, self.query(ORG_USE).bind(org.as_str()).bind(self.clock.of(now))).await? else {
            return Ok(None);
        };
        let count = |column: usize| row.try_get::<i32, _>(column).map(|count| u64::from(count.unsigned_abs()));
        Ok(Some(OrgUse {
            own: own(&row)?,
            meters: meters(&row)?,
            live: LiveCounts { waiting: count(9)?, ready: count(10)?, running: count(11)? },
            at: Timestamp(row.try_get(12)?),
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
            .bind(own.cpu_ms_per_hour.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)));
        set.fetch_one(tx).await?;
        Ok(())
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
            live: count(9)?,
            active: count(10)?,
            at: Timestamp(row.try_get(11)?),
        }))
    }
}

/// What is used, as it stands behind the limits.
fn meters(row: &PgRow) -> Result<Meters> {
    let bucket = row.try_get::<Option<f64>, _>(5)?.zip(row.try_get::<Option<i64>, _>(6)?.map(Timestamp));
    Ok(Meters { bucket, cpu_ms: row.try_get(7)?, cpu_hour: row.try_get(8)? })
}

fn own(row: &PgRow) -> Result<OwnLimits> {
    let whole = |column: usize| row.try_get::<Option<i32>, _>(column).map(|value| value.map(i32::unsigned_abs));
    Ok(OwnLimits {
        submits_per_second: row.try_get(0)?,
        submit_burst: whole(1)?,
        running_max: whole(2)?,
        queue_max: whole(3)?,
        cpu_ms_per_hour: row.try_get::<Option<i64>, _>(4)?.map(i64::unsigned_abs),
    })
}

fn int(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}
