//! `/v1/limits`: what the caller's org may and what it has used of it. Nothing here changes a limit: that is the operator's, on the command line.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Converse, May};
use super::problem::Problem;
use super::views::json;
use crate::quota::Standing;

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(get_limits))
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
