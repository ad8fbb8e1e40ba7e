//! `turnhouse conversations`: list, show and delete conversations, read their messages, start their state anew.

use std::collections::BTreeMap;

use clap::Subcommand;
use reqwest::Method;
use serde_json::Value;

use super::client::{Client, PageArgs, Server};
use super::output::{Output, line, note, printable};
use super::transcript::content_text;
use super::{CliError, Result};
use turnhouse::ids::{AgentId, ConversationId};

const EXAMPLES: &str = "\
Examples:
  turnhouse conversations list notes
  turnhouse conversations messages notes c-42";

/// List, show, name and delete conversations
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// An agent's conversations: one's own, or all for an admin
    #[command(after_help = "Example:\n  turnhouse conversations list notes --limit 10")]
    List {
        /// The agent
        agent: AgentId,
        #[command(flatten)]
        page: PageArgs,
        #[command(flatten)]
        server: Server,
    },
    /// One conversation
    #[command(after_help = "Example:\n  turnhouse conversations show notes c-42")]
    Show(One),
    /// What was said, with each turn's state
    #[command(after_help = "Example:\n  turnhouse conversations messages notes c-42 --limit 20")]
    Messages {
        #[command(flatten)]
        one: One,
        #[command(flatten)]
        page: PageArgs,
    },
    /// Name a conversation, or write metadata on it
    #[command(
        after_help = "Example:\n  turnhouse conversations set notes c-42 --title Invoices --metadata ticket=4711"
    )]
    Set {
        #[command(flatten)]
        one: One,
        /// What people call it; an empty one takes the title away
        #[arg(long)]
        title: Option<String>,
        /// All of its metadata, NAME=VALUE each; a single empty one takes it away
        #[arg(long, value_name = "NAME=VALUE", value_parser = entry)]
        metadata: Vec<Option<(String, String)>>,
    },
    /// Start from an empty state again; what was said stays
    #[command(after_help = "Example:\n  turnhouse conversations reset notes c-42")]
    Reset(One),
    /// Delete a conversation with its history and its state, ending its live turns
    #[command(after_help = "Example:\n  turnhouse conversations delete notes c-42")]
    Delete(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// The agent
    agent: AgentId,
    /// The conversation
    conversation: ConversationId,
    #[command(flatten)]
    server: Server,
}

impl One {
    fn path(&self) -> String {
        format!("v1/agents/{}/conversations/{}", self.agent, self.conversation)
    }
}

const COLUMNS: &[(&str, &str)] =
    &[("CONVERSATION", "/id"), ("TITLE", "/title"), ("USER", "/user_id"), ("CREATED", "/created_at")];

/// `NAME=VALUE`; nothing is no entry.
fn entry(text: &str) -> Result<Option<(String, String)>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok(Some((name.to_owned(), value.to_owned())))
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    match args.action {
        Action::List { agent, page, server } => {
            let path = format!("v1/agents/{agent}/conversations");
            output.page(&Client::new(&server)?.page(&path, &page).await?, COLUMNS);
        }
        Action::Show(one) => output.resource(&Client::new(&one.server)?.get(&one.path()).await?),
        Action::Messages { one, page } => {
            let path = format!("{}/messages", one.path());
            let messages = Client::new(&one.server)?.page(&path, &page).await?;
            if output.json { output.json(&messages) } else { show_messages(&messages, one.agent.as_str()) }
        }
        Action::Set { one, title, metadata } => {
            let mut change = serde_json::Map::new();
            if let Some(title) = title {
                change.insert("title".to_owned(), Some(title).filter(|title| !title.is_empty()).into());
            }
            if !metadata.is_empty() {
                let entries: BTreeMap<String, String> = metadata.into_iter().flatten().collect();
                change.insert("metadata".to_owned(), serde_json::to_value(entries).expect("texts serialise"));
            }
            if change.is_empty() {
                return Err(CliError::usage("there is nothing to set").help("pass --title or --metadata"));
            }
            let change = Value::Object(change);
            output.resource(&Client::new(&one.server)?.send(Method::PATCH, &one.path(), &change).await?);
        }
        Action::Reset(one) => {
            Client::new(&one.server)?.call(Method::DELETE, &format!("{}/snapshot", one.path())).await?;
            output.done("reset", "conversation", one.conversation.as_str());
        }
        Action::Delete(one) => {
            Client::new(&one.server)?.call(Method::DELETE, &one.path()).await?;
            output.done("deleted", "conversation", one.conversation.as_str());
        }
    }
    Ok(())
}

/// What was said, as in a chat.
fn show_messages(messages: &Value, agent: &str) {
    let items = messages["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    if items.is_empty() {
        line("(none)");
    }
    for item in items {
        line(&printable(&exchange(item, agent)));
    }
    if let Some(next) = messages["next"].as_str() {
        note(&format!("there are more: --after {next}"));
    }
}

fn exchange(item: &Value, agent: &str) -> String {
    let text = |content: &Value| content_text(content).trim_end().replace('\n', "\n  ");
    let answer = match item["state"].as_str() {
        Some("completed") => text(&item["reply"]),
        Some("failed") => format!("({})", item["failure"]["code"].as_str().unwrap_or("failed")),
        state => format!("({})", state.unwrap_or("unknown")),
    };
    format!("> {}\n{agent}: {answer}", text(&item["message"]))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_read_as_a_chat_and_a_failed_turn_says_why() {
        let said = json!({"state": "completed", "message": {"text": "a\nb"}, "reply": {"text": "c\n"}});
        assert_eq!(exchange(&said, "notes"), "> a\n  b\nnotes: c");
        let failed = json!({"state": "failed", "message": {"text": "a"}, "failure": {"code": "no_reply"}});
        assert_eq!(exchange(&failed, "notes"), "> a\nnotes: (no_reply)");
    }
}
