//! The audit: written in the transaction of what it tells of, read newest first.

use rusqlite::params;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use uuid::Uuid;

use super::SqliteStore;
use super::reads::{one_more, page, uuid};
use super::writer::{Tried, Tx};
use crate::audit::{Act, Actor, AuditEntry, AuditFilter, AuditPlace};
use crate::clock::Timestamp;
use crate::ids::OrgId;
use crate::store::{Page, Result, StoreError};

/// A page of it: ?1 org, ?2 since, ?3 and ?4 before which place, ?5 how many, ?6 what its filter names.
macro_rules! entries {
    ($name:literal, $filter:literal) => {
        concat!(
            "-- ",
            $name,
            "\nSELECT at, audit_id, actor, credential, request_id, verb, resource, detail FROM audit\n WHERE org_id = ?1",
            $filter,
            " AND at >= ?2 AND (at, audit_id) < (?3, ?4) ORDER BY at DESC, audit_id DESC LIMIT ?5"
        )
    };
}

statements! {
    AUDIT_NEW = "-- audit_new
INSERT INTO audit (org_id, at, audit_id, actor, credential, request_id, verb, resource, detail) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)";
    AUDIT = entries!("audit", "");
    AUDIT_BY_ACTOR = entries!("audit_by_actor", " AND actor = ?6");
    AUDIT_BY_VERB = entries!("audit_by_verb", " AND verb = ?6");
    AUDIT_BY_RESOURCE = entries!("audit_by_resource", " AND resource = ?6");
}

impl Tx<'_> {
    /// Writes down what this transaction does.
    pub(super) fn note(&self, org: Option<&OrgId>, acts: &[Act], by: &Actor) -> Tried<()> {
        for act in acts {
            self.conn.prepare_cached(AUDIT_NEW)?.execute(params![
                org.map_or("", OrgId::as_str),
                self.now.0,
                Uuid::now_v7().as_bytes(),
                by.user,
                by.credential,
                by.request_id,
                act.verb.as_str(),
                act.resource,
                act.detail_json(by)
            ])?;
            metrics::counter!("turnhouse_audit_entries_total", "verb" => act.verb.as_str()).increment(1);
        }
        Ok(())
    }
}

impl SqliteStore {
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
        let mut query = sqlx::query(statement)
            .bind(org.map_or("", OrgId::as_str))
            .bind(since.0)
            .bind(before.at.0)
            .bind(before.id.as_bytes().to_vec())
            .bind(one_more(limit));
        if let Some(named) = named {
            query = query.bind(named);
        }
        page(&query.fetch_all(&self.readers).await?, limit, entry)
    }
}

fn entry(row: &SqliteRow) -> Result<AuditEntry> {
    Ok(AuditEntry {
        at: Timestamp(row.try_get(0)?),
        id: uuid(row, 1)?,
        actor: row.try_get(2)?,
        credential: row.try_get(3)?,
        request_id: row.try_get(4)?,
        verb: row.try_get(5)?,
        resource: row.try_get(6)?,
        detail: serde_json::from_str(row.try_get(7)?)
            .map_err(|error| StoreError::Corrupt(format!("an audit's detail: {error}")))?,
    })
}
