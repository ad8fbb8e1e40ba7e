//! `/v1/limits` and `/v1/agents/{agent}/limits`: what the caller's org and its agents may and what they have used of it. Nothing here changes a limit: an org's are
//! the operator's, on the command line, and an agent's are in its settings.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Converse, May, SeeAgents};
use super::params::Ids;
use super::problem::Problem;
use super::views::json;
use crate::ids::AgentId;
use crate::quota::{AgentStanding, Standing};

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(get_limits)).routes(routes!(get_agent_limits))
}

/// Get the org's limits
///
/// And what it has used of them, over all hosts together. A message that is over one is refused with 429 and says which; only the operator of the host
/// changes them.
#[utoipa::path(get, path = "/v1/limits", tag = "limits",
    responses((status = 200, description = "The limits and what is used of them", body = Standing)))]
async fn get_limits(State(gateway): State<Gateway>, caller: May<Converse>) -> Result<Response, Problem> {
    let host = &gateway.host;
    let org = host.store.org_use(&caller.org, host.clock.now()).await?.ok_or_else(|| Problem::not_found("org"))?;
    json(StatusCode::OK, &Standing::of(&org, &host.config.limits))
}

/// Get an agent's limits
///
/// Those of its own settings, within its org's, and what it has used of them, over all hosts together. Nothing is counted of an agent without limits of its own.
#[utoipa::path(get, path = "/v1/agents/{agent}/limits", tag = "limits", params(("agent" = AgentId, Path)),
    responses((status = 200, description = "The limits and what is used of them", body = AgentStanding)))]
async fn get_agent_limits(
    State(gateway): State<Gateway>,
    caller: May<SeeAgents>,
    Ids(agent): Ids<AgentId>,
) -> Result<Response, Problem> {
    let store = &gateway.host.store;
    let found = store.agent(&caller.org, &agent).await?.ok_or_else(|| Problem::not_found("agent"))?;
    let used = store.agent_use(&caller.org, &agent, gateway.host.clock.now()).await?;
    json(StatusCode::OK, &AgentStanding::of(&found.settings.limits.own(), used.as_ref()))
}
