//! Limits of an org: its rate, its bounds on turns and its processor time, over whoever writes.

use super::*;
use crate::admission::Refusal;
use crate::audit::{AuditFilter, Verb};
use crate::quota::{Exceeded, LimitName, LimitOf, LimitsChange, OwnLimits, WINDOW_MS};

async fn limit(world: &World, of: &str, change: LimitsChange) -> OwnLimits {
    world.store.set_org_limits(&org(of), &change, world.now(), &by()).await.unwrap().expect("there is the org")
}

fn rate(per_second: f64, burst: u32) -> LimitsChange {
    LimitsChange {
        submits_per_second: Some(Some(per_second)),
        submit_burst: Some(Some(burst)),
        ..LimitsChange::default()
    }
}

fn running(max: Option<u32>) -> LimitsChange {
    LimitsChange { running_max: Some(max), ..LimitsChange::default() }
}

async fn refusal(world: &World, message: Accept) -> Refusal {
    let turn = message.turn;
    let of = message.org.clone();
    match world.accept(message).await {
        AcceptResult::Refused(refusal) => {
            assert!(world.store.turn(&of, turn).await.unwrap().is_none(), "nothing is stored");
            refusal
        }
        other => panic!("not refused: {other:?}"),
    }
}

fn too_fast(max: f64, wait_ms: u64) -> Refusal {
    Refusal::Exceeded(Exceeded { of: LimitOf::Org, limit: LimitName::SubmitsPerSecond, max, wait_ms: Some(wait_ms) })
}

pub(in crate::store) async fn o3_an_orgs_messages_come_at_its_rate(world: &World) {
    limit(world, "acme", rate(2.0, 3)).await;
    for lane in ["a", "b", "c"] {
        world.submit(world.message(lane)).await;
    }
    assert_eq!(refusal(world, world.message("d")).await, too_fast(2.0, 500));
    world.submit(world.message_of_zeta("d")).await;
    world.advance_ms(200);
    assert_eq!(refusal(world, world.message("d")).await, too_fast(2.0, 300), "a refusal costs nothing");
    world.advance_ms(300);
    world.submit(world.message("d")).await;
    assert_eq!(refusal(world, world.message("e")).await, too_fast(2.0, 500));
    world.advance_ms(60_000);
    for _ in 0..3 {
        world.submit(world.message("e")).await;
    }
    assert_eq!(refusal(world, world.message("e")).await, too_fast(2.0, 500), "a pause fills the bucket once");
    // From the next message on.
    limit(world, "acme", rate(1_000.0, 3)).await;
    world.advance_ms(1);
    world.submit(world.message("e")).await;
    limit(world, "acme", LimitsChange { submits_per_second: Some(None), ..LimitsChange::default() }).await;
    for _ in 0..9 {
        world.submit(world.message("e")).await;
    }
}

pub(in crate::store) async fn o3_a_rate_is_one_for_a_batch_and_what_joins_counts(world: &World) {
    limit(world, "acme", rate(1.0, 4)).await;
    let batch = ["a", "b", "c"].map(|lane| Write::Accept(Box::new(world.message(lane))));
    let written = world.batch(batch.to_vec()).await;
    assert!(written.iter().all(|answer| matches!(answer, Written::Accept(AcceptResult::Accepted { .. }))));
    let waiting = world.submit(collecting(world.message("a"), 9)).await;
    assert_eq!(refusal(world, collecting(world.message("a"), 9)).await, too_fast(1.0, 1_000), "what would join");
    let batch = ["d", "e"].map(|lane| Write::Accept(Box::new(world.message(lane))));
    world.advance_ms(1_000);
    let written = world.batch(batch.to_vec()).await;
    assert!(matches!(&written[0], Written::Accept(AcceptResult::Accepted { .. })));
    assert!(matches!(&written[1], Written::Accept(AcceptResult::Refused(refusal)) if *refusal == too_fast(1.0, 1_000)));
    world.advance_ms(1_000);
    let joined = world.accept(collecting(world.message("a"), 9)).await;
    assert!(matches!(joined, AcceptResult::Joined(turn) if turn == waiting));
    assert_eq!(refusal(world, world.message("f")).await, too_fast(1.0, 1_000), "what joined took a token");
}

pub(in crate::store) async fn o3_a_conversation_that_is_made_counts_as_a_message(world: &World) {
    limit(world, "acme", rate(2.0, 2)).await;
    let open = async |of: &str, id: &str| {
        let (of, id) = (org(of), conversation(id));
        world.store.open_conversation(&of, &agent(), &id, &user("ann"), world.now()).await.unwrap()
    };
    let refused = |opening: Opening| match opening {
        Opening::Refused(exceeded) => Refusal::Exceeded(exceeded),
        other => panic!("not refused: {other:?}"),
    };
    assert!(matches!(open("acme", "a").await, Opening::Made(_)));
    world.submit(world.message("b")).await;
    assert_eq!(refused(open("acme", "c").await), too_fast(2.0, 500), "the message took the other token");
    assert_eq!(refusal(world, world.message("a")).await, too_fast(2.0, 500), "it is one bucket");
    assert!(world.store.conversation(&org("acme"), &agent(), &conversation("c")).await.unwrap().is_none());
    for _ in 0..3 {
        assert!(matches!(open("acme", "a").await, Opening::Found(_)), "what is there costs nothing");
    }
    assert!(matches!(open("zeta", "c").await, Opening::Made(_)), "nobody else waits");
    world.advance_ms(500);
    assert!(matches!(open("acme", "c").await, Opening::Made(_)));
    assert_eq!(refused(open("acme", "d").await), too_fast(2.0, 500));
    // Nor where the org has stored what it may.
    let full =
        LimitsChange { submits_per_second: Some(None), storage_bytes_max: Some(Some(1)), ..LimitsChange::default() };
    limit(world, "acme", full).await;
    while world.store.measure_storage(world.now()).await.unwrap().is_some() {}
    let Refusal::Exceeded(exceeded) = refused(open("acme", "d").await) else { unreachable!() };
    assert_eq!((exceeded.limit, exceeded.max), (LimitName::StorageBytesMax, 1.0));
    assert!(exceeded.wait_ms.is_some_and(|wait| wait > 0));
    assert!(matches!(open("acme", "a").await, Opening::Found(_)));
}

pub(in crate::store) async fn o3_what_was_accepted_before_costs_nothing(world: &World) {
    limit(world, "acme", rate(1.0, 2)).await;
    let keyed = Accept { key: Some(("k".to_owned(), [1; 32])), ..world.message("c") };
    world.submit(keyed.clone()).await;
    for _ in 0..5 {
        let again = Accept { turn: TurnId::new(), ..keyed.clone() };
        assert!(matches!(world.accept(again).await, AcceptResult::Attached(turn) if turn == keyed.turn));
    }
    let last = world.message("d");
    world.submit(last.clone()).await;
    assert_eq!(refusal(world, world.message("e")).await, too_fast(1.0, 1_000));
    let again = Accept { turn: TurnId::new(), ..keyed.clone() };
    assert!(matches!(world.accept(again).await, AcceptResult::Attached(_)), "also with an empty bucket");
    assert!(matches!(world.accept(last).await, AcceptResult::Attached(_)), "the journal's own retry is no message");
    let other = Accept { turn: TurnId::new(), key: Some(("k".to_owned(), [2; 32])), ..keyed };
    assert_eq!(refusal(world, other).await, Refusal::IdempotencyMismatch);
    let busy = Accept { on_busy: OnBusy::Reject, ..world.message("c") };
    assert!(matches!(refusal(world, busy).await, Refusal::ConversationBusy { .. }));
    world.advance_ms(1_000);
    world.submit(world.message("e")).await;
}

pub(in crate::store) async fn o3_an_orgs_own_bound_holds_for_claims_and_fused_starts(world: &World) {
    limit(world, "acme", running(Some(2))).await;
    let fused = |message: Accept| Accept { claim_for: Some((world.replica, RunningBound(3))), ..message };
    let started = async |message: Accept| {
        matches!(world.accept(fused(message)).await, AcceptResult::Accepted { claimed: Some(_), .. })
    };
    assert!(started(world.message("a")).await && started(world.message("b")).await);
    assert!(!started(world.message("c")).await, "its own bound is lower than everybody's");
    assert!(started(world.message_of_zeta("a")).await, "what may not run is in nobody's way");
    let claim =
        async || world.claim_with(ClaimRequest { org_running_max: RunningBound(3), ..world.claim_request(9) }).await;
    assert!(claim().await.is_empty());
    // Higher than everybody's, from the next batch on.
    limit(world, "acme", running(Some(4))).await;
    world.submit(world.message("d")).await;
    world.submit(world.message("e")).await;
    assert_eq!(claim().await.len(), 2);
    limit(world, "acme", running(None)).await;
    assert!(claim().await.is_empty());
    assert!(started(world.message_of_zeta("b")).await);
    limit(world, "acme", running(Some(5))).await;
    assert!(!started(world.message_of_zeta("c")).await, "something older may run now");
    assert_eq!(claim().await.len(), 1 + 1, "one of each org");
}

pub(in crate::store) async fn o3_an_orgs_own_queue_is_bounded(world: &World) {
    let bounds = QueueBounds { org_queue_max: 2, ..BOUNDS };
    let message = |lane: &str| Accept { bounds, ..world.message(lane) };
    let queue = |max| LimitsChange { queue_max: Some(max), ..LimitsChange::default() };
    limit(world, "acme", queue(Some(1))).await;
    let first = world.submit(message("a")).await;
    assert_eq!(refusal(world, message("b")).await, Refusal::OrgQueueFull { max: 1 });
    limit(world, "acme", queue(Some(3))).await;
    world.submit(message("b")).await;
    world.submit(message("c")).await;
    assert_eq!(refusal(world, message("d")).await, Refusal::OrgQueueFull { max: 3 });
    limit(world, "acme", queue(None)).await;
    world.cancel(first).await;
    assert_eq!(refusal(world, message("d")).await, Refusal::OrgQueueFull { max: 2 });
    limit(world, "acme", queue(Some(0))).await;
    assert_eq!(refusal(world, message("d")).await, Refusal::OrgQueueFull { max: 0 });
    world.submit(Accept { bounds, ..world.message_of_zeta("a") }).await;
}

/// Whoever interrupts their own turns, deletes them, or has another host end them, has used what they used.
pub(in crate::store) async fn o3_processor_time_counts_however_a_turn_ends(world: &World) {
    let change = LimitsChange { cpu_ms_per_hour: Some(Some(100)), ..LimitsChange::default() };
    limit(world, "acme", change).await;
    let add = async |turn: TurnId, cpu_ms: f64| {
        world.store.add_usage(&org("acme"), &agent(), turn, &used(cpu_ms), world.now()).await.unwrap()
    };
    let meter = async || {
        let found = world.store.org_use(&org("acme"), world.now()).await.unwrap().unwrap();
        found.meters.cpu_ms(found.at)
    };
    let running = world.submit_and_start(world.message("a")).await.lease.turn;
    assert!(!add(running, 5.0).await, "it has not ended, and will tell by itself");
    world.submit(Accept { on_busy: OnBusy::Interrupt, ..world.message("a") }).await;
    world.claim_one().await;
    assert!(add(running, 40.0).await);
    assert!(!add(running, 40.0).await, "once");
    assert_eq!(world.record(running).await.usage, Some(used(40.0)), "and is told of the turn");
    let deleted = world.submit_and_start(world.message("b")).await.lease.turn;
    let conversation = "b".parse().unwrap();
    world.store.delete_conversation(&org("acme"), &agent(), &conversation, None, world.now(), &by()).await.unwrap();
    assert!(add(deleted, 59.0).await);
    assert_eq!(meter().await, 99.0);
    let told = world.submit_and_start(world.message("c")).await;
    let commit = Commit { usage: Some(used(1.0)), ..world.commit(&told, replied("done")) };
    assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
    assert!(!add(told.lease.turn, 50.0).await, "its end has told it");
    assert_eq!(meter().await, 100.0);
    assert!(matches!(refusal(world, world.message("d")).await, Refusal::Exceeded(_)));
    let gone = world.store.add_usage(&org("nobody"), &agent(), TurnId::new(), &used(1.0), world.now()).await.unwrap();
    assert!(!gone, "of no org");
}

pub(in crate::store) async fn o3_processor_time_is_bounded_by_the_hour(world: &World) {
    let change = LimitsChange { cpu_ms_per_hour: Some(Some(100)), ..LimitsChange::default() };
    limit(world, "acme", change).await;
    let end = async |claimed: Claimed, cpu_ms: f64| {
        let commit = Commit { usage: Some(used(cpu_ms)), ..world.commit(&claimed, replied("done")) };
        assert!(matches!(world.end(commit.clone()).await, CommitResult::Won(_)));
        assert!(matches!(world.end(commit).await, CommitResult::Lost), "and is counted once");
    };
    let start = async || world.submit_and_start(world.message("a")).await;
    end(start().await, 60.0).await;
    end(start().await, 39.5).await;
    let running = start().await;
    let queued = world.submit(world.message("b")).await;
    end(running, 10.0).await;
    let left = (WINDOW_MS - world.now().0 % WINDOW_MS).unsigned_abs();
    let used_up = Refusal::Exceeded(Exceeded {
        of: LimitOf::Org,
        limit: LimitName::CpuMsPerHour,
        max: 100.0,
        wait_ms: Some(left),
    });
    assert_eq!(refusal(world, world.message("a")).await, used_up);
    assert_eq!(world.claim_one().await.lease.turn, queued, "what was accepted runs");
    world.submit(world.message_of_zeta("a")).await;
    world.advance_ms(left - 1);
    assert!(matches!(refusal(world, world.message("a")).await, Refusal::Exceeded(_)));
    world.advance_ms(1);
    let found = world.store.org_use(&org("acme"), world.now()).await.unwrap().unwrap();
    assert_eq!(found.meters.cpu_ms(found.at), 0.0);
    let free = world.submit(world.message("c")).await;
    assert_eq!(world.state(free).await, TurnState::Queued);
}

pub(in crate::store) async fn o3_a_limit_is_its_orgs_own_and_written_down(world: &World) {
    let change = LimitsChange { queue_max: Some(Some(7)), ..rate(0.5, 2) };
    let own = limit(world, "acme", change).await;
    let expected =
        OwnLimits { submits_per_second: Some(0.5), submit_burst: Some(2), queue_max: Some(7), ..OwnLimits::default() };
    assert_eq!(own, expected);
    assert_eq!(limit(world, "acme", change).await, expected, "what changes nothing is not told");
    let back = limit(world, "acme", LimitsChange { queue_max: Some(None), ..LimitsChange::default() }).await;
    assert_eq!(back, OwnLimits { queue_max: None, ..expected });
    let of = async |id: &str| world.store.org_use(&org(id), world.now()).await.unwrap().map(|found| found.own);
    assert_eq!((of("acme").await, of("zeta").await), (Some(back), Some(OwnLimits::default())));
    assert_eq!(of("nowhere").await, None);
    assert!(world.store.set_org_limits(&org("nowhere"), &change, world.now(), &by()).await.unwrap().is_none());
    let told = async |id: &str| {
        let filter = AuditFilter::Verb(Verb::OrgLimits);
        world.store.audit(Some(&org(id)), &filter, Timestamp(0), None, 9).await.unwrap().items
    };
    let acts = told("acme").await;
    assert_eq!((acts.len(), told("zeta").await.len()), (2, 0));
    let mut details: Vec<_> = acts.iter().map(|act| act.detail.clone()).collect();
    details.sort_by_key(|detail| detail["to"]["queue_max"].is_null());
    assert_eq!(details[0]["to"], serde_json::json!({"submits_per_second": 0.5, "submit_burst": 2, "queue_max": 7}));
    assert_eq!(details[1], serde_json::json!({"from": {"queue_max": 7}, "to": {"queue_max": null}}));
}

pub(in crate::store) async fn what_is_used_is_told(world: &World) {
    let change = LimitsChange { cpu_ms_per_hour: Some(Some(1_000)), ..rate(1.0, 5) };
    limit(world, "acme", change).await;
    let claimed = world.submit_and_start(world.message("a")).await;
    let commit = Commit { usage: Some(used(12.5)), ..world.commit(&claimed, replied("done")) };
    world.end(commit).await;
    world.submit_and_start(world.message("a")).await;
    world.submit(world.message("a")).await;
    world.submit(world.message("b")).await;
    let found = world.store.org_use(&org("acme"), world.now()).await.unwrap().unwrap();
    assert_eq!((found.live.waiting, found.live.ready, found.live.running, found.at), (1, 1, 1, world.now()));
    let quota = crate::quota::Quota::from(&crate::limits::Limits::default()).narrowed(&found.own);
    assert_eq!((found.meters.tokens(&quota, found.at), found.meters.cpu_ms(found.at)), (1.0, 12.5));
    let other = world.store.org_use(&org("zeta"), world.now()).await.unwrap().unwrap();
    assert_eq!((other.meters.bucket, other.meters.cpu_ms, other.live.running), (None, 0.0, 0));
}
