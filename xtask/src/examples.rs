//! `cargo xtask examples`: builds the example worker of each language and holds the same conversation with each, then one in which every
//! turn is another language's, on one state.
//!
//! A language whose toolchain is not here and cannot be brought is skipped, by name. One whose toolchain is here has to build and to answer.

mod build;

mod conversation;

mod toolchain;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use crate::pypi::Found;
use crate::setup;
use conversation::Host;

/// What the command line asks for.
#[derive(Debug, Default, clap::Args)]
pub struct Options {
    /// Only these
    #[arg(value_name = "EXAMPLE")]
    only: Vec<String>,
}

/// A directory of `examples/`, and how its module is built.
struct Example {
    name: &'static str,
    build: fn(&Path) -> Result<Found<PathBuf>>,
}

const EXAMPLES: [Example; 5] = [
    Example { name: "rust-sdk", build: build::rust_with_tests },
    Example { name: "rust-plain", build: build::rust },
    Example { name: "c", build: build::c },
    Example { name: "go", build: build::go },
    Example { name: "javascript", build: build::rust },
];

pub fn run(options: &Options) -> Result<()> {
    let chosen = chosen(&options.only)?;
    setup::ensure_wasm_target()?;
    let host = Host::new(setup::build_bin_as_tested("turnhouse")?)?;

    let (mut passed, mut failed, mut skipped) = (Vec::new(), 0, 0);
    for example in &chosen {
        match (example.build)(&setup::root().join("examples").join(example.name)) {
            Ok(Found::Here(module)) => match host.hold(&module) {
                Ok(wall_ms) => {
                    let bytes = std::fs::metadata(&module)?.len();
                    println!("{:12} {:>10}  {wall_ms:>6.1} ms a turn", example.name, size(bytes));
                    passed.push((example.name, module));
                }
                Err(error) => {
                    failed += 1;
                    println!("failed: {}: {error:#}", example.name);
                }
            },
            Ok(Found::Missing(why)) => {
                skipped += 1;
                println!("skipped: {}: {why}", example.name);
            }
            Err(error) => {
                failed += 1;
                println!("failed: {}: {error:#}", example.name);
            }
        }
    }
    if passed.len() > 1 {
        let names: Vec<&str> = passed.iter().map(|(name, _)| *name).collect();
        let modules: Vec<&Path> = passed.iter().map(|(_, module)| module.as_path()).collect();
        match host.hand_over(&modules) {
            Ok(()) => println!("one conversation through all of them: {}", names.join(" → ")),
            Err(error) => {
                failed += 1;
                println!("failed: one conversation through {}: {error:#}", names.join(" → "));
            }
        }
    }
    println!("{} spoken with, {failed} failed, {skipped} skipped", passed.len());
    ensure!(failed == 0, "see the lines above that begin with `failed`");
    Ok(())
}

fn chosen(only: &[String]) -> Result<Vec<&'static Example>> {
    if let Some(unknown) = only.iter().find(|name| EXAMPLES.iter().all(|example| example.name != *name)) {
        let names = EXAMPLES.map(|example| example.name);
        bail!("there is no example {unknown}; there are {}", names.join(", "));
    }
    Ok(EXAMPLES.iter().filter(|example| only.is_empty() || only.iter().any(|name| name == example.name)).collect())
}

fn size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let bytes = bytes as f64;
    if bytes < KIB * KIB { format!("{:.0} KiB", bytes / KIB) } else { format!("{:.1} MiB", bytes / KIB / KIB) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_chosen_by_their_whole_names() {
        let names = |only: &[&str]| {
            let only: Vec<String> = only.iter().map(|name| (*name).to_owned()).collect();
            chosen(&only).map(|chosen| chosen.iter().map(|example| example.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), EXAMPLES.len());
        assert_eq!(names(&["go", "c"]).unwrap(), ["c", "go"]);
        assert!(names(&["rust"]).unwrap_err().to_string().contains("rust-sdk, rust-plain"));
    }

    #[test]
    fn every_directory_of_the_examples_is_tried() {
        let mut names = EXAMPLES.map(|example| example.name);
        names.sort_unstable();
        let mut directories: Vec<String> = std::fs::read_dir(setup::root().join("examples"))
            .unwrap()
            .flatten()
            .filter(|entry| entry.path().is_dir())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect();
        directories.sort_unstable();
        assert_eq!(directories, names);
    }

    #[test]
    fn sizes_are_told_in_the_unit_that_fits() {
        assert_eq!(size(45_265), "44 KiB");
        assert_eq!(size(4_156_508), "4.0 MiB");
    }
}
