//! Provisioning: an org as it should be, made or mended.

use rusqlite::{OptionalExtension, params};

use super::catalog::Upload;
use super::writer::{Tried, Tx};
use crate::agent::AgentSettings;
use crate::audit::{Act, Actor};
use crate::ids::{OrgId, UserId, WorkerName};
use crate::store::{DefaultAgent, Provisioned, PutAgent, PutWorker, Starter};

statements! {
    /// An owner that is there stays.
    ORG_OWNED = "-- org_owned
UPDATE orgs SET owner_user = ?2 WHERE org_id = ?1 AND owner_user = ''";
    ORG_PROVISIONED = "-- org_provisioned
SELECT provisioned_at IS NOT NULL FROM orgs WHERE org_id = ?1";
    ORG_PROVISION = "-- org_provision
UPDATE orgs SET provisioned_at = ?2 WHERE org_id = ?1";
    /// Whether a worker is there with other bytes than these.
    WORKER_OTHER = "-- worker_other
SELECT 1 FROM worker_versions w WHERE w.org_id = ?1 AND w.worker = ?2
   AND NOT EXISTS (SELECT 1 FROM worker_versions s WHERE s.org_id = ?1 AND s.digest = ?3 AND s.worker = ?2) LIMIT 1";
}

impl Tx<'_> {
    pub(super) fn provision_org(
        &mut self,
        org: &OrgId,
        owner: &UserId,
        starter: &Starter,
        by: &Actor,
    ) -> Tried<Provisioned> {
        let created = self.create_org(org, owner, by)?;
        if !created && !self.conn.prepare_cached(super::keys::ORG_KNOWN)?.exists(params![org.as_str()])? {
            return Ok(Provisioned { created, owner_set: false, owner_joined: false, default: DefaultAgent::Deleting });
        }
        let owner_set = self.conn.prepare_cached(ORG_OWNED)?.execute(params![org.as_str(), owner.as_str()])? == 1;
        let owner_joined = self.owner_joins(org, by)?;
        let default = self.provide_default(org, starter, by)?;
        if !created && (owner_set || default.is_repair()) {
            self.note(Some(org), &[Act::org_repair(owner_set.then_some(owner), &default)], by)?;
        }
        Ok(Provisioned { created, owner_set, owner_joined, default })
    }

    fn provide_default(&mut self, org: &OrgId, starter: &Starter, by: &Actor) -> Tried<DefaultAgent> {
        let key = params![org.as_str()];
        let before =
            self.conn.prepare_cached(ORG_PROVISIONED)?.query_row(key, |row| row.get::<_, bool>(0)).optional()?;
        let default = match (self.default_agent_id(org)?, self.known_agent(org, &starter.agent)?) {
            (Some(agent), _) => DefaultAgent::Kept(agent),
            (None, _) if before == Some(true) => return Ok(DefaultAgent::LeftOut),
            // Of that name: whoever made it meant it. Nothing else of it is touched.
            (None, Some(agent)) => {
                let settings = AgentSettings { default: true, ..agent.settings };
                match self.put_agent(org, &agent.id, settings, usize::MAX, by)? {
                    PutAgent::Stored { agent, .. } => DefaultAgent::Flagged(agent.id),
                    _ => return Ok(DefaultAgent::NoRoom),
                }
            }
            (None, None) => match self.make_default(org, starter, by)? {
                Some(made) => made,
                None => return Ok(DefaultAgent::NoRoom),
            },
        };
        self.conn.prepare_cached(ORG_PROVISION)?.execute(params![org.as_str(), self.now.0])?;
        Ok(default)
    }

    /// `None`: the org has as many agents or workers as it may.
    fn make_default(&mut self, org: &OrgId, starter: &Starter, by: &Actor) -> Tried<Option<DefaultAgent>> {
        // Before the worker: one without its agent is of no use.
        if self.agents(org)? >= starter.agents_max {
            return Ok(None);
        }
        // A version more would change a worker of that name that is somebody's own.
        let mut worker: Option<WorkerName> = None;
        for name in starter.worker_names() {
            let other = params![org.as_str(), name.as_str(), &starter.digest[..]];
            if !self.conn.prepare_cached(WORKER_OTHER)?.exists(other)? {
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
        let put = self.put_worker(org, &worker, &upload, starter.workers_max, starter.versions_kept, by)?;
        let (PutWorker::Created(version) | PutWorker::Existing(version)) = put else { return Ok(None) };
        let settings = AgentSettings { version: Some(version.version), default: true, ..AgentSettings::of(worker) };
        match self.put_agent(org, &starter.agent, settings, starter.agents_max, by)? {
            PutAgent::Stored { agent, .. } => Ok(Some(DefaultAgent::Made(agent.id))),
            _ => Ok(None),
        }
    }
}
