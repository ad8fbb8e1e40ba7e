//! T1–T8, T10: every message is answered once, whatever becomes of its worker; cancel and idempotency.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::client::told;
use turnhouse_tests::{Client, TestHost, eventually};

pub fn text(text: &str) -> Value {
    json!({ "message": { "text": text } })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t1_every_accepted_message_gets_exactly_one_terminal_event() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    for guest in ["echo", "no_reply", "trap", "exit_code", "big_reply"] {
        ann.deploy(guest).await;
    }
    ann.deploy_as("spin", "spin", json!({ "limits": { "cpu_timeout_ms": 100 } })).await;
    for (agent, ends) in [
        ("echo", "turn.completed"),
        ("no_reply", "turn.failed"),
        ("trap", "turn.failed"),
        ("exit_code", "turn.failed"),
        ("big_reply", "turn.completed"),
        ("spin", "turn.failed"),
    ] {
        let turn = ann.say(agent, "c-1", "7").await;
        let (one, other) = tokio::join!(turn.events(None), turn.events(None));
        let (one, other) = tokio::join!(one.all(), other.all());
        let (one, other) = (told(one), told(other));
        assert_eq!(one, other, "two readers of one turn");
        let terminal: Vec<_> = one.iter().filter(|event| event.is_terminal()).collect();
        assert_eq!(terminal.len(), 1, "{one:?}");
        assert_eq!((terminal[0].kind.as_str(), terminal[0].id.as_str()), (ends, "end"), "{one:?}");
        assert!(one.last().expect("an event").is_terminal());
        // And on the submission's own stream.
        let streamed = ann.stream(agent, "c-2", "7").await.all().await;
        assert_eq!(streamed.iter().filter(|event| event.is_terminal()).count(), 1, "{streamed:?}");
        assert_eq!(streamed.last().expect("an event").kind, ends);
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t2_a_reply_that_comes_after_the_end_changes_nothing() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    ann.set_agent("hasty", "slow_reply", json!({ "limits": { "turn_timeout_ms": 150 } })).await;
    let cancelled = ann.say("slow_reply", "c-1", "400").await;
    let late = ann.say("hasty", "c-1", "400").await;
    cancelled.reaches("running").await;
    assert_eq!(cancelled.cancel().await.1["state"], "cancelled");
    assert_eq!(late.failed().await, "turn_timeout");
    let before = (cancelled.get().await, late.get().await);
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!((cancelled.get().await, late.get().await), before);
    for (agent, turn) in [("slow_reply", &cancelled), ("hasty", &late)] {
        let shown = &ann.messages(agent, "c-1").await[0];
        assert_eq!(shown["reply"], Value::Null, "{shown}");
        let events = turn.events(None).await.all().await;
        assert!(
            events.iter().all(|event| event.kind != "turn.completed" && event.kind != "output.delta"),
            "{events:?}"
        );
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t3_exit_0_without_a_reply_is_no_reply() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("no_reply").await;
    let wasm = wat::parse_str(turnhouse_workers::wat("no_reply")).expect("it is wat");
    assert_eq!(ann.upload("smallest", wasm).await.0, StatusCode::CREATED);
    ann.set_agent("smallest", "smallest", json!({})).await;
    for agent in ["no_reply", "smallest"] {
        assert_eq!(ann.say(agent, "c-1", "hello").await.failed().await, "no_reply");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t4_losing_an_election_is_never_a_failure() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    let turns = join_all((0..40).map(|n| {
        let ann = ann.clone();
        async move { ann.say("echo", &format!("c-{}", n % 10), "hi").await }
    }))
    .await;
    // Each races its own end, twice.
    let cancels = join_all(turns.iter().flat_map(|turn| [turn.cancel(), turn.cancel()])).await;
    assert!(cancels.iter().all(|(status, _)| *status == StatusCode::OK), "{cancels:?}");
    for turn in &turns {
        let ended = turn.ended().await;
        assert!(ended["state"] == "completed" || ended["state"] == "cancelled", "{ended}");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t5_a_turn_that_waits_behind_a_long_one_is_not_ended_by_its_admission_clock() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("slow_reply", "slow_reply", json!({ "limits": { "admission_timeout_ms": 1_000 } })).await;
    let long = ann.say("slow_reply", "c-1", "2500").await;
    let behind = ann.say("slow_reply", "c-1", "1").await;
    assert_eq!(behind.completed().await, "1");
    assert_eq!(long.completed().await, "2500");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t5_each_wait_has_its_own_clock_and_code() {
    let host = TestHost::start_with(|config| config.limits.host_running_max = 1).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let limits = json!({ "limits": { "admission_timeout_ms": 300, "queue_timeout_ms": 300 } });
    ann.set_agent("hasty", "slow_reply", limits).await;
    let first = ann.say("hasty", "c-1", "3000").await;
    first.reaches("running").await;
    let behind = ann.say("hasty", "c-1", "1").await;
    let without_slot = ann.say("hasty", "c-2", "1").await;
    assert_eq!(behind.failed().await, "queue_timeout");
    assert_eq!(without_slot.failed().await, "admission_timeout");
    assert_eq!(first.get().await["state"], "running", "the others did not wait for it");
    assert_eq!(first.completed().await, "3000");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t6_nothing_lets_a_turn_go_on_for_ever() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    for guest in ["status_loop", "sleep_day", "progress_slowly", "spin", "spin_in_hostcalls", "wait_echo"] {
        ann.deploy(guest).await;
    }
    let idle = json!({ "limits": { "idle_timeout_ms": 400 } });
    let wall = json!({ "limits": { "turn_timeout_ms": 2_500, "idle_timeout_ms": 2_400 } });
    let cpu = json!({ "limits": { "cpu_timeout_ms": 200 } });
    let cases = [
        ("status_loop", &idle, "10", "idle_timeout", "idle_timeout_ms"),
        ("sleep_day", &idle, "", "idle_timeout", "idle_timeout_ms"),
        // Its operation's time is not its own idleness, and is no way out either.
        ("wait_echo", &wall, "3600000", "turn_timeout", "turn_timeout_ms"),
        // It says something all the time, and is ended all the same.
        ("progress_slowly", &wall, "1000 ticks every 50", "turn_timeout", "turn_timeout_ms"),
        ("spin", &cpu, "", "cpu_timeout", "cpu_timeout_ms"),
        ("spin_in_hostcalls", &cpu, "clock", "cpu_timeout", "cpu_timeout_ms"),
    ];
    let ended = join_all(cases.iter().map(|(guest, settings, message, code, setting)| {
        let ann = ann.clone();
        async move {
            let agent = format!("{guest}-bounded");
            ann.set_agent(&agent, guest, (*settings).clone()).await;
            let message = if message.is_empty() { "go" } else { message };
            let turn = ann.say(&agent, "c-1", message).await;
            let turn = turn.ended().await;
            assert_eq!(turn["failure"]["code"], *code, "{guest}: {turn}");
            let detail = turn["failure"]["detail"].as_str().expect("a detail");
            assert!(detail.contains(setting), "{guest}: {detail}");
        }
    }));
    ended.await;
    // Progress keeps the idle clock from running out.
    ann.set_agent("steady", "progress_slowly", json!({ "limits": { "idle_timeout_ms": 2_000 } })).await;
    let steady = ann.say("steady", "c-1", "30 ticks every 100").await;
    assert_eq!(steady.completed().await, "tick ".repeat(30));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t7_the_terminal_event_names_the_cause() {
    let host = TestHost::start_with(|config| config.limits.host_calls_max = 20_000).await;
    let ann = host.member("acme", "ann", "admin").await;
    let small = json!({ "limits": { "reply_bytes_max": 4_096, "memory_bytes_max": 8_388_608 } });
    let cases = [
        ("exit_code", "7", "worker_exit", "7"),
        ("exit_code", "255", "worker_exit", "255"),
        ("trap", "now", "worker_trapped", "unreachable"),
        ("trap", "bounds", "worker_trapped", "out of bounds"),
        ("panic", "oh no", "worker_trapped", ""),
        ("memory_bomb", "now", "worker_out_of_memory", "memory_bytes_max"),
        ("deep_recursion", "now", "worker_stack_overflow", "stack"),
        ("big_stdout", "4097", "output_limit", "reply_bytes_max"),
        // Told at the call, which the guest gives up on.
        ("big_reply", "4097", "worker_exit", "1"),
        ("big_reply", "8192 deltas 100", "output_limit", "reply_bytes_max"),
        ("spin_in_hostcalls", "now", "host_call_limit", "host_calls_max"),
        ("no_reply", "now", "no_reply", ""),
    ];
    for guest in [
        "exit_code",
        "trap",
        "panic",
        "memory_bomb",
        "deep_recursion",
        "big_stdout",
        "big_reply",
        "spin_in_hostcalls",
        "no_reply",
    ] {
        ann.deploy_as(guest, guest, small.clone()).await;
    }
    ann.deploy("echo").await;
    for (guest, message, code, says) in cases {
        let turn = ann.say(guest, "c-1", message).await;
        let events = turn.events(None).await.all().await;
        let terminal = events.last().expect("an event");
        assert_eq!(
            (terminal.kind.as_str(), &terminal.data["code"]),
            ("turn.failed", &json!(code)),
            "{guest} {message}: {terminal:?}"
        );
        let detail = terminal.data["detail"].as_str().expect("a detail");
        assert!(!detail.is_empty() && detail.contains(says), "{guest} {message}: {detail:?}");
        assert_eq!(turn.get().await["failure"]["code"], code);
        if guest == "exit_code" {
            assert_eq!(terminal.data["exit_code"].to_string(), message, "{terminal:?}");
        }
        // Its neighbour is as well as ever.
        assert_eq!(ann.say("echo", "c-1", "hi").await.completed().await, "hi");
    }
    // Exactly the limit is within it.
    assert_eq!(ann.say("big_reply", "c-1", "4096").await.completed().await.len(), 4_096);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t8_a_queued_turn_that_is_cancelled_leaves_nothing_in_the_context() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("slow_reply", "agent", json!({ "history_messages": 10 })).await;
    ann.upload("input_probe", turnhouse_workers::bytes("input_probe")).await;
    let first = ann.say("agent", "c-1", "700").await;
    let forgotten = ann.say("agent", "c-1", "never mind 5").await;
    let third = ann.say("agent", "c-1", "what was said?").await;
    assert_eq!(forgotten.get().await["state"], "queued");
    let (status, answer) = forgotten.cancel().await;
    assert_eq!((status, &answer["state"]), (StatusCode::OK, &json!("cancelled")), "{answer}");
    ann.set_agent("agent", "input_probe", json!({ "history_messages": 10 })).await;
    assert_eq!(first.completed().await, "700");
    let input: Value = serde_json::from_str(&third.completed().await).expect("the input");
    let history = input["history"].to_string();
    assert!(history.contains("700") && !history.contains("never mind"), "{history}");
    let events = forgotten.events(None).await.all().await;
    assert_eq!(events.iter().map(|event| event.kind.as_str()).collect::<Vec<_>>(), ["turn.accepted", "turn.cancelled"]);
    assert_eq!(events[1].data["by"], "user");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t8_a_running_turn_that_is_cancelled_ends_at_once_and_its_slot_is_free() {
    let host = TestHost::start_with(|config| config.limits.host_running_max = 1).await;
    let ann = host.member("acme", "ann", "admin").await;
    for guest in ["spin", "sleep_day", "wait_echo", "echo"] {
        ann.deploy(guest).await;
    }
    for guest in ["spin", "sleep_day", "wait_echo"] {
        let mut stream = ann.stream(guest, "c-1", "3600000").await;
        let turn = ann.turn(stream.until("turn.accepted").await.data["turn_id"].as_str().expect("its id"));
        stream.until("turn.started").await;
        let began = Instant::now();
        let (status, answer) = turn.cancel().await;
        assert_eq!((status, &answer["state"]), (StatusCode::OK, &json!("cancelled")), "{guest}: {answer}");
        let last = stream.all().await.pop().expect("an end");
        assert_eq!(last.kind, "turn.cancelled", "{last:?}");
        assert!(began.elapsed() < Duration::from_secs(5), "{guest}: {:?}", began.elapsed());
        // The only slot there is: it is free when the guest is gone.
        assert_eq!(ann.say("echo", "c-1", "hi").await.completed().await, "hi");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t8_cancelling_what_has_ended_answers_with_its_state_and_never_hits_the_next_turn() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let done = ann.say("slow_reply", "c-1", "1").await;
    assert_eq!(done.completed().await, "1");
    let cancelled = ann.say("slow_reply", "c-1", "5000").await;
    let next = ann.say("slow_reply", "c-1", "3000").await;
    for _ in 0..3 {
        let (status, answer) = done.cancel().await;
        assert_eq!((status, &answer["state"]), (StatusCode::OK, &json!("completed")));
        let (status, answer) = cancelled.cancel().await;
        assert_eq!((status, &answer["state"]), (StatusCode::OK, &json!("cancelled")));
    }
    next.reaches("running").await;
    assert_eq!(cancelled.cancel().await.1["state"], "cancelled");
    assert_eq!(next.completed().await, "3000");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t10_a_poison_turn_ends_with_a_reason_and_the_conversation_goes_on() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("trap", "agent", json!({})).await;
    ann.upload("echo", turnhouse_workers::bytes("echo")).await;
    let poison = ann.say("agent", "c-1", "abort").await;
    assert_eq!(poison.failed().await, "worker_trapped");
    assert_eq!(poison.get().await["attempt"], 1, "a guest's fault is not tried again");
    ann.set_agent("agent", "echo", json!({})).await;
    assert_eq!(ann.say("agent", "c-1", "hi").await.completed().await, "hi");
    host.stop().await;
}

/// Whoever waits for a turn that goes with its conversation is told so, and not that it waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t1_waiting_for_a_turn_that_is_deleted_ends_with_its_end() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let request = ann
        .request(Method::POST, &Client::turns("slow_reply", "c-1"))
        .header("prefer", "wait=20")
        .json(&json!({"message": {"text": "20000"}}));
    let waiting = tokio::spawn(turnhouse_tests::client::answer(request));
    let conversation = "/v1/agents/slow_reply/conversations/c-1";
    turnhouse_tests::eventually("the turn runs", async || {
        ann.get(&Client::turns("slow_reply", "c-1")).await.1["items"][0]["state"] == "running"
    })
    .await;
    assert_eq!(ann.call(Method::DELETE, conversation).await.0, StatusCode::NO_CONTENT);
    let (status, answer) = waiting.await.expect("an answer");
    assert_eq!((status, &answer["state"]), (StatusCode::ACCEPTED, &json!("cancelled")), "{answer}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idempotency_key_begins_one_turn() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    let submit = async |conversation: &str, key: &str, body: Value| {
        ann.submit_keyed("snapshot_counter", conversation, key, body).await
    };
    // At once, on one conversation.
    let answers = join_all((0..12).map(|_| submit("c-1", "k-1", text("a")))).await;
    let ids: std::collections::HashSet<String> =
        answers.iter().map(|(status, _, body)| (assert_eq!(*status, 202), body["turn_id"].to_string()).1).collect();
    assert_eq!(ids.len(), 1, "{answers:?}");
    assert_eq!(answers.iter().filter(|(_, replayed, _)| !replayed).count(), 1, "{answers:?}");
    let turn = ann.turn(answers[0].2["turn_id"].as_str().expect("its id"));
    assert_eq!(turn.completed().await, "1");
    // After its end it attaches to the same turn, whose state it says, and streams from its first event.
    let (status, replayed, body) = submit("c-1", "k-1", text("a")).await;
    assert_eq!((status, replayed, &body["state"]), (StatusCode::ACCEPTED, true, &json!("completed")));
    // Another body is another request; the same key elsewhere is another key.
    let (status, _, problem) = submit("c-1", "k-1", text("b")).await;
    assert_eq!((status, &problem["code"]), (StatusCode::UNPROCESSABLE_ENTITY, &json!("idempotency_mismatch")));
    let (status, replayed, body) = submit("c-2", "k-1", text("a")).await;
    assert_eq!((status, replayed), (StatusCode::ACCEPTED, false));
    ann.turn(body["turn_id"].as_str().expect("its id")).completed().await;
    assert_eq!(ann.messages("snapshot_counter", "c-1").await.len(), 1);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_submission_stores_nothing_not_even_its_key() {
    let host = TestHost::start_with(|config| config.limits.conversation_queue_max = 1).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let running = ann.say("slow_reply", "c-1", "60000").await;
    running.reaches("running").await;
    let queued = ann.say("slow_reply", "c-1", "2").await;
    let request =
        ann.request(reqwest::Method::POST, &Client::turns("slow_reply", "c-1")).header("idempotency-key", "k-1");
    let response = request.json(&text("3")).send().await.expect("an answer");
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(response.headers().contains_key("retry-after"));
    let problem: Value = response.json().await.expect("a problem");
    assert_eq!(problem["code"], "conversation_queue_full", "{problem}");
    running.cancel().await;
    assert_eq!(queued.completed().await, "2");
    // The key is free.
    let (status, replayed, body) = ann.submit_keyed("slow_reply", "c-1", "k-1", text("4")).await;
    assert_eq!((status, replayed), (StatusCode::ACCEPTED, false), "{body}");
    assert_eq!(ann.turn(body["turn_id"].as_str().expect("its id")).completed().await, "4");
    let said: Vec<Value> =
        ann.messages("slow_reply", "c-1").await.iter().map(|m| m["message"]["text"].clone()).collect();
    assert_eq!(said, [json!("60000"), json!("2"), json!("4")]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefer_wait_answers_with_the_ended_turn_also_when_it_failed() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    ann.deploy("trap").await;
    let wait = async |agent: &str, seconds: u32, message: &str| {
        let request = ann.request(reqwest::Method::POST, &Client::turns(agent, "c-1"));
        let request = request.header("prefer", format!("wait={seconds}"));
        let response = request.json(&text(message)).send().await.expect("an answer");
        let applied = response.headers().get("preference-applied").map(|v| v.to_str().expect("text").to_owned());
        let location = response.headers().contains_key("location");
        (response.status(), applied, location, response.json::<Value>().await.expect("JSON"))
    };
    let (status, applied, _, turn) = wait("slow_reply", 30, "50").await;
    assert_eq!((status, applied.as_deref()), (StatusCode::OK, Some("wait=30")));
    assert_eq!((&turn["state"], &turn["reply"]["text"]), (&json!("completed"), &json!("50")));
    let (status, _, _, turn) = wait("trap", 30, "now").await;
    assert_eq!(
        (status, &turn["state"], &turn["failure"]["code"]),
        (StatusCode::OK, &json!("failed"), &json!("worker_trapped"))
    );
    let (status, applied, location, turn) = wait("slow_reply", 1, "2500").await;
    assert_eq!((status, applied.as_deref(), location), (StatusCode::ACCEPTED, Some("wait=1"), true), "{turn}");
    // Not waiting any more cancels nothing.
    assert_eq!(ann.turn(turn["turn_id"].as_str().expect("its id")).completed().await, "2500");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_is_told_to_its_worker() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("input_probe").await;
    for dry_run in [true, false] {
        let mut body = text("hi");
        body["dry_run"] = json!(dry_run);
        let (_, answer) = ann.submit("input_probe", "c-1", body).await;
        let input = ann.turn(answer["turn_id"].as_str().expect("its id")).completed().await;
        let input: Value = serde_json::from_str(&input).expect("the input");
        assert_eq!(input["dry_run"], dry_run);
    }
    eventually("nothing is live", async || host.live().await == Default::default()).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_turn_keeps_its_version_and_the_next_has_the_new_one() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    let settings = json!({ "limits": { "turn_timeout_ms": 20_000 } });
    ann.deploy_as("slow_reply", "agent", settings).await;
    // Longer than the uploads take.
    let running = ann.say("agent", "c-1", "4000").await;
    let waiting = ann.say("agent", "c-1", "hello").await;
    running.reaches("running").await;
    let (status, version) = ann.upload("slow_reply", turnhouse_workers::bytes("echo")).await;
    assert_eq!((status, &version["version"]), (StatusCode::CREATED, &json!(2)), "{version}");
    // The bytes of an existing version again are that version.
    let (status, version) = ann.upload("slow_reply", turnhouse_workers::bytes("slow_reply")).await;
    assert_eq!((status, &version["version"]), (StatusCode::OK, &json!(1)), "{version}");
    ann.set_agent("agent", "slow_reply", json!({ "version": 2 })).await;
    assert_eq!((running.completed().await.as_str(), &running.get().await["version"]), ("4000", &json!(1)));
    assert_eq!((waiting.completed().await.as_str(), &waiting.get().await["version"]), ("hello", &json!(2)));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_is_not_deleted_while_a_turn_lives_that_has_started_with_it() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("slow_reply", "agent", json!({})).await;
    ann.deploy("echo").await;
    let running = ann.say("agent", "c-1", "60000").await;
    running.reaches("running").await;
    let delete = async || ann.call(Method::DELETE, "/v1/workers/slow_reply").await;
    let in_use = |(status, problem): (StatusCode, Value), by: &str| {
        assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("worker_in_use")), "{problem}");
        assert!(problem["detail"].as_str().expect("a detail").contains(by), "{problem}");
    };
    in_use(delete().await, "agent agent");
    // Its agent runs another by now; the turn's version is still the one with which it started.
    ann.set_agent("agent", "echo", json!({})).await;
    in_use(delete().await, "a live turn");
    running.cancel().await;
    assert_eq!(running.ended().await["state"], "cancelled");
    assert_eq!(delete().await.0, StatusCode::NO_CONTENT);
    assert_eq!(delete().await.0, StatusCode::NOT_FOUND);
    assert_eq!(ann.say("agent", "c-1", "hi").await.completed().await, "hi");
    host.stop().await;
}
