//! Workers and agents: what a deploy changes and a turn looks up.
//!
//! Looking them up is on the path of every turn, so both are cached, keyed by org, for a second at most: other hosts change them, too. Where a turn
//! runs, the claim names the revision of the agent's settings that holds, and an older entry is read again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use moka::sync::Cache;

use crate::agent::{Agent, AgentSettings, InvalidSetting, NO_FILE_MODE};
use crate::attachment::AttachmentId;
use crate::audit::Actor;
use crate::clock::Timestamp;
use crate::content::Content;
use crate::gate::SessionMode;
use crate::host::Host;
use crate::ids::{AgentId, OrgId, TurnId, WorkerName};
use crate::input::History;
use crate::journal::Observer;
use crate::limits::Limits;
use crate::sandbox::{Attachments, GuestLimits, LoadError, ModuleRefusal, PieceSource, Sandbox, Worker};
use crate::store::{Claimed, Deleted, Direction, PutAgent, PutWorker, Result, Store, StoreError};
use crate::turn::{TurnState, Usage};

/// How long an agent's settings are believed at the edge, and a worker's version at all: another host may have changed the one, or deleted the
/// other and given its name to other bytes.
const TTL: Duration = Duration::from_secs(1);

/// How long before a store that does not answer is asked for a piece again.
const PIECE_AGAIN: Duration = Duration::from_millis(100);

/// Agents and worker versions that are kept at hand.
const CACHED: u64 = 10_000;

/// An agent with what follows from it.
#[derive(Clone)]
struct Cached {
    agent: Arc<Agent>,
    guest_limits: Arc<GuestLimits>,
}

/// The caches.
pub struct Registry {
    store: Arc<dyn Store>,
    limits: Arc<Limits>,
    agents: Cache<(OrgId, AgentId), Cached>,
    workers: Cache<(OrgId, WorkerName, u32), Arc<Worker>>,
}

/// The attachments of an org's turn, as the store has them.
struct StoredPieces {
    store: Arc<dyn Store>,
    org: OrgId,
}

#[async_trait]
impl PieceSource for StoredPieces {
    async fn piece(&self, id: AttachmentId, piece: u32) -> Option<Bytes> {
        loop {
            match self.store.attachment_piece(&self.org, id, piece).await {
                Ok(found) => return found,
                // Whoever asked bounds how long this may go on.
                Err(StoreError::Unavailable(_)) => tokio::time::sleep(PIECE_AGAIN).await,
                Err(error) => {
                    tracing::error!(org = %self.org, %id, piece, %error, "an attachment could not be read");
                    return None;
                }
            }
        }
    }
}

/// Whether a message refers to attachments. Most do not say the word, and are not parsed for it.
fn refers(message: &[u8]) -> bool {
    let spelt = std::str::from_utf8(message).is_ok_and(|text| text.contains("attachment") || text.contains("\\u"));
    spelt && serde_json::from_slice(message).is_ok_and(|content: Content| !content.attachments().is_empty())
}

impl Registry {
    /// Empty caches over `store`.
    pub fn new(store: Arc<dyn Store>, limits: Arc<Limits>) -> Registry {
        let agents = Cache::builder().max_capacity(CACHED).time_to_live(TTL).build();
        // The sandbox bounds what is loaded; this only saves its lookup by digest.
        let workers = Cache::builder().max_capacity(256).time_to_live(TTL).build();
        Registry { store, limits, agents, workers }
    }

    async fn read(&self, org: &OrgId, id: &AgentId) -> Result<Option<Cached>> {
        let Some(agent) = self.store.agent(org, id).await? else { return Ok(None) };
        let guest_limits = Arc::new(GuestLimits::of(&self.limits, &agent.settings.limits));
        let cached = Cached { agent: Arc::new(agent), guest_limits };
        self.agents.insert((org.clone(), id.clone()), cached.clone());
        Ok(Some(cached))
    }

    /// An agent, as it was at most a second ago.
    pub async fn agent(&self, org: &OrgId, id: &AgentId) -> Result<Option<Arc<Agent>>> {
        match self.agents.get(&(org.clone(), id.clone())) {
            Some(cached) => Ok(Some(cached.agent)),
            None => Ok(self.read(org, id).await?.map(|cached| cached.agent)),
        }
    }

    /// An agent and its guests' bounds, at `revision` or newer.
    pub async fn agent_at(
        &self,
        org: &OrgId,
        id: &AgentId,
        revision: u64,
    ) -> Result<Option<(Arc<Agent>, Arc<GuestLimits>)>> {
        let cached = match self.agents.get(&(org.clone(), id.clone())) {
            Some(cached) if cached.agent.revision >= revision => Some(cached),
            _ => self.read(org, id).await?,
        };
        Ok(cached.map(|cached| (cached.agent, cached.guest_limits)))
    }

    /// A worker's version, ready to run. The inner error says why it is not.
    pub async fn worker(
        &self,
        sandbox: &Sandbox,
        org: &OrgId,
        name: &WorkerName,
        version: u32,
    ) -> Result<std::result::Result<Arc<Worker>, String>> {
        let key = (org.clone(), name.clone(), version);
        if let Some(worker) = self.workers.get(&key) {
            return Ok(Ok(worker));
        }
        let Some(row) = self.store.worker_version(org, name, version).await? else {
            return Ok(Err("it does not exist".to_owned()));
        };
        let wasm = async || {
            let module = self.store.module(org, row.digest).await?;
            module.ok_or_else(|| anyhow::anyhow!("the store has no module with this digest"))
        };
        match sandbox.load(org, row.digest, wasm).await {
            Ok(worker) => {
                self.workers.insert(key, worker.clone());
                Ok(Ok(worker))
            }
            Err(error) => match &*error {
                LoadError::Refused(refusal) => Ok(Err(refusal.to_string())),
                LoadError::Digest => Ok(Err(error.to_string())),
                LoadError::Fetch(cause) => Err(StoreError::Unavailable(format!("{cause:#}"))),
            },
        }
    }

    /// Completed turns of the conversation before the claimed one, as its agent asks for; nothing for a private turn.
    pub async fn history(&self, claimed: &Claimed, agent: &Agent) -> Result<History> {
        let wanted = agent.settings.history_messages;
        let (Some(conversation), true) = (&claimed.envelope.conversation, wanted > 0 && claimed.head.is_some()) else {
            return Ok(Vec::new());
        };
        let org = &claimed.lease.org;
        let page = self
            .store
            .turns(org, &claimed.agent, conversation, claimed.seq, Direction::Backward, false, wanted * 2)
            .await?;
        let completed = page.items.into_iter().filter(|turn| turn.state == TurnState::Completed);
        let mut history: History =
            completed.filter_map(|turn| Some((turn.id, turn.message, turn.reply?))).take(wanted).collect();
        history.reverse();
        // The input has a bound; what is oldest goes first.
        let mut bytes: usize = history.iter().map(|(_, message, reply)| message.len() + reply.len()).sum();
        while bytes > self.limits.input_bytes_max / 2 && !history.is_empty() {
            let (_, message, reply) = history.remove(0);
            bytes -= message.len() + reply.len();
        }
        Ok(history)
    }

    /// What the claimed turn's message and its history refer to, to be read when the guest asks for it.
    pub async fn attachments(&self, claimed: &Claimed, history: &History) -> Result<Attachments> {
        let own = std::iter::once((claimed.lease.turn, &claimed.message));
        let turns: Vec<TurnId> = own
            .chain(history.iter().map(|(turn, message, _)| (*turn, message)))
            .filter(|(_, message)| refers(message))
            .map(|(turn, _)| turn)
            .collect();
        if turns.is_empty() {
            return Ok(Attachments::default());
        }
        let org = claimed.lease.org.clone();
        let known = self.store.attachments_of(&org, &turns).await?;
        Ok(Attachments::new(known, Arc::new(StoredPieces { store: self.store.clone(), org })))
    }

    /// What changed is read again.
    pub fn forget_agent(&self, org: &OrgId, id: &AgentId) {
        self.agents.invalidate(&(org.clone(), id.clone()));
    }

    /// Nothing of an org is at hand any more.
    pub fn forget_org(&self, org: &OrgId) {
        let agents: Vec<_> = self.agents.iter().filter(|(key, _)| key.0 == *org).map(|(key, _)| key).collect();
        agents.iter().for_each(|key| self.agents.invalidate(&**key));
        let workers: Vec<_> = self.workers.iter().filter(|(key, _)| key.0 == *org).map(|(key, _)| key).collect();
        workers.iter().for_each(|key| self.workers.invalidate(&**key));
    }

    /// A deleted worker's versions are no longer at hand: its name may come to mean other bytes.
    pub fn forget_worker(&self, org: &OrgId, name: &WorkerName) {
        for version in 1..=u32::try_from(self.limits.worker_versions_kept).unwrap_or(u32::MAX) {
            self.workers.invalidate(&(org.clone(), name.clone(), version));
        }
    }
}

impl GuestLimits {
    /// The operator's bounds, narrowed by the agent's own.
    pub fn of(operator: &Limits, own: &crate::agent::AgentLimits) -> GuestLimits {
        GuestLimits {
            memory_bytes_max: own.memory_bytes_max.unwrap_or(operator.memory_bytes_max).min(operator.memory_bytes_max),
            reply_bytes_max: own.reply_bytes_max.unwrap_or(operator.reply_bytes_max).min(operator.reply_bytes_max),
            snapshot_bytes_max: own
                .snapshot_bytes_max
                .unwrap_or(operator.snapshot_bytes_max)
                .min(operator.snapshot_bytes_max),
            ..GuestLimits::from(operator)
        }
    }
}

impl Registry {
    /// See [`Store::add_usage`].
    pub async fn add_usage(
        &self,
        org: &OrgId,
        agent: &AgentId,
        turn: TurnId,
        usage: &Usage,
        now: Timestamp,
    ) -> Result<bool> {
        self.store.add_usage(org, agent, turn, usage, now).await
    }
}

/// Why a worker was not stored.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// This host would not run it.
    #[error(transparent)]
    Refused(#[from] ModuleRefusal),
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why an agent was not stored.
#[derive(Debug, thiserror::Error)]
pub enum PutAgentError {
    /// A setting is out of bounds.
    #[error(transparent)]
    Invalid(#[from] InvalidSetting),
    /// The store does not answer.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Host {
    /// Validates, compiles and stores a module.
    pub async fn upload_worker(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        wasm: Bytes,
        by: &Actor,
    ) -> std::result::Result<PutWorker, UploadError> {
        let sandbox = &self.dispatch.sandbox;
        let (inspection, digest) = sandbox.inspect_apart(wasm.clone()).await;
        let inspection = inspection?;
        let begun = Instant::now();
        let bytes = wasm.clone();
        if let Err(error) = sandbox.load(org, digest, async || Ok(bytes)).await {
            return Err(match &*error {
                LoadError::Refused(refusal) => UploadError::Refused(refusal.clone()),
                LoadError::Fetch(_) | LoadError::Digest => UploadError::Store(StoreError::Corrupt(error.to_string())),
            });
        }
        let limits = &self.config.limits;
        let put = self
            .store
            .put_worker(
                org,
                worker,
                digest,
                wasm,
                inspection.imports,
                begun.elapsed().as_secs_f64() * 1_000.0,
                limits.org_workers_max,
                limits.worker_versions_kept,
                self.clock.now(),
                by,
            )
            .await?;
        Ok(put)
    }

    /// Deletes a worker that no agent uses.
    pub async fn delete_worker(&self, org: &OrgId, worker: &WorkerName, by: &Actor) -> Result<Deleted> {
        let deleted = self.store.delete_worker(org, worker, self.clock.now(), by).await?;
        self.dispatch.registry.forget_worker(org, worker);
        Ok(deleted)
    }

    /// Checks and stores an agent's settings.
    pub async fn put_agent(
        &self,
        org: &OrgId,
        agent: &AgentId,
        settings: AgentSettings,
        by: &Actor,
    ) -> std::result::Result<PutAgent, PutAgentError> {
        settings.check(&self.config.limits)?;
        if settings.session_mode == SessionMode::File && self.store.shared() {
            return Err(InvalidSetting(NO_FILE_MODE.to_owned()).into());
        }
        let (agents_max, now) = (self.config.limits.org_agents_max, self.clock.now());
        let put = self.store.put_agent(org, agent, settings, agents_max, now, by).await?;
        self.dispatch.registry.forget_agent(org, agent);
        // A bound that was raised may let a turn go that was held.
        Observer::backlog(&self.dispatch);
        Ok(put)
    }

    /// An agent, as it was at most a second ago.
    pub async fn agent(&self, org: &OrgId, agent: &AgentId) -> Result<Option<Arc<Agent>>> {
        self.dispatch.registry.agent(org, agent).await
    }

    /// Deletes an agent that has no conversation.
    pub async fn delete_agent(&self, org: &OrgId, agent: &AgentId, by: &Actor) -> Result<Deleted> {
        let deleted = self.store.delete_agent(org, agent, self.clock.now(), by).await?;
        self.dispatch.registry.forget_agent(org, agent);
        Ok(deleted)
    }
}
