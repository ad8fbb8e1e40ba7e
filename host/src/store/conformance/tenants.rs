//! Orgs and members: the same names on both sides, and nothing of one in the other.

use super::*;
use crate::admission::Refusal;
use crate::caller::Caller;

pub(in crate::store) async fn o1_the_same_names_in_two_orgs_never_meet(world: &World) {
    let key = Some(("k".to_owned(), [1; 32]));
    let mine = world.submit_and_start(Accept { key: key.clone(), ..world.message("c") }).await;
    // The very same turn id, conversation, user and key.
    let theirs = Accept { turn: mine.lease.turn, key, ..world.message_of_zeta("c") };
    let theirs = world.submit_and_start(theirs).await;
    world.append(&theirs, deltas(1, &["secret"])).await;
    assert!(world.event_ids(mine.lease.turn, None).await.is_empty());
    world.complete(&theirs, Some(b"secret")).await;
    assert_eq!(world.state(mine.lease.turn).await, TurnState::Running);
    world.complete(&mine, Some(b"mine")).await;
    let next = world.submit_and_start(world.message("c")).await;
    assert_eq!(next.head.unwrap().snapshot.unwrap().body.as_deref(), Some(&b"mine"[..]));
    world
        .store
        .delete_conversation(&org("zeta"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
    assert_eq!(world.state(mine.lease.turn).await, TurnState::Completed);
    let page = |of: &'static str| {
        let (org, agent) = (org(of), agent());
        async move { world.store.conversations(&org, &agent, None, None, 10).await.unwrap().items.len() }
    };
    assert_eq!((page("acme").await, page("zeta").await), (1, 0));
    let found = world.store.turn(&org("acme"), mine.lease.turn).await.unwrap().unwrap();
    let caller = Caller { org: org("zeta"), user: user("ann"), scopes: Scopes::ADMIN, credential: "key:1".into() };
    assert!(found.open(&caller).is_none());
}

pub(in crate::store) async fn o2_anothers_conversation_is_not_found(world: &World) {
    let keyed = Accept { key: Some(("k".to_owned(), [1; 32])), ..world.message("c") };
    world.submit(keyed.clone()).await;
    for on_busy in [OnBusy::Enqueue, OnBusy::Reject, OnBusy::Interrupt] {
        let bob = Accept { turn: TurnId::new(), user: user("bob"), on_busy, ..keyed.clone() };
        let refused = world.accept(bob).await;
        assert!(matches!(refused, AcceptResult::Refused(Refusal::NotFound)), "ownership comes before key and busy");
    }
    assert_eq!(world.state(keyed.turn).await, TurnState::Queued);
    let opened = world
        .store
        .open_conversation(&org("acme"), &agent(), &conversation("c"), &user("bob"), world.now())
        .await
        .unwrap();
    let Opening::Found(found) = opened else { panic!("it is there") };
    let bob = Caller { org: org("acme"), user: user("bob"), scopes: Scopes::TURNS, credential: "key:1".into() };
    assert!(found.open(&bob).is_none());
    let mine = world.store.conversations(&org("acme"), &agent(), Some(&user("bob")), None, 10).await.unwrap();
    assert!(mine.items.is_empty());
}

/// Whose it is, is looked at where it is changed: between a look and a change it may have gone and begun again as another's.
pub(in crate::store) async fn o2_anothers_conversation_is_neither_deleted_nor_reset_nor_named(world: &World) {
    let (of, agent, id) = (org("acme"), agent(), conversation("c"));
    let turn = world.submit_and_start(world.message("c")).await;
    world.complete(&turn, Some(b"kept")).await;
    let acts = super::audit::all(world, "acme").await.len();
    let named: NotesChange = serde_json::from_str(r#"{"title": "mine now"}"#).unwrap();
    let (store, now, by) = (&world.store, world.now(), by());
    let (ann, bob) = (user("ann"), user("bob"));
    for (whose, there) in [(&bob, &id), (&ann, &conversation("d"))] {
        assert!(!store.write_notes(&of, &agent, there, Some(whose), &named).await.unwrap());
        assert!(!store.reset_snapshot(&of, &agent, there, Some(whose), now, &by).await.unwrap());
        assert!(store.delete_conversation(&of, &agent, there, Some(whose), now, &by).await.unwrap().is_none());
    }
    let record = store.conversation(&of, &agent, &id).await.unwrap().unwrap().for_host();
    assert_eq!((record.user, record.title, record.snapshot_run), (ann.clone(), None, Some(turn.lease.turn.into())));
    assert_eq!(super::audit::all(world, "acme").await.len(), acts, "nothing was done");
    assert!(store.write_notes(&of, &agent, &id, Some(&ann), &named).await.unwrap());
    assert!(store.reset_snapshot(&of, &agent, &id, Some(&ann), now, &by).await.unwrap());
    assert!(store.delete_conversation(&of, &agent, &id, Some(&ann), now, &by).await.unwrap().is_some());
    assert!(store.delete_conversation(&of, &agent, &id, Some(&ann), now, &by).await.unwrap().is_none(), "it is gone");
    assert_eq!(super::audit::all(world, "acme").await.len(), acts + 2);
}

pub(in crate::store) async fn an_admin_sees_every_conversation(world: &World) {
    world.submit(world.message("c")).await;
    let admin = Accept { user: user("root"), sees_all: true, ..world.message("c") };
    let turn = world.submit(admin).await;
    assert_eq!(world.record(turn).await.seq, Some(2));
    let found = world.store.conversation(&org("acme"), &agent(), &conversation("c")).await.unwrap().unwrap();
    assert_eq!(found.for_host().user, user("ann"), "it still is who began it");
}

pub(in crate::store) async fn deleting_one_conversation_leaves_its_neighbours(world: &World) {
    let mut kept = Vec::new();
    for lane in ["b", "c", "c2"] {
        let claimed = world.submit_and_start(world.message(lane)).await;
        world.append(&claimed, deltas(1, &[lane])).await;
        world.complete(&claimed, Some(b"state")).await;
        kept.push(claimed.lease.turn);
    }
    world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
    for (lane, turn) in [("b", kept[0]), ("c2", kept[2])] {
        assert_eq!(world.event_ids(turn, None).await, ["1.1"]);
        assert!(world.submit_and_start(world.message(lane)).await.head.unwrap().snapshot.is_some());
    }
}
