//! Pages of lists: `?limit=&after=`, and the opaque cursors that lead from one to the next. Pure but for its extractor.
//!
//! A cursor names the list that it came from, so that one list's cursor is refused by another.

use axum::extract::FromRequestParts;
use axum::extract::rejection::QueryRejection;
use axum::http::request::Parts;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::Gateway;
use super::body::unknown_field;
use super::problem::{Code, Problem};
use crate::store::Direction;

/// A stretch of a list.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub struct List<T> {
    /// In the list's order.
    pub items: Vec<T>,
    /// Send it as `after` to get what follows; null at the end.
    pub next: Option<String>,
}

impl<T> List<T> {
    /// Everything at once.
    pub fn whole(items: Vec<T>) -> List<T> {
        List { items, next: None }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawQuery {
    limit: Option<u32>,
    after: Option<String>,
    direction: Option<RawDirection>,
    // Read by the extractor of callers.
    #[serde(rename = "user")]
    _user: Option<String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawDirection {
    Forward,
    Backward,
}

/// Which stretch of a list is wanted.
#[derive(Debug)]
pub struct PageQuery {
    /// How many items at most.
    pub limit: usize,
    after: Option<String>,
    direction: Option<Direction>,
}

impl FromRequestParts<Gateway> for PageQuery {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<PageQuery, Problem> {
        let query = axum::extract::Query::<RawQuery>::try_from_uri(&parts.uri).map_err(|error| bad_query(&error))?;
        PageQuery::check(query.0, gateway.host.config.limits.page_items_max)
    }
}

/// What is wrong with a query.
pub fn bad_query(error: &QueryRejection) -> Problem {
    let text = error.body_text();
    unknown_field(&text).unwrap_or_else(|| Problem::new(Code::MalformedRequest, text))
}

/// How many items a page has at most.
pub fn checked_limit(limit: Option<u32>, items_max: usize) -> Result<usize, Problem> {
    let limit = limit.map_or(items_max.min(50), |limit| limit as usize);
    if !(1..=items_max).contains(&limit) {
        return Err(Problem::new(Code::MalformedRequest, format!("limit must be 1 to {items_max}")));
    }
    Ok(limit)
}

impl PageQuery {
    fn check(query: RawQuery, items_max: usize) -> Result<PageQuery, Problem> {
        let limit = checked_limit(query.limit, items_max)?;
        let direction = query.direction.map(|direction| match direction {
            RawDirection::Forward => Direction::Forward,
            RawDirection::Backward => Direction::Backward,
        });
        Ok(PageQuery { limit, after: query.after, direction })
    }

    fn undirected(&self) -> Result<(), Problem> {
        match self.direction {
            None => Ok(()),
            Some(_) => Err(Problem::new(Code::UnknownField, "this list has one order; leave out `direction`")
                .with("field", "direction")),
        }
    }

    /// After which name of the list `kind` it begins.
    pub fn after_name<T: std::str::FromStr>(&self, kind: char) -> Result<Option<T>, Problem> {
        self.undirected()?;
        let Some(cursor) = &self.after else { return Ok(None) };
        decode(kind, cursor).and_then(|name| name.parse().ok()).map(Some).ok_or_else(invalid_cursor)
    }

    /// After which place of the list `kind` it begins, and which way it goes. The cursor knows its way; `direction` is for the first page.
    pub fn after_place(&self, kind: char) -> Result<(Option<i64>, Direction), Problem> {
        let Some(cursor) = &self.after else {
            return Ok((None, self.direction.unwrap_or(Direction::Forward)));
        };
        let text = decode(kind, cursor).ok_or_else(invalid_cursor)?;
        let (direction, place) = match text.split_at_checked(1) {
            Some(("f", place)) => (Direction::Forward, place),
            Some(("b", place)) => (Direction::Backward, place),
            _ => return Err(invalid_cursor()),
        };
        if self.direction.is_some_and(|asked| asked != direction) {
            return Err(Problem::new(Code::InvalidCursor, "the cursor goes the other way; leave out `direction`"));
        }
        Ok((Some(place.parse().map_err(|_| invalid_cursor())?), direction))
    }
}

/// What is no cursor of this list.
pub fn invalid_cursor() -> Problem {
    Problem::new(
        Code::InvalidCursor,
        "`after` is not a cursor of this list; send `next` as it came, or none to start anew",
    )
}

/// A cursor after a name.
pub fn name_cursor(kind: char, name: impl std::fmt::Display) -> String {
    encode(kind, name)
}

/// A cursor of the list `kind`.
pub fn encode(kind: char, place: impl std::fmt::Display) -> String {
    URL_SAFE_NO_PAD.encode(format!("{kind}:{place}"))
}

/// A cursor from a place, in a direction.
pub fn place_cursor(kind: char, direction: Direction, place: i64) -> String {
    let way = if direction == Direction::Forward { 'f' } else { 'b' };
    encode(kind, format_args!("{way}{place}"))
}

/// What a cursor of the list `kind` says.
pub fn decode(kind: char, cursor: &str) -> Option<String> {
    // An id has at most 128 bytes: what is longer is no cursor of ours.
    if cursor.len() > 200 {
        return None;
    }
    let text = String::from_utf8(URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()?;
    text.strip_prefix(kind)?.strip_prefix(':').map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::AgentId;

    fn query(after: &str) -> PageQuery {
        PageQuery { limit: 10, after: Some(after.to_owned()), direction: None }
    }

    #[test]
    fn a_cursor_comes_back_and_only_to_its_list() {
        let agent = AgentId::parse("support").unwrap();
        let cursor = name_cursor('a', &agent);
        assert_eq!(query(&cursor).after_name::<AgentId>('a').unwrap(), Some(agent));
        for bad in [cursor.as_str(), "", "x", "!!", &"A".repeat(300), &name_cursor('a', "../etc")] {
            let code = query(bad).after_name::<AgentId>(if bad == cursor { 'w' } else { 'a' }).unwrap_err().code();
            assert_eq!(code, Code::InvalidCursor, "{bad}");
        }
    }

    #[test]
    fn a_place_cursor_knows_its_way() {
        for direction in [Direction::Forward, Direction::Backward] {
            let cursor = place_cursor('m', direction, 42);
            assert_eq!(query(&cursor).after_place('m').unwrap(), (Some(42), direction));
        }
        let other =
            PageQuery { direction: Some(Direction::Forward), ..query(&place_cursor('m', Direction::Backward, 1)) };
        assert_eq!(other.after_place('m').unwrap_err().code(), Code::InvalidCursor);
        assert_eq!(query(&name_cursor('m', "x1")).after_place('m').unwrap_err().code(), Code::InvalidCursor);
        assert_eq!(query(&name_cursor('m', "")).after_place('m').unwrap_err().code(), Code::InvalidCursor);
    }

    #[test]
    fn a_limit_has_bounds_and_unknown_parameters_are_named() {
        let parse = |uri: &'static str| {
            let uri = axum::http::Uri::from_static(uri);
            let raw = axum::extract::Query::<RawQuery>::try_from_uri(&uri).map_err(|e| bad_query(&e))?;
            PageQuery::check(raw.0, 100)
        };
        assert_eq!(parse("/?limit=100").unwrap().limit, 100);
        assert_eq!(parse("/?user=ann").unwrap().limit, 50);
        for bad in ["/?limit=0", "/?limit=101", "/?limit=x", "/?limit=-1", "/?direction=up"] {
            assert_eq!(parse(bad).unwrap_err().code(), Code::MalformedRequest, "{bad}");
        }
        assert_eq!(parse("/?limti=5").unwrap_err().code(), Code::UnknownField);
    }
}
