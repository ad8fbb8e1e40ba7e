//! The bounds of an agent's own, what it has used of them, and which of its turns are held: ready, and not before a time that never comes, so that no claim finds
//! them until another of the agent's has ended. One row of an agent that has bounds, none of any other.

use rusqlite::{OptionalExtension, params};

use super::limits::{meters, own};
use super::writer::{Tried, Tx};
use crate::clock::Timestamp;
use crate::ids::{AgentId, OrgId};
use crate::quota::{Meters, OwnLimits, Quota};
use crate::store::AgentUse;

/// When a held turn may start: never. The statements name the number, so that they find its index.
pub(super) const HELD: Timestamp = Timestamp(9_007_199_254_740_991);

statements! {
    AGENT_LOAD = "-- agent_load
SELECT submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, storage_bytes_max, tokens, tokens_at, cpu_ms, cpu_hour, storage_bytes, live, active
  FROM agent_load WHERE org_id = ?1 AND agent_id = ?2";
    AGENT_LOAD_SET = "-- agent_load_set
UPDATE agent_load SET tokens = ?3, tokens_at = ?4, cpu_ms = ?5, cpu_hour = ?6, live = ?7, active = ?8 WHERE org_id = ?1 AND agent_id = ?2";
    AGENT_BOUNDS_SET = "-- agent_bounds_set
UPDATE agent_load SET submits_per_second = ?3, submit_burst = ?4, running_max = ?5, queue_max = ?6, cpu_ms_per_hour = ?7,
   storage_bytes_max = ?8
 WHERE org_id = ?1 AND agent_id = ?2";
    AGENT_LOAD_NEW = "-- agent_load_new
INSERT INTO agent_load (org_id, agent_id, submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, storage_bytes_max, live, active)
SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, count(*), count(*) FILTER (WHERE state <> 'waiting') FROM turn_markers WHERE org_id = ?1 AND agent_id = ?2";
    AGENT_LOAD_DELETE = "-- agent_load_delete
DELETE FROM agent_load WHERE org_id = ?1 AND agent_id = ?2";
    LIMITED_AGENTS = "-- limited_agents
INSERT INTO org_limits (org_id, limited_agents) VALUES (?1, max(0, ?2))
ON CONFLICT (org_id) DO UPDATE SET limited_agents = limited_agents + ?2, storage_at = iif(?2 > 0, 0, storage_at)";
    RELEASE_HELD = "-- release_held
UPDATE turn_markers SET not_before = ?3, deadline_at = ?3 + admission_ms
 WHERE org_id = ?1 AND turn_id IN (SELECT turn_id FROM turn_markers
   WHERE org_id = ?1 AND agent_id = ?2 AND state = 'ready' AND not_before = 9007199254740991 ORDER BY turn_id LIMIT ?4)";
}

impl AgentUse {
    /// Whether no other turn of it may start.
    pub(super) fn is_full(&self) -> bool {
        self.own.running_max.is_some_and(|max| self.active >= u64::from(max))
    }

    pub(super) fn quota(&self) -> Quota {
        Quota::NONE.narrowed(&self.own)
    }
}

impl Tx<'_> {
    /// What an agent that has bounds has used of them; `None`: it has none.
    pub(super) fn agent_load(&self, org: &OrgId, agent: &AgentId) -> Tried<Option<AgentUse>> {
        if self.limited(org)?.agents == 0 {
            return Ok(None);
        }
        let mut statement = self.conn.prepare_cached(AGENT_LOAD)?;
        let found = statement.query_row(params![org.as_str(), agent.as_str()], |row| {
            Ok(AgentUse {
                own: own(row)?,
                meters: meters(row)?,
                live: row.get::<_, i64>(11)?.unsigned_abs(),
                active: row.get::<_, i64>(12)?.unsigned_abs(),
                at: self.now,
            })
        });
        Ok(found.optional()?)
    }

    pub(super) fn set_agent_load(&self, org: &OrgId, agent: &AgentId, load: &AgentUse) -> Tried<()> {
        let Meters { bucket, cpu_ms, cpu_hour, storage_bytes: _ } = load.meters;
        self.conn.prepare_cached(AGENT_LOAD_SET)?.execute(params![
            org.as_str(),
            agent.as_str(),
            bucket.map(|(tokens, _)| tokens),
            bucket.map(|(_, at)| at.0),
            cpu_ms,
            cpu_hour,
            count(load.live),
            count(load.active),
        ])?;
        Ok(())
    }

    /// A message to an agent has come in. `active`: its turn runs, or may.
    pub(super) fn agent_takes(&self, org: &OrgId, agent: &AgentId, of: Option<bool>) -> Tried<()> {
        let Some(mut load) = self.agent_load(org, agent)? else { return Ok(()) };
        let quota = load.quota();
        load.meters.take_token(&quota, self.now);
        if let Some(active) = of {
            load.live += 1;
            load.active += u64::from(active);
        }
        self.set_agent_load(org, agent, &load)
    }

    /// Lets the oldest held turns of an agent go for which it has room. Whether there was one.
    pub(super) fn release_held(&mut self, org: &OrgId, agent: &AgentId) -> Tried<bool> {
        let Some(mut load) = self.agent_load(org, agent)? else { return Ok(false) };
        let room = load.own.running_max.map_or(i64::MAX, |max| i64::from(max) - count(load.active));
        if room <= 0 {
            return Ok(false);
        }
        let released =
            self.conn.prepare_cached(RELEASE_HELD)?.execute(params![org.as_str(), agent.as_str(), self.now.0, room])?;
        if released == 0 {
            return Ok(false);
        }
        load.active += released as u64;
        self.set_agent_load(org, agent, &load)?;
        self.older_ready = None;
        Ok(true)
    }

    /// Sets an agent's bounds: what runs goes on, and what was held starts where there is room now.
    pub(super) fn limit_agent(&mut self, org: &OrgId, agent: &AgentId, own: &OwnLimits) -> Tried<()> {
        let bounds = params![
            org.as_str(),
            agent.as_str(),
            own.submits_per_second,
            own.submit_burst,
            own.running_max,
            own.queue_max,
            own.cpu_ms_per_hour.map(count),
            own.storage_bytes_max.map(count),
        ];
        let (none, known) = (*own == OwnLimits::default(), self.agent_load(org, agent)?.is_some());
        if !known && none {
            return Ok(());
        }
        if !known {
            self.conn.prepare_cached(AGENT_LOAD_NEW)?.execute(bounds)?;
            return self.count_limited(org, 1);
        }
        self.conn.prepare_cached(AGENT_BOUNDS_SET)?.execute(bounds)?;
        self.release_held(org, agent)?;
        if none {
            self.conn.prepare_cached(AGENT_LOAD_DELETE)?.execute(params![org.as_str(), agent.as_str()])?;
            self.count_limited(org, -1)?;
        }
        Ok(())
    }

    fn count_limited(&self, org: &OrgId, more: i64) -> Tried<()> {
        self.conn.prepare_cached(LIMITED_AGENTS)?.execute(params![org.as_str(), more])?;
        self.limited.borrow_mut().remove(org);
        Ok(())
    }
}

fn count(of: u64) -> i64 {
    i64::try_from(of).unwrap_or(i64::MAX)
}
