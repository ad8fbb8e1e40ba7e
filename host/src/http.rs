//! The gateway: an axum edge that parses what comes in, asks the host, and says how it went.
//!
//! Statuses, headers and problem bodies live here and nowhere below; no wasmtime and no SQL is seen here. One file a kind of resource
//! (`workers`, `agents`, `conversations`, `turns`, `ticket`, `attachments`, `ingest`, `members`, `limits`), each with its routes and their
//! documentation; what they share stands beside
//! them (`auth`, `params`, `page`, `body`, `negotiate`, `problem`, `sse`). `observe` is around them all. [`serve`] drives connections.

use std::ops::Deref;
use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse as _;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use utoipa_axum::router::OpenApiRouter;

use crate::host::Host;

mod serve;

mod observe;

mod unread;

mod cors;

mod auth;

mod params;

mod page;

mod body;

mod negotiate;

pub mod problem;

mod message;

mod readers;

mod sse;

mod views;

mod workers;

mod agents;

mod conversations;

mod turns;

mod ticket;

mod ingest;

mod attachments;

mod audit;

mod limits;

mod members;

mod export;

mod health;

pub mod openapi;

mod under_way;

#[cfg(test)]
mod tests;

pub use auth::Peer;
pub use serve::{Tls, serve, serve_on};

use problem::{Code, Problem};
use under_way::UnderWay;

/// What every route is given. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Gateway(Arc<Shared>);

pub(crate) struct Shared {
    host: Host,
    readers: Arc<readers::Readers>,
    module_uploads: workers::Uploads,
    attachment_uploads: Arc<UnderWay>,
    exports: export::Exports,
    metrics: observe::RouteMetrics,
}

impl Deref for Gateway {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Gateway {
    fn new(host: Host) -> Gateway {
        let limits = &host.config.limits;
        Gateway(Arc::new(Shared {
            readers: readers::Readers::new(limits),
            module_uploads: workers::Uploads::new(limits),
            attachment_uploads: attachments::uploads(),
            exports: export::Exports::default(),
            metrics: observe::RouteMetrics::default(),
            host,
        }))
    }

    fn router(&self) -> Router {
        let (routes, _document) = routes().split_for_parts();
        let routes = routes
            .fallback(async || Problem::new(Code::NotFound, "there is no such route; /openapi.json lists them"))
            .method_not_allowed_fallback(async || {
                Problem::new(Code::MethodNotAllowed, "this route has other methods; the Allow header lists them")
            });
        // A preflight has no key and is no route's.
        let routes = match cors::layer(&self.host.config.cors_origins) {
            Some(cors) => routes.layer(cors),
            None => routes,
        };
        routes.layer(axum::middleware::from_fn_with_state(self.clone(), observe::observe)).with_state(self.clone())
    }
}

/// Every route of the gateway, with its documentation.
fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .merge(health::routes())
        .merge(workers::routes())
        .merge(agents::routes())
        .merge(conversations::routes())
        .merge(turns::routes())
        .merge(ticket::routes())
        .merge(attachments::routes())
        .merge(ingest::routes())
        .merge(audit::routes())
        .merge(limits::routes())
        .merge(members::routes())
        .merge(export::routes())
}

/// The gateway's routes over `host`. [`serve`] is this with connections; alone, it is for tests and for embedding.
pub fn router(host: Host) -> Router {
    Gateway::new(host).router()
}

/// `GET /metrics`, for a listener of its own: the figures count tenants.
pub fn metrics_router(handle: PrometheusHandle) -> Router {
    let render = async move || {
        let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        ([(header::CONTENT_TYPE, text)], handle.render()).into_response()
    };
    Router::new().route("/metrics", get(render))
}
