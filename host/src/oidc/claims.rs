//! What a token says, whose signature, issuer and audience are right: its times, and for whom it stands. Pure.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Reason, Settings, is_among};
use crate::caller::Scopes;
use crate::clock::Timestamp;
use crate::ids::{OrgId, UserId};

/// Who a token stands for. Whether there is such an org is not known here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Whom.
    pub user: UserId,
    /// For which org.
    pub of: Of,
    /// What it may do.
    pub scopes: Scopes,
    /// The issuer, by the operator's name for it.
    pub issuer: Arc<str>,
    /// Until when, the leeway included.
    pub until: Timestamp,
}

/// For which org a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Of {
    /// The one that it says, or the operator of all tokens of its issuer.
    Org(OrgId),
    /// The same, where its user must be a member.
    MembersOf(OrgId),
    /// Whichever its user is a member of, among these; any, when there are none.
    Membership(Arc<[OrgId]>),
}

/// By the words of the claim itself: a token never makes an operator unless the operator says so.
const BY_NAME: &[(&str, Scopes)] = &[
    ("turnhouse:turns", Scopes::TURNS),
    ("turnhouse:deploy", Scopes::DEPLOY),
    ("turnhouse:admin", Scopes::ADMIN),
    ("turnhouse:ingest", Scopes::INGEST),
    ("turnhouse:act_as", Scopes::ACT_AS),
];

/// Until when a token is good, if it is now.
pub fn times(says: &Map<String, Value>, settings: &Settings, now: Timestamp) -> Result<Timestamp, Reason> {
    // Seconds, perhaps with a fraction (RFC 7519).
    let ms = |name: &str| {
        says.get(name).map(|at| at.as_f64().map(|at| (at * 1_000.0) as i64).ok_or(Reason::Malformed)).transpose()
    };
    let leeway_ms = i64::try_from(settings.leeway_s * 1_000).unwrap_or(i64::MAX);
    let expires = ms("exp")?.ok_or(Reason::Expired)?.saturating_add(leeway_ms);
    if expires <= now.0 {
        return Err(Reason::Expired);
    }
    let begins = ms("nbf")?.max(ms("iat")?);
    if begins.is_some_and(|at| at.saturating_sub(leeway_ms) > now.0) {
        return Err(Reason::NotYetValid);
    }
    let longest_ms = i64::try_from(settings.lifetime_s_max.saturating_mul(1_000)).unwrap_or(i64::MAX);
    if expires.saturating_sub(leeway_ms) > now.0.saturating_add(longest_ms) {
        return Err(Reason::Lifetime);
    }
    Ok(Timestamp(expires))
}

/// Org, user and scopes, as the operator maps them.
pub fn read(
    says: &Map<String, Value>,
    settings: &Settings,
    issuer: Arc<str>,
    until: Timestamp,
) -> Result<Verified, Reason> {
    // Bound to a key that its bearer would have to show, which nobody asks for here: it must not pass as a plain one.
    if says.contains_key("cnf") {
        return Err(Reason::Claims);
    }
    let org = match (&settings.org, &settings.org_claim) {
        (Some(org), _) => Some(org.clone()),
        (None, Some(claim)) => {
            let org = claimed(says, claim).and_then(Value::as_str).ok_or(Reason::Claims)?;
            let org = OrgId::parse(org).map_err(|_| Reason::Claims)?;
            if !is_among(&settings.orgs, &org) {
                return Err(Reason::Claims);
            }
            Some(org)
        }
        (None, None) => None,
    };
    let of = match org {
        Some(org) if settings.members_only => Of::MembersOf(org),
        Some(org) => Of::Org(org),
        None => Of::Membership(settings.orgs.as_slice().into()),
    };
    // Anybody can claim an address that nobody has looked at.
    let unproven = says.get("email_verified").and_then(Value::as_bool) != Some(true);
    if settings.user_claim == "email" && unproven {
        return Err(Reason::Claims);
    }
    let user = claimed(says, &settings.user_claim).and_then(Value::as_str).ok_or(Reason::Claims)?;
    let user = UserId::parse(user).map_err(|_| Reason::Claims)?;
    Ok(Verified { user, of, scopes: scopes(says, settings), issuer, until })
}

fn scopes(says: &Map<String, Value>, settings: &Settings) -> Scopes {
    let words: Vec<&str> = match claimed(says, &settings.scopes_claim) {
        Some(Value::String(text)) => text.split(' ').collect(),
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let allows = |word: &str| match settings.scopes.is_empty() {
        true => BY_NAME.iter().find(|(name, _)| *name == word).map(|(_, scopes)| *scopes),
        false => settings.scopes.get(word).copied(),
    };
    words.into_iter().filter_map(allows).fold(settings.scopes_always, Scopes::and)
}

/// A claim by its name, or by a pointer into what is nested. Names may have slashes within, as URLs do.
fn claimed<'a>(says: &'a Map<String, Value>, claim: &str) -> Option<&'a Value> {
    let Some(path) = claim.strip_prefix('/') else { return says.get(claim) };
    let (first, rest) = path.split_once('/').map_or((path, None), |(first, rest)| (first, Some(rest)));
    let first = says.get(&first.replace("~1", "/").replace("~0", "~"))?;
    match rest {
        Some(rest) => first.pointer(&format!("/{rest}")),
        None => Some(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: Timestamp = Timestamp(1_000_000_000);

    fn settings() -> Settings {
        Settings { org_claim: Some("org".to_owned()), ..Settings::default() }
    }

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn read_as(settings: &Settings, says: Value) -> Result<Verified, Reason> {
        read(&map(says), settings, "main".into(), NOW)
    }

    fn of(org: &str) -> Of {
        Of::Org(org.parse().unwrap())
    }

    #[test]
    fn a_token_is_good_between_its_times_and_for_no_longer_than_is_allowed() {
        let times = |says: Value| times(&map(says), &settings(), NOW);
        let now = 1_000_000;
        assert_eq!(times(json!({"exp": now + 60})), Ok(Timestamp((now + 90) * 1_000)));
        assert_eq!(times(json!({"exp": now - 29})), Ok(Timestamp((now + 1) * 1_000)), "within the leeway");
        assert_eq!(times(json!({"exp": now as f64 + 0.5})), Ok(Timestamp((now + 30) * 1_000 + 500)));
        for (says, why) in [
            (json!({}), Reason::Expired),
            (json!({"exp": now - 30}), Reason::Expired),
            (json!({"exp": -1e300}), Reason::Expired),
            (json!({"exp": "tomorrow"}), Reason::Malformed),
            (json!({"exp": null}), Reason::Malformed),
            (json!({"exp": now + 60, "nbf": now + 31}), Reason::NotYetValid),
            (json!({"exp": now + 60, "iat": now + 31}), Reason::NotYetValid),
            (json!({"exp": now + 60, "nbf": "now"}), Reason::Malformed),
            (json!({"exp": now + 86_401}), Reason::Lifetime),
            (json!({"exp": 1e300}), Reason::Lifetime),
        ] {
            assert_eq!(times(says.clone()), Err(why), "{says}");
        }
    }

    #[test]
    fn org_user_and_scopes_are_those_of_the_claims_that_the_operator_names() {
        let says =
            json!({"org": "acme", "sub": "ann@acme.example", "scope": "openid turnhouse:turns turnhouse:operator"});
        let token = read_as(&settings(), says.clone()).unwrap();
        assert_eq!((token.of, token.user.as_str()), (of("acme"), "ann@acme.example"));
        assert_eq!(token.scopes, Scopes::TURNS, "no token makes an operator by itself");
        let nested = Settings {
            org_claim: Some("/tenant/name".to_owned()),
            user_claim: "https://example.org/user".to_owned(),
            scopes_claim: "/realm/roles".to_owned(),
            scopes: [("boss".to_owned(), Scopes::ADMIN.and(Scopes::OPERATOR))].into(),
            scopes_always: Scopes::TURNS,
            ..settings()
        };
        let nested = read_as(
            &nested,
            json!({"tenant": {"name": "zeta"}, "https://example.org/user": "zoe", "realm": {"roles": ["boss", "turnhouse:ingest", 7]}}),
        )
        .unwrap();
        assert_eq!((nested.of, nested.user.as_str()), (of("zeta"), "zoe"));
        assert_eq!(nested.scopes, Scopes::ADMIN.and(Scopes::OPERATOR).and(Scopes::TURNS));
        let fixed = Settings { org: Some("acme".parse().unwrap()), org_claim: None, ..settings() };
        assert_eq!(read_as(&fixed, json!({"org": "zeta", "sub": "ann"})).unwrap().of, of("acme"));
        assert_eq!(read_as(&fixed, json!({"sub": "ann"})).unwrap().scopes, Scopes::default());
    }

    #[test]
    fn whose_membership_counts_is_the_operators_to_say() {
        let acme: OrgId = "acme".parse().unwrap();
        let says = json!({"org": "acme", "sub": "ann"});
        let members = Settings { members_only: true, ..settings() };
        assert_eq!(read_as(&members, says.clone()).unwrap().of, Of::MembersOf(acme.clone()));
        let none = Settings { org_claim: None, orgs: vec![acme.clone()], ..settings() };
        assert_eq!(
            read_as(&none, says).unwrap().of,
            Of::Membership([acme].into()),
            "a claim that nobody named says nothing"
        );
    }

    #[test]
    fn o1_a_token_that_does_not_say_whose_it_is_stands_for_nobody() {
        for says in [
            json!({"sub": "ann"}),
            json!({"org": null, "sub": "ann"}),
            json!({"org": ["acme"], "sub": "ann"}),
            json!({"org": "../acme", "sub": "ann"}),
            json!({"org": "acme"}),
            json!({"org": "acme", "sub": ""}),
            json!({"org": "acme", "sub": "auth0|7"}),
            json!({"org": "acme", "sub": 7}),
            json!({"org": "acme", "sub": "ann", "cnf": {"jkt": "x"}}),
        ] {
            assert_eq!(read_as(&settings(), says.clone()), Err(Reason::Claims), "{says}");
        }
        let some = Settings { orgs: vec!["acme".parse().unwrap()], ..settings() };
        assert!(read_as(&some, json!({"org": "acme", "sub": "ann"})).is_ok());
        assert_eq!(read_as(&some, json!({"org": "zeta", "sub": "ann"})), Err(Reason::Claims));
        let by_mail = Settings { user_claim: "email".to_owned(), ..settings() };
        let mail = |verified: Value| json!({"org": "acme", "email": "ann@acme.example", "email_verified": verified});
        assert!(read_as(&by_mail, mail(json!(true))).is_ok());
        for unproven in [json!(false), json!("true"), json!(null)] {
            assert_eq!(read_as(&by_mail, mail(unproven)), Err(Reason::Claims));
        }
    }
}
