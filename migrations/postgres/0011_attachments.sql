-- Files that messages refer to, by the SHA-256 of their bytes. Per org, so that nobody learns by a digest what another org has. One is kept for as
-- long as a turn refers to it, and for a while for whoever has uploaded it.
--
-- Whoever makes a reference locks the attachment's row FOR KEY SHARE first, and whoever deletes it FOR UPDATE: it goes only when nothing refers to it, and
-- nothing comes to refer to what goes.
CREATE TABLE attachments (
  org_id     text COLLATE "C" NOT NULL,
  digest     bytea  NOT NULL CHECK (length(digest) = 32),
  bytes      bigint NOT NULL CHECK (bytes >= 0),
  created_at bigint NOT NULL,
  PRIMARY KEY (org_id, digest)
);

-- Their bytes, in pieces of one size but for the last, counted from 0: so that a reader takes what it needs.
CREATE TABLE attachment_pieces (
  org_id text COLLATE "C" NOT NULL,
  digest bytea NOT NULL,
  piece  int   NOT NULL CHECK (piece >= 0),
  body   bytea NOT NULL CHECK (length(body) > 0),
  PRIMARY KEY (org_id, digest, piece)
);
ALTER TABLE attachment_pieces ALTER body SET STORAGE EXTERNAL;

-- Who may use one without a turn of theirs that refers to it: each has uploaded these very bytes, and knows of nobody else who has.
CREATE TABLE attachment_uploads (
  org_id      text COLLATE "C" NOT NULL,
  digest      bytea  NOT NULL,
  user_id     text COLLATE "C" NOT NULL,
  media_type  text   NOT NULL CHECK (length(media_type) <= 127),
  uploaded_at bigint NOT NULL,
  PRIMARY KEY (org_id, digest, user_id)
);
-- Forgetting goes by age.
CREATE INDEX attachment_uploads_age ON attachment_uploads (uploaded_at);

-- Which turns refer to which: written with the turn, gone with it. `user_id` is the turn's.
CREATE TABLE attachment_refs (
  org_id     text COLLATE "C" NOT NULL,
  turn_id    uuid  NOT NULL,
  digest     bytea NOT NULL,
  user_id    text COLLATE "C" NOT NULL,
  media_type text  NOT NULL CHECK (length(media_type) <= 127),
  PRIMARY KEY (org_id, turn_id, digest)
);
CREATE INDEX attachment_refs_digest ON attachment_refs (org_id, digest, user_id);

-- What may have become unused: the sweep looks, and deletes what nothing refers to. Deleting a conversation does not wait for megabytes. The same one may
-- be named twice: an index that forbade it would have those who name it wait for each other.
CREATE TABLE attachments_released (
  released_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  org_id      text COLLATE "C" NOT NULL,
  digest      bytea NOT NULL
);
CREATE INDEX attachments_released_org ON attachments_released (org_id);
CREATE FUNCTION release_attachments() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO attachments_released (org_id, digest) SELECT g.org_id, g.digest FROM gone g;
  RETURN NULL;
END $$;
CREATE TRIGGER attachment_ref_released AFTER DELETE ON attachment_refs
  REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION release_attachments();
CREATE TRIGGER attachment_upload_released AFTER DELETE ON attachment_uploads
  REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION release_attachments();

-- Looks at some of them, and stops once it has deleted p_bytes_max; how many it has looked at. What somebody refers to right now is looked at again.
CREATE FUNCTION drop_released_attachments(p_limit int, p_bytes_max bigint) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
  l record;
  v_bytes bigint; v_gone bigint := 0;
  n int := 0;
BEGIN
  FOR l IN SELECT r.released_id, r.org_id, r.digest FROM attachments_released r ORDER BY r.released_id LIMIT p_limit FOR UPDATE SKIP LOCKED LOOP
    EXIT WHEN v_gone >= p_bytes_max;
    SELECT a.bytes INTO v_bytes FROM attachments a WHERE a.org_id = l.org_id AND a.digest = l.digest FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
      IF NOT EXISTS (SELECT 1 FROM attachment_refs r WHERE r.org_id = l.org_id AND r.digest = l.digest)
         AND NOT EXISTS (SELECT 1 FROM attachment_uploads u WHERE u.org_id = l.org_id AND u.digest = l.digest)
      THEN
        DELETE FROM attachment_pieces p WHERE p.org_id = l.org_id AND p.digest = l.digest;
        DELETE FROM attachments a WHERE a.org_id = l.org_id AND a.digest = l.digest;
        v_gone := v_gone + v_bytes;
      END IF;
    ELSIF EXISTS (SELECT 1 FROM attachments a WHERE a.org_id = l.org_id AND a.digest = l.digest) THEN
      CONTINUE;
    END IF;
    DELETE FROM attachments_released r WHERE r.released_id = l.released_id;
    n := n + 1;
  END LOOP;
  RETURN n;
END $$;
