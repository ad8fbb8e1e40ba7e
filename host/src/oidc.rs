//! OpenID Connect: who a bearer token (a JWT) of a trusted issuer stands for.
//!
//! Everything of a token is an attacker's until its signature has been checked, and the order is this: its size and shape; its issuer, which must be
//! one of the operator's; its algorithm, which must be one that the operator allows there and is never a symmetric one; its key, which must be the
//! issuer's ([`keys`]) and fit the algorithm; its signature; its audience and its times; what it says of org, user and scopes ([`claims`]). A key
//! that comes with the token (`jwk`, `jku`, `x5c`) is never looked at. No database is asked here, and of a token that was good
//! [`crate::keys::Authenticator`] remembers the answer for a while.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::join_all;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{DecodingKey, Validation};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::clock::Timestamp;

mod claims;

mod keys;

mod settings;

pub use claims::{Of, Verified};
pub use settings::{Algorithm, Settings, is_among};

use keys::KeySet;

/// Longer than any token that an issuer would make; of a longer one nothing is read.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Why a token is refused: for the operator's metrics and log, never for whoever sent it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// As a label.
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// No JWT, too large, of another type, or with what this host does not understand.
    Malformed = "token_malformed";
    /// Of nobody whom the operator trusts.
    Issuer = "token_issuer";
    /// Under an algorithm that is not allowed.
    Algorithm = "token_algorithm";
    /// Under a key that the issuer does not have, or has for something else.
    UnknownKey = "token_unknown_key";
    /// The signature is wrong.
    Signature = "token_signature";
    /// For somebody else.
    Audience = "token_audience";
    /// Over.
    Expired = "token_expired";
    /// Not begun.
    NotYetValid = "token_not_yet_valid";
    /// It would live for longer than the operator allows.
    Lifetime = "token_lifetime";
    /// What it says of org and user is missing or is no id.
    Claims = "token_claims";
}

/// Why a token stands for nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenError {
    /// It is no good.
    Refused(Reason),
    /// It cannot be told: the issuer's keys cannot be had.
    Unavailable,
}

impl From<Reason> for TokenError {
    fn from(reason: Reason) -> TokenError {
        TokenError::Refused(reason)
    }
}

/// An issuer that the operator trusts.
struct Issuer {
    name: Arc<str>,
    settings: Settings,
    keys: KeySet,
}

/// All of them.
pub struct Issuers(Vec<Issuer>);

/// What of a token's header matters.
#[derive(Deserialize)]
struct Head {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    crit: Option<Value>,
}

impl Issuers {
    /// Of the operator's settings, by the names that they have there; nothing is fetched yet.
    pub fn new(settings: &BTreeMap<String, Settings>) -> anyhow::Result<Issuers> {
        let issuer = |(name, settings): (&String, &Settings)| {
            let name: Arc<str> = name.as_str().into();
            Ok(Issuer { keys: KeySet::new(name.clone(), settings)?, name, settings: settings.clone() })
        };
        settings.iter().map(issuer).collect::<anyhow::Result<_>>().map(Issuers)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What the operator says of the issuer of this name, if it is trusted still.
    pub fn settings(&self, name: &str) -> Option<&Settings> {
        self.0.iter().find(|issuer| *issuer.name == *name).map(|issuer| &issuer.settings)
    }

    /// Keeps every issuer's keys fresh, for ever.
    pub async fn keep_fresh(self: Arc<Self>) {
        join_all(self.0.iter().map(|issuer| issuer.keys.keep_fresh())).await;
    }

    /// Who a token stands for.
    pub async fn verify(&self, token: &str, now: Timestamp) -> Result<Verified, TokenError> {
        let (head, says) = read(token)?;
        let by = says.get("iss").and_then(Value::as_str);
        let issuer = self.0.iter().find(|issuer| by == Some(&issuer.settings.issuer)).ok_or(Reason::Issuer)?;
        let verified = issuer.verify(token, &head, now).await;
        if let Err(error) = verified {
            tracing::debug!(issuer = &*issuer.name, ?error, "a token was refused");
        }
        verified
    }
}

impl Issuer {
    async fn verify(&self, token: &str, head: &Head, now: Timestamp) -> Result<Verified, TokenError> {
        let allowed = self.settings.algorithms.iter().find(|allowed| allowed.as_str() == head.alg);
        let algorithm = allowed.ok_or(Reason::Algorithm)?.to_jwt();
        let kid = head.kid.as_deref();
        let mut says = self.signed_with_one_of(self.keys.find(kid, algorithm).await?, token, algorithm);
        if let Err(Reason::Signature) = says
            && let Some(keys) = self.keys.find_anew(kid, algorithm).await
        {
            says = self.signed_with_one_of(keys, token, algorithm);
        }
        let says = says?;
        let times = claims::times(&says, &self.settings, now)?;
        Ok(claims::read(&says, &self.settings, self.name.clone(), times)?)
    }

    fn signed_with_one_of(
        &self,
        keys: Vec<DecodingKey>,
        token: &str,
        algorithm: jsonwebtoken::Algorithm,
    ) -> Result<Map<String, Value>, Reason> {
        let tried = keys.iter().map(|key| self.signed(token, key, algorithm)).reduce(|one, other| one.or(other));
        tried.unwrap_or(Err(Reason::UnknownKey))
    }

    /// What the token says, if this key signed it, its issuer made it, and it is meant for this host.
    fn signed(
        &self,
        token: &str,
        key: &DecodingKey,
        algorithm: jsonwebtoken::Algorithm,
    ) -> Result<Map<String, Value>, Reason> {
        let mut expected = Validation::new(algorithm);
        expected.set_issuer(&[&self.settings.issuer]);
        expected.set_audience(&self.settings.audiences);
        expected.required_spec_claims = HashSet::from(["exp", "iss", "aud"].map(str::to_owned));
        // By the host's clock, in `claims`.
        expected.validate_exp = false;
        match jsonwebtoken::decode::<Map<String, Value>>(token, key, &expected) {
            Ok(token) => Ok(token.claims),
            Err(error) => Err(match error.kind() {
                ErrorKind::InvalidSignature => Reason::Signature,
                ErrorKind::InvalidIssuer => Reason::Issuer,
                ErrorKind::InvalidAudience => Reason::Audience,
                ErrorKind::MissingRequiredClaim(claim) if claim == "aud" => Reason::Audience,
                ErrorKind::MissingRequiredClaim(claim) if claim == "exp" => Reason::Expired,
                ErrorKind::InvalidAlgorithm => Reason::Algorithm,
                _ => Reason::Malformed,
            }),
        }
    }
}

/// A token's header and what it says, of which nothing is known yet.
fn read(token: &str) -> Result<(Head, Map<String, Value>), Reason> {
    let mut parts = token.split('.');
    let (Some(head), Some(says), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return Err(Reason::Malformed);
    };
    if token.len() > TOKEN_BYTES_MAX {
        return Err(Reason::Malformed);
    }
    let decoded = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| Reason::Malformed);
    let head: Head = serde_json::from_slice(&decoded(head)?).map_err(|_| Reason::Malformed)?;
    // Other types are for other ends, though the same issuer signs them: a logout token, an event.
    let typ = head.typ.as_deref().unwrap_or("JWT").to_ascii_lowercase();
    if head.crit.is_some() || !matches!(typ.as_str(), "jwt" | "at+jwt" | "application/at+jwt") {
        return Err(Reason::Malformed);
    }
    Ok((head, serde_json::from_slice(&decoded(says)?).map_err(|_| Reason::Malformed)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(head: &str, says: &str) -> String {
        format!("{}.{}.AAAA", URL_SAFE_NO_PAD.encode(head), URL_SAFE_NO_PAD.encode(says))
    }

    #[test]
    fn what_is_no_token_is_not_looked_at() {
        let head = r#"{"alg":"RS256","kid":"1"}"#;
        assert!(read(&token(head, "{}")).is_ok());
        for (head, says) in [
            ("{}", "{}"),
            ("[]", "{}"),
            (head, "[]"),
            (head, ""),
            (r#"{"alg":7}"#, "{}"),
            (r#"{"alg":"RS256","crit":["exp"]}"#, "{}"),
            (r#"{"alg":"RS256","typ":"logout+jwt"}"#, "{}"),
        ] {
            assert_eq!(read(&token(head, says)).err(), Some(Reason::Malformed), "{head} {says}");
        }
        let good = token(head, "{}");
        for bad in ["", ".", "..", "a.b", &good[1..], &format!("{good}.AAAA"), &"x".repeat(20_000)] {
            assert_eq!(read(bad).err(), Some(Reason::Malformed), "{bad}");
        }
        let long = token(head, &format!(r#"{{"a":"{}"}}"#, "x".repeat(TOKEN_BYTES_MAX)));
        assert_eq!(read(&long).err(), Some(Reason::Malformed));
    }
}
