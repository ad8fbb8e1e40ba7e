//! `turnhouse agents`: list, show, set and delete agents.
//!
//! A change reads the agent, changes what was named and stores the whole: what was not named stays as it is.

use clap::Subcommand;
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, PageArgs, Server};
use super::output::Output;
use super::{CliError, Result};
use turnhouse::ids::{AgentId, WorkerName};

const EXAMPLES: &str = "\
Examples:
  turnhouse agents list
  turnhouse agents set notes --version 3 --env TONE=dry --limit turn_timeout_ms=90000";

/// List, show, set and delete agents
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// The org's agents
    #[command(after_help = "Example:\n  turnhouse agents list --limit 10")]
    List {
        #[command(flatten)]
        page: PageArgs,
        #[command(flatten)]
        server: Server,
    },
    /// One agent's settings
    #[command(after_help = "Example:\n  turnhouse agents show notes --json")]
    Show(One),
    /// Make an agent, or change what is named of it
    #[command(
        after_help = "Example:\n  turnhouse agents set notes --worker notes --default --limit turn_timeout_ms=90000"
    )]
    Set {
        #[command(flatten)]
        one: One,
        #[command(flatten)]
        change: Change,
    },
    /// Delete an agent that has no conversation
    #[command(after_help = "Example:\n  turnhouse agents delete notes")]
    Delete(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// The agent
    agent: AgentId,
    #[command(flatten)]
    server: Server,
}

/// What is to be changed of an agent.
#[derive(Debug, Default, clap::Args)]
pub struct Change {
    /// The worker that it runs; needed for a new agent
    #[arg(long)]
    pub worker: Option<WorkerName>,
    /// The worker's version; the newest when --worker is given alone. `turnhouse rollback` goes back by one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub version: Option<u32>,
    /// Conversations that name no agent get this one
    #[arg(long)]
    pub default: bool,
    /// A bound of its own, such as turn_timeout_ms=90000; see the manual for their names
    #[arg(long, value_name = "NAME=NUMBER", value_parser = limit)]
    pub limit: Vec<(String, u64)>,
    /// A variable of the worker's environment
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// Takes a variable away
    #[arg(long, value_name = "NAME")]
    pub unset_env: Vec<String>,
    /// A host that its operations may reach; all of them together replace those of before
    #[arg(long, value_name = "HOST")]
    pub allow_host: Vec<String>,
    /// The model that its operations use
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// How many completed turns its input carries
    #[arg(long, value_name = "N")]
    pub history_messages: Option<u32>,
    /// How its conversations keep their state: a snapshot, or files in a private directory
    #[arg(long, value_name = "MODE", value_parser = ["snapshot", "file"])]
    pub session_mode: Option<String>,
}

/// `NAME=VALUE`; the value may have any further `=`.
pub fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| "write NAME=VALUE".to_owned())?;
    if name.is_empty() {
        return Err("the name is empty; write NAME=VALUE".to_owned());
    }
    Ok((name.to_owned(), value.to_owned()))
}

fn limit(text: &str) -> Result<(String, u64), String> {
    let (name, value) = variable(text)?;
    let number = value.parse().map_err(|_| format!("{value:?} is no whole number"))?;
    Ok((name, number))
}

impl Change {
    /// The settings to store: `before` with what is named.
    pub fn apply(&self, agent: &AgentId, before: Option<Value>) -> Result<Value> {
        let mut settings = match before.map(settings_of) {
            Some(settings) => settings,
            None if self.worker.is_some() => Map::new(),
            None => {
                return Err(CliError::usage(format!("there is no agent {agent}"))
                    .help("name the --worker that it is to run, or see `turnhouse agents list`"));
            }
        };
        if let Some(worker) = &self.worker {
            settings.insert("worker".into(), json!(worker));
            settings.remove("version");
        }
        if let Some(version) = self.version {
            settings.insert("version".into(), json!(version));
        }
        if self.default {
            settings.insert("default".into(), json!(true));
        }
        for (name, value) in &self.limit {
            object(&mut settings, "limits").insert(name.clone(), json!(value));
        }
        for name in &self.unset_env {
            object(&mut settings, "environment").remove(name);
        }
        for (name, value) in &self.env {
            object(&mut settings, "environment").insert(name.clone(), json!(value));
        }
        if !self.allow_host.is_empty() {
            settings.insert("allowed_hosts".into(), json!(self.allow_host));
        }
        if let Some(model) = &self.model {
            settings.insert("model".into(), json!(model));
        }
        if let Some(count) = self.history_messages {
            settings.insert("history_messages".into(), json!(count));
        }
        if let Some(mode) = &self.session_mode {
            settings.insert("session_mode".into(), json!(mode));
        }
        Ok(Value::Object(settings))
    }
}

/// An agent's settings out of its resource. What the host adds is named here, so that a setting which this program does not know goes back as it came.
pub fn settings_of(agent: Value) -> Map<String, Value> {
    const ADDED: &[&str] = &["id", "revision", "created_at", "updated_at", "links"];
    let Value::Object(mut settings) = agent else { return Map::new() };
    settings.retain(|name, value| !ADDED.contains(&name.as_str()) && !value.is_null());
    settings
}

fn object<'a>(settings: &'a mut Map<String, Value>, name: &str) -> &'a mut Map<String, Value> {
    let value = settings.entry(name).or_insert_with(|| json!({}));
    if !value.is_object() {
        *value = json!({});
    }
    value.as_object_mut().expect("it was made one")
}

/// Reads the agent, changes it and stores it; what is stored.
pub async fn change(client: &Client, agent: &AgentId, change: &Change) -> Result<Value> {
    let path = format!("v1/agents/{agent}");
    let settings = change.apply(agent, client.find(&path).await?)?;
    Ok(client.send(Method::PUT, &path, &settings).await?)
}

const COLUMNS: &[(&str, &str)] = &[
    ("AGENT", "/id"),
    ("WORKER", "/worker"),
    ("VERSION", "/version"),
    ("DEFAULT", "/default"),
    ("UPDATED", "/updated_at"),
];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    match args.action {
        Action::List { page, server } => output.page(&Client::new(&server)?.page("v1/agents", &page).await?, COLUMNS),
        Action::Show(one) => {
            output.resource(&Client::new(&one.server)?.get(&format!("v1/agents/{}", one.agent)).await?);
        }
        Action::Set { one, change: changed } => {
            output.resource(&change(&Client::new(&one.server)?, &one.agent, &changed).await?);
        }
        Action::Delete(one) => {
            let client = Client::new(&one.server)?;
            client.call(Method::DELETE, &format!("v1/agents/{}", one.agent)).await?;
            output.done("deleted", "agent", one.agent.as_str());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent() -> AgentId {
        "notes".parse().unwrap()
    }

    #[test]
    fn what_is_not_named_stays_as_it_is() {
        let before = json!({"id": "notes", "worker": "notes", "version": 2, "default": true, "limits": {"turn_timeout_ms": 5},
            "environment": {"A": "1", "B": "2"}, "model": null, "a_newer_setting": 7, "revision": 4, "created_at": "…"});
        let change = Change {
            version: Some(3),
            limit: vec![limit("cpu_timeout_ms=9").unwrap()],
            env: vec![variable("A=x=y").unwrap()],
            unset_env: vec!["B".into()],
            ..Change::default()
        };
        let expected = json!({"worker": "notes", "version": 3, "default": true, "a_newer_setting": 7,
            "limits": {"turn_timeout_ms": 5, "cpu_timeout_ms": 9}, "environment": {"A": "x=y"}});
        assert_eq!(change.apply(&agent(), Some(before)).unwrap(), expected);
    }

    #[test]
    fn a_new_agent_needs_a_worker_and_another_worker_drops_the_pin() {
        assert!(Change::default().apply(&agent(), None).is_err());
        let change = Change { worker: Some("echo".parse().unwrap()), ..Change::default() };
        assert_eq!(change.apply(&agent(), None).unwrap(), json!({"worker": "echo"}));
        let before = json!({"worker": "notes", "version": 2});
        assert_eq!(change.apply(&agent(), Some(before)).unwrap(), json!({"worker": "echo"}));
    }

    #[test]
    fn settings_that_are_none_are_refused() {
        assert!(variable("=x").is_err() && variable("x").is_err() && limit("a=b").is_err());
    }
}
