//! Who is calling, and what is theirs. The one ownership check (O1, O2). Pure.
//!
//! Stores hand out what belongs to somebody as [`Owned`]; its content is reached only through [`Owned::open`], so that a route cannot be
//! written without the check.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{OrgId, UserId};

macro_rules! scopes {
    ($($(#[$doc:meta])* $name:ident = $bit:literal, $text:literal;)*) => {
        /// What a key may do.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct Scopes(u8);

        impl Scopes {
            $($(#[$doc])* pub const $name: Scopes = Scopes(1 << $bit);)*
            const NAMES: &[(Scopes, &'static str)] = &[$((Scopes::$name, $text),)*];
        }
    };
}

scopes! {
    /// Run turns and read one's own.
    TURNS = 0, "turns";
    /// Workers, and agents but for their hosts, secrets and `default`.
    DEPLOY = 1, "deploy";
    /// All of the org, and its keys.
    ADMIN = 2, "admin";
    /// `POST /v1/ingest`.
    INGEST = 3, "ingest";
    /// Name the user for whom it calls.
    ACT_AS = 4, "act_as";
    /// Host-wide metrics and limits; no content.
    OPERATOR = 5, "operator";
}

impl Scopes {
    /// Whether every scope of `other` is among these; `admin` includes `turns` and `deploy`.
    pub fn include(self, other: Scopes) -> bool {
        self.whole() & other.0 == other.0
    }

    /// What both allow.
    #[must_use]
    pub fn shared_with(self, other: Scopes) -> Scopes {
        Scopes(self.whole() & other.whole())
    }

    fn whole(self) -> u8 {
        let implied = if self.0 & Scopes::ADMIN.0 != 0 { Scopes::TURNS.0 | Scopes::DEPLOY.0 } else { 0 };
        self.0 | implied
    }

    /// Both.
    #[must_use]
    pub const fn and(self, other: Scopes) -> Scopes {
        Scopes(self.0 | other.0)
    }

    /// From `turns,deploy`. The error is the name that is no scope.
    pub fn parse(text: &str) -> Result<Scopes, String> {
        text.split(',').map(str::trim).filter(|name| !name.is_empty()).try_fold(Scopes::default(), |all, name| {
            let known = Scopes::NAMES.iter().find(|(_, text)| *text == name);
            known.map(|(scope, _)| all.and(*scope)).ok_or_else(|| name.to_owned())
        })
    }

    /// Their names.
    pub fn names(self) -> Vec<&'static str> {
        Scopes::NAMES.iter().filter(|(scope, _)| self.0 & scope.0 != 0).map(|(_, name)| *name).collect()
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(","))
    }
}

impl fmt::Debug for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Scopes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.names().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Scopes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        Scopes::parse(&names.join(",")).map_err(|name| serde::de::Error::custom(format!("{name:?} is no scope")))
    }
}

/// As what somebody belongs to an org: what they may do there with a credential that is theirs and not the org's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Runs turns and reads their own.
    Member,
    /// All of the org but its owners.
    Admin,
    /// All of the org.
    Owner,
}

impl Role {
    /// As stored and sent.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Member => "member",
            Role::Admin => "admin",
            Role::Owner => "owner",
        }
    }

    /// From its text.
    pub fn parse(text: &str) -> Option<Role> {
        [Role::Member, Role::Admin, Role::Owner].into_iter().find(|role| role.as_str() == text)
    }

    /// What it allows. Nothing of adapters, backends and operators: those have keys.
    pub fn scopes(self) -> Scopes {
        match self {
            Role::Member => Scopes::TURNS,
            Role::Admin | Role::Owner => Scopes::ADMIN,
        }
    }
}

/// The authenticated caller of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The org of the key, or the one of theirs that the request is for.
    pub org: OrgId,
    /// The user of the key.
    pub user: UserId,
    /// What the key may do.
    pub scopes: Scopes,
    /// What they authenticated with, for the audit: `key:<id>`. No secret.
    pub credential: Arc<str>,
}

impl Caller {
    /// Whose things this caller sees, where not everybody's.
    pub fn only_own(&self) -> Option<&UserId> {
        (!self.scopes.include(Scopes::ADMIN)).then_some(&self.user)
    }

    /// Whether what `owner` began is this caller's to see: their own, or any of the org's for an admin.
    pub fn sees(&self, owner: &UserId) -> bool {
        self.only_own().is_none_or(|user| user == owner)
    }
}

/// What a caller showed: by which it can be asked again whether it is still good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Credential {
    /// An API key of the caller's org.
    Key {
        /// What names it in lists.
        id: Arc<str>,
    },
    /// A token of an issuer that the operator trusts.
    Token {
        /// By the operator's name for it.
        issuer: Arc<str>,
    },
}

/// Something that belongs to a member of an org. Who asks must show who they are.
#[derive(Debug, Clone)]
pub struct Owned<T> {
    org: OrgId,
    owner: UserId,
    value: T,
}

impl<T> Owned<T> {
    /// Marks `value` as `owner`'s, of `org`.
    pub fn new(org: OrgId, owner: UserId, value: T) -> Owned<T> {
        Owned { org, owner, value }
    }

    /// The value, if it is the caller's to see. `None` is answered as if it did not exist.
    pub fn open(self, caller: &Caller) -> Option<T> {
        (self.org == caller.org && caller.sees(&self.owner)).then_some(self.value)
    }

    /// The value, for the host's own use: never on behalf of a caller.
    pub fn for_host(self) -> T {
        self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(org: &str, user: &str, scopes: &str) -> Caller {
        Caller {
            org: org.parse().unwrap(),
            user: user.parse().unwrap(),
            scopes: Scopes::parse(scopes).unwrap(),
            credential: "key:1".into(),
        }
    }

    #[test]
    fn o1_one_ownership_function_decides() {
        let owned = Owned::new("a".parse().unwrap(), "ann".parse().unwrap(), 1);
        assert_eq!(owned.clone().open(&caller("a", "ann", "turns")), Some(1));
        assert_eq!(owned.clone().open(&caller("a", "root", "admin")), Some(1));
        assert_eq!(owned.clone().open(&caller("a", "bob", "turns,deploy,ingest,act_as,operator")), None);
        assert_eq!(owned.clone().open(&caller("b", "ann", "turns")), None);
        assert_eq!(owned.open(&caller("b", "root", "admin")), None);
    }

    #[test]
    fn scopes_are_parsed_by_name_and_admin_includes_the_daily_ones() {
        assert_eq!(Scopes::parse("turns, deploy").unwrap().to_string(), "turns,deploy");
        assert_eq!(Scopes::parse("root").unwrap_err(), "root");
        assert!(Scopes::ADMIN.include(Scopes::TURNS.and(Scopes::DEPLOY)));
        assert!(!Scopes::ADMIN.include(Scopes::OPERATOR));
        assert!(!Scopes::TURNS.include(Scopes::DEPLOY));
    }

    #[test]
    fn a_role_allows_no_more_than_the_credential_and_no_less_than_both() {
        let shared = |scopes: &str, role: Role| Scopes::parse(scopes).unwrap().shared_with(role.scopes()).to_string();
        assert_eq!(shared("admin", Role::Member), "turns");
        assert_eq!(shared("admin,operator,act_as,ingest", Role::Owner), "turns,deploy,admin");
        assert_eq!(shared("deploy", Role::Admin), "deploy");
        assert_eq!(shared("deploy", Role::Member), "");
        for role in [Role::Member, Role::Admin, Role::Owner] {
            assert_eq!(Role::parse(role.as_str()), Some(role));
        }
        assert_eq!(Role::parse("root"), None);
    }
}
