//! The audit: each change with who made it, in the change's own transaction; read newest first; gone by age alone.

use super::*;
use crate::audit::{Act, Actor, AuditEntry, AuditFilter, AuditPlace, Verb};

pub(super) async fn all(world: &World, of: &str) -> Vec<AuditEntry> {
    let org = org(of);
    world.store.audit(Some(&org), &AuditFilter::All, Timestamp(0), None, 100).await.unwrap().items
}

/// What was done since the last look, oldest first.
async fn since(world: &World, seen: &mut usize) -> Vec<(String, String)> {
    let mut entries = all(world, "acme").await;
    entries.reverse();
    let new = entries.iter().skip(*seen).map(|entry| (entry.verb.clone(), entry.resource.clone())).collect();
    *seen = entries.len();
    new
}

/// Each act at a time of its own: of what is done at one time, the order is chance.
fn acts(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(verb, resource)| ((*verb).to_owned(), (*resource).to_owned())).collect()
}

pub(in crate::store) async fn each_change_is_written_down_with_who_made_it(world: &World) {
    let (acme, store) = (org("acme"), &world.store);
    let mut seen = 0;
    let sorted = |mut acts: Vec<(String, String)>| {
        acts.sort();
        acts
    };
    let made = [("agent.create", "agent/support"), ("org.create", "org"), ("worker.upload", "worker/echo")];
    assert_eq!(sorted(since(world, &mut seen).await), acts(&made));
    let entry = all(world, "acme").await.remove(0);
    assert_eq!((entry.actor.as_str(), entry.credential.as_str()), ("root", "key:0123456789abcdef"));
    assert_eq!((entry.request_id.as_deref(), entry.at), (Some("r-1"), world.now()));

    // What changes nothing is not written down.
    world.upload(&acme, &worker(), b"one").await;
    store.create_org(&acme, &user("eve"), world.now(), &by()).await.unwrap();
    assert_eq!(
        store.delete_worker(&acme, &worker(), world.now(), &by()).await.unwrap(),
        Deleted::InUse("agent support".to_owned())
    );
    world.set_agent(&acme, Some(9)).await;
    let nobody = AgentId::parse("nobody").unwrap();
    assert_eq!(store.delete_agent(&acme, &nobody, world.now(), &by()).await.unwrap(), Deleted::NotFound);
    assert_eq!(since(world, &mut seen).await, []);

    world.advance_ms(1);
    world.upload(&acme, &worker(), b"two").await;
    assert_eq!(since(world, &mut seen).await, acts(&[("worker.upload", "worker/echo")]));
    world.advance_ms(1);
    world.set_agent(&acme, Some(2)).await;
    assert_eq!(since(world, &mut seen).await, acts(&[("agent.pin", "agent/support")]));
    world.advance_ms(1);
    let default = AgentSettings { version: Some(2), default: true, ..AgentSettings::of(worker()) };
    store.put_agent(&acme, &agent(), default, 3, world.now(), &by()).await.unwrap();
    let both = [("agent.change", "agent/support"), ("agent.default", "agent/support")];
    assert_eq!(sorted(since(world, &mut seen).await), acts(&both));
    world.advance_ms(1);
    let key = key();
    assert!(store.create_key([7; 32], &key, &by()).await.unwrap());
    assert_eq!(since(world, &mut seen).await, acts(&[("key.create", "key/0123456789abcdef")]));
    world.advance_ms(1);
    for _ in 0..2 {
        assert!(store.revoke_key(&acme, &key.id, world.now(), &by()).await.unwrap());
    }
    assert!(!store.revoke_key(&acme, "0000000000000000", world.now(), &by()).await.unwrap());
    assert_eq!(since(world, &mut seen).await, acts(&[("key.revoke", "key/0123456789abcdef")]), "once");
    world.advance_ms(1);
    world.submit(world.message("c")).await;
    store.reset_snapshot(&acme, &agent(), &conversation("c"), None, world.now(), &by()).await.unwrap();
    assert_eq!(since(world, &mut seen).await, acts(&[("conversation.reset", "agent/support/conversation/c")]));
    world.advance_ms(1);
    store.delete_conversation(&acme, &agent(), &conversation("c"), None, world.now(), &by()).await.unwrap();
    assert_eq!(since(world, &mut seen).await, acts(&[("conversation.delete", "agent/support/conversation/c")]));
    world.advance_ms(1);
    store.delete_agent(&acme, &agent(), world.now(), &by()).await.unwrap();
    let both = [("agent.default", "agent/support"), ("agent.delete", "agent/support")];
    assert_eq!(sorted(since(world, &mut seen).await), acts(&both));
    world.advance_ms(1);
    store.delete_worker(&acme, &worker(), world.now(), &by()).await.unwrap();
    assert_eq!(since(world, &mut seen).await, acts(&[("worker.delete", "worker/echo")]));
}

fn key() -> KeyRecord {
    KeyRecord {
        id: "0123456789abcdef".to_owned(),
        org: org("acme"),
        user: user("ann"),
        scopes: Scopes::TURNS,
        name: "the name is its maker's text and is left out".to_owned(),
        // Made when the world is, plus what the rule above has let pass.
        created_at: Timestamp(1_000_004),
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    }
}

pub(in crate::store) async fn o1_an_orgs_audit_is_its_own_and_the_hosts_is_nobodys(world: &World) {
    let act = Act::new(Verb::OrgDelete, "org", serde_json::json!({ "org_sha256": "00" }));
    world.store.record_act(None, &act, world.now(), &Actor::command_line()).await.unwrap();
    let act = Act::new(Verb::OrgExport, "org", serde_json::json!({}));
    world.store.record_act(Some(&org("zeta")), &act, world.now(), &by()).await.unwrap();
    let verbs = |entries: &[AuditEntry]| entries.iter().map(|entry| entry.verb.clone()).collect::<Vec<_>>();
    assert!(!verbs(&all(world, "acme").await).contains(&"org.export".to_owned()));
    assert_eq!(all(world, "acme").await.len() + 1, all(world, "zeta").await.len());
    let host = world.store.audit(None, &AuditFilter::All, Timestamp(0), None, 9).await.unwrap().items;
    assert_eq!(verbs(&host), ["org.delete"]);
    assert!(
        world
            .store
            .audit(Some(&org("nowhere")), &AuditFilter::All, Timestamp(0), None, 9)
            .await
            .unwrap()
            .items
            .is_empty()
    );
}

pub(in crate::store) async fn the_audit_is_read_newest_first_by_each_filter(world: &World) {
    let acme = org("acme");
    world.advance_ms(10);
    let began = world.now();
    for n in 0..7_u64 {
        // Two at the same time: the place tells them apart.
        world.advance_ms(n % 2);
        let verb = if n % 2 == 0 { Verb::OrgExport } else { Verb::ConversationExport };
        let act = Act::new(verb, format!("thing/{}", n % 3), serde_json::json!({ "n": n }));
        let by = Actor::new(if n < 4 { "ann" } else { "bob" }, "key:1", None, None);
        world.store.record_act(Some(&acme), &act, world.now(), &by).await.unwrap();
    }
    let read = async |filter: AuditFilter, since: Timestamp, limit: usize| {
        let (mut before, mut seen) = (None, Vec::new());
        loop {
            let page = world.store.audit(Some(&acme), &filter, since, before, limit).await.unwrap();
            assert!(page.items.len() <= limit && page.items.is_sorted_by(|a, b| (a.at, a.id) > (b.at, b.id)));
            before = page.items.last().map(|last| AuditPlace { at: last.at, id: last.id });
            seen.extend(page.items.iter().map(|entry| entry.detail["n"].as_u64().unwrap()));
            if !page.more {
                seen.sort_unstable();
                return seen;
            }
        }
    };
    for limit in [1, 2, 3, 100] {
        assert_eq!(read(AuditFilter::All, began, limit).await, [0, 1, 2, 3, 4, 5, 6], "{limit} a page");
        assert_eq!(read(AuditFilter::Actor("bob".to_owned()), began, limit).await, [4, 5, 6]);
        assert_eq!(read(AuditFilter::Verb(Verb::OrgExport), began, limit).await, [0, 2, 4, 6]);
        assert_eq!(read(AuditFilter::Resource("thing/1".to_owned()), began, limit).await, [1, 4]);
    }
    assert_eq!(read(AuditFilter::All, began.plus_ms(2), 2).await, [3, 4, 5, 6]);
    let until = Some(AuditPlace::until(began));
    let early = world.store.audit(Some(&acme), &AuditFilter::All, began, until, 9).await.unwrap();
    assert_eq!(early.items.len(), 1, "up to and including that time");
}

pub(in crate::store) async fn old_entries_of_the_audit_go_and_young_ones_stay(world: &World) {
    let before = all(world, "acme").await.len();
    world.advance_ms(1_000);
    let act = Act::new(Verb::OrgExport, "org", serde_json::json!({}));
    world.store.record_act(Some(&org("acme")), &act, world.now(), &by()).await.unwrap();
    let keep = Retention { audit_since: Some(world.now()), ..Retention::default() };
    let done = world.store.retain(None, keep, 2).await.unwrap();
    assert_eq!((done.org, done.rows), (Some(org("acme")), 2), "no more than it may at once");
    while world.store.retain(None, keep, 2).await.unwrap().rows > 0 {}
    assert!(before > 2);
    assert_eq!(all(world, "acme").await.iter().map(|entry| entry.verb.as_str()).collect::<Vec<_>>(), ["org.export"]);
    assert_eq!(all(world, "zeta").await.len(), before, "an org at a time");
}
