//! The embedded store: one SQLite file in the data directory, nothing to install, one host at a time.
//!
//! Writes go through one rusqlite connection behind a fair mutex ([`writer`]): the journal calls it from its own thread, everything else from
//! tokio's blocking threads. Reads and migrations go through sqlx, so that both databases share the tool. Nothing but this directory knows SQL.

use std::fs::{DirBuilder, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::FairMutex;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use sqlx::{ConnectOptions, Connection as _};

use self::writer::{Tried, Tx, Writer};
use super::{Result, StoreError};
use crate::clock::Timestamp;
use crate::limits::Limits;
use crate::quota::Quota;

mod accept;
mod agent_load;
mod attachments;
mod audit;
mod catalog;
mod checkpoint;
mod claim;
mod commit;
mod conversations;
mod counts;
mod erase;
mod facade;
mod keys;
mod limits;
mod members;
mod orgs;
mod reads;
mod retention;
mod running;
mod standing;
mod sweep;
mod whole;
mod writer;

#[cfg(test)]
mod tests;

static MIGRATIONS: Migrator = sqlx::migrate!("../migrations/sqlite");

const DATABASE: &str = "turnhouse.db";
const LOCK: &str = "turnhouse.lock";

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct SqliteOptions {
    /// Where the database is. Made when it does not exist, for its owner alone.
    pub data_dir: PathBuf,
    /// Snapshots of a conversation that keep their bytes.
    pub snapshots_kept: u32,
    /// Connections that read.
    pub readers: u32,
    /// For orgs that have no limits of their own.
    pub quota: Quota,
}

impl SqliteOptions {
    /// The usual bounds in this directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> SqliteOptions {
        SqliteOptions {
            data_dir: data_dir.into(),
            snapshots_kept: 10,
            readers: 4,
            quota: Quota::from(&Limits::default()),
        }
    }
}

/// The embedded store.
pub struct SqliteStore {
    writer: Arc<FairMutex<Option<Writer>>>,
    /// One write outside the journal at a time: however many of them wait, and whoever sends them, the journal waits for one (O5).
    changes: Arc<tokio::sync::Mutex<()>>,
    readers: SqlitePool,
    checkpointer: checkpoint::Checkpointer,
    /// For orgs that have no limits of their own.
    quota: Quota,
    /// The database.
    file: PathBuf,
    /// Held for the store's life: another host would take this one for dead. `None` beside the host that holds it.
    lock: Option<File>,
}

impl SqliteStore {
    /// Opens or makes the database in `options.data_dir` and brings its schema up to date.
    pub async fn open(options: SqliteOptions) -> Result<SqliteStore> {
        let lock = make_and_lock(&options.data_dir)?;
        migrate(&options.data_dir.join(DATABASE)).await?;
        SqliteStore::connect(options, Some(lock)).await
    }

    /// Opens it for orgs and keys, also beside the host that uses it: their writes are short, and no host keeps them in memory for long. Turns
    /// are that host's alone, who counts them: [`Store::write`](super::Store::write) and the deletion of conversations are refused then. Agents
    /// and workers must not be written through it either: a running host caches those.
    pub async fn open_admin(options: SqliteOptions) -> Result<SqliteStore> {
        let file = options.data_dir.join(DATABASE);
        match make_and_lock(&options.data_dir) {
            Ok(lock) => {
                migrate(&file).await?;
                SqliteStore::connect(options, Some(lock)).await
            }
            Err(StoreError::InUse(_)) => {
                // Its schema is its host's to change.
                check_schema(&file).await?;
                SqliteStore::connect(options, None).await
            }
            Err(error) => Err(error),
        }
    }

    /// Opens connections to a database that has its schema.
    async fn connect(options: SqliteOptions, lock: Option<File>) -> Result<SqliteStore> {
        let file = options.data_dir.join(DATABASE);
        let checkpointer = checkpoint::Checkpointer::start(&file)?;
        let wake = checkpointer.wake();
        let (path, kept, quota) = (file.clone(), options.snapshots_kept, options.quota);
        let writer = blocking(move || Writer::open(&path, kept, quota, wake)).await??;
        let readers = SqlitePoolOptions::new()
            .max_connections(options.readers.max(1))
            .acquire_timeout(Duration::from_secs(10))
            .connect_with(
                SqliteConnectOptions::new()
                    .filename(&file)
                    .read_only(true)
                    .busy_timeout(Duration::from_secs(5))
                    .foreign_keys(false)
                    .disable_statement_logging(),
            )
            .await
            .map_err(|error| opening(&file, error))?;
        let (writer, changes) = (Arc::new(FairMutex::new(Some(writer))), Arc::default());
        Ok(SqliteStore { writer, changes, readers, checkpointer, quota, file, lock })
    }

    /// Only the host that holds the lock counts what is live.
    fn owns_turns(&self) -> Result<()> {
        match self.lock {
            Some(_) => Ok(()),
            None => Err(StoreError::InUse(
                "a running turnhouse owns the turns of this database; ask it over HTTP".to_owned(),
            )),
        }
    }

    /// One write outside the journal, on a thread that may block.
    async fn write_with<T, F>(&self, now: Timestamp, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&mut Tx<'_>) -> Tried<T> + Send + 'static,
    {
        let alone = Arc::clone(&self.changes).lock_owned().await;
        let writer = Arc::clone(&self.writer);
        blocking(move || {
            // Here, so that it is held until the write is done, also when nobody waits for it any more.
            let _alone = alone;
            Ok(writer.lock().as_mut().ok_or_else(closed)?.transaction(now, work)?)
        })
        .await?
    }
}

fn closed() -> StoreError {
    StoreError::Unavailable("the store is closed".to_owned())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| StoreError::Unavailable(error.to_string()))
}

/// Makes the directory, for its owner alone, and takes its lock.
fn make_and_lock(dir: &Path) -> Result<File> {
    let unavailable = |error: std::io::Error| {
        let why = match error.kind() {
            // Not found: a file system that makes no directories says that.
            ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied | ErrorKind::NotFound => {
                "cannot be written; make it writable or name another".to_owned()
            }
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                "is on a full disk; free some space or name another".to_owned()
            }
            ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "is not a directory; name another".to_owned(),
            _ => format!("cannot be made or used: {error}; name one that is writable"),
        };
        StoreError::Unavailable(format!("data directory {} {why}", dir.display()))
    };
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir).map_err(unavailable)?;
    let lock = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK)).map_err(unavailable)?;
    match lock.try_lock() {
        Ok(()) => {
            // Before SQLite makes it with everybody's rights: the directory may be an older one that others can enter.
            let mut database = File::options();
            database.create(true).truncate(false).write(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut database, 0o600);
            database.open(dir.join(DATABASE)).map_err(unavailable)?;
            Ok(lock)
        }
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(format!(
            "another turnhouse uses {}; stop it or name another data directory",
            dir.display()
        ))),
        Err(TryLockError::Error(error)) => Err(unavailable(error)),
    }
}

/// Brings the schema up to date, or says that it is newer than this program.
async fn migrate(file: &Path) -> Result<()> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .foreign_keys(false)
        .busy_timeout(Duration::from_secs(5))
        .disable_statement_logging();
    let mut connection = sqlx::SqliteConnection::connect_with(&options).await.map_err(|error| opening(file, error))?;
    let known = schema_known();
    let migrated = MIGRATIONS.run(&mut connection).await;
    connection.close().await.map_err(|error| opening(file, error))?;
    match migrated {
        Ok(()) => Ok(()),
        Err(MigrateError::VersionMissing(found) | MigrateError::VersionTooNew(found, _)) => {
            Err(StoreError::NewerSchema { found, known })
        }
        Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) => Err(opening(file, error)),
        Err(other) => Err(StoreError::Corrupt(format!("{}: {other}", file.display()))),
    }
}

/// Whether the schema is exactly this program's, without changing anything.
async fn check_schema(file: &Path) -> Result<()> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .read_only(true)
        .busy_timeout(Duration::from_secs(5))
        .disable_statement_logging();
    let mut connection = sqlx::SqliteConnection::connect_with(&options).await.map_err(|error| opening(file, error))?;
    let found: i64 = sqlx::query_scalar("SELECT coalesce(max(version), 0) FROM _sqlx_migrations")
        .fetch_one(&mut connection)
        .await
        .map_err(|error| opening(file, error))?;
    connection.close().await.map_err(|error| opening(file, error))?;
    let known = schema_known();
    match found.cmp(&known) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(StoreError::NewerSchema { found, known }),
        std::cmp::Ordering::Less => Err(StoreError::InUse(format!(
            "an older turnhouse uses {}; stop it, or use that version's program",
            file.display()
        ))),
    }
}

/// The newest migration of this program.
fn schema_known() -> i64 {
    MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// What a person can do about a database that does not open.
fn opening(file: &Path, error: sqlx::Error) -> StoreError {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code).unwrap_or_default().into_owned();
    let file = file.display();
    // Extended codes carry the primary one in their low byte.
    match code.parse::<i32>().map_or(0, |code| code & 0xff) {
        8 => StoreError::Unavailable(format!("{file} is read-only; make it and its directory writable")),
        11 => StoreError::Corrupt(format!("{file} is damaged; restore it from a backup")),
        13 => StoreError::Unavailable(format!("the disk of {file} is full; free some space")),
        14 => StoreError::Unavailable(format!("{file} cannot be opened; make it and its directory writable")),
        26 => StoreError::Corrupt(format!("{file} is not a database; move it away or name another data directory")),
        _ => StoreError::Unavailable(format!("{file}: {error}")),
    }
}
