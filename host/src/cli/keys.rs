//! `turnhouse keys`: make, list, rotate and revoke API keys, on the database directly, so that a first key can be made.
//!
//! A key's secret is shown once, here, and kept nowhere: the database has its SHA-256.

use clap::Subcommand;
use serde_json::{Value, json};
use turnhouse::audit::Actor;
use turnhouse::caller::Scopes;
use turnhouse::clock::{Clock, Timestamp};
use turnhouse::ids::{OrgId, UserId};
use turnhouse::keys;
use turnhouse::store::{KeyRecord, KeyState, StoreError};

use super::orgs::no_such_org;
use super::output::{Output, note};
use super::{CliError, Result, database};

const EXAMPLES: &str = "\
Examples:
  turnhouse keys create --org acme --user ann@acme.example --scopes turns,deploy --name laptop --expires 90d
  turnhouse keys list --org acme
  turnhouse keys rotate --org acme 0123456789abcdef --overlap 7d
  turnhouse keys revoke --org acme 0123456789abcdef";

/// Make, list, rotate and revoke API keys, on the database directly
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Make a key; its secret is shown once
    #[command(
        after_help = "Example:\n  turnhouse keys create --org acme --user ann@acme.example --scopes turns --expires 90d"
    )]
    Create(Create),
    /// An org's keys, without their secrets
    #[command(after_help = "Example:\n  turnhouse keys list --org acme --json")]
    List {
        /// The org
        #[arg(long)]
        org: OrgId,
        #[command(flatten)]
        database: database::DataArgs,
    },
    /// Make a key in another's place: the same user, scopes and name. The old one works for a while longer, so that nothing stands still
    #[command(after_help = "Example:\n  turnhouse keys rotate --org acme 0123456789abcdef --overlap 7d")]
    Rotate(Rotate),
    /// End a key
    #[command(after_help = "Example:\n  turnhouse keys revoke --org acme 0123456789abcdef")]
    Revoke {
        /// The key's id, as `keys list` shows it
        key: String,
        /// The org
        #[arg(long)]
        org: OrgId,
        #[command(flatten)]
        database: database::DataArgs,
    },
}

#[derive(Debug, clap::Args)]
struct Rotate {
    /// The old key's id, as `keys list` shows it
    key: String,
    /// The org
    #[arg(long)]
    org: OrgId,
    /// How long the old key works beside the new one
    #[arg(long, value_parser = lifetime_ms, value_name = "TIME", default_value = "7d")]
    overlap: u64,
    /// When the new key stops working: 12h, 90d; unless given, it lives as long as the old one was made for
    #[arg(long, value_parser = lifetime_ms, value_name = "TIME")]
    expires: Option<u64>,
    #[command(flatten)]
    database: database::DataArgs,
}

#[derive(Debug, clap::Args)]
struct Create {
    /// The org
    #[arg(long)]
    org: OrgId,
    /// The member of the org whose key it is
    #[arg(long)]
    user: UserId,
    /// What it may do, of turns, deploy, admin, ingest, act_as, operator
    #[arg(long, value_parser = scopes, default_value = "turns", value_name = "SCOPE,…")]
    scopes: Scopes,
    /// What it is for
    #[arg(long, default_value = "")]
    name: String,
    /// When it stops working: 12h, 90d; never unless given
    #[arg(long, value_parser = lifetime_ms, value_name = "TIME")]
    expires: Option<u64>,
    #[command(flatten)]
    database: database::DataArgs,
}

fn scopes(text: &str) -> Result<Scopes, String> {
    let scopes = Scopes::parse(text).map_err(|name| format!("{name:?} is no scope"))?;
    if scopes == Scopes::default() { Err("name at least one scope".to_owned()) } else { Ok(scopes) }
}

/// `30m`, `12h`, `90d` in milliseconds.
fn lifetime_ms(text: &str) -> Result<u64, String> {
    const WRITE: &str = "write a number and m, h or d: 90d";
    let (number, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or(WRITE)?;
    let minutes = match unit {
        "m" => 1,
        "h" => 60,
        "d" => 24 * 60,
        _ => return Err(WRITE.to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| WRITE)?;
    // A century is for ever, and stays far from where timestamps end.
    let ms = number.checked_mul(minutes * 60_000).filter(|ms| (1..=100 * 366 * 86_400_000).contains(ms));
    ms.ok_or_else(|| "that is not between a minute and a century".to_owned())
}

/// A key as the API and the commands show it.
fn shown(key: &KeyRecord, now: Timestamp, warning_ms: u64) -> Value {
    json!({"state": key.state(now, warning_ms), "successor": key.successor, "id": key.id, "org": key.org, "user": key.user, "scopes": key.scopes, "name": key.name, "created_at": key.created_at,
        "expires_at": key.expires_at, "revoked_at": key.revoked_at, "last_used_at": key.last_used_at})
}

const COLUMNS: &[(&str, &str)] = &[
    ("KEY", "/id"),
    ("STATE", "/state"),
    ("USER", "/user"),
    ("SCOPES", "/scope_names"),
    ("NAME", "/name"),
    ("EXPIRES", "/expires_at"),
    ("REVOKED", "/revoked_at"),
    ("LAST USED", "/last_used_at"),
];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let now = Clock::system().now();
    match args.action {
        Action::Create(create) => make(create, now, output).await,
        Action::List { org, database } => {
            let warning_ms = database.load()?.limits.key_warning_ms();
            let store = database.open().await?;
            let found = async { Ok((store.org_use(&org, now).await?.is_some(), store.keys(&org).await?)) };
            let found: Result<_, StoreError> = found.await;
            store.close().await;
            let (known, keys) = found.map_err(database::failed)?;
            if !known {
                return Err(no_such_org(&org));
            }
            let item = |key: &KeyRecord| {
                let mut item = shown(key, now, warning_ms);
                if !output.json {
                    item["scope_names"] = json!(key.scopes.to_string());
                }
                item
            };
            let items: Vec<Value> = keys.iter().map(item).collect();
            output.page(&json!({"items": items, "next": null}), COLUMNS);
            for key in keys.iter().filter(|key| key.state(now, warning_ms) == KeyState::Expiring) {
                let days = key.expires_at.map_or(0, |at| at.since_ms(now) / 86_400_000);
                note(&format!(
                    "key {} of {} ends in {days} d: turnhouse keys rotate --org {org} {}",
                    key.id, key.user, key.id
                ));
            }
            Ok(())
        }
        Action::Rotate(rotate) => take_over(rotate, now, output).await,
        Action::Revoke { key, org, database } => {
            let store = database.open().await?;
            let revoked = store.revoke_key(&org, &key, now, &Actor::command_line()).await.map_err(database::failed);
            store.close().await;
            if !revoked? {
                return Err(CliError::failed(format!("org {org} has no key {key}"))
                    .help(format!("see `turnhouse keys list --org {org}`")));
            }
            output.done("revoked", "key", &key);
            Ok(())
        }
    }
}

async fn take_over(rotate: Rotate, now: Timestamp, output: Output) -> Result {
    let Rotate { key: id, org, overlap, expires, database } = rotate;
    let warning_ms = database.load()?.limits.key_warning_ms();
    let store = database.open().await?;
    let rotated = async {
        let Some(old) = store.key_by_id(&org, &id).await? else { return Ok(None) };
        let lives_ms = expires.or_else(|| old.expires_at.map(|at| at.since_ms(old.created_at)));
        let expires_at = lives_ms.map(|ms| now.plus_ms(ms));
        let new = keys::mint(org.clone(), old.user, old.scopes, old.name, expires_at, now);
        let done = store.rotate_key(&id, new.hash, &new.record, overlap, &Actor::command_line()).await?;
        // As it is now: with its successor, or why it has none.
        Ok(store.key_by_id(&org, &id).await?.map(|old| (old, done.then_some(new))))
    };
    let rotated: Result<_, StoreError> = rotated.await;
    store.close().await;
    let (old, new) = match rotated.map_err(database::failed)? {
        Some((old, Some(new))) => (old, new),
        Some((old, None)) => return Err(not_rotated(&old, now)),
        None => {
            return Err(CliError::failed(format!("org {org} has no key {id}"))
                .help(format!("see `turnhouse keys list --org {org}`")));
        }
    };
    let until = old.expires_at.map(Timestamp::rfc3339).unwrap_or_default();
    if output.json {
        let mut key = shown(&new.record, now, warning_ms);
        key["api_key"] = json!(new.secret);
        key["replaces"] = shown(&old, now, warning_ms);
        output.json(&key);
    } else {
        output.say(&new.secret);
        note(&format!("key {} of {} in org {org}; it is shown only now", new.record.id, new.record.user));
        note(&format!("key {id}, whose place it takes, works until {until}; end it sooner with `keys revoke`"));
    }
    Ok(())
}

fn not_rotated(old: &KeyRecord, now: Timestamp) -> CliError {
    let (org, id) = (&old.org, &old.id);
    let create =
        format!("make a new one: turnhouse keys create --org {org} --user {} --scopes {}", old.user, old.scopes);
    match (old.state(now, 0), &old.successor) {
        (KeyState::Rotated | KeyState::Live | KeyState::Expiring, Some(next)) => {
            CliError::failed(format!("key {id} was rotated already"))
                .help(format!("its successor is {next}: rotate that"))
        }
        (KeyState::Revoked, _) => CliError::failed(format!("key {id} was revoked")).help(create),
        _ => CliError::failed(format!("key {id} has ended")).help(create),
    }
}

async fn make(create: Create, now: Timestamp, output: Output) -> Result {
    let expires_at = create.expires.map(|ms| now.plus_ms(ms));
    let org = create.org.clone();
    let keys::NewKey { secret, hash, record } =
        keys::mint(org, create.user, create.scopes, create.name, expires_at, now);
    let warning_ms = create.database.load()?.limits.key_warning_ms();
    let store = create.database.open().await?;
    let made = store.create_key(hash, &record, &Actor::command_line()).await.map_err(database::failed);
    store.close().await;
    if !made? {
        return Err(CliError::failed(format!("there is no org {}", create.org))
            .help(format!("make it: turnhouse orgs create {}", create.org)));
    }
    if output.json {
        let mut key = shown(&record, now, warning_ms);
        key["api_key"] = json!(secret);
        output.json(&key);
    } else {
        output.say(&secret);
        note(&format!("key {} of {} in org {}; it is shown only now", record.id, record.user, record.org));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifetime_has_a_unit() {
        assert_eq!(lifetime_ms("30m"), Ok(1_800_000));
        assert_eq!(lifetime_ms("90d"), Ok(90 * 86_400_000));
        for bad in ["", "d", "0d", "-1d", "90", "1y", "99999999999999999999d", "9é", "40000d"] {
            assert!(lifetime_ms(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_scope_is_named_and_none_is_refused() {
        assert_eq!(scopes("turns,admin").unwrap().to_string(), "turns,admin");
        assert!(scopes("").is_err());
        assert!(scopes("root").unwrap_err().contains("root"));
    }
}
