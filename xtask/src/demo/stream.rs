//! Follows one turn's events, prints what its worker says, and keeps what the demo's expectations are about.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::time::timeout;

use super::narrator::Narrator;
use crate::load::Connection;

/// Between two events. The stories of the demo pause for a tenth of a second.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// When to stop following.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The stream's end.
    End,
    /// After so many pieces of text.
    Pieces(usize),
}

/// What was seen of a turn.
#[derive(Debug, Default)]
pub struct Followed {
    /// The text so far; a restart begins it anew.
    pub text: String,
    pub pieces: usize,
    pub statuses: usize,
    /// From the request to the first piece, and from there to the last.
    pub first_after: Duration,
    pub spread: Duration,
    pub last_event_id: String,
    /// `attempt` of each `turn.restarted`.
    pub restarted: Vec<u64>,
    /// Each terminal event's kind and data. There must be exactly one.
    pub ends: Vec<(String, Value)>,
}

impl Followed {
    /// The turn's only end, which must be a reply.
    pub fn completed(&self) -> Result<()> {
        let kinds: Vec<&str> = self.ends.iter().map(|(kind, _)| kind.as_str()).collect();
        ensure!(kinds == ["turn.completed"], "expected the turn to end once, with turn.completed; saw {:?}", self.ends);
        ensure!(!self.text.trim().is_empty(), "expected the worker to say something, saw nothing");
        Ok(())
    }
}

/// Follows a stream that has just been opened, printing it as `who` speaking.
pub async fn follow(voice: &mut Narrator, who: &str, mut events: Connection, until: Until) -> Result<Followed> {
    let opened = Instant::now();
    let mut seen = Followed::default();
    let mut first = None;
    voice.begin_stream(who);
    loop {
        let next = timeout(SILENCE_MAX, events.event()).await;
        let Some(event) = next.with_context(|| format!("nothing was heard for {SILENCE_MAX:?}"))?? else {
            return Ok(seen);
        };
        let data: Value =
            serde_json::from_str(event.data).with_context(|| format!("an event's data is {:?}", event.data))?;
        if !event.id.is_empty() {
            event.id.clone_into(&mut seen.last_event_id);
        }
        match event.kind {
            "output.delta" => {
                let text = data["text"].as_str().context("a delta has no text")?;
                let first = *first.get_or_insert_with(Instant::now);
                seen.first_after = first - opened;
                seen.spread = first.elapsed();
                seen.pieces += 1;
                seen.text.push_str(text);
                voice.piece(text);
                if until == Until::Pieces(seen.pieces) {
                    return Ok(seen);
                }
            }
            "status" => {
                seen.statuses += 1;
            }
            "turn.restarted" => {
                seen.restarted.push(data["attempt"].as_u64().context("turn.restarted has no attempt")?);
                seen.text.clear();
                voice.note(&format!(
                    "turn.restarted, attempt {}: forget what you heard, here it is from its beginning",
                    data["attempt"]
                ));
                voice.begin_stream(who);
            }
            _ if event.is_terminal() => {
                ensure!(event.id == "end", "expected the last event's id to be `end`, saw {:?}", event.id);
                seen.ends.push((event.kind.to_owned(), data));
            }
            _ => {}
        }
    }
}
