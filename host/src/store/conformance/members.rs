//! Members: of their own org alone, owners among themselves, and gone with their keys.

use super::*;
use crate::audit::{AuditFilter, Verb};
use crate::caller::Role;

async fn put(world: &World, of: &str, who: &str, role: Role, changer: Option<&str>) -> PutMember {
    let changer = changer.map(user);
    world.store.put_member(&org(of), &user(who), role, changer.as_ref(), 5, world.now(), &by()).await.unwrap()
}

async fn remove(world: &World, of: &str, who: &str, changer: Option<&str>) -> RemoveMember {
    let changer = changer.map(user);
    world.store.remove_member(&org(of), &user(who), changer.as_ref(), world.now(), &by()).await.unwrap()
}

async fn role(world: &World, of: &str, who: &str) -> Option<Role> {
    world.store.role(&org(of), &user(who)).await.unwrap()
}

fn is_new(put: &PutMember) -> bool {
    matches!(put, PutMember::Stored { created: true, .. })
}

async fn audited(world: &World, of: &str, verb: Verb) -> Vec<(String, serde_json::Value)> {
    let page = world.store.audit(Some(&org(of)), &AuditFilter::Verb(verb), Timestamp(0), None, 99).await.unwrap();
    page.items.into_iter().map(|entry| (entry.resource, entry.detail)).collect()
}

pub(in crate::store) async fn o1_members_are_of_their_org_alone(world: &World) {
    assert_eq!(role(world, "acme", "root").await, Some(Role::Owner), "whoever it was made for");
    world.advance_ms(5);
    let added = put(world, "acme", "ann", Role::Member, Some("root")).await;
    let ann = Member { user: user("ann"), role: Role::Member, added_at: world.now(), added_by: by().user };
    assert_eq!(added, PutMember::Stored { member: ann.clone(), created: true });
    world.advance_ms(5);
    assert_eq!(
        put(world, "acme", "ann", Role::Member, None).await,
        PutMember::Stored { member: ann.clone(), created: false }
    );
    assert!(is_new(&put(world, "zeta", "ann", Role::Admin, None).await));
    // Another role, since the same time.
    let changed = put(world, "acme", "ann", Role::Admin, Some("root")).await;
    let ann = Member { role: Role::Admin, ..ann };
    assert_eq!(changed, PutMember::Stored { member: ann.clone(), created: false });
    let page = world.store.members(&org("acme"), None, 1).await.unwrap();
    assert_eq!((page.items, page.more), (vec![ann], true));
    let rest = world.store.members(&org("acme"), Some(&user("ann")), 9).await.unwrap();
    assert_eq!((rest.items.len(), &rest.items[0].user, rest.more), (1, &user("root"), false));
    let own = |of: &str, role| Membership { org: org(of), role };
    let all = world.store.memberships(&user("ann"), 9).await.unwrap();
    assert_eq!(all, [own("acme", Role::Admin), own("zeta", Role::Admin)]);
    assert_eq!(world.store.memberships(&user("ann"), 1).await.unwrap().len(), 1);
    assert!(world.store.memberships(&user("eve"), 9).await.unwrap().is_empty());
    for (of, who) in [("acme", "eve"), ("nowhere", "ann")] {
        assert_eq!(role(world, of, who).await, None);
    }
    assert_eq!(put(world, "nowhere", "ann", Role::Member, None).await, PutMember::NoOrg);
    assert_eq!(remove(world, "acme", "ann", None).await, RemoveMember::Done);
    assert_eq!((role(world, "acme", "ann").await, role(world, "zeta", "ann").await), (None, Some(Role::Admin)));
    assert_eq!(remove(world, "acme", "ann", None).await, RemoveMember::NotFound);
    // What was done, and not what was as it should be already.
    let told = |verb| audited(world, "acme", verb);
    assert_eq!(told(Verb::MemberAdd).await, [("member/ann".to_owned(), serde_json::json!({"role": "member"}))]);
    let changed = serde_json::json!({"from": "member", "to": "admin"});
    assert_eq!(told(Verb::MemberChange).await, [("member/ann".to_owned(), changed)]);
    let removed = serde_json::json!({"role": "admin", "keys": 0});
    assert_eq!(told(Verb::MemberRemove).await, [("member/ann".to_owned(), removed)]);
}

pub(in crate::store) async fn an_org_keeps_an_owner_and_owners_are_owners_to_change(world: &World) {
    use MemberRefusal::{LastOwner, NotOwner};
    put(world, "acme", "ann", Role::Admin, None).await;
    // Neither an admin, nor somebody who is no member, nor an owner of another org.
    put(world, "zeta", "zoe", Role::Owner, None).await;
    for changer in ["ann", "eve", "zoe"] {
        assert_eq!(put(world, "acme", "ann", Role::Owner, Some(changer)).await, PutMember::Refused(NotOwner));
        assert_eq!(put(world, "acme", "root", Role::Member, Some(changer)).await, PutMember::Refused(NotOwner));
        assert_eq!(remove(world, "acme", "root", Some(changer)).await, RemoveMember::Refused(NotOwner));
    }
    // Not even the operator, nor the owner themselves.
    for changer in [None, Some("root")] {
        assert_eq!(put(world, "acme", "root", Role::Admin, changer).await, PutMember::Refused(LastOwner));
        assert_eq!(remove(world, "acme", "root", changer).await, RemoveMember::Refused(LastOwner));
    }
    assert_eq!(role(world, "acme", "root").await, Some(Role::Owner));
    put(world, "acme", "ann", Role::Owner, Some("root")).await;
    let owner = async || world.store.org(&org("acme")).await.unwrap().unwrap().owner;
    assert_eq!(owner().await, user("root"));
    put(world, "acme", "root", Role::Member, Some("ann")).await;
    assert_eq!(owner().await, user("ann"), "the org is not said to be owned by somebody who does not");
    assert_eq!(remove(world, "acme", "ann", Some("ann")).await, RemoveMember::Refused(LastOwner));
    assert_eq!(remove(world, "acme", "root", Some("ann")).await, RemoveMember::Done);
    assert_eq!(owner().await, user("ann"));
}

pub(in crate::store) async fn a_removed_members_keys_end_with_it(world: &World) {
    let key = |of: &str, who: &str, id: u8| KeyRecord {
        id: id.to_string(),
        org: org(of),
        user: user(who),
        scopes: Scopes::TURNS,
        name: String::new(),
        created_at: world.now(),
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    for (of, who, id) in [("acme", "ann", 1), ("acme", "ann", 2), ("acme", "bob", 3), ("zeta", "ann", 4)] {
        assert!(world.store.create_key([id; 32], &key(of, who, id), &by()).await.unwrap());
    }
    world.store.revoke_key(&org("acme"), "2", world.now(), &by()).await.unwrap();
    world.advance_ms(5);
    put(world, "acme", "ann", Role::Member, None).await;
    put(world, "zeta", "ann", Role::Member, None).await;
    assert_eq!(remove(world, "acme", "ann", Some("root")).await, RemoveMember::Done);
    let ended = async |id: u8| world.store.key([id; 32]).await.unwrap().unwrap().revoked_at;
    assert_eq!(ended(1).await, Some(world.now()));
    assert_eq!((ended(3).await, ended(4).await), (None, None), "nobody else's, and none elsewhere");
    assert_ne!(ended(2).await, Some(world.now()), "what has ended ended then");
    let revoked = audited(world, "acme", Verb::KeyRevoke).await;
    assert_eq!(revoked.iter().map(|(resource, _)| resource.as_str()).collect::<Vec<_>>(), ["key/1", "key/2"]);
    assert_eq!(audited(world, "acme", Verb::MemberRemove).await[0].1, serde_json::json!({"role": "member", "keys": 1}));
}

pub(in crate::store) async fn o1_a_turn_is_found_among_ones_own_orgs_alone(world: &World) {
    let (ours, theirs) = (world.submit(world.message("c")).await, world.submit(world.message_of_zeta("c")).await);
    put(world, "acme", "ann", Role::Member, None).await;
    let found = async |who: &str, turn| world.store.membership_of_turn(&user(who), turn).await.unwrap();
    assert_eq!(found("ann", ours).await, Some(Membership { org: org("acme"), role: Role::Member }));
    assert_eq!((found("ann", theirs).await, found("ann", TurnId::new()).await), (None, None));
    assert_eq!(found("eve", ours).await, None);
    assert_eq!(found("root", theirs).await, Some(Membership { org: org("zeta"), role: Role::Owner }));
}

pub(in crate::store) async fn o3_an_org_has_so_many_members(world: &World) {
    for who in ["ann", "bob", "cat", "dan"] {
        assert!(is_new(&put(world, "acme", who, Role::Member, None).await));
    }
    assert_eq!(put(world, "acme", "eve", Role::Member, None).await, PutMember::Full);
    assert!(!is_new(&put(world, "acme", "ann", Role::Admin, None).await), "a role may change all the same");
    remove(world, "acme", "bob", None).await;
    assert!(is_new(&put(world, "acme", "eve", Role::Member, None).await));
}

pub(in crate::store) async fn o1_an_org_that_goes_has_no_members(world: &World) {
    put(world, "acme", "ann", Role::Member, None).await;
    let turn = world.submit(world.message("c")).await;
    world.cancel(turn).await;
    world.store.mark_org(&org("acme"), world.now(), &by()).await.unwrap();
    assert_eq!(role(world, "acme", "ann").await, None);
    assert!(world.store.memberships(&user("ann"), 9).await.unwrap().is_empty());
    assert_eq!(world.store.membership_of_turn(&user("ann"), turn).await.unwrap(), None);
    assert_eq!(put(world, "acme", "eve", Role::Member, None).await, PutMember::NoOrg);
    while world.store.erase_org(&org("acme"), 9).await.unwrap() != Erased::Whole {}
    assert!(world.store.members(&org("acme"), None, 9).await.unwrap().items.is_empty());
    // The same name is another org, with nobody from before.
    world.store.create_org(&org("acme"), &user("eve"), world.now(), &by()).await.unwrap();
    assert_eq!((role(world, "acme", "ann").await, role(world, "acme", "eve").await), (None, Some(Role::Owner)));
}

/// An org from before there were members: `damage` runs a statement behind the store's back.
pub(in crate::store) async fn an_older_orgs_owner_joins(world: &World, damage: impl AsyncFn(&'static str)) {
    let starter = super::orgs::starter();
    let provision =
        async || world.store.provision_org(&org("acme"), &user("eve"), &starter, world.now(), &by()).await.unwrap();
    damage("DELETE FROM org_members WHERE org_id = 'acme'").await;
    let mended = provision().await;
    assert!(mended.owner_joined && !mended.owner_set && !mended.created);
    assert_eq!(role(world, "acme", "root").await, Some(Role::Owner));
    assert_eq!(role(world, "acme", "eve").await, None, "it has an owner");
    assert_eq!(audited(world, "acme", Verb::MemberAdd).await.len(), 1);
    assert!(!provision().await.owner_joined, "once");
    // What an owner arranged stays.
    put(world, "acme", "ann", Role::Owner, Some("root")).await;
    put(world, "acme", "root", Role::Member, Some("ann")).await;
    assert!(!provision().await.owner_joined);
    assert_eq!(role(world, "acme", "root").await, Some(Role::Member));
    // A role that an admin gave before the org was mended stays, too.
    damage("DELETE FROM org_members WHERE org_id = 'acme'").await;
    put(world, "acme", "ann", Role::Admin, Some("bob")).await;
    assert!(!provision().await.owner_joined, "its owner is ann");
    assert_eq!(role(world, "acme", "ann").await, Some(Role::Admin));
    put(world, "acme", "ann", Role::Owner, None).await;
}
