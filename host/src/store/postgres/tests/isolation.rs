//! The second wall, tried: each method that names an org, as if it had another org's wall around it.

use super::*;
use crate::agent::{AgentLimits, AgentSettings};
use crate::attachment::{Attachment, Pieces};
use crate::audit::{Act, AuditFilter, Verb};
use crate::caller::{Role, Scopes};
use crate::ids::{AgentId, WorkerName};
use crate::notes::NotesChange;
use crate::quota::LimitsChange;
use crate::store::conformance::{deltas, worker};
use crate::store::{
    Accept, Among, Deleted, Direction, KeyRecord, PutAttachment, PutMember, PutWorker, RemoveMember, Result,
};
use crate::turn::Usage;

/// What names an org and is done before the wall: the operator's, on whole orgs.
const OPERATORS: [&str; 4] = ["create_org", "provision_org", "mark_org", "erase_org"];

/// What a shared store has nothing of.
const EMBEDDED: [&str; 1] = ["note_files"];

/// Every method of the store that names one org, in the order of the trait, without the operator's and what is the embedded store's alone.
fn methods_of_an_org() -> Vec<String> {
    let facade = include_str!("../facade.rs");
    let methods = facade.split("    async fn ").skip(1);
    let named = methods.filter_map(|method| {
        let (head, _) = method.split_once(" {\n")?;
        let names_one = ["org: &OrgId", "org: Option<&OrgId>", "key: &KeyRecord"].iter().any(|one| head.contains(one));
        let (name, _) = head.split_once('(')?;
        (names_one && !OPERATORS.contains(&name) && !EMBEDDED.contains(&name)).then(|| name.to_owned())
    });
    named.collect()
}

fn key(world: &World, n: u8) -> ([u8; 32], KeyRecord) {
    let key = KeyRecord {
        id: hex::encode([n; 8]),
        org: org("acme"),
        user: user("ann"),
        scopes: Scopes::TURNS,
        name: "k".to_owned(),
        created_at: world.now(),
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    ([n; 32], key)
}

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

const MODULE: &[u8] = b"spare";

fn digest() -> [u8; 32] {
    Sha256::digest(MODULE).into()
}

fn file(bytes: &[u8]) -> (Attachment, Vec<bytes::Bytes>) {
    let mut pieces = Pieces::default();
    pieces.push(bytes);
    pieces.finish("text/plain".to_owned())
}

async fn upload(world: &World, bytes: &[u8]) -> Result<PutAttachment> {
    let (attachment, pieces) = file(bytes);
    world.store.put_attachment(&org("acme"), &user("ann"), &attachment, pieces, 1_000, world.now()).await
}

async fn join(world: &World, who: &str) -> Result<PutMember> {
    world.store.put_member(&org("acme"), &user(who), Role::Member, None, 9, world.now(), &by()).await
}

/// Gives `acme` something for every method to see or to change; the ended turn.
pub(super) async fn furnish(world: &World) -> crate::ids::TurnId {
    let acme = org("acme");
    upload(world, b"file").await.unwrap();
    join(world, "leaving").await.unwrap();
    let message = Accept { attachments: vec![file(b"file").0], ..world.message("c") };
    let claimed = world.submit_and_start(message).await;
    world.append(&claimed, deltas(1, &["a", "b"])).await;
    world.complete(&claimed, Some(b"state")).await;
    let worn = world.submit_and_start(world.message("worn")).await;
    world.complete(&worn, Some(b"old")).await;
    for queued in ["doomed", "spared"] {
        world.submit(world.message(queued)).await;
    }
    for n in [1, 2] {
        let (hash, key) = key(world, n);
        assert!(world.store.create_key(hash, &key, &by()).await.unwrap());
    }
    world.upload(&acme, &name::<WorkerName>("spare"), MODULE).await;
    for (agent, default) in [("spare", false), ("default", true)] {
        let limits = AgentLimits { queue_max: default.then_some(9), ..AgentLimits::default() };
        let settings = AgentSettings { default, limits, ..AgentSettings::of(worker()) };
        let put = world.store.put_agent(&acme, &name(agent), settings, 9, world.now(), &by()).await.unwrap();
        assert!(matches!(put, PutAgent::Stored { .. }), "{put:?}");
    }
    claimed.lease.turn
}

/// One method with `acme` as its org; whether it saw or changed anything.
async fn tried(world: &World, ended: crate::ids::TurnId, method: &str) -> Result<bool> {
    let (store, acme, now) = (&world.store, org("acme"), world.now());
    let (of, at, who) = (&acme, (&agent(), &conversation("c")), &by());
    let act = Act::new(Verb::OrgExport, "org", serde_json::json!({}));
    Ok(match method {
        "turn" => store.turn(of, ended).await?.is_some(),
        "events" => store.events(of, ended, None, 1_000).await?.is_some_and(|page| !page.events.is_empty()),
        "turns" => !store.turns(of, at.0, at.1, None, Direction::Forward, true, 9).await?.items.is_empty(),
        "open_conversation" => {
            let opened = store.open_conversation(of, at.0, &conversation("new"), &user("ann"), now).await?;
            matches!(opened, Opening::Made(_))
        }
        "conversation" => store.conversation(of, at.0, at.1).await?.is_some(),
        "generation" => store.generation(of, at.0, at.1).await?.is_some(),
        "conversations" => !store.conversations(of, at.0, None, None, 9).await?.items.is_empty(),
        "write_notes" => {
            let change = NotesChange { title: Some(Some("a title".to_owned())), metadata: None };
            store.write_notes(of, at.0, at.1, None, &change).await?
        }
        "delete_conversation" => {
            store.delete_conversation(of, at.0, &conversation("doomed"), None, now, who).await?.is_some()
        }
        "reset_snapshot" => store.reset_snapshot(of, at.0, &conversation("worn"), None, now, who).await?,
        "org_conversations" => !store.org_conversations(of, None, 9).await?.items.is_empty(),
        "org_turns" => !store.org_turns(of, None, 9).await?.items.is_empty(),
        "snapshots" => !store.snapshots(of, &Among::All, None, 9).await?.items.is_empty(),
        "put_attachment" => matches!(upload(world, b"new").await?, PutAttachment::Created(_)),
        "attachments" => !store.attachments(of, None, &[file(b"file").0.id]).await?.is_empty(),
        "attachments_of" => !store.attachments_of(of, &[ended]).await?.is_empty(),
        "org_attachments" => !store.org_attachments(of, None, 9).await?.items.is_empty(),
        "attachment_piece" => store.attachment_piece(of, file(b"file").0.id, 0).await?.is_some(),
        "set_org_limits" => {
            let change = LimitsChange { running_max: Some(Some(5)), ..LimitsChange::default() };
            store.set_org_limits(of, &change, now, who).await?.is_some()
        }
        "add_usage" => {
            let usage = Usage { cpu_ms: 1.0, ..Usage::default() };
            store.add_usage(of, at.0, crate::ids::TurnId::new(), &usage, now).await?
        }
        "agent_use" => store.agent_use(of, &name("default"), now).await?.is_some(),
        "org_use" => store.org_use(of, now).await?.is_some(),
        "members" => !store.members(of, None, 9).await?.items.is_empty(),
        "role" => store.role(of, &user("leaving")).await?.is_some(),
        "put_member" => matches!(join(world, "new").await?, PutMember::Stored { created: true, .. }),
        "remove_member" => store.remove_member(of, &user("leaving"), None, now, who).await? == RemoveMember::Done,
        "put_worker" => {
            let digest = Sha256::digest(b"new").into();
            let put = store.put_worker(of, &worker(), digest, "new".into(), vec![], 1.0, 9, 9, now, who).await?;
            matches!(put, PutWorker::Created(_))
        }
        "workers" => !store.workers(of, None, 9).await?.items.is_empty(),
        "worker_versions" => !store.worker_versions(of, &worker()).await?.is_empty(),
        "worker_version" => store.worker_version(of, &worker(), 1).await?.is_some(),
        "module" => store.module(of, digest()).await?.is_some(),
        "delete_worker" => store.delete_worker(of, &name("spare"), now, who).await? == Deleted::Done,
        "put_agent" => {
            let put = store.put_agent(of, &name("new"), AgentSettings::of(worker()), 9, now, who).await?;
            matches!(put, PutAgent::Stored { .. })
        }
        "agent" => store.agent(of, at.0).await?.is_some(),
        "default_agent" => store.default_agent(of).await?.is_some(),
        "agents" => !store.agents(of, None, 9).await?.items.is_empty(),
        "delete_agent" => store.delete_agent(of, &name::<AgentId>("spare"), now, who).await? == Deleted::Done,
        "org" => store.org(of).await?.is_some(),
        "live_turns" => !store.live_turns(of, 9).await?.is_empty(),
        "module_digests" => !store.module_digests(of).await?.is_empty(),
        "create_key" => {
            let (hash, key) = key(world, 3);
            store.create_key(hash, &key, who).await?
        }
        "key_by_id" => store.key_by_id(of, &key(world, 1).1.id).await?.is_some(),
        "keys" => !store.keys(of).await?.is_empty(),
        "rotate_key" => {
            let (hash, successor) = key(world, 4);
            store.rotate_key(&key(world, 1).1.id, hash, &successor, 1_000, who).await?
        }
        "revoke_key" => store.revoke_key(of, &key(world, 2).1.id, now, who).await?,
        "record_act" => store.record_act(Some(of), &act, now, who).await.map(|()| true)?,
        "audit" => !store.audit(Some(of), &AuditFilter::All, Timestamp(0), None, 9).await?.items.is_empty(),
        other => panic!("{other} names an org: it has to be tried here, too"),
    })
}

/// All rows of all tables.
async fn contents(world: &World) -> String {
    let mut connection = home(world).database.look().await;
    let sql = "SELECT string_agg(format('%s %s', c.relname, query_to_xml(format('SELECT t::text FROM %s t ORDER BY 1', c.oid::regclass), true, true, '')), ' ' ORDER BY c.relname)
                 FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'";
    sqlx::query(sql).fetch_one(&mut connection).await.unwrap().get(0)
}

async fn every_method_with_anothers_wall(world: World) {
    let ended = furnish(&world).await;
    let store = Arc::clone(&home(&world).store);
    let methods = methods_of_an_org();
    assert!(methods.len() > 30, "{methods:?}");
    let before = contents(&world).await;
    let mut refused = Vec::new();
    *store.walled_as.lock() = Some(org("zeta"));
    for method in &methods {
        match tried(&world, ended, method).await {
            Ok(seen) => assert!(!seen, "{method} sees another org"),
            Err(error) => {
                let text = error.to_string();
                assert!(matches!(error, StoreError::Corrupt(_)), "{method}: {text}: not to be tried again");
                assert!(text.contains("violates row-level security policy"), "{method}: {text}");
                refused.push(method.as_str());
            }
        }
        assert_eq!(contents(&world).await, before, "{method} changes another org");
    }
    let writes = ["open_conversation", "put_attachment", "put_worker", "record_act"];
    assert_eq!(refused, writes, "the others find nothing to change");
    // With its own wall each does what it is for.
    *store.walled_as.lock() = None;
    for method in &methods {
        assert!(tried(&world, ended, method).await.unwrap(), "{method} was tried with something to see");
    }
    check(&world).await;
}

#[tokio::test]
async fn o1_nothing_of_an_org_is_seen_or_changed_through_anothers_wall() {
    every_method_with_anothers_wall(world().await).await;
}

#[tokio::test]
async fn o1_nothing_of_an_org_is_seen_or_changed_through_anothers_wall_behind_a_pooler() {
    every_method_with_anothers_wall(pooled_world().await).await;
}

#[tokio::test]
async fn o1_what_an_org_may_not_do_leaves_the_connection_as_it_was() {
    let world = world().await;
    let ended = furnish(&world).await;
    let home = home(&world);
    for _ in 0..10 {
        *home.store.walled_as.lock() = Some(org("zeta"));
        assert!(tried(&world, ended, "record_act").await.is_err());
        assert!(!tried(&world, ended, "turn").await.unwrap());
        *home.store.walled_as.lock() = None;
        assert!(tried(&world, ended, "turn").await.unwrap());
        let row = home.store.one_hostwide(
            home.store.query("SELECT current_user = session_user, current_setting('turnhouse.org', true)"),
        );
        let row = row.await.unwrap();
        assert!(row.get::<bool, _>(0), "the role ends with its transaction");
        assert_eq!(row.get::<Option<String>, _>(1).unwrap_or_default(), "", "and so does the org");
    }
}

/// Drops what is asked when it has been polled so often: at each of its awaits, one after another.
async fn given_up_after(polls: usize, asked: impl Future<Output = ()>) {
    let mut asked = std::pin::pin!(asked);
    let mut polled = 0;
    std::future::poll_fn(|cx| {
        polled += 1;
        if polled > polls { std::task::Poll::Ready(()) } else { asked.as_mut().poll(cx) }
    })
    .await;
}

/// A client hangs up at any moment: the role and the org of what it asked for do not stay behind.
#[tokio::test]
async fn o1_whoever_goes_away_in_the_midst_leaves_nothing_on_the_connection() {
    let database = Database::migrated().await;
    let store = PostgresStore::open(PostgresOptions { connections: 1, ..database.options() }).await.unwrap();
    for of in ["acme", "zeta"] {
        assert!(store.create_org(&org(of), &user("root"), Timestamp(1), &by()).await.unwrap());
    }
    for polls in 1..40 {
        given_up_after(polls, async { drop(store.org(&org("acme")).await) }).await;
        // What reads alone changes nothing, and behind a wall there is one org.
        assert_eq!(store.orgs().await.unwrap().len(), 2, "a read that was given up after {polls} polls");
        assert!(
            store.create_org(&org("zeta"), &user("root"), Timestamp(1), &by()).await.is_ok(),
            "after {polls} polls"
        );
        given_up_after(polls, async { drop(store.begin_of(&org("acme"), super::super::BEGIN).await) }).await;
        assert_eq!(store.orgs().await.unwrap().len(), 2, "a transaction that was given up after {polls} polls");
    }
    store.close().await;
}
