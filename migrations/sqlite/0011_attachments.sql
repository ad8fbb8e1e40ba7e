-- Files that messages refer to, by the SHA-256 of their bytes. Per org, so that nobody learns by a digest what another org has. One is kept for as
-- long as a turn refers to it, and for a while for whoever has uploaded it.
CREATE TABLE attachments (
  org_id     TEXT    NOT NULL,
  digest     BLOB    NOT NULL CHECK (length(digest) = 32),
  bytes      INTEGER NOT NULL CHECK (bytes >= 0),
  created_at INTEGER NOT NULL,
  PRIMARY KEY (org_id, digest)
) STRICT, WITHOUT ROWID;

-- Their bytes, in pieces of one size but for the last, counted from 0: so that a reader takes what it needs.
CREATE TABLE attachment_pieces (
  org_id TEXT    NOT NULL,
  digest BLOB    NOT NULL,
  piece  INTEGER NOT NULL CHECK (piece >= 0),
  body   BLOB    NOT NULL CHECK (length(body) > 0),
  PRIMARY KEY (org_id, digest, piece)
) STRICT;

-- Who may use one without a turn of theirs that refers to it: each has uploaded these very bytes, and knows of nobody else who has.
CREATE TABLE attachment_uploads (
  org_id      TEXT    NOT NULL,
  digest      BLOB    NOT NULL,
  user_id     TEXT    NOT NULL,
  media_type  TEXT    NOT NULL CHECK (length(media_type) <= 127),
  uploaded_at INTEGER NOT NULL,
  PRIMARY KEY (org_id, digest, user_id)
) STRICT, WITHOUT ROWID;
-- Forgetting goes by age.
CREATE INDEX attachment_uploads_age ON attachment_uploads (uploaded_at);

-- Which turns refer to which: written with the turn, gone with it. `user_id` is the turn's.
CREATE TABLE attachment_refs (
  org_id     TEXT NOT NULL,
  turn_id    BLOB NOT NULL CHECK (length(turn_id) = 16),
  digest     BLOB NOT NULL,
  user_id    TEXT NOT NULL,
  media_type TEXT NOT NULL CHECK (length(media_type) <= 127),
  PRIMARY KEY (org_id, turn_id, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX attachment_refs_digest ON attachment_refs (org_id, digest, user_id);

-- What may have become unused: the sweep looks, and deletes what nothing refers to. Deleting a conversation does not wait for megabytes.
CREATE TABLE attachments_released (
  released_id INTEGER PRIMARY KEY,
  org_id      TEXT NOT NULL,
  digest      BLOB NOT NULL
) STRICT;
CREATE INDEX attachments_released_org ON attachments_released (org_id);
CREATE TRIGGER attachment_ref_released AFTER DELETE ON attachment_refs
BEGIN INSERT INTO attachments_released (org_id, digest) VALUES (OLD.org_id, OLD.digest); END;
CREATE TRIGGER attachment_upload_released AFTER DELETE ON attachment_uploads
BEGIN INSERT INTO attachments_released (org_id, digest) VALUES (OLD.org_id, OLD.digest); END;
