//! Who calls: `Authorization: Bearer …`, a key or a token, and for which org → [`Caller`], and whether that may do what the route does.
//!
//! A key and most tokens say for which org they are. For whoever's does not, it is the one in `Turnhouse-Org`, or else the one that has the turn of the
//! path, or else the only one of which they are a member: here alone, so that no route ever looks at the header or forgets the question.
//!
//! Every route but health, readiness and the document takes a [`May`], or where a ticket will do a [`Follower`]: without one it has no caller, and
//! without a caller nothing that is [`crate::caller::Owned`] opens.

use std::marker::PhantomData;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, header};

use super::Gateway;
use super::params::Ids;
use super::problem::{Code, Problem};
use crate::audit::Actor;
use crate::caller::{Caller, Credential, Scopes};
use crate::clock::Timestamp;
use crate::ids::{OrgId, TurnId, UserId};
use crate::keys::Bearer;
use crate::members::{Asked, OrgError};
use crate::oidc::Of;

/// For which org a request is, of whoever's credential does not say it.
pub const ORG: HeaderName = HeaderName::from_static("turnhouse-org");

/// The address of a connection's other end, in the extensions of its requests.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// The request's id, in its extensions.
#[derive(Debug, Clone)]
pub struct RequestId(pub HeaderValue);

/// Where the extractor of callers leaves word that the key which was used ends soon: `observe` tells the client.
#[derive(Debug, Clone, Default)]
pub struct KeyEnds(Arc<OnceLock<Timestamp>>);

impl KeyEnds {
    /// When, if soon.
    pub fn soon(&self) -> Option<Timestamp> {
        self.0.get().copied()
    }
}

/// What a route demands of a key.
pub trait Right {
    /// One of these is enough.
    const ANY_OF: &[Scopes];
}

macro_rules! rights {
    ($($(#[$doc:meta])* $name:ident = [$($scope:ident),+];)*) => {
        $($(#[$doc])* #[derive(Debug, Clone, Copy)] pub struct $name;
        impl Right for $name { const ANY_OF: &[Scopes] = &[$(Scopes::$scope),+]; })*
    };
}

rights! {
    /// Runs turns and reads one's own.
    Converse = [TURNS];
    /// Changes workers and agents.
    Deploy = [DEPLOY];
    /// Sees which agents there are.
    SeeAgents = [TURNS, DEPLOY];
    /// Uploads what messages refer to, and reads it.
    Attach = [TURNS, INGEST];
    /// Hands in envelopes.
    Ingest = [INGEST];
    /// Sees what was done in the org, and by whom; says who its members are.
    Administer = [ADMIN];
}

/// A caller whose key has the right `R`.
#[derive(Debug, Clone)]
pub struct May<R> {
    caller: Caller,
    /// The key's scopes, also where it acts for another user.
    pub key_scopes: Scopes,
    /// The key's user, also where it acts for another.
    key_user: UserId,
    request_id: Option<RequestId>,
    /// What was shown.
    pub by: Credential,
    /// When that ends.
    pub expires_at: Option<Timestamp>,
    right: PhantomData<R>,
}

impl<R> std::ops::Deref for May<R> {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl<R: Right + Send> FromRequestParts<Gateway> for May<R> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<May<R>, Problem> {
        let who = authenticated(parts, gateway).await?;
        // Before it is asked which turns there are: whoever may not ask is told that of any.
        allowed::<R>(who.scopes)?;
        let asked = asked(parts, &who).await?;
        let caller = gateway.host.keys.caller(&who, &asked).await?;
        let mut may = May::check(caller, who)?;
        may.request_id = parts.extensions.get().cloned();
        match parts.uri.query().filter(|query| query.contains("user=")) {
            None => Ok(may),
            Some(query) => may.acting_for_query(query),
        }
    }
}

/// Whose key or token a request has.
pub async fn authenticated(parts: &Parts, gateway: &Gateway) -> Result<Bearer, Problem> {
    let mut given = parts.headers.get_all(header::AUTHORIZATION).iter();
    let secret = match (given.next(), given.next()) {
        (Some(one), None) => one.to_str().ok().and_then(bearer),
        _ => None,
    };
    let who = gateway.host.keys.authenticate(secret, from(parts)).await?;
    if let (Some(at), Some(ends)) = (gateway.host.key_ends_soon(&who), parts.extensions.get::<KeyEnds>()) {
        // Whoever asks twice for the caller hears the same.
        let _ = ends.0.set(at);
    }
    Ok(who)
}

/// What a request says of the org that it is for. Its turn matters only to whoever's credential names none.
pub async fn asked(parts: &mut Parts, who: &Bearer) -> Result<Asked, Problem> {
    let org = named_org(parts)?;
    let turn = match who.of {
        Of::Membership(_) if org.is_none() => named_turn(parts).await?,
        _ => None,
    };
    Ok(Asked { org, turn })
}

fn named_org(parts: &Parts) -> Result<Option<OrgId>, Problem> {
    let mut given = parts.headers.get_all(ORG).iter();
    match (given.next(), given.next()) {
        (None, _) => Ok(None),
        (Some(one), None) => Ok(Some(OrgId::parse(&String::from_utf8_lossy(one.as_bytes()))?)),
        (Some(_), Some(_)) => {
            Err(Problem::new(Code::MalformedRequest, "a request is for one org: send one Turnhouse-Org header"))
        }
    }
}

async fn named_turn(parts: &mut Parts) -> Result<Option<TurnId>, Problem> {
    let params = RawPathParams::from_request_parts(parts, &()).await;
    let params = params.map_err(|_| Problem::new(Code::InvalidId, "the path is not UTF-8"))?;
    let turn = params.iter().find(|(name, _)| *name == "turn").map(|(_, text)| text.parse());
    Ok(turn.transpose()?)
}

/// Whether these scopes have the right.
fn allowed<R: Right>(scopes: Scopes) -> Result<(), Problem> {
    if R::ANY_OF.iter().any(|scope| scopes.include(*scope)) { Ok(()) } else { Err(missing(R::ANY_OF)) }
}

impl<R: Right> May<R> {
    /// Whether the caller has the right in the org.
    fn check(caller: Caller, who: Bearer) -> Result<May<R>, Problem> {
        allowed::<R>(caller.scopes)?;
        let (key_scopes, key_user, by, expires_at) = (caller.scopes, who.user, who.by, who.expires_at);
        Ok(May { key_scopes, key_user, caller, by, expires_at, request_id: None, right: PhantomData })
    }

    /// The caller, unless they act for a member, who is no admin: what is the org's alone they do not do.
    pub fn as_admin(&self) -> Result<&Caller, Problem> {
        if self.caller.scopes.include(Scopes::ADMIN) { Ok(&self.caller) } else { Err(missing(&[Scopes::ADMIN])) }
    }

    /// The caller as `user`, where the request names one: who acts for a user sees what that user sees, and no more.
    pub fn acting_for(&self, user: Option<&str>) -> Result<Caller, Problem> {
        let Some(user) = user else { return Ok(self.caller.clone()) };
        if !self.key_scopes.include(Scopes::ACT_AS) {
            return Err(missing(&[Scopes::ACT_AS]));
        }
        let credential = self.caller.credential.clone();
        Ok(Caller { org: self.caller.org.clone(), user: UserId::parse(user)?, scopes: Scopes::TURNS, credential })
    }

    /// Who the audit says it was: the authenticated one, and for whom they acted.
    pub fn actor(&self) -> Actor {
        let request_id = self.request_id.as_ref().and_then(|id| id.0.to_str().ok());
        let acting_for = (self.caller.user != self.key_user).then(|| self.caller.user.clone());
        Actor::new(self.key_user.as_str(), &self.caller.credential, request_id, acting_for)
    }

    /// `?user=`: the same for requests without a body.
    fn acting_for_query(mut self, query: &str) -> Result<May<R>, Problem> {
        let user = query.split('&').find_map(|pair| pair.strip_prefix("user=")).map(percent_decoded);
        self.caller = self.acting_for(user.as_deref())?;
        Ok(self)
    }
}

/// Whoever follows a turn: a caller with a key, or with a ticket for that turn.
#[derive(Debug)]
pub struct Follower {
    caller: Caller,
    /// Which turn.
    pub turn: TurnId,
    /// Whether it came with a ticket, whose end is the turn's.
    pub with_ticket: bool,
}

impl std::ops::Deref for Follower {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl FromRequestParts<Gateway> for Follower {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<Follower, Problem> {
        let query = parts.uri.query().unwrap_or_default();
        // Tickets are made of characters that need no escape.
        let mut tickets = query.split('&').filter_map(|pair| pair.strip_prefix("ticket="));
        let Some(ticket) = tickets.next() else {
            let may = May::<Converse>::from_request_parts(parts, gateway).await?;
            let Ids(turn) = Ids::from_request_parts(parts, gateway).await?;
            return Ok(Follower { caller: may.caller, turn, with_ticket: false });
        };
        let names_user = query.split('&').any(|pair| pair.starts_with("user="));
        if tickets.next().is_some() || names_user || parts.headers.contains_key(header::AUTHORIZATION) {
            let detail = "a ticket says who follows: send one, and neither a key nor `user` beside it";
            return Err(Problem::new(Code::MalformedRequest, detail));
        }
        let (ticket, from) = (ticket.to_owned(), from(parts));
        let Ids(turn) = Ids::from_request_parts(parts, gateway).await?;
        let caller = gateway.host.keys.follower(&ticket, turn, from).await?;
        if named_org(parts)?.is_some_and(|named| named != caller.org) {
            return Err(OrgError::NotThere.into());
        }
        Ok(Follower { caller, turn, with_ticket: true })
    }
}

/// The other end's address, where there is a connection.
fn from(parts: &Parts) -> Option<IpAddr> {
    parts.extensions.get::<Peer>().map(|peer| peer.0)
}

/// The token of `Bearer <token>`.
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim_start())
}

/// User ids have `:` and `@`, which clients may escape; an escape that is none stays and is refused as an id.
fn percent_decoded(text: &str) -> String {
    let uri = format!("/?user={text}");
    let parsed = uri.parse().ok().and_then(|uri| {
        axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&uri)
            .ok()
            .and_then(|query| query.0.into_iter().next())
    });
    parsed.map_or_else(|| text.to_owned(), |(_, value)| value)
}

/// The key, token or role lacks these.
pub fn missing(any_of: &[Scopes]) -> Problem {
    let names: Vec<String> = any_of.iter().map(ToString::to_string).collect();
    let scope = names.join(" or ");
    Problem::new(
        Code::ScopeMissing,
        format!("this key lacks the scope {scope}; use a key that has it (`turnhouse keys create --scopes …`)"),
    )
    .with("scope", names.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may(scopes: &str) -> Result<May<Converse>, Problem> {
        let (org, user): (OrgId, UserId) = ("acme".parse().unwrap(), "backend".parse().unwrap());
        let (scopes, credential, by) =
            (Scopes::parse(scopes).unwrap(), "key:1".into(), Credential::Key { id: "1".into() });
        let who = Bearer { user: user.clone(), of: Of::Org(org.clone()), scopes, credential, by, expires_at: None };
        May::check(Caller { org, user, scopes, credential: "key:1".into() }, who)
    }

    #[test]
    fn a_missing_scope_is_named() {
        let problem = may("deploy").unwrap_err();
        assert_eq!(problem.code(), Code::ScopeMissing);
        assert!(format!("{problem:?}").contains("turns"));
        assert!(may("admin").is_ok());
    }

    #[test]
    fn who_acts_for_a_user_is_that_user_and_no_more() {
        let ann = may("admin,act_as").unwrap().acting_for(Some("ann")).unwrap();
        assert_eq!(ann.user.as_str(), "ann");
        assert!(ann.sees(&"ann".parse().unwrap()) && !ann.sees(&"bob".parse().unwrap()));
        assert_eq!(may("admin").unwrap().acting_for(Some("ann")).unwrap_err().code(), Code::ScopeMissing);
        assert_eq!(may("turns,act_as").unwrap().acting_for(Some("a/b")).unwrap_err().code(), Code::InvalidId);
        let query = may("turns,act_as").unwrap().acting_for_query("limit=1&user=ann%40example.org").unwrap();
        assert_eq!(query.user.as_str(), "ann@example.org");
        let actor = query.actor();
        assert_eq!((actor.user.as_str(), actor.credential.as_str()), ("backend", "key:1"), "it is not who it acts for");
        assert_eq!(actor.acting_for, Some("ann@example.org".parse().unwrap()));
        assert_eq!(may("turns").unwrap().actor().acting_for, None);
    }

    #[test]
    fn a_bearer_token_is_read_whatever_the_case_of_its_scheme() {
        assert_eq!(bearer("Bearer th_1"), Some("th_1"));
        assert_eq!(bearer("bearer th_1"), Some("th_1"));
        assert_eq!(bearer("Basic th_1"), None);
        assert_eq!(bearer("th_1"), None);
    }
}
