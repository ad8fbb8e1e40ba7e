//! Workers, agents, orgs, keys, conversations as they are listed.

use super::*;

pub(in crate::store) async fn workers_have_versions_by_their_bytes(world: &World) {
    let acme = org("acme");
    let PutWorker::Existing(same) = world.upload(&acme, &worker(), b"one").await else { panic!("made again") };
    assert_eq!((same.version, same.size, same.imports.len(), same.compile_ms), (1, 3, 1, 1.5));
    let PutWorker::Created(two) = world.upload(&acme, &worker(), b"two").await else { panic!("not made") };
    assert_eq!(two.version, 2);
    let versions = world.store.worker_versions(&acme, &worker()).await.unwrap();
    assert_eq!(versions.iter().map(|version| version.version).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(world.store.workers(&acme, None, 10).await.unwrap().items[0].version, 2);
    assert_eq!(world.store.module(&acme, two.digest).await.unwrap().as_deref(), Some(&b"two"[..]));
    assert!(world.store.module(&org("zeta"), two.digest).await.unwrap().is_none(), "modules are an org's");
    assert!(world.store.worker_version(&acme, &worker(), 3).await.unwrap().is_none());
    for (name, fits) in [("second", true), ("third", true), ("fourth", false)] {
        let put = world.upload(&acme, &WorkerName::parse(name).unwrap(), b"one").await;
        assert_eq!(matches!(put, PutWorker::Created(_)), fits, "{put:?}");
    }
}

pub(in crate::store) async fn old_versions_go_and_used_ones_stay(world: &World) {
    let acme = org("acme");
    world.upload(&acme, &worker(), b"two").await;
    // Version 1 is pinned; 2 is the oldest that nobody uses.
    assert!(matches!(world.upload(&acme, &worker(), b"three").await, PutWorker::Created(made) if made.version == 3));
    let versions = world.store.worker_versions(&acme, &worker()).await.unwrap();
    assert_eq!(versions.iter().map(|version| version.version).collect::<Vec<_>>(), [3, 1]);
    // A live turn started with 1 and the pin moves to 3: both are used now.
    let live = world.submit_and_start(world.message("c")).await;
    world.set_agent(&acme, None).await;
    assert!(matches!(world.upload(&acme, &worker(), b"four").await, PutWorker::Full(WorkerFull::Versions(2))));
    world.complete(&live, None).await;
    let gone = versions[1].digest;
    assert!(matches!(world.upload(&acme, &worker(), b"four").await, PutWorker::Created(made) if made.version == 4));
    assert!(world.store.module(&acme, gone).await.unwrap().is_none(), "its bytes went with it");
    assert!(world.store.module(&org("zeta"), gone).await.unwrap().is_some());
}

pub(in crate::store) async fn a_used_worker_is_not_deleted(world: &World) {
    let acme = org("acme");
    assert!(
        matches!(world.store.delete_worker(&acme, &worker(), world.now(), &by()).await.unwrap(), Deleted::InUse(by) if by.contains("support"))
    );
    let digest = world.store.worker_version(&acme, &worker(), 1).await.unwrap().unwrap().digest;
    assert_eq!(world.store.delete_agent(&acme, &agent(), world.now(), &by()).await.unwrap(), Deleted::Done);
    assert_eq!(world.store.delete_worker(&acme, &worker(), world.now(), &by()).await.unwrap(), Deleted::Done);
    assert_eq!(world.store.delete_worker(&acme, &worker(), world.now(), &by()).await.unwrap(), Deleted::NotFound);
    assert!(world.store.module(&acme, digest).await.unwrap().is_none());
    assert!(world.store.worker_versions(&acme, &worker()).await.unwrap().is_empty());
}

pub(in crate::store) async fn agents_pin_versions_and_one_is_default(world: &World) {
    let acme = org("acme");
    world.upload(&acme, &worker(), b"two").await;
    assert!(matches!(world.set_agent(&acme, Some(7)).await, PutAgent::NoSuchWorker));
    let put = |id: &'static str, default| {
        let settings = AgentSettings { default, ..AgentSettings::of(worker()) };
        let acme = acme.clone();
        async move {
            world.store.put_agent(&acme, &AgentId::parse(id).unwrap(), settings, 3, world.now(), &by()).await.unwrap()
        }
    };
    assert!(world.store.default_agent(&acme).await.unwrap().is_none());
    let PutAgent::Stored { agent: first, created: true } = put("first", true).await else { panic!("not stored") };
    assert_eq!((first.settings.version, first.revision), (Some(2), 1), "the newest, from now on fixed");
    put("second", true).await;
    assert_eq!(world.store.default_agent(&acme).await.unwrap().unwrap().id.as_str(), "second");
    let first = world.store.agent(&acme, &first.id).await.unwrap().unwrap();
    assert_eq!((first.settings.default, first.revision), (false, 2), "a change is a revision");
    assert!(matches!(put("third", false).await, PutAgent::Full));
    let PutAgent::Stored { agent: changed, created: false } = world.set_agent(&acme, Some(1)).await else {
        panic!("not changed")
    };
    assert_eq!((changed.revision, changed.settings.version), (2, Some(1)));
    assert_eq!(world.store.agent(&acme, &agent()).await.unwrap(), Some(changed));
}

pub(in crate::store) async fn an_agent_with_conversations_is_not_deleted(world: &World) {
    let (acme, agent) = (org("acme"), agent());
    world.submit(world.message("c")).await;
    assert!(
        matches!(world.store.delete_agent(&acme, &agent, world.now(), &by()).await.unwrap(), Deleted::InUse(by) if by.contains('c'))
    );
    world.store.delete_conversation(&acme, &agent, &conversation("c"), None, world.now(), &by()).await.unwrap();
    assert_eq!(world.store.delete_agent(&acme, &agent, world.now(), &by()).await.unwrap(), Deleted::Done);
    assert_eq!(world.store.delete_agent(&acme, &agent, world.now(), &by()).await.unwrap(), Deleted::NotFound);
}

pub(in crate::store) async fn lists_have_cursors(world: &World) {
    let (acme, agent) = (org("acme"), agent());
    for lane in ["a", "b", "c"] {
        world.submit(world.message(lane)).await;
    }
    world.submit(Accept { user: user("bob"), ..world.message("bobs") }).await;
    let page = world.store.conversations(&acme, &agent, None, None, 2).await.unwrap();
    assert_eq!(page.items.iter().map(|found| found.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(page.more);
    let page = world.store.conversations(&acme, &agent, None, Some(&conversation("b")), 2).await.unwrap();
    assert_eq!(page.items.iter().map(|found| found.id.as_str()).collect::<Vec<_>>(), ["bobs", "c"]);
    assert!(!page.more);
    let page = world.store.conversations(&acme, &agent, Some(&user("ann")), Some(&conversation("a")), 9).await.unwrap();
    assert_eq!(page.items.iter().map(|found| found.id.as_str()).collect::<Vec<_>>(), ["b", "c"]);

    let turns: Vec<TurnId> = {
        let mut turns = Vec::new();
        for _ in 0..5 {
            turns.push(world.submit(world.message("d")).await);
        }
        turns
    };
    let list = |after, direction| {
        let (acme, agent) = (acme.clone(), agent.clone());
        async move { world.store.turns(&acme, &agent, &conversation("d"), after, direction, true, 2).await.unwrap() }
    };
    let ids = |page: &Page<TurnRecord>| page.items.iter().map(|turn| turn.id).collect::<Vec<_>>();
    let page = list(None, Direction::Forward).await;
    assert_eq!((ids(&page), page.more), (turns[..2].to_vec(), true));
    let page = list(page.items[1].seq, Direction::Forward).await;
    assert_eq!((ids(&page), page.more), (turns[2..4].to_vec(), true));
    let page = list(None, Direction::Backward).await;
    assert_eq!((ids(&page), page.more), (vec![turns[4], turns[3]], true));
    let page = list(Some(2), Direction::Backward).await;
    assert_eq!((ids(&page), page.more), (vec![turns[0]], false));

    let page = world.store.agents(&acme, None, 10).await.unwrap();
    assert_eq!(page.items.iter().map(|agent| agent.id.as_str()).collect::<Vec<_>>(), ["support"]);
    assert!(world.store.agents(&acme, Some(&agent), 10).await.unwrap().items.is_empty());
    assert!(world.store.workers(&acme, Some(&worker()), 10).await.unwrap().items.is_empty());
}

pub(in crate::store) async fn keys_are_found_by_hash_and_revoked(world: &World) {
    let key = KeyRecord {
        id: "0123456789abcdef".to_owned(),
        org: org("acme"),
        user: user("ann"),
        scopes: Scopes::TURNS.and(Scopes::DEPLOY),
        name: "laptop".to_owned(),
        created_at: world.now(),
        expires_at: Some(world.now().plus_ms(1_000)),
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    assert!(world.store.create_key([7; 32], &key, &by()).await.unwrap());
    let stray = KeyRecord { org: org("nowhere"), ..key.clone() };
    assert!(!world.store.create_key([8; 32], &stray, &by()).await.unwrap());
    assert!(world.store.key([8; 32]).await.unwrap().is_none());
    let found = world.store.key([7; 32]).await.unwrap().unwrap();
    assert_eq!((found.org, found.user, found.scopes), (key.org.clone(), key.user, key.scopes));
    assert_eq!((found.name, found.expires_at), (key.name, key.expires_at));
    world.store.touch_keys(&[(org("acme"), key.id.clone())], world.now()).await.unwrap();
    let used = world.store.key([7; 32]).await.unwrap().unwrap().last_used_at.unwrap();
    assert_eq!(used.0 % 60_000, 0, "to the minute");
    assert!(!world.store.revoke_key(&org("zeta"), &key.id, world.now(), &by()).await.unwrap(), "not another org's");
    assert!(world.store.revoke_key(&org("acme"), &key.id, world.now(), &by()).await.unwrap());
    let revoked = world.now();
    world.advance_ms(5);
    world.store.revoke_key(&org("acme"), &key.id, world.now(), &by()).await.unwrap();
    assert_eq!(world.store.keys(&org("acme")).await.unwrap()[0].revoked_at, Some(revoked), "once revoked, so it stays");
    assert!(world.store.keys(&org("zeta")).await.unwrap().is_empty());
    let by_id = world.store.key_by_id(&org("acme"), &key.id).await.unwrap().unwrap();
    assert_eq!((by_id.user, by_id.revoked_at), (user("ann"), Some(revoked)));
    assert!(world.store.key_by_id(&org("zeta"), &key.id).await.unwrap().is_none(), "not another org's");
}

pub(in crate::store) async fn a_rotated_key_ends_after_its_overlap_and_has_one_successor(world: &World) {
    let (now, actor) = (world.now(), by());
    let key = |id: &str, lives_ms: Option<u64>| KeyRecord {
        id: id.to_owned(),
        org: org("acme"),
        user: user("ann"),
        scopes: Scopes::TURNS,
        name: "laptop".to_owned(),
        created_at: now,
        expires_at: lives_ms.map(|ms| now.plus_ms(ms)),
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    let by_id = async |id: &str| world.store.key_by_id(&org("acme"), id).await.unwrap().unwrap();
    assert!(world.store.create_key([1; 32], &key("old", None), &actor).await.unwrap());
    let (one, other) = (key("one", Some(9_000)), key("other", None));
    let (one, other) = tokio::join!(
        world.store.rotate_key("old", [2; 32], &one, 1_000, &actor),
        world.store.rotate_key("old", [3; 32], &other, 1_000, &actor)
    );
    assert_ne!(one.as_ref().unwrap(), other.as_ref().unwrap(), "one successor");
    let (next, lives) = if one.unwrap() { ("one", Some(now.plus_ms(9_000))) } else { ("other", None) };
    let old = by_id("old").await;
    assert_eq!((old.successor.as_deref(), old.expires_at), (Some(next), Some(now.plus_ms(1_000))));
    let new = by_id(next).await;
    assert_eq!((new.user, new.name, new.expires_at, new.successor), (user("ann"), "laptop".to_owned(), lives, None));
    assert_eq!(world.store.keys(&org("acme")).await.unwrap().len(), 2, "what lost is not stored");
    let rotations: Vec<_> =
        super::audit::all(world, "acme").await.into_iter().filter(|entry| entry.verb == "key.rotate").collect();
    assert_eq!(rotations.len(), 1, "{rotations:?}");
    assert!(rotations[0].resource == "key/old" && rotations[0].detail.to_string().contains(next), "{rotations:?}");
    // An end that is nearer stays; what has ended, was revoked, or is another org's has no successor.
    assert!(world.store.create_key([4; 32], &key("short", Some(500)), &actor).await.unwrap());
    assert!(world.store.rotate_key("short", [5; 32], &key("long", Some(500)), 1_000, &actor).await.unwrap());
    assert_eq!(by_id("short").await.expires_at, Some(now.plus_ms(500)));
    assert!(world.store.create_key([6; 32], &key("over", Some(0)), &actor).await.unwrap());
    assert!(world.store.create_key([7; 32], &key("revoked", None), &actor).await.unwrap());
    world.store.revoke_key(&org("acme"), "revoked", now, &actor).await.unwrap();
    for id in ["over", "revoked", "nothing"] {
        assert!(!world.store.rotate_key(id, [8; 32], &key("late", None), 1_000, &actor).await.unwrap(), "{id}");
    }
    let theirs = KeyRecord { org: org("zeta"), ..key("late", None) };
    assert!(!world.store.rotate_key(next, [8; 32], &theirs, 1_000, &actor).await.unwrap());
    assert!(world.store.key([8; 32]).await.unwrap().is_none());
}

pub(in crate::store) async fn o1_whoever_leaves_an_org_leaves_no_key_behind(world: &World) {
    let (now, actor, of) = (world.now(), by(), org("acme"));
    let key = |id: String, who: &UserId| KeyRecord {
        id,
        org: of.clone(),
        user: who.clone(),
        scopes: Scopes::TURNS,
        name: "laptop".to_owned(),
        created_at: now,
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    for n in 0..10_u8 {
        let who = user(&format!("guest-{n}"));
        let joined = world.store.put_member(&of, &who, Role::Member, None, 100, now, &actor).await.unwrap();
        assert!(matches!(joined, PutMember::Stored { created: true, .. }), "{joined:?}");
        let (old, new) = (key(format!("old-{n}"), &who), key(format!("new-{n}"), &who));
        assert!(world.store.create_key([n; 32], &old, &actor).await.unwrap());
        let (rotated, removed) = tokio::join!(
            world.store.rotate_key(&old.id, [n + 100; 32], &new, 1_000, &actor),
            world.store.remove_member(&of, &who, None, now, &actor)
        );
        assert_eq!((rotated.is_ok(), removed.unwrap()), (true, RemoveMember::Done));
        let left = world.store.keys(&of).await.unwrap();
        let alive: Vec<_> = left.iter().filter(|key| key.user == who && key.revoked_at.is_none()).collect();
        assert!(alive.is_empty(), "{alive:?}");
    }
}

pub(in crate::store) async fn ticket_keys_are_added_in_order_and_two_are_kept(world: &World) {
    let add = |number: i64, byte: u8| world.store.add_ticket_key(number, [byte; 32], world.now());
    assert!(world.store.ticket_keys().await.unwrap().is_empty());
    assert!(!add(2, 9).await.unwrap(), "the first is 1");
    let (one, other) = tokio::join!(add(1, 1), add(1, 2));
    assert_ne!(one.unwrap(), other.unwrap(), "of two hosts one is first");
    assert!(!add(1, 3).await.unwrap());
    let first = world.store.ticket_keys().await.unwrap().pop().unwrap();
    assert_eq!((first.number, first.created_at), (1, world.now()));
    assert!(first.secret == [1; 32] || first.secret == [2; 32]);
    assert!(!format!("{first:?}").contains(&format!("{:?}", first.secret)));
    assert!(add(2, 4).await.unwrap() && add(3, 5).await.unwrap());
    let kept = world.store.ticket_keys().await.unwrap();
    let kept: Vec<_> = kept.iter().map(|key| (key.number, key.secret)).collect();
    assert_eq!(kept, [(3, [5; 32]), (2, [4; 32])]);
}

pub(in crate::store) async fn orgs_are_made_once(world: &World) {
    assert!(!world.store.create_org(&org("acme"), &user("eve"), world.now(), &by()).await.unwrap());
    assert!(world.store.create_org(&org("beta"), &user("eve"), world.now(), &by()).await.unwrap());
    let beta = world.store.org(&org("beta")).await.unwrap().unwrap();
    assert_eq!((beta.id, beta.owner), (org("beta"), user("eve")));
    assert!(world.store.org(&org("nowhere")).await.unwrap().is_none());
    let orgs = world.store.orgs().await.unwrap();
    let named: Vec<_> = orgs.iter().map(|org| (org.id.as_str(), org.owner.as_str())).collect();
    assert_eq!(named, [("acme", "root"), ("beta", "eve"), ("zeta", "root")]);
    world.store.ping().await.unwrap();
}

pub(in crate::store) async fn conversations_are_opened_once(world: &World) {
    let open = |by: &'static str| async move {
        let by = user(by);
        world.store.open_conversation(&org("acme"), &agent(), &conversation("c"), &by, world.now()).await.unwrap()
    };
    let Opening::Made(first) = open("ann").await else { panic!("there was none") };
    assert!(first.for_host().snapshot_run.is_none());
    let Opening::Found(again) = open("bob").await else { panic!("there is one") };
    assert_eq!(again.for_host().user, user("ann"));
    assert_eq!(world.submit_and_start(world.message("c")).await.seq, Some(1));
    world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
    let Opening::Made(reborn) = open("bob").await else { panic!("it was deleted") };
    assert_eq!(reborn.for_host().user, user("bob"));
}

pub(in crate::store) async fn s8_a_title_goes_with_its_conversation_and_stays_over_a_reset(world: &World) {
    use crate::notes::NotesChange;
    let (acme, agent, id) = (org("acme"), agent(), conversation("c"));
    let change = |json: &str| serde_json::from_str::<NotesChange>(json).unwrap();
    let write =
        async |org: &OrgId, json: &str| world.store.write_notes(org, &agent, &id, None, &change(json)).await.unwrap();
    assert!(!write(&acme, r#"{"title": "too soon"}"#).await, "there is no such conversation");
    world.submit(world.message("c")).await;
    world.submit(world.message_of_zeta("c")).await;
    let read = async |org: &OrgId| {
        let found = world.store.conversation(org, &agent, &id).await.unwrap().unwrap().for_host();
        let listed = world.store.conversations(org, &agent, None, None, 9).await.unwrap().items.remove(0);
        assert_eq!((&listed.title, &listed.metadata), (&found.title, &found.metadata));
        (found.title, found.metadata.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>())
    };
    let is = |title: Option<&str>, metadata: &[&str]| {
        (title.map(str::to_owned), metadata.iter().map(|entry| (*entry).to_owned()).collect::<Vec<_>>())
    };
    assert_eq!(read(&acme).await, is(None, &[]));
    assert!(write(&acme, r#"{"title": "it's\u00e4 \\ title", "metadata": {"a": "1", "b": "2"}}"#).await);
    assert_eq!(read(&acme).await, is(Some("it's\u{e4} \\ title"), &["a=1", "b=2"]));
    assert!(write(&acme, r#"{"metadata": {"c": "3"}}"#).await);
    assert_eq!(read(&acme).await, is(Some("it's\u{e4} \\ title"), &["c=3"]), "the other stays");
    assert!(write(&acme, r#"{"title": null}"#).await);
    assert_eq!(read(&acme).await, is(None, &["c=3"]));
    assert!(write(&acme, r#"{"title": "again", "metadata": null}"#).await);
    world.store.reset_snapshot(&acme, &agent, &id, None, world.now(), &by()).await.unwrap();
    assert_eq!(read(&acme).await, is(Some("again"), &[]));
    assert_eq!(read(&org("zeta")).await, is(None, &[]), "the other org's is its own");
    world.store.delete_conversation(&acme, &agent, &id, None, world.now(), &by()).await.unwrap();
    assert!(!write(&acme, r#"{"title": "too late"}"#).await);
    world.submit(world.message("c")).await;
    assert_eq!(read(&acme).await, is(None, &[]), "who begins it again begins with nothing");
}
