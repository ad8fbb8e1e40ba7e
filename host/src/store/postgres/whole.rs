//! An org read as a whole, in stretches: for its export.

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::PostgresStore;
use super::conversations::record;
use super::reads::{TURNS_OF_ORG, id, one_more, page, small, turn_record};
use crate::clock::Timestamp;
use crate::ids::{AgentId, ConversationId, OrgId, RunId, TurnId};
use crate::store::{Among, ConversationRecord, Page, Result, SnapshotPlace, SnapshotRecord, TurnRecord};

statements! {
    CONVERSATIONS_OF_ORG = "-- conversations_of_org
SELECT c.agent_id, c.conversation_id, c.user_id, c.created_at, c.head_run, c.generation, n.title, n.metadata
  FROM conversations c LEFT JOIN conversation_notes n ON n.org_id = c.org_id AND n.agent_id = c.agent_id AND n.conversation_id = c.conversation_id
 WHERE c.org_id = $1 AND (c.agent_id, c.conversation_id) > ($2, $3) AND c.deleted_at IS NULL ORDER BY c.agent_id, c.conversation_id LIMIT $4";
    SNAPSHOTS_OF_ORG = "-- snapshots_of_org
SELECT agent_id, conversation_id, run_id, parent_run, turn_id, worker, version, at, length(body) FROM snapshots
 WHERE org_id = $1 AND (agent_id, conversation_id, parent_run) > ($2, $3, $4) ORDER BY agent_id, conversation_id, parent_run LIMIT $5";
    SNAPSHOTS_OF = "-- snapshots_of
SELECT agent_id, conversation_id, run_id, parent_run, turn_id, worker, version, at, length(body) FROM snapshots
 WHERE org_id = $1 AND agent_id = $2 AND conversation_id = $3 AND parent_run > $4 ORDER BY parent_run LIMIT $5";
}

impl PostgresStore {
    pub(super) async fn read_org_conversations(
        &self,
        org: &OrgId,
        after: Option<&(AgentId, ConversationId)>,
        limit: usize,
    ) -> Result<Page<ConversationRecord>> {
        let asked = self
            .query(CONVERSATIONS_OF_ORG)
            .bind(org.as_str())
            .bind(after.map_or("", |(agent, _)| agent.as_str()))
            .bind(after.map_or("", |(_, conversation)| conversation.as_str()))
            .bind(one_more(limit));
        page(&self.rows_of(org, asked).await?, limit, record)
    }

    pub(super) async fn read_org_turns(
        &self,
        org: &OrgId,
        after: Option<TurnId>,
        limit: usize,
    ) -> Result<Page<TurnRecord>> {
        let after = after.map_or(Uuid::nil(), |turn| turn.0);
        let asked = self.query(TURNS_OF_ORG).bind(org.as_str()).bind(after).bind(one_more(limit));
        page(&self.rows_of(org, asked).await?, limit, turn_record)
    }

    pub(super) async fn read_snapshots(
        &self,
        org: &OrgId,
        among: &Among,
        after: Option<&SnapshotPlace>,
        limit: usize,
    ) -> Result<Page<SnapshotRecord>> {
        let parent = after.map_or(Uuid::nil(), |place| place.parent);
        let (statement, agent, conversation) = match among {
            Among::All => (
                SNAPSHOTS_OF_ORG,
                after.map_or("", |place| place.agent.as_str()),
                after.map_or("", |place| place.conversation.as_str()),
            ),
            Among::One(agent, conversation) => (SNAPSHOTS_OF, agent.as_str(), conversation.as_str()),
        };
        let asked =
            self.query(statement).bind(org.as_str()).bind(agent).bind(conversation).bind(parent).bind(one_more(limit));
        page(&self.rows_of(org, asked).await?, limit, snapshot)
    }
}

fn snapshot(row: &PgRow) -> Result<SnapshotRecord> {
    Ok(SnapshotRecord {
        agent: id(row, 0)?,
        conversation: id(row, 1)?,
        run_id: RunId(row.try_get(2)?),
        parent: row.try_get(3)?,
        turn: TurnId(row.try_get(4)?),
        worker: id(row, 5)?,
        version: small(row, 6)?,
        at: Timestamp(row.try_get(7)?),
        bytes: row.try_get::<Option<i32>, _>(8)?.map(i64::from).map(i64::unsigned_abs),
    })
}
