//! Many hostile guests at once, and one neighbour.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;

use crate::arena::{Arena, SHORT, neighbour};

/// As many at once as an org may have on this host, of every kind that uses up one thing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_of_hostile_guests_leaves_their_neighbour_its_turns() {
    let arena = Arena::open(SHORT).await;
    let crowd =
        ["spin", "copy_memory", "many_tables", "poll_tricks", "memory_bomb", "huge_text", "stdout_flood", "wasi_loop"];
    for guest in crowd {
        arena.deploy(guest).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let neighbour = tokio::spawn(neighbour(arena.ann.clone(), stop.clone()));
    let ends = join_all((0..64).map(|n| {
        let (mallory, guest) = (arena.mallory.clone(), crowd[n % crowd.len()]);
        async move {
            let turn = mallory.say(guest, &format!("c-{n}"), "0").await;
            let ended = turn.ended().await;
            assert_eq!(ended["state"], "failed", "{guest}: {ended}");
            assert_ne!(ended["failure"]["code"], "internal", "{guest}: {ended}");
        }
    }));
    ends.await;
    stop.store(true, Ordering::Relaxed);
    let mut times = neighbour.await.expect("every turn of the neighbour is answered");
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1_000.0;
    println!(
        "{} turns of the neighbour beside 64 hostile ones: p50 {:.1} ms, the slowest {:.1} ms",
        times.len(),
        ms(times[times.len() / 2]),
        ms(times[times.len() - 1])
    );
    arena.settled().await;
    arena.host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guests_with_all_the_tables_that_they_may_have_leave_their_neighbour_one() {
    let arena = Arena::open(SHORT).await;
    arena.deploy("many_tables").await;
    // All slots but one, for as long as nothing happens to be let.
    let running = arena.host.host.config.limits.host_running_max - 1;
    let turns = join_all((0..running).map(|n| {
        let mallory = arena.mallory.clone();
        async move { mallory.say("many_tables", &format!("c-{n}"), "go").await }
    }))
    .await;
    neighbour(arena.ann.clone(), Arc::new(AtomicBool::new(true))).await;
    for turn in &turns {
        // Not `internal`: there was an instance for each.
        assert_eq!(turn.failed().await, "idle_timeout");
    }
    arena.settled().await;
    arena.host.stop().await;
}
