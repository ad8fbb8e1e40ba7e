//! Attachments: whose they are, what keeps them, and that they go when nothing does.

use super::*;
use crate::admission::Refusal;
use crate::attachment::{Attachment, AttachmentId, PIECE_BYTES, Pieces};

const ORG_BYTES_MAX: u64 = 2_000_000;
const UPLOAD_MS: u64 = 1_000;

/// Uploads these bytes, as a member of an org.
async fn put(world: &World, of: &str, by: &str, bytes: &[u8]) -> (Attachment, PutAttachment) {
    let mut pieces = Pieces::default();
    pieces.push(bytes);
    let (attachment, pieces) = pieces.finish(format!("text/{by}"));
    let stored = world.store.put_attachment(&org(of), &user(by), &attachment, pieces, ORG_BYTES_MAX, world.now()).await;
    (attachment, stored.unwrap())
}

async fn uploaded(world: &World, by: &str, bytes: &[u8]) -> Attachment {
    put(world, "acme", by, bytes).await.0
}

/// As which type a member finds it; `None` where it is not theirs.
async fn found(world: &World, of: &str, by: Option<&str>, id: AttachmentId) -> Option<String> {
    let member = by.map(user);
    let found = world.store.attachments(&org(of), member.as_ref(), &[id]).await.unwrap();
    assert!(found.iter().all(|attachment| attachment.id == id));
    found.into_iter().next().map(|attachment| attachment.media_type)
}

async fn is_stored(world: &World, of: &str, id: AttachmentId) -> bool {
    let stored = world.store.org_attachments(&org(of), None, 100).await.unwrap().items.iter().any(|a| a.id == id);
    assert_eq!(
        world.store.attachment_piece(&org(of), id, 0).await.unwrap().is_some(),
        stored,
        "with its bytes, or not at all"
    );
    stored
}

/// Sweeps until there is nothing to look at, as of now.
async fn swept(world: &World) {
    let before = Timestamp(world.now().0 - i64::try_from(UPLOAD_MS).unwrap());
    while world.store.sweep_attachments(before, 2).await.unwrap() > 0 {}
}

fn referring(message: Accept, to: &[&Attachment]) -> Accept {
    Accept { attachments: to.iter().map(|attachment| (*attachment).clone()).collect(), ..message }
}

pub(in crate::store) async fn o1_the_same_bytes_in_two_orgs_are_two(world: &World) {
    let (attachment, first) = put(world, "acme", "ann", b"bytes").await;
    let id = attachment.id;
    assert_eq!(found(world, "zeta", Some("ann"), id).await, None);
    assert_eq!(found(world, "zeta", None, id).await, None);
    assert_eq!(world.store.attachment_piece(&org("zeta"), id, 0).await.unwrap(), None);
    let refused = world.accept(referring(world.message_of_zeta("c"), &[&attachment])).await;
    assert!(matches!(refused, AcceptResult::Refused(Refusal::AttachmentNotFound)), "{refused:?}");
    let (_, second) = put(world, "zeta", "ann", b"bytes").await;
    assert_eq!(
        (first, second),
        (PutAttachment::Created(world.now()), PutAttachment::Created(world.now())),
        "nobody is told"
    );
    let turn = world.submit_and_start(referring(world.message_of_zeta("c"), &[&attachment])).await;
    world.complete(&turn, None).await;
    world
        .store
        .delete_conversation(&org("zeta"), &agent(), &conversation("c"), None, world.now(), &by())
        .await
        .unwrap();
    swept(world).await;
    assert!(is_stored(world, "acme", id).await && !is_stored(world, "zeta", id).await);
    assert_eq!(found(world, "acme", Some("ann"), id).await.as_deref(), Some("text/ann"));
}

pub(in crate::store) async fn o2_an_attachment_is_whose_it_is(world: &World) {
    let attachment = uploaded(world, "ann", b"bytes").await;
    let id = attachment.id;
    assert_eq!(found(world, "acme", Some("bob"), id).await, None);
    assert_eq!(found(world, "acme", None, id).await.as_deref(), Some("text/ann"), "an admin sees all");
    // Bob has the same bytes, and is not told that somebody else does.
    let (_, stored) = put(world, "acme", "bob", b"bytes").await;
    assert_eq!(stored, PutAttachment::Created(world.now()));
    assert_eq!(put(world, "acme", "bob", b"bytes").await.1, PutAttachment::Existing(world.now()));
    assert_eq!(found(world, "acme", Some("bob"), id).await.as_deref(), Some("text/bob"));
    assert_eq!(found(world, "acme", Some("ann"), id).await.as_deref(), Some("text/ann"));
    // What an admin says in ann's conversation is ann's.
    let own = uploaded(world, "root", b"the admin's").await;
    world.submit(world.message("c")).await;
    let admin = Accept { user: user("root"), sees_all: true, ..world.message("c") };
    world.submit(referring(admin, &[&own])).await;
    assert_eq!(found(world, "acme", Some("ann"), own.id).await.as_deref(), Some("text/root"));
    assert_eq!(found(world, "acme", Some("bob"), own.id).await, None);
}

pub(in crate::store) async fn an_attachment_is_its_bytes_in_pieces(world: &World) {
    let bytes: Vec<u8> = (0..PIECE_BYTES + 3).map(|n| (n / 7) as u8).collect();
    let attachment = uploaded(world, "ann", &bytes).await;
    let piece = async |number| world.store.attachment_piece(&org("acme"), attachment.id, number).await.unwrap();
    assert_eq!(piece(0).await.unwrap(), bytes[..PIECE_BYTES]);
    assert_eq!(piece(1).await.unwrap(), bytes[PIECE_BYTES..]);
    assert_eq!((piece(2).await, piece(u32::MAX).await), (None, None));
    let empty = uploaded(world, "ann", b"").await;
    let listed = world.store.org_attachments(&org("acme"), None, 1).await.unwrap();
    assert!(listed.more);
    let rest = world.store.org_attachments(&org("acme"), Some(listed.items[0].id), 10).await.unwrap();
    let mut sizes = [(listed.items[0].id, listed.items[0].bytes), (rest.items[0].id, rest.items[0].bytes)];
    sizes.sort_by_key(|(_, bytes)| *bytes);
    assert_eq!(sizes, [(empty.id, 0), (attachment.id, bytes.len() as u64)]);
    assert!(!rest.more && rest.items.len() == 1);
}

pub(in crate::store) async fn what_a_turn_refers_to_stays_and_goes_with_it(world: &World) {
    let (one, two) = (uploaded(world, "ann", b"one").await, uploaded(world, "ann", b"two").await);
    let claimed = world.submit_and_start(referring(world.message("c"), &[&one, &two])).await;
    let mut known = world.store.attachments_of(&org("acme"), &[claimed.lease.turn]).await.unwrap();
    known.sort_by_key(|attachment| attachment.id != one.id);
    assert_eq!(known, [one.clone(), two.clone()]);
    assert!(world.store.attachments_of(&org("zeta"), &[claimed.lease.turn]).await.unwrap().is_empty());
    world.complete(&claimed, None).await;
    world.advance_ms(UPLOAD_MS * 2);
    swept(world).await;
    assert!(is_stored(world, "acme", one.id).await, "its upload is forgotten, the turn refers to it");
    assert_eq!(found(world, "acme", Some("ann"), one.id).await.as_deref(), Some("text/ann"));
    let next = world.submit(referring(world.message("d"), &[&one])).await;
    // Ids are in the order of real time, which is not the world's.
    let keep = Retention { turns_since: Some(Timestamp(i64::MAX >> 16)), ..Retention::default() };
    while world.store.retain(None, keep, 10).await.unwrap().rows > 0 {}
    swept(world).await;
    assert!(is_stored(world, "acme", one.id).await, "a live turn refers to it");
    assert!(!is_stored(world, "acme", two.id).await);
    assert_eq!(found(world, "acme", None, two.id).await, None);
    world.cancel(next).await;
    while world.store.retain(None, keep, 10).await.unwrap().rows > 0 {}
    swept(world).await;
    assert!(!is_stored(world, "acme", one.id).await);
}

pub(in crate::store) async fn an_upload_that_nothing_refers_to_goes(world: &World) {
    let (old, again) = (uploaded(world, "ann", b"old").await, uploaded(world, "ann", b"again").await);
    world.advance_ms(UPLOAD_MS / 2);
    assert_eq!(put(world, "acme", "ann", b"again").await.1, PutAttachment::Existing(world.now()));
    world.advance_ms(UPLOAD_MS / 2 + 1);
    swept(world).await;
    assert_eq!(found(world, "acme", Some("ann"), old.id).await, None);
    assert!(!is_stored(world, "acme", old.id).await);
    assert!(is_stored(world, "acme", again.id).await, "it was uploaded again");
    // It comes back whole.
    assert!(matches!(put(world, "acme", "ann", b"old").await.1, PutAttachment::Created(_)));
    assert!(is_stored(world, "acme", old.id).await);
}

pub(in crate::store) async fn an_attachment_that_is_gone_is_not_referred_to(world: &World) {
    let (kept, gone) = (uploaded(world, "ann", b"kept").await, uploaded(world, "ann", b"gone").await);
    world.submit(referring(world.message("a"), &[&kept])).await;
    world.advance_ms(UPLOAD_MS + 1);
    swept(world).await;
    let keyed = Accept { key: Some(("k".to_owned(), [1; 32])), ..referring(world.message("b"), &[&kept, &gone]) };
    let turn = keyed.turn;
    let refused = world.accept(keyed.clone()).await;
    assert!(matches!(refused, AcceptResult::Refused(Refusal::AttachmentNotFound)), "{refused:?}");
    assert!(world.store.turn(&org("acme"), turn).await.unwrap().is_none(), "nothing was written");
    assert!(world.store.attachments_of(&org("acme"), &[turn]).await.unwrap().is_empty());
    // Beside others that are whole, and once it is there again.
    let batch =
        [world.message("x"), Accept { turn: TurnId::new(), ..keyed.clone() }, referring(world.message("y"), &[&kept])];
    let written = world.batch(batch.map(|accept| Write::Accept(Box::new(accept))).into()).await;
    let refused: Vec<_> = written.iter().map(|one| matches!(one, Written::Accept(AcceptResult::Refused(_)))).collect();
    assert_eq!(refused, [false, true, false]);
    uploaded(world, "ann", b"gone").await;
    world.submit(keyed).await;
    assert_eq!(world.store.attachments_of(&org("acme"), &[turn]).await.unwrap().len(), 2);
}

pub(in crate::store) async fn an_org_has_room_for_so_many_bytes(world: &World) {
    let half = vec![1; 1_200_000];
    let first = uploaded(world, "ann", &half).await;
    let other = vec![2; 1_200_000];
    let (attachment, stored) = put(world, "acme", "ann", &other).await;
    assert_eq!(stored, PutAttachment::Full);
    assert!(!is_stored(world, "acme", attachment.id).await);
    assert!(
        matches!(put(world, "acme", "bob", &half).await.1, PutAttachment::Created(_)),
        "the same bytes take no more room"
    );
    assert!(matches!(put(world, "zeta", "ann", &other).await.1, PutAttachment::Created(_)), "another org has its own");
    assert_eq!(put(world, "nowhere", "ann", b"x").await.1, PutAttachment::NoOrg);
    world.store.mark_org(&org("zeta"), world.now(), &by()).await.unwrap();
    assert_eq!(put(world, "zeta", "ann", b"x").await.1, PutAttachment::NoOrg, "nothing is left behind");
    world.advance_ms(UPLOAD_MS + 1);
    swept(world).await;
    assert!(!is_stored(world, "acme", first.id).await);
    assert!(matches!(put(world, "acme", "ann", &other).await.1, PutAttachment::Created(_)));
}

pub(in crate::store) async fn s8_attachments_go_with_their_conversation(world: &World) {
    let (only, both, bobs) = (
        uploaded(world, "ann", b"only").await,
        uploaded(world, "ann", b"both").await,
        uploaded(world, "ann", b"bobs").await,
    );
    uploaded(world, "bob", b"bobs").await;
    let first = world.submit_and_start(referring(world.message("a"), &[&only, &both, &bobs])).await;
    world.complete(&first, None).await;
    let second = world.submit_and_start(referring(world.message("a"), &[&only])).await;
    world.complete(&second, None).await;
    let kept = world.submit_and_start(referring(world.message("b"), &[&both])).await;
    world
        .store
        .delete_conversation(&org("acme"), &agent(), &conversation("a"), None, world.now(), &by())
        .await
        .unwrap();
    // At once for whoever asks, in a while from the disk.
    assert_eq!(found(world, "acme", Some("ann"), only.id).await, None);
    assert_eq!(found(world, "acme", None, only.id).await, None);
    assert_eq!(found(world, "acme", Some("ann"), bobs.id).await, None);
    assert_eq!(
        found(world, "acme", Some("bob"), bobs.id).await.as_deref(),
        Some("text/bob"),
        "who uploaded the same has it"
    );
    swept(world).await;
    assert!(!is_stored(world, "acme", only.id).await);
    assert!(is_stored(world, "acme", both.id).await && is_stored(world, "acme", bobs.id).await);
    assert_eq!(world.store.attachments_of(&org("acme"), &[kept.lease.turn]).await.unwrap(), [both]);
    let refused = world.accept(referring(world.message("a"), &[&only])).await;
    assert!(matches!(refused, AcceptResult::Refused(Refusal::AttachmentNotFound)), "{refused:?}");
}

pub(in crate::store) async fn a_message_that_joins_brings_its_attachments(world: &World) {
    let (one, two) = (uploaded(world, "ann", b"one").await, uploaded(world, "ann", b"two").await);
    world.submit_and_start(world.message("c")).await;
    let waiting = world.submit(collecting(referring(world.message("c"), &[&one]), 9)).await;
    let joined = world.accept(collecting(referring(world.message("c"), &[&one, &two]), 9)).await;
    assert!(matches!(joined, AcceptResult::Joined(turn) if turn == waiting), "{joined:?}");
    let known = world.store.attachments_of(&org("acme"), &[waiting]).await.unwrap();
    assert_eq!(known.len(), 2);
}
