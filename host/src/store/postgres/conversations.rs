//! Conversations: made, listed, deleted, begun anew. Their row is never removed: places go on where they were.

use std::collections::BTreeMap;

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::PostgresStore;
use super::audit::said;
use super::reads::{id, one_more, page};
use super::writer::{bigint, refusal};
use crate::admission::Refusal;
use crate::audit::{Act, Actor, Verb};
use crate::caller::Owned;
use crate::clock::Timestamp;
use crate::ids::{AgentId, ConversationId, OrgId, RunId, TurnId, UserId};
use crate::notes::NotesChange;
use crate::quota::Exceeded;
use crate::store::{ConversationRecord, Ended, Page, Result, StoreError};
use crate::turn::{CancelledBy, Outcome};

statements! {
    CONVERSATION = "-- conversation
SELECT c.agent_id, c.conversation_id, c.user_id, c.created_at, c.head_run, c.generation, n.title, n.metadata
  FROM conversations c LEFT JOIN conversation_notes n ON n.org_id = c.org_id AND n.agent_id = c.agent_id AND n.conversation_id = c.conversation_id
 WHERE c.org_id = $1 AND c.agent_id = $2 AND c.conversation_id = $3 AND c.deleted_at IS NULL";
    /// Also of one that is deleted.
    GENERATION = "-- generation
SELECT generation FROM conversations WHERE org_id = $1 AND agent_id = $2 AND conversation_id = $3";
    CONVERSATIONS = "-- conversations
SELECT c.agent_id, c.conversation_id, c.user_id, c.created_at, c.head_run, c.generation, n.title, n.metadata
  FROM conversations c LEFT JOIN conversation_notes n ON n.org_id = c.org_id AND n.agent_id = c.agent_id AND n.conversation_id = c.conversation_id
 WHERE c.org_id = $1 AND c.agent_id = $2 AND c.conversation_id > $3 AND c.deleted_at IS NULL ORDER BY c.conversation_id LIMIT $4";
    CONVERSATIONS_OF = "-- conversations_of
SELECT c.agent_id, c.conversation_id, c.user_id, c.created_at, c.head_run, c.generation, n.title, n.metadata
  FROM conversations c LEFT JOIN conversation_notes n ON n.org_id = c.org_id AND n.agent_id = c.agent_id AND n.conversation_id = c.conversation_id
 WHERE c.org_id = $1 AND c.agent_id = $2 AND c.user_id = $5 AND c.conversation_id > $3 AND c.deleted_at IS NULL ORDER BY c.conversation_id LIMIT $4";
    OPEN = "-- open
SELECT made, refusal, limit_max, wait_ms FROM open_conversation($1::bigint, $2, $3, $4, $5, $6, $7::float8, $8::int, $9::bigint)";
    /// $1 the time, $6 and on what is said of it, $13 whose it must be.
    DELETE = "-- delete
WITH gone AS MATERIALIZED (SELECT turn, was, accepted, ended FROM delete_conversation_and_notes($1::bigint, $2, $3, $4, $13, $5)),
     said AS (INSERT INTO audit (org_id, at, audit_id, actor, credential, request_id, verb, resource, detail)
              SELECT $2, coalesce($1::bigint, turnhouse_now()), $6, $7, $8, $9, $10, $11, $12 WHERE EXISTS (SELECT 1 FROM gone))
SELECT turn, was, accepted, ended FROM gone";
    NOTES = "-- notes
SELECT write_notes($1, $2, $3, $8, $4, $5, $6, $7)";
    /// $1 the time, $6 and on what is said of it, $13 whose it must be.
    RESET = "-- reset
WITH anew AS MATERIALIZED (SELECT reset_snapshot($2, $3, $4, $13, $5) AS done),
     said AS (INSERT INTO audit (org_id, at, audit_id, actor, credential, request_id, verb, resource, detail)
              SELECT $2, coalesce($1::bigint, turnhouse_now()), $6, $7, $8, $9, $10, $11, $12 FROM anew WHERE done)
SELECT done FROM anew";
}

impl PostgresStore {
    pub(super) async fn read_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Result<Option<Owned<ConversationRecord>>> {
        let asked = self.query(CONVERSATION).bind(org.as_str()).bind(agent.as_str()).bind(conversation.as_str());
        let row = self.row_of(org, asked).await?;
        row.map(|row| record(&row).map(|found| Owned::new(org.clone(), found.user.clone(), found))).transpose()
    }

    pub(super) async fn read_generation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Result<Option<Uuid>> {
        let asked = self.query(GENERATION).bind(org.as_str()).bind(agent.as_str()).bind(conversation.as_str());
        self.row_of(org, asked).await?.map(|row| Ok(row.try_get(0)?)).transpose()
    }

    pub(super) async fn read_conversations(
        &self,
        org: &OrgId,
        agent: &AgentId,
        user: Option<&UserId>,
        after: Option<&ConversationId>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>> {
        let asked = self
            .query(if user.is_some() { CONVERSATIONS_OF } else { CONVERSATIONS })
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(after.map_or("", ConversationId::as_str))
            .bind(one_more(limit));
        let asked = match user {
            Some(user) => asked.bind(user.as_str()),
            None => asked,
        };
        page(&self.rows_of(org, asked).await?, limit, record)
    }

    /// Whether it is new, or the limit that keeps it from being made.
    pub(super) async fn write_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        user: &UserId,
        now: Timestamp,
    ) -> Result<std::result::Result<bool, Exceeded>> {
        let asked = self
            .query(OPEN)
            .bind(self.clock.of(now))
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .bind(user.as_str())
            .bind(Uuid::now_v7())
            .bind(self.quota.submits_per_second)
            .bind(i32::try_from(self.quota.submit_burst).unwrap_or(i32::MAX))
            .bind(bigint(self.quota.storage_bytes_max));
        let row = self.call_one_of(org, asked).await?;
        if row.try_get::<Option<&str>, _>("refusal")?.is_none() {
            return Ok(Ok(row.try_get("made")?));
        }
        match refusal(&row)? {
            Refusal::Exceeded(exceeded) => Ok(Err(exceeded)),
            other => Err(StoreError::Corrupt(format!("{other} keeps no conversation from being made"))),
        }
    }

    pub(super) async fn write_deletion(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<Option<Vec<Ended>>> {
        let asked = self
            .query(DELETE)
            .bind(self.clock.of(now))
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .bind(Uuid::now_v7());
        let act = Act::conversation(Verb::ConversationDelete, agent, conversation);
        let asked = said(asked, &act, by).bind(whose.map(UserId::as_str));
        let rows = self.call_of(org, asked).await?;
        let Some((_there, turns)) = rows.split_first() else { return Ok(None) };
        turns
            .iter()
            .map(|row| {
                Ok(Ended {
                    org: org.clone(),
                    turn: TurnId(row.try_get(0)?),
                    agent: agent.clone(),
                    outcome: Outcome::Cancelled { by: CancelledBy::Deleted },
                    usage: None,
                    was_running: row.try_get::<&str, _>(1)? == "running",
                    accepted_at: Timestamp(row.try_get(2)?),
                    ended_at: Timestamp(row.try_get(3)?),
                    promoted: false,
                })
            })
            .collect::<Result<_>>()
            .map(Some)
    }

    /// `false`: it is not there, or not `whose`.
    pub(super) async fn write_conversation_notes(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        change: &NotesChange,
    ) -> Result<bool> {
        let asked = self
            .query(NOTES)
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .bind(change.title.is_some())
            .bind(change.title.clone().flatten())
            .bind(change.metadata.is_some())
            .bind(change.metadata_json())
            .bind(whose.map(UserId::as_str));
        Ok(self.call_one_of(org, asked).await?.try_get(0)?)
    }

    pub(super) async fn write_reset(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
        now: Timestamp,
        by: &Actor,
    ) -> Result<bool> {
        let asked = self
            .query(RESET)
            .bind(self.clock.of(now))
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .bind(Uuid::now_v7());
        let act = Act::conversation(Verb::ConversationReset, agent, conversation);
        let asked = said(asked, &act, by).bind(whose.map(UserId::as_str));
        Ok(self.call_one_of(org, asked).await?.try_get(0)?)
    }
}

pub(super) fn record(row: &PgRow) -> Result<ConversationRecord> {
    let (head, generation): (Uuid, Uuid) = (row.try_get(4)?, row.try_get(5)?);
    Ok(ConversationRecord {
        agent: id(row, 0)?,
        id: id(row, 1)?,
        user: id(row, 2)?,
        created_at: Timestamp(row.try_get(3)?),
        snapshot_run: (head != generation).then_some(RunId(head)),
        title: row.try_get(6)?,
        metadata: match row.try_get::<Option<&str>, _>(7)? {
            Some(json) => serde_json::from_str(json)
                .map_err(|error| StoreError::Corrupt(format!("a conversation's metadata: {error}")))?,
            None => BTreeMap::new(),
        },
    })
}
