//! S3–S9: a conversation's state is one chain of what completed turns wrote, and nothing else ever changes it.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::{Client, TestHost};

/// Saves "dirty", then never ends.
const SAVES_AND_SPINS: &str = r#"(module
  (import "turnhouse_v1" "snapshot_write" (func $write (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "dirty")
  (func (export "_start") (drop (call $write (i32.const 0) (i32.const 5))) (loop $for_ever (br $for_ever))))"#;

/// `snapshot_then_trap`, asked to read: the state as Rust shows it.
async fn state(ann: &Client, agent: &str, conversation: &str) -> String {
    ann.set_agent(agent, "snapshot_then_trap", json!({})).await;
    ann.say(agent, conversation, "read").await.completed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s3_snapshots_of_a_conversation_form_one_chain() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    for n in 1..=13 {
        assert_eq!(ann.say("snapshot_counter", "c-1", "more").await.completed().await, n.to_string());
    }
    let tables = host.tables();
    assert_eq!(tables.count("SELECT count(*) FROM snapshots"), 13);
    assert_eq!(
        tables.count("SELECT count(*) FROM snapshots WHERE body IS NOT NULL"),
        10,
        "older rows keep the chain, not the bytes"
    );
    assert_eq!(tables.faults(), Vec::<String>::new());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s4_a_turn_that_does_not_complete_leaves_the_snapshot_as_it_was() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("snapshot_big", "agent", json!({})).await;
    ann.upload("snapshot_then_trap", turnhouse_workers::bytes("snapshot_then_trap")).await;
    let (status, _) = ann.upload("spinner", wat::parse_str(SAVES_AND_SPINS).expect("it is wat")).await;
    assert_eq!(status, StatusCode::CREATED);
    ann.say("agent", "c-1", "3").await.completed().await;
    assert_eq!(state(&ann, "agent", "c-1").await, "Some(\"sss\")");
    // Failed.
    assert_eq!(ann.say("agent", "c-1", "dirty").await.failed().await, "worker_trapped");
    assert_eq!(state(&ann, "agent", "c-1").await, "Some(\"sss\")");
    // Timed out, by each of the clocks.
    for (limits, code) in [
        (json!({ "turn_timeout_ms": 200 }), "turn_timeout"),
        (json!({ "idle_timeout_ms": 200 }), "idle_timeout"),
        (json!({ "cpu_timeout_ms": 100 }), "cpu_timeout"),
    ] {
        ann.set_agent("agent", "spinner", json!({ "limits": limits })).await;
        assert_eq!(ann.say("agent", "c-1", "go").await.failed().await, code);
        assert_eq!(state(&ann, "agent", "c-1").await, "Some(\"sss\")", "{code}");
    }
    // Cancelled.
    ann.set_agent("agent", "spinner", json!({})).await;
    let turn = ann.say("agent", "c-1", "go").await;
    turn.reaches("running").await;
    turn.cancel().await;
    assert_eq!(state(&ann, "agent", "c-1").await, "Some(\"sss\")");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s5_a_snapshot_over_its_limit_is_refused_at_the_call_and_the_reply_stands() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("snapshot_big", "agent", json!({ "limits": { "snapshot_bytes_max": 1_000 } })).await;
    ann.upload("snapshot_then_trap", turnhouse_workers::bytes("snapshot_then_trap")).await;
    let turn = ann.say("agent", "c-1", "1001").await;
    let events = turn.events(None).await.all().await;
    let rejected: Vec<_> = events.iter().filter(|event| event.kind == "snapshot.rejected").collect();
    assert_eq!(rejected.len(), 1, "{events:?}");
    assert_eq!((&rejected[0].data["bytes"], &rejected[0].data["limit_bytes"]), (&json!(1_001), &json!(1_000)));
    assert!(turn.completed().await.starts_with("Err("));
    assert_eq!(state(&ann, "agent", "c-1").await, "Some(\"small\")", "what was staged before stays");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s6_a_snapshot_that_cannot_be_read_fails_the_turn() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    assert_eq!(ann.say("snapshot_counter", "c-1", "one").await.completed().await, "1");
    host.tables().to_damage().execute("UPDATE snapshots SET body = NULL");
    for _ in 0..2 {
        let turn = ann.say("snapshot_counter", "c-1", "two").await.ended().await;
        assert_eq!(turn["failure"]["code"], "snapshot_unreadable", "{turn}");
        assert!(turn["failure"]["detail"].as_str().expect("a detail").contains("DELETE"), "{turn}");
    }
    let path = "/v1/agents/snapshot_counter/conversations/c-1/snapshot";
    assert_eq!(ann.call(Method::DELETE, path).await.0, StatusCode::NO_CONTENT);
    assert_eq!(ann.say("snapshot_counter", "c-1", "anew").await.completed().await, "1");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s7_a_turn_starts_from_the_snapshot_of_the_run_that_wrote_it() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("snapshot_counter", "agent", json!({})).await;
    for guest in ["trap", "echo", "input_probe"] {
        ann.upload(guest, turnhouse_workers::bytes(guest)).await;
    }
    let origin = async || {
        ann.set_agent("agent", "input_probe", json!({})).await;
        let input = ann.say("agent", "c-1", "where from?").await.completed().await;
        serde_json::from_str::<Value>(&input).expect("the input")["snapshot"].clone()
    };
    assert_eq!(origin().await, Value::Null);
    ann.set_agent("agent", "snapshot_counter", json!({})).await;
    let writer = ann.say("agent", "c-1", "one").await;
    writer.completed().await;
    let run = writer.get().await["run_id"].clone();
    // A run that failed and one that wrote nothing are later, and are not what the state is of.
    ann.set_agent("agent", "trap", json!({})).await;
    ann.say("agent", "c-1", "abort").await.failed().await;
    ann.set_agent("agent", "echo", json!({})).await;
    ann.say("agent", "c-1", "hi").await.completed().await;
    let origin = origin().await;
    assert_eq!(
        (&origin["run_id"], &origin["worker"], &origin["version"]),
        (&run, &json!("snapshot_counter"), &json!(1))
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s8_a_conversation_that_is_deleted_and_made_again_starts_from_nothing() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("snapshot_counter", "agent", json!({ "history_messages": 10 })).await;
    ann.upload("slow_reply", turnhouse_workers::bytes("slow_reply")).await;
    ann.upload("input_probe", turnhouse_workers::bytes("input_probe")).await;
    let path = "/v1/agents/agent/conversations/c-1";
    for n in ["1", "2", "3"] {
        assert_eq!(ann.say("agent", "c-1", "more").await.completed().await, n);
    }
    // It is deleted while a turn runs and another waits.
    ann.set_agent("agent", "slow_reply", json!({ "history_messages": 10 })).await;
    let running = ann.say("agent", "c-1", "20000").await;
    running.reaches("running").await;
    let stream = running.events(None).await;
    ann.say("agent", "c-1", "20000").await;
    assert_eq!(ann.call(Method::DELETE, path).await.0, StatusCode::NO_CONTENT);
    let last = stream.all().await.pop().expect("an event");
    assert_eq!((last.kind.as_str(), &last.data["by"]), ("turn.cancelled", &json!("deleted")));
    for gone in
        [path.to_owned(), format!("{path}/messages"), format!("{path}/turns"), format!("/v1/turns/{}", running.id)]
    {
        assert_eq!(ann.get(&gone).await.0, StatusCode::NOT_FOUND, "{gone}");
    }
    ann.set_agent("agent", "input_probe", json!({ "history_messages": 10 })).await;
    let input: Value =
        serde_json::from_str(&ann.say("agent", "c-1", "hello?").await.completed().await).expect("the input");
    assert_eq!((&input["snapshot"], &input["history"]), (&Value::Null, &json!([])), "{input}");
    ann.set_agent("agent", "snapshot_counter", json!({})).await;
    assert_eq!(ann.say("agent", "c-1", "more").await.completed().await, "1");
    assert_eq!(ann.messages("agent", "c-1").await.len(), 2);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s8_a_reset_empties_the_state_and_keeps_the_history() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    for n in ["1", "2"] {
        assert_eq!(ann.say("snapshot_counter", "c-1", "more").await.completed().await, n);
    }
    let path = "/v1/agents/snapshot_counter/conversations/c-1/snapshot";
    assert_eq!(ann.call(Method::DELETE, path).await.0, StatusCode::NO_CONTENT);
    assert_eq!(ann.say("snapshot_counter", "c-1", "more").await.completed().await, "1");
    assert_eq!(ann.say("snapshot_counter", "c-1", "more").await.completed().await, "2");
    assert_eq!(ann.messages("snapshot_counter", "c-1").await.len(), 4);
    host.stop().await;
}
