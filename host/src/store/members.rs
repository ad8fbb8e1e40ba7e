//! Who belongs to an org: records, and which changes are whose to make. Pure; each store asks it under the org's lock.

use crate::caller::Role;
use crate::clock::Timestamp;
use crate::ids::{OrgId, UserId};

/// Somebody who belongs to an org.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub user: UserId,
    /// As what.
    pub role: Role,
    /// Since when.
    pub added_at: Timestamp,
    /// By whom, as the audit names them.
    pub added_by: String,
}

/// An org to which somebody belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// The org.
    pub org: OrgId,
    /// As what.
    pub role: Role,
}

/// Why an org's members stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberRefusal {
    /// Owners are made and unmade by owners.
    NotOwner,
    /// It is the org's last owner.
    LastOwner,
}

/// What became of [`Store::put_member`](super::Store::put_member).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutMember {
    /// They belong to the org as they should.
    Stored {
        /// As stored.
        member: Member,
        /// They did not before.
        created: bool,
    },
    /// There is no such org.
    NoOrg,
    /// The org has `org_members_max` members.
    Full,
    /// Nothing was changed.
    Refused(MemberRefusal),
}

/// What became of [`Store::remove_member`](super::Store::remove_member).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RemoveMember {
    /// They are gone, and their keys with them.
    Done,
    /// They were no member.
    NotFound,
    /// Nothing was changed.
    Refused(MemberRefusal),
}

/// Whether a member may go from `before` to `after`. `as_owner`: whoever asks is an owner, or the operator.
pub(super) fn refused(before: Option<Role>, after: Option<Role>, as_owner: bool, owners: i64) -> Option<MemberRefusal> {
    let (was, will) = (before == Some(Role::Owner), after == Some(Role::Owner));
    if (was || will) && !as_owner {
        return Some(MemberRefusal::NotOwner);
    }
    (was && !will && owners <= 1).then_some(MemberRefusal::LastOwner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_made_and_unmade_by_owners_and_the_last_one_stays() {
        use MemberRefusal::{LastOwner, NotOwner};
        use Role::{Admin, Owner};
        for (before, after, as_owner, owners, expected) in [
            (None, Some(Admin), false, 1, None),
            (Some(Admin), None, false, 1, None),
            (None, Some(Owner), false, 1, Some(NotOwner)),
            (Some(Admin), Some(Owner), false, 1, Some(NotOwner)),
            (Some(Owner), None, false, 2, Some(NotOwner)),
            (Some(Owner), Some(Admin), true, 2, None),
            (Some(Owner), Some(Admin), true, 1, Some(LastOwner)),
            (Some(Owner), None, true, 1, Some(LastOwner)),
            (None, Some(Owner), true, 0, None),
        ] {
            assert_eq!(refused(before, after, as_owner, owners), expected, "{before:?} {after:?} {as_owner} {owners}");
        }
    }
}
