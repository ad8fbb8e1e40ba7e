//! What every store must do, rule by rule, against the trait alone. A rule is a function over a [`World`]; each store's tests run them all
//! (`conformance::rules!`), and its own checker looks at the tables after each.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;

use super::*;
use crate::admission::{OnBusy, QueueBounds};
use crate::caller::Scopes;
use crate::content::{Content, Joinable};
use crate::event::{EventBatch, raw};
use crate::gate::{self, Envelope, Grant, SessionMode};
use crate::ids::RunId;
use crate::lease::Epoch;
use crate::turn::{CancelledBy, Failure, Outcome, TurnState, Usage};

pub(super) mod agent_limits;
pub(super) mod attachments;
pub(super) mod audit;
pub(super) mod catalog;
pub(super) mod limits;
pub(super) mod members;
pub(super) mod model;
pub(super) mod orgs;
pub(super) mod queue;
pub(super) mod snapshots;
pub(super) mod tenants;
pub(super) mod torture;
pub(super) mod turns;

/// One test a rule: `$world` makes a [`World`], `$check` looks at what a rule has left behind.
macro_rules! rules {
    ($world:path, $check:path) => {
        $crate::store::conformance::rules! { @ $world, $check;
            turns: [
                t1_every_accepted_message_gets_one_end, t1_of_two_ends_in_one_batch_the_first_stands, t2_a_late_reply_changes_nothing,
                t4_a_lost_election_is_not_an_error, t8_cancel_of_a_queued_turn_leaves_nothing, t8_cancel_twice_hits_nothing_else,
                t10_a_poison_turn_ends_and_the_conversation_goes_on, r1_an_effect_that_began_is_never_run_again,
                r1_what_may_not_run_again_hides_no_other_orgs_turn, r2_a_stopped_replica_writes_nothing_more, r2_an_expired_replica_is_dead_for_ever, r6_a_drain_spends_no_attempt_and_claims_nothing,
                r7_one_item_that_fails_in_a_batch_fails_alone, a_reply_without_a_running_turn_is_lost,
                e1_event_ids_go_up_over_a_restart, e2_whoever_returns_sees_the_rest_and_nothing_twice, events_come_in_pages,
                a_long_tail_reads_like_a_short_one, worker_and_version_are_fixed_at_the_first_start, a_submission_twice_is_one_turn,
                usage_and_failure_are_kept, stale_leases_are_named, a_nul_byte_ends_nobodys_batch,
                progress_tells_what_has_changed,
            ]
            queue: [
                t5_a_waiting_turn_has_its_own_clock, t9_turns_run_in_the_order_of_acceptance, t9_a_deferred_turn_is_not_overtaken,
                one_turn_of_a_conversation_at_a_time, a_fused_claim_waits_its_turn, a_fused_claim_keeps_the_orgs_bound,
                a_fused_claim_is_complete, o5_a_long_queue_does_not_delay_another_org, o3_running_turns_of_an_org_are_bounded,
                busy_is_rejected_or_interrupted_as_asked, t9_what_comes_meanwhile_is_one_next_turn, what_is_old_goes_and_what_lives_stays, an_interrupt_ends_every_live_turn, queues_are_bounded,
                idempotency_keys_attach_and_mismatch, a_replayed_key_interrupts_nothing, idempotency_keys_are_forgotten,
                each_clock_has_its_own_reason, s1_the_gate_refuses_without_starting, s1_the_gates_column_agrees_with_the_gate,
                a_private_turn_occupies_its_conversation, live_counts_are_exact, status_tells_what_is_owed, r8_an_end_tells_that_the_next_is_ready,
            ]
            snapshots: [
                s2_without_a_permit_no_snapshot_is_written, s3_snapshots_form_one_chain, s3_two_first_snapshots_collide,
                s4_a_failed_turn_leaves_the_snapshot, s7_a_snapshot_belongs_to_the_run_that_wrote_it,
                s8_a_deleted_conversation_starts_from_nothing, s8_deleting_ends_live_turns, a_reset_starts_a_new_chain, a_run_id_writes_once,
                s8_a_file_turn_has_its_conversations_generation,
            ]
            tenants: [
                o1_the_same_names_in_two_orgs_never_meet, o2_anothers_conversation_is_not_found,
                o2_anothers_conversation_is_neither_deleted_nor_reset_nor_named, an_admin_sees_every_conversation,
                deleting_one_conversation_leaves_its_neighbours,
            ]
            attachments: [
                o1_the_same_bytes_in_two_orgs_are_two, o2_an_attachment_is_whose_it_is, an_attachment_is_its_bytes_in_pieces,
                what_a_turn_refers_to_stays_and_goes_with_it, an_upload_that_nothing_refers_to_goes, an_attachment_that_is_gone_is_not_referred_to,
                an_org_has_room_for_so_many_bytes, s8_attachments_go_with_their_conversation, a_message_that_joins_brings_its_attachments,
            ]
            catalog: [
                workers_have_versions_by_their_bytes, old_versions_go_and_used_ones_stay, a_used_worker_is_not_deleted,
                agents_pin_versions_and_one_is_default, an_agent_with_conversations_is_not_deleted, lists_have_cursors,
                keys_are_found_by_hash_and_revoked, a_rotated_key_ends_after_its_overlap_and_has_one_successor,
                o1_whoever_leaves_an_org_leaves_no_key_behind,
                ticket_keys_are_added_in_order_and_two_are_kept, orgs_are_made_once, conversations_are_opened_once,
                s8_a_title_goes_with_its_conversation_and_stays_over_a_reset,
            ]
            audit: [
                each_change_is_written_down_with_who_made_it, o1_an_orgs_audit_is_its_own_and_the_hosts_is_nobodys,
                the_audit_is_read_newest_first_by_each_filter, old_entries_of_the_audit_go_and_young_ones_stay,
            ]
            orgs: [
                provisioning_makes_an_org_whole_once, provisioning_leaves_what_an_admin_curated, provisioning_names_no_worker_of_somebodys_own,
                a_full_org_is_told_that_it_has_no_room, o1_the_default_is_the_orgs_own,
                an_org_goes_in_pieces_and_only_once_it_is_marked_and_idle, a_marked_org_is_nobodys,
            ]
            limits: [
                o3_an_orgs_messages_come_at_its_rate, o3_a_rate_is_one_for_a_batch_and_what_joins_counts, o3_what_was_accepted_before_costs_nothing,
                o3_a_conversation_that_is_made_counts_as_a_message,
                o3_an_orgs_own_bound_holds_for_claims_and_fused_starts, o3_an_orgs_own_queue_is_bounded, o3_processor_time_is_bounded_by_the_hour,
                o3_processor_time_counts_however_a_turn_ends,
                o3_a_limit_is_its_orgs_own_and_written_down, what_is_used_is_told,
            ]
            agent_limits: [
                o3_an_agents_messages_come_at_its_rate_within_its_orgs, o3_an_agents_queue_is_bounded, o3_an_agents_processor_time_is_bounded,
                o3_no_more_of_an_agents_turns_run_than_it_says, o3_what_is_held_starts_in_the_order_of_acceptance, o3_a_held_turn_has_the_queues_clock,
                o3_what_is_held_ends_like_any_other, o3_an_agents_bounds_are_changed_under_its_turns, o3_a_requeue_and_a_takeover_take_no_more_room,
                o3_what_an_org_and_an_agent_have_stored_is_measured_and_bounded,
            ]
            members: [
                o1_members_are_of_their_org_alone, an_org_keeps_an_owner_and_owners_are_owners_to_change, a_removed_members_keys_end_with_it,
                o1_a_turn_is_found_among_ones_own_orgs_alone, o3_an_org_has_so_many_members, o1_an_org_that_goes_has_no_members,
            ]
            torture: [r1_torture_leaves_no_trace,]
            model: [every_answer_is_one_that_the_protocol_allows,]
        }
    };
    (@ $world:path, $check:path; $($module:ident: [$($rule:ident,)*])*) => {
        $(mod $module {
            $(#[tokio::test]
            async fn $rule() {
                let world = $world().await;
                $crate::store::conformance::$module::$rule(&world).await;
                $check(&world).await;
            })*
        })*
    };
}
pub(super) use rules;

/// A store with two orgs, each with agent `support` on worker `echo`, one live replica, and a time of its own.
pub(super) struct World {
    pub(super) store: Arc<dyn Store>,
    pub(super) replica: ReplicaId,
    now: AtomicI64,
    /// Whatever must outlive the store.
    pub(super) _keep: Box<dyn std::any::Any + Send + Sync>,
}

pub(super) const ATTEMPTS_MAX: u32 = 3;
pub(super) const CLOCKS: Clocks =
    Clocks { admission_timeout_ms: 10_000, queue_timeout_ms: 50_000, turn_timeout_ms: 20_000 };
pub(super) const TTL_MS: u64 = 1_000_000;
pub(super) const BOUNDS: QueueBounds =
    QueueBounds { conversation_queue_max: 1_000, org_queue_max: 10_000, host_queue_max: 10_000 };

pub(super) fn org(id: &str) -> OrgId {
    OrgId::parse(id).unwrap()
}

/// Whoever makes the changes of these rules.
pub(super) fn by() -> Actor {
    Actor::new("root", "key:0123456789abcdef", Some("r-1"), None)
}

pub(super) fn user(id: &str) -> UserId {
    UserId::parse(id).unwrap()
}

pub(super) fn agent() -> AgentId {
    AgentId::parse("support").unwrap()
}

pub(super) fn worker() -> WorkerName {
    WorkerName::parse("echo").unwrap()
}

pub(super) fn conversation(id: &str) -> ConversationId {
    ConversationId::parse(id).unwrap()
}

pub(super) fn replied(text: &str) -> Outcome {
    Outcome::Completed { reply: Content::text(text), replaces_deltas: false }
}

pub(super) fn failed(code: crate::turn::FailureCode) -> Outcome {
    Outcome::Failed(Failure::new(code, "because"))
}

/// What a turn used, as far as anybody counts it here.
pub(super) fn used(cpu_ms: f64) -> Usage {
    Usage { cpu_ms, wall_ms: 2.0, memory_peak_bytes: 3, host_calls: 4, bytes_in: 5, bytes_out: 6, instance_ms: 7.0 }
}

pub(super) fn cancelled() -> Outcome {
    Outcome::Cancelled { by: CancelledBy::User }
}

/// A message of ann's in org `acme`, to agent `support`.
pub(super) fn message(conversation_id: &str) -> Accept {
    let turn = TurnId::new();
    Accept {
        org: org("acme"),
        turn,
        agent: agent(),
        envelope: Envelope {
            run_id: Some(turn.into()),
            org: Some(org("acme")),
            conversation: Some(conversation(conversation_id)),
            mode: SessionMode::Snapshot,
        },
        user: user("ann"),
        sees_all: false,
        message: Bytes::from_static(br#"{"text":"hi"}"#),
        attachments: Vec::new(),
        dry_run: false,
        key: None,
        on_busy: OnBusy::Enqueue,
        collect: None,
        bounds: BOUNDS,
        clocks: CLOCKS,
        attempts_max: ATTEMPTS_MAX,
        claim_for: None,
    }
}

/// The same, with `on_busy: collect` where a turn's message may have so many parts.
pub(super) fn collecting(message: Accept, parts_max: u32) -> Accept {
    let joinable = Joinable::of(&message.message).unwrap();
    let files_bytes = message.attachments.iter().map(|file| file.bytes).sum();
    let collect = Some(Collect { message: joinable, parts_max, bytes_max: 1_000, files_bytes, files_bytes_max: 10 });
    Accept { on_busy: OnBusy::Collect, collect, ..message }
}

/// Deltas of these texts from `first_seq`.
pub(super) fn deltas(first_seq: u32, texts: &[&str]) -> EventBatch {
    let events = texts.iter().map(|text| ("output.delta".into(), raw(&serde_json::json!({ "text": text })))).collect();
    EventBatch { first_seq, events }
}

impl World {
    pub(super) async fn new(store: Arc<dyn Store>, keep: Box<dyn std::any::Any + Send + Sync>) -> World {
        let world = World { store, replica: ReplicaId::new(), now: AtomicI64::new(1_000_000), _keep: keep };
        world.store.register_replica(world.replica, world.now(), TTL_MS).await.unwrap();
        for id in ["acme", "zeta"] {
            world.store.create_org(&org(id), &user("root"), world.now(), &by()).await.unwrap();
            world.upload(&org(id), &worker(), b"one").await;
            world.set_agent(&org(id), None).await;
        }
        world
    }

    pub(super) fn now(&self) -> Timestamp {
        Timestamp(self.now.load(Ordering::Relaxed))
    }

    pub(super) fn advance_ms(&self, ms: u64) {
        self.now.fetch_add(i64::try_from(ms).unwrap(), Ordering::Relaxed);
    }

    pub(super) async fn upload(&self, org: &OrgId, worker: &WorkerName, wasm: &'static [u8]) -> PutWorker {
        use sha2::Digest;
        let digest = sha2::Sha256::digest(wasm).into();
        let imports = vec!["turnhouse_v1.reply".to_owned()];
        let wasm = Bytes::from_static(wasm);
        self.store.put_worker(org, worker, digest, wasm, imports, 1.5, 3, 2, self.now(), &by()).await.unwrap()
    }

    pub(super) async fn set_agent(&self, org: &OrgId, version: Option<u32>) -> PutAgent {
        let settings = AgentSettings { version, ..AgentSettings::of(worker()) };
        self.store.put_agent(org, &agent(), settings, 3, self.now(), &by()).await.unwrap()
    }

    /// A message of `ann` to a conversation of `acme`, as the gateway would accept it.
    pub(super) fn message(&self, conversation_id: &str) -> Accept {
        message(conversation_id)
    }

    /// The same for org `zeta`.
    pub(super) fn message_of_zeta(&self, conversation_id: &str) -> Accept {
        let mut message = self.message(conversation_id);
        message.org = org("zeta");
        message.envelope.org = Some(org("zeta"));
        message
    }

    pub(super) async fn batch(&self, batch: Vec<Write>) -> Vec<Written> {
        let length = batch.len();
        let written = self.store.write(batch, self.now()).await.unwrap();
        assert_eq!(written.len(), length, "one answer an item");
        written
    }

    pub(super) async fn write(&self, item: Write) -> Written {
        self.batch(vec![item]).await.pop().unwrap()
    }

    pub(super) async fn accept(&self, accept: Accept) -> AcceptResult {
        match self.write(Write::Accept(Box::new(accept))).await {
            Written::Accept(result) => result,
            other => panic!("{other:?}"),
        }
    }

    /// Submits what must be accepted.
    pub(super) async fn submit(&self, accept: Accept) -> TurnId {
        let turn = accept.turn;
        match self.accept(accept).await {
            AcceptResult::Accepted { .. } => turn,
            other => panic!("not accepted: {other:?}"),
        }
    }

    /// Submits what must be accepted and started at once.
    pub(super) async fn submit_and_start(&self, mut accept: Accept) -> Claimed {
        accept.claim_for = Some((self.replica, RunningBound(1_000)));
        match self.accept(accept).await {
            AcceptResult::Accepted { claimed: Some(claimed), .. } => *claimed,
            other => panic!("not started: {other:?}"),
        }
    }

    pub(super) fn claim_request(&self, slots: usize) -> ClaimRequest {
        ClaimRequest {
            holder: self.replica,
            slots,
            org_running_max: RunningBound(1_000),
            backoff_ms: 100,
            backoff_ms_max: 300,
        }
    }

    pub(super) async fn claim_with(&self, request: ClaimRequest) -> Vec<Claimed> {
        match self.write(Write::Claim(request)).await {
            Written::Claim(claimed) => claimed,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn claim(&self, slots: usize) -> Vec<Claimed> {
        self.claim_with(self.claim_request(slots)).await
    }

    /// Claims the one turn that is ready.
    pub(super) async fn claim_one(&self) -> Claimed {
        let mut claimed = self.claim(10).await;
        assert_eq!(claimed.len(), 1, "exactly one turn is ready");
        claimed.pop().unwrap()
    }

    pub(super) fn commit(&self, claimed: &Claimed, outcome: Outcome) -> Commit {
        Commit {
            org: claimed.lease.org.clone(),
            turn: claimed.lease.turn,
            epoch: Some(claimed.lease.epoch),
            outcome,
            snapshot: None,
            tail: EventBatch::default(),
            usage: None,
        }
    }

    /// What a running turn stages, on the head that its claim gave.
    pub(super) fn stage(&self, claimed: &Claimed, body: &'static [u8]) -> StagedSnapshot {
        let Ok(Grant::Shared(permit)) = gate::decide(&claimed.envelope) else { panic!("no permit") };
        let parent = claimed.head.as_ref().expect("a shared turn has a head").parent;
        StagedSnapshot { permit, parent, body: Bytes::from_static(body) }
    }

    pub(super) async fn end(&self, commit: Commit) -> CommitResult {
        match self.write(Write::Commit(Box::new(commit))).await {
            Written::Commit(result) => result,
            other => panic!("{other:?}"),
        }
    }

    /// Completes what must still be this claim's to complete.
    pub(super) async fn complete(&self, claimed: &Claimed, snapshot: Option<&'static [u8]>) -> Ended {
        let mut commit = self.commit(claimed, replied("done"));
        commit.snapshot = snapshot.map(|body| self.stage(claimed, body));
        match self.end(commit).await {
            CommitResult::Won(ended) => *ended,
            other => panic!("not completed: {other:?}"),
        }
    }

    /// Ends a turn whatever its epoch is.
    pub(super) async fn cancel(&self, turn: TurnId) -> CommitResult {
        self.end(Commit {
            org: org("acme"),
            turn,
            epoch: None,
            outcome: cancelled(),
            snapshot: None,
            tail: EventBatch::default(),
            usage: None,
        })
        .await
    }

    pub(super) async fn append(&self, claimed: &Claimed, batch: EventBatch) -> Fenced {
        match self.write(Write::Append(Append { lease: claimed.lease.clone(), batch })).await {
            Written::Append(fenced) => fenced,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn requeue(&self, claimed: &Claimed, delay_ms: u64) -> Fenced {
        let requeue = Requeue { lease: claimed.lease.clone(), delay_ms };
        match self.write(Write::Requeue(requeue)).await {
            Written::Requeue(fenced) => fenced,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn record(&self, turn: TurnId) -> TurnRecord {
        self.store.turn(&org("acme"), turn).await.unwrap().expect("the turn is there").for_host()
    }

    pub(super) async fn state(&self, turn: TurnId) -> TurnState {
        self.record(turn).await.state
    }

    /// Ids of the written events after `after`.
    pub(super) async fn event_ids(&self, turn: TurnId, after: Option<EventId>) -> Vec<String> {
        let page = self.store.events(&org("acme"), turn, after, 1 << 20).await.unwrap().expect("the turn is there");
        assert!(!page.more);
        page.events.iter().map(|event| event.id.to_string()).collect()
    }

    pub(super) async fn sweep(&self) -> SweepFindings {
        self.store.repair_lanes(self.now(), 100).await.unwrap();
        self.store.sweep(self.now(), 2, 100).await.unwrap()
    }

    /// Another host's incarnation.
    pub(super) async fn another_replica(&self, ttl_ms: u64) -> ReplicaId {
        let replica = ReplicaId::new();
        self.store.register_replica(replica, self.now(), ttl_ms).await.unwrap();
        replica
    }
}
