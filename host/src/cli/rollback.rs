//! `turnhouse rollback`: points an agent back at an older version of its worker. Nothing is uploaded and nothing deleted.

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Value, json};

use super::agents::settings_of;
use super::client::{Client, Server};
use super::output::Output;
use super::{CliError, Result};
use turnhouse::ids::AgentId;

const EXAMPLES: &str = "\
Examples:
  turnhouse rollback support
  turnhouse rollback support --to 3";

/// Point an agent back at an older version of its worker
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The agent
    agent: AgentId,

    /// The version that it is to run; the one before the present when none is given
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    to: Option<u32>,

    #[command(flatten)]
    server: Server,
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let client = Client::new(&args.server)?;
    let agent = args.agent;
    let path = format!("v1/agents/{agent}");
    let before = client
        .find(&path)
        .await?
        .ok_or_else(|| CliError::failed(format!("there is no agent {agent}")).help("see `turnhouse agents list`"))?;
    let worker = before["worker"].as_str().context("the host did not say which worker the agent runs")?.to_owned();
    let present = version(&before).context("the host did not say which version the agent runs")?;
    let versions = client.get(&format!("v1/workers/{worker}")).await?;
    let versions: Vec<u32> = versions["items"].as_array().into_iter().flatten().filter_map(version).collect();
    let target = target(&versions, present, args.to).map_err(|why| {
        CliError::failed(why.about(&agent, &worker)).help(format!("see `turnhouse workers show {worker}`"))
    })?;
    let mut settings = settings_of(before);
    settings.insert("version".into(), json!(target));
    let after = client.send(Method::PUT, &path, &Value::Object(settings)).await?;
    if output.json {
        output.json(&json!({"agent": after, "version_before": present}));
    } else {
        output.say(&format!("agent {agent} runs {worker} version {target}; it ran version {present}"));
        output.say(&format!(
            "turns that have started stay with theirs; back again: turnhouse rollback {agent} --to {present}"
        ));
    }
    Ok(())
}

fn version(of: &Value) -> Option<u32> {
    of["version"].as_u64().and_then(|n| u32::try_from(n).ok())
}

/// Why there is nothing to go back to.
#[derive(Debug, PartialEq, Eq)]
enum Nothing {
    Older { present: u32 },
    Such { wanted: u32 },
    ToDo { present: u32 },
}

impl Nothing {
    fn about(&self, agent: &AgentId, worker: &str) -> String {
        match self {
            Nothing::Older { present } => {
                format!("agent {agent} runs {worker} version {present}, and there is no older one to go back to")
            }
            Nothing::Such { wanted } => format!("worker {worker} has no version {wanted}"),
            Nothing::ToDo { present } => format!("agent {agent} runs {worker} version {present} already"),
        }
    }
}

/// The version to go to, of those that there are.
fn target(versions: &[u32], present: u32, wanted: Option<u32>) -> Result<u32, Nothing> {
    match wanted {
        Some(wanted) if wanted == present => Err(Nothing::ToDo { present }),
        Some(wanted) if versions.contains(&wanted) => Ok(wanted),
        Some(wanted) => Err(Nothing::Such { wanted }),
        None => {
            let older = versions.iter().filter(|version| **version < present);
            older.max().copied().ok_or(Nothing::Older { present })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_version_it_is_the_next_older_that_exists() {
        assert_eq!(target(&[5, 4, 2, 1], 5, None), Ok(4));
        assert_eq!(target(&[5, 4, 2, 1], 4, None), Ok(2));
        assert_eq!(target(&[2, 1], 1, None), Err(Nothing::Older { present: 1 }));
        assert_eq!(target(&[], 1, None), Err(Nothing::Older { present: 1 }));
    }

    #[test]
    fn a_named_version_must_exist_and_be_another() {
        assert_eq!(target(&[3, 2, 1], 3, Some(1)), Ok(1));
        assert_eq!(target(&[3, 2, 1], 1, Some(3)), Ok(3));
        assert_eq!(target(&[3, 2, 1], 3, Some(4)), Err(Nothing::Such { wanted: 4 }));
        assert_eq!(target(&[3, 2, 1], 3, Some(3)), Err(Nothing::ToDo { present: 3 }));
    }
}
