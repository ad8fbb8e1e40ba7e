//! Replicas that die, hang, wake up late, lose answers or the time: every turn still has its one end, and conversations go on.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use turnhouse_tests::{Cluster, Network, Setup, Turn, eventually};

/// Of a cluster's replicas.
const TTL: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r1_the_turns_of_a_killed_replica_run_elsewhere_within_its_ttl() {
    let mut cluster = Cluster::start(3).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    ann.deploy("snapshot_counter").await;
    assert_eq!(ann.say("snapshot_counter", "c-1", "x").await.completed().await, "1");
    let running = ann.say("slow_reply", "c-1", "800").await;
    let behind = ann.say("slow_reply", "c-1", "1").await;
    let at = cluster.started(&running).await;
    let others = [(at + 1) % 3, (at + 2) % 3];
    let killed = Instant::now();
    cluster.kill(at).await;
    let there = [cluster.turn_at(others[0], &running), cluster.turn_at(others[1], &behind)];
    there[0].reaches("running").await;
    eventually("it runs elsewhere", async || cluster.runner_of(&running).is_some()).await;
    assert!(killed.elapsed() < TTL + Duration::from_secs(2), "{:?}", killed.elapsed());
    assert_eq!(join_all(there.iter().map(Turn::completed)).await, ["800", "1"]);
    assert_eq!(there[0].get().await["attempt"], 2);
    assert_eq!(there[1].get().await["attempt"], 1);
    let next = cluster.at(others[0], &ann).say("snapshot_counter", "c-1", "x").await;
    assert_eq!(next.completed().await, "2", "the chain goes on");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r2_a_replica_that_cannot_reach_the_store_steps_down_before_others_take_over() {
    for network in [Network::Hung, Network::Cut] {
        let cluster = Cluster::start(2).await;
        let ann = cluster.member("acme", "ann", "admin").await;
        ann.deploy("progress_slowly").await;
        let turn = ann.say("progress_slowly", "c-1", "60 ticks every 100").await;
        let at = cluster.started(&turn).await;
        let dispatch = cluster.replicas[at].host.dispatch.clone();
        let there = cluster.replicas[1 - at].host.dispatch.clone();
        let first = dispatch.replica();
        let mut here = cluster.turn_at(at, &turn).events(None).await;
        here.until("output.delta").await;
        cluster.network(at, network);
        let cut = Instant::now();
        let id = turn.id.parse().expect("an id");
        eventually("its guest stops", async || {
            let taken = there.tracked(id).is_some();
            let stopped = dispatch.tracked(id).is_none_or(|running| running.control.stopped().is_some());
            assert!(stopped || !taken, "two replicas run it at once");
            stopped
        })
        .await;
        let stopped = cut.elapsed();
        eventually("another takes it over", async || there.tracked(id).is_some()).await;
        println!("{network:?}: stopped after {stopped:?}, taken over after {:?}", cut.elapsed());
        assert!(cut.elapsed() >= TTL - Duration::from_millis(600), "it was not given up early: {:?}", cut.elapsed());
        cluster.network(at, Network::Fine);
        // Its reader has stayed, and hears of the rest.
        let rest = here.all().await;
        assert!(rest.iter().any(|event| event.kind == "turn.restarted"), "{rest:?}");
        assert_eq!(rest.last().expect("an end").kind, "turn.completed");
        eventually("a new incarnation", async || dispatch.replica() != first).await;
        eventually("it may claim again", async || dispatch.may_claim()).await;
        let ann = cluster.at(at, &ann);
        assert_eq!(ann.say("progress_slowly", "c-2", "1 ticks every 1").await.completed().await, "tick ");
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t10_a_turn_that_loses_every_host_ends_and_its_conversation_goes_on() {
    let mut cluster =
        Cluster::start_with(4, Setup { change: |config| config.limits.attempts_max = 2, ..Setup::default() }).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let poison = ann.say("slow_reply", "c-1", "30000").await;
    let next = ann.say("slow_reply", "c-1", "2").await;
    for _ in 0..2 {
        let runner = cluster.started(&poison).await;
        cluster.kill(runner).await;
    }
    let left = cluster.replicas.iter().position(|replica| !replica.ended).expect("two are left");
    let at = cluster.turn_at(left, &poison);
    assert_eq!(at.failed().await, "attempts_exhausted");
    assert_eq!(cluster.turn_at(left, &next).completed().await, "2");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r6_a_drain_hands_over_to_the_others_without_spending_an_attempt() {
    let mut cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let turns = join_all((0..4).map(|n| {
        let ann = ann.clone();
        async move { ann.say("slow_reply", &format!("c-{n}"), "3000").await }
    }))
    .await;
    // Four of them, at two replicas: one has at least two.
    let mut at = [0, 0];
    for turn in &turns {
        at[cluster.started(turn).await] += 1;
    }
    let drained = usize::from(at[1] > at[0]);
    let left = 1 - drained;
    let began = Instant::now();
    cluster.drain(drained).await;
    for turn in &turns {
        eventually("it runs at the other", async || cluster.runner_of(turn) == Some(left)).await;
    }
    // Long before the TTL of a lost replica, which would have cost an attempt.
    println!("handed over after {:?}", began.elapsed());
    for turn in &turns {
        let turn = cluster.turn_at(left, turn);
        assert_eq!(turn.completed().await, "3000");
        assert_eq!(turn.get().await["attempt"], 1);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r6_a_drain_ends_in_time_while_the_store_hangs() {
    let mut cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let turn = ann.say("slow_reply", "c-1", "4000").await;
    let at = cluster.started(&turn).await;
    cluster.network(at, Network::Hung);
    let began = Instant::now();
    cluster.drain(at).await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(cluster.turn_at(1 - at, &turn).completed().await, "4000");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r9_a_claim_whose_answer_was_lost_is_run_all_the_same() {
    let cluster = Cluster::start(1).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    cluster.network(0, Network::AnswersLost);
    let body = json!({ "message": { "text": "1" } });
    let (status, _, problem) = ann.submit_keyed("slow_reply", "c-1", "k-1", body.clone()).await;
    assert_eq!((status.as_u16(), &problem["code"]), (503, &json!("store_unavailable")), "{problem}");
    // Claimed, too; or given back since by whoever looks after such claims.
    let live = cluster.live().await;
    assert_eq!(live.running + live.ready, 1, "it was accepted, and nobody knows: {live:?}");
    cluster.network(0, Network::Fine);
    let (status, replayed, body) = ann.submit_keyed("slow_reply", "c-1", "k-1", body).await;
    assert!(status.is_success() && replayed, "{status}: {body}");
    let turn = ann.turn(body["turn_id"].as_str().expect("its id"));
    let began = Instant::now();
    assert_eq!(turn.completed().await, "1");
    assert!(began.elapsed() < Duration::from_secs(10), "not by its deadline: {:?}", began.elapsed());
    assert_eq!(turn.get().await["attempt"], 1, "no attempt is spent");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t1_an_end_whose_answer_was_lost_is_told_once() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let turn = ann.say("slow_reply", "c-1", "700").await;
    let at = cluster.started(&turn).await;
    let (here, there) = (cluster.turn_at(at, &turn), cluster.turn_at(1 - at, &turn));
    let streams = [here.events(None).await, there.events(None).await];
    cluster.network(at, Network::AnswersLost);
    eventually("it has ended in the store", async || cluster.live().await.running == 0).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.network(at, Network::Fine);
    for stream in streams {
        let events = stream.all().await;
        assert_eq!(events.iter().filter(|event| event.is_terminal()).count(), 1, "{events:?}");
        assert_eq!(events.last().expect("an end").data["reply"]["text"], "700");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_a_store_that_goes_away_loses_nothing_and_clients_are_told_to_come_back() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("slow_reply").await;
    let turns = join_all((0..6).map(|n| {
        let ann = cluster.at(n % 2, &ann);
        async move { ann.say("slow_reply", &format!("c-{n}"), "400").await }
    }))
    .await;
    (0..2).for_each(|replica| cluster.network(replica, Network::Cut));
    let body = json!({ "message": { "text": "1" } });
    let response = ann
        .request(reqwest::Method::POST, &turnhouse_tests::Client::turns("slow_reply", "c-9"))
        .json(&body)
        .send()
        .await
        .expect("an answer");
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert_eq!(ann.get("/readyz").await.0, 503);
    // Longer than the TTL: everybody steps down.
    tokio::time::sleep(TTL + Duration::from_millis(500)).await;
    (0..2).for_each(|replica| cluster.network(replica, Network::Fine));
    for turn in &turns {
        assert_eq!(turn.completed().await, "400");
    }
    eventually("it is ready again", async || ann.get("/readyz").await.0 == 200).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_a_worker_that_reads_an_attachment_waits_for_a_store_that_is_away() {
    let cluster = Cluster::start(1).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("attachment").await;
    let file = ann.attach("text/plain", "one two three").await;
    let parts =
        json!([{"type": "text", "text": "after 600"}, {"type": "attachment", "attachment_id": file, "name": "a"}]);
    let (status, body) = ann.submit("attachment", "c-1", json!({ "message": { "parts": parts } })).await;
    assert_eq!(status, 202, "{body}");
    let turn = ann.turn(body["turn_id"].as_str().expect("its id"));
    turn.events(None).await.until("operation.started").await;
    cluster.network(0, Network::Cut);
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    cluster.network(0, Network::Fine);
    assert_eq!(turn.completed().await, "a: text/plain, 13 bytes, 3 words\n");
    assert_eq!(turn.get().await["attempt"], 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r3_clocks_ten_minutes_apart_change_nothing() {
    const MINUTES_10: i64 = 600_000;
    for tells_time in [true, false] {
        let setup = Setup { tells_time, skews_ms: vec![MINUTES_10, -MINUTES_10], ..Setup::default() };
        let mut cluster = Cluster::start_with(2, setup).await;
        let ann = cluster.member("acme", "ann", "admin").await;
        ann.deploy("slow_reply").await;
        ann.deploy_as("sleep_day", "short", json!({ "limits": { "turn_timeout_ms": 1500 } })).await;
        for replica in 0..2 {
            let ann = cluster.at(replica, &ann);
            let turn = ann.say("slow_reply", &format!("c-{replica}"), "500").await;
            assert_eq!(turn.completed().await, "500", "no clock ends it before its time");
            let began = Instant::now();
            assert_eq!(ann.say("short", &format!("c-{replica}"), "go").await.failed().await, "turn_timeout");
            assert!((1_400..8_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
        }
        let turn = ann.say("slow_reply", "c-3", "1500").await;
        let runner = cluster.started(&turn).await;
        let killed = Instant::now();
        cluster.kill(runner).await;
        assert_eq!(cluster.turn_at(1 - runner, &turn).completed().await, "1500");
        assert!(
            killed.elapsed() >= Duration::from_millis(2_000),
            "nobody took it for dead too soon: {:?}",
            killed.elapsed()
        );
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_what_was_said_while_the_store_was_away_is_in_the_log_before_the_end() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    let conversations: Vec<String> = (0..12).map(|n| format!("c-{n}")).collect();
    let turns = conversations.iter().map(|id| ann.say("progress_slowly", id, "30 ticks every 20"));
    let turns: Vec<Turn> = join_all(turns).await;
    for turn in &turns {
        cluster.started(turn).await;
    }
    for _ in 0..12 {
        cluster.network(0, Network::Cut);
        tokio::time::sleep(Duration::from_millis(55)).await;
        cluster.network(0, Network::Fine);
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    for turn in &turns {
        // From the log alone: the other replica has heard none of it.
        let there = cluster.turn_at(1, turn);
        let reply = there.completed().await;
        let events = there.events(None).await.all().await;
        let deltas = events.iter().filter(|event| event.kind == "output.delta");
        let said: String = deltas.map(|event| event.data["text"].as_str().expect("a text").to_owned()).collect();
        assert_eq!(said, reply);
    }
    cluster.stop().await;
}
