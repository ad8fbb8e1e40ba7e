//! The conformance suite on PostgreSQL, and what is PostgreSQL's alone: settings, poolers, versions, errors.
//!
//! A test makes a database of its own on the server that `TURNHOUSE_TEST_DATABASE_URL` names and drops it. The whole suite runs a second time through
//! PgBouncer in transaction mode, which `TURNHOUSE_TEST_POOLER_URL` names. `cargo xtask test` starts both.

use std::collections::{HashMap, HashSet};
use std::str::FromStr as _;
use std::sync::Arc;

use futures_util::FutureExt as _;
use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, Row as _};
use uuid::Uuid;

use super::open::without_pooler;
use super::*;
use crate::ids::ReplicaId;
use crate::store::conformance::{World, agent, by, conversation, org, user};
use crate::store::{
    Accept, AcceptResult, ClaimRequest, CommitResult, Opening, PutAgent, Store, StoreError, Write, Written,
};

mod home;
mod isolation;
mod policies;
mod releases;
mod roles;
mod server;
mod tables;

pub(super) use home::Database;
use home::*;
pub(super) use tables::check_database;
use tables::{check, count};

mod suite {
    crate::store::conformance::rules!(crate::store::postgres::tests::world, crate::store::postgres::tests::check);
}

mod pooled {
    crate::store::conformance::rules!(
        crate::store::postgres::tests::pooled_world,
        crate::store::postgres::tests::check
    );
}

#[tokio::test]
async fn a_schema_is_made_through_a_pooler() {
    let database = Database::empty().await;
    let url = on(&variable("TURNHOUSE_TEST_POOLER_URL"), &database.name);
    let options = PostgresOptions { url, ..database.options() };
    let stores = futures_util::future::join_all((0..3).map(|_| PostgresStore::open(options.clone()))).await;
    for store in stores {
        let store = store.unwrap();
        store.ping().await.unwrap();
        store.close().await;
    }
    let nowhere = PostgresOptions { url: on(&options.url, "no_such_database"), ..options };
    let why = PostgresStore::open(nowhere).await.err().unwrap().to_string();
    assert!(why.contains("there is no such database"), "{why}");
}

#[tokio::test]
async fn s6_a_snapshot_without_its_bytes_is_told() {
    let world = world().await;
    let claimed = world.submit_and_start(world.message("c")).await;
    world.complete(&claimed, Some(b"state")).await;
    assert_eq!(home(&world).damage("UPDATE snapshots SET body = NULL").await, 1);
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
    home(&world).damage("UPDATE turn_markers SET state = 'waiting' WHERE state = 'ready'").await;
    home(&world).damage("UPDATE org_load SET waiting = 2, ready = 0 WHERE org_id = 'acme'").await;
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
    let mut connection = home(&world).database.look().await;
    for sql in [
        "UPDATE turns SET outcome = 'cancelled', reply = NULL, cancelled_by = 'user' WHERE outcome = 'completed'",
        "UPDATE turns SET outcome = 'completed' WHERE outcome IS NULL",
        concat!("DELETE", " FROM turn_markers"),
        "UPDATE turn_markers SET state = 'ready' WHERE state = 'waiting'",
        "UPDATE turn_markers SET state = 'running', holder = gen_random_uuid() WHERE refusal IS NOT NULL",
        "UPDATE turn_markers SET holder = NULL WHERE state = 'running'",
        "UPDATE org_load SET running = -1",
    ] {
        let error = sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await.expect_err(sql);
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
        assert!(code.starts_with("23"), "{sql}: {error}");
    }
    world.complete(&running, Some(b"one")).await;
    let fork = "INSERT INTO snapshots SELECT org_id, agent_id, conversation_id, gen_random_uuid(), parent_run, turn_id, worker, version, at, body FROM snapshots";
    assert!(sqlx::query(fork).execute(&mut connection).await.is_err(), "two runs never share a parent");
    check(&world).await;
}

#[tokio::test]
async fn r1_what_was_accepted_is_there_for_another_host() {
    let world = world().await;
    let running = world.submit_and_start(world.message("c")).await;
    let waiting = world.submit(world.message("c")).await;
    let other = PostgresStore::open(home(&world).database.options()).await.unwrap();
    let live = other.live_counts().await.unwrap();
    assert_eq!((live.waiting, live.ready, live.running), (1, 0, 1), "the counts are the database's");
    assert_eq!(other.running_turns(world.replica).await.unwrap(), std::slice::from_ref(&running.lease));
    assert!(other.turn(&org("acme"), waiting).await.unwrap().is_some());
    other.close().await;
    assert!(matches!(other.ping().await, Err(StoreError::Unavailable(_))));
    check(&world).await;
}

#[tokio::test]
async fn a_turn_handed_round_for_ever_ends() {
    let world = world().await;
    let claimed = world.submit_and_start(world.message("c")).await;
    assert_eq!(crate::lease::EPOCH_MAX, 1_000_000, "the partial index says this number, too");
    home(&world).damage("UPDATE turn_markers SET epoch = 999999").await;
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
async fn file_mode_is_refused_with_its_reason() {
    let world = world().await;
    let settings = crate::agent::AgentSettings {
        session_mode: crate::gate::SessionMode::File,
        ..crate::agent::AgentSettings::of(crate::store::conformance::worker())
    };
    let put = world.store.put_agent(&org("acme"), &agent(), settings, 3, world.now(), &by()).await.unwrap();
    assert!(matches!(put, PutAgent::NoFileMode), "{put:?}");
}

#[tokio::test]
async fn o5_ten_thousand_queued_turns_delay_no_other_orgs_single_one() {
    const QUEUED: usize = 10_000;
    let world = world().await;
    let bounds = crate::admission::QueueBounds {
        conversation_queue_max: 10,
        org_queue_max: 2 * QUEUED,
        host_queue_max: 2 * QUEUED,
    };
    let began = Instant::now();
    for some in (0..QUEUED).collect::<Vec<_>>().chunks(500) {
        // Two to a conversation: half of them are ready.
        let accept = |n: &usize| Accept { bounds, ..world.message(&format!("c-{}", n / 2)) };
        let batch = some.iter().map(|n| Write::Accept(Box::new(accept(n)))).collect();
        let written = world.batch(batch).await;
        assert!(written.iter().all(|one| matches!(one, Written::Accept(AcceptResult::Accepted { .. }))));
    }
    println!("{QUEUED} turns queued in {:?}", began.elapsed());
    // Other hosts, each of which goes by what it has served itself.
    let mut hosts = vec![(Arc::clone(&world.store), world.replica)];
    for _ in 0..3 {
        let store: Arc<dyn Store> =
            Arc::new(PostgresStore::open(home(&world).database.options()).await.expect("it opens"));
        hosts.push((store, world.another_replica(1_000_000).await));
    }
    let claim = async |host: usize, slots: usize| {
        let (store, holder) = &hosts[host % hosts.len()];
        let request = ClaimRequest { holder: *holder, ..world.claim_request(slots) };
        let mut written = store.write(vec![Write::Claim(request)], world.now()).await.expect("the store answers");
        let Some(Written::Claim(claimed)) = written.pop() else { panic!("a claim is answered by one") };
        claimed
    };
    let mut slowest = Duration::ZERO;
    for round in 0..6 {
        for host in 0..hosts.len() {
            assert_eq!(claim(host, 8).await.len(), 8, "there is enough for all");
        }
        world.advance_ms(1_000);
        let single = world.submit(Accept { bounds, ..world.message_of_zeta(&format!("c-{round}")) }).await;
        // Whichever host has a slot next: one it is.
        let began = Instant::now();
        let mut next = Vec::new();
        for host in 0..hosts.len() {
            next.extend(claim(round + host, 1).await.into_iter().map(|claimed| claimed.lease.turn));
        }
        slowest = slowest.max(began.elapsed());
        assert_eq!(next.len(), hosts.len());
        assert!(next.contains(&single), "it is among the next {}", hosts.len());
        assert_eq!(next[0], single, "a host that has just served the one serves the other");
    }
    println!("{} claims took {slowest:?} at most", hosts.len());
    for (store, _) in &hosts[1..] {
        store.close().await;
    }
    check(&world).await;
}

#[tokio::test]
async fn r3_the_time_is_the_databases() {
    let database = Database::migrated().await;
    let options = PostgresOptions { clock: Clock::Database, ..database.options() };
    let store = PostgresStore::open(options).await.unwrap();
    // Ten minutes behind, ten minutes ahead, and long ago.
    let real = crate::clock::Clock::system().now();
    let replica = ReplicaId::new();
    for skew in [-600_000, 600_000, -real.0] {
        let skewed = Timestamp(real.0 + skew);
        if skew == -600_000 {
            store.register_replica(replica, skewed, 60_000).await.unwrap();
        }
        assert!(store.renew_replica(replica, skewed, 60_000).await.unwrap());
        let id = format!("skewed{skew}");
        store.create_org(&org(&id), &user("root"), skewed, &by()).await.unwrap();
        let made = store.orgs().await.unwrap().into_iter().find(|found| found.id == org(&id)).unwrap().created_at;
        assert!((made.0 - real.0).abs() < 60_000, "{made:?}");
        let conversation = conversation("c");
        let opened = store.open_conversation(&org(&id), &agent(), &conversation, &user("a"), skewed).await.unwrap();
        let Opening::Made(opened) = opened else { panic!("there was none") };
        assert!((opened.for_host().created_at.0 - real.0).abs() < 60_000);
    }
}

#[tokio::test]
async fn the_sweep_vacuums_the_table_of_live_turns_directly_and_through_a_pooler() {
    for parameter in ["pgbouncer=false", "pgbouncer=true"] {
        let database = Database::migrated().await;
        let url = with_parameter(&url_of(&database.name), parameter);
        let store = PostgresStore::open(PostgresOptions { url, ..database.options() }).await.unwrap();
        // A session that ends tells the server at once how many rows it left dead.
        let mut other = PgConnection::connect(&url_of(&database.name)).await.unwrap();
        let rows = sweep::DEAD_MAX + 1;
        let left = format!(
            "ALTER TABLE turn_markers SET (autovacuum_enabled = false);
             BEGIN;
             INSERT INTO turn_markers (org_id, turn_id, agent_id, mode, state, epoch, attempt, attempts_max, not_before, deadline_at, admission_ms, turn_ms)
             SELECT 'a', gen_random_uuid(), 'b', 'snapshot', 'ready', 0, 0, 3, 0, 9000000000000000, 1, 1 FROM generate_series(1, {rows});
             ROLLBACK;"
        );
        sqlx::raw_sql(AssertSqlSafe(left)).execute(&mut other).await.unwrap();
        other.close().await.unwrap();
        let asked = "SELECT pg_stat_get_vacuum_count('turn_markers'::regclass), pg_stat_get_dead_tuples('turn_markers'::regclass)";
        let seen = async || {
            let row = store.one_hostwide(store.query(asked)).await.unwrap();
            (row.get::<i64, _>(0), row.get::<i64, _>(1))
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), async {
            while seen().await != (1, 0) {
                store.find_overdue(Timestamp(0), 5, 10).await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{parameter}: not vacuumed"));
        store.find_overdue(Timestamp(0), 5, 10).await.unwrap();
        assert_eq!(seen().await.0, 1, "{parameter}: nothing is vacuumed that needs none");
        store.close().await;
    }
}

#[tokio::test]
async fn a_journal_that_rests_holds_nobody_up() {
    let world = world().await;
    let store = Arc::clone(&home(&world).store);
    let (rest, rests) = std::sync::mpsc::channel::<()>();
    let (tell, told) = tokio::sync::oneshot::channel();
    // As the journal does: a thread with a runtime that stands still between its batches.
    let accept = Write::Accept(Box::new(world.message("c")));
    let (writer, now) = (Arc::clone(&store), world.now());
    let journal = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(writer.write(vec![accept], now)).unwrap();
        tell.send(()).unwrap();
        let _ = rests.recv();
    });
    told.await.unwrap();
    let others = async {
        for _ in 0..10 {
            futures_util::future::join_all((0..5).map(|_| store.ping())).await.into_iter().for_each(Result::unwrap);
        }
        store.close().await;
    };
    tokio::time::timeout(Duration::from_secs(3), others).await.expect("nobody waits for the journal's next batch");
    drop(rest);
    journal.join().unwrap();
}

#[tokio::test]
async fn a_host_whose_org_others_write_to_gathers_what_would_wait() {
    let world = world().await;
    let store = Arc::clone(&home(&world).store);
    let mut other = home(&world).database.look().await;
    run(&mut other, "BEGIN; SELECT 1 FROM org_load FOR UPDATE".to_owned()).await;
    let accept = |conversation: &str| vec![Write::Accept(Box::new(world.message(conversation)))];
    let (writer, batch, now) = (Arc::clone(&store), accept("a"), world.now());
    let written = tokio::spawn(async move { writer.write(batch, now).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(store.gather(), Duration::ZERO, "nothing has been waited for yet");
    run(&mut other, "COMMIT".to_owned()).await;
    written.await.unwrap().unwrap();
    assert!(store.gather() > Duration::ZERO, "the next batch would wait, too");
    for n in 0..20 {
        store.write(accept(&format!("b{n}")), now).await.unwrap();
    }
    assert_eq!(store.gather(), Duration::ZERO, "nobody was in the way");
    check(&world).await;
}

#[tokio::test]
async fn keys_that_two_hosts_touch_at_once_lock_nobody_out() {
    let world = world().await;
    let key = |n: u8| crate::store::KeyRecord {
        id: format!("{n:016x}"),
        org: org("acme"),
        user: user("ann"),
        scopes: crate::caller::Scopes::TURNS,
        name: "k".to_owned(),
        created_at: world.now(),
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    let mut used = Vec::new();
    for n in 0..20 {
        world.store.create_key([n; 32], &key(n), &by()).await.unwrap();
        used.push((org("acme"), key(n).id));
    }
    let backwards: Vec<_> = used.iter().rev().cloned().collect();
    for round in 1..10_u64 {
        let now = world.now().plus_ms(round * 60_000);
        let (one, other) = tokio::join!(world.store.touch_keys(&used, now), world.store.touch_keys(&backwards, now));
        one.unwrap();
        other.unwrap();
    }
    let keys = world.store.keys(&org("acme")).await.unwrap();
    assert!(keys.iter().all(|key| key.last_used_at == keys[0].last_used_at && key.last_used_at.is_some()));
}

#[tokio::test]
async fn an_org_without_an_owner_gets_one() {
    let world = world().await;
    home(&world).damage("UPDATE orgs SET owner_user = '' WHERE org_id = 'acme'").await;
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
    let damage = async |sql: &'static str| assert!(home(&world).damage(sql).await > 0, "{sql}");
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
    let mut connection = home(&world).database.look().await;
    for sql in [
        "UPDATE audit SET actor = 'eve'",
        "DELETE FROM audit WHERE verb = 'org.export' AND org_id = 'acme'",
        "DELETE FROM audit WHERE verb = 'org.export' AND org_id = ''",
        "TRUNCATE audit",
        "INSERT INTO audit SELECT org_id, at + 1, audit_id, actor, credential, request_id, verb, resource, repeat(' ', 2000) FROM audit",
    ] {
        let error = sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await.expect_err(sql);
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default().into_owned();
        assert!(code.starts_with("23"), "{sql}: {error}");
    }
    let old = home(&world).damage("DELETE FROM audit WHERE verb = 'org.create'").await;
    assert!(old > 0, "what is older than thirty days may go");
    home(&world).damage("UPDATE orgs SET deleting_at = 1 WHERE org_id = 'acme'").await;
    let gone = home(&world).damage("DELETE FROM audit WHERE verb = 'org.export' AND org_id = 'acme'").await;
    assert_eq!(gone, 1, "with its org");
}

#[tokio::test]
async fn every_statement_says_its_name() {
    for (name, sql) in [
        attachments::STATEMENTS,
        audit::STATEMENTS,
        catalog::STATEMENTS,
        conversations::STATEMENTS,
        erase::STATEMENTS,
        facade::STATEMENTS,
        keys::STATEMENTS,
        limits::STATEMENTS,
        members::STATEMENTS,
        orgs::STATEMENTS,
        reads::STATEMENTS,
        standing::STATEMENTS,
        sweep::STATEMENTS,
        wall::STATEMENTS,
        retention::STATEMENTS,
        whole::STATEMENTS,
    ]
    .into_iter()
    .flatten()
    {
        assert!(sql.starts_with(&format!("-- {}\n", name.to_lowercase())), "{name} says its name");
    }
}
