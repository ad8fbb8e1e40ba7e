//! The marker protocol as a pure state machine, over the pure code that production runs ([`admission::decide`], [`gate::decide`]), and histories
//! over it: submit, claim, renew, append, effect, commit, cancel, requeue, expiry, takeover, crash, delayed messages (any lease that was ever
//! handed out may speak again), and a sweep whose findings arrive late.
//!
//! Thousands of histories run on the machine alone, which checks its own invariants at every step; the same kind of history then runs on each store,
//! and every answer must be one that the machine allows. Where the protocol leaves a choice (which ready turn a claim takes), the machine judges the
//! choice instead of making it. Failing histories are shrunk, and printed.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::*;
use crate::admission::{self, Decision, Facts, Refusal};
use crate::quota::{LimitsChange, Meters, Quota};
use crate::turn::FailureCode;

mod protocol;

use protocol::{End, Protocol, Verdict};

const ORG_RUNNING_MAX: usize = 2;
/// What the second org has of its own.
const OWN_RUNNING_MAX: u32 = 1;
const QUOTA: Quota = Quota { submits_per_second: 20.0, submit_burst: 4, cpu_ms_per_hour: 12, storage_bytes_max: 0 };
/// What a turn uses that is ended under a lease.
const CPU_MS: f64 = 1.0;
const TTL_MS: u64 = 200;
const GATE_REFUSALS_MAX: u32 = 2;
const BACKOFF_MS: u64 = 30;
const REPLICAS: usize = 3;
const LANES: usize = 2;

/// One step of a history. Numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Op {
    Submit {
        org: usize,
        lane: usize,
        on_busy: OnBusy,
        fused: Option<usize>,
        key: Option<u8>,
        attempts_max: u32,
        envelope: Odd,
    },
    Claim {
        replica: usize,
        slots: usize,
    },
    Append {
        lease: usize,
        effect: bool,
    },
    Commit {
        lease: usize,
        completes: bool,
        snapshot: bool,
    },
    Requeue {
        lease: usize,
        delay_ms: u64,
    },
    Cancel {
        turn: usize,
    },
    Renew {
        replica: usize,
    },
    /// Dead at once, without a word; a new incarnation comes.
    Crash {
        replica: usize,
    },
    Tick {
        ms: u64,
    },
    Find,
    /// What was found, perhaps long ago, is acted upon.
    EndFound,
}

/// What is odd about an envelope.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Odd {
    Nothing,
    NoOrg,
    NoConversation,
    NoRun,
}

fn op() -> impl Strategy<Value = Op> {
    let on_busy = prop_oneof![
        6 => Just(OnBusy::Enqueue),
        1 => Just(OnBusy::Reject),
        1 => Just(OnBusy::Interrupt),
        3 => Just(OnBusy::Collect),
    ];
    let envelope = prop_oneof![12 => Just(Odd::Nothing), 1 => Just(Odd::NoOrg), 1 => Just(Odd::NoConversation), 1 => Just(Odd::NoRun)];
    let submit = (
        0..2_usize,
        0..LANES,
        on_busy,
        proptest::option::of(0..REPLICAS),
        proptest::option::weighted(0.2, 0..3_u8),
        1..4_u32,
        envelope,
    )
        .prop_map(|(org, lane, on_busy, fused, key, attempts_max, envelope)| Op::Submit {
            org,
            lane,
            on_busy,
            fused,
            key,
            attempts_max,
            envelope,
        });
    prop_oneof![
        8 => submit,
        6 => (0..REPLICAS, 1..5_usize).prop_map(|(replica, slots)| Op::Claim { replica, slots }),
        2 => (any::<usize>(), proptest::bool::weighted(0.3)).prop_map(|(lease, effect)| Op::Append { lease, effect }),
        6 => (any::<usize>(), any::<bool>(), any::<bool>())
            .prop_map(|(lease, completes, snapshot)| Op::Commit { lease, completes, snapshot }),
        2 => (any::<usize>(), prop_oneof![Just(0), Just(25_u64)]).prop_map(|(lease, delay_ms)| Op::Requeue { lease, delay_ms }),
        1 => any::<usize>().prop_map(|turn| Op::Cancel { turn }),
        2 => (0..REPLICAS).prop_map(|replica| Op::Renew { replica }),
        1 => (0..REPLICAS).prop_map(|replica| Op::Crash { replica }),
        4 => prop_oneof![Just(1_u64), Just(20), Just(120), Just(350)].prop_map(|ms| Op::Tick { ms }),
        1 => Just(Op::Find),
        1 => Just(Op::EndFound),
    ]
}

fn history() -> impl Strategy<Value = Vec<Op>> {
    proptest::collection::vec(op(), 1..60)
}

fn clocks() -> Clocks {
    Clocks { admission_timeout_ms: 900, queue_timeout_ms: 1_500, turn_timeout_ms: 400 }
}

/// Who carries a history out: the machine alone, or a store whose answers it judges.
struct Run<'w> {
    protocol: Protocol,
    world: Option<&'w World>,
    orgs: [OrgId; 2],
    replicas: Vec<ReplicaId>,
    /// Every lease that was ever handed out, and the head that came with it.
    leases: Vec<(Lease, Envelope, Option<Uuid>)>,
    turns: Vec<(OrgId, TurnId)>,
    found: Vec<(OrgId, TurnId, Epoch)>,
    /// For the machine alone: where its round of orgs begins.
    round: usize,
}

impl<'w> Run<'w> {
    async fn new(world: Option<&'w World>, case: usize) -> Run<'w> {
        let orgs = ["a", "b"].map(|name| org(&format!("model-{case}-{name}")));
        let mut run = Run {
            protocol: Protocol { now: 1_000_000, ..Protocol::default() },
            world,
            orgs,
            replicas: Vec::new(),
            leases: Vec::new(),
            turns: Vec::new(),
            found: Vec::new(),
            round: 0,
        };
        run.protocol.meters.insert(run.orgs[1].clone(), Meters::default());
        if let Some(world) = world {
            run.protocol.now = world.now().0;
            for org in &run.orgs {
                world.store.create_org(org, &user("root"), world.now(), &by()).await.unwrap();
                world.upload(org, &worker(), b"one").await;
                world.set_agent(org, None).await;
            }
            let limits = LimitsChange {
                submits_per_second: Some(Some(QUOTA.submits_per_second)),
                submit_burst: Some(Some(QUOTA.submit_burst)),
                running_max: Some(Some(OWN_RUNNING_MAX)),
                cpu_ms_per_hour: Some(Some(QUOTA.cpu_ms_per_hour)),
                ..LimitsChange::default()
            };
            world.store.set_org_limits(&run.orgs[1], &limits, world.now(), &by()).await.unwrap();
        }
        for _ in 0..REPLICAS {
            let replica = run.another_replica().await;
            run.replicas.push(replica);
        }
        run
    }

    async fn another_replica(&mut self) -> ReplicaId {
        let replica = match self.world {
            Some(world) => world.another_replica(TTL_MS).await,
            None => ReplicaId::new(),
        };
        self.protocol.replicas.insert(replica, self.protocol.now + i64::try_from(TTL_MS).unwrap());
        replica
    }

    fn tick(&mut self, ms: u64) {
        self.protocol.now += i64::try_from(ms).unwrap();
        if let Some(world) = self.world {
            world.advance_ms(ms);
        }
    }

    async fn step(&mut self, op: &Op) {
        match op {
            Op::Submit { org, lane, on_busy, fused, key, attempts_max, envelope } => {
                let accept = self.message(*org, *lane, *on_busy, *fused, *key, *attempts_max, *envelope);
                self.submit(accept).await;
            }
            Op::Claim { replica, slots } => self.claim(self.replicas[*replica], *slots).await,
            Op::Append { lease, effect } => {
                let Some((lease, _, _)) = self.lease(*lease) else { return };
                let expected = self.protocol.append(&lease, *effect);
                if let Some(world) = self.world {
                    let append = Append { lease, batch: deltas(1, &["a"]) };
                    let write = if *effect { Write::BeginEffect(append) } else { Write::Append(append) };
                    assert!(matches!(world.write(write).await, Written::Append(fenced) if fenced == expected));
                }
            }
            Op::Commit { lease, completes, snapshot } => {
                let Some((lease, envelope, head)) = self.lease(*lease) else { return };
                let staged = head.filter(|_| *snapshot && *completes);
                let outcome = if *completes { replied("done") } else { failed(FailureCode::WorkerTrapped) };
                self.commit(lease.org, lease.turn, Some(lease.epoch), outcome, staged.map(|head| (envelope, head)))
                    .await;
            }
            Op::Requeue { lease, delay_ms } => {
                let Some((lease, _, _)) = self.lease(*lease) else { return };
                let requeue = Requeue { lease, delay_ms: *delay_ms };
                let expected = self.protocol.requeue(&requeue);
                if let Some(world) = self.world {
                    assert!(
                        matches!(world.write(Write::Requeue(requeue)).await, Written::Requeue(fenced) if fenced == expected)
                    );
                }
            }
            Op::Cancel { turn } => {
                let Some((org, turn)) = pick(&self.turns, *turn).cloned() else { return };
                self.commit(org, turn, None, cancelled(), None).await;
            }
            Op::Renew { replica } => {
                let replica = self.replicas[*replica];
                let alive = self.protocol.alive(replica);
                if alive {
                    self.protocol.replicas.insert(replica, self.protocol.now + i64::try_from(TTL_MS).unwrap());
                }
                if let Some(world) = self.world {
                    let renewed = world.store.renew_replica(replica, world.now(), TTL_MS).await.unwrap();
                    assert_eq!(renewed, alive, "an expired lease is never revived (R2)");
                }
            }
            Op::Crash { replica } => self.replicas[*replica] = self.another_replica().await,
            Op::Tick { ms } => self.tick(*ms),
            Op::Find => self.find().await,
            Op::EndFound => self.end_found().await,
        }
        self.protocol.check();
    }

    fn lease(&self, index: usize) -> Option<(Lease, Envelope, Option<Uuid>)> {
        pick(&self.leases, index).cloned()
    }

    #[allow(clippy::too_many_arguments)]
    fn message(
        &self,
        org_index: usize,
        lane: usize,
        on_busy: OnBusy,
        fused: Option<usize>,
        key: Option<u8>,
        attempts_max: u32,
        odd: Odd,
    ) -> Accept {
        let (turn, org) = (TurnId::new(), self.orgs[org_index].clone());
        let envelope = Envelope {
            run_id: (odd != Odd::NoRun).then(|| turn.into()),
            org: (odd != Odd::NoOrg).then(|| org.clone()),
            conversation: (odd != Odd::NoConversation).then(|| conversation(&format!("c-{lane}"))),
            mode: SessionMode::Snapshot,
        };
        let accept = Accept {
            org,
            turn,
            agent: agent(),
            envelope,
            user: user("ann"),
            sees_all: false,
            message: Bytes::from_static(br#"{"text":"hi"}"#),
            attachments: Vec::new(),
            dry_run: false,
            // Some keys come again with another body.
            key: key.map(|key| (format!("k-{}", key / 2), [key; 32])),
            on_busy,
            collect: None,
            bounds: QueueBounds { conversation_queue_max: 2, org_queue_max: 5, host_queue_max: 10_000 },
            clocks: clocks(),
            attempts_max,
            claim_for: fused.map(|replica| (self.replicas[replica], RunningBound(ORG_RUNNING_MAX))),
        };
        // Three messages of one part each, with what stands between them.
        if on_busy == OnBusy::Collect { collecting(accept, 5) } else { accept }
    }

    async fn submit(&mut self, accept: Accept) {
        let expected = self.protocol.accept(&accept);
        if let Some(world) = self.world {
            let answer = match world.accept(accept.clone()).await {
                AcceptResult::Refused(refusal) => Verdict::Refused(refusal),
                AcceptResult::Attached(turn) => Verdict::Attached(turn),
                AcceptResult::Joined(turn) => Verdict::Joined(turn),
                AcceptResult::Accepted { interrupted, claimed } => {
                    let started = claimed.is_some();
                    if let Some(claimed) = claimed {
                        let head = claimed.head.as_ref().map(|head| head.parent);
                        self.leases.push((claimed.lease.clone(), claimed.envelope.clone(), head));
                    }
                    Verdict::Accepted { interrupted: interrupted.iter().map(|ended| ended.turn).collect(), started }
                }
            };
            assert_eq!(answer, expected);
        } else if let Verdict::Accepted { started: true, .. } = expected {
            self.hand_out(accept.turn);
        }
        if let Verdict::Accepted { .. } = expected {
            self.turns.push((accept.org, accept.turn));
        }
    }

    /// The lease of a marker as it stands now; for the machine alone.
    fn hand_out(&mut self, turn: TurnId) {
        let marker = &self.protocol.markers[&turn];
        let lease = Lease { org: marker.org.clone(), turn, epoch: marker.epoch, deadline: Timestamp(marker.deadline) };
        let shared = matches!(gate::decide(&marker.envelope), Ok(Grant::Shared(_)));
        let head = marker.lane.as_ref().filter(|_| shared).map(|(conversation, _)| {
            let lane = &self.protocol.lanes[&(marker.org.clone(), conversation.clone())];
            lane.chain.last().map_or(Uuid::nil(), |run| run.0)
        });
        self.leases.push((lease, marker.envelope.clone(), head));
    }

    async fn claim(&mut self, holder: ReplicaId, slots: usize) {
        let Some(world) = self.world else {
            let taken = self.choose(holder, slots);
            self.protocol.claimed(holder, slots, &taken);
            taken.iter().for_each(|(turn, _)| self.hand_out(*turn));
            return;
        };
        let request = ClaimRequest {
            holder,
            slots,
            org_running_max: RunningBound(ORG_RUNNING_MAX),
            backoff_ms: BACKOFF_MS,
            backoff_ms_max: BACKOFF_MS * 4,
        };
        let claimed = world.claim_with(request).await;
        let taken: Vec<_> = claimed.iter().map(|claimed| (claimed.lease.turn, claimed.lease.epoch)).collect();
        self.protocol.claimed(holder, slots, &taken);
        for claimed in claimed {
            let marker = &self.protocol.markers[&claimed.lease.turn];
            assert_eq!(claimed.attempt, marker.attempt);
            assert_eq!(claimed.refused.map(|(_, times)| times), (marker.refusals > 0).then_some(marker.refusals));
            assert_eq!(claimed.lease.deadline.0, marker.deadline);
            let head = claimed.head.as_ref().map(|head| head.parent);
            if let (Some(head), Some((conversation, _))) = (head, &marker.lane) {
                let lane = &self.protocol.lanes[&(marker.org.clone(), conversation.clone())];
                assert!(lane.chain.last().is_none_or(|run| run.0 == head), "it starts from the newest snapshot (S3)");
            }
            self.leases.push((claimed.lease, claimed.envelope, head));
        }
    }

    /// A claim's choice, for the machine alone: orphans, then one an org and round.
    fn choose(&mut self, holder: ReplicaId, slots: usize) -> Vec<(TurnId, Epoch)> {
        let protocol = &self.protocol;
        if !protocol.alive(holder) {
            return Vec::new();
        }
        let orphans = protocol.markers.iter().filter(|(_, marker)| protocol.is_orphan(marker));
        let mut taken: Vec<_> = orphans.take(slots).map(|(turn, marker)| (*turn, marker.epoch + 1)).collect();
        let mut running: Vec<usize> = self.orgs.iter().map(|org| protocol.running(org)).collect();
        let mut queues: Vec<Vec<(i64, TurnId, Epoch, bool)>> = self
            .orgs
            .iter()
            .map(|org| {
                let due = protocol.markers.iter().filter(|(_, marker)| marker.org == *org && protocol.is_due(marker));
                let mut due: Vec<_> = due
                    .map(|(turn, marker)| {
                        (marker.not_before, *turn, marker.epoch + 1, gate::decide(&marker.envelope).is_ok())
                    })
                    .collect();
                due.sort_by(|a, b| b.cmp(a));
                due
            })
            .collect();
        let mut idle = 0;
        while taken.len() < slots && idle < self.orgs.len() {
            let org = self.round % self.orgs.len();
            self.round += 1;
            match queues[org].last() {
                Some((_, turn, epoch, runs)) if running[org] < protocol.running_max(&self.orgs[org]) => {
                    taken.push((*turn, *epoch));
                    running[org] += usize::from(*runs);
                    queues[org].pop();
                    idle = 0;
                }
                _ => idle += 1,
            }
        }
        taken
    }

    async fn commit(
        &mut self,
        org: OrgId,
        turn: TurnId,
        epoch: Option<Epoch>,
        outcome: Outcome,
        staged: Option<(Envelope, Uuid)>,
    ) {
        let completes = matches!(outcome, Outcome::Completed { .. });
        let expected = self.protocol.end(turn, epoch, completes, staged.as_ref().map(|(_, parent)| *parent));
        let Some(world) = self.world else { return };
        let snapshot = staged.map(|(envelope, parent)| {
            let Ok(Grant::Shared(permit)) = gate::decide(&envelope) else { panic!("a head without a permit") };
            StagedSnapshot { permit, parent, body: Bytes::from_static(b"state") }
        });
        let commit = Commit {
            org,
            turn,
            epoch,
            outcome,
            snapshot,
            tail: EventBatch::default(),
            usage: epoch.map(|_| used(CPU_MS)),
        };
        let answer = match world.end(commit).await {
            CommitResult::Won(ended) => End::Won { was_running: ended.was_running, promoted: ended.promoted },
            CommitResult::Lost => End::Lost,
            CommitResult::SnapshotConflict => End::Conflict,
        };
        assert_eq!(answer, expected);
    }

    async fn find(&mut self) {
        let expected = self.protocol.overdue();
        let org_of = |turn: &TurnId| self.protocol.markers[turn].org.clone();
        self.found = expected.iter().map(|(turn, epoch)| (org_of(turn), *turn, *epoch)).collect();
        if let Some(world) = self.world {
            world.store.repair_lanes(world.now(), 1_000).await.unwrap();
            let found = world.store.sweep(world.now(), GATE_REFUSALS_MAX, 1_000).await.unwrap();
            let found: BTreeSet<_> = found.overdue.iter().map(|overdue| (overdue.turn, overdue.epoch)).collect();
            assert_eq!(found, expected, "a sweep finds what is overdue, and nothing else (T1)");
        }
    }

    async fn end_found(&mut self) {
        for (org, turn, epoch) in std::mem::take(&mut self.found) {
            self.commit(org, turn, Some(epoch), failed(FailureCode::Internal), None).await;
        }
    }

    /// No more messages: everything that is live ends, by its clock at the latest.
    async fn quiesce(&mut self) {
        for _ in 0..100 {
            if self.protocol.markers.is_empty() {
                return;
            }
            self.tick(50);
            self.find().await;
            self.end_found().await;
            self.protocol.check();
        }
        panic!("{} turns never end (T1)", self.protocol.markers.len());
    }
}

fn pick<T>(from: &[T], index: usize) -> Option<&T> {
    (!from.is_empty()).then(|| &from[index % from.len()])
}

async fn carry_out(world: Option<&World>, case: usize, history: &[Op]) {
    let mut run = Run::new(world, case).await;
    for op in history {
        run.step(op).await;
    }
    run.quiesce().await;
}

/// The machine keeps its own invariants, whatever happens.
#[test]
fn the_protocol_keeps_its_invariants() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut runner = TestRunner::new(Config { cases: 3_000, failure_persistence: None, ..Config::default() });
    runner
        .run(&history(), |history| {
            runtime.block_on(carry_out(None, 0, &history));
            Ok(())
        })
        .unwrap();
}

/// The same histories on a store: every answer is one that the machine allows. `TURNHOUSE_TEST_SEED` begins anew where another run began.
pub(in crate::store) async fn every_answer_is_one_that_the_protocol_allows(world: &World) {
    const CASES: usize = 80;
    let seed = std::env::var("TURNHOUSE_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| Uuid::now_v7().as_u128() as u64);
    println!("TURNHOUSE_TEST_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    for case in 0..CASES {
        let history = history().new_tree(&mut runner).unwrap().current();
        println!("history {case}: {history:?}");
        carry_out(Some(world), case, &history).await;
    }
}
