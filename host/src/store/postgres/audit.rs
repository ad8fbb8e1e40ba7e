//! The audit: written in the transaction of what it tells of, read newest first.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::reads::{one_more, page};
use super::{Asked, PostgresStore};
use crate::audit::{Act, Actor, AuditEntry, AuditFilter, AuditPlace};
use crate::clock::Timestamp;
use crate::ids::OrgId;
use crate::store::{Page, Result, StoreError};

/// A page of it: $1 org, $2 since, $3 and $4 before which place, $5 how many, $6 what its filter names.
macro_rules! entries {
    ($name:literal, $filter:literal) => {
        concat!(
            "-- ",
            $name,
            "\nSELECT at, audit_id, actor, credential, request_id, verb, resource, detail FROM audit\n WHERE org_id = $1",
            $filter,
            " AND at >= $2 AND (at, audit_id) < ($3, $4) ORDER BY at DESC, audit_id DESC LIMIT $5"
        )
    };
}

statements! {
    AUDIT_NEW = "-- audit_new
INSERT INTO audit (org_id, at, audit_id, actor, credential, request_id, verb, resource, detail)
VALUES ($1, coalesce($2::bigint, turnhouse_now()), $3, $4, $5, $6, $7, $8, $9)";
    AUDIT = entries!("audit", "");
    AUDIT_BY_ACTOR = entries!("audit_by_actor", " AND actor = $6");
    AUDIT_BY_VERB = entries!("audit_by_verb", " AND verb = $6");
    AUDIT_BY_RESOURCE = entries!("audit_by_resource", " AND resource = $6");
}

impl PostgresStore {
    /// Writes down what this transaction does.
    pub(super) async fn note(
        &self,
        tx: &mut PgConnection,
        org: Option<&str>,
        acts: &[Act],
        by: &Actor,
        now: Timestamp,
    ) -> Result<()> {
        for act in acts {
            let asked = self.query(AUDIT_NEW).bind(org.unwrap_or_default().to_owned()).bind(self.clock.of(now));
            said(asked, act, by).execute(&mut *tx).await?;
        }
        Ok(())
    }

    /// The same, alone: of what changes nothing here.
    pub(super) async fn write_act(&self, org: Option<&OrgId>, act: &Act, by: &Actor, now: Timestamp) -> Result<()> {
        let named = org.map_or("", OrgId::as_str);
        let asked = said(self.query(AUDIT_NEW).bind(named).bind(self.clock.of(now)), act, by);
        match org {
            Some(org) => self.change_of(org, asked).await?,
            None => self.change_hostwide(asked).await?,
        };
        Ok(())
    }

    pub(super) async fn read_audit(
        &self,
        org: Option<&OrgId>,
        filter: &AuditFilter,
        since: Timestamp,
        before: Option<AuditPlace>,
        limit: usize,
    ) -> Result<Page<AuditEntry>> {
        let (statement, named) = match filter {
            AuditFilter::All => (AUDIT, None),
            AuditFilter::Actor(actor) => (AUDIT_BY_ACTOR, Some(actor.as_str())),
            AuditFilter::Verb(verb) => (AUDIT_BY_VERB, Some(verb.as_str())),
            AuditFilter::Resource(resource) => (AUDIT_BY_RESOURCE, Some(resource.as_str())),
        };
        let before = before.unwrap_or(AuditPlace::until(Timestamp(i64::MAX)));
        let asked = self
            .query(statement)
            .bind(org.map_or("", OrgId::as_str))
            .bind(since.0)
            .bind(before.at.0)
            .bind(before.id)
            .bind(one_more(limit));
        let asked = match named {
            Some(named) => asked.bind(named),
            None => asked,
        };
        let rows = match org {
            Some(org) => self.rows_of(org, asked).await?,
            None => self.rows_hostwide(asked).await?,
        };
        page(&rows, limit, entry)
    }
}

/// Binds an act's own seven fields, from its id on.
pub(super) fn said<'q>(asked: Asked<'q>, act: &Act, by: &Actor) -> Asked<'q> {
    metrics::counter!("turnhouse_audit_entries_total", "verb" => act.verb.as_str()).increment(1);
    asked
        .bind(Uuid::now_v7())
        .bind(by.user.clone())
        .bind(by.credential.clone())
        .bind(by.request_id.clone())
        .bind(act.verb.as_str())
        .bind(act.resource.clone())
        .bind(act.detail_json(by))
}

fn entry(row: &PgRow) -> Result<AuditEntry> {
    Ok(AuditEntry {
        at: Timestamp(row.try_get(0)?),
        id: row.try_get(1)?,
        actor: row.try_get(2)?,
        credential: row.try_get(3)?,
        request_id: row.try_get(4)?,
        verb: row.try_get(5)?,
        resource: row.try_get(6)?,
        detail: serde_json::from_str(row.try_get(7)?)
            .map_err(|error| StoreError::Corrupt(format!("an audit's detail: {error}")))?,
    })
}
