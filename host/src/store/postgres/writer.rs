//! The hot path: a batch of the journal is one call of the function `write_batch`, one message that commits by itself. What the function
//! decides, and under which locks, is told in `migrations/postgres/0002_functions.sql`; here items become its arguments
//! (`items.rs`) and its rows answers (`answers.rs`).

use std::time::Duration;

use sqlx::Row as _;
use sqlx::postgres::PgRow;
use sqlx::types::Json;

pub(super) use self::answers::refusal;
use self::answers::{answer, odd};
use self::items::{Bodies, describe};
use super::{PostgresStore, Route};
use crate::clock::Timestamp;
use crate::store::{AcceptResult, CommitResult, Result, Write, Written};

mod answers;
mod items;

/// How often a batch is tried again that the database gave up for another's sake (a deadlock, a lock held too long).
const TRIES: u32 = 4;

/// What one host's writer remembers between batches. Only hints: the database decides.
#[derive(Debug, Default)]
pub(super) struct Hot {
    /// The org that its claims served last.
    pub(super) cursor: Option<String>,
    /// Live turns of all orgs: as last counted, and moved by what this host has written since.
    pub(super) live: i64,
    /// For how long what is to be written gathers before it is sent.
    pub(super) gather: Duration,
}

/// A batch that comes so much before its lock is free wastes nothing, and one that comes late does.
const EARLY: Duration = Duration::from_micros(300);
/// More is never gathered for: then the lock is held by something else than another host's batches.
const GATHER_MAX: Duration = Duration::from_millis(8);

/// For how long to gather next time, if the last batch gathered for `gather` and then waited for `waited`. Half of what it waited too long is added, so
/// that hosts which take turns find their places; where nothing was waited for, it soon is no more.
fn gather_next(gather: Duration, waited: Duration) -> Duration {
    if waited < EARLY {
        let less = gather * 3 / 4;
        return if less < EARLY { Duration::ZERO } else { less };
    }
    (gather + (waited - EARLY) / 2).min(GATHER_MAX)
}

const WRITE_BATCH: &str = "SELECT * FROM write_batch($1::bigint, $2::text[], $3::jsonb, $4::bytea[], $5::int, $6::bigint, $7::text, \
     $8::float8, $9::int, $10::bigint, $11::bigint)";

/// The same in two steps, behind a pooler, where a batch is a transaction of several messages: a host that stops between two of them, or whose network is
/// slow, must not keep all others from an org's row.
const STAGE_BATCH: &str = "SELECT set_config('turnhouse.orgs', $2::text[]::text, true), set_config('turnhouse.items', $3::jsonb::text, true), \
     set_config('turnhouse.bodies', $4::bytea[]::text, true), set_config('turnhouse.bounds', \
     jsonb_build_array($1::bigint, $5::int, $6::bigint, $7::text, $8::float8, $9::int, $10::bigint, $11::bigint)::text, true)";
const WRITE_STAGED: &str = "SELECT w.* FROM (SELECT current_setting('turnhouse.bounds')::jsonb AS b) AS staged, \
     write_batch((b ->> 0)::bigint, current_setting('turnhouse.orgs')::text[], current_setting('turnhouse.items')::jsonb, \
     current_setting('turnhouse.bodies')::bytea[], (b ->> 1)::int, (b ->> 2)::bigint, b ->> 3, (b ->> 4)::float8, (b ->> 5)::int, \
     (b ->> 6)::bigint, (b ->> 7)::bigint) AS w; COMMIT";

impl PostgresStore {
    /// One batch of the journal: an answer an item.
    pub(super) async fn write_batch(&self, batch: Vec<Write>, now: Timestamp) -> Result<Vec<Written>> {
        let mut answers = Vec::with_capacity(batch.len());
        // Parts of the batch that are still to be written, the next one last. An item that breaks its part is found by halving, and fails alone.
        let mut parts = vec![&batch[..]];
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            match self.call(part, now).await {
                Ok(written) => {
                    if let Some(hints) = &self.hints {
                        hints.after(part, &written);
                    }
                    answers.extend(written);
                }
                Err(error) if is_an_items(&error) => {
                    let why = error.to_string();
                    if let [_alone] = part {
                        answers.push(Written::Failed(why));
                        continue;
                    }
                    tracing::warn!(error = why, items = part.len(), "an item broke its batch; writing its halves");
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(answers)
    }

    /// Tried again where the database gave it up for another's sake: nothing of it was written then.
    async fn call(&self, batch: &[Write], now: Timestamp) -> Result<Vec<Written>, sqlx::Error> {
        let mut tries = 1;
        loop {
            match self.call_once(batch, now).await {
                Err(sqlx::Error::Database(error))
                    if tries < TRIES && matches!(error.code().as_deref(), Some("40001" | "40P01" | "55P03")) =>
                {
                    tracing::warn!(%error, "a batch gave way to another; trying again");
                    tries += 1;
                }
                done => return done,
            }
        }
    }

    async fn call_once(&self, batch: &[Write], now: Timestamp) -> Result<Vec<Written>, sqlx::Error> {
        let mut bodies = Bodies::default();
        let items = describe(batch, &mut bodies)?;
        let mut orgs: Vec<&str> = items.iter().filter_map(|item| item.org).collect();
        orgs.sort_unstable();
        orgs.dedup();
        let bodies: Vec<&[u8]> = bodies.0.iter().map(|body| &body[..]).collect();
        let (cursor, live) = {
            let hot = self.hot.lock();
            (hot.cursor.clone(), hot.live)
        };
        let (statement, then) = match self.route {
            Route::Direct => (WRITE_BATCH, None),
            Route::Pooled => (STAGE_BATCH, Some(WRITE_STAGED)),
        };
        let asked = self
            .query(statement)
            .bind(self.clock.of(now))
            .bind(orgs)
            .bind(Json(&items))
            .bind(bodies)
            .bind(self.snapshots_kept)
            .bind(live)
            .bind(cursor)
            .bind(self.quota.submits_per_second)
            .bind(i32::try_from(self.quota.submit_burst).unwrap_or(i32::MAX))
            .bind(bigint(self.quota.cpu_ms_per_hour))
            .bind(bigint(self.quota.storage_bytes_max));
        // Those of a run come as they were decided; those of one item in order.
        let mut rows: Vec<Vec<PgRow>> = batch.iter().map(|_| Vec::new()).collect();
        let mut waited = Duration::ZERO;
        for row in self.rows_for_journal(asked, then).await? {
            if row.try_get::<&str, _>("kind")? == "waited" {
                waited = Duration::from_micros(u64::try_from(row.try_get::<i64, _>("at")?).unwrap_or(0));
                metrics::histogram!("turnhouse_store_lock_wait_seconds").record(waited);
                continue;
            }
            let place = usize::try_from(row.try_get::<i32, _>("ord")?).ok().and_then(|ord| ord.checked_sub(1));
            let own = place.and_then(|place| rows.get_mut(place));
            own.ok_or_else(|| odd("an answer names no item of its batch"))?.push(row);
        }
        let mut answers = Vec::with_capacity(batch.len());
        let (mut came, mut served) = (0, None);
        for (item, own) in batch.iter().zip(&rows) {
            let answer = answer(item, own)?;
            came += moved(&answer);
            if let Written::Claim(claimed) = &answer
                && let Some(last) = claimed.last()
            {
                served = Some(last.lease.org.as_str().to_owned());
            }
            answers.push(answer);
        }
        let mut hot = self.hot.lock();
        hot.live = hot.live.saturating_add(came).max(0);
        hot.gather = gather_next(hot.gather, waited);
        if served.is_some() {
            hot.cursor = served;
        }
        Ok(answers)
    }
}

/// By how many live turns an answer changes their number.
fn moved(answer: &Written) -> i64 {
    match answer {
        Written::Accept(AcceptResult::Accepted { interrupted, .. }) => 1 - bigint(interrupted.len()),
        Written::Commit(CommitResult::Won(_)) => -1,
        _ => 0,
    }
}

/// Whether the item is to blame and not the database: data that it cannot hold, or a constraint that is broken.
fn is_an_items(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| ["22", "23", "P0"].iter().any(|class| code.starts_with(class)))
        }
        sqlx::Error::Encode(_) | sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } => true,
        _ => false,
    }
}

pub(super) fn bigint(of: impl TryInto<i64>) -> i64 {
    of.try_into().unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{EARLY, GATHER_MAX, gather_next};

    /// Two hosts that take turns: whoever comes before the other is done waits for the rest.
    #[test]
    fn what_would_wait_for_its_lock_gathers_instead() {
        let free_after = Duration::from_millis(5);
        let mut gather = Duration::ZERO;
        for _ in 0..20 {
            gather = gather_next(gather, free_after.saturating_sub(gather));
        }
        assert!(gather > free_after - EARLY * 2 && gather <= free_after, "{gather:?}");
        for _ in 0..20 {
            gather = gather_next(gather, Duration::ZERO);
        }
        assert_eq!(gather, Duration::ZERO);
        assert_eq!(gather_next(Duration::ZERO, Duration::from_secs(5)), GATHER_MAX);
    }
}
