//! `/v1/members`: who belongs to the org and as what, for its admins. `/v1/me`: whose a credential is and what it may do.

use axum::extract::{FromRequestParts, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Administer, May, asked, authenticated};
use super::body::JsonBytes;
use super::page::{List, PageQuery, name_cursor};
use super::params::Ids;
use super::problem::{Code, Problem};
use super::views::json;
use crate::caller::{Role, Scopes};
use crate::clock::Timestamp;
use crate::ids::{OrgId, UserId};
use crate::members::OrgError;
use crate::oidc::{Of, is_among};
use crate::store::{Member, MemberRefusal, Membership, PutMember, RemoveMember};

/// What a cursor of this list begins with.
const CURSOR: char = 'p';

/// Their routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new()
        .routes(routes!(get_me))
        .routes(routes!(list_members))
        .routes(routes!(put_member, delete_member))
}

/// A member of the org.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Member)]
pub struct MemberView {
    /// Who.
    user_id: UserId,
    /// As what.
    role: Role,
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    added_at: Timestamp,
    /// By whom; `operator` for the command line.
    added_by: String,
}

impl From<Member> for MemberView {
    fn from(member: Member) -> MemberView {
        let Member { user, role, added_at, added_by } = member;
        MemberView { user_id: user, role, added_at, added_by }
    }
}

/// As what somebody is to belong to the org.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = NewMember)]
struct NewMember {
    /// `member` runs turns and reads their own, `admin` does all but change owners, `owner` does all.
    role: Role,
}

/// An org to which the caller belongs.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Membership)]
struct MembershipView {
    /// The org.
    org_id: OrgId,
    /// As what.
    role: Role,
}

impl From<Membership> for MembershipView {
    fn from(found: Membership) -> MembershipView {
        MembershipView { org_id: found.org, role: found.role }
    }
}

/// Whose a credential is, and what it may do.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Me)]
struct Me {
    /// Who.
    user_id: UserId,
    /// For which org; null where the credential names none and its user is not a member of exactly one.
    org_id: Option<OrgId>,
    /// As what they belong to it, if they do.
    role: Option<Role>,
    /// What they may do: there, or without an org at most.
    #[schema(value_type = Vec<String>)]
    scopes: Scopes,
    /// By what: `key:<id>`, `token:<issuer>`.
    credential: String,
    /// When that ends.
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    /// Of a token that names no org: those for which it can be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    orgs: Option<Vec<MembershipView>>,
}

impl FromRequestParts<Gateway> for Me {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gateway: &Gateway) -> Result<Me, Problem> {
        let (who, keys) = (authenticated(parts, gateway).await?, &gateway.host.keys);
        let caller = match keys.caller(&who, &asked(parts, &who).await?).await {
            Ok(caller) => Some(caller),
            // That is what whoever asks wants to know.
            Err(OrgError::NoOrg | OrgError::Several) => None,
            Err(error) => return Err(error.into()),
        };
        let role = match &caller {
            Some(caller) => keys.members.role(&caller.org, &caller.user).await.map_err(OrgError::Store)?,
            None => None,
        };
        let orgs = match &who.of {
            Of::Membership(among) => {
                let own = keys.members.of(&who.user).await.map_err(OrgError::Store)?;
                Some(own.iter().filter(|own| is_among(among, &own.org)).cloned().map(Into::into).collect())
            }
            Of::Org(_) | Of::MembersOf(_) => None,
        };
        let scopes = caller.as_ref().map_or(who.scopes, |caller| caller.scopes);
        let (credential, org_id) = (who.credential.to_string(), caller.map(|caller| caller.org));
        Ok(Me { user_id: who.user, org_id, role, scopes, credential, expires_at: who.expires_at, orgs })
    }
}

/// Say who is calling
///
/// Whose the key or token is, for which org, and what it may do there. For any that works.
#[utoipa::path(get, path = "/v1/me", tag = "members", responses((status = 200, description = "Who is calling", body = Me)))]
async fn get_me(me: Me) -> Result<Response, Problem> {
    json(StatusCode::OK, &me)
}

/// List members
///
/// By user.
#[utoipa::path(get, path = "/v1/members", tag = "members", responses((status = 200, description = "A page", body = List<MemberView>)))]
async fn list_members(
    State(gateway): State<Gateway>,
    caller: May<Administer>,
    query: PageQuery,
) -> Result<Response, Problem> {
    let org = &caller.as_admin()?.org;
    let after: Option<UserId> = query.after_name(CURSOR)?;
    let page = gateway.host.store.members(org, after.as_ref(), query.limit).await?;
    let next = page.items.last().filter(|_| page.more).map(|last| name_cursor(CURSOR, &last.user));
    json(StatusCode::OK, &List { items: page.items.into_iter().map(MemberView::from).collect(), next })
}

/// Add a member, or change a role
///
/// What a member may do with a token that names no org, or that an issuer makes for members alone. Keys have scopes of their own. Only an owner
/// makes an owner, or another of one; an org keeps one owner at least.
#[utoipa::path(put, path = "/v1/members/{user}", tag = "members", params(("user" = UserId, Path)), request_body = NewMember,
    responses((status = 201, description = "They are a member now", body = MemberView), (status = 200, description = "They have the role", body = MemberView)))]
async fn put_member(
    State(gateway): State<Gateway>,
    caller: May<Administer>,
    Ids(user): Ids<UserId>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let host = &gateway.host;
    let (org, changer) = (&caller.as_admin()?.org, &caller.user);
    let body = JsonBytes::read(&parts.headers, body, host.config.limits.request_body_bytes_max).await?;
    let NewMember { role } = body.parse_named(Code::InvalidSetting)?;
    let (max, now) = (host.config.limits.org_members_max, host.clock.now());
    match host.store.put_member(org, &user, role, Some(changer), max, now, &caller.actor()).await? {
        PutMember::Stored { member, created } => {
            let status = if created { StatusCode::CREATED } else { StatusCode::OK };
            json(status, &MemberView::from(member))
        }
        PutMember::Full => {
            let detail = format!("this org has {max} members, the limit; remove some first");
            Err(Problem::new(Code::QuotaExhausted, detail).over("org", "members_max", max as f64))
        }
        // It went while it was asked.
        PutMember::NoOrg => Err(OrgError::NotThere.into()),
        PutMember::Refused(refusal) => Err(refusal.into()),
    }
}

/// Remove a member
///
/// Their keys in the org end with it. Only an owner removes an owner; the last one stays.
#[utoipa::path(delete, path = "/v1/members/{user}", tag = "members", params(("user" = UserId, Path)),
    responses((status = 204, description = "They are none")))]
async fn delete_member(
    State(gateway): State<Gateway>,
    caller: May<Administer>,
    Ids(user): Ids<UserId>,
) -> Result<Response, Problem> {
    let (org, changer, now) = (&caller.as_admin()?.org, &caller.user, gateway.host.clock.now());
    match gateway.host.store.remove_member(org, &user, Some(changer), now, &caller.actor()).await? {
        RemoveMember::Done => Ok(StatusCode::NO_CONTENT.into_response()),
        RemoveMember::NotFound => Err(Problem::not_found("member")),
        RemoveMember::Refused(refusal) => Err(refusal.into()),
    }
}

impl From<MemberRefusal> for Problem {
    fn from(refusal: MemberRefusal) -> Problem {
        match refusal {
            MemberRefusal::NotOwner => Problem::new(
                Code::OwnerRequired,
                "who is an owner of the org is for its owners to say; ask one of them",
            ),
            MemberRefusal::LastOwner => Problem::new(
                Code::LastOwner,
                "this is the last owner of the org; make another member an owner first (`PUT /v1/members/{user}`)",
            ),
        }
    }
}
