//! Running a worker natively, in a unit test: the same closure, against a host that lives in the test's thread.
//!
//! [`turn`] begins with a message, [`TestTurn`] sets what else the turn is given, [`TestTurn::run`] runs it, and the [`Report`] is what came of it. The host
//! here checks and limits as the real one does by default, so that a name which it refuses or a state which is too big is found in the test. It does not sleep and has
//! no clocks: an operation is answered at once, or [never](Answer::pending).
//!
//! ```
//! use turnhouse_guest::{Turn, WorkerResult, testing};
//!
//! fn worker(turn: Turn) -> WorkerResult {
//!     turn.status("counting")?;
//!     turn.say(&turn.text().split_whitespace().count().to_string())?;
//!     Ok(())
//! }
//!
//! let report = testing::turn("one two three").run(worker);
//! assert_eq!(report.text(), "3");
//! assert_eq!(report.statuses, ["counting"]);
//! ```

pub(crate) mod fake;

use std::collections::HashMap;
use std::io::Read as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::turn::{begin_and_run, with_causes};
use crate::{Input, Level, Message, OperationError, Origin, Part, Past, Role, Turn, WorkerResult};

/// A turn with this message, of agent `agent` in conversation `conversation`, its first, with a deadline in a minute.
pub fn turn(message: impl Into<Message>) -> TestTurn {
    let now_unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    TestTurn {
        input: Input {
            turn_id: "turn".into(),
            conversation_id: Some("conversation".into()),
            agent_id: "agent".into(),
            run_id: Some("turn".into()),
            attempt: 1,
            deadline_unix_ms: Some(now_unix_ms + 60_000),
            message: message.into(),
            ..Input::default()
        },
        attachments: HashMap::new(),
        state: None,
        state_bytes_max: 4 * 1024 * 1024,
        scripts: HashMap::new(),
    }
}

type Script = Box<dyn FnMut(&Value) -> Answer>;

/// A turn that has not run yet. Every method sets one thing that the worker will find.
#[must_use = "nothing happens until `run`"]
pub struct TestTurn {
    input: Input,
    attachments: HashMap<String, Vec<u8>>,
    state: Option<Vec<u8>>,
    state_bytes_max: usize,
    scripts: HashMap<String, Script>,
}

impl TestTurn {
    /// The state that the turn before saved.
    ///
    /// # Panics
    /// If it cannot be JSON.
    pub fn state<T: Serialize + ?Sized>(self, state: &T) -> TestTurn {
        self.state_bytes(serde_json::to_vec(state).expect("the state can be written as JSON"))
    }

    /// The state that the turn before saved, as bytes: of an older version, or not JSON at all.
    pub fn state_bytes(mut self, state: impl Into<Vec<u8>>) -> TestTurn {
        self.state = Some(state.into());
        self.input.snapshot = Some(Origin { run_id: "turn-before".into(), worker: "worker".into(), version: 1 });
        self
    }

    /// The largest state that may be saved, in bytes; 4 MiB unless set.
    pub fn state_bytes_max(mut self, state_bytes_max: usize) -> TestTurn {
        self.state_bytes_max = state_bytes_max;
        self
    }

    /// Makes it a private turn: no state to read, none to save, no history.
    pub fn private(mut self) -> TestTurn {
        self.input.run_id = None;
        self
    }

    /// Adds an earlier, completed turn to the history.
    pub fn history(mut self, message: impl Into<Message>, reply: impl Into<Message>) -> TestTurn {
        let turn_id = format!("turn-{}", self.input.history.len() / 2);
        self.input.history.push(Past { role: Role::User, turn_id: turn_id.clone(), message: message.into() });
        self.input.history.push(Past { role: Role::Agent, turn_id, message: reply.into() });
        self
    }

    /// Adds a file to the message: a [`Part::Attachment`], which the worker can [read](Turn::attachment).
    pub fn attachment(
        mut self,
        name: impl Into<String>,
        media_type: impl Into<String>,
        bytes: impl Into<Vec<u8>>,
    ) -> TestTurn {
        let bytes = bytes.into();
        // Here they are numbered; a host names them by their bytes.
        let attachment_id = format!("sha256-{:064x}", self.attachments.len() + 1);
        self.input.message.parts.push(Part::Attachment {
            attachment_id: attachment_id.clone(),
            name: Some(name.into()),
            media_type: media_type.into(),
            bytes: bytes.len() as u64,
        });
        self.attachments.insert(attachment_id, bytes);
        self
    }

    /// Sets a variable of the agent's environment, as the worker finds it in [`Input::environment`]. The process's own environment is not changed.
    pub fn environment(mut self, name: impl Into<String>, value: impl Into<String>) -> TestTurn {
        self.input.environment.insert(name.into(), value.into());
        self
    }

    /// Which attempt it is; 1 unless set.
    pub fn attempt(mut self, attempt: u32) -> TestTurn {
        self.input.attempt = attempt;
        self
    }

    /// Makes it a dry run.
    pub fn dry_run(mut self) -> TestTurn {
        self.input.dry_run = true;
        self
    }

    /// How much time the worker is told that it has. Nothing stops it here when that is over.
    pub fn time_left(mut self, time_left: Duration) -> TestTurn {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.input.deadline_unix_ms = Some((now + time_left).as_millis() as u64);
        self
    }

    /// Answers every call of this operation by the script, which is given the request. An operation without a script is unknown.
    pub fn on_call(mut self, operation: impl Into<String>, script: impl FnMut(&Value) -> Answer + 'static) -> TestTurn {
        self.scripts.insert(operation.into(), Box::new(script));
        self
    }

    /// Runs the worker and reports. A panic of the worker goes through to the test.
    pub fn run(self, worker: impl FnOnce(Turn) -> WorkerResult) -> Report {
        let mut report = fake::with_turn(self, || begin_and_run(worker).err().map(|error| with_causes(error.as_ref())));
        if let Some(error) = &report.error {
            report.logs.push((Level::Error, error.clone()));
        }
        report
    }
}

/// How a scripted operation answers: a JSON head, frames, and an end.
#[derive(Debug, Clone)]
#[must_use = "a script returns it"]
pub struct Answer(fake::Answer);

impl Answer {
    /// Begins an answer with its JSON head. Without more, it ends there.
    ///
    /// # Panics
    /// If the head cannot be JSON.
    pub fn head<T: Serialize + ?Sized>(head: &T) -> Answer {
        let head = serde_json::to_vec(head).expect("the head can be written as JSON");
        Answer(fake::Answer::Frames { frames: vec![head], end: fake::End::Done })
    }

    /// Never answers, so that waiting for it times out. A worker that waits without a timeout fails its test.
    pub fn pending() -> Answer {
        Answer(fake::Answer::Frames { frames: vec![], end: fake::End::Never })
    }

    /// Fails without a head.
    pub fn failed(error: OperationError) -> Answer {
        Answer(fake::Answer::Frames { frames: vec![], end: fake::End::Failed(error) })
    }

    /// Is not started, because the agent's settings do not allow it: [`Error::Denied`](crate::Error::Denied).
    pub fn denied() -> Answer {
        Answer(fake::Answer::Refused(fake::ACCES))
    }

    /// Is not started, because the request is malformed: [`Error::Invalid`](crate::Error::Invalid).
    pub fn invalid() -> Answer {
        Answer(fake::Answer::Refused(fake::INVAL))
    }

    /// Adds a frame. Empty ones are left out, as the host does.
    pub fn frame(mut self, frame: impl Into<Vec<u8>>) -> Answer {
        let frame = frame.into();
        if let fake::Answer::Frames { frames, .. } = &mut self.0
            && !frame.is_empty()
        {
            frames.push(frame);
        }
        self
    }

    /// Stays silent after the last frame instead of ending.
    pub fn then_pending(self) -> Answer {
        self.ending(fake::End::Never)
    }

    /// Fails after the last frame.
    pub fn then_failed(self, error: OperationError) -> Answer {
        self.ending(fake::End::Failed(error))
    }

    fn ending(mut self, with: fake::End) -> Answer {
        if let fake::Answer::Frames { end, .. } = &mut self.0 {
            *end = with;
        }
        self
    }
}

/// What came of a turn.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Report {
    /// The pieces that were streamed, in order.
    pub deltas: Vec<String>,
    /// The last reply that the worker gave, if it gave one. [`reply`](Report::reply) is what the client gets.
    pub replied: Option<Message>,
    /// The statuses, in order.
    pub statuses: Vec<String>,
    /// The worker's own events: name and data.
    pub events: Vec<(String, Value)>,
    /// The log. An error that the closure returned is its last line.
    pub logs: Vec<(Level, String)>,
    /// The state saved last, as bytes. [`state`](Report::state) reads it.
    pub saved: Option<Vec<u8>>,
    /// How many bytes each state had that was too big to be saved.
    pub rejected_states: Vec<usize>,
    /// The operations that were started: name and request.
    pub calls: Vec<(String, Value)>,
    /// The error that the closure returned, with its causes: the program would have exited with code 1.
    pub error: Option<String>,
}

impl Report {
    /// What the client gets as the reply: what the worker replied, else what it said, joined. `None` where that is empty or the worker failed: that turn fails.
    pub fn reply(&self) -> Option<Message> {
        if self.error.is_some() {
            return None;
        }
        let reply = match &self.replied {
            Some(reply) => reply.clone(),
            None => Message::from(self.deltas.concat().as_str()),
        };
        let empty = reply.parts.iter().all(|part| matches!(part, Part::Text { text } if text.is_empty()));
        (!empty).then_some(reply)
    }

    /// The text of the reply.
    ///
    /// # Panics
    /// If the turn would have failed, saying why.
    #[track_caller]
    pub fn text(&self) -> String {
        match (&self.error, self.reply()) {
            (Some(error), _) => panic!("the worker failed: {error}"),
            (None, None) => panic!("the worker gave no reply"),
            (None, Some(reply)) => reply.text(),
        }
    }

    /// The state that the next turn would start from, if this turn saved one and did not fail.
    ///
    /// # Panics
    /// If what was saved is not the JSON of a `T`.
    #[track_caller]
    pub fn state<T: DeserializeOwned>(&self) -> Option<T> {
        let saved = self.saved.as_ref().filter(|_| self.reply().is_some())?;
        Some(serde_json::from_slice(saved).expect("the saved state is the JSON of the asked type"))
    }
}

/// What [`crate::run`] does off wasm.
pub(crate) fn run_on_stdio(worker: impl FnOnce(Turn) -> WorkerResult) -> WorkerResult {
    let mut message = String::new();
    std::io::stdin().read_to_string(&mut message)?;
    let report = turn(message.as_str()).run(worker);
    for (level, line) in report.logs.iter().filter(|(_, line)| Some(line) != report.error.as_ref()) {
        eprintln!("{level:?}: {line}");
    }
    if let Some(error) = report.error {
        return Err(error.into());
    }
    println!("{}", report.reply().ok_or("the worker gave no reply")?.text());
    Ok(())
}

#[cfg(test)]
mod tests;
