//! What the database holds, read past every replica: the other half of what the checker judges.

use std::collections::HashMap;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::database::{self, Database};

/// A row of `turns`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TurnRow {
    pub org: String,
    pub id: String,
    pub conversation: Option<String>,
    pub seq: Option<i64>,
    pub run: Option<String>,
    pub text: Option<String>,
    pub outcome: Option<String>,
    pub reply: Option<String>,
    pub failure: Option<String>,
    pub cancelled_by: Option<String>,
    pub started_at: Option<i64>,
    pub ended_at: Option<i64>,
    pub end_epoch: Option<i64>,
    pub attempts: Option<i64>,
}

/// A row of `snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SnapshotRow {
    pub org: String,
    pub conversation: String,
    pub run: String,
    pub parent: String,
    pub turn: String,
    /// `None`: no longer kept.
    pub state: Option<String>,
}

/// A row of `conversations`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ConversationRow {
    pub org: String,
    pub conversation: String,
    pub next_seq: i64,
    pub generation: String,
    pub head: String,
    pub deleted: bool,
}

/// A row of `turn_events`: a stretch of consecutive events.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct EventsRow {
    pub org: String,
    pub turn: String,
    pub epoch: i64,
    pub first: i64,
    pub count: i64,
}

/// A row of `idempotency_keys`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct KeyRow {
    pub org: String,
    pub conversation: String,
    pub key: String,
    pub turn: String,
}

/// A row of `turn_markers`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MarkerRow {
    pub org: String,
    pub turn: String,
    pub state: String,
    pub attempt: i64,
}

/// A row of `org_load`, and what the markers say it should be.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct LoadRow {
    pub org: String,
    pub waiting: i64,
    pub ready: i64,
    pub running: i64,
    pub markers: i64,
}

/// Every table that the rules are about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {
    pub turns: Vec<TurnRow>,
    pub snapshots: Vec<SnapshotRow>,
    pub conversations: Vec<ConversationRow>,
    pub events: Vec<EventsRow>,
    pub keys: Vec<KeyRow>,
    pub markers: Vec<MarkerRow>,
    pub load: Vec<LoadRow>,
    /// The hot table with its indexes.
    pub hot_bytes: i64,
}

const TURNS: &str = "SELECT org_id AS org, turn_id AS id, conversation_id AS conversation, seq, run_id AS run,
    convert_from(message, 'UTF8')::json ->> 'text' AS text, outcome, convert_from(reply, 'UTF8')::json ->> 'text' AS reply,
    failure::json ->> 'code' AS failure, cancelled_by, started_at, ended_at, end_epoch, attempts FROM turns";
const SNAPSHOTS: &str =
    "SELECT org_id AS org, conversation_id AS conversation, run_id AS run, parent_run AS parent, turn_id AS turn,
    convert_from(body, 'UTF8') AS state FROM snapshots";
const CONVERSATIONS: &str =
    "SELECT org_id AS org, conversation_id AS conversation, next_seq, generation, head_run AS head,
    deleted_at IS NOT NULL AS deleted FROM conversations";
const EVENTS: &str = "SELECT org_id AS org, turn_id AS turn, epoch, first_seq AS first, json_array_length(convert_from(body, 'UTF8')::json) AS count
    FROM turn_events";
const KEYS: &str =
    "SELECT org_id AS org, conversation_id AS conversation, idem_key AS key, turn_id AS turn FROM idempotency_keys";
const MARKERS: &str = "SELECT org_id AS org, turn_id AS turn, state, attempt FROM turn_markers";
const LOAD: &str = "SELECT org_id AS org, waiting, ready, running,
    (SELECT count(*) FROM turn_markers m WHERE m.org_id = l.org_id) AS markers FROM org_load l";
const HOT: &str = "SELECT pg_total_relation_size('turn_markers') AS bytes";

impl Tables {
    /// Reads them all. Not one transaction: nothing may change while they are read.
    pub async fn read(database: &Database) -> Result<Tables> {
        #[derive(Deserialize)]
        struct Hot {
            bytes: i64,
        }
        Ok(Tables {
            turns: rows(database, TURNS).await?,
            snapshots: rows(database, SNAPSHOTS).await?,
            conversations: rows(database, CONVERSATIONS).await?,
            events: rows(database, EVENTS).await?,
            keys: rows(database, KEYS).await?,
            markers: rows(database, MARKERS).await?,
            load: rows(database, LOAD).await?,
            hot_bytes: rows::<Hot>(database, HOT).await?.first().map_or(0, |hot| hot.bytes),
        })
    }

    pub fn turns_by_id(&self) -> HashMap<&str, &TurnRow> {
        self.turns.iter().map(|turn| (turn.id.as_str(), turn)).collect()
    }
}

/// How many turns still owe their end.
pub async fn markers(database: &Database) -> Result<u64> {
    let count = database.psql(database::NAME, "SELECT count(*) FROM turn_markers").await?;
    count.trim().parse().context("a count is a number")
}

async fn rows<T: DeserializeOwned>(database: &Database, sql: &str) -> Result<Vec<T>> {
    // JSON has no newlines of its own, so a line is a row.
    let text = database.psql(database::NAME, &format!("SELECT row_to_json(r) FROM ({sql}) r")).await?;
    let lines = text.lines().filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_str(line).with_context(|| format!("an unexpected row: {line}"))).collect()
}
