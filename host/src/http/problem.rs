//! What a client is told when it does not get what it asked for: RFC 9457 problems with a stable code.
//!
//! HTTP statuses live here and nowhere below `http/`. A handler returns a [`Problem`]; `observe` renders it, because only there the
//! request's id is known, and writes its cause to the log, once.

use std::borrow::Cow;
use std::fmt;

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::ser::SerializeMap as _;

mod causes;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $status:literal $text:literal;)*) => {
        /// Why a request was refused. Stable.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, utoipa::ToSchema)]
        #[serde(rename_all = "snake_case")]
        #[schema(as = ProblemCode)]
        pub enum Code {
            $($(#[$doc])* $variant,)*
        }

        impl Code {
            /// Every code.
            pub const ALL: &[Code] = &[$(Code::$variant,)*];

            /// As sent.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// The status that it is sent with.
            pub fn status(self) -> StatusCode {
                StatusCode::from_u16(match self { $(Code::$variant => $status,)* }).expect("the table has statuses")
            }
        }
    };
}

codes! {
    /// Not what the route reads: JSON, UTF-8, a query.
    MalformedRequest = 400 "malformed_request";
    /// A field that the route does not know.
    UnknownField = 400 "unknown_field";
    /// It does not say for which of the user's orgs it is.
    OrgRequired = 400 "org_required";
    /// An id has characters or a length that ids have not.
    InvalidId = 400 "invalid_id";
    /// The message is empty, too large or no message.
    InvalidMessage = 400 "invalid_message";
    /// A setting is out of bounds.
    InvalidSetting = 400 "invalid_setting";
    /// A cursor or `Last-Event-ID` that this host did not give.
    InvalidCursor = 400 "invalid_cursor";
    /// Not 1 to 255 visible ASCII characters.
    InvalidIdempotencyKey = 400 "invalid_idempotency_key";
    /// No key, or none that works.
    Unauthenticated = 401 "unauthenticated";
    /// The key may not do this.
    ScopeMissing = 403 "scope_missing";
    /// Owners are an owner's to change.
    OwnerRequired = 403 "owner_required";
    /// The envelope names an org that is not the key's.
    OrgMismatch = 403 "org_mismatch";
    /// It does not exist, or is not the caller's.
    NotFound = 404 "not_found";
    /// No agent was named and the org has no default.
    NoDefaultAgent = 404 "no_default_agent";
    /// The user is a member of no org.
    NoOrg = 404 "no_org";
    /// The route exists, not with this method.
    MethodNotAllowed = 405 "method_not_allowed";
    /// None of the accepted media types can be sent.
    NotAcceptable = 406 "not_acceptable";
    /// `on_busy: reject`, and a turn is live.
    ConversationBusy = 409 "conversation_busy";
    /// An agent runs this worker.
    WorkerInUse = 409 "worker_in_use";
    /// The agent still has conversations.
    AgentInUse = 409 "agent_in_use";
    /// The agent cannot run turns yet.
    AgentNotReady = 409 "agent_not_ready";
    /// An org keeps an owner.
    LastOwner = 409 "last_owner";
    /// The turn ended too long ago for a ticket.
    TurnEnded = 409 "turn_ended";
    /// The request is over `request_body_bytes_max`.
    BodyTooLarge = 413 "body_too_large";
    /// The attachment is over `attachment_bytes_max`.
    AttachmentTooLarge = 413 "attachment_too_large";
    /// The module is over `module_bytes_max`.
    ModuleTooLarge = 413 "module_too_large";
    /// Path and query are over `url_bytes_max`.
    UriTooLong = 414 "uri_too_long";
    /// The body is not of the type that the route reads.
    UnsupportedMediaType = 415 "unsupported_media_type";
    /// The key was used with another body.
    IdempotencyMismatch = 422 "idempotency_mismatch";
    /// The message refers to an attachment that is not there, or not the caller's to use.
    AttachmentNotFound = 422 "attachment_not_found";
    /// No WebAssembly module that this host can run.
    ModuleInvalid = 422 "module_invalid";
    /// A library or a reactor: no WASI command. (A component is no module at all: `module_invalid`.)
    ModuleNotCommand = 422 "module_not_command";
    /// It imports what this host does not provide.
    ModuleImportUnknown = 422 "module_import_unknown";
    /// Too many functions, or too large ones.
    ModuleTooComplex = 422 "module_too_complex";
    /// It took too long to compile.
    CompileTimeout = 422 "compile_timeout";
    /// Too many failed authentications, or too many messages of the org or the agent.
    RateLimited = 429 "rate_limited";
    /// Too many turns wait in the conversation.
    ConversationQueueFull = 429 "conversation_queue_full";
    /// Too many live turns of the org.
    OrgQueueFull = 429 "org_queue_full";
    /// Too many live turns of the agent.
    AgentQueueFull = 429 "agent_queue_full";
    /// The org or the agent has or has used all that it may.
    QuotaExhausted = 429 "quota_exhausted";
    /// Too many open streams.
    TooManyStreams = 429 "too_many_streams";
    /// Our fault.
    Internal = 500 "internal";
    /// Too many live turns of the host.
    HostQueueFull = 503 "host_queue_full";
    /// The host is stopping.
    Draining = 503 "draining";
    /// The database does not answer.
    StoreUnavailable = 503 "store_unavailable";
    /// The keys of a token's issuer cannot be had.
    IssuerUnavailable = 503 "issuer_unavailable";
}

impl Code {
    /// From its text.
    pub fn parse(text: &str) -> Option<Code> {
        Code::ALL.iter().copied().find(|code| code.as_str() == text)
    }

    /// What `Retry-After` says where the case knows nothing better.
    fn retry_after_s(self) -> Option<u64> {
        match self {
            Code::ConversationQueueFull | Code::HostQueueFull | Code::Draining | Code::StoreUnavailable => Some(1),
            Code::OrgQueueFull | Code::AgentQueueFull | Code::TooManyStreams => Some(5),
            Code::IssuerUnavailable => Some(15),
            Code::RateLimited | Code::QuotaExhausted => Some(60),
            _ => None,
        }
    }
}

/// What a problem may have beside what all have.
pub const MEMBERS: &[&str] = &["field", "scope", "active_turn_id", "events", "limit", "limit_of", "limit_value"];

/// An answer that says no. Cheap to move; clones are made only to carry it in a response's extensions.
#[derive(Clone)]
pub struct Problem(Box<Inner>);

#[derive(Clone)]
struct Inner {
    code: Code,
    detail: Cow<'static, str>,
    retry_after_s: Option<u64>,
    facts: Vec<(&'static str, serde_json::Value)>,
    cause: Option<String>,
}

impl Problem {
    /// `detail` is for a person: what happened and what to do.
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Problem {
        let detail = detail.into();
        let retry_after_s = code.retry_after_s();
        Problem(Box::new(Inner { code, detail, retry_after_s, facts: Vec::new(), cause: None }))
    }

    /// Our fault: `cause` goes to the log, never to the client.
    pub fn internal(cause: impl fmt::Display) -> Problem {
        let detail = "the host failed; its log says why, under this request_id";
        Problem::new(Code::Internal, detail).caused_by(cause)
    }

    /// What is not there, or not the caller's.
    pub fn not_found(what: &str) -> Problem {
        Problem::new(Code::NotFound, format!("there is no such {what}"))
    }

    /// For the log.
    #[must_use]
    pub fn caused_by(mut self, cause: impl fmt::Display) -> Problem {
        self.0.cause = Some(cause.to_string());
        self
    }

    /// Adds a member that belongs to the code.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<serde_json::Value>) -> Problem {
        debug_assert!(MEMBERS.contains(&name), "the document says nothing of {name}");
        self.0.facts.push((name, value.into()));
        self
    }

    /// Says which limit is reached, whose it is, and what it is.
    #[must_use]
    pub fn over(self, of: &'static str, limit: &'static str, max: f64) -> Problem {
        self.at_limit(of, limit).with("limit_value", max)
    }

    /// The same, where what it is is not known here.
    fn at_limit(self, of: &'static str, limit: &'static str) -> Problem {
        self.with("limit", limit).with("limit_of", of)
    }

    /// Says when to come back.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> Problem {
        self.0.retry_after_s = Some(seconds);
        self
    }

    /// Its code.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// What the log should know and the client should not.
    pub fn cause(&self) -> Option<&str> {
        self.0.cause.as_deref()
    }

    /// Its body.
    pub fn to_json(&self, request_id: Option<&str>) -> Vec<u8> {
        serde_json::to_vec(&Body { problem: &self.0, request_id }).expect("texts serialise")
    }

    /// Its headers, over those that the response has.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(seconds) = self.0.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.0.code == Code::Unauthenticated {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }
}

struct Body<'a> {
    problem: &'a Inner,
    request_id: Option<&'a str>,
}

impl serde::Serialize for Body<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("type", "about:blank")?;
        map.serialize_entry("title", &self.problem.code.as_str().replace('_', " "))?;
        map.serialize_entry("status", &self.problem.code.status().as_u16())?;
        map.serialize_entry("code", self.problem.code.as_str())?;
        map.serialize_entry("detail", &self.problem.detail)?;
        for (name, value) in &self.problem.facts {
            map.serialize_entry(name, value)?;
        }
        if let Some(id) = self.request_id {
            map.serialize_entry("request_id", id)?;
        }
        map.end()
    }
}

impl fmt::Debug for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.code.as_str(), self.0.detail)
    }
}

impl IntoResponse for Problem {
    /// The status, and itself for `observe` to render.
    fn into_response(self) -> Response {
        let mut response = self.0.code.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Refusal;
    use crate::ids::TurnId;
    use crate::store::StoreError;

    #[test]
    fn codes_are_their_serde_names_and_come_back() {
        for code in Code::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
            assert_eq!(Code::parse(code.as_str()), Some(*code));
            let waits = matches!(code.status().as_u16(), 429 | 503);
            assert_eq!(code.retry_after_s().is_some(), waits, "{code:?}");
        }
        assert_eq!(Code::parse("nonsense"), None);
    }

    #[test]
    fn every_code_is_on_the_page_of_problems_with_its_cause_and_its_remedy_and_no_other() {
        use crate::turn::FailureCode;
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/problems.md");
        let page = std::fs::read_to_string(page).unwrap();
        let mut documented = Vec::new();
        for row in page.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [code, fact, cause, remedy] = cells[..] else {
                panic!("{row}: code, status or retryable, cause, remedy")
            };
            assert!(!cause.is_empty() && !remedy.is_empty(), "{row}");
            documented.push((code.trim_matches('`').to_owned(), fact.to_owned()));
        }
        let refusals = Code::ALL.iter().map(|code| (code.as_str().to_owned(), code.status().as_u16().to_string()));
        let yes_or_no = |yes| if yes { "yes" } else { "no" };
        let failures = FailureCode::ALL.iter().map(|c| (c.as_str().to_owned(), yes_or_no(c.retryable()).to_owned()));
        let mut known: Vec<_> = refusals.chain(failures).collect();
        known.sort();
        documented.sort();
        assert_eq!(documented, known);
    }

    #[test]
    fn a_busy_conversation_names_its_turn_and_its_stream() {
        let active = TurnId::new();
        let problem = Problem::from(Refusal::ConversationBusy { active });
        let body: serde_json::Value = serde_json::from_slice(&problem.to_json(Some("r-1"))).unwrap();
        assert_eq!(body["type"], "about:blank");
        assert_eq!(body["title"], "conversation busy");
        assert_eq!(body["status"], 409);
        assert_eq!(body["code"], "conversation_busy");
        assert_eq!(body["active_turn_id"], active.to_string());
        assert_eq!(body["events"], format!("/v1/turns/{active}/events"));
        assert_eq!(body["request_id"], "r-1");
    }

    #[test]
    fn o6_a_cause_is_never_in_the_body() {
        let problem = Problem::internal("password=hunter2");
        assert!(!String::from_utf8(problem.to_json(Some("r"))).unwrap().contains("hunter2"));
        assert_eq!(problem.cause(), Some("password=hunter2"));
        let store = Problem::from(StoreError::Unavailable("/secret/path".to_owned()));
        assert!(!String::from_utf8(store.to_json(None)).unwrap().contains("/secret"));
    }
}
