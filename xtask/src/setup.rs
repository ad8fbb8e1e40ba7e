//! What must be there before a task begins: the WebAssembly target and the built program with its workers.
//!
//! It asks cargo where things are instead of knowing their paths.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// What workers are compiled for.
pub const WASM_TARGET: &str = "wasm32-wasip1";

/// The workspace's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate lies in the workspace")
}

/// A cargo that works in the workspace.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Installs the target that workers are compiled for, unless it is there.
pub fn ensure_wasm_target() -> Result<()> {
    if has_wasm_target()? {
        return Ok(());
    }
    eprintln!("Installing the Rust target {WASM_TARGET}, which workers are compiled for.");
    let status = Command::new("rustup").current_dir(root()).args(["target", "add", WASM_TARGET]).status();
    match status {
        Ok(status) if status.success() => {}
        Ok(_) => bail!("`rustup target add {WASM_TARGET}` failed; its message is above"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(
            "workers are compiled for {WASM_TARGET}, which this Rust lacks, and there is no rustup to add it: install Rust from \
             https://rustup.rs, or your system's package with the standard library of {WASM_TARGET}"
        ),
        Err(error) => return Err(error).context("cannot run rustup"),
    }
    ensure!(
        has_wasm_target()?,
        "rustup added {WASM_TARGET} to another toolchain than the one in use; see `rustup show`"
    );
    Ok(())
}

fn has_wasm_target() -> Result<bool> {
    let output = Command::new("rustc")
        .current_dir(root())
        .args(["--print", "target-libdir", "--target", WASM_TARGET])
        .output()
        .context("cannot run rustc; install Rust from https://rustup.rs")?;
    let libdir = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    Ok(std::fs::read_dir(libdir)
        .is_ok_and(|files| files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libstd-"))))
}

/// With which optimisation the program is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// The one of the tests: soon there, and its dependencies are optimised.
    Dev,
    /// For measurements.
    Release,
}

/// What a build made.
#[derive(Debug)]
pub struct Built {
    /// The program `turnhouse`.
    pub program: PathBuf,
    /// The table of modules that the workers' build script has written.
    guests: String,
}

impl Built {
    /// The module of a bundled worker or of a test's guest.
    pub fn guest(&self, name: &str) -> Result<PathBuf> {
        module(&self.guests, name).with_context(|| format!("the build made no worker called {name}"))
    }
}

/// Its lines are Rust: `Guest { name: "echo", path: "/…/echo.wasm" },`. Depending on the crate that holds them instead would build the workers
/// before this program could install the target that they need.
fn module(guests: &str, name: &str) -> Option<PathBuf> {
    let (_, rest) = guests.split_once(&format!("name: {name:?}, path: \""))?;
    rest.split_once('"').map(|(path, _)| PathBuf::from(path))
}

/// Builds the program and the workers.
pub fn build(profile: Profile) -> Result<Built> {
    let messages = cargo_build(profile, &["--package", "turnhouse", "--package", "turnhouse-workers"])?;
    Ok(Built { program: executable(&messages, "bin", "turnhouse")?, guests: guests(&messages)? })
}

/// Builds the workers; the module of the one with this name.
pub fn build_guest(name: &str) -> Result<PathBuf> {
    let messages = cargo_build(Profile::Dev, &["--package", "turnhouse-workers"])?;
    module(&guests(&messages)?, name).with_context(|| format!("the build made no worker called {name}"))
}

fn guests(messages: &[Value]) -> Result<String> {
    let workers = messages.iter().find(|m| {
        m["reason"] == "build-script-executed"
            && m["package_id"].as_str().is_some_and(|id| id.contains("workers#turnhouse-workers@"))
    });
    let out_dir = workers.and_then(|m| m["out_dir"].as_str()).context("cargo did not say where the workers are")?;
    std::fs::read_to_string(Path::new(out_dir).join("guests.rs")).context("the workers have no table")
}

/// Builds one example of a package.
pub fn build_example(profile: Profile, package: &str, example: &str) -> Result<PathBuf> {
    let messages = cargo_build(profile, &["--package", package, "--example", example])?;
    executable(&messages, "example", example)
}

/// Builds the program of a package of the same name.
pub fn build_bin(profile: Profile, name: &str) -> Result<PathBuf> {
    executable(&cargo_build(profile, &["--package", name])?, "bin", name)
}

/// Builds a program of the workspace as its tests have it. Cargo chooses the features of dependencies for all packages that it is asked for at once:
/// for this one alone it would compile some of them again, minutes of a test run.
pub fn build_bin_as_tested(name: &str) -> Result<PathBuf> {
    executable(&cargo_build(Profile::Dev, &["--workspace", "--bin", name])?, "bin", name)
}

fn executable(messages: &[Value], kind: &str, name: &str) -> Result<PathBuf> {
    let made = messages.iter().find(|m| m["target"]["name"] == name && m["target"]["kind"][0] == kind);
    let path = made.and_then(|m| m["executable"].as_str());
    path.map(PathBuf::from).with_context(|| format!("cargo did not say where the {kind} {name} is"))
}

/// Runs `cargo build`, its progress on stderr, and returns its messages.
fn cargo_build(profile: Profile, arguments: &[&str]) -> Result<Vec<Value>> {
    let mut cargo = cargo();
    cargo.args(["build", "--message-format=json-render-diagnostics"]).args(arguments);
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "the build failed ({}); cargo's messages are above", output.status);
    let lines = output.stdout.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"{"));
    lines.map(|line| serde_json::from_slice(line).context("cargo's messages are no JSON")).collect()
}

/// Where cargo builds, and where whatever a task leaves belongs.
pub fn target_dir() -> PathBuf {
    root().join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// A fresh directory under `target`, removed when dropped: on the same disk as the build, where a temporary directory may be memory only.
pub fn scratch_dir(purpose: &str) -> Result<tempfile::TempDir> {
    let target = target_dir();
    std::fs::create_dir_all(&target)?;
    tempfile::Builder::new()
        .prefix(&format!("{purpose}-"))
        .tempdir_in(&target)
        .with_context(|| format!("cannot make a directory in {}", target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_found_by_its_whole_name() {
        let table = r#"&[
            Guest { name: "no_reply", path: "/b/no_reply.wasm" },
            Guest { name: "reply", path: "/a/reply.wasm" },
        ]"#;
        assert_eq!(module(table, "reply"), Some("/a/reply.wasm".into()));
        assert_eq!(module(table, "rep"), None);
    }
}
