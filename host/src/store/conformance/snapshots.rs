//! Snapshots: who may write one, on which head, and what a deletion leaves.

use super::*;
use crate::turn::FailureCode;

pub(in crate::store) async fn s2_without_a_permit_no_snapshot_is_written(world: &World) {
    // A permit is good for its own run, org and conversation and for nothing else.
    let other = world.submit_and_start(world.message("other")).await;
    let theirs = world.submit_and_start(world.message_of_zeta("c")).await;
    let mine = world.submit_and_start(world.message("c")).await;
    for stolen in [&other, &theirs] {
        let mut commit = world.commit(&mine, replied("x"));
        let mut staged = world.stage(stolen, b"x");
        staged.parent = mine.head.as_ref().unwrap().parent;
        commit.snapshot = Some(staged);
        assert!(matches!(world.end(commit).await, CommitResult::SnapshotConflict));
    }
    assert_eq!(world.state(mine.lease.turn).await, TurnState::Running, "nothing was written");
    let mut without = world.commit(&mine, replied("x"));
    without.snapshot = None;
    assert!(matches!(world.end(without).await, CommitResult::Won(_)));
    assert!(world.submit_and_start(world.message("c")).await.head.unwrap().snapshot.is_none());
}

pub(in crate::store) async fn s3_snapshots_form_one_chain(world: &World) {
    let mut parent = None;
    for round in 0..15 {
        let claimed = world.submit_and_start(world.message("c")).await;
        let head = claimed.head.clone().unwrap();
        match parent {
            None => assert!(head.snapshot.is_none()),
            Some(run) => {
                assert_eq!((head.parent, head.snapshot.as_ref().unwrap().run_id.0), (run, run));
                assert_eq!(head.snapshot.unwrap().body.as_deref(), Some(&b"state"[..]));
            }
        }
        if round % 5 == 4 {
            world.complete(&claimed, None).await;
            continue;
        }
        world.complete(&claimed, Some(b"state")).await;
        parent = Some(claimed.lease.turn.0);
    }
}

pub(in crate::store) async fn s3_two_first_snapshots_collide(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    let root = first.head.as_ref().unwrap().parent;
    world.complete(&first, Some(b"one")).await;
    let second = world.submit_and_start(world.message("c")).await;
    let mut commit = world.commit(&second, replied("x"));
    let mut staged = world.stage(&second, b"two");
    staged.parent = root;
    commit.snapshot = Some(staged);
    assert!(matches!(world.end(commit).await, CommitResult::SnapshotConflict));
    world.complete(&second, Some(b"two")).await;
}

pub(in crate::store) async fn s4_a_failed_turn_leaves_the_snapshot(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    world.complete(&first, Some(b"good")).await;
    for outcome in [failed(FailureCode::WorkerTrapped), failed(FailureCode::TurnTimeout), cancelled()] {
        let claimed = world.submit_and_start(world.message("c")).await;
        let mut commit = world.commit(&claimed, outcome);
        commit.snapshot = Some(world.stage(&claimed, b"bad"));
        assert!(matches!(world.end(commit.clone()).await, CommitResult::SnapshotConflict));
        commit.snapshot = None;
        assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
    }
    let head = world.submit_and_start(world.message("c")).await.head.unwrap();
    assert_eq!(head.parent, first.lease.turn.0);
    assert_eq!(head.snapshot.unwrap().body.as_deref(), Some(&b"good"[..]));
}

pub(in crate::store) async fn s7_a_snapshot_belongs_to_the_run_that_wrote_it(world: &World) {
    let run_id = RunId::new();
    let mut message = world.message("c");
    message.envelope.run_id = Some(run_id);
    let claimed = world.submit_and_start(message).await;
    world.complete(&claimed, Some(b"mine")).await;
    let skipped = world.submit_and_start(world.message("c")).await;
    world.complete(&skipped, None).await;
    let head = world.submit_and_start(world.message("c")).await.head.unwrap();
    assert_eq!(head.snapshot.unwrap().run_id, run_id, "not the latest run's: the one that wrote it");
    let record = world.store.conversation(&org("acme"), &agent(), &conversation("c")).await.unwrap().unwrap();
    assert_eq!(record.for_host().snapshot_run, Some(run_id));
}

pub(in crate::store) async fn s8_a_deleted_conversation_starts_from_nothing(world: &World) {
    let keyed = || Accept { key: Some(("k".to_owned(), [1; 32])), ..world.message("c") };
    let first = world.submit_and_start(keyed()).await;
    world.append(&first, deltas(1, &["a"])).await;
    world.complete(&first, Some(b"old")).await;
    let (of, agent, id) = (org("acme"), agent(), conversation("c"));
    assert!(
        world.store.delete_conversation(&of, &agent, &id, None, world.now(), &by()).await.unwrap().unwrap().is_empty()
    );
    assert!(world.store.conversation(&of, &agent, &id).await.unwrap().is_none());
    assert!(world.store.turn(&of, first.lease.turn).await.unwrap().is_none());
    assert!(world.store.events(&of, first.lease.turn, None, 1).await.unwrap().is_none());
    assert!(world.store.conversations(&of, &agent, None, None, 10).await.unwrap().items.is_empty());
    // Whoever begins it again owns it; the key is forgotten; the place goes on.
    let again = world.submit_and_start(Accept { user: user("bob"), ..keyed() }).await;
    let head = again.head.clone().unwrap();
    assert!(head.snapshot.is_none());
    assert_ne!(head.parent, first.head.unwrap().parent, "another root");
    assert_eq!(again.seq, Some(2));
    world.complete(&again, Some(b"new")).await;
    let record = world.store.conversation(&of, &agent, &id).await.unwrap().unwrap().for_host();
    assert_eq!((record.user, record.snapshot_run), (user("bob"), Some(again.lease.turn.into())));
}

pub(in crate::store) async fn s8_deleting_ends_live_turns(world: &World) {
    let running = world.submit_and_start(world.message("c")).await;
    let waiting = world.submit(world.message("c")).await;
    let mut homeless = world.message("c");
    homeless.envelope.org = None;
    let homeless = world.submit(homeless).await;
    let ended = world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
    let ended = ended.expect("it was there");
    let mut turns: Vec<TurnId> = ended.iter().map(|ended| ended.turn).collect();
    turns.sort();
    assert_eq!(turns, [running.lease.turn, waiting, homeless]);
    assert!(
        ended.iter().all(|ended| ended.outcome == Outcome::Cancelled { by: CancelledBy::Deleted } && !ended.promoted)
    );
    let mut late = world.commit(&running, replied("late"));
    late.snapshot = Some(world.stage(&running, b"late"));
    assert!(matches!(world.end(late).await, CommitResult::Lost));
    assert!(world.submit_and_start(world.message("c")).await.head.unwrap().snapshot.is_none());
}

pub(in crate::store) async fn a_reset_starts_a_new_chain(world: &World) {
    let first = world.submit_and_start(world.message("c")).await;
    world.complete(&first, Some(b"old")).await;
    let running = world.submit_and_start(world.message("c")).await;
    world.store.reset_snapshot(&org("acme"), &agent(), &conversation("c"), None, world.now(), &by()).await.unwrap();
    let mut commit = world.commit(&running, replied("x"));
    commit.snapshot = Some(world.stage(&running, b"of the old chain"));
    assert!(matches!(world.end(commit.clone()).await, CommitResult::SnapshotConflict));
    commit.snapshot = None;
    assert!(matches!(world.end(commit).await, CommitResult::Won(_)));
    let next = world.submit_and_start(world.message("c")).await;
    assert!(next.head.as_ref().unwrap().snapshot.is_none());
    assert_eq!(world.state(first.lease.turn).await, TurnState::Completed, "turns stay");
    world.complete(&next, Some(b"new")).await;
}

pub(in crate::store) async fn a_run_id_writes_once(world: &World) {
    let run_id = RunId::new();
    let with_run = || {
        let mut message = world.message("c");
        message.envelope.run_id = Some(run_id);
        message
    };
    let first = world.submit_and_start(with_run()).await;
    world.complete(&first, Some(b"one")).await;
    let between = world.submit_and_start(world.message("c")).await;
    world.complete(&between, Some(b"two")).await;
    let again = world.submit_and_start(with_run()).await;
    let mut commit = world.commit(&again, replied("x"));
    commit.snapshot = Some(world.stage(&again, b"three"));
    assert!(matches!(world.end(commit).await, CommitResult::SnapshotConflict));
    world.complete(&again, None).await;
}

pub(in crate::store) async fn s8_a_file_turn_has_its_conversations_generation(world: &World) {
    let (of, agent, id) = (org("acme"), agent(), conversation("c"));
    let message = || {
        let mut message = world.message("c");
        message.envelope.mode = SessionMode::File;
        message
    };
    let known = async || world.store.generation(&of, &agent, &id).await.unwrap();
    assert_eq!(known().await, None);
    let first = world.submit_and_start(message()).await;
    assert!(first.head.is_none() && first.generation.is_some());
    assert_eq!(known().await, first.generation);
    // Claimed in either way, and at every turn, it is the same.
    let second = world.submit(message()).await;
    world.complete(&first, None).await;
    let claimed = world.claim_one().await;
    assert_eq!((claimed.lease.turn, claimed.generation), (second, first.generation));
    world.complete(&claimed, None).await;

    world.store.reset_snapshot(&of, &agent, &id, None, world.now(), &by()).await.unwrap();
    let reset = world.submit_and_start(message()).await;
    assert!(reset.generation.is_some() && reset.generation != first.generation);
    world.store.delete_conversation(&of, &agent, &id, None, world.now(), &by()).await.unwrap();
    let deleted = known().await;
    assert!(deleted.is_some() && deleted != reset.generation, "its row stays, with another generation");
    let again = world.submit_and_start(message()).await;
    assert_eq!(again.generation, deleted);
    // In snapshot mode it is nobody's business.
    world.complete(&again, None).await;
    assert_eq!(world.submit_and_start(world.message("c")).await.generation, None);
}
