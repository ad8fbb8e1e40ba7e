//! Exports: all of an org, or of a conversation, and nothing of anybody else's.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::{Client, TestHost};

const CONVERSATION: &str = "/v1/agents/snapshot_counter/conversations/c-1";

/// The lines of an export, which must be whole.
async fn export(client: &Client, path: &str) -> Vec<Value> {
    let response = client.request(Method::GET, path).send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let text = response.text().await.expect("a body");
    let mut lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    let end = lines.pop().expect("a last line");
    assert_eq!(end, json!({"kind": "end", "lines": lines.len()}));
    assert_eq!((&lines[0]["kind"], &lines[0]["format"]), (&json!("export"), &json!(1)));
    lines
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == kind).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_is_whole_and_of_ones_own() {
    let host = TestHost::start().await;
    let (ann, zoe) = (host.member("acme", "ann", "admin").await, host.member("zeta", "ann", "admin").await);
    let (bob, eve) = (host.member("acme", "bob", "turns").await, host.member("acme", "eve", "turns").await);
    ann.deploy_as("snapshot_counter", "snapshot_counter", json!({"environment": {"TOKEN": "hunter2"}})).await;
    ann.deploy("echo").await;
    zoe.deploy("snapshot_counter").await;
    zoe.say("snapshot_counter", "c-1", "zoe's own").await.completed().await;
    // More than a page of turns, in two conversations.
    for n in 0..23 {
        bob.say("snapshot_counter", "c-1", &format!("message {n}")).await.completed().await;
    }
    eve.say("snapshot_counter", "c-2", "eve's own").await.completed().await;
    bob.send(Method::PATCH, CONVERSATION, json!({"title": "Counting", "metadata": {"ticket": "4711"}})).await;
    // A private turn is in no history, and in the export.
    let adapter = host.member("acme", "adapter", "ingest").await;
    let envelope = json!({"agent": "echo", "message": {"text": "in private"}});
    let (status, accepted) = adapter.send(Method::POST, "/v1/ingest", envelope).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{accepted}");
    ann.turn(accepted["turn_id"].as_str().expect("its id")).completed().await;

    let lines = export(&ann, "/v1/export").await;
    assert_eq!((of_kind(&lines, "agent").len(), of_kind(&lines, "worker").len()), (2, 2));
    assert_eq!(of_kind(&lines, "org")[0]["id"], "acme");
    let conversations = of_kind(&lines, "conversation");
    assert_eq!((conversations.len(), &conversations[0]["title"]), (2, &json!("Counting")));
    assert_eq!(of_kind(&lines, "turn").len(), 25);
    assert!(of_kind(&lines, "turn").iter().any(|turn| turn["message"]["text"] == "in private"
        && turn["private"] == true
        && turn["user_id"] == "adapter"));
    let snapshots = of_kind(&lines, "snapshot");
    assert_eq!(snapshots.len(), 24, "one of each counted turn");
    assert!(snapshots.iter().all(|snapshot| snapshot.get("body").is_none()));
    assert!(
        of_kind(&lines, "audit").iter().any(|entry| entry["verb"] == "org.export"),
        "it was written down before it began"
    );
    let text = serde_json::to_string(&lines).expect("JSON");
    for nowhere in ["hunter2", "zoe's own", &ann.key, "zeta"] {
        assert!(!text.contains(nowhere), "{nowhere} is in the export");
    }
    assert!(text.contains("TOKEN"), "that there is a variable is told");

    // One conversation, in its order, by whom it belongs to and by an admin.
    for client in [&bob, &ann] {
        let lines = export(client, &format!("{CONVERSATION}/export")).await;
        let said: Vec<&str> =
            of_kind(&lines, "turn").iter().map(|turn| turn["message"]["text"].as_str().expect("a text")).collect();
        assert_eq!(said, (0..23).map(|n| format!("message {n}")).collect::<Vec<_>>());
        assert_eq!(of_kind(&lines, "turn")[22]["reply"]["text"], "23");
        assert_eq!(of_kind(&lines, "snapshot").len(), 23);
        assert_eq!(lines.len(), 1 + 1 + 23 + 23, "and nothing else");
    }
    for stranger in [&eve, &host.member("zeta", "bob", "turns").await] {
        let (status, problem) = stranger.get(&format!("{CONVERSATION}/export")).await;
        assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    }
    let (status, problem) = bob.get("/v1/export").await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("scope_missing")));
    let backend = host.member("acme", "backend", "admin,act_as").await;
    let (status, problem) = backend.get("/v1/export?user=bob").await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("scope_missing")), "bob may not");
    host.stop().await;
}
