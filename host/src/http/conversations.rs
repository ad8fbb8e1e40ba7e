//! Conversations: begun, listed, read back, reset, deleted.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::Gateway;
use super::auth::{Converse, May};
use super::body::JsonBytes;
use super::page::{List, PageQuery, name_cursor, place_cursor};
use super::params::Ids;
use super::problem::{Code, Problem};
use super::views::{ConversationView, MessageView, TurnView, json, located};
use crate::audit::{Act, Verb};
use crate::caller::Caller;
use crate::ids::{AgentId, ConversationId};
use crate::notes::NotesChange;
use crate::store::{ConversationRecord, Direction, Opening, Page, TurnRecord};

/// What names a conversation is small: sixteen values of at most 512 characters, each of up to six bytes as JSON may write it.
const NOTES_BODY_BYTES_MAX: usize = 128 * 1024;

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(create_conversation))
        .routes(routes!(list_conversations))
        .routes(routes!(get_conversation, patch_conversation, delete_conversation))
        .routes(routes!(list_messages))
        .routes(routes!(reset_snapshot))
}

/// Which conversation to begin.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewConversation {
    /// Its agent; the org's default when absent.
    #[schema(value_type = Option<AgentId>)]
    agent: Option<String>,
    /// Its id; made when absent.
    #[schema(value_type = Option<ConversationId>)]
    conversation: Option<String>,
    /// Whose it is. Needs the scope `act_as`.
    #[schema(value_type = Option<crate::ids::UserId>)]
    user: Option<String>,
}

/// Begin a conversation
///
/// Not needed before a first message, which begins its conversation itself. One that is new counts against the org's rate and room as a message does.
#[utoipa::path(post, path = "/v1/conversations", tag = "conversations", request_body = NewConversation,
    responses((status = 201, description = "It is new", body = ConversationView), (status = 200, description = "It existed, and is the caller's", body = ConversationView)))]
async fn create_conversation(
    State(gateway): State<Gateway>,
    may: May<Converse>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let body = JsonBytes::read(&parts.headers, body, gateway.host.config.limits.request_body_bytes_max).await?;
    let new: NewConversation = body.parse(Code::MalformedRequest)?;
    let caller = may.acting_for(new.user.as_deref())?;
    let conversation = match &new.conversation {
        Some(id) => ConversationId::parse(id)?,
        None => ConversationId::parse(&Uuid::now_v7().to_string())?,
    };
    let agent = match &new.agent {
        Some(id) => {
            let id = AgentId::parse(id)?;
            gateway.host.agent(&caller.org, &id).await?.ok_or_else(|| Problem::not_found("agent"))?;
            id
        }
        None => {
            let default = gateway.host.store.default_agent(&caller.org).await?;
            default
                .ok_or_else(|| {
                    Problem::new(
                        Code::NoDefaultAgent,
                        "this org has no default agent; name one in `agent`, or put one with `default` true",
                    )
                })?
                .id
        }
    };
    let now = gateway.host.clock.now();
    let opening = gateway.host.store.open_conversation(&caller.org, &agent, &conversation, &caller.user, now).await?;
    let (opened, new) = match opening {
        Opening::Made(made) => (made, true),
        Opening::Found(found) => (found, false),
        Opening::Refused(exceeded) => {
            gateway.host.dispatch.meters.refused(&caller.org, (exceeded.of, exceeded.limit));
            return Err(exceeded.into());
        }
    };
    let record = opened.open(&caller).ok_or_else(|| Problem::not_found("conversation"))?;
    let view = ConversationView::from(record);
    let response = json(if new { StatusCode::CREATED } else { StatusCode::OK }, &view)?;
    Ok(located(response, &view.links.this))
}

/// The caller's conversation, or 404.
pub async fn opened(
    gateway: &Gateway,
    caller: &Caller,
    agent: &AgentId,
    conversation: &ConversationId,
) -> Result<ConversationRecord, Problem> {
    let found = gateway.host.store.conversation(&caller.org, agent, conversation).await?;
    found.and_then(|owned| owned.open(caller)).ok_or_else(|| Problem::not_found("conversation"))
}

/// What was changed under the condition that it is the caller's.
fn was_there(changed: bool) -> Result<(), Problem> {
    changed.then_some(()).ok_or_else(|| Problem::not_found("conversation"))
}

/// List conversations
///
/// The caller's own, or all of the agent's for an admin; by id.
#[utoipa::path(get, path = "/v1/agents/{agent}/conversations", tag = "conversations", params(("agent" = AgentId, Path)),
    responses((status = 200, description = "A page", body = List<ConversationView>)))]
async fn list_conversations(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids(agent): Ids<AgentId>,
    query: PageQuery,
) -> Result<Response, Problem> {
    let after: Option<ConversationId> = query.after_name('c')?;
    gateway.host.agent(&caller.org, &agent).await?.ok_or_else(|| Problem::not_found("agent"))?;
    let page =
        gateway.host.store.conversations(&caller.org, &agent, caller.only_own(), after.as_ref(), query.limit).await?;
    let next = page.items.last().filter(|_| page.more).map(|last| name_cursor('c', &last.id));
    let items = page.items.into_iter().map(ConversationView::from).collect();
    json(StatusCode::OK, &List { items, next })
}

/// Get a conversation
#[utoipa::path(get, path = "/v1/agents/{agent}/conversations/{conversation}", tag = "conversations",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path)),
    responses((status = 200, description = "The conversation", body = ConversationView)))]
async fn get_conversation(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
) -> Result<Response, Problem> {
    let record = opened(&gateway, &caller, &agent, &conversation).await?;
    json(StatusCode::OK, &ConversationView::from(record))
}

/// Name a conversation
///
/// Sets its title and its metadata: what is absent stays, null takes away, and metadata is replaced as a whole. By whom it belongs to, or an admin.
#[utoipa::path(patch, path = "/v1/agents/{agent}/conversations/{conversation}", tag = "conversations",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path)),
    request_body(content = NotesChange, example = json!({"title": "Invoices of March", "metadata": {"ticket": "4711"}})),
    responses((status = 200, description = "The conversation", body = ConversationView)))]
async fn patch_conversation(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let body = JsonBytes::read(&parts.headers, body, NOTES_BODY_BYTES_MAX).await?;
    let change: NotesChange = body.parse_named(Code::InvalidSetting)?;
    change.check().map_err(|why| Problem::new(Code::InvalidSetting, why))?;
    let found = opened(&gateway, &caller, &agent, &conversation).await?;
    if found.user != caller.user {
        let (act, host) = (Act::conversation(Verb::ConversationChange, &agent, &conversation), &gateway.host);
        host.store.record_act(Some(&caller.org), &act, host.clock.now(), &caller.actor()).await?;
    }
    let written =
        gateway.host.store.write_notes(&caller.org, &agent, &conversation, caller.only_own(), &change).await?;
    was_there(written)?;
    json(StatusCode::OK, &ConversationView::from(opened(&gateway, &caller, &agent, &conversation).await?))
}

/// Delete a conversation
///
/// Ends its live turns (`by: deleted`) and deletes its history, its snapshots and its private directory. Who begins it again starts from nothing.
#[utoipa::path(delete, path = "/v1/agents/{agent}/conversations/{conversation}", tag = "conversations",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path)), responses((status = 204, description = "It is gone")))]
async fn delete_conversation(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
) -> Result<Response, Problem> {
    let (whose, by) = (caller.only_own(), caller.actor());
    was_there(gateway.host.delete_conversation(&caller.org, &agent, &conversation, whose, &by).await?)?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// Start from an empty state again
///
/// The next turn finds no snapshot, and an empty private directory. The history stays.
#[utoipa::path(delete, path = "/v1/agents/{agent}/conversations/{conversation}/snapshot", tag = "conversations",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path)), responses((status = 204, description = "Its state is empty")))]
async fn reset_snapshot(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
) -> Result<Response, Problem> {
    let (whose, by) = (caller.only_own(), caller.actor());
    was_there(gateway.host.reset_conversation(&caller.org, &agent, &conversation, whose, &by).await?)?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// List messages
///
/// The history, with each turn's state; private turns are not in it. Oldest first, or newest first with `direction=backward`.
#[utoipa::path(get, path = "/v1/agents/{agent}/conversations/{conversation}/messages", tag = "conversations",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path)),
    responses((status = 200, description = "A page", body = List<MessageView>)))]
async fn list_messages(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
    query: PageQuery,
) -> Result<Response, Problem> {
    let (page, next) = turns(&gateway, &caller, &agent, &conversation, &query, 'm', false).await?;
    json(StatusCode::OK, &List { items: page.items.into_iter().map(MessageView::from).collect(), next })
}

/// A page of `…/turns`, which [`super::turns`] serves.
pub async fn turn_page(
    gateway: &Gateway,
    caller: &Caller,
    agent: &AgentId,
    conversation: &ConversationId,
    query: &PageQuery,
) -> Result<List<TurnView>, Problem> {
    let (page, next) = turns(gateway, caller, agent, conversation, query, 't', true).await?;
    Ok(List { items: page.items.into_iter().map(TurnView::from).collect(), next })
}

async fn turns(
    gateway: &Gateway,
    caller: &Caller,
    agent: &AgentId,
    conversation: &ConversationId,
    query: &PageQuery,
    cursor_kind: char,
    with_private: bool,
) -> Result<(Page<TurnRecord>, Option<String>), Problem> {
    let (after, direction): (Option<i64>, Direction) = query.after_place(cursor_kind)?;
    opened(gateway, caller, agent, conversation).await?;
    let store = &gateway.host.store;
    let page = store.turns(&caller.org, agent, conversation, after, direction, with_private, query.limit).await?;
    let last = page.items.last().and_then(|last| last.seq).filter(|_| page.more);
    let next = last.map(|seq| place_cursor(cursor_kind, direction, seq));
    Ok((page, next))
}
