//! The end of an org: its mark, and its rows, table by table and a few hundred at a time.
//!
//! A table that gets an `org_id` belongs into this list; a test looks through all tables for what is left.

use sqlx::Row;

use super::catalog::LOAD_LOCK;
use super::keys::org_record;
use super::reads::limit as rows_max;
use super::{BEGIN, PostgresStore};
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::ids::{OrgId, TurnId};
use crate::store::{Erased, OrgRecord, Result, StoreError};

statements! {
    ORG_MARK = "-- org_mark
UPDATE orgs SET deleting_at = coalesce($2::bigint, turnhouse_now()) WHERE org_id = $1 AND deleting_at IS NULL";
    ORG_THERE = "-- org_there
SELECT deleting_at IS NOT NULL FROM orgs WHERE org_id = $1";
    ORG_KEYS_END = "-- org_keys_end
UPDATE api_keys SET revoked_at = coalesce($2::bigint, turnhouse_now()) WHERE org_id = $1 AND revoked_at IS NULL";
    DELETING = "-- deleting
SELECT org_id, owner_user, created_at, deleting_at FROM orgs WHERE deleting_at IS NOT NULL ORDER BY org_id";
    LIVE_OF_ORG = "-- live_of_org
SELECT turn_id FROM turn_markers WHERE org_id = $1 LIMIT $2";
    DIGESTS = "-- digests
SELECT digest FROM modules WHERE org_id = $1";
    ERASE_TURN_EVENTS = "-- erase_turn_events
DELETE FROM turn_events WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM turn_events WHERE org_id = $1 LIMIT $2))";
    ERASE_TURNS = "-- erase_turns
DELETE FROM turns WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM turns WHERE org_id = $1 LIMIT $2))";
    ERASE_ATTACHMENT_REFS = "-- erase_attachment_refs
DELETE FROM attachment_refs WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM attachment_refs WHERE org_id = $1 LIMIT $2))";
    ERASE_ATTACHMENT_UPLOADS = "-- erase_attachment_uploads
DELETE FROM attachment_uploads WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM attachment_uploads WHERE org_id = $1 LIMIT $2))";
    ERASE_ATTACHMENT_PIECES = "-- erase_attachment_pieces
DELETE FROM attachment_pieces WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM attachment_pieces WHERE org_id = $1 LIMIT $2))";
    ERASE_ATTACHMENTS = "-- erase_attachments
DELETE FROM attachments WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM attachments WHERE org_id = $1 LIMIT $2))";
    ERASE_ATTACHMENTS_RELEASED = "-- erase_attachments_released
DELETE FROM attachments_released WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM attachments_released WHERE org_id = $1 LIMIT $2))";
    ERASE_SNAPSHOTS = "-- erase_snapshots
DELETE FROM snapshots WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM snapshots WHERE org_id = $1 LIMIT $2))";
    ERASE_IDEMPOTENCY_KEYS = "-- erase_idempotency_keys
DELETE FROM idempotency_keys WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM idempotency_keys WHERE org_id = $1 LIMIT $2))";
    ERASE_CONVERSATION_NOTES = "-- erase_conversation_notes
DELETE FROM conversation_notes WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM conversation_notes WHERE org_id = $1 LIMIT $2))";
    ERASE_CONVERSATIONS = "-- erase_conversations
DELETE FROM conversations WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM conversations WHERE org_id = $1 LIMIT $2))";
    ERASE_AGENTS = "-- erase_agents
DELETE FROM agents WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM agents WHERE org_id = $1 LIMIT $2))";
    ERASE_AGENT_LOAD = "-- erase_agent_load
DELETE FROM agent_load WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM agent_load WHERE org_id = $1 LIMIT $2))";
    ERASE_WORKER_VERSIONS = "-- erase_worker_versions
DELETE FROM worker_versions WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM worker_versions WHERE org_id = $1 LIMIT $2))";
    ERASE_MODULES = "-- erase_modules
DELETE FROM modules WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM modules WHERE org_id = $1 LIMIT $2))";
    ERASE_API_KEYS = "-- erase_api_keys
DELETE FROM api_keys WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM api_keys WHERE org_id = $1 LIMIT $2))";
    ERASE_MEMBERS = "-- erase_members
DELETE FROM org_members WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM org_members WHERE org_id = $1 LIMIT $2))";
    ERASE_AUDIT = "-- erase_audit
DELETE FROM audit WHERE org_id = $1 AND ctid = ANY (ARRAY(SELECT ctid FROM audit WHERE org_id = $1 LIMIT $2))";
    ERASE_ORG = "-- erase_org
DELETE FROM orgs WHERE org_id = $1 AND deleting_at IS NOT NULL";
    ERASE_LOAD = "-- erase_load
DELETE FROM org_load WHERE org_id = $1";
}

/// What an org has rows in, in the order in which they go. The audit last: until then it says what is happening.
const ERASE: &[&str] = &[
    ERASE_TURN_EVENTS,
    ERASE_TURNS,
    ERASE_ATTACHMENT_REFS,
    ERASE_ATTACHMENT_UPLOADS,
    ERASE_ATTACHMENT_PIECES,
    ERASE_ATTACHMENTS,
    ERASE_ATTACHMENTS_RELEASED,
    ERASE_SNAPSHOTS,
    ERASE_IDEMPOTENCY_KEYS,
    ERASE_CONVERSATION_NOTES,
    ERASE_CONVERSATIONS,
    ERASE_AGENTS,
    ERASE_AGENT_LOAD,
    ERASE_WORKER_VERSIONS,
    ERASE_MODULES,
    ERASE_API_KEYS,
    ERASE_MEMBERS,
    ERASE_AUDIT,
];

impl PostgresStore {
    pub(super) async fn read_deleting(&self) -> Result<Vec<OrgRecord>> {
        self.rows_hostwide(self.query(DELETING)).await?.iter().map(org_record).collect()
    }

    pub(super) async fn read_live_turns(&self, org: &OrgId, limit: usize) -> Result<Vec<TurnId>> {
        let asked = self.query(LIVE_OF_ORG).bind(org.as_str()).bind(rows_max(limit));
        self.rows_of(org, asked).await?.iter().map(|row| Ok(TurnId(row.try_get(0)?))).collect()
    }

    pub(super) async fn read_digests(&self, org: &OrgId) -> Result<Vec<[u8; 32]>> {
        let rows = self.rows_of(org, self.query(DIGESTS).bind(org.as_str())).await?;
        let digest =
            |bytes: &[u8]| bytes.try_into().map_err(|_| StoreError::Corrupt("a digest is not 32 bytes".to_owned()));
        rows.iter().map(|row| digest(row.try_get(0)?)).collect()
    }

    pub(super) async fn write_mark(&self, org: &OrgId, now: Timestamp, by: &Actor) -> Result<bool> {
        let mut tx = self.begin_hostwide(BEGIN).await?;
        let at = self.clock.of(now);
        if self.query(ORG_MARK).bind(org.as_str()).bind(at).execute(&mut *tx).await?.rows_affected() == 0 {
            let there = self.query(ORG_THERE).bind(org.as_str()).fetch_optional(&mut *tx).await?;
            return Ok(there.is_some());
        }
        self.query(ORG_KEYS_END).bind(org.as_str()).bind(at).execute(&mut *tx).await?;
        self.note(&mut tx, None, &[Act::org_delete(org)], by, now).await?;
        tx.commit().await?;
        Ok(true)
    }

    pub(super) async fn erase_step(&self, org: &OrgId, limit: usize) -> Result<Erased> {
        let id = org.as_str();
        let there = self.row_hostwide(self.query(ORG_THERE).bind(id)).await?;
        let Some(there) = there else { return Ok(Erased::Whole) };
        if !there.try_get::<bool, _>(0)? || !self.read_live_turns(org, 1).await?.is_empty() {
            return Ok(Erased::Not);
        }
        for statement in ERASE {
            let rows = match *statement {
                // A module's bytes are megabytes, a piece of an attachment a quarter of one.
                ERASE_MODULES => 4,
                ERASE_ATTACHMENT_PIECES => 32,
                _ => rows_max(limit),
            };
            let gone = self.change_hostwide(self.query(statement).bind(id).bind(rows)).await?;
            if gone > 0 {
                return Ok(Erased::Rows(usize::try_from(gone).unwrap_or(usize::MAX)));
            }
        }
        // Under the lock under which turns are accepted: none came in since they were looked for.
        let mut tx = self.begin_hostwide(BEGIN).await?;
        self.query(LOAD_LOCK).bind(id).execute(&mut *tx).await?;
        if self.query(LIVE_OF_ORG).bind(id).bind(1_i64).fetch_optional(&mut *tx).await?.is_some() {
            return Ok(Erased::Not);
        }
        self.query(ERASE_LOAD).bind(id).execute(&mut *tx).await?;
        self.query(ERASE_ORG).bind(id).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(Erased::Whole)
    }
}
