//! One host, assembled: what the gateway and the command line act on, and how it starts and stops.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::audit::Actor;
use crate::caller::Credential;
use crate::clock::{Clock, Timestamp};
use crate::config::Config;
use crate::dispatch::Dispatch;
use crate::events::{Bounds, LiveTurns};
use crate::ids::{AgentId, ConversationId, OrgId, ReplicaId, TurnId, UserId};
use crate::journal::{Journal, Observer as _};
use crate::keys::{Authenticator, Bearer};
use crate::oidc::Issuers;
use crate::private_dirs::PrivateDirs;
use crate::quota::Quota;
use crate::registry::Registry;
use crate::sandbox::{CacheConfig, Sandbox, SandboxConfig};
use crate::store::postgres::{PostgresOptions, PostgresStore};
use crate::store::sqlite::{SqliteOptions, SqliteStore};
use crate::store::{Store, StoreError};
use crate::turn::{CancelledBy, Outcome, TurnState};
use crate::{erase, replica, supervisor, sweep, tidy, watch};

/// How long the guests' threads may take to end.
const GUESTS_LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// How long a client waits for a write to be answered before it is told that the store is not there. The write may yet happen.
pub const STORE_PATIENCE: Duration = Duration::from_secs(10);

/// How long a probe waits.
const PING_WITHIN: Duration = Duration::from_secs(2);

/// How long one word to the store may take while the host ends.
const WORD_WITHIN: Duration = Duration::from_secs(1);

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
    /// What it runs.
    pub dispatch: Arc<Dispatch>,
    /// Whose keys it knows.
    pub keys: Arc<Authenticator>,
    /// What goes on beside the turns.
    tasks: TaskTracker,
    /// Ends `tasks`.
    stop: CancellationToken,
}

impl std::ops::Deref for Host {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Host {
    /// Opens the store that the configuration names, the embedded one in the data directory or the shared one, and starts on it.
    pub async fn start(config: Config) -> anyhow::Result<Host> {
        let snapshots_kept = config.limits.snapshots_kept;
        let quota = Quota::from(&config.limits);
        let store: Arc<dyn Store> = match &config.database_url {
            Some(url) => {
                let options = PostgresOptions {
                    snapshots_kept,
                    quota,
                    connections: config.database_connections,
                    hints: true,
                    listen_url: config.database_listen_url.as_ref().map(|url| url.as_str().to_owned()),
                    ..PostgresOptions::new(url.as_str())
                };
                Arc::new(PostgresStore::open(options).await?)
            }
            None => {
                let options = SqliteOptions { snapshots_kept, quota, ..SqliteOptions::new(&config.data_dir) };
                Arc::new(SqliteStore::open(options).await?)
            }
        };
        Host::start_on(config, store, Clock::system()).await
    }

    /// A host on this store, which other hosts may use, too: makes the sandbox, takes up what an earlier incarnation left, and begins to run turns.
    /// Where the store has a time of its own, the host goes by that instead of `clock`. Draining closes the store.
    pub async fn start_on(config: Config, store: Arc<dyn Store>, clock: Clock) -> anyhow::Result<Host> {
        let limits = Arc::new(config.limits.clone());
        let clock = store.time().await?.map_or(clock, Clock::following);
        let sandbox = Sandbox::new(&sandbox_config(&config)).context("the sandbox could not be made")?;

        // After the store: whoever has that has the directory.
        let private_dirs = if store.shared() {
            None
        } else {
            let dirs = PrivateDirs::open(&config.data_dir, &limits, store.clone());
            Some(dirs.context("the directory of private directories cannot be used")?)
        };

        let (replica, registered) = (ReplicaId::new(), Instant::now());
        store.register_replica(replica, clock.now(), limits.lease_ttl_ms).await?;
        // Elsewhere the others live; what they leave is taken over once they have expired.
        if !store.shared() && store.expire_other_replicas(replica, clock.now()).await? > 0 {
            tracing::info!("an earlier host ended without draining; its turns are taken up again");
        }

        let (journal, pending) = Journal::new();
        let bounds = Bounds {
            batch_ms: limits.delta_batch_ms,
            batch_bytes: limits.delta_batch_bytes,
            buffer_bytes_max: limits.reader_buffer_bytes_max,
        };
        let (live, flush) = LiveTurns::new(bounds, journal.clone());
        let registry = Arc::new(Registry::new(store.clone(), limits.clone()));
        let dispatch = Dispatch::new(
            journal,
            live,
            registry,
            sandbox,
            private_dirs,
            limits,
            clock.clone(),
            replica,
            store.shared(),
        );
        pending.run(store.clone(), clock.clone(), dispatch.clone())?;

        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let issuers = Arc::new(Issuers::new(&config.oidc).context("an issuer of tokens cannot be used")?);
        let keys = Authenticator::new(store.clone(), clock.clone(), &config.limits, issuers.clone());
        let keys = Arc::new(keys);
        keys.tickets.prepare().await?;
        let background = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            let stop = stop.clone();
            tasks.spawn(async move { stop.run_until_cancelled_owned(task).await });
        };
        background(Box::pin(flush));
        background(Box::pin(dispatch.clone().claim_ready()));
        background(Box::pin(supervisor::supervise(dispatch.clone(), tasks.clone())));
        background(Box::pin(sweep::sweep(dispatch.clone(), store.clone())));
        background(Box::pin(tidy::tidy(dispatch.clone(), store.clone())));
        background(Box::pin(tidy::measure(dispatch.clone(), store.clone())));
        background(Box::pin(erase::erase(dispatch.clone(), store.clone())));
        background(Box::pin(replica::renew(dispatch.clone(), store.clone(), registered)));
        background(Box::pin(replica::follow_time(dispatch.clone(), store.clone())));
        background(Box::pin(replica::drop_stale(dispatch.clone(), store.clone())));
        background(Box::pin(watch::keep_watch(dispatch.watch.clone(), store.clone())));
        background(Box::pin(issuers.keep_fresh()));
        if let Some(hints) = store.hints() {
            background(Box::pin(dispatch.clone().hear(hints)));
        }
        if let Some(dirs) = dispatch.private_dirs.clone() {
            background(Box::pin(dirs.sweep()));
        }
        dispatch.slots.note_backlog();
        Ok(Host(Arc::new(Inner { config, clock, store, dispatch, keys, tasks, stop })))
    }

    /// Whether it takes new turns: not while it drains, nor when its store does not answer or its ticker stands still. The error says why.
    pub async fn ready(&self) -> Result<(), String> {
        if self.draining() {
            return Err("draining".to_owned());
        }
        if !self.dispatch.sandbox.ticker_alive() {
            return Err("the epoch ticker stands still; restart the host".to_owned());
        }
        match tokio::time::timeout(PING_WITHIN, self.store.ping()).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_late) => Err(format!("the store does not answer within {PING_WITHIN:?}")),
        }
    }

    /// Whether it is draining.
    pub fn draining(&self) -> bool {
        self.dispatch.draining()
    }

    /// When a key ends that was used, if that is soon: whoever uses it should be told. Tokens end soon by their nature.
    pub fn key_ends_soon(&self, who: &Bearer) -> Option<Timestamp> {
        let soon = self.clock.now().plus_ms(self.config.limits.key_warning_ms());
        who.expires_at.filter(|at| matches!(who.by, Credential::Key { .. }) && *at <= soon)
    }

    /// Ends a turn now; what state it has then. A turn that has ended stays as it is (T8). `None`: there is no such turn.
    pub async fn cancel(&self, org: &OrgId, turn: TurnId, by: CancelledBy) -> Result<Option<TurnState>, StoreError> {
        let end = self.dispatch.end(org.clone(), turn, None, Outcome::Cancelled { by });
        match tokio::time::timeout(STORE_PATIENCE, end).await {
            Ok(true) => return Ok(Some(TurnState::Cancelled)),
            Ok(false) => {}
            Err(_late) => return Err(no_answer()),
        }
        Ok(self.store.turn(org, turn).await?.map(|turn| turn.for_host().state))
    }

    /// Deletes a conversation with its history, snapshots and private directory, ending its live turns. `false`: it is not there, or not `whose`.
    pub async fn delete_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        let ended = self.store.delete_conversation(org, agent, conversation, whose, self.clock.now(), by).await?;
        let Some(ended) = ended else { return Ok(false) };
        ended.iter().for_each(|ended| self.dispatch.ended(ended));
        self.forget_directory(org, agent, conversation).await;
        Ok(true)
    }

    /// Starts a conversation's state anew: its chain of snapshots, and its private directory. Its turns stay. `false`: it is not there, or not `whose`.
    pub async fn reset_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        by: &Actor,
    ) -> Result<bool, StoreError> {
        let there = self.store.reset_snapshot(org, agent, conversation, whose, self.clock.now(), by).await?;
        if there {
            self.forget_directory(org, agent, conversation).await;
        }
        Ok(there)
    }

    /// Nobody finds the directory any more; that it leaves the disk waits for the guest that may still use it, here for a while and then
    /// beside us.
    async fn forget_directory(&self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) {
        let Some(dirs) = self.dispatch.private_dirs.clone() else { return };
        let forget = dirs.forget(org.clone(), agent.clone(), conversation.clone());
        let forgotten = self.tasks.spawn(self.stop.clone().run_until_cancelled_owned(forget));
        let _ = tokio::time::timeout(Duration::from_millis(self.dispatch.limits.cancel_poll_ms), forgotten).await;
    }

    /// Stops claiming, finishes or gives back what runs, within `drain_timeout_ms`; then closes the store. A store that does not answer delays
    /// none of it for long.
    pub async fn drain(&self) {
        let (store, replica) = (&self.store, self.dispatch.replica());
        let told = tokio::time::timeout(WORD_WITHIN, store.drain_replica(replica));
        let (told, ()) = tokio::join!(told, self.dispatch.drain());
        if !matches!(told, Ok(Ok(()))) {
            tracing::warn!("the store could not be told of the drain");
        }
        let give_back = async {
            let held = self.dispatch.settle_claims(&**store, &[]).await?;
            self.dispatch.settle_claims(&**store, &held).await
        };
        if !matches!(tokio::time::timeout(WORD_WITHIN, give_back).await, Ok(Ok(_))) {
            tracing::warn!("what the store says this host holds could not be looked up; it is taken over from here");
        }
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        if !matches!(tokio::time::timeout(WORD_WITHIN, self.keys.record_last_use()).await, Ok(Ok(()))) {
            tracing::warn!("the last use of keys was not recorded");
        }
        if !matches!(tokio::time::timeout(WORD_WITHIN, store.retire_replica(replica)).await, Ok(Ok(()))) {
            tracing::warn!("the replica's row stays until it expires");
        }
        self.end_guests().await;
        let _ = tokio::time::timeout(WORD_WITHIN, store.close()).await;
    }

    /// Ends as a crash does, for tests: everything stops at once, and the store hears nothing of it.
    pub async fn abandon(&self) {
        self.stop.cancel();
        self.dispatch.step_down();
        self.tasks.close();
        self.end_guests().await;
    }

    async fn end_guests(&self) {
        let sandbox = self.dispatch.sandbox.clone();
        let _ = tokio::task::spawn_blocking(move || sandbox.shutdown(GUESTS_LEAVE_WITHIN)).await;
    }
}

fn no_answer() -> StoreError {
    StoreError::Unavailable(format!("no answer within {STORE_PATIENCE:?}"))
}

/// The sandbox that a configuration asks for: compiled modules live in the data directory, their key beside them and not among them.
pub fn sandbox_config(config: &Config) -> SandboxConfig {
    let cache = CacheConfig {
        directory: config.data_dir.join("modules"),
        key_file: config.data_dir.join("modules.key"),
        bytes_max: config.limits.cache_bytes_max,
    };
    let mut sandbox = SandboxConfig {
        cache: Some(cache),
        compiler: config.compiler.clone(),
        memory_keep_resident_bytes: config.keep_resident_bytes,
        ..SandboxConfig::new(config.limits.clone())
    };
    if config.guest_threads > 0 {
        sandbox.threads = config.guest_threads;
    }
    sandbox
}
