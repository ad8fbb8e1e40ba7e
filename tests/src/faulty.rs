//! A store as one replica meets it: behind a network that can be cut, hang, or lose answers, and with a clock of its own.
//!
//! Every replica of a [`crate::Cluster`] has one of these. Over PostgreSQL it adds the network and nothing else. Over the embedded store, which all
//! replicas of the cluster then have as one, it also stands in for what only a shared store has: it says that it is shared, tells hints, and has a time
//! of its own, whatever the host's clock says.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{broadcast, watch};
use turnhouse::agent::{Agent, AgentSettings};
use turnhouse::attachment::{Attachment, AttachmentId};
use turnhouse::audit::{Act, Actor, AuditEntry, AuditFilter, AuditPlace};
use turnhouse::caller::{Owned, Role};
use turnhouse::clock::{Clock, Timestamp};
use turnhouse::event::EventId;
use turnhouse::ids::{AgentId, ConversationId, OrgId, ReplicaId, TurnId, UserId, WorkerName};
use turnhouse::lease::Lease;
use turnhouse::notes::NotesChange;
use turnhouse::quota::{LimitsChange, OwnLimits};
use turnhouse::store::{
    AgentUse, Among, ConversationRecord, Deleted, Direction, Ended, Erased, EventPage, Finding, Hint, KeyRecord,
    LiveCounts, Member, Membership, Opening, OrgRecord, OrgUse, Page, Progress, Provisioned, PutAgent, PutAttachment,
    PutMember, PutWorker, RemoveMember, Result, Retained, Retention, SnapshotPlace, SnapshotRecord, Starter, Store,
    StoreError, StoreStatus, SweepFindings, TicketKey, TurnRecord, WorkerVersion, Write, Written,
};
use turnhouse::turn::Usage;
use uuid::Uuid;

/// What becomes of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// They go through.
    Fine,
    /// They fail at once.
    Cut,
    /// They have no answer until this changes, and nothing reaches the store: then they fail.
    Hung,
    /// Writes are done, and their answers never come: they fail.
    AnswersLost,
    /// They are done, and answered so much later.
    Late(Duration),
    /// It is somebody else's machine by now: they fail for ever.
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Read,
    Lease,
    Write,
}

/// The store behind a network.
pub struct Faulty {
    store: Arc<dyn Store>,
    network: watch::Sender<Network>,
    stands_in: Option<StandIn>,
    tells_time: bool,
    reads: AtomicU64,
    blind: AtomicBool,
}

/// What the embedded store lacks.
struct StandIn {
    hints: Option<broadcast::Sender<Hint>>,
    clock: Clock,
}

impl Faulty {
    /// Over the embedded store, which others have, too. With `hints`, what this replica writes is told there to all.
    pub fn embedded(store: Arc<dyn Store>, hints: Option<broadcast::Sender<Hint>>, tells_time: bool) -> Faulty {
        Faulty::new(store, Some(StandIn { hints, clock: Clock::system() }), tells_time)
    }

    /// Over a shared store that was opened for this replica alone. Not to tell its time is all that can be changed of it.
    pub fn shared(store: Arc<dyn Store>, tells_time: bool) -> Faulty {
        Faulty::new(store, None, tells_time)
    }

    fn new(store: Arc<dyn Store>, stands_in: Option<StandIn>, tells_time: bool) -> Faulty {
        let (network, reads, blind) = (watch::Sender::new(Network::Fine), AtomicU64::new(0), AtomicBool::new(false));
        Faulty { store, network, stands_in, tells_time, reads, blind }
    }

    /// From now on polls have no answer: whoever waits for a turn hears of it by a hint, or not at all.
    pub fn blind(&self) {
        self.blind.store(true, Ordering::Relaxed);
    }

    /// Changes what becomes of calls, also of those that wait.
    pub fn set(&self, network: Network) {
        self.network.send_if_modified(|now| *now != Network::Gone && std::mem::replace(now, network) != network);
    }

    /// Calls that only read, until now.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    fn now(&self, of_the_host: Timestamp) -> Timestamp {
        self.stands_in.as_ref().map_or(of_the_host, |stands_in| stands_in.clock.now())
    }

    async fn through<T>(&self, call: Call, answer: impl Future<Output = Result<T>> + Send) -> Result<T> {
        if call == Call::Read {
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
        let failed = || Err(StoreError::Unavailable("the network failed".to_owned()));
        let mut network = self.network.subscribe();
        let now = *network.borrow_and_update();
        match now {
            Network::Fine => {
                let answer = answer.await;
                if *network.borrow() == Network::Gone { failed() } else { answer }
            }
            Network::Cut | Network::Gone => failed(),
            Network::Hung => {
                let _ = network.changed().await;
                failed()
            }
            Network::AnswersLost => {
                let answer = answer.await;
                if call == Call::Write { failed() } else { answer }
            }
            Network::Late(time) => {
                let answer = answer.await;
                tokio::time::sleep(time).await;
                answer
            }
        }
    }

    /// What a batch may have changed for others. It comes back to this replica, too, as from any database.
    fn tell(&self, turns: Vec<TurnId>, ready: bool) {
        let Some(StandIn { hints: Some(hints), .. }) = &self.stands_in else { return };
        let ready = ready.then_some(Hint::Ready);
        for hint in ready.into_iter().chain(turns.into_iter().map(Hint::Turn)) {
            let _ = hints.send(hint);
        }
    }
}

#[async_trait]
impl Store for Faulty {
    async fn write(&self, batch: Vec<Write>, now: Timestamp) -> Result<Vec<Written>> {
        let turns = batch.iter().filter_map(turn_of).collect();
        let ready = batch.iter().any(|write| matches!(write, Write::Accept(_) | Write::Commit(_) | Write::Requeue(_)));
        let written = self.through(Call::Write, self.store.write(batch, self.now(now))).await;
        self.tell(turns, ready);
        written
    }

    fn gather(&self) -> Duration {
        self.store.gather()
    }

    async fn register_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<()> {
        self.through(Call::Lease, self.store.register_replica(replica, self.now(now), ttl_ms)).await
    }

    async fn renew_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<bool> {
        self.through(Call::Lease, self.store.renew_replica(replica, self.now(now), ttl_ms)).await
    }

    async fn drain_replica(&self, replica: ReplicaId) -> Result<()> {
        self.through(Call::Lease, self.store.drain_replica(replica)).await
    }

    async fn retire_replica(&self, replica: ReplicaId) -> Result<()> {
        self.through(Call::Lease, self.store.retire_replica(replica)).await
    }

    async fn expire_other_replicas(&self, except: ReplicaId, now: Timestamp) -> Result<u64> {
        self.through(Call::Read, self.store.expire_other_replicas(except, self.now(now))).await
    }

    async fn sweep(&self, now: Timestamp, gate_refusals_max: u32, limit: usize) -> Result<SweepFindings> {
        self.through(Call::Read, self.store.sweep(self.now(now), gate_refusals_max, limit)).await
    }

    async fn repair_lanes(&self, now: Timestamp, limit: usize) -> Result<()> {
        self.through(Call::Read, self.store.repair_lanes(self.now(now), limit)).await
    }

    async fn forget_keys(&self, before: Timestamp, limit: usize) -> Result<usize> {
        self.through(Call::Read, self.store.forget_keys(before, limit)).await
    }

    async fn retain(&self, after: Option<&OrgId>, keep: Retention, limit: usize) -> Result<Retained> {
        self.through(Call::Read, self.store.retain(after, keep, limit)).await
    }

    async fn live_counts(&self) -> Result<LiveCounts> {
        self.through(Call::Read, self.store.live_counts()).await
    }

    async fn turn(&self, org: &OrgId, turn: TurnId) -> Result<Option<Owned<TurnRecord>>> {
        self.through(Call::Read, self.store.turn(org, turn)).await
    }

    async fn events(
        &self,
        org: &OrgId,
        turn: TurnId,
        after: Option<EventId>,
        bytes_max: usize,
    ) -> Result<Option<EventPage>> {
        self.through(Call::Read, self.store.events(org, turn, after, bytes_max)).await
    }

    async fn turns(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        after: Option<i64>,
        direction: Direction,
        with_private: bool,
        limit: usize,
    ) -> Result<Page<TurnRecord>> {
        self.through(Call::Read, self.store.turns(org, agent, conversation, after, direction, with_private, limit))
            .await
    }

    async fn running_turns(&self, replica: ReplicaId) -> Result<Vec<Lease>> {
        self.through(Call::Read, self.store.running_turns(replica)).await
    }

    async fn stale(&self, leases: &[Lease]) -> Result<Vec<TurnId>> {
        self.through(Call::Read, self.store.stale(leases)).await
    }

    async fn progress(&self, turns: &[(OrgId, TurnId)]) -> Result<Vec<Option<Progress>>> {
        if self.blind.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        self.through(Call::Read, self.store.progress(turns)).await
    }

    async fn open_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        user: &UserId,
        now: Timestamp,
    ) -> Result<Opening> {
        self.through(Call::Read, self.store.open_conversation(org, agent, conversation, user, self.now(now))).await
    }

    async fn conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Result<Option<Owned<ConversationRecord>>> {
        self.through(Call::Read, self.store.conversation(org, agent, conversation)).await
    }

    async fn generation(&self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Result<Option<Uuid>> {
        self.through(Call::Read, self.store.generation(org, agent, conversation)).await
    }

    async fn note_files(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        generation: Uuid,
        bytes: u64,
    ) -> Result<()> {
        self.through(Call::Read, self.store.note_files(org, agent, conversation, generation, bytes)).await
    }

    async fn conversations(
        &self,
        org: &OrgId,
        agent: &AgentId,
        user: Option<&UserId>,
        after: Option<&ConversationId>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>> {
        self.through(Call::Read, self.store.conversations(org, agent, user, after, limit)).await
    }

    async fn write_notes(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        change: &NotesChange,
    ) -> Result<bool> {
        self.through(Call::Read, self.store.write_notes(org, agent, conversation, whose, change)).await
    }

    async fn delete_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<Vec<Ended>>> {
        self.through(Call::Read, self.store.delete_conversation(org, agent, conversation, whose, self.now(now), by))
            .await
    }

    async fn reset_snapshot(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<bool> {
        self.through(Call::Read, self.store.reset_snapshot(org, agent, conversation, whose, self.now(now), by)).await
    }

    async fn org_conversations(
        &self,
        org: &OrgId,
        after: Option<&(AgentId, ConversationId)>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>> {
        self.through(Call::Read, self.store.org_conversations(org, after, limit)).await
    }

    async fn org_turns(&self, org: &OrgId, after: Option<TurnId>, limit: usize) -> Result<Page<TurnRecord>> {
        self.through(Call::Read, self.store.org_turns(org, after, limit)).await
    }

    async fn snapshots(
        &self,
        org: &OrgId,
        among: &Among,
        after: Option<&SnapshotPlace>,
        limit: usize,
    ) -> Result<Page<SnapshotRecord>> {
        self.through(Call::Read, self.store.snapshots(org, among, after, limit)).await
    }

    async fn put_attachment(
        &self,
        org: &OrgId,
        user: &UserId,
        attachment: &Attachment,
        pieces: Vec<Bytes>,
        org_bytes_max: u64,
        now: Timestamp,
    ) -> Result<PutAttachment> {
        let put = self.store.put_attachment(org, user, attachment, pieces, org_bytes_max, self.now(now));
        self.through(Call::Read, put).await
    }

    async fn attachments(&self, org: &OrgId, user: Option<&UserId>, ids: &[AttachmentId]) -> Result<Vec<Attachment>> {
        self.through(Call::Read, self.store.attachments(org, user, ids)).await
    }

    async fn attachments_of(&self, org: &OrgId, turns: &[TurnId]) -> Result<Vec<Attachment>> {
        self.through(Call::Read, self.store.attachments_of(org, turns)).await
    }

    async fn org_attachments(
        &self,
        org: &OrgId,
        after: Option<AttachmentId>,
        limit: usize,
    ) -> Result<Page<Attachment>> {
        self.through(Call::Read, self.store.org_attachments(org, after, limit)).await
    }

    async fn attachment_piece(&self, org: &OrgId, id: AttachmentId, piece: u32) -> Result<Option<Bytes>> {
        self.through(Call::Read, self.store.attachment_piece(org, id, piece)).await
    }

    async fn sweep_attachments(&self, before: Timestamp, limit: usize) -> Result<usize> {
        self.through(Call::Read, self.store.sweep_attachments(before, limit)).await
    }

    async fn put_worker(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        digest: [u8; 32],
        wasm: Bytes,
        imports: Vec<String>,
        compile_ms: f64,
        workers_max: usize,
        versions_kept: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutWorker> {
        self.through(
            Call::Read,
            self.store.put_worker(
                org,
                worker,
                digest,
                wasm,
                imports,
                compile_ms,
                workers_max,
                versions_kept,
                self.now(now),
                by,
            ),
        )
        .await
    }

    async fn workers(&self, org: &OrgId, after: Option<&WorkerName>, limit: usize) -> Result<Page<WorkerVersion>> {
        self.through(Call::Read, self.store.workers(org, after, limit)).await
    }

    async fn worker_versions(&self, org: &OrgId, worker: &WorkerName) -> Result<Vec<WorkerVersion>> {
        self.through(Call::Read, self.store.worker_versions(org, worker)).await
    }

    async fn worker_version(&self, org: &OrgId, worker: &WorkerName, version: u32) -> Result<Option<WorkerVersion>> {
        self.through(Call::Read, self.store.worker_version(org, worker, version)).await
    }

    async fn module(&self, org: &OrgId, digest: [u8; 32]) -> Result<Option<Bytes>> {
        self.through(Call::Read, self.store.module(org, digest)).await
    }

    async fn delete_worker(&self, org: &OrgId, worker: &WorkerName, now: Timestamp, by: &Actor) -> Result<Deleted> {
        self.through(Call::Read, self.store.delete_worker(org, worker, self.now(now), by)).await
    }

    async fn put_agent(
        &self,
        org: &OrgId,
        agent: &AgentId,
        settings: AgentSettings,
        agents_max: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutAgent> {
        self.through(Call::Read, self.store.put_agent(org, agent, settings, agents_max, self.now(now), by)).await
    }

    async fn agent(&self, org: &OrgId, agent: &AgentId) -> Result<Option<Agent>> {
        self.through(Call::Read, self.store.agent(org, agent)).await
    }

    async fn default_agent(&self, org: &OrgId) -> Result<Option<Agent>> {
        self.through(Call::Read, self.store.default_agent(org)).await
    }

    async fn agents(&self, org: &OrgId, after: Option<&AgentId>, limit: usize) -> Result<Page<Agent>> {
        self.through(Call::Read, self.store.agents(org, after, limit)).await
    }

    async fn delete_agent(&self, org: &OrgId, agent: &AgentId, now: Timestamp, by: &Actor) -> Result<Deleted> {
        self.through(Call::Read, self.store.delete_agent(org, agent, self.now(now), by)).await
    }

    async fn create_org(&self, org: &OrgId, owner: &UserId, now: Timestamp, by: &Actor) -> Result<bool> {
        self.through(Call::Read, self.store.create_org(org, owner, self.now(now), by)).await
    }

    async fn provision_org(
        &self,
        org: &OrgId,
        owner: &UserId,
        starter: &Starter,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Provisioned> {
        self.through(Call::Read, self.store.provision_org(org, owner, starter, self.now(now), by)).await
    }

    async fn org(&self, org: &OrgId) -> Result<Option<OrgRecord>> {
        self.through(Call::Read, self.store.org(org)).await
    }

    async fn orgs(&self) -> Result<Vec<OrgRecord>> {
        self.through(Call::Read, self.store.orgs()).await
    }

    async fn set_org_limits(
        &self,
        org: &OrgId,
        change: &LimitsChange,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<OwnLimits>> {
        self.through(Call::Read, self.store.set_org_limits(org, change, self.now(now), by)).await
    }

    async fn measure_storage(&self, now: Timestamp) -> Result<Option<OrgId>> {
        self.through(Call::Read, self.store.measure_storage(self.now(now))).await
    }

    async fn agent_use(&self, org: &OrgId, agent: &AgentId, now: Timestamp) -> Result<Option<AgentUse>> {
        self.through(Call::Read, self.store.agent_use(org, agent, self.now(now))).await
    }

    async fn add_usage(
        &self,
        org: &OrgId,
        agent: &AgentId,
        turn: TurnId,
        usage: &Usage,
        now: Timestamp,
    ) -> Result<bool> {
        self.through(Call::Read, self.store.add_usage(org, agent, turn, usage, self.now(now))).await
    }

    async fn org_use(&self, org: &OrgId, now: Timestamp) -> Result<Option<OrgUse>> {
        self.through(Call::Read, self.store.org_use(org, self.now(now))).await
    }

    async fn mark_org(&self, org: &OrgId, now: Timestamp, by: &Actor) -> Result<bool> {
        self.through(Call::Read, self.store.mark_org(org, self.now(now), by)).await
    }

    async fn deleting_orgs(&self) -> Result<Vec<OrgRecord>> {
        self.through(Call::Read, self.store.deleting_orgs()).await
    }

    async fn live_turns(&self, org: &OrgId, limit: usize) -> Result<Vec<TurnId>> {
        self.through(Call::Read, self.store.live_turns(org, limit)).await
    }

    async fn module_digests(&self, org: &OrgId) -> Result<Vec<[u8; 32]>> {
        self.through(Call::Read, self.store.module_digests(org)).await
    }

    async fn erase_org(&self, org: &OrgId, limit: usize) -> Result<Erased> {
        self.through(Call::Read, self.store.erase_org(org, limit)).await
    }

    async fn create_key(&self, hash: [u8; 32], key: &KeyRecord, by: &Actor) -> Result<bool> {
        self.through(Call::Read, self.store.create_key(hash, key, by)).await
    }

    async fn key(&self, hash: [u8; 32]) -> Result<Option<KeyRecord>> {
        self.through(Call::Read, self.store.key(hash)).await
    }

    async fn keys(&self, org: &OrgId) -> Result<Vec<KeyRecord>> {
        self.through(Call::Read, self.store.keys(org)).await
    }

    async fn key_by_id(&self, org: &OrgId, id: &str) -> Result<Option<KeyRecord>> {
        self.through(Call::Read, self.store.key_by_id(org, id)).await
    }

    async fn rotate_key(&self, id: &str, hash: [u8; 32], key: &KeyRecord, overlap_ms: u64, by: &Actor) -> Result<bool> {
        self.through(Call::Read, self.store.rotate_key(id, hash, key, overlap_ms, by)).await
    }

    async fn revoke_key(&self, org: &OrgId, id: &str, now: Timestamp, by: &Actor) -> Result<bool> {
        self.through(Call::Read, self.store.revoke_key(org, id, self.now(now), by)).await
    }

    async fn touch_keys(&self, used: &[(OrgId, String)], now: Timestamp) -> Result<()> {
        self.through(Call::Read, self.store.touch_keys(used, self.now(now))).await
    }

    async fn members(&self, org: &OrgId, after: Option<&UserId>, limit: usize) -> Result<Page<Member>> {
        self.through(Call::Read, self.store.members(org, after, limit)).await
    }

    async fn role(&self, org: &OrgId, user: &UserId) -> Result<Option<Role>> {
        self.through(Call::Read, self.store.role(org, user)).await
    }

    async fn memberships(&self, user: &UserId, limit: usize) -> Result<Vec<Membership>> {
        self.through(Call::Read, self.store.memberships(user, limit)).await
    }

    async fn membership_of_turn(&self, user: &UserId, turn: TurnId) -> Result<Option<Membership>> {
        self.through(Call::Read, self.store.membership_of_turn(user, turn)).await
    }

    async fn put_member(
        &self,
        org: &OrgId,
        user: &UserId,
        role: Role,
        changer: Option<&UserId>,
        members_max: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutMember> {
        let put = self.store.put_member(org, user, role, changer, members_max, self.now(now), by);
        self.through(Call::Read, put).await
    }

    async fn remove_member(
        &self,
        org: &OrgId,
        user: &UserId,
        changer: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<RemoveMember> {
        self.through(Call::Read, self.store.remove_member(org, user, changer, self.now(now), by)).await
    }

    async fn record_act(&self, org: Option<&OrgId>, act: &Act, now: Timestamp, by: &Actor) -> Result<()> {
        self.through(Call::Read, self.store.record_act(org, act, self.now(now), by)).await
    }

    async fn audit(
        &self,
        org: Option<&OrgId>,
        filter: &AuditFilter,
        since: Timestamp,
        before: Option<AuditPlace>,
        limit: usize,
    ) -> Result<Page<AuditEntry>> {
        self.through(Call::Read, self.store.audit(org, filter, since, before, limit)).await
    }

    async fn ticket_keys(&self) -> Result<Vec<TicketKey>> {
        self.through(Call::Read, self.store.ticket_keys()).await
    }

    async fn add_ticket_key(&self, number: i64, secret: [u8; 32], now: Timestamp) -> Result<bool> {
        self.through(Call::Read, self.store.add_ticket_key(number, secret, self.now(now))).await
    }

    async fn status(&self, now: Timestamp) -> Result<StoreStatus> {
        self.through(Call::Read, self.store.status(self.now(now))).await
    }

    async fn examine(&self) -> Result<Vec<Finding>> {
        self.through(Call::Read, self.store.examine()).await
    }

    async fn ping(&self) -> Result<()> {
        self.through(Call::Read, self.store.ping()).await
    }

    fn hints(&self) -> Option<broadcast::Receiver<Hint>> {
        match &self.stands_in {
            Some(stands_in) => stands_in.hints.as_ref().map(broadcast::Sender::subscribe),
            None => self.store.hints(),
        }
    }

    fn shared(&self) -> bool {
        true
    }

    async fn time(&self) -> Result<Option<Timestamp>> {
        if !self.tells_time {
            return Ok(None);
        }
        match &self.stands_in {
            Some(stands_in) => self.through(Call::Read, async { Ok(Some(stands_in.clock.now())) }).await,
            None => self.through(Call::Read, self.store.time()).await,
        }
    }

    async fn close(&self) {
        // The embedded one is the others', too, and they go on.
        if self.stands_in.is_none() {
            self.store.close().await;
        }
    }
}

fn turn_of(write: &Write) -> Option<TurnId> {
    match write {
        Write::Accept(accept) => Some(accept.turn),
        Write::Append(append) | Write::BeginEffect(append) => Some(append.lease.turn),
        Write::Commit(commit) => Some(commit.turn),
        Write::Requeue(requeue) => Some(requeue.lease.turn),
        Write::Claim(_) => None,
    }
}
