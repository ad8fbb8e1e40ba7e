//! Attachments: stored by their bytes, used by whoever uploaded them or has a turn that refers to them, gone when nobody does.

use bytes::Bytes;
use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::reads::{limit as rows_max, one_more, page};
use super::{BEGIN_LARGE, PostgresStore};
use crate::attachment::{Attachment, AttachmentId};
use crate::clock::Timestamp;
use crate::ids::{OrgId, TurnId, UserId};
use crate::store::{Page, PutAttachment, Result, StoreError};

/// So much goes in one step of the sweep.
const SWEEP_BYTES_MAX: i64 = 16 << 20;

statements! {
    /// Whoever takes an org away waits for this, and comes after it.
    ATTACHMENT_ORG = "-- attachment_org
SELECT 1 FROM orgs WHERE org_id = $1 AND deleting_at IS NULL FOR KEY SHARE";
    /// It stays until this transaction ends.
    ATTACHMENT_THERE = "-- attachment_there
SELECT bytes FROM attachments WHERE org_id = $1 AND digest = $2 FOR KEY SHARE";
    ATTACHMENT_BYTES = "-- attachment_bytes
SELECT coalesce(sum(bytes), 0)::bigint FROM attachments WHERE org_id = $1";
    /// No row: somebody else was storing it.
    ATTACHMENT_NEW = "-- attachment_new
INSERT INTO attachments (org_id, digest, bytes, created_at) VALUES ($1, $2, $3, coalesce($4::bigint, turnhouse_now())) ON CONFLICT DO NOTHING";
    ATTACHMENT_PIECE_NEW = "-- attachment_piece_new
INSERT INTO attachment_pieces (org_id, digest, piece, body) VALUES ($1, $2, $3, $4)";
    UPLOAD_THERE = "-- upload_there
SELECT 1 FROM attachment_uploads WHERE org_id = $1 AND digest = $2 AND user_id = $3";
    UPLOAD_PUT = "-- upload_put
INSERT INTO attachment_uploads (org_id, digest, user_id, media_type, uploaded_at) VALUES ($1, $2, $3, $4, coalesce($5::bigint, turnhouse_now()))
ON CONFLICT (org_id, digest, user_id) DO UPDATE SET media_type = excluded.media_type, uploaded_at = excluded.uploaded_at RETURNING uploaded_at";
    /// $3 the member; NULL is whoever sees all of the org.
    ATTACHMENTS = "-- attachments
SELECT * FROM (
  SELECT a.digest, a.bytes, coalesce(
           (SELECT u.media_type FROM attachment_uploads u WHERE u.org_id = $1 AND u.digest = a.digest AND ($3::text IS NULL OR u.user_id = $3) LIMIT 1),
           (SELECT r.media_type FROM attachment_refs r WHERE r.org_id = $1 AND r.digest = a.digest AND ($3::text IS NULL OR r.user_id = $3) LIMIT 1)) AS media_type
    FROM attachments a WHERE a.org_id = $1 AND a.digest = ANY ($2)) f
 WHERE f.media_type IS NOT NULL";
    ATTACHMENTS_OF_TURNS = "-- attachments_of_turns
SELECT DISTINCT r.digest, a.bytes, r.media_type FROM attachment_refs r JOIN attachments a ON a.org_id = r.org_id AND a.digest = r.digest
 WHERE r.org_id = $1 AND r.turn_id = ANY ($2)";
    ATTACHMENTS_OF_ORG = "-- attachments_of_org
SELECT a.digest, a.bytes, coalesce(
         (SELECT u.media_type FROM attachment_uploads u WHERE u.org_id = a.org_id AND u.digest = a.digest LIMIT 1),
         (SELECT r.media_type FROM attachment_refs r WHERE r.org_id = a.org_id AND r.digest = a.digest LIMIT 1))
  FROM attachments a WHERE a.org_id = $1 AND a.digest > $2 ORDER BY a.digest LIMIT $3";
    ATTACHMENT_PIECE = "-- attachment_piece
SELECT body FROM attachment_pieces WHERE org_id = $1 AND digest = $2 AND piece = $3";
    UPLOADS_FORGET = "-- uploads_forget
DELETE FROM attachment_uploads WHERE (org_id, digest, user_id) IN (
  SELECT org_id, digest, user_id FROM attachment_uploads WHERE uploaded_at < $1 ORDER BY uploaded_at LIMIT $2 FOR UPDATE SKIP LOCKED)";
    RELEASED_DROP = "-- released_drop
SELECT drop_released_attachments($1, $2)";
}

impl PostgresStore {
    pub(super) async fn write_attachment(
        &self,
        org: &OrgId,
        user: &UserId,
        attachment: &Attachment,
        pieces: &[Bytes],
        org_bytes_max: u64,
        now: Timestamp,
    ) -> Result<PutAttachment> {
        let mut tx = self.begin_of(org, BEGIN_LARGE).await?;
        let (org, user, digest, at) = (org.as_str(), user.as_str(), &attachment.id.0[..], self.clock.of(now));
        loop {
            let there = self.query(ATTACHMENT_THERE).bind(org).bind(digest);
            if there.fetch_optional(&mut *tx).await?.is_some() {
                break;
            }
            // Uploads at the same moment do not see each other: together they may go over the bound by what a host takes in at once.
            let has: i64 = self.query(ATTACHMENT_BYTES).bind(org).fetch_one(&mut *tx).await?.try_get(0)?;
            if has.unsigned_abs().saturating_add(attachment.bytes) > org_bytes_max {
                return Ok(PutAttachment::Full);
            }
            if let Some(max) = self.storage_full(&mut tx, org).await? {
                return Ok(PutAttachment::StorageFull(max.unsigned_abs()));
            }
            let bytes = i64::try_from(attachment.bytes).unwrap_or(i64::MAX);
            let new = self.query(ATTACHMENT_NEW).bind(org).bind(digest).bind(bytes).bind(at);
            if new.execute(&mut *tx).await?.rows_affected() == 0 {
                continue;
            }
            for (piece, body) in (0_i32..).zip(pieces) {
                let asked = self.query(ATTACHMENT_PIECE_NEW).bind(org).bind(digest).bind(piece).bind(&body[..]);
                asked.execute(&mut *tx).await?;
            }
            break;
        }
        let had = self.query(UPLOAD_THERE).bind(org).bind(digest).bind(user).fetch_optional(&mut *tx).await?;
        let put = self.query(UPLOAD_PUT).bind(org).bind(digest).bind(user).bind(&attachment.media_type).bind(at);
        let at = Timestamp(put.fetch_one(&mut *tx).await?.try_get(0)?);
        // Last: whoever deploys in the org does not wait for the bytes.
        if self.query(ATTACHMENT_ORG).bind(org).fetch_optional(&mut *tx).await?.is_none() {
            return Ok(PutAttachment::NoOrg);
        }
        tx.commit().await?;
        Ok(if had.is_some() { PutAttachment::Existing(at) } else { PutAttachment::Created(at) })
    }

    pub(super) async fn read_attachments(
        &self,
        org: &OrgId,
        user: Option<&UserId>,
        ids: &[AttachmentId],
    ) -> Result<Vec<Attachment>> {
        let digests: Vec<Vec<u8>> = ids.iter().map(|id| id.0.to_vec()).collect();
        let asked = self.query(ATTACHMENTS).bind(org.as_str()).bind(digests).bind(user.map(UserId::as_str));
        self.rows_of(org, asked).await?.iter().map(attachment).collect()
    }

    pub(super) async fn read_attachments_of(&self, org: &OrgId, turns: &[TurnId]) -> Result<Vec<Attachment>> {
        let turns: Vec<Uuid> = turns.iter().map(|turn| turn.0).collect();
        let asked = self.query(ATTACHMENTS_OF_TURNS).bind(org.as_str()).bind(turns);
        self.rows_of(org, asked).await?.iter().map(attachment).collect()
    }

    pub(super) async fn read_org_attachments(
        &self,
        org: &OrgId,
        after: Option<AttachmentId>,
        limit: usize,
    ) -> Result<Page<Attachment>> {
        let after = after.map_or_else(Vec::new, |id| id.0.to_vec());
        let asked = self.query(ATTACHMENTS_OF_ORG).bind(org.as_str()).bind(after).bind(one_more(limit));
        page(&self.rows_of(org, asked).await?, limit, attachment)
    }

    pub(super) async fn read_piece(&self, org: &OrgId, id: AttachmentId, piece: u32) -> Result<Option<Bytes>> {
        let piece = i32::try_from(piece).unwrap_or(i32::MAX);
        let asked = self.query(ATTACHMENT_PIECE).bind(org.as_str()).bind(id.0.to_vec()).bind(piece);
        self.row_of(org, asked).await?.map(|row| Ok(row.try_get::<Vec<u8>, _>(0)?.into())).transpose()
    }

    pub(super) async fn drop_attachments(&self, before: Timestamp, limit: usize) -> Result<usize> {
        self.change_hostwide(self.query(UPLOADS_FORGET).bind(before.0).bind(rows_max(limit))).await?;
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let seen: i32 =
            self.one_hostwide(self.query(RELEASED_DROP).bind(limit).bind(SWEEP_BYTES_MAX)).await?.try_get(0)?;
        Ok(usize::try_from(seen).unwrap_or(0))
    }
}

fn attachment(row: &PgRow) -> Result<Attachment> {
    let id = AttachmentId::from_slice(row.try_get(0)?)
        .ok_or_else(|| StoreError::Corrupt("an attachment's digest is not 32 bytes".to_owned()))?;
    // One that nothing refers to any more has no type, until the sweep comes by.
    let media_type = row.try_get::<Option<String>, _>(2)?.unwrap_or_else(|| "application/octet-stream".to_owned());
    Ok(Attachment { id, media_type, bytes: row.try_get::<i64, _>(1)?.unsigned_abs() })
}
