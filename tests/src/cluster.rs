//! Several replicas in this process on one store, each with a gateway of its own; any of them can be drained, killed, or cut off from the store.

use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use turnhouse::audit::Actor;
use turnhouse::caller::Scopes;
use turnhouse::clock::Clock;
use turnhouse::config::Config;
use turnhouse::host::Host;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::store::postgres::{PostgresOptions, PostgresStore};
use turnhouse::store::sqlite::{SqliteOptions, SqliteStore};
use turnhouse::store::{LiveCounts, Store};
use turnhouse::{http, keys};

use crate::client::{Client, Turn};
use crate::database::{Backing, Database, Home};
use crate::faulty::{Faulty, Network};

/// How its replicas are to be.
pub struct Setup {
    /// On what they keep what they must remember.
    pub backing: Backing,
    /// Whether writes are told to the others at once.
    pub hints: bool,
    /// Whether the store tells its time. If not, each replica goes by its own clock.
    pub tells_time: bool,
    /// By how much the clock of each replica is wrong.
    pub skews_ms: Vec<i64>,
    /// Changes every replica's configuration.
    pub change: fn(&mut Config),
}

impl Default for Setup {
    fn default() -> Setup {
        Setup { backing: Backing::chosen(), hints: false, tells_time: true, skews_ms: Vec::new(), change: |_| {} }
    }
}

/// Replicas on one store.
pub struct Cluster {
    /// In the order in which they were started; those that have ended stay.
    pub replicas: Vec<Replica>,
    store: Arc<dyn Store>,
    hints: Option<broadcast::Sender<turnhouse::store::Hint>>,
    setup: Setup,
    home: Home,
}

/// One of them.
pub struct Replica {
    /// The host itself.
    pub host: Host,
    /// Where its gateway listens.
    pub url: String,
    /// The store as it meets it.
    pub store: Arc<Faulty>,
    stop: CancellationToken,
    gateway: JoinHandle<()>,
    /// It was drained or killed.
    pub ended: bool,
}

impl Cluster {
    /// So many replicas on a fresh store.
    pub async fn start(replicas: usize) -> Cluster {
        Cluster::start_with(replicas, Setup::default()).await
    }

    /// The same, set up otherwise.
    pub async fn start_with(replicas: usize, setup: Setup) -> Cluster {
        let home = Home::on(setup.backing);
        let store: Arc<dyn Store> = match home.database() {
            Some(database) => Arc::new(open(database, false).await),
            None => {
                let options = SqliteOptions::new(home.path().join("data"));
                Arc::new(SqliteStore::open(options).await.expect("the store opens"))
            }
        };
        let hints = setup.hints.then(|| broadcast::Sender::new(1_024));
        let mut cluster = Cluster { replicas: Vec::new(), store, hints, setup, home };
        for _ in 0..replicas {
            cluster.add().await;
        }
        cluster
    }

    /// One more replica; its index.
    pub async fn add(&mut self) -> usize {
        self.add_with(|_| {}).await
    }

    /// The same with settings of its own.
    pub async fn add_with(&mut self, change: impl FnOnce(&mut Config)) -> usize {
        let index = self.replicas.len();
        let data_dir = self.home.path().join(format!("replica-{index}"));
        std::fs::create_dir_all(&data_dir).expect("a directory");
        let mut config = Config { data_dir, guest_threads: 1, ..Config::default() };
        config.limits.host_running_max = 16;
        config.limits.drain_timeout_ms = 3_500;
        config.limits.cancel_poll_ms = 250;
        // Short, and long enough for a machine that is busy with other tests.
        (config.limits.lease_ttl_ms, config.limits.lease_renew_ms, config.limits.lease_margin_ms) = (3_000, 500, 1_000);
        (self.setup.change)(&mut config);
        change(&mut config);
        let tells_time = self.setup.tells_time;
        let store = Arc::new(match self.home.database() {
            Some(database) => Faulty::shared(Arc::new(open(database, self.setup.hints).await), tells_time),
            None => Faulty::embedded(self.store.clone(), self.hints.clone(), tells_time),
        });
        let clock = match self.setup.skews_ms.get(index) {
            Some(skew) => Clock::following(turnhouse::clock::Timestamp(Clock::system().now().0 + skew)),
            None => Clock::system(),
        };
        let host = Host::start_on(config, store.clone(), clock).await.expect("the host starts");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let stop = CancellationToken::new();
        let gateway = tokio::spawn(http::serve(host.clone(), listener, stop.clone().cancelled_owned()));
        self.replicas.push(Replica { host, url, store, stop, gateway, ended: false });
        index
    }

    /// A member of an org, as a client of the first replica.
    pub async fn member(&self, org: &str, user: &str, scopes: &str) -> Client {
        let (org, user) = (OrgId::parse(org).expect("an org id"), UserId::parse(user).expect("a user id"));
        let now = Clock::system().now();
        self.store.create_org(&org, &user, now, &Actor::command_line()).await.expect("the org is made");
        let key = keys::mint(org, user, Scopes::parse(scopes).expect("scopes"), "test", None, now);
        assert!(self.store.create_key(key.hash, &key.record, &Actor::command_line()).await.expect("the key is stored"));
        Client::new(&self.replicas[0].url, &key.secret)
    }

    /// The same client at another replica.
    pub fn at(&self, replica: usize, client: &Client) -> Client {
        Client::new(&self.replicas[replica].url, &client.key)
    }

    /// The same turn at another replica.
    pub fn turn_at(&self, replica: usize, turn: &Turn) -> Turn {
        Turn { client: self.at(replica, &turn.client), id: turn.id.clone() }
    }

    /// Live turns by state, of all replicas.
    pub async fn live(&self) -> LiveCounts {
        self.store.live_counts().await.expect("the store answers")
    }

    /// The store itself, as nobody's network bends it.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Changes what becomes of a replica's calls.
    pub fn network(&self, replica: usize, network: Network) {
        self.replicas[replica].store.set(network);
    }

    /// Which replica runs this turn.
    pub fn runner_of(&self, turn: &Turn) -> Option<usize> {
        let id = turn.id.parse().expect("a turn id");
        let runs = |replica: &Replica| !replica.ended && replica.host.dispatch.tracked(id).is_some();
        self.replicas.iter().position(runs)
    }

    /// Waits until somebody runs it; who. Mostly the replica that accepted it, and on a busy machine whoever was faster.
    pub async fn started(&self, turn: &Turn) -> usize {
        crate::eventually("somebody runs it", async || self.runner_of(turn).is_some()).await;
        self.runner_of(turn).expect("it runs")
    }

    /// Ends a replica as SIGTERM does.
    pub async fn drain(&mut self, replica: usize) {
        let replica = &mut self.replicas[replica];
        replica.ended = true;
        replica.host.drain().await;
        replica.stop.cancel();
        replica.gateway.abort();
        assert!(replica.host.dispatch.running().is_empty(), "a run is still tracked");
        // The process ends here. A claim that a store which hangs never answered held its slots until then.
        replica.store.set(Network::Gone);
        crate::eventually("no slot is held", async || replica.host.dispatch.slots.in_use() == 0).await;
    }

    /// Ends a replica as `kill -9` does: its connections break off, and the store hears nothing more of it.
    pub async fn kill(&mut self, replica: usize) {
        let replica = &mut self.replicas[replica];
        replica.ended = true;
        replica.store.set(Network::Gone);
        replica.gateway.abort();
        replica.host.abandon().await;
        // Its machine's connections to the store end with it.
        replica.store.close().await;
    }

    /// Waits until nothing is live, drains every replica that is left, and looks for faults in the tables and for what was forgotten in memory.
    pub async fn stop(mut self) {
        crate::eventually("no live turn is left", async || self.live().await == LiveCounts::default()).await;
        for replica in 0..self.replicas.len() {
            if self.replicas[replica].ended {
                continue;
            }
            self.network(replica, Network::Fine);
            let dispatch = self.replicas[replica].host.dispatch.clone();
            crate::eventually("no ended turn is kept", async || dispatch.live.is_empty()).await;
            self.drain(replica).await;
        }
        self.store.close().await;
        assert_eq!(self.home.tables(&self.home.path().join("data")).faults(), Vec::<String>::new());
    }

    /// The database, where the store is PostgreSQL.
    pub fn database(&self) -> Option<&Database> {
        self.home.database()
    }
}

async fn open(database: &Database, hints: bool) -> PostgresStore {
    PostgresStore::open(PostgresOptions { hints, ..database.options() }).await.expect("the store opens")
}
