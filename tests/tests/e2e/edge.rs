//! Bad input, item by item: each gets its code and a detail that says what to do, and leaves nothing behind.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse::audit::Actor;
use turnhouse::ids::{OrgId, UserId};
use turnhouse_tests::client::answer;
use turnhouse_tests::{Client, TestHost, eventually};

/// Status, code and detail.
fn told((status, problem): &(StatusCode, Value)) -> (u16, &str, &str) {
    let text = |name: &str| problem[name].as_str().unwrap_or("");
    (status.as_u16(), text("code"), text("detail"))
}

#[track_caller]
fn refused(answer: &(StatusCode, Value), status: u16, code: &str, says: &str) {
    let (got, its_code, detail) = told(answer);
    assert_eq!((got, its_code), (status, code), "{answer:?}");
    assert!(detail.contains(says), "{says:?} is not in {detail:?}");
    assert_eq!(answer.1["status"], status, "{answer:?}");
}

/// How much is stored: turns, conversations, workers, modules, agents, keys of requests.
fn stored(host: &TestHost) -> Vec<i64> {
    let tables = host.tables();
    ["turns", "turn_markers", "conversations", "worker_versions", "modules", "agents", "idempotency_keys"]
        .map(|table| tables.count(&format!("SELECT count(*) FROM {table}")))
        .to_vec()
}

async fn raw(client: &Client, path: &str, body: Vec<u8>) -> (StatusCode, Value) {
    answer(client.request(Method::POST, path).header("content-type", "application/json").body(body)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modules_that_this_host_does_not_run_are_named() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    let before = stored(&host);
    let wat = |text: &str| wat::parse_str(text).expect("it is wat");
    let whole = turnhouse_workers::bytes("echo");
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (b"\x7fELF and so on".to_vec(), "module_invalid", ""),
        (Vec::new(), "module_invalid", ""),
        (whole[..whole.len() / 2].to_vec(), "module_invalid", ""),
        (wat(&turnhouse_workers::wat("component")), "module_invalid", "core module"),
        (wat(&turnhouse_workers::wat("unknown_import")), "module_import_unknown", ""),
        (wat(&turnhouse_workers::wat("no_start")), "module_not_command", "_start"),
        (wat(&turnhouse_workers::wat("initialize_present")), "module_not_command", "_initialize"),
        (wat(&turnhouse_workers::wat("no_memory")), "module_not_command", "memory"),
        (
            wat(r#"(module (import "env" "magic" (func)) (memory (export "memory") 1) (func (export "_start")))"#),
            "module_import_unknown",
            "env.magic",
        ),
    ];
    for (wasm, code, says) in cases {
        refused(&ann.upload("bad", wasm).await, 422, code, says);
    }
    // Everything written by hand is answered: taken, or refused with one of the codes for modules.
    for name in turnhouse_workers::wat_names() {
        let wasm = wat(&turnhouse_workers::wat(&name));
        let (status, problem) = ann.upload("probe", wasm).await;
        if status.is_success() {
            assert_eq!(ann.call(Method::DELETE, "/v1/workers/probe").await.0, StatusCode::NO_CONTENT);
        } else {
            assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{name}: {problem}");
            assert!(problem["code"].as_str().expect("a code").starts_with("module_"), "{name}: {problem}");
        }
    }
    // 200 MiB are refused by their length, before they are read, and while they are streamed.
    let path = "/v1/workers/huge";
    let size = 200 * 1024 * 1024_u64;
    let claimed =
        ann.request(Method::PUT, path).header("content-type", "application/wasm").header("content-length", size);
    if let Ok(response) = claimed.body(reqwest::Body::wrap_stream(endless(size))).send().await {
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
        let problem: Value = response.json().await.expect("a problem");
        refused(&(StatusCode::PAYLOAD_TOO_LARGE, problem), 413, "module_too_large", "33554432");
    }
    let wrong_type = ann.request(Method::PUT, path).header("content-type", "text/plain").body("hello");
    refused(&answer(wrong_type).await, 415, "unsupported_media_type", "application/wasm");
    assert_eq!(stored(&host), before, "nothing is stored");
    host.stop().await;
}

fn endless(bytes: u64) -> impl futures_util::Stream<Item = Result<bytes::Bytes, std::io::Error>> {
    let chunk = bytes::Bytes::from(vec![0; 64 * 1024]);
    futures_util::stream::iter((0..bytes / (64 * 1024)).map(move |_| Ok(chunk.clone())))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_none_are_refused_and_store_nothing() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin,ingest").await;
    ann.deploy("echo").await;
    let before = stored(&host);
    let turns = Client::turns("echo", "c-1");
    let text = |text: String| json!({ "message": { "text": text } }).to_string().into_bytes();
    let cases: Vec<(Vec<u8>, u16, &str, &str)> = vec![
        (text("x".repeat(2 * 1024 * 1024)), 413, "body_too_large", "2097152"),
        (text("x".repeat(300 * 1024)), 400, "invalid_message", "262144"),
        (b"{\"message\":{\"text\":\"caf\xe9\"}}".to_vec(), 400, "malformed_request", "UTF-8"),
        (text(String::new()), 400, "invalid_message", "empty"),
        (b"".to_vec(), 400, "malformed_request", "JSON"),
        (b"{".to_vec(), 400, "malformed_request", "JSON"),
        (b"{}".to_vec(), 400, "invalid_message", "message"),
        (br#"{"message":{"text":"a","parts":[]}}"#.to_vec(), 400, "invalid_message", "one of them"),
        (br#"{"message":{"text":"a"},"colour":"red"}"#.to_vec(), 400, "unknown_field", "colour"),
        (br#"{"message":{"text":"a","colour":"red"}}"#.to_vec(), 400, "unknown_field", "colour"),
        (br#"{"message":{"text":"a"},"on_busy":"wait"}"#.to_vec(), 400, "malformed_request", "enqueue"),
        (
            br#"{"message":{"parts":[{"type":"blob","media_type":"image/png","base64":"%%%"}]}}"#.to_vec(),
            400,
            "invalid_message",
            "",
        ),
        (br#"{"message":{"text":"a"}} and more"#.to_vec(), 400, "malformed_request", ""),
    ];
    for (body, status, code, says) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        let refusal = raw(&ann, &turns, body).await;
        let (got, its_code, detail) = told(&refusal);
        assert_eq!((got, its_code), (status, code), "{shown}: {detail}");
        assert!(detail.contains(says) && !detail.is_empty(), "{shown}: {detail}");
    }
    let no_type = ann.request(Method::POST, &turns).body("hello");
    refused(&answer(no_type).await, 415, "unsupported_media_type", "application/json");
    refused(
        &raw(&ann, "/v1/ingest", br#"{"agent":"echo","message":{"text":"a"},"conv":"x"}"#.to_vec()).await,
        400,
        "unknown_field",
        "conv",
    );
    let body = json!({ "worker": "echo", "limits": { "turn_timeout": 1 } });
    refused(&ann.send(Method::PUT, "/v1/agents/echo", body).await, 400, "unknown_field", "turn_timeout");
    let body = json!({ "worker": "echo", "limits": { "turn_timeout_ms": 900_001 } });
    refused(&ann.send(Method::PUT, "/v1/agents/echo", body).await, 400, "invalid_setting", "900000");
    for key in ["", "a b", &"k".repeat(256)] {
        let request = ann
            .request(Method::POST, &turns)
            .header("idempotency-key", key)
            .json(&json!({ "message": { "text": "a" } }));
        refused(&answer(request).await, 400, "invalid_idempotency_key", "255");
    }
    assert_eq!(stored(&host), before, "nothing is stored");
    // What is odd but allowed is kept as it came.
    for odd in ["a\0b", "\u{feff}", "👩‍👩‍👧", "<script>", "' OR 1=1 --", "\u{202e}"] {
        assert_eq!(ann.say("echo", "c-1", odd).await.completed().await, odd);
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o4_ids_are_checked_at_the_edge() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin,ingest").await;
    ann.deploy("echo").await;
    let before = stored(&host);
    let long = "a".repeat(300);
    for bad in ["..%2Fetc", "%2e%2e", "..", "a%2Fb", "a%00b", "a%20b", "%ff", "-a", "caf%C3%A9", "a%0Ab", long.as_str()]
    {
        let message = json!({ "message": { "text": "hi" } });
        for (method, path) in [
            (Method::POST, format!("/v1/agents/echo/conversations/{bad}/turns")),
            (Method::POST, format!("/v1/agents/{bad}/conversations/c-1/turns")),
            (Method::PUT, format!("/v1/agents/{bad}")),
            (Method::GET, format!("/v1/turns/{bad}")),
        ] {
            let (status, problem) = ann.send(method.clone(), &path, message.clone()).await;
            let code = problem["code"].as_str().unwrap_or_default();
            // `..` as a whole segment is taken out of the path by the client itself; then there is no such route.
            let plain = (status.as_u16(), code) == (400, "invalid_id");
            let folded = bad.contains("..") || bad.contains("%2e");
            let gone = folded && matches!(status.as_u16(), 404 | 405);
            assert!(plain || gone, "{method} {path}: {status} {problem}");
            if plain {
                assert!(!problem["detail"].as_str().expect("a detail").is_empty());
            }
        }
        let (status, problem) = ann.upload(bad, turnhouse_workers::bytes("echo")).await;
        assert!(matches!(status.as_u16(), 400 | 404 | 405), "{bad}: {status} {problem}");
    }
    for bad in ["../../etc", "a/b", "a\0b", "", long.as_str()] {
        for field in ["conversation", "agent", "org", "run_id"] {
            let mut envelope = json!({ "agent": "echo", "message": { "text": "hi" } });
            envelope[field] = json!(bad);
            refused(&ann.send(Method::POST, "/v1/ingest", envelope).await, 400, "invalid_id", "");
        }
        let begin = json!({ "agent": "echo", "conversation": bad });
        refused(&ann.send(Method::POST, "/v1/conversations", begin).await, 400, "invalid_id", "");
    }
    assert_eq!(stored(&host), before, "nothing is stored");
    // File names come from hashes: nothing that a client named is in the data directory.
    ann.set_agent("a.b-c_d", "echo", json!({})).await;
    assert_eq!(ann.say("a.b-c_d", "x:y@z", "hi").await.completed().await, "hi");
    let mut names = Vec::new();
    let mut todo = vec![host.data_dir().to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
            if entry.path().is_dir() {
                todo.push(entry.path());
            }
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    assert!(
        names.iter().all(|name| !name.contains("echo") && !name.contains("acme") && !name.contains("a.b-c_d")),
        "{names:?}"
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_exist_is_said_not_to() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    let turn = "01990000-0000-7000-8000-000000000000";
    for path in [
        "/v1/agents/nobody".to_owned(),
        "/v1/workers/nobody".to_owned(),
        "/v1/agents/echo/conversations/none".to_owned(),
        "/v1/agents/echo/conversations/none/messages".to_owned(),
        "/v1/agents/nobody/conversations".to_owned(),
        format!("/v1/turns/{turn}"),
        format!("/v1/turns/{turn}/events"),
        "/v1/nothing".to_owned(),
    ] {
        refused(&ann.get(&path).await, 404, "not_found", "there is no such");
    }
    let message = json!({ "message": { "text": "hi" } });
    refused(&ann.submit("nobody", "c-1", message).await, 404, "not_found", "agent");
    refused(&ann.call(Method::POST, &format!("/v1/turns/{turn}/cancel")).await, 404, "not_found", "turn");
    refused(&ann.send(Method::POST, "/v1/conversations", json!({})).await, 404, "no_default_agent", "default");
    refused(&ann.call(Method::PATCH, "/v1/agents/echo").await, 405, "method_not_allowed", "Allow");
    refused(&ann.get("/v1/agents?after=nonsense").await, 400, "invalid_cursor", "");
    let (status, problem) = ann.call(Method::DELETE, "/v1/workers/echo").await;
    assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("worker_in_use")));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_do_not_work_are_all_told_the_same() {
    let host = TestHost::start_with(|config| config.limits.auth_failures_per_minute = 1_000).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    let (org, user) = (OrgId::parse("acme").expect("an org"), UserId::parse("ann").expect("a user"));
    let now = host.host.clock.now();
    let past = turnhouse::clock::Timestamp(now.0 - 1);
    let scopes = turnhouse::caller::Scopes::parse("admin").expect("scopes");
    let expired = turnhouse::keys::mint(org.clone(), user.clone(), scopes, "expired", Some(past), now);
    assert!(host.host.store.create_key(expired.hash, &expired.record, &Actor::command_line()).await.expect("stored"));
    let revoked = turnhouse::keys::mint(org.clone(), user, scopes, "revoked", None, now);
    assert!(host.host.store.create_key(revoked.hash, &revoked.record, &Actor::command_line()).await.expect("stored"));
    assert!(host.host.store.revoke_key(&org, &revoked.record.id, now, &Actor::command_line()).await.expect("revoked"));
    let mut answers = Vec::new();
    for key in ["th_wrong", &format!("{}x", ann.key), &expired.secret, &revoked.secret, "", "🔑"] {
        let stranger = Client::new(&host.url, "");
        let request = reqwest::Client::new().get(format!("{}/v1/agents", stranger.url));
        let request = request.header("authorization", format!("Bearer {key}").into_bytes());
        let response = request.send().await.expect("an answer");
        assert!(response.headers().contains_key("www-authenticate"), "{key}");
        let status = response.status();
        let mut problem: Value = response.json().await.expect("a problem");
        problem.as_object_mut().expect("an object").remove("request_id");
        answers.push((status, problem));
    }
    let none = reqwest::Client::new().get(format!("{}/v1/agents", host.url)).send().await.expect("an answer");
    assert_eq!(none.status(), StatusCode::UNAUTHORIZED);
    refused(&answers[0], 401, "unauthenticated", "keys create");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_key_and_its_successor_both_work_until_the_overlap_is_over() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    let (store, org) = (&host.host.store, OrgId::parse("acme").expect("an org"));
    let old = store.keys(&org).await.expect("keys").pop().expect("ann's");
    let now = host.host.clock.now();
    let next = turnhouse::keys::mint(org.clone(), old.user.clone(), old.scopes, "next", None, now);
    assert!(store.rotate_key(&old.id, next.hash, &next.record, 4_000, &Actor::command_line()).await.expect("stored"));
    let next = Client::new(&host.url, &next.secret);
    for client in [&ann, &next] {
        assert_eq!(client.get("/v1/agents").await.0, StatusCode::OK);
    }
    eventually("the old one ends", async || ann.get("/v1/agents").await.0 == StatusCode::UNAUTHORIZED).await;
    assert_eq!(next.get("/v1/agents").await.0, StatusCode::OK);
    host.host.keys.record_last_use().await.expect("written");
    let keys = store.keys(&org).await.expect("keys");
    assert!(keys.len() == 2 && keys.iter().all(|key| key.last_used_at.is_some()), "{keys:?}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_uses_a_key_that_ends_soon_is_told_on_every_answer() {
    let host = TestHost::start_with(|config| config.limits.key_warning_days = 3).await;
    let ann = host.member("acme", "ann", "admin").await;
    let (org, user) = (OrgId::parse("acme").expect("an org"), UserId::parse("ann").expect("a user"));
    let (now, day) = (host.host.clock.now(), 86_400_000);
    let warned = async |client: &Client, path: &str| {
        let response = client.request(Method::GET, path).send().await.expect("an answer");
        response.headers().get("turnhouse-key-expires-at").map(|at| at.to_str().expect("text").to_owned())
    };
    let key = async |lives_ms: u64| {
        let scopes = turnhouse::caller::Scopes::TURNS;
        let key = turnhouse::keys::mint(org.clone(), user.clone(), scopes, "k", Some(now.plus_ms(lives_ms)), now);
        assert!(host.host.store.create_key(key.hash, &key.record, &Actor::command_line()).await.expect("stored"));
        let stored = host.host.store.key(key.hash).await.expect("read").expect("it is there");
        (Client::new(&host.url, &key.secret), stored.expires_at.expect("an end").rfc3339())
    };
    let (soon, at) = key(2 * day).await;
    // Also where the answer is no.
    for path in ["/v1/agents", "/v1/workers", "/v1/turns/01990000-0000-7000-8000-000000000000"] {
        assert_eq!(warned(&soon, path).await, Some(at.clone()), "{path}");
    }
    let (later, _) = key(5 * day).await;
    for client in [&later, &ann, &Client::new(&host.url, "th_wrong")] {
        assert_eq!(warned(client, "/v1/agents").await, None);
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_keys_is_slowed_down() {
    let host = TestHost::start_with(|config| config.limits.auth_failures_per_minute = 5).await;
    let stranger = Client::new(&host.url, "th_guess");
    let mut limited = None;
    for _ in 0..20 {
        let response = stranger.request(Method::GET, "/v1/agents").send().await.expect("an answer");
        if response.status() == StatusCode::TOO_MANY_REQUESTS {
            limited = response.headers().get("retry-after").cloned();
            break;
        }
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    }
    assert!(limited.is_some());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_under_a_foreign_name_reaches_no_host_of_ones_own_machine() {
    let host = TestHost::start_with(|config| config.loopback_only = true).await;
    let ann = host.member("acme", "ann", "admin").await;
    for (name, allowed) in [("evil.example", false), ("localhost:1", true), ("127.0.0.1", true)] {
        let response = ann.request(Method::GET, "/v1/agents").header("host", name).send().await.expect("an answer");
        assert_eq!(response.status().is_success(), allowed, "{name}: {}", response.status());
    }
    host.stop().await;
}
