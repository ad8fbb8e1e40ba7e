//! One host, assembled: what the gateway and the command line act on, and how it starts and stops.

use std::sync::Arc;

use crate::clock::Clock;
use crate::config::Config;
use crate::ids::{AgentId, ConversationId, OrgId, TurnId};
use crate::store::{Store, StoreError};
use crate::turn::{CancelledBy, TurnState};

/// A running host. Cheap to clone.
#[derive(Clone)]
pub struct Host(Arc<Inner>);

/// What a host is made of.
pub struct Inner {
    /// Its configuration.
    pub config: Config,
    /// Its time.
    pub clock: Clock,
    /// What it remembers.
    pub store: Arc<dyn Store>,
}

impl std::ops::Deref for Host {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Host {
    /// Opens the store, makes the sandbox, claims what an earlier incarnation left, and begins to run turns.
    pub async fn start(_config: Config) -> anyhow::Result<Host> {
        anyhow::bail!("not assembled")
    }

    /// Whether it takes new turns: not while it drains, nor when its store does not answer or its ticker stands still. The error says why.
    pub async fn ready(&self) -> Result<(), String> {
        Err("not assembled".to_owned())
    }

    /// Whether it is draining.
    pub fn draining(&self) -> bool {
        false
    }

    /// Ends a turn now; what state it has then. A turn that has ended stays as it is (T8). `None`: there is no such turn.
    pub async fn cancel(&self, _org: &OrgId, _turn: TurnId, _by: CancelledBy) -> Result<Option<TurnState>, StoreError> {
        Ok(None)
    }

    /// Deletes a conversation with its history and snapshots, ending its live turns.
    pub async fn delete_conversation(
        &self,
        _org: &OrgId,
        _agent: &AgentId,
        _conversation: &ConversationId,
    ) -> Result<(), StoreError> {
        Ok(())
    }

    /// Stops claiming, finishes or gives back what runs, within `drain_timeout_ms`; then closes the store.
    pub async fn drain(&self) {}
}
