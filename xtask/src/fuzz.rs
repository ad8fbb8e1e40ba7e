//! `cargo xtask fuzz`: builds the fuzz targets with libFuzzer and runs each from its kept corpus.
//!
//! Only the host and the targets are instrumented (`fuzz/instrument`), so everything else is what other builds have compiled in the same
//! directory already; fuzz/README.md says what that costs and finds.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::setup;

/// The targets: each is `fuzz/fuzz_targets/NAME.rs`, and its corpus `fuzz/corpus/NAME`.
const TARGETS: [&str; 2] = ["host_calls", "upload"];

/// An input over this is no small module and no short list of calls.
const INPUT_BYTES_MAX: u32 = 4_096;

/// One input takes milliseconds; it hangs when it takes this long.
const INPUT_SECONDS_MAX: u32 = 20;

/// The pool's memory is reserved, not used: what is used in earnest is far below.
const MEMORY_MIB_MAX: u32 = 2_048;

/// What the command line asks for.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// How long each target runs
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Merge what reaches something new into the kept corpus
    #[arg(long)]
    keep: bool,
    /// Run only these targets
    #[arg(value_parser = TARGETS)]
    targets: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    let targets: Vec<&str> = match options.targets.as_slice() {
        [] => TARGETS.to_vec(),
        named => named.iter().map(String::as_str).collect(),
    };
    let programs = build()?;
    for target in targets {
        fuzz(target, &programs.join(format!("fuzz_{target}")), options)?;
    }
    Ok(())
}

/// Builds every target; the directory of the programs.
fn build() -> Result<PathBuf> {
    let root = setup::root();
    let mut cargo = setup::cargo();
    cargo.args(["build", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--target-dir"]).arg(root.join("target"));
    cargo.env("RUSTC_WRAPPER", root.join("fuzz/instrument"));
    eprintln!("$ cargo build --manifest-path fuzz/Cargo.toml");
    ensure!(
        cargo.status().context("cannot run cargo")?.success(),
        "the fuzz targets do not build; its messages are above (libFuzzer is compiled with a C++ compiler: `c++` or `clang++`)"
    );
    Ok(root.join("target/debug"))
}

fn fuzz(target: &str, program: &Path, options: &Options) -> Result<()> {
    let root = setup::root();
    let (kept, work) = (root.join("fuzz/corpus").join(target), root.join("target/fuzz").join(target));
    let found = work.join("found");
    std::fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
    println!("\n{target}: {} s from {} inputs", options.seconds, inputs(&kept)?.len());
    let before = inputs(&work)?;
    let mut command = Command::new(program);
    command
        .current_dir(&work)
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .args(["-print_final_stats=1", "-verbosity=0", "-artifact_prefix=./"])
        // New inputs go into the first directory, and are there the next time.
        .args([&found, &kept]);
    let status = command.status().with_context(|| format!("cannot run {}", program.display()))?;
    if !status.success() {
        let new: Vec<_> = inputs(&work)?.into_iter().filter(|file| !before.contains(file)).collect();
        let input = new.first().map_or_else(|| "none was written".to_owned(), |file| file.display().to_string());
        bail!("{target} failed, {status}; the input: {input}; again: {} {input}", program.display());
    }
    if options.keep { keep(program, &kept, &found) } else { Ok(()) }
}

/// Makes the corpus anew of what is in it and what was found: as few and as small inputs as reach the same.
fn keep(program: &Path, kept: &Path, found: &Path) -> Result<()> {
    let fresh = tempfile::tempdir_in(kept.parent().context("the corpus has a directory")?)?;
    let status = Command::new(program)
        .args(["-set_cover_merge=1", "-use_counters=0"])
        .args([fresh.path(), kept, found])
        .status()?;
    ensure!(status.success(), "the corpus could not be merged: {status}");
    for old in inputs(kept)? {
        std::fs::remove_file(old)?;
    }
    for new in inputs(fresh.path())? {
        std::fs::rename(&new, kept.join(new.file_name().context("a file has a name")?))?;
    }
    println!("{} inputs are kept in {}", inputs(kept)?.len(), kept.display());
    Ok(())
}

/// The files of a directory: of a corpus its inputs, of a working directory what libFuzzer wrote of failures.
fn inputs(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    Ok(entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect())
}
