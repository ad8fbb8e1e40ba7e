//! From a module's bytes to a [`Worker`]: inspected, compiled where it can do no harm, kept in memory and on disk.
//!
//! An upload and a turn take the same way in, [`Sandbox::load`]: what was compiled for the one is there for the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use wasmtime::{Engine, Module};

use super::Sandbox;
use super::cache::{CacheName, Found, ModuleCache};
use super::compiler;
use super::inspect::{self, Inspection, ModuleRefusal};
use super::module::Worker;
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

    /// The same, and its SHA-256, on a thread that may be kept busy: a module may have many MiB.
    pub async fn inspect_apart(&self, wasm: Bytes) -> (Result<Inspection, ModuleRefusal>, [u8; 32]) {
        let (importable, limits) = (self.importable.clone(), self.limits.clone());
        let inspected = self.handle.spawn_blocking(move || {
            (inspect::inspect(&wasm, &importable, &limits), <[u8; 32]>::from(Sha256::digest(&wasm)))
        });
        inspected.await.unwrap_or_else(|error| {
            tracing::error!(error = error.to_string(), "reading a module's structure failed");
            let refusal = ModuleRefusal::Invalid("the module's structure cannot be read; build it again".to_owned());
            (Err(refusal), [0; 32])
        })
    }

    /// Inspects, validates and compiles, bounded in number, time and memory.
    pub async fn compile(&self, wasm: Bytes) -> Result<Worker, ModuleRefusal> {
        self.inspect_apart(wasm.clone()).await.0?;
        let compiled = self.compiled(wasm).await?;
        Worker::link(&self.linker, &self.deserialized(&compiled)?)
    }

    /// The native code of a module that was inspected, as bytes: in a process of its own where the host has named its compiler, else on a thread that may be kept busy.
    async fn compiled(&self, wasm: Bytes) -> Result<Vec<u8>, ModuleRefusal> {
        let begun = Instant::now();
        let timeout_ms = self.limits.compile_timeout_ms;
        // Waiting for others' modules is not this one's fault.
        let permit = self.compiling.clone().acquire_owned().await.expect("the semaphore is never closed");
        let compiling = async {
            match &self.compiler {
                Some(program) => compiler::compile_apart(program, &self.limits, self.allocator, wasm).await,
                None => {
                    let engine = self.engine.clone();
                    let compiled = self.handle.spawn_blocking(move || {
                        // Held until the compiler is done, even when nobody waits for it any more: here it cannot be interrupted.
                        let _permit = permit;
                        compiler::compile_here(&engine, &wasm)
                    });
                    compiled.await.unwrap_or_else(|error| {
                        tracing::error!(error = error.to_string(), "the compiler failed on a module");
                        Err(ModuleRefusal::TooComplex(
                            "the compiler failed on the module; build it with another toolchain version".to_owned(),
                        ))
                    })
                }
            }
        };
        let compiled = tokio::time::timeout(Duration::from_millis(timeout_ms), compiling)
            .await
            .unwrap_or(Err(ModuleRefusal::CompileTimeout { timeout_ms }));
        let result = compiled.as_ref().err().map_or("compiled", ModuleRefusal::code);
        metrics::counter!("turnhouse_compiles_total", "result" => result).increment(1);
        metrics::histogram!("turnhouse_compile_duration_seconds").record(begun.elapsed().as_secs_f64());
        compiled
    }

    /// Native code that this host's compiler has just made, as a module.
    fn deserialized(&self, compiled: &[u8]) -> Result<Module, ModuleRefusal> {
        // What compiles and is still refused is over a limit of the pool's slots.
        deserialize(&self.engine, compiled).map_err(|error| {
            let reason: String = format!("{error:#}").chars().take(300).collect();
            ModuleRefusal::TooComplex(format!("the module is more than this host runs: {reason}; link less into it"))
        })
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
            let (inspected, found) = self.inspect_apart(wasm.clone()).await;
            if found != digest {
                return Err(LoadError::Digest);
            }
            inspected?;
            let compiled = self.compiled(wasm).await?;
            let module = self.deserialized(&compiled)?;
            if let Some((cache, name)) = cached {
                self.keep_cached(cache, name, compiled).await;
            }
            Ok(Arc::new(Worker::link(&self.linker, &module)?))
        };
        self.loaded.try_get_with((org.clone(), digest), make).await
    }

    /// Drops an org's module from memory and from the disk.
    pub async fn forget(&self, org: &OrgId, digest: [u8; 32]) {
        self.loaded.invalidate(&(org.clone(), digest)).await;
        if let Some(cache) = self.cache.clone() {
            let name = cache.name(org, &digest);
            let _ = self.handle.spawn_blocking(move || cache.forget(&name)).await;
        }
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

    async fn keep_cached(&self, cache: Arc<ModuleCache>, name: CacheName, compiled: Vec<u8>) {
        let written = self.handle.spawn_blocking(move || cache.write(&name, &compiled));
        if let Ok(Err(error)) = written.await {
            tracing::warn!(
                error = error.to_string(),
                "a compiled module could not be kept; it will be compiled again at the next start"
            );
        }
    }
}

/// The one place where bytes become native code.
#[allow(
    unsafe_code,
    reason = "the bytes are of this host's own compiler: from its process just now, or under a MAC of this host's key over their name and content"
)]
fn deserialize(engine: &Engine, authentic: &[u8]) -> wasmtime::Result<Module> {
    // SAFETY: these bytes were made by `Engine::precompile_module`. Either `compiled` has them from its compiler, which is this very program, over a
    // pipe that nobody else has; or `ModuleCache::read` has verified that a process with this host's key made exactly them, for an engine of the same
    // compatibility hash. They are in memory before they are verified and cannot change after.
    unsafe { Module::deserialize(engine, authentic) }
}
