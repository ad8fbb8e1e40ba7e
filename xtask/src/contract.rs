//! `cargo xtask contract`: what `/openapi.json` of a running host promises, held against three things.
//!
//! 1. `docs/openapi.json`, the document as it was last kept: nothing that clients rely on may be gone ([`breaking`]), and what is new is kept with
//!    `--bless`.
//! 2. OpenAPI's specification, by a validator from PyPI.
//! 3. The host itself, by Schemathesis from PyPI: it makes requests of the document, right and wrong, alone and in chains, and holds every answer
//!    against it. Its seed is printed; the same seed asks the same.
//!
//! Then the programs of `docs/clients.md` are run against it ([`clients`]). What wants PyPI, npm or a tool that is not here is skipped, by name.

mod breaking;

mod clients;

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::process::Command;

use crate::api::Api;
use crate::host::{Host, Role, Start};
use crate::pypi::{self, Found};
use crate::setup;

/// The document as it was last kept.
const KEPT: &str = "docs/openapi.json";
/// Schemathesis' settings, hooks and packages.
const SETTINGS: &str = "xtask/contract";

/// What the command line asks for.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Keep the document as it is now, if it only adds
    #[arg(long)]
    bless: bool,
    /// With --bless: keep it although it breaks clients
    #[arg(long, requires = "bless")]
    breaking: bool,
    /// What Schemathesis asks follows from it; chosen and printed unless given
    #[arg(long)]
    seed: Option<u32>,
    /// How long Schemathesis asks
    #[arg(long, default_value_t = SECONDS)]
    seconds: u32,
}

const SECONDS: u32 = 60;

impl Options {
    /// Of a run that must not fail for what nobody has changed.
    pub fn of_tests() -> Options {
        Options { bless: false, breaking: false, seed: Some(1), seconds: SECONDS }
    }
}

pub async fn run(options: Options) -> Result<()> {
    setup::ensure_wasm_target()?;
    // As the tests have it: otherwise cargo compiles half of the dependencies again.
    let program = setup::build_bin_as_tested("turnhouse")?;
    let module = setup::build_guest("echo")?;
    let scratch = setup::scratch_dir("contract")?;
    let start = Start {
        program,
        data_dir: scratch.path().join("data"),
        listen: ([127, 0, 0, 1], 0).into(),
        role: Role::Dev { modules: vec![module.clone()] },
        // It is meant to try wrong keys, too; and a document does not know how many parts an operator allows.
        settings: ["AUTH_FAILURES_PER_MINUTE", "MESSAGE_PARTS_MAX"]
            .map(|limit| (format!("TURNHOUSE_LIMITS__{limit}"), u32::MAX.to_string()))
            .to_vec(),
    };
    let host = start.run().await?;
    let held = hold(&options, &host, &module, scratch.path()).await;
    let stopped = host.stop().await;
    held.map_err(|error| anyhow::anyhow!("{error:#}"))?;
    stopped
}

async fn hold(options: &Options, host: &Host, module: &Path, scratch: &Path) -> Result<()> {
    let document = Api::of(host).get("/openapi.json").await?.expect(200)?;
    kept(options, &document)?;
    let environment = pypi::environment("contract", &Path::new(SETTINGS).join("requirements.txt"))?;
    clients::run(host, &environment, scratch).await?;
    let python = match environment {
        Found::Here(python) => python,
        Found::Missing(why) => {
            println!("skipped: the specification's validator and Schemathesis: {why}");
            return Ok(());
        }
    };
    let file = scratch.join("openapi.json");
    std::fs::write(&file, document.to_string())?;
    let mut validator = Command::new(&python);
    validator.args(["-m", "openapi_spec_validator", "--errors", "all"]).arg(&file);
    let output = validator.stdin(Stdio::null()).output().await.context("cannot run the validator")?;
    ensure!(
        output.status.success(),
        "the document is not what OpenAPI {} asks for:\n{}",
        document["openapi"].as_str().unwrap_or("?"),
        String::from_utf8_lossy(&output.stdout)
    );
    println!("OpenAPI's specification: kept");
    schemathesis(options, host, module, &python).await
}

/// Holds the document against the one that was kept.
fn kept(options: &Options, document: &Value) -> Result<()> {
    ensure!(document["openapi"] == "3.1.0", "the document is of OpenAPI {} and not of 3.1", document["openapi"]);
    let file = setup::root().join(KEPT);
    let before: Value = match std::fs::read(&file) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{KEPT} is no JSON"))?,
        Err(_) => Value::Null,
    };
    let breaks = breaking::breaks(&before, document);
    if !breaks.is_empty() && !options.breaking {
        bail!(
            "{} of what clients rely on is broken (if that must be: cargo xtask contract --bless --breaking):\n  {}",
            breaks.len(),
            breaks.join("\n  ")
        );
    }
    if before == *document {
        println!("{KEPT}: nothing is new");
        return Ok(());
    }
    ensure!(
        options.bless,
        "the document says more than {KEPT}, and breaks nothing; keep it: cargo xtask contract --bless"
    );
    std::fs::write(&file, format!("{document:#}\n"))?;
    println!("{KEPT}: kept as it is now");
    Ok(())
}

async fn schemathesis(options: &Options, host: &Host, module: &Path, python: &Path) -> Result<()> {
    let settings = setup::root().join(SETTINGS);
    let seed = options.seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.subsec_nanos()));
    println!("Schemathesis: {} s with --seed {seed}", options.seconds);
    let report: PathBuf = setup::target_dir().join("contract.xml");
    let mut command = Command::new(python.with_file_name("schemathesis"));
    command
        .arg("--config-file")
        .arg(settings.join("schemathesis.toml"))
        .args(["run", &format!("{}/openapi.json", host.url), "--no-color", "--continue-on-failure"])
        .args(["--seed", &seed.to_string(), "--max-time", &options.seconds.to_string(), "--request-timeout", "65"])
        .args(["--generation-database", "none", "--report-junit-path"])
        .arg(&report)
        .args(["--header", &format!("Authorization: Bearer {}", host.api_key)])
        .env("SCHEMATHESIS_HOOKS", "hooks")
        .env("PYTHONPATH", &settings)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("CONTRACT_MODULE", module)
        .current_dir(setup::target_dir())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = command.output().await.context("cannot run Schemathesis")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let told =
            text.split_once("= ERRORS =").or_else(|| text.split_once("= FAILURES =")).map_or(&*text, |(_, rest)| rest);
        bail!(
            "the host does not keep to its document; again: cargo xtask contract --seed {seed}\n{told}\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let summary = text.split_once("= SUMMARY =").map_or(&*text, |(_, rest)| rest);
    println!("{}", summary.trim_matches(['=', '\n']));
    println!("its report is in {}", report.display());
    Ok(())
}
