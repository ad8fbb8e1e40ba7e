//! Where the guests are: the bundled workers and the tests' small programs, which this crate's build script compiles to WebAssembly.
//!
//! It holds no code of a worker (those are the crates `echo`, `notes` and `story` beside it, and `tests/guests`) and knows nothing of the host. It is for
//! tests, benches and `cargo xtask`: its paths are those of the machine that built it.

pub mod made;

use std::fs;
use std::path::{Path, PathBuf};

include!(concat!(env!("OUT_DIR"), "/guests.rs"));

/// A module that was built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guest {
    /// Its program's name: `echo`, `spin`.
    pub name: &'static str,
    /// Its file, absolute.
    pub path: &'static str,
}

/// The plain worker that replies with its message.
pub const ECHO: &str = "echo";
/// The worker that remembers through its state.
pub const NOTES: &str = "notes";
/// The worker that streams for some seconds.
pub const STORY: &str = "story";

/// The bundled workers: [`ECHO`], [`NOTES`], [`STORY`].
pub fn bundled() -> &'static [Guest] {
    WORKERS
}

/// The tests' guests, one behaviour each: the programs of `tests/guests/src/bin`.
pub fn test_guests() -> &'static [Guest] {
    GUESTS
}

/// Every module that was built.
pub fn all_guests() -> impl Iterator<Item = &'static Guest> {
    bundled().iter().chain(test_guests())
}

/// The file of the module with this name.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn path(name: &str) -> PathBuf {
    match all_guests().find(|guest| guest.name == name) {
        Some(guest) => PathBuf::from(guest.path),
        None => panic!("no guest is called {name}"),
    }
}

/// The bytes of the module with this name.
///
/// # Panics
/// If there is none, or its file is gone.
#[track_caller]
pub fn bytes(name: &str) -> Vec<u8> {
    let path = path(name);
    fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

/// The modules that no compiler makes, written by hand as text: the names of `tests/guests/wat/*.wat`, without the ending.
///
/// # Panics
/// If the directory cannot be read.
pub fn wat_names() -> Vec<String> {
    let files = fs::read_dir(wat_dir()).expect("tests/guests/wat can be read");
    let mut names: Vec<String> =
        files.flatten().filter_map(|file| Some(file.file_name().to_str()?.strip_suffix(".wat")?.to_owned())).collect();
    names.sort();
    names
}

/// The text of one of them. The crate `wat` makes it a module.
///
/// # Panics
/// If there is none of this name.
#[track_caller]
pub fn wat(name: &str) -> String {
    let path = wat_dir().join(format!("{name}.wat"));
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn wat_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/guests/wat")
}
