//! For which org somebody speaks whose credential does not say so: one of those of which they are a member.
//!
//! Answers come from memory for [`TRUSTED_FOR`], like those about keys: a warm path makes no round trip to the store, and whoever is removed is told
//! so within two seconds at every host. Nothing of an org is asked before it is known to be the user's own, and what is another's is answered as what
//! is nowhere, after the same look.

use std::sync::Arc;

use moka::future::Cache;

use crate::caller::Role;
use crate::ids::{OrgId, TurnId, UserId};
use crate::keys::{REMEMBERED_MAX, TRUSTED_FOR};
use crate::oidc::is_among;
use crate::store::{Membership, Store, StoreError};

/// Orgs of one user that are read at once; of more, one is named.
const ORGS_MAX: usize = 1_000;

/// What a request says of the org that it is for.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// It names one.
    pub org: Option<OrgId>,
    /// It is about this turn.
    pub turn: Option<TurnId>,
}

/// Why a request is for no org.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OrgError {
    /// The org that it names is not there for this credential: of whichever reason.
    #[error("no such org")]
    NotThere,
    /// None of the user's orgs has the turn.
    #[error("no such turn")]
    NoSuchTurn,
    /// The user is a member of none.
    #[error("a member of no org")]
    NoOrg,
    /// The user is a member of several, and the request names none.
    #[error("a member of several orgs")]
    Several,
    /// The store does not answer.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

impl From<Arc<StoreError>> for OrgError {
    fn from(error: Arc<StoreError>) -> OrgError {
        OrgError::Store(error)
    }
}

/// Who belongs where, as of a moment ago.
pub struct Memberships {
    store: Arc<dyn Store>,
    roles: Cache<(OrgId, UserId), Option<Role>>,
    orgs: Cache<UserId, Arc<[Membership]>>,
    turns: Cache<(UserId, TurnId), Option<Membership>>,
}

impl Memberships {
    /// Of `store`; nothing is read yet.
    pub fn new(store: Arc<dyn Store>) -> Memberships {
        fn cache<K: std::hash::Hash + Eq + Send + Sync + 'static, V: Clone + Send + Sync + 'static>() -> Cache<K, V> {
            Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(TRUSTED_FOR).build()
        }
        Memberships { store, roles: cache(), orgs: cache(), turns: cache() }
    }

    /// As what somebody belongs to an org, if they do and it is there.
    pub async fn role(&self, org: &OrgId, user: &UserId) -> Result<Option<Role>, Arc<StoreError>> {
        self.roles.try_get_with((org.clone(), user.clone()), self.store.role(org, user)).await
    }

    /// Somebody's orgs.
    pub async fn of(&self, user: &UserId) -> Result<Arc<[Membership]>, Arc<StoreError>> {
        let read = async { Ok(self.store.memberships(user, ORGS_MAX).await?.into()) };
        self.orgs.try_get_with(user.clone(), read).await
    }

    /// The one of somebody's orgs, among these (among all, when there are none), that a request is for: the one that it names, else the one that has
    /// its turn, else the only one.
    pub async fn find(&self, user: &UserId, among: &[OrgId], asked: &Asked) -> Result<Membership, OrgError> {
        let counts = |found: &Membership| is_among(among, &found.org);
        if let Some(org) = &asked.org {
            let role = self.role(org, user).await?;
            let found = role.map(|role| Membership { org: org.clone(), role });
            return found.filter(counts).ok_or(OrgError::NotThere);
        }
        if let Some(turn) = asked.turn {
            let read = self.store.membership_of_turn(user, turn);
            let found = self.turns.try_get_with((user.clone(), turn), read).await?;
            return found.filter(counts).ok_or(OrgError::NoSuchTurn);
        }
        let all = self.of(user).await?;
        let mut own = all.iter().filter(|found| counts(found));
        match (own.next(), own.next()) {
            (Some(only), None) => Ok(only.clone()),
            (None, _) => Err(OrgError::NoOrg),
            (Some(_), Some(_)) => Err(OrgError::Several),
        }
    }
}
