//! `turnhouse export`: all of the key's org, or of one conversation, as JSON lines.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context as _;
use turnhouse::ids::{AgentId, ConversationId};

use super::client::{Client, Server};
use super::output::{Output, note};
use super::{CliError, Result};

const EXAMPLES: &str = "\
Examples:
  turnhouse export --output acme.jsonl
  turnhouse export --agent notes --conversation c-42";

/// Read out all of the org (for its admins), or of one conversation, as JSON lines
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The conversation's agent
    #[arg(long, requires = "conversation")]
    agent: Option<AgentId>,
    /// Only this conversation
    #[arg(long, requires = "agent")]
    conversation: Option<ConversationId>,
    /// Where to; standard output unless given. A file appears under its name once it is whole
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    server: Server,
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let path = match (&args.agent, &args.conversation) {
        (Some(agent), Some(conversation)) => format!("v1/agents/{agent}/conversations/{conversation}/export"),
        _ => "v1/export".to_owned(),
    };
    let mut answer = Client::new(&args.server)?.download(&path).await?;
    let mut tail = Tail::default();
    match &args.output {
        None => {
            let mut stdout = std::io::stdout();
            copy(&mut answer, &mut stdout, &mut tail).await?;
        }
        Some(file) => {
            let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).map_or_else(|| ".".into(), PathBuf::from);
            let made = tempfile::NamedTempFile::new_in(&dir);
            let mut part = made.with_context(|| format!("cannot write in {}", dir.display()))?;
            copy(&mut answer, part.as_file_mut(), &mut tail).await?;
            part.as_file().sync_all().context("cannot write the export")?;
            part.persist(file).with_context(|| format!("cannot write {}", file.display()))?;
            output.done("exported", "file", &file.display().to_string());
        }
    }
    note(&format!("{} lines", tail.lines));
    Ok(())
}

async fn copy(answer: &mut reqwest::Response, to: &mut impl Write, tail: &mut Tail) -> Result {
    loop {
        match answer.chunk().await {
            Ok(Some(chunk)) => {
                tail.see(&chunk);
                to.write_all(&chunk).context("cannot write the export")?;
            }
            Ok(None) if tail.is_end() => break,
            Ok(None) | Err(_) => {
                return Err(CliError::failed("the export broke off: its last line is missing")
                    .help("try again; the host's log may say why"));
            }
        }
    }
    to.flush().context("cannot write the export")?;
    Ok(())
}

/// Remembers the last line: without `end` an export is not whole.
#[derive(Default)]
struct Tail {
    line: Vec<u8>,
    lines: u64,
    last: Vec<u8>,
}

impl Tail {
    /// Bytes of a line that are remembered; the last one is short.
    const BYTES_MAX: usize = 64;

    fn see(&mut self, chunk: &[u8]) {
        for byte in chunk {
            if *byte == b'\n' {
                self.last = std::mem::take(&mut self.line);
                self.lines += 1;
            } else if self.line.len() <= Self::BYTES_MAX {
                self.line.push(*byte);
            }
        }
    }

    fn is_end(&self) -> bool {
        let last: serde_json::Value = serde_json::from_slice(&self.last).unwrap_or_default();
        self.line.is_empty() && last["kind"] == "end" && last["lines"] == self.lines - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_without_its_last_line_is_not_whole() {
        let seen = |text: &str| {
            let mut tail = Tail::default();
            text.as_bytes().chunks(3).for_each(|chunk| tail.see(chunk));
            tail
        };
        assert!(seen("{\"kind\":\"export\"}\n{\"kind\":\"end\",\"lines\":1}\n").is_end());
        for broken in [
            "{\"kind\":\"export\"}\n",
            "{\"kind\":\"end\",\"lines\":1}\n",
            "{\"kind\":\"export\"}\n{\"kind\":\"end\",\"lines\":1}",
        ] {
            assert!(!seen(broken).is_end(), "{broken}");
        }
    }
}
