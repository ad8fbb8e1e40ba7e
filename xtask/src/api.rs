//! The host's HTTP API as a client speaks it: JSON in and out, and the stream of a turn's events.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::time::timeout;

use crate::host::Host;
use crate::load::{Connection, request};

/// For one request and its whole answer, streams aside.
const ANSWER_MAX: Duration = Duration::from_secs(75);

/// An address and a key.
#[derive(Debug, Clone)]
pub struct Api {
    pub address: SocketAddr,
    pub key: String,
}

/// An answer that was read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub replayed: bool,
    pub body: Value,
}

impl Answer {
    /// Its body, if its status is this.
    pub fn expect(self, status: u16) -> Result<Value> {
        ensure!(self.status == status, "expected status {status}, saw {}: {}", self.status, self.body);
        Ok(self.body)
    }
}

impl Api {
    pub fn of(host: &Host) -> Api {
        Api { address: host.address, key: host.api_key.clone() }
    }

    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.send("GET", path, &[], None).await
    }

    /// Sends a request on a connection of its own and reads the answer, whatever its status.
    pub async fn send(&self, method: &str, path: &str, headers: &[&str], body: Option<&Value>) -> Result<Answer> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let exchange = async {
            let mut connection = Connection::open(self.address).await?;
            let head = connection.send(&request(method, path, &self.key, headers, body.as_bytes())).await?;
            let replayed = head.header("idempotent-replayed") == Some("true");
            let body = connection.body().await?;
            let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body)? };
            Ok::<_, anyhow::Error>(Answer { status: head.status, replayed, body })
        };
        let answer = timeout(ANSWER_MAX, exchange).await.with_context(|| format!("no answer within {ANSWER_MAX:?}"));
        answer.and_then(|inner| inner).with_context(|| format!("{method} {path}"))
    }

    /// Submits a message and returns at once with the turn's resource.
    pub async fn submit(&self, agent: &str, conversation: &str, text: &str, headers: &[&str]) -> Result<Answer> {
        self.send("POST", &turns_path(agent, conversation), headers, Some(&message(text))).await
    }

    /// Submits a message; the answer is the stream of its turn's events.
    pub async fn submit_streaming(&self, agent: &str, conversation: &str, text: &str) -> Result<Connection> {
        let body = message(text).to_string();
        self.stream("POST", &turns_path(agent, conversation), &[], body.as_bytes()).await
    }

    /// A turn's events, after the one with this id if one is given.
    pub async fn events(&self, turn: &str, last_event_id: Option<&str>) -> Result<Connection> {
        let resume = last_event_id.map(|id| format!("Last-Event-ID: {id}"));
        let headers: Vec<&str> = resume.as_deref().into_iter().collect();
        self.stream("GET", &format!("/v1/turns/{turn}/events"), &headers, b"").await
    }

    async fn stream(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Result<Connection> {
        let mut connection = Connection::open(self.address).await?;
        let headers = [&["Accept: text/event-stream"], headers].concat();
        let bytes = request(method, path, &self.key, &headers, body);
        let head = timeout(ANSWER_MAX, connection.send(&bytes)).await.context("no answer")??;
        if head.status != 200 {
            let body = connection.body().await?;
            anyhow::bail!(
                "{method} {path}: expected a stream, saw {}: {}",
                head.status,
                String::from_utf8_lossy(&body)
            );
        }
        Ok(connection)
    }
}

/// Where messages to a conversation go.
pub fn turns_path(agent: &str, conversation: &str) -> String {
    format!("/v1/agents/{agent}/conversations/{conversation}/turns")
}

/// The body that submits a text.
pub fn message(text: &str) -> Value {
    serde_json::json!({"message": {"text": text}})
}

/// A text in a JSON body, by its JSON pointer.
pub fn text<'a>(body: &'a Value, pointer: &str) -> Result<&'a str> {
    body.pointer(pointer).and_then(Value::as_str).with_context(|| format!("expected a text at {pointer}, saw {body}"))
}
