//! The cache of compiled modules trusts nothing for lying in its directory.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::*;

struct Cached {
    _root: tempfile::TempDir,
    config: CacheConfig,
}

impl Cached {
    fn new() -> Cached {
        let root = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            directory: root.path().join("modules"),
            key_file: root.path().join("module-cache.key"),
            bytes_max: 1 << 30,
        };
        Cached { _root: root, config }
    }

    fn sandbox(&self) -> Arc<Sandbox> {
        let limits = Limits { host_running_max: 2, ..Limits::default() };
        Sandbox::new(&SandboxConfig { cache: Some(self.config.clone()), ..SandboxConfig::new(limits) }).unwrap()
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files: Vec<_> =
            fs::read_dir(&self.config.directory).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }
}

fn wasm(exit: u32) -> Bytes {
    wat::parse_str(format!(
        r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (memory (export "memory") 1) (func (export "_start") (call $exit (i32.const {exit}))))"#
    ))
    .unwrap()
    .into()
}

/// Loads in a host that has nothing in memory. Whether it had to compile.
fn compiles(cached: &Cached, org: &str, wasm: &Bytes) -> bool {
    let sandbox = cached.sandbox();
    let digest = Sha256::digest(wasm).into();
    let asked = AtomicUsize::new(0);
    let org = OrgId::parse(org).unwrap();
    let load = sandbox.load(&org, digest, || async {
        asked.fetch_add(1, Ordering::Relaxed);
        Ok(wasm.clone())
    });
    sandbox.handle().block_on(load).unwrap();
    asked.into_inner() == 1
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_module_is_compiled_once_over_restarts_and_its_files_are_private() {
    let cached = Cached::new();
    assert!(compiles(&cached, "acme", &wasm(1)));
    assert!(!compiles(&cached, "acme", &wasm(1)));
    assert_eq!(mode(&cached.config.directory), 0o700);
    assert_eq!(mode(&cached.config.key_file), 0o600);
    assert_eq!(cached.files().iter().map(|file| mode(file)).collect::<Vec<_>>(), [0o600]);
}

#[test]
fn o3_the_cache_is_keyed_by_org() {
    let cached = Cached::new();
    assert!(compiles(&cached, "acme", &wasm(1)));
    assert!(compiles(&cached, "umbrella", &wasm(1)));
    assert_eq!(cached.files().len(), 2);
}

#[test]
fn a_damaged_truncated_swapped_or_foreign_file_is_compiled_anew() {
    let cached = Cached::new();
    assert!(compiles(&cached, "acme", &wasm(1)));
    let first = cached.files()[0].clone();
    assert!(compiles(&cached, "acme", &wasm(2)));
    let second = cached.files().into_iter().find(|file| *file != first).unwrap();
    let sound = fs::read(&first).unwrap();
    let mut damaged = sound.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let mut forged = sound.clone();
    forged[..32].fill(0);
    for bad in [
        damaged,
        forged,
        sound[..sound.len() - 1].to_vec(),
        sound[..10].to_vec(),
        Vec::new(),
        fs::read(&second).unwrap(),
    ] {
        fs::write(&first, &bad).unwrap();
        assert!(compiles(&cached, "acme", &wasm(1)), "{} bytes", bad.len());
        assert!(!compiles(&cached, "acme", &wasm(1)), "it is mended");
    }
    // Written under another key: by another host, or by somebody else.
    fs::write(&cached.config.key_file, [7; 32]).unwrap();
    assert!(compiles(&cached, "acme", &wasm(1)));
    // A link out of the directory is not followed.
    let outside = cached.config.directory.with_file_name("outside");
    fs::rename(&first, &outside).unwrap();
    std::os::unix::fs::symlink(&outside, &first).unwrap();
    assert!(compiles(&cached, "acme", &wasm(1)));
}

#[test]
fn the_oldest_give_way_when_the_bound_is_met() {
    let mut cached = Cached::new();
    assert!(compiles(&cached, "acme", &wasm(1)));
    let one = fs::metadata(&cached.files()[0]).unwrap().len();
    cached.config.bytes_max = one * 2 + one / 2;
    assert!(compiles(&cached, "acme", &wasm(2)));
    // Used, so no longer the oldest.
    assert!(!compiles(&cached, "acme", &wasm(1)));
    assert!(compiles(&cached, "acme", &wasm(3)));
    assert_eq!(cached.files().len(), 2);
    assert!(!compiles(&cached, "acme", &wasm(1)));
    assert!(compiles(&cached, "acme", &wasm(2)));
}

#[test]
fn a_key_that_is_none_or_lies_in_the_cache_is_told_at_the_start() {
    let mut cached = Cached::new();
    fs::write(&cached.config.key_file, b"short").unwrap();
    fs::set_permissions(&cached.config.key_file, fs::Permissions::from_mode(0o600)).unwrap();
    let error = Sandbox::new(&SandboxConfig {
        cache: Some(cached.config.clone()),
        ..SandboxConfig::new(Limits { host_running_max: 2, ..Limits::default() })
    })
    .map(|_| ())
    .unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(error)).contains("remove it"));
    cached.config.key_file = cached.config.directory.join("key");
    let config = SandboxConfig { cache: Some(cached.config.clone()), ..SandboxConfig::new(Limits::default()) };
    assert!(matches!(Sandbox::new(&config), Err(SandboxError::Cache(_))));
}

#[test]
fn many_loads_at_once_compile_once_and_a_refusal_is_not_kept() {
    let sandbox = sandbox();
    let org = OrgId::parse("acme").unwrap();
    let wasm = wasm(77);
    let digest: [u8; 32] = Sha256::digest(&wasm).into();
    let asked = AtomicUsize::new(0);
    let load = || {
        sandbox.load(&org, digest, || async {
            asked.fetch_add(1, Ordering::Relaxed);
            Ok(wasm.clone())
        })
    };
    sandbox.handle().block_on(async {
        let loaded = futures_util::future::join_all((0..20).map(|_| load())).await;
        assert!(loaded.iter().all(|worker| Arc::ptr_eq(worker.as_ref().unwrap(), loaded[0].as_ref().unwrap())));
    });
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    let other = Sha256::digest(b"other").into();
    let wrong = sandbox.handle().block_on(sandbox.load(&org, other, || async { Ok(wasm.clone()) }));
    assert!(matches!(*wrong.unwrap_err(), LoadError::Digest));
    let text = Bytes::from_static(b"(module)");
    let digest = Sha256::digest(&text).into();
    for _ in 0..2 {
        let refused = sandbox.handle().block_on(sandbox.load(&org, digest, || async { Ok(text.clone()) }));
        assert!(matches!(&*refused.unwrap_err(), LoadError::Refused(refusal) if refusal.code() == "module_invalid"));
    }
}
