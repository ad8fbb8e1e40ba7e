//! The worker of a new org's default agent: a tiny module, so that an org can be talked to before anything is deployed.

use std::collections::BTreeSet;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use turnhouse::agent::AgentSettings;
use turnhouse::audit::Actor;
use turnhouse::clock::Timestamp;
use turnhouse::ids::{AgentId, OrgId, WorkerName};
use turnhouse::limits::Limits;
use turnhouse::store::{PutAgent, PutWorker, Result, Store};

/// `starter.wat`, assembled.
#[rustfmt::skip]
const WASM: &[u8] = &[
    0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00, 0x01, 0x0c, 0x02, 0x60, 0x04, 0x7f, 0x7f, 0x7f, 0x7f, 0x01, 0x7f, 0x60, 0x00, 0x00, 0x02, 0x44,
    0x02, 0x16, 0x77, 0x61, 0x73, 0x69, 0x5f, 0x73, 0x6e, 0x61, 0x70, 0x73, 0x68, 0x6f, 0x74, 0x5f, 0x70, 0x72, 0x65, 0x76, 0x69, 0x65, 0x77, 0x31,
    0x07, 0x66, 0x64, 0x5f, 0x72, 0x65, 0x61, 0x64, 0x00, 0x00, 0x16, 0x77, 0x61, 0x73, 0x69, 0x5f, 0x73, 0x6e, 0x61, 0x70, 0x73, 0x68, 0x6f, 0x74,
    0x5f, 0x70, 0x72, 0x65, 0x76, 0x69, 0x65, 0x77, 0x31, 0x08, 0x66, 0x64, 0x5f, 0x77, 0x72, 0x69, 0x74, 0x65, 0x00, 0x00, 0x03, 0x02, 0x01, 0x01,
    0x05, 0x03, 0x01, 0x00, 0x01, 0x07, 0x13, 0x02, 0x06, 0x6d, 0x65, 0x6d, 0x6f, 0x72, 0x79, 0x02, 0x00, 0x06, 0x5f, 0x73, 0x74, 0x61, 0x72, 0x74,
    0x00, 0x02, 0x0a, 0x47, 0x01, 0x45, 0x00, 0x03, 0x40, 0x41, 0x00, 0x41, 0xc0, 0x00, 0x36, 0x02, 0x00, 0x41, 0x04, 0x41, 0x80, 0x20, 0x36, 0x02,
    0x00, 0x41, 0x00, 0x41, 0x00, 0x41, 0x01, 0x41, 0x08, 0x10, 0x00, 0x04, 0x40, 0x00, 0x0b, 0x41, 0x08, 0x28, 0x02, 0x00, 0x04, 0x40, 0x41, 0x04,
    0x41, 0x08, 0x28, 0x02, 0x00, 0x36, 0x02, 0x00, 0x41, 0x01, 0x41, 0x00, 0x41, 0x01, 0x41, 0x0c, 0x10, 0x01, 0x04, 0x40, 0x00, 0x0b, 0x0c, 0x01,
    0x0b, 0x0b, 0x0b,
];

/// What it imports.
const IMPORTS: [&str; 2] = ["wasi_snapshot_preview1.fd_read", "wasi_snapshot_preview1.fd_write"];

/// The name of the agent, and of its worker.
const AGENT: &str = "default";
const WORKER: &str = "starter";

/// Gives an org a default agent if it has none. Whatever is there already stays as it is. The agent's name, if it was made.
pub async fn provide_default_agent(store: &dyn Store, org: &OrgId, now: Timestamp) -> Result<Option<AgentId>> {
    if store.default_agent(org).await?.is_some() {
        return Ok(None);
    }
    let limits = Limits::default();
    let taken: BTreeSet<AgentId> =
        store.agents(org, None, limits.org_agents_max).await?.items.into_iter().map(|agent| agent.id).collect();
    let free = |n: u32| if n == 1 { AGENT.to_owned() } else { format!("{AGENT}-{n}") };
    let agent = (1..).map(|n| AgentId::parse(&free(n)).expect("it is an id")).find(|id| !taken.contains(id));
    let agent = agent.expect("there are more numbers than agents");
    let worker = WorkerName::parse(WORKER).expect("it is a name");
    let (digest, imports) = (Sha256::digest(WASM).into(), IMPORTS.map(str::to_owned).to_vec());
    let wasm = Bytes::from_static(WASM);
    let (workers, kept) = (limits.org_workers_max, limits.worker_versions_kept);
    let version = match store
        .put_worker(org, &worker, digest, wasm, imports, 0.0, workers, kept, now, &Actor::command_line())
        .await?
    {
        PutWorker::Created(version) | PutWorker::Existing(version) => version.version,
        PutWorker::Full(_) => return Ok(None),
    };
    let settings = AgentSettings { version: Some(version), default: true, ..AgentSettings::of(worker) };
    match store.put_agent(org, &agent, settings, limits.org_agents_max, now, &Actor::command_line()).await? {
        PutAgent::Stored { .. } => Ok(Some(agent)),
        PutAgent::NoSuchWorker | PutAgent::Full | PutAgent::NoFileMode => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_text() {
        assert_eq!(wat::parse_str(include_str!("starter.wat")).unwrap(), WASM);
    }

    #[tokio::test]
    async fn an_org_gets_one_default_agent_and_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let options = turnhouse::store::sqlite::SqliteOptions::new(dir.path().join("data"));
        let store = turnhouse::store::sqlite::SqliteStore::open(options).await.unwrap();
        let (org, owner) = (OrgId::parse("acme").unwrap(), "ann".parse().unwrap());
        store.create_org(&org, &owner, Timestamp(1), &Actor::command_line()).await.unwrap();
        let made = provide_default_agent(&store, &org, Timestamp(2)).await.unwrap();
        assert_eq!(made.unwrap().as_str(), "default");
        assert_eq!(provide_default_agent(&store, &org, Timestamp(3)).await.unwrap(), None);
        let agent = store.default_agent(&org).await.unwrap().unwrap();
        assert_eq!((agent.settings.worker.as_str(), agent.created_at), ("starter", Timestamp(2)));
    }
}
