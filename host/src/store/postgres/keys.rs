//! Orgs and API keys.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::members::MEMBERS_LOCK;
use super::reads::id;
use super::{BEGIN, PostgresStore};
use crate::audit::{Act, Actor};
use crate::caller::Scopes;
use crate::clock::Timestamp;
use crate::ids::{OrgId, UserId};
use crate::store::{KeyRecord, OrgRecord, Result, StoreError, TicketKey};

statements! {
    /// With its owner as its first member, and the row under whose lock its turns will change.
    ORG_NEW = "-- org_new
WITH made AS (INSERT INTO orgs (org_id, owner_user, created_at) VALUES ($1, $2, coalesce($3::bigint, turnhouse_now()))
              ON CONFLICT (org_id) DO NOTHING RETURNING created_at),
     joined AS (INSERT INTO org_members (org_id, user_id, role, added_at, added_by) SELECT $1, $2, 'owner', created_at, $4 FROM made),
     load AS (INSERT INTO org_load (org_id) VALUES ($1) ON CONFLICT (org_id) DO NOTHING)
SELECT EXISTS (SELECT 1 FROM made)";
    /// The one list without an org: it is the operator's.
    ORGS = "-- orgs
SELECT org_id, owner_user, created_at, deleting_at FROM orgs ORDER BY org_id";
    ORG = "-- org
SELECT org_id, owner_user, created_at, deleting_at FROM orgs WHERE org_id = $1";
    /// $7 is when its maker made it, $8 when it shall end by the same clock; $9 the time when it is not the database's.
    KEY_NEW = "-- key_new
INSERT INTO api_keys (org_id, key_id, key_hash, user_id, scopes, name, created_at, expires_at)
SELECT $1, $2, $3, $4, $5, $6, n.now, n.now + ($8::bigint - $7::bigint)
  FROM (SELECT coalesce($9::bigint, turnhouse_now()) AS now) n WHERE EXISTS (SELECT 1 FROM orgs WHERE org_id = $1 AND deleting_at IS NULL)";
    /// $2 is replaced by $3, whose life is $8 and which is made at the same moment; of two successors at once the second finds the first. $9 is the time when it
    /// is not the database's, $10 the overlap.
    KEY_SUCCEED = "-- key_succeed
WITH n AS (SELECT coalesce($9::bigint, turnhouse_now()) AS now),
     old AS (UPDATE api_keys k SET successor = $3, expires_at = least(k.expires_at, n.now + $10::bigint) FROM n
              WHERE k.org_id = $1 AND k.key_id = $2 AND k.revoked_at IS NULL AND k.successor IS NULL AND (k.expires_at IS NULL OR k.expires_at > n.now)
                AND EXISTS (SELECT 1 FROM orgs o WHERE o.org_id = $1 AND o.deleting_at IS NULL)
             RETURNING n.now)
INSERT INTO api_keys (org_id, key_id, key_hash, user_id, scopes, name, created_at, expires_at)
SELECT $1, $3, $4, $5, $6, $7, old.now, old.now + $8::bigint FROM old";
    KEY = "-- key
SELECT key_id, org_id, user_id, scopes, name, created_at, expires_at, revoked_at, last_used_at, successor FROM api_keys WHERE key_hash = $1";
    KEY_BY_ID = "-- key_by_id
SELECT key_id, org_id, user_id, scopes, name, created_at, expires_at, revoked_at, last_used_at, successor FROM api_keys
 WHERE org_id = $1 AND key_id = $2";
    KEYS = "-- keys
SELECT key_id, org_id, user_id, scopes, name, created_at, expires_at, revoked_at, last_used_at, successor FROM api_keys
 WHERE org_id = $1 ORDER BY created_at DESC, key_id";
    KEY_REVOKE = "-- key_revoke
UPDATE api_keys SET revoked_at = coalesce($3::bigint, turnhouse_now()) WHERE org_id = $1 AND key_id = $2 AND revoked_at IS NULL";
    KEY_KNOWN = "-- key_known
SELECT 1 FROM api_keys WHERE org_id = $1 AND key_id = $2";
    /// To the minute: a key that is used all the time is written now and then. In the order of keys, so that two hosts do not lock each other out.
    KEY_TOUCH = "-- key_touch
WITH used AS MATERIALIZED (
  SELECT k.org_id, k.key_id, n.minute FROM (SELECT t.now - t.now % 60000 AS minute FROM (SELECT coalesce($3::bigint, turnhouse_now()) AS now) t) n,
         unnest($1::text[], $2::text[]) AS u (org_id, key_id)
    JOIN api_keys k ON k.org_id = u.org_id AND k.key_id = u.key_id
   WHERE k.last_used_at IS NULL OR k.last_used_at < n.minute
   ORDER BY k.org_id, k.key_id FOR NO KEY UPDATE OF k)
UPDATE api_keys k SET last_used_at = used.minute FROM used WHERE k.org_id = used.org_id AND k.key_id = used.key_id";
    TICKET_KEYS = "-- ticket_keys
SELECT key_no, secret, created_at FROM ticket_keys ORDER BY key_no DESC";
    /// Of two hosts that add the same number at once one waits for the other and then adds nothing.
    TICKET_KEY_NEW = "-- ticket_key_new
WITH made AS (INSERT INTO ticket_keys (key_no, secret, created_at)
              SELECT $1, $2, coalesce($3::bigint, turnhouse_now()) WHERE $1 = (SELECT coalesce(max(key_no), 0) + 1 FROM ticket_keys)
              ON CONFLICT (key_no) DO NOTHING RETURNING key_no),
     gone AS (DELETE FROM ticket_keys t USING made m WHERE t.key_no < m.key_no - 1)
SELECT EXISTS (SELECT 1 FROM made)";
}

impl PostgresStore {
    pub(super) async fn write_org(&self, org: &OrgId, owner: &UserId, now: Timestamp, by: &Actor) -> Result<bool> {
        let mut tx = self.begin_hostwide(BEGIN).await?;
        let made = self.put_org(&mut tx, org, owner, now, by).await?;
        tx.commit().await?;
        Ok(made)
    }

    pub(super) async fn put_org(
        &self,
        tx: &mut PgConnection,
        org: &OrgId,
        owner: &UserId,
        now: Timestamp,
        by: &Actor,
    ) -> Result<bool> {
        let asked = self.query(ORG_NEW).bind(org.as_str()).bind(owner.as_str()).bind(self.clock.of(now)).bind(&by.user);
        let made = asked.fetch_one(&mut *tx).await?.try_get(0)?;
        if made {
            self.note(tx, Some(org.as_str()), &[Act::org_create(owner)], by, now).await?;
        }
        Ok(made)
    }

    pub(super) async fn read_orgs(&self) -> Result<Vec<OrgRecord>> {
        let rows = self.rows_hostwide(self.query(ORGS)).await?;
        rows.iter().map(org_record).collect()
    }

    pub(super) async fn read_org(&self, org: &OrgId) -> Result<Option<OrgRecord>> {
        let row = self.row_of(org, self.query(ORG).bind(org.as_str())).await?;
        row.as_ref().map(org_record).transpose()
    }

    pub(super) async fn write_key(&self, hash: [u8; 32], key: &KeyRecord, by: &Actor) -> Result<bool> {
        let mut tx = self.begin_of(&key.org, BEGIN).await?;
        let asked = self
            .query(KEY_NEW)
            .bind(key.org.as_str())
            .bind(key.id.as_str())
            .bind(&hash[..])
            .bind(key.user.as_str())
            .bind(key.scopes.to_string())
            .bind(key.name.as_str())
            .bind(key.created_at.0)
            .bind(key.expires_at.map(|at| at.0))
            .bind(self.clock.of(key.created_at));
        let made = asked.execute(&mut *tx).await?.rows_affected() == 1;
        if made {
            let act = Act::key_create(&key.id, &key.user, key.scopes, key.expires_at);
            self.note(&mut tx, Some(key.org.as_str()), &[act], by, key.created_at).await?;
        }
        tx.commit().await?;
        Ok(made)
    }

    pub(super) async fn write_successor(
        &self,
        id: &str,
        hash: [u8; 32],
        key: &KeyRecord,
        overlap_ms: u64,
        by: &Actor,
    ) -> Result<bool> {
        let mut tx = self.begin_of(&key.org, BEGIN).await?;
        // Whoever leaves the org meanwhile leaves no key behind: it is ended before it has a successor, or its successor with it.
        self.query(MEMBERS_LOCK).bind(key.org.as_str()).execute(&mut *tx).await?;
        let asked = self
            .query(KEY_SUCCEED)
            .bind(key.org.as_str())
            .bind(id)
            .bind(key.id.as_str())
            .bind(&hash[..])
            .bind(key.user.as_str())
            .bind(key.scopes.to_string())
            .bind(key.name.as_str())
            .bind(key.expires_at.map(|at| at.0.saturating_sub(key.created_at.0)))
            .bind(self.clock.of(key.created_at))
            .bind(i64::try_from(overlap_ms).unwrap_or(i64::MAX));
        let rotated = asked.execute(&mut *tx).await?.rows_affected() == 1;
        if rotated {
            let acts = [Act::key_create(&key.id, &key.user, key.scopes, key.expires_at), Act::key_rotate(id, &key.id)];
            self.note(&mut tx, Some(key.org.as_str()), &acts, by, key.created_at).await?;
        }
        tx.commit().await?;
        Ok(rotated)
    }

    pub(super) async fn read_key(&self, hash: [u8; 32]) -> Result<Option<KeyRecord>> {
        let row = self.row_hostwide(self.query(KEY).bind(&hash[..])).await?;
        row.as_ref().map(record).transpose()
    }

    pub(super) async fn read_key_by_id(&self, org: &OrgId, key: &str) -> Result<Option<KeyRecord>> {
        let row = self.row_of(org, self.query(KEY_BY_ID).bind(org.as_str()).bind(key)).await?;
        row.as_ref().map(record).transpose()
    }

    pub(super) async fn read_ticket_keys(&self) -> Result<Vec<TicketKey>> {
        let rows = self.rows_hostwide(self.query(TICKET_KEYS)).await?;
        rows.iter().map(ticket_key).collect()
    }

    pub(super) async fn write_ticket_key(&self, number: i64, secret: [u8; 32], now: Timestamp) -> Result<bool> {
        let asked = self.query(TICKET_KEY_NEW).bind(number).bind(&secret[..]).bind(self.clock.of(now));
        Ok(self.one_hostwide(asked).await?.try_get(0)?)
    }

    pub(super) async fn read_keys(&self, org: &OrgId) -> Result<Vec<KeyRecord>> {
        let rows = self.rows_of(org, self.query(KEYS).bind(org.as_str())).await?;
        rows.iter().map(record).collect()
    }

    pub(super) async fn write_revocation(&self, org: &OrgId, id: &str, now: Timestamp, by: &Actor) -> Result<bool> {
        let mut tx = self.begin_of(org, BEGIN).await?;
        let asked = self.query(KEY_REVOKE).bind(org.as_str()).bind(id).bind(self.clock.of(now));
        if asked.execute(&mut *tx).await?.rows_affected() == 0 {
            // Revoked before: once, so it stays.
            let known = self.query(KEY_KNOWN).bind(org.as_str()).bind(id).fetch_optional(&mut *tx).await?;
            return Ok(known.is_some());
        }
        self.note(&mut tx, Some(org.as_str()), &[Act::key_revoke(id)], by, now).await?;
        tx.commit().await?;
        Ok(true)
    }

    pub(super) async fn write_last_use(&self, used: &[(OrgId, String)], now: Timestamp) -> Result<()> {
        let orgs: Vec<&str> = used.iter().map(|(org, _)| org.as_str()).collect();
        let keys: Vec<&str> = used.iter().map(|(_, key)| key.as_str()).collect();
        self.change_hostwide(self.query(KEY_TOUCH).bind(orgs).bind(keys).bind(self.clock.of(now))).await?;
        Ok(())
    }
}

pub(super) fn org_record(row: &PgRow) -> Result<OrgRecord> {
    Ok(OrgRecord {
        id: id(row, 0)?,
        owner: id(row, 1)?,
        created_at: Timestamp(row.try_get(2)?),
        deleting_at: row.try_get::<Option<i64>, _>(3)?.map(Timestamp),
    })
}

fn record(row: &PgRow) -> Result<KeyRecord> {
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

fn ticket_key(row: &PgRow) -> Result<TicketKey> {
    let secret: &[u8] = row.try_get(1)?;
    let secret = secret.try_into().map_err(|_| StoreError::Corrupt("a ticket key has not 32 bytes".to_owned()))?;
    Ok(TicketKey { number: row.try_get(0)?, secret, created_at: Timestamp(row.try_get(2)?) })
}
