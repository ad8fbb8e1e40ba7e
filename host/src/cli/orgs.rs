//! `turnhouse orgs`: make and list orgs, on the database directly.

use clap::Subcommand;
use serde_json::json;
use turnhouse::audit::Actor;
use turnhouse::clock::Clock;
use turnhouse::ids::{OrgId, UserId};

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
            let done = async {
                let created = store.create_org(&org, &owner, now, &Actor::command_line()).await?;
                Ok((created, starter::provide_default_agent(&*store, &org, now).await?))
            };
            let done = done.await.map_err(database::failed);
            store.close().await;
            let (created, agent) = done?;
            if output.json {
                output.json(&json!({"id": org, "created": created, "default_agent_created": agent}));
            } else if created {
                output.say(&format!("made org {org}, owned by {owner}"));
                if let Some(agent) = agent {
                    output.say(&format!(
                        "its default agent is {agent}, which repeats what it is told until you deploy something better"
                    ));
                }
                output.say(&format!("a key for it: turnhouse keys create --org {org} --user {owner} --scopes admin"));
            } else {
                output.say(&format!("org {org} exists; what it lacked is filled in"));
            }
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
