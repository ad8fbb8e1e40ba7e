//! What is old goes, an org at a time and a few rows at a time. Ids of turns are in the order of time, so that a range of the primary key says what is
//! old, and no statement reads what stays.

use uuid::Uuid;

use super::PostgresStore;
use super::reads::limit as rows_max;
use crate::ids::OrgId;
use crate::store::{Result, Retained, Retention};

statements! {
    RETAIN_ORG = "-- retain_org
SELECT org_id FROM orgs WHERE org_id > $1 ORDER BY org_id LIMIT 1";
    /// $1 org, $2 the oldest id that stays, $3 how many. A live turn has no outcome and stays. Of its snapshot stays what the chain or the next turn needs.
    RETAIN_TURNS = "-- retain_turns
WITH old AS MATERIALIZED (
  SELECT t.turn_id, t.agent_id, t.conversation_id, t.run_id FROM turns t
   WHERE t.org_id = $1 AND t.turn_id < $2 AND t.outcome IS NOT NULL ORDER BY t.turn_id LIMIT $3 FOR UPDATE SKIP LOCKED),
events AS (DELETE FROM turn_events e USING old o WHERE e.org_id = $1 AND e.turn_id = o.turn_id),
files AS (DELETE FROM attachment_refs f USING old o WHERE f.org_id = $1 AND f.turn_id = o.turn_id),
states AS (DELETE FROM snapshots s USING old o
  WHERE s.org_id = $1 AND s.run_id = o.run_id AND s.agent_id = o.agent_id AND s.conversation_id = o.conversation_id AND s.body IS NULL)
DELETE FROM turns t USING old o WHERE t.org_id = $1 AND t.turn_id = o.turn_id";
    /// $1 org, $2 the oldest id that stays, $3 how many rows.
    RETAIN_EVENTS = "-- retain_events
WITH old AS MATERIALIZED (
  SELECT e.turn_id, e.epoch, e.first_seq FROM turn_events e
   WHERE e.org_id = $1 AND e.turn_id < $2 AND NOT EXISTS (SELECT 1 FROM turn_markers m WHERE m.org_id = $1 AND m.turn_id = e.turn_id)
   ORDER BY e.turn_id LIMIT $3 FOR UPDATE SKIP LOCKED)
DELETE FROM turn_events e USING old o WHERE e.org_id = $1 AND e.turn_id = o.turn_id AND e.epoch = o.epoch AND e.first_seq = o.first_seq";
    /// $1 org, $2 the oldest time that stays, $3 how many rows.
    RETAIN_AUDIT = "-- retain_audit
WITH old AS MATERIALIZED (
  SELECT a.at, a.audit_id FROM audit a WHERE a.org_id = $1 AND a.at < $2 ORDER BY a.at, a.audit_id LIMIT $3 FOR UPDATE SKIP LOCKED)
DELETE FROM audit a USING old o WHERE a.org_id = $1 AND a.at = o.at AND a.audit_id = o.audit_id";
}

impl PostgresStore {
    pub(super) async fn retain_next(&self, after: Option<&OrgId>, keep: Retention, limit: usize) -> Result<Retained> {
        let asked = self.query(RETAIN_ORG).bind(after.map_or("", OrgId::as_str));
        let Some(row) = self.row_hostwide(asked).await? else { return Ok(Retained::default()) };
        let org: OrgId = super::reads::id(&row, 0)?;
        let mut rows = 0;
        for (sql, since) in [(RETAIN_TURNS, keep.turns_since), (RETAIN_EVENTS, keep.events_since)] {
            let Some(since) = since else { continue };
            let floor: Uuid = since.first_id();
            rows += self.change_hostwide(self.query(sql).bind(org.as_str()).bind(floor).bind(rows_max(limit))).await?;
        }
        if let Some(since) = keep.audit_since {
            let asked = self.query(RETAIN_AUDIT).bind(org.as_str()).bind(since.0).bind(rows_max(limit));
            rows += self.change_hostwide(asked).await?;
        }
        Ok(Retained { org: Some(org), rows: usize::try_from(rows).unwrap_or(usize::MAX) })
    }
}
