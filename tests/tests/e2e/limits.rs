//! O3, O5: what an org may use is bounded, each refusal says by what and until when, and no other org notices.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse::audit::Actor;
use turnhouse::ids::OrgId;
use turnhouse::quota::LimitsChange;
use turnhouse_tests::{Client, TestHost, eventually};

async fn limit(host: &TestHost, org: &str, change: LimitsChange) {
    let (org, now) = (OrgId::parse(org).expect("an org id"), host.host.clock.now());
    let set = host.host.store.set_org_limits(&org, &change, now, &Actor::command_line()).await;
    assert!(set.expect("the store answers").is_some());
}

/// A refusal: its `Retry-After` and its problem.
async fn refused(client: &Client, path: &str, body: Value) -> (u64, Value) {
    let response = client.request(Method::POST, path).json(&body).send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    let after = response.headers()["retry-after"].to_str().expect("a text").parse().expect("seconds");
    (after, response.json().await.expect("a problem"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_messages_over_an_orgs_rate_are_told_when_to_come_back() {
    let host = TestHost::start().await;
    let (ann, zoe) = (host.member("acme", "ann", "admin,ingest").await, host.member("zeta", "zoe", "admin").await);
    for client in [&ann, &zoe] {
        client.deploy("echo").await;
    }
    let rate =
        LimitsChange { submits_per_second: Some(Some(0.01)), submit_burst: Some(Some(2)), ..LimitsChange::default() };
    limit(&host, "acme", rate).await;
    let message = json!({ "message": { "text": "hi" } });
    let (status, _, first) = ann.submit_keyed("echo", "c-1", "k-1", message.clone()).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    assert_eq!(ann.say("echo", "c-1", "hi").await.completed().await, "hi");
    let envelope = json!({ "agent": "echo", "message": { "text": "hi" }, "conversation": "c-2", "org": "acme" });
    let conversation = json!({ "agent": "echo", "conversation": "c-3" });
    for (path, body) in [
        (Client::turns("echo", "c-3"), message.clone()),
        ("/v1/ingest".to_owned(), envelope),
        ("/v1/conversations".to_owned(), conversation),
    ] {
        let (after, problem) = refused(&ann, &path, body).await;
        assert_eq!((&problem["code"], &problem["limit"]), (&json!("rate_limited"), &json!("submits_per_second")));
        assert_eq!(problem["limit_value"], 0.01);
        assert!((90..=100).contains(&after), "a token in a hundred seconds: {after}");
        let detail = problem["detail"].as_str().expect("a text");
        assert!(detail.contains("turnhouse orgs limits ORG --submits-per-second"), "{detail}");
    }
    assert_eq!(ann.get("/v1/agents/echo/conversations/c-3").await.0, StatusCode::NOT_FOUND, "nothing is stored");
    // What was accepted is there under its key, and no other org notices.
    let (status, replayed, again) = ann.submit_keyed("echo", "c-1", "k-1", message).await;
    assert_eq!((status, replayed, &again["turn_id"]), (StatusCode::ACCEPTED, true, &first["turn_id"]));
    for n in 0..5 {
        assert_eq!(zoe.say("echo", &format!("c-{n}"), "hi").await.completed().await, "hi");
    }
    let (status, limits) = ann.get("/v1/limits").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!((&limits["limits"]["submit_burst"], &limits["used"]["submits_left"]), (&json!(2), &json!(0.0)));
    let theirs = zoe.get("/v1/limits").await.1;
    assert_eq!(
        (&theirs["limits"]["submits_per_second"], &theirs["used"]["submits_left"]),
        (&json!(null), &json!(null))
    );
    assert_eq!(ann.send(Method::PUT, "/v1/limits", json!({ "queue_max": 9 })).await.0, StatusCode::METHOD_NOT_ALLOWED);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_o5_an_orgs_own_bounds_on_turns_hold_and_another_goes_on() {
    let host = TestHost::start().await;
    let (ann, zoe) = (host.member("acme", "ann", "admin").await, host.member("zeta", "zoe", "admin").await);
    for client in [&ann, &zoe] {
        client.deploy("slow_reply").await;
    }
    let bounds = LimitsChange { running_max: Some(Some(1)), queue_max: Some(Some(3)), ..LimitsChange::default() };
    limit(&host, "acme", bounds).await;
    let mut turns = Vec::new();
    for n in 0..3 {
        turns.push(ann.say("slow_reply", &format!("c-{n}"), "30000").await);
    }
    turns[0].reaches("running").await;
    let (_, problem) = refused(&ann, &Client::turns("slow_reply", "c-9"), json!({ "message": { "text": "1" } })).await;
    assert_eq!((&problem["code"], &problem["limit"]), (&json!("org_queue_full"), &json!("queue_max")));
    assert_eq!(problem["limit_value"], 3.0);
    assert_eq!(zoe.say("slow_reply", "c-1", "1").await.completed().await, "1");
    let limits = ann.get("/v1/limits").await.1;
    assert_eq!((&limits["used"]["running"], &limits["used"]["queued"]), (&json!(1), &json!(2)));
    // More of them, for the host that is running and without a word to it.
    limit(&host, "acme", LimitsChange { running_max: Some(Some(3)), ..LimitsChange::default() }).await;
    eventually("all three run", async || host.live().await.running == 3).await;
    for turn in &turns {
        turn.cancel().await;
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_an_org_that_has_used_its_hour_of_processor_time_waits_for_the_next() {
    let host = TestHost::start_with(|config| config.limits.org_cpu_ms_per_hour = 20).await;
    let (ann, zoe) = (host.member("acme", "ann", "admin").await, host.member("zeta", "zoe", "admin").await);
    ann.deploy_as("spin", "spin", json!({ "limits": { "cpu_timeout_ms": 50 } })).await;
    zoe.deploy("echo").await;
    assert_eq!(ann.say("spin", "c-1", "spin").await.failed().await, "cpu_timeout");
    let (after, problem) = refused(&ann, &Client::turns("spin", "c-1"), json!({ "message": { "text": "spin" } })).await;
    assert_eq!((&problem["code"], &problem["limit"]), (&json!("quota_exhausted"), &json!("cpu_ms_per_hour")));
    assert!((1..=3_600).contains(&after), "{after}");
    let limits = ann.get("/v1/limits").await.1;
    assert_eq!(limits["limits"]["cpu_ms_per_hour"], 20);
    assert!(limits["used"]["cpu_ms"].as_f64().expect("a number") >= 20.0, "{limits}");
    assert!(limits["used"]["cpu_resets_at"].is_string());
    assert_eq!(zoe.say("echo", "c-1", "hi").await.completed().await, "hi");
    limit(&host, "acme", LimitsChange { cpu_ms_per_hour: Some(Some(0)), ..LimitsChange::default() }).await;
    assert_eq!(ann.say("spin", "c-1", "spin").await.failed().await, "cpu_timeout", "it has none of its own");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_o5_an_agents_own_bounds_hold_and_its_orgs_other_agents_go_on() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    let bounds = |running_max: u32| json!({ "limits": { "running_max": running_max, "queue_max": 3 } });
    ann.deploy_as("slow_reply", "bounded", bounds(1)).await;
    ann.deploy("slow_reply").await;
    let mut turns = Vec::new();
    for n in 0..3 {
        turns.push(ann.say("bounded", &format!("c-{n}"), "30000").await);
    }
    turns[0].reaches("running").await;
    let message = json!({ "message": { "text": "1" } });
    let (_, problem) = refused(&ann, &Client::turns("bounded", "c-9"), message).await;
    assert_eq!((&problem["code"], &problem["limit"]), (&json!("agent_queue_full"), &json!("queue_max")));
    assert_eq!((&problem["limit_of"], &problem["limit_value"]), (&json!("agent"), &json!(3.0)));
    assert!(problem["detail"].as_str().expect("a text").contains("limits.queue_max"), "{problem}");
    assert_eq!(ann.say("slow_reply", "c-1", "1").await.completed().await, "1");
    let (status, limits) = ann.get("/v1/agents/bounded/limits").await;
    assert_eq!((status, &limits["limits"]["running_max"]), (StatusCode::OK, &json!(1)));
    assert_eq!((&limits["used"]["running"], &limits["used"]["queued"]), (&json!(1), &json!(2)));
    assert_eq!((&limits["limits"]["cpu_ms_per_hour"], &limits["used"]["cpu_ms"]), (&Value::Null, &Value::Null));
    let free = ann.get("/v1/agents/slow_reply/limits").await.1;
    assert_eq!((&free["limits"]["queue_max"], &free["used"]["running"]), (&Value::Null, &Value::Null));
    // What ends lets the next go, and so does a bound that is raised, at once.
    turns[0].cancel().await;
    turns[1].reaches("running").await;
    ann.deploy_as("slow_reply", "bounded", bounds(2)).await;
    turns[2].reaches("running").await;
    let invalid = json!({ "worker": "slow_reply", "limits": { "running_max": 0 } });
    let (status, problem) = ann.send(Method::PUT, "/v1/agents/bounded", invalid).await;
    assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_setting")));
    assert!(problem["detail"].as_str().expect("a text").contains("limits.running_max"), "{problem}");
    for turn in &turns[1..] {
        turn.cancel().await;
    }
    host.stop().await;
}

/// Whoever interrupts their own guests has used what these used, and is told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_an_interrupt_does_not_hide_processor_time() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("spin").await;
    let change = LimitsChange { cpu_ms_per_hour: Some(Some(60_000)), ..LimitsChange::default() };
    limit(&host, "acme", change).await;
    let spinning = ann.say("spin", "c-1", "spin").await;
    spinning.reaches("running").await;
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    let interrupt = json!({ "message": { "text": "spin" }, "on_busy": "interrupt" });
    let (status, answer) = ann.submit("spin", "c-1", interrupt).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
    assert_eq!(spinning.ended().await["cancelled_by"], "interrupt");
    eventually("what it used is counted", async || {
        ann.get("/v1/limits").await.1["used"]["cpu_ms"].as_f64().is_some_and(|used| used >= 20.0)
    })
    .await;
    let told = spinning.get().await["usage"]["cpu_ms"].as_f64().expect("it is told of the turn");
    assert!(told >= 20.0, "{told}");
    ann.turn(answer["turn_id"].as_str().expect("its id")).cancel().await;
    host.stop().await;
}
