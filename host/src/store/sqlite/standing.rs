//! How turns and the store stand: what readers of turns that run elsewhere live from, and what `turnhouse status` and `doctor` show.

use sqlx::Row;

use super::SqliteStore;
use super::reads::uuid;
use crate::clock::Timestamp;
use crate::ids::{OrgId, ReplicaId, TurnId};
use crate::lease::Epoch;
use crate::store::{Finding, LiveCounts, Progress, ReplicaStatus, Result, StoreStatus};

statements! {
    /// ?1 [{org, turn}]: three look-ups a turn, and no body.
    PROGRESS = "-- progress
SELECT e.key, t.outcome IS NOT NULL, m.state = 'running', coalesce(t.end_epoch, m.epoch),
       (SELECT (l.epoch << 32) | l.first_seq FROM turn_events l WHERE l.org_id = t.org_id AND l.turn_id = t.turn_id
         ORDER BY l.epoch DESC, l.first_seq DESC LIMIT 1)
  FROM json_each(?1) e CROSS JOIN turns t ON t.org_id = e.value->>'org' AND t.turn_id = unhex(e.value->>'turn')
  LEFT JOIN turn_markers m ON m.org_id = t.org_id AND m.turn_id = t.turn_id";
    STATUS_SCHEMA = "-- status_schema
SELECT coalesce(max(version), 0) FROM _sqlx_migrations";
    STATUS_REPLICAS = "-- status_replicas
SELECT r.replica_id, r.expires_at, r.draining,
       (SELECT count(*) FROM turn_markers m WHERE m.holder = r.replica_id AND m.state = 'running')
  FROM replicas r ORDER BY r.expires_at";
    /// Over all that is live: an operator's question, not a turn's.
    STATUS_LIVE = "-- status_live
SELECT count(*) FILTER (WHERE m.state = 'waiting'), count(*) FILTER (WHERE m.state = 'ready'), count(*) FILTER (WHERE m.state = 'running'),
       min(t.accepted_at), min(m.not_before) FILTER (WHERE m.state = 'ready' AND m.not_before <= ?1), count(*) FILTER (WHERE m.deadline_at <= ?1)
  FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id";
    EXAMINE_JOURNAL = "-- examine_journal
SELECT journal_mode FROM pragma_journal_mode()";
}

impl SqliteStore {
    pub(super) async fn read_progress(&self, turns: &[(OrgId, TurnId)]) -> Result<Vec<Option<Progress>>> {
        let mut found = vec![None; turns.len()];
        if turns.is_empty() {
            return Ok(found);
        }
        let asked: Vec<_> = turns
            .iter()
            .map(|(org, turn)| serde_json::json!({"org": org, "turn": turn.0.simple().to_string()}))
            .collect();
        let asked = serde_json::Value::Array(asked).to_string();
        for row in sqlx::query(PROGRESS).bind(asked).fetch_all(&self.readers).await? {
            let place = usize::try_from(row.try_get::<i64, _>(0)?).expect("a place of the list");
            // Two halves of one number: both are 32 bits wide.
            let logged = row.try_get::<Option<i64>, _>(4)?.map(|both| ((both >> 32) as Epoch, both as u32));
            found[place] = Some(Progress {
                ended: row.try_get(1)?,
                running: row.try_get::<Option<bool>, _>(2)?.unwrap_or(false),
                epoch: row.try_get::<Option<Epoch>, _>(3)?.unwrap_or_default(),
                logged,
            });
        }
        Ok(found)
    }

    pub(super) async fn read_status(&self, now: Timestamp) -> Result<StoreStatus> {
        let mut tx = self.readers.begin().await?;
        let schema_version = sqlx::query(STATUS_SCHEMA).fetch_one(&mut *tx).await?.try_get(0)?;
        let mut replicas = Vec::new();
        for row in sqlx::query(STATUS_REPLICAS).fetch_all(&mut *tx).await? {
            replicas.push(ReplicaStatus {
                id: ReplicaId(uuid(&row, 0)?),
                expires_in_ms: row.try_get::<i64, _>(1)?.saturating_sub(now.0),
                draining: row.try_get(2)?,
                running: row.try_get::<i64, _>(3)?.unsigned_abs(),
            });
        }
        let row = sqlx::query(STATUS_LIVE).bind(now.0).fetch_one(&mut *tx).await?;
        let count = |column: usize| -> Result<u64> { Ok(row.try_get::<i64, _>(column)?.unsigned_abs()) };
        let age = |column: usize| -> Result<Option<u64>> {
            Ok(row.try_get::<Option<i64>, _>(column)?.map(|since| now.since_ms(Timestamp(since))))
        };
        Ok(StoreStatus {
            kind: "sqlite",
            place: self.file.display().to_string(),
            schema_version,
            schema_known: super::schema_known(),
            now,
            replicas,
            live: LiveCounts { waiting: count(0)?, ready: count(1)?, running: count(2)? },
            oldest_live_ms: age(3)?,
            oldest_ready_ms: age(4)?,
            overdue: count(5)?,
        })
    }

    /// The file, as far as looking at it tells. What a newer or damaged one is, opening it has told already.
    pub(super) async fn examine_file(&self) -> Result<Vec<Finding>> {
        let version: i64 = sqlx::query(STATUS_SCHEMA).fetch_one(&self.readers).await?.try_get(0)?;
        let mode: String = sqlx::query(EXAMINE_JOURNAL).fetch_one(&self.readers).await?.try_get(0)?;
        let bytes = |path: &std::path::Path| std::fs::metadata(path).map_or(0, |file| file.len());
        let mut log = self.file.clone().into_os_string();
        log.push("-wal");
        let (database, log) = (bytes(&self.file), bytes(log.as_ref()));
        Ok(vec![
            Finding::good("schema", format!("version {version}, this program's")),
            if mode == "wal" {
                Finding::good("journal", "write-ahead log")
            } else {
                Finding::bad(
                    "journal",
                    format!("journal mode {mode}"),
                    "start a host once: it sets the write-ahead log",
                )
            },
            // A checkpoint comes every few MiB; a log this long means that some reader never lets go.
            if log < 512 * 1024 * 1024 {
                Finding::good("file", format!("{} MiB, its log {} MiB", database >> 20, log >> 20))
            } else {
                Finding::doubtful(
                    "file",
                    format!("{} MiB, its log {} MiB", database >> 20, log >> 20),
                    "end whatever else has the database open (a backup, a shell), so that its log can be written back",
                )
            },
        ])
    }
}
