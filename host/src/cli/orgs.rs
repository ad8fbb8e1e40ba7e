//! `turnhouse orgs`: make, mend, bound, list and delete orgs and give them members, on the database directly.

use clap::Subcommand;
use serde_json::{Value, json};
use turnhouse::audit::{Actor, AuditEntry, AuditFilter};
use turnhouse::caller::Role;
use turnhouse::clock::{Clock, Timestamp};
use turnhouse::erase::erase_alone;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::private_dirs::PrivateDirs;
use turnhouse::quota::{LimitName, LimitsChange, Standing};
use turnhouse::store::{DefaultAgent, OrgUse, Provisioned, PutMember, StoreError};

use super::output::Output;
use super::{CliError, Result, database, members, starter};

/// How often it is asked whether the hosts are done.
const ASK_EVERY: std::time::Duration = std::time::Duration::from_millis(250);

const EXAMPLES: &str = "\
Examples:
  turnhouse orgs create acme --owner ann@acme.example
  turnhouse orgs member acme bob@acme.example --role admin
  turnhouse orgs list --json";

/// Make, bound, list and delete orgs and give them members, on the database directly
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
    /// What an org may and what it has used of it; with options, other limits for it, from the next message on and on every host
    #[command(after_help = LIMITS_EXAMPLES)]
    Limits {
        /// The org
        org: OrgId,
        #[command(flatten)]
        change: ChangeArgs,
        #[command(flatten)]
        database: database::DataArgs,
    },
    /// Make somebody a member of an org, or give a member another role: also an owner, where the org has lost its own
    #[command(after_help = "Example:\n  turnhouse orgs member acme ann@acme.example --role owner")]
    Member {
        /// The org
        org: OrgId,
        /// The user
        user: UserId,
        /// As what: member, admin, owner
        #[arg(long, value_parser = members::role, default_value = "member")]
        role: Role,
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

const LIMITS_EXAMPLES: &str = "\
Examples:
  turnhouse orgs limits acme
  turnhouse orgs limits acme --running-max 50 --submits-per-second 5 --submit-burst 20
  turnhouse orgs limits acme --cpu-ms-per-hour off --running-max default";

/// Limits to change: a number, `default` for the host's (`limits.org_…` of its configuration), or `off` where there may be none.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct ChangeArgs {
    /// Messages a second over time, such as 0.5; `off` or `default`
    #[arg(long, value_name = "N|off|default", value_parser = rate)]
    submits_per_second: Option<Set<f64>>,
    /// Messages at once after a pause, where they are limited; `default`
    #[arg(long, value_name = "N|default", value_parser = bound::<1>)]
    submit_burst: Option<Set<u32>>,
    /// Running turns; `default`
    #[arg(long, value_name = "N|default", value_parser = bound::<1>)]
    running_max: Option<Set<u32>>,
    /// Live turns, running ones included; 0 takes no messages; `default`
    #[arg(long, value_name = "N|default", value_parser = bound::<0>)]
    queue_max: Option<Set<u32>>,
    /// Milliseconds of guests' processor time an hour; `off` or `default`
    #[arg(long, value_name = "N|off|default", value_parser = amount)]
    cpu_ms_per_hour: Option<Set<u64>>,
    /// Bytes of turns, events, snapshots, attachments and modules, as last measured; `off` or `default`
    #[arg(long, value_name = "N|off|default", value_parser = amount)]
    storage_bytes_max: Option<Set<u64>>,
}

/// What a limit is set to; `None`: the host's.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Set<T>(Option<T>);

fn set<T>(text: &str, off: Option<T>, number: impl FnOnce() -> Option<T>, says: &str) -> Result<Set<T>, String> {
    let value = match (text, off) {
        ("default", _) => return Ok(Set(None)),
        ("off", Some(off)) => Some(off),
        _ => number(),
    };
    value.map(|value| Set(Some(value))).ok_or_else(|| says.to_owned())
}

fn rate(text: &str) -> Result<Set<f64>, String> {
    let number = || text.parse().ok().filter(|rate: &f64| (0.001..=1e6).contains(rate));
    set(text, Some(0.0), number, "it is a number from 0.001 to 1000000, off or default")
}

fn bound<const MIN: u32>(text: &str) -> Result<Set<u32>, String> {
    let number = || text.parse().ok().filter(|bound| (MIN..=1_000_000_000).contains(bound));
    set(text, None, number, &format!("it is a number from {MIN} to 1000000000, or default"))
}

fn amount(text: &str) -> Result<Set<u64>, String> {
    let number = || text.parse().ok().filter(|amount| (1..=1 << 52).contains(amount));
    set(text, Some(0), number, "it is a number from 1, off or default")
}

impl From<ChangeArgs> for LimitsChange {
    fn from(args: ChangeArgs) -> LimitsChange {
        LimitsChange {
            submits_per_second: args.submits_per_second.map(|set| set.0),
            submit_burst: args.submit_burst.map(|set| set.0),
            running_max: args.running_max.map(|set| set.0),
            queue_max: args.queue_max.map(|set| set.0),
            cpu_ms_per_hour: args.cpu_ms_per_hour.map(|set| set.0),
            storage_bytes_max: args.storage_bytes_max.map(|set| set.0),
        }
    }
}

const LIMIT_COLUMNS: &[(&str, &str)] =
    &[("LIMIT", "/limit"), ("VALUE", "/value"), ("SET FOR", "/set_for"), ("USED", "/used")];

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
        Action::Member { org, user, role, database } => {
            let max = database.load()?.limits.org_members_max;
            let store = database.open().await?;
            let now = Clock::system().now();
            let put = store.put_member(&org, &user, role, None, max, now, &Actor::command_line()).await;
            store.close().await;
            match put.map_err(database::failed)? {
                PutMember::Stored { member, .. } => members::told(&member.user, &org, member.role, output),
                PutMember::NoOrg => return Err(no_such_org(&org)),
                PutMember::Full => {
                    return Err(CliError::failed(format!("org {org} has {max} members"))
                        .help("remove some, or raise limits.org_members_max"));
                }
                PutMember::Refused(_) => {
                    return Err(CliError::failed(format!("{user} is the last owner of org {org}"))
                        .help(format!("make another one first: turnhouse orgs member {org} USER --role owner")));
                }
            }
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
        Action::Limits { org, change, database } => limits(&org, change.into(), &database, output).await?,
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

/// Changes what is to be changed, and shows how the org stands.
async fn limits(org: &OrgId, change: LimitsChange, database: &database::DataArgs, output: Output) -> Result {
    let limits = database.load()?.limits;
    let store = database.open().await?;
    let now = Clock::system().now();
    let done = async {
        if change != LimitsChange::default() {
            store.set_org_limits(org, &change, now, &Actor::command_line()).await?;
        }
        store.org_use(org, now).await
    };
    let done: Result<Option<OrgUse>, StoreError> = done.await;
    store.close().await;
    let Some(found) = done.map_err(database::failed)? else {
        return Err(no_such_org(org));
    };
    let standing = Standing::of(&found, &limits);
    if output.json {
        let own = &found.own;
        output.json(&json!({"org": org, "own": own, "limits": standing.limits, "used": standing.used}));
        return Ok(());
    }
    let (own, value) = (json!(found.own), json!(standing.limits));
    let used = |name: LimitName| match name {
        LimitName::SubmitsPerSecond => Value::Null,
        LimitName::SubmitBurst => standing.used.submits_left.map_or(Value::Null, |left| json!(format!("{left} left"))),
        LimitName::RunningMax => json!(standing.used.running),
        LimitName::QueueMax => json!(standing.used.running + standing.used.queued),
        LimitName::CpuMsPerHour => standing.used.cpu_ms.map_or(Value::Null, |ms| json!(ms.round())),
        LimitName::StorageBytesMax => json!(standing.used.storage_bytes),
    };
    let row = |name: &LimitName| {
        let id = name.as_str();
        let value = if value[id].is_null() { json!("off") } else { value[id].clone() };
        let set_for = if own[id].is_null() { "every org" } else { "this org" };
        json!({"limit": id, "value": value, "set_for": set_for, "used": used(*name)})
    };
    let rows: Vec<Value> = LimitName::ALL.iter().map(row).collect();
    output.page(&json!({"items": rows, "next": null}), LIMIT_COLUMNS);
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
        return Err(no_such_org(org));
    }
    output.done(if no_wait { "marked" } else { "deleted" }, "org", org.as_str());
    Ok(())
}

pub(super) fn no_such_org(org: &OrgId) -> CliError {
    CliError::failed(format!("there is no org {org}")).help("see `turnhouse orgs list`")
}

/// Tells what an org was given.
fn provisioned(org: &OrgId, owner: &UserId, done: &Provisioned, output: Output) {
    if output.json {
        let (agent, made) = match &done.default {
            DefaultAgent::Kept(agent) | DefaultAgent::Flagged(agent) => (Some(agent), None),
            DefaultAgent::Made(agent) => (Some(agent), Some(agent)),
            DefaultAgent::LeftOut | DefaultAgent::NoRoom | DefaultAgent::Deleting => (None, None),
        };
        output.json(&json!({"id": org, "created": done.created, "owner_set": done.owner_set,
            "owner_joined": done.owner_joined, "default_agent": agent,
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
    if done.owner_joined {
        output.say("its owner is a member now");
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
