//! What an operator says of an issuer. Pure.

use std::collections::BTreeMap;

use reqwest::Url;
use serde::{Deserialize, Serialize};

use crate::caller::Scopes;
use crate::ids::OrgId;

/// An issuer of tokens that the host trusts: `[oidc.<name>]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Its address, exactly as its tokens say it in `iss`. Its discovery document lies below.
    pub issuer: String,
    /// A token must be for one of these (`aud`).
    pub audiences: Vec<String>,
    /// What its tokens may be signed with.
    pub algorithms: Vec<Algorithm>,
    /// Where its keys are, if it has no discovery document.
    pub jwks_url: Option<String>,
    /// The org of all its tokens. This, or `org_claim`, or neither: then a token is for whichever org its user is a member of.
    pub org: Option<OrgId>,
    /// The claim that says which org: its name, or a JSON pointer (`/tenant/name`).
    pub org_claim: Option<String>,
    /// Unless `org` is set: the orgs that its tokens may be for; any, when empty.
    pub orgs: Vec<OrgId>,
    /// With `org` or `org_claim`: the user must be a member of the org, and may do what token and role both allow.
    pub members_only: bool,
    /// The claim that says which user. With `email`, `email_verified` must be true.
    pub user_claim: String,
    /// The claim that says what may be done: words, or a list.
    pub scopes_claim: String,
    /// What the words of that claim allow. When empty, `turnhouse:turns` allows `turns`, and so on, but for `operator`.
    pub scopes: BTreeMap<String, Scopes>,
    /// What every token of the issuer allows.
    pub scopes_always: Scopes,
    /// By how much its clock may differ from the host's.
    pub leeway_s: u64,
    /// For how long from now a token may be valid: a token cannot be revoked.
    pub lifetime_s_max: u64,
    /// How long its keys are believed while it does not answer.
    pub keys_kept_s: u64,
    /// Between two looks for a key that nobody knows.
    pub refetch_s: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            issuer: String::new(),
            audiences: Vec::new(),
            algorithms: vec![Algorithm::RS256, Algorithm::ES256],
            jwks_url: None,
            org: None,
            org_claim: None,
            orgs: Vec::new(),
            members_only: false,
            user_claim: "sub".to_owned(),
            scopes_claim: "scope".to_owned(),
            scopes: BTreeMap::new(),
            scopes_always: Scopes::default(),
            leeway_s: 30,
            lifetime_s_max: 86_400,
            keys_kept_s: 86_400,
            refetch_s: 10,
        }
    }
}

macro_rules! algorithms {
    ($($name:ident),*) => {
        /// What a token may be signed with: asymmetric algorithms only, so that no public key is ever taken for a secret.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[allow(missing_docs)]
        pub enum Algorithm { $($name),* }

        impl Algorithm {
            /// As a token's header says it.
            pub fn as_str(self) -> &'static str {
                match self { $(Algorithm::$name => stringify!($name)),* }
            }

            /// As the library has it.
            pub(super) fn to_jwt(self) -> jsonwebtoken::Algorithm {
                match self { $(Algorithm::$name => jsonwebtoken::Algorithm::$name),* }
            }
        }
    };
}
algorithms!(RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA);

impl Settings {
    /// Whether what its users may do is bounded by what they are in the org.
    pub fn by_membership(&self) -> bool {
        self.members_only || (self.org.is_none() && self.org_claim.is_none())
    }

    /// Names what is wrong, and what to do.
    pub fn check(&self, name: &str) -> Result<(), String> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b);
        if !(1..=32).contains(&name.len()) || !name.bytes().all(plain) {
            return Err(format!("oidc.{name}: name it with 1 to 32 lower-case letters, digits, - or _"));
        }
        address(&self.issuer).map_err(|why| format!("oidc.{name}.issuer {why}"))?;
        if let Some(url) = &self.jwks_url {
            address(url).map_err(|why| format!("oidc.{name}.jwks_url {why}"))?;
        }
        if self.audiences.iter().all(String::is_empty) || self.audiences.iter().any(String::is_empty) {
            return Err(format!("oidc.{name}.audiences must name what tokens for this host have in `aud`"));
        }
        if self.algorithms.is_empty() {
            return Err(format!("oidc.{name}.algorithms must name at least one"));
        }
        if self.org.is_some() && self.org_claim.is_some() {
            return Err(format!(
                "oidc.{name}: set `org`, for tokens of one org, or `org_claim`, for tokens that say it, not both"
            ));
        }
        if self.org.is_some() && !self.orgs.is_empty() {
            return Err(format!("oidc.{name}.orgs goes with `org_claim`, or with neither"));
        }
        if self.leeway_s > 600 {
            return Err(format!("oidc.{name}.leeway_s must be at most 600: set the clocks instead"));
        }
        Ok(())
    }
}

/// Whether an org is among those for which an issuer may speak: any, when none is named.
pub fn is_among(orgs: &[OrgId], org: &OrgId) -> bool {
    orgs.is_empty() || orgs.contains(org)
}

/// An address to fetch from: TLS, but for what does not leave the machine.
pub(super) fn address(text: &str) -> Result<Url, String> {
    let url: Url = text.parse().map_err(|_| "must be an address: https://id.example.org".to_owned())?;
    let secret = !url.username().is_empty() || url.password().is_some();
    if secret || url.fragment().is_some() {
        return Err("must be an address without user, password and fragment".to_owned());
    }
    match url.scheme() {
        "https" if url.has_host() => Ok(url),
        "http" if is_loopback(&url) => Ok(url),
        _ => Err("must be an https:// address; http:// is for this machine's own loopback alone".to_owned()),
    }
}

/// Whether it does not leave the machine.
pub(super) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Settings {
        Settings {
            issuer: "https://id.example.org/realms/main".to_owned(),
            audiences: vec!["turnhouse".to_owned()],
            org_claim: Some("org".to_owned()),
            ..Settings::default()
        }
    }

    #[test]
    fn what_an_issuer_must_have_is_named() {
        good().check("main").unwrap();
        let one = |name: &str, change: fn(&mut Settings)| {
            let mut settings = good();
            change(&mut settings);
            settings.check(name).unwrap_err()
        };
        for (why, says) in [
            (one("Main", |_| {}), "lower-case"),
            (one("main", |s| s.issuer = "http://id.example.org".to_owned()), "https"),
            (one("main", |s| s.issuer = "ftp://127.0.0.1".to_owned()), "https"),
            (one("main", |s| s.issuer = "https://ann:secret@id.example.org".to_owned()), "without user"),
            (one("main", |s| s.jwks_url = Some("http://10.0.0.1/keys".to_owned())), "jwks_url"),
            (one("main", |s| s.audiences.clear()), "audiences"),
            (one("main", |s| s.audiences.push(String::new())), "audiences"),
            (one("main", |s| s.algorithms.clear()), "algorithms"),
            (one("main", |s| s.org = Some("acme".parse().unwrap())), "org_claim"),
            (one("main", |s| s.leeway_s = 3_600), "leeway_s"),
        ] {
            assert!(why.contains(says) && why.contains("oidc.") && !why.contains("secret"), "{why}");
        }
        let of_members = Settings { org_claim: None, ..good() };
        of_members.check("main").unwrap();
        assert!(of_members.by_membership() && !good().by_membership());
        let mut local = good();
        local.issuer = "http://127.0.0.1:9000".to_owned();
        local.check("local").unwrap();
    }

    #[test]
    fn no_symmetric_algorithm_can_be_allowed() {
        for bad in ["HS256", "HS384", "HS512", "none", "None", "rs256"] {
            assert!(serde_json::from_value::<Algorithm>(bad.into()).is_err(), "{bad}");
        }
        assert_eq!(serde_json::from_value::<Algorithm>("EdDSA".into()).unwrap(), Algorithm::EdDSA);
    }
}
