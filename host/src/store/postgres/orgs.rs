//! Provisioning: an org as it should be, made or mended, in one transaction under its row.

use sqlx::{PgConnection, Row};

use super::catalog::{ORG_LOCK, Upload};
use super::{BEGIN_LARGE, PostgresStore};
use crate::agent::AgentSettings;
use crate::audit::{Act, Actor};
use crate::clock::Timestamp;
use crate::ids::{OrgId, UserId, WorkerName};
use crate::store::{DefaultAgent, Provisioned, PutAgent, PutWorker, Result, Starter};

statements! {
    /// An owner that is there stays.
    ORG_OWNED = "-- org_owned
UPDATE orgs SET owner_user = $2 WHERE org_id = $1 AND owner_user = ''";
    ORG_LEAVING = "-- org_leaving
SELECT 1 FROM orgs WHERE org_id = $1 AND deleting_at IS NOT NULL";
    ORG_PROVISIONED = "-- org_provisioned
SELECT provisioned_at IS NOT NULL FROM orgs WHERE org_id = $1";
    ORG_PROVISION = "-- org_provision
UPDATE orgs SET provisioned_at = coalesce($2::bigint, turnhouse_now()) WHERE org_id = $1";
    /// Whether a worker is there with other bytes than these.
    WORKER_OTHER = "-- worker_other
SELECT 1 FROM worker_versions w WHERE w.org_id = $1 AND w.worker = $2
   AND NOT EXISTS (SELECT 1 FROM worker_versions s WHERE s.org_id = $1 AND s.digest = $3 AND s.worker = $2) LIMIT 1";
}

impl PostgresStore {
    pub(super) async fn write_provision(
        &self,
        org: &OrgId,
        owner: &UserId,
        starter: &Starter,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Provisioned> {
        let id = org.as_str();
        let mut tx = self.begin_hostwide(BEGIN_LARGE).await?;
        let created = self.put_org(&mut tx, org, owner, now, by).await?;
        self.query(ORG_LOCK).bind(id).execute(&mut *tx).await?;
        let leaving = self.query(ORG_LEAVING).bind(id).fetch_optional(&mut *tx).await?.is_some();
        if leaving {
            return Ok(Provisioned { created, owner_set: false, owner_joined: false, default: DefaultAgent::Deleting });
        }
        let owned = self.query(ORG_OWNED).bind(id).bind(owner.as_str()).execute(&mut *tx).await?;
        let owner_set = owned.rows_affected() == 1;
        let owner_joined = self.owner_joins(&mut tx, id, now, by).await?;
        let default = self.provide_default(&mut tx, org, starter, now, by).await?;
        if !created && (owner_set || default.is_repair()) {
            let act = Act::org_repair(owner_set.then_some(owner), &default);
            self.note(&mut tx, Some(id), &[act], by, now).await?;
        }
        tx.commit().await?;
        Ok(Provisioned { created, owner_set, owner_joined, default })
    }

    async fn provide_default(
        &self,
        tx: &mut PgConnection,
        org: &OrgId,
        starter: &Starter,
        now: Timestamp,
        by: &Actor,
    ) -> Result<DefaultAgent> {
        let id = org.as_str();
        let before: bool = self.query(ORG_PROVISIONED).bind(id).fetch_one(&mut *tx).await?.try_get(0)?;
        let default = match (self.default_agent_id(tx, id).await?, self.known_agent(tx, id, &starter.agent).await?) {
            (Some(agent), _) => DefaultAgent::Kept(agent),
            (None, _) if before => return Ok(DefaultAgent::LeftOut),
            // Of that name: whoever made it meant it. Nothing else of it is touched.
            (None, Some(agent)) => {
                let settings = AgentSettings { default: true, ..agent.settings };
                match self.put_agent_in(tx, org, &agent.id, settings, usize::MAX, now, by).await? {
                    PutAgent::Stored { agent, .. } => DefaultAgent::Flagged(agent.id),
                    _ => return Ok(DefaultAgent::NoRoom),
                }
            }
            (None, None) => match self.make_default(tx, org, starter, now, by).await? {
                Some(made) => made,
                None => return Ok(DefaultAgent::NoRoom),
            },
        };
        self.query(ORG_PROVISION).bind(id).bind(self.clock.of(now)).execute(&mut *tx).await?;
        Ok(default)
    }

    /// `None`: the org has as many agents or workers as it may.
    async fn make_default(
        &self,
        tx: &mut PgConnection,
        org: &OrgId,
        starter: &Starter,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<DefaultAgent>> {
        // Before the worker: one without its agent is of no use.
        if !self.has_room_for_agent(tx, org.as_str(), starter.agents_max).await? {
            return Ok(None);
        }
        // A version more would change a worker of that name that is somebody's own.
        let mut worker: Option<WorkerName> = None;
        for name in starter.worker_names() {
            let other = self.query(WORKER_OTHER).bind(org.as_str()).bind(name.to_string()).bind(&starter.digest[..]);
            if other.fetch_optional(&mut *tx).await?.is_none() {
                worker = Some(name);
                break;
            }
        }
        let Some(worker) = worker else { return Ok(None) };
        let upload = Upload {
            digest: starter.digest,
            wasm: starter.wasm.clone(),
            imports: starter.imports.clone(),
            compile_ms: 0.0,
        };
        let (workers_max, kept) = (starter.workers_max, starter.versions_kept);
        let put = self.put_worker_in(tx, org, &worker, &upload, workers_max, kept, now, by).await?;
        let (PutWorker::Created(version) | PutWorker::Existing(version)) = put else { return Ok(None) };
        let settings = AgentSettings { version: Some(version.version), default: true, ..AgentSettings::of(worker) };
        match self.put_agent_in(tx, org, &starter.agent, settings, starter.agents_max, now, by).await? {
            PutAgent::Stored { agent, .. } => Ok(Some(DefaultAgent::Made(agent.id))),
            _ => Ok(None),
        }
    }
}
