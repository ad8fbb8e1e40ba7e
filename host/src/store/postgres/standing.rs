//! How turns and the store stand: what readers of turns that run elsewhere live from, and what `turnhouse status` and `doctor` show.

use sqlx::Row;
use uuid::Uuid;

use super::reads::small;
use super::{PostgresStore, Route};
use crate::clock::Timestamp;
use crate::ids::{OrgId, ReplicaId, TurnId};
use crate::lease::Epoch;
use crate::store::{Finding, LiveCounts, Progress, ReplicaStatus, Result, StoreStatus};

statements! {
    /// $1 orgs, $2 turns: three look-ups a turn, and no body.
    PROGRESS = "-- progress
SELECT a.place, t.outcome IS NOT NULL, coalesce(m.state = 'running', false), coalesce(t.end_epoch, m.epoch, 0), l.epoch, l.first_seq
  FROM unnest($1::text[], $2::uuid[]) WITH ORDINALITY AS a (org_id, turn_id, place)
  JOIN turns t ON t.org_id = a.org_id AND t.turn_id = a.turn_id
  LEFT JOIN turn_markers m ON m.org_id = t.org_id AND m.turn_id = t.turn_id
  LEFT JOIN LATERAL (SELECT e.epoch, e.first_seq FROM turn_events e WHERE e.org_id = t.org_id AND e.turn_id = t.turn_id
                      ORDER BY e.epoch DESC, e.first_seq DESC LIMIT 1) l ON true";
    TIME = "-- time
SELECT turnhouse_now()";
    STATUS_SCHEMA = "-- status_schema
SELECT coalesce(max(version), 0), turnhouse_now() FROM _sqlx_migrations";
    STATUS_REPLICAS = "-- status_replicas
SELECT r.replica_id, r.expires_at - coalesce($1::bigint, turnhouse_now()), r.draining,
       (SELECT count(*) FROM turn_markers m WHERE m.holder = r.replica_id AND m.state = 'running')
  FROM replicas r ORDER BY r.expires_at";
    /// Over all that is live: an operator's question, not a turn's.
    STATUS_LIVE = "-- status_live
WITH n AS MATERIALIZED (SELECT coalesce($1::bigint, turnhouse_now()) AS now)
SELECT count(*) FILTER (WHERE m.state = 'waiting'), count(*) FILTER (WHERE m.state = 'ready'), count(*) FILTER (WHERE m.state = 'running'),
       (SELECT now FROM n) - min(t.accepted_at),
       (SELECT now FROM n) - min(m.not_before) FILTER (WHERE m.state = 'ready' AND m.not_before <= (SELECT now FROM n)),
       count(*) FILTER (WHERE m.deadline_at <= (SELECT now FROM n)), (SELECT now FROM n)
  FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id";
    EXAMINE = "-- examine
SELECT current_setting('server_version'), current_setting('fsync') = 'on', current_setting('full_page_writes') = 'on', current_setting('autovacuum') = 'on',
       current_setting('max_connections')::int, (SELECT count(*) FROM pg_stat_activity WHERE datname IS NOT NULL),
       pg_total_relation_size('turn_markers'), pg_is_in_recovery()";
}

impl PostgresStore {
    pub(super) async fn read_time(&self) -> Result<Timestamp> {
        Ok(Timestamp(self.one_hostwide(self.query(TIME)).await?.try_get(0)?))
    }

    pub(super) async fn read_progress(&self, turns: &[(OrgId, TurnId)]) -> Result<Vec<Option<Progress>>> {
        let mut found = vec![None; turns.len()];
        if turns.is_empty() {
            return Ok(found);
        }
        let orgs: Vec<&str> = turns.iter().map(|(org, _)| org.as_str()).collect();
        let ids: Vec<Uuid> = turns.iter().map(|(_, turn)| turn.0).collect();
        for row in self.rows_hostwide(self.query(PROGRESS).bind(orgs).bind(ids)).await? {
            let place = usize::try_from(row.try_get::<i64, _>(0)? - 1).expect("a place of the list");
            let logged = match row.try_get::<Option<i32>, _>(4)? {
                Some(epoch) => {
                    let first_seq = u32::try_from(row.try_get::<i64, _>(5)?).unwrap_or(u32::MAX);
                    Some((Epoch::try_from(epoch).unwrap_or_default(), first_seq))
                }
                None => None,
            };
            found[place] =
                Some(Progress { ended: row.try_get(1)?, running: row.try_get(2)?, epoch: small(&row, 3)?, logged });
        }
        Ok(found)
    }

    pub(super) async fn read_status(&self, now: Timestamp) -> Result<StoreStatus> {
        let at = self.clock.of(now);
        let schema_version = self.one_hostwide(self.query(STATUS_SCHEMA)).await?.try_get(0)?;
        let mut replicas = Vec::new();
        for row in self.rows_hostwide(self.query(STATUS_REPLICAS).bind(at)).await? {
            replicas.push(ReplicaStatus {
                id: ReplicaId(row.try_get(0)?),
                expires_in_ms: row.try_get(1)?,
                draining: row.try_get(2)?,
                running: row.try_get::<i64, _>(3)?.unsigned_abs(),
            });
        }
        let row = self.one_hostwide(self.query(STATUS_LIVE).bind(at)).await?;
        let count = |column: usize| -> Result<u64> { Ok(row.try_get::<i64, _>(column)?.unsigned_abs()) };
        let age = |column: usize| -> Result<Option<u64>> {
            Ok(row.try_get::<Option<i64>, _>(column)?.map(|age| age.max(0).unsigned_abs()))
        };
        Ok(StoreStatus {
            kind: "postgres",
            place: super::open::place(&self.connect),
            schema_version,
            schema_known: super::open::schema_known(),
            now: Timestamp(row.try_get(6)?),
            replicas,
            live: LiveCounts { waiting: count(0)?, ready: count(1)?, running: count(2)? },
            oldest_live_ms: age(3)?,
            oldest_ready_ms: age(4)?,
            overdue: count(5)?,
        })
    }

    /// The server and the way to it.
    pub(super) async fn examine_server(&self) -> Result<Vec<Finding>> {
        let version: i64 = self.one_hostwide(self.query(STATUS_SCHEMA)).await?.try_get(0)?;
        let known = super::open::schema_known();
        let row = self.one_hostwide(self.query(EXAMINE)).await?;
        let server: String = row.try_get(0)?;
        let (fsync, full_pages, vacuums): (bool, bool, bool) = (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        let (most, used, hot): (i32, i64, i64) = (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
        let recovers: bool = row.try_get(7)?;
        let mut findings = vec![
            if version > known {
                Finding::doubtful(
                    "schema",
                    format!("version {version}; this program knows {known} and may use it"),
                    "finish the upgrade: run the newer program everywhere",
                )
            } else {
                Finding::good("schema", format!("version {version}, this program's"))
            },
            if recovers {
                Finding::bad(
                    "server",
                    format!("PostgreSQL {server}, a standby"),
                    "name the primary in the database URL",
                )
            } else {
                Finding::good("server", format!("PostgreSQL {server}"))
            },
            match (self.route, self.hears()) {
                (Route::Direct, _) => Finding::good("pooler", "none"),
                (Route::Pooled, true) => {
                    Finding::good("pooler", "in transaction mode; hints come over a connection of their own")
                }
                (Route::Pooled, false) => Finding::good(
                    "pooler",
                    "in transaction mode; without database_listen_url, what other hosts do is seen within half a second",
                ),
            },
            if vacuums {
                Finding::good("autovacuum", "on")
            } else {
                Finding::bad("autovacuum", "off", "set autovacuum = on: the table of live turns grows without it")
            },
            if used * 10 < i64::from(most) * 9 {
                Finding::good("connections", format!("{used} of {most}"))
            } else {
                Finding::doubtful(
                    "connections",
                    format!("{used} of {most}"),
                    "raise max_connections, lower database_connections, or put a pooler in transaction mode in front",
                )
            },
            if hot < 64 * 1024 * 1024 {
                Finding::good("live turns", format!("their table has {} KiB", hot >> 10))
            } else {
                Finding::doubtful(
                    "live turns",
                    format!("their table has {} MiB", hot >> 20),
                    "look for a transaction that has been open for long (pg_stat_activity): vacuum cannot clean behind it",
                )
            },
        ];
        findings.push(self.examine_wall().await?);
        if !fsync || !full_pages {
            findings.push(Finding::doubtful(
                "durability",
                "fsync or full_page_writes is off",
                "set both to on: a crash of the database's machine may lose or damage what was accepted",
            ));
        }
        Ok(findings)
    }
}
