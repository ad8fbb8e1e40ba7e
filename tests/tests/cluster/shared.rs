//! What PostgreSQL itself does for replicas: hints over its connections, sessions that it ends, a pooler before it. In every run, whichever store
//! the other tests have.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use turnhouse_tests::{Backing, Cluster, Setup};

fn setup(backing: Backing) -> Setup {
    Setup { backing, hints: true, ..Setup::default() }
}

/// A reader at a replica whose polls have no answer sees another one's turn to its end: by hints alone.
async fn a_reader_hears_by_hints_alone(cluster: &Cluster) {
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    let turn = ann.say("progress_slowly", "c-1", "6 ticks every 200").await;
    let at = cluster.started(&turn).await;
    let other = (at + 1) % cluster.replicas.len();
    cluster.replicas[other].store.blind();
    let (here, there) = (cluster.turn_at(at, &turn), cluster.turn_at(other, &turn));
    let reader = there.events(None).await;
    let (here, there) = tokio::join!(here.completed(), reader.all());
    assert_eq!(here, "tick ".repeat(6));
    let deltas = there.iter().filter(|event| event.kind == "output.delta").count();
    assert_eq!((deltas, there.last().expect("an end").id.as_str()), (6, "end"), "{there:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r5_the_databases_hints_reach_readers_on_another_replica() {
    let cluster = Cluster::start_with(2, setup(Backing::Shared)).await;
    a_reader_hears_by_hints_alone(&cluster).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r5_without_hints_whoever_polls_no_more_hears_nothing() {
    let cluster = Cluster::start_with(2, Setup { hints: false, ..setup(Backing::Shared) }).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    // A reader that was held up may look once more after the end, and then it has not heard of it: no busy machine does that five times.
    let mut heard = Vec::new();
    for n in 0..5 {
        let turn = ann.say("sleep_day", &format!("c-{n}"), "go").await;
        let at = cluster.started(&turn).await;
        cluster.replicas[1 - at].store.blind();
        let mut there = cluster.turn_at(1 - at, &turn).events(None).await;
        there.until("turn.started").await;
        cluster.turn_at(at, &turn).cancel().await;
        match tokio::time::timeout(Duration::from_secs(2), there.next()).await {
            Ok(event) => heard.push(event),
            Err(_) => break,
        }
    }
    assert!(heard.len() < 5, "so the other tests do show hints: {heard:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t1_r1_replicas_behind_a_pooler_do_the_same_and_hear_each_other_past_it() {
    let mut cluster = Cluster::start_with(3, setup(Backing::Pooled)).await;
    a_reader_hears_by_hints_alone(&cluster).await;
    let ann = cluster.member("acme", "bob", "admin").await;
    ann.deploy("snapshot_counter").await;
    ann.deploy("slow_reply").await;
    // More conversations than the pooler has sessions, over all replicas at once.
    let counts = join_all((0..8).map(|n| {
        let ann = cluster.at(n % 3, &ann);
        async move {
            let mut last = String::new();
            for _ in 0..4 {
                last = ann.say("snapshot_counter", &format!("c-{n}"), "more").await.completed().await;
            }
            last
        }
    }))
    .await;
    assert_eq!(counts, ["4"; 8]);
    let (running, behind) = (ann.say("slow_reply", "c-1", "600").await, ann.say("slow_reply", "c-1", "1").await);
    let at = cluster.started(&running).await;
    cluster.kill(at).await;
    assert_eq!(cluster.turn_at((at + 1) % 3, &running).completed().await, "600");
    assert_eq!(cluster.turn_at((at + 2) % 3, &behind).completed().await, "1");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_sessions_that_the_server_ends_lose_nothing() {
    let cluster = Cluster::start_with(2, setup(Backing::Shared)).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("snapshot_counter").await;
    ann.deploy("progress_slowly").await;
    let database = cluster.database().expect("it is PostgreSQL");
    let mut ended = 0;
    for round in 0..8 {
        let long = format!("{} ticks every 30", 4 + round);
        let (text, key) = (json!({ "message": { "text": long } }), format!("k-{round}"));
        // Whoever is told that the store is away comes again.
        let turn = loop {
            let (status, _, body) = ann.submit_keyed("progress_slowly", "c-1", &key, text.clone()).await;
            if status.is_success() {
                break ann.turn(body["turn_id"].as_str().expect("its id"));
            }
            assert_eq!((status.as_u16(), &body["code"]), (503, &json!("store_unavailable")), "{body}");
        };
        let readers = [turn.events(None).await, cluster.turn_at(1, &turn).events(None).await];
        tokio::time::sleep(Duration::from_millis(50)).await;
        ended += database.end_sessions();
        for reader in readers {
            let events = reader.all().await;
            let ends: Vec<_> = events.iter().filter(|event| event.is_terminal()).collect();
            assert_eq!((ends.len(), ends[0].kind.as_str()), (1, "turn.completed"), "{events:?}");
        }
        assert_eq!(turn.get().await["attempt"], 1, "nobody was taken for dead");
    }
    assert!(ended >= 8, "{ended} sessions");
    // The listeners are there again, too.
    let turn = ann.say("progress_slowly", "c-2", "8 ticks every 300").await;
    let other = 1 - cluster.started(&turn).await;
    cluster.replicas[other].store.blind();
    assert_eq!(cluster.turn_at(other, &turn).completed().await, "tick ".repeat(8));
    cluster.stop().await;
}
