//! The conformance suite on SQLite, and what is SQLite's alone: files, plans, errors.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use rusqlite::OpenFlags;
use tempfile::TempDir;

use super::*;
use crate::ids::ReplicaId;
use crate::store::conformance::{World, agent, by, conversation, org, replied};
use crate::store::{AcceptResult, CommitResult, Store, Write, Written};
use crate::turn::TurnState;

mod tables;

use tables::check;

const SNAPSHOTS_KEPT: u32 = 3;

/// The store under a [`World`], for what the trait does not show.
struct Home {
    dir: TempDir,
    store: Arc<SqliteStore>,
}

fn options(dir: &TempDir) -> SqliteOptions {
    SqliteOptions { snapshots_kept: SNAPSHOTS_KEPT, readers: 2, ..SqliteOptions::new(dir.path().join("data")) }
}

async fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open(options(&dir)).await.unwrap());
    // The rules are about what is written, not about when it reaches the disk; a few hundred waits for it would be most of the suite's time.
    store.writer.lock().as_mut().unwrap().conn.pragma_update(None, "synchronous", "OFF").unwrap();
    World::new(Arc::clone(&store) as Arc<dyn Store>, Box::new(Home { dir, store })).await
}

fn home(world: &World) -> &Home {
    world._keep.downcast_ref().unwrap()
}

impl Home {
    fn file(&self) -> PathBuf {
        self.dir.path().join("data").join(DATABASE)
    }

    fn look(&self) -> rusqlite::Connection {
        rusqlite::Connection::open_with_flags(self.file(), OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap()
    }

    /// Breaks the tables behind the store's back.
    fn damage(&self, sql: &str) -> usize {
        self.store.writer.lock().as_mut().unwrap().conn.execute(sql, []).unwrap()
    }
}

mod suite {
    crate::store::conformance::rules!(crate::store::sqlite::tests::world, crate::store::sqlite::tests::check);
}

#[tokio::test]
async fn s6_a_snapshot_without_its_bytes_is_told() {
    let world = world().await;
    let claimed = world.submit_and_start(world.message("c")).await;
    world.complete(&claimed, Some(b"state")).await;
    assert_eq!(home(&world).damage("UPDATE snapshots SET body = NULL"), 1);
    let fused = world.submit_and_start(world.message("c")).await;
    let snapshot = fused.head.as_ref().unwrap().snapshot.as_ref().expect("it never silently starts fresh");
    assert_eq!((snapshot.run_id, snapshot.body.clone()), (claimed.lease.turn.into(), None));
    world.requeue(&fused, 0).await;
    assert!(world.claim_one().await.head.unwrap().snapshot.unwrap().body.is_none());
}

#[tokio::test]
async fn a_stranded_lane_is_mended_by_the_sweep() {
    let world = world().await;
    let turn = world.submit(world.message("c")).await;
    let next = world.submit(world.message("c")).await;
    // As if a commit had forgotten to make the next ready.
    home(&world).damage("UPDATE turn_markers SET state = 'waiting' WHERE state = 'ready'");
    home(&world)
        .store
        .writer
        .lock()
        .as_mut()
        .unwrap()
        .transaction(world.now(), |tx| {
            tx.counts.shift(&org("acme"), Some(counts::Stage::Ready), Some(counts::Stage::Waiting));
            Ok(())
        })
        .unwrap();
    assert!(world.claim(10).await.is_empty());
    assert!(world.sweep().await.ready);
    let claimed = world.claim_one().await;
    assert_eq!(claimed.lease.turn, turn);
    world.complete(&claimed, None).await;
    assert_eq!(world.claim_one().await.lease.turn, next);
    check(&world).await;
}

#[tokio::test]
async fn the_schema_says_it_a_second_time() {
    let world = world().await;
    let running = world.submit_and_start(world.message("c")).await;
    world.submit(world.message("c")).await;
    let ended = world.submit_and_start(world.message("d")).await;
    world.complete(&ended, None).await;
    let mut refused = world.message("e");
    refused.envelope.org = None;
    world.submit(refused).await;
    let home = home(&world);
    let fails = |sql: &str| {
        // In a transaction that is rolled back, as the writer's are.
        let mut writer = home.store.writer.lock();
        let conn = &writer.as_mut().unwrap().conn;
        conn.execute_batch("BEGIN").unwrap();
        let error = conn.execute(sql, []).expect_err(sql);
        conn.execute_batch("ROLLBACK").unwrap();
        assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::ConstraintViolation), "{sql}: {error}");
    };
    fails("UPDATE turns SET outcome = 'cancelled', reply = NULL, cancelled_by = 'user' WHERE outcome = 'completed'");
    fails("UPDATE turns SET outcome = 'completed' WHERE outcome IS NULL");
    fails(concat!("DELETE", " FROM turn_markers"));
    fails("UPDATE turn_markers SET state = 'ready' WHERE state = 'waiting'");
    fails("UPDATE turn_markers SET state = 'running', holder = x'00' WHERE refusal IS NOT NULL");
    fails("UPDATE turn_markers SET holder = NULL WHERE state = 'running'");
    world.complete(&running, Some(b"one")).await;
    fails(
        "INSERT INTO snapshots SELECT org_id, agent_id, conversation_id, randomblob(16), parent_run, turn_id, worker, version, at, body FROM snapshots",
    );
    check(&world).await;
}

#[tokio::test]
async fn r4_a_full_disk_loses_nothing_and_heals() {
    let world = world().await;
    let home = home(&world);
    let pages = |sql: &str| {
        home.store.writer.lock().as_mut().unwrap().conn.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap()
    };
    let before = world.submit_and_start(world.message("c")).await;
    let used = pages("PRAGMA page_count");
    pages(&format!("PRAGMA max_page_count = {used}"));
    let large = || {
        let mut message = world.message("d");
        message.message = vec![b'x'; 200_000].into();
        message
    };
    let lost = world.message("e");
    let batch = vec![Write::Accept(Box::new(lost.clone())), Write::Accept(Box::new(large()))];
    let error = world.store.write(batch, world.now()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(why) if why.contains("full")), "{error}");
    assert!(world.store.turn(&org("acme"), lost.turn).await.unwrap().is_none(), "nothing of the batch was written");
    check(&world).await;
    pages("PRAGMA max_page_count = 4294967294");
    world.complete(&before, None).await;
    world.submit(lost).await;
    world.submit(large()).await;
    check(&world).await;
}

#[tokio::test]
async fn a_read_only_database_is_unavailable_not_the_items_fault() {
    let world = world().await;
    home(&world).store.writer.lock().as_mut().unwrap().conn.pragma_update(None, "query_only", true).unwrap();
    let item = Write::Accept(Box::new(world.message("c")));
    let error = world.store.write(vec![item.clone(), item], world.now()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(why) if why.contains("read-only")), "{error}");
    home(&world).store.writer.lock().as_mut().unwrap().conn.pragma_update(None, "query_only", false).unwrap();
    world.submit(world.message("c")).await;
    check(&world).await;
}

#[tokio::test]
async fn r1_what_was_accepted_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (running, waiting) = {
        let store = Arc::new(SqliteStore::open(options(&dir)).await.unwrap());
        let world = World::new(store, Box::new(())).await;
        let running = world.submit_and_start(world.message("c")).await;
        (running, world.submit(world.message("c")).await)
        // Dropped without a close, as a crash would.
    };
    let store = SqliteStore::open(options(&dir)).await.unwrap();
    let live = store.live_counts().await.unwrap();
    assert_eq!((live.waiting, live.ready, live.running), (1, 0, 1), "the counts come from the rows");
    let (replica, now) = (ReplicaId::new(), Timestamp(2_000_000));
    store.register_replica(replica, now, 1_000).await.unwrap();
    store.expire_other_replicas(replica, Timestamp(1_000_001)).await.unwrap();
    let request = crate::store::ClaimRequest {
        holder: replica,
        slots: 9,
        org_running_max: crate::store::RunningBound(9),
        backoff_ms: 1,
        backoff_ms_max: 1,
    };
    let written = store.write(vec![Write::Claim(request)], Timestamp(1_000_001)).await.unwrap();
    let [Written::Claim(claimed)] = &written[..] else { panic!("{written:?}") };
    assert_eq!((claimed.len(), claimed[0].lease.turn, claimed[0].restarted), (1, running.lease.turn, true));
    assert_eq!(store.turn(&org("acme"), waiting).await.unwrap().unwrap().for_host().state, TurnState::Queued);
    store.close().await;
    assert!(matches!(store.ping().await, Err(StoreError::Unavailable(_))));
    assert!(matches!(store.write(vec![], now).await, Err(StoreError::Unavailable(_))));
}

#[tokio::test]
async fn a_second_host_is_refused_and_the_directory_is_its_owners() {
    let dir = tempfile::tempdir().unwrap();
    let first = SqliteStore::open(options(&dir)).await.unwrap();
    let Err(StoreError::InUse(why)) = SqliteStore::open(options(&dir)).await else { panic!("opened twice") };
    assert!(why.contains("another turnhouse uses") && why.contains("data"), "{why}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(dir.path().join("data")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let mode = std::fs::metadata(dir.path().join("data").join(DATABASE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    first.close().await;
    drop(first);
    SqliteStore::open(options(&dir)).await.unwrap();
}

#[tokio::test]
async fn keys_are_made_beside_a_running_host_and_turns_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let host = SqliteStore::open(options(&dir)).await.unwrap();
    let beside = SqliteStore::open_admin(options(&dir)).await.unwrap();
    let owner = crate::store::conformance::user("root");
    assert!(beside.create_org(&org("acme"), &owner, Timestamp(1), &by()).await.unwrap());
    assert_eq!(host.orgs().await.unwrap().len(), 1, "the host sees it at once");
    assert!(matches!(beside.write(vec![], Timestamp(1)).await, Err(StoreError::InUse(_))));
    let deleted =
        beside.delete_conversation(&org("acme"), &agent(), &conversation("c"), None, Timestamp(1), &by()).await;
    assert!(matches!(deleted, Err(StoreError::InUse(_))));
    beside.close().await;
    host.close().await;
    drop((host, beside));
    SqliteStore::open_admin(options(&dir)).await.unwrap().write(vec![], Timestamp(1)).await.unwrap();
}

#[tokio::test]
async fn a_turn_handed_round_for_ever_ends() {
    let world = world().await;
    let claimed = world.submit_and_start(world.message("c")).await;
    assert_eq!(crate::lease::EPOCH_MAX, 1_000_000, "the partial index says this number, too");
    home(&world).damage("UPDATE turn_markers SET epoch = 999999");
    let mut last = claimed.clone();
    last.lease.epoch = 999_999;
    world.requeue(&last, 0).await;
    assert!(world.claim(10).await.is_empty());
    let found = world.sweep().await;
    assert!(!found.ready);
    let found: Vec<_> = found.overdue.iter().map(|overdue| (overdue.turn, overdue.why)).collect();
    assert_eq!(found, [(claimed.lease.turn, crate::store::OverdueReason::AttemptsExhausted)]);
    assert!(matches!(world.cancel(claimed.lease.turn).await, CommitResult::Won(_)));
    check(&world).await;
}

#[tokio::test]
async fn what_is_no_database_of_ours_is_said_clearly() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join(DATABASE), "this is a text file, and a long one at that. ".repeat(100)).unwrap();
    let Err(StoreError::Corrupt(why)) = SqliteStore::open(options(&dir)).await else { panic!("opened a text file") };
    assert!(why.contains("not a database") && why.contains("move it away"), "{why}");

    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [file.clone(), file.join("below")] {
        let Err(StoreError::Unavailable(why)) = SqliteStore::open(SqliteOptions::new(&path)).await else {
            panic!("opened {}", path.display())
        };
        assert!(why.contains("not a directory"), "{why}");
    }
}

#[tokio::test]
async fn every_commit_reaches_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(options(&dir)).await.unwrap();
    let writer = store.writer.lock();
    let conn = &writer.as_ref().unwrap().conn;
    let pragma =
        |name: &str| conn.pragma_query_value(None, name, |row| row.get::<_, rusqlite::types::Value>(0)).unwrap();
    assert_eq!(pragma("synchronous"), rusqlite::types::Value::Integer(2), "FULL");
    assert_eq!(pragma("journal_mode"), rusqlite::types::Value::Text("wal".to_owned()));
    assert_eq!(pragma("foreign_keys"), rusqlite::types::Value::Integer(0));
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    SqliteStore::open(options(&dir)).await.unwrap().close().await;
    let conn = rusqlite::Connection::open(dir.path().join("data").join(DATABASE)).unwrap();
    conn.execute("INSERT INTO _sqlx_migrations VALUES (99, 'later', 0, 1, x'00', 0)", []).unwrap();
    drop(conn);
    let Err(StoreError::NewerSchema { found: 99, known: 13 }) = SqliteStore::open(options(&dir)).await else {
        panic!("opened a newer schema")
    };
}

#[tokio::test]
async fn o3_what_a_private_directory_takes_is_stored_until_its_generation_is_renewed() {
    let world = world().await;
    let (acme, agent, id) = (org("acme"), agent(), conversation("c"));
    let change = crate::quota::LimitsChange { storage_bytes_max: Some(Some(1_000_000)), ..Default::default() };
    world.store.set_org_limits(&acme, &change, world.now(), &by()).await.unwrap();
    let turn = world.submit_and_start(world.message("c")).await;
    world.complete(&turn, None).await;
    let stored = async || {
        world.advance_ms(crate::quota::MEASURED_EVERY_MS);
        while world.store.measure_storage(world.now()).await.unwrap().is_some() {}
        world.store.org_use(&acme, world.now()).await.unwrap().unwrap().meters.storage_bytes
    };
    let generation = async || world.store.generation(&acme, &agent, &id).await.unwrap().unwrap();
    let note = async |of, bytes| world.store.note_files(&acme, &agent, &id, of, bytes).await.unwrap();
    let (without, first) = (stored().await, generation().await);
    note(first, 60_000).await;
    assert_eq!(stored().await, without + 60_000);
    note(first, 50_000).await;
    note(uuid::Uuid::now_v7(), 70_000).await;
    assert_eq!(stored().await, without + 50_000, "another generation's is nobody's");
    assert!(world.store.reset_snapshot(&acme, &agent, &id, None, world.now(), &by()).await.unwrap());
    note(first, 50_000).await;
    assert_eq!(stored().await, without);
    note(generation().await, 40_000).await;
    assert_eq!(stored().await, without + 40_000);
    world.store.delete_conversation(&acme, &agent, &id, None, world.now(), &by()).await.unwrap();
    assert!(stored().await < without);
    check(&world).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o5_however_many_changes_wait_the_journal_waits_for_one() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    let world = world().await;
    let (store, done) = (Arc::clone(&home(&world).store), Arc::new(AtomicUsize::new(0)));
    let change = |_| {
        let (store, done) = (store.clone(), done.clone());
        tokio::spawn(async move {
            let work = move |_: &mut super::writer::Tx<'_>| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                done.fetch_add(1, Ordering::SeqCst);
                Ok(())
            };
            store.write_with(Timestamp(0), work).await
        })
    };
    let changes: Vec<_> = (0..30).map(change).collect();
    while done.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let before = done.load(Ordering::SeqCst);
    world.claim(0).await;
    let meanwhile = done.load(Ordering::SeqCst) - before;
    assert!(meanwhile <= 3, "the one under way, and whoever came just before: {meanwhile}");
    for change in changes {
        change.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn an_org_without_an_owner_gets_one() {
    let world = world().await;
    home(&world).damage("UPDATE orgs SET owner_user = '' WHERE org_id = 'acme'");
    let starter = crate::store::Starter {
        agent: "default".parse().unwrap(),
        worker: "starter".parse().unwrap(),
        digest: [9; 32],
        wasm: bytes::Bytes::from_static(b"starter"),
        imports: vec![],
        workers_max: 3,
        versions_kept: 2,
        agents_max: 3,
    };
    let eve = crate::store::conformance::user("eve");
    let mended = world.store.provision_org(&org("acme"), &eve, &starter, world.now(), &by()).await.unwrap();
    assert!(mended.owner_set && !mended.created);
    let owners: Vec<_> = world.store.orgs().await.unwrap().into_iter().map(|org| org.owner.to_string()).collect();
    assert_eq!(owners, ["eve", "root"], "and nobody else's is touched");
}

#[tokio::test]
async fn an_older_orgs_owner_becomes_its_member_and_roles_stay() {
    let world = world().await;
    let damage = async |sql: &'static str| assert!(home(&world).damage(sql) > 0, "{sql}");
    crate::store::conformance::members::an_older_orgs_owner_joins(&world, damage).await;
    check(&world).await;
}

#[tokio::test]
async fn what_was_done_is_not_rewritten() {
    let world = world().await;
    let now = crate::clock::Clock::system().now();
    let act = crate::audit::Act::new(crate::audit::Verb::OrgExport, "org", serde_json::json!({}));
    for org in [Some(&org("acme")), None] {
        world.store.record_act(org, &act, now, &by()).await.unwrap();
    }
    let home = home(&world);
    let run = |sql: &str| home.store.writer.lock().as_mut().unwrap().conn.execute(sql, []);
    for sql in [
        "UPDATE audit SET actor = 'eve'",
        "DELETE FROM audit WHERE verb = 'org.export' AND org_id = 'acme'",
        "DELETE FROM audit WHERE verb = 'org.export' AND org_id = ''",
        "INSERT INTO audit SELECT org_id, at + 1, audit_id, actor, credential, request_id, verb, resource, printf('%2000s', '') FROM audit",
    ] {
        assert!(run(sql).is_err(), "{sql}");
    }
    assert!(run("DELETE FROM audit WHERE verb = 'org.create'").unwrap() > 0, "what is older than thirty days may go");
    run("UPDATE orgs SET deleting_at = 1 WHERE org_id = 'acme'").unwrap();
    assert_eq!(run("DELETE FROM audit WHERE verb = 'org.export' AND org_id = 'acme'").unwrap(), 1, "with its org");
}

#[tokio::test]
async fn no_statement_scans_a_table() {
    let world = world().await;
    let conn = home(&world).look();
    let all = [
        accept::STATEMENTS,
        attachments::STATEMENTS,
        audit::STATEMENTS,
        catalog::STATEMENTS,
        claim::STATEMENTS,
        commit::STATEMENTS,
        conversations::STATEMENTS,
        erase::STATEMENTS,
        facade::STATEMENTS,
        keys::STATEMENTS,
        agent_load::STATEMENTS,
        limits::STATEMENTS,
        members::STATEMENTS,
        orgs::STATEMENTS,
        reads::STATEMENTS,
        running::STATEMENTS,
        standing::STATEMENTS,
        sweep::STATEMENTS,
        retention::STATEMENTS,
        whole::STATEMENTS,
        writer::STATEMENTS,
    ];
    for (name, sql) in all.into_iter().flatten() {
        assert!(sql.starts_with(&format!("-- {}\n", name.to_lowercase())), "{name} says its name");
        let mut statement =
            conn.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap_or_else(|error| panic!("{name}: {error}"));
        let plan: Vec<String> = statement.raw_query().mapped(|row| row.get(3)).collect::<Result<_, _>>().unwrap();
        for step in &plan {
            let scans = step.starts_with("SCAN ") && !step.contains("VIRTUAL TABLE") && step != "SCAN CONSTANT ROW";
            let allowed = match *name {
                // Once, at the start; the operator's list of orgs; two rows at most.
                "LOAD_COUNTS" | "ORGS" | "TICKET_KEYS" => true,
                // Over the partial index of what is marked: next to nothing.
                "DELETING" => step.contains("orgs_deleting"),
                // Over the partial indexes of what waits, is ready, was refused; the replicas are a handful.
                "SWEEP_STUCK" => step.contains("markers_waiting"),
                "SWEEP_READY" => step.contains("markers_ready"),
                "SWEEP_DEAD" | "SWEEP_REPLICAS" | "EXPIRE_OTHERS" => step.contains("replicas"),
                // An operator's: over what is live, and a handful of rows.
                "STATUS_LIVE" => step.starts_with("SCAN m "),
                "STATUS_REPLICAS" => step.starts_with("SCAN r"),
                "STATUS_SCHEMA" => true,
                // Over the orgs, now and then, and what was summed of one.
                "STORAGE_NEXT" => step.starts_with("SCAN o"),
                "STORAGE" => step.starts_with("SCAN (subquery"),
                _ => false,
            };
            assert!(!scans || allowed, "{name}: {plan:#?}");
        }
        // A probe must use the whole key: through the wrong index it walks a conversation's chain.
        let point = ["HEAD_SNAPSHOT", "SNAPSHOT_KNOWN", "SNAPSHOT_DROP"].contains(name);
        assert!(!point || plan[0].contains("run_id=?"), "{name}: {plan:#?}");
        let ordered = [
            "TURNS_FORWARD",
            "TURNS_BACKWARD",
            "EVENTS",
            "EVENTS_FROM",
            "CLAIM_NEXT",
            "CONVERSATIONS",
            "CONVERSATIONS_OF",
            "AUDIT",
            "MEMBERS",
            "MEMBERSHIPS",
            "MEMBERSHIP_OF_TURN",
            "CONVERSATIONS_OF_ORG",
            "SNAPSHOTS_OF_ORG",
            "SNAPSHOTS_OF",
            "TURNS_OF_ORG",
            "AUDIT_BY_ACTOR",
            "AUDIT_BY_VERB",
            "AUDIT_BY_RESOURCE",
        ];
        assert!(!ordered.contains(name) || !plan.iter().any(|step| step.contains("TEMP B-TREE")), "{name}: {plan:#?}");
    }
}

#[test]
fn s9_exactly_one_function_deletes_markers() {
    let needle = concat!("DELETE FROM ", "turn_markers");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut dirs = vec![root.join("src"), root.join("../migrations")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let squeezed = text.split_whitespace().collect::<Vec<_>>().join(" ").to_uppercase();
            for _ in squeezed.matches(&needle.to_uppercase()) {
                found.push(path.clone());
            }
        }
    }
    found.sort();
    let ends = |place: usize, path: &str| found.get(place).is_some_and(|found| found.ends_with(path));
    let one_a_store = ends(0, "migrations/postgres/0002_functions.sql") && ends(1, "src/store/sqlite/commit.rs");
    assert!(found.len() == 2 && one_a_store, "{found:?}");
    let functions = std::fs::read_to_string(&found[0]).unwrap();
    let before = functions.split_once(needle).expect("it is written like this").0;
    let function = before.rsplit_once("CREATE FUNCTION ").expect("in a function").1;
    assert!(function.starts_with("end_turns("), "one function deletes them");
    let commit = std::fs::read_to_string(&found[1]).unwrap();
    // Its declaration and its one use.
    assert_eq!(commit.matches("COMMIT_DELETE").count(), 2, "one function runs it");
}

#[tokio::test]
async fn a_checkpoint_beside_the_writer_changes_nothing() {
    let world = world().await;
    for round in 0..200 {
        let claimed = world.submit_and_start(world.message(&format!("c-{}", round % 3))).await;
        let result = world.end(world.commit(&claimed, replied("ok"))).await;
        assert!(matches!(result, CommitResult::Won(_)));
    }
    let page = world
        .store
        .turns(&org("acme"), &agent(), &conversation("c-0"), None, crate::store::Direction::Backward, true, 100)
        .await
        .unwrap();
    assert_eq!(page.items.len(), 67);
    assert!(matches!(world.accept(world.message("c-0")).await, AcceptResult::Accepted { .. }));
    check(&world).await;
}
