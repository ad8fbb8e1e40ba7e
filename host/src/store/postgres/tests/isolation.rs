//! The second wall: each method that names an org, tried as if it had another org's wall around it; what the wall is made of; and who stands where.

use super::*;
use crate::agent::{AgentLimits, AgentSettings};
use crate::attachment::{Attachment, Pieces};
use crate::audit::{Act, Actor, AuditFilter, Verb};
use crate::caller::{Role, Scopes};
use crate::ids::{AgentId, WorkerName};
use crate::notes::NotesChange;
use crate::quota::LimitsChange;
use crate::store::conformance::{deltas, worker};
use crate::store::{
    Accept, Among, Deleted, Direction, KeyRecord, PutAttachment, PutMember, PutWorker, RemoveMember, Result,
};
use crate::turn::Usage;

/// What names an org and is done before the wall: the operator's, on whole orgs.
const OPERATORS: [&str; 4] = ["create_org", "provision_org", "mark_org", "erase_org"];

/// Every method of the store that names one org, in the order of the trait, without the operator's.
fn methods_of_an_org() -> Vec<String> {
    let facade = include_str!("../facade.rs");
    let methods = facade.split("    async fn ").skip(1);
    let named = methods.filter_map(|method| {
        let (head, _) = method.split_once(" {\n")?;
        let names_one = ["org: &OrgId", "org: Option<&OrgId>", "key: &KeyRecord"].iter().any(|one| head.contains(one));
        let (name, _) = head.split_once('(')?;
        (names_one && !OPERATORS.contains(&name)).then(|| name.to_owned())
    });
    named.collect()
}

fn key(world: &World, n: u8) -> ([u8; 32], KeyRecord) {
    let key = KeyRecord {
        id: hex::encode([n; 8]),
        org: org("acme"),
        user: user("ann"),
        scopes: Scopes::TURNS,
        name: "k".to_owned(),
        created_at: world.now(),
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    ([n; 32], key)
}

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

const MODULE: &[u8] = b"spare";

fn digest() -> [u8; 32] {
    Sha256::digest(MODULE).into()
}

fn file(bytes: &[u8]) -> (Attachment, Vec<bytes::Bytes>) {
    let mut pieces = Pieces::default();
    pieces.push(bytes);
    pieces.finish("text/plain".to_owned())
}

async fn upload(world: &World, bytes: &[u8]) -> Result<PutAttachment> {
    let (attachment, pieces) = file(bytes);
    world.store.put_attachment(&org("acme"), &user("ann"), &attachment, pieces, 1_000, world.now()).await
}

async fn join(world: &World, who: &str) -> Result<PutMember> {
    world.store.put_member(&org("acme"), &user(who), Role::Member, None, 9, world.now(), &by()).await
}

/// Gives `acme` something for every method to see or to change; the ended turn.
async fn furnish(world: &World) -> crate::ids::TurnId {
    let acme = org("acme");
    upload(world, b"file").await.unwrap();
    join(world, "leaving").await.unwrap();
    let message = Accept { attachments: vec![file(b"file").0], ..world.message("c") };
    let claimed = world.submit_and_start(message).await;
    world.append(&claimed, deltas(1, &["a", "b"])).await;
    world.complete(&claimed, Some(b"state")).await;
    let worn = world.submit_and_start(world.message("worn")).await;
    world.complete(&worn, Some(b"old")).await;
    for queued in ["doomed", "spared"] {
        world.submit(world.message(queued)).await;
    }
    for n in [1, 2] {
        let (hash, key) = key(world, n);
        assert!(world.store.create_key(hash, &key, &by()).await.unwrap());
    }
    world.upload(&acme, &name::<WorkerName>("spare"), MODULE).await;
    for (agent, default) in [("spare", false), ("default", true)] {
        let limits = AgentLimits { queue_max: default.then_some(9), ..AgentLimits::default() };
        let settings = AgentSettings { default, limits, ..AgentSettings::of(worker()) };
        let put = world.store.put_agent(&acme, &name(agent), settings, 9, world.now(), &by()).await.unwrap();
        assert!(matches!(put, PutAgent::Stored { .. }), "{put:?}");
    }
    claimed.lease.turn
}

/// One method with `acme` as its org; whether it saw or changed anything.
async fn tried(world: &World, ended: crate::ids::TurnId, method: &str) -> Result<bool> {
    let (store, acme, now) = (&world.store, org("acme"), world.now());
    let (of, at, who) = (&acme, (&agent(), &conversation("c")), &by());
    let act = Act::new(Verb::OrgExport, "org", serde_json::json!({}));
    Ok(match method {
        "turn" => store.turn(of, ended).await?.is_some(),
        "events" => store.events(of, ended, None, 1_000).await?.is_some_and(|page| !page.events.is_empty()),
        "turns" => !store.turns(of, at.0, at.1, None, Direction::Forward, true, 9).await?.items.is_empty(),
        "open_conversation" => store.open_conversation(of, at.0, &conversation("new"), &user("ann"), now).await?.1,
        "conversation" => store.conversation(of, at.0, at.1).await?.is_some(),
        "generation" => store.generation(of, at.0, at.1).await?.is_some(),
        "conversations" => !store.conversations(of, at.0, None, None, 9).await?.items.is_empty(),
        "write_notes" => {
            let change = NotesChange { title: Some(Some("a title".to_owned())), metadata: None };
            store.write_notes(of, at.0, at.1, &change).await?
        }
        "delete_conversation" => {
            !store.delete_conversation(of, at.0, &conversation("doomed"), now, who).await?.is_empty()
        }
        "reset_snapshot" => store.reset_snapshot(of, at.0, &conversation("worn"), now, who).await.map(|()| true)?,
        "org_conversations" => !store.org_conversations(of, None, 9).await?.items.is_empty(),
        "org_turns" => !store.org_turns(of, None, 9).await?.items.is_empty(),
        "snapshots" => !store.snapshots(of, &Among::All, None, 9).await?.items.is_empty(),
        "put_attachment" => matches!(upload(world, b"new").await?, PutAttachment::Created(_)),
        "attachments" => !store.attachments(of, None, &[file(b"file").0.id]).await?.is_empty(),
        "attachments_of" => !store.attachments_of(of, &[ended]).await?.is_empty(),
        "org_attachments" => !store.org_attachments(of, None, 9).await?.items.is_empty(),
        "attachment_piece" => store.attachment_piece(of, file(b"file").0.id, 0).await?.is_some(),
        "set_org_limits" => {
            let change = LimitsChange { running_max: Some(Some(5)), ..LimitsChange::default() };
            store.set_org_limits(of, &change, now, who).await?.is_some()
        }
        "add_usage" => {
            let usage = Usage { cpu_ms: 1.0, ..Usage::default() };
            store.add_usage(of, at.0, crate::ids::TurnId::new(), &usage, now).await?
        }
        "agent_use" => store.agent_use(of, &name("default"), now).await?.is_some(),
        "org_use" => store.org_use(of, now).await?.is_some(),
        "members" => !store.members(of, None, 9).await?.items.is_empty(),
        "role" => store.role(of, &user("leaving")).await?.is_some(),
        "put_member" => matches!(join(world, "new").await?, PutMember::Stored { created: true, .. }),
        "remove_member" => store.remove_member(of, &user("leaving"), None, now, who).await? == RemoveMember::Done,
        "put_worker" => {
            let digest = Sha256::digest(b"new").into();
            let put = store.put_worker(of, &worker(), digest, "new".into(), vec![], 1.0, 9, 9, now, who).await?;
            matches!(put, PutWorker::Created(_))
        }
        "workers" => !store.workers(of, None, 9).await?.items.is_empty(),
        "worker_versions" => !store.worker_versions(of, &worker()).await?.is_empty(),
        "worker_version" => store.worker_version(of, &worker(), 1).await?.is_some(),
        "module" => store.module(of, digest()).await?.is_some(),
        "delete_worker" => store.delete_worker(of, &name("spare"), now, who).await? == Deleted::Done,
        "put_agent" => {
            let put = store.put_agent(of, &name("new"), AgentSettings::of(worker()), 9, now, who).await?;
            matches!(put, PutAgent::Stored { .. })
        }
        "agent" => store.agent(of, at.0).await?.is_some(),
        "default_agent" => store.default_agent(of).await?.is_some(),
        "agents" => !store.agents(of, None, 9).await?.items.is_empty(),
        "delete_agent" => store.delete_agent(of, &name::<AgentId>("spare"), now, who).await? == Deleted::Done,
        "org" => store.org(of).await?.is_some(),
        "live_turns" => !store.live_turns(of, 9).await?.is_empty(),
        "module_digests" => !store.module_digests(of).await?.is_empty(),
        "create_key" => {
            let (hash, key) = key(world, 3);
            store.create_key(hash, &key, who).await?
        }
        "key_by_id" => store.key_by_id(of, &key(world, 1).1.id).await?.is_some(),
        "keys" => !store.keys(of).await?.is_empty(),
        "rotate_key" => {
            let (hash, successor) = key(world, 4);
            store.rotate_key(&key(world, 1).1.id, hash, &successor, 1_000, who).await?
        }
        "revoke_key" => store.revoke_key(of, &key(world, 2).1.id, now, who).await?,
        "record_act" => store.record_act(Some(of), &act, now, who).await.map(|()| true)?,
        "audit" => !store.audit(Some(of), &AuditFilter::All, Timestamp(0), None, 9).await?.items.is_empty(),
        other => panic!("{other} names an org: it has to be tried here, too"),
    })
}

/// All rows of all tables.
async fn contents(world: &World) -> String {
    let mut connection = home(world).database.look().await;
    let sql = "SELECT string_agg(format('%s %s', c.relname, query_to_xml(format('SELECT t::text FROM %s t ORDER BY 1', c.oid::regclass), true, true, '')), ' ' ORDER BY c.relname)
                 FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'";
    sqlx::query(sql).fetch_one(&mut connection).await.unwrap().get(0)
}

async fn every_method_with_anothers_wall(world: World) {
    let ended = furnish(&world).await;
    let store = Arc::clone(&home(&world).store);
    let methods = methods_of_an_org();
    assert!(methods.len() > 30, "{methods:?}");
    let before = contents(&world).await;
    let mut refused = Vec::new();
    *store.walled_as.lock() = Some(org("zeta"));
    for method in &methods {
        match tried(&world, ended, method).await {
            Ok(seen) => assert!(!seen, "{method} sees another org"),
            Err(error) => {
                let text = error.to_string();
                assert!(matches!(error, StoreError::Corrupt(_)), "{method}: {text}: not to be tried again");
                assert!(text.contains("violates row-level security policy"), "{method}: {text}");
                refused.push(method.as_str());
            }
        }
        assert_eq!(contents(&world).await, before, "{method} changes another org");
    }
    let writes =
        ["open_conversation", "delete_conversation", "reset_snapshot", "put_attachment", "put_worker", "record_act"];
    assert_eq!(refused, writes, "the others find nothing to change");
    // With its own wall each does what it is for.
    *store.walled_as.lock() = None;
    for method in &methods {
        assert!(tried(&world, ended, method).await.unwrap(), "{method} was tried with something to see");
    }
    check(&world).await;
}

#[tokio::test]
async fn o1_nothing_of_an_org_is_seen_or_changed_through_anothers_wall() {
    every_method_with_anothers_wall(world().await).await;
}

#[tokio::test]
async fn o1_nothing_of_an_org_is_seen_or_changed_through_anothers_wall_behind_a_pooler() {
    every_method_with_anothers_wall(pooled_world().await).await;
}

#[tokio::test]
async fn o1_what_an_org_may_not_do_leaves_the_connection_as_it_was() {
    let world = world().await;
    let ended = furnish(&world).await;
    let home = home(&world);
    for _ in 0..10 {
        *home.store.walled_as.lock() = Some(org("zeta"));
        assert!(tried(&world, ended, "record_act").await.is_err());
        assert!(!tried(&world, ended, "turn").await.unwrap());
        *home.store.walled_as.lock() = None;
        assert!(tried(&world, ended, "turn").await.unwrap());
        let row = home.store.one_hostwide(
            home.store.query("SELECT current_user = session_user, current_setting('turnhouse.org', true)"),
        );
        let row = row.await.unwrap();
        assert!(row.get::<bool, _>(0), "the role ends with its transaction");
        assert_eq!(row.get::<Option<String>, _>(1).unwrap_or_default(), "", "and so does the org");
    }
}

/// Drops what is asked when it has been polled so often: at each of its awaits, one after another.
async fn given_up_after(polls: usize, asked: impl Future<Output = ()>) {
    let mut asked = std::pin::pin!(asked);
    let mut polled = 0;
    std::future::poll_fn(|cx| {
        polled += 1;
        if polled > polls { std::task::Poll::Ready(()) } else { asked.as_mut().poll(cx) }
    })
    .await;
}

/// A client hangs up at any moment: the role and the org of what it asked for do not stay behind.
#[tokio::test]
async fn o1_whoever_goes_away_in_the_midst_leaves_nothing_on_the_connection() {
    let database = Database::migrated().await;
    let store = PostgresStore::open(PostgresOptions { connections: 1, ..database.options() }).await.unwrap();
    for of in ["acme", "zeta"] {
        assert!(store.create_org(&org(of), &user("root"), Timestamp(1), &by()).await.unwrap());
    }
    for polls in 1..40 {
        given_up_after(polls, async { drop(store.org(&org("acme")).await) }).await;
        // What reads alone changes nothing, and behind a wall there is one org.
        assert_eq!(store.orgs().await.unwrap().len(), 2, "a read that was given up after {polls} polls");
        assert!(
            store.create_org(&org("zeta"), &user("root"), Timestamp(1), &by()).await.is_ok(),
            "after {polls} polls"
        );
        given_up_after(polls, async { drop(store.begin_of(&org("acme"), super::super::BEGIN).await) }).await;
        assert_eq!(store.orgs().await.unwrap().len(), 2, "a transaction that was given up after {polls} polls");
    }
    store.close().await;
}

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
    ("sweep.rs", &["find_overdue", "forget_keys_before", "read_live_counts", "vacuum_markers"]),
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
