//! `/v1/audit`: who did what to which resource, for the org's admins.

use axum::extract::{FromRequestParts, Query, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use super::Gateway;
use super::auth::{Administer, May};
use super::page::{List, bad_query, checked_limit, decode, encode, invalid_cursor};
use super::problem::{Code, Problem};
use super::views::json;
use crate::audit::{AuditEntry, AuditFilter, AuditPlace, Verb};
use crate::clock::Timestamp;
use crate::ids::OrgId;

/// What a cursor of this list begins with.
const CURSOR: char = 'u';

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(list_audit))
}

/// An act: who did what to which resource.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = AuditEntry)]
struct AuditView {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// Its own.
    id: Uuid,
    /// The authenticated user; `operator` for the command line.
    actor: String,
    /// By what: `key:<id>`, a token's subject, `command line`, `host`.
    credential: String,
    /// `x-request-id` of the request in which; null for the command line.
    request_id: Option<String>,
    /// What.
    #[schema(example = "agent.pin")]
    verb: String,
    /// To which resource.
    #[schema(example = "agent/support")]
    resource: String,
    /// What belongs to the verb. No secret, and nothing that was said.
    #[schema(value_type = Object)]
    detail: serde_json::Value,
}

impl From<AuditEntry> for AuditView {
    fn from(entry: AuditEntry) -> AuditView {
        AuditView {
            at: entry.at,
            id: entry.id,
            actor: entry.actor,
            credential: entry.credential,
            request_id: entry.request_id,
            verb: entry.verb,
            resource: entry.resource,
            detail: entry.detail,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQuery {
    limit: Option<u32>,
    after: Option<String>,
    actor: Option<String>,
    verb: Option<String>,
    resource: Option<String>,
    since: Option<String>,
    until: Option<String>,
}

/// Which stretch of the audit is wanted.
#[derive(Debug)]
struct AuditQuery {
    limit: usize,
    filter: AuditFilter,
    since: Timestamp,
    before: Option<AuditPlace>,
    /// Of which org's list its cursor says that it is.
    cursor_of: Option<String>,
}

impl FromRequestParts<Gateway> for AuditQuery {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<AuditQuery, Problem> {
        let query = Query::<RawQuery>::try_from_uri(&parts.uri).map_err(|error| bad_query(&error))?;
        AuditQuery::check(query.0, gateway.host.config.limits.page_items_max)
    }
}

impl AuditQuery {
    fn check(query: RawQuery, items_max: usize) -> Result<AuditQuery, Problem> {
        let malformed = |text: &'static str| Problem::new(Code::MalformedRequest, text);
        let time = |text: Option<String>, name: &str| match text {
            None => Ok(None),
            Some(text) => Timestamp::parse(&text).map(Some).ok_or_else(|| {
                let detail = format!("{name} must be a time of RFC 3339: 2026-11-23T17:03:12Z");
                Problem::new(Code::MalformedRequest, detail)
            }),
        };
        let filter = match (query.actor, query.verb, query.resource) {
            (None, None, None) => AuditFilter::All,
            (Some(actor), None, None) => AuditFilter::Actor(bounded(actor)?),
            (None, None, Some(resource)) => AuditFilter::Resource(bounded(resource)?),
            (None, Some(verb), None) => {
                let known = Verb::ALL.iter().map(|verb| verb.as_str()).collect::<Vec<_>>();
                AuditFilter::Verb(Verb::parse(&verb).ok_or_else(|| {
                    Problem::new(Code::MalformedRequest, format!("verb must be one of {}", known.join(", ")))
                })?)
            }
            _ => return Err(malformed("name one of `actor`, `verb` and `resource`; `since` and `until` go with each")),
        };
        let (before, cursor_of) = match (query.after, time(query.until, "until")?) {
            (Some(cursor), _) => {
                let (place, of) = place(&cursor).ok_or_else(invalid_cursor)?;
                (Some(place), Some(of))
            }
            (None, until) => (until.map(AuditPlace::until), None),
        };
        let since = time(query.since, "since")?.unwrap_or(Timestamp(0));
        Ok(AuditQuery { limit: checked_limit(query.limit, items_max)?, filter, since, before, cursor_of })
    }
}

/// A name to look for. None that is stored is longer.
fn bounded(name: String) -> Result<String, Problem> {
    if (1..=320).contains(&name.len()) {
        return Ok(name);
    }
    Err(Problem::new(Code::MalformedRequest, "`actor` and `resource` have 1 to 320 bytes"))
}

/// A cursor's place, and which org it is of.
fn place(cursor: &str) -> Option<(AuditPlace, String)> {
    let text = decode(CURSOR, cursor)?;
    let mut parts = text.splitn(3, '.');
    let (at, id, of) = (parts.next()?, parts.next()?, parts.next()?);
    Some((AuditPlace { at: Timestamp(at.parse().ok()?), id: id.parse().ok()? }, of.to_owned()))
}

/// What a cursor says of its org: a place is a time, and would lead into any org's list.
fn tag(org: &OrgId) -> String {
    crate::erase::name_hash(org)[..16].to_owned()
}

/// List what was done
///
/// Newest first: what deploys, keys, defaults, limits, deletions and exports did to the org, and who did it, by which credential and in which request.
/// It cannot be changed. For the scope `admin`.
#[utoipa::path(get, path = "/v1/audit", tag = "audit",
    params(("actor" = Option<String>, Query, min_length = 1, max_length = 320, description = "Only what this user did. One of `actor`, `verb` and `resource` at a time."),
        ("verb" = inline(Option<Verb>), Query, description = "Only this."),
        ("resource" = Option<String>, Query, min_length = 1, max_length = 320, description = "Only what was done to this.", example = "agent/support"),
        ("since" = Option<String>, Query, format = DateTime, description = "Not what was done before; RFC 3339."),
        ("until" = Option<String>, Query, format = DateTime, description = "Not what was done after; RFC 3339. A page's `next` says it for the pages behind it.")),
    responses((status = 200, description = "A page", body = List<AuditView>)))]
async fn list_audit(
    State(gateway): State<Gateway>,
    caller: May<Administer>,
    query: AuditQuery,
) -> Result<Response, Problem> {
    let AuditQuery { limit, filter, since, before, cursor_of } = query;
    let tag = tag(&caller.org);
    if cursor_of.is_some_and(|of| of != tag) {
        return Err(invalid_cursor());
    }
    let page = gateway.host.store.audit(Some(&caller.org), &filter, since, before, limit).await?;
    let last = page.items.last().filter(|_| page.more);
    let next = last.map(|last| encode(CURSOR, format_args!("{}.{}.{tag}", last.at.0, last.id.simple())));
    json(StatusCode::OK, &List { items: page.items.into_iter().map(AuditView::from).collect(), next })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(uri: &str) -> Result<AuditQuery, Problem> {
        let uri: axum::http::Uri = uri.parse().unwrap();
        let raw = Query::<RawQuery>::try_from_uri(&uri).map_err(|error| bad_query(&error))?;
        AuditQuery::check(raw.0, 100)
    }

    #[test]
    fn one_filter_at_a_time_and_any_stretch_of_time() {
        let query = parse("/?verb=agent.pin&since=2026-11-23T17:03:12Z&until=2026-11-24T00:00:00.5Z&limit=7").unwrap();
        assert_eq!((query.filter, query.limit), (AuditFilter::Verb(Verb::AgentPin), 7));
        assert_eq!(query.since.rfc3339(), "2026-11-23T17:03:12.000Z");
        assert_eq!(query.before.unwrap().at.rfc3339(), "2026-11-24T00:00:00.500Z");
        for bad in ["/?verb=agent.pin&actor=ann", "/?verb=nonsense", "/?since=yesterday", "/?limit=0", "/?resource="] {
            assert_eq!(parse(bad).unwrap_err().code(), Code::MalformedRequest, "{bad}");
        }
        assert_eq!(parse("/?user=ann").unwrap_err().code(), Code::UnknownField, "nobody reads it for somebody else");
    }

    #[test]
    fn a_cursor_is_a_place_and_only_of_this_list() {
        let id = Uuid::from_u128(7);
        let cursor = encode(CURSOR, format_args!("12.{}.abc", id.simple()));
        let query = parse(&format!("/?after={cursor}")).unwrap();
        assert_eq!(query.before, Some(AuditPlace { at: Timestamp(12), id }));
        assert_eq!(query.cursor_of.as_deref(), Some("abc"));
        for bad in [encode('a', "12.x"), encode(CURSOR, "12"), encode(CURSOR, "x.y.z"), "!!".to_owned()] {
            assert_eq!(parse(&format!("/?after={bad}")).unwrap_err().code(), Code::InvalidCursor, "{bad}");
        }
    }
}
