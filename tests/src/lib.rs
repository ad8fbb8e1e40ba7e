//! The harness of the end-to-end suites: a whole host on a fresh store, the embedded or the shared one, and a client that speaks the real HTTP API to it.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use turnhouse_tests::TestHost;
//!
//! let host = TestHost::start().await;
//! let ann = host.member("acme", "ann", "admin").await;
//! ann.deploy("echo").await;
//! let reply = ann.say("echo", "c-1", "hi").await.completed().await;
//! assert_eq!(reply, "hi");
//! host.stop().await; // fails the test when a marker, a slot or a task is left
//! # Ok(()) }
//! ```

pub mod choices;

pub mod client;

pub mod cluster;

pub mod database;

pub mod faulty;

pub mod host;

pub mod issuer;

pub mod program;

pub mod tables;

pub use client::{Client, Events, SeenEvent, Turn};
pub use cluster::{Cluster, Setup};
pub use database::{Backing, Database, Home, on_postgres};
pub use faulty::Network;
pub use host::TestHost;
pub use program::Program;
pub use tables::Tables;

use std::time::Duration;

/// Nothing that a test waits for takes longer; it is a bound, not an expectation: guests run at a low priority, and a busy machine starves them.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for a condition, with a bound.
///
/// # Panics
/// When it does not hold within [`PATIENCE`].
#[track_caller]
pub fn eventually<'a, F, T>(what: &'a str, mut condition: F) -> impl Future<Output = ()> + 'a
where
    F: FnMut() -> T + 'a,
    T: Future<Output = bool> + 'a,
{
    let at = std::panic::Location::caller();
    async move {
        let patience = tokio::time::Instant::now() + PATIENCE;
        while !condition().await {
            assert!(tokio::time::Instant::now() < patience, "{at}: not within {PATIENCE:?}: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
