//! Turns: one end each, whoever tries to end them; what a lost owner may still do; the log.

use super::*;
use crate::turn::FailureCode;

pub(in crate::store) async fn t1_every_accepted_message_gets_one_end(world: &World) {
    let turn = world.submit(world.message("c")).await;
    assert_eq!(world.state(turn).await, TurnState::Queued);
    let claimed = world.claim_one().await;
    assert_eq!((claimed.lease.turn, claimed.attempt, claimed.restarted), (turn, 1, false));
    let running = world.record(turn).await;
    assert_eq!((running.state, running.attempt, running.first_epoch), (TurnState::Running, 1, Some(1)));
    let ended = world.complete(&claimed, None).await;
    assert!(ended.was_running && !ended.promoted);
    let record = world.record(turn).await;
    assert_eq!(record.state, TurnState::Completed);
    assert_eq!(record.reply.as_deref(), Some(&br#"{"text":"done"}"#[..]));
    assert_eq!((record.ended_at, record.attempt), (Some(world.now()), 1));
    for outcome in [replied("again"), failed(FailureCode::Internal), cancelled()] {
        assert!(matches!(world.end(world.commit(&claimed, outcome)).await, CommitResult::Lost));
    }
    assert_eq!(world.record(turn).await.reply, record.reply);
}

pub(in crate::store) async fn t1_of_two_ends_in_one_batch_the_first_stands(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    let late = world.commit(&claimed, failed(FailureCode::TurnTimeout));
    let reply = world.commit(&claimed, replied("too late"));
    let written = world.batch(vec![Write::Commit(Box::new(late)), Write::Commit(Box::new(reply))]).await;
    assert!(matches!(&written[..], [Written::Commit(CommitResult::Won(_)), Written::Commit(CommitResult::Lost)]));
    assert_eq!(world.state(claimed.lease.turn).await, TurnState::Failed);
}

pub(in crate::store) async fn t2_a_late_reply_changes_nothing(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    assert!(matches!(world.cancel(claimed.lease.turn).await, CommitResult::Won(ended) if ended.was_running));
    assert_eq!(world.append(&claimed, deltas(1, &["late"])).await, Fenced::Stale);
    let mut commit = world.commit(&claimed, replied("late"));
    commit.snapshot = Some(world.stage(&claimed, b"late"));
    commit.tail = deltas(1, &["late"]);
    assert!(matches!(world.end(commit).await, CommitResult::Lost));
    assert_eq!(world.requeue(&claimed, 0).await, Fenced::Stale);
    let record = world.record(claimed.lease.turn).await;
    assert_eq!(
        (record.state, record.cancelled_by, record.reply),
        (TurnState::Cancelled, Some(CancelledBy::User), None)
    );
    assert!(world.event_ids(claimed.lease.turn, None).await.is_empty());
    let next = world.submit_and_start(world.message("c")).await;
    assert!(next.head.unwrap().snapshot.is_none());
}

pub(in crate::store) async fn t4_a_lost_election_is_not_an_error(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    let mut nobodys = claimed.clone();
    nobodys.lease.turn = TurnId::new();
    assert!(matches!(world.end(world.commit(&nobodys, cancelled())).await, CommitResult::Lost));
    let mut older = claimed.clone();
    older.lease.epoch -= 1;
    assert!(matches!(world.end(world.commit(&older, cancelled())).await, CommitResult::Lost));
    assert_eq!(world.state(claimed.lease.turn).await, TurnState::Running);
}

pub(in crate::store) async fn t8_cancel_of_a_queued_turn_leaves_nothing(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    let second = world.submit(world.message("c")).await;
    let third = world.submit(world.message("c")).await;
    assert!(matches!(world.cancel(second).await, CommitResult::Won(ended) if !ended.was_running && !ended.promoted));
    assert_eq!(world.state(second).await, TurnState::Cancelled);
    assert!(world.complete(&first, Some(b"one")).await.promoted);
    let next = world.claim_one().await;
    assert_eq!(next.lease.turn, third);
    assert_eq!(next.head.unwrap().snapshot.unwrap().run_id, first.lease.turn.into());
}

pub(in crate::store) async fn t8_cancel_twice_hits_nothing_else(world: &World) {
    let first = world.submit(world.message("c")).await;
    let second = world.submit(world.message("c")).await;
    assert!(matches!(world.cancel(first).await, CommitResult::Won(ended) if ended.promoted));
    assert!(matches!(world.cancel(first).await, CommitResult::Lost));
    assert_eq!(world.state(second).await, TurnState::Queued);
    assert_eq!(world.claim_one().await.lease.turn, second);
}

pub(in crate::store) async fn t10_a_poison_turn_ends_and_the_conversation_goes_on(world: &World) {
    let poison = world.submit(world.message("c")).await;
    let next = world.submit(world.message("c")).await;
    for attempt in 1..=ATTEMPTS_MAX {
        assert_eq!(world.sweep().await.overdue.len(), 0, "attempts are left");
        let holder = world.another_replica(100).await;
        let claimed = world.claim_with(ClaimRequest { holder, ..world.claim_request(10) }).await;
        assert_eq!(claimed.len(), 1);
        assert_eq!((claimed[0].lease.turn, claimed[0].attempt), (poison, attempt));
        assert_eq!(claimed[0].restarted, attempt > 1);
        world.advance_ms(101);
    }
    assert!(world.claim(10).await.is_empty(), "no attempt is left");
    let overdue = world.sweep().await.overdue;
    assert_eq!(overdue.len(), 1);
    assert_eq!((overdue[0].turn, overdue[0].why), (poison, OverdueReason::AttemptsExhausted));
    let end = Commit {
        org: org("acme"),
        turn: poison,
        epoch: Some(overdue[0].epoch),
        outcome: failed(FailureCode::AttemptsExhausted),
        snapshot: None,
        tail: EventBatch::default(),
        usage: None,
    };
    assert!(matches!(world.end(end).await, CommitResult::Won(ended) if ended.promoted));
    assert_eq!(world.claim_one().await.lease.turn, next);
}

pub(in crate::store) async fn r1_an_effect_that_began_is_never_run_again(world: &World) {
    let holder = world.another_replica(100).await;
    let turn = world.submit(world.message("c")).await;
    let claimed = world.claim_with(ClaimRequest { holder, ..world.claim_request(1) }).await.pop().unwrap();
    let begin = Append { lease: claimed.lease.clone(), batch: deltas(1, &["begins"]) };
    assert!(matches!(world.write(Write::BeginEffect(begin.clone())).await, Written::Append(Fenced::Done)));
    assert_eq!(world.event_ids(turn, None).await, ["1.1"]);
    assert_eq!(world.requeue(&claimed, 0).await, Fenced::Stale, "nor does its own host give it back");
    world.advance_ms(101);
    assert!(world.claim(10).await.is_empty());
    let overdue = world.sweep().await.overdue;
    assert_eq!(overdue.iter().map(|o| o.why).collect::<Vec<_>>(), [OverdueReason::HostLost]);
    assert!(matches!(world.cancel(turn).await, CommitResult::Won(_)));
    assert!(matches!(world.write(Write::BeginEffect(begin)).await, Written::Append(Fenced::Stale)));
}

pub(in crate::store) async fn r1_what_may_not_run_again_hides_no_other_orgs_turn(world: &World) {
    let spent = |message: Accept| Accept { attempts_max: 1, ..message };
    // The same from either side, whichever org a store looks at first.
    for acme_is_spent in [true, false] {
        let holder = world.another_replica(100).await;
        for at in 0..3 {
            let id = format!("{acme_is_spent}-{at}");
            world
                .submit(if acme_is_spent { spent(world.message(&id)) } else { spent(world.message_of_zeta(&id)) })
                .await;
        }
        let turn = world.submit(if acme_is_spent { world.message_of_zeta("c") } else { world.message("c") }).await;
        let held = world.claim_with(ClaimRequest { holder, ..world.claim_request(4) }).await;
        assert_eq!(held.len(), 4);
        world.advance_ms(101);
        let taken = world.claim(1).await;
        assert_eq!(taken.iter().map(|claimed| claimed.lease.turn).collect::<Vec<_>>(), [turn]);
        for overdue in world.sweep().await.overdue {
            assert_eq!(overdue.why, OverdueReason::AttemptsExhausted);
            let lost = held.iter().find(|claimed| claimed.lease.turn == overdue.turn).unwrap();
            let end = world.commit(lost, failed(FailureCode::AttemptsExhausted));
            assert!(matches!(world.end(end).await, CommitResult::Won(_)));
        }
        world.complete(&taken[0], None).await;
    }
}

pub(in crate::store) async fn r2_a_stopped_replica_writes_nothing_more(world: &World) {
    let holder = world.another_replica(100).await;
    let turn = world.submit(world.message("c")).await;
    let stopped = world.claim_with(ClaimRequest { holder, ..world.claim_request(1) }).await.pop().unwrap();
    assert_eq!(world.append(&stopped, deltas(1, &["a"])).await, Fenced::Done);
    world.advance_ms(101);
    let taken = world.claim_one().await;
    assert_eq!((taken.lease.turn, taken.lease.epoch, taken.attempt, taken.restarted), (turn, 2, 2, true));
    assert_eq!(world.append(&stopped, deltas(2, &["zombie"])).await, Fenced::Stale);
    assert_eq!(world.requeue(&stopped, 0).await, Fenced::Stale);
    let mut commit = world.commit(&stopped, replied("zombie"));
    commit.snapshot = Some(world.stage(&stopped, b"zombie"));
    assert!(matches!(world.end(commit).await, CommitResult::Lost));
    assert_eq!(world.store.stale(&[stopped.lease.clone(), taken.lease.clone()]).await.unwrap(), [turn]);
    world.complete(&taken, Some(b"state")).await;
    assert_eq!(world.event_ids(turn, None).await, ["1.1", "2.0"]);
}

pub(in crate::store) async fn r2_an_expired_replica_is_dead_for_ever(world: &World) {
    let replica = world.another_replica(100).await;
    world.advance_ms(50);
    assert!(world.store.renew_replica(replica, world.now(), 100).await.unwrap());
    world.advance_ms(100);
    assert!(!world.store.renew_replica(replica, world.now(), 100).await.unwrap());
    world.submit(world.message("c")).await;
    assert!(world.claim_with(ClaimRequest { holder: replica, ..world.claim_request(1) }).await.is_empty());
    let fused = Accept { claim_for: Some((replica, RunningBound(9))), ..world.message("d") };
    assert!(matches!(world.accept(fused).await, AcceptResult::Accepted { claimed: None, .. }));
    // On the embedded store a restart expires whoever was there before.
    let mine = world.another_replica(100_000).await;
    let theirs = world.another_replica(100_000).await;
    assert_eq!(world.claim_with(ClaimRequest { holder: theirs, ..world.claim_request(9) }).await.len(), 2);
    assert_eq!(world.store.expire_other_replicas(mine, world.now()).await.unwrap(), 2);
    let taken = world.claim_with(ClaimRequest { holder: mine, ..world.claim_request(9) }).await;
    assert!(taken.len() == 2 && taken.iter().all(|claimed| claimed.restarted && claimed.attempt == 2));
}

pub(in crate::store) async fn r6_a_drain_spends_no_attempt_and_claims_nothing(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    world.store.drain_replica(world.replica).await.unwrap();
    assert_eq!(world.store.running_turns(world.replica).await.unwrap(), std::slice::from_ref(&claimed.lease));
    assert_eq!(world.requeue(&claimed, 0).await, Fenced::Done);
    assert!(world.claim(10).await.is_empty(), "a draining replica claims nothing");
    let other = world.another_replica(TTL_MS).await;
    let taken = world.claim_with(ClaimRequest { holder: other, ..world.claim_request(10) }).await.pop().unwrap();
    assert_eq!((taken.attempt, taken.lease.epoch, taken.restarted), (1, 3, true));
    assert_eq!(world.requeue(&taken, 0).await, Fenced::Done);
    let again = world.claim_with(ClaimRequest { holder: other, ..world.claim_request(10) }).await.pop().unwrap();
    assert_eq!(again.attempt, 1, "however often it is given back");
    world.store.retire_replica(other).await.unwrap();
    assert!(world.sweep().await.ready, "what a retired replica still held can be taken over");
}

pub(in crate::store) async fn r7_one_item_that_fails_in_a_batch_fails_alone(world: &World) {
    let running = world.submit_and_start(world.message("r")).await;
    let good = [world.message("a"), world.message("b")];
    // The edge refuses this one as org_mismatch; a store that is handed it all the same must not let its neighbours pay.
    let mut bad = world.message("c");
    bad.envelope.org = Some(org("zeta"));
    let accept = |accept: &Accept| Write::Accept(Box::new(accept.clone()));
    let written = world
        .batch(vec![
            accept(&good[0]),
            Write::Commit(Box::new(world.commit(&running, replied("ok")))),
            accept(&bad),
            accept(&good[1]),
        ])
        .await;
    assert!(matches!(
        &written[..],
        [
            Written::Accept(AcceptResult::Accepted { .. }),
            Written::Commit(CommitResult::Won(_)),
            Written::Failed(_),
            Written::Accept(AcceptResult::Accepted { .. })
        ]
    ));
    assert!(world.store.turn(&org("acme"), bad.turn).await.unwrap().is_none());
    assert!(world.store.conversation(&org("acme"), &agent(), &conversation("c")).await.unwrap().is_none());
    let live = world.store.live_counts().await.unwrap();
    assert_eq!((live.waiting, live.ready, live.running), (0, 2, 0));
    assert_eq!(world.claim(10).await.len(), 2);
}

pub(in crate::store) async fn a_reply_without_a_running_turn_is_lost(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    assert_eq!(world.requeue(&claimed, 0).await, Fenced::Done);
    // Whoever has no epoch, or one that does not run, has no instance that could have answered.
    let mut commit = world.commit(&claimed, replied("who?"));
    commit.epoch = None;
    assert!(matches!(world.end(commit.clone()).await, CommitResult::Lost));
    commit.epoch = Some(claimed.lease.epoch + 1);
    assert!(matches!(world.end(commit).await, CommitResult::Lost));
    assert_eq!(world.state(claimed.lease.turn).await, TurnState::Queued);
}

pub(in crate::store) async fn e1_event_ids_go_up_over_a_restart(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    let turn = claimed.lease.turn;
    assert_eq!(world.append(&claimed, deltas(1, &["a", "b"])).await, Fenced::Done);
    assert_eq!(world.append(&claimed, deltas(1, &["a", "b"])).await, Fenced::Done, "the journal's own retry");
    assert_eq!(world.append(&claimed, deltas(3, &["c"])).await, Fenced::Done);
    assert_eq!(world.requeue(&claimed, 0).await, Fenced::Done);
    let again = world.claim_one().await;
    assert_eq!((again.lease.epoch, again.first_epoch), (3, 1));
    assert_eq!(world.append(&again, deltas(1, &["a"])).await, Fenced::Done);
    let mut commit = world.commit(&again, replied("a"));
    commit.tail = deltas(2, &["", ""]);
    assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
    assert_eq!(world.event_ids(turn, None).await, ["1.1", "1.2", "1.3", "3.0", "3.1", "3.2", "3.3"]);
    let page = world.store.events(&org("acme"), turn, None, 1 << 20).await.unwrap().unwrap();
    assert_eq!(page.events[3].kind, "turn.restarted");
    assert_eq!(page.events[3].data.get(), r#"{"attempt":1}"#);
    assert_eq!(page.turn.epoch, 3);
}

pub(in crate::store) async fn e2_whoever_returns_sees_the_rest_and_nothing_twice(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    let turn = claimed.lease.turn;
    world.append(&claimed, deltas(1, &["a", "b", "c"])).await;
    world.append(&claimed, deltas(4, &["d"])).await;
    let mut commit = world.commit(&claimed, replied("abcdef"));
    commit.tail = deltas(5, &["e", "f"]);
    assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
    let all: Vec<EventId> = (1..=6).map(|seq| EventId::At(1, seq)).collect();
    for (seen, id) in
        std::iter::once(EventId::ACCEPTED).chain([EventId::At(1, 0)]).map(|id| (0, id)).chain(all.iter().map(|id| {
            let EventId::At(_, seq) = id else { unreachable!() };
            (*seq as usize, *id)
        }))
    {
        let rest: Vec<String> = all[seen..].iter().map(ToString::to_string).collect();
        assert_eq!(world.event_ids(turn, Some(id)).await, rest, "after {id}");
    }
    assert!(world.event_ids(turn, Some(EventId::End)).await.is_empty());
    assert!(world.event_ids(turn, Some(EventId::At(7, 0))).await.is_empty());
    assert!(world.store.events(&org("acme"), TurnId::new(), None, 1).await.unwrap().is_none());
}

pub(in crate::store) async fn events_come_in_pages(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    let turn = claimed.lease.turn;
    for seq in 1..=150 {
        world.append(&claimed, deltas(seq, &["0123456789"])).await;
    }
    let mut commit = world.commit(&claimed, replied("x"));
    commit.tail = deltas(151, &["0123456789"]);
    assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
    let (mut after, mut seen) = (None, Vec::new());
    for pages in 1.. {
        let page = world.store.events(&org("acme"), turn, after, 500).await.unwrap().unwrap();
        assert!(!page.events.is_empty(), "every page moves on");
        seen.extend(page.events.iter().map(|event| event.id));
        after = seen.last().copied();
        if !page.more {
            assert!(pages > 5, "500 bytes hold some ten of these events");
            break;
        }
    }
    assert_eq!(seen, (1..=151).map(|seq| EventId::At(1, seq)).collect::<Vec<_>>());
}

pub(in crate::store) async fn a_long_tail_reads_like_a_short_one(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    let mut commit = world.commit(&claimed, replied("x"));
    let long = "x".repeat(30_000);
    commit.tail = deltas(1, &[&long, "y"]);
    assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
    assert_eq!(world.event_ids(claimed.lease.turn, None).await, ["1.1", "1.2"]);
    assert_eq!(world.event_ids(claimed.lease.turn, Some(EventId::At(1, 1))).await, ["1.2"]);
}

pub(in crate::store) async fn worker_and_version_are_fixed_at_the_first_start(world: &World) {
    let fused = world.submit_and_start(world.message("c")).await;
    let queued = world.submit(world.message("d")).await;
    assert_eq!((fused.worker.clone(), fused.agent_revision), (Some((worker(), 1)), 1));
    world.upload(&org("acme"), &worker(), b"two").await;
    world.set_agent(&org("acme"), Some(2)).await;
    assert_eq!(world.requeue(&fused, 0).await, Fenced::Done);
    let claimed = world.claim(10).await;
    let of = |turn: TurnId| claimed.iter().find(|claimed| claimed.lease.turn == turn).unwrap();
    assert_eq!((of(fused.lease.turn).worker.clone(), of(fused.lease.turn).agent_revision), (Some((worker(), 1)), 2));
    assert_eq!(of(queued).worker, Some((worker(), 2)));
    assert_eq!(world.record(fused.lease.turn).await.worker, Some((worker(), 1)));
    let mut lost = world.message("e");
    lost.agent = AgentId::parse("nobody").unwrap();
    assert_eq!(world.submit_and_start(lost).await.worker, None, "its agent is gone");
}

pub(in crate::store) async fn a_submission_twice_is_one_turn(world: &World) {
    // The journal's own retry, when the answer to its COMMIT was lost.
    let message = world.message("c");
    let turn = world.submit(message.clone()).await;
    assert!(matches!(world.accept(message.clone()).await, AcceptResult::Attached(same) if same == turn));
    let interrupting = Accept { on_busy: OnBusy::Interrupt, ..message };
    assert!(matches!(world.accept(interrupting).await, AcceptResult::Attached(same) if same == turn));
    assert_eq!(world.state(turn).await, TurnState::Queued);
    assert_eq!(
        world.record(world.submit(world.message("c")).await).await.seq,
        Some(2),
        "no place was given out for it"
    );
}

pub(in crate::store) async fn usage_and_failure_are_kept(world: &World) {
    let claimed = world.submit_and_start(world.message("c")).await;
    let failure = Failure::new(FailureCode::WorkerExit, "exited").with("exit_code", 3);
    let usage = Usage {
        cpu_ms: 0.5,
        wall_ms: 1.25,
        memory_peak_bytes: 1 << 20,
        host_calls: 7,
        bytes_in: 3,
        bytes_out: 5,
        instance_ms: 0.75,
    };
    let mut commit = world.commit(&claimed, Outcome::Failed(failure.clone()));
    commit.usage = Some(usage);
    world.advance_ms(5);
    let CommitResult::Won(ended) = world.end(commit).await else { panic!("lost") };
    assert_eq!((ended.usage, ended.accepted_at, ended.ended_at), (Some(usage), claimed.accepted_at, world.now()));
    let record = world.record(claimed.lease.turn).await;
    assert_eq!((record.failure, record.usage, record.state), (Some(failure), Some(usage), TurnState::Failed));
    assert_eq!((record.started_at, record.ended_at), (Some(claimed.started_at), Some(world.now())));
    assert_eq!(record.message, claimed.message);
}

pub(in crate::store) async fn a_nul_byte_ends_nobodys_batch(world: &World) {
    let mut message = world.message("c");
    message.message = Bytes::from_static(b"{\"text\":\"a\0b\"}");
    message.key = Some(("k\0ey".to_owned(), [1; 32]));
    let claimed = world.submit_and_start(message.clone()).await;
    assert_eq!(world.append(&claimed, deltas(1, &["a\0b"])).await, Fenced::Done);
    assert!(matches!(world.end(world.commit(&claimed, replied("a\0b"))).await, CommitResult::Won(_)));
    let record = world.record(claimed.lease.turn).await;
    assert_eq!((record.message, record.state), (message.message.clone(), TurnState::Completed));
    let again = Accept { turn: TurnId::new(), ..message };
    assert!(matches!(world.accept(again).await, AcceptResult::Attached(turn) if turn == claimed.lease.turn));
}

pub(in crate::store) async fn stale_leases_are_named(world: &World) {
    let ended = world.submit_and_start(world.message("a")).await;
    let moved = world.submit_and_start(world.message("b")).await;
    let held = world.submit_and_start(world.message("c")).await;
    world.complete(&ended, None).await;
    world.requeue(&moved, 0).await;
    let mut stale = world.store.stale(&[ended.lease.clone(), moved.lease.clone(), held.lease.clone()]).await.unwrap();
    stale.sort();
    assert_eq!(stale, [ended.lease.turn, moved.lease.turn]);
    assert!(world.store.stale(&[]).await.unwrap().is_empty());
}

pub(in crate::store) async fn progress_tells_what_has_changed(world: &World) {
    let turn = world.submit(world.message("c")).await;
    let other = world.submit(world.message_of_zeta("c")).await;
    let asked = [(org("acme"), TurnId::new()), (org("acme"), turn), (org("acme"), other), (org("zeta"), other)];
    let look = || async {
        let found = world.store.progress(&asked).await.unwrap();
        assert_eq!(found.len(), asked.len(), "one answer a turn, in their order");
        assert!(found[0].is_none() && found[2].is_none(), "no such turn of this org");
        assert!(found[3].is_some());
        found[1].expect("it is there")
    };
    let queued = look().await;
    assert_eq!(queued, Progress { ended: false, running: false, epoch: 0, logged: None });
    assert_eq!(look().await, queued, "nothing has changed");
    let claimed = world.claim(10).await.into_iter().find(|claimed| claimed.lease.turn == turn).unwrap();
    let running = look().await;
    assert_eq!(running, Progress { ended: false, running: true, epoch: claimed.lease.epoch, logged: None });
    world.append(&claimed, deltas(1, &["a", "b"])).await;
    world.append(&claimed, deltas(3, &["c"])).await;
    assert_eq!(look().await, Progress { logged: Some((claimed.lease.epoch, 3)), ..running });
    world.requeue(&claimed, 0).await;
    let requeued = look().await;
    assert_eq!((requeued.running, requeued.epoch), (false, claimed.lease.epoch + 1));
    let again = world.claim_one().await;
    assert_eq!(look().await.logged, Some((again.lease.epoch, 0)), "turn.restarted is in the log");
    world.complete(&again, None).await;
    let ended = look().await;
    assert_eq!((ended.ended, ended.running, ended.epoch), (true, false, again.lease.epoch));
    assert!(world.store.progress(&[]).await.unwrap().is_empty());
}
