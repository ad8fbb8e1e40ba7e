//! The machine: what every step of the protocol must answer, and what always holds of its state. It knows nothing of stores; the histories over it are in
//! the module above.

use super::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    Ready,
    Running,
}

#[derive(Debug, Clone)]
pub(super) struct Marker {
    pub(super) org: OrgId,
    pub(super) envelope: Envelope,
    /// Its conversation and place, where it has one.
    pub(super) lane: Option<(ConversationId, i64)>,
    pub(super) stage: Stage,
    pub(super) epoch: Epoch,
    pub(super) attempt: u32,
    pub(super) attempts_max: u32,
    pub(super) refusals: u32,
    pub(super) effects: bool,
    pub(super) holder: Option<ReplicaId>,
    pub(super) not_before: i64,
    pub(super) deadline: i64,
    pub(super) started: bool,
    /// Parts of its message, while others may join it.
    pub(super) collected: u32,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Lane {
    pub(super) last_seq: i64,
    /// Runs whose snapshots form the chain, oldest first.
    pub(super) chain: Vec<RunId>,
}

/// The protocol.
#[derive(Debug, Default)]
pub(super) struct Protocol {
    pub(super) now: i64,
    pub(super) replicas: HashMap<ReplicaId, i64>,
    pub(super) markers: BTreeMap<TurnId, Marker>,
    pub(super) ended: BTreeSet<TurnId>,
    pub(super) accepted: BTreeSet<TurnId>,
    pub(super) lanes: HashMap<(OrgId, ConversationId), Lane>,
    pub(super) keys: HashMap<(OrgId, String, String), ([u8; 32], TurnId)>,
    /// Of orgs that are limited.
    pub(super) meters: HashMap<OrgId, Meters>,
}

/// What an accept must answer.
#[derive(Debug, PartialEq)]
pub(super) enum Verdict {
    Refused(Refusal),
    Attached(TurnId),
    Joined(TurnId),
    Accepted { interrupted: BTreeSet<TurnId>, started: bool },
}

/// What a commit must answer.
#[derive(Debug, PartialEq)]
pub(super) enum End {
    Won { was_running: bool, promoted: bool },
    Lost,
    Conflict,
}

impl Protocol {
    pub(super) fn alive(&self, replica: ReplicaId) -> bool {
        self.replicas.get(&replica).is_some_and(|expires| *expires > self.now)
    }

    pub(super) fn running(&self, org: &OrgId) -> usize {
        self.markers.values().filter(|marker| marker.org == *org && marker.stage == Stage::Running).count()
    }

    pub(super) fn running_max(&self, org: &OrgId) -> usize {
        if self.meters.contains_key(org) { OWN_RUNNING_MAX as usize } else { ORG_RUNNING_MAX }
    }

    pub(super) fn in_lane<'a>(
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
    pub(super) fn is_orphan(&self, marker: &Marker) -> bool {
        marker.stage == Stage::Running
            && marker.holder.is_some_and(|holder| !self.alive(holder))
            && marker.attempt < marker.attempts_max
            && !marker.effects
            && marker.deadline > self.now
    }

    /// Ready, and may be claimed now, the org's bound aside.
    pub(super) fn is_due(&self, marker: &Marker) -> bool {
        marker.stage == Stage::Ready && marker.not_before <= self.now && marker.deadline > self.now
    }

    /// An org's next.
    pub(super) fn next_of(&self, org: &OrgId) -> Option<TurnId> {
        let due = self.markers.iter().filter(|(_, marker)| marker.org == *org && self.is_due(marker));
        due.min_by_key(|(turn, marker)| (marker.not_before, **turn)).map(|(turn, _)| *turn)
    }

    pub(super) fn orgs(&self) -> BTreeSet<OrgId> {
        self.markers.values().map(|marker| marker.org.clone()).collect()
    }

    /// Orgs that could start a turn now.
    pub(super) fn eligible(&self) -> Vec<OrgId> {
        let could = |org: &OrgId| self.running(org) < self.running_max(org) && self.next_of(org).is_some();
        self.orgs().into_iter().filter(could).collect()
    }

    pub(super) fn accept(&mut self, accept: &Accept) -> Verdict {
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
        let open = last
            .filter(|(_, marker)| accept.collect.as_ref().is_some_and(|collect| collect.fits(marker.collected, 0, 0)));
        let facts = Facts {
            joins: open.map(|(turn, _)| *turn),
            foreign: false,
            attachment_missing: false,
            keyed: key.as_ref().and_then(|(key, hash)| self.keys.get(key).map(|(known, turn)| (*turn, known == hash))),
            lane_live: live.len(),
            lane_active: active.map(|(turn, _)| *turn),
            exceeded: self.meters.get(&accept.org).and_then(|meters| meters.exceeded(&QUOTA, Timestamp(self.now))),
            agent_queue: None,
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

    pub(super) fn take_token(&mut self, org: &OrgId) {
        if let Some(meters) = self.meters.get_mut(org) {
            meters.take_token(&QUOTA, Timestamp(self.now));
        }
    }

    /// Judges what a claim took, in order, and follows it.
    pub(super) fn claimed(&mut self, holder: ReplicaId, slots: usize, taken: &[(TurnId, Epoch)]) {
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

    pub(super) fn holds(&self, lease: &Lease) -> bool {
        self.markers
            .get(&lease.turn)
            .is_some_and(|marker| marker.stage == Stage::Running && marker.epoch == lease.epoch)
    }

    pub(super) fn append(&mut self, lease: &Lease, effect: bool) -> Fenced {
        if !self.holds(lease) {
            return Fenced::Stale;
        }
        self.markers.get_mut(&lease.turn).unwrap().effects |= effect;
        Fenced::Done
    }

    pub(super) fn requeue(&mut self, requeue: &Requeue) -> Fenced {
        if !self.holds(&requeue.lease) || self.markers[&requeue.lease.turn].effects {
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

    pub(super) fn end(
        &mut self,
        turn: TurnId,
        epoch: Option<Epoch>,
        completes: bool,
        snapshot_on: Option<Uuid>,
    ) -> End {
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
    pub(super) fn overdue(&self) -> BTreeSet<(TurnId, Epoch)> {
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
    pub(super) fn check(&self) {
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
