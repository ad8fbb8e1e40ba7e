//! The second wall between orgs. Statements that serve one org go through the functions whose names end in `_of`: each begins its transaction as the role
//! `turnhouse_tenant` and names the org, and row-level security (`migrations/postgres/0012_row_level_security.sql`) then shows it that org's rows and no others.
//! The first wall, `org_id = $n`, is in the statements as before.
//!
//! The wall is for a statement of ours that is wrong. It is none for whoever has the database run statements of their own: they can change role and setting.

use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Postgres, Row as _, SqlSafeStr as _, SqlStr, Transaction};

use super::ask::Frame;
use super::open::{MIGRATING, opening, place};
use super::{Asked, BEGIN, PostgresStore, Route};
use crate::ids::OrgId;
use crate::store::{Finding, Result, StoreError};

/// What is missing in the wall, gravest first, and who can mend it: `dba`, whoever may make and grant roles; `owner`, whoever owns the tables.
const GAPS: &str = "-- gaps
WITH role AS (SELECT oid, rolname, rolsuper OR rolbypassrls AS is_above FROM pg_roles WHERE rolname IN ('turnhouse_tenant', 'turnhouse_host')),
     tenant AS (SELECT * FROM role WHERE rolname = 'turnhouse_tenant'),
     host AS (SELECT * FROM role WHERE rolname = 'turnhouse_host'),
     org AS (SELECT relnamespace, relowner FROM pg_class WHERE oid = 'orgs'::regclass)
SELECT 'owner', format('there is no role %s', named) FROM unnest(ARRAY['turnhouse_tenant', 'turnhouse_host']) AS named
 WHERE NOT EXISTS (SELECT 1 FROM role WHERE rolname = named)
UNION ALL
SELECT 'dba', format('role %s is above row-level security', rolname) FROM role WHERE is_above
UNION ALL
SELECT 'dba', format('role turnhouse_tenant is a member of %s', m.roleid::regrole) FROM tenant JOIN pg_auth_members m ON m.member = tenant.oid
UNION ALL
SELECT 'dba', format('role %I may not act as turnhouse_tenant', current_user) FROM tenant
 WHERE NOT pg_has_role(current_user, oid, CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END)
UNION ALL
SELECT 'dba', format('role %I neither owns the tables nor belongs to turnhouse_host', current_user) FROM host, org
 WHERE NOT pg_has_role(current_user, host.oid, 'USAGE') AND NOT pg_has_role(current_user, org.relowner, 'USAGE')
UNION ALL
SELECT 'owner', format('table %s is open to all orgs', c.relname) FROM org JOIN pg_class c USING (relnamespace, relowner)
 WHERE c.relkind IN ('r', 'p') AND EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'org_id' AND NOT a.attisdropped)
   AND NOT (c.relrowsecurity AND 'tenant' IS NOT DISTINCT FROM (
     SELECT string_agg(p.polname, ' ') FROM pg_policy p
      WHERE p.polrelid = c.oid AND (p.polroles && '{0}'::oid[] OR p.polroles && ARRAY(SELECT oid FROM tenant))))";

statements! {
    /// Whether the login role is above the wall, and whether it could take it down.
    WALL_LOGIN = "-- wall_login
SELECT current_user::text, r.rolsuper OR r.rolbypassrls, pg_has_role(current_user, c.relowner, 'USAGE')
  FROM pg_roles r, pg_class c WHERE r.rolname = current_user AND c.oid = 'orgs'::regclass";
}

impl PostgresStore {
    /// The rows of one statement that reads what is an org's. Whoever asks waits for one round trip more than without a wall.
    pub(super) async fn rows_of(&self, org: &OrgId, asked: Asked<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
        let begin = self.walled(org, &format!("{}; SET TRANSACTION READ ONLY", self.shortest_begin()));
        self.rows_in(Frame::Begun { begin, commits: false }, asked).await
    }

    /// The first row of such a statement, if there is one.
    pub(super) async fn row_of(&self, org: &OrgId, asked: Asked<'_>) -> Result<Option<PgRow>, sqlx::Error> {
        Ok(self.rows_of(org, asked).await?.into_iter().next())
    }

    /// The rows of one statement that changes what is an org's.
    pub(super) async fn call_of(&self, org: &OrgId, asked: Asked<'_>) -> Result<Vec<PgRow>, sqlx::Error> {
        let begin = self.walled(org, self.shortest_begin());
        self.rows_in(Frame::Begun { begin, commits: true }, asked).await
    }

    /// The one row of such a statement that always has one.
    pub(super) async fn call_one_of(&self, org: &OrgId, asked: Asked<'_>) -> Result<PgRow, sqlx::Error> {
        self.call_of(org, asked).await?.into_iter().next().ok_or(sqlx::Error::RowNotFound)
    }

    /// How many rows of an org one statement changed.
    pub(super) async fn change_of(&self, org: &OrgId, asked: Asked<'_>) -> Result<u64, sqlx::Error> {
        let begin = self.walled(org, self.shortest_begin());
        self.change_in(Frame::Begun { begin, commits: true }, asked).await
    }

    /// A transaction of one org, for administration.
    pub(super) async fn begin_of(
        &self,
        org: &OrgId,
        begin: &'static str,
    ) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        self.begin(self.walled(org, begin)).await
    }

    fn shortest_begin(&self) -> &'static str {
        match self.route {
            Route::Direct => "BEGIN",
            Route::Pooled => BEGIN,
        }
    }

    /// One message, which the server runs as one transaction. `BEGIN` comes last: what fails before it leaves none behind. An id has no quote in it, and is
    /// escaped all the same.
    fn walled(&self, org: &OrgId, begin: &str) -> SqlStr {
        #[cfg(test)]
        let other = self.walled_as.lock().clone();
        #[cfg(test)]
        let org = other.as_ref().unwrap_or(org);
        let org = org.as_str().replace('\'', "''");
        AssertSqlSafe(format!("SET LOCAL ROLE turnhouse_tenant; SET LOCAL turnhouse.org = '{org}'; {begin}"))
            .into_sql_str()
    }

    /// What `turnhouse doctor` says of it. A store with a gap in it does not open.
    pub(super) async fn examine_wall(&self) -> Result<Finding> {
        let row = self.one_hostwide(self.query(WALL_LOGIN)).await?;
        let (user, is_above, owns): (String, bool, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let up = "an org's statements see its rows alone";
        Ok(match (is_above, owns) {
            (true, _) => Finding::doubtful(
                "wall",
                format!("{up}; the hosts' role {user} is above row-level security"),
                "let the hosts use a role that is no superuser, without BYPASSRLS",
            ),
            (false, true) => Finding::good("wall", format!("{up}; the hosts' role {user} owns the tables")),
            (false, false) => Finding::good("wall", format!("{up}; the hosts' role {user} does not own the tables")),
        })
    }
}

/// Lets nobody work with a gap in the wall. `mends`: as the owner of the tables, who builds what is missing.
pub(super) async fn check(options: &PgConnectOptions, connection: &mut PgConnection, mends: bool) -> Result<()> {
    if mends {
        mend(connection).await.map_err(|error| opening(options, &error))?;
    }
    let rows = sqlx::raw_sql(GAPS).fetch_all(&mut *connection).await;
    let gaps = rows.and_then(|rows| rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect());
    let gaps: Vec<(String, String)> = gaps.map_err(|error| opening(options, &error))?;
    let Some((who, gap)) = gaps.first() else { return Ok(()) };
    let (place, user) = (place(options), options.get_username());
    let advice = match who.as_str() {
        "owner" => "run turnhouse migrate as the role that owns the tables".to_owned(),
        _ => format!(
            "make both roles NOSUPERUSER NOBYPASSRLS and members of none, and GRANT turnhouse_tenant, turnhouse_host TO \"{user}\""
        ),
    };
    Err(StoreError::Unavailable(format!("the wall between orgs has a gap at {place}: {gap}; {advice}")))
}

async fn mend(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let mut tx = connection.begin_with(MIGRATING).await?;
    // One at a time, as migrations.
    sqlx::raw_sql("SELECT pg_advisory_xact_lock(8787, hashtext(current_schema())); SELECT build_wall()")
        .execute(&mut *tx)
        .await?;
    tx.commit().await
}
