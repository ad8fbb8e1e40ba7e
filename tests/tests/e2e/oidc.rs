//! Tokens of an OpenID Connect issuer, with real signatures, against an issuer on this machine that is sometimes not well.

use std::collections::BTreeMap;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse::clock::Clock;
use turnhouse::oidc::{Issuers, Reason, Settings, TokenError};
use turnhouse_tests::client::answer;
use turnhouse_tests::issuer::{Mood, SigningKey, TestIssuer, hs256, message, now_s};
use turnhouse_tests::{Client, TestHost, eventually};

/// A host that trusts `issuer` as `main`, and has the org `acme` with the agent `echo`.
async fn host_with(settings: Settings) -> TestHost {
    let host = TestHost::start_with(|config| {
        config.limits.auth_failures_per_minute = 10_000;
        config.oidc.insert("main".to_owned(), settings);
    })
    .await;
    host.member("acme", "root", "admin").await.deploy("echo").await;
    host
}

/// Status and problem of a request; what differs between any two is left out.
async fn told(host: &TestHost, token: &str) -> (StatusCode, Value) {
    let (status, mut problem) = Client::new(&host.url, token).get("/v1/agents").await;
    if let Some(problem) = problem.as_object_mut() {
        problem.remove("request_id");
    }
    (status, problem)
}

async fn status(host: &TestHost, token: &str) -> StatusCode {
    told(host, token).await.0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_a_token_stands_for_the_user_and_the_org_that_it_names_and_may_what_its_scopes_allow() {
    let (rsa, ec) = (SigningKey::rs256("rsa-1"), SigningKey::es256("ec-1"));
    let issuer = TestIssuer::start(&[&rsa, &ec]).await;
    let host = host_with(issuer.settings()).await;
    host.member("zeta", "root", "admin").await.deploy("echo").await;
    let with = |key: &SigningKey, org: &str, scope: &str| {
        let mut claims = issuer.claims(org, "ann");
        claims["scope"] = json!(scope);
        Client::new(&host.url, &key.token(&claims))
    };
    let ann = with(&rsa, "acme", "turnhouse:turns");
    let turn = ann.say("echo", "c-1", "hi").await;
    assert_eq!(turn.completed().await, "hi");
    // The same member under another key of the issuer, and with a key of the host's.
    for same in [with(&ec, "acme", "turnhouse:turns email"), host.member("acme", "ann", "turns").await] {
        assert_eq!(same.turn(&turn.id).get().await["state"], "completed");
    }
    // The same name in another org is somebody else, and another name in this one.
    assert_eq!(
        with(&rsa, "zeta", "turnhouse:turns").get(&format!("/v1/turns/{}", turn.id)).await.0,
        StatusCode::NOT_FOUND
    );
    let bob = Client::new(&host.url, &rsa.token(&issuer.claims("acme", "bob")));
    assert_eq!(bob.get(&format!("/v1/turns/{}", turn.id)).await.0, StatusCode::NOT_FOUND);
    // Scopes.
    let (status, problem) = ann.send(Method::PUT, "/v1/agents/mine", json!({ "worker": "echo" })).await;
    assert_eq!((status, &problem["code"]), (StatusCode::FORBIDDEN, &json!("scope_missing")));
    let none = with(&rsa, "acme", "openid profile");
    assert_eq!(none.get("/v1/agents").await.1["code"], json!("scope_missing"));
    let admin = with(&ec, "acme", "turnhouse:admin");
    admin.set_agent("mine", "echo", json!({})).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o2_tokens_that_are_no_good_are_all_told_the_same() {
    let (rsa, ec, stranger) = (SigningKey::rs256("rsa-1"), SigningKey::es256("ec-1"), SigningKey::rs256("rsa-1"));
    let issuer = TestIssuer::start(&[&rsa, &ec]).await;
    let host = host_with(issuer.settings()).await;
    // The same once more, to see why: clients are not told.
    let issuers = Issuers::new(&BTreeMap::from([("main".to_owned(), issuer.settings())])).expect("issuers");
    let now = now_s();
    let says = |change: &dyn Fn(&mut Value)| {
        let mut claims = issuer.claims("acme", "ann");
        change(&mut claims);
        claims
    };
    let good = issuer.claims("acme", "ann");
    assert_eq!(status(&host, &rsa.token(&good)).await, StatusCode::OK);
    let header = |change: Value| {
        let mut header = rsa.header();
        header.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        header
    };
    let none = message(&json!({"alg": "none", "typ": "JWT"}), &good);
    let tampered = {
        let signed = rsa.token(&good);
        let (_, signature) = signed.rsplit_once('.').expect("a signature");
        format!("{}.{signature}", message(&rsa.header(), &issuer.claims("acme", "root")))
    };
    let jwk_of_its_own = header(json!({"kid": "mine", "jwk": stranger.jwk()}));
    let n = rsa.jwk()["n"].as_str().expect("a modulus").to_owned();
    let hs = header(json!({"alg": "HS256"}));
    let cases: Vec<(&str, String, Reason)> = vec![
        ("another issuer", rsa.token(&says(&|c| c["iss"] = json!("https://id.example.org"))), Reason::Issuer),
        ("several issuers", rsa.token(&says(&|c| c["iss"] = json!([issuer.url]))), Reason::Issuer),
        ("no issuer", rsa.token(&says(&|c| c["iss"] = json!(null))), Reason::Issuer),
        ("nearly the issuer", rsa.token(&says(&|c| c["iss"] = json!(format!("{}/", issuer.url)))), Reason::Issuer),
        ("another audience", rsa.token(&says(&|c| c["aud"] = json!(["other"]))), Reason::Audience),
        ("no audience", rsa.token(&says(&|c| c["aud"] = json!(null))), Reason::Audience),
        ("no algorithm", format!("{none}."), Reason::Algorithm),
        ("no algorithm and something", format!("{none}.AAAA"), Reason::Algorithm),
        ("the public key as a secret", hs256(&rsa.public_bytes(), &hs, &good), Reason::Algorithm),
        ("the modulus as a secret", hs256(n.as_bytes(), &hs, &good), Reason::Algorithm),
        ("the issuer's secret", hs256(b"secret", &json!({"alg": "HS256", "kid": "secret"}), &good), Reason::Algorithm),
        (
            "an algorithm that is not allowed",
            rsa.token_with(&header(json!({"alg": "RS384"})), &good),
            Reason::Algorithm,
        ),
        ("a key of another kind", rsa.token_with(&header(json!({"alg": "ES256"})), &good), Reason::UnknownKey),
        ("over", rsa.token(&says(&|c| c["exp"] = json!(now - 31))), Reason::Expired),
        ("without an end", rsa.token(&says(&|c| c["exp"] = json!(null))), Reason::Expired),
        ("for ever", rsa.token(&says(&|c| c["exp"] = json!(now + 400 * 86_400))), Reason::Lifetime),
        ("not yet", rsa.token(&says(&|c| c["nbf"] = json!(now + 120))), Reason::NotYetValid),
        ("made in the future", rsa.token(&says(&|c| c["iat"] = json!(now + 120))), Reason::NotYetValid),
        ("an unknown key", rsa.token_with(&header(json!({"kid": "rsa-9"})), &good), Reason::UnknownKey),
        ("a key that it brings", stranger.token_with(&jwk_of_its_own, &good), Reason::UnknownKey),
        ("another key of the same name", stranger.token(&good), Reason::Signature),
        ("another text", tampered, Reason::Signature),
        ("no org", rsa.token(&says(&|c| c["org"] = json!(null))), Reason::Claims),
        ("no user", rsa.token(&says(&|c| c["sub"] = json!(null))), Reason::Claims),
        ("bound to a key", rsa.token(&says(&|c| c["cnf"] = json!({"jkt": "x"}))), Reason::Claims),
        ("for logging out", rsa.token_with(&header(json!({"typ": "logout+jwt"})), &good), Reason::Malformed),
        ("with conditions", rsa.token_with(&header(json!({"crit": ["exp"]})), &good), Reason::Malformed),
        ("large", rsa.token(&says(&|c| c["more"] = json!("x".repeat(20_000)))), Reason::Malformed),
        ("no token", "nonsense".to_owned(), Reason::Malformed),
    ];
    let expected = told(&host, "").await;
    assert_eq!((expected.0, &expected.1["code"]), (StatusCode::UNAUTHORIZED, &json!("unauthenticated")));
    for (what, token, why) in cases {
        assert_eq!(issuers.verify(&token, Clock::system().now()).await, Err(TokenError::Refused(why)), "{what}");
        assert_eq!(told(&host, &token).await, expected, "{what}");
    }
    // Good, and of an org that is not here.
    assert_eq!(told(&host, &rsa.token(&issuer.claims("nowhere", "ann"))).await, expected);
    // Without a name the one key that fits is meant.
    assert_eq!(status(&host, &ec.token_with(&json!({"alg": "ES256"}), &good)).await, StatusCode::OK);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_issuer_no_token_is_taken() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let host = TestHost::start().await;
    host.member("acme", "ann", "admin").await;
    assert_eq!(status(&host, &key.token(&issuer.claims("acme", "ann"))).await, StatusCode::UNAUTHORIZED);
    assert_eq!(issuer.fetches(), 0, "nobody is asked");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_key_of_the_issuer_is_fetched_when_it_is_met_and_an_old_one_is_no_more() {
    let (old, new) = (SigningKey::rs256("old"), SigningKey::es256("new"));
    let issuer = TestIssuer::start(&[&old]).await;
    let host = host_with(Settings { refetch_s: 0, ..issuer.settings() }).await;
    assert_eq!(status(&host, &old.token(&issuer.claims("acme", "ann"))).await, StatusCode::OK);
    issuer.publish(&[&new]);
    assert_eq!(status(&host, &new.token(&issuer.claims("acme", "ann"))).await, StatusCode::OK);
    assert_eq!(status(&host, &old.token(&issuer.claims("acme", "bob"))).await, StatusCode::UNAUTHORIZED);
    host.stop().await;
}

/// A name is the issuer's to give anew, if an unwise one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_key_under_an_old_name_is_fetched_when_it_is_met() {
    let (old, new) = (SigningKey::es256("1"), SigningKey::es256("1"));
    let issuer = TestIssuer::start(&[&old]).await;
    let host = host_with(Settings { refetch_s: 0, ..issuer.settings() }).await;
    assert_eq!(status(&host, &old.token(&issuer.claims("acme", "ann"))).await, StatusCode::OK);
    let fetches = issuer.fetches();
    assert_eq!(status(&host, &new.token(&issuer.claims("acme", "ann"))).await, StatusCode::UNAUTHORIZED);
    assert!(issuer.fetches() > fetches, "its keys were looked at once more");
    issuer.publish(&[&new]);
    assert_eq!(status(&host, &new.token(&issuer.claims("acme", "ann"))).await, StatusCode::OK);
    assert_eq!(status(&host, &old.token(&issuer.claims("acme", "bob"))).await, StatusCode::UNAUTHORIZED);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_nobody_knows_do_not_make_the_host_ask_and_ask() {
    let (known, unknown) = (SigningKey::es256("1"), SigningKey::es256("2"));
    let issuer = TestIssuer::start(&[&known]).await;
    let host = host_with(Settings { refetch_s: 3_600, ..issuer.settings() }).await;
    assert_eq!(status(&host, &known.token(&issuer.claims("acme", "ann"))).await, StatusCode::OK);
    let fetches = issuer.fetches();
    for n in 0..20 {
        let header = json!({"alg": "ES256", "kid": format!("made-up-{n}")});
        let token = unknown.token_with(&header, &issuer.claims("acme", "ann"));
        assert_eq!(status(&host, &token).await, StatusCode::UNAUTHORIZED);
    }
    let forged = SigningKey::es256("1");
    for _ in 0..20 {
        assert_eq!(status(&host, &forged.token(&issuer.claims("acme", "ann"))).await, StatusCode::UNAUTHORIZED);
    }
    assert_eq!(issuer.fetches(), fetches);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_an_issuer_is_down_its_keys_stay_good_for_a_while() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    issuer.set(Mood::Down);
    let host = host_with(Settings { refetch_s: 0, ..issuer.settings() }).await;
    let token = |user: &str| key.token(&issuer.claims("acme", user));
    // Not the client's fault: it may keep its token, and it does not count as a failure.
    let refused =
        Client::new(&host.url, &token("ann")).request(Method::GET, "/v1/agents").send().await.expect("an answer");
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key("retry-after"));
    assert_eq!(refused.json::<Value>().await.expect("a problem")["code"], json!("issuer_unavailable"));
    issuer.set(Mood::Fine);
    assert_eq!(status(&host, &token("ann")).await, StatusCode::OK);
    issuer.set(Mood::Down);
    assert_eq!(status(&host, &token("bob")).await, StatusCode::OK, "by the keys that it had");
    host.stop().await;

    issuer.set(Mood::Fine);
    let host = host_with(Settings { refetch_s: 0, keys_kept_s: 2, ..issuer.settings() }).await;
    assert_eq!(status(&host, &token("ann")).await, StatusCode::OK);
    issuer.set(Mood::Down);
    let n = std::sync::atomic::AtomicUsize::new(0);
    eventually("its keys are believed no more", async || {
        let user = format!("user-{}", n.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        status(&host, &token(&user)).await == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_issuer_answers_is_bounded_and_must_be_its_own() {
    let key = SigningKey::es256("1");
    for mood in [Mood::Huge, Mood::Redirects, Mood::Another] {
        let issuer = TestIssuer::start(&[&key]).await;
        issuer.set(mood);
        let host = host_with(Settings { refetch_s: 0, ..issuer.settings() }).await;
        let token = key.token(&issuer.claims("acme", "ann"));
        assert_eq!(status(&host, &token).await, StatusCode::SERVICE_UNAVAILABLE, "{mood:?}");
        issuer.set(Mood::Fine);
        assert_eq!(status(&host, &token).await, StatusCode::OK, "{mood:?}");
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_ends_with_the_token_that_asked_for_it() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let host = host_with(Settings { leeway_s: 0, ..issuer.settings() }).await;
    let root = host.member("acme", "root", "admin").await;
    root.deploy("sleep_day").await;
    let mut claims = issuer.claims("acme", "ann");
    claims["exp"] = json!(now_s() + 5);
    let ann = Client::new(&host.url, &key.token(&claims));
    let turn = ann.say("sleep_day", "c-1", "go").await;
    let (_, url) = turn.ticket().await;
    let follows = async || answer_status(&ann, &url).await;
    assert_eq!(follows().await, StatusCode::OK);
    eventually("the token ends, and its ticket", async || follows().await == StatusCode::UNAUTHORIZED).await;
    assert_eq!(status(&host, &ann.key).await, StatusCode::UNAUTHORIZED);
    root.turn(&turn.id).cancel().await;
    host.stop().await;
}

async fn answer_status(client: &Client, path: &str) -> StatusCode {
    client.anonymous(Method::GET, path).send().await.expect("an answer").status()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_tokens_count_as_failures_and_a_good_one_goes_on() {
    let (key, stranger) = (SigningKey::es256("1"), SigningKey::es256("1"));
    let issuer = TestIssuer::start(&[&key]).await;
    let host = TestHost::start_with(|config| {
        config.limits.auth_failures_per_minute = 3;
        config.oidc.insert("main".to_owned(), issuer.settings());
    })
    .await;
    host.member("acme", "root", "admin").await.deploy("echo").await;
    let mut seen = Vec::new();
    for n in 0..5 {
        let token = stranger.token(&issuer.claims("acme", &format!("user-{n}")));
        seen.push(status(&host, &token).await.as_u16());
    }
    assert_eq!(seen, [401, 401, 401, 429, 429]);
    let (status, _) =
        answer(Client::new(&host.url, &key.token(&issuer.claims("acme", "ann"))).request(Method::GET, "/v1/agents"))
            .await;
    assert_eq!(status, StatusCode::OK);
    host.stop().await;
}
