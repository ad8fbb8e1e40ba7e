//! Resources as they are shown: exactly the shapes of the manual. Pure.

use std::collections::BTreeMap;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::{BufMut as _, Bytes, BytesMut};
use serde::ser::{Error as _, SerializeStruct as _};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::problem::Problem;
use crate::agent::{Agent, AgentLimits};
use crate::clock::Timestamp;
use crate::content::Content;
use crate::gate::SessionMode;
use crate::ids::{AgentId, ConversationId, RunId, TurnId, UserId, WorkerName};
use crate::store::{ConversationRecord, TurnRecord, WorkerVersion};
use crate::turn::{CancelledBy, Failure, TurnState, Usage};

/// `value` as a response.
pub fn json<T: Serialize>(status: StatusCode, value: &T) -> Result<Response, Problem> {
    let mut body = BytesMut::with_capacity(512).writer();
    serde_json::to_writer(&mut body, value).map_err(Problem::internal)?;
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    Ok((status, headers, body.into_inner().freeze()).into_response())
}

/// Sets `Location`.
pub fn located(mut response: Response, path: &str) -> Response {
    let value = HeaderValue::from_str(path).expect("ids are ASCII");
    response.headers_mut().insert(header::LOCATION, value);
    response
}

/// JSON that was stored as it came.
#[derive(Debug)]
pub struct Stored(pub Bytes);

impl Serialize for Stored {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_slice(&self.0).map_err(|_| S::Error::custom("stored JSON is none"))?;
        raw.serialize(serializer)
    }
}

/// Where a turn is.
#[derive(Debug, ToSchema)]
pub struct TurnLinks {
    /// The turn.
    #[schema(value_type = String, example = "/v1/turns/01990000-0000-7000-8000-000000000000")]
    #[allow(dead_code, reason = "the three are written from one id")]
    #[schema(rename = "self")]
    this: TurnId,
    /// Its events.
    #[schema(value_type = String)]
    #[allow(dead_code, reason = "see `this`")]
    events: (),
    /// Where to cancel it.
    #[schema(value_type = String)]
    #[allow(dead_code, reason = "see `this`")]
    cancel: (),
}

impl From<TurnId> for TurnLinks {
    fn from(turn: TurnId) -> TurnLinks {
        TurnLinks { this: turn, events: (), cancel: () }
    }
}

impl Serialize for TurnLinks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let id = self.this;
        let mut links = serializer.serialize_struct("TurnLinks", 3)?;
        links.serialize_field("self", &Shown(format_args!("/v1/turns/{id}")))?;
        links.serialize_field("events", &Shown(format_args!("/v1/turns/{id}/events")))?;
        links.serialize_field("cancel", &Shown(format_args!("/v1/turns/{id}/cancel")))?;
        links.end()
    }
}

/// Written without a string of its own.
struct Shown<'a>(std::fmt::Arguments<'a>);

impl Serialize for Shown<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// A turn's state, and where the rest is.
#[derive(Debug, Serialize, ToSchema)]
pub struct TurnRef {
    /// The turn.
    pub turn_id: TurnId,
    /// Its state when this was written.
    pub state: TurnState,
    /// The message became part of this turn, which waited already (`on_busy: collect`).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    #[schema(required = false)]
    pub joined: bool,
    /// Where it is.
    pub links: TurnLinks,
}

impl TurnRef {
    /// Of `turn`.
    pub fn new(turn: TurnId, state: TurnState) -> TurnRef {
        TurnRef { turn_id: turn, state, joined: false, links: turn.into() }
    }
}

/// One event of a stream. A stream is one after another, each ended by an empty line.
#[derive(Debug, ToSchema)]
#[schema(as = Event)]
#[allow(dead_code, reason = "it is only described: `sse` writes events field by field")]
pub struct StreamEvent {
    /// Its kind; see the table. Expect kinds that you do not know.
    event: String,
    /// One line of JSON.
    data: String,
    /// `<epoch>.<seq>`, or `end` for the last.
    id: String,
}

/// A turn.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Turn)]
pub struct TurnView {
    /// Its id.
    pub id: TurnId,
    /// Its agent.
    pub agent_id: AgentId,
    /// Its conversation; null where its envelope named none.
    pub conversation_id: Option<ConversationId>,
    /// Its run; null where its envelope named none.
    pub run_id: Option<RunId>,
    /// Its state.
    pub state: TurnState,
    /// How often it was started.
    pub attempt: u32,
    /// The worker that it first started with; null before.
    pub worker: Option<WorkerName>,
    /// That worker's version.
    pub version: Option<u32>,
    /// The reply, when completed.
    #[schema(value_type = Option<Content>)]
    pub reply: Option<Stored>,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Who cancelled it; absent unless it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancelled_by: Option<CancelledBy>,
    /// What it used; null until it has ended.
    pub usage: Option<Usage>,
    /// When it was accepted.
    #[schema(value_type = String, format = DateTime)]
    pub accepted_at: Timestamp,
    /// When it first started.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// When it ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    /// Where it is.
    pub links: TurnLinks,
}

impl From<TurnRecord> for TurnView {
    fn from(turn: TurnRecord) -> TurnView {
        let (worker, version) = turn.worker.unzip();
        TurnView {
            id: turn.id,
            agent_id: turn.agent,
            conversation_id: turn.conversation,
            run_id: turn.run_id,
            state: turn.state,
            attempt: turn.attempt,
            worker,
            version,
            reply: turn.reply.map(Stored),
            failure: turn.failure,
            cancelled_by: turn.cancelled_by,
            usage: turn.usage,
            accepted_at: turn.accepted_at,
            started_at: turn.started_at,
            ended_at: turn.ended_at,
            links: turn.id.into(),
        }
    }
}

/// One exchange of a conversation's history.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Message)]
pub struct MessageView {
    /// The turn.
    pub turn_id: TurnId,
    /// Its place in the conversation.
    pub seq: Option<i64>,
    /// Its state.
    pub state: TurnState,
    /// What was said.
    #[schema(value_type = Content)]
    pub message: Stored,
    /// What was answered, when completed.
    #[schema(value_type = Option<Content>)]
    pub reply: Option<Stored>,
    /// Why there is no answer.
    pub failure: Option<Failure>,
    /// When it was accepted.
    #[schema(value_type = String, format = DateTime)]
    pub accepted_at: Timestamp,
    /// When it ended.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
}

impl From<TurnRecord> for MessageView {
    fn from(turn: TurnRecord) -> MessageView {
        MessageView {
            turn_id: turn.id,
            seq: turn.seq,
            state: turn.state,
            message: Stored(turn.message),
            reply: turn.reply.map(Stored),
            failure: turn.failure,
            accepted_at: turn.accepted_at,
            ended_at: turn.ended_at,
        }
    }
}

/// A conversation.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Conversation)]
pub struct ConversationView {
    /// Its id.
    pub id: ConversationId,
    /// Its agent.
    pub agent_id: AgentId,
    /// Who began it.
    pub user_id: UserId,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// The run whose snapshot it stands on; null at the start.
    pub snapshot_run_id: Option<RunId>,
    /// What people call it; null when nobody has named it.
    pub title: Option<String>,
    /// What programs wrote on it.
    pub metadata: BTreeMap<String, String>,
    /// Where it is.
    pub links: ConversationLinks,
}

/// Where a conversation is.
#[derive(Debug, Serialize, ToSchema)]
pub struct ConversationLinks {
    /// The conversation.
    #[serde(rename = "self")]
    pub this: String,
    /// Where to send messages, and its turns.
    pub turns: String,
    /// Its history.
    pub messages: String,
}

impl From<ConversationRecord> for ConversationView {
    fn from(conversation: ConversationRecord) -> ConversationView {
        let this = format!("/v1/agents/{}/conversations/{}", conversation.agent, conversation.id);
        let links = ConversationLinks { turns: format!("{this}/turns"), messages: format!("{this}/messages"), this };
        ConversationView {
            id: conversation.id,
            agent_id: conversation.agent,
            user_id: conversation.user,
            created_at: conversation.created_at,
            snapshot_run_id: conversation.snapshot_run,
            title: conversation.title,
            metadata: conversation.metadata,
            links,
        }
    }
}

/// A version of a worker.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Worker)]
pub struct WorkerView {
    /// The worker.
    pub id: WorkerName,
    /// 1, 2, ….
    pub version: u32,
    /// SHA-256 of the module, hex.
    pub digest: String,
    /// What the module imports: `module.name`.
    pub imports: Vec<String>,
    /// Bytes of the module.
    pub size_bytes: u64,
    /// How long it took to compile.
    pub compile_ms: f64,
    /// When it was uploaded.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
}

impl From<WorkerVersion> for WorkerView {
    fn from(version: WorkerVersion) -> WorkerView {
        WorkerView {
            id: version.worker,
            version: version.version,
            digest: hex::encode(version.digest),
            imports: version.imports,
            size_bytes: version.size,
            compile_ms: version.compile_ms,
            created_at: version.created_at,
        }
    }
}

/// An agent.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Agent)]
pub struct AgentView {
    /// Its id.
    pub id: AgentId,
    /// The worker that it runs.
    pub worker: WorkerName,
    /// That worker's version.
    pub version: Option<u32>,
    /// Whether conversations that name no agent get this one.
    pub default: bool,
    /// How its conversations keep their state.
    pub session_mode: SessionMode,
    /// Its own bounds.
    pub limits: AgentLimits,
    /// Environment of the worker's program. Only for keys that may deploy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<BTreeMap<String, String>>,
    /// Hosts that its operations may reach. Only for keys that may deploy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_hosts: Option<Vec<String>>,
    /// The model that its `llm.chat` uses.
    pub model: Option<String>,
    /// Completed turns that its input carries.
    pub history_messages: usize,
    /// + 1 at every change.
    pub revision: u64,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it was last changed.
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
}

impl AgentView {
    /// `whole` also shows what only who deploys should see.
    pub fn new(agent: Agent, whole: bool) -> AgentView {
        let settings = agent.settings;
        AgentView {
            id: agent.id,
            worker: settings.worker,
            version: settings.version,
            default: settings.default,
            session_mode: settings.session_mode,
            limits: settings.limits,
            environment: whole.then_some(settings.environment),
            allowed_hosts: whole.then_some(settings.allowed_hosts),
            model: settings.model,
            history_messages: settings.history_messages,
            revision: agent.revision,
            created_at: agent.created_at,
            updated_at: agent.updated_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_turn_has_the_manuals_shape() {
        let id: TurnId = "01990000-0000-7000-8000-000000000000".parse().unwrap();
        let turn = TurnRecord {
            org: "acme".parse().unwrap(),
            id,
            user: "ann".parse().unwrap(),
            agent: "support".parse().unwrap(),
            conversation: Some("c-42".parse().unwrap()),
            run_id: Some(id.into()),
            private: false,
            seq: Some(1),
            state: TurnState::Completed,
            attempt: 1,
            epoch: 1,
            first_epoch: Some(1),
            worker: Some(("notes".parse().unwrap(), 3)),
            message: Bytes::from_static(br#"{"text":"hello"}"#),
            dry_run: false,
            reply: Some(Bytes::from_static(br#"{"text":"hello"}"#)),
            replaces_deltas: false,
            failure: None,
            cancelled_by: None,
            usage: Some(Usage {
                cpu_ms: 0.4,
                wall_ms: 1.9,
                memory_peak_bytes: 1_179_648,
                host_calls: 3,
                bytes_in: 5,
                bytes_out: 6,
                instance_ms: 0.9,
            }),
            accepted_at: Timestamp(0),
            started_at: Some(Timestamp(1)),
            ended_at: Some(Timestamp(2)),
        };
        let base = "/v1/turns/01990000-0000-7000-8000-000000000000";
        assert_eq!(
            serde_json::to_value(TurnView::from(turn)).unwrap(),
            json!({
                "id": id, "agent_id": "support", "conversation_id": "c-42", "run_id": id, "state": "completed", "attempt": 1,
                "worker": "notes", "version": 3, "reply": {"text": "hello"}, "failure": null,
                "usage": {"cpu_ms": 0.4, "wall_ms": 1.9, "memory_peak_bytes": 1_179_648, "host_calls": 3,
                    "bytes_in": 5, "bytes_out": 6, "instance_ms": 0.9},
                "accepted_at": "1970-01-01T00:00:00.000Z", "started_at": "1970-01-01T00:00:00.001Z", "ended_at": "1970-01-01T00:00:00.002Z",
                "links": {"self": base, "events": format!("{base}/events"), "cancel": format!("{base}/cancel")},
            })
        );
    }
}
