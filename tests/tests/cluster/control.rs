//! Cancel, interrupt, deletion and settings that come to one replica and are about what another does.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::json;
use turnhouse::audit::Actor;
use turnhouse_tests::{Cluster, Setup, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t8_a_cancel_at_another_replica_is_told_and_stops_the_guest() {
    for hints in [false, true] {
        let cluster = Cluster::start_with(2, Setup { hints, ..Setup::default() }).await;
        let ann = cluster.member("acme", "ann", "admin").await;
        ann.deploy("spin").await;
        let turn = ann.say("spin", "c-1", "go").await;
        let at = cluster.started(&turn).await;
        let mut here = cluster.turn_at(at, &turn).events(None).await;
        here.until("turn.started").await;
        let began = Instant::now();
        let (status, body) = cluster.turn_at(1 - at, &turn).cancel().await;
        assert_eq!((status, &body["state"]), (StatusCode::OK, &json!("cancelled")));
        // A reader where it ran hears of it though its host did not end it.
        let end = here.next().await.expect("its end");
        assert_eq!((end.kind.as_str(), &end.data["by"]), ("turn.cancelled", &json!("user")));
        eventually("the guest is gone", async || cluster.replicas[at].host.dispatch.slots.in_use() == 0).await;
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert_eq!(turn.cancel().await.0, StatusCode::OK, "again, anywhere");
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t8_an_interrupt_at_another_replica_takes_the_conversation_over() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let long = ann.say("slow_reply", "c-1", "30000").await;
    let other = 1 - cluster.started(&long).await;
    let body = json!({ "message": { "text": "1" }, "on_busy": "interrupt" });
    let (status, body) = cluster.at(other, &ann).submit("slow_reply", "c-1", body).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    let next = ann.turn(body["turn_id"].as_str().expect("its id"));
    assert_eq!(next.completed().await, "1");
    let ended = long.ended().await;
    assert_eq!((&ended["state"], &ended["cancelled_by"]), (&json!("cancelled"), &json!("interrupt")), "{ended}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s8_a_conversation_deleted_at_another_replica_ends_its_turns() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let (running, waiting) = (ann.say("sleep_day", "c-1", "go").await, ann.say("sleep_day", "c-1", "go").await);
    let at = cluster.started(&running).await;
    let (running, waiting) = (cluster.turn_at(at, &running), cluster.turn_at(at, &waiting));
    let streams = [running.events(None).await, waiting.events(None).await];
    let path = "/v1/agents/sleep_day/conversations/c-1";
    assert!(cluster.at(1 - at, &ann).call(Method::DELETE, path).await.0.is_success());
    for stream in streams {
        let end = stream.all().await.pop().expect("an end");
        assert_eq!((end.kind.as_str(), &end.data["by"]), ("turn.cancelled", &json!("deleted")));
    }
    eventually("the guest is gone", async || cluster.replicas[at].host.dispatch.slots.in_use() == 0).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_an_agent_or_a_key_changed_at_one_replica_is_changed_at_all() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("env_probe").await;
    ann.deploy("echo").await;
    let there = cluster.at(1, &ann);
    assert_eq!(there.say("echo", "c-1", "one").await.completed().await, "one");
    // The name of a worker that was deleted comes to mean other bytes.
    assert!(ann.call(Method::DELETE, "/v1/agents/echo/conversations/c-1").await.0.is_success());
    assert!(ann.call(Method::DELETE, "/v1/agents/echo").await.0.is_success());
    assert!(ann.call(Method::DELETE, "/v1/workers/echo").await.0.is_success());
    assert!(ann.upload("echo", turnhouse_workers::bytes("slow_reply")).await.0.is_success());
    ann.set_agent("echo", "echo", json!({})).await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let began = Instant::now();
    assert_eq!(there.say("echo", "c-2", "300").await.completed().await, "300");
    assert!(began.elapsed() >= Duration::from_millis(300), "it runs the new bytes");
    let bob = cluster.member("acme", "bob", "turns").await;
    let there = cluster.at(1, &bob);
    assert_eq!(there.get("/v1/agents").await.0, StatusCode::OK);
    let org = "acme".parse().expect("an org");
    let keys = cluster.store().keys(&org).await.expect("keys");
    let key = keys.iter().find(|key| key.user.as_str() == "bob").expect("bob's");
    assert!(
        cluster
            .store()
            .revoke_key(&org, &key.id, cluster.replicas[0].host.clock.now(), &Actor::command_line())
            .await
            .expect("revoked")
    );
    let began = Instant::now();
    eventually("it is refused", async || there.get("/v1/agents").await.0 == StatusCode::UNAUTHORIZED).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_a_ticket_is_good_at_every_replica_and_ends_with_its_key_at_all() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let bob = cluster.member("acme", "bob", "turns").await;
    let turn = bob.say("sleep_day", "c-1", "go").await;
    cluster.started(&turn).await;
    let (_, here) = turn.ticket().await;
    let (_, there) = cluster.turn_at(1, &turn).ticket().await;
    let replicas = [bob.clone(), cluster.at(1, &bob)];
    for url in [&here, &there] {
        for replica in &replicas {
            replica.follow(url, None).await.until("turn.started").await;
        }
    }
    let org = "acme".parse().expect("an org");
    let keys = cluster.store().keys(&org).await.expect("keys");
    let key = keys.iter().find(|key| key.user.as_str() == "bob").expect("bob's");
    let now = cluster.replicas[0].host.clock.now();
    let revoked = cluster.store().revoke_key(&org, &key.id, now, &Actor::command_line()).await;
    assert!(revoked.expect("it is revoked"));
    assert!(turnhouse::keys::TRUSTED_FOR < Duration::from_secs(2), "nobody believes it for longer");
    tokio::time::sleep(turnhouse::keys::TRUSTED_FOR).await;
    for url in [&here, &there] {
        for replica in &replicas {
            let response = replica.anonymous(Method::GET, url).send().await.expect("an answer");
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        }
    }
    ann.turn(&turn.id).cancel().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_mode_is_refused_where_the_store_is_shared() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin,ingest").await;
    ann.deploy("echo").await;
    let settings = json!({ "worker": "echo", "session_mode": "file" });
    let (status, problem) = ann.send(Method::PUT, "/v1/agents/files", settings).await;
    assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_setting")), "{problem}");
    assert!(problem["detail"].as_str().expect("a text").contains("needs the embedded store"), "{problem}");
    let envelope = json!({ "agent": "echo", "mode": "file", "message": { "text": "hi" } });
    let (status, problem) = ann.send(Method::POST, "/v1/ingest", envelope).await;
    assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_setting")), "{problem}");
    assert!(!cluster.replicas[0].host.config.data_dir.join("files").exists(), "there is no place for them");
    cluster.stop().await;
}
