-- Who did what to which resource: of an org, or ('') of the host. Written in the transaction of what it tells of, never changed, and taken away by age
-- alone. No secret and no message is in it, and every field has its bound here a second time.
CREATE TABLE audit (
  org_id     TEXT    NOT NULL,
  at         INTEGER NOT NULL,
  audit_id   BLOB    NOT NULL CHECK (length(audit_id) = 16),       -- tells apart what was done at one time; no number that would count other orgs'
  actor      TEXT    NOT NULL CHECK (length(actor) <= 256),        -- the authenticated user
  credential TEXT    NOT NULL CHECK (length(credential) <= 256),   -- by what: a key's id, a token's subject, the command line
  request_id TEXT    CHECK (length(request_id) <= 128),
  verb       TEXT    NOT NULL CHECK (length(verb) <= 32),
  resource   TEXT    NOT NULL CHECK (length(resource) <= 320),
  detail     TEXT    NOT NULL CHECK (length(detail) <= 1024),      -- JSON object
  PRIMARY KEY (org_id, at, audit_id)
) STRICT, WITHOUT ROWID;
-- One for each filter, in the order of the list.
CREATE INDEX audit_actor ON audit (org_id, actor, at, audit_id);
CREATE INDEX audit_verb ON audit (org_id, verb, at, audit_id);
CREATE INDEX audit_resource ON audit (org_id, resource, at, audit_id);

-- An org that is being deleted is no longer there for anybody; its row stays until all else of it is gone.
ALTER TABLE orgs ADD COLUMN deleting_at INTEGER;

-- Of what is not rewritten. Thirty days stay whatever is configured; what an org leaves goes with it.
CREATE TRIGGER audit_stays BEFORE UPDATE ON audit
BEGIN SELECT RAISE(FAIL, 'what was done is not rewritten'); END;
CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit
WHEN OLD.at > (unixepoch() - 30 * 86400) * 1000
 AND (OLD.org_id = '' OR EXISTS (SELECT 1 FROM orgs WHERE org_id = OLD.org_id AND deleting_at IS NULL))
BEGIN SELECT RAISE(FAIL, 'what was done in the last thirty days is kept'); END;
