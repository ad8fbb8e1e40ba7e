//! `turnhouse dev`: a host for one's own machine, with an org, a key and the given workers, which follows their files.
//!
//! It listens on loopback only and refuses foreign `Host` headers, so that no page in a browser can reach it under another name.

use std::net::SocketAddr;
use std::path::PathBuf;

use turnhouse::agent::AgentSettings;
use turnhouse::audit::Actor;
use turnhouse::config::Config;
use turnhouse::host::Host;
use turnhouse::ids::{AgentId, OrgId, UserId, WorkerName};
use turnhouse::registry::{PutAgentError, UploadError};
use turnhouse::store::{PutAgent, PutWorker};
use turnhouse::telemetry::LogFormat;

use anyhow::Context as _;

use super::database::load_config;
use super::deploy::{read_module, worker_name};
use super::hosting::{Hosting, install_logs};
use super::inspect::refused;
use super::output::{Output, Style, line, note};
use super::{CliError, Result, database};

mod key;

mod watch;

use watch::Watched;

const EXAMPLES: &str = "\
Examples:
  turnhouse dev greeter.wasm
  turnhouse dev target/wasm32-wasip1/release/greeter.wasm --listen 127.0.0.1:9000
  turnhouse dev greeter.wasm --json

Workers and agents are named for their files; the first is the org's default. A file that changes is deployed again.
With --json the first line on stdout says url, org and api_key, once the host is ready.";

const ORG: &str = "dev";

/// Run a host for this machine, with an org, a key and these workers
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Modules to deploy and to follow
    wasm: Vec<PathBuf>,

    /// Where it listens: an address of this machine's own loopback
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8787")]
    listen: SocketAddr,

    /// Where the database and the key are kept
    #[arg(long, value_name = "DIR", env = "TURNHOUSE_DATA_DIR", default_value = "turnhouse-data")]
    data_dir: PathBuf,

    /// How log lines look; text on a terminal, else JSON
    #[arg(long, value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

/// The first line on stdout with `--json`: the host answers.
#[derive(serde::Serialize)]
struct Ready<'a> {
    url: &'a str,
    org: &'a str,
    api_key: &'a str,
}

/// Runs until it is told to end.
pub async fn run(args: Args, output: Output) -> Result {
    if !args.listen.ip().is_loopback() {
        return Err(CliError::usage(format!("{} is not on this machine's loopback", args.listen))
            .help("`turnhouse dev` trusts who can reach it; for others run `turnhouse serve --listen`"));
    }
    // Before anything is started: a wrong name or a missing file is the user's to mend.
    let mut modules = args.wasm.iter().map(|path| Module::new(path.clone())).collect::<Result<Vec<Module>>>()?;
    for (index, module) in modules.iter().enumerate() {
        if modules[..index].iter().any(|earlier| earlier.worker == module.worker) {
            return Err(CliError::usage(format!("two files are named {}", module.worker)).help("rename one of them"));
        }
    }
    install_logs(args.log_format)?;
    let hosting = Box::pin(Hosting::start(config(&args)?)).await?;
    let host = hosting.host().clone();
    let prepared = prepare(&host, &mut modules).await;
    let api_key = match prepared {
        Ok(api_key) => api_key,
        Err(error) => {
            // The lock and the lease are given back: the next attempt finds a clean house.
            host.drain().await;
            return Err(error);
        }
    };
    let url = hosting.url()?;
    let ready = || {
        if output.json {
            // In the order in which a person reads it, too.
            let ready = Ready { url: &url, org: ORG, api_key: &api_key };
            line(&serde_json::to_string(&ready).expect("strings serialise"));
        } else {
            banner(&url, &api_key, &modules);
        }
    };
    let following = modules.clone();
    hosting.serve(ready, follow(&host, following)).await
}

fn config(args: &Args) -> Result<Config> {
    let file = Some(args.data_dir.join("turnhouse.toml")).filter(|file| file.is_file());
    let overrides = vec![
        ("listen", args.listen.to_string().into()),
        // Several may run on one machine.
        ("metrics_listen", "127.0.0.1:0".into()),
        ("data_dir", args.data_dir.to_string_lossy().into_owned().into()),
        ("loopback_only", true.into()),
    ];
    let mut config = load_config(file.as_deref(), overrides)?;
    // Whatever the environment says: this is the host without anything to install.
    config.database_url = None;
    Ok(config)
}

/// A file that is a worker and an agent.
#[derive(Debug, Clone)]
struct Module {
    worker: WorkerName,
    agent: AgentId,
    file: Watched,
}

impl Module {
    fn new(path: PathBuf) -> Result<Module> {
        read_module(&path)?;
        let worker = worker_name(&path)?;
        let agent = AgentId::parse(worker.as_str()).context("the file's name is no agent's")?;
        Ok(Module { worker, agent, file: Watched::new(path) })
    }
}

fn ids() -> Result<(OrgId, UserId)> {
    Ok((OrgId::parse(ORG).context("the org's id")?, UserId::parse(ORG).context("the user's id")?))
}

/// Makes the org, its key and its agents, as far as they do not exist. Returns the key.
async fn prepare(host: &Host, modules: &mut [Module]) -> Result<String> {
    let (org, user) = ids()?;
    host.store.create_org(&org, &user, host.clock.now(), &Actor::command_line()).await.map_err(database::failed)?;
    let file = host.config.data_dir.join("dev-key");
    let api_key = key::keep(host.store.as_ref(), &file, &org, &user, host.clock.now()).await?;
    for (index, module) in modules.iter_mut().enumerate() {
        module.file.deployed();
        let deployed = Box::pin(deploy(host, &org, module, index == 0)).await;
        deployed.map_err(|error| error.context(format!("cannot deploy {}", module.file.path().display())))?;
    }
    Ok(api_key)
}

/// Stores the file as a worker's version and lets its agent run it. What else is set of the agent stays.
async fn deploy(host: &Host, org: &OrgId, module: &Module, default: bool) -> Result<u32> {
    let wasm = read_module(module.file.path())?;
    let stored =
        host.upload_worker(org, &module.worker, wasm, &Actor::command_line()).await.map_err(|error| match error {
            UploadError::Refused(refusal) => refused(&refusal),
            UploadError::Store(error) => database::failed(error),
        })?;
    let version = match stored {
        PutWorker::Created(version) | PutWorker::Existing(version) => version.version,
        PutWorker::Full(why) => {
            return Err(CliError::failed(why.to_string()).help("delete workers that are not needed"));
        }
    };
    let before = host.agent(org, &module.agent).await.map_err(database::failed)?;
    let mut settings = before.map_or_else(|| AgentSettings::of(module.worker.clone()), |agent| agent.settings.clone());
    settings.worker = module.worker.clone();
    settings.version = Some(version);
    settings.default |= default;
    match host.put_agent(org, &module.agent, settings, &Actor::command_line()).await {
        Ok(PutAgent::Stored { .. }) => Ok(version),
        Ok(PutAgent::NoSuchWorker) => Err(CliError::failed(format!("worker {} was deleted meanwhile", module.worker))),
        Ok(PutAgent::NoFileMode) => Err(CliError::failed("session_mode \"file\" needs the embedded store")),
        Ok(PutAgent::Full) => Err(CliError::failed("the org has all the agents that it may have")),
        Err(PutAgentError::Invalid(error)) => Err(CliError::failed(error.to_string())),
        Err(PutAgentError::Store(error)) => Err(database::failed(error)),
    }
}

/// Deploys files that change, for ever. Running turns keep their version; one that is refused leaves the one before in place.
async fn follow(host: &Host, mut modules: Vec<Module>) -> Result {
    let (org, _) = ids()?;
    let mut ticks = tokio::time::interval(watch::INTERVAL);
    loop {
        ticks.tick().await;
        for module in &mut modules {
            if !module.file.changed() {
                continue;
            }
            match Box::pin(deploy(host, &org, module, false)).await {
                Ok(version) => note(&format!("deployed {} version {version}", module.worker)),
                Err(error) => error.context(format!("cannot deploy {}", module.file.path().display())).print(),
            }
        }
    }
}

fn banner(url: &str, api_key: &str, modules: &[Module]) {
    let style = Style::of(&std::io::stdout());
    let agents: Vec<&str> = modules.iter().map(|module| module.agent.as_str()).collect();
    line(&format!("{} is ready\n", style.bold("turnhouse dev")));
    line(&format!("  url      {url}"));
    line(&format!("  api key  {api_key}"));
    match agents.as_slice() {
        [] => {
            line("  agents   none yet\n");
            line("Deploy one from another terminal:\n");
            line(&format!("  TURNHOUSE_URL={url} TURNHOUSE_API_KEY={api_key} turnhouse deploy worker.wasm\n"));
        }
        [first, rest @ ..] => {
            let rest: String = rest.iter().map(|agent| format!(", {agent}")).collect();
            line(&format!("  agents   {first} (default){rest}; a file that changes is deployed again\n"));
            line("Talk to it from another terminal:\n");
            line(&format!("  TURNHOUSE_URL={url} TURNHOUSE_API_KEY={api_key} turnhouse chat {first}\n"));
            line(&format!("  curl -N {url}/v1/agents/{first}/conversations/hello/turns \\"));
            line(&format!("    -H 'Authorization: Bearer {api_key}' -H 'Accept: text/event-stream' \\"));
            line("    -H 'Content-Type: application/json' -d '{\"message\": {\"text\": \"hello\"}}'\n");
        }
    }
    line("Ctrl-C ends it.");
}

#[cfg(test)]
mod tests {
    use super::super::output::Style;
    use super::*;

    fn args(listen: &str, wasm: Vec<PathBuf>, data_dir: PathBuf) -> Args {
        Args { wasm, listen: listen.parse().unwrap(), data_dir, log_format: None }
    }

    #[tokio::test]
    async fn an_address_that_others_can_reach_is_refused_before_anything_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
            let error = run(args(address, vec![], data.clone()), Output { json: false }).await.unwrap_err();
            assert!(error.render(Style::plain()).contains("turnhouse serve"));
            assert_eq!(format!("{:?}", error.exit_code()), format!("{:?}", std::process::ExitCode::from(2)));
        }
        assert!(!data.exists());
    }

    #[tokio::test]
    async fn a_missing_file_and_two_of_one_name_are_refused_before_anything_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let error = run(args("127.0.0.1:0", vec!["/nonexistent/a.wasm".into()], data.clone()), Output { json: false });
        assert!(error.await.is_err());
        let twice: Vec<PathBuf> = ["a", "b"].iter().map(|d| directory.path().join(d).join("w.wasm")).collect();
        for path in &twice {
            std::fs::create_dir(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let error = run(args("127.0.0.1:0", twice, data.clone()), Output { json: false }).await.unwrap_err();
        assert!(error.render(Style::plain()).contains("two files are named w"));
        assert!(!data.exists());
    }

    #[test]
    fn the_configuration_is_closed_to_others() {
        let config = config(&args("127.0.0.1:0", vec![], "data".into())).unwrap();
        assert!(config.loopback_only && config.metrics_listen.ip().is_loopback() && config.database_url.is_none());
    }
}
