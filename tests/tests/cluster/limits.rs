//! Room and fairness over all replicas together.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::json;
use turnhouse::audit::Actor;
use turnhouse::clock::Timestamp;
use turnhouse::ids::OrgId;
use turnhouse::quota::LimitsChange;
use turnhouse_tests::{Cluster, Setup, Turn, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r8_freed_room_is_taken_at_once_on_whichever_replica() {
    let setup = Setup { hints: true, change: |config| config.limits.host_running_max = 1, ..Setup::default() };
    let cluster = Cluster::start_with(2, setup).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    ann.say("slow_reply", "warm", "1").await.completed().await;
    let began = Instant::now();
    // All come in at one replica; the other has room, too.
    let turns = join_all((0..60).map(|n| {
        let ann = ann.clone();
        async move { ann.say("slow_reply", &format!("c-{n}"), "20").await }
    }))
    .await;
    join_all(turns.iter().map(Turn::completed)).await;
    // One slot alone takes 1.2 s; waiting for the sweeper's round each time, 15 s.
    println!("60 turns on two slots: {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_an_orgs_bounds_hold_over_all_replicas() {
    let setup = Setup {
        change: |config| {
            config.limits.org_running_max = 3;
            config.limits.org_queue_max = 8;
            config.limits.conversation_queue_max = 1;
        },
        ..Setup::default()
    };
    let cluster = Cluster::start_with(2, setup).await;
    let (ann, zoe) = (cluster.member("acme", "ann", "admin").await, cluster.member("zeta", "zoe", "admin").await);
    for client in [&ann, &zoe] {
        client.deploy("slow_reply").await;
    }
    let turns = join_all((0..8).map(|n| {
        let ann = cluster.at(n % 2, &ann);
        async move { ann.say("slow_reply", &format!("c-{n}"), "30000").await }
    }))
    .await;
    eventually("three run", async || cluster.live().await.running == 3).await;
    for replica in 0..2 {
        let at = cluster.at(replica, &ann);
        let request = at.request(reqwest::Method::POST, &turnhouse_tests::Client::turns("slow_reply", "c-9"));
        let response = request.json(&json!({ "message": { "text": "1" } })).send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert!(response.headers().contains_key("retry-after"));
        let problem: serde_json::Value = response.json().await.expect("JSON");
        assert_eq!(problem["code"], "org_queue_full", "{problem}");
    }
    // Another org has its own room, at either.
    for replica in 0..2 {
        assert_eq!(cluster.at(replica, &zoe).say("slow_reply", "c-1", "1").await.completed().await, "1");
    }
    assert_eq!(cluster.live().await.running, 3);
    join_all(turns.iter().map(Turn::cancel)).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_an_orgs_rate_holds_over_all_replicas() {
    let cluster = Cluster::start(2).await;
    let (ann, zoe) = (cluster.member("acme", "ann", "admin").await, cluster.member("zeta", "zoe", "admin").await);
    for client in [&ann, &zoe] {
        client.deploy("echo").await;
    }
    let org = OrgId::parse("acme").expect("an org id");
    let rate =
        LimitsChange { submits_per_second: Some(Some(0.001)), submit_burst: Some(Some(7)), ..LimitsChange::default() };
    // The store's time is the cluster's.
    let now = cluster.store().time().await.expect("it answers").unwrap_or(Timestamp(0));
    cluster.store().set_org_limits(&org, &rate, now, &Actor::command_line()).await.expect("it is set");
    let answers = join_all((0..20).map(|n| {
        let at = cluster.at(n % 2, &ann);
        async move { at.submit("echo", &format!("c-{n}"), json!({ "message": { "text": "hi" } })).await.0 }
    }))
    .await;
    let of = |status: StatusCode| answers.iter().filter(|answer| **answer == status).count();
    assert_eq!((of(StatusCode::ACCEPTED), of(StatusCode::TOO_MANY_REQUESTS)), (7, 13), "one bucket for both");
    for replica in 0..2 {
        assert_eq!(cluster.at(replica, &ann).get("/v1/limits").await.1["used"]["submits_left"], 0.0);
        assert_eq!(cluster.at(replica, &zoe).say("echo", "c-1", "hi").await.completed().await, "hi");
    }
    cluster.stop().await;
}
