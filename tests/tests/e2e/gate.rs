//! S1, S2: what the gate refuses never starts, and what it grants nothing leaves no trace in anybody's state or history.

use reqwest::StatusCode;
use serde_json::{Value, json};
use turnhouse_tests::{Client, TestHost, Turn, on_postgres};
use uuid::Uuid;

async fn quick() -> TestHost {
    TestHost::start_with(|config| {
        config.limits.gate_refusals_max = 3;
        config.limits.backoff_ms = 20;
        config.limits.backoff_ms_max = 40;
    })
    .await
}

async fn ingest(client: &Client, envelope: Value) -> (StatusCode, Value) {
    client.send(reqwest::Method::POST, "/v1/ingest", envelope).await
}

/// An envelope with some of its three facts.
fn envelope(run: Option<Uuid>, org: Option<&str>, conversation: Option<&str>) -> Value {
    let mut envelope = json!({ "agent": "snapshot_counter", "message": { "text": "count" } });
    if let Some(run) = run {
        envelope["run_id"] = json!(run.to_string());
    }
    if let Some(org) = org {
        envelope["org"] = json!(org);
    }
    if let Some(conversation) = conversation {
        envelope["conversation"] = json!(conversation);
    }
    envelope
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_no_instance_is_made_for_a_refused_envelope() {
    let host = quick().await;
    let ann = host.member("acme", "ann", "admin,ingest").await;
    ann.deploy("snapshot_counter").await;
    let run = || Some(Uuid::now_v7());
    for (envelope, reason) in [
        (envelope(run(), None, Some("c-1")), "missing_org"),
        (envelope(run(), None, None), "missing_org"),
        (envelope(run(), Some("acme"), None), "missing_conversation"),
    ] {
        let (status, answer) = ingest(&ann, envelope).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        let turn = ann.turn(answer["turn_id"].as_str().expect("its id"));
        let ended = turn.ended().await;
        assert_eq!(
            (&ended["failure"]["code"], &ended["failure"]["reason"]),
            (&json!("gate_refused"), &json!(reason)),
            "{ended}"
        );
        // It never started: no attempt, no start, no worker, and no event between its acceptance and its end.
        assert_eq!(
            (&ended["attempt"], &ended["started_at"], &ended["worker"]),
            (&json!(0), &Value::Null, &Value::Null),
            "{ended}"
        );
        let kinds: Vec<String> = turn.events(None).await.all().await.into_iter().map(|event| event.kind).collect();
        assert_eq!(kinds, ["turn.accepted", "turn.failed"]);
    }
    assert_eq!(host.tables().count("SELECT count(*) FROM snapshots"), 0);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s1_two_hosts_that_are_handed_the_same_envelope_without_an_org_both_refuse() {
    let (one, other) = tokio::join!(quick(), quick());
    let same = envelope(Some(Uuid::now_v7()), None, Some("c-1"));
    for host in [one, other] {
        let ann = host.member("acme", "ann", "admin,ingest").await;
        ann.deploy("snapshot_counter").await;
        let (status, answer) = ingest(&ann, same.clone()).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        let ended = ann.turn(answer["turn_id"].as_str().expect("its id")).ended().await;
        assert_eq!(ended["failure"]["reason"], "missing_org", "{ended}");
        assert_eq!(ended["started_at"], Value::Null, "{ended}");
        assert_eq!(host.tables().count("SELECT count(*) FROM snapshots"), 0);
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s2_only_all_three_facts_write_a_snapshot() {
    let host = quick().await;
    let ann = host.member("acme", "ann", "admin,ingest").await;
    ann.deploy("snapshot_counter").await;
    let say = async |envelope: Value| {
        let (status, answer) = ingest(&ann, envelope).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        ann.turn(answer["turn_id"].as_str().expect("its id")).completed().await
    };
    let snapshots = || host.tables().count("SELECT count(*) FROM snapshots");
    let shared = || envelope(Some(Uuid::now_v7()), Some("acme"), Some("c-1"));
    assert_eq!(say(shared()).await, "1");
    assert_eq!(say(shared()).await, "2");
    assert_eq!(snapshots(), 2);
    // Private turns start from nothing and leave nothing, whatever they name.
    for private in [
        envelope(None, Some("acme"), Some("c-1")),
        envelope(None, Some("acme"), None),
        envelope(None, None, Some("c-1")),
        envelope(None, None, None),
    ] {
        assert_eq!(say(private).await, "1");
    }
    let mut file = shared();
    file["mode"] = json!("file");
    if on_postgres() {
        let (status, problem) = ingest(&ann, file).await;
        assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_setting")), "{problem}");
    } else {
        assert_eq!(say(file).await, "1");
    }
    assert_eq!(snapshots(), 2);
    assert_eq!(say(shared()).await, "3");
    let history = ann.messages("snapshot_counter", "c-1").await;
    let replies: Vec<&Value> = history.iter().map(|message| &message["reply"]["text"]).collect();
    assert_eq!(replies, ["1", "2", "3"], "private turns are in no history");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_envelope_does_not_hold_up_its_conversation() {
    let host = TestHost::start_with(|config| {
        config.limits.gate_refusals_max = 5;
        config.limits.backoff_ms = 200;
    })
    .await;
    let ann = host.member("acme", "ann", "admin,ingest").await;
    ann.deploy("snapshot_counter").await;
    let (_, answer) = ingest(&ann, envelope(Some(Uuid::now_v7()), None, Some("c-1"))).await;
    let refused = ann.turn(answer["turn_id"].as_str().expect("its id"));
    assert_eq!(ann.say("snapshot_counter", "c-1", "hi").await.completed().await, "1");
    assert_eq!(refused.get().await["state"], "queued", "it still backs off");
    assert_eq!(refused.failed().await, "gate_refused");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envelope_of_another_org_is_refused_at_the_door() {
    let host = quick().await;
    let ann = host.member("acme", "ann", "admin,ingest").await;
    let bob = host.member("acme", "bob", "turns").await;
    ann.deploy("snapshot_counter").await;
    let (status, problem) = ingest(&ann, envelope(Some(Uuid::now_v7()), Some("other"), Some("c-1"))).await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("org_mismatch")));
    let (status, problem) = ingest(&bob, envelope(None, None, None)).await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("scope_missing")));
    assert_eq!(host.tables().count("SELECT count(*) FROM turns"), 0);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t8_a_refused_envelope_that_backs_off_can_be_cancelled() {
    let host = TestHost::start_with(|config| config.limits.backoff_ms = 5_000).await;
    let ann = host.member("acme", "ann", "admin,ingest").await;
    ann.deploy("snapshot_counter").await;
    let (_, answer) = ingest(&ann, envelope(Some(Uuid::now_v7()), None, Some("c-1"))).await;
    let turn = ann.turn(answer["turn_id"].as_str().expect("its id"));
    let stream = turn.events(None).await;
    let (status, answer) = turn.cancel().await;
    assert_eq!((status, &answer["state"]), (StatusCode::OK, &json!("cancelled")), "{answer}");
    assert_eq!(stream.all().await.pop().expect("an end").kind, "turn.cancelled");
    host.stop().await;
}

/// O1: a private turn that names a conversation is its sender's, and goes with theirs alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_a_conversation_goes_without_what_others_said_in_private() {
    let host = quick().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    let (adapter, bob) =
        (host.member("acme", "adapter", "ingest,turns").await, host.member("acme", "bob", "turns,ingest").await);
    let in_private = async |client: &Client| {
        let (status, answer) = ingest(client, envelope(None, None, Some("c-9"))).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        let turn = client.turn(answer["turn_id"].as_str().expect("its id"));
        turn.ended().await;
        turn
    };
    let another = in_private(&adapter).await;
    bob.say("snapshot_counter", "c-9", "mine").await.completed().await;
    let own = in_private(&bob).await;
    let path = "/v1/agents/snapshot_counter/conversations/c-9";
    assert_eq!(bob.call(reqwest::Method::DELETE, path).await.0, StatusCode::NO_CONTENT);
    let of = async |client: &Client, turn: &Turn| client.get(&format!("/v1/turns/{}", turn.id)).await.0;
    assert_eq!(of(&bob, &own).await, StatusCode::NOT_FOUND);
    assert_eq!(of(&adapter, &another).await, StatusCode::OK, "it never was in bob's conversation");
    host.stop().await;
}
