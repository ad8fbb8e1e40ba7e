//! From a module's bytes to a [`Worker`]: inspected, compiled on a thread that may be kept busy, kept in memory and on disk.
//!
//! An upload and a turn take the same way in, [`Sandbox::load`]: what was compiled for the one is there for the other.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use wasmtime::{Engine, Module};

use super::Sandbox;
use super::cache::{CacheName, Found, ModuleCache};
use super::inspect::{self, Inspection, ModuleRefusal};
use super::module::{self, Worker};
use crate::ids::OrgId;

/// Why a worker could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The module cannot be a worker here.
    #[error(transparent)]
    Refused(#[from] ModuleRefusal),
    /// Its bytes could not be had.
    #[error("the module's bytes cannot be read")]
    Fetch(#[source] anyhow::Error),
    /// They are not those of the digest.
    #[error("the module's bytes are not those that were uploaded")]
    Digest,
}

impl Sandbox {
    /// Reads a module's structure without compiling anything: cheap, and the first thing that an upload meets.
    pub fn inspect(&self, wasm: &[u8]) -> Result<Inspection, ModuleRefusal> {
        inspect::inspect(wasm, &self.importable, &self.limits)
    }

    /// Inspects, validates and compiles, on a thread of its own, bounded in number and time.
    pub async fn compile(&self, wasm: Bytes) -> Result<Worker, ModuleRefusal> {
        let module = self.compile_module(wasm).await?;
        Worker::link(&self.linker, &module)
    }

    async fn compile_module(&self, wasm: Bytes) -> Result<Module, ModuleRefusal> {
        self.inspect(&wasm)?;
        let timeout_ms = self.limits.compile_timeout_ms;
        let engine = self.engine.clone();
        let compiling = self.compiling.clone();
        let compiled = tokio::time::timeout(Duration::from_millis(timeout_ms), async move {
            let permit = compiling.acquire_owned().await.expect("the semaphore is never closed");
            self.handle
                .spawn_blocking(move || {
                    // Held until the compiler is done, even when nobody waits for it any more: it cannot be interrupted.
                    let _permit = permit;
                    module::compile(&engine, &wasm)
                })
                .await
        });
        match compiled.await {
            Err(_) => Err(ModuleRefusal::CompileTimeout { timeout_ms }),
            Ok(Ok(result)) => result,
            Ok(Err(error)) => {
                tracing::error!(error = error.to_string(), "the compiler failed on a module");
                Err(ModuleRefusal::TooComplex(
                    "the compiler failed on the module; build it with another toolchain version".to_owned(),
                ))
            }
        }
    }

    /// The worker of an org's module: from memory, from the cache on disk, or compiled from `wasm`, which is asked only then. Any number of
    /// callers at once make it once.
    pub async fn load<F, Fut>(&self, org: &OrgId, digest: [u8; 32], wasm: F) -> Result<Arc<Worker>, Arc<LoadError>>
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = anyhow::Result<Bytes>>,
    {
        let make = async {
            let cached = self.cache.as_ref().map(|cache| (cache.clone(), cache.name(org, &digest)));
            if let Some((cache, name)) = cached.clone()
                && let Some(module) = self.load_cached(cache, name).await
            {
                return Ok(Arc::new(Worker::link(&self.linker, &module)?));
            }
            let wasm = wasm().await.map_err(LoadError::Fetch)?;
            if <[u8; 32]>::from(Sha256::digest(&wasm)) != digest {
                return Err(LoadError::Digest);
            }
            let module = self.compile_module(wasm).await?;
            if let Some((cache, name)) = cached {
                self.keep_cached(cache, name, module.clone()).await;
            }
            Ok(Arc::new(Worker::link(&self.linker, &module)?))
        };
        self.loaded.try_get_with((org.clone(), digest), make).await
    }

    async fn load_cached(&self, cache: Arc<ModuleCache>, name: CacheName) -> Option<Module> {
        let engine = self.engine.clone();
        let read = self.handle.spawn_blocking(move || {
            let found = match cache.read(&name) {
                Found::Hit(content) => match deserialize(&engine, &content) {
                    Ok(module) => Ok(module),
                    Err(error) => {
                        tracing::warn!(error = format!("{error:#}"), "an authentic compiled module is not this engine's");
                        Err("rejected")
                    }
                },
                Found::Miss => Err("miss"),
                Found::Rejected => {
                    tracing::warn!("a compiled module in the cache was not written by this host, or is damaged; it is compiled anew");
                    Err("rejected")
                }
            };
            if found.as_ref().err() == Some(&"rejected") {
                cache.forget(&name);
            }
            found
        });
        let found = read.await.unwrap_or(Err("miss"));
        let result = found.as_ref().err().copied().unwrap_or("hit");
        metrics::counter!("turnhouse_module_cache_total", "result" => result).increment(1);
        found.ok()
    }

    async fn keep_cached(&self, cache: Arc<ModuleCache>, name: CacheName, module: Module) {
        let written = self.handle.spawn_blocking(move || -> anyhow::Result<()> {
            cache.write(&name, &module.serialize()?)?;
            Ok(())
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(
                error = format!("{error:#}"),
                "a compiled module could not be kept; it will be compiled again at the next start"
            );
        }
    }
}

/// The one place where bytes become native code.
#[allow(
    unsafe_code,
    reason = "the bytes carry a MAC of this host's key over their name and content: this host's compiler wrote them"
)]
fn deserialize(engine: &Engine, authentic: &[u8]) -> wasmtime::Result<Module> {
    // SAFETY: `ModuleCache::read` has verified that `Module::serialize` of a process with this host's key made exactly these bytes, for an
    // engine of the same compatibility hash; they are read into memory before they are verified and cannot change after.
    unsafe { Module::deserialize(engine, authentic) }
}
