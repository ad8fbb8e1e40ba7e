//! Who belongs to an org, and to which orgs somebody belongs.

use rusqlite::{OptionalExtension as _, params};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::SqliteStore;
use super::keys::ORG_KNOWN;
use super::reads::{id, one_more, page};
use super::writer::{Fault, Tried, Tx};
use crate::audit::{Act, Actor};
use crate::caller::Role;
use crate::clock::Timestamp;
use crate::ids::{OrgId, TurnId, UserId};
use crate::store::members::refused;
use crate::store::{Member, Membership, Page, PutMember, RemoveMember, Result, StoreError};

statements! {
    MEMBERS = "-- members
SELECT user_id, role, added_at, added_by FROM org_members WHERE org_id = ?1 AND user_id > ?2 ORDER BY user_id LIMIT ?3";
    /// Of an org that is being deleted nobody is a member.
    ROLE = "-- role
SELECT role FROM org_members WHERE org_id = ?1 AND user_id = ?2 AND EXISTS (SELECT 1 FROM orgs WHERE org_id = ?1 AND deleting_at IS NULL)";
    MEMBERSHIPS = "-- memberships
SELECT m.org_id, m.role FROM org_members m
 WHERE m.user_id = ?1 AND EXISTS (SELECT 1 FROM orgs o WHERE o.org_id = m.org_id AND o.deleting_at IS NULL) ORDER BY m.org_id LIMIT ?2";
    /// Among the user's own orgs: nothing is asked of others', so that what is theirs and what is nowhere take the same time.
    MEMBERSHIP_OF_TURN = "-- membership_of_turn
SELECT m.org_id, m.role FROM org_members m
 WHERE m.user_id = ?1 AND EXISTS (SELECT 1 FROM turns t WHERE t.org_id = m.org_id AND t.turn_id = ?2)
   AND EXISTS (SELECT 1 FROM orgs o WHERE o.org_id = m.org_id AND o.deleting_at IS NULL) ORDER BY m.org_id LIMIT 1";
    MEMBER = "-- member
SELECT role, added_at, added_by FROM org_members WHERE org_id = ?1 AND user_id = ?2";
    MEMBERS_COUNT = "-- members_count
SELECT count(*) FROM org_members WHERE org_id = ?1";
    OWNERS = "-- owners
SELECT count(*) FROM org_members WHERE org_id = ?1 AND role = 'owner'";
    MEMBER_PUT = "-- member_put
INSERT INTO org_members (org_id, user_id, role, added_at, added_by) VALUES (?1, ?2, ?3, ?4, ?5)
    ON CONFLICT (org_id, user_id) DO UPDATE SET role = excluded.role";
    MEMBER_DELETE = "-- member_delete
DELETE FROM org_members WHERE org_id = ?1 AND user_id = ?2";
    MEMBER_KEYS_END = "-- member_keys_end
UPDATE api_keys SET revoked_at = ?3 WHERE org_id = ?1 AND user_id = ?2 AND revoked_at IS NULL RETURNING key_id";
    /// Whoever the org was said to be owned by is an owner no more.
    OWNER_NEXT = "-- owner_next
UPDATE orgs SET owner_user = coalesce((SELECT user_id FROM org_members WHERE org_id = ?1 AND role = 'owner' ORDER BY added_at, user_id LIMIT 1),
                                        owner_user)
 WHERE org_id = ?1 AND owner_user = ?2";
    /// Of an org that has none. A role that somebody was given stays.
    OWNER_JOINS = "-- owner_joins
INSERT INTO org_members (org_id, user_id, role, added_at, added_by) SELECT org_id, owner_user, 'owner', ?2, ?3 FROM orgs
 WHERE org_id = ?1 AND NOT EXISTS (SELECT 1 FROM org_members WHERE org_id = ?1 AND role = 'owner')
    ON CONFLICT (org_id, user_id) DO NOTHING RETURNING user_id";
}

impl SqliteStore {
    pub(super) async fn read_members(&self, org: &OrgId, after: Option<&UserId>, limit: usize) -> Result<Page<Member>> {
        let after = after.map_or("", UserId::as_str);
        let asked = sqlx::query(MEMBERS).bind(org.as_str()).bind(after).bind(one_more(limit));
        page(&asked.fetch_all(&self.readers).await?, limit, member)
    }

    pub(super) async fn read_role(&self, org: &OrgId, user: &UserId) -> Result<Option<Role>> {
        let asked = sqlx::query(ROLE).bind(org.as_str()).bind(user.as_str());
        asked.fetch_optional(&self.readers).await?.as_ref().map(|row| role(row, 0)).transpose()
    }

    pub(super) async fn read_memberships(&self, user: &UserId, limit: usize) -> Result<Vec<Membership>> {
        let asked = sqlx::query(MEMBERSHIPS).bind(user.as_str()).bind(one_more(limit) - 1);
        asked.fetch_all(&self.readers).await?.iter().map(membership).collect()
    }

    pub(super) async fn read_membership_of_turn(&self, user: &UserId, turn: TurnId) -> Result<Option<Membership>> {
        let asked = sqlx::query(MEMBERSHIP_OF_TURN).bind(user.as_str()).bind(turn.as_bytes().to_vec());
        asked.fetch_optional(&self.readers).await?.as_ref().map(membership).transpose()
    }
}

fn role(row: &SqliteRow, column: usize) -> Result<Role> {
    let text: &str = row.try_get(column)?;
    Role::parse(text).ok_or_else(|| StoreError::Corrupt(format!("{text:?} is no role")))
}

fn member(row: &SqliteRow) -> Result<Member> {
    let added_at = Timestamp(row.try_get(2)?);
    Ok(Member { user: id(row, 0)?, role: role(row, 1)?, added_at, added_by: row.try_get(3)? })
}

fn membership(row: &SqliteRow) -> Result<Membership> {
    Ok(Membership { org: id(row, 0)?, role: role(row, 1)? })
}

impl Tx<'_> {
    fn member(&self, org: &OrgId, user: &UserId) -> Tried<Option<Member>> {
        let mut statement = self.conn.prepare_cached(MEMBER)?;
        let columns = |row: &rusqlite::Row<'_>| Ok((row.get::<_, String>(0)?, row.get(1)?, row.get(2)?));
        let found = statement.query_row(params![org.as_str(), user.as_str()], columns).optional()?;
        let Some((role, added_at, added_by)) = found else { return Ok(None) };
        let role = Role::parse(&role).ok_or_else(|| Fault::Corrupt(format!("{role:?} is no role")))?;
        Ok(Some(Member { user: user.clone(), role, added_at: Timestamp(added_at), added_by }))
    }

    fn members_count(&self, org: &OrgId, statement: &str) -> Tried<i64> {
        Ok(self.conn.prepare_cached(statement)?.query_row(params![org.as_str()], |row| row.get(0))?)
    }

    /// Whether `changer` may make and unmake owners: the operator, who is nobody's member, may.
    fn as_owner(&self, org: &OrgId, changer: Option<&UserId>) -> Tried<bool> {
        let Some(changer) = changer else { return Ok(true) };
        Ok(self.member(org, changer)?.is_some_and(|member| member.role == Role::Owner))
    }

    pub(super) fn put_member(
        &self,
        org: &OrgId,
        user: &UserId,
        role: Role,
        changer: Option<&UserId>,
        members_max: usize,
        by: &Actor,
    ) -> Tried<PutMember> {
        if !self.conn.prepare_cached(ORG_KNOWN)?.exists(params![org.as_str()])? {
            return Ok(PutMember::NoOrg);
        }
        let before = self.member(org, user)?;
        if let Some(member) = before.clone().filter(|member| member.role == role) {
            return Ok(PutMember::Stored { member, created: false });
        }
        let (was, owners) = (before.as_ref().map(|member| member.role), self.members_count(org, OWNERS)?);
        if let Some(refusal) = refused(was, Some(role), self.as_owner(org, changer)?, owners) {
            return Ok(PutMember::Refused(refusal));
        }
        let room = usize::try_from(self.members_count(org, MEMBERS_COUNT)?).is_ok_and(|count| count < members_max);
        if was.is_none() && !room {
            return Ok(PutMember::Full);
        }
        self.write_member(org, user, role, by)?;
        if was == Some(Role::Owner) {
            self.conn.prepare_cached(OWNER_NEXT)?.execute(params![org.as_str(), user.as_str()])?;
        }
        self.note(Some(org), &[Act::member_put(user, was, role)], by)?;
        let added = Member { user: user.clone(), role, added_at: self.now, added_by: by.user.clone() };
        Ok(PutMember::Stored { member: Member { role, ..before.unwrap_or(added) }, created: was.is_none() })
    }

    /// Writes a membership down, whatever there was.
    pub(super) fn write_member(&self, org: &OrgId, user: &UserId, role: Role, by: &Actor) -> Tried<()> {
        let values = params![org.as_str(), user.as_str(), role.as_str(), self.now.0, by.user];
        self.conn.prepare_cached(MEMBER_PUT)?.execute(values)?;
        Ok(())
    }

    pub(super) fn remove_member(
        &self,
        org: &OrgId,
        user: &UserId,
        changer: Option<&UserId>,
        by: &Actor,
    ) -> Tried<RemoveMember> {
        let Some(before) = self.member(org, user)? else { return Ok(RemoveMember::NotFound) };
        let owners = self.members_count(org, OWNERS)?;
        if let Some(refusal) = refused(Some(before.role), None, self.as_owner(org, changer)?, owners) {
            return Ok(RemoveMember::Refused(refusal));
        }
        let named = params![org.as_str(), user.as_str()];
        self.conn.prepare_cached(MEMBER_DELETE)?.execute(named)?;
        self.conn.prepare_cached(OWNER_NEXT)?.execute(named)?;
        let mut statement = self.conn.prepare_cached(MEMBER_KEYS_END)?;
        let keys = statement.query_map(params![org.as_str(), user.as_str(), self.now.0], |row| row.get(0))?;
        let keys = keys.collect::<rusqlite::Result<Vec<String>>>()?;
        self.note(Some(org), &Act::member_remove(user, before.role, &keys), by)?;
        Ok(RemoveMember::Done)
    }

    /// Makes the org's owner its member, where it has no owner among its members: it is from before there were any.
    pub(super) fn owner_joins(&self, org: &OrgId, by: &Actor) -> Tried<bool> {
        let mut statement = self.conn.prepare_cached(OWNER_JOINS)?;
        let joined = statement.query_row(params![org.as_str(), self.now.0, by.user], |row| row.get::<_, String>(0));
        let Some(joined) = joined.optional()? else { return Ok(false) };
        let joined: UserId = joined.parse().map_err(|error| Fault::Corrupt(format!("{error}")))?;
        self.note(Some(org), &[Act::member_put(&joined, None, Role::Owner)], by)?;
        Ok(true)
    }
}
