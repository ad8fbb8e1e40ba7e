//! Stream tickets: a turn is followed without a header, by whoever was given its ticket, and nothing else is done with one.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse::audit::Actor;
use turnhouse::caller::Scopes;
use turnhouse_tests::client::{answer, told};
use turnhouse_tests::{Client, TestHost, eventually};

/// Status and problem of a request without a key; what differs between any two requests is left out.
async fn refusal(client: &Client, method: Method, path: &str) -> (StatusCode, Value) {
    let (status, mut problem) = answer(client.anonymous(method, path)).await;
    if let Some(problem) = problem.as_object_mut() {
        problem.remove("request_id");
    }
    (status, problem)
}

fn is_kept_secret(response: &reqwest::Response) -> bool {
    let headers = response.headers();
    headers["cache-control"] == "no-store" && headers["referrer-policy"] == "no-referrer"
}

async fn status(client: &Client, path: &str) -> StatusCode {
    client.anonymous(Method::GET, path).send().await.expect("an answer").status()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn e2_a_ticket_follows_a_turn_without_a_header_and_goes_on_after_a_reconnect() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("progress_slowly").await;
    let turn = ann.say("progress_slowly", "c-1", "6 ticks every 50").await;
    let made = ann.request(Method::POST, &format!("/v1/turns/{}/ticket", turn.id)).send().await.expect("an answer");
    assert_eq!(made.status(), StatusCode::CREATED);
    assert!(is_kept_secret(&made));
    let made: Value = made.json().await.expect("JSON");
    let (ticket, url) = (made["ticket"].as_str().expect("a ticket"), made["url"].as_str().expect("a URL"));
    assert_eq!(url, format!("/v1/turns/{}/events?ticket={ticket}", turn.id));
    assert!(made["expires_at"].is_string(), "{made}");

    let mut first = ann.follow(url, None).await;
    let mut seen = vec![first.next().await.expect("an event"), first.until("output.delta").await];
    drop(first);
    let whole = turn.events(None).await.all().await;
    let after = seen.pop().expect("a delta");
    let rest = ann.follow(url, Some(&after.id)).await.all().await;
    let at = whole.iter().position(|event| event.id == after.id).expect("it is in the log");
    assert_eq!(rest, whole[at + 1..]);
    assert_eq!(told(ann.follow(url, None).await.all().await), told(whole));

    let done = ann.anonymous(Method::GET, url).header("last-event-id", "end").send().await.expect("an answer");
    assert_eq!(done.status(), StatusCode::NO_CONTENT);
    let stream = ann.anonymous(Method::GET, url).send().await.expect("an answer");
    assert!(is_kept_secret(&stream));
    drop(stream);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o2_a_ticket_is_good_for_the_events_of_its_turn_alone_and_tells_nothing_of_others() {
    let host = TestHost::start_with(|config| config.limits.auth_failures_per_minute = 10_000).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    let (turn, other) = (ann.say("echo", "c-1", "hi").await, ann.say("echo", "c-2", "hi").await);
    turn.completed().await;
    other.completed().await;
    let (ticket, url) = turn.ticket().await;
    let (none, no_problem) = refusal(&ann, Method::GET, &format!("/v1/turns/{}/events", turn.id)).await;
    assert_eq!((none, &no_problem["code"]), (StatusCode::UNAUTHORIZED, &json!("unauthenticated")));

    // Forged, cut, of another turn, of one that does not exist: the same answer as none.
    let unknown = "01990000-0000-7000-8000-000000000000";
    let mut bad: Vec<String> = [&turn.id[..], &other.id, unknown]
        .iter()
        .flat_map(|id| [format!("/v1/turns/{id}/events?ticket={ticket}x"), format!("/v1/turns/{id}/events?ticket=")])
        .collect();
    bad.extend([&other.id[..], unknown].map(|id| format!("/v1/turns/{id}/events?ticket={ticket}")));
    bad.push(format!("/v1/turns/{}/events?ticket={}", turn.id, ann.key));
    for path in &bad {
        assert_eq!(refusal(&ann, Method::GET, path).await, (none, no_problem.clone()), "{path}");
    }
    // On no other route of the document is it a credential, in the query or as a key.
    let (_, document) = answer(ann.anonymous(Method::GET, "/openapi.json")).await;
    let mut tried = 0;
    for (path, item) in document["paths"].as_object().expect("paths") {
        let filled = path.replace("{turn}", &turn.id).replace("{agent}", "echo").replace("{conversation}", "c-1");
        let filled = filled.replace("{worker}", "echo");
        for method in item.as_object().expect("methods").keys() {
            if !path.starts_with("/v1/") || path == "/v1/turns/{turn}/events" {
                continue;
            }
            tried += 1;
            let method: Method = method.to_uppercase().parse().expect("a method");
            let answered = refusal(&ann, method.clone(), &format!("{filled}?ticket={ticket}")).await;
            assert_eq!(answered, (none, no_problem.clone()), "{method} {path}");
            let as_key = answer(ann.anonymous(method, &filled).bearer_auth(&ticket)).await;
            assert_eq!(as_key.0, StatusCode::UNAUTHORIZED, "{path}");
        }
    }
    assert!(tried > 15, "{tried}");
    let as_key = ann.anonymous(Method::GET, &format!("/v1/turns/{}/events", turn.id)).bearer_auth(&ticket);
    assert_eq!(answer(as_key).await.0, StatusCode::UNAUTHORIZED);
    // Two answers to who is calling are none.
    for (path, key) in
        [(format!("{url}&ticket={ticket}"), None), (format!("{url}&user=bob"), None), (url.clone(), Some(&ann.key))]
    {
        let mut request = ann.anonymous(Method::GET, &path);
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        let (status, problem) = answer(request).await;
        assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("malformed_request")), "{path}");
    }
    assert_eq!(status(&ann, &url).await, StatusCode::OK, "it still is good");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o2_a_ticket_is_made_only_by_whoever_may_follow_the_turn() {
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    let (bob, eve) = (host.member("acme", "bob", "turns").await, host.member("acme", "eve", "turns").await);
    let zoe = host.member("zeta", "bob", "admin").await;
    let turn = bob.say("echo", "c-1", "hi").await;
    turn.completed().await;
    let path = format!("/v1/turns/{}/ticket", turn.id);
    for stranger in [&eve, &zoe] {
        let (status, problem) = stranger.call(Method::POST, &path).await;
        assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    }
    let deploy = host.member("acme", "dan", "deploy").await;
    assert_eq!(deploy.call(Method::POST, &path).await.0, StatusCode::FORBIDDEN);
    // The owner, an admin, and a backend for its user may.
    let backend = host.member("acme", "backend", "turns,act_as").await;
    assert_eq!(backend.call(Method::POST, &path).await.0, StatusCode::NOT_FOUND, "on its own behalf");
    for (client, path) in [(&bob, path.clone()), (&ann, path.clone()), (&backend, format!("{path}?user=bob"))] {
        let (made, body) = client.call(Method::POST, &path).await;
        assert_eq!(made, StatusCode::CREATED, "{body}");
        let url = body["url"].as_str().expect("a URL");
        assert!(!url.contains("user="), "{url}");
        let events = client.follow(url, None).await.all().await;
        assert_eq!(events.last().expect("an end").kind, "turn.completed");
        // A turn that has been deleted since is not there any more.
        assert_eq!(status(client, url).await, StatusCode::OK);
    }
    let (_, url) = turn.ticket().await;
    assert!(bob.call(Method::DELETE, "/v1/agents/echo/conversations/c-1").await.0.is_success());
    let (status, problem) = answer(bob.anonymous(Method::GET, &url)).await;
    assert_eq!((status, &problem["code"]), (StatusCode::NOT_FOUND, &json!("not_found")));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_is_good_while_its_turn_lives_and_ends_soon_after_it() {
    let host = TestHost::start_with(|config| config.limits.ticket_grace_ms = 1_500).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let turn = ann.say("sleep_day", "c-1", "go").await;
    let (_, url) = turn.ticket().await;
    tokio::time::sleep(Duration::from_millis(2_000)).await;
    assert_eq!(status(&ann, &url).await, StatusCode::OK, "the turn lives for longer than the grace");
    turn.cancel().await;
    eventually("it ends", async || status(&ann, &url).await == StatusCode::UNAUTHORIZED).await;
    let (status, problem) = ann.call(Method::POST, &format!("/v1/turns/{}/ticket", turn.id)).await;
    assert_eq!((status, &problem["code"]), (StatusCode::CONFLICT, &json!("turn_ended")), "{problem}");
    assert!(turn.events(None).await.all().await.last().is_some_and(|event| event.id == "end"), "a key still reads it");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_has_a_bound_of_its_own_and_its_keys() {
    let host = TestHost::start_with(|config| config.limits.ticket_ms_max = 2_000).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let turn = ann.say("sleep_day", "c-1", "go").await;
    let (_, url) = turn.ticket().await;
    assert_eq!(status(&ann, &url).await, StatusCode::OK);
    eventually("it ends", async || status(&ann, &url).await == StatusCode::UNAUTHORIZED).await;
    turn.cancel().await;
    host.stop().await;

    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("sleep_day").await;
    let now = host.host.clock.now();
    let (org, user) = ("acme".parse().expect("an org"), "bob".parse().expect("a user"));
    let key = turnhouse::keys::mint(org, user, Scopes::TURNS, "short", Some(now.plus_ms(4_000)), now);
    assert!(host.host.store.create_key(key.hash, &key.record, &Actor::command_line()).await.expect("stored"));
    let bob = Client::new(&host.url, &key.secret);
    let turn = bob.say("sleep_day", "c-1", "go").await;
    let (_, url) = turn.ticket().await;
    assert_eq!(status(&bob, &url).await, StatusCode::OK);
    eventually("the key expires, and its ticket", async || status(&bob, &url).await == StatusCode::UNAUTHORIZED).await;
    ann.turn(&turn.id).cancel().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guessing_tickets_is_slowed_down() {
    let host = TestHost::start_with(|config| config.limits.auth_failures_per_minute = 5).await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("echo").await;
    let turn = ann.say("echo", "c-1", "hi").await;
    turn.completed().await;
    let (_, url) = turn.ticket().await;
    let mut answers = Vec::new();
    for _ in 0..7 {
        answers.push(status(&ann, &format!("{url}x")).await.as_u16());
    }
    assert_eq!(answers, [401, 401, 401, 401, 401, 429, 429]);
    assert_eq!(status(&ann, &url).await, StatusCode::OK, "a good one goes on");
    host.stop().await;
}
