//! Builds the guests: the bundled workers and `tests/guests`, for `wasm32-wasip1`, by a cargo of their own in a target directory of their own.
//!
//! The outer cargo tells its build scripts, through the environment, how it builds for *this* machine: flags, wrappers (clippy's driver
//! among them), profile. None of that may reach the guests, whose bytes should be the same whoever builds them. So the inner cargo
//! starts without it and is told everything that matters here.

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "wasm32-wasip1";

/// The same as in `.cargo/config.toml`, where it serves who builds a guest by hand. Said again, because flags from the environment or from a
/// user's own configuration would otherwise take its place.
const STACK: [&str; 2] = ["-C", "link-arg=-zstack-size=131072"];

/// The bundled workers are linked for speed and size; the tests' many small guests for a short build.
const GROUPS: [Group; 2] = [
    Group { name: "workers", packages: &["echo", "notes", "story"], lto: "fat", opt_level: "3", codegen_units: "1" },
    Group { name: "guests", packages: &["turnhouse-test-guests"], lto: "off", opt_level: "s", codegen_units: "16" },
];

struct Group {
    name: &'static str,
    packages: &'static [&'static str],
    lto: &'static str,
    opt_level: &'static str,
    codegen_units: &'static str,
}

fn main() {
    if let Err(problem) = build() {
        for line in problem.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<(), String> {
    let root = path_from_env("CARGO_MANIFEST_DIR")?.parent().ok_or("the workers' directory has no parent")?.to_owned();
    rerun_if_changed(&root);
    require_target()?;
    let out_dir = path_from_env("OUT_DIR")?;
    let mut table = String::new();
    for group in &GROUPS {
        // A directory each: their programs lie side by side, and a name of one group could be one of the other's.
        let target_dir = guests_dir(&out_dir).join(group.name);
        run_cargo(&root, &target_dir, group)?;
        writeln!(table, "pub(crate) const {}: &[Guest] = &[", group.name.to_uppercase())
            .map_err(|error| error.to_string())?;
        for (name, path) in built(&root, &target_dir, group)? {
            writeln!(table, "    Guest {{ name: {name:?}, path: {path:?} }},").map_err(|error| error.to_string())?;
        }
        table.push_str("];\n");
    }
    fs::write(out_dir.join("guests.rs"), table).map_err(|error| format!("cannot write guests.rs: {error}"))
}

/// `target/guests`, beside `target/debug`. The guests do not depend on how this crate is built, and debug, release and clippy each have an
/// `OUT_DIR` of their own: there they would be built three times. Where cargo's layout is another than `…/debug/build/PACKAGE/out`, that will do.
fn guests_dir(out_dir: &Path) -> PathBuf {
    let build = out_dir.ancestors().nth(2).filter(|build| build.ends_with("build"));
    build.and_then(|build| build.ancestors().nth(2)).unwrap_or(out_dir).join("guests")
}

/// Everything that the inner cargo reads. Directories, so that a new file counts too.
fn rerun_if_changed(root: &Path) {
    for path in [
        "Cargo.toml",
        "Cargo.lock",
        ".cargo/config.toml",
        "rust-toolchain.toml",
        "guest-sdk/Cargo.toml",
        "guest-sdk/src",
        "workers/build.rs",
        "workers/echo",
        "workers/notes",
        "workers/story",
        "tests/guests/Cargo.toml",
        "tests/guests/src",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
}

/// Without this check the failure is several hundred lines of "can't find crate for `std`".
fn require_target() -> Result<(), String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", TARGET])
        .output()
        .map_err(|error| format!("cannot run rustc: {error}"))?;
    let libdir = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let has_std = fs::read_dir(&libdir)
        .is_ok_and(|files| files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libstd-")));
    if has_std { Ok(()) } else { Err(format!("the target {TARGET} is not installed; run: rustup target add {TARGET}")) }
}

fn run_cargo(root: &Path, target_dir: &Path, group: &Group) -> Result<(), String> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| !may_pass(name)) {
            cargo.env_remove(&name);
        }
    }
    // Configuration is found from the working directory upwards.
    cargo.current_dir(root).args(["build", "--release", "--target", TARGET, "--target-dir"]).arg(target_dir);
    for package in group.packages {
        cargo.args(["--package", package]);
    }
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(root))
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", group.opt_level)
        .env("CARGO_PROFILE_RELEASE_LTO", group.lto)
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", group.codegen_units)
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "false")
        .env("CARGO_PROFILE_RELEASE_INCREMENTAL", "false");
    let output = cargo.output().map_err(|error| format!("cannot run cargo: {error}"))?;
    let messages = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        // Seen with `cargo build -vv` only.
        eprintln!("{messages}");
        return Ok(());
    }
    // Of a script that says what went wrong, the outer cargo shows nothing else: so the compiler's messages are part of it.
    Err(format!("building {} for {TARGET} failed, {}\n{messages}", group.packages.join(", "), output.status))
}

/// As cargo wants them encoded. The paths in panic messages must not tell where this machine keeps its sources, nor change a module's digest.
fn rustflags(root: &Path) -> OsString {
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let mut flags = OsString::from(STACK.join("\u{1f}"));
    for (from, to) in [(Some(root.to_owned()), "/turnhouse"), (cargo_home, "/cargo")] {
        if let Some(from) = from {
            flags.push("\u{1f}--remap-path-prefix=");
            flags.push(from);
            flags.push(format!("={to}"));
        }
    }
    flags
}

/// Where to find and fetch crates, how loudly to talk, and the job server stay; how to compile goes.
fn may_pass(name: &str) -> bool {
    const KEPT: [&str; 2] = ["CARGO_HOME", "CARGO_MAKEFLAGS"];
    const KEPT_PREFIXES: [&str; 6] =
        ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTRIES_", "CARGO_REGISTRY_", "CARGO_SOURCE_", "CARGO_TERM_"];
    const DROPPED: [&str; 5] = ["RUSTFLAGS", "RUSTDOCFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CLIPPY_ARGS"];
    let kept = KEPT.contains(&name) || KEPT_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    kept || !(name.starts_with("CARGO") || DROPPED.contains(&name))
}

/// The programs of a group, by name. From their sources rather than from the directory's content, where a program that was renamed or
/// removed would still lie.
fn built(root: &Path, target_dir: &Path, group: &Group) -> Result<Vec<(String, PathBuf)>, String> {
    let mut names: Vec<String> = match group.packages {
        ["turnhouse-test-guests"] => fs::read_dir(root.join("tests/guests/src/bin"))
            .map_err(|error| format!("cannot read tests/guests/src/bin: {error}"))?
            .flatten()
            .filter_map(|file| Some(file.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
            .collect(),
        packages => packages.iter().map(|name| (*name).to_owned()).collect(),
    };
    names.sort();
    names
        .into_iter()
        .map(|name| {
            let path = target_dir.join(TARGET).join("release").join(format!("{name}.wasm"));
            if path.is_file() { Ok((name, path)) } else { Err(format!("the build left no {}", path.display())) }
        })
        .collect()
}

fn path_from_env(name: &str) -> Result<PathBuf, String> {
    env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {name}"))
}
