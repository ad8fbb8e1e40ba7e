//! An issuer's public keys: fetched, kept fresh beside the requests, and kept for a while when the issuer does not answer.
//!
//! A request waits for the issuer only when a token names a key that is not known or is not signed with the one that it names: then the keys are fetched once
//! more, by one request for all, and not again for `refetch_s`, whatever anybody sends. What the issuer answers is bounded in size and time, and no redirect is followed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey};
use parking_lot::Mutex;
use reqwest::{Client, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::settings::{Settings, address, is_loopback};
use super::{Reason, TokenError};

/// For one answer of the issuer.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A discovery document, or a set of keys.
const DOCUMENT_BYTES_MAX: usize = 256 * 1024;
/// Keys of a set; more are not looked at.
const KEYS_MAX: usize = 64;
/// Keys under one name that are tried for one token.
const TRIED_MAX: usize = 4;
/// How often the keys are fetched anew, and how soon again after a failure.
const REFRESHED_EVERY: Duration = Duration::from_secs(300);
const FAILED_AGAIN: Duration = Duration::from_secs(15);

/// A key of an issuer.
struct Key {
    kid: Option<String>,
    /// What it is for, if it says so.
    only: Option<Algorithm>,
    shape: Shape,
    key: DecodingKey,
}

#[derive(PartialEq, Eq)]
enum Shape {
    Rsa,
    P256,
    P384,
    Ed25519,
}

impl Key {
    /// `None`: it is symmetric, unknown, for encryption, or broken.
    fn of(jwk: Value) -> Option<Key> {
        let jwk: Jwk = serde_json::from_value(jwk).ok()?;
        let common = &jwk.common;
        let signs = common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature)
            && common.key_operations.as_ref().is_none_or(|all| all.contains(&KeyOperations::Verify));
        let shape = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => Shape::Rsa,
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => Shape::P256,
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => Shape::P384,
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => Shape::Ed25519,
            _ => return None,
        };
        let only = common.key_algorithm.map(Algorithm::try_from).transpose().ok()?;
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        signs.then(|| Key { kid: jwk.common.key_id, only, shape, key })
    }

    fn fits(&self, algorithm: Algorithm) -> bool {
        let shape = match algorithm {
            Algorithm::ES256 => Shape::P256,
            Algorithm::ES384 => Shape::P384,
            other if other.family() == AlgorithmFamily::Rsa => Shape::Rsa,
            other if other.family() == AlgorithmFamily::Ed => Shape::Ed25519,
            _ => return false,
        };
        self.shape == shape && self.only.is_none_or(|only| only == algorithm)
    }
}

/// The keys of one issuer.
pub struct KeySet {
    issuer: Arc<str>,
    at: String,
    jwks_url: Option<Url>,
    kept: Duration,
    refetch: Duration,
    http: Client,
    state: Mutex<State>,
    fetching: tokio::sync::Mutex<()>,
}

#[derive(Default, Clone)]
struct State {
    keys: Arc<Vec<Key>>,
    /// When they were fetched.
    fetched: Option<Instant>,
    /// When somebody last tried to.
    tried: Option<Instant>,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<Value>,
}

impl KeySet {
    /// Nothing is fetched yet.
    pub fn new(name: Arc<str>, settings: &Settings) -> anyhow::Result<KeySet> {
        let at = address(&settings.issuer).map_err(anyhow::Error::msg)?;
        let jwks_url = settings.jwks_url.as_deref().map(address).transpose().map_err(anyhow::Error::msg)?;
        let mut http = Client::builder()
            .timeout(FETCH_TIMEOUT)
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("turnhouse/", env!("CARGO_PKG_VERSION")));
        if is_loopback(&at) {
            // A proxy for the world outside does not know this machine's own ports.
            http = http.no_proxy();
        }
        Ok(KeySet {
            issuer: name,
            at: settings.issuer.clone(),
            jwks_url,
            kept: Duration::from_secs(settings.keys_kept_s),
            refetch: Duration::from_secs(settings.refetch_s),
            http: http.build().context("cannot make an HTTP client")?,
            state: Mutex::default(),
            fetching: tokio::sync::Mutex::default(),
        })
    }

    /// Fetches them now and then, for ever.
    pub async fn keep_fresh(&self) {
        loop {
            let fetched = {
                let _fetching = self.fetching.lock().await;
                self.fetch().await
            };
            tokio::time::sleep(if fetched { REFRESHED_EVERY } else { FAILED_AGAIN }).await;
        }
    }

    /// The keys that a token of this header may be signed with: those of its name, or the only one that fits where it names none.
    pub async fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<Vec<DecodingKey>, TokenError> {
        if let Some(found) = self.known(kid, algorithm) {
            return Ok(found);
        }
        {
            let _fetching = self.fetching.lock().await;
            // Whoever held it before may have fetched what is asked for here.
            if let Some(found) = self.known(kid, algorithm) {
                return Ok(found);
            }
            self.fetch_once_more().await;
        }
        match self.known(kid, algorithm) {
            Some(found) => Ok(found),
            None if self.believed().is_some() => Err(Reason::UnknownKey.into()),
            None => Err(TokenError::Unavailable),
        }
    }

    /// The same, after one more look at the issuer's keys: a token was not signed with those that [`KeySet::find`] found, and an issuer may have given an old
    /// name to a new key. `None`: they are as they were.
    pub async fn find_anew(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<Vec<DecodingKey>> {
        let before = self.state.lock().fetched;
        let _fetching = self.fetching.lock().await;
        if self.state.lock().fetched == before && !self.fetch_once_more().await {
            return None;
        }
        self.known(kid, algorithm)
    }

    /// Fetches them, if nobody has tried to of late; whether it did. Only whoever holds `fetching` calls this.
    async fn fetch_once_more(&self) -> bool {
        let due = self.state.lock().tried.is_none_or(|at| at.elapsed() >= self.refetch);
        due && self.fetch().await
    }

    /// The keys, unless the issuer has been silent for too long.
    fn believed(&self) -> Option<Arc<Vec<Key>>> {
        let state = self.state.lock();
        state.fetched.filter(|at| at.elapsed() < self.kept).map(|_| state.keys.clone())
    }

    fn known(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<Vec<DecodingKey>> {
        let keys = self.believed()?;
        let named = |key: &&Key| kid.is_none() || key.kid.as_deref() == kid;
        let found: Vec<_> = keys.iter().filter(named).filter(|key| key.fits(algorithm)).take(TRIED_MAX).collect();
        let clear = if kid.is_none() { found.len() == 1 } else { !found.is_empty() };
        clear.then(|| found.into_iter().map(|key| key.key.clone()).collect())
    }

    /// Fetches them; whether it did. Only whoever holds `fetching` calls this.
    async fn fetch(&self) -> bool {
        self.state.lock().tried = Some(Instant::now());
        let fetched = self.fetched().await;
        let result = if fetched.is_ok() { "fetched" } else { "failed" };
        metrics::counter!("turnhouse_oidc_fetches_total", "issuer" => self.issuer.to_string(), "result" => result)
            .increment(1);
        match fetched {
            Ok(keys) => {
                let mut state = self.state.lock();
                state.keys = Arc::new(keys);
                state.fetched = Some(Instant::now());
                true
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(
                    issuer = &*self.issuer,
                    error,
                    "an issuer's keys could not be fetched; those it had stay good for a while"
                );
                false
            }
        }
    }

    async fn fetched(&self) -> anyhow::Result<Vec<Key>> {
        let url = match &self.jwks_url {
            Some(url) => url.clone(),
            None => {
                let at = format!("{}/.well-known/openid-configuration", self.at.trim_end_matches('/'));
                let found: Discovery = self.get(at.parse()?).await.context("its discovery document")?;
                ensure!(
                    found.issuer == self.at,
                    "its discovery document is another issuer's; write `issuer` as it says itself"
                );
                address(&found.jwks_uri).map_err(|why| anyhow::anyhow!("its jwks_uri {why}"))?
            }
        };
        let set: Set = self.get(url).await.context("its keys")?;
        Ok(set.keys.into_iter().take(KEYS_MAX).filter_map(Key::of).collect())
    }

    async fn get<T: DeserializeOwned>(&self, url: Url) -> anyhow::Result<T> {
        let mut response = self.http.get(url).header("accept", "application/json").send().await?;
        ensure!(response.status() == reqwest::StatusCode::OK, "it answers {}", response.status());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            ensure!(body.len() + chunk.len() <= DOCUMENT_BYTES_MAX, "it is larger than {DOCUMENT_BYTES_MAX} bytes");
            body.extend_from_slice(&chunk);
        }
        serde_json::from_slice(&body).context("it cannot be read")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
    const Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";

    #[test]
    fn a_key_is_for_the_algorithms_of_its_kind_and_for_signatures() {
        let p256 = |more: Value| {
            let mut jwk = json!({"kty": "EC", "crv": "P-256", "x": X, "y": Y, "kid": "1"});
            jwk.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            Key::of(jwk)
        };
        let key = p256(json!({"use": "sig", "alg": "ES256"})).unwrap();
        assert!(key.fits(Algorithm::ES256));
        for other in [Algorithm::RS256, Algorithm::ES384, Algorithm::EdDSA, Algorithm::HS256] {
            assert!(!key.fits(other), "{other:?}");
        }
        assert!(p256(json!({})).unwrap().fits(Algorithm::ES256));
        assert!(p256(json!({"use": "enc"})).is_none());
        assert!(p256(json!({"key_ops": ["sign"]})).is_none());
        assert!(p256(json!({"alg": "ECDH-ES"})).is_none());
        assert!(!p256(json!({"alg": "ES384"})).unwrap().fits(Algorithm::ES256));
    }

    #[test]
    fn symmetric_unknown_and_broken_keys_are_left_out() {
        for jwk in [
            json!({"kty": "oct", "k": "c2VjcmV0", "kid": "1", "alg": "HS256"}),
            json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"}),
            json!({"kty": "RSA", "n": "!", "e": "AQAB"}),
            json!({"kty": "EC", "crv": "P-521", "x": X, "y": Y}),
            json!({}),
            json!(7),
        ] {
            assert!(Key::of(jwk.clone()).is_none(), "{jwk}");
        }
    }
}
