//! E1–E5, E7: a stream can be left and taken up again anywhere; nothing is lost, nothing comes twice, and nobody is cancelled by it.

use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::json;
use turnhouse_tests::{Client, SeenEvent, TestHost, Turn, eventually};

/// An id as its place: `end` is after every pair.
fn place(event: &SeenEvent) -> (u64, u64) {
    if event.id == "end" {
        return (u64::MAX, u64::MAX);
    }
    let (epoch, seq) = event.id.split_once('.').unwrap_or_else(|| panic!("an id: {event:?}"));
    (epoch.parse().expect("a number"), seq.parse().expect("a number"))
}

/// Events but for the moment of acceptance, which the log has from the write and the live stream from just before it.
fn told(mut events: Vec<SeenEvent>) -> Vec<SeenEvent> {
    for event in events.iter_mut().filter(|event| event.kind == "turn.accepted") {
        event.data["accepted_at"] = json!(null);
    }
    events
}

async fn teller(host: &TestHost) -> Client {
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    ann
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e1_event_ids_strictly_increase() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    ann.deploy("big_reply").await;
    for (agent, message) in [("progress_slowly", "20 ticks every 3"), ("big_reply", "200000 deltas 300")] {
        let stream = ann.stream(agent, "c-1", message).await.all().await;
        assert!(stream.is_sorted_by(|one, next| place(one) < place(next)), "{stream:?}");
        assert_eq!((stream[0].id.as_str(), stream[0].kind.as_str()), ("0.0", "turn.accepted"));
        assert_eq!(stream[1].kind, "turn.started");
        let turn = ann.turn(stream[0].data["turn_id"].as_str().expect("its id"));
        assert_eq!(told(turn.events(None).await.all().await), told(stream), "the log says what the stream said");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_a_client_that_returns_after_any_event_sees_the_rest_and_nothing_twice() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    let turn = ann.say("progress_slowly", "c-1", "12 ticks every 10").await;
    let all = turn.events(None).await.all().await;
    assert!(all.len() >= 4, "{all:?}");
    for (index, event) in all.iter().enumerate().take(all.len() - 1) {
        assert_eq!(turn.events(Some(&event.id)).await.all().await, all[index + 1..], "after {}", event.id);
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_a_client_may_leave_after_every_single_event_while_the_turn_runs() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    let turn = ann.say("progress_slowly", "c-1", "15 ticks every 20").await;
    let (mut seen, mut last): (Vec<SeenEvent>, Option<String>) = (Vec::new(), None);
    while last.as_deref() != Some("end") {
        let event = turn.events(last.as_deref()).await.next().await.expect("an event");
        last = Some(event.id.clone());
        seen.push(event);
    }
    assert!(seen.is_sorted_by(|one, next| place(one) < place(next)), "{seen:?}");
    assert_eq!(told(seen), told(turn.events(None).await.all().await));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_the_log_outlives_the_host() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    let turn = ann.say("progress_slowly", "c-1", "5 ticks every 40").await;
    let before = turn.events(None).await.all().await;
    let host = host.restart().await;
    let turn = Turn { client: Client::new(&host.url, &ann.key), id: turn.id };
    assert_eq!(told(turn.events(None).await.all().await), told(before.clone()));
    for (index, event) in before.iter().enumerate().take(before.len() - 1) {
        assert_eq!(turn.events(Some(&event.id)).await.all().await, before[index + 1..], "after {}", event.id);
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e3_the_deltas_joined_are_the_reply_or_the_end_says_that_they_are_not() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    ann.deploy("reply_replaces").await;
    ann.deploy("bad_utf8_stdout").await;
    for (agent, joined, reply, replaces) in [
        ("progress_slowly", "tick tick tick ", "tick tick tick ", false),
        ("reply_replaces", "a draft", "the reply", true),
        ("bad_utf8_stdout", "caf\u{fffd} \u{fffd}", "caf\u{fffd} \u{fffd}", false),
    ] {
        let events = ann.stream(agent, "c-1", "3 ticks every 30").await.all().await;
        let deltas = events.iter().filter(|event| event.kind == "output.delta");
        let text: String = deltas.map(|event| event.data["text"].as_str().expect("a text")).collect();
        let end = events.last().expect("an end");
        assert_eq!((text.as_str(), end.data["reply"]["text"].as_str()), (joined, Some(reply)), "{agent}");
        assert_eq!(end.data["replaces_deltas"], json!(replaces), "{agent}");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e4_a_quiet_stream_gets_comments_that_are_no_events() {
    let host = TestHost::start_with(|config| config.limits.ping_ms = 50).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let turn = ann.say("sleep_day", "c-1", "go").await;
    let response = ann.request(Method::GET, &format!("/v1/turns/{}/events", turn.id)).send().await.expect("an answer");
    let mut bytes = response.bytes_stream();
    let mut text = String::new();
    while text.matches(": ping").count() < 3 {
        let chunk = tokio::time::timeout(Duration::from_secs(20), bytes.next()).await.expect("a comment in time");
        text.push_str(str::from_utf8(&chunk.expect("a chunk").expect("bytes")).expect("UTF-8"));
    }
    for block in text.split("\n\n").filter(|block| block.contains("ping")) {
        assert_eq!(block, ": ping", "a comment has no id and no event");
    }
    turn.cancel().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e5_an_id_that_nothing_has_gets_a_resync_and_goes_on() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    let turn = ann.say("progress_slowly", "c-1", "4 ticks every 250").await;
    // While it runs.
    turn.events(None).await.until("output.delta").await;
    let live = turn.events(Some("1.900")).await.all().await;
    assert_eq!(live[0].kind, "resync", "{live:?}");
    assert_eq!(live[0].data["state"], "running", "{live:?}");
    let rest: String = live[1..]
        .iter()
        .filter(|event| event.kind == "output.delta")
        .filter_map(|event| event.data["text"].as_str())
        .collect();
    assert_eq!(format!("{}{rest}", live[0].data["text"].as_str().expect("a text")), "tick tick tick tick ");
    assert_eq!(live.iter().filter(|event| event.is_terminal()).count(), 1);
    // After its end.
    let ended = turn.events(Some("1.900")).await.all().await;
    assert_eq!(
        ended.iter().map(|event| event.kind.as_str()).collect::<Vec<_>>(),
        ["resync", "turn.completed"],
        "{ended:?}"
    );
    assert_eq!(
        (&ended[0].data["state"], &ended[0].data["text"]),
        (&json!("completed"), &json!("tick tick tick tick "))
    );
    // What it resumes from is an id of the stream.
    assert_eq!(turn.events(Some(&ended[0].id)).await.all().await, ended[1..]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e5_only_end_is_204_and_what_is_no_id_is_refused() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    let turn = ann.say("progress_slowly", "c-1", "1 tick every 1").await;
    turn.completed().await;
    let last = async |id: &str| {
        let request = ann.request(Method::GET, &format!("/v1/turns/{}/events", turn.id)).header("last-event-id", id);
        request.send().await.expect("an answer").status()
    };
    assert_eq!(last("end").await, StatusCode::NO_CONTENT);
    assert_eq!(last("0.0").await, StatusCode::OK);
    assert_eq!(last("4294967295.1").await, StatusCode::OK);
    for bad in ["x", "1", "1.2.3", "-1.0", "1.-2", "99999999999999999999.1"] {
        assert_eq!(last(bad).await, StatusCode::BAD_REQUEST, "{bad}");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e7_disconnecting_never_cancels() {
    let host = TestHost::start().await;
    let ann = teller(&host).await;
    let mut turns = Vec::new();
    for n in 0..5 {
        let mut stream = ann.stream("progress_slowly", &format!("c-{n}"), "5 ticks every 60").await;
        let first = stream.next().await.expect("an event");
        turns.push(ann.turn(first.data["turn_id"].as_str().expect("its id")));
        drop(stream);
    }
    for turn in turns {
        assert_eq!(turn.completed().await, "tick ".repeat(5));
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e6_too_many_streams_are_refused_and_leave_nothing_behind() {
    let host = TestHost::start_with(|config| {
        config.limits.readers_per_turn_max = 2;
        config.limits.readers_per_org_max = 3;
    })
    .await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let turn = ann.say("sleep_day", "c-1", "go").await;
    let (one, other) = (turn.events(None).await, turn.events(None).await);
    let follow = async || ann.get(&format!("/v1/turns/{}/events", turn.id)).await;
    let (status, problem) = follow().await;
    assert_eq!((status, &problem["code"]), (StatusCode::TOO_MANY_REQUESTS, &json!("too_many_streams")));
    let limit = (&problem["limit"], &problem["limit_of"], &problem["limit_value"]);
    assert_eq!(limit, (&json!("readers_max"), &json!("turn"), &json!(2.0)), "what was exceeded is said");
    let another = ann.say("sleep_day", "c-2", "go").await;
    let third = another.events(None).await;
    eventually("both run", async || host.live().await.running == 2).await;
    let before = host.live().await;
    let request = ann.request(Method::POST, &Client::turns("sleep_day", "c-3")).header("accept", "text/event-stream");
    let response = request.json(&json!({ "message": { "text": "go" } })).send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(host.live().await, before, "nothing was accepted");
    drop((one, other, third));
    turn.cancel().await;
    another.cancel().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_readers_that_fall_behind_what_is_kept_in_memory_read_the_log() {
    let host = TestHost::start_with(|config| {
        config.limits.reader_buffer_bytes_max = 16 * 1024;
        config.limits.delta_batch_bytes = 4 * 1024;
    })
    .await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("big_reply").await;
    let turn = ann.say("big_reply", "c-1", "600000 deltas 1500").await;
    let slow = async {
        // Leaves after every few events, and takes its time to come back.
        let (mut seen, mut last): (Vec<SeenEvent>, Option<String>) = (Vec::new(), None);
        while last.as_deref() != Some("end") {
            let mut events = turn.events(last.as_deref()).await;
            for _ in 0..40 {
                let Some(event) = events.next().await else { break };
                last = Some(event.id.clone());
                seen.push(event);
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        seen
    };
    let (slow, fast) = tokio::join!(slow, async { turn.events(None).await.all().await });
    assert!(fast.is_sorted_by(|one, next| place(one) < place(next)));
    let ids =
        |events: &[SeenEvent]| events.iter().map(|event| format!("{} {}", event.id, event.kind)).collect::<Vec<_>>();
    assert_eq!(ids(&slow), ids(&fast));
    let text: usize = fast.iter().filter_map(|event| event.data["text"].as_str()).map(str::len).sum();
    assert_eq!(text, 600_000);
    host.stop().await;
}
