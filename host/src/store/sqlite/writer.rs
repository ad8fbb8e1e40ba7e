//! The one connection that writes: its transactions, and what happens to them when something goes wrong.
//!
//! One batch of the journal is one transaction, row by row through cached prepared statements: on SQLite that beats clever SQL once no thread
//! stands between. Two writers on one file would halve the rate. Driven by [`super::SqliteStore`], which holds it behind a fair mutex.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::SyncSender;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode};

use super::counts::{Counts, Stage};
use super::limits::Limited;
use crate::clock::Timestamp;
use crate::ids::{OrgId, ReplicaId};
use crate::quota::Quota;
use crate::store::{StoreError, Write, Written};

/// Pages of the log at which a write checkpoints what the checkpointer has left, so that the log starts anew.
const WAL_PAGES_MAX: i64 = 32_000;
/// Transactions between two wake-ups of the checkpointer.
const CHECKPOINT_EVERY: u32 = 256;

statements! {
    /// What is live, when the store opens.
    LOAD_COUNTS = "-- load_counts
SELECT org_id, state, count(*) FROM turn_markers GROUP BY org_id, state";
}

/// Why a write did not go through.
#[derive(Debug)]
pub(super) enum Fault {
    Sql(rusqlite::Error),
    /// What is stored contradicts itself.
    Corrupt(String),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Fault {
        Fault::Sql(error)
    }
}

pub(super) type Tried<T> = Result<T, Fault>;

impl Fault {
    /// Whether it is the store's trouble and not the item's: then nothing of the batch may stand.
    fn is_everybodys(&self) -> bool {
        use ErrorCode::*;
        match self {
            Fault::Corrupt(_) => false,
            Fault::Sql(error) => matches!(
                error.sqlite_error_code(),
                Some(
                    DiskFull
                        | ReadOnly
                        | SystemIoFailure
                        | CannotOpen
                        | DatabaseBusy
                        | DatabaseLocked
                        | OutOfMemory
                        | NotADatabase
                        | DatabaseCorrupt
                        | PermissionDenied
                        | FileLockingProtocolFailed
                        | NoLargeFileSupport
                )
            ),
        }
    }

    fn text(&self) -> String {
        match self {
            Fault::Sql(error) => error.to_string(),
            Fault::Corrupt(text) => text.clone(),
        }
    }
}

impl From<Fault> for StoreError {
    fn from(fault: Fault) -> StoreError {
        match fault {
            Fault::Corrupt(text) => StoreError::Corrupt(text),
            Fault::Sql(error) => match error.sqlite_error_code() {
                Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => StoreError::Corrupt(error.to_string()),
                Some(ErrorCode::DiskFull) => StoreError::Unavailable("the disk is full; free some space".to_owned()),
                Some(ErrorCode::ReadOnly) => StoreError::Unavailable("the database is read-only".to_owned()),
                _ => StoreError::Unavailable(error.to_string()),
            },
        }
    }
}

/// The writing connection and what it remembers between transactions.
pub(super) struct Writer {
    pub(super) conn: Connection,
    counts: Counts,
    /// The org that was served last.
    cursor: Option<OrgId>,
    snapshots_kept: usize,
    /// For orgs that have no limits of their own.
    quota: Quota,
    checkpointer: SyncSender<()>,
    until_checkpoint: u32,
}

impl Writer {
    /// Opens `file`, which has its schema already.
    pub(super) fn open(file: &Path, snapshots_kept: u32, quota: Quota, checkpointer: SyncSender<()>) -> Tried<Writer> {
        let conn = Connection::open(file)?;
        conn.set_prepared_statement_cache_capacity(128);
        conn.busy_timeout(std::time::Duration::from_secs(5))?;
        conn.pragma_update(None, "journal_mode", "WAL")?;
        conn.pragma_update(None, "synchronous", "FULL")?;
        conn.pragma_update(None, "foreign_keys", false)?;
        conn.pragma_update(None, "temp_store", "MEMORY")?;
        conn.pragma_update(None, "cache_size", -65_536)?;
        // Without it, a statement whose plan a bound value might change is parsed again at every other value: a tenth of this thread's time.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        conn.pragma_update(None, "wal_autocheckpoint", WAL_PAGES_MAX)?;
        let mut counts = Counts::default();
        let mut statement = conn.prepare(LOAD_COUNTS)?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let org: String = row.get(0)?;
            let org = OrgId::parse(&org).map_err(|error| Fault::Corrupt(error.to_string()))?;
            let stage = Stage::parse(row.get_ref(1)?.as_str().unwrap_or_default());
            for _ in 0..row.get::<_, i64>(2)? {
                counts.shift(&org, None, stage);
            }
        }
        drop(rows);
        drop(statement);
        counts.settle();
        let kept = usize::try_from(snapshots_kept.max(1)).unwrap_or(usize::MAX);
        Ok(Writer {
            conn,
            counts,
            cursor: None,
            snapshots_kept: kept,
            quota,
            checkpointer,
            until_checkpoint: CHECKPOINT_EVERY,
        })
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Runs `work` as one durable transaction, or leaves no trace of it.
    pub(super) fn transaction<T>(&mut self, now: Timestamp, work: impl FnOnce(&mut Tx<'_>) -> Tried<T>) -> Tried<T> {
        if !self.conn.is_autocommit() {
            // The last one ended in a panic, or could not even be rolled back.
            self.counts.undo_to(0);
            self.conn.execute_batch("ROLLBACK")?;
        }
        self.conn.execute_batch("BEGIN IMMEDIATE")?;
        let cursor = self.cursor.clone();
        let mut tx = Tx {
            conn: &self.conn,
            counts: &mut self.counts,
            cursor: &mut self.cursor,
            snapshots_kept: self.snapshots_kept,
            quota: self.quota,
            now,
            holder: None,
            older_ready: None,
            limited: RefCell::default(),
        };
        let done =
            work(&mut tx).and_then(|value| self.conn.execute_batch("COMMIT").map(|()| value).map_err(Fault::from));
        match done {
            Ok(value) => {
                self.counts.settle();
                self.until_checkpoint -= 1;
                if self.until_checkpoint == 0 {
                    self.until_checkpoint = CHECKPOINT_EVERY;
                    // Full: it is at work, and will find this too.
                    let _ = self.checkpointer.try_send(());
                }
                Ok(value)
            }
            Err(fault) => {
                self.counts.undo_to(0);
                self.cursor = cursor;
                // SQLite ends the transaction itself after some errors. Where this fails, the next one begins with it.
                if !self.conn.is_autocommit() {
                    self.conn.execute_batch("ROLLBACK")?;
                }
                Err(fault)
            }
        }
    }

    /// One batch of the journal: one transaction, an answer an item.
    pub(super) fn write(&mut self, batch: &[Write], now: Timestamp) -> Tried<Vec<Written>> {
        let tried = self.transaction(now, |tx| batch.iter().map(|item| tx.item(item)).collect());
        match tried {
            Err(fault) if !fault.is_everybodys() => {
                tracing::warn!(
                    error = fault.text(),
                    items = batch.len(),
                    "an item broke its batch; writing each on its own"
                );
                self.write_each(batch, now)
            }
            tried => tried,
        }
    }

    /// The same batch with a savepoint an item, so that the one which fails, fails alone (R7). Still one transaction: where the store itself
    /// gives way, nothing of it stands. Savepoints are not free, hence only here.
    fn write_each(&mut self, batch: &[Write], now: Timestamp) -> Tried<Vec<Written>> {
        self.transaction(now, |tx| {
            let mut answers = Vec::with_capacity(batch.len());
            for item in batch {
                tx.conn.execute_batch("SAVEPOINT item")?;
                let mark = tx.counts.mark();
                match tx.item(item) {
                    Ok(answer) => answers.push(answer),
                    Err(fault) if fault.is_everybodys() => return Err(fault),
                    Err(fault) => {
                        tx.conn.execute_batch("ROLLBACK TO item")?;
                        tx.counts.undo_to(mark);
                        tx.older_ready = None;
                        tx.limited.take();
                        answers.push(Written::Failed(fault.text()));
                    }
                }
                tx.conn.execute_batch("RELEASE item")?;
            }
            Ok(answers)
        })
    }
}

/// An open transaction. What it does is in the modules named for it: `accept`, `claim`, `commit`, `running`, `conversations`, `catalog`, `limits`.
pub(super) struct Tx<'w> {
    pub(super) conn: &'w Connection,
    pub(super) counts: &'w mut Counts,
    pub(super) cursor: &'w mut Option<OrgId>,
    pub(super) snapshots_kept: usize,
    /// For orgs that have no limits of their own.
    pub(super) quota: Quota,
    pub(super) now: Timestamp,
    /// The holder that was asked about last, and whether it may claim. Nobody else writes meanwhile, so the answer stays true.
    pub(super) holder: Option<(ReplicaId, bool)>,
    /// Whether something older is ready for a slot; `None`: to be looked up.
    pub(super) older_ready: Option<bool>,
    /// Orgs' own limits and meters, as this transaction has read and moved them.
    pub(super) limited: RefCell<HashMap<OrgId, Limited>>,
}

impl Tx<'_> {
    fn item(&mut self, item: &Write) -> Tried<Written> {
        Ok(match item {
            Write::Accept(accept) => Written::Accept(self.accept(accept)?),
            Write::Claim(request) => Written::Claim(self.claim(request)?),
            Write::Append(append) => Written::Append(self.append(append, false)?),
            Write::BeginEffect(append) => Written::Append(self.append(append, true)?),
            Write::Commit(commit) => Written::Commit(self.end_turn(commit)?),
            Write::Requeue(requeue) => Written::Requeue(self.requeue(requeue)?),
        })
    }

    /// A marker moves, comes or goes.
    pub(super) fn shift(&mut self, org: &OrgId, from: Option<Stage>, to: Option<Stage>) {
        self.counts.shift(org, from, to);
        // What becomes ready, or makes room for what was, can be older than the next that comes in.
        if to == Some(Stage::Ready) || from == Some(Stage::Running) {
            self.older_ready = None;
        }
    }
}
