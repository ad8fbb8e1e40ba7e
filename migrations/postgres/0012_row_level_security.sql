-- The second wall between orgs. The first is `org_id = $n` in every statement; where that is wrong or forgotten, row-level security shows nothing and changes
-- nothing. What a host does for one org, it does as turnhouse_tenant, in a transaction that names the org. What it does for all of them at once (the hot
-- path, sweeps, replicas), it does as itself: as the owner of the tables, who is above their policies, or as a member of turnhouse_host, whom one policy
-- lets through.
--
-- Neither role may log in. A policy without an org lets nothing through: the setting is NULL where it was never made, and empty behind a transaction that
-- made it, which would else be the host's own part of the audit.

-- Builds the wall, or mends it, over every table that has an org_id. For this migration, for later ones that add a table, and for `turnhouse migrate`: roles
-- are the cluster's and do not come along when a database is restored elsewhere.
CREATE FUNCTION build_wall() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  v_advice text := format('as a role that may, run CREATE ROLE turnhouse_host and CREATE ROLE turnhouse_tenant ROLE %I', current_user);
  v_act_as text := CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END;
  v_schema oid := (SELECT relnamespace FROM pg_class WHERE oid = 'orgs'::regclass);
  v_role text;
  v_hosts text;
  v_tenants text;
  t record;
BEGIN
  FOREACH v_role IN ARRAY ARRAY['turnhouse_tenant', 'turnhouse_host'] LOOP
    IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = v_role) THEN
      BEGIN
        EXECUTE format('CREATE ROLE %I NOLOGIN', v_role);
      EXCEPTION
        -- Another database of the cluster was first.
        WHEN duplicate_object OR unique_violation THEN NULL;
        WHEN insufficient_privilege THEN
          RAISE EXCEPTION 'role % is missing and % may not create roles', v_role, current_user USING ERRCODE = 'insufficient_privilege', HINT = v_advice;
      END;
    END IF;
    IF NOT has_schema_privilege(v_role, v_schema, 'USAGE') THEN
      EXECUTE format('GRANT USAGE ON SCHEMA %s TO %I', v_schema::regnamespace, v_role);
    END IF;
  END LOOP;
  IF NOT pg_has_role(current_user, 'turnhouse_tenant', v_act_as) THEN
    BEGIN
      EXECUTE format('GRANT turnhouse_tenant TO %I', current_user);
    EXCEPTION
      WHEN unique_violation THEN NULL;
      WHEN insufficient_privilege THEN
        RAISE EXCEPTION '% may not act as turnhouse_tenant', current_user USING ERRCODE = 'insufficient_privilege',
          HINT = format('as a role that may, run GRANT turnhouse_tenant TO %I', current_user);
    END;
  END IF;

  -- Only the owner's: what else lies in the schema is somebody else's.
  FOR t IN
    SELECT c.oid::regclass AS name, c.relname, c.relrowsecurity AS walled,
           EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'org_id' AND NOT a.attisdropped) AS of_orgs
      FROM pg_class c JOIN pg_class o ON o.oid = 'orgs'::regclass AND o.relnamespace = c.relnamespace AND o.relowner = c.relowner
     WHERE c.relkind IN ('r', 'p') ORDER BY c.relname
  LOOP
    v_hosts := CASE
      WHEN t.of_orgs OR t.relname IN ('replicas', 'ticket_keys') THEN 'SELECT, INSERT, UPDATE, DELETE'
      WHEN t.relname IN ('schema_compat', '_sqlx_migrations') THEN 'SELECT' END;
    IF v_hosts IS NOT NULL THEN
      EXECUTE format('GRANT %s ON %s TO turnhouse_host', v_hosts, t.name);
    END IF;
    CONTINUE WHEN NOT t.of_orgs;
    -- What statements of one org do, and no more. Whoever locks a row must be allowed to change a column of it.
    v_tenants := CASE t.relname
      WHEN 'orgs' THEN 'SELECT, UPDATE (org_id, owner_user)'
      WHEN 'org_load' THEN 'SELECT, UPDATE'
      WHEN 'api_keys' THEN 'SELECT, INSERT, UPDATE'
      WHEN 'modules' THEN 'SELECT, INSERT, DELETE'
      WHEN 'worker_versions' THEN 'SELECT, INSERT, DELETE'
      WHEN 'conversations' THEN 'SELECT, INSERT, UPDATE'
      WHEN 'idempotency_keys' THEN 'SELECT, DELETE'
      WHEN 'turns' THEN 'SELECT, UPDATE, DELETE'
      WHEN 'turn_markers' THEN 'SELECT, UPDATE (not_before, deadline_at), DELETE'
      WHEN 'turn_events' THEN 'SELECT, DELETE'
      WHEN 'snapshots' THEN 'SELECT, DELETE'
      WHEN 'attachments' THEN 'SELECT, INSERT, UPDATE (org_id)'
      WHEN 'attachment_pieces' THEN 'SELECT, INSERT'
      WHEN 'attachment_uploads' THEN 'SELECT, INSERT, UPDATE, DELETE'
      WHEN 'attachment_refs' THEN 'SELECT, DELETE'
      WHEN 'attachments_released' THEN 'SELECT, INSERT'
      WHEN 'audit' THEN 'SELECT, INSERT'
      ELSE 'SELECT, INSERT, UPDATE, DELETE' END;
    EXECUTE format('GRANT %s ON %s TO turnhouse_tenant', v_tenants, t.name);
    IF NOT t.walled THEN
      EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', t.name);
    END IF;
    IF NOT EXISTS (SELECT 1 FROM pg_policy WHERE polrelid = t.name AND polname = 'tenant') THEN
      EXECUTE format($p$CREATE POLICY tenant ON %s TO turnhouse_tenant
        USING (org_id = nullif(current_setting('turnhouse.org', true), '')) WITH CHECK (org_id = nullif(current_setting('turnhouse.org', true), ''))$p$, t.name);
    END IF;
    IF NOT EXISTS (SELECT 1 FROM pg_policy WHERE polrelid = t.name AND polname = 'host') THEN
      EXECUTE format('CREATE POLICY host ON %s TO turnhouse_host USING (true) WITH CHECK (true)', t.name);
    END IF;
  END LOOP;
END $$;

SELECT build_wall();
