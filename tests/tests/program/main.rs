//! The program from outside: its commands, exit codes and messages, its signals, and the data directories that it does not take.

mod commands;
mod database;
mod serving;
mod shared;

use std::path::Path;

use turnhouse_tests::program::Ran;

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of UTF-8")
}

fn guest(name: &str) -> String {
    text(&turnhouse_workers::path(name)).to_owned()
}

#[track_caller]
fn failed(ran: &Ran, code: i32, says: &[&str]) {
    assert_eq!(ran.code, code, "{ran:?}");
    for says in says {
        assert!(ran.stderr.contains(says), "{says:?} is not in {ran:?}");
    }
    assert!(!ran.stderr.contains("panicked") && !ran.stderr.contains("backtrace"), "{ran:?}");
}
