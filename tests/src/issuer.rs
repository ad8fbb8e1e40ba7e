//! An OpenID Connect issuer on the loopback interface, with keys and signatures of its own, and with what can be wrong with one.

use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair};
use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::Response;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use turnhouse::oidc::Settings;

/// How an issuer answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// As it should.
    Fine,
    /// 503 to everything.
    Down,
    /// With more than anybody wants to read.
    Huge,
    /// With the address of somebody else.
    Redirects,
    /// Its discovery document is another issuer's.
    Another,
}

struct Shared {
    url: String,
    mood: Mood,
    keys: Vec<Value>,
    fetches: usize,
}

/// An issuer. It ends with this.
pub struct TestIssuer {
    /// Where it is, and what its tokens say in `iss`.
    pub url: String,
    shared: Arc<Mutex<Shared>>,
    server: tokio::task::JoinHandle<()>,
}

impl TestIssuer {
    /// One that publishes these keys.
    pub async fn start(keys: &[&SigningKey]) -> TestIssuer {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let shared = Arc::new(Mutex::new(Shared { url: url.clone(), mood: Mood::Fine, keys: Vec::new(), fetches: 0 }));
        let (discovery, jwks) = (shared.clone(), shared.clone());
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(async move || answer(&discovery, false)))
            .route("/keys", get(async move || answer(&jwks, true)));
        let server = tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
        let issuer = TestIssuer { url, shared, server };
        issuer.publish(keys);
        issuer
    }

    /// These are its keys from now on.
    pub fn publish(&self, keys: &[&SigningKey]) {
        // With what else a set may have: a symmetric key and one of a kind that nobody knows.
        let mut set =
            vec![json!({"kty": "oct", "k": "c2VjcmV0", "kid": "secret"}), json!({"kty": "AKP", "kid": "new"})];
        set.extend(keys.iter().map(|key| key.jwk()));
        self.shared.lock().keys = set;
    }

    /// How it answers from now on.
    pub fn set(&self, mood: Mood) {
        self.shared.lock().mood = mood;
    }

    /// How often its keys were asked for.
    pub fn fetches(&self) -> usize {
        self.shared.lock().fetches
    }

    /// What an operator says of it.
    pub fn settings(&self) -> Settings {
        Settings {
            issuer: self.url.clone(),
            audiences: vec!["turnhouse".to_owned()],
            org_claim: Some("org".to_owned()),
            ..Settings::default()
        }
    }

    /// What a token of it says: it is `user`'s, of `org`, and good for five minutes.
    pub fn claims(&self, org: &str, user: &str) -> Value {
        let now = now_s();
        json!({"iss": self.url, "aud": ["other", "turnhouse"], "iat": now, "exp": now + 300, "sub": user, "org": org,
            "scope": "openid turnhouse:turns"})
    }
}

impl Drop for TestIssuer {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn answer(shared: &Mutex<Shared>, keys: bool) -> Response {
    let mut shared = shared.lock();
    shared.fetches += usize::from(keys);
    let (status, body) = match shared.mood {
        Mood::Down => (StatusCode::SERVICE_UNAVAILABLE, "down".to_owned()),
        Mood::Huge => (StatusCode::OK, format!("{{\"keys\":[{}]}}", "0,".repeat(1 << 20))),
        Mood::Redirects => (StatusCode::FOUND, String::new()),
        Mood::Fine | Mood::Another if keys => (StatusCode::OK, json!({ "keys": shared.keys }).to_string()),
        mood => {
            let issuer = if mood == Mood::Another { "https://id.example.org" } else { &shared.url };
            (StatusCode::OK, json!({ "issuer": issuer, "jwks_uri": format!("{}/keys", shared.url) }).to_string())
        }
    };
    let response = Response::builder().status(status).header(header::LOCATION, format!("{}/keys", shared.url));
    response.body(Body::from(body)).expect("a response")
}

/// Seconds since 1970.
pub fn now_s() -> i64 {
    turnhouse::clock::Clock::system().now().0 / 1_000
}

/// A key that signs tokens.
pub struct SigningKey {
    /// Its name.
    pub kid: String,
    pair: Pair,
}

enum Pair {
    Rsa(RsaKeyPair),
    Ec(EcdsaKeyPair),
}

impl SigningKey {
    /// A new RSA key, for RS256.
    pub fn rs256(kid: &str) -> SigningKey {
        SigningKey { kid: kid.to_owned(), pair: Pair::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).expect("a key")) }
    }

    /// A new key on P-256, for ES256.
    pub fn es256(kid: &str) -> SigningKey {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
        SigningKey { kid: kid.to_owned(), pair: Pair::Ec(pair) }
    }

    /// Its public half.
    pub fn jwk(&self) -> Value {
        match &self.pair {
            Pair::Rsa(pair) => {
                let key = pair.public_key();
                let number = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
                json!({"kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.kid,
                    "n": number(key.modulus().big_endian_without_leading_zero()),
                    "e": number(key.exponent().big_endian_without_leading_zero())})
            }
            Pair::Ec(pair) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({"kty": "EC", "crv": "P-256", "kid": self.kid, "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y)})
            }
        }
    }

    /// Its public half as bytes, for whoever takes it for a secret.
    pub fn public_bytes(&self) -> Vec<u8> {
        match &self.pair {
            Pair::Rsa(pair) => pair.public_key().as_ref().to_vec(),
            Pair::Ec(pair) => pair.public_key().as_ref().to_vec(),
        }
    }

    /// The header of its tokens.
    pub fn header(&self) -> Value {
        let alg = if matches!(self.pair, Pair::Rsa(_)) { "RS256" } else { "ES256" };
        json!({"alg": alg, "typ": "JWT", "kid": self.kid})
    }

    /// A token.
    pub fn token(&self, claims: &Value) -> String {
        self.token_with(&self.header(), claims)
    }

    /// A token with a header that says what it likes.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        let message = message(header, claims);
        let random = SystemRandom::new();
        let signature = match &self.pair {
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message.as_bytes(), &mut signature).expect("it signs");
                signature
            }
            Pair::Ec(pair) => pair.sign(&random, message.as_bytes()).expect("it signs").as_ref().to_vec(),
        };
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// A token under a secret.
pub fn hs256(secret: &[u8], header: &Value, claims: &Value) -> String {
    let message = message(header, claims);
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
    let mac = aws_lc_rs::hmac::sign(&key, message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac))
}

/// What is signed of a token.
pub fn message(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}
