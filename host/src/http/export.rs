//! What is the caller's, read out whole: an org for its admins, a conversation for whom it belongs to. JSON lines.
//!
//! A page at a time is read and written, and the next only once the client has taken it: memory is bounded by a page, whatever there is to read. The
//! pages are of different moments. The last line counts the others, so that an export that broke off is not taken for a whole one.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Administer, Converse, May};
use super::conversations::opened;
use super::members::MemberView;
use super::params::Ids;
use super::problem::Problem;
use super::under_way::{Place, UnderWay};
use super::views::Stored;
use crate::agent::Agent;
use crate::attachment::{Attachment, AttachmentId};
use crate::audit::{Act, AuditEntry, AuditFilter, AuditPlace, Verb};
use crate::caller::Owned;
use crate::clock::Timestamp;
use crate::host::Host;
use crate::ids::{AgentId, ConversationId, OrgId, RunId, TurnId, UserId, WorkerName};
use crate::store::{
    Among, ConversationRecord, Direction, Result as StoreResult, SnapshotPlace, SnapshotRecord, StoreError, TurnRecord,
    WorkerVersion,
};
use crate::turn::{CancelledBy, Failure, TurnState, Usage};

/// What the first line says of the lines behind it. A change that takes something away is another number.
const FORMAT_VERSION: u32 = 1;
/// For how long a client may leave a page lying, and how long all of them may take: an export holds a place that others wait for.
const PAGE_TIMEOUT: Duration = Duration::from_secs(60);
const EXPORT_TIMEOUT: Duration = Duration::from_secs(3_600);
/// Rows of a page that have no bodies.
const ROWS: usize = 100;
/// Turns of a page: at most so many messages and replies are in memory, and fewer once they turn out to be large.
const TURNS_MAX: usize = 16;
/// A page of turns that is larger is followed by a smaller one.
const PAGE_BYTES: usize = 1 << 20;

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(export_org)).routes(routes!(export_conversation))
}

/// Exports that run: one of an org, so that nobody has a host read the same tables over and over at once, and a few of its conversations, which are counted
/// apart so that no member keeps an admin from theirs.
pub struct Exports {
    of_orgs: Arc<UnderWay>,
    of_conversations: Arc<UnderWay>,
}

impl Default for Exports {
    fn default() -> Exports {
        Exports {
            of_orgs: UnderWay::new("exports", "exports_max", 1, 8),
            of_conversations: UnderWay::new("exports of conversations", "conversation_exports_max", 4, 32),
        }
    }
}

/// Export the org
///
/// JSON lines, each an object with `kind`: `export` (the first), `org`, `member`, `agent`, `worker` (a version, without its module), `conversation`, `attachment`
/// (without its bytes: `GET /v1/attachments/{attachment}` has them), `turn` (with message and reply), `snapshot` (without its bytes), `audit`, and `end` (the last, with how many lines came before it: without it the export is not
/// whole). No secret is in it: of an agent's environment there are the names. For the scope `admin`; it is written down in the audit.
#[utoipa::path(get, path = "/v1/export", tag = "export",
    responses((status = 200, description = "All of the org", content_type = "application/x-ndjson", body = String,
        example = "{\"kind\":\"export\",\"format\":1,\"org\":\"acme\",\"at\":\"2026-11-23T17:03:12.120Z\"}\n{\"kind\":\"end\",\"lines\":1}\n")))]
async fn export_org(State(gateway): State<Gateway>, caller: May<Administer>) -> Result<Response, Problem> {
    caller.as_admin()?;
    let act = Act::new(Verb::OrgExport, "org", json!({}));
    let Some(org) = gateway.host.store.org(&caller.org).await? else { return Err(Problem::not_found("org")) };
    begin(&gateway, &caller.org, Among::All, Begun { at: org.created_at, user: None }, act, &caller.actor()).await
}

/// Export a conversation
///
/// The lines of an org's export that are this conversation's: `conversation`, `turn`, `snapshot`. By whom it belongs to, or an admin.
#[utoipa::path(get, path = "/v1/agents/{agent}/conversations/{conversation}/export", tag = "conversations",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path)),
    responses((status = 200, description = "All of the conversation", content_type = "application/x-ndjson", body = String)))]
async fn export_conversation(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
) -> Result<Response, Problem> {
    let found = opened(&gateway, &caller, &agent, &conversation).await?;
    let begun = Begun { at: found.created_at, user: Some(found.user) };
    let act = Act::conversation(Verb::ConversationExport, &agent, &conversation);
    begin(&gateway, &caller.org, Among::One(agent, conversation), begun, act, &caller.actor()).await
}

async fn begin(
    gateway: &Gateway,
    org: &OrgId,
    among: Among,
    begun: Begun,
    act: Act,
    by: &crate::audit::Actor,
) -> Result<Response, Problem> {
    let (of, exports) = match among {
        Among::All => ("org", &gateway.exports.of_orgs),
        Among::One(..) => ("conversation", &gateway.exports.of_conversations),
    };
    let place = exports.begin(org)?;
    let host = gateway.host.clone();
    // Before the first byte: it changes nothing that it could be written down with.
    host.store.record_act(Some(org), &act, host.clock.now(), by).await?;
    metrics::counter!("turnhouse_exports_total", "of" => of).increment(1);
    let export = Export { host, org: org.clone(), among, begun, stage: Stage::Head, lines: 0, turns: 4 };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment; filename=\"export.jsonl\"")),
    ];
    Ok((StatusCode::OK, headers, Body::from_stream(taken(export, place, PAGE_TIMEOUT, EXPORT_TIMEOUT))).into_response())
}

/// The export's pages as they are taken. It runs by itself, since the body of a client that takes nothing is not even asked for more: so it ends, and its
/// place is free, whatever the client does. What breaks off ends in an error and not as if that were all.
fn taken(
    export: Export,
    place: Place,
    page_timeout: Duration,
    timeout: Duration,
) -> impl Stream<Item = Result<Bytes, BrokenOff>> {
    let (pages, taken) = mpsc::channel(1);
    tokio::spawn(async move {
        let (_place, org) = (place, export.org.clone());
        let why = match tokio::time::timeout(timeout, write(export, &pages, page_timeout)).await {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => BrokenOff::TooSlow,
        };
        tracing::warn!(%org, error = %why, "an export breaks off");
    });
    futures_util::stream::unfold(Some(taken), async |taken| {
        let mut taken = taken?;
        match taken.recv().await {
            Some(Some(page)) => Some((Ok(page), Some(taken))),
            Some(None) => None,
            None => Some((Err(BrokenOff::Here), None)),
        }
    })
}

/// Writes page after page, and `None` behind the last.
async fn write(
    mut export: Export,
    pages: &mpsc::Sender<Option<Bytes>>,
    page_timeout: Duration,
) -> Result<(), BrokenOff> {
    loop {
        let page = export.page().await?;
        let last = page.is_none();
        pages.send_timeout(page, page_timeout).await.map_err(|_| BrokenOff::TooSlow)?;
        if last {
            return Ok(());
        }
    }
}

/// Why an export is not whole.
#[derive(Debug, thiserror::Error)]
enum BrokenOff {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("what is exported was deleted")]
    Gone,
    #[error("its client went away, or takes it too slowly")]
    TooSlow,
    #[error("the export broke off")]
    Here,
}

/// What an org or a conversation is told by from another that has its name later.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Begun {
    at: Timestamp,
    user: Option<UserId>,
}

/// Where an export is.
struct Export {
    host: Host,
    org: OrgId,
    among: Among,
    begun: Begun,
    stage: Stage,
    lines: u64,
    /// Turns of the next page.
    turns: usize,
}

/// What is read next, and after what.
enum Stage {
    Head,
    Members(Option<UserId>),
    Agents(Option<AgentId>),
    Workers(Option<WorkerName>),
    Conversations(Option<(AgentId, ConversationId)>),
    Attachments(Option<AttachmentId>),
    Turns(Option<TurnId>, Option<i64>),
    Snapshots(Option<SnapshotPlace>),
    Audit(Option<AuditPlace>),
    End,
    Done,
}

impl Export {
    /// The next page of lines; `None` behind the last.
    async fn page(&mut self) -> Result<Option<Bytes>, BrokenOff> {
        let page = self.read().await?;
        // After it was read: what was the caller's when the export began may have been deleted and begun again, as somebody else's.
        if page.is_some() && self.still_begun().await?.as_ref() != Some(&self.begun) {
            return Err(BrokenOff::Gone);
        }
        Ok(page)
    }

    async fn still_begun(&self) -> StoreResult<Option<Begun>> {
        let store = &self.host.store;
        Ok(match &self.among {
            Among::All => store.org(&self.org).await?.map(|org| Begun { at: org.created_at, user: None }),
            Among::One(agent, conversation) => {
                let found = store.conversation(&self.org, agent, conversation).await?.map(Owned::for_host);
                found.map(|found| Begun { at: found.created_at, user: Some(found.user) })
            }
        })
    }

    async fn read(&mut self) -> StoreResult<Option<Bytes>> {
        let mut page = BytesMut::new();
        while page.is_empty() {
            self.stage = match std::mem::replace(&mut self.stage, Stage::Done) {
                Stage::Head => self.head(&mut page).await?,
                Stage::Members(after) => self.members(&mut page, after).await?,
                Stage::Agents(after) => self.agents(&mut page, after).await?,
                Stage::Workers(after) => self.workers(&mut page, after).await?,
                Stage::Conversations(after) => self.conversations(&mut page, after).await?,
                Stage::Attachments(after) => self.attachments(&mut page, after).await?,
                Stage::Turns(after, seq) => self.turns(&mut page, after, seq).await?,
                Stage::Snapshots(after) => self.snapshots(&mut page, after).await?,
                Stage::Audit(before) => self.audit(&mut page, before).await?,
                Stage::End => {
                    let lines = self.lines;
                    self.line(&mut page, "end", &json!({ "lines": lines }))?;
                    Stage::Done
                }
                Stage::Done => return Ok(None),
            };
        }
        Ok(Some(page.freeze()))
    }

    fn line<T: Serialize>(&mut self, page: &mut BytesMut, kind: &'static str, of: &T) -> StoreResult<()> {
        #[derive(Serialize)]
        struct Line<'a, T> {
            kind: &'static str,
            #[serde(flatten)]
            of: &'a T,
        }
        // What does not serialise was not stored by us.
        serde_json::to_writer(page.writer(), &Line { kind, of })
            .map_err(|error| StoreError::Corrupt(format!("a {kind} to be exported: {error}")))?;
        page.put_u8(b'\n');
        self.lines += 1;
        Ok(())
    }

    async fn head(&mut self, page: &mut BytesMut) -> StoreResult<Stage> {
        let (org, at) = (self.org.clone(), self.host.clock.now());
        self.line(page, "export", &json!({"format": FORMAT_VERSION, "org": org, "at": at}))?;
        match self.among.clone() {
            Among::All => {
                if let Some(found) = self.host.store.org(&org).await? {
                    self.line(page, "org", &json!({"id": org, "owner": found.owner, "created_at": found.created_at}))?;
                }
                Ok(Stage::Members(None))
            }
            Among::One(agent, conversation) => {
                // Its caller has been found to see it; it may be gone since.
                if let Some(found) = self.host.store.conversation(&org, &agent, &conversation).await? {
                    self.line(page, "conversation", &conversation_line(found.for_host()))?;
                }
                Ok(Stage::Turns(None, None))
            }
        }
    }

    async fn members(&mut self, page: &mut BytesMut, after: Option<UserId>) -> StoreResult<Stage> {
        let found = self.host.store.members(&self.org, after.as_ref(), ROWS).await?;
        let last = found.items.last().map(|member| member.user.clone());
        for member in found.items {
            self.line(page, "member", &MemberView::from(member))?;
        }
        Ok(if found.more { Stage::Members(last) } else { Stage::Agents(None) })
    }

    async fn agents(&mut self, page: &mut BytesMut, after: Option<AgentId>) -> StoreResult<Stage> {
        let found = self.host.store.agents(&self.org, after.as_ref(), ROWS).await?;
        let last = found.items.last().map(|agent| agent.id.clone());
        for agent in found.items {
            self.line(page, "agent", &agent_line(agent))?;
        }
        Ok(if found.more { Stage::Agents(last) } else { Stage::Workers(None) })
    }

    /// A worker at a time, with its versions.
    async fn workers(&mut self, page: &mut BytesMut, after: Option<WorkerName>) -> StoreResult<Stage> {
        let found = self.host.store.workers(&self.org, after.as_ref(), 1).await?;
        let Some(worker) = found.items.into_iter().next().map(|newest| newest.worker) else {
            return Ok(Stage::Conversations(None));
        };
        for version in self.host.store.worker_versions(&self.org, &worker).await? {
            self.line(page, "worker", &worker_line(version))?;
        }
        Ok(if found.more { Stage::Workers(Some(worker)) } else { Stage::Conversations(None) })
    }

    async fn conversations(
        &mut self,
        page: &mut BytesMut,
        after: Option<(AgentId, ConversationId)>,
    ) -> StoreResult<Stage> {
        let found = self.host.store.org_conversations(&self.org, after.as_ref(), ROWS).await?;
        let last = found.items.last().map(|found| (found.agent.clone(), found.id.clone()));
        for conversation in found.items {
            self.line(page, "conversation", &conversation_line(conversation))?;
        }
        Ok(if found.more { Stage::Conversations(last) } else { Stage::Attachments(None) })
    }

    async fn attachments(&mut self, page: &mut BytesMut, after: Option<AttachmentId>) -> StoreResult<Stage> {
        let found = self.host.store.org_attachments(&self.org, after, ROWS).await?;
        let last = found.items.last().map(|attachment| attachment.id);
        for Attachment { id, media_type, bytes } in found.items {
            self.line(page, "attachment", &json!({"id": id, "media_type": media_type, "bytes": bytes}))?;
        }
        Ok(if found.more { Stage::Attachments(last) } else { Stage::Turns(None, None) })
    }

    async fn turns(&mut self, page: &mut BytesMut, after: Option<TurnId>, seq: Option<i64>) -> StoreResult<Stage> {
        let (store, limit) = (&self.host.store, self.turns);
        let found = match &self.among {
            Among::All => store.org_turns(&self.org, after, limit).await?,
            Among::One(agent, conversation) => {
                store.turns(&self.org, agent, conversation, seq, Direction::Forward, true, limit).await?
            }
        };
        let last = found.items.last().map(|turn| (turn.id, turn.seq));
        for turn in found.items {
            self.line(page, "turn", &TurnLine::from(turn))?;
        }
        self.turns = if page.len() > PAGE_BYTES { (limit / 2).max(1) } else { (limit * 2).min(TURNS_MAX) };
        Ok(match last {
            Some((turn, seq)) if found.more => Stage::Turns(Some(turn), seq),
            _ => Stage::Snapshots(None),
        })
    }

    async fn snapshots(&mut self, page: &mut BytesMut, after: Option<SnapshotPlace>) -> StoreResult<Stage> {
        let found = self.host.store.snapshots(&self.org, &self.among, after.as_ref(), ROWS).await?;
        let last = found.items.last().map(|last| SnapshotPlace {
            agent: last.agent.clone(),
            conversation: last.conversation.clone(),
            parent: last.parent,
        });
        for snapshot in found.items {
            self.line(page, "snapshot", &snapshot_line(&snapshot))?;
        }
        Ok(match (found.more, &self.among) {
            (true, _) => Stage::Snapshots(last),
            (false, Among::All) => Stage::Audit(None),
            (false, Among::One(..)) => Stage::End,
        })
    }

    async fn audit(&mut self, page: &mut BytesMut, before: Option<AuditPlace>) -> StoreResult<Stage> {
        let found = self.host.store.audit(Some(&self.org), &AuditFilter::All, Timestamp(0), before, ROWS).await?;
        let last = found.items.last().map(|last| AuditPlace { at: last.at, id: last.id });
        for entry in found.items {
            self.line(page, "audit", &audit_line(entry))?;
        }
        Ok(if found.more { Stage::Audit(last) } else { Stage::End })
    }
}

/// Without the environment's values: they may be secret.
fn agent_line(agent: Agent) -> Value {
    let settings = agent.settings;
    let environment: Vec<String> = settings.environment.into_keys().collect();
    json!({"id": agent.id, "worker": settings.worker, "version": settings.version, "default": settings.default,
        "session_mode": settings.session_mode, "limits": settings.limits, "environment_names": environment,
        "allowed_hosts": settings.allowed_hosts, "model": settings.model, "history_messages": settings.history_messages,
        "revision": agent.revision, "created_at": agent.created_at, "updated_at": agent.updated_at})
}

fn worker_line(version: WorkerVersion) -> Value {
    json!({"id": version.worker, "version": version.version, "digest": hex::encode(version.digest), "size_bytes": version.size,
        "imports": version.imports, "created_at": version.created_at})
}

fn conversation_line(conversation: ConversationRecord) -> Value {
    json!({"id": conversation.id, "agent_id": conversation.agent, "user_id": conversation.user,
        "created_at": conversation.created_at, "snapshot_run_id": conversation.snapshot_run, "title": conversation.title,
        "metadata": conversation.metadata})
}

fn snapshot_line(snapshot: &SnapshotRecord) -> Value {
    json!({"agent_id": snapshot.agent, "conversation_id": snapshot.conversation, "run_id": snapshot.run_id,
        "parent": snapshot.parent, "turn_id": snapshot.turn, "worker": snapshot.worker, "version": snapshot.version,
        "at": snapshot.at, "size_bytes": snapshot.bytes})
}

fn audit_line(entry: AuditEntry) -> Value {
    json!({"at": entry.at, "id": entry.id, "actor": entry.actor, "credential": entry.credential, "request_id": entry.request_id,
        "verb": entry.verb, "resource": entry.resource, "detail": entry.detail})
}

/// Message and reply are written as they were stored.
#[derive(Serialize)]
struct TurnLine {
    id: TurnId,
    agent_id: AgentId,
    conversation_id: Option<ConversationId>,
    user_id: UserId,
    run_id: Option<RunId>,
    seq: Option<i64>,
    private: bool,
    state: TurnState,
    attempt: u32,
    worker: Option<WorkerName>,
    version: Option<u32>,
    dry_run: bool,
    message: Stored,
    reply: Option<Stored>,
    failure: Option<Failure>,
    cancelled_by: Option<CancelledBy>,
    usage: Option<Usage>,
    accepted_at: Timestamp,
    started_at: Option<Timestamp>,
    ended_at: Option<Timestamp>,
}

impl From<TurnRecord> for TurnLine {
    fn from(turn: TurnRecord) -> TurnLine {
        let (worker, version) = turn.worker.unzip();
        TurnLine {
            id: turn.id,
            agent_id: turn.agent,
            conversation_id: turn.conversation,
            user_id: turn.user,
            run_id: turn.run_id,
            seq: turn.seq,
            private: turn.private,
            state: turn.state,
            attempt: turn.attempt,
            worker,
            version,
            dry_run: turn.dry_run,
            message: Stored(turn.message),
            reply: turn.reply.map(Stored),
            failure: turn.failure,
            cancelled_by: turn.cancelled_by,
            usage: turn.usage,
            accepted_at: turn.accepted_at,
            started_at: turn.started_at,
            ended_at: turn.ended_at,
        }
    }
}
