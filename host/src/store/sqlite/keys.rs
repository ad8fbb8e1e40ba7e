//! Orgs and API keys.

use rusqlite::params;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use super::reads::id;
use super::writer::{Tried, Tx};
use crate::audit::{Act, Actor};
use crate::caller::{Role, Scopes};
use crate::clock::Timestamp;
use crate::ids::{OrgId, UserId};
use crate::store::{KeyRecord, OrgRecord, Result, StoreError, TicketKey};

statements! {
    ORG_NEW = "-- org_new
INSERT INTO orgs (org_id, owner_user, created_at) VALUES (?1, ?2, ?3) ON CONFLICT (org_id) DO NOTHING";
    ORG_KNOWN = "-- org_known
SELECT 1 FROM orgs WHERE org_id = ?1 AND deleting_at IS NULL";
    /// The one list without an org: it is the operator's.
    ORGS = "-- orgs
SELECT org_id, owner_user, created_at, deleting_at FROM orgs ORDER BY org_id";
    ORG = "-- org
SELECT org_id, owner_user, created_at, deleting_at FROM orgs WHERE org_id = ?1";
    KEY_NEW = "-- key_new
INSERT INTO api_keys (org_id, key_id, key_hash, user_id, scopes, name, created_at, expires_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    KEY_SUCCEED = "-- key_succeed
UPDATE api_keys SET successor = ?3, expires_at = min(coalesce(expires_at, ?5), ?5)
 WHERE org_id = ?1 AND key_id = ?2 AND revoked_at IS NULL AND successor IS NULL AND (expires_at IS NULL OR expires_at > ?4)
   AND EXISTS (SELECT 1 FROM orgs WHERE org_id = ?1 AND deleting_at IS NULL)";
    KEY = "-- key
SELECT key_id, org_id, user_id, scopes, name, created_at, expires_at, revoked_at, last_used_at, successor FROM api_keys WHERE key_hash = ?1";
    KEY_BY_ID = "-- key_by_id
SELECT key_id, org_id, user_id, scopes, name, created_at, expires_at, revoked_at, last_used_at, successor FROM api_keys
 WHERE org_id = ?1 AND key_id = ?2";
    KEYS = "-- keys
SELECT key_id, org_id, user_id, scopes, name, created_at, expires_at, revoked_at, last_used_at, successor FROM api_keys
 WHERE org_id = ?1 ORDER BY created_at DESC, key_id";
    KEY_REVOKE = "-- key_revoke
UPDATE api_keys SET revoked_at = ?3 WHERE org_id = ?1 AND key_id = ?2 AND revoked_at IS NULL";
    KEY_KNOWN = "-- key_known
SELECT 1 FROM api_keys WHERE org_id = ?1 AND key_id = ?2";
    KEY_TOUCH = "-- key_touch
UPDATE api_keys SET last_used_at = ?3 WHERE org_id = ?1 AND key_id = ?2 AND (last_used_at IS NULL OR last_used_at < ?3)";
    TICKET_KEYS = "-- ticket_keys
SELECT key_no, secret, created_at FROM ticket_keys ORDER BY key_no DESC";
    TICKET_KEY_NEW = "-- ticket_key_new
INSERT INTO ticket_keys (key_no, secret, created_at) SELECT ?1, ?2, ?3 WHERE ?1 = (SELECT coalesce(max(key_no), 0) + 1 FROM ticket_keys)";
    TICKET_KEY_FORGET = "-- ticket_key_forget
DELETE FROM ticket_keys WHERE key_no < ?1 - 1";
}

/// To the minute: a key that is used all the time is written now and then.
const LAST_USED_STEP_MS: i64 = 60_000;

impl SqliteStore {
    pub(super) async fn read_orgs(&self) -> Result<Vec<OrgRecord>> {
        let rows = sqlx::query(ORGS).fetch_all(&self.readers).await?;
        rows.iter().map(org_record).collect()
    }

    pub(super) async fn read_org(&self, org: &OrgId) -> Result<Option<OrgRecord>> {
        let row = sqlx::query(ORG).bind(org.as_str()).fetch_optional(&self.readers).await?;
        row.as_ref().map(org_record).transpose()
    }

    pub(super) async fn read_key(&self, hash: [u8; 32]) -> Result<Option<KeyRecord>> {
        let row = sqlx::query(KEY).bind(&hash[..]).fetch_optional(&self.readers).await?;
        row.as_ref().map(record).transpose()
    }

    pub(super) async fn read_key_by_id(&self, org: &OrgId, key: &str) -> Result<Option<KeyRecord>> {
        let row = sqlx::query(KEY_BY_ID).bind(org.as_str()).bind(key).fetch_optional(&self.readers).await?;
        row.as_ref().map(record).transpose()
    }

    pub(super) async fn read_ticket_keys(&self) -> Result<Vec<TicketKey>> {
        let rows = sqlx::query(TICKET_KEYS).fetch_all(&self.readers).await?;
        rows.iter().map(ticket_key).collect()
    }

    pub(super) async fn read_keys(&self, org: &OrgId) -> Result<Vec<KeyRecord>> {
        let rows = sqlx::query(KEYS).bind(org.as_str()).fetch_all(&self.readers).await?;
        rows.iter().map(record).collect()
    }
}

pub(super) fn org_record(row: &SqliteRow) -> Result<OrgRecord> {
    Ok(OrgRecord {
        id: id(row, 0)?,
        owner: id(row, 1)?,
        created_at: Timestamp(row.try_get(2)?),
        deleting_at: row.try_get::<Option<i64>, _>(3)?.map(Timestamp),
    })
}

fn record(row: &SqliteRow) -> Result<KeyRecord> {
    let scopes: &str = row.try_get(3)?;
    let time = |column: usize| row.try_get::<Option<i64>, _>(column).map(|at| at.map(Timestamp));
    Ok(KeyRecord {
        id: row.try_get(0)?,
        org: id(row, 1)?,
        user: id(row, 2)?,
        scopes: Scopes::parse(scopes).map_err(|name| StoreError::Corrupt(format!("{name:?} is no scope")))?,
        name: row.try_get(4)?,
        created_at: Timestamp(row.try_get(5)?),
        expires_at: time(6)?,
        revoked_at: time(7)?,
        last_used_at: time(8)?,
        successor: row.try_get(9)?,
    })
}

fn ticket_key(row: &SqliteRow) -> Result<TicketKey> {
    let secret: &[u8] = row.try_get(1)?;
    let secret = secret.try_into().map_err(|_| StoreError::Corrupt("a ticket key has not 32 bytes".to_owned()))?;
    Ok(TicketKey { number: row.try_get(0)?, secret, created_at: Timestamp(row.try_get(2)?) })
}

impl Tx<'_> {
    pub(super) fn create_org(&self, org: &OrgId, owner: &UserId, by: &Actor) -> Tried<bool> {
        let made = self.conn.prepare_cached(ORG_NEW)?.execute(params![org.as_str(), owner.as_str(), self.now.0])?;
        if made == 1 {
            self.write_member(org, owner, Role::Owner, by)?;
            self.note(Some(org), &[Act::org_create(owner)], by)?;
        }
        Ok(made == 1)
    }

    pub(super) fn create_key(&self, hash: &[u8; 32], key: &KeyRecord, by: &Actor) -> Tried<bool> {
        if !self.conn.prepare_cached(ORG_KNOWN)?.exists(params![key.org.as_str()])? {
            return Ok(false);
        }
        self.conn.prepare_cached(KEY_NEW)?.execute(params![
            key.org.as_str(),
            key.id,
            &hash[..],
            key.user.as_str(),
            key.scopes.to_string(),
            key.name,
            key.created_at.0,
            key.expires_at.map(|at| at.0)
        ])?;
        let act = Act::key_create(&key.id, &key.user, key.scopes, key.expires_at);
        self.note(Some(&key.org), &[act], by)?;
        Ok(true)
    }

    pub(super) fn rotate_key(
        &self,
        id: &str,
        hash: &[u8; 32],
        key: &KeyRecord,
        overlap_ms: u64,
        by: &Actor,
    ) -> Tried<bool> {
        let ends = self.now.plus_ms(overlap_ms).0;
        let org = key.org.as_str();
        let replaced = self.conn.prepare_cached(KEY_SUCCEED)?.execute(params![org, id, key.id, self.now.0, ends])? == 1;
        if !replaced || !self.create_key(hash, key, by)? {
            return Ok(false);
        }
        self.note(Some(&key.org), &[Act::key_rotate(id, &key.id)], by)?;
        Ok(true)
    }

    pub(super) fn revoke_key(&self, org: &OrgId, id: &str, by: &Actor) -> Tried<bool> {
        if self.conn.prepare_cached(KEY_REVOKE)?.execute(params![org.as_str(), id, self.now.0])? == 1 {
            self.note(Some(org), &[Act::key_revoke(id)], by)?;
            return Ok(true);
        }
        // Revoked before: once, so it stays.
        Ok(self.conn.prepare_cached(KEY_KNOWN)?.exists(params![org.as_str(), id])?)
    }

    pub(super) fn add_ticket_key(&self, number: i64, secret: &[u8; 32]) -> Tried<bool> {
        let added = self.conn.prepare_cached(TICKET_KEY_NEW)?.execute(params![number, &secret[..], self.now.0])? == 1;
        if added {
            self.conn.prepare_cached(TICKET_KEY_FORGET)?.execute(params![number])?;
        }
        Ok(added)
    }

    pub(super) fn touch_keys(&self, used: &[(OrgId, String)]) -> Tried<()> {
        let minute = self.now.0 - self.now.0.rem_euclid(LAST_USED_STEP_MS);
        for (org, id) in used {
            self.conn.prepare_cached(KEY_TOUCH)?.execute(params![org.as_str(), id, minute])?;
        }
        Ok(())
    }
}
