//! The gateway over a whole host, in one process: every route is asked as a client would, without a connection.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode, header};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

mod callers;
mod protocol;

use super::auth::Peer;
use super::*;
use crate::audit::Actor;
use crate::caller::Scopes;
use crate::clock::Timestamp;
use crate::config::Config;
use crate::ids::OrgId;
use crate::keys;
use crate::limits::Limits;

/// Reads nothing, says "hi".
const WORKER: &str = r#"(module
    (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (data (i32.const 0) "\08\00\00\00\02\00\00\00hi")
    (func (export "_start") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16)))))"#;

/// Spins until it is stopped.
const SPINNER: &str = r#"(module (memory (export "memory") 1) (func (export "_start") (loop (br 0))))"#;

struct Edge {
    host: Host,
    router: Router,
    _data: tempfile::TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}: {}", self.status, self.text()))
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The problem's code, having checked that it is one.
    #[track_caller]
    fn code(&self) -> String {
        assert_eq!(self.headers["content-type"], "application/problem+json", "{}", self.text());
        let body = self.json();
        assert_eq!(body["status"], self.status.as_u16());
        assert_eq!(body["request_id"].as_str().unwrap(), self.headers["x-request-id"]);
        let waits = matches!(self.status.as_u16(), 429 | 503);
        assert_eq!(self.headers.contains_key(header::RETRY_AFTER), waits);
        body["code"].as_str().unwrap().to_owned()
    }
}

impl Edge {
    async fn start() -> Edge {
        Edge::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Edge {
        let data = tempfile::tempdir().unwrap();
        let limits = Limits { host_running_max: 4, org_running_max: 4, ..Limits::default() };
        let mut config = Config { data_dir: data.path().to_owned(), limits, ..Config::default() };
        change(&mut config);
        let host = Host::start(config).await.unwrap();
        for org in ["acme", "other"] {
            let owner = "root".parse().unwrap();
            host.store
                .create_org(&org.parse().unwrap(), &owner, host.clock.now(), &Actor::command_line())
                .await
                .unwrap();
        }
        Edge { router: router(host.clone()), host, _data: data }
    }

    /// With worker `hi` as agent `hi`, the default, and worker `spin` as agent `spin`.
    async fn deployed() -> Edge {
        Edge::deployed_with(|_| {}).await
    }

    async fn deployed_with(change: impl FnOnce(&mut Config)) -> Edge {
        let edge = Edge::with(change).await;
        let admin = edge.key("acme", "root", "admin").await;
        for (name, wat, default) in [("hi", WORKER, true), ("spin", SPINNER, false)] {
            let wasm = wat::parse_str(wat).unwrap();
            let (path, wasm_type) = (format!("/v1/workers/{name}"), [("content-type", "application/wasm")]);
            let put = edge.send("PUT", &path, &admin, &wasm_type, wasm).await;
            assert_eq!(put.status, 201, "{}", put.text());
            let settings = json!({"worker": name, "default": default});
            assert_eq!(edge.put(&format!("/v1/agents/{name}"), &admin, settings).await.status, 201);
        }
        edge
    }

    async fn key(&self, org: &str, user: &str, scopes: &str) -> String {
        self.key_until(org, user, scopes, None).await.secret
    }

    async fn key_until(&self, org: &str, user: &str, scopes: &str, expires_at: Option<Timestamp>) -> keys::NewKey {
        let (org, user): (OrgId, _) = (org.parse().unwrap(), user.parse().unwrap());
        let key = keys::mint(org, user, Scopes::parse(scopes).unwrap(), "test", expires_at, self.host.clock.now());
        assert!(self.host.store.create_key(key.hash, &key.record, &Actor::command_line()).await.unwrap());
        key
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        key: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if !key.is_empty() {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.raw(request.body(body.into()).unwrap()).await
    }

    async fn raw(&self, request: Request<Body>) -> Answer {
        let answered = async {
            let (parts, body) = self.router.clone().oneshot(request).await.unwrap().into_parts();
            let body = body.collect().await.unwrap().to_bytes().to_vec();
            Answer { status: parts.status, headers: parts.headers, body }
        };
        tokio::time::timeout(Duration::from_secs(60), answered).await.expect("it answers")
    }

    async fn get(&self, path: &str, key: &str) -> Answer {
        self.send("GET", path, key, &[], Body::empty()).await
    }

    async fn post(&self, path: &str, key: &str, headers: &[(&str, &str)], body: Value) -> Answer {
        let headers = [&[("content-type", "application/json")], headers].concat();
        self.send("POST", path, key, &headers, body.to_string()).await
    }

    async fn put(&self, path: &str, key: &str, body: Value) -> Answer {
        self.send("PUT", path, key, &[("content-type", "application/json")], body.to_string()).await
    }

    async fn delete(&self, path: &str, key: &str) -> Answer {
        self.send("DELETE", path, key, &[], Body::empty()).await
    }
}

fn hello() -> Value {
    json!({"message": {"text": "hello"}})
}

const C: &str = "/v1/agents/hi/conversations/c-1";

#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_answered_with_events_with_the_turn_or_with_where_to_look() {
    let edge = Edge::deployed().await;
    let ann = edge.key("acme", "ann", "turns").await;
    let turns = format!("{C}/turns");

    let streamed = edge.post(&turns, &ann, &[("accept", "text/event-stream")], hello()).await;
    assert_eq!(streamed.status, 200);
    assert_eq!(streamed.headers["content-type"], "text/event-stream");
    assert_eq!(streamed.headers["cache-control"], "no-cache");
    assert_eq!(streamed.headers["x-accel-buffering"], "no");
    let events = streamed.text();
    assert!(events.starts_with("event: turn.accepted\ndata: {"), "{events}");
    assert!(events.contains("event: turn.completed\ndata: {") && events.ends_with("\nid: end\n\n"), "{events}");

    let waited = edge.post(&turns, &ann, &[("prefer", "respond-async, wait=600")], hello()).await;
    assert_eq!((waited.status, &waited.headers["preference-applied"]), (StatusCode::OK, &"wait=60".parse().unwrap()));
    let turn = waited.json();
    assert_eq!((&turn["state"], &turn["reply"]), (&json!("completed"), &json!({"text": "hi"})));
    assert_eq!((&turn["agent_id"], &turn["conversation_id"]), (&json!("hi"), &json!("c-1")));
    assert_eq!(turn["run_id"], turn["id"]);

    let accepted = edge.post(&turns, &ann, &[], hello()).await;
    assert_eq!(accepted.status, 202);
    let links = &accepted.json()["links"];
    assert_eq!(accepted.headers["location"], links["self"].as_str().unwrap());
    assert!(!accepted.headers.contains_key("preference-applied"));
    let followed = edge.get(links["events"].as_str().unwrap(), &ann).await;
    assert!(followed.text().ends_with("id: end\n\n"));
    assert_eq!(edge.get(links["self"].as_str().unwrap(), &ann).await.json()["state"], "completed");
    let cancelled = edge.post(links["cancel"].as_str().unwrap(), &ann, &[], json!({})).await;
    assert_eq!(
        (cancelled.status, &cancelled.json()["state"]),
        (StatusCode::OK, &json!("completed")),
        "it stays as it is"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_after_the_id_that_its_client_saw() {
    let edge = Edge::deployed().await;
    let ann = edge.key("acme", "ann", "turns").await;
    let turn = edge.post(&format!("{C}/turns"), &ann, &[("prefer", "wait=30")], hello()).await.json();
    let events = format!("/v1/turns/{}/events", turn["id"].as_str().unwrap());
    let after = async |id: &str| edge.send("GET", &events, &ann, &[("last-event-id", id)], Body::empty()).await;
    let whole = edge.get(&events, &ann).await.text();
    let rest = after("0.0").await.text();
    assert_eq!(whole.split_once("id: 0.0\n\n").unwrap().1, rest);
    assert_eq!(after("end").await.status, 204);
    assert_eq!(after("nonsense").await.code(), "invalid_cursor");
    let xml = edge.send("GET", &events, &ann, &[("accept", "application/xml")], Body::empty()).await;
    assert_eq!(xml.code(), "not_acceptable");
}

#[tokio::test(flavor = "multi_thread")]
async fn e7_a_client_that_leaves_cancels_nothing_and_makes_room_for_another_reader() {
    let edge = Edge::deployed_with(|config| config.limits.readers_per_turn_max = 1).await;
    let ann = edge.key("acme", "ann", "turns").await;
    let turn = edge.post("/v1/agents/spin/conversations/c-1/turns", &ann, &[], hello()).await.json();
    let events = turn["links"]["events"].as_str().unwrap();
    let request = || {
        let request = Request::builder().uri(events).header("authorization", format!("Bearer {ann}"));
        request.body(Body::empty()).unwrap()
    };
    let mut first = edge.router.clone().oneshot(request()).await.unwrap();
    let frame = first.body_mut().frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(frame.starts_with(b"event: turn.accepted"));
    let second = edge.get(events, &ann).await;
    assert_eq!((second.status.as_u16(), second.code().as_str()), (429, "too_many_streams"));
    drop(first);
    let again = edge.router.clone().oneshot(request()).await.unwrap();
    assert_eq!(again.status(), 200);
    drop(again);
    let state = edge.get(turn["links"]["self"].as_str().unwrap(), &ann).await.json()["state"].clone();
    assert!(state == "queued" || state == "running", "{state}");
    edge.post(turn["links"]["cancel"].as_str().unwrap(), &ann, &[], json!({})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_attaches_to_its_turn_and_to_no_other_body() {
    let edge = Edge::deployed().await;
    let ann = edge.key("acme", "ann", "turns").await;
    let turns = format!("{C}/turns");
    let first = edge.post(&turns, &ann, &[("idempotency-key", "k-1")], hello()).await;
    assert!(!first.headers.contains_key("idempotent-replayed"));
    let again = edge.post(&turns, &ann, &[("idempotency-key", "k-1")], hello()).await;
    assert_eq!((again.status, &again.headers["idempotent-replayed"]), (StatusCode::ACCEPTED, &"true".parse().unwrap()));
    assert_eq!(again.json()["turn_id"], first.json()["turn_id"]);
    let streamed = [("idempotency-key", "k-1"), ("accept", "text/event-stream")];
    let streamed = edge.post(&turns, &ann, &streamed, hello()).await;
    assert!(
        streamed.text().starts_with("event: turn.accepted") && streamed.headers.contains_key("idempotent-replayed")
    );
    let other = edge.post(&turns, &ann, &[("idempotency-key", "k-1")], json!({"message": {"text": "bye"}})).await;
    assert_eq!((other.status.as_u16(), other.code().as_str()), (422, "idempotency_mismatch"));
    let invalid = edge.post(&turns, &ann, &[("idempotency-key", "a b")], hello()).await;
    assert_eq!(invalid.code(), "invalid_idempotency_key");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_conversation_says_with_what_and_a_live_turn_can_be_cancelled() {
    let edge = Edge::deployed().await;
    let (ann, root) = (edge.key("acme", "ann", "turns").await, edge.key("acme", "root", "admin").await);
    let turns = "/v1/agents/spin/conversations/c-1/turns";
    let live = edge.post(turns, &ann, &[], hello()).await.json();
    let busy = edge.post(turns, &ann, &[], json!({"message": {"text": "x"}, "on_busy": "reject"})).await;
    assert_eq!((busy.status.as_u16(), busy.code().as_str()), (409, "conversation_busy"));
    assert_eq!(busy.json()["active_turn_id"], live["turn_id"]);
    assert_eq!(busy.json()["events"], live["links"]["events"]);
    let cancelled = edge.post(live["links"]["cancel"].as_str().unwrap(), &root, &[], json!({})).await;
    assert_eq!(cancelled.json()["state"], "cancelled");
    let turn = edge.get(live["links"]["self"].as_str().unwrap(), &ann).await.json();
    assert_eq!((&turn["state"], &turn["cancelled_by"]), (&json!("cancelled"), &json!("admin")));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_named_and_nothing_is_accepted() {
    let edge = Edge::deployed().await;
    let ann = edge.key("acme", "ann", "turns").await;
    let turns = format!("{C}/turns");
    let json_type = ("content-type", "application/json");
    let huge = format!(r#"{{"message":{{"text":"{}"}}}}"#, "x".repeat(2 << 20));
    let long = format!("/v1/agents/{}/conversations/c/turns", "x".repeat(300));
    /// Path, headers, body; status and code.
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [u8], u16, &'a str);
    let cases: &[Case<'_>] = &[
        (&turns, &[json_type], huge.as_bytes(), 413, "body_too_large"),
        (&turns, &[json_type], b"{\"message\":{\"text\":\"\xff\"}}", 400, "malformed_request"),
        (&turns, &[json_type], b"{", 400, "malformed_request"),
        (&turns, &[json_type], b"", 400, "malformed_request"),
        (&turns, &[json_type], br#"{"message":{"text":""}}"#, 400, "invalid_message"),
        (&turns, &[json_type], b"{}", 400, "invalid_message"),
        (&turns, &[json_type], br#"{"message":{"text":"a"},"colour":1}"#, 400, "unknown_field"),
        (&turns, &[json_type], br#"{"message":{"text":"a"},"on_busy":"maybe"}"#, 400, "malformed_request"),
        (&turns, &[json_type], br#"{"message":{"text":"a"},"user":"bob"}"#, 403, "scope_missing"),
        (&turns, &[("content-type", "text/plain")], br#"{"message":{"text":"a"}}"#, 415, "unsupported_media_type"),
        (&turns, &[], br#"{"message":{"text":"a"}}"#, 415, "unsupported_media_type"),
        (&turns, &[json_type, ("accept", "application/xml")], br#"{"message":{"text":"a"}}"#, 406, "not_acceptable"),
        (&long, &[json_type], br#"{"message":{"text":"a"}}"#, 400, "invalid_id"),
        ("/v1/agents/hi/conversations/..%2Fetc/turns", &[json_type], br#"{"message":{"text":"a"}}"#, 400, "invalid_id"),
        ("/v1/agents/hi/conversations/a%00/turns", &[json_type], br#"{"message":{"text":"a"}}"#, 400, "invalid_id"),
        ("/v1/agents/hi/conversations/%ff/turns", &[json_type], br#"{"message":{"text":"a"}}"#, 400, "invalid_id"),
        ("/v1/agents/nobody/conversations/c/turns", &[json_type], br#"{"message":{"text":"a"}}"#, 404, "not_found"),
    ];
    for (path, headers, body, status, code) in cases {
        let answer = edge.send("POST", path, &ann, headers, body.to_vec()).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (*status, *code), "{path} {}", answer.text());
        assert!(answer.json()["detail"].as_str().unwrap().len() > 10, "{}", answer.text());
    }
    assert_eq!(edge.get(&turns, &ann).await.code(), "not_found", "no conversation came into being");
    assert_eq!(edge.get("/v1/turns/nonsense", &ann).await.code(), "invalid_id");
    assert_eq!(edge.get(&format!("/v1/turns/{}", crate::ids::TurnId::new()), &ann).await.code(), "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_modules_and_settings_are_named() {
    let edge = Edge::with(|config| config.limits.module_bytes_max = 1_000).await;
    let deploy = edge.key("acme", "dev", "deploy").await;
    let wasm = ("content-type", "application/wasm");
    let put = async |body: Vec<u8>| edge.send("PUT", "/v1/workers/w", &deploy, &[wasm], body).await;
    assert_eq!(put(vec![0; 1_001]).await.code(), "module_too_large");
    assert_eq!(put(b"no wasm".to_vec()).await.code(), "module_invalid");
    let unknown = wat::parse_str(
        r#"(module (import "env" "secret" (func)) (memory (export "memory") 1) (func (export "_start")))"#,
    );
    let unknown = put(unknown.unwrap()).await;
    assert_eq!(unknown.code(), "module_import_unknown");
    assert!(unknown.text().contains("secret"));
    let text = edge.send("PUT", "/v1/workers/w", &deploy, &[("content-type", "text/plain")], "x").await;
    assert_eq!(text.code(), "unsupported_media_type");
    let first = put(wat::parse_str(WORKER).unwrap()).await;
    let again = put(wat::parse_str(WORKER).unwrap()).await;
    assert_eq!((first.status.as_u16(), again.status.as_u16()), (201, 200));
    assert_eq!((&again.json()["version"], &again.json()["digest"]), (&json!(1), &first.json()["digest"]));

    for (settings, code) in [
        (json!({"worker": "nobody"}), "invalid_setting"),
        (json!({"worker": "w", "version": 9}), "invalid_setting"),
        (json!({"worker": "../w"}), "invalid_setting"),
        (json!({"worker": "w", "limits": {"turn_timeout_ms": 0}}), "invalid_setting"),
        (json!({"worker": "w", "limits": {"turn_timeout": 1}}), "unknown_field"),
        (json!({"worker": "w", "session_mode": "file", "history_messages": 1}), "invalid_setting"),
        (json!({"worker": "w", "session_mode": "folder"}), "invalid_setting"),
        (json!({"worker": "w", "default": true}), "scope_missing"),
        (json!({"worker": "w", "allowed_hosts": ["example.org"]}), "scope_missing"),
        (json!({}), "invalid_setting"),
    ] {
        let answer = edge.put("/v1/agents/a", &deploy, settings.clone()).await;
        assert_eq!(answer.code(), code, "{settings} {}", answer.text());
    }
    assert_eq!(edge.get("/v1/agents/a", &deploy).await.code(), "not_found");
    let made = edge.put("/v1/agents/a", &deploy, json!({"worker": "w"})).await;
    assert_eq!((made.status.as_u16(), &made.json()["version"]), (201, &json!(1)));
    assert_eq!(edge.put("/v1/agents/a", &deploy, json!({"worker": "w"})).await.status, 200);
    let used = edge.delete("/v1/workers/w", &deploy).await;
    assert_eq!((used.status.as_u16(), used.code().as_str()), (409, "worker_in_use"));
    assert_eq!(edge.delete("/v1/agents/a", &deploy).await.status, 204);
    assert_eq!(edge.delete("/v1/workers/w", &deploy).await.status, 204);
    assert_eq!(edge.get("/v1/workers/w", &deploy).await.code(), "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn conversations_are_begun_listed_read_both_ways_and_deleted() {
    let edge = Edge::deployed().await;
    let ann = edge.key("acme", "ann", "turns").await;
    let made = edge.post("/v1/conversations", &ann, &[], json!({})).await;
    assert_eq!((made.status.as_u16(), &made.json()["agent_id"]), (201, &json!("hi")), "the org's default");
    assert_eq!(made.headers["location"], made.json()["links"]["self"].as_str().unwrap());
    let named = json!({"agent": "hi", "conversation": "c-1"});
    assert_eq!(edge.post("/v1/conversations", &ann, &[], named.clone()).await.status, 201);
    assert_eq!(edge.post("/v1/conversations", &ann, &[], named).await.status, 200);
    let nowhere = edge.key("other", "eve", "turns").await;
    assert_eq!(edge.post("/v1/conversations", &nowhere, &[], json!({})).await.code(), "no_default_agent");

    for text in ["one", "two", "three"] {
        let message = json!({"message": {"text": text}});
        edge.post(&format!("{C}/turns"), &ann, &[("prefer", "wait=30")], message).await;
    }
    let pages = async |first: String| {
        let (mut texts, mut path) = (Vec::new(), first.clone());
        loop {
            let page = edge.get(&path, &ann).await.json();
            for item in page["items"].as_array().unwrap() {
                assert_eq!((&item["state"], &item["reply"]), (&json!("completed"), &json!({"text": "hi"})));
                texts.push(item["message"]["text"].as_str().unwrap().to_owned());
            }
            let Some(next) = page["next"].as_str() else { return texts };
            path = format!("{C}/messages?limit=2&after={next}");
        }
    };
    assert_eq!(pages(format!("{C}/messages?limit=2")).await, ["one", "two", "three"]);
    assert_eq!(pages(format!("{C}/messages?limit=2&direction=backward")).await, ["three", "two", "one"]);
    assert_eq!(edge.get(&format!("{C}/messages?after=nonsense"), &ann).await.code(), "invalid_cursor");
    assert_eq!(edge.get(&format!("{C}/messages?limit=0"), &ann).await.code(), "malformed_request");
    assert_eq!(edge.get("/v1/agents/hi/conversations", &ann).await.json()["items"].as_array().unwrap().len(), 2);

    let admin = edge.key("acme", "root", "admin").await;
    assert_eq!(edge.delete("/v1/agents/hi", &admin).await.code(), "agent_in_use");
    assert_eq!(edge.delete(&format!("{C}/snapshot"), &ann).await.status, 204);
    assert_eq!(edge.delete(C, &ann).await.status, 204);
    assert_eq!(edge.get(C, &ann).await.code(), "not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envelope_is_taken_as_it_is_but_for_another_org() {
    let edge = Edge::deployed().await;
    let (adapter, ann) = (edge.key("acme", "adapter", "ingest,turns").await, edge.key("acme", "ann", "turns").await);
    let envelope = json!({"agent": "hi", "message": {"text": "hello"}});
    let accepted = edge.post("/v1/ingest", &adapter, &[], envelope.clone()).await;
    assert_eq!(accepted.status, 202);
    let events = edge.get(accepted.json()["links"]["events"].as_str().unwrap(), &adapter).await.text();
    assert!(events.contains("turn.completed"), "{events}");
    let turn = edge.get(accepted.json()["links"]["self"].as_str().unwrap(), &adapter).await.json();
    assert_eq!((&turn["conversation_id"], &turn["run_id"]), (&Value::Null, &Value::Null));
    let with = |name: &str, value: Value| {
        let mut envelope = envelope.clone();
        envelope[name] = value;
        envelope
    };
    assert_eq!(edge.post("/v1/ingest", &adapter, &[], with("org", json!("other"))).await.code(), "org_mismatch");
    assert_eq!(edge.post("/v1/ingest", &adapter, &[], with("org", json!("../x"))).await.code(), "invalid_id");
    assert_eq!(edge.post("/v1/ingest", &adapter, &[], with("run_id", json!("x"))).await.code(), "invalid_id");
    assert_eq!(edge.post("/v1/ingest", &adapter, &[], with("runid", json!("x"))).await.code(), "unknown_field");
    assert_eq!(edge.post("/v1/ingest", &ann, &[], envelope).await.code(), "scope_missing");
}
