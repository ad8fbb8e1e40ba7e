//! Who belongs to an org, and to which orgs somebody belongs.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::reads::{id, limit as rows_max, one_more, page};
use super::{BEGIN, PostgresStore};
use crate::audit::{Act, Actor};
use crate::caller::Role;
use crate::clock::Timestamp;
use crate::ids::{OrgId, TurnId, UserId};
use crate::store::members::refused;
use crate::store::{Member, Membership, Page, PutMember, RemoveMember, Result, StoreError};

statements! {
    MEMBERS = "-- members
SELECT user_id, role, added_at, added_by FROM org_members WHERE org_id = $1 AND user_id > $2 ORDER BY user_id LIMIT $3";
    /// Of an org that is being deleted nobody is a member.
    ROLE = "-- role
SELECT role FROM org_members WHERE org_id = $1 AND user_id = $2 AND EXISTS (SELECT 1 FROM orgs WHERE org_id = $1 AND deleting_at IS NULL)";
    MEMBERSHIPS = "-- memberships
SELECT m.org_id, m.role FROM org_members m
 WHERE m.user_id = $1 AND EXISTS (SELECT 1 FROM orgs o WHERE o.org_id = m.org_id AND o.deleting_at IS NULL) ORDER BY m.org_id LIMIT $2";
    /// Among the user's own orgs: nothing is asked of others', so that what is theirs and what is nowhere take the same time.
    MEMBERSHIP_OF_TURN = "-- membership_of_turn
SELECT m.org_id, m.role FROM org_members m
 WHERE m.user_id = $1 AND EXISTS (SELECT 1 FROM turns t WHERE t.org_id = m.org_id AND t.turn_id = $2)
   AND EXISTS (SELECT 1 FROM orgs o WHERE o.org_id = m.org_id AND o.deleting_at IS NULL) ORDER BY m.org_id LIMIT 1";
    /// All that changes an org's members happens under its row.
    MEMBERS_LOCK = "-- members_lock
SELECT 1 FROM orgs WHERE org_id = $1 AND deleting_at IS NULL FOR UPDATE";
    MEMBER = "-- member
SELECT user_id, role, added_at, added_by FROM org_members WHERE org_id = $1 AND user_id = $2";
    MEMBERS_COUNT = "-- members_count
SELECT count(*) FROM org_members WHERE org_id = $1";
    OWNERS = "-- owners
SELECT count(*) FROM org_members WHERE org_id = $1 AND role = 'owner'";
    MEMBER_PUT = "-- member_put
INSERT INTO org_members (org_id, user_id, role, added_at, added_by) VALUES ($1, $2, $3, coalesce($4::bigint, turnhouse_now()), $5)
    ON CONFLICT (org_id, user_id) DO UPDATE SET role = excluded.role RETURNING user_id, role, added_at, added_by";
    MEMBER_DELETE = "-- member_delete
DELETE FROM org_members WHERE org_id = $1 AND user_id = $2";
    MEMBER_KEYS_END = "-- member_keys_end
UPDATE api_keys SET revoked_at = coalesce($3::bigint, turnhouse_now()) WHERE org_id = $1 AND user_id = $2 AND revoked_at IS NULL RETURNING key_id";
    /// Whoever the org was said to be owned by is an owner no more.
    OWNER_NEXT = "-- owner_next
UPDATE orgs SET owner_user = coalesce((SELECT user_id FROM org_members WHERE org_id = $1 AND role = 'owner' ORDER BY added_at, user_id LIMIT 1),
                                        owner_user)
 WHERE org_id = $1 AND owner_user = $2";
    /// Of an org that has none. A role that somebody was given stays.
    OWNER_JOINS = "-- owner_joins
INSERT INTO org_members (org_id, user_id, role, added_at, added_by)
SELECT org_id, owner_user, 'owner', coalesce($2::bigint, turnhouse_now()), $3 FROM orgs
 WHERE org_id = $1 AND NOT EXISTS (SELECT 1 FROM org_members WHERE org_id = $1 AND role = 'owner')
    ON CONFLICT (org_id, user_id) DO NOTHING RETURNING user_id";
}

impl PostgresStore {
    pub(super) async fn read_members(&self, org: &OrgId, after: Option<&UserId>, limit: usize) -> Result<Page<Member>> {
        let after = after.map_or("", UserId::as_str);
        let asked = self.query(MEMBERS).bind(org.as_str()).bind(after).bind(one_more(limit));
        page(&self.rows_of(org, asked).await?, limit, member)
    }

    pub(super) async fn read_role(&self, org: &OrgId, user: &UserId) -> Result<Option<Role>> {
        let row = self.row_of(org, self.query(ROLE).bind(org.as_str()).bind(user.as_str())).await?;
        row.as_ref().map(|row| role(row, 0)).transpose()
    }

    pub(super) async fn read_memberships(&self, user: &UserId, limit: usize) -> Result<Vec<Membership>> {
        let asked = self.query(MEMBERSHIPS).bind(user.as_str()).bind(rows_max(limit));
        self.rows_hostwide(asked).await?.iter().map(membership).collect()
    }

    pub(super) async fn read_membership_of_turn(&self, user: &UserId, turn: TurnId) -> Result<Option<Membership>> {
        let row = self.row_hostwide(self.query(MEMBERSHIP_OF_TURN).bind(user.as_str()).bind(turn.0)).await?;
        row.as_ref().map(membership).transpose()
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) async fn write_member(
        &self,
        org: &OrgId,
        user: &UserId,
        role: Role,
        changer: Option<&UserId>,
        members_max: usize,
        now: Timestamp,
        by: &Actor,
    ) -> Result<PutMember> {
        let mut tx = self.begin_of(org, BEGIN).await?;
        if self.query(MEMBERS_LOCK).bind(org.as_str()).fetch_optional(&mut *tx).await?.is_none() {
            return Ok(PutMember::NoOrg);
        }
        let before = self.member(&mut tx, org, user).await?;
        let was = before.as_ref().map(|member| member.role);
        if let Some(member) = before.filter(|member| member.role == role) {
            return Ok(PutMember::Stored { member, created: false });
        }
        let (owners, as_owner) =
            (self.members_count(&mut tx, org, OWNERS).await?, self.as_owner(&mut tx, org, changer).await?);
        if let Some(refusal) = refused(was, Some(role), as_owner, owners) {
            return Ok(PutMember::Refused(refusal));
        }
        let count = self.members_count(&mut tx, org, MEMBERS_COUNT).await?;
        if was.is_none() && usize::try_from(count).is_ok_and(|count| count >= members_max) {
            return Ok(PutMember::Full);
        }
        let asked = self.query(MEMBER_PUT).bind(org.as_str()).bind(user.as_str()).bind(role.as_str());
        let stored = asked.bind(self.clock.of(now)).bind(by.user.as_str()).fetch_one(&mut *tx).await?;
        if was == Some(Role::Owner) {
            self.query(OWNER_NEXT).bind(org.as_str()).bind(user.as_str()).execute(&mut *tx).await?;
        }
        self.note(&mut tx, Some(org.as_str()), &[Act::member_put(user, was, role)], by, now).await?;
        let member = member(&stored)?;
        tx.commit().await?;
        Ok(PutMember::Stored { member, created: was.is_none() })
    }

    pub(super) async fn erase_member(
        &self,
        org: &OrgId,
        user: &UserId,
        changer: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<RemoveMember> {
        let (id, name) = (org.as_str(), user.as_str());
        let mut tx = self.begin_of(org, BEGIN).await?;
        self.query(MEMBERS_LOCK).bind(id).execute(&mut *tx).await?;
        let Some(before) = self.member(&mut tx, org, user).await? else { return Ok(RemoveMember::NotFound) };
        let (owners, as_owner) =
            (self.members_count(&mut tx, org, OWNERS).await?, self.as_owner(&mut tx, org, changer).await?);
        if let Some(refusal) = refused(Some(before.role), None, as_owner, owners) {
            return Ok(RemoveMember::Refused(refusal));
        }
        self.query(MEMBER_DELETE).bind(id).bind(name).execute(&mut *tx).await?;
        self.query(OWNER_NEXT).bind(id).bind(name).execute(&mut *tx).await?;
        let ended = self.query(MEMBER_KEYS_END).bind(id).bind(name).bind(self.clock.of(now));
        let ended = ended.fetch_all(&mut *tx).await?;
        let keys = ended.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, _>>()?;
        self.note(&mut tx, Some(id), &Act::member_remove(user, before.role, &keys), by, now).await?;
        tx.commit().await?;
        Ok(RemoveMember::Done)
    }

    async fn member(&self, tx: &mut PgConnection, org: &OrgId, user: &UserId) -> Result<Option<Member>> {
        let asked = self.query(MEMBER).bind(org.as_str()).bind(user.as_str());
        asked.fetch_optional(tx).await?.as_ref().map(member).transpose()
    }

    async fn members_count(&self, tx: &mut PgConnection, org: &OrgId, statement: &'static str) -> Result<i64> {
        Ok(self.query(statement).bind(org.as_str()).fetch_one(tx).await?.try_get(0)?)
    }

    /// Whether `changer` may make and unmake owners: the operator, who is nobody's member, may.
    async fn as_owner(&self, tx: &mut PgConnection, org: &OrgId, changer: Option<&UserId>) -> Result<bool> {
        let Some(changer) = changer else { return Ok(true) };
        Ok(self.member(tx, org, changer).await?.is_some_and(|member| member.role == Role::Owner))
    }

    /// Makes the org's owner its member, where it has no owner among its members: it is from before there were any.
    pub(super) async fn owner_joins(
        &self,
        tx: &mut PgConnection,
        org: &str,
        now: Timestamp,
        by: &Actor,
    ) -> Result<bool> {
        let asked = self.query(OWNER_JOINS).bind(org.to_owned()).bind(self.clock.of(now)).bind(by.user.clone());
        let Some(joined) = asked.fetch_optional(&mut *tx).await? else { return Ok(false) };
        self.note(tx, Some(org), &[Act::member_put(&id(&joined, 0)?, None, Role::Owner)], by, now).await?;
        Ok(true)
    }
}

fn role(row: &PgRow, column: usize) -> Result<Role> {
    let text: &str = row.try_get(column)?;
    Role::parse(text).ok_or_else(|| StoreError::Corrupt(format!("{text:?} is no role")))
}

fn member(row: &PgRow) -> Result<Member> {
    let added_at = Timestamp(row.try_get(2)?);
    Ok(Member { user: id(row, 0)?, role: role(row, 1)?, added_at, added_by: row.try_get(3)? })
}

fn membership(row: &PgRow) -> Result<Membership> {
    Ok(Membership { org: id(row, 0)?, role: role(row, 1)? })
}
