//! The store of a test: the embedded one, or a PostgreSQL database of the test's own, as `TURNHOUSE_TEST_STORE` says.
//!
//! The end-to-end suites run on both. What is about one of them alone says so in its name: tests in a module `embedded` are about the data directory
//! and its file, those in a module `shared` about PostgreSQL whatever the variable says. The nextest profile `postgres` leaves both out.

use std::path::Path;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tempfile::TempDir;
use turnhouse::config::DatabaseUrl;
use turnhouse::store::postgres::{PostgresOptions, PostgresStore};
use uuid::Uuid;

use crate::tables::Tables;

/// On what a test's hosts keep what they must remember.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// SQLite, in the data directory.
    Embedded,
    /// PostgreSQL.
    Shared,
    /// PostgreSQL behind PgBouncer; hints come past it.
    Pooled,
}

impl Backing {
    /// As `TURNHOUSE_TEST_STORE` says; the embedded one where it says nothing.
    ///
    /// # Panics
    /// When it names neither `sqlite` nor `postgres`.
    pub fn chosen() -> Backing {
        match std::env::var("TURNHOUSE_TEST_STORE").as_deref() {
            Err(_) | Ok("sqlite") => Backing::Embedded,
            Ok("postgres") => Backing::Shared,
            Ok(other) => panic!("TURNHOUSE_TEST_STORE is {other:?}; it may be sqlite or postgres"),
        }
    }
}

/// Whether the chosen store is PostgreSQL.
pub fn on_postgres() -> bool {
    Backing::chosen() == Backing::Shared
}

/// Where a test's hosts keep what they keep. All of it goes when this is dropped.
pub struct Home {
    dir: TempDir,
    database: Option<Database>,
}

impl Home {
    /// A fresh one on the chosen store.
    pub fn new() -> Home {
        Home::on(Backing::chosen())
    }

    /// A fresh one on this store.
    pub fn on(backing: Backing) -> Home {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let database = match backing {
            Backing::Embedded => None,
            Backing::Shared => Some(Database::new(None)),
            Backing::Pooled => Some(Database::new(Some(variable("TURNHOUSE_TEST_POOLER_URL")))),
        };
        Home { dir, database }
    }

    /// For what hosts keep beside their store.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The database, unless the store is the embedded one.
    pub fn database(&self) -> Option<&Database> {
        self.database.as_ref()
    }

    /// Its tables; the embedded store's lie in `data_dir`.
    pub fn tables(&self, data_dir: &Path) -> Tables {
        match &self.database {
            Some(database) => Tables::of(database),
            None => Tables::open(data_dir),
        }
    }
}

impl Default for Home {
    fn default() -> Home {
        Home::new()
    }
}

/// A database with its schema on the server that `TURNHOUSE_TEST_DATABASE_URL` names; dropped with this.
pub struct Database {
    name: String,
    pooler: Option<String>,
}

impl Database {
    /// `pooler`: what the hosts are to go through.
    fn new(pooler: Option<String>) -> Database {
        let name = format!("turnhouse_{}", Uuid::now_v7().simple());
        wait(create(name.clone()));
        Database { name, pooler }
    }

    /// Its URL for hosts: as a role that owns nothing, which a pooler need not know.
    pub fn url(&self) -> DatabaseUrl {
        match &self.pooler {
            Some(pooler) => on(pooler, &self.name).into(),
            None => as_host(&self.direct_url()).into(),
        }
    }

    /// Its owner's URL, past any pooler.
    pub fn direct_url(&self) -> String {
        on(&server(), &self.name)
    }

    /// How a host opens it.
    pub fn options(&self) -> PostgresOptions {
        let options = PostgresOptions::new(self.url().as_str());
        PostgresOptions { connections: 5, listen_url: Some(self.direct_url()), ..options }
    }

    /// Ends every session in it but one's own, as a restart of the server does; how many.
    pub fn end_sessions(&self) -> i64 {
        Tables::of(self).count(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let drop = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        wait(async move {
            let mut connection = PgConnection::connect(&server()).await.expect("the tests' PostgreSQL answers");
            run(&mut connection, drop).await;
        });
    }
}

/// The role of hosts, a login that owns nothing, and its password.
const HOST: &str = "turnhouse_tests_host";

/// The same database as the hosts' role.
fn as_host(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").expect("a URL");
    let rest = rest.split_once('@').map_or(rest, |(_, rest)| rest);
    format!("{scheme}://{HOST}:{HOST}@{rest}")
}

/// A copy of one that all tests share, which is sooner there than the migrations run.
async fn create(name: String) {
    let mut connection = PgConnection::connect(&server()).await.expect("the tests' PostgreSQL answers");
    let template = format!("turnhouse_tests_template_{}", schema());
    // Ends with the session.
    run(&mut connection, "SELECT pg_advisory_lock(8789)".to_owned()).await;
    let known = sqlx::query("SELECT 1 FROM pg_database WHERE datname = $1").bind(&template);
    if known.fetch_optional(&mut connection).await.expect("the server's databases").is_none() {
        let making = format!("turnhouse_{}", Uuid::now_v7().simple());
        run(&mut connection, format!("CREATE DATABASE {making}")).await;
        let options = PostgresOptions::new(on(&server(), &making));
        let store = PostgresStore::open(options).await.expect("the schema is made");
        turnhouse::store::Store::close(&store).await;
        run(&mut connection, format!("ALTER DATABASE {making} RENAME TO {template}")).await;
    }
    // The server's: another test may have made it.
    let host = format!(
        "DO $$ BEGIN CREATE ROLE {HOST} LOGIN PASSWORD '{HOST}' IN ROLE turnhouse_tenant, turnhouse_host;
         EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
    );
    run(&mut connection, host).await;
    run(&mut connection, format!("CREATE DATABASE {name} TEMPLATE {template}")).await;
}

/// What tells one schema from another: the migrations' text.
fn schema() -> String {
    use std::hash::{Hash as _, Hasher as _};
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations/postgres");
    let mut files: Vec<_> = std::fs::read_dir(dir).expect("the migrations").flatten().map(|file| file.path()).collect();
    files.sort();
    let mut hasher = std::hash::DefaultHasher::new();
    for file in files {
        std::fs::read(&file).expect("a migration").hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

async fn run(connection: &mut PgConnection, sql: String) {
    let done = sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(connection).await;
    done.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Does it to its end, on a thread of its own: also where a runtime is at work, and in a `Drop`.
pub(crate) fn wait<T: Send + 'static>(what: impl Future<Output = T> + Send + 'static) -> T {
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(what)
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn server() -> String {
    variable("TURNHOUSE_TEST_DATABASE_URL")
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} names no server for this test: run `cargo xtask test`, which starts PostgreSQL and PgBouncer, or set it to the URL of one \
             whose user may make databases and roles"
        )
    })
}

/// The same server, another database.
fn on(url: &str, database: &str) -> String {
    let (address, parameters) = url.split_once('?').map_or((url, None), |(address, rest)| (address, Some(rest)));
    let (host, _) = address.rsplit_once('/').expect("the URL names a database");
    let parameters = parameters.map(|rest| format!("?{rest}")).unwrap_or_default();
    format!("{host}/{database}{parameters}")
}
