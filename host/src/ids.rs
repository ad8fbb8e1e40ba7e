//! Identifiers, each its own type, validated once at the edge (O4).
//!
//! Names that people choose (`OrgId`, `AgentId`, …) are cheap to clone and compare; names that the host makes (`TurnId`, `RunId`,
//! `ReplicaId`) are UUIDs. Nothing here knows where an id is stored.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::attachment::AttachmentId;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{kind} id must be 1 to {max} characters, a letter or digit first, then letters, digits or any of {punctuation:?}"
)]
pub struct InvalidId {
    /// Which kind of id was expected: `agent`, `conversation`, ….
    pub kind: &'static str,
    max: usize,
    punctuation: &'static str,
}

impl InvalidId {
    /// Of what is named by its bytes.
    pub(crate) fn of_attachment() -> InvalidId {
        InvalidId { kind: "attachment", max: AttachmentId::TEXT_BYTES, punctuation: "-" }
    }
}

fn check(kind: &'static str, text: &str, max: usize, punctuation: &'static str) -> Result<(), InvalidId> {
    let mut bytes = text.bytes();
    let head = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    let tail = bytes.all(|b| b.is_ascii_alphanumeric() || punctuation.as_bytes().contains(&b));
    if head && tail && text.len() <= max { Ok(()) } else { Err(InvalidId { kind, max, punctuation }) }
}

macro_rules! chosen_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:tt, $punctuation:literal, $pattern:tt) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schema(value_type = String, min_length = 1, max_length = $max, pattern = $pattern)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks `text` and keeps it.
            pub fn parse(text: &str) -> Result<Self, InvalidId> {
                check($kind, text, $max, $punctuation)?;
                Ok(Self(text.into()))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::parse(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    };
}

chosen_id!(
    /// The tenant.
    OrgId, "org", 64, "._-", "^[A-Za-z0-9][A-Za-z0-9._-]*$"
);
chosen_id!(
    /// A member of an org, as its keys name them.
    UserId, "user", 128, "._:@-", "^[A-Za-z0-9][A-Za-z0-9._:@-]*$"
);
chosen_id!(
    /// An agent of an org.
    AgentId, "agent", 64, "._-", "^[A-Za-z0-9][A-Za-z0-9._-]*$"
);
chosen_id!(
    /// A worker of an org's registry.
    WorkerName, "worker", 64, "._-", "^[A-Za-z0-9][A-Za-z0-9._-]*$"
);
chosen_id!(
    /// A conversation; chosen by the client, per (org, agent).
    ConversationId, "conversation", 128, "._:@-", "^[A-Za-z0-9][A-Za-z0-9._:@-]*$"
);

macro_rules! made_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, format = Uuid, pattern = "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new one, ordered by time (UUIDv7).
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// Its 16 bytes, as the stores keep it.
            pub fn as_bytes(&self) -> &[u8] {
                self.0.as_bytes()
            }

            /// From the 16 bytes of a store.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                Uuid::from_slice(bytes).ok().map(Self)
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            /// Only the hyphenated lower-case form is an id: one turn has one URL.
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = InvalidId { kind: $kind, max: 36, punctuation: "-" };
                let id = Uuid::try_parse(text).map_err(|_| invalid.clone())?;
                if id.hyphenated().encode_lower(&mut Uuid::encode_buffer()) != text { return Err(invalid); }
                Ok(Self(id))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

made_id!(
    /// One turn.
    TurnId, "turn"
);
made_id!(
    /// What lets a turn write its conversation's snapshot.
    RunId, "run"
);
made_id!(
    /// One incarnation of one host process.
    ReplicaId, "replica"
);

impl From<TurnId> for RunId {
    /// The gateway's own runs carry their turn's id.
    fn from(turn: TurnId) -> RunId {
        RunId(turn.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn o4_ids_are_validated_at_the_edge() {
        for good in ["a", "A-1", "c.42_x", &"x".repeat(64)] {
            assert!(AgentId::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "../etc", "a/b", "a\0b", "a b", "é", "a:b", &"x".repeat(65), &"x".repeat(300)] {
            assert!(AgentId::parse(bad).is_err(), "{bad:?}");
        }
        assert!(ConversationId::parse("user:ann@example.org").is_ok());
        assert!(ConversationId::parse(&"x".repeat(129)).is_err());
    }

    #[test]
    fn a_turn_id_has_one_spelling() {
        let id = TurnId::new();
        assert_eq!(id.to_string().parse::<TurnId>(), Ok(id));
        assert!(
            id.to_string().to_uppercase().parse::<TurnId>().is_err()
                || !id.to_string().contains(|c: char| c.is_alphabetic())
        );
        assert!(id.0.simple().to_string().parse::<TurnId>().is_err());
        assert!("../../etc/passwd".parse::<TurnId>().is_err());
    }
}
