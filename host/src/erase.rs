//! The end of an org: everywhere and in pieces.
//!
//! ```text
//! marked ─ its keys are ended in the same transaction ─► its live turns end ─► after the grace: caches, directories, rows, a few hundred a step ─► gone
//! ```
//! Marking is the operator's (`turnhouse orgs delete`); from then on every host that finds the mark drives the rest, together and in any order: each
//! step is a short transaction of its own, so that no turn of another org waits for it, and what was interrupted goes on at the next step. Requests that
//! were let in before the mark was seen are over after the grace; [`Leaving`] keeps those out that read their body for longer.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};

use crate::clock::Timestamp;
use crate::dispatch::Dispatch;
use crate::ids::{OrgId, TurnId};
use crate::private_dirs::PrivateDirs;
use crate::store::{Commit, Erased, OrgRecord, Result, Store, Write};
use crate::turn::{CancelledBy, Outcome};

/// How often a host looks for marks, and how often it takes a step where there is one.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const STEP_EVERY: Duration = Duration::from_millis(100);

/// Rows of a step: some milliseconds of the store's time.
const ROWS_MAX: usize = 200;

/// Orgs that are being deleted, as of this host's last look.
#[derive(Default)]
pub struct Leaving(RwLock<HashSet<OrgId>>);

impl Leaving {
    /// Whether this org is.
    pub fn contains(&self, org: &OrgId) -> bool {
        self.0.read().contains(org)
    }
}

/// What the host's audit calls an org of which nothing is left, not even its name.
pub fn name_hash(org: &OrgId) -> String {
    hex::encode(Sha256::digest(org.as_str()))
}

/// Deletes what is marked, until it is dropped.
pub async fn erase(dispatch: Arc<Dispatch>, store: Arc<dyn Store>) {
    // When this host first saw the mark: its own caches are older than that.
    let mut seen: HashMap<OrgId, Timestamp> = HashMap::new();
    loop {
        let marked = match store.deleting_orgs().await {
            Ok(marked) => marked,
            Err(error) => {
                tracing::warn!(%error, "could not look for orgs to delete");
                Vec::new()
            }
        };
        if !marked.is_empty() || !seen.is_empty() {
            let now = dispatch.clock.now();
            seen.retain(|org, _| marked.iter().any(|found| found.id == *org));
            for org in &marked {
                seen.entry(org.id.clone()).or_insert(now);
            }
            *dispatch.leaving.0.write() = seen.keys().cloned().collect();
        }
        for org in &marked {
            if let Err(error) = step(&dispatch, &store, org, seen[&org.id]).await {
                tracing::warn!(org = %org.id, %error, "an org is not deleted yet");
            }
        }
        tokio::time::sleep(if marked.is_empty() { LOOK_EVERY } else { STEP_EVERY }).await;
    }
}

async fn step(dispatch: &Arc<Dispatch>, store: &Arc<dyn Store>, org: &OrgRecord, seen: Timestamp) -> Result<()> {
    let id = &org.id;
    let live = store.live_turns(id, ROWS_MAX).await?;
    // Through the dispatcher: their guests stop, and their clients hear of it.
    let end = |turn: TurnId| dispatch.end(id.clone(), turn, None, Outcome::Cancelled { by: CancelledBy::Deleted });
    futures_util::future::join_all(live.iter().map(|turn| end(*turn))).await;
    let marked = org.deleting_at.unwrap_or(seen).max(seen);
    if !live.is_empty() || dispatch.clock.now() < marked.plus_ms(dispatch.limits.org_deletion_grace_ms) {
        return Ok(());
    }
    // Before the rows that name them.
    for digest in store.module_digests(id).await? {
        dispatch.sandbox.forget(id, digest).await;
    }
    dispatch.registry.forget_org(id);
    if let Some(dirs) = &dispatch.private_dirs {
        dirs.clone().erase_org(id).await;
    }
    if store.erase_org(id, ROWS_MAX).await? == Erased::Whole {
        tracing::info!(org_sha256 = name_hash(id), "an org is deleted");
    }
    Ok(())
}

/// Deletes a marked org where no host is at work, a step at a time; `true` once nothing of it is left. For the command line, which must know that.
pub async fn erase_alone(
    store: &Arc<dyn Store>,
    dirs: Option<&Arc<PrivateDirs>>,
    org: &OrgId,
    now: Timestamp,
) -> Result<bool> {
    let live = store.live_turns(org, ROWS_MAX).await?;
    if !live.is_empty() {
        let end = |turn| {
            Write::Commit(Box::new(Commit {
                org: org.clone(),
                turn,
                epoch: None,
                outcome: Outcome::Cancelled { by: CancelledBy::Deleted },
                snapshot: None,
                tail: Default::default(),
                usage: None,
            }))
        };
        store.write(live.into_iter().map(end).collect(), now).await?;
        return Ok(false);
    }
    if let Some(dirs) = dirs {
        dirs.clone().erase_org(org).await;
    }
    Ok(store.erase_org(org, ROWS_MAX).await? == Erased::Whole)
}
