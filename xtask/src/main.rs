//! The project's tasks, as `cargo xtask`: `demo`, `test`, `examples`, `contract`, `fuzz`, `chaos`, `bench`. Each does its own set-up.
//!
//! This crate drives the real program over its real HTTP API, as a client would. It holds no part of the host.

mod setup;

mod pypi;

mod postgres;

mod test;

mod fuzz;

mod chaos;

mod host;

mod api;

mod load;

mod demo;

mod bench;

mod examples;

mod contract;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  cargo xtask demo                    a conversation that survives kill -9; then a host to try
  cargo xtask demo --exit             the same, and end
  cargo xtask test                    every test
  cargo xtask test gate idempotency   the tests with one of these words in their names
  cargo xtask examples                the example worker of each language, built and spoken with
  cargo xtask examples go c           some of them
  cargo xtask contract                the document against its snapshot, its specification and a running host
  cargo xtask fuzz --seconds 600      look for what breaks the sandbox
  cargo xtask chaos --minutes 5       kill, stop and cut off what serves turns, and check what its clients saw
  cargo xtask bench --quick           every figure once, roughly
  cargo xtask bench --only echo       the rows with this word in their names";

/// The project's tasks. Each does all its set-up.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show a host at work: streaming, memory, a crash in the middle of a turn
    Demo(demo::Options),
    /// Run every test
    Test(test::Options),
    /// Build the example worker of each language and hold a conversation with it
    Examples(examples::Options),
    /// Hold the API's document against its snapshot, OpenAPI's specification and a running host
    Contract(contract::Options),
    /// Run the fuzz targets
    Fuzz(fuzz::Options),
    /// Kill, stop, restart and cut off replicas and their database, and check what the clients saw and the tables hold
    Chaos(chaos::Options),
    /// Measure the parts, the whole, and how near it comes to them
    Bench(bench::Options),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let (name, done) = match Arguments::parse().task {
        Task::Demo(options) => ("demo", demo::run(options).await.map(|()| ExitCode::SUCCESS)),
        Task::Test(options) => ("test", test::run(&options).await.map(|()| ExitCode::SUCCESS)),
        Task::Examples(options) => ("examples", examples::run(&options).map(|()| ExitCode::SUCCESS)),
        Task::Contract(options) => ("contract", contract::run(options).await.map(|()| ExitCode::SUCCESS)),
        Task::Fuzz(options) => ("fuzz", fuzz::run(&options).map(|()| ExitCode::SUCCESS)),
        Task::Chaos(options) => ("chaos", chaos::run(options).await),
        Task::Bench(options) => ("bench", bench::run(options).await),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("\n{name} failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
