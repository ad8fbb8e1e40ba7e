//! `turnhouse members`: who belongs to the key's org, for its admins. `turnhouse orgs member` is the operator's.

use clap::Subcommand;
use reqwest::Method;
use serde_json::json;
use turnhouse::caller::Role;
use turnhouse::ids::{OrgId, UserId};

use super::Result;
use super::client::{Client, PageArgs, Server};
use super::output::Output;

const EXAMPLES: &str = "\
Examples:
  turnhouse members list
  turnhouse members add bob@acme.example --role admin
  turnhouse members remove bob@acme.example";

/// List, add and remove members of the org; for its admins
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// The org's members
    #[command(after_help = "Example:\n  turnhouse members list --json")]
    List {
        #[command(flatten)]
        page: PageArgs,
        #[command(flatten)]
        server: Server,
    },
    /// Make somebody a member, or give a member another role; what an owner is only an owner says
    #[command(after_help = "Example:\n  turnhouse members add bob@acme.example --role admin")]
    Add {
        /// The user
        user: UserId,
        /// As what: member, admin, owner
        #[arg(long, value_parser = role, default_value = "member")]
        role: Role,
        #[command(flatten)]
        server: Server,
    },
    /// Take a member out of the org; their keys end
    #[command(after_help = "Example:\n  turnhouse members remove bob@acme.example")]
    Remove {
        /// The user
        user: UserId,
        #[command(flatten)]
        server: Server,
    },
}

const COLUMNS: &[(&str, &str)] =
    &[("USER", "/user_id"), ("ROLE", "/role"), ("ADDED", "/added_at"), ("BY", "/added_by")];

/// A role by its name.
pub fn role(text: &str) -> Result<Role, String> {
    Role::parse(text).ok_or_else(|| "it is one of member, admin, owner".to_owned())
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    match args.action {
        Action::List { page, server } => output.page(&Client::new(&server)?.page("v1/members", &page).await?, COLUMNS),
        Action::Add { user, role, server } => {
            let body = json!({"role": role});
            let member = Client::new(&server)?.send(Method::PUT, &format!("v1/members/{user}"), &body).await?;
            if output.json {
                output.json(&member);
            } else {
                output.say(&format!("{user} belongs to the org as {}", role.as_str()));
            }
        }
        Action::Remove { user, server } => {
            Client::new(&server)?.call(Method::DELETE, &format!("v1/members/{user}")).await?;
            output.done("removed", "member", user.as_str());
        }
    }
    Ok(())
}

/// Tells what somebody is now.
pub fn told(user: &UserId, org: &OrgId, role: Role, output: Output) {
    if output.json {
        output.json(&json!({"org": org, "user_id": user, "role": role}));
    } else {
        output.say(&format!("{user} belongs to org {org} as {}", role.as_str()));
    }
}
