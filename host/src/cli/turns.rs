//! `turnhouse turns`: list, show, cancel and follow turns.

use anyhow::Context as _;
use clap::Subcommand;
use reqwest::Method;
use serde_json::json;

use super::Result;
use super::client::{Client, PageArgs, Server};
use super::follow::Follower;
use super::output::{Output, line};
use super::transcript::Transcript;
use turnhouse::ids::{AgentId, ConversationId, TurnId};

const EXAMPLES: &str = "\
Examples:
  turnhouse turns list notes c-42
  turnhouse turns tail 01936f2a-7c1e-7b3a-9d52-0c6f1d2e3a4b";

/// List, show, cancel and follow turns
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// A conversation's turns
    #[command(after_help = "Example:\n  turnhouse turns list notes c-42 --limit 10")]
    List {
        /// Its agent
        agent: AgentId,
        /// The conversation
        conversation: ConversationId,
        #[command(flatten)]
        page: PageArgs,
        #[command(flatten)]
        server: Server,
    },
    /// One turn: state, reply or failure, usage
    #[command(after_help = "Example:\n  turnhouse turns show 01936f2a-7c1e-7b3a-9d52-0c6f1d2e3a4b --json")]
    Show(One),
    /// End a turn now
    #[command(after_help = "Example:\n  turnhouse turns cancel 01936f2a-7c1e-7b3a-9d52-0c6f1d2e3a4b")]
    Cancel(One),
    /// Follow a turn from its first event to its last; with --json one event a line
    #[command(after_help = "Example:\n  turnhouse turns tail 01936f2a-7c1e-7b3a-9d52-0c6f1d2e3a4b --json")]
    Tail(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// The turn
    turn: TurnId,
    #[command(flatten)]
    server: Server,
}

const COLUMNS: &[(&str, &str)] = &[
    ("TURN", "/id"),
    ("STATE", "/state"),
    ("WORKER", "/worker"),
    ("VERSION", "/version"),
    ("FAILURE", "/failure/code"),
    ("ACCEPTED", "/accepted_at"),
];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    match args.action {
        Action::List { agent, conversation, page, server } => {
            let path = format!("v1/agents/{agent}/conversations/{conversation}/turns");
            output.page(&Client::new(&server)?.page(&path, &page).await?, COLUMNS);
        }
        Action::Show(one) => {
            output.resource(&Client::new(&one.server)?.get(&format!("v1/turns/{}", one.turn)).await?);
        }
        Action::Cancel(one) => {
            let path = format!("v1/turns/{}/cancel", one.turn);
            output.resource(&Client::new(&one.server)?.call(Method::POST, &path).await?);
        }
        Action::Tail(one) => return tail(&Client::new(&one.server)?, one.turn, output).await,
    }
    Ok(())
}

async fn tail(client: &Client, turn: TurnId, output: Output) -> Result {
    let mut follower = Follower::new(client, &turn.to_string());
    let mut transcript = Transcript::stdio().in_lines();
    while let Some(event) = follower.next().await? {
        if output.json {
            // One line each, also on a terminal: this is a stream.
            line(&json!({"id": event.id, "event": event.kind, "data": event.data}).to_string());
        } else if let Some(ending) = transcript.event(&event.kind, &event.data).context("cannot write")? {
            ending.into_result()?;
        }
    }
    Ok(())
}
