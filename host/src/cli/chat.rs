//! `turnhouse chat`: a conversation in the terminal, streaming. Ctrl-C cancels the turn that runs; between turns it ends the chat.
//!
//! Where stdin is no terminal, every line of it is a message.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use reqwest::Method;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::client::{Client, Server};
use super::files::Files;
use super::follow::Follower;
use super::output::{Output, Style, note};
use super::transcript::{Ending, Transcript};
use super::{CliError, Result};
use turnhouse::content::Content;
use turnhouse::ids::{AgentId, ConversationId};

const EXAMPLES: &str = "\
Examples:
  turnhouse chat notes
  turnhouse chat notes --conversation c-42
  turnhouse chat reader --attach report.txt
  echo hello | turnhouse chat notes --json";

/// Talk to an agent
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The agent; the org's default agent when none is named
    agent: Option<AgentId>,

    /// Go on with this conversation, or begin it under this id
    #[arg(long, value_name = "ID")]
    conversation: Option<ConversationId>,

    /// A file to go with the first message; may be given several times
    #[arg(long, value_name = "FILE")]
    attach: Vec<PathBuf>,

    #[command(flatten)]
    server: Server,
}

/// Runs it until stdin ends.
pub async fn run(args: Args, output: Output) -> Result {
    let client = Client::new(&args.server)?;
    // What is over it, the host itself says.
    let files = Files::read(&args.attach, usize::MAX)?;
    let mut body = json!({});
    if let Some(agent) = &args.agent {
        body["agent"] = json!(agent);
    }
    if let Some(conversation) = &args.conversation {
        body["conversation"] = json!(conversation);
    }
    let conversation = client.send(Method::POST, "v1/conversations", &body).await?;
    let name = |key: &str| {
        let value = conversation.get(format!("{key}_id")).or_else(|| conversation.get(key));
        value.and_then(|v| v.as_str()).map(str::to_owned)
    };
    let agent = args.agent.as_ref().map(ToString::to_string).or_else(|| name("agent"));
    let id = name("id").or_else(|| name("conversation"));
    let (Some(agent), Some(id)) = (agent, id) else {
        return Err(CliError::failed("the host did not name the conversation").help("is it of another version?"));
    };
    let interactive = std::io::stdin().is_terminal();
    if interactive && !output.json {
        note(&format!("conversation {id} with {agent}. Ctrl-C cancels a turn, Ctrl-D ends."));
    }
    for (media_type, bytes) in files.bodies() {
        client.post_bytes("v1/attachments", &media_type, bytes).await?;
    }
    let mut files = Some(files);
    let mut interrupts = signal(SignalKind::interrupt()).context("cannot wait for Ctrl-C")?;
    let mut lines = read_lines();
    let mut failed = None;
    loop {
        if interactive {
            prompt();
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            // Between turns it is the end.
            _ = interrupts.recv() => None,
        };
        let Some(line) = line else { break };
        let text = line.context("cannot read stdin")?;
        if text.trim().is_empty() {
            continue;
        }
        let path = format!("v1/agents/{agent}/conversations/{id}/turns");
        let message = match files.take() {
            Some(files) => files.beside(Content::text(text)),
            None => Content::text(text),
        };
        match talk(&client, &path, &message, &mut interrupts, output).await {
            Ok(()) => {}
            // At a terminal one goes on; a script is told at the end.
            Err(error) if interactive => error.print(),
            Err(error) => {
                if let Some(earlier) = failed.replace(error) {
                    CliError::print(&earlier);
                }
            }
        }
    }
    if interactive {
        eprintln!();
    }
    failed.map_or(Ok(()), Err)
}

/// One turn: sends the message, shows what is said, until it has ended.
async fn talk(client: &Client, path: &str, message: &Content, interrupts: &mut Signal, output: Output) -> Result {
    let key = uuid::Uuid::now_v7().to_string();
    let accepted = client.post_once(path, &key, &json!({ "message": message })).await?;
    let turn = accepted["turn_id"].as_str().context("the host did not name the turn")?.to_owned();
    let mut follower = Follower::new(client, &turn);
    let mut transcript = Transcript::stdio().in_lines();
    let mut cancelling = false;
    let mut ending = None;
    loop {
        let event = tokio::select! {
            event = follower.next() => event?,
            _ = interrupts.recv() => {
                if cancelling {
                    return Err(CliError::failed("left before the turn had ended")
                        .help(format!("see `turnhouse turns show {turn}`")));
                }
                cancelling = true;
                client.call(Method::POST, &format!("v1/turns/{turn}/cancel")).await?;
                continue;
            }
        };
        let Some(event) = event else { break };
        if output.json {
            ending = Ending::of(&event.kind, &event.data).or(ending);
        } else {
            ending = transcript.event(&event.kind, &event.data).context("cannot write")?.or(ending);
        }
    }
    if output.json {
        output.json(&client.get(&format!("v1/turns/{turn}")).await?);
    }
    match ending {
        // The user's own doing is no failure.
        Some(Ending::Cancelled { .. }) if cancelling => {
            note("cancelled");
            Ok(())
        }
        Some(ending) => ending.into_result(),
        None => {
            Err(CliError::failed("the stream ended before the turn did")
                .help(format!("see `turnhouse turns show {turn}`")))
        }
    }
}

fn prompt() {
    let style = Style::of(&std::io::stderr());
    let mut stderr = std::io::stderr().lock();
    let _ = write!(stderr, "{} ", style.bold(">")).and_then(|()| stderr.flush());
}

/// Lines of stdin. A read of a terminal cannot be interrupted, so it has a thread of its own, which ends with the process.
fn read_lines() -> mpsc::Receiver<std::io::Result<String>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    receiver
}
