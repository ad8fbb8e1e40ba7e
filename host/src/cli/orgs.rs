//! `turnhouse orgs`: make, mend, list and delete orgs, on the database directly.

use clap::Subcommand;
use serde_json::json;
use turnhouse::audit::{Actor, AuditEntry, AuditFilter};
use turnhouse::clock::{Clock, Timestamp};
use turnhouse::erase::erase_alone;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::private_dirs::PrivateDirs;
use turnhouse::store::{DefaultAgent, Provisioned, StoreError};

use super::output::Output;
use super::{CliError, Result, database, starter};

/// How often it is asked whether the hosts are done.
const ASK_EVERY: std::time::Duration = std::time::Duration::from_millis(250);

const EXAMPLES: &str = "\
Examples:
  turnhouse orgs create acme --owner ann@acme.example
  turnhouse orgs list --json";

/// Make, list and delete orgs, on the database directly
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
    /// Delete an org with all that it has: turns, conversations, agents, workers, keys, audit. For good
    #[command(after_help = "Example:\n  turnhouse orgs delete acme --yes")]
    Delete {
        /// The org
        org: OrgId,
        /// That it is meant
        #[arg(long)]
        yes: bool,
        /// Do not wait until all of it is gone: the hosts go on with it
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        database: database::DataArgs,
    },
    /// What was done to an org, also when nobody has a key for it; without one, what was done to the host
    #[command(after_help = "Example:\n  turnhouse orgs audit acme --limit 20")]
    Audit {
        /// The org
        org: Option<OrgId>,
        /// How many entries at most, newest first
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000), value_name = "N")]
        limit: u32,
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

const COLUMNS: &[(&str, &str)] =
    &[("ORG", "/id"), ("OWNER", "/owner"), ("CREATED", "/created_at"), ("BEING DELETED SINCE", "/deleting_at")];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    match args.action {
        Action::Create { org, owner, database } => {
            let store = database.open().await?;
            let now = Clock::system().now();
            let starter = starter::starter(&database.load()?.limits);
            let done = store.provision_org(&org, &owner, &starter, now, &Actor::command_line()).await;
            store.close().await;
            let done = done.map_err(database::failed)?;
            if done.default == DefaultAgent::Deleting {
                return Err(CliError::failed(format!("org {org} is being deleted"))
                    .help("make it again once it is gone; `turnhouse orgs list` tells"));
            }
            provisioned(&org, &owner, &done, output);
        }
        Action::Delete { org, yes, no_wait, database } => {
            if !yes {
                return Err(CliError::usage(format!("this deletes all of org {org}, for good"))
                    .help("`turnhouse export` keeps a copy; --yes says that it is meant"));
            }
            delete(&org, no_wait, &database, output).await?;
        }
        Action::Audit { org, limit, database } => {
            let store = database.open().await?;
            let page = store.audit(org.as_ref(), &AuditFilter::All, Timestamp(0), None, limit as usize).await;
            store.close().await;
            let item = |entry: &AuditEntry| {
                json!({"at": entry.at, "id": entry.id, "actor": entry.actor, "credential": entry.credential,
                    "request_id": entry.request_id, "verb": entry.verb, "resource": entry.resource, "detail": entry.detail})
            };
            let items: Vec<_> = page.map_err(database::failed)?.items.iter().map(item).collect();
            output.page(&json!({"items": items, "next": null}), super::audit::COLUMNS);
        }
        Action::List { database } => {
            let store = database.open().await?;
            let orgs = store.orgs().await.map_err(database::failed);
            store.close().await;
            let items: Vec<_> = orgs?
                .iter()
                .map(|org| json!({"id": org.id, "owner": org.owner, "created_at": org.created_at, "deleting_at": org.deleting_at}))
                .collect();
            output.page(&json!({"items": items, "next": null}), COLUMNS);
        }
    }
    Ok(())
}

/// Marks the org; then waits for the hosts, or does their work where there is none.
async fn delete(org: &OrgId, no_wait: bool, database: &database::DataArgs, output: Output) -> Result {
    let config = database.load()?;
    let store = database.open().await?;
    let clock = Clock::system();
    let done = async {
        if !store.mark_org(org, clock.now(), &Actor::command_line()).await? {
            return Ok(false);
        }
        let dirs = if store.shared() { None } else { Some(&config.data_dir) };
        while !no_wait && store.org(org).await?.is_some() {
            let status = store.status(clock.now()).await?;
            let hosts = status.replicas.iter().any(|replica| replica.expires_in_ms > 0);
            if hosts {
                tokio::time::sleep(ASK_EVERY).await;
                continue;
            }
            let dirs = match dirs.filter(|dir| dir.join("files").exists()) {
                Some(dir) => Some(
                    PrivateDirs::open(dir, &config.limits, store.clone())
                        .map_err(|error| StoreError::Unavailable(format!("the private directories: {error}")))?,
                ),
                None => None,
            };
            while !erase_alone(&store, dirs.as_ref(), org, clock.now()).await? {}
        }
        Ok(true)
    };
    let done: Result<bool, StoreError> = done.await;
    store.close().await;
    if !done.map_err(database::failed)? {
        return Err(CliError::failed(format!("there is no org {org}")).help("see `turnhouse orgs list`"));
    }
    output.done(if no_wait { "marked" } else { "deleted" }, "org", org.as_str());
    Ok(())
}

/// Tells what an org was given.
fn provisioned(org: &OrgId, owner: &UserId, done: &Provisioned, output: Output) {
    if output.json {
        let (agent, made) = match &done.default {
            DefaultAgent::Kept(agent) | DefaultAgent::Flagged(agent) => (Some(agent), None),
            DefaultAgent::Made(agent) => (Some(agent), Some(agent)),
            DefaultAgent::LeftOut | DefaultAgent::NoRoom | DefaultAgent::Deleting => (None, None),
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
        DefaultAgent::Deleting => {}
        DefaultAgent::NoRoom => output.say(
            "it has no default agent, and no room for one: limits.org_agents_max or limits.org_workers_max is reached",
        ),
    }
    if done.created {
        output.say(&format!("a key for it: turnhouse keys create --org {org} --user {owner} --scopes admin"));
    }
}
