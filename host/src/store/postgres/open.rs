//! Opens the database: what its URL says, what stands between, whether the server will do, and its schema brought up to date. What is in the way is said so
//! that a person can do something about it.

use std::str::FromStr;
use std::sync::LazyLock;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgDatabaseError};
use sqlx::{ConnectOptions as _, Connection as _, PgConnection, Row as _};

use super::{ACQUIRE_TIMEOUT, Route, SETTINGS, STATEMENT_TIMEOUT, silent};
use crate::store::{Result, StoreError};

pub(super) static MIGRATIONS: LazyLock<Migrator> = LazyLock::new(|| {
    let mut migrations = sqlx::migrate!("../migrations/postgres");
    // Its lock belongs to a session; ours to the transaction. What a newer program has added is judged by `schema_compat`.
    migrations.set_locking(false).set_ignore_missing(true);
    migrations
});

/// Begins a change of the schema.
pub(super) const MIGRATING: &str = "BEGIN; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = '60s'; SET LOCAL lock_timeout = '60s'";

/// The oldest server whose features are used.
const SERVER_MIN: i64 = 15;

/// What a URL says, and whether it says that it is a pooler's.
pub(super) fn read_url(url: &str) -> Result<(PgConnectOptions, bool)> {
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

/// Takes `pgbouncer=…` out of a URL: other programs' way to say it, which sqlx does not know.
pub(super) fn without_pooler(url: &str) -> (String, bool) {
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
pub(super) async fn connect(
    base: PgConnectOptions,
    said_pooled: bool,
) -> Result<(PgConnection, Route, PgConnectOptions)> {
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

pub(super) async fn attempt(options: &PgConnectOptions) -> Result<PgConnection, sqlx::Error> {
    tokio::time::timeout(ACQUIRE_TIMEOUT, options.connect()).await.unwrap_or_else(|_| Err(silent()))
}

fn is_unsupported_parameter(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    error.code().as_deref() == Some("08P01") && error.message().contains("startup parameter")
}

/// Whether it is a server that will do.
pub(super) async fn check_server(options: &PgConnectOptions, connection: &mut PgConnection) -> Result<()> {
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
pub(super) async fn migrate(
    options: &PgConnectOptions,
    connection: &mut PgConnection,
    route: Route,
    migrations: &Migrator,
) -> Result<()> {
    let failed = |error: sqlx::Error| opening(options, &error);
    if is_migrated(connection, migrations).await.map_err(failed)? {
        return check_compat(connection, migrations).await.map_err(failed)?;
    }
    let mut tx = connection.begin_with(MIGRATING).await.map_err(failed)?;
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
pub(super) fn schema_known() -> i64 {
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
pub(super) fn place(options: &PgConnectOptions) -> String {
    let host = match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => options.get_host().to_owned(),
    };
    let database = options.get_database().unwrap_or_else(|| options.get_username());
    format!("{host}:{}/{database}", options.get_port())
}

/// What a migration of ours advises.
fn hint(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?.hint()
}

/// What a person can do about a database that does not open.
pub(super) fn opening(options: &PgConnectOptions, error: &sqlx::Error) -> StoreError {
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
        // A schema that a role may not use is none for it.
        (_, "42501" | "3F000") => format!(
            "user {user} may not do that at {place}: {error}; {}",
            hint(error).unwrap_or("run turnhouse migrate as the role that owns the tables, and GRANT turnhouse_tenant, turnhouse_host to the hosts' role")
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
