//! T9: the turns of a conversation run one after another, in the order of acceptance; and what a message does that finds it busy.

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::{Client, TestHost};

use crate::turns::text;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t9_turns_of_a_conversation_run_in_the_order_of_acceptance() {
    let host = TestHost::start_with(|config| config.limits.conversation_queue_max = 100).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    let turns = join_all((0..60).map(|n| {
        let ann = ann.clone();
        async move { ann.say("snapshot_counter", &format!("c-{}", n % 2), &n.to_string()).await }
    }))
    .await;
    join_all(turns.iter().map(|turn| turn.completed())).await;
    for conversation in ["c-0", "c-1"] {
        let messages = ann.messages("snapshot_counter", conversation).await;
        let seqs: Vec<i64> = messages.iter().map(|message| message["seq"].as_i64().expect("a place")).collect();
        assert!(seqs.is_sorted_by(|one, next| one < next), "{seqs:?}");
        let counts: Vec<&str> =
            messages.iter().map(|message| message["reply"]["text"].as_str().expect("a count")).collect();
        let expected: Vec<String> = (1..=30).map(|n| n.to_string()).collect();
        assert_eq!(counts, expected, "one after the other, each from the state of the one before");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t9_what_one_client_sends_runs_as_it_was_sent() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let mut turns = Vec::new();
    for n in ["150", "1", "20", "2", "30"] {
        turns.push(ann.say("slow_reply", "c-1", n).await);
    }
    for turn in &turns {
        turn.completed().await;
    }
    let overtaken = "SELECT count(*) FROM turns a JOIN turns b ON a.seq < b.seq AND a.started_at > b.started_at";
    assert_eq!(host.tables().count(overtaken), 0);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_conversation_enqueues_rejects_or_interrupts() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let running = ann.say("slow_reply", "c-1", "20000").await;
    running.reaches("running").await;
    let queued = ann.say("slow_reply", "c-1", "20000").await;

    let mut reject = text("1");
    reject["on_busy"] = json!("reject");
    let (status, problem) = ann.submit("slow_reply", "c-1", reject.clone()).await;
    assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("conversation_busy")), "{problem}");
    assert_eq!(problem["active_turn_id"], running.id);
    assert_eq!(problem["events"], format!("/v1/turns/{}/events", running.id));

    let mut interrupt = text("1");
    interrupt["on_busy"] = json!("interrupt");
    let (status, replayed, answer) = ann.submit_keyed("slow_reply", "c-1", "k-1", interrupt.clone()).await;
    assert_eq!((status, replayed), (StatusCode::ACCEPTED, false), "{answer}");
    let interrupting = ann.turn(answer["turn_id"].as_str().expect("its id"));
    for turn in [&running, &queued] {
        let ended = turn.ended().await;
        assert_eq!((&ended["state"], &ended["cancelled_by"]), (&json!("cancelled"), &json!("interrupt")), "{ended}");
    }
    assert_eq!(interrupting.completed().await, "1");

    // A replayed key interrupts nothing.
    let next = ann.say("slow_reply", "c-1", "300").await;
    let (status, replayed, answer) = ann.submit_keyed("slow_reply", "c-1", "k-1", interrupt).await;
    assert_eq!((status, replayed, &answer["turn_id"]), (StatusCode::ACCEPTED, true, &json!(interrupting.id)));
    assert_eq!(next.completed().await, "300");

    // Idle, it rejects nothing.
    assert_eq!(ann.submit("slow_reply", "c-1", reject).await.0, StatusCode::ACCEPTED);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t9_messages_that_collect_are_one_next_turn_in_their_order() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    ann.deploy("echo").await;
    let running = ann.say("slow_reply", "c-1", "20000").await;
    running.reaches("running").await;
    // Every later turn echoes.
    ann.set_agent("slow_reply", "echo", json!({})).await;
    let collect = async |body: Value| {
        let mut body = json!({ "message": body });
        body["on_busy"] = json!("collect");
        let (status, answer) = ann.submit("slow_reply", "c-1", body).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        (answer["turn_id"].as_str().expect("its id").to_owned(), answer["joined"] == true)
    };
    let (next, joined) = collect(json!({ "text": "one" })).await;
    assert!(!joined, "nothing waited");
    let json = json!({ "parts": [{ "type": "text", "text": "two" }, { "type": "json", "data": { "n": 2 } }] });
    for more in [json, json!({ "text": "three" })] {
        assert_eq!(collect(more).await, (next.clone(), true));
    }
    // A message too large for the rest of its room waits by itself, and collects in its turn.
    let (last, joined) = collect(json!({ "parts": vec![json!({ "type": "text", "text": "." }); 32] })).await;
    assert!(!joined && last != next);
    running.cancel().await;
    assert_eq!(ann.turn(&next).completed().await, "one\ntwo\nthree");
    assert_eq!(ann.turn(&last).completed().await, ".".repeat(32));
    let history = ann.messages("slow_reply", "c-1").await;
    assert_eq!(history.len(), 3, "one turn, one message: {history:?}");
    assert_eq!(history[1]["message"]["parts"][2], json!({ "type": "text", "text": "two" }), "{}", history[1]);
    // Idle, it is a turn like any other, its message as it came.
    let (alone, joined) = collect(json!({ "text": "alone" })).await;
    assert!(!joined);
    assert_eq!(ann.turn(&alone).completed().await, "alone");
    assert_eq!(ann.messages("slow_reply", "c-1").await[3]["message"], json!({ "text": "alone" }));
    host.stop().await;
}

/// What is collected keeps within what one message may be, and what has been taken is not refused because many read it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t9_what_is_collected_is_no_more_than_one_message_may_be_and_taken_once() {
    let host = TestHost::start_with(|config| {
        config.limits.message_text_bytes_max = 2_000;
        config.limits.message_attachments_bytes_max = 100;
        config.limits.readers_per_turn_max = 1;
    })
    .await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let running = ann.say("slow_reply", "c-1", "20000").await;
    running.reaches("running").await;
    let collect = async |message: Value| {
        let (status, answer) = ann.submit("slow_reply", "c-1", json!({"message": message, "on_busy": "collect"})).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        (answer["turn_id"].as_str().expect("its id").to_owned(), answer["joined"] == true)
    };
    let of = |size: usize| json!({"text": "x".repeat(size)});
    let (first, _) = collect(of(1_200)).await;
    let (second, joined) = collect(of(1_200)).await;
    assert!(!joined && second != first, "together they say more than one may");
    assert_eq!(collect(of(100)).await, (second.clone(), true));
    let mut files = Vec::new();
    for n in 0..3 {
        files.push(ann.attach("text/plain", format!("{n}").repeat(45)).await);
    }
    let file = |n: usize| json!({"parts": [{"type": "attachment", "attachment_id": files[n], "name": "a"}]});
    assert_eq!(collect(file(0)).await, (second.clone(), true));
    assert_eq!(collect(file(1)).await, (second.clone(), true));
    let (third, joined) = collect(file(2)).await;
    assert!(!joined && third != second, "135 bytes of attachments are more than one may refer to");

    // Its one reader reads already: the next is told where the turn is, and its message is in it once.
    let mut reading = ann.turn(&third).events(None).await;
    reading.until("turn.accepted").await;
    let request = ann
        .request(Method::POST, &Client::turns("slow_reply", "c-1"))
        .header("accept", "text/event-stream")
        .json(&json!({"message": {"text": "told once"}, "on_busy": "collect"}));
    let (status, answer) = turnhouse_tests::client::answer(request).await;
    assert_eq!((status, &answer["joined"], &answer["turn_id"]), (StatusCode::ACCEPTED, &json!(true), &json!(third)));
    let messages = json!(ann.messages("slow_reply", "c-1").await).to_string();
    assert_eq!(messages.matches("told once").count(), 1, "{messages}");
    drop(reading);
    assert_eq!(ann.call(Method::DELETE, "/v1/agents/slow_reply/conversations/c-1").await.0, StatusCode::NO_CONTENT);
    host.stop().await;
}
