//! R6–R8, on one host: draining, batches in which one item fails, and slots that become free.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::json;
use turnhouse::event::EventBatch;
use turnhouse::store::{Append, Fenced};
use turnhouse_tests::{Client, TestHost, Turn, on_postgres};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r6_a_drain_gives_back_what_runs_without_spending_an_attempt() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let running = ann.say("slow_reply", "c-1", "4000").await;
    let queued = ann.say("slow_reply", "c-1", "1").await;
    running.reaches("running").await;
    let began = Instant::now();
    let host = host.restart_after(|_, tables| {
        assert_eq!(tables.count("SELECT count(*) FROM turn_markers"), 2, "nothing is lost");
        assert_eq!(tables.count("SELECT count(*) FROM turn_markers WHERE state = 'running'"), 0);
        assert_eq!(tables.count("SELECT max(attempt) FROM turn_markers"), 0, "no attempt is spent");
    });
    let host = host.await;
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    let again = |turn: &Turn| Turn { client: Client::new(&host.url, &ann.key), id: turn.id.clone() };
    assert_eq!(again(&running).completed().await, "4000");
    assert_eq!(again(&running).get().await["attempt"], 1);
    assert_eq!(again(&queued).completed().await, "1");
    // Its stream says that it began anew.
    let kinds: Vec<String> =
        again(&running).events(None).await.all().await.into_iter().map(|event| event.kind).collect();
    assert!(kinds.contains(&"turn.restarted".to_owned()), "{kinds:?}");
    host.stop().await;
}

/// It would begin a second time on the next host, and only a person can say what that would do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r1_a_turn_whose_effect_has_begun_is_not_given_back_by_a_drain() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let running = ann.say("sleep_day", "c-1", "go").await;
    let other = ann.say("sleep_day", "c-2", "go").await;
    for turn in [&running, &other] {
        turn.reaches("running").await;
    }
    let leases = host.host.store.running_turns(host.host.dispatch.replica()).await.expect("the store answers");
    let lease = leases.into_iter().find(|lease| lease.turn.to_string() == running.id).expect("it runs here");
    let begins = Append { lease, batch: EventBatch { first_seq: 1_000, events: Vec::new() } };
    // By the journal, as its worker's call would: the journal's connection is no other thread's.
    let begun = host.host.dispatch.journal.begin_effect(begins).await;
    assert!(matches!(begun, Ok(Fenced::Done)), "{begun:?}");
    let host = host.restart_after(|_, tables| {
        assert_eq!(tables.count("SELECT count(*) FROM turn_markers"), 1, "the other turn was given back");
    });
    let host = host.await;
    let again = |turn: &Turn| Turn { client: Client::new(&host.url, &ann.key), id: turn.id.clone() };
    let ended = again(&running).get().await;
    assert_eq!((&ended["state"], &ended["failure"]["code"]), (&json!("failed"), &json!("host_lost")), "{ended}");
    again(&other).reaches("running").await;
    again(&other).cancel().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r6_a_drain_lets_what_is_nearly_done_finish_and_takes_nothing_new() {
    let host = TestHost::start_with(|config| config.limits.drain_timeout_ms = 43_000).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let turn = ann.say("slow_reply", "c-1", "1500").await;
    turn.reaches("running").await;
    let stream = turn.events(None).await;
    let handle = host.host.clone();
    let drain = tokio::spawn(async move { handle.drain().await });
    turnhouse_tests::eventually("it drains", async || host.host.draining()).await;
    let (status, problem) = ann.submit("slow_reply", "c-2", json!({ "message": { "text": "1" } })).await;
    assert_eq!((status, &problem["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("draining")), "{problem}");
    assert_eq!(ann.get("/readyz").await.0, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(ann.get("/healthz").await.0, StatusCode::OK);
    let last = stream.all().await.pop().expect("an end");
    assert_eq!((last.kind.as_str(), &last.data["reply"]["text"]), ("turn.completed", &json!("1500")));
    drain.await.expect("it drains");
    assert_eq!(host.tables().faults(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r7_one_message_that_cannot_be_stored_fails_alone() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    host.tables().to_damage().execute(if on_postgres() {
        "CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'poisoned'; END $$;
         CREATE TRIGGER poison BEFORE INSERT ON turns FOR EACH ROW WHEN (convert_from(NEW.message, 'UTF8') LIKE '%poison%')
         EXECUTE FUNCTION poison()"
    } else {
        "CREATE TRIGGER poison BEFORE INSERT ON turns WHEN CAST(NEW.message AS TEXT) LIKE '%poison%'
         BEGIN SELECT RAISE(ABORT, 'poisoned'); END"
    });
    let submit = |n: usize| {
        let ann = ann.clone();
        async move {
            let text = if n % 16 == 3 { "poison".to_owned() } else { n.to_string() };
            ann.submit("echo", &format!("c-{n}"), json!({ "message": { "text": text } })).await
        }
    };
    for (n, (status, body)) in join_all((0..64).map(submit)).await.into_iter().enumerate() {
        if n % 16 == 3 {
            assert!(status.is_server_error(), "{n}: {status} {body}");
        } else {
            assert_eq!(status, StatusCode::ACCEPTED, "{n}: {body}");
            assert_eq!(ann.turn(body["turn_id"].as_str().expect("its id")).completed().await, n.to_string());
        }
    }
    assert_eq!(host.tables().count("SELECT count(*) FROM turns"), 60);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r8_a_slot_that_becomes_free_is_taken_at_once() {
    let host = TestHost::start_with(|config| config.limits.host_running_max = 1).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    ann.say("slow_reply", "warm", "1").await.completed().await;
    let began = Instant::now();
    let turns = join_all((0..60).map(|n| {
        let ann = ann.clone();
        async move { ann.say("slow_reply", &format!("c-{n}"), "1").await }
    }))
    .await;
    join_all(turns.iter().map(Turn::completed)).await;
    // Were each to wait for the sweeper's next round, they would take 15 s.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o5_an_org_has_its_bound_and_leaves_room_for_others() {
    let host = TestHost::start_with(|config| {
        config.limits.host_running_max = 4;
        config.limits.org_running_max = 2;
    })
    .await;
    let (ann, zoe) = (host.member("acme", "ann", "admin").await, host.member("zeta", "zoe", "admin").await);
    for client in [&ann, &zoe] {
        client.deploy("slow_reply").await;
    }
    let turns = join_all((0..6).map(|n| {
        let ann = ann.clone();
        async move { ann.say("slow_reply", &format!("c-{n}"), "20000").await }
    }))
    .await;
    turnhouse_tests::eventually("two run", async || host.live().await.running == 2).await;
    assert_eq!(zoe.say("slow_reply", "c-1", "1").await.completed().await, "1");
    let live = host.live().await;
    assert_eq!((live.running, live.ready), (2, 4), "{live:?}");
    join_all(turns.iter().map(Turn::cancel)).await;
    host.stop().await;
}
