//! Streams: a reader on any replica, and one that comes back at another, sees the same events, nothing twice, and one end.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;
use turnhouse::ids::OrgId;
use turnhouse::reader::Reader;
use turnhouse_tests::client::told;
use turnhouse_tests::{Cluster, Network, SeenEvent, Setup, Turn, eventually};

fn text(events: &[SeenEvent]) -> String {
    let deltas = events.iter().filter(|event| event.kind == "output.delta");
    deltas.map(|event| event.data["text"].as_str().expect("a text")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_a_reader_on_another_replica_sees_the_same_events() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    let turn = ann.say("progress_slowly", "c-1", "6 ticks every 200").await;
    let here = turn.events(None).await;
    let there = cluster.turn_at(1, &turn).events(None).await;
    let (here, there) = tokio::join!(here.all(), there.all());
    assert_eq!(told(here), told(there));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_a_client_that_changes_the_replica_after_every_event_misses_nothing() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    let turn = ann.say("progress_slowly", "c-1", "8 ticks every 60").await;
    let (mut seen, mut last): (Vec<SeenEvent>, Option<String>) = (Vec::new(), None);
    while last.as_deref() != Some("end") {
        let at = cluster.turn_at(seen.len() % 2, &turn);
        let event = at.events(last.as_deref()).await.next().await.expect("an event");
        last = Some(event.id.clone());
        seen.push(event);
    }
    // What one replica has told, the other waits for: no resync, nothing twice.
    assert_eq!(told(seen), told(turn.events(None).await.all().await));
    for replica in 0..2 {
        let end = cluster.turn_at(replica, &turn).events(Some("0.0")).await.all().await;
        assert_eq!(end.last().expect("an end").id, "end");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_whoever_waits_where_the_turn_was_accepted_hears_of_it_wherever_it_runs() {
    // The first replica has room for one turn only.
    let mut cluster = Cluster::start_with(0, Setup::default()).await;
    cluster.add_with(|config| config.limits.host_running_max = 1).await;
    cluster.add().await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    ann.deploy("progress_slowly").await;
    let long = ann.say("sleep_day", "c-1", "go").await;
    eventually("the first replica is full", async || cluster.runner_of(&long) == Some(0)).await;
    let began = Instant::now();
    let events = ann.stream("progress_slowly", "c-2", "3 ticks every 50").await.all().await;
    assert_eq!(
        (text(&events).as_str(), events.last().expect("an end").kind.as_str()),
        ("tick tick tick ", "turn.completed")
    );
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    long.cancel().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e3_a_stream_goes_on_over_a_takeover() {
    let mut cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    let turn = ann.say("progress_slowly", "c-1", "20 ticks every 100").await;
    let at = cluster.started(&turn).await;
    let (first, other) = (cluster.turn_at(at, &turn), cluster.turn_at(1 - at, &turn));
    let mut here = first.events(None).await;
    let there = other.events(None).await;
    let seen = here.until("output.delta").await;
    cluster.kill(at).await;
    let events = there.all().await;
    let restart = events.iter().position(|event| event.kind == "turn.restarted").expect("it begins anew");
    assert_eq!(events[restart].data["attempt"], 2);
    assert_eq!(text(&events[restart..]), "tick ".repeat(20), "what was said before is void");
    assert_eq!(events.last().expect("an end").kind, "turn.completed");
    // Whoever was at the dead replica goes on at the other.
    let rest = other.events(Some(&seen.id)).await.all().await;
    assert!(rest.iter().any(|event| event.kind == "turn.restarted"), "{rest:?}");
    assert_eq!(rest.iter().filter(|event| event.is_terminal()).count(), 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r5_a_hint_is_faster_than_the_poll_and_nothing_depends_on_it() {
    let mut delays = Vec::new();
    for hints in [true, false] {
        let cluster = Cluster::start_with(2, Setup { hints, ..Setup::default() }).await;
        let ann = cluster.member("acme", "ann", "admin").await;
        ann.deploy("sleep_day").await;
        let mut slowest = Duration::ZERO;
        for n in 0..5 {
            let turn = ann.say("sleep_day", &format!("c-{n}"), "go").await;
            let at = cluster.started(&turn).await;
            let mut there = cluster.turn_at(1 - at, &turn).events(None).await;
            there.until("turn.started").await;
            // Past the first look, which always wakes.
            tokio::time::sleep(Duration::from_millis(600)).await;
            cluster.turn_at(at, &turn).cancel().await;
            let told = Instant::now();
            assert!(there.next().await.expect("its end").is_terminal());
            slowest = slowest.max(told.elapsed());
        }
        delays.push(slowest);
        cluster.stop().await;
    }
    println!("told on another replica within {delays:?}");
    assert!(delays[0] < Duration::from_millis(400), "with hints: {delays:?}");
    assert!(delays[1] < Duration::from_secs(5), "without: {delays:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e6_five_thousand_idle_readers_of_turns_that_run_elsewhere_share_their_looks() {
    const TURNS: usize = 500;
    const READERS: usize = 5_000;
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let mut turns = Vec::new();
    for some in 0..TURNS / 50 {
        let say = |n: usize| {
            let ann = ann.clone();
            async move { ann.say("sleep_day", &format!("c-{}", some * 50 + n), "go").await }
        };
        turns.extend(join_all((0..50).map(say)).await);
    }
    // Both replicas are full; the rest waits. Readers at the second, of what it does not run.
    eventually("both are full", async || cluster.live().await.running == 32).await;
    let host = &cluster.replicas[1].host;
    let org: OrgId = "acme".parse().expect("an org");
    let elsewhere: Vec<&Turn> = turns.iter().filter(|turn| cluster.runner_of(turn) != Some(1)).collect();
    let mut readers: Vec<Reader> = (0..READERS)
        .map(|n| {
            let turn = elsewhere[n % elsewhere.len()].id.parse().expect("a turn id");
            Reader::new(host, org.clone(), turn, None)
        })
        .collect();
    let stop = CancellationToken::new();
    let reading = join_all(readers.iter_mut().map(|reader| {
        let stop = stop.clone();
        async move {
            loop {
                match stop.run_until_cancelled(reader.next()).await {
                    Some(event) => assert!(!event.expect("the store answers").expect("it goes on").kind.is_empty()),
                    None => return,
                }
            }
        }
    }));
    let measured = async {
        // Until everybody has read what there is, and each turn has been looked at once.
        let reads = || cluster.replicas[1].store.reads();
        // Three times in a row: on a busy machine one second may pass without anything.
        let calm = std::cell::Cell::new(0);
        eventually("they are idle", async || {
            let before = reads();
            tokio::time::sleep(Duration::from_secs(1)).await;
            calm.set(if (1..40).contains(&(reads() - before)) { calm.get() + 1 } else { 0 });
            calm.get() == 3
        })
        .await;
        let before = reads();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let asked = elsewhere.iter().map(|turn| (org.clone(), turn.id.parse().expect("an id"))).collect::<Vec<_>>();
        let (began, rounds) = (Instant::now(), 20);
        for _ in 0..rounds {
            assert!(cluster.store().progress(&asked).await.expect("the store answers").iter().all(Option::is_some));
        }
        println!("{} turns looked at in {:?}", asked.len(), began.elapsed() / rounds);
        stop.cancel();
        reads() - before
    };
    let (reads, _) = tokio::join!(measured, reading);
    // Four looks at all of them, eight sweeps and a few more. Were each reader to poll, it would be 20 000.
    assert!(reads < 80, "{reads} reads in two seconds");
    assert!(!host.dispatch.watch.is_empty());
    drop(readers);
    assert!(host.dispatch.watch.is_empty(), "nobody waits any more");
    for some in turns.chunks(50) {
        join_all(some.iter().rev().map(Turn::cancel)).await;
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_a_stream_outlives_a_store_that_goes_away_for_a_while() {
    let cluster = Cluster::start(2).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    let turn = ann.say("progress_slowly", "c-1", "30 ticks every 50").await;
    let mut here = turn.events(None).await;
    let there = cluster.turn_at(1, &turn).events(None).await;
    here.until("output.delta").await;
    (0..2).for_each(|replica| cluster.network(replica, Network::Cut));
    tokio::time::sleep(Duration::from_millis(800)).await;
    (0..2).for_each(|replica| cluster.network(replica, Network::Fine));
    let (here, there) = tokio::join!(here.all(), there.all());
    for events in [&here, &there] {
        assert_eq!(events.last().expect("an end").kind, "turn.completed", "{events:?}");
    }
    assert_eq!(text(&there), "tick ".repeat(30), "what could not be written at first was written later");
    cluster.stop().await;
}
