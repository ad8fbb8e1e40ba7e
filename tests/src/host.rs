//! A host in this process, with its gateway on a free port of the loopback interface.

use std::path::Path;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use turnhouse::audit::Actor;
use turnhouse::caller::{Role, Scopes};
use turnhouse::config::Config;
use turnhouse::host::Host;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::store::{LiveCounts, PutMember};
use turnhouse::{http, keys};

use crate::client::Client;
use crate::database::Home;
use crate::tables::Tables;

/// A host of a test.
pub struct TestHost {
    /// The host itself, for what the API does not show.
    pub host: Host,
    /// Where its gateway listens.
    pub url: String,
    config: Config,
    stop: CancellationToken,
    gateway: tokio::task::JoinHandle<()>,
    home: Home,
}

impl TestHost {
    /// A host on a fresh data directory and the chosen store, with small pools.
    pub async fn start() -> TestHost {
        TestHost::start_with(|_| {}).await
    }

    /// A host whose configuration `change` has changed.
    pub async fn start_with(change: impl FnOnce(&mut Config)) -> TestHost {
        let home = Home::new();
        let mut config = Config { data_dir: home.path().join("data"), guest_threads: 2, ..Config::default() };
        if let Some(database) = home.database() {
            config.database_url = Some(database.url());
            config.database_connections = 5;
        }
        config.limits.host_running_max = 32;
        // What runs when a test ends its host is given back half a second later.
        config.limits.drain_timeout_ms = 3_500;
        change(&mut config);
        TestHost::start_in(home, config).await
    }

    async fn start_in(home: Home, config: Config) -> TestHost {
        let host = Host::start(config.clone()).await.expect("the host starts");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let stop = CancellationToken::new();
        let gateway = tokio::spawn(http::serve(host.clone(), listener, stop.clone().cancelled_owned()));
        TestHost { host, url, config, stop, gateway, home }
    }

    /// Where the host keeps its data.
    pub fn data_dir(&self) -> &Path {
        &self.config.data_dir
    }

    /// What its store holds.
    pub fn tables(&self) -> Tables {
        self.home.tables(self.data_dir())
    }

    /// A member of an org with a key of these scopes; the org is made if it is new.
    pub async fn member(&self, org: &str, user: &str, scopes: &str) -> Client {
        let (org, user) = (OrgId::parse(org).expect("an org id"), UserId::parse(user).expect("a user id"));
        let now = self.host.clock.now();
        self.host.store.create_org(&org, &user, now, &Actor::command_line()).await.expect("the org is made");
        let scopes = Scopes::parse(scopes).expect("scopes");
        let key = keys::mint(org.clone(), user.clone(), scopes, "test", None, now);
        assert!(
            self.host.store.create_key(key.hash, &key.record, &Actor::command_line()).await.expect("the key is stored")
        );
        Client::new(&self.url, &key.secret)
    }

    /// Makes a user a member of an org that there is, or gives a member another role.
    pub async fn join(&self, org: &str, user: &str, role: Role) {
        let (org, user) = (OrgId::parse(org).expect("an org id"), UserId::parse(user).expect("a user id"));
        let (now, by) = (self.host.clock.now(), Actor::command_line());
        let put = self.host.store.put_member(&org, &user, role, None, usize::MAX, now, &by).await;
        let put = put.expect("the store answers");
        assert!(matches!(put, PutMember::Stored { .. }), "{put:?}");
    }

    /// Live turns by state.
    pub async fn live(&self) -> LiveCounts {
        self.host.store.live_counts().await.expect("the store answers")
    }

    /// Drains the host, and starts another on the same data.
    pub async fn restart(self) -> TestHost {
        self.restart_after(|_, _| {}).await
    }

    /// The same; what is done to the data directory and to the tables in between is `meanwhile`'s.
    pub async fn restart_after(mut self, meanwhile: impl FnOnce(&Path, Tables)) -> TestHost {
        self.shut_down().await;
        meanwhile(self.data_dir(), self.tables());
        TestHost::start_in(self.home, self.config).await
    }

    /// Waits until nothing is live, drains the host and asserts that it leaves nothing behind: no marker, no slot, no temporary directory, and tables
    /// without a fault.
    pub async fn stop(mut self) {
        crate::eventually("no live turn is left", async || self.live().await == LiveCounts::default()).await;
        self.shut_down().await;
        assert_eq!(self.tables().faults(), Vec::<String>::new());
        let files = self.data_dir().join("files");
        if self.home.database().is_some() {
            assert!(!files.exists(), "private directories need the embedded store");
        } else {
            let temporary = std::fs::read_dir(files.join("temporary")).expect("the host has made it");
            assert_eq!(temporary.count(), 0, "a temporary directory is left");
        }
    }

    async fn shut_down(&mut self) {
        self.stop.cancel();
        self.host.drain().await;
        assert_eq!(self.host.dispatch.slots.in_use(), 0, "a slot is still held");
        assert!(self.host.dispatch.running().is_empty(), "a run is still tracked");
        let _ = tokio::time::timeout(crate::PATIENCE, &mut self.gateway).await.expect("the gateway ends");
    }
}
