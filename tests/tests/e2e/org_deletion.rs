//! The end of an org: nothing of it is left anywhere, its neighbour notices nothing, and its name begins anew.

use std::path::{Path, PathBuf};

use reqwest::StatusCode;
use serde_json::json;
use turnhouse::audit::{Actor, AuditFilter, Verb};
use turnhouse::clock::Timestamp;
use turnhouse::ids::OrgId;
use turnhouse_tests::client::answer;
use turnhouse_tests::{TestHost, eventually, on_postgres};

/// A name that is in nothing by chance.
const DOOMED: &str = "doomed-7f3a9c";

/// Every file below.
fn files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let entries = entries.flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_nothing_of_a_deleted_org_is_left_anywhere() {
    let host = TestHost::start_with(|config| config.limits.org_deletion_grace_ms = 300).await;
    let (doomed, ann) = (host.member(DOOMED, "ann", "admin").await, host.member("acme", "ann", "admin").await);
    for client in [&doomed, &ann] {
        client.deploy("snapshot_counter").await;
        for _ in 0..3 {
            client.say("snapshot_counter", "c-1", "count").await.completed().await;
        }
        let (status, _, body) =
            client.submit_keyed("snapshot_counter", "c-2", "k-1", json!({"message": {"text": "count"}})).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
        client.turn(body["turn_id"].as_str().expect("its id")).completed().await;
        let path = "/v1/agents/snapshot_counter/conversations/c-1";
        client.send(reqwest::Method::PATCH, path, json!({"title": "Counting"})).await;
    }
    let mode = if on_postgres() { "snapshot" } else { "file" };
    doomed.deploy_as("files", "files", json!({"session_mode": mode, "limits": {"turn_timeout_ms": 60_000}})).await;
    doomed.say("files", "c-1", "write a hello").await.ended().await;
    // One that runs, one behind it, and one that streams its end to its client.
    doomed.deploy("slow_reply").await;
    let running = doomed.say("slow_reply", "c-1", "60000").await;
    doomed.say("slow_reply", "c-1", "60000").await;
    running.reaches("running").await;
    let mut events = running.events(None).await;
    let before = host.tables().that_hold(DOOMED);
    for table in [
        "agents",
        "api_keys",
        "audit",
        "conversations",
        "conversation_notes",
        "idempotency_keys",
        "modules",
        "org_members",
        "orgs",
        "snapshots",
        "turn_markers",
        "turns",
        "worker_versions",
    ] {
        assert!(before.contains(&table.to_owned()), "{table}: {before:?}");
    }
    let compiled = files(&host.data_dir().join("modules")).len();

    let org = OrgId::parse(DOOMED).expect("an id");
    let (store, by) = (&host.host.store, Actor::command_line());
    let now = || host.host.clock.now();
    assert!(store.mark_org(&org, now(), &by).await.expect("the store answers"));
    assert!(store.mark_org(&org, now(), &by).await.expect("the store answers"), "once more is fine");
    assert_eq!(events.until("turn.cancelled").await.data["by"], "deleted");
    let gone = async || store.org(&org).await.expect("the store answers").is_none();
    eventually("the org is gone", gone).await;

    assert_eq!(host.tables().that_hold(DOOMED), Vec::<String>::new());
    let named: Vec<PathBuf> = files(&host.data_dir().join("files"))
        .into_iter()
        .filter(|file| std::fs::read(file).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(DOOMED)))
        .collect();
    assert_eq!(named, Vec::<PathBuf>::new(), "private directories");
    let left = files(&host.data_dir().join("modules")).len();
    assert_eq!(left, compiled - 3, "its compiled modules went, and only those");
    let (status, problem) = answer(doomed.request(reqwest::Method::GET, "/v1/agents")).await;
    assert_eq!((status, &problem["code"]), (StatusCode::UNAUTHORIZED, &json!("unauthenticated")));

    // The operator can tell that it was done; nobody can read what it was called.
    let said =
        store.audit(None, &AuditFilter::Verb(Verb::OrgDelete), Timestamp(0), None, 9).await.expect("an audit").items;
    assert_eq!((said.len(), &said[0].detail["org_sha256"]), (1, &json!(turnhouse::erase::name_hash(&org))));

    // Its neighbour has all that it had.
    assert_eq!(ann.messages("snapshot_counter", "c-1").await.len(), 3);
    assert_eq!(ann.say("snapshot_counter", "c-1", "count").await.completed().await, "4");
    let (_, conversation) = ann.get("/v1/agents/snapshot_counter/conversations/c-1").await;
    assert_eq!(conversation["title"], "Counting");

    // The same name is another org, once this host has looked again.
    eventually("the mark is forgotten", async || !host.host.dispatch.leaving.contains(&org)).await;
    let again = host.member(DOOMED, "ann", "admin").await;
    assert_eq!(again.get("/v1/agents").await.1["items"], json!([]));
    again.deploy("snapshot_counter").await;
    assert_eq!(again.say("snapshot_counter", "c-1", "count").await.completed().await, "1");
    assert_eq!(again.get("/v1/audit?verb=org.create").await.1["items"].as_array().map(Vec::len), Some(1));
    host.stop().await;
}
