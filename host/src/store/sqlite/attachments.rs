//! Attachments: stored by their bytes, used by whoever uploaded them or has a turn that refers to them, gone when nobody does.

use bytes::Bytes;
use rusqlite::{OptionalExtension, params};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use super::reads::{one_more, page};
use super::writer::{Tried, Tx};
use crate::attachment::{Attachment, AttachmentId};
use crate::clock::Timestamp;
use crate::ids::{OrgId, TurnId, UserId};
use crate::store::{Accept, Page, PutAttachment, Result, StoreError};

/// So much goes in one step of the sweep: nobody waits for it for long.
const SWEEP_BYTES_MAX: i64 = 16 << 20;

statements! {
    ATTACHMENT_ORG = "-- attachment_org
SELECT 1 FROM orgs WHERE org_id = ?1 AND deleting_at IS NULL";
    ATTACHMENT_THERE = "-- attachment_there
SELECT bytes FROM attachments WHERE org_id = ?1 AND digest = ?2";
    ATTACHMENT_BYTES = "-- attachment_bytes
SELECT coalesce(sum(bytes), 0) FROM attachments WHERE org_id = ?1";
    ATTACHMENT_NEW = "-- attachment_new
INSERT INTO attachments (org_id, digest, bytes, created_at) VALUES (?1, ?2, ?3, ?4)";
    ATTACHMENT_PIECE_NEW = "-- attachment_piece_new
INSERT INTO attachment_pieces (org_id, digest, piece, body) VALUES (?1, ?2, ?3, ?4)";
    UPLOAD_THERE = "-- upload_there
SELECT 1 FROM attachment_uploads WHERE org_id = ?1 AND digest = ?2 AND user_id = ?3";
    UPLOAD_PUT = "-- upload_put
INSERT INTO attachment_uploads (org_id, digest, user_id, media_type, uploaded_at) VALUES (?1, ?2, ?3, ?4, ?5)
ON CONFLICT (org_id, digest, user_id) DO UPDATE SET media_type = excluded.media_type, uploaded_at = excluded.uploaded_at";
    /// ?3 the member. Of what is not theirs there is no media type.
    ATTACHMENT_OF = "-- attachment_of
SELECT a.digest, a.bytes, coalesce(
         (SELECT u.media_type FROM attachment_uploads u WHERE u.org_id = ?1 AND u.digest = ?2 AND u.user_id = ?3),
         (SELECT r.media_type FROM attachment_refs r WHERE r.org_id = ?1 AND r.digest = ?2 AND r.user_id = ?3 LIMIT 1))
  FROM attachments a WHERE a.org_id = ?1 AND a.digest = ?2";
    ATTACHMENT_OF_ORG = "-- attachment_of_org
SELECT a.digest, a.bytes, coalesce(
         (SELECT u.media_type FROM attachment_uploads u WHERE u.org_id = ?1 AND u.digest = ?2 LIMIT 1),
         (SELECT r.media_type FROM attachment_refs r WHERE r.org_id = ?1 AND r.digest = ?2 LIMIT 1))
  FROM attachments a WHERE a.org_id = ?1 AND a.digest = ?2";
    ATTACHMENTS_OF_TURN = "-- attachments_of_turn
SELECT r.digest, a.bytes, r.media_type FROM attachment_refs r JOIN attachments a ON a.org_id = r.org_id AND a.digest = r.digest
 WHERE r.org_id = ?1 AND r.turn_id = ?2";
    ATTACHMENTS_OF_ORG = "-- attachments_of_org
SELECT a.digest, a.bytes, coalesce(
         (SELECT u.media_type FROM attachment_uploads u WHERE u.org_id = a.org_id AND u.digest = a.digest LIMIT 1),
         (SELECT r.media_type FROM attachment_refs r WHERE r.org_id = a.org_id AND r.digest = a.digest LIMIT 1))
  FROM attachments a WHERE a.org_id = ?1 AND a.digest > ?2 ORDER BY a.digest LIMIT ?3";
    ATTACHMENT_PIECE = "-- attachment_piece
SELECT body FROM attachment_pieces WHERE org_id = ?1 AND digest = ?2 AND piece = ?3";
    ATTACHMENT_REFER = "-- attachment_refer
INSERT INTO attachment_refs (org_id, turn_id, digest, user_id, media_type) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING";
    /// Whoever uploaded one for a turn of this conversation has it no longer.
    DELETE_UPLOADS = "-- delete_uploads
DELETE FROM attachment_uploads WHERE org_id = ?1 AND (digest, user_id) IN (
  SELECT r.digest, r.user_id FROM turns t JOIN attachment_refs r ON r.org_id = t.org_id AND r.turn_id = t.turn_id
   WHERE t.org_id = ?1 AND t.agent_id = ?2 AND t.conversation_id = ?3 AND (t.seq IS NOT NULL OR t.user_id = (
    SELECT c.user_id FROM conversations c WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.conversation_id = ?3)))";
    DELETE_REFS = "-- delete_refs
DELETE FROM attachment_refs WHERE org_id = ?1 AND turn_id IN (
  SELECT t.turn_id FROM turns t WHERE t.org_id = ?1 AND t.agent_id = ?2 AND t.conversation_id = ?3 AND (t.seq IS NOT NULL OR t.user_id = (
    SELECT c.user_id FROM conversations c WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.conversation_id = ?3)))";
    UPLOADS_FORGET = "-- uploads_forget
DELETE FROM attachment_uploads WHERE (org_id, digest, user_id) IN (
  SELECT org_id, digest, user_id FROM attachment_uploads WHERE uploaded_at < ?1 ORDER BY uploaded_at LIMIT ?2)";
    RELEASED_NEXT = "-- released_next
SELECT released_id, org_id, digest FROM attachments_released WHERE released_id > ?1 ORDER BY released_id LIMIT 1";
    RELEASED_USED = "-- released_used
SELECT EXISTS (SELECT 1 FROM attachment_refs WHERE org_id = ?1 AND digest = ?2) OR EXISTS (SELECT 1 FROM attachment_uploads WHERE org_id = ?1 AND digest = ?2)";
    PIECES_DROP = "-- pieces_drop
DELETE FROM attachment_pieces WHERE org_id = ?1 AND digest = ?2";
    ATTACHMENT_DROP = "-- attachment_drop
DELETE FROM attachments WHERE org_id = ?1 AND digest = ?2 RETURNING bytes";
    RELEASED_DROP = "-- released_drop
DELETE FROM attachments_released WHERE released_id = ?1";
}

impl SqliteStore {
    pub(super) async fn read_attachments(
        &self,
        org: &OrgId,
        user: Option<&UserId>,
        ids: &[AttachmentId],
    ) -> Result<Vec<Attachment>> {
        let mut found = Vec::with_capacity(ids.len());
        for id in ids {
            let statement = if user.is_some() { ATTACHMENT_OF } else { ATTACHMENT_OF_ORG };
            let mut asked = sqlx::query(statement).bind(org.as_str()).bind(&id.0[..]);
            if let Some(user) = user {
                asked = asked.bind(user.as_str());
            }
            let row = asked.fetch_optional(&self.readers).await?;
            found.extend(row.map(|row| attachment_or_none(&row)).transpose()?.flatten());
        }
        Ok(found)
    }

    pub(super) async fn read_attachments_of(&self, org: &OrgId, turns: &[TurnId]) -> Result<Vec<Attachment>> {
        let mut found = Vec::new();
        for turn in turns {
            let asked = sqlx::query(ATTACHMENTS_OF_TURN).bind(org.as_str()).bind(turn.as_bytes());
            for row in asked.fetch_all(&self.readers).await? {
                found.push(attachment(&row)?);
            }
        }
        Ok(found)
    }

    pub(super) async fn read_org_attachments(
        &self,
        org: &OrgId,
        after: Option<AttachmentId>,
        limit: usize,
    ) -> Result<Page<Attachment>> {
        let after = after.map_or_else(Vec::new, |id| id.0.to_vec());
        let asked = sqlx::query(ATTACHMENTS_OF_ORG).bind(org.as_str()).bind(after).bind(one_more(limit));
        page(&asked.fetch_all(&self.readers).await?, limit, attachment)
    }

    pub(super) async fn read_piece(&self, org: &OrgId, id: AttachmentId, piece: u32) -> Result<Option<Bytes>> {
        let asked = sqlx::query(ATTACHMENT_PIECE).bind(org.as_str()).bind(&id.0[..]).bind(piece);
        let row = asked.fetch_optional(&self.readers).await?;
        row.map(|row| Ok(row.try_get::<Vec<u8>, _>(0)?.into())).transpose()
    }
}

fn attachment_or_none(row: &SqliteRow) -> Result<Option<Attachment>> {
    if row.try_get::<Option<&str>, _>(2)?.is_none() {
        return Ok(None);
    }
    attachment(row).map(Some)
}

fn attachment(row: &SqliteRow) -> Result<Attachment> {
    let id = AttachmentId::from_slice(row.try_get(0)?)
        .ok_or_else(|| StoreError::Corrupt("an attachment's digest is not 32 bytes".to_owned()))?;
    // One that nothing refers to any more has no type, until the sweep comes by.
    let media_type = row.try_get::<Option<String>, _>(2)?.unwrap_or_else(|| "application/octet-stream".to_owned());
    Ok(Attachment { id, media_type, bytes: row.try_get::<i64, _>(1)?.unsigned_abs() })
}

impl Tx<'_> {
    pub(super) fn put_attachment(
        &self,
        org: &OrgId,
        user: &UserId,
        attachment: &Attachment,
        pieces: &[Bytes],
        org_bytes_max: u64,
    ) -> Tried<PutAttachment> {
        let (of, org, user, digest) = (org, org.as_str(), user.as_str(), &attachment.id.0[..]);
        if !self.conn.prepare_cached(ATTACHMENT_ORG)?.exists([org])? {
            return Ok(PutAttachment::NoOrg);
        }
        if !self.conn.prepare_cached(ATTACHMENT_THERE)?.exists(params![org, digest])? {
            let has: i64 = self.conn.prepare_cached(ATTACHMENT_BYTES)?.query_row([org], |row| row.get(0))?;
            if has.unsigned_abs().saturating_add(attachment.bytes) > org_bytes_max {
                return Ok(PutAttachment::Full);
            }
            if let Some(max) = self.storage_full(of)? {
                return Ok(PutAttachment::StorageFull(max));
            }
            let bytes = i64::try_from(attachment.bytes).unwrap_or(i64::MAX);
            self.conn.prepare_cached(ATTACHMENT_NEW)?.execute(params![org, digest, bytes, self.now.0])?;
            for (piece, body) in pieces.iter().enumerate() {
                self.conn.prepare_cached(ATTACHMENT_PIECE_NEW)?.execute(params![
                    org,
                    digest,
                    piece as i64,
                    &body[..]
                ])?;
            }
        }
        let had = self.conn.prepare_cached(UPLOAD_THERE)?.exists(params![org, digest, user])?;
        let put = params![org, digest, user, attachment.media_type, self.now.0];
        self.conn.prepare_cached(UPLOAD_PUT)?.execute(put)?;
        Ok(if had { PutAttachment::Existing(self.now) } else { PutAttachment::Created(self.now) })
    }

    /// Whether something that a message refers to is not there.
    pub(super) fn misses_attachment(&self, accept: &Accept) -> Tried<bool> {
        for attachment in &accept.attachments {
            let asked = params![accept.org.as_str(), &attachment.id.0[..]];
            if !self.conn.prepare_cached(ATTACHMENT_THERE)?.exists(asked)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Has a turn refer to what its message does.
    pub(super) fn refer(&self, accept: &Accept, turn: TurnId, user: &str) -> Tried<()> {
        for attachment in &accept.attachments {
            self.conn.prepare_cached(ATTACHMENT_REFER)?.execute(params![
                accept.org.as_str(),
                turn.as_bytes(),
                &attachment.id.0[..],
                user,
                attachment.media_type
            ])?;
        }
        Ok(())
    }

    pub(super) fn sweep_attachments(&self, before: Timestamp, limit: usize) -> Tried<usize> {
        let rows = i64::try_from(limit).unwrap_or(i64::MAX);
        self.conn.prepare_cached(UPLOADS_FORGET)?.execute(params![before.0, rows])?;
        let (mut seen, mut last, mut gone) = (0, 0_i64, 0_i64);
        while seen < limit && gone < SWEEP_BYTES_MAX {
            let next = self.conn.prepare_cached(RELEASED_NEXT)?.query_row([last], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?, row.get::<_, [u8; 32]>(2)?))
            });
            let Some((id, org, digest)) = next.optional()? else { break };
            let key = params![org, &digest[..]];
            let used: bool = self.conn.prepare_cached(RELEASED_USED)?.query_row(key, |row| row.get(0))?;
            if !used {
                self.conn.prepare_cached(PIECES_DROP)?.execute(key)?;
                let dropped = self.conn.prepare_cached(ATTACHMENT_DROP)?.query_row(key, |row| row.get::<_, i64>(0));
                gone += dropped.optional()?.unwrap_or(0);
            }
            self.conn.prepare_cached(RELEASED_DROP)?.execute([id])?;
            (seen, last) = (seen + 1, id);
        }
        Ok(seen)
    }
}
