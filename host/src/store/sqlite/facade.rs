//! [`Store`] for [`SqliteStore`]: which side of the store each method goes to, and nothing else.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::params;
use uuid::Uuid;

use super::catalog::Upload;
use super::{SqliteStore, blocking, closed};
use crate::agent::{Agent, AgentSettings};
use crate::attachment::{Attachment, AttachmentId};
use crate::audit::{Act, Actor, AuditEntry, AuditFilter, AuditPlace, Verb};
use crate::caller::{Owned, Role};
use crate::clock::Timestamp;
use crate::event::EventId;
use crate::ids::{AgentId, ConversationId, OrgId, ReplicaId, TurnId, UserId, WorkerName};
use crate::lease::Lease;
use crate::notes::NotesChange;
use crate::quota::{LimitsChange, OwnLimits};
use crate::store::{
    AgentUse, Among, ConversationRecord, Deleted, Direction, Ended, Erased, EventPage, Finding, KeyRecord, LiveCounts,
    Member, Membership, Opening, OrgRecord, OrgUse, Page, Progress, Provisioned, PutAgent, PutAttachment, PutMember,
    PutWorker, RemoveMember, Result, Retained, Retention, SnapshotPlace, SnapshotRecord, Starter, Store, StoreStatus,
    SweepFindings, TicketKey, TurnRecord, WorkerVersion, Write, Written,
};
use crate::turn::Usage;

statements! {
    REGISTER = "-- register
INSERT INTO replicas (replica_id, expires_at) VALUES (?1, ?2)";
    /// No row: it has expired, and whoever holds its turns now must not meet it again.
    RENEW = "-- renew
UPDATE replicas SET expires_at = ?2 + ?3 WHERE replica_id = ?1 AND expires_at > ?2";
    DRAIN = "-- drain
UPDATE replicas SET draining = 1 WHERE replica_id = ?1";
    /// What it still holds is taken over as from the dead; the sweep forgets it then.
    RETIRE = "-- retire
UPDATE replicas SET expires_at = min(expires_at, 0), draining = 1 WHERE replica_id = ?1";
    PING = "-- ping
SELECT 1";
}

#[async_trait]
impl Store for SqliteStore {
    async fn write(&self, batch: Vec<Write>, now: Timestamp) -> Result<Vec<Written>> {
        self.owns_turns()?;
        // The journal's own thread: it may block.
        Ok(self.writer.lock().as_mut().ok_or_else(closed)?.write(&batch, now)?)
    }

    async fn register_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<()> {
        self.write_with(now, move |tx| {
            tx.conn.prepare_cached(REGISTER)?.execute(params![replica.as_bytes(), now.plus_ms(ttl_ms).0])?;
            Ok(())
        })
        .await
    }

    async fn renew_replica(&self, replica: ReplicaId, now: Timestamp, ttl_ms: u64) -> Result<bool> {
        self.write_with(now, move |tx| {
            let ttl = super::accept::millis(ttl_ms);
            Ok(tx.conn.prepare_cached(RENEW)?.execute(params![replica.as_bytes(), now.0, ttl])? == 1)
        })
        .await
    }

    async fn drain_replica(&self, replica: ReplicaId) -> Result<()> {
        self.write_with(Timestamp(0), move |tx| {
            tx.conn.prepare_cached(DRAIN)?.execute(params![replica.as_bytes()])?;
            Ok(())
        })
        .await
    }

    async fn retire_replica(&self, replica: ReplicaId) -> Result<()> {
        self.write_with(Timestamp(0), move |tx| {
            tx.conn.prepare_cached(RETIRE)?.execute(params![replica.as_bytes()])?;
            Ok(())
        })
        .await
    }

    async fn expire_other_replicas(&self, except: ReplicaId, now: Timestamp) -> Result<u64> {
        self.write_with(now, move |tx| tx.expire_others(except)).await
    }

    async fn sweep(&self, now: Timestamp, gate_refusals_max: u32, limit: usize) -> Result<SweepFindings> {
        self.find_overdue(now, gate_refusals_max, limit).await
    }

    async fn repair_lanes(&self, now: Timestamp, limit: usize) -> Result<()> {
        self.repair_stuck(now, limit).await
    }

    async fn forget_keys(&self, before: Timestamp, limit: usize) -> Result<usize> {
        self.write_with(before, move |tx| tx.forget_keys(before, limit)).await
    }

    async fn retain(&self, after: Option<&OrgId>, keep: Retention, limit: usize) -> Result<Retained> {
        let after = after.cloned();
        self.write_with(Timestamp(0), move |tx| tx.retain(after.as_ref(), keep, limit)).await
    }

    async fn live_counts(&self) -> Result<LiveCounts> {
        let writer = Arc::clone(&self.writer);
        let host =
            blocking(move || writer.lock().as_ref().map(|writer| writer.counts().host())).await?.ok_or_else(closed)?;
        Ok(LiveCounts { waiting: host.waiting as u64, ready: host.ready as u64, running: host.running as u64 })
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

    async fn progress(&self, turns: &[(OrgId, TurnId)]) -> Result<Vec<Option<Progress>>> {
        self.read_progress(turns).await
    }

    async fn open_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        user: &UserId,
        now: Timestamp,
    ) -> Result<Opening> {
        let ids = (org.clone(), agent.clone(), conversation.clone(), user.clone());
        let made = self.write_with(now, move |tx| tx.open_conversation(&ids.0, &ids.1, &ids.2, &ids.3)).await?;
        let made = match made {
            Ok(made) => made,
            Err(exceeded) => return Ok(Opening::Refused(exceeded)),
        };
        match self.read_conversation(org, agent, conversation).await? {
            Some(found) if made => Ok(Opening::Made(found)),
            Some(found) => Ok(Opening::Found(found)),
            // Deleted between the two: begin it again.
            None => Box::pin(self.open_conversation(org, agent, conversation, user, now)).await,
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
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        generation: Uuid,
        bytes: u64,
    ) -> Result<()> {
        self.write_files_bytes(org, agent, conversation, generation, bytes).await
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
        let (ids, change) = ((org.clone(), agent.clone(), conversation.clone()), change.clone());
        let whose = whose.cloned();
        self.write_with(Timestamp(0), move |tx| {
            let there = tx.conversation_is_there(&ids.0, &ids.1, &ids.2, whose.as_ref())?;
            if there {
                tx.write_notes(&ids.0, &ids.1, &ids.2, &change)?;
            }
            Ok(there)
        })
        .await
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
        self.owns_turns()?;
        let (ids, by) = ((org.clone(), agent.clone(), conversation.clone()), by.clone());
        let whose = whose.cloned();
        self.write_with(now, move |tx| {
            if !tx.conversation_is_there(&ids.0, &ids.1, &ids.2, whose.as_ref())? {
                return Ok(None);
            }
            let act = Act::conversation(Verb::ConversationDelete, &ids.1, &ids.2);
            tx.note(Some(&ids.0), &[act], &by)?;
            tx.delete_conversation(&ids.0, &ids.1, &ids.2).map(Some)
        })
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
        let (ids, by) = ((org.clone(), agent.clone(), conversation.clone()), by.clone());
        let whose = whose.cloned();
        self.write_with(now, move |tx| {
            let there = tx.conversation_is_there(&ids.0, &ids.1, &ids.2, whose.as_ref())?;
            if there {
                let act = Act::conversation(Verb::ConversationReset, &ids.1, &ids.2);
                tx.note(Some(&ids.0), &[act], &by)?;
                tx.reset_snapshot(&ids.0, &ids.1, &ids.2)?;
            }
            Ok(there)
        })
        .await
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
        let (org, user, attachment) = (org.clone(), user.clone(), attachment.clone());
        self.write_with(now, move |tx| tx.put_attachment(&org, &user, &attachment, &pieces, org_bytes_max)).await
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
        self.write_with(before, move |tx| tx.sweep_attachments(before, limit)).await
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
        let (org, worker, by) = (org.clone(), worker.clone(), by.clone());
        let upload = Upload { digest, wasm, imports, compile_ms };
        self.write_with(now, move |tx| tx.put_worker(&org, &worker, &upload, workers_max, versions_kept, &by)).await
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
        let (org, worker, by) = (org.clone(), worker.clone(), by.clone());
        self.write_with(now, move |tx| tx.delete_worker(&org, &worker, &by)).await
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
        let (org, agent, by) = (org.clone(), agent.clone(), by.clone());
        self.write_with(now, move |tx| tx.put_agent(&org, &agent, settings, agents_max, &by)).await
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
        let (org, agent, by) = (org.clone(), agent.clone(), by.clone());
        self.write_with(now, move |tx| tx.delete_agent(&org, &agent, &by)).await
    }

    async fn create_org(&self, org: &OrgId, owner: &UserId, now: Timestamp, by: &Actor) -> Result<bool> {
        let (org, owner, by) = (org.clone(), owner.clone(), by.clone());
        self.write_with(now, move |tx| tx.create_org(&org, &owner, &by)).await
    }

    async fn provision_org(
        &self,
        org: &OrgId,
        owner: &UserId,
        starter: &Starter,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Provisioned> {
        let (org, owner, starter, by) = (org.clone(), owner.clone(), starter.clone(), by.clone());
        self.write_with(now, move |tx| tx.provision_org(&org, &owner, &starter, &by)).await
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
        let (org, change, by) = (org.clone(), *change, by.clone());
        self.write_with(now, move |tx| tx.set_limits(&org, &change, &by)).await
    }

    async fn measure_storage(&self, now: Timestamp) -> Result<Option<OrgId>> {
        self.measure_next(now).await
    }

    async fn agent_use(&self, org: &OrgId, agent: &AgentId, now: Timestamp) -> Result<Option<AgentUse>> {
        let (org, agent) = (org.clone(), agent.clone());
        self.write_with(now, move |tx| tx.agent_load(&org, &agent)).await
    }

    async fn add_usage(
        &self,
        org: &OrgId,
        agent: &AgentId,
        turn: TurnId,
        usage: &Usage,
        now: Timestamp,
    ) -> Result<bool> {
        let (org, agent, usage) = (org.clone(), agent.clone(), *usage);
        self.write_with(now, move |tx| tx.add_usage(&org, &agent, turn, &usage)).await
    }

    async fn org_use(&self, org: &OrgId, now: Timestamp) -> Result<Option<OrgUse>> {
        let org = org.clone();
        self.write_with(now, move |tx| tx.org_use(&org)).await
    }

    async fn mark_org(&self, org: &OrgId, now: Timestamp, by: &Actor) -> Result<bool> {
        let (org, by) = (org.clone(), by.clone());
        self.write_with(now, move |tx| tx.mark_org(&org, &by)).await
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
        self.owns_turns()?;
        let org = org.clone();
        self.write_with(Timestamp(0), move |tx| tx.erase_org(&org, limit)).await
    }

    async fn create_key(&self, hash: [u8; 32], key: &KeyRecord, by: &Actor) -> Result<bool> {
        let (key, by) = (key.clone(), by.clone());
        self.write_with(key.created_at, move |tx| tx.create_key(&hash, &key, &by)).await
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
        let (id, key, by) = (id.to_owned(), key.clone(), by.clone());
        self.write_with(key.created_at, move |tx| tx.rotate_key(&id, &hash, &key, overlap_ms, &by)).await
    }

    async fn revoke_key(&self, org: &OrgId, id: &str, now: Timestamp, by: &Actor) -> Result<bool> {
        let (org, id, by) = (org.clone(), id.to_owned(), by.clone());
        self.write_with(now, move |tx| tx.revoke_key(&org, &id, &by)).await
    }

    async fn touch_keys(&self, used: &[(OrgId, String)], now: Timestamp) -> Result<()> {
        let used = used.to_vec();
        self.write_with(now, move |tx| tx.touch_keys(&used)).await
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
        let (org, user, changer, by) = (org.clone(), user.clone(), changer.cloned(), by.clone());
        self.write_with(now, move |tx| tx.put_member(&org, &user, role, changer.as_ref(), members_max, &by)).await
    }

    async fn remove_member(
        &self,
        org: &OrgId,
        user: &UserId,
        changer: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<RemoveMember> {
        let (org, user, changer, by) = (org.clone(), user.clone(), changer.cloned(), by.clone());
        self.write_with(now, move |tx| tx.remove_member(&org, &user, changer.as_ref(), &by)).await
    }

    async fn record_act(&self, org: Option<&OrgId>, act: &Act, now: Timestamp, by: &Actor) -> Result<()> {
        let (org, acts, by) = (org.cloned(), [act.clone()], by.clone());
        self.write_with(now, move |tx| tx.note(org.as_ref(), &acts, &by)).await
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
        self.write_with(now, move |tx| tx.add_ticket_key(number, &secret)).await
    }

    async fn status(&self, now: Timestamp) -> Result<StoreStatus> {
        self.read_status(now).await
    }

    async fn examine(&self) -> Result<Vec<Finding>> {
        self.examine_file().await
    }

    async fn ping(&self) -> Result<()> {
        sqlx::query(PING).execute(&self.readers).await?;
        Ok(())
    }

    async fn close(&self) {
        self.readers.close().await;
        let writer = self.writer.lock().take();
        // The last connection to close checkpoints the whole log and removes it.
        drop(writer);
        self.checkpointer.stop();
        // Whoever still holds this store can do nothing with it; the next host need not wait for them.
        if let Some(Err(error)) = self.lock.as_ref().map(std::fs::File::unlock) {
            tracing::warn!(%error, "the data directory stays locked until this process ends");
        }
    }
}
