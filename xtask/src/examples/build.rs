//! How the module of each language is built: the commands of `docs/workers.md`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::toolchain;
use crate::pypi::Found;
use crate::setup;

/// A directory with a crate.
pub fn rust(example: &Path) -> Result<Found<PathBuf>> {
    let target_dir = modules_dir()?;
    let mut cargo = setup::cargo();
    cargo.current_dir(example).args(["build", "--quiet", "--release", "--locked", "--target", setup::WASM_TARGET]);
    run(cargo.arg("--target-dir").arg(&target_dir))?;
    let module = target_dir.join(setup::WASM_TARGET).join("release").join(name(example)?).with_extension("wasm");
    ensure!(module.is_file(), "the build left no {}", module.display());
    Ok(Found::Here(module))
}

/// The same, after the crate's own tests, which run natively.
pub fn rust_with_tests(example: &Path) -> Result<Found<PathBuf>> {
    let mut cargo = setup::cargo();
    cargo.current_dir(example).args(["test", "--quiet", "--locked", "--target-dir"]).arg(modules_dir()?);
    // Its report would stand between the lines of this task.
    run(cargo.stdout(Stdio::null()))?;
    rust(example)
}

pub fn c(example: &Path) -> Result<Found<PathBuf>> {
    let mut compiler = match toolchain::c()? {
        Found::Here(compiler) => compiler,
        Found::Missing(why) => return Ok(Found::Missing(why)),
    };
    let module = modules_dir()?.join("c.wasm");
    compiler
        .current_dir(example)
        .args(["-Wall", "-Wextra", "-Werror", "-O2", "-s", "-Wl,-z,stack-size=131072"])
        .arg("-I")
        .arg(setup::root().join("guest-sdk/include"))
        .args(["worker.c", "-o"])
        .arg(&module);
    run(&mut compiler)?;
    Ok(Found::Here(module))
}

pub fn go(example: &Path) -> Result<Found<PathBuf>> {
    let mut go = match toolchain::go()? {
        Found::Here(go) => go,
        Found::Missing(why) => return Ok(Found::Missing(why)),
    };
    let module = modules_dir()?.join("go.wasm");
    go.current_dir(example)
        .env("GOOS", "wasip1")
        .env("GOARCH", "wasm")
        // Nothing of it needs a module from elsewhere, nor another Go; git may not trust a clone of somebody else's.
        .env("GOPROXY", "off")
        .args(["build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o"])
        .arg(&module)
        .arg(".");
    run(&mut go)?;
    Ok(Found::Here(module))
}

/// Beside the host's own build.
fn modules_dir() -> Result<PathBuf> {
    let directory = setup::target_dir().join("examples");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

fn name(example: &Path) -> Result<&str> {
    example.file_name().and_then(|name| name.to_str()).context("an example's directory has no name")
}

/// Runs a compiler, its messages on stderr.
fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{program} failed ({status}); its messages are above");
    Ok(())
}
