//! Everything at once, from a seed that is printed: several logical replicas in virtual time, mixed batches, stale owners that go on talking,
//! cancels, sweeps, interrupts, deletions, poison. A model follows every answer; the store's own checker reads the tables afterwards.
//!
//! `TURNHOUSE_TEST_SEED` runs one seed again, `TURNHOUSE_TEST_STEPS` sets how long.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::*;
use crate::admission::Refusal;
use crate::turn::FailureCode;

const ORG_RUNNING_MAX: usize = 3;
const REPLICA_TTL_MS: u64 = 250;
const STEPS: usize = 1_500;

/// SplitMix64: enough, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

type Lane = (OrgId, ConversationId);
type Key = (OrgId, Option<ConversationId>, String);

/// What the answers so far say must be true.
#[derive(Default)]
struct Model {
    /// Live turns and their lane and place.
    live: HashMap<(OrgId, TurnId), Option<(Lane, i64)>>,
    running: HashMap<(OrgId, TurnId), Epoch>,
    lanes: BTreeMap<Lane, BTreeMap<i64, TurnId>>,
    ended: HashSet<(OrgId, TurnId)>,
    /// What has begun an effect: it is neither given back nor taken over.
    effects: HashSet<(OrgId, TurnId)>,
    accepted: usize,
}

impl Model {
    fn accepted(&mut self, org: &OrgId, turn: TurnId, place: Option<(Lane, i64)>) {
        self.accepted += 1;
        if let Some((lane, seq)) = &place {
            let lane = self.lanes.entry(lane.clone()).or_default();
            assert!(lane.last_key_value().is_none_or(|(last, _)| last < seq), "places go up");
            lane.insert(*seq, turn);
        }
        assert!(self.live.insert((org.clone(), turn), place).is_none());
    }

    fn ended(&mut self, ended: &Ended) {
        let key = (ended.org.clone(), ended.turn);
        let place = self.live.remove(&key).expect("only a live turn ends, and once");
        assert_eq!(self.running.remove(&key).is_some(), ended.was_running);
        let mut next = None;
        if let Some((lane, seq)) = place {
            let turns = self.lanes.get_mut(&lane).unwrap();
            let was_active = turns.first_key_value().map(|(first, _)| *first) == Some(seq);
            turns.remove(&seq);
            next = turns.first_key_value().filter(|_| was_active).map(|_| ());
        }
        let deleted = matches!(ended.outcome, Outcome::Cancelled { by: CancelledBy::Deleted | CancelledBy::Interrupt });
        assert_eq!(ended.promoted, next.is_some() && !deleted, "the lane's next becomes ready, and only then");
        assert!(self.ended.insert(key), "a turn ends once");
    }

    fn claimed(&mut self, claimed: &Claimed) {
        let key = (claimed.lease.org.clone(), claimed.lease.turn);
        let place = self.live.get(&key).expect("only a live turn is claimed");
        if claimed.refused.is_some() {
            assert!(gate::decide(&claimed.envelope).is_err());
            return;
        }
        assert!(gate::decide(&claimed.envelope).is_ok());
        if let Some((lane, seq)) = place {
            assert_eq!(claimed.seq, Some(*seq));
            let (first, _) = self.lanes[lane].first_key_value().unwrap();
            assert_eq!(first, seq, "turns of {lane:?} run in order, one at a time");
        }
        if let Some(before) = self.running.insert(key, claimed.lease.epoch) {
            assert!(before < claimed.lease.epoch && claimed.restarted, "a takeover has another epoch");
        }
        let of_org = self.running.keys().filter(|(org, _)| *org == claimed.lease.org).count();
        assert!(of_org <= ORG_RUNNING_MAX, "{of_org} turns of {} run", claimed.lease.org);
    }
}

struct Replica {
    id: ReplicaId,
    renewed: Timestamp,
    held: Vec<Claimed>,
    /// What it held in an earlier life, and still believes to.
    zombies: Vec<Claimed>,
}

pub(in crate::store) async fn r1_torture_leaves_no_trace(world: &World) {
    let from_env = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let seed = from_env("TURNHOUSE_TEST_SEED").unwrap_or_else(|| uuid::Uuid::now_v7().as_u128() as u64);
    let steps = from_env("TURNHOUSE_TEST_STEPS").map_or(STEPS, |steps| usize::try_from(steps).unwrap());
    println!("TURNHOUSE_TEST_SEED={seed}");
    let mut run =
        Run { world, random: Random(seed), model: Model::default(), replicas: Vec::new(), keys: HashMap::new() };
    for _ in 0..4 {
        let id = world.another_replica(REPLICA_TTL_MS).await;
        run.replicas.push(Replica { id, renewed: world.now(), held: Vec::new(), zombies: Vec::new() });
    }
    for _ in 0..steps {
        let jump = *run.random.pick(&[0, 1, 2, 5, 10]);
        world.advance_ms(jump);
        match run.random.below(100) {
            0..25 => run.submit().await,
            25..85 => run.replica().await,
            85..90 => run.cancel().await,
            90..97 => run.sweep().await,
            97 => world.advance_ms(320),
            98 => run.delete().await,
            _ => run.look().await,
        }
    }
    run.drain().await;
    assert!(run.model.accepted > steps / 10, "{} turns were accepted", run.model.accepted);
    assert!(run.model.live.is_empty());
    assert_eq!(world.store.live_counts().await.unwrap(), LiveCounts::default());
}

struct Run<'w> {
    world: &'w World,
    random: Random,
    model: Model,
    replicas: Vec<Replica>,
    keys: HashMap<Key, ([u8; 32], TurnId)>,
}

impl Run<'_> {
    fn message(&mut self) -> Accept {
        let lane = format!("c-{}", self.random.below(6));
        let mut message =
            if self.random.chance(50) { self.world.message(&lane) } else { self.world.message_of_zeta(&lane) };
        message.attempts_max = *self.random.pick(&[1, 3, 5]);
        message.clocks = Clocks {
            admission_timeout_ms: *self.random.pick(&[300, 4_000]),
            queue_timeout_ms: *self.random.pick(&[900, 8_000]),
            turn_timeout_ms: *self.random.pick(&[150, 600]),
        };
        match self.random.below(40) {
            0 => message.envelope.org = None,
            1 => message.envelope.conversation = None,
            2 => message.envelope.run_id = None,
            3 => (message.envelope.org, message.envelope.mode) = (None, SessionMode::File),
            // Another org's: refused by a constraint, alone.
            4 => message.envelope.org = Some(org("elsewhere")),
            5 | 6 => message.on_busy = OnBusy::Interrupt,
            7 => message.on_busy = OnBusy::Reject,
            8 => message.user = user("bob"),
            9..13 => message = collecting(message, 7),
            _ => {}
        }
        if self.random.chance(20) {
            let body = u8::try_from(self.random.below(2)).unwrap();
            message.key = Some((format!("k-{}", self.random.below(50)), [body; 32]));
        }
        if self.random.chance(50) {
            let replica = self.random.below(self.replicas.len());
            message.claim_for = Some((self.replicas[replica].id, RunningBound(ORG_RUNNING_MAX)));
        }
        message
    }

    async fn submit(&mut self) {
        let count = *self.random.pick(&[1, 2, 4, 8]);
        let messages: Vec<Accept> = (0..count).map(|_| self.message()).collect();
        let batch = messages.iter().map(|message| Write::Accept(Box::new(message.clone()))).collect();
        let written = self.world.batch(batch).await;
        for (message, written) in messages.iter().zip(written) {
            self.accepted(message, written).await;
        }
        // The answer was lost and the journal says it all again.
        if self.random.chance(10) {
            for message in messages.into_iter().filter(|message| message.on_busy == OnBusy::Enqueue) {
                if self.model.live.contains_key(&(message.org.clone(), message.turn)) {
                    let again = self.world.accept(message.clone()).await;
                    assert!(matches!(again, AcceptResult::Attached(turn) if turn == message.turn), "{again:?}");
                }
            }
        }
    }

    async fn accepted(&mut self, message: &Accept, written: Written) {
        let conversation = message.envelope.conversation.clone();
        let key = message.key.clone().map(|(key, hash)| ((message.org.clone(), conversation, key), hash));
        match written {
            Written::Failed(_) => assert_eq!(message.envelope.org, Some(org("elsewhere"))),
            Written::Accept(AcceptResult::Attached(turn)) => {
                let (key, hash) = key.expect("only a key attaches here");
                assert_eq!(self.keys[&key], (hash, turn));
            }
            Written::Accept(AcceptResult::Joined(turn)) => {
                assert_eq!(message.on_busy, OnBusy::Collect);
                assert!(self.model.live.contains_key(&(message.org.clone(), turn)), "only what waits is joined");
                if let Some((key, hash)) = key {
                    self.keys.insert(key, (hash, turn));
                }
            }
            Written::Accept(AcceptResult::Refused(refusal)) => match refusal {
                Refusal::IdempotencyMismatch => assert_ne!(self.keys[&key.as_ref().unwrap().0].0, key.unwrap().1),
                Refusal::ConversationBusy { .. } => assert_eq!(message.on_busy, OnBusy::Reject),
                Refusal::NotFound => {}
                other => panic!("{other:?}"),
            },
            Written::Accept(AcceptResult::Accepted { interrupted, claimed }) => {
                interrupted.iter().for_each(|ended| self.model.ended(ended));
                if let Some((key, hash)) = key {
                    self.keys.insert(key, (hash, message.turn));
                }
                let laned = message.envelope.conversation.clone().filter(|_| message.envelope.org.is_some());
                // The conversation may be deleted by nobody meanwhile: one task drives everything.
                let record = self.world.store.turn(&message.org, message.turn).await.unwrap().unwrap().for_host();
                let place =
                    laned.map(|lane| ((message.org.clone(), lane), record.seq.expect("a laned turn has a place")));
                self.model.accepted(&message.org, message.turn, place);
                if let Some(claimed) = claimed {
                    self.model.claimed(&claimed);
                    let holder = message.claim_for.unwrap().0;
                    let replica = self.replicas.iter_mut().find(|replica| replica.id == holder).unwrap();
                    replica.held.push(*claimed);
                }
            }
            other => panic!("{other:?}"),
        }
    }

    fn end_of(&mut self, claimed: &Claimed, outcome: Outcome) -> Write {
        let mut commit = self.world.commit(claimed, outcome);
        let completes = matches!(commit.outcome, Outcome::Completed { .. });
        if completes && claimed.head.is_some() && self.random.chance(70) {
            commit.snapshot = Some(self.world.stage(claimed, b"state"));
            if self.random.chance(5) {
                commit.snapshot.as_mut().unwrap().parent = uuid::Uuid::now_v7();
            }
        }
        if self.random.chance(30) {
            commit.tail = deltas(100, &["tail"]);
        }
        Write::Commit(Box::new(commit))
    }

    async fn replica(&mut self) {
        let index = self.random.below(self.replicas.len());
        let now = self.world.now();
        let (id, renewed) = (self.replicas[index].id, self.replicas[index].renewed);
        let mut alive = true;
        if now.since_ms(renewed) > 60 {
            self.replicas[index].renewed = now;
            alive = self.world.store.renew_replica(id, now, REPLICA_TTL_MS).await.unwrap();
            assert!(alive || now.since_ms(renewed) >= REPLICA_TTL_MS);
        }
        if !alive || self.random.chance(3) {
            // Dead, or stopped and continued: a new incarnation, and the old one goes on talking.
            let fresh = self.world.another_replica(REPLICA_TTL_MS).await;
            let replica = &mut self.replicas[index];
            replica.zombies.append(&mut replica.held);
            (replica.id, replica.renewed) = (fresh, now);
        }
        let request = ClaimRequest {
            holder: self.replicas[index].id,
            org_running_max: RunningBound(ORG_RUNNING_MAX),
            ..self.world.claim_request(*self.random.pick(&[1, 4, 8]))
        };
        let claimed = self.world.claim_with(request).await;
        claimed.iter().for_each(|claimed| self.model.claimed(claimed));
        let mut held = std::mem::take(&mut self.replicas[index].held);
        held.extend(claimed);
        let zombies = std::mem::take(&mut self.replicas[index].zombies);
        let (mut batch, mut kept) = (Vec::new(), Vec::new());
        for claimed in held {
            let lease = claimed.lease.clone();
            if claimed.refused.is_some_and(|(_, refusals)| refusals >= 3) {
                batch.push(self.end_of(&claimed, failed(FailureCode::GateRefused)));
                continue;
            }
            if claimed.refused.is_some() {
                continue;
            }
            let seq = u32::try_from(self.random.below(50)).unwrap() + 1;
            batch.push(Write::Append(Append { lease: lease.clone(), batch: deltas(seq, &["a"]) }));
            match self.random.below(100) {
                0..55 => batch.push(self.end_of(&claimed, replied("done"))),
                55..60 => batch.push(self.end_of(&claimed, failed(FailureCode::WorkerTrapped))),
                // Supervisor and runner in one batch.
                60..64 => {
                    batch.push(self.end_of(&claimed, failed(FailureCode::TurnTimeout)));
                    batch.push(self.end_of(&claimed, replied("late")));
                }
                64..72 => batch.push(Write::Requeue(Requeue { lease, delay_ms: *self.random.pick(&[0, 15]) })),
                72..75 => {
                    batch.push(Write::BeginEffect(Append { lease, batch: deltas(60, &["effect"]) }));
                    kept.push(claimed);
                }
                75..78 => {}
                _ => kept.push(claimed),
            }
        }
        let mut still = Vec::new();
        for zombie in zombies {
            if zombie.refused.is_none() && self.random.chance(30) {
                let late = deltas(70, &["late"]);
                batch.push(Write::Append(Append { lease: zombie.lease.clone(), batch: late }));
                batch.push(self.end_of(&zombie, replied("zombie")));
            } else {
                still.push(zombie);
            }
        }
        self.replicas[index].held = kept;
        self.replicas[index].zombies = still;
        self.write(batch).await;
    }

    /// Writes, and holds every answer against the model, in order.
    async fn write(&mut self, mut batch: Vec<Write>) {
        // Poison at the end takes everything before it back once, and must leave no other trace.
        let poison = self.random.chance(10).then(|| {
            let mut message = self.world.message("c-0");
            message.envelope.org = Some(org("elsewhere"));
            message
        });
        batch.extend(poison.clone().map(|message| Write::Accept(Box::new(message))));
        let mut written = self.world.batch(batch.clone()).await;
        if poison.is_some() {
            batch.pop();
            assert!(matches!(written.pop(), Some(Written::Failed(_) | Written::Accept(AcceptResult::Refused(_)))));
        }
        for (item, written) in batch.iter().zip(written) {
            let holds = |lease: &Lease| {
                self.model.running.get(&(lease.org.clone(), lease.turn)).is_some_and(|epoch| *epoch == lease.epoch)
            };
            match (item, written) {
                (Write::Append(append) | Write::BeginEffect(append), Written::Append(fenced)) => {
                    assert_eq!(fenced == Fenced::Done, holds(&append.lease), "only the owner says anything");
                    if let (Write::BeginEffect(_), Fenced::Done) = (item, fenced) {
                        self.model.effects.insert((append.lease.org.clone(), append.lease.turn));
                    }
                }
                (Write::Requeue(requeue), Written::Requeue(fenced)) => {
                    let lease = &requeue.lease;
                    let effect = self.model.effects.contains(&(lease.org.clone(), lease.turn));
                    assert_eq!(fenced == Fenced::Done, holds(lease) && !effect);
                    if fenced == Fenced::Done {
                        self.model.running.remove(&(lease.org.clone(), lease.turn));
                    }
                }
                (Write::Commit(commit), Written::Commit(result)) => match result {
                    CommitResult::Won(ended) => self.model.ended(&ended),
                    CommitResult::SnapshotConflict => {
                        assert!(commit.snapshot.is_some());
                        assert!(self.model.live.contains_key(&(commit.org.clone(), commit.turn)));
                    }
                    CommitResult::Lost => {
                        let key = (commit.org.clone(), commit.turn);
                        let epoch = self.model.running.get(&key).copied();
                        assert!(epoch.is_none() || epoch != commit.epoch, "nobody else has ended it");
                    }
                },
                other => panic!("{other:?}"),
            }
        }
    }

    async fn cancel(&mut self) {
        let mut live: Vec<(OrgId, TurnId)> = self.model.live.keys().cloned().collect();
        live.sort();
        if live.is_empty() {
            return;
        }
        let mut batch = Vec::new();
        for _ in 0..3 {
            let (org, turn) = self.random.pick(&live).clone();
            let tail = EventBatch::default();
            let commit = Commit { org, turn, epoch: None, outcome: cancelled(), snapshot: None, tail, usage: None };
            batch.push(Write::Commit(Box::new(commit)));
        }
        self.write(batch).await;
    }

    async fn sweep(&mut self) {
        let now = self.world.now();
        self.world.store.repair_lanes(now, 20).await.unwrap();
        let found = self.world.store.sweep(now, 3, 20).await.unwrap();
        // Somebody acts between finding and ending: the epoch decides.
        if self.random.chance(50) {
            self.replica().await;
        }
        let batch = found
            .overdue
            .into_iter()
            .map(|overdue| {
                Write::Commit(Box::new(Commit {
                    org: overdue.org,
                    turn: overdue.turn,
                    epoch: Some(overdue.epoch),
                    outcome: failed(FailureCode::Internal),
                    snapshot: None,
                    tail: EventBatch::default(),
                    usage: None,
                }))
            })
            .collect();
        self.write(batch).await;
    }

    async fn delete(&mut self) {
        let org = org(if self.random.chance(50) { "acme" } else { "zeta" });
        let lane = conversation(&format!("c-{}", self.random.below(6)));
        if self.random.chance(30) {
            self.world.store.reset_snapshot(&org, &agent(), &lane, None, self.world.now(), &by()).await.unwrap();
            return;
        }
        let ended =
            self.world.store.delete_conversation(&org, &agent(), &lane, None, self.world.now(), &by()).await.unwrap();
        ended.iter().flatten().for_each(|ended| self.model.ended(ended));
        self.keys.retain(|(of, conversation, _), _| (of, conversation.as_ref()) != (&org, Some(&lane)));
        if let Some(turns) = self.model.lanes.get(&(org, lane)) {
            assert!(turns.is_empty(), "deletion ends what is live");
        }
    }

    /// What is read agrees with what was answered.
    async fn look(&mut self) {
        let live = self.world.store.live_counts().await.unwrap();
        assert_eq!((live.waiting + live.ready + live.running) as usize, self.model.live.len());
        assert_eq!(live.running as usize, self.model.running.len());
        for (org, turn) in self.model.live.keys() {
            let record = self.world.store.turn(org, *turn).await.unwrap().unwrap().for_host();
            let running = self.model.running.get(&(org.clone(), *turn));
            assert_eq!(record.state == TurnState::Running, running.is_some());
            assert!(running.is_none_or(|epoch| *epoch == record.epoch));
        }
    }

    /// No more submissions: everything that is live ends, by itself or by its clock.
    async fn drain(&mut self) {
        for _ in 0..2_000 {
            if self.model.live.is_empty() {
                return;
            }
            self.world.advance_ms(20);
            self.replica().await;
            self.sweep().await;
        }
        panic!("{} turns never end", self.model.live.len());
    }
}
