//! The conversation that every example holds, with the real program: `turnhouse run`, which keeps the state in a file between turns.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::setup;

/// Message and reply, one after the other, from the first turn of a conversation.
const CONVERSATION: [(&str, &str); 3] = [
    ("my name is Ada", "Hello Ada, this is message 1."),
    ("what is my name?", "You are Ada; this is message 2."),
    ("Grüße, \"世界\"\n\\o/ 🦀", "You said: Grüße, \"世界\"\n\\o/ 🦀; this is message 3."),
];

/// What is left of it, the same bytes in every language.
const STATE: &str = "3\nAda\n";

/// The program, and where its state files lie.
pub struct Host {
    program: PathBuf,
    scratch: tempfile::TempDir,
}

impl Host {
    pub fn new(program: PathBuf) -> Result<Host> {
        Ok(Host { program, scratch: setup::scratch_dir("examples")? })
    }

    /// Holds the conversation with one worker. Returns the wall time of its shortest turn, in ms: of the turn alone, without compiling.
    pub fn hold(&self, module: &Path) -> Result<f64> {
        let state = self.no_state("state")?;
        let mut shortest_ms = f64::INFINITY;
        for (message, reply) in CONVERSATION {
            shortest_ms = shortest_ms.min(self.turn(module, message, reply, &state)?);
        }
        let left = std::fs::read_to_string(&state).context("it has saved no state")?;
        ensure!(left == STATE, "its state is {left:?} and not {STATE:?}");

        // More than one event may carry, in characters of three bytes: whoever cuts it must cut between them.
        let long = "世".repeat(30_000);
        let reply = format!("You said: {long}; this is message 4.");
        self.turn(module, &long, &reply, &state)?;

        let none = self.no_state("none")?;
        self.turn(module, "what is my name?", "I do not know your name; this is message 1.", &none)?;

        let broken = self.scratch.path().join("broken");
        std::fs::write(&broken, "Ada")?;
        let output = self.run(module, "hello", &broken)?;
        ensure!(
            output.status.code() == Some(1),
            "with a state that it cannot read, it did not fail: {}",
            told(&output)
        );
        let left = std::fs::read_to_string(&broken)?;
        ensure!(left == "Ada", "it could not read its state, and replaced it by {left:?}");
        Ok(shortest_ms)
    }

    /// One conversation, every turn of which is held by the next worker: each goes on where another left off.
    pub fn hand_over(&self, modules: &[&Path]) -> Result<()> {
        let state = self.no_state("shared")?;
        for (index, module) in modules.iter().enumerate() {
            let n = index + 1;
            let (message, reply) = if index == 0 {
                ("my name is Ada", format!("Hello Ada, this is message {n}."))
            } else {
                ("what is my name?", format!("You are Ada; this is message {n}."))
            };
            self.turn(module, message, &reply, &state).with_context(|| module.display().to_string())?;
        }
        Ok(())
    }

    /// The path of a state that no turn has saved yet.
    fn no_state(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.path().join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("cannot remove a state"),
            _ => Ok(path),
        }
    }

    /// One turn, which has to reply so. Returns its wall time in ms.
    fn turn(&self, module: &Path, message: &str, reply: &str, state: &Path) -> Result<f64> {
        let output = self.run(module, message, state)?;
        ensure!(output.status.success(), "{:?} got no reply: {}", shortened(message), told(&output));
        let turn: Value = serde_json::from_slice(&output.stdout).context("the program printed no JSON")?;
        let said = turn["reply"]["text"].as_str().unwrap_or_default();
        ensure!(said == reply, "{:?} got {:?} and not {:?}", shortened(message), shortened(said), shortened(reply));
        turn["usage"]["wall_ms"].as_f64().context("the turn says no wall time")
    }

    fn run(&self, module: &Path, message: &str, state: &Path) -> Result<Output> {
        let mut program = Command::new(&self.program);
        program.arg("run").arg(module).args(["--json", "--message", message, "--state"]).arg(state);
        // Under the limits that everybody has, whatever this machine's host is told.
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("TURNHOUSE_")) {
                program.env_remove(&name);
            }
        }
        program.current_dir(self.scratch.path()).stdin(Stdio::null());
        program.output().with_context(|| format!("cannot run {}", self.program.display()))
    }
}

/// What the program said of a turn that failed: the log of the worker among it.
fn told(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    format!("{}; {}", output.status, shortened(stderr.trim()))
}

/// Enough to recognise it.
fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 600;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_shortened_between_characters() {
        assert_eq!(shortened("世界"), "世界");
        let long = shortened(&"世".repeat(1_000));
        assert!(long.starts_with("世世") && long.ends_with("… (3000 bytes)"), "{long}");
    }

    #[test]
    fn the_conversation_counts_its_messages() {
        for (index, (_, reply)) in CONVERSATION.iter().enumerate() {
            assert!(reply.ends_with(&format!("this is message {}.", index + 1)), "{reply}");
        }
    }
}
