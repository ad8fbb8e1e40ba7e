//! The audit over HTTP: who did what, for the org's admins, and nothing of what was said or is secret.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::client::answer;
use turnhouse_tests::{Client, TestHost};

async fn audit(client: &Client, query: &str) -> Vec<Value> {
    let (status, page) = client.get(&format!("/v1/audit{query}")).await;
    assert_eq!(status, StatusCode::OK, "{page}");
    page["items"].as_array().expect("items").clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_did_what_is_there_for_the_orgs_admin_alone() {
    let host = TestHost::start().await;
    let (ann, zoe) = (host.member("acme", "ann", "admin").await, host.member("zeta", "ann", "admin").await);
    let bob = host.member("acme", "bob", "turns,deploy").await;
    ann.deploy_as("snapshot_counter", "counter", json!({"environment": {"TOKEN": "hunter2"}})).await;
    let request = bob.request(Method::PUT, "/v1/agents/counter").header("x-request-id", "req-42");
    let settings = json!({"worker": "snapshot_counter", "version": 1, "history_messages": 3, "environment": {"TOKEN": "swordfish"}});
    let (status, body) = answer(request.json(&settings)).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    bob.say("counter", "c-1", "count, please").await.completed().await;
    let path = "/v1/agents/counter/conversations/c-1";
    assert_eq!(bob.call(Method::DELETE, &format!("{path}/snapshot")).await.0, StatusCode::NO_CONTENT);
    assert_eq!(ann.call(Method::DELETE, path).await.0, StatusCode::NO_CONTENT);

    let changed = audit(&ann, "?verb=agent.change&limit=1").await.remove(0);
    assert_eq!((&changed["actor"], &changed["request_id"]), (&json!("bob"), &json!("req-42")), "{changed}");
    assert_eq!(changed["resource"], "agent/counter");
    assert_eq!(changed["detail"], json!({"fields": ["environment", "history_messages"]}));
    assert!(changed["credential"].as_str().expect("a credential").starts_with("key:"));
    let reset = audit(&ann, "?resource=agent/counter/conversation/c-1").await;
    let verbs: Vec<&str> = reset.iter().map(|entry| entry["verb"].as_str().expect("a verb")).collect();
    assert_eq!(verbs, ["conversation.delete", "conversation.reset"], "newest first");
    let bobs = audit(&ann, "?actor=bob").await;
    assert!(bobs.iter().all(|entry| entry["actor"] == "bob") && bobs.len() == 2, "{bobs:?}");

    // Page by page it is the same.
    let (mut cursor, mut seen) = (None::<String>, Vec::new());
    loop {
        let after = cursor.map(|cursor| format!("&after={cursor}")).unwrap_or_default();
        let (_, page) = ann.get(&format!("/v1/audit?limit=2{after}")).await;
        seen.extend(page["items"].as_array().expect("items").clone());
        match page["next"].as_str() {
            Some(next) => cursor = Some(next.to_owned()),
            None => break,
        }
    }
    assert_eq!(seen, audit(&ann, "?limit=100").await);

    // Nothing that is secret, and nothing that was said.
    let text = serde_json::to_string(&seen).expect("JSON");
    for secret in ["hunter2", "swordfish", "count, please", &ann.key, &bob.key] {
        assert!(!text.contains(secret), "{secret} is in the audit");
    }
    // Nobody else's.
    assert!(!serde_json::to_string(&audit(&zoe, "").await).expect("JSON").contains("counter"));
    let (status, problem) = bob.get("/v1/audit").await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("scope_missing")));
    let backend = host.member("acme", "backend", "admin,act_as").await;
    let (status, problem) = backend.get("/v1/audit?user=bob").await;
    assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("unknown_field")));
    for method in [Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
        assert_eq!(ann.call(method, "/v1/audit").await.0, StatusCode::METHOD_NOT_ALLOWED);
    }
    host.stop().await;
}

/// What an admin does to what is another's is written down; what its owner does to their own is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admin_who_cancels_or_renames_anothers_is_written_down() {
    let host = TestHost::start().await;
    let (ann, bob) = (host.member("acme", "ann", "admin").await, host.member("acme", "bob", "turns").await);
    ann.deploy("slow_reply").await;
    let path = "/v1/agents/slow_reply/conversations/c-1";
    let own = bob.say("slow_reply", "c-1", "20000").await;
    assert_eq!(bob.send(Method::PATCH, path, json!({"title": "mine"})).await.0, StatusCode::OK);
    own.cancel().await;
    let turn = bob.say("slow_reply", "c-1", "20000").await;
    assert_eq!(ann.send(Method::PATCH, path, json!({"title": "read by ann"})).await.0, StatusCode::OK);
    assert_eq!(ann.turn(&turn.id).cancel().await.0, StatusCode::OK);
    let (_, page) = ann.get("/v1/audit?actor=ann").await;
    let acts: Vec<(&Value, &Value)> =
        page["items"].as_array().expect("a page").iter().map(|entry| (&entry["verb"], &entry["resource"])).collect();
    let (cancelled, renamed) = (json!(format!("turn/{}", turn.id)), json!("agent/slow_reply/conversation/c-1"));
    assert_eq!(acts[..2], [(&json!("turn.cancel"), &cancelled), (&json!("conversation.change"), &renamed)]);
    assert!(!page.to_string().contains("read by ann"), "what it says is not");
    assert_eq!(ann.get("/v1/audit?actor=bob").await.1["items"], json!([]));
    host.stop().await;
}
