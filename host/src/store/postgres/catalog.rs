//! What is deployed: workers with their versions and modules, and agents.
//!
//! Changes are rare and take several statements: each is a transaction under the org's row of `orgs`. Where live turns matter, it locks the org's row of
//! `org_load` after that, last and briefly, because turns wait for that one. Nobody locks the two the other way round.

use bytes::Bytes;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::reads::{id, one_more, page, small};
use super::{BEGIN, BEGIN_LARGE, PostgresStore};
use crate::agent::{Agent, AgentSettings};
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::gate::SessionMode;
use crate::ids::{AgentId, OrgId, WorkerName};
use crate::quota::OwnLimits;
use crate::store::{Deleted, Page, PutAgent, PutWorker, Result, StoreError, WorkerFull, WorkerVersion};

statements! {
    WORKERS = "-- workers
SELECT worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions w
 WHERE org_id = $1 AND worker > $2
   AND version = (SELECT max(v.version) FROM worker_versions v WHERE v.org_id = w.org_id AND v.worker = w.worker)
 ORDER BY worker LIMIT $3";
    WORKER_VERSIONS = "-- worker_versions
SELECT worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions WHERE org_id = $1 AND worker = $2 ORDER BY version DESC";
    WORKER_VERSION = "-- worker_version
SELECT worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions WHERE org_id = $1 AND worker = $2 AND version = $3";
    MODULE = "-- module
SELECT wasm FROM modules WHERE org_id = $1 AND digest = $2";
    ORG_LOCK = "-- org_lock
SELECT 1 FROM orgs WHERE org_id = $1 FOR UPDATE";
    /// No turn of the org begins or ends meanwhile.
    LOAD_LOCK = "-- load_lock
SELECT 1 FROM org_load WHERE org_id = $1 FOR NO KEY UPDATE";
    WORKER_SAME = "-- worker_same
SELECT worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions
 WHERE org_id = $1 AND worker = $2 AND digest = $3 ORDER BY version DESC LIMIT 1";
    WORKER_COUNTS = "-- worker_counts
SELECT count(*), coalesce(max(version), 0) FROM worker_versions WHERE org_id = $1 AND worker = $2";
    WORKERS_COUNT = "-- workers_count
SELECT count(DISTINCT worker) FROM worker_versions WHERE org_id = $1";
    /// The oldest that neither an agent nor a live turn uses.
    WORKER_OLDEST = "-- worker_oldest
SELECT v.version, v.digest FROM worker_versions v WHERE v.org_id = $1 AND v.worker = $2
   AND NOT EXISTS (SELECT 1 FROM agents a WHERE a.org_id = $1 AND a.worker = $2 AND a.version = v.version)
   AND NOT EXISTS (SELECT 1 FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id
                    WHERE m.org_id = $1 AND t.worker = $2 AND t.version = v.version)
 ORDER BY v.version LIMIT 1";
    MODULE_NEW = "-- module_new
INSERT INTO modules (org_id, digest, wasm) VALUES ($1, $2, $3) ON CONFLICT (org_id, digest) DO NOTHING";
    WORKER_NEW = "-- worker_new
INSERT INTO worker_versions (org_id, worker, version, digest, size, imports, compile_ms, created_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, coalesce($8::bigint, turnhouse_now()))
RETURNING worker, version, digest, size, imports, compile_ms, created_at";
    VERSION_DELETE = "-- version_delete
DELETE FROM worker_versions WHERE org_id = $1 AND worker = $2 AND version = $3";
    WORKER_DELETE = "-- worker_delete
DELETE FROM worker_versions WHERE org_id = $1 AND worker = $2 RETURNING digest";
    /// Two workers may share a module.
    MODULE_DELETE = "-- module_delete
DELETE FROM modules WHERE org_id = $1 AND digest = ANY ($2::bytea[])
   AND NOT EXISTS (SELECT 1 FROM worker_versions v WHERE v.org_id = $1 AND v.digest = modules.digest)";
    WORKER_AGENT = "-- worker_agent
SELECT agent_id FROM agents WHERE org_id = $1 AND worker = $2 LIMIT 1";
    WORKER_TURN = "-- worker_turn
SELECT 1 FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id WHERE m.org_id = $1 AND t.worker = $2 LIMIT 1";

    AGENT = "-- agent
SELECT agent_id, worker, version, is_default, settings, revision, created_at, updated_at FROM agents WHERE org_id = $1 AND agent_id = $2";
    AGENT_DEFAULT = "-- agent_default
SELECT agent_id, worker, version, is_default, settings, revision, created_at, updated_at FROM agents WHERE org_id = $1 AND is_default";
    AGENTS = "-- agents
SELECT agent_id, worker, version, is_default, settings, revision, created_at, updated_at FROM agents
 WHERE org_id = $1 AND agent_id > $2 ORDER BY agent_id LIMIT $3";
    AGENTS_COUNT = "-- agents_count
SELECT count(*) FROM agents WHERE org_id = $1";
    VERSION_KNOWN = "-- version_known
SELECT 1 FROM worker_versions WHERE org_id = $1 AND worker = $2 AND version = $3";
    /// Before another agent takes its place: the index allows one.
    AGENT_YIELD = "-- agent_yield
UPDATE agents SET is_default = false, revision = revision + 1, updated_at = coalesce($3::bigint, turnhouse_now())
 WHERE org_id = $1 AND is_default AND agent_id <> $2";
    AGENT_PUT = "-- agent_put
INSERT INTO agents AS a (org_id, agent_id, worker, version, is_default, settings, revision, created_at, updated_at)
SELECT $1, $2, $3, $4, $5, $6, 1, n.now, n.now FROM (SELECT coalesce($7::bigint, turnhouse_now()) AS now) n
ON CONFLICT (org_id, agent_id) DO UPDATE SET worker = excluded.worker, version = excluded.version, is_default = excluded.is_default,
  settings = excluded.settings, revision = a.revision + 1, updated_at = excluded.updated_at
RETURNING agent_id, worker, version, is_default, settings, revision, created_at, updated_at";
    AGENT_CONVERSATION = "-- agent_conversation
SELECT conversation_id FROM conversations WHERE org_id = $1 AND agent_id = $2 AND deleted_at IS NULL LIMIT 1";
    AGENT_DELETE = "-- agent_delete
DELETE FROM agents WHERE org_id = $1 AND agent_id = $2";
}

/// A version as it is uploaded.
pub(super) struct Upload {
    pub(super) digest: [u8; 32],
    pub(super) wasm: Bytes,
    pub(super) imports: Vec<String>,
    pub(super) compile_ms: f64,
}

impl PostgresStore {
    pub(super) async fn read_workers(
        &self,
        org: &OrgId,
        after: Option<&WorkerName>,
        limit: usize,
    ) -> Result<Page<WorkerVersion>> {
        let asked = self.query(WORKERS).bind(org.as_str()).bind(after.map_or("", WorkerName::as_str));
        page(&self.rows_of(org, asked.bind(one_more(limit))).await?, limit, worker_version)
    }

    pub(super) async fn read_worker_versions(&self, org: &OrgId, worker: &WorkerName) -> Result<Vec<WorkerVersion>> {
        let rows = self.rows_of(org, self.query(WORKER_VERSIONS).bind(org.as_str()).bind(worker.as_str())).await?;
        rows.iter().map(worker_version).collect()
    }

    pub(super) async fn read_worker_version(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        version: u32,
    ) -> Result<Option<WorkerVersion>> {
        let asked = self.query(WORKER_VERSION).bind(org.as_str()).bind(worker.as_str()).bind(number(version));
        self.row_of(org, asked).await?.as_ref().map(worker_version).transpose()
    }

    pub(super) async fn read_module(&self, org: &OrgId, digest: [u8; 32]) -> Result<Option<Bytes>> {
        let row = self.row_of(org, self.query(MODULE).bind(org.as_str()).bind(&digest[..])).await?;
        row.map(|row| Ok(Bytes::from(row.try_get::<Vec<u8>, _>(0)?))).transpose()
    }

    pub(super) async fn read_agent(&self, org: &OrgId, agent: &AgentId) -> Result<Option<Agent>> {
        let row = self.row_of(org, self.query(AGENT).bind(org.as_str()).bind(agent.as_str())).await?;
        row.as_ref().map(agent_record).transpose()
    }

    pub(super) async fn read_default_agent(&self, org: &OrgId) -> Result<Option<Agent>> {
        self.row_of(org, self.query(AGENT_DEFAULT).bind(org.as_str())).await?.as_ref().map(agent_record).transpose()
    }

    pub(super) async fn read_agents(&self, org: &OrgId, after: Option<&AgentId>, limit: usize) -> Result<Page<Agent>> {
        let asked = self.query(AGENTS).bind(org.as_str()).bind(after.map_or("", AgentId::as_str));
        page(&self.rows_of(org, asked.bind(one_more(limit))).await?, limit, agent_record)
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) async fn write_worker(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        upload: &Upload,
        workers_max: usize,
        versions_kept: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutWorker> {
        let mut tx = self.begin_of(org, BEGIN_LARGE).await?;
        self.query(ORG_LOCK).bind(org.as_str()).execute(&mut *tx).await?;
        let put = self.put_worker_in(&mut tx, org, worker, upload, workers_max, versions_kept, now, by).await?;
        if matches!(put, PutWorker::Created(_)) {
            tx.commit().await?;
        }
        Ok(put)
    }

    /// The same in a transaction that holds the org's row. What is `Full` must not be committed.
    #[allow(clippy::too_many_arguments)]
    pub(super) async fn put_worker_in(
        &self,
        tx: &mut PgConnection,
        org: &OrgId,
        worker: &WorkerName,
        upload: &Upload,
        workers_max: usize,
        versions_kept: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutWorker> {
        let (org, name) = (org.as_str(), worker.as_str());
        let same = self.query(WORKER_SAME).bind(org).bind(name).bind(&upload.digest[..]);
        if let Some(row) = same.fetch_optional(&mut *tx).await? {
            return Ok(PutWorker::Existing(worker_version(&row)?));
        }
        if let Some(max) = self.storage_full(tx, org).await? {
            return Ok(PutWorker::Full(WorkerFull::Storage(max.unsigned_abs())));
        }
        let (versions, newest) = self.versions(tx, org, name).await?;
        if versions == 0 {
            let row = self.query(WORKERS_COUNT).bind(org).fetch_one(&mut *tx).await?;
            let workers = row.try_get::<i64, _>(0)?;
            if !is_below(workers, workers_max) {
                return Ok(PutWorker::Full(WorkerFull::Workers(workers.unsigned_abs())));
            }
        }
        let (wasm, digest) = (&upload.wasm[..], &upload.digest[..]);
        self.query(MODULE_NEW).bind(org).bind(digest).bind(wasm).execute(&mut *tx).await?;
        let imports = serde_json::to_string(&upload.imports).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        let asked = self
            .query(WORKER_NEW)
            .bind(org)
            .bind(name)
            .bind(newest + 1)
            .bind(digest)
            .bind(i64::try_from(wasm.len()).unwrap_or(i64::MAX))
            .bind(imports)
            .bind(upload.compile_ms)
            .bind(self.clock.of(now));
        let created = worker_version(&asked.fetch_one(&mut *tx).await?)?;
        if !is_below(versions, versions_kept) {
            self.query(LOAD_LOCK).bind(org).execute(&mut *tx).await?;
            let row = self.query(WORKER_OLDEST).bind(org).bind(name).fetch_optional(&mut *tx).await?;
            // The new one, which nobody uses yet, makes no room for itself.
            let oldest = match row {
                Some(row) => Some((row.try_get::<i32, _>(0)?, row.try_get::<Vec<u8>, _>(1)?)),
                None => None,
            };
            let Some((version, digest)) = oldest.filter(|(version, _)| *version <= newest) else {
                return Ok(PutWorker::Full(WorkerFull::Versions(versions.unsigned_abs())));
            };
            self.query(VERSION_DELETE).bind(org).bind(name).bind(version).execute(&mut *tx).await?;
            self.query(MODULE_DELETE).bind(org).bind(vec![digest]).execute(&mut *tx).await?;
        }
        let act = Act::worker_upload(worker, created.version, &upload.digest, wasm.len());
        self.note(tx, Some(org), &[act], by, now).await?;
        Ok(PutWorker::Created(created))
    }

    /// How many versions a worker has, and its newest; 0 when there is no such worker.
    async fn versions(&self, tx: &mut PgConnection, org: &str, worker: &str) -> Result<(i64, i32)> {
        let row = self.query(WORKER_COUNTS).bind(org).bind(worker).fetch_one(tx).await?;
        Ok((row.try_get(0)?, row.try_get(1)?))
    }

    pub(super) async fn erase_worker(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Deleted> {
        let act = Act::worker_delete(worker);
        let mut tx = self.begin_of(org, BEGIN).await?;
        let (org, worker) = (org.as_str(), worker.as_str());
        self.query(ORG_LOCK).bind(org).execute(&mut *tx).await?;
        self.query(LOAD_LOCK).bind(org).execute(&mut *tx).await?;
        if let Some(row) = self.query(WORKER_AGENT).bind(org).bind(worker).fetch_optional(&mut *tx).await? {
            return Ok(Deleted::InUse(format!("agent {}", row.try_get::<&str, _>(0)?)));
        }
        if self.query(WORKER_TURN).bind(org).bind(worker).fetch_optional(&mut *tx).await?.is_some() {
            return Ok(Deleted::InUse("a live turn".to_owned()));
        }
        let rows = self.query(WORKER_DELETE).bind(org).bind(worker).fetch_all(&mut *tx).await?;
        if rows.is_empty() {
            return Ok(Deleted::NotFound);
        }
        let digests = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<Vec<u8>>, _>>()?;
        self.query(MODULE_DELETE).bind(org).bind(digests).execute(&mut *tx).await?;
        self.note(&mut tx, Some(org), &[act], by, now).await?;
        tx.commit().await?;
        Ok(Deleted::Done)
    }

    pub(super) async fn write_agent(
        &self,
        org: &OrgId,
        agent: &AgentId,
        settings: AgentSettings,
        agents_max: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutAgent> {
        let mut tx = self.begin_of(org, BEGIN).await?;
        self.query(ORG_LOCK).bind(org.as_str()).execute(&mut *tx).await?;
        let put = self.put_agent_in(&mut tx, org, agent, settings, agents_max, now, by).await?;
        if matches!(put, PutAgent::Stored { .. }) {
            tx.commit().await?;
        }
        Ok(put)
    }

    /// The same in a transaction that holds the org's row.
    #[allow(clippy::too_many_arguments)]
    pub(super) async fn put_agent_in(
        &self,
        tx: &mut PgConnection,
        org: &OrgId,
        agent: &AgentId,
        mut settings: AgentSettings,
        agents_max: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutAgent> {
        if settings.session_mode == SessionMode::File {
            return Ok(PutAgent::NoFileMode);
        }
        let (id, org) = (agent, org.as_str());
        let worker = settings.worker.clone();
        let version = match settings.version {
            Some(version) => {
                let asked = self.query(VERSION_KNOWN).bind(org).bind(worker.as_str()).bind(number(version));
                asked.fetch_optional(&mut *tx).await?.map(|_| number(version))
            }
            None => Some(self.versions(&mut *tx, org, worker.as_str()).await?.1).filter(|newest| *newest > 0),
        };
        let Some(version) = version else { return Ok(PutAgent::NoSuchWorker) };
        settings.version = Some(version.unsigned_abs());
        let known = self.known_agent(tx, org, id).await?;
        let default_before = self.default_agent_id(tx, org).await?;
        if known.is_none() && !self.has_room_for_agent(tx, org, agents_max).await? {
            return Ok(PutAgent::Full);
        }
        if settings.default {
            let asked = self.query(AGENT_YIELD).bind(org).bind(agent.as_str()).bind(self.clock.of(now));
            asked.execute(&mut *tx).await?;
        }
        let json = serde_json::to_string(&settings).map_err(|error| StoreError::Corrupt(error.to_string()))?;
        let asked = self
            .query(AGENT_PUT)
            .bind(org)
            .bind(agent.as_str())
            .bind(worker.as_str())
            .bind(version)
            .bind(settings.default)
            .bind(json)
            .bind(self.clock.of(now));
        let agent = agent_record(&asked.fetch_one(&mut *tx).await?)?;
        let before = known.as_ref().map(|known| known.settings.limits.own()).unwrap_or_default();
        let own = agent.settings.limits.own();
        if own != before {
            self.limit_agent(tx, org, agent.id.as_str(), &own, now).await?;
        }
        let acts = Act::agent_put(known.as_ref(), &agent, default_before.as_ref());
        self.note(tx, Some(org), &acts, by, now).await?;
        Ok(PutAgent::Stored { agent, created: known.is_none() })
    }

    /// Whether an org may have one agent more.
    pub(super) async fn has_room_for_agent(&self, tx: &mut PgConnection, org: &str, agents_max: usize) -> Result<bool> {
        let row = self.query(AGENTS_COUNT).bind(org.to_owned()).fetch_one(tx).await?;
        Ok(is_below(row.try_get(0)?, agents_max))
    }

    /// An agent as this transaction finds it.
    pub(super) async fn known_agent(&self, tx: &mut PgConnection, org: &str, agent: &AgentId) -> Result<Option<Agent>> {
        let row = self.query(AGENT).bind(org.to_owned()).bind(agent.to_string()).fetch_optional(tx).await?;
        row.as_ref().map(agent_record).transpose()
    }

    /// Which agent the org's default is now.
    pub(super) async fn default_agent_id(&self, tx: &mut PgConnection, org: &str) -> Result<Option<AgentId>> {
        let row = self.query(AGENT_DEFAULT).bind(org.to_owned()).fetch_optional(tx).await?;
        row.map(|row| id(&row, 0)).transpose()
    }

    pub(super) async fn erase_agent(
        &self,
        org: &OrgId,
        agent: &AgentId,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Deleted> {
        let mut tx = self.begin_of(org, BEGIN).await?;
        let (id, org, agent) = (agent, org.as_str(), agent.as_str());
        self.query(ORG_LOCK).bind(org).execute(&mut *tx).await?;
        // A conversation begins under this lock.
        self.query(LOAD_LOCK).bind(org).execute(&mut *tx).await?;
        if let Some(row) = self.query(AGENT_CONVERSATION).bind(org).bind(agent).fetch_optional(&mut *tx).await? {
            return Ok(Deleted::InUse(format!("conversation {}", row.try_get::<&str, _>(0)?)));
        }
        let default = self.default_agent_id(&mut tx, org).await?.as_ref() == Some(id);
        if self.query(AGENT_DELETE).bind(org).bind(agent).execute(&mut *tx).await?.rows_affected() == 0 {
            return Ok(Deleted::NotFound);
        }
        self.limit_agent(&mut tx, org, agent, &OwnLimits::default(), now).await?;
        self.note(&mut tx, Some(org), &Act::agent_delete(id, default), by, now).await?;
        tx.commit().await?;
        Ok(Deleted::Done)
    }
}

/// A version as the database counts; one that it cannot count does not exist.
fn number(version: u32) -> i32 {
    i32::try_from(version).unwrap_or(i32::MAX)
}

fn is_below(count: i64, max: usize) -> bool {
    usize::try_from(count).is_ok_and(|count| count < max)
}

fn worker_version(row: &PgRow) -> Result<WorkerVersion> {
    let corrupt = |what: &str| StoreError::Corrupt(format!("a worker's {what}"));
    let digest: &[u8] = row.try_get(2)?;
    Ok(WorkerVersion {
        worker: id(row, 0)?,
        version: small(row, 1)?,
        digest: digest.try_into().map_err(|_| corrupt("digest is not 32 bytes"))?,
        size: row.try_get::<i64, _>(3)?.unsigned_abs(),
        imports: serde_json::from_str(row.try_get(4)?).map_err(|error| corrupt(&format!("imports: {error}")))?,
        compile_ms: row.try_get(5)?,
        created_at: Timestamp(row.try_get(6)?),
    })
}

fn agent_record(row: &PgRow) -> Result<Agent> {
    let settings: AgentSettings = serde_json::from_str(row.try_get(4)?)
        .map_err(|error| StoreError::Corrupt(format!("an agent's settings: {error}")))?;
    Ok(Agent {
        id: id(row, 0)?,
        settings: AgentSettings {
            worker: id(row, 1)?,
            version: Some(small(row, 2)?),
            default: row.try_get(3)?,
            ..settings
        },
        revision: row.try_get::<i64, _>(5)?.unsigned_abs(),
        created_at: Timestamp(row.try_get(6)?),
        updated_at: Timestamp(row.try_get(7)?),
    })
}
