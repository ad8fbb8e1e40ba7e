//! O1, O6: two orgs' same names are two things, keys do what their scopes say, and what is secret is nowhere. What another may not see is `isolation`'s.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::{Client, TestHost, on_postgres};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_the_same_names_in_two_orgs_are_two_things() {
    let host = TestHost::start().await;
    let (ann, zoe) = (host.member("acme", "ann", "admin").await, host.member("zeta", "ann", "admin").await);
    for client in [&ann, &zoe] {
        client.deploy("snapshot_counter").await;
    }
    let submit = async |client: &Client| {
        let (status, replayed, body) =
            client.submit_keyed("snapshot_counter", "c-1", "k-1", json!({ "message": { "text": "count" } })).await;
        assert_eq!((status, replayed), (StatusCode::ACCEPTED, false), "{body}");
        client.turn(body["turn_id"].as_str().expect("its id"))
    };
    let first = submit(&ann).await;
    assert_eq!(first.completed().await, "1");
    assert_eq!(ann.say("snapshot_counter", "c-1", "more").await.completed().await, "2");
    // Not seen, not replayed, not counted on.
    assert_eq!(zoe.get("/v1/agents/snapshot_counter/conversations").await.1["items"], json!([]));
    assert_eq!(submit(&zoe).await.completed().await, "1");
    assert_eq!(zoe.messages("snapshot_counter", "c-1").await.len(), 1);
    assert_eq!(ann.messages("snapshot_counter", "c-1").await.len(), 2);
    // Deleting one leaves the other.
    let path = "/v1/agents/snapshot_counter/conversations/c-1";
    assert_eq!(zoe.call(Method::DELETE, path).await.0, StatusCode::NO_CONTENT);
    assert_eq!(ann.say("snapshot_counter", "c-1", "more").await.completed().await, "3");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scopes_are_what_a_key_may_do() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    let (turns, deploy) = (host.member("acme", "bob", "turns").await, host.member("acme", "dan", "deploy").await);
    let refused = |(status, problem): (StatusCode, Value)| {
        assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("scope_missing")), "{problem}");
    };
    refused(turns.upload("echo", turnhouse_workers::bytes("echo")).await);
    refused(turns.send(Method::PUT, "/v1/agents/mine", json!({ "worker": "echo" })).await);
    refused(turns.call(Method::DELETE, "/v1/agents/echo").await);
    refused(deploy.submit("echo", "c-1", json!({ "message": { "text": "hi" } })).await);
    refused(deploy.send(Method::PUT, "/v1/agents/mine", json!({ "worker": "echo", "default": true })).await);
    refused(turns.submit("echo", "c-1", json!({ "message": { "text": "hi" }, "user": "somebody-else" })).await);
    let backend = host.member("acme", "backend", "turns,act_as").await;
    let (status, body) = backend.submit("echo", "c-9", json!({ "message": { "text": "hi" }, "user": "bob" })).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    let theirs = turns.turn(body["turn_id"].as_str().expect("its id"));
    assert_eq!(theirs.completed().await, "hi", "it is bob's");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o6_secrets_are_nowhere() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("env_probe", "env_probe", json!({ "environment": { "TONE": "dry" } })).await;
    let turn = ann.say("env_probe", "c-1", "look around").await;
    let seen = turn.completed().await;
    assert!(seen.contains("TONE") && seen.contains(&turn.id), "{seen}");
    for secret in ["PATH", "HOME", "CARGO", &ann.key, host.data_dir().to_str().expect("a path")] {
        assert!(!seen.contains(secret), "{secret} is in {seen}");
    }
    let events: Vec<String> = turn.events(None).await.all().await.iter().map(|event| event.data.to_string()).collect();
    assert!(!events.concat().contains(&ann.key));
    // A wrong key is told nothing of itself, nor of others.
    let stranger = Client::new(&host.url, &format!("{}0", ann.key));
    let (status, problem) = stranger.get("/v1/agents").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(!problem.to_string().contains("th_1") && !problem.to_string().contains(&ann.key), "{problem}");
    // Nor does anything that is stored have it.
    let tables = host.tables();
    assert_eq!((tables.that_hold(&ann.key), tables.that_hold("look around")), (vec![], vec!["turns".to_owned()]));
    let data_dir = host.data_dir().to_owned();
    fn holds(dir: &std::path::Path, secret: &[u8]) -> Option<std::path::PathBuf> {
        std::fs::read_dir(dir).expect("a directory").flatten().find_map(|entry| {
            let path = entry.path();
            if path.is_dir() {
                return holds(&path, secret);
            }
            let bytes = std::fs::read(&path).expect("a file");
            bytes.windows(secret.len()).any(|window| window == secret).then_some(path)
        })
    }
    assert_eq!(holds(&data_dir, ann.key.as_bytes()), None);
    let elsewhere = on_postgres();
    assert!(elsewhere || holds(&data_dir, b"look around").is_some(), "the search does find what is there");
    host.stop().await;
}
