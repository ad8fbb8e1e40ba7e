//! `/healthz`, `/readyz`, `/openapi.json`: for probes and generators, without a key.

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::problem::{Code, Problem};
use super::views::json;
use super::{Gateway, openapi};

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(healthz)).routes(routes!(readyz)).routes(routes!(openapi_json))
}

/// How the host is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok` or `ready`.
    status: &'static str,
}

/// Whether the process answers
#[utoipa::path(get, path = "/healthz", tag = "health", security(()), responses((status = 200, description = "It does", body = Health)))]
async fn healthz() -> Result<Response, Problem> {
    json(StatusCode::OK, &Health { status: "ok" })
}

/// Whether this host takes new turns
///
/// Not while it drains, nor without its database.
#[utoipa::path(get, path = "/readyz", tag = "health", security(()), responses((status = 200, description = "It does", body = Health)))]
async fn readyz(State(gateway): State<Gateway>) -> Result<Response, Problem> {
    if gateway.host.draining() {
        return Err(Problem::new(Code::Draining, "this host is stopping and takes no new turns"));
    }
    match gateway.host.ready().await {
        Ok(()) => json(StatusCode::OK, &Health { status: "ready" }),
        // The reason may name files and addresses, and anybody may ask: it goes to the log.
        Err(why) => {
            Err(Problem::new(Code::StoreUnavailable, "this host cannot run turns now; its log says why").caused_by(why))
        }
    }
}

/// This document
#[utoipa::path(get, path = "/openapi.json", tag = "health", security(()), responses((status = 200, description = "OpenAPI 3.1", body = Object)))]
async fn openapi_json() -> Response {
    let headers = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
    (headers, openapi::json()).into_response()
}
