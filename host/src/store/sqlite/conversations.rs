//! Conversations: made, listed, deleted, begun anew. Their row is never removed: places go on where they were.

use std::collections::BTreeMap;

use rusqlite::params;
use sqlx::Row;
use sqlx::sqlite::SqliteRow;
use uuid::Uuid;

use super::SqliteStore;
use super::attachments::{DELETE_REFS, DELETE_UPLOADS};
use super::reads::{id, one_more, page, uuid};
use super::writer::{Fault, Tried, Tx};
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
 WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.conversation_id = ?3 AND c.deleted_at IS NULL";
    /// Also of one that is deleted.
    GENERATION = "-- generation
SELECT generation FROM conversations WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3";
    CONVERSATIONS = "-- conversations
SELECT c.agent_id, c.conversation_id, c.user_id, c.created_at, c.head_run, c.generation, n.title, n.metadata
  FROM conversations c LEFT JOIN conversation_notes n ON n.org_id = c.org_id AND n.agent_id = c.agent_id AND n.conversation_id = c.conversation_id
 WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.conversation_id > ?3 AND c.deleted_at IS NULL ORDER BY c.conversation_id LIMIT ?4";
    CONVERSATIONS_OF = "-- conversations_of
SELECT c.agent_id, c.conversation_id, c.user_id, c.created_at, c.head_run, c.generation, n.title, n.metadata
  FROM conversations c LEFT JOIN conversation_notes n ON n.org_id = c.org_id AND n.agent_id = c.agent_id AND n.conversation_id = c.conversation_id
 WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.user_id = ?5 AND c.conversation_id > ?3 AND c.deleted_at IS NULL ORDER BY c.conversation_id LIMIT ?4";
    /// Whosever it is, where ?4 is null.
    CONVERSATION_KNOWN = "-- conversation_known
SELECT 1 FROM conversations
 WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND deleted_at IS NULL AND (?4 IS NULL OR user_id = ?4)";
    /// What is not to be set stays.
    NOTES_WRITE = "-- notes_write
INSERT INTO conversation_notes (org_id, agent_id, conversation_id, title, metadata) VALUES (?1, ?2, ?3, ?5, ?7)
ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE SET title = CASE WHEN ?4 THEN excluded.title ELSE title END,
  metadata = CASE WHEN ?6 THEN excluded.metadata ELSE metadata END";
    DELETE_NOTES = "-- delete_notes
DELETE FROM conversation_notes WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3";
    /// Also those without a place: its owner's turn that named this conversation is part of what is deleted. Another's is not: it never was in this
    /// conversation, whose owner cannot see it.
    DELETE_LIVE = "-- delete_live
SELECT t.turn_id FROM turns t JOIN turn_markers m ON m.org_id = t.org_id AND m.turn_id = t.turn_id
 WHERE t.org_id = ?1 AND t.agent_id = ?2 AND t.conversation_id = ?3 AND (t.seq IS NOT NULL OR t.user_id = (
    SELECT c.user_id FROM conversations c WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.conversation_id = ?3)) ORDER BY t.seq DESC";
    DELETE_EVENTS = "-- delete_events
DELETE FROM turn_events WHERE org_id = ?1 AND turn_id IN (
  SELECT t.turn_id FROM turns t WHERE t.org_id = ?1 AND t.agent_id = ?2 AND t.conversation_id = ?3 AND (t.seq IS NOT NULL OR t.user_id = (
    SELECT c.user_id FROM conversations c WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.conversation_id = ?3)))";
    DELETE_TURNS = "-- delete_turns
DELETE FROM turns AS t WHERE t.org_id = ?1 AND t.agent_id = ?2 AND t.conversation_id = ?3 AND (t.seq IS NOT NULL OR t.user_id = (
    SELECT c.user_id FROM conversations c WHERE c.org_id = ?1 AND c.agent_id = ?2 AND c.conversation_id = ?3))";
    DELETE_SNAPSHOTS = "-- delete_snapshots
DELETE FROM snapshots WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3";
    DELETE_KEYS = "-- delete_keys
DELETE FROM idempotency_keys AS k WHERE k.org_id = ?1 AND k.agent_id = ?2 AND k.conversation_id = ?3
   AND NOT EXISTS (SELECT 1 FROM turns t WHERE t.org_id = k.org_id AND t.turn_id = k.turn_id)";
    FILES_KNOWN = "-- files_known
SELECT 1 FROM conversations WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND generation = ?4 AND files_bytes = ?5";
    FILES_NOTE = "-- files_note
UPDATE conversations SET files_bytes = ?5 WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3 AND generation = ?4";
    /// Another root: what was staged on the old chain fits nowhere any more.
    CHAIN_ANEW = "-- chain_anew
UPDATE conversations SET generation = ?4, head_run = ?4, kept_runs = x'', files_bytes = 0, deleted_at = coalesce(?5, deleted_at)
 WHERE org_id = ?1 AND agent_id = ?2 AND conversation_id = ?3";
}

impl SqliteStore {
    pub(super) async fn read_conversation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Result<Option<Owned<ConversationRecord>>> {
        let row = sqlx::query(CONVERSATION)
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .fetch_optional(&self.readers)
            .await?;
        row.map(|row| record(&row).map(|found| Owned::new(org.clone(), found.user.clone(), found))).transpose()
    }

    pub(super) async fn read_generation(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Result<Option<Uuid>> {
        let row = sqlx::query(GENERATION)
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .fetch_optional(&self.readers)
            .await?;
        row.map(|row| uuid(&row, 0)).transpose()
    }

    /// Written where it is news: most turns leave their files as they were.
    pub(super) async fn write_files_bytes(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        generation: Uuid,
        bytes: u64,
    ) -> Result<()> {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let known = sqlx::query(FILES_KNOWN)
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(conversation.as_str())
            .bind(&generation.as_bytes()[..])
            .bind(bytes);
        if known.fetch_optional(&self.readers).await?.is_some() {
            return Ok(());
        }
        let ids = (org.clone(), agent.clone(), conversation.clone());
        self.write_with(Timestamp(0), move |tx| {
            let (org, agent, conversation) = (ids.0.as_str(), ids.1.as_str(), ids.2.as_str());
            let noted = params![org, agent, conversation, generation.as_bytes(), bytes];
            Ok(tx.conn.prepare_cached(FILES_NOTE)?.execute(noted).map(drop)?)
        })
        .await
    }

    pub(super) async fn read_conversations(
        &self,
        org: &OrgId,
        agent: &AgentId,
        user: Option<&UserId>,
        after: Option<&ConversationId>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>> {
        let statement = if user.is_some() { CONVERSATIONS_OF } else { CONVERSATIONS };
        let mut query = sqlx::query(statement)
            .bind(org.as_str())
            .bind(agent.as_str())
            .bind(after.map_or("", ConversationId::as_str))
            .bind(one_more(limit));
        if let Some(user) = user {
            query = query.bind(user.as_str());
        }
        page(&query.fetch_all(&self.readers).await?, limit, record)
    }
}

pub(super) fn record(row: &SqliteRow) -> Result<ConversationRecord> {
    let (head, generation) = (uuid(row, 4)?, uuid(row, 5)?);
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

impl Tx<'_> {
    /// `true`: it did not exist.
    /// Whether it is new, or the limit that keeps it from being made.
    pub(super) fn open_conversation(
        &mut self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        user: &UserId,
    ) -> Tried<std::result::Result<bool, Exceeded>> {
        let lane = self.lane(org, agent, conversation)?;
        if lane.as_ref().is_some_and(|lane| !lane.deleted) {
            return Ok(Ok(false));
        }
        if let Some(exceeded) = self.no_room(org)? {
            return Ok(Err(exceeded));
        }
        self.take_token(org)?;
        let generation = lane.as_ref().map_or_else(Uuid::now_v7, |lane| lane.generation);
        let next_seq = lane.map_or(1, |lane| lane.next_seq);
        self.begin_lane(org, agent, conversation, user.as_str(), next_seq, generation)?;
        Ok(Ok(true))
    }

    pub(super) fn delete_conversation(
        &mut self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
    ) -> Tried<Vec<Ended>> {
        let key = params![org.as_str(), agent.as_str(), conversation.as_str()];
        let live = {
            let mut statement = self.conn.prepare_cached(DELETE_LIVE)?;
            let rows = statement.query_map(key, |row| row.get::<_, [u8; 16]>(0))?;
            rows.map(|turn| turn.map(|turn| TurnId(Uuid::from_bytes(turn)))).collect::<rusqlite::Result<Vec<_>>>()?
        };
        // Youngest first: ending one makes no other ready.
        let outcome = Outcome::Cancelled { by: CancelledBy::Deleted };
        let mut ended = Vec::with_capacity(live.len());
        for turn in live {
            let end = self.end(&super::commit::Ending::of(org, turn, &outcome))?;
            ended.push(end.ok_or_else(|| Fault::Corrupt(format!("live turn {turn} could not be ended")))?);
        }
        for statement in
            [DELETE_EVENTS, DELETE_UPLOADS, DELETE_REFS, DELETE_TURNS, DELETE_SNAPSHOTS, DELETE_KEYS, DELETE_NOTES]
        {
            self.conn.prepare_cached(statement)?.execute(key)?;
        }
        self.chain_anew(org, agent, conversation, Some(self.now))?;
        Ok(ended)
    }

    /// Whether it is there, and is `whose`.
    pub(super) fn conversation_is_there(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        whose: Option<&UserId>,
    ) -> Tried<bool> {
        let whose = whose.map(UserId::as_str);
        let key = params![org.as_str(), agent.as_str(), conversation.as_str(), whose];
        Ok(self.conn.prepare_cached(CONVERSATION_KNOWN)?.exists(key)?)
    }

    pub(super) fn write_notes(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        change: &NotesChange,
    ) -> Tried<()> {
        self.conn.prepare_cached(NOTES_WRITE)?.execute(params![
            org.as_str(),
            agent.as_str(),
            conversation.as_str(),
            change.title.is_some(),
            change.title.as_ref().and_then(Option::as_ref),
            change.metadata.is_some(),
            change.metadata_json()
        ])?;
        Ok(())
    }

    pub(super) fn reset_snapshot(&mut self, org: &OrgId, agent: &AgentId, conversation: &ConversationId) -> Tried<()> {
        let key = params![org.as_str(), agent.as_str(), conversation.as_str()];
        self.conn.prepare_cached(DELETE_SNAPSHOTS)?.execute(key)?;
        self.chain_anew(org, agent, conversation, None)
    }

    fn chain_anew(
        &self,
        org: &OrgId,
        agent: &AgentId,
        conversation: &ConversationId,
        deleted_at: Option<Timestamp>,
    ) -> Tried<()> {
        self.conn.prepare_cached(CHAIN_ANEW)?.execute(params![
            org.as_str(),
            agent.as_str(),
            conversation.as_str(),
            Uuid::now_v7().as_bytes(),
            deleted_at.map(|at| at.0)
        ])?;
        Ok(())
    }
}
