//! A batch's items as `write_batch` takes them: JSON, and beside it the bytes that they name.

use std::borrow::Cow;
use std::collections::HashSet;

use serde::Serialize;
use uuid::Uuid;

use super::bigint;
use crate::admission::OnBusy;
use crate::ids::{AgentId, ConversationId, OrgId, TurnId};
use crate::lease::{Epoch, Lease};
use crate::store::{Accept, Append, ClaimRequest, Commit, Requeue, Result, Write};
use crate::turn::Outcome;

/// One item as the function takes it. What it does not need is left out. Numbers that name a body count from 1.
#[derive(Debug, Default, Serialize)]
pub(super) struct Item<'a> {
    /// Its place in the batch, from 1.
    ord: usize,
    /// The place of the last item of its run.
    run_to: usize,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) org: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    turn: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<Epoch>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    accept: Option<AcceptItem<'a>>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    claim: Option<ClaimItem>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    events: Option<EventsItem>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    requeue: Option<RequeueItem>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    commit: Option<CommitItem<'a>>,
}

#[derive(Debug, Serialize)]
struct AcceptItem<'a> {
    agent: &'a str,
    run: Option<Uuid>,
    env_org: Option<&'a str>,
    conv: Option<&'a str>,
    mode: &'static str,
    usr: &'a str,
    sees_all: bool,
    dry: bool,
    key: Option<Cow<'a, str>>,
    hash: Option<usize>,
    msg: usize,
    on_busy: &'static str,
    conv_max: i64,
    org_max: i64,
    host_max: i64,
    admission_ms: i64,
    queue_ms: i64,
    turn_ms: i64,
    attempts_max: u32,
    holder: Option<Uuid>,
    running_max: Option<i64>,
    #[serde(flatten)]
    collect: Option<CollectItem>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    files: Vec<FileItem<'a>>,
}

#[derive(Debug, Serialize)]
struct FileItem<'a> {
    digest: String,
    media_type: &'a str,
}

#[derive(Debug, Serialize)]
struct CollectItem {
    whole: usize,
    more: usize,
    parts: i64,
    parts_max: i64,
    bytes_max: i64,
    files_bytes: i64,
    files_bytes_max: i64,
}

#[derive(Debug, Serialize)]
struct ClaimItem {
    holder: Uuid,
    slots: i64,
    running_max: i64,
    backoff_ms: i64,
    backoff_ms_max: i64,
}

#[derive(Debug, Serialize)]
struct EventsItem {
    first_seq: u32,
    body: Option<usize>,
    effect: bool,
}

#[derive(Debug, Serialize)]
struct RequeueItem {
    delay_ms: i64,
}

#[derive(Debug, Serialize)]
struct CommitItem<'a> {
    outcome: &'static str,
    reply: Option<usize>,
    replaces: Option<bool>,
    failure: Option<String>,
    cancelled_by: Option<&'static str>,
    first_seq: Option<u32>,
    body: Option<usize>,
    #[serde(flatten)]
    usage: Option<UsageItem>,
    #[serde(flatten)]
    snapshot: Option<SnapshotItem<'a>>,
}

#[derive(Debug, Serialize)]
struct UsageItem {
    cpu_ms: f64,
    wall_ms: f64,
    memory: i64,
    calls: i64,
    bytes_in: i64,
    bytes_out: i64,
    instance_ms: f64,
}

#[derive(Debug, Serialize)]
struct SnapshotItem<'a> {
    parent: Uuid,
    permit_run: Uuid,
    permit_org: &'a str,
    permit_conv: &'a str,
    snapshot: usize,
}

/// Payloads of a batch, by number from 1: they travel beside the items, in their own bytes.
#[derive(Default)]
pub(super) struct Bodies<'a>(pub(super) Vec<Cow<'a, [u8]>>);

impl<'a> Bodies<'a> {
    fn add(&mut self, body: impl Into<Cow<'a, [u8]>>) -> usize {
        self.0.push(body.into());
        self.0.len()
    }
}

/// What a batch asks of the database. Its bytes go to the `bodies`.
pub(super) fn describe<'a>(batch: &'a [Write], bodies: &mut Bodies<'a>) -> Result<Vec<Item<'a>>, sqlx::Error> {
    let items = batch.iter().zip(1..).zip(runs(batch));
    items.map(|((item, ord), run_to)| Ok(Item { ord, run_to, ..describe_one(item, bodies)? })).collect()
}

/// The place of the last item of each item's run, from 1. A run is of one kind and touches nothing twice: the database reads what all of it needs
/// before it writes any of it.
fn runs(batch: &[Write]) -> Vec<usize> {
    let mut ends = Vec::with_capacity(batch.len());
    let mut touched = HashSet::new();
    for (place, item) in batch.iter().enumerate() {
        let goes_on =
            place > 0 && joins(&batch[place - 1], item) && touches(item).all(|thing| !touched.contains(&thing));
        if !goes_on {
            ends.resize(place, place);
            touched.clear();
        }
        touched.extend(touches(item));
    }
    ends.resize(batch.len(), batch.len());
    ends
}

/// Whether items side by side may be written together.
fn joins(before: &Write, item: &Write) -> bool {
    match (before, item) {
        (Write::Append(_), Write::Append(_)) | (Write::Commit(_), Write::Commit(_)) => true,
        // An interrupt ends what others of its run might look at.
        (Write::Accept(before), Write::Accept(accept)) => {
            [before, accept].iter().all(|a| a.on_busy != OnBusy::Interrupt)
        }
        _ => false,
    }
}

/// What an item decides over.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Touched<'a> {
    Turn(&'a OrgId, TurnId),
    /// A conversation, and the idempotency keys that are told apart by it.
    Lane(&'a OrgId, &'a AgentId, Option<&'a ConversationId>),
}

fn touches(item: &Write) -> impl Iterator<Item = Touched<'_>> {
    let (turn, lane) = match item {
        Write::Accept(accept) => {
            let conversation = accept.envelope.conversation.as_ref();
            let shared = conversation.is_some() || accept.key.is_some();
            let lane = shared.then_some(Touched::Lane(&accept.org, &accept.agent, conversation));
            (Some(Touched::Turn(&accept.org, accept.turn)), lane)
        }
        Write::Commit(commit) => (Some(Touched::Turn(&commit.org, commit.turn)), None),
        Write::Append(_) | Write::BeginEffect(_) | Write::Requeue(_) | Write::Claim(_) => (None, None),
    };
    turn.into_iter().chain(lane)
}

fn describe_one<'a>(item: &'a Write, bodies: &mut Bodies<'a>) -> Result<Item<'a>, sqlx::Error> {
    Ok(match item {
        Write::Accept(accept) => accept_item(accept, bodies),
        Write::Claim(claim) => Item { kind: "claim", claim: Some(claim_item(claim)), ..Item::default() },
        Write::Append(append) => append_item(append, false, bodies),
        Write::BeginEffect(append) => append_item(append, true, bodies),
        Write::Commit(commit) => commit_item(commit, bodies)?,
        Write::Requeue(Requeue { lease, delay_ms }) => {
            Item { requeue: Some(RequeueItem { delay_ms: bigint(*delay_ms) }), ..held("requeue", lease) }
        }
    })
}

/// What is written under a lease.
fn held<'a>(kind: &'static str, lease: &'a Lease) -> Item<'a> {
    Item { kind, org: Some(lease.org.as_str()), turn: Some(lease.turn.0), epoch: Some(lease.epoch), ..Item::default() }
}

fn accept_item<'a>(accept: &'a Accept, bodies: &mut Bodies<'a>) -> Item<'a> {
    let envelope = &accept.envelope;
    let item = AcceptItem {
        agent: accept.agent.as_str(),
        run: envelope.run_id.map(|run| run.0),
        env_org: envelope.org.as_ref().map(OrgId::as_str),
        conv: envelope.conversation.as_ref().map(|id| id.as_str()),
        mode: envelope.mode.as_str(),
        usr: accept.user.as_str(),
        sees_all: accept.sees_all,
        dry: accept.dry_run,
        key: accept.key.as_ref().map(|(key, _)| storable(key)),
        hash: accept.key.as_ref().map(|(_, hash)| bodies.add(&hash[..])),
        msg: bodies.add(&accept.message[..]),
        on_busy: match accept.on_busy {
            OnBusy::Enqueue => "enqueue",
            OnBusy::Reject => "reject",
            OnBusy::Interrupt => "interrupt",
            OnBusy::Collect => "collect",
        },
        conv_max: bigint(accept.bounds.conversation_queue_max),
        org_max: bigint(accept.bounds.org_queue_max),
        host_max: bigint(accept.bounds.host_queue_max),
        admission_ms: bigint(accept.clocks.admission_timeout_ms),
        queue_ms: bigint(accept.clocks.queue_timeout_ms),
        turn_ms: bigint(accept.clocks.turn_timeout_ms),
        attempts_max: accept.attempts_max,
        holder: accept.claim_for.map(|(holder, _)| holder.0),
        running_max: accept.claim_for.map(|(_, bound)| bigint(bound.0)),
        collect: accept.collect.as_ref().map(|collect| CollectItem {
            whole: bodies.add(&collect.message.whole[..]),
            more: bodies.add(&collect.message.more[..]),
            parts: bigint(collect.message.parts),
            parts_max: bigint(collect.parts_max),
            bytes_max: bigint(collect.bytes_max),
            files_bytes: bigint(collect.files_bytes),
            files_bytes_max: bigint(collect.files_bytes_max),
        }),
        files: accept
            .attachments
            .iter()
            .map(|file| FileItem { digest: hex::encode(file.id.0), media_type: &file.media_type })
            .collect(),
    };
    Item {
        kind: "accept",
        org: Some(accept.org.as_str()),
        turn: Some(accept.turn.0),
        accept: Some(item),
        ..Item::default()
    }
}

fn claim_item(claim: &ClaimRequest) -> ClaimItem {
    ClaimItem {
        holder: claim.holder.0,
        slots: bigint(claim.slots),
        running_max: bigint(claim.org_running_max.0),
        backoff_ms: bigint(claim.backoff_ms),
        backoff_ms_max: bigint(claim.backoff_ms_max),
    }
}

fn append_item<'a>(append: &'a Append, effect: bool, bodies: &mut Bodies<'a>) -> Item<'a> {
    let body = (!append.batch.is_empty()).then(|| bodies.add(append.batch.encode()));
    let events = EventsItem { first_seq: append.batch.first_seq, body, effect };
    Item { events: Some(events), ..held("append", &append.lease) }
}

fn commit_item<'a>(commit: &'a Commit, bodies: &mut Bodies<'a>) -> Result<Item<'a>, sqlx::Error> {
    let (mut reply, mut replaces, mut failure, mut by) = (None, None, None, None);
    match &commit.outcome {
        Outcome::Completed { reply: content, replaces_deltas } => {
            reply = Some(bodies.add(json(content)?));
            replaces = Some(*replaces_deltas);
        }
        Outcome::Failed(why) => failure = Some(String::from_utf8_lossy(&json(why)?).into_owned()),
        Outcome::Cancelled { by: who } => by = Some(who.as_str()),
    }
    let tail = (!commit.tail.is_empty()).then(|| (commit.tail.first_seq, bodies.add(commit.tail.encode())));
    let item = CommitItem {
        outcome: commit.outcome.state().as_str(),
        reply,
        replaces,
        failure,
        cancelled_by: by,
        first_seq: tail.map(|(first_seq, _)| first_seq),
        body: tail.map(|(_, body)| body),
        usage: commit.usage.map(|usage| UsageItem {
            cpu_ms: usage.cpu_ms,
            wall_ms: usage.wall_ms,
            memory: bigint(usage.memory_peak_bytes),
            calls: bigint(usage.host_calls),
            bytes_in: bigint(usage.bytes_in),
            bytes_out: bigint(usage.bytes_out),
            instance_ms: usage.instance_ms,
        }),
        snapshot: commit.snapshot.as_ref().map(|staged| SnapshotItem {
            parent: staged.parent,
            permit_run: staged.permit.run_id().0,
            permit_org: staged.permit.org().as_str(),
            permit_conv: staged.permit.conversation().as_str(),
            snapshot: bodies.add(&staged.body[..]),
        }),
    };
    Ok(Item {
        kind: "commit",
        org: Some(commit.org.as_str()),
        turn: Some(commit.turn.0),
        epoch: commit.epoch,
        commit: Some(item),
        ..Item::default()
    })
}

/// A caller's own text as the database can hold it: a NUL byte, which it cannot, is written as `\0`. Two texts never become one.
fn storable(text: &str) -> Cow<'_, str> {
    if text.contains(['\0', '\\']) {
        Cow::Owned(text.replace('\\', "\\\\").replace('\0', "\\0"))
    } else {
        Cow::Borrowed(text)
    }
}

fn json<T: Serialize>(value: &T) -> Result<Vec<u8>, sqlx::Error> {
    serde_json::to_vec(value).map_err(|error| sqlx::Error::Encode(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance::{cancelled, message, org};

    fn cancel(turn: TurnId) -> Write {
        Write::Commit(Box::new(Commit {
            org: org("acme"),
            turn,
            epoch: None,
            outcome: cancelled(),
            snapshot: None,
            tail: crate::event::EventBatch::default(),
            usage: None,
        }))
    }

    #[test]
    fn a_run_is_of_one_kind_and_touches_nothing_twice() {
        let [one, two] = [TurnId::new(), TurnId::new()];
        let to = |conversation: &str| message(conversation);
        let keyed = |mut accept: Accept, key: &str| {
            accept.key = Some((key.to_owned(), [0; 32]));
            accept
        };
        let nowhere = |mut accept: Accept| {
            accept.envelope.conversation = None;
            accept
        };
        let interrupt = |accept: Accept| Accept { on_busy: OnBusy::Interrupt, ..accept };
        let again = to("a");
        let accepts =
            |accepts: Vec<Accept>| accepts.into_iter().map(|a| Write::Accept(Box::new(a))).collect::<Vec<_>>();
        let cases = [
            (vec![], vec![]),
            (vec![cancel(one), cancel(two), cancel(one)], vec![2, 2, 3]),
            (vec![cancel(one), accepts(vec![to("a")]).remove(0), cancel(two)], vec![1, 2, 3]),
            (accepts(vec![to("a"), to("b"), to("a"), to("c")]), vec![2, 2, 4, 4]),
            (accepts(vec![again.clone(), again]), vec![1, 2]),
            (accepts(vec![nowhere(to("a")), nowhere(to("a"))]), vec![2, 2]),
            (accepts(vec![nowhere(keyed(to("a"), "k")), nowhere(keyed(to("a"), "k"))]), vec![1, 2]),
            (accepts(vec![to("a"), interrupt(to("b")), to("c"), to("d")]), vec![1, 2, 4, 4]),
        ];
        for (batch, expected) in cases {
            assert_eq!(runs(&batch), expected, "{batch:?}");
        }
    }
}
