//! Two hosts that differ in one thing: on the first there is what others must not see, on the second it never was.
//!
//! `acme` and `zeta` have the same agents, workers, conversations, users, messages and idempotency keys; of `sealed` only `acme` has one of each.
//! gil is a member of `zeta` alone, and comes with a token that names no org. In `club`, bob's conversations are beside eve, who is another member.

use reqwest::Method;
use serde_json::{Map, Value, json};
use turnhouse::audit::Actor;
use turnhouse::caller::{Role, Scopes};
use turnhouse::keys;
use turnhouse::oidc::Settings;
use turnhouse_tests::issuer::{SigningKey, TestIssuer, now_s};
use turnhouse_tests::{Client, TestHost};

use super::answer::Answer;
use super::document::{IDEMPOTENCY_KEY, MESSAGE, Names, Operation, Request};

/// Every scope that there is.
const ALL_SCOPES: &str = "turns,deploy,admin,ingest,act_as,operator";

/// A host, and who calls it.
pub struct World {
    /// The host.
    pub host: TestHost,
    /// Admins by org, with every scope.
    admins: Vec<(&'static str, Client)>,
    eve: Client,
    unscoped: Client,
    revoked: Client,
    /// gil's token.
    token: String,
    _issuer: TestIssuer,
    http: reqwest::Client,
    /// bob's turn in each org.
    turns: Vec<(&'static str, String)>,
    /// What he has uploaded there.
    attachments: Vec<(&'static str, String)>,
}

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    NoKey,
    Garbage,
    Revoked,
    Unscoped,
    Member,
    Foreign,
    Guest,
    Own,
}

impl Caller {
    /// Those that must see and change nothing.
    pub const WRONG: [Caller; 7] = [
        Caller::NoKey,
        Caller::Garbage,
        Caller::Revoked,
        Caller::Unscoped,
        Caller::Member,
        Caller::Foreign,
        Caller::Guest,
    ];

    /// Whether it is of another org.
    pub fn is_foreign(self) -> bool {
        matches!(self, Caller::Foreign | Caller::Guest)
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Caller::NoKey => "no key",
            Caller::Garbage => "a key that never was",
            Caller::Revoked => "a revoked key of its admin",
            Caller::Unscoped => "a key without the scope",
            Caller::Member => "another member",
            Caller::Foreign => "another org's admin",
            Caller::Guest => "another org's admin, by a token that names no org",
            Caller::Own => "its own org's admin",
        }
    }

    /// Whose things it asks for.
    pub fn victim(self) -> &'static str {
        if self.is_foreign() || self == Caller::Own { "acme" } else { "club" }
    }
}

impl World {
    /// `whole`: with what others must not see.
    pub async fn new(whole: bool) -> World {
        let key = SigningKey::es256("1");
        let issuer = TestIssuer::start(&[&key]).await;
        let by_members = Settings { org_claim: None, scopes_always: Scopes::ADMIN, ..issuer.settings() };
        let host = TestHost::start_with(|config| {
            config.limits.auth_failures_per_minute = u32::MAX;
            config.oidc.insert("main".to_owned(), by_members);
        })
        .await;
        let orgs: &[&'static str] = if whole { &["acme", "zeta", "club"] } else { &["zeta", "club"] };
        let (mut admins, mut turns, mut attachments) = (Vec::new(), Vec::new(), Vec::new());
        for org in orgs {
            let admin = host.member(org, "root", ALL_SCOPES).await;
            admin.deploy_as("snapshot_counter", "support", json!({ "default": true })).await;
            admin.deploy_as("echo", "second", json!({})).await;
            let worker = admin.upload("counter", turnhouse_workers::bytes("snapshot_counter")).await;
            assert!(worker.0.is_success(), "{worker:?}");
            admin.set_agent("support", "counter", json!({ "default": true })).await;
            if whole || *org != "club" {
                let bob = host.member(org, "bob", "turns").await;
                host.join(org, "bob", Role::Member).await;
                let turn = converse(&bob, "support", "c-1").await;
                converse(&bob, "support", "c-2").await;
                turns.push((*org, turn));
                attachments.push((*org, bob.attach("text/plain", "a file that both have").await));
            }
            if *org == "acme" {
                for sealed in ["sealed", "spare"] {
                    let worker = admin.upload(sealed, turnhouse_workers::bytes("snapshot_counter")).await;
                    assert!(worker.0.is_success(), "{worker:?}");
                }
                let secret = json!({ "environment": { "SECRET": "of acme" }, "allowed_hosts": ["acme.example"] });
                admin.set_agent("sealed", "sealed", secret).await;
                admin.set_agent("spare", "counter", json!({})).await;
                let bob = host.member(org, "bob", "turns").await;
                let turn = converse(&bob, "sealed", "sealed").await;
                converse(&bob, "sealed", "sealed-2").await;
                converse(&bob, "support", "sealed").await;
                turns.insert(0, ("acme", turn));
                attachments.insert(0, ("acme", bob.attach("text/plain", "a file of acme").await));
            }
            admins.push((*org, admin));
        }
        host.join("zeta", "gil", Role::Admin).await;
        let mut claims = issuer.claims("acme", "gil");
        // Longer than all of this takes.
        claims["exp"] = json!(now_s() + 3_600);
        let token = key.token(&claims);
        let eve = host.member("club", "eve", "turns,ingest").await;
        let unscoped = host.member("club", "root", "operator").await;
        let revoked = revoked(&host).await;
        World {
            host,
            admins,
            eve,
            unscoped,
            revoked,
            token,
            _issuer: issuer,
            http: reqwest::Client::new(),
            turns,
            attachments,
        }
    }

    fn admin(&self, org: &str) -> &Client {
        let found = self.admins.iter().find(|(name, _)| *name == org);
        &found.unwrap_or_else(|| panic!("there is no {org} here")).1
    }

    /// The document, as whoever asks gets it.
    pub async fn document(&self) -> Value {
        self.admin("zeta").get("/openapi.json").await.1
    }

    /// What `caller` names: what is its victim's alone; what both have; what both have some of.
    pub async fn names(&self, caller: Caller, operations: &[Operation]) -> Vec<Names> {
        let org = caller.victim();
        let turn = self.turns.iter().find(|(name, _)| *name == org).expect("bob spoke").1.clone();
        let of_org = |(name, id): &(&str, String)| (*name == org).then(|| id.clone());
        let mut attachments = self.attachments.iter().filter_map(of_org);
        // The first is the victim's alone, where there are two.
        let (first, last) = (attachments.next().expect("bob has one"), attachments.next_back());
        let shared = Names {
            org,
            attachment: last.unwrap_or_else(|| first.clone()),
            agent: "support",
            conversation: "c-1",
            worker: "counter",
            key: IDEMPOTENCY_KEY.to_owned(),
            run: turn.clone(),
            turn,
            user: "bob",
            cursors: Map::new(),
        };
        let sealed =
            Names { agent: "sealed", conversation: "sealed", worker: "sealed", attachment: first, ..shared.clone() };
        let mixed = Names { conversation: "sealed", ..shared.clone() };
        let mut all = match caller {
            Caller::Foreign | Caller::Guest => vec![sealed, shared, mixed],
            // The run of a turn that ended is taken.
            Caller::Own => vec![Names { run: "01990000-0000-7000-8000-00000000000a".to_owned(), ..sealed }],
            _ => vec![shared],
        };
        for names in &mut all {
            names.cursors = self.cursors(names, operations).await;
        }
        all
    }

    /// Where the second page of each of the victim's lists begins.
    async fn cursors(&self, names: &Names, operations: &[Operation]) -> Map<String, Value> {
        let mut cursors = Map::new();
        for operation in operations {
            let first = operation.requests(names).into_iter().find(|request| request.path.ends_with("?limit=1"));
            let Some(first) = first else { continue };
            let (status, page) = self.admin(names.org).call(Method::GET, &first.path).await;
            assert!(status.is_success(), "{}: {status} {page}", first.path);
            assert!(
                page["next"].is_string(),
                "{}: there must be two, so that the list has a cursor: {page}",
                first.path
            );
            cursors.insert(operation.id.clone(), page["next"].clone());
        }
        cursors
    }

    /// Sends it as `caller`, and waits until what it began has ended.
    pub async fn ask(&self, caller: Caller, request: &Request) -> Answer {
        let key = match caller {
            Caller::NoKey => None,
            Caller::Garbage => Some(format!("th_{}", "0".repeat(64))),
            Caller::Revoked => Some(self.revoked.key.clone()),
            Caller::Unscoped => Some(self.unscoped.key.clone()),
            Caller::Member => Some(self.eve.key.clone()),
            Caller::Foreign => Some(self.admin("zeta").key.clone()),
            Caller::Guest => Some(self.token.clone()),
            Caller::Own => Some(self.admin("acme").key.clone()),
        };
        let mut sent = self.http.request(request.method.clone(), format!("{}{}", self.host.url, request.path));
        if let Some(key) = key {
            sent = sent.bearer_auth(key);
        }
        for (name, value) in &request.headers {
            sent = sent.header(name, value);
        }
        let response = sent.body(request.body.clone()).send().await.expect("an answer");
        let answer = tokio::time::timeout(turnhouse_tests::PATIENCE, Answer::read(response)).await;
        let answer = answer.unwrap_or_else(|_| panic!("{} {}: no end", request.method, request.path));
        if let Some(turn) = &answer.accepted {
            let org = if caller.is_foreign() { "zeta" } else { caller.victim() };
            self.admin(org).turn(turn).ended().await;
        }
        answer
    }
}

/// Two turns of a conversation; the first one's id.
async fn converse(bob: &Client, agent: &str, conversation: &str) -> String {
    let body = json!({ "message": { "text": MESSAGE } });
    let (status, _, body) = bob.submit_keyed(agent, conversation, IDEMPOTENCY_KEY, body).await;
    assert_eq!(status.as_u16(), 202, "{body}");
    let first = bob.turn(body["turn_id"].as_str().expect("its id"));
    first.completed().await;
    bob.say(agent, conversation, MESSAGE).await.completed().await;
    first.id
}

/// A key of `club`'s admin that was revoked before it was used.
async fn revoked(host: &TestHost) -> Client {
    let (now, scopes) = (host.host.clock.now(), Scopes::parse(ALL_SCOPES).expect("scopes"));
    let (org, user) = ("club".parse().expect("an org"), "root".parse().expect("a user"));
    let key = keys::mint(org, user, scopes, "revoked", None, now);
    let store = &host.host.store;
    assert!(store.create_key(key.hash, &key.record, &Actor::command_line()).await.expect("it is stored"));
    assert!(
        store.revoke_key(&key.record.org, &key.record.id, now, &Actor::command_line()).await.expect("it is revoked")
    );
    Client::new(&host.url, &key.secret)
}
