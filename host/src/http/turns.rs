//! Turns: a message comes in and is answered with events, with the ended turn, or with where to look; turns are read, followed, cancelled.
//!
//! [`submit_turn`] is the hot path: the body is read and parsed once, the message is stored as it came, and nothing is spawned.

use std::borrow::Cow;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Converse, Follower, May};
use super::body::JsonBytes;
use super::negotiate::{self, Answer, IDEMPOTENT_REPLAYED, PREFERENCE_APPLIED};
use super::page::{List, PageQuery};
use super::params::Ids;
use super::problem::{Code, Problem};
use super::readers::Permit;
use super::views::{StreamEvent, TurnRef, TurnView, json, located};
use super::{Gateway, conversations, message, sse, ticket};
use crate::admission::OnBusy;
use crate::audit::{Act, Verb};
use crate::caller::{Caller, Scopes};
use crate::content::Content;
use crate::event::EventId;
use crate::ids::{AgentId, ConversationId, TurnId, UserId};
use crate::keys::AuthError;
use crate::reader::Reader;
use crate::store::TurnRecord;
use crate::submit::{Session, Submission, Submitted, submit};
use crate::turn::{CancelledBy, TurnState};

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(submit_turn, list_turns))
        .routes(routes!(get_turn))
        .routes(routes!(stream_events))
        .routes(routes!(cancel_turn))
}

/// A message for a conversation.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewTurn)]
struct NewTurn<'a> {
    /// What to say.
    #[serde(borrow)]
    #[schema(value_type = Content)]
    message: Option<&'a RawValue>,
    /// What to do if the conversation is busy.
    #[serde(default)]
    on_busy: OnBusy,
    /// Skip operations with outside effects.
    #[serde(default)]
    dry_run: bool,
    /// For whom. Needs the scope `act_as`.
    #[serde(borrow, default)]
    #[schema(value_type = Option<UserId>)]
    user: Option<Cow<'a, str>>,
}

/// Submit a message
///
/// Begins the conversation if it does not exist. With `Accept: text/event-stream` the turn's events are the response; with `Prefer: wait=N` it
/// is the turn, once it has ended (also when it failed: read `state`), within N seconds; else it is where to look. Leaving early cancels nothing.
#[utoipa::path(post, path = "/v1/agents/{agent}/conversations/{conversation}/turns", tag = "turns",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path),
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "1 to 255 visible ASCII characters, remembered for 24 h: the same request again attaches to the same turn"),
        ("Prefer" = Option<String>, Header, description = "`wait=N`: wait up to N seconds, at most 60, for the turn to end", example = "wait=30")),
    request_body(content = NewTurn<'static>, example = json!({"message": {"text": "hello"}, "on_busy": "enqueue", "dry_run": false})),
    responses((status = 202, description = "Accepted: it will end in exactly one terminal event", body = TurnRef),
        (status = 200, description = "Its events, or with `Prefer: wait` the ended turn", content((TurnView = "application/json"), (StreamEvent = "text/event-stream")))))]
async fn submit_turn(
    State(gateway): State<Gateway>,
    may: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
    request: Request,
) -> Result<Response, Problem> {
    let received = Instant::now();
    let (parts, body) = request.into_parts();
    let limits = &gateway.host.config.limits;
    let answer = negotiate::answer(&parts.headers)?;
    let key = negotiate::idempotency_key(&parts.headers, limits.idempotency_key_bytes_max)?;
    let body = JsonBytes::read(&parts.headers, body, limits.request_body_bytes_max).await?;
    let new: NewTurn<'_> = body.parse(Code::MalformedRequest)?;
    let caller = may.acting_for(new.user.as_deref())?;
    let (message, attachments) = message::read(new.message, limits)?;
    let submission = Submission {
        message,
        attachments,
        sees_all: caller.scopes.include(Scopes::ADMIN),
        org: caller.org.clone(),
        user: caller.user.clone(),
        agent,
        session: Session::Conversation(conversation),
        dry_run: new.dry_run,
        on_busy: new.on_busy,
        key: keyed(key, &body),
    };

    match answer {
        Answer::Events => with_events(&gateway, &caller, submission).await,
        Answer::Json => {
            // A client that may not wait gets its 202 at once: waiting is a preference.
            let wait = negotiate::wait_s(&parts.headers).map(|seconds| seconds.min(limits.wait_ms_max / 1000));
            let wait = wait.and_then(|seconds| Some((seconds, gateway.readers.admit(&caller.org).ok()?)));
            match wait {
                Some((seconds, room)) => with_the_end(&gateway, &caller, submission, received, seconds, room).await,
                None => with_its_place(&gateway, &caller, submission).await,
            }
        }
    }
}

/// Submits and answers with the turn's events.
async fn with_events(gateway: &Gateway, caller: &Caller, submission: Submission) -> Result<Response, Problem> {
    // Before the message is accepted: a refusal here must leave nothing behind.
    let room = gateway.readers.admit(&caller.org)?;
    let submitted = submit(&gateway.host, submission).await?;
    let mut response = match room.of_turn(submitted.turn) {
        Ok(permit) => {
            let reader = Reader::of_submitted(&gateway.host, caller.org.clone(), &submitted);
            located(streamed(gateway, reader, permit), &turn_path(submitted.turn))
        }
        // A turn that was there before has as many readers as it may. The message is part of it, so this is no refusal.
        Err(_) => accepted(gateway, caller, &submitted).await?,
    };
    mark_replayed(&mut response, &submitted);
    Ok(response)
}

/// Submits and answers with the ended turn, if it has ended within `seconds` of `received`; else with its place.
async fn with_the_end(
    gateway: &Gateway,
    caller: &Caller,
    submission: Submission,
    received: Instant,
    seconds: u64,
    room: Permit,
) -> Result<Response, Problem> {
    let submitted = submit(&gateway.host, submission).await?;
    let ended = match room.of_turn(submitted.turn) {
        Ok(_room) => ended_by(gateway, caller, &submitted, received + Duration::from_secs(seconds)).await,
        // Only a turn that was there before has other readers.
        Err(_) => Waited::InVain,
    };
    let mut response = match ended {
        Waited::Ended(turn) => json(StatusCode::OK, &TurnView::from(*turn))?,
        Waited::Deleted => located(
            json(StatusCode::ACCEPTED, &TurnRef::new(submitted.turn, TurnState::Cancelled))?,
            &turn_path(submitted.turn),
        ),
        Waited::InVain => accepted(gateway, caller, &submitted).await?,
    };
    let applied = HeaderValue::from_str(&format!("wait={seconds}")).expect("a number");
    response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    mark_replayed(&mut response, &submitted);
    Ok(response)
}

/// Submits and answers with where the turn is.
async fn with_its_place(gateway: &Gateway, caller: &Caller, submission: Submission) -> Result<Response, Problem> {
    let submitted = submit(&gateway.host, submission).await?;
    let mut response = accepted(gateway, caller, &submitted).await?;
    mark_replayed(&mut response, &submitted);
    Ok(response)
}

/// The key with the SHA-256 of the raw body: another body is another request.
pub fn keyed(key: Option<&str>, body: &JsonBytes) -> Option<(String, [u8; 32])> {
    key.map(|key| (key.to_owned(), Sha256::digest(body.bytes()).into()))
}

/// 202: where the turn is.
pub async fn accepted(gateway: &Gateway, caller: &Caller, submitted: &Submitted) -> Result<Response, Problem> {
    let turn = submitted.turn;
    // A new turn's state is known; what an old key attaches to may be anywhere. The turn is accepted whatever the store says now.
    let found = if submitted.replayed { gateway.host.store.turn(&caller.org, turn).await.ok().flatten() } else { None };
    let state = found.and_then(|owned| owned.open(caller)).map_or(TurnState::Queued, |turn| turn.state);
    let place = TurnRef { joined: submitted.joined, ..TurnRef::new(turn, state) };
    Ok(located(json(StatusCode::ACCEPTED, &place)?, &turn_path(turn)))
}

/// Says that the key had begun the turn already.
pub fn mark_replayed(response: &mut Response, submitted: &Submitted) {
    if submitted.replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
}

fn turn_path(turn: TurnId) -> String {
    format!("/v1/turns/{turn}")
}

/// How waiting for a turn's end ended.
enum Waited {
    Ended(Box<TurnRecord>),
    /// It ended with its conversation, of which nothing is left.
    Deleted,
    InVain,
}

/// The turn, if it has ended before `until`. What goes wrong here is no failure of an accepted turn: the client is told where to look.
async fn ended_by(gateway: &Gateway, caller: &Caller, submitted: &Submitted, until: Instant) -> Waited {
    let mut reader = Reader::of_submitted(&gateway.host, caller.org.clone(), submitted);
    let terminal = async {
        loop {
            match reader.next().await {
                Ok(Some(event)) if event.id == EventId::End => return true,
                Ok(Some(_)) => {}
                Ok(None) => return false,
                Err(error) => {
                    let (org, turn) = (&caller.org, submitted.turn);
                    tracing::warn!(%org, %turn, %error, "waiting for a turn ends early: the store failed");
                    return false;
                }
            }
        }
    };
    if !tokio::time::timeout_at(until, terminal).await.unwrap_or(false) {
        return Waited::InVain;
    }
    match gateway.host.store.turn(&caller.org, submitted.turn).await {
        Ok(Some(owned)) => owned.open(caller).map_or(Waited::InVain, |turn| Waited::Ended(Box::new(turn))),
        Ok(None) => Waited::Deleted,
        Err(_) => Waited::InVain,
    }
}

/// What `reader` reads, as a response. The caller has been found to see its turn.
fn streamed(gateway: &Gateway, reader: Reader, permit: Permit) -> Response {
    sse::response(reader, permit, gateway.host.config.limits.ping_ms)
}

/// The caller's turn, or 404; and whether they began it.
pub async fn opened(gateway: &Gateway, caller: &Caller, turn: TurnId) -> Result<(TurnRecord, bool), Problem> {
    let found = gateway.host.store.turn(&caller.org, turn).await?.ok_or_else(|| Problem::not_found("turn"))?;
    let as_member = Caller { scopes: Scopes::TURNS, ..caller.clone() };
    let own = found.clone().open(&as_member).is_some();
    found.open(caller).map(|record| (record, own)).ok_or_else(|| Problem::not_found("turn"))
}

/// List a conversation's turns
///
/// Oldest first, or newest first with `direction=backward`; private turns that name the conversation too.
#[utoipa::path(get, path = "/v1/agents/{agent}/conversations/{conversation}/turns", tag = "turns",
    params(("agent" = AgentId, Path), ("conversation" = ConversationId, Path)),
    responses((status = 200, description = "A page", body = List<TurnView>)))]
async fn list_turns(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids((agent, conversation)): Ids<(AgentId, ConversationId)>,
    query: PageQuery,
) -> Result<Response, Problem> {
    json(StatusCode::OK, &conversations::turn_page(&gateway, &caller, &agent, &conversation, &query).await?)
}

/// Get a turn
#[utoipa::path(get, path = "/v1/turns/{turn}", tag = "turns", params(("turn" = TurnId, Path)),
    responses((status = 200, description = "The turn", body = TurnView)))]
async fn get_turn(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids(turn): Ids<TurnId>,
) -> Result<Response, Problem> {
    let (record, _) = opened(&gateway, &caller, turn).await?;
    json(StatusCode::OK, &TurnView::from(record))
}

/// Follow a turn
///
/// Server-sent events from the start, or after `Last-Event-ID`; a comment every 15 s. The stream ends after `turn.completed`, `turn.failed` or
/// `turn.cancelled`, whose id is `end`.
#[utoipa::path(get, path = "/v1/turns/{turn}/events", tag = "turns",
    params(("turn" = TurnId, Path), ("Last-Event-ID" = Option<String>, Header, pattern = "^((0|[1-9][0-9]{0,8})\\.(0|[1-9][0-9]{0,8})|end)?$", description = "The `id` of the last event that was seen", example = "1.4")),
    responses((status = 200, description = "Its events", content_type = "text/event-stream", body = StreamEvent),
        (status = 204, description = "`Last-Event-ID` was `end`: there is nothing more")),
    security(("api_key" = []), ("stream_ticket" = [])))]
async fn stream_events(
    State(gateway): State<Gateway>,
    caller: Follower,
    request: Request,
) -> Result<Response, Problem> {
    negotiate::accepts_events(request.headers())?;
    let after = negotiate::last_event_id(request.headers())?;
    let turn = caller.turn;
    let (record, _) = opened(&gateway, &caller, turn).await?;
    if caller.with_ticket && ticket::outlived(&gateway, &record) {
        return Err(AuthError::Unauthenticated.into());
    }
    if after == Some(EventId::End) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let permit = gateway.readers.admit(&caller.org)?.of_turn(turn)?;
    let mut response = streamed(&gateway, Reader::new(&gateway.host, caller.org.clone(), turn, after), permit);
    if caller.with_ticket {
        ticket::keep_secret(&mut response);
    }
    Ok(response)
}

/// Cancel a turn
///
/// The state that it has then: a turn that has ended stays as it is.
#[utoipa::path(post, path = "/v1/turns/{turn}/cancel", tag = "turns", params(("turn" = TurnId, Path)),
    responses((status = 200, description = "Its state", body = TurnRef)))]
async fn cancel_turn(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids(turn): Ids<TurnId>,
) -> Result<Response, Problem> {
    let (_, own) = opened(&gateway, &caller, turn).await?;
    let by = if own { CancelledBy::User } else { CancelledBy::Admin };
    if !own {
        let act = Act::new(Verb::TurnCancel, format!("turn/{turn}"), serde_json::json!({}));
        let host = &gateway.host;
        host.store.record_act(Some(&caller.org), &act, host.clock.now(), &caller.actor()).await?;
    }
    let state = gateway.host.cancel(&caller.org, turn, by).await?.ok_or_else(|| Problem::not_found("turn"))?;
    json(StatusCode::OK, &TurnRef::new(turn, state))
}
