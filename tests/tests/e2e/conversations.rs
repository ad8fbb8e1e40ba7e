//! What people rely on a conversation for: its name, its history from both ends, what a dry run leaves.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::{Client, TestHost};

const PATH: &str = "/v1/agents/snapshot_counter/conversations/c-1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_is_named_by_its_owner_or_an_admin() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    let (bob, eve) = (host.member("acme", "bob", "turns").await, host.member("acme", "eve", "turns").await);
    let zoe = host.member("zeta", "bob", "admin").await;
    for client in [&ann, &zoe] {
        client.deploy("snapshot_counter").await;
    }
    bob.say("snapshot_counter", "c-1", "count").await.completed().await;
    let (status, named) =
        bob.send(Method::PATCH, PATH, json!({"title": "Counting", "metadata": {"ticket": "4711"}})).await;
    assert_eq!(status, StatusCode::OK, "{named}");
    assert_eq!((&named["title"], &named["metadata"]), (&json!("Counting"), &json!({"ticket": "4711"})));
    let (status, named) = ann.send(Method::PATCH, PATH, json!({"title": null})).await;
    assert_eq!((status, &named["title"]), (StatusCode::OK, &Value::Null));
    assert_eq!(named["metadata"], json!({"ticket": "4711"}), "what is absent stays");
    assert_eq!(bob.get("/v1/agents/snapshot_counter/conversations").await.1["items"][0]["metadata"]["ticket"], "4711");
    for stranger in [&eve, &zoe] {
        let (status, problem) = stranger.send(Method::PATCH, PATH, json!({"title": "mine"})).await;
        assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    }
    for (body, code) in [
        (json!({"title": ""}), "invalid_setting"),
        (json!({"title": "a".repeat(201)}), "invalid_setting"),
        (json!({"title": "two\nlines"}), "invalid_setting"),
        (json!({"title": 7}), "invalid_setting"),
        (json!({"metadata": {"a": 1}}), "invalid_setting"),
        (json!({"metadata": ["a"]}), "invalid_setting"),
        (json!({"metadata": {"a": "b".repeat(513)}}), "invalid_setting"),
        (json!({"owner": "eve"}), "unknown_field"),
    ] {
        let (status, problem) = bob.send(Method::PATCH, PATH, body.clone()).await;
        assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!(code)), "{body}: {problem}");
    }
    let (_, now) = bob.get(PATH).await;
    assert_eq!((&now["title"], &now["metadata"]["ticket"]), (&Value::Null, &json!("4711")), "nothing was changed");
    host.stop().await;
}

/// All of a list behind a cursor, page by page: what each item's field says.
async fn walk(client: &Client, path: &str, mut after: Option<String>, field: &str) -> Vec<Value> {
    let mut seen = Vec::new();
    loop {
        let cursor = after.map(|after| format!("&after={after}")).unwrap_or_default();
        let (status, page) = client.get(&format!("{path}{cursor}")).await;
        assert_eq!(status, StatusCode::OK, "{page}");
        let items = page["items"].as_array().expect("items");
        assert!(items.len() <= 3);
        seen.extend(items.iter().map(|item| item[field].clone()));
        match page["next"].as_str() {
            Some(next) => after = Some(next.to_owned()),
            None => return seen,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_history_reads_the_same_from_both_ends_while_it_grows() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    for _ in 0..7 {
        ann.say("snapshot_counter", "c-1", "count").await.completed().await;
    }
    for (list, field) in [("messages", "turn_id"), ("turns", "id")] {
        let forward = walk(&ann, &format!("{PATH}/{list}?limit=3&direction=forward"), None, field).await;
        let mut backward = walk(&ann, &format!("{PATH}/{list}?limit=3&direction=backward"), None, field).await;
        backward.reverse();
        assert_eq!((forward.len(), &forward), (7, &backward), "{list}");
        assert_eq!(walk(&ann, &format!("{PATH}/{list}?limit=1"), None, field).await, forward, "{list}");
    }
    // What comes meanwhile is behind a forward cursor, and is not in what a backward one still leads to.
    let (_, newest) = ann.get(&format!("{PATH}/messages?limit=3&direction=backward")).await;
    let (_, oldest) = ann.get(&format!("{PATH}/messages?limit=6&direction=forward")).await;
    ann.say("snapshot_counter", "c-1", "count").await.completed().await;
    let older = walk_from(&ann, &newest).await;
    let newer = walk_from(&ann, &oldest).await;
    assert_eq!((older, newer), (vec![4, 3, 2, 1], vec![7, 8]));
    // A cursor knows its way and its list.
    let next = newest["next"].as_str().expect("there are more");
    for wrong in [format!("{PATH}/messages?direction=forward&after={next}"), format!("{PATH}/turns?after={next}")] {
        let (status, problem) = ann.get(&wrong).await;
        assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_cursor")), "{wrong}");
    }
    host.stop().await;
}

/// The places of what follows a page.
async fn walk_from(client: &Client, page: &Value) -> Vec<i64> {
    let next = page["next"].as_str().expect("there are more").to_owned();
    let places = walk(client, &format!("{PATH}/messages?limit=3"), Some(next), "seq").await;
    places.iter().map(|place| place.as_i64().expect("a place")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_keeps_history_and_state() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    for count in ["1", "2"] {
        let body = json!({"message": {"text": "count"}, "dry_run": true});
        let (status, accepted) = ann.submit("snapshot_counter", "c-1", body).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{accepted}");
        let turn = ann.turn(accepted["turn_id"].as_str().expect("its id"));
        assert_eq!(turn.completed().await, count, "its state is kept, and gone on from");
    }
    assert_eq!(ann.say("snapshot_counter", "c-1", "count").await.completed().await, "3");
    assert_eq!(ann.messages("snapshot_counter", "c-1").await.len(), 3);
    host.stop().await;
}
