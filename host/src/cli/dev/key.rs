//! The key of `turnhouse dev`: made once, kept in the data directory for its owner alone, and used again.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use turnhouse::audit::Actor;
use turnhouse::caller::Scopes;
use turnhouse::clock::Timestamp;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::keys;
use turnhouse::store::Store;

use super::super::{CliError, Result, database};

/// All of them: it is the author's own machine.
const SCOPES: Scopes =
    Scopes::TURNS.and(Scopes::DEPLOY).and(Scopes::ADMIN).and(Scopes::INGEST).and(Scopes::ACT_AS).and(Scopes::OPERATOR);

/// The key in `file` if it works, else a new one, written there.
pub async fn keep(store: &dyn Store, file: &Path, org: &OrgId, user: &UserId, now: Timestamp) -> Result<String> {
    if let Some(secret) = read(file)?
        && let Some(hash) = keys::hash(&secret)
    {
        let known = store.key(hash).await.map_err(database::failed)?;
        let works = |key: &turnhouse::store::KeyRecord| {
            key.org == *org && key.revoked_at.is_none() && key.expires_at.is_none_or(|at| now < at)
        };
        if known.as_ref().is_some_and(works) {
            return Ok(secret);
        }
    }
    let key = keys::mint(org.clone(), user.clone(), SCOPES, "turnhouse dev", None, now);
    if !store.create_key(key.hash, &key.record, &Actor::command_line()).await.map_err(database::failed)? {
        return Err(CliError::failed(format!("there is no org {org}")));
    }
    write(file, &key.secret)?;
    Ok(key.secret)
}

/// What the file holds, if there is one. One that others could read is closed to them from now on.
fn read(file: &Path) -> Result<Option<String>> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CliError::failed(format!("cannot read {}: {error}", file.display()))),
    };
    let mode = std::fs::metadata(file).map(|meta| meta.permissions().mode() & 0o777);
    if mode.is_ok_and(|mode| mode & 0o077 != 0) {
        std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot close {} to others", file.display()))?;
    }
    Ok(Some(text.trim().to_owned()))
}

/// Replaces the file; at no moment can others read it.
fn write(file: &Path, secret: &str) -> Result {
    let write = || -> std::io::Result<()> {
        // Made with mode 0600.
        let mut new = tempfile::NamedTempFile::new_in(file.parent().unwrap_or(Path::new(".")))?;
        writeln!(new, "{secret}")?;
        new.persist(file)?;
        Ok(())
    };
    Ok(write().with_context(|| format!("cannot write {}", file.display()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(file: &Path) -> u32 {
        std::fs::metadata(file).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_key_file_is_for_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("dev-key");
        assert_eq!(read(&file).unwrap(), None);
        write(&file, "th_x").unwrap();
        assert_eq!(mode(&file), 0o600);
        assert_eq!(read(&file).unwrap().as_deref(), Some("th_x"));
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        read(&file).unwrap();
        assert_eq!(mode(&file), 0o600, "what others could read is closed to them");
    }
}
