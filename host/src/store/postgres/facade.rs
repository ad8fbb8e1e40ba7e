//! [`Store`] for [`PostgresStore`]: which statement each method is, and nothing else.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use super::catalog::Upload;
use super::{Clock, PostgresStore, hints, millis};
use crate::agent::{Agent, AgentSettings};
use crate::attachment::{Attachment, AttachmentId};
use crate::audit::{Act, Actor, AuditEntry, AuditFilter, AuditPlace};
use crate::caller::{Owned, Role};
use crate::clock::Timestamp;
use crate::event::EventId;
use crate::ids::{AgentId, ConversationId, OrgId, ReplicaId, TurnId, UserId, WorkerName};
use crate::lease::Lease;
use crate::notes::NotesChange;
use crate::quota::{LimitsChange, OwnLimits};
use crate::store::{
    AgentUse, Among, ConversationRecord, Deleted, Direction, Ended, Erased, EventPage, Finding, Hint, KeyRecord,
    LiveCounts, Member, Membership, Opening, OrgRecord, OrgUse, Page, Progress, Provisioned, PutAgent, PutAttachment,
    PutMember, PutWorker, RemoveMember, Result, Retained, Retention, SnapshotPlace, SnapshotRecord, Starter, Store,
    StoreStatus, SweepFindings, TicketKey, TurnRecord, WorkerVersion, Write, Written,
};
use crate::turn::Usage;

statements! {
    REGISTER = "-- register
INSERT INTO replicas (replica_id, registered_at, expires_at)
SELECT $1, n.now, n.now + $3 FROM (SELECT coalesce($2::bigint, turnhouse_now()) AS now) n";
    /// No row: it has expired, and whoever holds its turns now must not meet it again.
    RENEW = "-- renew
UPDATE replicas SET expires_at = coalesce($2::bigint, turnhouse_now()) + $3
 WHERE replica_id = $1 AND expires_at > coalesce($2::bigint, turnhouse_now())";
    DRAIN = "-- drain
UPDATE replicas SET draining = true WHERE replica_id = $1";
    /// What it still holds is taken over as from the dead; the sweep forgets it then.
    RETIRE = "-- retire
UPDATE replicas SET expires_at = least(expires_at, coalesce($2::bigint, turnhouse_now())), draining = true WHERE replica_id = $1";
    /// Not `<= now` again: who has expired stays expired since then. No host on a shared database asks for this: the others are alive.
    EXPIRE_OTHERS = "-- expire_others
UPDATE replicas SET expires_at = n.now FROM (SELECT coalesce($2::bigint, turnhouse_now()) AS now) n WHERE replica_id <> $1 AND expires_at > n.now";
    PING = "-- ping
SELECT 1";
}

#[async_trait]
impl Store for PostgresStore {
    async fn write(&self, batch: Vec<Write>, now: Timestamp) -> Result<Vec<Written>> {
        self.write_batch(batch, now).await
    }

    fn gather(&self) -> Duration {
        self.hot.lock().gather
    }

    async fn register_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<()> {
        let ttl = millis(ttl_ms);
        self.change_hostwide(self.query(REGISTER).bind(replica.0).bind(self.clock.of(now)).bind(ttl)).await?;
        Ok(())
    }

    async fn renew_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<bool> {
        let ttl = millis(ttl_ms);
        Ok(self.change_hostwide(self.query(RENEW).bind(replica.0).bind(self.clock.of(now)).bind(ttl)).await? == 1)
    }

    async fn drain_replica(&self, replica: ReplicaId) -> Result<()> {
        self.change_hostwide(self.query(DRAIN).bind(replica.0)).await?;
        Ok(())
    }

    async fn retire_replica(&self, replica: ReplicaId) -> Result<()> {
        // Whoever passes the time passes none here: before all of it.
        let at = match self.clock {
            Clock::Database => None,
            Clock::Passed => Some(0_i64),
        };
        self.change_hostwide(self.query(RETIRE).bind(replica.0).bind(at)).await?;
        Ok(())
    }

    async fn expire_other_replicas(&self, except: ReplicaId, now: Timestamp) -> Result<u64> {
        Ok(self.change_hostwide(self.query(EXPIRE_OTHERS).bind(except.0).bind(self.clock.of(now))).await?)
    }

    async fn sweep(&self, now: Timestamp, gate_refusals_max: u32, limit: usize) -> Result<SweepFindings> {
        self.find_overdue(now, gate_refusals_max, limit).await
    }

    async fn repair_lanes(&self, now: Timestamp, limit: usize) -> Result<()> {
        self.repair_stuck(now, limit).await
    }

    async fn forget_keys(&self, before: Timestamp, limit: usize) -> Result<usize> {
        self.forget_keys_before(before, limit).await
    }

    async fn retain(&self, after: Option<&OrgId>, keep: Retention, limit: usize) -> Result<Retained> {
        self.retain_next(after, keep, limit).await
    }

    async fn live_counts(&self) -> Result<LiveCounts> {
        let counts = self.read_live_counts().await?;
        // Turns end at other hosts, and with their conversations: what this host has moved by itself is not all. Asked every second.
        self.hot.lock().live = i64::try_from(counts.total()).unwrap_or(i64::MAX);
        Ok(counts)
    }

    async fn turn(&self, org: &OrgId, turn: TurnId) -> Result<Option<Owned<TurnRecord>>> {
        self.read_turn(org, turn).await
    }

    async fn events(
        &self,
        org: &OrgId,
        turn: TurnId,
        after: Option<EventId>,
        bytes_max: usize,
    ) -> Result<Option<EventPage>> {
        self.read_events(org, turn, after, bytes_max).await
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
        self.read_turns(org, agent, conversation, after, direction, with_private, limit).await
    }

    async fn running_turns(&self, replica: ReplicaId) -> Result<Vec<Lease>> {
        self.read_running(replica).await
    }

    async fn stale(&self, leases: &[Lease]) -> Result<Vec<TurnId>> {
        self.read_stale(leases).await
    }

    async fn open_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        user: &UserId,
        now: Timestamp,
    ) -> Result<Opening> {
        loop {
            if let Some(found) = self.read_conversation(org, agent, conversation).await? {
                return Ok(Opening::Found(found));
            }
            let made = match self.write_conversation(org, agent, conversation, user, now).await? {
                Ok(made) => made,
                Err(exceeded) => return Ok(Opening::Refused(exceeded)),
            };
            // Deleted between the two: begin it again.
            if let Some(found) = self.read_conversation(org, agent, conversation).await? {
                return Ok(if made { Opening::Made(found) } else { Opening::Found(found) });
            }
        }
    }

    async fn conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Result<Option<Owned<ConversationRecord>>> {
        self.read_conversation(org, agent, conversation).await
    }

    async fn generation(&self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Result<Option<Uuid>> {
        self.read_generation(org, agent, conversation).await
    }

    async fn note_files(
        &self,
        _org: &OrgId,
        _agent: &AgentId,
        _conversation: &ConversationId,
        _generation: Uuid,
        _bytes: u64,
    ) -> Result<()> {
        Ok(())
    }

    async fn conversations(
        &self,
        org: &OrgId,
        agent: &AgentId,
        user: Option<&UserId>,
        after: Option<&ConversationId>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>> {
        self.read_conversations(org, agent, user, after, limit).await
    }

    async fn write_notes(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        change: &NotesChange,
    ) -> Result<bool> {
        self.write_conversation_notes(org, agent, conversation, whose, change).await
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
        self.write_deletion(org, agent, conversation, whose, now, by).await
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
        self.write_reset(org, agent, conversation, whose, now, by).await
    }

    async fn org_conversations(
        &self,
        org: &OrgId,
        after: Option<&(AgentId, ConversationId)>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>> {
        self.read_org_conversations(org, after, limit).await
    }

    async fn org_turns(&self, org: &OrgId, after: Option<TurnId>, limit: usize) -> Result<Page<TurnRecord>> {
        self.read_org_turns(org, after, limit).await
    }

    async fn snapshots(
        &self,
        org: &OrgId,
        among: &Among,
        after: Option<&SnapshotPlace>,
        limit: usize,
    ) -> Result<Page<SnapshotRecord>> {
        self.read_snapshots(org, among, after, limit).await
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
        self.write_attachment(org, user, attachment, &pieces, org_bytes_max, now).await
    }

    async fn attachments(&self, org: &OrgId, user: Option<&UserId>, ids: &[AttachmentId]) -> Result<Vec<Attachment>> {
        self.read_attachments(org, user, ids).await
    }

    async fn attachments_of(&self, org: &OrgId, turns: &[TurnId]) -> Result<Vec<Attachment>> {
        self.read_attachments_of(org, turns).await
    }

    async fn org_attachments(
        &self,
        org: &OrgId,
        after: Option<AttachmentId>,
        limit: usize,
    ) -> Result<Page<Attachment>> {
        self.read_org_attachments(org, after, limit).await
    }

    async fn attachment_piece(&self, org: &OrgId, id: AttachmentId, piece: u32) -> Result<Option<Bytes>> {
        self.read_piece(org, id, piece).await
    }

    async fn sweep_attachments(&self, before: Timestamp, limit: usize) -> Result<usize> {
        self.drop_attachments(before, limit).await
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
        let upload = Upload { digest, wasm, imports, compile_ms };
        self.write_worker(org, worker, &upload, workers_max, versions_kept, now, by).await
    }

    async fn workers(&self, org: &OrgId, after: Option<&WorkerName>, limit: usize) -> Result<Page<WorkerVersion>> {
        self.read_workers(org, after, limit).await
    }

    async fn worker_versions(&self, org: &OrgId, worker: &WorkerName) -> Result<Vec<WorkerVersion>> {
        self.read_worker_versions(org, worker).await
    }

    async fn worker_version(&self, org: &OrgId, worker: &WorkerName, version: u32) -> Result<Option<WorkerVersion>> {
        self.read_worker_version(org, worker, version).await
    }

    async fn module(&self, org: &OrgId, digest: [u8; 32]) -> Result<Option<Bytes>> {
        self.read_module(org, digest).await
    }

    async fn delete_worker(&self, org: &OrgId, worker: &WorkerName, now: Timestamp, by: &Actor) -> Result<Deleted> {
        self.erase_worker(org, worker, now, by).await
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
        self.write_agent(org, agent, settings, agents_max, now, by).await
    }

    async fn agent(&self, org: &OrgId, agent: &AgentId) -> Result<Option<Agent>> {
        self.read_agent(org, agent).await
    }

    async fn default_agent(&self, org: &OrgId) -> Result<Option<Agent>> {
        self.read_default_agent(org).await
    }

    async fn agents(&self, org: &OrgId, after: Option<&AgentId>, limit: usize) -> Result<Page<Agent>> {
        self.read_agents(org, after, limit).await
    }

    async fn delete_agent(&self, org: &OrgId, agent: &AgentId, now: Timestamp, by: &Actor) -> Result<Deleted> {
        self.erase_agent(org, agent, now, by).await
    }

    async fn create_org(&self, org: &OrgId, owner: &UserId, now: Timestamp, by: &Actor) -> Result<bool> {
        self.write_org(org, owner, now, by).await
    }

    async fn provision_org(
        &self,
        org: &OrgId,
        owner: &UserId,
        starter: &Starter,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Provisioned> {
        self.write_provision(org, owner, starter, now, by).await
    }

    async fn org(&self, org: &OrgId) -> Result<Option<OrgRecord>> {
        self.read_org(org).await
    }

    async fn orgs(&self) -> Result<Vec<OrgRecord>> {
        self.read_orgs().await
    }

    async fn set_org_limits(
        &self,
        org: &OrgId,
        change: &LimitsChange,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<OwnLimits>> {
        self.write_limits(org, change, now, by).await
    }

    async fn measure_storage(&self, now: Timestamp) -> Result<Option<OrgId>> {
        self.measure_next(now).await
    }

    async fn agent_use(&self, org: &OrgId, agent: &AgentId, now: Timestamp) -> Result<Option<AgentUse>> {
        self.read_agent_use(org, agent, now).await
    }

    async fn add_usage(
        &self,
        org: &OrgId,
        agent: &AgentId,
        turn: TurnId,
        usage: &Usage,
        now: Timestamp,
    ) -> Result<bool> {
        self.write_usage(org, agent, turn, usage, now).await
    }

    async fn org_use(&self, org: &OrgId, now: Timestamp) -> Result<Option<OrgUse>> {
        self.read_use(org, now).await
    }

    async fn mark_org(&self, org: &OrgId, now: Timestamp, by: &Actor) -> Result<bool> {
        self.write_mark(org, now, by).await
    }

    async fn deleting_orgs(&self) -> Result<Vec<OrgRecord>> {
        self.read_deleting().await
    }

    async fn live_turns(&self, org: &OrgId, limit: usize) -> Result<Vec<TurnId>> {
        self.read_live_turns(org, limit).await
    }

    async fn module_digests(&self, org: &OrgId) -> Result<Vec<[u8; 32]>> {
        self.read_digests(org).await
    }

    async fn erase_org(&self, org: &OrgId, limit: usize) -> Result<Erased> {
        self.erase_step(org, limit).await
    }

    async fn create_key(&self, hash: [u8; 32], key: &KeyRecord, by: &Actor) -> Result<bool> {
        self.write_key(hash, key, by).await
    }

    async fn key(&self, hash: [u8; 32]) -> Result<Option<KeyRecord>> {
        self.read_key(hash).await
    }

    async fn key_by_id(&self, org: &OrgId, id: &str) -> Result<Option<KeyRecord>> {
        self.read_key_by_id(org, id).await
    }

    async fn keys(&self, org: &OrgId) -> Result<Vec<KeyRecord>> {
        self.read_keys(org).await
    }

    async fn rotate_key(&self, id: &str, hash: [u8; 32], key: &KeyRecord, overlap_ms: u64, by: &Actor) -> Result<bool> {
        self.write_successor(id, hash, key, overlap_ms, by).await
    }

    async fn revoke_key(&self, org: &OrgId, id: &str, now: Timestamp, by: &Actor) -> Result<bool> {
        self.write_revocation(org, id, now, by).await
    }

    async fn touch_keys(&self, used: &[(OrgId, String)], now: Timestamp) -> Result<()> {
        self.write_last_use(used, now).await
    }

    async fn members(&self, org: &OrgId, after: Option<&UserId>, limit: usize) -> Result<Page<Member>> {
        self.read_members(org, after, limit).await
    }

    async fn role(&self, org: &OrgId, user: &UserId) -> Result<Option<Role>> {
        self.read_role(org, user).await
    }

    async fn memberships(&self, user: &UserId, limit: usize) -> Result<Vec<Membership>> {
        self.read_memberships(user, limit).await
    }

    async fn membership_of_turn(&self, user: &UserId, turn: TurnId) -> Result<Option<Membership>> {
        self.read_membership_of_turn(user, turn).await
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
        self.write_member(org, user, role, changer, members_max, now, by).await
    }

    async fn remove_member(
        &self,
        org: &OrgId,
        user: &UserId,
        changer: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<RemoveMember> {
        self.erase_member(org, user, changer, now, by).await
    }

    async fn record_act(&self, org: Option<&OrgId>, act: &Act, now: Timestamp, by: &Actor) -> Result<()> {
        self.write_act(org, act, by, now).await
    }

    async fn audit(
        &self,
        org: Option<&OrgId>,
        filter: &AuditFilter,
        since: Timestamp,
        before: Option<AuditPlace>,
        limit: usize,
    ) -> Result<Page<AuditEntry>> {
        self.read_audit(org, filter, since, before, limit).await
    }

    async fn ticket_keys(&self) -> Result<Vec<TicketKey>> {
        self.read_ticket_keys().await
    }

    async fn add_ticket_key(&self, number: i64, secret: [u8; 32], now: Timestamp) -> Result<bool> {
        self.write_ticket_key(number, secret, now).await
    }

    fn shared(&self) -> bool {
        true
    }

    async fn time(&self) -> Result<Option<Timestamp>> {
        match self.clock {
            Clock::Database => Ok(Some(self.read_time().await?)),
            Clock::Passed => Ok(None),
        }
    }

    async fn progress(&self, turns: &[(OrgId, TurnId)]) -> Result<Vec<Option<Progress>>> {
        self.read_progress(turns).await
    }

    fn hints(&self) -> Option<tokio::sync::broadcast::Receiver<Hint>> {
        self.hints.as_ref().map(hints::Hints::receiver)
    }

    async fn status(&self, now: Timestamp) -> Result<StoreStatus> {
        self.read_status(now).await
    }

    async fn examine(&self) -> Result<Vec<Finding>> {
        self.examine_server().await
    }

    async fn ping(&self) -> Result<()> {
        self.rows_hostwide(self.query(PING)).await?;
        Ok(())
    }

    async fn close(&self) {
        // Whoever is cut off from the database need not say goodbye to it.
        let closed = async {
            self.pool.close().await;
            drop(self.journal.lock().await.take());
        };
        let closed = tokio::time::timeout(super::ACQUIRE_TIMEOUT, closed).await;
        if closed.is_err() {
            tracing::debug!("the database did not answer the close of its connections");
        }
    }
}
