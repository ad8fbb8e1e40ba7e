//! `cargo xtask test`: every test of the workspace, after all set-up; the end-to-end suites once more with PostgreSQL as their store; then the
//! examples, which are workspaces of their own, and the API's contract.
//!
//! The shared store's tests find a PostgreSQL server under `TURNHOUSE_TEST_DATABASE_URL`, and PgBouncer before it under
//! `TURNHOUSE_TEST_POOLER_URL`: those that are set, or some that live as long as the run.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{contract, examples, postgres, setup};

/// What chooses the store of the end-to-end suites.
const STORE_VARIABLE: &str = "TURNHOUSE_TEST_STORE";

/// What the command line asks for.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Run only tests whose names contain one of these
    filters: Vec<String>,
}

pub async fn run(options: &Options) -> Result<()> {
    setup::ensure_wasm_target()?;
    let server = match std::env::var_os(postgres::URL_VARIABLE) {
        Some(_) => None,
        None => Some(postgres::Server::start()?),
    };
    let variables = server.as_ref().map(postgres::Server::variables);
    let cargo = |arguments: &[&str]| cargo(arguments, variables.as_ref().map_or(&[], |variables| &variables[..]));
    let on_postgres = |arguments: &[&str]| {
        let mut variables: Vec<_> = variables.iter().flatten().cloned().collect();
        variables.push((STORE_VARIABLE, "postgres".to_owned()));
        self::cargo(arguments, &variables)
    };
    let all = options.filters.is_empty();
    let mut failed = Vec::new();
    if has_nextest() {
        // One process a test, all in parallel. It runs no doc tests.
        let filters: Vec<&str> = options.filters.iter().map(String::as_str).collect();
        if !cargo(&[&["nextest", "run", "--workspace", "--no-fail-fast"], filters.as_slice()].concat())? {
            failed.push("cargo nextest run --workspace");
        }
        // Which tests, says .config/nextest.toml; of the words on the command line perhaps none is in their names.
        let again = ["nextest", "run", "--workspace", "--no-fail-fast", "--profile", "postgres", "--no-tests", "pass"];
        if !on_postgres(&[&again, filters.as_slice()].concat())? {
            failed.push("TURNHOUSE_TEST_STORE=postgres cargo nextest run --workspace --profile postgres");
        }
        if all && !cargo(&["test", "--workspace", "--doc", "--quiet"])? {
            failed.push("cargo test --workspace --doc");
        }
    } else {
        // Without `--`, cargo test takes one filter only; the test harness takes any number.
        let mut arguments = vec!["test", "--workspace", "--no-fail-fast", "--quiet"];
        if !all {
            arguments.push("--");
            arguments.extend(options.filters.iter().map(String::as_str));
        }
        if !cargo(&arguments)? {
            failed.push("cargo test --workspace");
        }
        let mut again = vec!["test", "--workspace", "--test", "e2e", "--test", "cluster", "--test", "kills"];
        again.extend(["--no-fail-fast", "--quiet", "--", "--skip", "embedded::", "--skip", "shared::"]);
        again.extend(options.filters.iter().map(String::as_str));
        if !on_postgres(&again)? {
            failed.push("TURNHOUSE_TEST_STORE=postgres cargo test --workspace --test e2e --test cluster --test kills");
        }
    }
    if all {
        eprintln!("$ cargo xtask examples");
        if let Err(error) = examples::run(&examples::Options::default()) {
            eprintln!("{error:#}");
            failed.push("cargo xtask examples");
        }
        eprintln!("$ cargo xtask contract");
        if let Err(error) = contract::run(contract::Options::of_tests()).await {
            eprintln!("{error:#}");
            failed.push("cargo xtask contract");
        }
    }
    println!("\nOne suite alone: cargo test -p turnhouse --lib gate::   One test: cargo xtask test NAME");
    ensure!(failed.is_empty(), "these failed: {}", failed.join(", "));
    Ok(())
}

fn has_nextest() -> bool {
    let version = setup::cargo().args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

fn cargo(arguments: &[&str], variables: &[(&str, String)]) -> Result<bool> {
    let mut cargo: Command = setup::cargo();
    cargo.envs(variables.iter().map(|(name, value)| (name, value)));
    eprintln!("$ cargo {}", arguments.join(" "));
    Ok(cargo.args(arguments).status().context("cannot run cargo")?.success())
}
