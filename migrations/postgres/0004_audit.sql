-- Who did what to which resource: of an org, or ('') of the host. Written in the transaction of what it tells of, never changed, and taken away by age
-- alone. No secret and no message is in it, and every field has its bound here a second time.
CREATE TABLE audit (
  org_id     text COLLATE "C" NOT NULL,
  at         bigint NOT NULL,
  audit_id   uuid   NOT NULL,                                      -- tells apart what was done at one time; no number that would count other orgs'
  actor      text COLLATE "C" NOT NULL CHECK (length(actor) <= 256),       -- the authenticated user
  credential text COLLATE "C" NOT NULL CHECK (length(credential) <= 256),  -- by what: a key's id, a token's subject, the command line
  request_id text COLLATE "C" CHECK (length(request_id) <= 128),
  verb       text COLLATE "C" NOT NULL CHECK (length(verb) <= 32),
  resource   text COLLATE "C" NOT NULL CHECK (length(resource) <= 320),
  detail     text   NOT NULL CHECK (length(detail) <= 1024),       -- JSON object
  PRIMARY KEY (org_id, at, audit_id)
);
-- One for each filter, in the order of the list.
CREATE INDEX audit_actor ON audit (org_id, actor, at, audit_id);
CREATE INDEX audit_verb ON audit (org_id, verb, at, audit_id);
CREATE INDEX audit_resource ON audit (org_id, resource, at, audit_id);

-- An org that is being deleted is no longer there for anybody; its row stays until all else of it is gone.
ALTER TABLE orgs ADD COLUMN deleting_at bigint;

-- Of what is not rewritten. Thirty days stay whatever is configured; what an org leaves goes with it.
CREATE FUNCTION audit_stays() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN RAISE EXCEPTION 'what was done is not rewritten' USING ERRCODE = 'integrity_constraint_violation'; END $$;
CREATE TRIGGER audit_stays BEFORE UPDATE ON audit FOR EACH ROW EXECUTE FUNCTION audit_stays();
CREATE TRIGGER audit_stays_whole BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_stays();
CREATE FUNCTION audit_is_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.org_id = '' OR EXISTS (SELECT 1 FROM orgs WHERE org_id = OLD.org_id AND deleting_at IS NULL) THEN
    RAISE EXCEPTION 'what was done in the last thirty days is kept' USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN OLD;
END $$;
CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit FOR EACH ROW
  WHEN (OLD.at > (extract(epoch FROM clock_timestamp()) * 1000)::bigint - 30::bigint * 86400000) EXECUTE FUNCTION audit_is_kept();
