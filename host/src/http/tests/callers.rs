//! Who is let in, and what is told to whoever is not.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn o2_what_is_not_the_callers_is_404_on_every_route() {
    let edge = Edge::deployed().await;
    let ann = edge.key("acme", "ann", "turns").await;
    let turn = edge.post(&format!("{C}/turns"), &ann, &[("prefer", "wait=30")], hello()).await.json();
    let turn = format!("/v1/turns/{}", turn["id"].as_str().unwrap());
    let bob = edge.key("acme", "bob", "turns,deploy,ingest,operator").await;
    let stranger = edge.key("other", "ann", "turns,deploy,ingest,admin,operator").await;
    let root = edge.key("acme", "root", "admin").await;
    let gets = [C.to_owned(), format!("{C}/messages"), format!("{C}/turns"), turn.clone(), format!("{turn}/events")];
    for key in [&bob, &stranger] {
        for path in &gets {
            assert_eq!(edge.get(path, key).await.code(), "not_found", "{path}");
        }
        assert_eq!(edge.post(&format!("{C}/turns"), key, &[], hello()).await.code(), "not_found");
        assert_eq!(
            edge.post(&format!("{C}/turns"), key, &[("accept", "text/event-stream")], hello()).await.code(),
            "not_found"
        );
        assert_eq!(edge.post(&format!("{turn}/cancel"), key, &[], json!({})).await.code(), "not_found");
        let end = edge.send("GET", &format!("{turn}/events"), key, &[("last-event-id", "end")], Body::empty()).await;
        assert_eq!(end.code(), "not_found");
        assert_eq!(edge.delete(C, key).await.code(), "not_found");
        assert_eq!(edge.delete(&format!("{C}/snapshot"), key).await.code(), "not_found");
        let taken = json!({"agent": "hi", "conversation": "c-1"});
        assert_eq!(edge.post("/v1/conversations", key, &[], taken).await.code(), "not_found");
    }
    for path in &gets {
        assert_eq!(edge.get(path, &root).await.status, 200, "an admin sees {path}");
        assert_eq!(edge.get(path, &ann).await.status, 200, "{path}");
    }
    let seen = edge.get("/v1/agents/hi/conversations", &bob).await.json();
    assert_eq!(seen["items"], json!([]));
    assert_eq!(edge.get("/v1/workers", &stranger).await.json()["items"], json!([]));
    assert_eq!(edge.get("/v1/agents", &stranger).await.json()["items"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_serves_its_own_users() {
    let edge = Edge::deployed().await;
    let backend = edge.key("acme", "backend", "turns,act_as").await;
    let ann = edge.key("acme", "ann", "turns").await;
    let message = json!({"message": {"text": "hello"}, "user": "ann"});
    let turn = edge.post(&format!("{C}/turns"), &backend, &[("prefer", "wait=30")], message).await.json();
    let turn = format!("/v1/turns/{}", turn["id"].as_str().unwrap());
    assert_eq!(edge.get(&turn, &ann).await.status, 200, "it is ann's");
    assert_eq!(edge.get(&turn, &backend).await.code(), "not_found");
    assert_eq!(edge.get(&format!("{turn}?user=ann"), &backend).await.status, 200);
    assert_eq!(edge.get(&format!("{turn}?user=bob"), &backend).await.code(), "not_found");
    assert_eq!(edge.get(&format!("{turn}?user=ann"), &ann).await.code(), "scope_missing");
}

#[tokio::test(flavor = "multi_thread")]
async fn o6_no_wrong_expired_and_revoked_keys_are_one_answer() {
    let edge = Edge::start().await;
    let past = Some(Timestamp(edge.host.clock.now().0 - 1));
    let expired = edge.key_until("acme", "ann", "turns", past).await.secret;
    let good = edge.key_until("acme", "ann", "turns,deploy", None).await;
    assert_eq!(edge.get("/v1/agents", &good.secret).await.status, 200);
    assert!(
        edge.host
            .store
            .revoke_key(&good.record.org, &good.record.id, edge.host.clock.now(), &Actor::command_line())
            .await
            .unwrap()
    );
    let until = tokio::time::Instant::now() + Duration::from_secs(2);
    while edge.get("/v1/agents", &good.secret).await.status == 200 {
        assert!(tokio::time::Instant::now() < until, "a revoked key stops within 2 s");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut bodies = Vec::new();
    for key in ["", "th_x", &format!("th_{}", "0".repeat(64)), &expired, &good.secret] {
        let answer = edge.get("/v1/agents", key).await;
        assert_eq!((answer.status.as_u16(), answer.code().as_str()), (401, "unauthenticated"));
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
        let mut body = answer.json();
        body.as_object_mut().unwrap().remove("request_id");
        bodies.push(body);
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "{bodies:?}");
    edge.host.keys.record_last_use().await.unwrap();
    let used = edge.host.store.keys(&"acme".parse().unwrap()).await.unwrap();
    assert!(used.iter().any(|key| key.id == good.record.id && key.last_used_at.is_some()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_fails_too_often_waits_and_its_neighbour_does_not() {
    let edge = Edge::with(|config| config.limits.auth_failures_per_minute = 3).await;
    let good = edge.key("acme", "ann", "turns").await;
    let from = async |address: &str, key: &str| {
        let request = Request::builder().uri("/v1/agents").header("authorization", format!("Bearer {key}"));
        let mut request = request.body(Body::empty()).unwrap();
        request.extensions_mut().insert(Peer(address.parse().unwrap()));
        edge.raw(request).await
    };
    assert_eq!(from("192.0.2.1", &good).await.status, 200);
    for _ in 0..3 {
        assert_eq!(from("192.0.2.1", "th_wrong").await.code(), "unauthenticated");
    }
    assert_eq!(from("192.0.2.1", "th_wrong").await.code(), "rate_limited");
    assert_eq!(from("192.0.2.2", "th_wrong").await.code(), "unauthenticated");
    assert_eq!(from("192.0.2.1", &good).await.status, 200, "who was good before goes on");
}
