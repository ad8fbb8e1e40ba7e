//! An org's own limits, and the meters that are held against them: one row of an org that has limits or is metered or measured, none of any other.
//!
//! The operator's command line writes limits beside a running host, so that nothing of them outlives a transaction in memory.

use rusqlite::{OptionalExtension, params};

use sqlx::Row;

use super::SqliteStore;
use super::reads::id;
use super::writer::{Tried, Tx};
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::ids::{AgentId, OrgId, TurnId};
use crate::quota::{Exceeded, FULL_MEASURED_EVERY_MS, LimitsChange, MEASURED_EVERY_MS, Meters, OwnLimits, TURN_BYTES};
use crate::store::{LiveCounts, OrgUse, Result};
use crate::turn::Usage;

statements! {
    LIMITS = "-- limits
SELECT submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, storage_bytes_max, tokens, tokens_at, cpu_ms, cpu_hour, storage_bytes, limited_agents
  FROM org_limits WHERE org_id = ?1";
    LIMITS_SET = "-- limits_set
INSERT INTO org_limits (org_id, submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, storage_bytes_max)
VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
ON CONFLICT (org_id) DO UPDATE SET submits_per_second = excluded.submits_per_second, submit_burst = excluded.submit_burst,
   running_max = excluded.running_max, queue_max = excluded.queue_max, cpu_ms_per_hour = excluded.cpu_ms_per_hour,
   storage_bytes_max = excluded.storage_bytes_max";
    METERS_SET = "-- meters_set
INSERT INTO org_limits (org_id, tokens, tokens_at, cpu_ms, cpu_hour) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT (org_id) DO UPDATE SET tokens = excluded.tokens, tokens_at = excluded.tokens_at, cpu_ms = excluded.cpu_ms, cpu_hour = excluded.cpu_hour";
    /// ?1 and ?2 measured before then, the latter of orgs that have stored what they may, ?3 what an org may that has no limit of its own. Of those that have a limit the one
    /// that was measured longest ago.
    STORAGE_NEXT = "-- storage_next
SELECT o.org_id, coalesce(l.limited_agents, 0) FROM orgs o LEFT JOIN org_limits l USING (org_id)
 WHERE (coalesce(l.storage_at, 0) <= ?1 OR l.storage_at <= ?2 AND l.storage_bytes >= coalesce(l.storage_bytes_max, ?3))
   AND (coalesce(l.storage_bytes_max, ?3) > 0 OR l.limited_agents > 0) AND o.deleting_at IS NULL ORDER BY coalesce(l.storage_at, 0) LIMIT 1";
    /// By agent, also of one with bounds that has nothing left; what is no agent's under NULL. ?2: what a turn takes beside its bodies. Lengths are read without the bytes.
    STORAGE = "-- storage
SELECT agent_id, sum(bytes) FROM (
  SELECT agent_id, sum(?2 + length(message) + coalesce(length(reply), 0) + coalesce(length(tail), 0)) AS bytes FROM turns WHERE org_id = ?1 GROUP BY agent_id
  UNION ALL SELECT agent_id, sum(length(body)) FROM snapshots WHERE org_id = ?1 GROUP BY agent_id
  UNION ALL SELECT NULL, sum(length(body)) FROM turn_events WHERE org_id = ?1
  UNION ALL SELECT NULL, sum(bytes) FROM attachments WHERE org_id = ?1
  UNION ALL SELECT agent_id, count(*) * ?2 + sum(files_bytes) FROM conversations WHERE org_id = ?1 AND deleted_at IS NULL GROUP BY agent_id
  UNION ALL SELECT agent_id, sum(coalesce(length(title), 0) + coalesce(length(metadata), 0)) FROM conversation_notes WHERE org_id = ?1 GROUP BY agent_id
  UNION ALL SELECT agent_id, 0 FROM agent_load WHERE org_id = ?1
  UNION ALL SELECT NULL, sum(length(wasm)) FROM modules WHERE org_id = ?1) GROUP BY agent_id";
    STORAGE_SET = "-- storage_set
INSERT INTO org_limits (org_id, storage_bytes, storage_at) VALUES (?1, ?2, ?3)
ON CONFLICT (org_id) DO UPDATE SET storage_bytes = excluded.storage_bytes, storage_at = excluded.storage_at";
    TURN_USED = "-- turn_used
UPDATE turns SET cpu_ms = ?3, wall_ms = ?4, memory_peak_bytes = ?5, host_calls = ?6, bytes_in = ?7, bytes_out = ?8, instance_ms = ?9
 WHERE org_id = ?1 AND turn_id = ?2 AND outcome IS NOT NULL AND cpu_ms IS NULL";
    TURN_THERE = "-- turn_there
SELECT 1 FROM turns WHERE org_id = ?1 AND turn_id = ?2";
    STORAGE_SET_AGENT = "-- storage_set_agent
UPDATE agent_load SET storage_bytes = ?3 WHERE org_id = ?1 AND agent_id = ?2";
}

/// What an org may and what it has used, where that is not the host's to say.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limited {
    pub(super) own: OwnLimits,
    pub(super) meters: Meters,
    /// How many of its agents have bounds of their own.
    pub(super) agents: u32,
}

impl SqliteStore {
    /// Measures what an org has stored whose turn it is; `None`: it is nobody's. Summed beside the writer.
    pub(super) async fn measure_next(&self, now: Timestamp) -> Result<Option<OrgId>> {
        let before = |ms: u64| now.0.saturating_sub_unsigned(ms);
        let next = sqlx::query(STORAGE_NEXT)
            .bind(before(MEASURED_EVERY_MS))
            .bind(before(FULL_MEASURED_EVERY_MS))
            .bind(bigint(self.quota.storage_bytes_max));
        let Some(row) = next.fetch_optional(&self.readers).await? else { return Ok(None) };
        let (org, limited): (OrgId, bool) = (id(&row, 0)?, row.try_get::<i64, _>(1)? > 0);
        let (mut whole, mut agents) = (0_i64, Vec::new());
        for row in sqlx::query(STORAGE).bind(org.as_str()).bind(TURN_BYTES).fetch_all(&self.readers).await? {
            let bytes = row.try_get::<Option<i64>, _>(1)?.unwrap_or(0);
            whole = whole.saturating_add(bytes);
            if let Some(agent) = row.try_get::<Option<String>, _>(0)?
                && limited
            {
                agents.push((agent, bytes));
            }
        }
        let measured = org.clone();
        self.write_with(now, move |tx| {
            // It may be gone by now, and what was left of it with it.
            if tx.conn.prepare_cached(super::keys::ORG_KNOWN)?.exists(params![measured.as_str()])? {
                tx.conn.prepare_cached(STORAGE_SET)?.execute(params![measured.as_str(), whole, now.0])?;
                for (agent, bytes) in &agents {
                    tx.conn.prepare_cached(STORAGE_SET_AGENT)?.execute(params![measured.as_str(), agent, bytes])?;
                }
            }
            Ok(())
        })
        .await?;
        Ok(Some(org))
    }
}

/// Limits, as a row of an org's or an agent's begins.
pub(super) fn own(row: &rusqlite::Row<'_>) -> rusqlite::Result<OwnLimits> {
    Ok(OwnLimits {
        submits_per_second: row.get(0)?,
        submit_burst: row.get(1)?,
        running_max: row.get(2)?,
        queue_max: row.get(3)?,
        cpu_ms_per_hour: row.get::<_, Option<i64>>(4)?.map(i64::unsigned_abs),
        storage_bytes_max: row.get::<_, Option<i64>>(5)?.map(i64::unsigned_abs),
    })
}

/// What is used, as it stands behind the limits.
pub(super) fn meters(row: &rusqlite::Row<'_>) -> rusqlite::Result<Meters> {
    let bucket = row.get::<_, Option<f64>>(6)?.zip(row.get::<_, Option<i64>>(7)?.map(Timestamp));
    let storage_bytes = row.get::<_, i64>(10)?.unsigned_abs();
    Ok(Meters { bucket, cpu_ms: row.get(8)?, cpu_hour: row.get(9)?, storage_bytes })
}

fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Tx<'_> {
    /// An org's limits and meters; nothing where it has none.
    pub(super) fn limited(&self, org: &OrgId) -> Tried<Limited> {
        if let Some(known) = self.limited.borrow().get(org) {
            return Ok(*known);
        }
        let mut statement = self.conn.prepare_cached(LIMITS)?;
        let found = statement.query_row(params![org.as_str()], |row| {
            Ok(Limited { own: own(row)?, meters: meters(row)?, agents: row.get(11)? })
        });
        let found = found.optional()?.unwrap_or_default();
        self.limited.borrow_mut().insert(org.clone(), found);
        Ok(found)
    }

    /// Whether another turn of the org may run, where `running_max` is the host's bound.
    pub(super) fn has_room(&self, org: &OrgId, running_max: usize) -> Tried<bool> {
        let running = self.counts.org(org).running;
        // No bound is lower.
        if running == 0 {
            return Ok(true);
        }
        Ok(running < self.limited(org)?.own.running_max.map_or(running_max, |max| max as usize))
    }

    /// The limit that keeps the org from storing more.
    pub(super) fn no_room(&self, org: &OrgId) -> Tried<Option<Exceeded>> {
        let limited = self.limited(org)?;
        Ok(limited.meters.no_room(&self.quota.narrowed(&limited.own), self.now))
    }

    /// A message of the org has come in, or something that counts as one.
    pub(super) fn take_token(&self, org: &OrgId) -> Tried<()> {
        let mut limited = self.limited(org)?;
        let quota = self.quota.narrowed(&limited.own);
        if limited.meters.take_token(&quota, self.now) { self.write_meters(org, limited) } else { Ok(()) }
    }

    /// A turn of the org has used processor time.
    pub(super) fn use_cpu(&self, org: &OrgId, cpu_ms: f64) -> Tried<()> {
        let mut limited = self.limited(org)?;
        let quota = self.quota.narrowed(&limited.own);
        if limited.meters.use_cpu(&quota, cpu_ms, self.now) { self.write_meters(org, limited) } else { Ok(()) }
    }

    /// What a guest used whose turn ended without it.
    pub(super) fn add_usage(&self, org: &OrgId, agent: &AgentId, turn: TurnId, usage: &Usage) -> Tried<bool> {
        let count = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let told = self.conn.prepare_cached(TURN_USED)?.execute(params![
            org.as_str(),
            turn.as_bytes(),
            usage.cpu_ms,
            usage.wall_ms,
            count(usage.memory_peak_bytes),
            count(usage.host_calls),
            count(usage.bytes_in),
            count(usage.bytes_out),
            usage.instance_ms
        ])?;
        let there = || self.conn.prepare_cached(TURN_THERE)?.exists(params![org.as_str(), turn.as_bytes()]);
        if (told == 0 && there()?)
            || !self.conn.prepare_cached(super::keys::ORG_KNOWN)?.exists(params![org.as_str()])?
        {
            return Ok(false);
        }
        self.use_cpu(org, usage.cpu_ms)?;
        if let Some(mut load) = self.agent_load(org, agent)? {
            let quota = load.quota();
            if load.meters.use_cpu(&quota, usage.cpu_ms, self.now) {
                self.set_agent_load(org, agent, &load)?;
            }
        }
        Ok(true)
    }

    /// Whether the org has stored what it may, as last measured, and how much that is.
    pub(super) fn storage_full(&self, org: &OrgId) -> Tried<Option<u64>> {
        let limited = self.limited(org)?;
        let max = self.quota.narrowed(&limited.own).storage_bytes_max;
        Ok((max > 0 && limited.meters.storage_bytes >= max).then_some(max))
    }

    fn write_meters(&self, org: &OrgId, limited: Limited) -> Tried<()> {
        let Meters { bucket, cpu_ms, cpu_hour, storage_bytes: _ } = limited.meters;
        self.conn.prepare_cached(METERS_SET)?.execute(params![
            org.as_str(),
            bucket.map(|(tokens, _)| tokens),
            bucket.map(|(_, at)| at.0),
            cpu_ms,
            cpu_hour
        ])?;
        self.limited.borrow_mut().insert(org.clone(), limited);
        Ok(())
    }

    /// `None`: there is no such org.
    pub(super) fn set_limits(&self, org: &OrgId, change: &LimitsChange, by: &Actor) -> Tried<Option<OwnLimits>> {
        if !self.conn.prepare_cached(super::keys::ORG_KNOWN)?.exists(params![org.as_str()])? {
            return Ok(None);
        }
        let before = self.limited(org)?.own;
        let after = before.with(change);
        if after == before {
            return Ok(Some(after));
        }
        self.conn.prepare_cached(LIMITS_SET)?.execute(params![
            org.as_str(),
            after.submits_per_second,
            after.submit_burst,
            after.running_max,
            after.queue_max,
            after.cpu_ms_per_hour.map(bigint),
            after.storage_bytes_max.map(bigint)
        ])?;
        self.note(Some(org), &[Act::org_limits(&before, &after)], by)?;
        Ok(Some(after))
    }

    /// `None`: there is no such org.
    pub(super) fn org_use(&self, org: &OrgId) -> Tried<Option<OrgUse>> {
        if !self.conn.prepare_cached(super::keys::ORG_KNOWN)?.exists(params![org.as_str()])? {
            return Ok(None);
        }
        let Limited { own, meters, .. } = self.limited(org)?;
        let live = self.counts.org(org);
        let live = LiveCounts { waiting: live.waiting as u64, ready: live.ready as u64, running: live.running as u64 };
        Ok(Some(OrgUse { own, meters, live, at: self.now }))
    }
}
