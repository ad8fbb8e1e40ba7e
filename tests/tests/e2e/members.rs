//! Members: for which org a token is that does not say it, what a member's role allows, and the end of a membership at every host.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse::audit::Actor;
use turnhouse::caller::{Role, Scopes};
use turnhouse::keys::{Authenticator, TRUSTED_FOR};
use turnhouse::members::Asked;
use turnhouse::oidc::{Issuers, Settings};
use turnhouse_tests::client::answer;
use turnhouse_tests::faulty::Faulty;
use turnhouse_tests::issuer::{SigningKey, TestIssuer};
use turnhouse_tests::{Client, Cluster, Network, Setup, TestHost, eventually};

const NOWHERE: &str = "01990000-0000-7000-8000-000000000000";

/// The issuer's tokens name no org: what they may do is their user's role's.
fn by_membership(issuer: &TestIssuer) -> Settings {
    Settings { org_claim: None, scopes_always: Scopes::ADMIN, ..issuer.settings() }
}

async fn host_with(settings: Settings) -> TestHost {
    TestHost::start_with(|config| {
        config.limits.auth_failures_per_minute = 10_000;
        config.limits.org_deletion_grace_ms = 600_000;
        config.oidc.insert("main".to_owned(), settings);
    })
    .await
}

/// Status and body of a `GET` for an org; what differs between any two requests is left out.
async fn told(client: &Client, path: &str, org: Option<&str>) -> (StatusCode, Value) {
    let mut request = client.request(Method::GET, path);
    if let Some(org) = org {
        request = request.header("turnhouse-org", org);
    }
    let (status, mut body) = answer(request).await;
    if let Some(body) = body.as_object_mut() {
        body.remove("request_id");
    }
    (status, body)
}

#[track_caller]
fn refused(told: &(StatusCode, Value), status: StatusCode, code: &str) {
    assert_eq!((told.0, &told.1["code"]), (status, &json!(code)), "{}", told.1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_o2_a_token_that_names_no_org_is_for_its_users_own() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let host = host_with(by_membership(&issuer)).await;
    for org in ["acme", "zeta", "club", "doomed"] {
        host.member(org, "root", "admin").await.deploy("echo").await;
    }
    let token = |user: &str| Client::new(&host.url, &key.token(&issuer.claims("club", user)));
    let (ann, bob) = (token("ann"), token("bob"));
    refused(&told(&ann, "/v1/agents", None).await, StatusCode::NOT_FOUND, "no_org");
    assert_eq!(told(&ann, "/v1/me", None).await.1["orgs"], json!([]));
    host.join("acme", "ann", Role::Member).await;
    host.join("acme", "bob", Role::Member).await;
    host.join("doomed", "ann", Role::Owner).await;
    let doomed = "doomed".parse().expect("an org");
    host.host.store.mark_org(&doomed, host.host.clock.now(), &Actor::command_line()).await.expect("it is marked");
    let at_home = async || told(&ann, "/v1/agents", None).await.0 == StatusCode::OK;
    eventually("they are a member of one org", at_home).await;

    // In the only org that is theirs and there, as what they are there.
    let turn = ann.say("echo", "c-1", "hi").await;
    assert_eq!(turn.completed().await, "hi");
    let (status, me) = told(&ann, "/v1/me", None).await;
    assert_eq!((status, &me["org_id"], &me["role"]), (StatusCode::OK, &json!("acme"), &json!("member")), "{me}");
    assert_eq!((&me["scopes"], &me["orgs"]), (&json!(["turns"]), &json!([{"org_id": "acme", "role": "member"}])));
    let (status, problem) = ann.send(Method::PUT, "/v1/agents/mine", json!({"worker": "echo"})).await;
    refused(&(status, problem), StatusCode::FORBIDDEN, "scope_missing");

    // Of several, the one that is named; whichever has the turn; else none, and none is named to them.
    host.join("zeta", "ann", Role::Admin).await;
    let several = async || told(&ann, "/v1/agents", None).await.0 == StatusCode::BAD_REQUEST;
    eventually("they are a member of two orgs", several).await;
    let problem = told(&ann, "/v1/agents", None).await;
    refused(&problem, StatusCode::BAD_REQUEST, "org_required");
    assert!(
        !problem.1.to_string().contains("acme") && problem.1.to_string().contains("Turnhouse-Org"),
        "{}",
        problem.1
    );
    assert_eq!(told(&ann, "/v1/me", None).await.1["org_id"], json!(null));
    assert_eq!(told(&ann, "/v1/agents", Some("zeta")).await.0, StatusCode::OK);
    let path = format!("/v1/turns/{}", turn.id);
    for rest in ["", "/ticket", "/cancel"] {
        let method = if rest.is_empty() { Method::GET } else { Method::POST };
        assert!(ann.call(method, &format!("{path}{rest}")).await.0.is_success(), "{rest}");
    }
    assert!(turn.events(None).await.all().await.last().expect("an end").is_terminal());
    assert_eq!(told(&ann, &path, Some("acme")).await.0, StatusCode::OK);

    // Turns of another member, of the other org's, of an org that is not theirs, of nobody: the same.
    let nothing = told(&ann, &format!("/v1/turns/{NOWHERE}"), None).await;
    refused(&nothing, StatusCode::NOT_FOUND, "not_found");
    let root = |org: &'static str| host.member(org, "root", "admin");
    let mut others = vec![path.clone()];
    for org in ["acme", "club"] {
        others.push(format!("/v1/turns/{}", root(org).await.say("echo", "c-9", "hi").await.id));
    }
    assert_eq!(told(&bob, &others[0], None).await, nothing, "another member's");
    for path in &others[1..] {
        assert_eq!(told(&ann, path, None).await, nothing);
        assert_eq!(told(&ann, &format!("{path}/events"), None).await, nothing);
        assert_eq!(ann.call(Method::POST, &format!("{path}/cancel")).await.0, StatusCode::NOT_FOUND);
    }
    assert_eq!(told(&ann, &path, Some("zeta")).await, nothing, "it is not in the org that is named");
    refused(&told(&ann, "/v1/turns/7", None).await, StatusCode::BAD_REQUEST, "invalid_id");

    // Orgs that are not theirs, that are going, that never were: the same, by token and by key.
    let no_org = told(&ann, "/v1/agents", Some("nowhere")).await;
    refused(&no_org, StatusCode::NOT_FOUND, "not_found");
    let by_key = root("acme").await;
    for org in ["club", "doomed"] {
        assert_eq!(told(&ann, "/v1/agents", Some(org)).await, no_org, "{org}");
    }
    for org in ["club", "doomed", "nowhere"] {
        assert_eq!(told(&by_key, "/v1/agents", Some(org)).await, no_org, "{org}");
        assert_eq!(told(&by_key, "/v1/me", Some(org)).await, no_org, "{org}");
    }
    assert_eq!(told(&by_key, "/v1/agents", Some("acme")).await.0, StatusCode::OK);
    let me = told(&by_key, "/v1/me", None).await.1;
    assert_eq!((&me["org_id"], &me["role"], me.get("orgs")), (&json!("acme"), &json!("owner"), None), "{me}");
    refused(&told(&by_key, "/v1/agents", Some("../acme")).await, StatusCode::BAD_REQUEST, "invalid_id");
    let twice = ann.request(Method::GET, "/v1/agents").header("turnhouse-org", "acme").header("turnhouse-org", "zeta");
    refused(&answer(twice).await, StatusCode::BAD_REQUEST, "malformed_request");
    // A ticket is for its turn's org, whatever is named beside it.
    let (_, url) = ann.turn(&turn.id).ticket().await;
    for (org, expected) in [("acme", StatusCode::OK), ("zeta", StatusCode::NOT_FOUND)] {
        let follow = ann.anonymous(Method::GET, &url).header("turnhouse-org", org).send().await.expect("an answer");
        assert_eq!(follow.status(), expected, "{org}");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_a_token_for_members_alone_may_what_both_it_and_the_role_allow() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let host = host_with(Settings { members_only: true, ..issuer.settings() }).await;
    for org in ["acme", "zeta"] {
        host.member(org, "root", "admin").await.deploy("echo").await;
    }
    host.join("acme", "ann", Role::Member).await;
    host.join("acme", "bob", Role::Admin).await;
    let token = |org: &str, user: &str, scope: &str| {
        let mut claims = issuer.claims(org, user);
        claims["scope"] = json!(scope);
        Client::new(&host.url, &key.token(&claims))
    };
    let scopes =
        async |user: &str, scope: &str| told(&token("acme", user, scope), "/v1/me", None).await.1["scopes"].clone();
    assert_eq!(scopes("ann", "turnhouse:admin turnhouse:act_as").await, json!(["turns"]));
    assert_eq!(scopes("bob", "turnhouse:turns").await, json!(["turns"]));
    assert_eq!(scopes("bob", "turnhouse:admin turnhouse:ingest").await, json!(["turns", "deploy", "admin"]));
    // No member of the org that it names, or no such org: as any token that is no good.
    let none = told(&token("nowhere", "ann", "turnhouse:turns"), "/v1/agents", None).await;
    refused(&none, StatusCode::UNAUTHORIZED, "unauthenticated");
    for (org, user) in [("zeta", "ann"), ("acme", "eve")] {
        assert_eq!(told(&token(org, user, "turnhouse:turns"), "/v1/agents", None).await, none);
    }
    let ann = token("acme", "ann", "turnhouse:turns");
    let elsewhere = told(&ann, "/v1/agents", Some("zeta")).await;
    refused(&elsewhere, StatusCode::NOT_FOUND, "not_found");
    assert_eq!(told(&ann, "/v1/agents", Some("nowhere")).await, elsewhere);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_no_token_is_good_for_an_org_that_is_being_deleted() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let (plain, listed) = (issuer.settings(), by_membership(&issuer));
    for settings in [plain.clone(), Settings { members_only: true, ..plain }, listed] {
        let host = host_with(settings).await;
        let root = host.member("acme", "root", "admin").await;
        root.deploy("sleep_day").await;
        let ann = Client::new(&host.url, &key.token(&issuer.claims("acme", "ann")));
        host.join("acme", "ann", Role::Member).await;
        let turn = ann.say("sleep_day", "c-1", "go").await;
        let (_, url) = turn.ticket().await;
        let acme = "acme".parse().expect("an org");
        host.host.store.mark_org(&acme, host.host.clock.now(), &Actor::command_line()).await.expect("it is marked");
        let marked = Instant::now();
        let gone = async || {
            let status = async |path: &str| ann.anonymous(Method::GET, path).send().await.expect("an answer").status();
            let (by_token, by_key) = (told(&ann, "/v1/agents", None).await.0, told(&root, "/v1/agents", None).await.0);
            !by_token.is_success()
                && by_key == StatusCode::UNAUTHORIZED
                && status(&url).await == StatusCode::UNAUTHORIZED
        };
        eventually("it is nobody's", gone).await;
        assert!(marked.elapsed() < Duration::from_secs(2), "{:?}", marked.elapsed());
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orgs_members_are_its_admins_to_say_and_its_owners_their_own() {
    let host = TestHost::start().await;
    let root = host.member("acme", "root", "admin").await;
    let (ann, eve) = (host.member("acme", "ann", "admin").await, host.member("acme", "eve", "turns,act_as").await);
    let put = async |by: &Client, user: &str, role: &str| {
        by.send(Method::PUT, &format!("/v1/members/{user}"), json!({ "role": role })).await
    };
    let remove = async |by: &Client, user: &str| by.call(Method::DELETE, &format!("/v1/members/{user}")).await;
    let (status, member) = put(&root, "ann", "admin").await;
    assert_eq!((status, &member["added_by"]), (StatusCode::CREATED, &json!("root")), "{member}");
    assert_eq!(put(&ann, "bob%40acme.example", "member").await.0, StatusCode::CREATED);
    assert_eq!(put(&ann, "bob@acme.example", "member").await.0, StatusCode::OK);
    let (_, page) = ann.get("/v1/members?limit=2").await;
    let users = |page: &Value| {
        page["items"].as_array().expect("items").iter().map(|m| m["user_id"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(users(&page), ["ann", "bob@acme.example"]);
    let next = page["next"].as_str().expect("there is more");
    let (_, page) = ann.get(&format!("/v1/members?after={next}")).await;
    assert_eq!((users(&page), &page["items"][0]["role"]), (vec![json!("root")], &json!("owner")));

    // An admin is no owner, and the last owner stays.
    for answered in [put(&ann, "ann", "owner").await, put(&ann, "root", "member").await, remove(&ann, "root").await] {
        refused(&answered, StatusCode::FORBIDDEN, "owner_required");
    }
    for answered in [put(&root, "root", "admin").await, remove(&root, "root").await] {
        refused(&answered, StatusCode::CONFLICT, "last_owner");
    }
    assert_eq!(put(&root, "ann", "owner").await.0, StatusCode::OK);
    assert_eq!(remove(&ann, "root").await.0, StatusCode::NO_CONTENT);
    let ended = async || told(&root, "/v1/members", None).await.0 == StatusCode::UNAUTHORIZED;
    eventually("root's key ended with the membership", ended).await;
    refused(&remove(&ann, "root").await, StatusCode::NOT_FOUND, "not_found");
    let (_, orgs) = ann.get("/v1/audit?verb=member.remove").await;
    assert_eq!((&orgs["items"][0]["actor"], &orgs["items"][0]["resource"]), (&json!("ann"), &json!("member/root")));

    // Nobody else's to say or see; bad input.
    for answered in [put(&eve, "eve", "admin").await, remove(&eve, "ann").await, eve.get("/v1/members").await] {
        refused(&answered, StatusCode::FORBIDDEN, "scope_missing");
    }
    let backend = host.member("acme", "backend", "admin,act_as").await;
    refused(&put(&backend, "eve?user=ann", "admin").await, StatusCode::FORBIDDEN, "scope_missing");
    refused(&put(&ann, "-", "admin").await, StatusCode::BAD_REQUEST, "invalid_id");
    refused(&put(&ann, "eve", "king").await, StatusCode::BAD_REQUEST, "invalid_setting");
    let unknown = ann.send(Method::PUT, "/v1/members/eve", json!({"role": "member", "rank": 1})).await;
    refused(&unknown, StatusCode::BAD_REQUEST, "unknown_field");
    host.stop().await;
}

/// Replicas that take the issuer's tokens, by membership.
async fn cluster(issuer: &TestIssuer, replicas: usize) -> Cluster {
    let mut cluster = Cluster::start_with(0, Setup::default()).await;
    for _ in 0..replicas {
        let settings = by_membership(issuer);
        cluster.add_with(|config| drop(config.oidc.insert("main".to_owned(), settings))).await;
    }
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_a_removed_member_is_let_in_nowhere_two_seconds_later() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let cluster = cluster(&issuer, 2).await;
    let root = cluster.member("acme", "root", "admin").await;
    root.deploy("sleep_day").await;
    let (status, problem) = root.send(Method::PUT, "/v1/members/ann", json!({"role": "member"})).await;
    assert_eq!(status, StatusCode::CREATED, "{problem}");
    let by_key = cluster.member("acme", "ann", "turns").await;
    let by_token = Client::new(&root.url, &key.token(&issuer.claims("", "ann")));
    let turn = by_token.say("sleep_day", "c-1", "go").await;
    let (_, of_token) = turn.ticket().await;
    let (_, of_key) = by_key.turn(&turn.id).ticket().await;
    // Every way in, at every replica, again and again so that each has it in memory.
    let ways = async || {
        let mut seen = Vec::new();
        for replica in 0..2 {
            for client in [cluster.at(replica, &by_key), cluster.at(replica, &by_token)] {
                seen.push(told(&client, "/v1/agents", None).await.0);
                seen.push(told(&client, &format!("/v1/turns/{}", turn.id), None).await.0);
                for url in [&of_token, &of_key] {
                    seen.push(client.anonymous(Method::GET, url).send().await.expect("an answer").status());
                }
            }
        }
        seen
    };
    assert!(ways().await.iter().all(StatusCode::is_success));
    assert_eq!(root.call(Method::DELETE, "/v1/members/ann").await.0, StatusCode::NO_CONTENT);
    let removed = Instant::now();
    eventually("they are let in nowhere", async || ways().await.iter().all(|status| status.is_client_error())).await;
    assert!(removed.elapsed() < Duration::from_secs(2), "{:?}", removed.elapsed());
    root.turn(&turn.id).cancel().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_warm_authenticated_request_asks_the_store_nothing() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let host = TestHost::start().await;
    let ann = host.member("acme", "ann", "turns").await;
    host.member("acme", "root", "admin").await.deploy("echo").await;
    let turn = ann.say("echo", "c-1", "hi").await;
    turn.completed().await;
    let turn = turn.id.parse().expect("a turn");
    let named = Settings {
        issuer: format!("{}/", issuer.url),
        jwks_url: Some(format!("{}/keys", issuer.url)),
        ..issuer.settings()
    };
    let issuers = [("named", named), ("members", by_membership(&issuer))].map(|(name, of)| (name.to_owned(), of));
    let issuers = Arc::new(Issuers::new(&BTreeMap::from(issuers)).expect("issuers"));
    let store = Arc::new(Faulty::embedded(host.host.store.clone(), None, true));
    let keys = Authenticator::new(store.clone(), host.host.clock.clone(), &host.host.config.limits, issuers);
    let mut says_org = issuer.claims("acme", "ann");
    says_org["iss"] = json!(format!("{}/", issuer.url));
    let (says_org, says_none) = (key.token(&says_org), key.token(&issuer.claims("", "ann")));
    let here = Asked { org: Some("acme".parse().expect("an org")), turn: None };
    let (nothing, of_turn) = (Asked::default(), Asked { org: None, turn: Some(turn) });
    let all = [
        ("a key", &ann.key, &nothing),
        ("a token with its org", &says_org, &nothing),
        ("a token without one", &says_none, &nothing),
        ("a token for an org that the request names", &says_none, &here),
        ("a token for a turn", &says_none, &of_turn),
    ];
    for (what, secret, asked) in all {
        let request = async || {
            let who = keys.authenticate(Some(secret), None).await.expect("it is good");
            let caller = keys.caller(&who, asked).await.expect("of an org");
            assert_eq!((caller.org.as_str(), caller.user.as_str()), ("acme", "ann"), "{what}");
        };
        eventually("ten requests were made while the first one's answers were believed", async || {
            let began = Instant::now();
            let before = store.reads();
            request().await;
            let cold = store.reads();
            for _ in 0..10 {
                request().await;
            }
            let (warm, in_time) = (store.reads(), began.elapsed() < TRUSTED_FOR / 2);
            assert!(!in_time || warm == cold, "{what}: {} trips", warm - cold);
            in_time && cold > before
        })
        .await;
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r4_whoever_was_here_a_moment_ago_is_known_while_the_store_is_away() {
    let key = SigningKey::es256("1");
    let issuer = TestIssuer::start(&[&key]).await;
    let cluster = cluster(&issuer, 1).await;
    let by_key = cluster.member("acme", "ann", "turns").await;
    let by_token = Client::new(&by_key.url, &key.token(&issuer.claims("", "ann")));
    eventually("both are known without the store", async || {
        let mut known = true;
        for client in [&by_key, &by_token] {
            assert_eq!(told(client, "/v1/me", None).await.0, StatusCode::OK);
            cluster.network(0, Network::Cut);
            known &= told(client, "/v1/me", None).await.0 == StatusCode::OK;
            cluster.network(0, Network::Fine);
        }
        known
    })
    .await;
    cluster.stop().await;
}
