//! The end of an org: its mark, and its rows, table by table and a few hundred at a time.
//!
//! A table that gets an `org_id` belongs into this list; a test looks through all tables for what is left.

use rusqlite::params;

use super::SqliteStore;
use super::keys::org_record;
use super::reads::{one_more, uuid};
use super::writer::{Tried, Tx};
use crate::audit::{Act, Actor};
use crate::ids::{OrgId, TurnId};
use crate::store::{Erased, OrgRecord, Result, StoreError};
use sqlx::Row;

statements! {
    ORG_MARK = "-- org_mark
UPDATE orgs SET deleting_at = ?2 WHERE org_id = ?1 AND deleting_at IS NULL";
    ORG_THERE = "-- org_there
SELECT deleting_at IS NOT NULL FROM orgs WHERE org_id = ?1";
    ORG_KEYS_END = "-- org_keys_end
UPDATE api_keys SET revoked_at = ?2 WHERE org_id = ?1 AND revoked_at IS NULL";
    DELETING = "-- deleting
SELECT org_id, owner_user, created_at, deleting_at FROM orgs WHERE deleting_at IS NOT NULL ORDER BY org_id";
    LIVE_OF_ORG = "-- live_of_org
SELECT turn_id FROM turn_markers WHERE org_id = ?1 LIMIT ?2";
    DIGESTS = "-- digests
SELECT digest FROM modules WHERE org_id = ?1";
    ERASE_TURN_EVENTS = "-- erase_turn_events
DELETE FROM turn_events WHERE org_id = ?1 AND (turn_id, epoch, first_seq) IN (SELECT turn_id, epoch, first_seq FROM turn_events WHERE org_id = ?1 LIMIT ?2)";
    ERASE_TURNS = "-- erase_turns
DELETE FROM turns WHERE org_id = ?1 AND turn_id IN (SELECT turn_id FROM turns WHERE org_id = ?1 LIMIT ?2)";
    ERASE_ATTACHMENT_REFS = "-- erase_attachment_refs
DELETE FROM attachment_refs WHERE org_id = ?1 AND (turn_id, digest) IN (SELECT turn_id, digest FROM attachment_refs WHERE org_id = ?1 LIMIT ?2)";
    ERASE_ATTACHMENT_UPLOADS = "-- erase_attachment_uploads
DELETE FROM attachment_uploads WHERE org_id = ?1 AND (digest, user_id) IN (SELECT digest, user_id FROM attachment_uploads WHERE org_id = ?1 LIMIT ?2)";
    ERASE_ATTACHMENT_PIECES = "-- erase_attachment_pieces
DELETE FROM attachment_pieces WHERE org_id = ?1 AND (digest, piece) IN (SELECT digest, piece FROM attachment_pieces WHERE org_id = ?1 LIMIT ?2)";
    ERASE_ATTACHMENTS = "-- erase_attachments
DELETE FROM attachments WHERE org_id = ?1 AND digest IN (SELECT digest FROM attachments WHERE org_id = ?1 LIMIT ?2)";
    ERASE_ATTACHMENTS_RELEASED = "-- erase_attachments_released
DELETE FROM attachments_released WHERE org_id = ?1 AND released_id IN (SELECT released_id FROM attachments_released WHERE org_id = ?1 LIMIT ?2)";
    ERASE_SNAPSHOTS = "-- erase_snapshots
DELETE FROM snapshots WHERE org_id = ?1 AND (agent_id, conversation_id, run_id) IN (SELECT agent_id, conversation_id, run_id FROM snapshots WHERE org_id = ?1 LIMIT ?2)";
    ERASE_IDEMPOTENCY_KEYS = "-- erase_idempotency_keys
DELETE FROM idempotency_keys WHERE org_id = ?1 AND (agent_id, conversation_id, idem_key) IN (SELECT agent_id, conversation_id, idem_key FROM idempotency_keys WHERE org_id = ?1 LIMIT ?2)";
    ERASE_CONVERSATION_NOTES = "-- erase_conversation_notes
DELETE FROM conversation_notes WHERE org_id = ?1 AND (agent_id, conversation_id) IN (SELECT agent_id, conversation_id FROM conversation_notes WHERE org_id = ?1 LIMIT ?2)";
    ERASE_CONVERSATIONS = "-- erase_conversations
DELETE FROM conversations WHERE org_id = ?1 AND (agent_id, conversation_id) IN (SELECT agent_id, conversation_id FROM conversations WHERE org_id = ?1 LIMIT ?2)";
    ERASE_AGENTS = "-- erase_agents
DELETE FROM agents WHERE org_id = ?1 AND agent_id IN (SELECT agent_id FROM agents WHERE org_id = ?1 LIMIT ?2)";
    ERASE_WORKER_VERSIONS = "-- erase_worker_versions
DELETE FROM worker_versions WHERE org_id = ?1 AND (worker, version) IN (SELECT worker, version FROM worker_versions WHERE org_id = ?1 LIMIT ?2)";
    ERASE_MODULES = "-- erase_modules
DELETE FROM modules WHERE org_id = ?1 AND digest IN (SELECT digest FROM modules WHERE org_id = ?1 LIMIT ?2)";
    ERASE_API_KEYS = "-- erase_api_keys
DELETE FROM api_keys WHERE org_id = ?1 AND key_id IN (SELECT key_id FROM api_keys WHERE org_id = ?1 LIMIT ?2)";
    ERASE_LIMITS = "-- erase_limits
DELETE FROM org_limits WHERE org_id = ?1 AND org_id IN (SELECT org_id FROM org_limits WHERE org_id = ?1 LIMIT ?2)";
    ERASE_AGENT_LOAD = "-- erase_agent_load
DELETE FROM agent_load WHERE org_id = ?1 AND agent_id IN (SELECT agent_id FROM agent_load WHERE org_id = ?1 LIMIT ?2)";
    ERASE_MEMBERS = "-- erase_members
DELETE FROM org_members WHERE org_id = ?1 AND user_id IN (SELECT user_id FROM org_members WHERE org_id = ?1 LIMIT ?2)";
    ERASE_AUDIT = "-- erase_audit
DELETE FROM audit WHERE org_id = ?1 AND (at, audit_id) IN (SELECT at, audit_id FROM audit WHERE org_id = ?1 LIMIT ?2)";
    ERASE_ORG = "-- erase_org
DELETE FROM orgs WHERE org_id = ?1 AND deleting_at IS NOT NULL";
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
    ERASE_LIMITS,
    ERASE_MEMBERS,
    ERASE_AUDIT,
];

impl SqliteStore {
    pub(super) async fn read_deleting(&self) -> Result<Vec<OrgRecord>> {
        let rows = sqlx::query(DELETING).fetch_all(&self.readers).await?;
        rows.iter().map(org_record).collect()
    }

    pub(super) async fn read_live_turns(&self, org: &OrgId, limit: usize) -> Result<Vec<TurnId>> {
        let asked = sqlx::query(LIVE_OF_ORG).bind(org.as_str()).bind(one_more(limit) - 1);
        asked.fetch_all(&self.readers).await?.iter().map(|row| Ok(TurnId(uuid(row, 0)?))).collect()
    }

    pub(super) async fn read_digests(&self, org: &OrgId) -> Result<Vec<[u8; 32]>> {
        let rows = sqlx::query(DIGESTS).bind(org.as_str()).fetch_all(&self.readers).await?;
        let digest =
            |bytes: &[u8]| bytes.try_into().map_err(|_| StoreError::Corrupt("a digest is not 32 bytes".to_owned()));
        rows.iter().map(|row| digest(row.try_get(0)?)).collect()
    }
}

impl Tx<'_> {
    pub(super) fn mark_org(&self, org: &OrgId, by: &Actor) -> Tried<bool> {
        let asked = params![org.as_str(), self.now.0];
        if self.conn.prepare_cached(ORG_MARK)?.execute(asked)? == 1 {
            self.conn.prepare_cached(ORG_KEYS_END)?.execute(asked)?;
            self.note(None, &[Act::org_delete(org)], by)?;
            return Ok(true);
        }
        Ok(self.conn.prepare_cached(ORG_THERE)?.exists(params![org.as_str()])?)
    }

    pub(super) fn erase_org(&self, org: &OrgId, limit: usize) -> Tried<Erased> {
        let key = params![org.as_str()];
        let marked = self.conn.prepare_cached(ORG_THERE)?.query_row(key, |row| row.get::<_, bool>(0));
        let marked = match marked {
            Err(rusqlite::Error::QueryReturnedNoRows) => return Ok(Erased::Whole),
            other => other?,
        };
        if !marked || self.conn.prepare_cached(LIVE_OF_ORG)?.exists(params![org.as_str(), 1])? {
            return Ok(Erased::Not);
        }
        for statement in ERASE {
            let rows = match *statement {
                // A module's bytes are megabytes, a piece of an attachment a quarter of one.
                ERASE_MODULES => 4,
                ERASE_ATTACHMENT_PIECES => 32,
                _ => i64::try_from(limit).unwrap_or(i64::MAX),
            };
            let gone = self.conn.prepare_cached(statement)?.execute(params![org.as_str(), rows])?;
            if gone > 0 {
                return Ok(Erased::Rows(gone));
            }
        }
        self.conn.prepare_cached(ERASE_ORG)?.execute(key)?;
        Ok(Erased::Whole)
    }
}
