//! The shared store: PostgreSQL, for any number of hosts on one database.
//!
//! Each intention is one statement that commits by itself; what needs several steps under a lock is a function of the database
//! (`migrations/postgres`). Only rare administration opens a transaction from here. No connection is held while a guest runs.
//!
//! It works behind a pooler that gives every transaction another connection: nothing is left in a session, and there is no statement that must
//! outlive its transaction. Such a pooler is noticed when the store opens ([`Route`]).

use std::str::FromStr;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgArguments, PgConnectOptions, PgPool, PgPoolOptions, PgQueryResult, PgRow};
use sqlx::query::Query;
use sqlx::{ConnectOptions as _, Connection as _, PgConnection, Postgres, Row as _, Transaction};

use super::{Result, StoreError};
use crate::clock::Timestamp;

mod catalog;
mod conversations;
mod facade;
mod hints;
mod keys;
mod reads;
mod retention;
mod standing;
mod sweep;
mod writer;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod torture;

static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrations = sqlx::migrate!("../migrations/postgres");
    // Its lock belongs to a session; ours to the transaction. What a newer program has added is judged by `schema_compat`.
    migrations.set_locking(false).set_ignore_missing(true);
    migrations
});

/// The oldest server whose features are used.
const SERVER_MIN: i64 = 15;
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
    hot: Mutex<writer::Hot>,
    /// The journal's alone, not the pool's: the journal's thread drives a runtime of its own while it writes, and a connection lives with the runtime
    /// that opened it. Anybody else who got it from a pool would wait for that thread's next batch.
    journal: tokio::sync::Mutex<Option<(PgConnection, Instant)>>,
    connect: PgConnectOptions,
    broke: Arc<Broke>,
    hints: Option<hints::Hints>,
    /// Held while the table of live turns is vacuumed.
    vacuuming: Arc<tokio::sync::Mutex<()>>,
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
        PostgresStore::open_with(options, &MIGRATIONS).await
    }

    /// The same with other migrations: those of another release.
    async fn open_with(options: PostgresOptions, migrations: &Migrator) -> Result<PostgresStore> {
        let (base, said_pooled) = read_url(&options.url)?;
        let (mut connection, route, connect) = connect(base, said_pooled).await?;
        let opened = async {
            check_server(&connect, &mut connection).await?;
            migrate(&connect, &mut connection, route, migrations).await
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
            hot: Mutex::default(),
            journal: tokio::sync::Mutex::default(),
            connect,
            broke,
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

    /// The rows of one statement, which commits by itself.
    async fn rows(&self, asked: Asked<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        match tokio::time::timeout(ANSWER_TIMEOUT, rows(self.route, &mut connection, asked)).await {
            Ok(rows) => rows.inspect_err(|error| self.broke.note(error)),
            Err(_) => {
                // Nobody knows what will still come over it.
                drop(connection.detach());
                Err(silent())
            }
        }
    }

    /// The same for the journal, over its own connection.
    async fn rows_for_journal(&self, asked: Asked<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
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
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, rows(self.route, &mut connection, asked)).await;
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

    /// The first row of one statement, if there is one.
    async fn row(&self, asked: Asked<'_>) -> Result<Option<PgRow>, sqlx::Error> {
        Ok(self.rows(asked).await?.into_iter().next())
    }

    /// The one row of a statement that always has one.
    async fn one(&self, asked: Asked<'_>) -> Result<PgRow, sqlx::Error> {
        self.row(asked).await?.ok_or(sqlx::Error::RowNotFound)
    }

    /// How many rows one statement changed, which commits by itself.
    async fn change(&self, asked: Asked<'_>) -> Result<u64, sqlx::Error> {
        let mut connection = self.pool.acquire().await?;
        let answered = tokio::time::timeout(ANSWER_TIMEOUT, async {
            match self.route {
                Route::Direct => asked.execute(&mut *connection).await,
                Route::Pooled => {
                    let mut tx = connection.begin_with(BEGIN).await?;
                    let done = asked.execute(&mut *tx).await?;
                    tx.commit().await?;
                    Ok(done)
                }
            }
        });
        match answered.await {
            Ok(done) => {
                let done = done.inspect_err(|error| self.broke.note(error));
                done.map(|done: PgQueryResult| done.rows_affected())
            }
            Err(_) => {
                drop(connection.detach());
                Err(silent())
            }
        }
    }

    /// A transaction, for administration alone.
    async fn begin(&self, begin: &'static str) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        self.pool.begin_with(begin).await
    }
}

async fn rows(route: Route, connection: &mut PgConnection, asked: Asked<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
    match route {
        Route::Direct => asked.fetch_all(connection).await,
        Route::Pooled => {
            let mut tx = connection.begin_with(BEGIN).await?;
            let rows = asked.fetch_all(&mut *tx).await?;
            tx.commit().await?;
            Ok(rows)
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

/// What a URL says, and whether it says that it is a pooler's.
fn read_url(url: &str) -> Result<(PgConnectOptions, bool)> {
    let (url, pooled) = without_pooler(url);
    // The parser's error is left out: it might repeat parts of the URL.
    let read = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
    let read = read.then(|| PgConnectOptions::from_str(&url).ok()).flatten();
    let base = read.ok_or_else(|| {
        StoreError::Unavailable(
            "the database's URL cannot be read; write postgres://user:password@host:5432/database, with special characters of the \
             password percent-encoded"
                .to_owned(),
        )
    })?;
    let base = base.extra_float_digits(None).disable_statement_logging();
    let base = if base.get_application_name().is_some() { base } else { base.application_name("turnhouse") };
    Ok((base, pooled))
}

/// Milliseconds as the database counts them; small enough that a sum with a time is still a bigint.
fn millis(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX).min(1 << 52)
}

/// Takes `pgbouncer=…` out of a URL: other programs' way to say it, which sqlx does not know.
fn without_pooler(url: &str) -> (String, bool) {
    let Some((address, parameters)) = url.split_once('?') else { return (url.to_owned(), false) };
    let mut pooled = false;
    let kept: Vec<&str> = parameters
        .split('&')
        .filter(|parameter| match parameter.strip_prefix("pgbouncer=") {
            Some(value) => {
                pooled = matches!(value, "true" | "1");
                false
            }
            None => true,
        })
        .collect();
    (if kept.is_empty() { address.to_owned() } else { format!("{address}?{}", kept.join("&")) }, pooled)
}

/// The first connection, what it goes through, and how all others are made.
///
/// A session takes its settings as it starts. A pooler for transactions either refuses them or leaves them out, because its sessions are not ours:
/// that is how it is noticed.
async fn connect(base: PgConnectOptions, said_pooled: bool) -> Result<(PgConnection, Route, PgConnectOptions)> {
    let pooled = base.clone().statement_cache_capacity(0);
    if !said_pooled {
        let direct = base.options(SETTINGS);
        match attempt(&direct).await {
            Ok(mut connection) => {
                let row = sqlx::raw_sql("SELECT current_setting('statement_timeout')").fetch_one(&mut connection).await;
                let set: String = row.and_then(|row| row.try_get(0)).map_err(|error| opening(&direct, &error))?;
                if set == STATEMENT_TIMEOUT {
                    return Ok((connection, Route::Direct, direct));
                }
                let _ = connection.close().await;
            }
            Err(error) if is_unsupported_parameter(&error) => {}
            Err(error) => return Err(opening(&direct, &error)),
        }
    }
    match attempt(&pooled).await {
        Ok(connection) => Ok((connection, Route::Pooled, pooled)),
        Err(error) => Err(opening(&pooled, &error)),
    }
}

async fn attempt(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(ACQUIRE_TIMEOUT, options.connect()).await.unwrap_or_else(|_| Err(silent()))
}

fn is_unsupported_parameter(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    error.code().as_deref() == Some("08P01") && error.message().contains("startup parameter")
}

/// Whether it is a server that will do.
async fn check_server(options: &PgConnectOptions, connection: &mut PgConnection) -> Result<()> {
    let row = sqlx::raw_sql(
        "SELECT current_setting('server_version_num'), current_setting('server_version'), pg_is_in_recovery()::text",
    )
    .fetch_one(connection)
    .await;
    let facts = row.and_then(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)));
    let (number, version, standby): (String, String, String) = facts.map_err(|error| opening(options, &error))?;
    let number: i64 = number.parse().unwrap_or(0);
    let place = place(options);
    if number < SERVER_MIN * 10_000 {
        return Err(StoreError::Unavailable(format!(
            "the PostgreSQL at {place} is version {version}; use {SERVER_MIN} or newer"
        )));
    }
    if standby == "true" {
        return Err(StoreError::Unavailable(format!("the PostgreSQL at {place} is a standby; name the primary")));
    }
    Ok(())
}

/// Brings the schema up to date in one transaction, one host at a time, or says that it is too new for this program.
async fn migrate(
    options: &PgConnectOptions,
    connection: &mut PgConnection,
    route: Route,
    migrations: &Migrator,
) -> Result<()> {
    let failed = |error: sqlx::Error| opening(options, &error);
    if is_migrated(connection, migrations).await.map_err(failed)? {
        return check_compat(connection, migrations).await.map_err(failed)?;
    }
    let begin = "BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL lock_timeout = '60s'";
    let mut tx = connection.begin_with(begin).await.map_err(failed)?;
    // Waits for another host that is at it. Ends with the transaction: behind a pooler there is no session to hold it.
    let lock = sqlx::raw_sql("SELECT pg_advisory_xact_lock(8787, hashtext(current_schema()))");
    lock.execute(&mut *tx).await.map_err(failed)?;
    // Its statements have names, which another client of the pooler may have left behind in this server's session.
    let forget = (route == Route::Pooled).then_some("DEALLOCATE ALL");
    if let Some(forget) = forget {
        sqlx::raw_sql(forget).execute(&mut *tx).await.map_err(failed)?;
    }
    // Hosts at work hold locks for milliseconds. A change of a table that cannot get its lock must not make them queue behind it.
    sqlx::raw_sql("SET LOCAL lock_timeout = '5s'").execute(&mut *tx).await.map_err(failed)?;
    match migrations.run_direct(None, &mut *tx, false).await {
        Ok(()) => {}
        Err(MigrateError::Execute(error)) => return Err(failed(error)),
        Err(MigrateError::ExecuteMigration(error, version)) => {
            return Err(match opening(options, &error) {
                StoreError::Unavailable(why) => StoreError::Unavailable(format!("migration {version}: {why}")),
                other => other,
            });
        }
        Err(MigrateError::VersionMismatch(version)) => {
            return Err(StoreError::Corrupt(format!(
                "migration {version} of the database at {} is another than this program's; use the program that made it",
                place(options)
            )));
        }
        Err(other) => return Err(StoreError::Corrupt(format!("{}: {other}", place(options)))),
    }
    check_compat(&mut tx, migrations).await.map_err(failed)??;
    if let Some(forget) = forget {
        sqlx::raw_sql(forget).execute(&mut *tx).await.map_err(failed)?;
    }
    tx.commit().await.map_err(failed)
}

/// Whether all of this program's migrations are there. Without changing anything: the role of a host need not own the schema.
async fn is_migrated(connection: &mut PgConnection, migrations: &Migrator) -> Result<bool, sqlx::Error> {
    let table = sqlx::raw_sql("SELECT to_regclass('_sqlx_migrations')::text").fetch_one(&mut *connection).await?;
    if table.try_get::<Option<String>, _>(0)?.is_none() {
        return Ok(false);
    }
    let rows = sqlx::raw_sql("SELECT version, encode(checksum, 'hex') FROM _sqlx_migrations WHERE success")
        .fetch_all(&mut *connection)
        .await?;
    let applied = rows
        .iter()
        .map(|row| Ok((row.try_get::<i64, _>(0)?, row.try_get::<String, _>(1)?)))
        .collect::<Result<Vec<_>, sqlx::Error>>()?;
    let same = |migration: &sqlx::migrate::Migration| {
        let checksum = hex::encode(&migration.checksum);
        applied.iter().any(|(version, found)| *version == migration.version && *found == checksum)
    };
    Ok(migrations.iter().all(same))
}

/// The newest migration that this program knows.
fn schema_known() -> i64 {
    newest(&MIGRATIONS)
}

fn newest(migrations: &Migrator) -> i64 {
    migrations.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// Whether this program may work on a schema that a newer one has brought further.
async fn check_compat(connection: &mut PgConnection, migrations: &Migrator) -> Result<Result<()>, sqlx::Error> {
    let row = sqlx::raw_sql("SELECT oldest_supported FROM schema_compat").fetch_one(connection).await?;
    let found: i64 = row.try_get(0)?;
    let known = newest(migrations);
    Ok(if found > known { Err(StoreError::NewerSchema { found, known }) } else { Ok(()) })
}

/// Where it is, without the password.
fn place(options: &PgConnectOptions) -> String {
    let host = match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => options.get_host().to_owned(),
    };
    let database = options.get_database().unwrap_or_else(|| options.get_username());
    format!("{host}:{}/{database}", options.get_port())
}

/// What a person can do about a database that does not open.
fn opening(options: &PgConnectOptions, error: &sqlx::Error) -> StoreError {
    let (place, user) = (place(options), options.get_username());
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code).unwrap_or_default();
    // A pooler has one code for whatever is wrong.
    let said = error.as_database_error().filter(|_| code == "08P01").map(|error| error.message().to_owned());
    let code = match said.as_deref() {
        Some(said) if said.contains("does not exist") || said.contains("no such database") => "3D000",
        Some(said) if said.contains("authentication failed") || said.contains("no such user") => "28P01",
        _ => &*code,
    };
    let text = match (error, code) {
        (sqlx::Error::Io(error), _) => format!(
            "cannot connect to PostgreSQL at {place}: {error}; is it running there, and does a firewall let this host through?"
        ),
        (sqlx::Error::Tls(error), _) => {
            format!("no TLS with PostgreSQL at {place}: {error}; see sslmode and sslrootcert in the database's URL")
        }
        (_, "28P01" | "28000") => {
            format!(
                "PostgreSQL at {place} refuses user {user}; check user and password in the database's URL, and the server's pg_hba.conf"
            )
        }
        (_, "3D000") => format!("there is no such database at {place}; make it, with CREATE DATABASE or createdb"),
        (_, "42501") => format!(
            "user {user} may not do that at {place}: {error}; GRANT it ALL on the database's schema, or let a role that may start turnhouse once"
        ),
        (_, "53300") => {
            format!("PostgreSQL at {place} has no connection left; raise its max_connections or give the hosts fewer")
        }
        (_, "55P03" | "57014") => {
            format!("PostgreSQL at {place} was too busy to change the schema: {error}; try again")
        }
        (_, "57P03") => format!("PostgreSQL at {place} is starting up or shutting down; try again"),
        _ => format!("PostgreSQL at {place}: {error}"),
    };
    StoreError::Unavailable(text)
}
