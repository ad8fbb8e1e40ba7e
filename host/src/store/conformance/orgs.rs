//! Orgs: made whole, mended, and their default agents.

use super::*;
use crate::audit::{AuditFilter, Verb};

pub(super) fn starter() -> Starter {
    Starter {
        agent: AgentId::parse("default").unwrap(),
        worker: WorkerName::parse("starter").unwrap(),
        digest: [9; 32],
        wasm: Bytes::from_static(b"starter"),
        imports: vec!["wasi_snapshot_preview1.fd_read".to_owned()],
        workers_max: 3,
        versions_kept: 2,
        agents_max: 3,
    }
}

async fn provision(world: &World, of: &str) -> Provisioned {
    world.store.provision_org(&org(of), &user("eve"), &starter(), world.now(), &by()).await.unwrap()
}

fn id(text: &str) -> AgentId {
    AgentId::parse(text).unwrap()
}

pub(in crate::store) async fn provisioning_makes_an_org_whole_once(world: &World) {
    let made = provision(world, "beta").await;
    let expected = Provisioned {
        created: true,
        owner_set: false,
        owner_joined: false,
        default: DefaultAgent::Made(id("default")),
    };
    assert_eq!(made, expected);
    let beta = org("beta");
    let agent = world.store.default_agent(&beta).await.unwrap().unwrap();
    assert_eq!(
        (agent.settings.worker.as_str(), agent.settings.version, agent.created_at),
        ("starter", Some(1), world.now())
    );
    assert_eq!(world.store.module(&beta, [9; 32]).await.unwrap().as_deref(), Some(&b"starter"[..]));
    world.advance_ms(5);
    for _ in 0..2 {
        let again = provision(world, "beta").await;
        assert_eq!(
            again,
            Provisioned {
                created: false,
                owner_set: false,
                owner_joined: false,
                default: DefaultAgent::Kept(id("default"))
            }
        );
    }
    assert_eq!(world.store.default_agent(&beta).await.unwrap().unwrap(), agent, "nothing of it was touched");
    assert_eq!(world.store.worker_versions(&beta, &agent.settings.worker).await.unwrap().len(), 1);
    let repairs =
        world.store.audit(Some(&beta), &AuditFilter::Verb(Verb::OrgRepair), Timestamp(0), None, 9).await.unwrap();
    assert!(repairs.items.is_empty());
}

pub(in crate::store) async fn provisioning_leaves_what_an_admin_curated(world: &World) {
    let acme = org("acme");
    let put = async |name: &str, default: bool| {
        let mut settings = AgentSettings { default, ..AgentSettings::of(worker()) };
        settings.environment.insert("TONE".to_owned(), "dry".to_owned());
        world.store.put_agent(&acme, &id(name), settings, 3, world.now(), &by()).await.unwrap();
        world.store.agent(&acme, &id(name)).await.unwrap().unwrap()
    };
    // An older org, with an agent of that name that nobody has marked: it is, and is otherwise as it was.
    let unmarked = put("default", false).await;
    let support = world.store.agent(&acme, &agent()).await.unwrap();
    world.advance_ms(5);
    let mended = provision(world, "acme").await;
    assert_eq!(
        mended,
        Provisioned {
            created: false,
            owner_set: false,
            owner_joined: false,
            default: DefaultAgent::Flagged(id("default"))
        }
    );
    let marked = world.store.agent(&acme, &id("default")).await.unwrap().unwrap();
    let as_before = AgentSettings { default: false, ..marked.settings.clone() };
    assert_eq!((as_before, marked.created_at), (unmarked.settings, unmarked.created_at));
    assert!(marked.settings.default);
    assert_eq!(world.store.agent(&acme, &agent()).await.unwrap(), support);
    let owner = world.store.orgs().await.unwrap().into_iter().find(|found| found.id == acme).unwrap().owner;
    assert_eq!(owner, user("root"), "its owner stays");
    let repairs =
        world.store.audit(Some(&acme), &AuditFilter::Verb(Verb::OrgRepair), Timestamp(0), None, 9).await.unwrap();
    assert_eq!(repairs.items.len(), 1);
    assert_eq!(repairs.items[0].detail, serde_json::json!({"owner": null, "default": "default"}));
    // Another default, of the admin's choice.
    put("support", true).await;
    assert_eq!(provision(world, "acme").await.default, DefaultAgent::Kept(agent()));
    // None, of the admin's choice.
    put("support", false).await;
    assert_eq!(provision(world, "acme").await.default, DefaultAgent::LeftOut);
    assert!(world.store.default_agent(&acme).await.unwrap().is_none());
}

pub(in crate::store) async fn provisioning_names_no_worker_of_somebodys_own(world: &World) {
    let (acme, theirs) = (org("acme"), WorkerName::parse("starter").unwrap());
    world.upload(&acme, &theirs, b"their own").await;
    assert_eq!(provision(world, "acme").await.default, DefaultAgent::Made(id("default")));
    let agent = world.store.default_agent(&acme).await.unwrap().unwrap();
    assert_eq!(agent.settings.worker.as_str(), "starter-2");
    assert_eq!(world.store.worker_versions(&acme, &theirs).await.unwrap().len(), 1);
}

pub(in crate::store) async fn a_full_org_is_told_that_it_has_no_room(world: &World) {
    let acme = org("acme");
    for name in ["one", "two"] {
        let settings = AgentSettings::of(worker());
        world.store.put_agent(&acme, &id(name), settings, 3, world.now(), &by()).await.unwrap();
    }
    assert_eq!(provision(world, "acme").await.default, DefaultAgent::NoRoom);
    let workers = world.store.workers(&acme, None, 9).await.unwrap().items;
    assert_eq!(workers.len(), 1, "no worker without its agent");
    world.store.delete_agent(&acme, &id("two"), world.now(), &by()).await.unwrap();
    assert_eq!(provision(world, "acme").await.default, DefaultAgent::Made(id("default")), "once there is room");
}

pub(in crate::store) async fn o1_the_default_is_the_orgs_own(world: &World) {
    provision(world, "acme").await;
    assert!(world.store.default_agent(&org("acme")).await.unwrap().is_some());
    assert!(world.store.default_agent(&org("zeta")).await.unwrap().is_none());
    assert!(world.store.default_agent(&org("nowhere")).await.unwrap().is_none());
}

pub(in crate::store) async fn an_org_goes_in_pieces_and_only_once_it_is_marked_and_idle(world: &World) {
    let (acme, store) = (org("acme"), &world.store);
    let step = async || store.erase_org(&acme, 2).await.unwrap();
    assert_eq!(step().await, Erased::Not, "nobody has marked it");
    for lane in ["a", "b", "c"] {
        let claimed = world.submit_and_start(world.message(lane)).await;
        world.append(&claimed, deltas(1, &["said"])).await;
        world.complete(&claimed, Some(b"state")).await;
    }
    let theirs = world.submit_and_start(world.message_of_zeta("a")).await;
    world.complete(&theirs, Some(b"theirs")).await;
    let live = world.submit(world.message("d")).await;
    assert!(!store.mark_org(&org("nowhere"), world.now(), &by()).await.unwrap());
    assert!(store.mark_org(&acme, world.now(), &by()).await.unwrap());
    let marked = store.deleting_orgs().await.unwrap();
    assert_eq!((marked.len(), &marked[0].id, marked[0].deleting_at), (1, &acme, Some(world.now())));
    assert_eq!(store.live_turns(&acme, 9).await.unwrap(), [live]);
    assert_eq!(step().await, Erased::Not, "a turn of it is live");
    world.cancel(live).await;
    let digest = store.module_digests(&acme).await.unwrap();
    assert_eq!(digest.len(), 1);
    let mut steps = 0;
    loop {
        match step().await {
            Erased::Rows(rows) => assert!((1..=2).contains(&rows), "no more at once"),
            Erased::Whole => break,
            Erased::Not => panic!("it is marked and idle"),
        }
        steps += 1;
        assert!(steps < 100, "it comes to an end");
    }
    assert!(steps > 6);
    assert!(store.org(&acme).await.unwrap().is_none() && store.deleting_orgs().await.unwrap().is_empty());
    assert!(store.audit(Some(&acme), &AuditFilter::All, Timestamp(0), None, 9).await.unwrap().items.is_empty());
    assert!(store.module(&acme, digest[0]).await.unwrap().is_none());
    assert_eq!(step().await, Erased::Whole, "there is nothing of it");
    // The other one is whole.
    assert!(store.module(&org("zeta"), digest[0]).await.unwrap().is_some());
    let next = world.submit_and_start(world.message_of_zeta("a")).await;
    assert_eq!(next.head.unwrap().snapshot.unwrap().body.as_deref(), Some(&b"theirs"[..]));
}

pub(in crate::store) async fn a_marked_org_is_nobodys(world: &World) {
    let (acme, store) = (org("acme"), &world.store);
    let key = |id: &str| KeyRecord {
        id: id.to_owned(),
        org: acme.clone(),
        user: user("ann"),
        scopes: Scopes::ADMIN,
        name: String::new(),
        created_at: world.now(),
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    assert!(store.create_key([1; 32], &key("1"), &by()).await.unwrap());
    store.mark_org(&acme, world.now(), &by()).await.unwrap();
    assert_eq!(
        store.key([1; 32]).await.unwrap().unwrap().revoked_at,
        Some(world.now()),
        "its keys ended with the mark"
    );
    assert!(!store.create_key([2; 32], &key("2"), &by()).await.unwrap(), "and there are no new ones");
    assert_eq!(provision(world, "acme").await.default, DefaultAgent::Deleting);
    let marked = store.orgs().await.unwrap().into_iter().find(|org| org.id == acme).unwrap();
    assert_eq!(marked.deleting_at, Some(world.now()));
}
