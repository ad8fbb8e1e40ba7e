//! What the tables of a data directory say, read beside the host: the other half of every check on what clients were told.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use rusqlite::{Connection, OpenFlags, Row};
use uuid::Uuid;

/// A data directory's database.
pub struct Tables(Connection);

/// A row of `turns`.
#[derive(Debug, Clone)]
pub struct TurnRow {
    /// Its id.
    pub id: String,
    /// `org/agent/conversation`.
    pub lane: String,
    /// Its place in the conversation.
    pub seq: Option<i64>,
    /// How it ended, if it has.
    pub outcome: Option<String>,
    /// Its reply as JSON.
    pub reply: Option<String>,
    /// How often it was started.
    pub attempts: Option<i64>,
}

impl Tables {
    /// Opens the database of `data_dir` for reading.
    pub fn open(data_dir: &Path) -> Tables {
        let connection = Connection::open_with_flags(file(data_dir), OpenFlags::SQLITE_OPEN_READ_ONLY);
        Tables(connection.expect("the database opens"))
    }

    /// Opens it for writing: for tests that damage what is stored.
    pub fn open_to_damage(data_dir: &Path) -> Tables {
        let connection = Connection::open(file(data_dir)).expect("the database opens");
        connection.busy_timeout(crate::PATIENCE).expect("a time-out is set");
        Tables(connection)
    }

    /// Runs statements.
    pub fn execute(&self, sql: &str) {
        self.0.execute_batch(sql).expect("the statements run");
    }

    /// The number that a query gives.
    pub fn count(&self, sql: &str) -> i64 {
        self.0.query_row(sql, [], |row| row.get(0)).expect("a number")
    }

    fn all<T>(&self, sql: &str, read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>) -> Vec<T> {
        let mut statement = self.0.prepare(sql).expect("a statement");
        let rows = statement.query_map([], read).expect("rows");
        rows.collect::<Result<_, _>>().expect("rows of these columns")
    }

    /// Every turn, in the order of acceptance of its conversation.
    pub fn turns(&self) -> Vec<TurnRow> {
        let sql = "SELECT turn_id, org_id || '/' || agent_id || '/' || coalesce(conversation_id, ''), seq, outcome, CAST(reply AS TEXT), attempts
            FROM turns ORDER BY 2, seq";
        self.all(sql, |row| {
            Ok(TurnRow {
                id: Uuid::from_bytes(row.get(0)?).to_string(),
                lane: row.get(1)?,
                seq: row.get(2)?,
                outcome: row.get(3)?,
                reply: row.get(4)?,
                attempts: row.get(5)?,
            })
        })
    }

    /// The text of every turn's message.
    pub fn messages(&self) -> Vec<String> {
        self.all("SELECT CAST(message AS TEXT) ->> '$.text' FROM turns", |row| row.get(0))
    }

    /// Everything that is wrong with a database whose host is drained and idle: turns without an end, markers that are left, chains that
    /// are none. Empty when all is well.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let markers = self.count("SELECT count(*) FROM turn_markers");
        if markers > 0 {
            faults.push(format!("{markers} markers are left"));
        }
        let integrity: String = self.0.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("a check");
        if integrity != "ok" {
            faults.push(format!("the file is damaged: {integrity}"));
        }
        for turn in self.turns().iter().filter(|turn| turn.outcome.is_none()) {
            faults.push(format!("turn {} of {} has no end", turn.id, turn.lane));
        }
        self.chain_faults(&mut faults);
        self.event_faults(&mut faults);
        faults
    }

    /// S3 and S7: from every conversation's head, parents lead over every snapshot of its generation to its root, and each snapshot is of the
    /// completed turn whose run wrote it.
    fn chain_faults(&self, faults: &mut Vec<String>) {
        struct Snapshot {
            lane: String,
            run: [u8; 16],
            parent: [u8; 16],
            outcome: Option<String>,
            is_its_turns_run: bool,
        }
        let snapshots = self.all(
            "SELECT s.org_id || '/' || s.agent_id || '/' || s.conversation_id, s.run_id, s.parent_run, t.outcome, s.run_id IS t.run_id
             FROM snapshots s LEFT JOIN turns t ON t.org_id = s.org_id AND t.turn_id = s.turn_id",
            |row| {
                let (lane, run, parent) = (row.get(0)?, row.get(1)?, row.get(2)?);
                Ok(Snapshot { lane, run, parent, outcome: row.get(3)?, is_its_turns_run: row.get(4)? })
            },
        );
        let mut parents: HashMap<(&str, [u8; 16]), [u8; 16]> = HashMap::new();
        let mut had: HashSet<(&str, [u8; 16])> = HashSet::new();
        for snapshot in &snapshots {
            let (lane, run) = (&snapshot.lane, Uuid::from_bytes(snapshot.run));
            if snapshot.outcome.as_deref() != Some("completed") {
                faults.push(format!("snapshot {run} of {lane} is of a turn that is {:?}", snapshot.outcome));
            }
            if !snapshot.is_its_turns_run {
                faults.push(format!("snapshot {run} of {lane} belongs to another run than its turn's"));
            }
            if !had.insert((lane, snapshot.parent)) {
                faults.push(format!("two snapshots of {lane} have one parent"));
            }
            parents.insert((lane, snapshot.run), snapshot.parent);
        }
        let lanes: Vec<(String, [u8; 16], [u8; 16], bool)> = self.all(
            "SELECT org_id || '/' || agent_id || '/' || conversation_id, head_run, generation, deleted_at IS NOT NULL FROM conversations",
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        );
        for (lane, head, root, deleted) in &lanes {
            let all = snapshots.iter().filter(|snapshot| snapshot.lane == *lane).count();
            let (mut at, mut steps) = (*head, 0);
            while at != *root && steps <= all {
                match parents.get(&(lane.as_str(), at)) {
                    Some(parent) => at = *parent,
                    None => break,
                }
                steps += 1;
            }
            if at != *root || (*deleted && all > 0) {
                faults.push(format!("the chain of {lane} does not lead to its root: {steps} of {all} snapshots"));
            }
        }
    }

    /// E1: the log's rows of a turn and epoch do not overlap.
    fn event_faults(&self, faults: &mut Vec<String>) {
        let rows: Vec<([u8; 16], i64, i64, i64)> = self.all(
            "SELECT turn_id, epoch, first_seq, json_array_length(CAST(body AS TEXT)) FROM turn_events ORDER BY 1, 2, 3",
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        );
        for pair in rows.windows(2) {
            let ((turn, epoch, first, count), (next_turn, next_epoch, next, _)) = (pair[0], pair[1]);
            if (turn, epoch) == (next_turn, next_epoch) && next < first + count {
                faults.push(format!("events {epoch}.{next} of {} are there twice", Uuid::from_bytes(turn)));
            }
        }
    }
}

fn file(data_dir: &Path) -> std::path::PathBuf {
    data_dir.join("turnhouse.db")
}
