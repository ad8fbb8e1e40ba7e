-- Who belongs to an org, and as what. A credential that does not say for which org it speaks is looked up here.
CREATE TABLE org_members (
  org_id   TEXT    NOT NULL,
  user_id  TEXT    NOT NULL,
  role     TEXT    NOT NULL CHECK (role IN ('member', 'admin', 'owner')),
  added_at INTEGER NOT NULL,
  added_by TEXT    NOT NULL CHECK (length(added_by) <= 256),       -- whoever is named in the audit
  PRIMARY KEY (org_id, user_id)
) STRICT, WITHOUT ROWID;
-- A user's orgs: a look-up that comes before an org is known.
CREATE INDEX org_members_user ON org_members (user_id, org_id);
