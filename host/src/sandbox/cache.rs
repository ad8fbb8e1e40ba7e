//! Compiled modules on disk. Loading one is running native code, so that nothing is trusted for lying in the directory.
//!
//! A file is named for what it is (org, digest of the wasm, the engine's settings and version) and carries a MAC over that name and its
//! content, under a key outside the directory. Whatever is corrupt, truncated, of another host or swapped with a neighbour is compiled
//! anew. It is driven by `Sandbox::load`, on threads that may block.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::hash::{Hash as _, Hasher};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use wasmtime::Engine;

use super::bulk;
use crate::ids::OrgId;

/// Where compiled modules are kept.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// Their directory, which nobody else may enter.
    pub directory: PathBuf,
    /// The key that authenticates them; not inside the directory.
    pub key_file: PathBuf,
    /// Their size in all.
    pub bytes_max: u64,
}

const KEY_BYTES: usize = 32;
const MAC_BYTES: usize = 32;

/// Files that are being written end in this; those of a dead process are swept with the rest.
const SUFFIX: &str = ".cwasm";

/// What a look into the cache found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The content, authenticated.
    Hit(Vec<u8>),
    Miss,
    /// Something is there that this host did not write, or not there.
    Rejected,
}

pub(super) struct ModuleCache {
    directory: PathBuf,
    key: [u8; KEY_BYTES],
    bytes_max: u64,
    engine: [u8; 32],
    /// One eviction at a time.
    evicting: Mutex<()>,
}

/// A compiled module's name: hex, fit for a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CacheName(String);

impl ModuleCache {
    pub(super) fn open(config: &CacheConfig, engine: &Engine) -> io::Result<ModuleCache> {
        private_directory(&config.directory)?;
        if config.key_file.starts_with(&config.directory) {
            return Err(io::Error::other("the module cache's key must not lie in the directory that it protects"));
        }
        Ok(ModuleCache {
            directory: config.directory.clone(),
            key: key(&config.key_file)?,
            bytes_max: config.bytes_max,
            engine: compatibility(engine),
            evicting: Mutex::new(()),
        })
    }

    pub(super) fn name(&self, org: &OrgId, digest: &[u8; 32]) -> CacheName {
        let mut hash = Sha256::new();
        hash.update((org.as_str().len() as u64).to_le_bytes());
        hash.update(org.as_str());
        hash.update(digest);
        hash.update(self.engine);
        CacheName(hex::encode(hash.finalize()))
    }

    /// Reads and authenticates.
    pub(super) fn read(&self, name: &CacheName) -> Found {
        let path = self.path(name);
        let mut content = Vec::new();
        let read = OpenOptions::new()
            .read(true)
            .custom_flags(nofollow())
            .open(&path)
            .and_then(|file| file.take(self.bytes_max).read_to_end(&mut content).map(|_| ()));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Found::Miss,
            Err(error) => {
                tracing::warn!(error = error.to_string(), "a compiled module cannot be read; it is compiled anew");
                return Found::Rejected;
            }
            Ok(()) => {}
        }
        let Some((mac, _)) = content.split_first_chunk::<MAC_BYTES>() else { return Found::Rejected };
        let mac = *mac;
        if self.mac(name, &content[MAC_BYTES..]).verify_slice(&mac).is_err() {
            return Found::Rejected;
        }
        content.drain(..MAC_BYTES);
        // The oldest goes first when room is needed; what is used is not old.
        if let Ok(file) = File::open(&path) {
            let _ = file.set_modified(SystemTime::now());
        }
        Found::Hit(content)
    }

    /// Writes beside and renames: a reader sees all of a file or none of it. What does not fit the bound is not kept.
    pub(super) fn write(&self, name: &CacheName, content: &[u8]) -> io::Result<()> {
        let bytes = (content.len() + MAC_BYTES) as u64;
        if bytes > self.bytes_max {
            return Ok(());
        }
        self.make_room(bytes)?;
        let mac = self.mac(name, content).finalize().into_bytes();
        let mut file = tempfile::Builder::new()
            .prefix(".writing-")
            .suffix(SUFFIX)
            .permissions(Permissions::from_mode(0o600))
            .tempfile_in(&self.directory)?;
        file.write_all(&mac)?;
        file.write_all(content)?;
        file.persist(self.path(name)).map_err(|error| error.error)?;
        Ok(())
    }

    /// Removes a file that turned out not to be what it should.
    pub(super) fn forget(&self, name: &CacheName) {
        let _ = std::fs::remove_file(self.path(name));
    }

    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let _one = self.evicting.lock();
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            if !entry.file_name().to_string_lossy().ends_with(SUFFIX) {
                continue;
            }
            // One that another thread has just replaced is nobody's concern.
            let Ok(metadata) = entry.metadata() else { continue };
            files.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len(), entry.path()));
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        for (_, len, path) in files {
            if total + bytes <= self.bytes_max {
                break;
            }
            std::fs::remove_file(path)?;
            total -= len;
        }
        Ok(())
    }

    fn mac(&self, name: &CacheName, content: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).expect("any length is a key");
        mac.update(name.0.as_bytes());
        mac.update(content);
        mac
    }

    pub(super) fn path(&self, name: &CacheName) -> PathBuf {
        self.directory.join(format!("{}{SUFFIX}", name.0))
    }
}

fn nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

/// Makes the directory, or tightens one that is there.
fn private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let metadata = std::fs::symlink_metadata(path)?;
    if !metadata.is_dir() {
        return Err(io::Error::other(format!("{} is not a directory", path.display())));
    }
    if metadata.permissions().mode() & 0o777 != 0o700 {
        std::fs::set_permissions(path, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

/// Reads the key, or makes one at first use.
fn key(path: &Path) -> io::Result<[u8; KEY_BYTES]> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !path.try_exists()? {
        let mut key = [0; KEY_BYTES];
        getrandom::fill(&mut key).map_err(|error| io::Error::other(error.to_string()))?;
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        let mut file = tempfile::Builder::new().permissions(Permissions::from_mode(0o600)).tempfile_in(parent)?;
        file.write_all(&key)?;
        file.as_file().sync_all()?;
        // Another process may have been quicker: its key is the one.
        match file.persist_noclobber(path) {
            Ok(_) => return Ok(key),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.error),
        }
    }
    let mut key = Vec::new();
    let file = OpenOptions::new().read(true).custom_flags(nofollow()).open(path)?;
    if file.metadata()?.permissions().mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "the module cache's key was open to others and is made anew");
        std::fs::remove_file(path)?;
        return self::key(path);
    }
    file.take(KEY_BYTES as u64 + 1).read_to_end(&mut key)?;
    key.try_into().map_err(|_| {
        io::Error::other(format!("{} is not a key of the module cache; remove it and start again", path.display()))
    })
}

/// What an engine's compiled modules depend on, as a digest.
fn compatibility(engine: &Engine) -> [u8; 32] {
    struct Sha256Hasher(Sha256);
    impl Hasher for Sha256Hasher {
        fn write(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
        fn finish(&self) -> u64 {
            unreachable!("the digest is taken instead")
        }
    }
    let mut hasher = Sha256Hasher(Sha256::new());
    engine.precompile_compatibility_hash().hash(&mut hasher);
    hasher.0.update([bulk::REVISION]);
    hasher.0.finalize().into()
}
