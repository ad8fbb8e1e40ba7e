//! What is deployed: workers with their versions and modules, and agents.

use bytes::Bytes;
use rusqlite::{OptionalExtension, params};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use super::reads::{id, one_more, page};
use super::writer::{Fault, Tried, Tx};
use crate::agent::{Agent, AgentSettings};
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::ids::{AgentId, OrgId, WorkerName};
use crate::quota::OwnLimits;
use crate::store::{Deleted, Page, PutAgent, PutWorker, Result, StoreError, WorkerFull, WorkerVersion};

statements! {
    WORKERS = "-- workers
SELECT worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions w
 WHERE org_id = ?1 AND worker > ?2
   AND version = (SELECT max(v.version) FROM worker_versions v WHERE v.org_id = w.org_id AND v.worker = w.worker)
 ORDER BY worker LIMIT ?3";
    WORKER_VERSIONS = "-- worker_versions
SELECT worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions WHERE org_id = ?1 AND worker = ?2 ORDER BY version DESC";
    WORKER_VERSION = "-- worker_version
SELECT worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions WHERE org_id = ?1 AND worker = ?2 AND version = ?3";
    MODULE = "-- module
SELECT wasm FROM modules WHERE org_id = ?1 AND digest = ?2";
    WORKER_SAME = "-- worker_same
SELECT version, size, imports, compile_ms, created_at FROM worker_versions WHERE org_id = ?1 AND digest = ?3 AND worker = ?2 ORDER BY version DESC LIMIT 1";
    WORKER_COUNTS = "-- worker_counts
SELECT count(*), coalesce(max(version), 0) FROM worker_versions WHERE org_id = ?1 AND worker = ?2";
    WORKERS_COUNT = "-- workers_count
SELECT count(DISTINCT worker) FROM worker_versions WHERE org_id = ?1";
    /// The oldest that neither an agent nor a live turn uses.
    WORKER_OLDEST = "-- worker_oldest
SELECT v.version, v.digest FROM worker_versions v WHERE v.org_id = ?1 AND v.worker = ?2
   AND NOT EXISTS (SELECT 1 FROM agents a WHERE a.org_id = ?1 AND a.worker = ?2 AND a.version = v.version)
   AND NOT EXISTS (SELECT 1 FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id
                    WHERE m.org_id = ?1 AND t.worker = ?2 AND t.version = v.version)
 ORDER BY v.version LIMIT 1";
    MODULE_NEW = "-- module_new
INSERT INTO modules (org_id, digest, wasm) VALUES (?1, ?2, ?3) ON CONFLICT (org_id, digest) DO NOTHING";
    WORKER_NEW = "-- worker_new
INSERT INTO worker_versions (org_id, worker, version, digest, size, imports, compile_ms, created_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    VERSION_DELETE = "-- version_delete
DELETE FROM worker_versions WHERE org_id = ?1 AND worker = ?2 AND version = ?3";
    WORKER_DELETE = "-- worker_delete
DELETE FROM worker_versions WHERE org_id = ?1 AND worker = ?2";
    WORKER_DIGESTS = "-- worker_digests
SELECT DISTINCT digest FROM worker_versions WHERE org_id = ?1 AND worker = ?2";
    /// Two workers may share a module.
    MODULE_DELETE = "-- module_delete
DELETE FROM modules WHERE org_id = ?1 AND digest = ?2
   AND NOT EXISTS (SELECT 1 FROM worker_versions v WHERE v.org_id = ?1 AND v.digest = ?2)";
    WORKER_AGENT = "-- worker_agent
SELECT agent_id FROM agents WHERE org_id = ?1 AND worker = ?2 LIMIT 1";
    WORKER_TURN = "-- worker_turn
SELECT 1 FROM turn_markers m JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id WHERE m.org_id = ?1 AND t.worker = ?2 LIMIT 1";

    AGENT = "-- agent
SELECT agent_id, worker, version, is_default, settings, revision, created_at, updated_at FROM agents WHERE org_id = ?1 AND agent_id = ?2";
    AGENT_DEFAULT = "-- agent_default
SELECT agent_id, worker, version, is_default, settings, revision, created_at, updated_at FROM agents WHERE org_id = ?1 AND is_default = 1";
    AGENTS = "-- agents
SELECT agent_id, worker, version, is_default, settings, revision, created_at, updated_at FROM agents
 WHERE org_id = ?1 AND agent_id > ?2 ORDER BY agent_id LIMIT ?3";
    AGENTS_COUNT = "-- agents_count
SELECT count(*) FROM agents WHERE org_id = ?1";
    VERSION_KNOWN = "-- version_known
SELECT 1 FROM worker_versions WHERE org_id = ?1 AND worker = ?2 AND version = ?3";
    /// Before another agent takes its place: the index allows one.
    AGENT_YIELD = "-- agent_yield
UPDATE agents SET is_default = 0, revision = revision + 1, updated_at = ?3 WHERE org_id = ?1 AND is_default = 1 AND agent_id <> ?2";
    AGENT_PUT = "-- agent_put
INSERT INTO agents (org_id, agent_id, worker, version, is_default, settings, revision, created_at, updated_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1, ?7, ?7)
ON CONFLICT (org_id, agent_id) DO UPDATE SET worker = excluded.worker, version = excluded.version, is_default = excluded.is_default,
  settings = excluded.settings, revision = revision + 1, updated_at = excluded.updated_at";
    AGENT_CONVERSATION = "-- agent_conversation
SELECT conversation_id FROM conversations WHERE org_id = ?1 AND agent_id = ?2 AND deleted_at IS NULL LIMIT 1";
    AGENT_DELETE = "-- agent_delete
DELETE FROM agents WHERE org_id = ?1 AND agent_id = ?2";
}

/// A version as it is uploaded.
pub(super) struct Upload {
    pub(super) digest: [u8; 32],
    pub(super) wasm: Bytes,
    pub(super) imports: Vec<String>,
    pub(super) compile_ms: f64,
}

impl SqliteStore {
    pub(super) async fn read_workers(
        &self,
        org: &OrgId,
        after: Option<&WorkerName>,
        limit: usize,
    ) -> Result<Page<WorkerVersion>> {
        let rows = sqlx::query(WORKERS)
            .bind(org.as_str())
            .bind(after.map_or("", WorkerName::as_str))
            .bind(one_more(limit))
            .fetch_all(&self.readers)
            .await?;
        page(&rows, limit, worker_version)
    }

    pub(super) async fn read_worker_versions(&self, org: &OrgId, worker: &WorkerName) -> Result<Vec<WorkerVersion>> {
        let rows =
            sqlx::query(WORKER_VERSIONS).bind(org.as_str()).bind(worker.as_str()).fetch_all(&self.readers).await?;
        rows.iter().map(worker_version).collect()
    }

    pub(super) async fn read_worker_version(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        version: u32,
    ) -> Result<Option<WorkerVersion>> {
        let query = sqlx::query(WORKER_VERSION).bind(org.as_str()).bind(worker.as_str()).bind(version);
        query.fetch_optional(&self.readers).await?.as_ref().map(worker_version).transpose()
    }

    pub(super) async fn read_module(&self, org: &OrgId, digest: [u8; 32]) -> Result<Option<Bytes>> {
        let row = sqlx::query(MODULE).bind(org.as_str()).bind(&digest[..]).fetch_optional(&self.readers).await?;
        row.map(|row| Ok(Bytes::from(row.try_get::<Vec<u8>, _>(0)?))).transpose()
    }

    pub(super) async fn read_agent(&self, org: &OrgId, agent: &AgentId) -> Result<Option<Agent>> {
        let row = sqlx::query(AGENT).bind(org.as_str()).bind(agent.as_str()).fetch_optional(&self.readers).await?;
        row.as_ref().map(agent_record).transpose()
    }

    pub(super) async fn read_default_agent(&self, org: &OrgId) -> Result<Option<Agent>> {
        let row = sqlx::query(AGENT_DEFAULT).bind(org.as_str()).fetch_optional(&self.readers).await?;
        row.as_ref().map(agent_record).transpose()
    }

    pub(super) async fn read_agents(&self, org: &OrgId, after: Option<&AgentId>, limit: usize) -> Result<Page<Agent>> {
        let rows = sqlx::query(AGENTS)
            .bind(org.as_str())
            .bind(after.map_or("", AgentId::as_str))
            .bind(one_more(limit))
            .fetch_all(&self.readers)
            .await?;
        page(&rows, limit, agent_record)
    }
}

fn worker_version(row: &SqliteRow) -> Result<WorkerVersion> {
    let corrupt = |what: &str| StoreError::Corrupt(format!("a worker's {what}"));
    let digest: &[u8] = row.try_get(2)?;
    Ok(WorkerVersion {
        worker: id(row, 0)?,
        version: row.try_get(1)?,
        digest: digest.try_into().map_err(|_| corrupt("digest is not 32 bytes"))?,
        size: row.try_get::<i64, _>(3)?.unsigned_abs(),
        imports: serde_json::from_str(row.try_get(4)?).map_err(|error| corrupt(&format!("imports: {error}")))?,
        compile_ms: row.try_get(5)?,
        created_at: Timestamp(row.try_get(6)?),
    })
}

fn agent_record(row: &SqliteRow) -> Result<Agent> {
    let settings: AgentSettings = serde_json::from_str(row.try_get(4)?)
        .map_err(|error| StoreError::Corrupt(format!("an agent's settings: {error}")))?;
    Ok(Agent {
        id: id(row, 0)?,
        settings: AgentSettings {
            worker: id(row, 1)?,
            version: Some(row.try_get(2)?),
            default: row.try_get(3)?,
            ..settings
        },
        revision: row.try_get::<i64, _>(5)?.unsigned_abs(),
        created_at: Timestamp(row.try_get(6)?),
        updated_at: Timestamp(row.try_get(7)?),
    })
}

impl Tx<'_> {
    pub(super) fn put_worker(
        &self,
        org: &OrgId,
        worker: &WorkerName,
        upload: &Upload,
        workers_max: usize,
        versions_kept: usize,
        by: &Actor,
    ) -> Tried<PutWorker> {
        let stored = |version: u32, size: u64, imports: Vec<String>, compile_ms: f64, created_at: Timestamp| {
            let (worker, digest) = (worker.clone(), upload.digest);
            WorkerVersion { worker, version, digest, size, imports, compile_ms, created_at }
        };
        let key = params![org.as_str(), worker.as_str()];
        let same = self
            .conn
            .prepare_cached(WORKER_SAME)?
            .query_row(params![org.as_str(), worker.as_str(), &upload.digest[..]], |row| {
                let imports: String = row.get(2)?;
                Ok((row.get(0)?, row.get::<_, u32>(1)?.into(), imports, row.get(3)?, Timestamp(row.get(4)?)))
            })
            .optional()?;
        if let Some((version, size, imports, compile_ms, created_at)) = same {
            let imports = serde_json::from_str(&imports).map_err(|error| Fault::Corrupt(error.to_string()))?;
            return Ok(PutWorker::Existing(stored(version, size, imports, compile_ms, created_at)));
        }
        if let Some(max) = self.storage_full(org)? {
            return Ok(PutWorker::Full(WorkerFull::Storage(max)));
        }
        let (versions, newest) = self
            .conn
            .prepare_cached(WORKER_COUNTS)?
            .query_row(key, |row| Ok((row.get::<_, u32>(0)? as usize, row.get::<_, u32>(1)?)))?;
        if versions == 0 {
            let workers: u32 =
                self.conn.prepare_cached(WORKERS_COUNT)?.query_row(params![org.as_str()], |row| row.get(0))?;
            if workers as usize >= workers_max {
                return Ok(PutWorker::Full(WorkerFull::Workers(u64::from(workers))));
            }
        }
        if versions >= versions_kept {
            let oldest = self
                .conn
                .prepare_cached(WORKER_OLDEST)?
                .query_row(key, |row| Ok((row.get::<_, u32>(0)?, row.get::<_, Vec<u8>>(1)?)))
                .optional()?;
            let Some((version, digest)) = oldest else {
                return Ok(PutWorker::Full(WorkerFull::Versions(versions as u64)));
            };
            self.conn.prepare_cached(VERSION_DELETE)?.execute(params![org.as_str(), worker.as_str(), version])?;
            self.conn.prepare_cached(MODULE_DELETE)?.execute(params![org.as_str(), digest])?;
        }
        let imports = serde_json::to_string(&upload.imports).map_err(|error| Fault::Corrupt(error.to_string()))?;
        self.conn.prepare_cached(MODULE_NEW)?.execute(params![org.as_str(), &upload.digest[..], &upload.wasm[..]])?;
        self.conn.prepare_cached(WORKER_NEW)?.execute(params![
            org.as_str(),
            worker.as_str(),
            newest + 1,
            &upload.digest[..],
            upload.wasm.len() as i64,
            imports,
            upload.compile_ms,
            self.now.0
        ])?;
        let act = Act::worker_upload(worker, newest + 1, &upload.digest, upload.wasm.len());
        self.note(Some(org), &[act], by)?;
        let size = upload.wasm.len() as u64;
        Ok(PutWorker::Created(stored(newest + 1, size, upload.imports.clone(), upload.compile_ms, self.now)))
    }

    pub(super) fn delete_worker(&self, org: &OrgId, worker: &WorkerName, by: &Actor) -> Tried<Deleted> {
        let key = params![org.as_str(), worker.as_str()];
        let agent: Option<String> =
            self.conn.prepare_cached(WORKER_AGENT)?.query_row(key, |row| row.get(0)).optional()?;
        if let Some(agent) = agent {
            return Ok(Deleted::InUse(format!("agent {agent}")));
        }
        if self.conn.prepare_cached(WORKER_TURN)?.exists(key)? {
            return Ok(Deleted::InUse("a live turn".to_owned()));
        }
        let digests = {
            let mut statement = self.conn.prepare_cached(WORKER_DIGESTS)?;
            let rows = statement.query_map(key, |row| row.get::<_, Vec<u8>>(0))?;
            rows.collect::<rusqlite::Result<Vec<_>>>()?
        };
        if self.conn.prepare_cached(WORKER_DELETE)?.execute(key)? == 0 {
            return Ok(Deleted::NotFound);
        }
        for digest in digests {
            self.conn.prepare_cached(MODULE_DELETE)?.execute(params![org.as_str(), digest])?;
        }
        self.note(Some(org), &[Act::worker_delete(worker)], by)?;
        Ok(Deleted::Done)
    }

    pub(super) fn put_agent(
        &mut self,
        org: &OrgId,
        agent: &AgentId,
        mut settings: AgentSettings,
        agents_max: usize,
        by: &Actor,
    ) -> Tried<PutAgent> {
        let worker = settings.worker.as_str();
        let version = match settings.version {
            Some(version) => {
                let asked = params![org.as_str(), worker, version];
                self.conn.prepare_cached(VERSION_KNOWN)?.exists(asked)?.then_some(version)
            }
            None => {
                let mut statement = self.conn.prepare_cached(WORKER_COUNTS)?;
                let newest: u32 = statement.query_row(params![org.as_str(), worker], |row| row.get(1))?;
                (newest > 0).then_some(newest)
            }
        };
        let Some(version) = version else { return Ok(PutAgent::NoSuchWorker) };
        settings.version = Some(version);
        let known = self.known_agent(org, agent)?;
        let default_before = self.default_agent_id(org)?;
        if known.is_none() && self.agents(org)? >= agents_max {
            return Ok(PutAgent::Full);
        }
        if settings.default {
            self.conn.prepare_cached(AGENT_YIELD)?.execute(params![org.as_str(), agent.as_str(), self.now.0])?;
        }
        let json = serde_json::to_string(&settings).map_err(|error| Fault::Corrupt(error.to_string()))?;
        self.conn.prepare_cached(AGENT_PUT)?.execute(params![
            org.as_str(),
            agent.as_str(),
            settings.worker.as_str(),
            version,
            settings.default,
            json,
            self.now.0
        ])?;
        let before = known.as_ref().map(|known| known.settings.limits.own()).unwrap_or_default();
        if settings.limits.own() != before {
            self.limit_agent(org, agent, &settings.limits.own())?;
        }
        let (revision, created_at) =
            known.as_ref().map_or((1, self.now), |known| (known.revision + 1, known.created_at));
        let stored = Agent { id: agent.clone(), settings, revision, created_at, updated_at: self.now };
        self.note(Some(org), &Act::agent_put(known.as_ref(), &stored, default_before.as_ref()), by)?;
        Ok(PutAgent::Stored { agent: stored, created: known.is_none() })
    }

    /// How many agents an org has.
    pub(super) fn agents(&self, org: &OrgId) -> Tried<usize> {
        let count: u32 = self.conn.prepare_cached(AGENTS_COUNT)?.query_row(params![org.as_str()], |row| row.get(0))?;
        Ok(count as usize)
    }

    /// An agent as this transaction finds it.
    pub(super) fn known_agent(&self, org: &OrgId, agent: &AgentId) -> Tried<Option<Agent>> {
        let corrupt = |error: &dyn std::fmt::Display| Fault::Corrupt(error.to_string());
        let mut statement = self.conn.prepare_cached(AGENT)?;
        let mut rows = statement.query(params![org.as_str(), agent.as_str()])?;
        let Some(row) = rows.next()? else { return Ok(None) };
        let (worker, json): (String, String) = (row.get(1)?, row.get(4)?);
        let settings: AgentSettings = serde_json::from_str(&json).map_err(|error| corrupt(&error))?;
        Ok(Some(Agent {
            id: agent.clone(),
            settings: AgentSettings {
                worker: worker.parse().map_err(|error| corrupt(&error))?,
                version: Some(row.get(2)?),
                default: row.get(3)?,
                ..settings
            },
            revision: row.get::<_, i64>(5)?.unsigned_abs(),
            created_at: Timestamp(row.get(6)?),
            updated_at: Timestamp(row.get(7)?),
        }))
    }

    /// Which agent the org's default is now.
    pub(super) fn default_agent_id(&self, org: &OrgId) -> Tried<Option<AgentId>> {
        let found: Option<String> =
            self.conn.prepare_cached(AGENT_DEFAULT)?.query_row(params![org.as_str()], |row| row.get(0)).optional()?;
        found.map(|id| id.parse().map_err(|error: crate::ids::InvalidId| Fault::Corrupt(error.to_string()))).transpose()
    }

    pub(super) fn delete_agent(&mut self, org: &OrgId, agent: &AgentId, by: &Actor) -> Tried<Deleted> {
        let key = params![org.as_str(), agent.as_str()];
        let conversation: Option<String> =
            self.conn.prepare_cached(AGENT_CONVERSATION)?.query_row(key, |row| row.get(0)).optional()?;
        if let Some(conversation) = conversation {
            return Ok(Deleted::InUse(format!("conversation {conversation}")));
        }
        let default = self.default_agent_id(org)?.as_ref() == Some(agent);
        if self.conn.prepare_cached(AGENT_DELETE)?.execute(key)? == 0 {
            return Ok(Deleted::NotFound);
        }
        self.limit_agent(org, agent, &OwnLimits::default())?;
        self.note(Some(org), &Act::agent_delete(agent, default), by)?;
        Ok(Deleted::Done)
    }
}
