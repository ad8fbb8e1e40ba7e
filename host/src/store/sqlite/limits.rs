//! An org's own limits, and the meters that are held against them: one row of an org that has limits or is metered, none of any other.
//!
//! The operator's command line writes limits beside a running host, so that nothing of them outlives a transaction in memory.

use rusqlite::{OptionalExtension, params};

use super::writer::{Tried, Tx};
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::ids::OrgId;
use crate::quota::{LimitsChange, Meters, OwnLimits};
use crate::store::{LiveCounts, OrgUse};

statements! {
    LIMITS = "-- limits
SELECT submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, tokens, tokens_at, cpu_ms, cpu_hour, limited_agents
  FROM org_limits WHERE org_id = ?1";
    LIMITS_SET = "-- limits_set
INSERT INTO org_limits (org_id, submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
ON CONFLICT (org_id) DO UPDATE SET submits_per_second = excluded.submits_per_second, submit_burst = excluded.submit_burst,
   running_max = excluded.running_max, queue_max = excluded.queue_max, cpu_ms_per_hour = excluded.cpu_ms_per_hour";
    METERS_SET = "-- meters_set
INSERT INTO org_limits (org_id, tokens, tokens_at, cpu_ms, cpu_hour) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT (org_id) DO UPDATE SET tokens = excluded.tokens, tokens_at = excluded.tokens_at, cpu_ms = excluded.cpu_ms, cpu_hour = excluded.cpu_hour";
}

/// What an org may and what it has used, where that is not the host's to say.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limited {
    pub(super) own: OwnLimits,
    pub(super) meters: Meters,
    /// How many of its agents have bounds of their own.
    pub(super) agents: u32,
}

impl Tx<'_> {
    /// An org's limits and meters; nothing where it has none.
    pub(super) fn limited(&self, org: &OrgId) -> Tried<Limited> {
        if let Some(known) = self.limited.borrow().get(org) {
            return Ok(*known);
        }
        let mut statement = self.conn.prepare_cached(LIMITS)?;
        let found = statement.query_row(params![org.as_str()], |row| {
            let bucket = row.get::<_, Option<f64>>(5)?.zip(row.get::<_, Option<i64>>(6)?.map(Timestamp));
            Ok(Limited {
                own: OwnLimits {
                    submits_per_second: row.get(0)?,
                    submit_burst: row.get(1)?,
                    running_max: row.get(2)?,
                    queue_max: row.get(3)?,
                    cpu_ms_per_hour: row.get::<_, Option<i64>>(4)?.map(i64::unsigned_abs),
                },
                meters: Meters { bucket, cpu_ms: row.get(7)?, cpu_hour: row.get(8)? },
                agents: row.get(9)?,
            })
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

    /// A message of the org has come in.
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

    fn write_meters(&self, org: &OrgId, limited: Limited) -> Tried<()> {
        let Meters { bucket, cpu_ms, cpu_hour } = limited.meters;
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
            after.cpu_ms_per_hour.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX))
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
