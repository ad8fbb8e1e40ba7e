-- Who belongs to an org, and as what. A credential that does not say for which org it speaks is looked up here.
CREATE TABLE org_members (
  org_id   text COLLATE "C" NOT NULL,
  user_id  text COLLATE "C" NOT NULL,
  role     text COLLATE "C" NOT NULL CHECK (role IN ('member', 'admin', 'owner')),
  added_at bigint NOT NULL,
  added_by text   NOT NULL CHECK (length(added_by) <= 256),         -- whoever is named in the audit
  PRIMARY KEY (org_id, user_id)
);
-- A user's orgs: a look-up that comes before an org is known.
CREATE INDEX org_members_user ON org_members (user_id, org_id);
