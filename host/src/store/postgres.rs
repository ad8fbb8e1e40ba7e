//! The shared store: PostgreSQL, for any number of hosts on one database.
//!
//! Each intention is one statement that commits by itself; what needs several steps under a lock is a function of the database
//! (`migrations/postgres`). Only rare administration opens a transaction from here. No connection is held while a guest runs.
//!
//! Functions that run a statement say in their name for whom: `…_of` for one org, behind the wall (`wall.rs`); `…_hostwide` for all of them, before it.
//!
//! It works behind a pooler that gives every transaction another connection: nothing is left in a session, and there is no statement that must
//! outlive its transaction. Such a pooler is noticed when the store opens ([`Route`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgPool, PgPoolOptions, PgRow};
use sqlx::query::Query;
use sqlx::{Connection as _, PgConnection, Postgres};

use self::ask::staged;
use self::open::{MIGRATIONS, attempt, check_server, connect, migrate, read_url};
use super::Result;
use crate::clock::Timestamp;
#[cfg(test)]
use crate::ids::OrgId;
use crate::limits::Limits;
use crate::quota::Quota;

mod ask;
mod attachments;
mod audit;
mod catalog;
mod conversations;
mod erase;
mod facade;
mod hints;
mod keys;
mod limits;
mod members;
mod open;
mod orgs;
mod reads;
mod retention;
mod standing;
mod sweep;
mod wall;
mod whole;
mod writer;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod torture;

/// How long a statement may take, and how long it waits for a lock, in the server.
const STATEMENT_TIMEOUT: &str = "10s";
/// How long an answer may take to arrive: a connection that says nothing for so long is given up. Longer than any statement.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a caller waits for a connection, and a new connection for its server.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection that has idled for longer is tried before it is used: the server may have restarted meanwhile.
const TRUSTED_IDLE: Duration = Duration::from_secs(1);
/// Between two attempts at a server that is just coming back.
const CONNECT_AGAIN: Duration = Duration::from_millis(100);

/// What every session or, behind a pooler, every transaction runs under. A host that stops in the midst of a transaction must not hold its locks for
/// long; planning the larger statements costs more than running them.
const SETTINGS: [(&str, &str); 6] = [
    ("statement_timeout", STATEMENT_TIMEOUT),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "2s"),
    ("plan_cache_mode", "force_generic_plan"),
    ("jit", "off"),
    ("synchronous_commit", "on"),
];
/// The same for one transaction, in the one message that begins it.
const BEGIN: &str = "BEGIN; SET LOCAL statement_timeout = '10s'; SET LOCAL lock_timeout = '5s'; \
    SET LOCAL idle_in_transaction_session_timeout = '2s'; SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL jit = off; \
    SET LOCAL synchronous_commit = on";
/// For what sends large bodies in the midst of a transaction.
const BEGIN_LARGE: &str = "BEGIN; SET LOCAL statement_timeout = '60s'; SET LOCAL lock_timeout = '5s'; \
    SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL synchronous_commit = on";

/// Where the time comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The database, the same for all hosts: `now` of the callers is left aside.
    Database,
    /// The callers' `now`: for tests in virtual time.
    Passed,
}

impl Clock {
    /// What a statement takes for its time; `None` lets the database take its own.
    pub(super) fn of(self, now: Timestamp) -> Option<i64> {
        match self {
            Clock::Database => None,
            Clock::Passed => Some(now.0),
        }
    }
}

/// How a store is opened.
#[derive(Clone)]
pub struct PostgresOptions {
    /// `postgres://user:password@host:port/database?sslmode=…`. `pgbouncer=true` says that a pooler in transaction mode stands between, should it not
    /// be noticed.
    pub url: String,
    /// Snapshots of a conversation that keep their bytes.
    pub snapshots_kept: u32,
    /// For orgs that have no limits of their own.
    pub quota: Quota,
    /// Connections at most.
    pub connections: u32,
    /// Where the time comes from.
    pub clock: Clock,
    /// Whether other hosts are told what is written, and heard.
    pub hints: bool,
    /// The same database past any pooler, for hearing the other hosts: `url` where that is no pooler's.
    pub listen_url: Option<String>,
}

impl PostgresOptions {
    /// The usual bounds on this database.
    pub fn new(url: impl Into<String>) -> PostgresOptions {
        PostgresOptions {
            url: url.into(),
            snapshots_kept: 10,
            quota: Quota::from(&Limits::default()),
            connections: 10,
            clock: Clock::Database,
            hints: false,
            listen_url: None,
        }
    }
}

impl std::fmt::Debug for PostgresOptions {
    /// Without the URL, which may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresOptions")
            .field("snapshots_kept", &self.snapshots_kept)
            .field("connections", &self.connections)
            .field("clock", &self.clock)
            .finish_non_exhaustive()
    }
}

/// What stands between the host and the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// Nothing: a connection is a session, with its settings and its prepared statements.
    Direct,
    /// A pooler. What a statement needs must be in its own transaction.
    Pooled,
}

/// The shared store.
pub struct PostgresStore {
    pool: PgPool,
    route: Route,
    clock: Clock,
    snapshots_kept: i32,
    quota: Quota,
    hot: Mutex<writer::Hot>,
    /// The journal's alone, not the pool's: the journal's thread drives a runtime of its own while it writes, and a connection lives with the runtime
    /// that opened it. Anybody else who got it from a pool would wait for that thread's next batch.
    journal: tokio::sync::Mutex<Option<(PgConnection, Instant)>>,
    connect: PgConnectOptions,
    broke: Arc<Broke>,
    hints: Option<hints::Hints>,
    /// Held while the table of live turns is vacuumed.
    vacuuming: Arc<tokio::sync::Mutex<()>>,
    /// Another org than a statement's own, whose wall it shall meet.
    #[cfg(test)]
    walled_as: Mutex<Option<OrgId>>,
}

/// When a session last broke off. A restart ends all of them: whatever has not been used since is tried before it is used, so that one statement fails
/// of it and not one a connection.
#[derive(Default)]
struct Broke(Mutex<Option<Instant>>);

impl Broke {
    fn note(&self, error: &sqlx::Error) {
        if !leaves_the_session(error) {
            self.note_now();
        }
    }

    fn note_now(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    /// Until when a server that has just gone is waited for. That it has been away for longer is no reason to make everybody wait.
    fn patience(&self) -> Option<Instant> {
        self.0.lock().map(|at| at + ACQUIRE_TIMEOUT)
    }

    /// Whether what has idled for so long may be used as it is.
    fn trusts(&self, idle: Duration) -> bool {
        idle <= TRUSTED_IDLE && self.0.lock().is_none_or(|at| idle < at.elapsed())
    }
}

/// A statement with its values.
type Asked<'q> = Query<'q, Postgres, PgArguments>;

impl PostgresStore {
    /// Connects, brings the schema up to date, or says what is in the way.
    pub async fn open(options: PostgresOptions) -> Result<PostgresStore> {
        PostgresStore::open_with(options, &MIGRATIONS, false).await
    }

    /// The same as the role that owns the tables; mends the wall between orgs where roles, grants or policies of it are missing.
    pub async fn migrate(options: PostgresOptions) -> Result<PostgresStore> {
        PostgresStore::open_with(options, &MIGRATIONS, true).await
    }

    /// The same with other migrations: those of another release.
    async fn open_with(options: PostgresOptions, migrations: &Migrator, mends: bool) -> Result<PostgresStore> {
        let (base, said_pooled) = read_url(&options.url)?;
        let (mut connection, route, connect) = connect(base, said_pooled).await?;
        let opened = async {
            check_server(&connect, &mut connection).await?;
            migrate(&connect, &mut connection, route, migrations).await?;
            wall::check(&connect, &mut connection, mends).await
        };
        let opened = opened.await;
        let _ = connection.close().await;
        opened?;
        if route == Route::Pooled {
            tracing::info!("a pooler stands before the database; every statement runs in a transaction of its own");
        }
        let broke = Arc::new(Broke::default());
        let trusted = Arc::clone(&broke);
        let pool = PgPoolOptions::new()
            .max_connections(options.connections.max(1))
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .before_acquire(move |connection, meta| {
                let trusted = trusted.trusts(meta.idle_for);
                Box::pin(async move {
                    if !trusted {
                        connection.ping().await?;
                    }
                    Ok(true)
                })
            })
            .connect_lazy_with(connect.clone());
        let listen = match &options.listen_url {
            Some(url) => Some(read_url(url)?.0),
            // Behind a pooler nobody can listen: then readers look for themselves.
            None => (route == Route::Direct).then(|| connect.clone()),
        };
        let hints = listen.filter(|_| options.hints).map(|listen| hints::Hints::start(pool.clone(), route, listen));
        Ok(PostgresStore {
            hints,
            vacuuming: Arc::default(),
            pool,
            route,
            clock: options.clock,
            snapshots_kept: i32::try_from(options.snapshots_kept).unwrap_or(i32::MAX),
            quota: options.quota,
            hot: Mutex::default(),
            journal: tokio::sync::Mutex::default(),
            connect,
            broke,
            #[cfg(test)]
            walled_as: Mutex::default(),
        })
    }

    /// Whether other hosts are heard.
    fn hears(&self) -> bool {
        self.hints.is_some()
    }

    /// A statement that is still to be given its values. Prepared for the session's life only where there is a session.
    fn query(&self, sql: &'static str) -> Asked<'static> {
        sqlx::query(sql).persistent(self.route == Route::Direct)
    }

    /// The rows of a statement of the journal, over its own connection: a batch is of many orgs. `then`: the statement that works with what `asked`
    /// only lays down, see [`staged`].
    async fn rows_for_journal(&self, asked: Asked<'_>, then: Option<&'static str>) -> Result<Vec<PgRow>, sqlx::Error> {
        let mut kept = self.journal.lock().await;
        if self.pool.is_closed() {
            return Err(sqlx::Error::PoolClosed);
        }
        // Taken: if this is dropped in its midst, the connection goes with it.
        let mut connection = match kept.take() {
            Some((connection, used)) if self.broke.trusts(used.elapsed()) => connection,
            Some((mut connection, _)) => match tokio::time::timeout(ACQUIRE_TIMEOUT, connection.ping()).await {
                Ok(Ok(())) => connection,
                _ => {
                    self.broke.note_now();
                    self.reconnect().await?
                }
            },
            None => self.reconnect().await?,
        };
        let answered = async {
            match then {
                None => asked.fetch_all(&mut connection).await,
                Some(then) => staged(&mut connection, asked, then).await,
            }
        };
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, answered).await;
        let rows = answered.unwrap_or_else(|_| Err(silent()));
        match rows.as_ref().err().filter(|error| !leaves_the_session(error)) {
            None => *kept = Some((connection, Instant::now())),
            Some(error) => self.broke.note(error),
        }
        rows
    }

    /// A connection for the journal. While the server restarts it is waited for: nothing was asked yet, so that it can be tried again. Once a statement
    /// has been sent, nobody here knows what became of it; then its callers do what they do for a lost answer.
    async fn reconnect(&self) -> Result<PgConnection, sqlx::Error> {
        let patience = self.broke.patience();
        loop {
            match attempt(&self.connect).await {
                Err(error)
                    if is_passing(&error)
                        && patience.is_some_and(|until| Instant::now() < until)
                        && !self.pool.is_closed() =>
                {
                    tokio::time::sleep(CONNECT_AGAIN).await;
                }
                done => return done,
            }
        }
    }
}

/// Whether the session goes on after this error: the statement's own, not the server's end or the network's.
fn leaves_the_session(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| !code.starts_with("57P") && !code.starts_with("08"))
}

/// Whether a server that is restarting says this to whoever connects, or nobody does because it is not there yet.
fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => error.code().as_deref() == Some("57P03"),
        sqlx::Error::Io(error) => {
            use std::io::ErrorKind::{ConnectionRefused, ConnectionReset, NotFound};
            matches!(error.kind(), ConnectionRefused | ConnectionReset | NotFound)
        }
        _ => false,
    }
}

fn silent() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "the database does not answer"))
}

/// Milliseconds as the database counts them; small enough that a sum with a time is still a bigint.
fn millis(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX).min(1 << 52)
}
