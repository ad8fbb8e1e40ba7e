//! What the second wall is made of, and who stands where: roles, policies, what works before it, and what it costs.

use super::isolation::furnish;
use super::*;
use crate::audit::{Act, Actor, Verb};

async fn answer(connection: &mut PgConnection, sql: &str) -> Result<i64, String> {
    let row = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_one(connection).await;
    row.and_then(|row| row.try_get(0)).map_err(|error| error.to_string())
}

async fn names(connection: &mut PgConnection, sql: &str) -> Vec<String> {
    let rows = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_all(connection).await;
    rows.unwrap_or_else(|error| panic!("{sql}: {error}")).iter().map(|row| row.get(0)).collect()
}

const WITH_ORG: &str = "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'org_id' AND NOT a.attisdropped
  WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') ORDER BY 1";

#[tokio::test]
async fn o1_without_an_org_the_tenants_role_sees_nothing() {
    let world = world().await;
    furnish(&world).await;
    let act = Act::new(Verb::OrgDelete, "org", serde_json::json!({}));
    world.store.record_act(None, &act, world.now(), &Actor::command_line()).await.unwrap();
    let mut connection = home(&world).database.look().await;
    let tables = names(&mut connection, WITH_ORG).await;
    assert!(tables.len() > 10, "{tables:?}");
    let host = "SELECT count(*) FROM audit WHERE org_id = ''";
    assert_eq!(answer(&mut connection, host).await.unwrap(), 1, "the host's own part of the audit");
    // In a session that never had an org; in one whose last transaction had one; with one that there is not.
    for before in [
        "SELECT 1",
        "BEGIN; SET LOCAL turnhouse.org = 'acme'; COMMIT",
        "SET turnhouse.org = ''",
        "SET turnhouse.org = 'nowhere'",
    ] {
        run(&mut connection, format!("RESET ROLE; {before}; SET ROLE turnhouse_tenant")).await;
        for table in &tables {
            let seen = answer(&mut connection, &format!("SELECT count(*) FROM {table}")).await.unwrap();
            assert_eq!(seen, 0, "{table} after {before}");
        }
    }
    run(&mut connection, "SET turnhouse.org = 'zeta'".to_owned()).await;
    assert_eq!(answer(&mut connection, "SELECT count(*) FROM agents").await.unwrap(), 1);
    for sql in [
        "INSERT INTO audit SELECT 'acme', 1, gen_random_uuid(), 'a', 'b', NULL, 'c', 'd', '{}' RETURNING 1",
        "INSERT INTO audit SELECT '', 1, gen_random_uuid(), 'a', 'b', NULL, 'c', 'd', '{}' RETURNING 1",
        "UPDATE agents SET org_id = 'acme' RETURNING 1",
    ] {
        let refused = answer(&mut connection, sql).await.unwrap_err();
        assert!(refused.contains("row-level security"), "{sql}: {refused}");
    }
}

#[tokio::test]
async fn o1_the_tenants_role_can_neither_take_down_its_wall_nor_go_round_it() {
    let world = world().await;
    furnish(&world).await;
    let mut connection = home(&world).database.look().await;
    run(&mut connection, "SET SESSION AUTHORIZATION turnhouse_tenant; SET turnhouse.org = 'acme'".to_owned()).await;
    assert!(answer(&mut connection, "SELECT count(*) FROM turns").await.unwrap() > 0);
    for sql in [
        "SET ROLE turnhouse_host",
        "SET ROLE postgres",
        "ALTER ROLE turnhouse_tenant BYPASSRLS",
        "GRANT turnhouse_host TO turnhouse_tenant",
        "ALTER TABLE turns DISABLE ROW LEVEL SECURITY",
        "ALTER TABLE turns OWNER TO turnhouse_tenant",
        "DROP POLICY tenant ON turns",
        "ALTER POLICY tenant ON turns USING (true)",
        "CREATE POLICY mine ON turns USING (true)",
        "SET row_security = off; SELECT count(*) FROM turns",
        "TRUNCATE turns",
        "CREATE TABLE mine ()",
        "SELECT build_wall()",
        "SELECT 1 FROM ticket_keys",
        "SELECT 1 FROM replicas",
        "SELECT 1 FROM schema_compat",
        "SELECT 1 FROM _sqlx_migrations",
        "UPDATE orgs SET deleting_at = 1",
        "DELETE FROM orgs",
        "DELETE FROM api_keys",
        "DELETE FROM audit",
        "UPDATE audit SET actor = 'eve'",
        "INSERT INTO turns (org_id) VALUES ('acme')",
        "INSERT INTO snapshots (org_id) VALUES ('acme')",
        "UPDATE turn_markers SET epoch = 0",
    ] {
        let done = sqlx::raw_sql(sql).execute(&mut connection).await;
        let refused = done.expect_err(sql);
        let code = refused.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
        assert_eq!(code, "42501", "{sql}: {refused}");
    }
}

#[tokio::test]
async fn o1_every_table_with_an_org_stands_behind_the_wall() {
    let database = Database::migrated().await;
    let mut connection = database.look().await;
    let tables = names(&mut connection, WITH_ORG).await;
    let policies = "SELECT format('%s %s %s %s %s %s %s', c.relname, p.polname, p.polcmd, p.polpermissive, (SELECT string_agg(r::regrole::text, ',') FROM unnest(p.polroles) r),
                           pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid))
                      FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid WHERE c.relrowsecurity ORDER BY 1";
    let own = "(org_id = NULLIF(current_setting('turnhouse.org'::text, true), ''::text))";
    let expected = tables.iter().flat_map(|table| {
        [
            format!("{table} host * t turnhouse_host true true"),
            format!("{table} tenant * t turnhouse_tenant {own} {own}"),
        ]
    });
    let mut expected: Vec<String> = expected.collect();
    expected.sort();
    let mut found = names(&mut connection, policies).await;
    found.sort();
    assert_eq!(found, expected, "a migration that adds a table with an org_id ends with SELECT build_wall()");
    // What has rows of orgs and no policies of its own would show them with its owner's eyes.
    for (what, sql) in [
        (
            "a view or a foreign table with an org",
            "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'org_id'
              WHERE c.relnamespace = 'public'::regnamespace AND c.relkind NOT IN ('r', 'p', 'i', 'I', 'c')",
        ),
        (
            "a function that runs as its owner",
            "SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prosecdef",
        ),
        (
            "the tenants' role has something else",
            "SELECT format('%s: %s', c.relname, g.privilege_type) FROM pg_class c, aclexplode(c.relacl) g
              WHERE g.grantee = 'turnhouse_tenant'::regrole AND (g.is_grantable OR g.privilege_type NOT IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
                 OR NOT EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'org_id'))",
        ),
        (
            "a role of the wall owns something, may log in, or is above it",
            "SELECT r.rolname::text FROM pg_roles r WHERE r.rolname IN ('turnhouse_tenant', 'turnhouse_host')
                AND (r.rolsuper OR r.rolbypassrls OR r.rolcanlogin OR r.rolcreaterole OR r.rolcreatedb OR EXISTS (SELECT 1 FROM pg_auth_members m WHERE m.member = r.oid)
                  OR EXISTS (SELECT 1 FROM pg_shdepend d WHERE d.refobjid = r.oid AND d.deptype = 'o'))",
        ),
        (
            "the hosts' role lacks a table",
            "SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
                AND NOT has_table_privilege('turnhouse_host', c.oid, 'SELECT')
             UNION ALL
             SELECT c.relname::text FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p')
                AND c.relname NOT IN ('schema_compat', '_sqlx_migrations')
                AND NOT (has_table_privilege('turnhouse_host', c.oid, 'INSERT') AND has_table_privilege('turnhouse_host', c.oid, 'UPDATE')
                     AND has_table_privilege('turnhouse_host', c.oid, 'DELETE'))",
        ),
    ] {
        assert_eq!(names(&mut connection, sql).await, Vec::<String>::new(), "{what}");
    }
}

/// The functions whose statements run before the wall. Each has its reason: it serves many orgs at once, comes before an org is known, or is the operator's.
const HOSTWIDE: &[(&str, &[&str])] = &[
    ("ask.rs", &["one_hostwide", "row_hostwide"]),
    ("attachments.rs", &["drop_attachments"]),
    ("audit.rs", &["read_audit", "write_act"]),
    ("erase.rs", &["erase_step", "read_deleting", "write_mark"]),
    (
        "facade.rs",
        &["drain_replica", "expire_other_replicas", "ping", "register_replica", "renew_replica", "retire_replica"],
    ),
    ("keys.rs", &["read_key", "read_orgs", "read_ticket_keys", "write_last_use", "write_org", "write_ticket_key"]),
    ("limits.rs", &["measure_next"]),
    ("members.rs", &["read_membership_of_turn", "read_memberships"]),
    ("orgs.rs", &["write_provision"]),
    ("reads.rs", &["read_running", "read_stale"]),
    ("retention.rs", &["retain_next"]),
    ("standing.rs", &["examine_server", "read_progress", "read_status", "read_time"]),
    ("sweep.rs", &["find_overdue", "forget_keys_before", "read_live_counts", "repair_stuck", "vacuum_markers"]),
    ("wall.rs", &["examine_wall"]),
    ("writer.rs", &["call_once"]),
];

#[test]
fn o1_only_these_work_before_the_wall() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store/postgres");
    let mut found = Vec::new();
    let mut raw = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let file = entry.file_name().into_string().unwrap();
        if !file.ends_with(".rs") || ["tests.rs", "torture.rs"].contains(&file.as_str()) {
            continue;
        }
        let text = std::fs::read_to_string(entry.path()).unwrap();
        let mut functions: Vec<String> = Vec::new();
        for function in text.split(" fn ").skip(1) {
            let (name, body) = function.split_once(['(', '<']).unwrap();
            if ["_hostwide(", ".rows_for_journal("].iter().any(|call| body.contains(call)) {
                functions.push(name.to_owned());
            }
            if ["pool.begin", "pool.acquire", "pool.clone"].iter().any(|way| body.contains(way)) {
                raw.push(format!("{file} {name}"));
            }
        }
        functions.sort();
        functions.dedup();
        if !functions.is_empty() {
            found.push((file, functions));
        }
    }
    found.sort();
    raw.sort();
    let expected: Vec<_> = HOSTWIDE
        .iter()
        .map(|(file, functions)| {
            ((*file).to_owned(), functions.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(found, expected, "what serves one org goes through a function whose name ends in _of");
    let ways = ["ask.rs begin", "ask.rs change_in", "ask.rs rows_in", "hints.rs tell", "sweep.rs vacuum_markers"];
    assert_eq!(raw, ways, "nothing else takes a connection");
}

/// A condition of the wall comes before every other, and one that might tell of what it sees could no longer go by an index. None here does.
#[tokio::test]
async fn o5_behind_the_wall_statements_go_by_an_index() {
    let database = Database::migrated().await;
    let mut connection = database.look().await;
    // Another role than the table's owner: the tenants', and a host that does not own the tables.
    for role in ["turnhouse_tenant", "turnhouse_host"] {
        let settings = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET jit = off; SET turnhouse.org = 'acme'";
        run(&mut connection, format!("RESET ROLE; {settings}; SET ROLE {role}")).await;
        let all = [
            conversations::STATEMENTS,
            reads::STATEMENTS,
            whole::STATEMENTS,
            catalog::STATEMENTS,
            attachments::STATEMENTS,
            audit::STATEMENTS,
            keys::STATEMENTS,
            limits::STATEMENTS,
            members::STATEMENTS,
        ];
        for (name, sql) in all.into_iter().flatten() {
            // The operator's, and what the hosts ask for all orgs.
            let of_all = [
                "ORG_NEW",
                "ORGS",
                "KEY",
                "KEY_TOUCH",
                "TICKET_KEYS",
                "TICKET_KEY_NEW",
                "RUNNING",
                "STALE",
                "MEMBERSHIPS",
                "MEMBERSHIP_OF_TURN",
                "UPLOADS_FORGET",
                "RELEASED_DROP",
                "STORAGE_NEXT",
            ];
            if of_all.contains(name) {
                continue;
            }
            run(&mut connection, format!("PREPARE asked AS {sql}")).await;
            let values = "SELECT concat_ws(', ', VARIADIC array_fill('NULL'::text, ARRAY[cardinality(parameter_types)])) FROM pg_prepared_statements";
            let values = names(&mut connection, values).await.remove(0);
            let explained = sqlx::raw_sql(AssertSqlSafe(format!("EXPLAIN EXECUTE asked ({values})")));
            let rows =
                explained.fetch_all(&mut connection).await.unwrap_or_else(|error| panic!("{role}: {name}: {error}"));
            let plan: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
            let plan = plan.join("\n");
            assert!(!plan.contains("Seq Scan on"), "{role}: {name}:\n{plan}");
            // Each look-up of a table begins with the org.
            for scan in plan.split("->").filter(|node| node.contains("Index Scan") || node.contains("Index Only Scan"))
            {
                let condition = scan.lines().find(|line| line.contains("Index Cond"));
                assert!(condition.is_some_and(|line| line.contains("org_id = ")), "{role}: {name}: {scan}\n{plan}");
            }
            run(&mut connection, "DEALLOCATE asked".to_owned()).await;
        }
    }
}
