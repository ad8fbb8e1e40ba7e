//! The private directories of session mode `file`: where they are, whose they are, who uses them, and when they go.
//!
//! ```text
//! <data_dir>/files/<2 hex>/<SHA-256 of org, agent and conversation>/owner.json
//!                                                                   /<generation>/…    what the guest sees
//! <data_dir>/files/temporary/<uuid>/…                                                  of a turn without a place in a conversation
//! ```
//! A directory belongs to one *generation* of its conversation, and generations never come back: what is deleted or reset is dead from that
//! transaction on, whoever still has it open, and a conversation that is begun again starts from an empty directory. So removing is never
//! urgent, and there is one rule for it, [`PrivateDirs::settle`]: generations on the disk that are not their conversation's in the store are removed. It
//! is applied when a conversation is deleted or reset, when a turn leaves a directory, and to all of them at start. What is left is counted then, and noted in
//! the store, so that it is a part of what its org and its agent have stored.
//!
//! A conversation's directory is *taken* by one turn at a time. Its lane already sees to that; but a turn that was told to stop may still have
//! its guest for a moment when the next one is claimed, and the next waits here until the guest is gone and has no file operation in flight. That
//! is complete because only one host uses a data directory. It is why this is for the embedded store alone.

use std::collections::HashSet;
use std::fs::{self, DirBuilder};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::ids::{AgentId, ConversationId, OrgId};
use crate::limits::Limits;
use crate::sandbox::Control;
use crate::sandbox::private_dir::{PrivateDir, Quota, tree};
use crate::store::{Claimed, Store};

const OWNER: &str = "owner.json";
const TEMPORARY: &str = "temporary";

/// What a file, a directory or a link takes beside its bytes, when it is counted what is stored: an inode and a name.
const ENTRY_BYTES: u64 = 512;

/// All private directories of this host.
pub struct PrivateDirs {
    root: PathBuf,
    quota: Quota,
    store: Arc<dyn Store>,
    taken: Mutex<HashSet<Place>>,
    freed: Notify,
}

/// Why a turn has no directory.
#[derive(Debug, thiserror::Error)]
pub enum Unlent {
    /// The turn was told to stop before it could have one.
    #[error("the turn has ended")]
    Stopped,
    /// This host has none: others use its store, and a directory is one machine's.
    #[error("this host has no private directories")]
    NotHere,
    /// The disk.
    #[error("the private directory cannot be opened")]
    Io(#[from] io::Error),
}

/// A conversation's place on the disk: a hash, never an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Place([u8; 32]);

impl Place {
    /// The place whose directory this is, if it is one's.
    fn named(path: &Path) -> Option<Place> {
        let mut hash = [0; 32];
        hex::decode_to_slice(path.file_name()?.to_str()?, &mut hash).ok()?;
        Some(Place(hash))
    }
}

/// Whose a place is: from the disk, this is the way back to the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Owner {
    org: OrgId,
    agent: AgentId,
    conversation: ConversationId,
}

impl Owner {
    fn place(&self) -> Place {
        let mut hash = Sha256::new();
        for id in [self.org.as_str(), self.agent.as_str(), self.conversation.as_str()] {
            // With its length, so that no two triples run together.
            hash.update((id.len() as u64).to_le_bytes());
            hash.update(id);
        }
        Place(hash.finalize().into())
    }
}

/// A directory that a turn has.
pub struct Lent {
    dirs: Arc<PrivateDirs>,
    open: Option<PrivateDir>,
    of: Of,
}

enum Of {
    Conversation(Owner, Taken),
    Turn(Temporary),
}

impl PrivateDirs {
    /// Of a host that starts. Blocks.
    pub fn open(data_dir: &Path, limits: &Limits, store: Arc<dyn Store>) -> io::Result<Arc<PrivateDirs>> {
        let root = data_dir.join("files");
        make(&root)?;
        // What a crashed host left of its temporary ones is put aside, so that nobody has to tell it from what is made from now on.
        let left = root.join(format!("{TEMPORARY}-{}", Uuid::now_v7().simple()));
        match fs::rename(root.join(TEMPORARY), left) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => make(&root.join(TEMPORARY))?,
        }
        Ok(Arc::new(PrivateDirs {
            root,
            quota: Quota::from(limits),
            store,
            taken: Mutex::default(),
            freed: Notify::new(),
        }))
    }

    /// A directory for a turn in file mode: its conversation's, or a temporary one where it has no place in any. Waits for the guest of an earlier
    /// turn of the conversation that is on its way out.
    pub async fn lend(self: &Arc<Self>, claimed: &Claimed, control: &Control) -> Result<Lent, Unlent> {
        let quota = self.quota;
        let (Some(generation), Some(conversation)) = (claimed.generation, &claimed.envelope.conversation) else {
            let temporary = Temporary(self.root.join(TEMPORARY).join(Uuid::now_v7().simple().to_string()));
            return blocking({
                let dirs = self.clone();
                move || {
                    make(&temporary.0)?;
                    let open = PrivateDir::open(&temporary.0, quota)?;
                    Ok(Lent { dirs, open: Some(open), of: Of::Turn(temporary) })
                }
            })
            .await
            .map_err(Unlent::Io);
        };
        let owner =
            Owner { org: claimed.lease.org.clone(), agent: claimed.agent.clone(), conversation: conversation.clone() };
        let taken = tokio::select! {
            taken = self.clone().take(owner.place()) => taken,
            _ = control.until_stopped() => return Err(Unlent::Stopped),
        };
        // Whoever deletes a conversation stops its turns first and takes the place then: either it finds us here, or we see that here.
        if control.stopped().is_some() {
            return Err(Unlent::Stopped);
        }
        let place = self.path(taken.place);
        let dirs = self.clone();
        blocking(move || {
            own(&place, &owner)?;
            let path = place.join(generation.simple().to_string());
            make(&path)?;
            let open = PrivateDir::open(&path, quota)?;
            Ok(Lent { dirs, open: Some(open), of: Of::Conversation(owner, taken) })
        })
        .await
        .map_err(Unlent::Io)
    }

    /// After a conversation was deleted or reset: removes what was its directory, once no guest uses it any more.
    pub async fn forget(self: Arc<Self>, org: OrgId, agent: AgentId, conversation: ConversationId) {
        let owner = Owner { org, agent, conversation };
        let taken = self.clone().take(owner.place()).await;
        self.settle(&owner, &taken).await;
    }

    /// Removes what earlier incarnations of the host left: temporary directories, and those whose conversation was deleted or reset.
    pub async fn sweep(self: Arc<Self>) {
        let root = self.root.clone();
        let found = blocking(move || {
            let mut places = Vec::new();
            for entry in fs::read_dir(&root)? {
                let path = entry?.path();
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                if name.starts_with(&format!("{TEMPORARY}-")) {
                    tree::remove(&path)?;
                } else if name.len() == 2 {
                    places.extend(fs::read_dir(&path)?.filter_map(|place| Some(place.ok()?.path())));
                }
            }
            Ok(places)
        });
        let places = found.await.unwrap_or_else(|error| {
            tracing::warn!(%error, "private directories that nobody has could not be looked for");
            Vec::new()
        });
        for path in places {
            // Taken before it is looked into: a turn may just be beginning it.
            let Some(place) = Place::named(&path) else { continue };
            let taken = self.clone().take(place).await;
            match blocking(move || begun_by(&path)).await {
                Ok(Some(owner)) if owner.place() == place => self.settle(&owner, &taken).await,
                Ok(None) => {}
                // Perhaps somebody's: it stays.
                Ok(Some(_)) => tracing::warn!("a private directory is not where its owner's belongs; it is kept"),
                Err(error) => tracing::warn!(%error, "it is not known whose a private directory is; it is kept"),
            }
        }
    }

    /// Removes all that is an org's, which is being deleted: no turn of it runs or will.
    pub async fn erase_org(self: Arc<Self>, org: &OrgId) {
        let (root, org) = (self.root.clone(), org.clone());
        let found = blocking(move || {
            let mut places = Vec::new();
            for entry in fs::read_dir(&root)? {
                let path = entry?.path();
                if path.file_name().is_some_and(|name| name.len() == 2) {
                    places.extend(fs::read_dir(&path)?.filter_map(|place| Some(place.ok()?.path())));
                }
            }
            let of_org = |place: PathBuf| {
                let owner = owner_of(&place).ok().flatten()?;
                (owner.org == org).then_some((owner, place))
            };
            Ok(places.into_iter().filter_map(of_org).collect::<Vec<_>>())
        });
        let found = found.await.unwrap_or_else(|error| {
            tracing::warn!(%error, "private directories could not be looked through");
            Vec::new()
        });
        for (owner, place) in found {
            // Once the guest of a turn that was ended has left it.
            let taken = self.clone().take(owner.place()).await;
            if let Err(error) = blocking(move || tree::remove(&place)).await {
                tracing::warn!(%error, "a private directory of a deleted org could not be removed; it is tried again");
            }
            drop(taken);
        }
    }

    /// The one rule. A generation that is seen on the disk and is not the conversation's afterwards is dead for ever. Of a conversation that the store
    /// has never had nothing is removed: deleting one leaves its row, so this is another database than the one that was here.
    async fn settle(&self, owner: &Owner, taken: &Taken) {
        let place = self.path(taken.place);
        if let Err(error) = self.try_settle(owner, place).await {
            tracing::warn!(%error, org = %owner.org, agent = %owner.agent, "a private directory is neither tidied nor counted; the next turn or start looks again");
        }
    }

    async fn try_settle(&self, owner: &Owner, place: PathBuf) -> anyhow::Result<()> {
        let listed = {
            let place = place.clone();
            blocking(move || if place.exists() { generations(&place).map(Some) } else { Ok(None) }).await?
        };
        let Some(listed) = listed else { return Ok(()) };
        let Some(live) = self.store.generation(&owner.org, &owner.agent, &owner.conversation).await? else {
            anyhow::bail!("the database does not know its conversation");
        };
        let kept = live.simple().to_string();
        let held = blocking(move || {
            for name in listed.iter().filter(|name| **name != kept) {
                tree::remove(&place.join(name))?;
            }
            if !listed.contains(&kept) {
                tree::remove(&place)?;
                return Ok(None);
            }
            tree::measure(fs::File::open(place.join(kept))?).map(Some)
        })
        .await?;
        if let Some(held) = held {
            let bytes = held.bytes.saturating_add(held.files.saturating_mul(ENTRY_BYTES));
            self.store.note_files(&owner.org, &owner.agent, &owner.conversation, live, bytes).await?;
        }
        Ok(())
    }

    async fn take(self: Arc<Self>, place: Place) -> Taken {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if self.taken.lock().insert(place) {
                return Taken { dirs: self.clone(), place };
            }
            freed.await;
        }
    }

    fn path(&self, place: Place) -> PathBuf {
        let name = hex::encode(place.0);
        self.root.join(&name[..2]).join(name)
    }
}

impl Lent {
    /// The directory, once, for the guest.
    pub fn take(&mut self) -> Option<PrivateDir> {
        self.open.take()
    }

    /// The guest is gone: a temporary directory goes, too, and so does that of a conversation that was deleted meanwhile.
    pub async fn leave(self) {
        match self.of {
            Of::Conversation(owner, taken) => self.dirs.settle(&owner, &taken).await,
            Of::Turn(temporary) => {
                let _ = blocking(move || {
                    drop(temporary);
                    Ok(())
                })
                .await;
            }
        }
    }
}

/// Nobody else uses the place while this lives.
struct Taken {
    dirs: Arc<PrivateDirs>,
    place: Place,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.dirs.taken.lock().remove(&self.place);
        self.dirs.freed.notify_waiters();
    }
}

/// A directory that goes with this, also when a turn's future is dropped.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = tree::remove(&self.0) {
            tracing::warn!(%error, "a temporary directory could not be removed; the next start does");
        }
    }
}

/// For the host's user alone.
fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes a place and says whose it is, durably, before anything of its owner's is in it.
fn own(place: &Path, owner: &Owner) -> io::Result<()> {
    if place.join(OWNER).exists() {
        return Ok(());
    }
    make(place)?;
    let mut file = tempfile::NamedTempFile::new_in(place)?;
    file.write_all(&serde_json::to_vec(owner)?)?;
    file.as_file().sync_all()?;
    file.persist(place.join(OWNER)).map_err(|error| error.error)?;
    fs::File::open(place)?.sync_all()
}

/// `None`: nothing was begun there yet.
fn owner_of(place: &Path) -> io::Result<Option<Owner>> {
    match fs::read(place.join(OWNER)) {
        Ok(json) => Ok(Some(serde_json::from_slice(&json)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && generations(place)?.is_empty() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The same of a place that is taken: where nothing was begun, it is removed.
fn begun_by(place: &Path) -> io::Result<Option<Owner>> {
    let owner = owner_of(place)?;
    if owner.is_none() {
        tree::remove(place)?;
    }
    Ok(owner)
}

/// The names of a place's generations.
fn generations(place: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::{SqliteOptions, SqliteStore};

    fn owner(org: &str, agent: &str, conversation: &str) -> Owner {
        Owner {
            org: OrgId::parse(org).unwrap(),
            agent: AgentId::parse(agent).unwrap(),
            conversation: ConversationId::parse(conversation).unwrap(),
        }
    }

    #[test]
    fn o1_no_two_conversations_share_a_place() {
        let owners = [
            owner("acme", "notes", "c1"),
            owner("other", "notes", "c1"),
            owner("acme", "note", "sc1"),
            owner("acme", "notesc", "1"),
            owner("acmen", "otes", "c1"),
        ];
        let places: HashSet<_> = owners.iter().map(Owner::place).collect();
        assert_eq!(places.len(), owners.len());
    }

    #[test]
    fn a_place_knows_whose_it_is_and_one_that_never_began_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let (place, empty) = (root.path().join("p"), root.path().join("q"));
        own(&place, &owner("acme", "notes", "c1")).unwrap();
        own(&place, &owner("acme", "notes", "c1")).unwrap();
        assert_eq!(owner_of(&place).unwrap(), Some(owner("acme", "notes", "c1")));
        make(&empty).unwrap();
        assert_eq!(owner_of(&empty).unwrap(), None);
        assert!(empty.exists(), "whoever only asks removes nothing");
        assert_eq!(begun_by(&empty).unwrap(), None);
        assert!(!empty.exists());
        // Somebody's, perhaps: a generation whose owner cannot be read is not removed.
        fs::write(place.join(OWNER), "{").unwrap();
        make(&place.join("generation")).unwrap();
        assert!(begun_by(&place).is_err());
        assert!(place.join("generation").exists());
    }

    #[tokio::test]
    async fn a_sweep_waits_for_the_turn_that_begins_a_place() {
        let home = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(SqliteOptions::new(home.path().join("data"))).await.unwrap();
        let dirs = PrivateDirs::open(home.path(), &Limits::default(), Arc::new(store)).unwrap();
        let place = owner("acme", "notes", "c1").place();
        let path = dirs.path(place);
        let taken = dirs.clone().take(place).await;
        make(&path).unwrap();
        let sweep = tokio::spawn(dirs.clone().sweep());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        assert!(path.exists(), "it was just being begun");
        drop(taken);
        sweep.await.unwrap();
        assert!(!path.exists(), "nobody went on");
    }
}
