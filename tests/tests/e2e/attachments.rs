//! Attachments: uploaded, referred to, read by whoever may and by the worker; gone with what refers to them.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::{Client, PATIENCE, TestHost};

/// A message with these beside it.
fn message(text: &str, attachments: &[(&str, &str)]) -> Value {
    let files = attachments.iter().map(|(id, name)| json!({"type": "attachment", "attachment_id": id, "name": name}));
    let parts: Vec<Value> = std::iter::once(json!({"type": "text", "text": text})).chain(files).collect();
    json!({ "message": { "parts": parts } })
}

/// What a turn with this message replies.
async fn reply(client: &Client, conversation: &str, body: Value) -> String {
    let (status, body) = client.submit("attachment", conversation, body).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    client.turn(body["turn_id"].as_str().expect("its id")).completed().await
}

async fn read(client: &Client, id: &str) -> StatusCode {
    client.request(Method::GET, &format!("/v1/attachments/{id}")).send().await.expect("an answer").status()
}

async fn upload(client: &Client, path: &str, kind: &str, bytes: &str) -> (StatusCode, Value) {
    let request = client.request(Method::POST, path).header("content-type", kind).body(bytes.to_owned());
    let answer = request.send().await.expect("an answer");
    (answer.status(), answer.json().await.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_reads_what_its_message_and_its_history_refer_to() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("attachment", "attachment", json!({ "history_messages": 20 })).await;
    let poem = ann.attach("text/plain; charset=utf-8", "one two\nthree").await;
    let large: String = (0..100_000).map(|n| format!("{n:06} ")).collect();
    let table = ann.attach("text/csv", large.as_str()).await;
    let of_table = format!("table: text/csv, {} bytes, 100000 words\n", large.len());
    let of_poem = "poem.txt: text/plain; charset=utf-8, 13 bytes, 3 words\n";
    let said = reply(&ann, "c", message("count", &[(&poem, "poem.txt"), (&table, "table")])).await;
    assert_eq!(said, format!("{of_poem}{of_table}"));
    // A range, the end, past it; and what only the history refers to.
    for (offset, length, expected) in
        [(0, 3, "3 of 13: one"), (8, 100, "5 of 13: three"), (13, 5, "0 of 13: "), (4_000_000_000_u64, 5, "0 of 13: ")]
    {
        let text = format!("read {poem} {offset} {length}");
        assert_eq!(reply(&ann, "c", json!({"message": {"text": text}})).await, expected);
    }
    let in_two_pieces = format!("read {table} {} 14", 256 * 1024 - 7);
    let at = 256 * 1024 - 7;
    let said = reply(&ann, "d", message(&in_two_pieces, &[(&table, "t")])).await;
    assert_eq!(said, format!("14 of {}: {}", large.len(), &large[at..at + 14]));
    // What the turn does not refer to is not there, though it is the very same member's.
    let text = format!("read {poem} 0 3");
    assert_eq!(reply(&ann, "e", json!({"message": {"text": text}})).await, "there is nothing to read");
    let never = format!("read sha256-{} 0 3", "0".repeat(64));
    assert_eq!(reply(&ann, "c", json!({"message": {"text": never}})).await, "there is nothing to read");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_o2_an_attachment_is_whose_it_is_and_to_others_not_there() {
    let host = TestHost::start().await;
    let (root, ann, bob) = (
        host.member("acme", "root", "admin").await,
        host.member("acme", "ann", "turns").await,
        host.member("acme", "bob", "turns,ingest").await,
    );
    let zoe = host.member("zeta", "ann", "admin").await;
    root.deploy("attachment").await;
    zoe.deploy("attachment").await;
    let id = ann.attach("text/plain", "ann's words").await;
    for client in [&ann, &root] {
        assert_eq!(read(client, &id).await, StatusCode::OK);
    }
    let missing = format!("sha256-{}", "0".repeat(64));
    for client in [&bob, &zoe] {
        // To the byte what is told of one that nobody has.
        let (of_hers, of_none) = (
            client.get(&format!("/v1/attachments/{id}")).await,
            client.get(&format!("/v1/attachments/{missing}")).await,
        );
        let without_id = |(status, mut body): (StatusCode, Value)| {
            body["request_id"] = json!(null);
            (status, body)
        };
        assert_eq!(without_id(of_hers.clone()), without_id(of_none));
        assert_eq!(of_hers.0, StatusCode::NOT_FOUND);
        let (status, problem) = client.submit("attachment", "c-b", message("count", &[(&id, "a")])).await;
        assert_eq!((status.as_u16(), &problem["code"]), (422, &json!("attachment_not_found")), "{problem}");
    }
    let envelope = json!({"agent": "attachment", "message": message("count", &[(&id, "a")])["message"]});
    let (status, problem) = bob.send(Method::POST, "/v1/ingest", envelope).await;
    assert_eq!((status.as_u16(), &problem["code"]), (422, &json!("attachment_not_found")), "{problem}");
    // The same bytes are bob's once he has uploaded them, and he cannot tell that they were there.
    let (status, body) = upload(&bob, "/v1/attachments", "text/markdown", "ann's words").await;
    assert_eq!((status, &body["id"], &body["media_type"]), (StatusCode::CREATED, &json!(id), &json!("text/markdown")));
    assert_eq!(upload(&bob, "/v1/attachments", "text/markdown", "ann's words").await.0, StatusCode::OK);
    assert_eq!(read(&bob, &id).await, StatusCode::OK);
    assert_eq!(upload(&zoe, "/v1/attachments", "text/plain", "ann's words").await.0, StatusCode::CREATED);
    // For a user, by who acts for users; and what an admin sends into a conversation is its owner's to read.
    let backend = host.member("acme", "backend", "turns,act_as").await;
    let (status, body) = upload(&backend, "/v1/attachments?user=eve", "text/plain", "eve's").await;
    assert_eq!(status, StatusCode::CREATED, "{body}");
    let eves = body["id"].as_str().expect("its id").to_owned();
    assert_eq!(read(&backend, &eves).await, StatusCode::NOT_FOUND);
    assert_eq!(read(&host.member("acme", "eve", "turns").await, &eves).await, StatusCode::OK);
    reply(&ann, "c", message("count", &[(&id, "a")])).await;
    let admins = root.attach("text/plain", "the admin's").await;
    reply(&root, "c", message("count", &[(&admins, "a")])).await;
    assert_eq!((read(&ann, &admins).await, read(&bob, &admins).await), (StatusCode::OK, StatusCode::NOT_FOUND));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_an_attachment_is_refused_with_what_to_do() {
    let host = TestHost::start_with(|config| {
        config.limits.attachment_bytes_max = 1_000;
        config.limits.message_attachments_bytes_max = 1_500;
        config.limits.org_attachments_bytes_max = 2_500;
    })
    .await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("attachment").await;
    let path = "/v1/attachments";
    let (status, problem) = upload(&ann, path, "text/plain", &"x".repeat(1_001)).await;
    assert_eq!((status.as_u16(), &problem["code"]), (413, &json!("attachment_too_large")), "{problem}");
    let chunked = futures_util::stream::iter((0..3).map(|_| Ok::<_, std::io::Error>("x".repeat(400))));
    let request = ann.request(Method::POST, path).body(reqwest::Body::wrap_stream(chunked));
    assert_eq!(request.send().await.expect("an answer").status(), StatusCode::PAYLOAD_TOO_LARGE);
    for kind in ["png", "multipart/form-data; boundary=x", &"a/b".repeat(43)] {
        let (status, problem) = upload(&ann, path, kind, "x").await;
        assert_eq!((status.as_u16(), &problem["code"]), (415, &json!("unsupported_media_type")), "{kind}: {problem}");
    }
    let [one, two] = ["1", "2"].map(|digit| digit.repeat(1_000));
    let (one, two) = (ann.attach("text/plain", one).await, ann.attach("text/plain", two).await);
    let (status, problem) = upload(&ann, path, "text/plain", &"3".repeat(1_000)).await;
    assert_eq!((status.as_u16(), &problem["code"]), (429, &json!("quota_exhausted")), "{problem}");
    let (status, problem) = ann.submit("attachment", "c", message("count", &[(&one, "a"), (&two, "b")])).await;
    assert_eq!((status.as_u16(), &problem["code"]), (400, &json!("invalid_message")), "{problem}");
    let (status, problem) = ann.submit("attachment", "c", message("count", &[(&one, "../a")])).await;
    assert_eq!((status.as_u16(), &problem["code"]), (400, &json!("invalid_message")), "{problem}");
    let (status, problem) = ann.get("/v1/attachments/..%2F..%2Fetc").await;
    assert_eq!((status.as_u16(), &problem["code"]), (400, &json!("invalid_id")), "{problem}");
    assert_eq!(reply(&ann, "c", message("count", &[(&one, "a"), (&one, "b")])).await.lines().count(), 2);
    // As it is sent back: to be saved, not shown.
    let request = ann.request(Method::GET, &format!("{path}/{one}"));
    let answer = request.send().await.expect("an answer");
    let header = |name: &str| answer.headers()[name].to_str().expect("ASCII").to_owned();
    assert_eq!((header("content-type"), header("content-length")), ("text/plain".to_owned(), "1000".to_owned()));
    assert_eq!(
        (header("content-disposition"), header("x-content-type-options")),
        ("attachment".to_owned(), "nosniff".to_owned())
    );
    let tag = header("etag");
    assert_eq!(answer.text().await.expect("the bytes"), "1".repeat(1_000));
    let again = ann.request(Method::GET, &format!("{path}/{one}")).header("if-none-match", tag);
    assert_eq!(again.send().await.expect("an answer").status(), StatusCode::NOT_MODIFIED);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s8_attachments_go_with_their_conversation_and_uploads_with_their_time() {
    let host = TestHost::start_with(|config| config.limits.attachment_upload_ms = 2_000).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("attachment").await;
    let (kept, never) = (ann.attach("text/plain", "kept").await, ann.attach("text/plain", "never").await);
    assert_eq!(reply(&ann, "c", message("count", &[(&kept, "a")])).await, "a: text/plain, 4 bytes, 1 words\n");
    let gone = async |id: &str| {
        let begun = std::time::Instant::now();
        while read(&ann, id).await != StatusCode::NOT_FOUND {
            assert!(begun.elapsed() < PATIENCE, "{id} stays");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    gone(&never).await;
    assert_eq!(read(&ann, &kept).await, StatusCode::OK, "a turn refers to it");
    assert_eq!(reply(&ann, "c", message("count", &[(&kept, "b")])).await, "b: text/plain, 4 bytes, 1 words\n");
    let path = "/v1/agents/attachment/conversations/c";
    assert_eq!(ann.call(Method::DELETE, path).await.0, StatusCode::NO_CONTENT);
    assert_eq!(read(&ann, &kept).await, StatusCode::NOT_FOUND);
    let (status, problem) = ann.submit("attachment", "c", message("count", &[(&kept, "a")])).await;
    assert_eq!((status.as_u16(), &problem["code"]), (422, &json!("attachment_not_found")), "{problem}");
    let begun = std::time::Instant::now();
    while host.tables().of_org("acme").iter().any(|row| row.starts_with("attachment")) {
        assert!(begun.elapsed() < PATIENCE, "{:?}", host.tables().of_org("acme"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    host.stop().await;
}
