//! `turnhouse orgs`: make and list orgs, on the database directly.

use clap::Subcommand;
use serde_json::json;
use turnhouse::audit::Actor;
use turnhouse::clock::Clock;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::store::{DefaultAgent, Provisioned};

use super::output::Output;
use super::{Result, database, starter};

const EXAMPLES: &str = "\
Examples:
  turnhouse orgs create acme --owner ann@acme.example
  turnhouse orgs list --json";

/// Make and list orgs, on the database directly
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make an org, or fill in what an older one lacks; what it has stays
    #[command(after_help = "Example:\n  turnhouse orgs create acme --owner ann@acme.example")]
    Create {
        /// The org
        org: OrgId,
        /// The member who owns it
        #[arg(long, value_name = "USER", default_value = "owner")]
        owner: UserId,
        #[command(flatten)]
        database: database::DataArgs,
    },
    /// Every org
    #[command(after_help = "Example:\n  turnhouse orgs list --data-dir /var/lib/turnhouse")]
    List {
        #[command(flatten)]
        database: database::DataArgs,
    },
}

const COLUMNS: &[(&str, &str)] = &[("ORG", "/id"), ("OWNER", "/owner"), ("CREATED", "/created_at")];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    match args.action {
        Action::Create { org, owner, database } => {
            let store = database.open().await?;
            let now = Clock::system().now();
            let starter = starter::starter(&database.load()?.limits);
            let done = store.provision_org(&org, &owner, &starter, now, &Actor::command_line()).await;
            store.close().await;
            provisioned(&org, &owner, &done.map_err(database::failed)?, output);
        }
        Action::List { database } => {
            let store = database.open().await?;
            let orgs = store.orgs().await.map_err(database::failed);
            store.close().await;
            let items: Vec<_> = orgs?
                .iter()
                .map(|org| json!({"id": org.id, "owner": org.owner, "created_at": org.created_at}))
                .collect();
            output.page(&json!({"items": items, "next": null}), COLUMNS);
        }
    }
    Ok(())
}

/// Tells what an org was given.
fn provisioned(org: &OrgId, owner: &UserId, done: &Provisioned, output: Output) {
    if output.json {
        let (agent, made) = match &done.default {
            DefaultAgent::Kept(agent) | DefaultAgent::Flagged(agent) => (Some(agent), None),
            DefaultAgent::Made(agent) => (Some(agent), Some(agent)),
            DefaultAgent::LeftOut | DefaultAgent::NoRoom => (None, None),
        };
        output.json(&json!({"id": org, "created": done.created, "owner_set": done.owner_set, "default_agent": agent,
            "default_agent_created": made}));
        return;
    }
    if done.created {
        output.say(&format!("made org {org}, owned by {owner}"));
    } else {
        output.say(&format!("org {org} exists; what it has stays"));
    }
    if done.owner_set {
        output.say(&format!("it had no owner and is owned by {owner} now"));
    }
    match &done.default {
        DefaultAgent::Made(agent) => output.say(&format!(
            "its default agent is {agent}, which repeats what it is told until you deploy something better"
        )),
        DefaultAgent::Flagged(agent) => output.say(&format!("its agent {agent} is its default from now on")),
        DefaultAgent::Kept(agent) => output.say(&format!("its default agent is {agent}")),
        DefaultAgent::LeftOut => {
            output.say("it has no default agent, as its admin left it; any agent put with `default` true is one")
        }
        DefaultAgent::NoRoom => output.say(
            "it has no default agent, and no room for one: limits.org_agents_max or limits.org_workers_max is reached",
        ),
    }
    if done.created {
        output.say(&format!("a key for it: turnhouse keys create --org {org} --user {owner} --scopes admin"));
    }
}
