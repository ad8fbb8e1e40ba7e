//! How the clients reach the replicas: any of them, each request on a connection of its own, with a short patience; and what they all write down.
//!
//! It knows what every answer must look like, whatever is broken: a problem that is the database's is 503 with `Retry-After`, never 500.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::time::timeout;

use super::dice::Dice;
use super::record::{EventId, LaneId, Record, Seen, Stream};
use crate::api::turns_path;
use crate::load::{Connection, request};

/// The agent, the same in every org.
pub const AGENT: &str = "chain";
/// What a client waits for an answer. A stopped replica gives none.
const ANSWER_MAX: Duration = Duration::from_millis(4_000);

/// A tenant: its name, and the keys of its speakers.
#[derive(Debug, Clone)]
pub struct Org {
    pub name: String,
    pub key: String,
}

pub struct Desk {
    pub replicas: Vec<SocketAddr>,
    pub orgs: Vec<Org>,
    pub record: RefCell<Record>,
    /// No new messages.
    pub enough: Cell<bool>,
}

/// An answer that was read whole.
pub struct Answer {
    pub replica: usize,
    pub status: u16,
    pub replayed: bool,
    pub body: Value,
}

impl Answer {
    fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or("-")
    }
}

/// A stream that was opened.
pub struct Opened {
    pub replica: usize,
    /// `Location`: which turn's it is.
    pub turn: Option<String>,
    pub connection: Connection,
}

/// What came of asking for a stream.
pub enum Asked {
    Stream(Opened),
    /// Something else, read whole.
    Answer(Answer),
    /// Nothing, or half of it.
    Nothing,
}

/// How reading a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Its turn has ended.
    Whole,
    /// It broke off, it ended before its turn did, or nothing came for long.
    Broke,
    /// The client left.
    Ours,
}

impl Desk {
    pub fn org(&self, lane: &LaneId) -> &Org {
        self.orgs.iter().find(|org| org.name == lane.org).expect("lanes are made of orgs")
    }

    fn any_replica(&self, dice: &mut Dice) -> usize {
        dice.below(self.replicas.len() as u64) as usize
    }

    /// Asks any replica, once. `None`: nobody knows what came of it.
    pub async fn ask(
        &self,
        dice: &mut Dice,
        org: &Org,
        (method, path): (&str, &str),
        headers: &[&str],
        body: &str,
    ) -> Option<Answer> {
        match self.ask_for_stream(dice, org, (method, path), headers, body).await {
            Asked::Answer(answer) => Some(answer),
            Asked::Stream(_) => unreachable!("nobody asked for a stream"),
            Asked::Nothing => None,
        }
    }

    /// The same, where the answer may be a stream: if the headers accept one.
    pub async fn ask_for_stream(
        &self,
        dice: &mut Dice,
        org: &Org,
        (method, path): (&str, &str),
        headers: &[&str],
        body: &str,
    ) -> Asked {
        let replica = self.any_replica(dice);
        let wants_stream = headers.iter().any(|line| line.contains("text/event-stream"));
        let exchange = async {
            let mut connection = Connection::open(self.replicas[replica]).await?;
            let head = connection.send(&request(method, path, &org.key, headers, body.as_bytes())).await?;
            if wants_stream && head.status == 200 {
                let turn = head.header("location").and_then(|path| path.rsplit('/').next()).map(str::to_owned);
                return Ok(Asked::Stream(Opened { replica, turn, connection }));
            }
            let replayed = head.header("idempotent-replayed") == Some("true");
            let retry_after = head.header("retry-after").is_some();
            let body = connection.body().await?;
            let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).context("no JSON")? };
            let answer = Answer { replica, status: head.status, replayed, body };
            self.judge((method, path), &answer, retry_after);
            Ok::<_, anyhow::Error>(Asked::Answer(answer))
        };
        let asked = match timeout(ANSWER_MAX, exchange).await {
            Ok(Ok(asked)) => asked,
            Ok(Err(_)) | Err(_) => Asked::Nothing,
        };
        let status = match &asked {
            Asked::Stream(_) => "200 stream".to_owned(),
            Asked::Answer(answer) if answer.status < 400 => answer.status.to_string(),
            Asked::Answer(answer) => format!("{} {}", answer.status, answer.code()),
            Asked::Nothing => "no answer".to_owned(),
        };
        *self.record.borrow_mut().statuses.entry(status).or_default() += 1;
        asked
    }

    /// R4: of an answer that is a problem.
    fn judge(&self, (method, path): (&str, &str), answer: &Answer, retry_after: bool) {
        let what = match answer.status {
            429 | 503 if !retry_after => "has no Retry-After",
            500..=502 | 504.. => "is none of ours",
            _ => return,
        };
        let (status, replica, body) = (answer.status, answer.replica, &answer.body);
        let what = format!("{method} {path} on replica {replica}: status {status} {what}: {body}");
        self.record.borrow_mut().violation("R4", what, vec![]);
    }

    /// Opens a turn's events where its client left off.
    pub async fn events(&self, dice: &mut Dice, org: &Org, turn: &str, after: Option<EventId>) -> Asked {
        let resume = after.map(|id| format!("Last-Event-ID: {id}"));
        let headers: Vec<&str> = ["Accept: text/event-stream"].into_iter().chain(resume.as_deref()).collect();
        self.ask_for_stream(dice, org, ("GET", &format!("/v1/turns/{turn}/events")), &headers, "").await
    }

    /// Writes down a stream's events until it ends, breaks, is silent for `patience`, or has had `enough` of them.
    pub async fn read(
        &self,
        place: usize,
        opened: Opened,
        after: Option<EventId>,
        patience: Duration,
        enough: usize,
    ) -> Left {
        let Opened { replica, mut connection, .. } = opened;
        let stream = {
            let mut record = self.record.borrow_mut();
            let streams = &mut record.turns[place].streams;
            streams.push(Stream { after });
            u32::try_from(streams.len() - 1).expect("few streams")
        };
        for _ in 0..enough {
            let event = match timeout(patience, connection.event()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) if self.record.borrow().turns[place].is_over() => return Left::Whole,
                Ok(Ok(None)) => {
                    self.record.borrow_mut().count("streams that ended before their turn");
                    return Left::Broke;
                }
                Ok(Err(_)) | Err(_) => return Left::Broke,
            };
            let mut record = self.record.borrow_mut();
            let at = record.now();
            let Some(id) = EventId::parse(event.id) else {
                let what = format!("event {} has the id {:?}", event.kind, event.id);
                record.violation("E1", what, vec![place]);
                return Left::Broke;
            };
            let seen = Seen { at, stream, replica, id, kind: event.kind.into(), data: event.data.into() };
            record.turns[place].events.push(seen);
        }
        Left::Ours
    }

    /// Sets the stage, on whichever replica answers: retried until it does.
    pub async fn insist(&self, org: &Org, (method, path): (&str, &str), body: &Value) -> Result<Value> {
        let mut dice = Dice::new(0, path);
        for _ in 0..50 {
            let answer = self.ask(&mut dice, org, (method, path), &[], &body.to_string()).await;
            match answer {
                Some(answer) if answer.status < 300 => return Ok(answer.body),
                Some(answer) if answer.status < 500 && answer.status != 429 => {
                    anyhow::bail!("{method} {path}: {} {}", answer.status, answer.body)
                }
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
        anyhow::bail!("{method} {path}: no replica answers")
    }
}

/// Where messages of a lane go.
pub fn lane_path(lane: &LaneId) -> String {
    turns_path(AGENT, &lane.conversation)
}
