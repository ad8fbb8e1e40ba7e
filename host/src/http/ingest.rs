//! `POST /v1/ingest`: platform adapters hand in envelopes with whatever they have. What is missing stays missing: the gate decides.

use std::borrow::Cow;

use axum::extract::{Request, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::auth::{Ingest, May};
use super::body::JsonBytes;
use super::problem::{Code, Problem};
use super::turns::{accepted, keyed, mark_replayed};
use super::views::TurnRef;
use super::{Gateway, message, negotiate};
use crate::admission::OnBusy;
use crate::caller::Scopes;
use crate::content::Content;
use crate::gate::SessionMode;
use crate::ids::{AgentId, ConversationId, InvalidId, OrgId, RunId, UserId};
use crate::submit::{Session, Submission, submit};

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(ingest))
}

/// What an adapter has.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewEnvelope)]
struct NewEnvelope<'a> {
    /// What lets the turn write its conversation's snapshot. Without one the turn is private.
    #[schema(value_type = Option<RunId>)]
    run_id: Option<Cow<'a, str>>,
    /// The org, as the adapter knows it; must be the key's where it is there.
    #[schema(value_type = Option<OrgId>)]
    org: Option<Cow<'a, str>>,
    /// The conversation.
    #[schema(value_type = Option<ConversationId>)]
    conversation: Option<Cow<'a, str>>,
    /// The agent.
    #[schema(value_type = AgentId)]
    agent: Cow<'a, str>,
    /// The agent's, when absent.
    mode: Option<SessionMode>,
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
    #[schema(value_type = Option<UserId>)]
    user: Option<Cow<'a, str>>,
}

fn optional<T: std::str::FromStr<Err = InvalidId>>(text: Option<&str>) -> Result<Option<T>, Problem> {
    text.map(str::parse).transpose().map_err(Problem::from)
}

/// Hand in an envelope
///
/// An envelope that names a run must name its org and its conversation, or the gate refuses it: it goes back with back-off and ends as
/// `gate_refused`.
#[utoipa::path(post, path = "/v1/ingest", tag = "ingest",
    params(("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255, pattern = "^[!-~]+$", description = "As for a conversation's turns; needs a `conversation`")),
    request_body(content = NewEnvelope<'static>, example = json!({"agent": "support", "conversation": "c-42", "message": {"text": "hello"}})),
    responses((status = 202, description = "Accepted: it will end in exactly one terminal event", body = TurnRef)))]
async fn ingest(State(gateway): State<Gateway>, may: May<Ingest>, request: Request) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let limits = &gateway.host.config.limits;
    let key = negotiate::idempotency_key(&parts.headers, limits.idempotency_key_bytes_max)?;
    let body = JsonBytes::read(&parts.headers, body, limits.request_body_bytes_max).await?;
    let new: NewEnvelope<'_> = body.parse(Code::MalformedRequest)?;
    let caller = may.acting_for(new.user.as_deref())?;
    let org: Option<OrgId> = optional(new.org.as_deref())?;
    if org.as_ref().is_some_and(|org| *org != caller.org) {
        return Err(Problem::new(Code::OrgMismatch, "the envelope's org is not the key's; use a key of that org"));
    }
    let conversation: Option<ConversationId> = optional(new.conversation.as_deref())?;
    if key.is_some() && conversation.is_none() {
        let detail = "a key belongs to a conversation; name one in the envelope, or leave out the Idempotency-Key";
        return Err(Problem::new(Code::InvalidIdempotencyKey, detail));
    }
    if new.on_busy == OnBusy::Collect {
        let detail = "an envelope is a run of its own and joins no other: send `on_busy` enqueue, reject or interrupt";
        return Err(Problem::new(Code::MalformedRequest, detail));
    }
    let (message, attachments) = message::read(new.message, limits)?;
    let submission = Submission {
        message,
        attachments,
        sees_all: caller.scopes.include(Scopes::ADMIN),
        agent: AgentId::parse(&new.agent)?,
        session: Session::Envelope { run_id: optional(new.run_id.as_deref())?, org, conversation, mode: new.mode },
        org: caller.org.clone(),
        user: caller.user.clone(),
        dry_run: new.dry_run,
        on_busy: new.on_busy,
        key: keyed(key, &body),
    };
    let submitted = submit(&gateway.host, submission).await?;
    let mut response = accepted(&gateway, &caller, &submitted).await?;
    mark_replayed(&mut response, &submitted);
    Ok(response)
}
