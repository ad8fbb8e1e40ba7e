//! Ids from a path, each checked before a handler sees it (O4).

use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;

use super::problem::{Code, Problem};
use crate::attachment::AttachmentId;
use crate::ids::{AgentId, ConversationId, InvalidId, TurnId, UserId, WorkerName};

/// The ids of a path.
#[derive(Debug)]
pub struct Ids<T>(pub T);

/// What a path can hold.
pub trait FromPath: Sized {
    /// From the named parameters.
    fn from_path(params: &RawPathParams) -> Result<Self, Problem>;
}

impl<S: Send + Sync, T: FromPath + Send> FromRequestParts<S> for Ids<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Ids<T>, Problem> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|_| Problem::new(Code::InvalidId, "the path is not UTF-8"))?;
        T::from_path(&params).map(Ids)
    }
}

fn param<T: std::str::FromStr<Err = InvalidId>>(params: &RawPathParams, name: &str) -> Result<T, Problem> {
    let (_, text) = params.iter().find(|(key, _)| *key == name).expect("the route has this parameter");
    text.parse::<T>().map_err(Problem::from)
}

impl FromPath for AgentId {
    fn from_path(params: &RawPathParams) -> Result<Self, Problem> {
        param(params, "agent")
    }
}

impl FromPath for WorkerName {
    fn from_path(params: &RawPathParams) -> Result<Self, Problem> {
        param(params, "worker")
    }
}

impl FromPath for AttachmentId {
    fn from_path(params: &RawPathParams) -> Result<Self, Problem> {
        param(params, "attachment")
    }
}

impl FromPath for UserId {
    fn from_path(params: &RawPathParams) -> Result<Self, Problem> {
        param(params, "user")
    }
}

impl FromPath for TurnId {
    fn from_path(params: &RawPathParams) -> Result<Self, Problem> {
        param(params, "turn")
    }
}

impl FromPath for (AgentId, ConversationId) {
    fn from_path(params: &RawPathParams) -> Result<Self, Problem> {
        Ok((param(params, "agent")?, param(params, "conversation")?))
    }
}
