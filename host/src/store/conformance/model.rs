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

const ORG_RUNNING_MAX: usize = 2;
/// What the second org has of its own.
const OWN_RUNNING_MAX: u32 = 1;
const QUOTA: Quota = Quota { submits_per_second: 20.0, submit_burst: 4, cpu_ms_per_hour: 12 };
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Ready,
    Running,
}

#[derive(Debug, Clone)]
struct Marker {
    org: OrgId,
    envelope: Envelope,
    /// Its conversation and place, where it has one.
    lane: Option<(ConversationId, i64)>,
    stage: Stage,
    epoch: Epoch,
    attempt: u32,
    attempts_max: u32,
    refusals: u32,
    effects: bool,
    holder: Option<ReplicaId>,
    not_before: i64,
    deadline: i64,
    started: bool,
    /// Parts of its message, while others may join it.
    collected: u32,
}

#[derive(Debug, Clone, Default)]
struct Lane {
    last_seq: i64,
    /// Runs whose snapshots form the chain, oldest first.
    chain: Vec<RunId>,
}

/// The protocol.
#[derive(Debug, Default)]
struct Protocol {
    now: i64,
    replicas: HashMap<ReplicaId, i64>,
    markers: BTreeMap<TurnId, Marker>,
    ended: BTreeSet<TurnId>,
    accepted: BTreeSet<TurnId>,
    lanes: HashMap<(OrgId, ConversationId), Lane>,
    keys: HashMap<(OrgId, String, String), ([u8; 32], TurnId)>,
    /// Of orgs that are limited.
    meters: HashMap<OrgId, Meters>,
}

/// What an accept must answer.
#[derive(Debug, PartialEq)]
enum Verdict {
    Refused(Refusal),
    Attached(TurnId),
    Joined(TurnId),
    Accepted { interrupted: BTreeSet<TurnId>, started: bool },
}

/// What a commit must answer.
#[derive(Debug, PartialEq)]
enum End {
    Won { was_running: bool, promoted: bool },
    Lost,
    Conflict,
}

impl Protocol {
    fn alive(&self, replica: ReplicaId) -> bool {
        self.replicas.get(&replica).is_some_and(|expires| *expires > self.now)
    }

    fn running(&self, org: &OrgId) -> usize {
        self.markers.values().filter(|marker| marker.org == *org && marker.stage == Stage::Running).count()
    }

    fn running_max(&self, org: &OrgId) -> usize {
        if self.meters.contains_key(org) { OWN_RUNNING_MAX as usize } else { ORG_RUNNING_MAX }
    }

    fn in_lane<'a>(
        &'a self,
        org: &'a OrgId,
        conversation: &'a ConversationId,
    ) -> impl Iterator<Item = (TurnId, &'a Marker)> {
        self.markers
            .iter()
            .filter(move |(_, marker)| {
                marker.org == *org && marker.lane.as_ref().is_some_and(|(lane, _)| lane == conversation)
            })
            .map(|(turn, marker)| (*turn, marker))
    }

    /// Held by the dead, and may be run again.
    fn is_orphan(&self, marker: &Marker) -> bool {
        marker.stage == Stage::Running
            && marker.holder.is_some_and(|holder| !self.alive(holder))
            && marker.attempt < marker.attempts_max
            && !marker.effects
            && marker.deadline > self.now
    }

    /// Ready, and may be claimed now, the org's bound aside.
    fn is_due(&self, marker: &Marker) -> bool {
        marker.stage == Stage::Ready && marker.not_before <= self.now && marker.deadline > self.now
    }

    /// An org's next.
    fn next_of(&self, org: &OrgId) -> Option<TurnId> {
        let due = self.markers.iter().filter(|(_, marker)| marker.org == *org && self.is_due(marker));
        due.min_by_key(|(turn, marker)| (marker.not_before, **turn)).map(|(turn, _)| *turn)
    }

    fn orgs(&self) -> BTreeSet<OrgId> {
        self.markers.values().map(|marker| marker.org.clone()).collect()
    }

    /// Orgs that could start a turn now.
    fn eligible(&self) -> Vec<OrgId> {
        let could = |org: &OrgId| self.running(org) < self.running_max(org) && self.next_of(org).is_some();
        self.orgs().into_iter().filter(could).collect()
    }

    fn accept(&mut self, accept: &Accept) -> Verdict {
        let conversation = accept.envelope.conversation.clone();
        let laned = conversation.clone().filter(|_| accept.envelope.org.is_some());
        let scope = conversation.map_or(String::new(), |id| id.as_str().to_owned());
        let key = accept.key.as_ref().map(|(key, hash)| ((accept.org.clone(), scope, key.clone()), *hash));
        let live: Vec<(TurnId, Marker)> = laned
            .as_ref()
            .map(|lane| self.in_lane(&accept.org, lane).map(|(turn, marker)| (turn, marker.clone())).collect())
            .unwrap_or_default();
        let active = live
            .iter()
            .min_by_key(|(_, marker)| (marker.stage == Stage::Waiting, marker.lane.as_ref().map(|lane| lane.1)));
        let last = live.iter().filter(|(_, marker)| marker.stage == Stage::Waiting);
        let last = last.max_by_key(|(_, marker)| marker.lane.as_ref().map(|lane| lane.1));
        let open =
            last.filter(|(_, marker)| accept.collect.as_ref().is_some_and(|collect| collect.fits(marker.collected, 0)));
        let facts = Facts {
            joins: open.map(|(turn, _)| *turn),
            foreign: false,
            attachment_missing: false,
            keyed: key.as_ref().and_then(|(key, hash)| self.keys.get(key).map(|(known, turn)| (*turn, known == hash))),
            lane_live: live.len(),
            lane_active: active.map(|(turn, _)| *turn),
            exceeded: self.meters.get(&accept.org).and_then(|meters| meters.exceeded(&QUOTA, Timestamp(self.now))),
            org_live: self.markers.values().filter(|marker| marker.org == accept.org).count(),
            host_live: self.markers.len(),
        };
        let interrupt = match admission::decide(&facts, accept.on_busy, &accept.bounds) {
            Err(refusal) => return Verdict::Refused(refusal),
            Ok(Decision::Attach(turn)) => return Verdict::Attached(turn),
            Ok(Decision::Join(turn)) => {
                self.take_token(&accept.org);
                self.markers.get_mut(&turn).unwrap().collected += accept.collect.as_ref().unwrap().message.adds();
                if let Some((key, hash)) = key {
                    self.keys.insert(key, (hash, turn));
                }
                return Verdict::Joined(turn);
            }
            Ok(Decision::Accept { interrupt }) => interrupt,
        };
        self.take_token(&accept.org);
        let mut interrupted = BTreeSet::new();
        if interrupt {
            for (turn, _) in &live {
                self.markers.remove(turn);
                assert!(self.ended.insert(*turn));
                interrupted.insert(*turn);
            }
        }
        let behind = !live.is_empty() && !interrupt;
        let is_older_ready = !self.eligible().is_empty() || self.markers.values().any(|marker| self.is_orphan(marker));
        let holder = accept.claim_for.map(|(holder, _)| holder).filter(|holder| {
            !behind
                && gate::decide(&accept.envelope).is_ok()
                && self.running(&accept.org) < self.running_max(&accept.org)
                && self.alive(*holder)
                && !is_older_ready
        });
        let lane = laned.map(|conversation| {
            let lane = self.lanes.entry((accept.org.clone(), conversation.clone())).or_default();
            lane.last_seq += 1;
            (conversation, lane.last_seq)
        });
        let started = holder.is_some();
        let (stage, clock) = match (started, behind) {
            (true, _) => (Stage::Running, accept.clocks.turn_timeout_ms),
            (false, true) => (Stage::Waiting, accept.clocks.queue_timeout_ms),
            (false, false) => (Stage::Ready, accept.clocks.admission_timeout_ms),
        };
        let marker = Marker {
            org: accept.org.clone(),
            envelope: accept.envelope.clone(),
            lane,
            stage,
            epoch: u32::from(started),
            attempt: u32::from(started),
            attempts_max: accept.attempts_max,
            refusals: 0,
            effects: false,
            holder,
            not_before: self.now,
            deadline: self.now + i64::try_from(clock).unwrap(),
            started,
            collected: accept
                .collect
                .as_ref()
                .filter(|_| stage == Stage::Waiting)
                .map_or(0, |collect| collect.message.parts),
        };
        self.markers.insert(accept.turn, marker);
        assert!(self.accepted.insert(accept.turn));
        if let Some((key, hash)) = key {
            self.keys.insert(key, (hash, accept.turn));
        }
        Verdict::Accepted { interrupted, started }
    }

    fn take_token(&mut self, org: &OrgId) {
        if let Some(meters) = self.meters.get_mut(org) {
            meters.take_token(&QUOTA, Timestamp(self.now));
        }
    }

    /// Judges what a claim took, in order, and follows it.
    fn claimed(&mut self, holder: ReplicaId, slots: usize, taken: &[(TurnId, Epoch)]) {
        assert!(taken.len() <= slots, "no more than there are slots");
        assert!(taken.is_empty() || self.alive(holder), "only the living claim");
        let mut of_org: BTreeMap<OrgId, usize> = BTreeMap::new();
        for (turn, epoch) in taken {
            let marker = self.markers.get(turn).expect("only what is live is claimed").clone();
            let orphan = self.is_orphan(&marker);
            assert!(orphan || self.next_of(&marker.org) == Some(*turn), "an org's turns are claimed in their order");
            assert!(orphan || self.running(&marker.org) < self.running_max(&marker.org), "an org's bound holds (O3)");
            if !orphan {
                *of_org.entry(marker.org.clone()).or_default() += 1;
            }
            assert_eq!(*epoch, marker.epoch + 1, "every change of owner has an epoch of its own (E1)");
            let now = self.now;
            let next = self.markers.get_mut(turn).unwrap();
            next.epoch += 1;
            if gate::decide(&marker.envelope).is_err() {
                next.not_before = now + i64::try_from((BACKOFF_MS << marker.refusals).min(BACKOFF_MS * 4)).unwrap();
                next.refusals += 1;
                continue;
            }
            next.stage = Stage::Running;
            next.holder = Some(holder);
            next.attempt += 1;
            next.deadline = now + i64::try_from(clocks().turn_timeout_ms).unwrap();
            next.started = true;
        }
        if self.alive(holder) && taken.len() < slots {
            assert_eq!(self.eligible(), [], "what could be claimed is claimed while there are slots");
            assert!(!self.markers.values().any(|marker| self.is_orphan(marker)), "so are the turns of the dead (R1)");
        }
        let most = of_org.values().max().copied().unwrap_or(0);
        for org in self.eligible() {
            assert!(of_org.get(&org).copied().unwrap_or(0) + 1 >= most, "orgs take turns (O5)");
        }
    }

    fn holds(&self, lease: &Lease) -> bool {
        self.markers
            .get(&lease.turn)
            .is_some_and(|marker| marker.stage == Stage::Running && marker.epoch == lease.epoch)
    }

    fn append(&mut self, lease: &Lease, effect: bool) -> Fenced {
        if !self.holds(lease) {
            return Fenced::Stale;
        }
        self.markers.get_mut(&lease.turn).unwrap().effects |= effect;
        Fenced::Done
    }

    fn requeue(&mut self, requeue: &Requeue) -> Fenced {
        if !self.holds(&requeue.lease) {
            return Fenced::Stale;
        }
        let (now, delay) = (self.now, i64::try_from(requeue.delay_ms).unwrap());
        let marker = self.markers.get_mut(&requeue.lease.turn).unwrap();
        marker.stage = Stage::Ready;
        marker.holder = None;
        marker.epoch += 1;
        marker.attempt -= 1;
        marker.not_before = now + delay;
        marker.deadline = now + i64::try_from(clocks().admission_timeout_ms).unwrap().max(delay + 1);
        Fenced::Done
    }

    fn end(&mut self, turn: TurnId, epoch: Option<Epoch>, completes: bool, snapshot_on: Option<Uuid>) -> End {
        let Some(marker) = self.markers.get(&turn) else { return End::Lost };
        if epoch.is_some_and(|epoch| epoch != marker.epoch) || (completes && marker.stage != Stage::Running) {
            return End::Lost;
        }
        let marker = marker.clone();
        if let Some(parent) = snapshot_on {
            let (conversation, _) = marker.lane.clone().expect("a permit names a conversation");
            let lane = self.lanes.get_mut(&(marker.org.clone(), conversation)).unwrap();
            let run = marker.envelope.run_id.unwrap();
            // The root is the conversation's generation, which only the store knows.
            if !completes || lane.chain.last().is_some_and(|head| head.0 != parent) || lane.chain.contains(&run) {
                return End::Conflict;
            }
            lane.chain.push(run);
        }
        self.markers.remove(&turn);
        assert!(self.ended.insert(turn), "a turn ends once (T1)");
        if let (Some(meters), Some(_)) = (self.meters.get_mut(&marker.org), epoch) {
            meters.use_cpu(&QUOTA, CPU_MS, Timestamp(self.now));
        }
        let mut promoted = false;
        if let (Some((conversation, _)), true) = (&marker.lane, marker.stage != Stage::Waiting) {
            let waiting = self.in_lane(&marker.org, conversation).filter(|(_, other)| other.stage == Stage::Waiting);
            let next = waiting.min_by_key(|(_, other)| other.lane.as_ref().map(|lane| lane.1)).map(|(turn, _)| turn);
            if let Some(next) = next {
                let now = self.now;
                let next = self.markers.get_mut(&next).unwrap();
                next.stage = Stage::Ready;
                next.not_before = now;
                next.deadline = now + i64::try_from(clocks().admission_timeout_ms).unwrap();
                promoted = true;
            }
        }
        End::Won { was_running: marker.stage == Stage::Running, promoted }
    }

    /// What a sweep must find.
    fn overdue(&self) -> BTreeSet<(TurnId, Epoch)> {
        let is_overdue = |marker: &Marker| {
            marker.deadline <= self.now
                || (marker.stage == Stage::Running
                    && marker.holder.is_some_and(|holder| !self.alive(holder))
                    && (marker.effects || marker.attempt >= marker.attempts_max))
                || (marker.stage == Stage::Ready && marker.refusals >= GATE_REFUSALS_MAX)
        };
        self.markers
            .iter()
            .filter(|(_, marker)| is_overdue(marker))
            .map(|(turn, marker)| (*turn, marker.epoch))
            .collect()
    }

    /// What must hold between any two steps.
    fn check(&self) {
        assert_eq!(
            self.accepted.len(),
            self.markers.len() + self.ended.len(),
            "a turn is live or has ended, never both or neither (T1)"
        );
        let mut lanes: BTreeMap<(OrgId, ConversationId), Vec<&Marker>> = BTreeMap::new();
        for (turn, marker) in &self.markers {
            assert!(!self.ended.contains(turn));
            assert!(marker.attempt <= marker.attempts_max, "attempts are bounded (T10)");
            assert!(
                marker.stage != Stage::Running || gate::decide(&marker.envelope).is_ok(),
                "nothing refused runs (S1)"
            );
            assert_eq!(marker.stage == Stage::Running, marker.holder.is_some());
            if let Some((conversation, _)) = &marker.lane {
                lanes.entry((marker.org.clone(), conversation.clone())).or_default().push(marker);
            }
        }
        for (lane, markers) in lanes {
            let active: Vec<_> = markers.iter().filter(|marker| marker.stage != Stage::Waiting).collect();
            assert_eq!(active.len(), 1, "{lane:?} has exactly one turn whose turn it is");
            let first = markers.iter().map(|marker| marker.lane.as_ref().unwrap().1).min();
            assert_eq!(
                Some(active[0].lane.as_ref().unwrap().1),
                first,
                "{lane:?} goes in the order of acceptance (T9)"
            );
        }
        for org in self.orgs() {
            assert!(self.running(&org) <= self.running_max(&org));
        }
        for lane in self.lanes.values() {
            let distinct: BTreeSet<_> = lane.chain.iter().map(|run| run.0).collect();
            assert_eq!(distinct.len(), lane.chain.len(), "one chain (S3)");
        }
    }
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
