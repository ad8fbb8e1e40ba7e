//! Bounds of an agent's own: its rate, its queue, its processor time, and how many of its turns run, over whoever writes. What is over the last is held.

use super::*;
use crate::admission::Refusal;
use crate::agent::AgentLimits;
use crate::quota::{
    Exceeded, FULL_MEASURED_EVERY_MS, LimitName, LimitOf, LimitsChange, MEASURED_EVERY_MS, TURN_BYTES, WINDOW_MS,
};

/// An agent of acme's without bounds.
const FREE: &str = "free";

async fn set(world: &World, limits: AgentLimits) {
    let settings = AgentSettings { limits, ..AgentSettings::of(worker()) };
    let put = world.store.put_agent(&org("acme"), &agent(), settings, 3, world.now(), &by()).await.unwrap();
    assert!(matches!(put, PutAgent::Stored { .. }));
    let free = AgentSettings::of(worker());
    world.store.put_agent(&org("acme"), &AgentId::parse(FREE).unwrap(), free, 3, world.now(), &by()).await.unwrap();
}

fn running(max: u32) -> AgentLimits {
    AgentLimits { running_max: Some(max), ..AgentLimits::default() }
}

fn to_free(message: Accept) -> Accept {
    Accept { agent: AgentId::parse(FREE).unwrap(), ..message }
}

fn fused(world: &World, message: Accept) -> Accept {
    Accept { claim_for: Some((world.replica, RunningBound(1_000))), ..message }
}

async fn refused(world: &World, message: Accept) -> Refusal {
    match world.accept(message).await {
        AcceptResult::Refused(refusal) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// Whether it started with its message.
async fn starts(world: &World, message: Accept) -> bool {
    match world.accept(fused(world, message)).await {
        AcceptResult::Accepted { claimed, .. } => claimed.is_some(),
        other => panic!("not accepted: {other:?}"),
    }
}

async fn ends(world: &World, claimed: &Claimed) -> Ended {
    match world.end(world.commit(claimed, replied("done"))).await {
        CommitResult::Won(ended) => *ended,
        other => panic!("{other:?}"),
    }
}

async fn load(world: &World) -> (u64, u64) {
    let load = world.store.agent_use(&org("acme"), &agent(), world.now()).await.unwrap().expect("it has bounds");
    (load.live, load.active)
}

fn over(of: LimitOf, limit: LimitName, max: f64, wait_ms: u64) -> Refusal {
    Refusal::Exceeded(Exceeded { of, limit, max, wait_ms: Some(wait_ms) })
}

pub(in crate::store) async fn o3_an_agents_messages_come_at_its_rate_within_its_orgs(world: &World) {
    let limits = AgentLimits { submits_per_second: Some(2.0), submit_burst: Some(2), ..AgentLimits::default() };
    set(world, limits).await;
    let change =
        LimitsChange { submits_per_second: Some(Some(1.0)), submit_burst: Some(Some(4)), ..LimitsChange::default() };
    world.store.set_org_limits(&org("acme"), &change, world.now(), &by()).await.unwrap();
    let of_agent = |wait_ms| over(LimitOf::Agent, LimitName::SubmitsPerSecond, 2.0, wait_ms);
    let of_org = |wait_ms| over(LimitOf::Org, LimitName::SubmitsPerSecond, 1.0, wait_ms);
    let batch = ["a", "b", "c"].map(|lane| Write::Accept(Box::new(world.message(lane))));
    let written = world.batch(batch.to_vec()).await;
    assert!(matches!(&written[2], Written::Accept(AcceptResult::Refused(refusal)) if *refusal == of_agent(500)));
    world.submit(to_free(world.message("a"))).await;
    world.submit(to_free(world.message("b"))).await;
    assert_eq!(refused(world, world.message("c")).await, of_org(1_000), "the org's comes first");
    world.advance_ms(1_000);
    world.submit(collecting(world.message("a"), 9)).await;
    assert_eq!(refused(world, to_free(world.message("c"))).await, of_org(1_000), "both took one");
    world.advance_ms(1_000);
    let joined = world.accept(collecting(world.message("a"), 9)).await;
    assert!(matches!(joined, AcceptResult::Joined(_)), "what joins is a message like any other: {joined:?}");
    world.advance_ms(1_000);
    world.submit(to_free(world.message("c"))).await;
    // A refusal of the one takes nothing of the other.
    for _ in 0..3 {
        assert_eq!(refused(world, world.message("d")).await, of_org(1_000));
    }
    world
        .store
        .set_org_limits(
            &org("acme"),
            &LimitsChange { submits_per_second: Some(None), ..LimitsChange::default() },
            world.now(),
            &by(),
        )
        .await
        .unwrap();
    world.submit(world.message("d")).await;
    world.submit(world.message("d")).await;
    assert_eq!(refused(world, world.message("d")).await, of_agent(500));
    let known = to_free(world.message("d"));
    world.submit(known.clone()).await;
    set(world, AgentLimits::default()).await;
    world.submit(world.message("d")).await;
}

pub(in crate::store) async fn o3_an_agents_queue_is_bounded(world: &World) {
    set(world, AgentLimits { queue_max: Some(2), ..AgentLimits::default() }).await;
    let first = world.submit(world.message("a")).await;
    world.submit(world.message("a")).await;
    assert_eq!(refused(world, world.message("b")).await, Refusal::AgentQueueFull { max: 2 });
    world.submit(to_free(world.message("b"))).await;
    world.submit(world.message_of_zeta("b")).await;
    let interrupting = Accept { on_busy: OnBusy::Interrupt, ..world.message("a") };
    world.submit(interrupting).await;
    assert_eq!(load(world).await, (1, 1), "an interrupt makes room for itself");
    assert!(matches!(world.state(first).await, TurnState::Cancelled));
    set(world, AgentLimits { queue_max: Some(0), ..AgentLimits::default() }).await;
    assert_eq!(refused(world, world.message("b")).await, Refusal::AgentQueueFull { max: 0 });
}

pub(in crate::store) async fn o3_an_agents_processor_time_is_bounded(world: &World) {
    set(world, AgentLimits { cpu_ms_per_hour: Some(100), ..AgentLimits::default() }).await;
    for (lane, cpu_ms) in [("a", 60.0), ("b", 40.0)] {
        let claimed = world.submit_and_start(world.message(lane)).await;
        let free = world.submit_and_start(to_free(world.message(lane))).await;
        for claimed in [claimed, free] {
            let commit = Commit { usage: Some(used(cpu_ms)), ..world.commit(&claimed, replied("done")) };
            assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
        }
    }
    let left = (WINDOW_MS - world.now().0 % WINDOW_MS).unsigned_abs();
    let used_up = over(LimitOf::Agent, LimitName::CpuMsPerHour, 100.0, left);
    assert_eq!(refused(world, world.message("a")).await, used_up);
    world.submit(to_free(world.message("a"))).await;
    world.advance_ms(left);
    world.submit(world.message("a")).await;
}

pub(in crate::store) async fn o3_no_more_of_an_agents_turns_run_than_it_says(world: &World) {
    set(world, running(2)).await;
    let [a, b] = [world.submit_and_start(world.message("a")).await, world.submit_and_start(world.message("b")).await];
    assert!(!starts(world, world.message("c")).await && !starts(world, world.message("d")).await);
    assert!(starts(world, to_free(world.message("a"))).await, "what is held is in nobody's way");
    assert!(starts(world, world.message_of_zeta("a")).await);
    assert!(world.claim(9).await.is_empty());
    assert_eq!(load(world).await, (4, 2));
    assert!(ends(world, &a).await.promoted, "whoever hears of it looks for what is ready");
    let c = world.claim_one().await;
    assert_eq!(c.envelope.conversation, Some(conversation("c")));
    // A turn of a lane whose predecessor ends takes its place in the agent's row, not at its head.
    let behind = world.submit(world.message("b")).await;
    assert!(ends(world, &b).await.promoted);
    let d = world.claim_one().await;
    assert_eq!(d.envelope.conversation, Some(conversation("d")));
    ends(world, &c).await;
    assert_eq!(world.claim_one().await.lease.turn, behind);
    ends(world, &d).await;
    assert_eq!(load(world).await, (1, 1));
    assert!(starts(world, world.message("e")).await);
}

pub(in crate::store) async fn o3_what_is_held_starts_in_the_order_of_acceptance(world: &World) {
    set(world, running(1)).await;
    let mut running = world.submit_and_start(world.message("a")).await;
    let mut expected = Vec::new();
    // Also without a place in a conversation, and in one batch.
    for lane in ["b", "c", "b", "d", "e"] {
        let mut message = world.message(lane);
        if lane == "d" {
            message.envelope.conversation = None;
            message.envelope.run_id = None;
        }
        expected.push((message.turn, lane));
        world.batch(vec![Write::Accept(Box::new(message))]).await;
    }
    let mut order = Vec::new();
    while order.len() < expected.len() {
        ends(world, &running).await;
        running = world.claim_one().await;
        order.push(running.lease.turn);
        assert_eq!(load(world).await.1, 1);
    }
    let expected: Vec<_> = expected.into_iter().map(|(turn, _)| turn).collect();
    assert_eq!(order, [expected[0], expected[1], expected[2], expected[3], expected[4]]);
}

pub(in crate::store) async fn o3_a_held_turn_has_the_queues_clock(world: &World) {
    set(world, running(1)).await;
    let first = world.submit_and_start(world.message("a")).await;
    let held = world.submit(world.message("b")).await;
    world.advance_ms(CLOCKS.admission_timeout_ms + 1);
    let found = world.sweep().await;
    assert!(found.overdue.is_empty() && !found.ready, "{found:?}");
    ends(world, &first).await;
    assert!(world.sweep().await.ready);
    world.advance_ms(CLOCKS.admission_timeout_ms);
    let found = world.sweep().await;
    assert_eq!(
        found.overdue.iter().map(|o| (o.turn, o.why)).collect::<Vec<_>>(),
        [(held, OverdueReason::AdmissionTimeout)]
    );
    world.cancel(held).await;
    let running = world.submit_and_start(world.message("a")).await;
    let held = world.submit(world.message("b")).await;
    world.advance_ms(CLOCKS.queue_timeout_ms);
    let found = world.sweep().await;
    let found: Vec<_> = found.overdue.iter().map(|overdue| (overdue.turn, overdue.why)).collect();
    assert_eq!(found, [(running.lease.turn, OverdueReason::TurnTimeout), (held, OverdueReason::QueueTimeout)]);
}

pub(in crate::store) async fn o3_what_is_held_ends_like_any_other(world: &World) {
    set(world, running(1)).await;
    let running = world.submit_and_start(world.message("a")).await;
    let [b, c, d] = [
        world.submit(world.message("b")).await,
        world.submit(world.message("c")).await,
        world.submit(world.message("d")).await,
    ];
    world.cancel(b).await;
    assert_eq!(load(world).await, (3, 1));
    world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
    assert_eq!(load(world).await, (2, 1));
    assert!(world.store.turn(&org("acme"), c).await.unwrap().is_none());
    // Whoever interrupts what runs waits behind what was held before.
    let interrupting = fused(world, Accept { on_busy: OnBusy::Interrupt, ..world.message("a") });
    let turn = interrupting.turn;
    let AcceptResult::Accepted { interrupted, claimed: None } = world.accept(interrupting).await else {
        panic!("something older was held")
    };
    assert!(interrupted.len() == 1 && interrupted[0].promoted && interrupted[0].turn == running.lease.turn);
    let next = world.claim_one().await;
    assert_eq!(next.lease.turn, d);
    world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("d"), None, world.now(), &by())
        .await
        .unwrap();
    assert_eq!(world.claim_one().await.lease.turn, turn, "a deletion frees, too");
}

pub(in crate::store) async fn o3_an_agents_bounds_are_changed_under_its_turns(world: &World) {
    set(world, AgentLimits::default()).await;
    assert!(world.store.agent_use(&org("acme"), &agent(), world.now()).await.unwrap().is_none());
    let [a, b] = [world.submit_and_start(world.message("a")).await, world.submit_and_start(world.message("b")).await];
    world.submit(world.message("a")).await;
    set(world, running(1)).await;
    assert_eq!(load(world).await, (3, 2), "what runs goes on");
    let held = [world.submit(world.message("c")).await, world.submit(world.message("d")).await];
    ends(world, &b).await;
    assert!(world.claim(9).await.is_empty(), "one is enough");
    set(world, running(2)).await;
    assert_eq!(world.claim_one().await.lease.turn, held[0]);
    set(world, AgentLimits::default()).await;
    assert_eq!(world.claim_one().await.lease.turn, held[1]);
    assert!(world.store.agent_use(&org("acme"), &agent(), world.now()).await.unwrap().is_none());
    ends(world, &a).await;
    world.claim_one().await;
    // An agent that goes takes its bounds along.
    let other = AgentId::parse(FREE).unwrap();
    let settings = AgentSettings { limits: running(1), ..AgentSettings::of(worker()) };
    world.store.put_agent(&org("acme"), &other, settings, 3, world.now(), &by()).await.unwrap();
    assert!(world.store.agent_use(&org("zeta"), &other, world.now()).await.unwrap().is_none(), "it is another org's");
    assert!(matches!(world.store.delete_agent(&org("acme"), &other, world.now(), &by()).await.unwrap(), Deleted::Done));
    assert!(world.store.agent_use(&org("acme"), &other, world.now()).await.unwrap().is_none());
}

pub(in crate::store) async fn o3_a_requeue_and_a_takeover_take_no_more_room(world: &World) {
    set(world, running(1)).await;
    let first = world.submit_and_start(world.message("a")).await;
    world.submit(world.message("b")).await;
    let requeue = Write::Requeue(Requeue { lease: first.lease.clone(), delay_ms: 0 });
    assert!(matches!(world.write(requeue).await, Written::Requeue(Fenced::Done)));
    assert_eq!(load(world).await, (2, 1));
    let again = world.claim_one().await;
    assert_eq!(again.lease.turn, first.lease.turn, "it had its room");
    ends(world, &again).await;
    let second = world.claim_one().await;
    ends(world, &second).await;
    // A host that lives for a second.
    let other = ReplicaId::new();
    world.store.register_replica(other, world.now(), 1_000).await.unwrap();
    let message = Accept { claim_for: Some((other, RunningBound(1_000))), ..world.message("c") };
    assert!(matches!(world.accept(message).await, AcceptResult::Accepted { claimed: Some(_), .. }));
    let held = world.submit(world.message("d")).await;
    world.advance_ms(1_001);
    let taken = world.claim_one().await;
    assert!(taken.restarted);
    assert_eq!(load(world).await, (2, 1));
    ends(world, &taken).await;
    assert_eq!(world.claim_one().await.lease.turn, held);
}

pub(in crate::store) async fn o3_what_an_org_and_an_agent_have_stored_is_measured_and_bounded(world: &World) {
    world.advance_ms(MEASURED_EVERY_MS);
    let free = to_free(world.message("a"));
    set(world, AgentLimits { storage_bytes_max: Some(5_000), ..AgentLimits::default() }).await;
    let change = LimitsChange { storage_bytes_max: Some(Some(10_000)), ..LimitsChange::default() };
    world.store.set_org_limits(&org("acme"), &change, world.now(), &by()).await.unwrap();
    let measure = async || {
        let mut measured = Vec::new();
        while let Some(org) = world.store.measure_storage(world.now()).await.unwrap() {
            measured.push(org);
        }
        measured.sort();
        measured
    };
    let stored = async || {
        let org = world.store.org_use(&org("acme"), world.now()).await.unwrap().unwrap();
        let agent = world.store.agent_use(&self::org("acme"), &agent(), world.now()).await.unwrap().unwrap();
        (org.meters.storage_bytes, agent.meters.storage_bytes)
    };
    assert_eq!(measure().await, [org("acme"), org("zeta")]);
    assert_eq!(stored().await, (3, 0), "the module's three bytes");
    let claimed = world.submit_and_start(world.message("a")).await;
    world.append(&claimed, deltas(1, &["said"])).await;
    world.complete(&claimed, Some(b"state")).await;
    world.submit(free.clone()).await;
    assert!(measure().await.is_empty(), "not so soon");
    world.advance_ms(MEASURED_EVERY_MS);
    assert_eq!(measure().await, [org("acme"), org("zeta")]);
    let (whole, agents) = stored().await;
    let message = free.message.len() as u64;
    let (turn, reply) = (TURN_BYTES.unsigned_abs(), r#"{"text":"done"}"#.len() as u64);
    let delta = deltas(1, &["said"]).encode().len() as u64;
    let lane = turn;
    assert!(agents >= turn + lane + message + reply + 5, "{agents}");
    assert_eq!(whole, agents + turn + lane + message + delta + 3);
    // Full: the agent first, then the org, until it is measured again.
    let big = Accept { message: Bytes::from(format!("{{\"text\":\"{}\"}}", "x".repeat(5_000))), ..world.message("b") };
    world.submit(big.clone()).await;
    world.submit(world.message("b")).await;
    world.advance_ms(MEASURED_EVERY_MS);
    measure().await;
    let full = |of, max| over(of, LimitName::StorageBytesMax, max, FULL_MEASURED_EVERY_MS);
    assert_eq!(refused(world, world.message("b")).await, full(LimitOf::Agent, 5_000.0));
    world.submit(to_free(Accept { turn: TurnId::new(), ..big })).await;
    world.advance_ms(MEASURED_EVERY_MS);
    measure().await;
    assert_eq!(refused(world, to_free(world.message("b"))).await, full(LimitOf::Org, 10_000.0));
    let (store, now) = (&world.store, world.now());
    let put = store.put_worker(&org("acme"), &worker(), [7; 32], "new".into(), vec![], 1.0, 9, 9, now, &by()).await;
    assert!(matches!(put.unwrap(), PutWorker::Full(WorkerFull::Storage(10_000))), "nor a module");
    let mut pieces = crate::attachment::Pieces::default();
    pieces.push(b"file");
    let (file, pieces) = pieces.finish("text/plain".to_owned());
    let put = store.put_attachment(&org("acme"), &user("ann"), &file, pieces, 1_000, now).await.unwrap();
    assert_eq!(put, PutAttachment::StorageFull(10_000), "nor a file");
    world.submit(world.message_of_zeta("b")).await;
    world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("b"), None, world.now(), &by())
        .await
        .unwrap();
    assert_eq!(refused(world, to_free(world.message("b"))).await, full(LimitOf::Org, 10_000.0), "not measured yet");
    world.advance_ms(FULL_MEASURED_EVERY_MS);
    assert_eq!(measure().await, [org("acme")], "sooner than others");
    world.submit(world.message("b")).await;
    // An agent of which nothing is left is not full for ever.
    for of in ["a", "b"] {
        world
            .store
            .delete_conversation(&org("acme"), &agent(), &conversation(of), None, world.now(), &by())
            .await
            .unwrap();
    }
    world.advance_ms(MEASURED_EVERY_MS);
    measure().await;
    assert_eq!(stored().await.1, 0);
}
