//! What HTTP itself asks of a gateway, whatever the route.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_host_header_is_refused_on_a_loopback_host() {
    let edge = Edge::with(|config| config.loopback_only = true).await;
    let asked = async |host: &str| edge.send("GET", "/healthz", "", &[("host", host)], Body::empty()).await;
    assert_eq!(asked("localhost:8787").await.status, 200);
    let refused = asked("evil.example").await;
    assert_eq!(refused.code(), "malformed_request");
    assert!(refused.text().contains("localhost"));
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_methods_and_unknown_routes() {
    let edge = Edge::start().await;
    assert_eq!(edge.get("/healthz", "").await.json(), json!({"status": "ok"}));
    assert_eq!(edge.get("/readyz", "").await.json(), json!({"status": "ready"}));
    assert_eq!(edge.get("/nowhere", "").await.code(), "not_found");
    let own_id = edge.send("GET", "/nowhere", "", &[("x-request-id", "mine-1")], Body::empty()).await;
    assert_eq!(own_id.json()["request_id"], "mine-1");

    // What the document says is routed, and nothing else is.
    let document = edge.get("/openapi.json", "").await.json();
    for (path, item) in document["paths"].as_object().unwrap() {
        let path = path.replace("{turn}", "01990000-0000-7000-8000-000000000000").replace(['{', '}'], "");
        for method in ["get", "put", "post", "delete", "patch"] {
            let answer = edge.send(&method.to_uppercase(), &path, "", &[], Body::empty()).await;
            if item.get(method).is_some() {
                assert_ne!(answer.status, 405, "{method} {path}");
                assert_eq!(answer.status == 401, path.starts_with("/v1/"), "{method} {path}");
            } else {
                assert_eq!(answer.code(), "method_not_allowed", "{method} {path}");
                assert!(!answer.headers["allow"].is_empty());
            }
        }
    }
    edge.host.drain().await;
    assert_eq!(edge.get("/readyz", "").await.code(), "draining");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_is_one_requests_and_tells_nothing() {
    let edge = Edge::start().await;
    let gateway = Gateway::new(edge.host.clone());
    let router = Router::new()
        .route(
            "/boom",
            get(async || {
                if true {
                    panic!("hunter2")
                }
            }),
        )
        .layer(axum::middleware::from_fn_with_state(gateway, observe::observe));
    let edge = Edge { router, ..edge };
    let answer = edge.get("/boom", "").await;
    assert_eq!((answer.status.as_u16(), answer.code().as_str()), (500, "internal"));
    assert!(!answer.text().contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn both_protocols_are_served() {
    let edge = Edge::deployed().await;
    let key = edge.key("acme", "ann", "turns").await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}{C}/turns", listener.local_addr().unwrap());
    let stop = tokio_util::sync::CancellationToken::new();
    let server = tokio::spawn(serve(edge.host.clone(), listener, stop.clone().cancelled_owned()));
    let http1 = reqwest::Client::builder().http1_only().no_proxy().build().unwrap();
    let http2 = reqwest::Client::builder().http2_prior_knowledge().no_proxy().build().unwrap();
    for client in [http1, http2] {
        let answer =
            client.post(&url).bearer_auth(&key).header("accept", "text/event-stream").json(&hello()).send().await;
        let text = answer.unwrap().text().await.unwrap();
        assert!(text.ends_with("id: end\n\n"), "{text}");
    }
    stop.cancel();
    tokio::time::timeout(Duration::from_secs(30), server).await.expect("idle connections are closed").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_pages_of_listed_origins_may_call_and_a_preflight_needs_no_key() {
    let edge = Edge::with(|config| config.cors_origins = vec!["https://app.example.org".to_owned()]).await;
    let key = edge.key("acme", "ann", "turns").await;
    let preflight = async |origin: &str| {
        let asks = [("origin", origin), ("access-control-request-method", "POST")];
        let asks =
            [&asks[..], &[("access-control-request-headers", "authorization,content-type,idempotency-key")]].concat();
        edge.send("OPTIONS", &format!("{C}/turns"), "", &asks, Body::empty()).await
    };
    let allowed = preflight("https://app.example.org").await;
    assert_eq!(
        (allowed.status.as_u16(), &allowed.headers["access-control-allow-origin"]),
        (200, &"https://app.example.org".parse().unwrap())
    );
    let headers = allowed.headers["access-control-allow-headers"].to_str().unwrap().to_owned();
    for name in ["authorization", "content-type", "idempotency-key", "last-event-id"] {
        assert!(headers.contains(name), "{headers}");
    }
    for stranger in ["https://evil.example", "https://app.example.org.evil.example", "null"] {
        assert!(!preflight(stranger).await.headers.contains_key("access-control-allow-origin"), "{stranger}");
    }
    // The answer itself, a refusal too; and never to a page that may bring its visitor's credentials.
    for (key, status) in [(key.as_str(), 200), ("th_x", 401)] {
        let answer = edge.send("GET", "/v1/agents", key, &[("origin", "https://app.example.org")], Body::empty()).await;
        assert_eq!(answer.status.as_u16(), status);
        assert_eq!(answer.headers["access-control-allow-origin"], "https://app.example.org");
        assert!(!answer.headers.contains_key("access-control-allow-credentials"));
        assert!(answer.headers["vary"].to_str().unwrap().contains("origin"));
        let told = answer.headers["access-control-expose-headers"].to_str().unwrap();
        assert!(told.contains("x-request-id") && told.contains("retry-after"), "{told}");
    }
    let closed = Edge::start().await;
    let answer = closed.send("GET", "/healthz", "", &[("origin", "https://app.example.org")], Body::empty()).await;
    assert!(!answer.headers.contains_key("access-control-allow-origin"), "nobody is, unless they are named");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_tells_browsers_to_make_nothing_of_it() {
    let edge = Edge::deployed().await;
    let ann = edge.key("acme", "ann", "turns").await;
    let stream = edge.post(&format!("{C}/turns"), &ann, &[("accept", "text/event-stream")], hello()).await;
    assert_eq!(stream.headers["cache-control"], "no-cache");
    for answer in
        [stream, edge.get("/v1/agents", &ann).await, edge.get("/v1/agents", "").await, edge.get("/x", "").await]
    {
        assert_eq!(answer.headers["x-content-type-options"], "nosniff");
        assert_eq!(answer.headers["referrer-policy"], "no-referrer");
        assert_eq!(answer.headers["content-security-policy"], "default-src 'none'; frame-ancestors 'none'");
        assert!(answer.headers.contains_key("cache-control"));
    }
    assert_eq!(edge.get("/v1/agents", &ann).await.headers["cache-control"], "no-store");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_is_bounded_before_its_route_is_looked_at() {
    let edge = Edge::with(|config| config.limits.url_bytes_max = 300).await;
    let key = edge.key("acme", "ann", "turns").await;
    for path in [format!("/v1/agents?after={}", "a".repeat(300)), format!("/{}", "a".repeat(300))] {
        let answer = edge.get(&path, &key).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (414, "uri_too_long"));
        assert!(answer.text().contains("at most 300"), "{}", answer.text());
    }
    let fits = format!("/{}", "a".repeat(299));
    assert_eq!(edge.get(&fits, &key).await.code(), "not_found");
}

/// O1: between two pages of an export its conversation is deleted, and begun again by another.
#[tokio::test(flavor = "multi_thread")]
async fn o1_an_export_ends_where_its_conversation_becomes_anothers() {
    let edge = Edge::deployed().await;
    let (ann, bob) = (edge.key("acme", "ann", "turns").await, edge.key("acme", "bob", "turns").await);
    let say = async |key: &str, text: &str| {
        let body = json!({"message": {"text": text}});
        assert_eq!(edge.post(&format!("{C}/turns"), key, &[("prefer", "wait=30")], body).await.status, 200);
    };
    for _ in 0..30 {
        say(&ann, "ann's").await;
    }
    let request = Request::get(format!("{C}/export")).header("authorization", format!("Bearer {ann}"));
    let answer = edge.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut body = answer.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(String::from_utf8_lossy(&first).contains("\"kind\":\"conversation\""));
    assert_eq!(edge.delete(C, &ann).await.status, 204);
    for _ in 0..30 {
        say(&bob, "bob's").await;
    }
    // What had been read before may still be told; then it breaks off, which no client takes for the end.
    let mut told = String::new();
    let broken = loop {
        match body.frame().await {
            Some(Ok(frame)) => told.push_str(&String::from_utf8_lossy(&frame.into_data().unwrap())),
            Some(Err(_)) => break true,
            None => break false,
        }
    };
    assert!(broken, "{told}");
    assert!(!told.contains("bob") && !told.contains("\"kind\":\"end\""), "{told}");
    // Its place is free.
    assert_eq!(edge.get(&format!("{C}/export"), &bob).await.status, 200);
}

/// O5: whoever sends modules slowly delays uploads of their own org.
#[tokio::test(flavor = "multi_thread")]
async fn o5_uploads_that_do_not_come_delay_no_other_org() {
    let edge = Edge::start().await;
    let (slow, other) = (edge.key("acme", "ann", "deploy").await, edge.key("other", "ann", "deploy").await);
    let wasm = wat::parse_str(WORKER).unwrap();
    let kind = [("content-type", "application/wasm")];
    let upload = |name: &str| {
        let trickle = Body::from_stream(futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>());
        let request = Request::put(format!("/v1/workers/{name}")).header("authorization", format!("Bearer {slow}"));
        edge.router.clone().oneshot(request.header("content-type", "application/wasm").body(trickle).unwrap())
    };
    let mut trickling = tokio::task::JoinSet::new();
    for n in 0..10 {
        trickling.spawn(upload(&format!("w{n}")));
    }
    for _ in 8..10 {
        let refused = tokio::time::timeout(Duration::from_secs(10), trickling.join_next()).await.unwrap();
        assert_eq!(refused.unwrap().unwrap().unwrap().status(), 429, "more than may wait");
    }
    assert_eq!(edge.send("PUT", "/v1/workers/hi", &other, &kind, wasm.clone()).await.status, 201);
    trickling.shutdown().await;
    assert_eq!(edge.send("PUT", "/v1/workers/hi", &slow, &kind, wasm).await.status, 201, "there is room again");
}
