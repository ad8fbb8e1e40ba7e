//! Which web pages may call: those of the configured origins, and none else. Where none is configured, browsers are told nothing.
//!
//! No cookie is read here, so that no page rides on a visitor's session: a page has to have a key. Credentials in CORS' sense are never allowed.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::auth::ORG;
use super::negotiate::{IDEMPOTENCY_KEY, IDEMPOTENT_REPLAYED, LAST_EVENT_ID, PREFER, PREFERENCE_APPLIED};
use super::observe::{KEY_EXPIRES_AT, REQUEST_ID};

/// How long a browser may remember a preflight's answer.
const PREFLIGHT_MAX_AGE: Duration = Duration::from_secs(600);

/// The layer for these origins; `None` where there are none.
pub fn layer(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins: Vec<HeaderValue> =
        origins.iter().map(|origin| origin.parse().expect("checked with the configuration")).collect();
    let asked: [HeaderName; 8] = [
        header::AUTHORIZATION,
        header::CONTENT_TYPE,
        header::ACCEPT,
        IDEMPOTENCY_KEY,
        PREFER,
        LAST_EVENT_ID,
        REQUEST_ID,
        ORG,
    ];
    let told =
        [header::LOCATION, header::RETRY_AFTER, IDEMPOTENT_REPLAYED, PREFERENCE_APPLIED, REQUEST_ID, KEY_EXPIRES_AT];
    Some(
        CorsLayer::new()
            .allow_origin(AllowOrigin::list(origins))
            .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
            .allow_headers(asked)
            .expose_headers(told)
            .max_age(PREFLIGHT_MAX_AGE),
    )
}
