//! The queue: who is next, who may come in, and which clock ends a turn that waits.

use super::*;
use crate::admission::Refusal;
use crate::gate::GateRefusal;

fn bound(world: &World, slots: usize, org_running_max: usize) -> ClaimRequest {
    ClaimRequest { org_running_max: RunningBound(org_running_max), ..world.claim_request(slots) }
}

pub(in crate::store) async fn t5_a_waiting_turn_has_its_own_clock(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    let second = world.submit(world.message("c")).await;
    world.advance_ms(CLOCKS.admission_timeout_ms + 1);
    assert!(world.sweep().await.overdue.is_empty(), "a waiting turn is not under the admission clock");
    assert!(world.complete(&first, None).await.promoted);
    world.advance_ms(CLOCKS.admission_timeout_ms - 1);
    assert!(world.sweep().await.overdue.is_empty(), "the admission clock began when it became ready");
    let claimed = world.claim_one().await;
    assert_eq!(claimed.lease.turn, second);
    assert_eq!(claimed.lease.deadline, world.now().plus_ms(CLOCKS.turn_timeout_ms));
}

pub(in crate::store) async fn t9_turns_run_in_the_order_of_acceptance(world: &World) {
    let messages: Vec<Accept> = (0..6).map(|_| world.message("c")).collect();
    let turns: Vec<TurnId> = messages.iter().map(|message| message.turn).collect();
    // All in one batch: their order is the order of the items.
    world.batch(messages.into_iter().map(|message| Write::Accept(Box::new(message))).collect()).await;
    for (place, turn) in (1..).zip(turns) {
        let claimed = world.claim_one().await;
        assert_eq!((claimed.lease.turn, claimed.seq), (turn, Some(place)));
        world.complete(&claimed, None).await;
    }
}

pub(in crate::store) async fn t9_a_deferred_turn_is_not_overtaken(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    let second = world.submit(world.message("c")).await;
    assert_eq!(world.requeue(&first, 500).await, Fenced::Done);
    let third = world.message("c");
    let third = world.submit(Accept { claim_for: Some((world.replica, RunningBound(9))), ..third }).await;
    assert!(world.claim(10).await.is_empty(), "the first is deferred and nobody passes it");
    world.advance_ms(500);
    for turn in [first.lease.turn, second, third] {
        let claimed = world.claim_one().await;
        assert_eq!(claimed.lease.turn, turn);
        world.complete(&claimed, None).await;
    }
}

pub(in crate::store) async fn one_turn_of_a_conversation_at_a_time(world: &World) {
    for _ in 0..4 {
        world.submit(world.message("c")).await;
        world.submit(world.message("d")).await;
    }
    for _ in 0..4 {
        let claimed = world.claim(10).await;
        assert_eq!(claimed.len(), 2);
        for claimed in claimed {
            world.complete(&claimed, Some(b"state")).await;
        }
    }
    assert!(world.claim(10).await.is_empty());
}

pub(in crate::store) async fn a_fused_claim_waits_its_turn(world: &World) {
    let fused = |message: Accept| Accept { claim_for: Some((world.replica, RunningBound(2))), ..message };
    let older = world.submit(world.message("old")).await;
    let behind = world.accept(fused(world.message("new"))).await;
    assert!(matches!(behind, AcceptResult::Accepted { claimed: None, .. }), "something older is ready");
    assert_eq!(world.claim(10).await[0].lease.turn, older);
    // Its org is at its bound now; another org's turn is not in its way.
    let waiting = world.accept(fused(world.message("third"))).await;
    assert!(matches!(waiting, AcceptResult::Accepted { claimed: None, .. }));
    let other = world.accept(fused(world.message_of_zeta("c"))).await;
    assert!(matches!(other, AcceptResult::Accepted { claimed: Some(_), .. }));
    // What was accepted earlier in this very batch is older, too.
    world.batch(vec![]).await;
    let unclaimed = world.message_of_zeta("d");
    let late = fused(world.message_of_zeta("e"));
    let written = world.batch(vec![Write::Accept(Box::new(unclaimed)), Write::Accept(Box::new(late))]).await;
    assert!(matches!(&written[1], Written::Accept(AcceptResult::Accepted { claimed: None, .. })));
}

pub(in crate::store) async fn a_fused_claim_keeps_the_orgs_bound(world: &World) {
    let mut started = 0;
    for lane in ["a", "b", "c"] {
        let message = Accept { claim_for: Some((world.replica, RunningBound(2))), ..world.message(lane) };
        if matches!(world.accept(message).await, AcceptResult::Accepted { claimed: Some(_), .. }) {
            started += 1;
        }
    }
    assert_eq!(started, 2);
}

pub(in crate::store) async fn a_fused_claim_is_complete(world: &World) {
    let message = Accept { dry_run: true, ..world.message("c") };
    let claimed = world.submit_and_start(message.clone()).await;
    assert_eq!(claimed.lease.epoch, 1);
    assert_eq!(claimed.lease.deadline, world.now().plus_ms(CLOCKS.turn_timeout_ms));
    assert_eq!((claimed.envelope.clone(), claimed.agent.clone()), (message.envelope, agent()));
    assert_eq!((claimed.user.clone(), claimed.dry_run, claimed.seq), (user("ann"), true, Some(1)));
    assert_eq!((claimed.attempt, claimed.restarted, claimed.first_epoch), (1, false, 1));
    assert_eq!((claimed.accepted_at, claimed.started_at), (world.now(), world.now()));
    assert!(claimed.refused.is_none() && claimed.head.as_ref().unwrap().snapshot.is_none());
    let record = world.record(claimed.lease.turn).await;
    assert_eq!(
        (record.state, record.started_at, record.worker),
        (TurnState::Running, Some(world.now()), claimed.worker.clone())
    );
    world.complete(&claimed, Some(b"state")).await;
    let next = world.submit_and_start(world.message("c")).await;
    let snapshot = next.head.unwrap().snapshot.unwrap();
    assert_eq!(snapshot.body.as_deref(), Some(&b"state"[..]));
    assert_eq!((snapshot.run_id, snapshot.worker, snapshot.version), (claimed.lease.turn.into(), worker(), 1));
}

pub(in crate::store) async fn o5_a_long_queue_does_not_delay_another_org(world: &World) {
    for lane in 0..30 {
        world.submit(world.message(&format!("c-{lane}"))).await;
    }
    let single = world.submit(world.message_of_zeta("c")).await;
    let claimed = world.claim(2).await;
    assert!(claimed.iter().any(|claimed| claimed.lease.turn == single), "one an org and round");
    world.submit(world.message_of_zeta("d")).await;
    world.submit(world.message_of_zeta("e")).await;
    let mut orgs = Vec::new();
    for _ in 0..4 {
        orgs.push(world.claim(1).await.pop().unwrap().lease.org.to_string());
    }
    orgs.sort();
    assert_eq!(orgs, ["acme", "acme", "zeta", "zeta"], "single slots go round as well");
}

pub(in crate::store) async fn o3_running_turns_of_an_org_are_bounded(world: &World) {
    for lane in 0..5 {
        world.submit(world.message(&format!("c-{lane}"))).await;
        world.submit(world.message_of_zeta(&format!("c-{lane}"))).await;
    }
    let claimed = world.claim_with(bound(world, 20, 2)).await;
    assert_eq!(claimed.len(), 4);
    assert!(world.claim_with(bound(world, 20, 2)).await.is_empty());
    world.complete(&claimed[0], None).await;
    let next = world.claim_with(bound(world, 20, 2)).await;
    assert_eq!(next.len(), 1);
    assert_eq!(next[0].lease.org, claimed[0].lease.org);
}

pub(in crate::store) async fn busy_is_rejected_or_interrupted_as_asked(world: &World) {
    let reject = |on_busy| Accept { on_busy, ..world.message("c") };
    let first = world.submit(reject(OnBusy::Reject)).await;
    let refused = world.accept(reject(OnBusy::Reject)).await;
    assert!(
        matches!(refused, AcceptResult::Refused(Refusal::ConversationBusy { active }) if active == first),
        "{refused:?}"
    );
    let claimed = world.claim_one().await;
    let refused = world.accept(reject(OnBusy::Reject)).await;
    assert!(matches!(refused, AcceptResult::Refused(Refusal::ConversationBusy { active }) if active == first));
    world.complete(&claimed, None).await;
    let next = world.submit(reject(OnBusy::Reject)).await;
    assert_eq!(world.record(next).await.seq, Some(2), "a refusal takes no place");
}

pub(in crate::store) async fn t9_what_comes_meanwhile_is_one_next_turn(world: &World) {
    let text = |text: &str, parts_max: u32| {
        let message = Bytes::from(format!(r#"{{"text":"{text}"}}"#));
        collecting(Accept { message, ..world.message("c") }, parts_max)
    };
    let joined = async |accept: Accept| match world.accept(accept).await {
        AcceptResult::Joined(turn) => turn,
        other => panic!("{other:?}"),
    };
    // Nobody is there: a turn like any other, and what comes while it is ready waits behind it.
    let first = world.submit_and_start(text("first", 9)).await;
    assert_eq!(&first.message[..], br#"{"text":"first"}"#, "kept as it came");
    let next = world.submit(text("a", 9)).await;
    assert_eq!(joined(text("b", 9)).await, next);
    let keyed = |hash: u8| Accept { key: Some(("k".to_owned(), [hash; 32])), ..text("c", 9) };
    assert_eq!(joined(keyed(1)).await, next);
    assert!(matches!(world.accept(keyed(1)).await, AcceptResult::Attached(turn) if turn == next), "once");
    assert!(matches!(world.accept(keyed(2)).await, AcceptResult::Refused(Refusal::IdempotencyMismatch)));
    // One that does not collect is not joined, and nothing overtakes it.
    let plain = world.submit(world.message("c")).await;
    let last = world.submit(text("d", 9)).await;
    assert_eq!(joined(text("e", 9)).await, last);
    // What does not fit, and what is of another kind, waits by itself.
    let full = world.submit(text("f", 4)).await;
    let dry = world.submit(Accept { dry_run: true, ..text("g", 9) }).await;
    assert_ne!(world.submit(text("h", 9)).await, dry);
    // Another's conversation is not found, whatever waits there.
    let foreign = Accept { user: user("bob"), ..text("i", 9) };
    assert!(matches!(world.accept(foreign).await, AcceptResult::Refused(Refusal::NotFound)));
    // They run in the order of acceptance; one that has begun is joined no more.
    world.complete(&first, None).await;
    let mut running = world.claim_one().await;
    assert_eq!(running.lease.turn, next);
    let content: Content = serde_json::from_slice(&running.message).unwrap();
    assert_eq!(content.joined_text(), "a\nb\nc");
    for (turn, expected) in [(plain, "hi"), (last, "d\ne"), (full, "f"), (dry, "g")] {
        world.complete(&running, None).await;
        running = world.claim_one().await;
        assert_eq!(running.lease.turn, turn);
        let content: Content = serde_json::from_slice(&running.message).unwrap();
        assert_eq!(content.joined_text(), expected);
    }
    assert_eq!(world.record(next).await.seq, Some(2), "who joins takes no place");
}

pub(in crate::store) async fn an_interrupt_ends_every_live_turn(world: &World) {
    let running = world.submit_and_start(world.message("c")).await;
    let waiting = [world.submit(world.message("c")).await, world.submit(world.message("c")).await];
    let other = world.submit(world.message("d")).await;
    let interrupting = Accept { on_busy: OnBusy::Interrupt, ..world.message("c") };
    let turn = interrupting.turn;
    let AcceptResult::Accepted { interrupted, .. } = world.accept(interrupting).await else { panic!("refused") };
    let mut ended: Vec<TurnId> = interrupted.iter().map(|ended| ended.turn).collect();
    ended.sort();
    assert_eq!(ended, [running.lease.turn, waiting[0], waiting[1]]);
    assert!(interrupted.iter().all(|ended| ended.outcome == Outcome::Cancelled { by: CancelledBy::Interrupt }));
    assert!(interrupted.iter().all(|ended| !ended.promoted));
    assert_eq!(interrupted.iter().filter(|ended| ended.was_running).count(), 1);
    for ended in ended {
        assert_eq!(world.record(ended).await.cancelled_by, Some(CancelledBy::Interrupt));
    }
    let mut ready: Vec<TurnId> = world.claim(10).await.iter().map(|claimed| claimed.lease.turn).collect();
    ready.sort();
    assert_eq!(ready, [other, turn]);
    // In a lane that is free by its own interrupt it can start at once.
    let fused = Accept { on_busy: OnBusy::Interrupt, ..world.message("c") };
    assert_eq!(world.submit_and_start(fused).await.seq, Some(5));
}

pub(in crate::store) async fn queues_are_bounded(world: &World) {
    let bounds = QueueBounds { conversation_queue_max: 1, org_queue_max: 3, host_queue_max: 4 };
    let message = |lane: &str| Accept { bounds, ..world.message(lane) };
    world.submit(message("a")).await;
    world.submit(message("a")).await;
    assert!(matches!(world.accept(message("a")).await, AcceptResult::Refused(Refusal::ConversationQueueFull)));
    world.submit(message("b")).await;
    assert!(matches!(world.accept(message("c")).await, AcceptResult::Refused(Refusal::OrgQueueFull { max: 3 })));
    let theirs = |lane: &str| Accept { bounds, ..world.message_of_zeta(lane) };
    world.submit(theirs("a")).await;
    assert!(matches!(world.accept(theirs("b")).await, AcceptResult::Refused(Refusal::HostQueueFull)));
    let claimed = world.claim(1).await.pop().unwrap();
    world.complete(&claimed, None).await;
    world.submit(theirs("b")).await;
}

pub(in crate::store) async fn idempotency_keys_attach_and_mismatch(world: &World) {
    let keyed = |lane: &str, hash: u8| Accept { key: Some(("k".to_owned(), [hash; 32])), ..world.message(lane) };
    let first = keyed("c", 1);
    let again = keyed("c", 1);
    let other = keyed("c", 2);
    let batch = [&first, &again, &other].map(|accept| Write::Accept(Box::new(accept.clone())));
    let written = world.batch(batch.into()).await;
    assert!(matches!(&written[0], Written::Accept(AcceptResult::Accepted { .. })));
    assert!(matches!(&written[1], Written::Accept(AcceptResult::Attached(turn)) if *turn == first.turn));
    assert!(matches!(&written[2], Written::Accept(AcceptResult::Refused(Refusal::IdempotencyMismatch))));
    world.submit(keyed("d", 2)).await;
    let theirs = Accept { key: Some(("k".to_owned(), [2; 32])), ..world.message_of_zeta("c") };
    assert!(
        matches!(world.accept(theirs).await, AcceptResult::Accepted { .. }),
        "keys are an org's and a conversation's"
    );
    assert!(matches!(world.cancel(first.turn).await, CommitResult::Won(_)));
    assert!(
        matches!(world.accept(again).await, AcceptResult::Attached(turn) if turn == first.turn),
        "also when it has ended"
    );
}

pub(in crate::store) async fn a_replayed_key_interrupts_nothing(world: &World) {
    let keyed = || Accept { key: Some(("k".to_owned(), [1; 32])), on_busy: OnBusy::Interrupt, ..world.message("c") };
    let first = world.submit(keyed()).await;
    let claimed = world.claim_one().await;
    world.complete(&claimed, None).await;
    let next = world.submit(world.message("c")).await;
    assert!(matches!(world.accept(keyed()).await, AcceptResult::Attached(turn) if turn == first));
    assert_eq!(world.state(next).await, TurnState::Queued);
}

pub(in crate::store) async fn idempotency_keys_are_forgotten(world: &World) {
    let keyed = || Accept { key: Some(("k".to_owned(), [1; 32])), ..world.message("c") };
    let first = world.submit(keyed()).await;
    assert_eq!(world.store.forget_keys(world.now(), 10).await.unwrap(), 0);
    assert!(matches!(world.accept(keyed()).await, AcceptResult::Attached(turn) if turn == first));
    world.advance_ms(1);
    assert_eq!(world.store.forget_keys(world.now(), 10).await.unwrap(), 1);
    assert!(matches!(world.accept(keyed()).await, AcceptResult::Accepted { .. }));
}

pub(in crate::store) async fn each_clock_has_its_own_reason(world: &World) {
    let running = world.submit_and_start(world.message("c")).await.lease.turn;
    let waiting = world.submit(world.message("c")).await;
    let ready = world.submit(world.message("d")).await;
    let mut seen = Vec::new();
    for (ms, turn, why) in [
        (CLOCKS.admission_timeout_ms, ready, OverdueReason::AdmissionTimeout),
        (CLOCKS.turn_timeout_ms - CLOCKS.admission_timeout_ms, running, OverdueReason::TurnTimeout),
        (CLOCKS.queue_timeout_ms - CLOCKS.turn_timeout_ms, waiting, OverdueReason::QueueTimeout),
    ] {
        world.advance_ms(ms - 1);
        assert_eq!(world.sweep().await.overdue.len(), seen.len(), "not a millisecond early");
        world.advance_ms(1);
        seen.push((turn, why));
        let mut overdue: Vec<_> = world.sweep().await.overdue.iter().map(|found| (found.turn, found.why)).collect();
        overdue.sort_by_key(|found| seen.iter().position(|seen| seen == found));
        assert_eq!(overdue, seen);
    }
    assert!(world.claim(10).await.is_empty(), "what is overdue is the sweeper's");
    for (turn, _) in seen {
        assert!(matches!(world.cancel(turn).await, CommitResult::Won(_)));
    }
}

pub(in crate::store) async fn s1_the_gate_refuses_without_starting(world: &World) {
    let mut message = world.message("c");
    message.envelope.org = None;
    let fused = Accept { claim_for: Some((world.replica, RunningBound(9))), ..message };
    let turn = fused.turn;
    assert!(matches!(world.accept(fused).await, AcceptResult::Accepted { claimed: None, .. }));
    let neighbour = world.submit(world.message("d")).await;
    let claimed = world.claim(10).await;
    assert_eq!(claimed.len(), 2, "a refused row does not stand in its neighbours' way");
    let refused = claimed.iter().find(|claimed| claimed.lease.turn == turn).unwrap();
    assert_eq!(refused.refused, Some((GateRefusal::MissingOrg, 1)));
    assert_eq!((refused.attempt, refused.lease.epoch), (0, 1));
    assert!(claimed.iter().any(|claimed| claimed.lease.turn == neighbour && claimed.refused.is_none()));
    assert_eq!(world.state(turn).await, TurnState::Queued);
    assert_eq!(world.append(refused, deltas(1, &["no"])).await, Fenced::Stale);
    // A second replica that is handed the same envelope refuses as well, after the back-off.
    let second = world.another_replica(TTL_MS).await;
    let request = ClaimRequest { holder: second, ..world.claim_request(10) };
    assert!(world.claim_with(request).await.is_empty());
    world.advance_ms(100);
    assert_eq!(world.claim_with(request).await[0].refused, Some((GateRefusal::MissingOrg, 2)));
    world.advance_ms(199);
    assert!(world.claim_with(request).await.is_empty(), "the back-off doubles");
    let overdue = world.sweep().await.overdue;
    assert_eq!(overdue.len(), 1);
    assert_eq!((overdue[0].turn, overdue[0].why), (turn, OverdueReason::GateRefused(GateRefusal::MissingOrg)));
    let mut end = world.commit(refused, Outcome::Failed(Failure::gate_refused(GateRefusal::MissingOrg)));
    assert!(matches!(world.end(end.clone()).await, CommitResult::Lost), "the second replica's refusal moved the epoch");
    end.epoch = Some(overdue[0].epoch);
    assert!(matches!(world.end(end).await, CommitResult::Won(ended) if !ended.was_running));
}

pub(in crate::store) async fn s1_the_gates_column_agrees_with_the_gate(world: &World) {
    for case in 0..16_u32 {
        let mut message = world.message(&format!("c-{case}"));
        let envelope = &mut message.envelope;
        envelope.mode = if case & 1 == 0 { SessionMode::Snapshot } else { SessionMode::File };
        envelope.run_id = envelope.run_id.filter(|_| case & 2 == 0);
        envelope.org = envelope.org.take().filter(|_| case & 4 == 0);
        envelope.conversation = envelope.conversation.take().filter(|_| case & 8 == 0);
        let decided = gate::decide(envelope);
        let turn = message.turn;
        // A fused claim would ask the gate itself; this one asks the column.
        world.submit(message.clone()).await;
        let claimed = world.claim_one().await;
        assert_eq!(claimed.envelope, message.envelope);
        assert_eq!(claimed.refused.map(|(why, _)| why), decided.as_ref().err().copied(), "{:?}", claimed.envelope);
        assert_eq!(claimed.head.is_some(), matches!(decided, Ok(Grant::Shared(_))), "{:?}", claimed.envelope);
        let has_directory = claimed.envelope.mode == SessionMode::File && claimed.seq.is_some();
        assert_eq!(claimed.generation.is_some(), has_directory, "{:?}", claimed.envelope);
        assert_eq!(world.record(turn).await.private, decided == Ok(Grant::Private));
        assert_eq!(world.state(turn).await == TurnState::Running, decided.is_ok());
        assert!(matches!(world.cancel(turn).await, CommitResult::Won(_)));
    }
}

pub(in crate::store) async fn a_private_turn_occupies_its_conversation(world: &World) {
    let private = || {
        let mut message = world.message("c");
        message.envelope.run_id = None;
        message
    };
    let shared = world.submit_and_start(world.message("c")).await;
    let turn = world.submit(private()).await;
    let last = world.submit(world.message("c")).await;
    world.complete(&shared, Some(b"state")).await;
    let claimed = world.claim_one().await;
    assert_eq!(claimed.lease.turn, turn);
    assert!(claimed.head.is_none(), "a private turn reads nothing shared");
    assert_eq!(gate::decide(&claimed.envelope), Ok(Grant::Private));
    // With somebody else's permit it writes nothing either.
    let mut commit = world.commit(&claimed, replied("x"));
    let mut stolen = world.stage(&shared, b"stolen");
    stolen.parent = shared.lease.turn.0;
    commit.snapshot = Some(stolen);
    assert!(matches!(world.end(commit).await, CommitResult::SnapshotConflict));
    world.complete(&claimed, None).await;
    let claimed = world.claim_one().await;
    assert_eq!(claimed.lease.turn, last);
    assert_eq!(claimed.head.as_ref().unwrap().parent, shared.lease.turn.0);
    let list = |with_private| {
        let conversation = conversation("c");
        async move {
            let page = world
                .store
                .turns(&org("acme"), &agent(), &conversation, None, Direction::Forward, with_private, 10)
                .await
                .unwrap();
            page.items.iter().map(|turn| turn.id).collect::<Vec<_>>()
        }
    };
    assert_eq!(list(false).await, [shared.lease.turn, last]);
    assert_eq!(list(true).await, [shared.lease.turn, turn, last]);
}

pub(in crate::store) async fn live_counts_are_exact(world: &World) {
    let counts = || async {
        let live = world.store.live_counts().await.unwrap();
        (live.waiting, live.ready, live.running)
    };
    let first = world.submit(world.message("c")).await;
    world.submit(world.message("c")).await;
    world.submit(world.message_of_zeta("c")).await;
    assert_eq!(counts().await, (1, 2, 0));
    let claimed = world.claim(10).await;
    assert_eq!(counts().await, (1, 0, 2));
    let mine = claimed.iter().find(|claimed| claimed.lease.turn == first).unwrap();
    world.requeue(mine, 0).await;
    assert_eq!(counts().await, (1, 1, 1));
    assert!(matches!(world.cancel(first).await, CommitResult::Won(_)));
    assert_eq!(counts().await, (0, 1, 1));
    world
        .store
        .delete_conversation(&org("zeta"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
    assert_eq!(counts().await, (0, 1, 0));
}

pub(in crate::store) async fn r8_an_end_tells_that_the_next_is_ready(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    assert!(!world.sweep().await.ready);
    let second = world.submit(world.message("c")).await;
    assert!(!world.sweep().await.ready, "it waits");
    assert!(world.complete(&first, None).await.promoted);
    assert!(world.sweep().await.ready, "a claimer that missed the word finds it here (R5)");
    assert_eq!(world.claim_one().await.lease.turn, second);
}

pub(in crate::store) async fn status_tells_what_is_owed(world: &World) {
    let idle = world.store.status(world.now()).await.unwrap();
    assert_eq!((idle.live, idle.oldest_live_ms, idle.oldest_ready_ms), (LiveCounts::default(), None, None));
    assert_eq!(idle.schema_version, idle.schema_known);
    assert_eq!((idle.replicas.len(), idle.replicas[0].id, idle.replicas[0].running), (1, world.replica, 0));
    assert!(idle.replicas[0].expires_in_ms > 0 && !idle.replicas[0].draining);
    assert!(world.store.examine().await.unwrap().iter().all(|finding| finding.health < Health::Bad));
    world.submit_and_start(world.message("a")).await;
    world.advance_ms(1_000);
    world.submit(world.message("b")).await;
    world.submit(world.message("b")).await;
    world.advance_ms(500);
    let busy = world.store.status(world.now()).await.unwrap();
    assert_eq!(busy.live, LiveCounts { waiting: 1, ready: 1, running: 1 });
    assert_eq!(busy.replicas[0].running, 1);
    assert!(busy.oldest_live_ms.unwrap() >= 1_500 && busy.oldest_ready_ms.unwrap() >= 500, "{busy:?}");
    assert!(busy.oldest_ready_ms.unwrap() < 1_500, "it counts from when the turn became ready: {busy:?}");
    assert_eq!(busy.overdue, 0);
    world.advance_ms(CLOCKS.turn_timeout_ms);
    assert_eq!(world.store.status(world.now()).await.unwrap().overdue, 2, "what was ready, and what ran");
    world.store.drain_replica(world.replica).await.unwrap();
    assert!(world.store.status(world.now()).await.unwrap().replicas[0].draining);
}

pub(in crate::store) async fn what_is_old_goes_and_what_lives_stays(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    world.append(&first, deltas(1, &["said"])).await;
    world.complete(&first, Some(b"state")).await;
    let live = world.submit_and_start(world.message("c")).await;
    world.append(&live, deltas(1, &["said"])).await;
    let others = world.submit_and_start(world.message_of_zeta("c")).await;
    world.complete(&others, None).await;
    // Ids are of real time, in which all of this is of now.
    let later = Timestamp(crate::clock::Clock::system().now().0 + 60_000);
    let keep = |turns_since, events_since| Retention { turns_since, events_since, audit_since: None };
    let step = async |after: Option<&str>, keep| {
        let after = after.map(org);
        world.store.retain(after.as_ref(), keep, 100).await.unwrap()
    };
    let of = |id: &str, rows| Retained { org: Some(org(id)), rows };
    assert_eq!(step(None, keep(Some(Timestamp(1)), Some(Timestamp(1)))).await, of("acme", 0), "nothing is so old");
    assert_eq!(step(None, keep(None, Some(later))).await, of("acme", 1), "the log of what has ended");
    assert!(world.event_ids(first.lease.turn, None).await.is_empty());
    assert!(world.record(first.lease.turn).await.reply.is_some(), "a turn keeps its reply without its log");
    assert_eq!(step(None, keep(Some(later), None)).await, of("acme", 1));
    assert!(world.store.turn(&org("acme"), first.lease.turn).await.unwrap().is_none());
    assert_eq!(world.event_ids(live.lease.turn, None).await, ["1.1"], "what lives keeps its log");
    assert!(world.store.turn(&org("zeta"), others.lease.turn).await.unwrap().is_some(), "an org at a time");
    assert_eq!(step(Some("acme"), keep(Some(later), None)).await, of("zeta", 1));
    assert_eq!(step(Some("zeta"), keep(Some(later), None)).await, Retained::default(), "the round is over");
    // The conversation goes on from the snapshot of the turn that went.
    world.complete(&live, None).await;
    let next = world.submit_and_start(world.message("c")).await;
    assert_eq!(next.head.unwrap().snapshot.unwrap().body.unwrap(), "state");
    assert_eq!(next.seq, Some(3));
    // What was kept for the chain is this turn's own; the checker wants every snapshot's turn.
    world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
}
