//! What is old goes, an org at a time and a few rows at a time. Ids of turns are in the order of time, so that a range of the primary key says what is
//! old, and no statement reads what stays.

use rusqlite::params;

use super::writer::{Tried, Tx};
use crate::ids::OrgId;
use crate::store::{Retained, Retention};

statements! {
    RETAIN_ORG = "-- retain_org
SELECT org_id FROM orgs WHERE org_id > ?1 ORDER BY org_id LIMIT 1";
    /// A live turn has no outcome and stays.
    RETAIN_OLD = "-- retain_old
SELECT turn_id, agent_id, conversation_id, run_id FROM turns WHERE org_id = ?1 AND turn_id < ?2 AND outcome IS NOT NULL ORDER BY turn_id LIMIT ?3";
    RETAIN_TURN = "-- retain_turn
DELETE FROM turns WHERE org_id = ?1 AND turn_id = ?2";
    RETAIN_REFS = "-- retain_refs
DELETE FROM attachment_refs WHERE org_id = ?1 AND turn_id = ?2";
    RETAIN_LOG = "-- retain_log
DELETE FROM turn_events WHERE org_id = ?1 AND turn_id = ?2";
    /// What the next turn may need has its bytes, and stays.
    RETAIN_SNAPSHOT = "-- retain_snapshot
DELETE FROM snapshots WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND run_id = ?4 AND body IS NULL";
    /// The log of old turns, but for live ones: an id at a time, in its order.
    RETAIN_LOGGED = "-- retain_logged
SELECT DISTINCT e.turn_id FROM turn_events e WHERE e.org_id = ?1 AND e.turn_id < ?2
   AND NOT EXISTS (SELECT 1 FROM turn_markers m WHERE m.org_id = ?1 AND m.turn_id = e.turn_id) ORDER BY e.turn_id LIMIT ?3";
    RETAIN_AUDIT = "-- retain_audit
DELETE FROM audit WHERE org_id = ?1 AND (at, audit_id) IN (SELECT a.at, a.audit_id FROM audit a WHERE a.org_id = ?1 AND a.at < ?2 ORDER BY a.at LIMIT ?3)";
}

impl Tx<'_> {
    pub(super) fn retain(&self, after: Option<&OrgId>, keep: Retention, limit: usize) -> Tried<Retained> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut statement = self.conn.prepare_cached(RETAIN_ORG)?;
        let mut found = statement.query_map([after.map_or("", OrgId::as_str)], |row| row.get::<_, String>(0))?;
        let Some(org) = found.next().transpose()? else { return Ok(Retained::default()) };
        let mut rows = 0;
        if let Some(since) = keep.turns_since {
            let mut old = self.conn.prepare_cached(RETAIN_OLD)?;
            let mut old = old.query(params![org, since.first_id().as_bytes(), limit])?;
            while let Some(row) = old.next()? {
                let turn: [u8; 16] = row.get(0)?;
                self.conn.prepare_cached(RETAIN_LOG)?.execute(params![org, turn])?;
                self.conn.prepare_cached(RETAIN_REFS)?.execute(params![org, turn])?;
                let (conversation, run): (Option<String>, Option<[u8; 16]>) = (row.get(2)?, row.get(3)?);
                if let (Some(conversation), Some(run)) = (conversation, run) {
                    let agent: String = row.get(1)?;
                    self.conn.prepare_cached(RETAIN_SNAPSHOT)?.execute(params![org, agent, conversation, run])?;
                }
                rows += self.conn.prepare_cached(RETAIN_TURN)?.execute(params![org, turn])?;
            }
        }
        if let Some(since) = keep.events_since {
            let mut old = self.conn.prepare_cached(RETAIN_LOGGED)?;
            let old =
                old.query_map(params![org, since.first_id().as_bytes(), limit], |row| row.get::<_, [u8; 16]>(0))?;
            for turn in old.collect::<rusqlite::Result<Vec<_>>>()? {
                self.conn.prepare_cached(RETAIN_LOG)?.execute(params![org, turn])?;
                rows += 1;
            }
        }
        if let Some(since) = keep.audit_since {
            rows += self.conn.prepare_cached(RETAIN_AUDIT)?.execute(params![org, since.0, limit])?;
        }
        Ok(Retained { org: Some(super::claim::parsed(&org)?), rows })
    }
}
