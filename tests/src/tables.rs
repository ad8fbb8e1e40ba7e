//! What a store's tables say, read beside the host: the other half of every check on what clients were told.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags};
use serde_json::Value as Json;
use sqlx::postgres::{PgRow, PgValueRef};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, Row as _, TypeInfo as _, ValueRef as _};
use uuid::Uuid;

use crate::database::{Database, wait};

/// A store's tables. Statements that mean the same to both databases may be asked of either.
pub struct Tables(Place);

enum Place {
    /// A data directory's file.
    File(Connection),
    /// The URL of a PostgreSQL database; each statement has a connection of its own.
    Database(String),
}

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
        Tables(Place::File(connection.expect("the database opens")))
    }

    /// The tables of a PostgreSQL database.
    pub fn of(database: &Database) -> Tables {
        Tables(Place::Database(database.direct_url()))
    }

    /// The same for writing: for tests that damage what is stored.
    #[must_use]
    pub fn to_damage(self) -> Tables {
        match self.0 {
            Place::File(connection) => {
                let connection = Connection::open(connection.path().expect("it has a file")).expect("it opens");
                connection.busy_timeout(crate::PATIENCE).expect("a time-out is set");
                Tables(Place::File(connection))
            }
            database => Tables(database),
        }
    }

    /// Runs statements.
    pub fn execute(&self, sql: &str) {
        match &self.0 {
            Place::File(connection) => connection.execute_batch(sql).expect("the statements run"),
            Place::Database(url) => {
                let (url, sql) = (url.clone(), sql.to_owned());
                wait(async move {
                    let mut connection = PgConnection::connect(&url).await.expect("the database answers");
                    connection.execute(sqlx::raw_sql(AssertSqlSafe(sql))).await.expect("the statements run");
                });
            }
        }
    }

    /// The number that a query gives.
    pub fn count(&self, sql: &str) -> i64 {
        self.rows(sql).pop().expect("a row").number(0)
    }

    fn rows(&self, sql: &str) -> Vec<Row> {
        match &self.0 {
            Place::File(connection) => {
                let mut statement = connection.prepare(sql).expect("a statement");
                let columns = statement.column_count();
                let rows = statement.query_map([], |row| (0..columns).map(|column| row.get(column)).collect());
                rows.expect("rows").map(|row| Row(row.expect("a row"))).collect()
            }
            Place::Database(url) => {
                let (url, sql) = (url.clone(), sql.to_owned());
                wait(async move {
                    let mut connection = PgConnection::connect(&url).await.expect("the database answers");
                    let rows = connection.fetch_all(sqlx::query(AssertSqlSafe(sql.clone()))).await;
                    rows.unwrap_or_else(|error| panic!("{sql}: {error}")).iter().map(Row::of).collect()
                })
            }
        }
    }

    /// Every turn, in the order of acceptance of its conversation.
    pub fn turns(&self) -> Vec<TurnRow> {
        let rows = self.rows(
            "SELECT turn_id, org_id || '/' || agent_id || '/' || coalesce(conversation_id, '') AS lane, seq, outcome, reply, attempts
               FROM turns ORDER BY 2, seq",
        );
        let turn = |row: &Row| TurnRow {
            id: row.id(0).to_string(),
            lane: row.text(1),
            seq: row.if_any(2, Row::number),
            outcome: row.if_any(3, Row::text),
            reply: row.if_any(4, Row::body),
            attempts: row.if_any(5, Row::number),
        };
        rows.iter().map(turn).collect()
    }

    /// The text of every turn's message.
    pub fn messages(&self) -> Vec<String> {
        let rows = self.rows("SELECT message FROM turns");
        let text = |row: &Row| row.json(0)["text"].as_str().expect("a text").to_owned();
        rows.iter().map(text).collect()
    }

    /// The tables that hold this text somewhere.
    pub fn that_hold(&self, text: &str) -> Vec<String> {
        let (names, found) = match &self.0 {
            Place::File(_) => ("SELECT name FROM sqlite_schema WHERE type = 'table'", None),
            // A body shows as its hex digits.
            Place::Database(_) => (
                "SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema()",
                Some(format!("t::text LIKE '%{text}%' OR t::text LIKE '%{}%'", hex(text))),
            ),
        };
        let mut holding = Vec::new();
        for name in self.rows(names).iter().map(|row| row.text(0)) {
            let found = found.clone().unwrap_or_else(|| {
                let columns = self.rows(&format!("SELECT name FROM pragma_table_info('{name}')"));
                let has = |column: &Row| format!("instr(CAST({} AS BLOB), CAST('{text}' AS BLOB)) > 0", column.text(0));
                columns.iter().map(has).collect::<Vec<_>>().join(" OR ")
            });
            if self.count(&format!("SELECT count(*) FROM {name} t WHERE {found}")) > 0 {
                holding.push(name);
            }
        }
        holding
    }

    /// Every row that is an org's, as text, in an order of its own; but for when a key was last used, which is told of whoever presents it, and
    /// for what the host measures by itself.
    pub fn of_org(&self, org: &str) -> Vec<String> {
        let (names, columns, quoted) = match &self.0 {
            Place::File(_) => (
                "SELECT name FROM sqlite_schema WHERE type = 'table'",
                "SELECT name FROM pragma_table_info(",
                ("quote(", ")"),
            ),
            Place::Database(_) => (
                "SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema()",
                "SELECT attname::text FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped AND attrelid = to_regclass(",
                ("coalesce(", "::text, 'NULL')"),
            ),
        };
        let measured = ["last_used_at", "storage_bytes", "storage_at"];
        let mut rows = Vec::new();
        for table in self.rows(names).iter().map(|row| row.text(0)) {
            let mut columns: Vec<String> =
                self.rows(&format!("{columns}'{table}')")).iter().map(|row| row.text(0)).collect();
            columns.retain(|column| !measured.contains(&column.as_str()));
            if !columns.iter().any(|column| column == "org_id") {
                continue;
            }
            let (before, after) = quoted;
            let shown: Vec<String> =
                columns.iter().map(|column| format!("'{column}=' || {before}{column}{after}")).collect();
            let says = match table.as_str() {
                // SQLite makes it when it first measures what an org without limits stores: its limits are NULL, its meters 0.
                "org_limits" => {
                    let own = columns.iter().filter(|column| *column != "org_id").map(|column| match column.as_str() {
                        "cpu_ms" | "cpu_hour" | "limited_agents" => format!("{column} <> 0"),
                        _ => format!("{column} IS NOT NULL"),
                    });
                    own.collect::<Vec<_>>().join(" OR ")
                }
                _ => "true".to_owned(),
            };
            let shown = shown.join(" || ' ' || ");
            let sql = format!("SELECT {shown} FROM {table} WHERE org_id = '{org}' AND ({says}) ORDER BY 1");
            rows.extend(self.rows(&sql).iter().map(|row| format!("{table}: {}", row.text(0))));
        }
        rows
    }

    /// Everything that is wrong with a database whose hosts are drained and idle: turns without an end, markers that are left, chains that
    /// are none. Empty when all is well.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let markers = self.count("SELECT count(*) FROM turn_markers");
        if markers > 0 {
            faults.push(format!("{markers} markers are left"));
        }
        match &self.0 {
            Place::File(_) => {
                let integrity = self.rows("PRAGMA integrity_check").pop().expect("a check").text(0);
                if integrity != "ok" {
                    faults.push(format!("the file is damaged: {integrity}"));
                }
            }
            Place::Database(_) => {
                for row in self.rows(
                    "SELECT org_id, waiting, ready, running FROM org_load WHERE waiting <> 0 OR ready <> 0 OR running <> 0",
                ) {
                    let counts = [row.number(1), row.number(2), row.number(3)];
                    faults.push(format!("org {} is said to have live turns: {counts:?}", row.text(0)));
                }
            }
        }
        for row in self.rows(
            "SELECT org_id FROM orgs o WHERE NOT EXISTS (SELECT 1 FROM org_members m WHERE m.org_id = o.org_id AND m.role = 'owner')",
        ) {
            faults.push(format!("org {} has no owner among its members", row.text(0)));
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
        let snapshots = self.rows(
            "SELECT s.org_id || '/' || s.agent_id || '/' || s.conversation_id AS lane, s.run_id, s.parent_run, t.outcome,
                    s.run_id IS NOT DISTINCT FROM t.run_id AS own
               FROM snapshots s LEFT JOIN turns t ON t.org_id = s.org_id AND t.turn_id = s.turn_id",
        );
        let mut parents: HashMap<(String, Uuid), Uuid> = HashMap::new();
        let mut had: HashSet<(String, Uuid)> = HashSet::new();
        for snapshot in &snapshots {
            let (lane, run, parent) = (snapshot.text(0), snapshot.id(1), snapshot.id(2));
            let outcome = snapshot.if_any(3, Row::text);
            if outcome.as_deref() != Some("completed") {
                faults.push(format!("snapshot {run} of {lane} is of a turn that is {outcome:?}"));
            }
            if !snapshot.yes(4) {
                faults.push(format!("snapshot {run} of {lane} belongs to another run than its turn's"));
            }
            if !had.insert((lane.clone(), parent)) {
                faults.push(format!("two snapshots of {lane} have one parent"));
            }
            parents.insert((lane, run), parent);
        }
        let lanes = self.rows(
            "SELECT org_id || '/' || agent_id || '/' || conversation_id AS lane, head_run, generation, deleted_at IS NOT NULL AS deleted
               FROM conversations",
        );
        for row in &lanes {
            let (lane, head, root, deleted) = (row.text(0), row.id(1), row.id(2), row.yes(3));
            let all = snapshots.iter().filter(|snapshot| snapshot.text(0) == lane).count();
            let (mut at, mut steps) = (head, 0);
            while at != root && steps <= all {
                match parents.get(&(lane.clone(), at)) {
                    Some(parent) => at = *parent,
                    None => break,
                }
                steps += 1;
            }
            if at != root || (deleted && all > 0) {
                faults.push(format!("the chain of {lane} does not lead to its root: {steps} of {all} snapshots"));
            }
        }
    }

    /// E1: the log's rows of a turn and epoch do not overlap.
    fn event_faults(&self, faults: &mut Vec<String>) {
        let rows = self.rows("SELECT turn_id, epoch, first_seq, body FROM turn_events ORDER BY 1, 2, 3");
        let rows: Vec<(Uuid, i64, i64, i64)> = rows
            .iter()
            .map(|row| {
                let events = row.json(3).as_array().expect("an array of events").len();
                (row.id(0), row.number(1), row.number(2), i64::try_from(events).expect("a number"))
            })
            .collect();
        for pair in rows.windows(2) {
            let ((turn, epoch, first, count), (next_turn, next_epoch, next, _)) = (pair[0], pair[1]);
            if (turn, epoch) == (next_turn, next_epoch) && next < first + count {
                faults.push(format!("events {epoch}.{next} of {turn} are there twice"));
            }
        }
    }
}

/// A row, whichever database it came from: ids and bodies are bytes, what is true is 1.
struct Row(Vec<Value>);

impl Row {
    fn of(row: &PgRow) -> Row {
        Row((0..row.len()).map(|column| value(row.try_get_raw(column).expect("a column"))).collect())
    }

    fn number(&self, column: usize) -> i64 {
        match &self.0[column] {
            Value::Integer(number) => *number,
            other => panic!("{other:?} is no number"),
        }
    }

    fn yes(&self, column: usize) -> bool {
        self.number(column) == 1
    }

    fn text(&self, column: usize) -> String {
        match &self.0[column] {
            Value::Text(text) => text.clone(),
            other => panic!("{other:?} is no text"),
        }
    }

    fn body(&self, column: usize) -> String {
        match &self.0[column] {
            Value::Blob(bytes) => String::from_utf8(bytes.clone()).expect("UTF-8"),
            other => panic!("{other:?} is no body"),
        }
    }

    fn json(&self, column: usize) -> Json {
        serde_json::from_str(&self.body(column)).expect("JSON")
    }

    fn id(&self, column: usize) -> Uuid {
        match &self.0[column] {
            Value::Blob(bytes) => Uuid::from_slice(bytes).expect("an id"),
            other => panic!("{other:?} is no id"),
        }
    }

    fn if_any<T>(&self, column: usize, read: fn(&Row, usize) -> T) -> Option<T> {
        (self.0[column] != Value::Null).then(|| read(self, column))
    }
}

/// PostgreSQL's value as SQLite would have it.
fn value(value: PgValueRef<'_>) -> Value {
    use sqlx::{Decode, Postgres};
    fn read<'r, T: Decode<'r, Postgres>>(value: PgValueRef<'r>) -> T {
        T::decode(value).expect("a value of its type")
    }
    if value.is_null() {
        return Value::Null;
    }
    let kind = value.type_info().name().to_owned();
    match kind.as_str() {
        "BOOL" => Value::Integer(read::<bool>(value).into()),
        "INT4" => Value::Integer(read::<i32>(value).into()),
        "INT8" => Value::Integer(read(value)),
        "TEXT" => Value::Text(read(value)),
        "BYTEA" => Value::Blob(read(value)),
        "UUID" => Value::Blob(read::<Uuid>(value).as_bytes().to_vec()),
        other => panic!("a column of type {other}: say here what it is in SQLite"),
    }
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn file(data_dir: &Path) -> std::path::PathBuf {
    data_dir.join("turnhouse.db")
}
