//! Where the tests of PostgreSQL live: a database for each, and the worlds of the conformance suite upon it, directly and through a pooler.

use super::*;

pub(super) const SNAPSHOTS_KEPT: u32 = 3;

pub(super) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} names no server for this test: run `cargo xtask test`, which starts PostgreSQL and PgBouncer, or set it to the URL of one \
             whose user may make databases and roles"
        )
    })
}

pub(super) fn server() -> String {
    variable("TURNHOUSE_TEST_DATABASE_URL")
}

/// The same server, another database.
pub(super) fn url_of(database: &str) -> String {
    on(&server(), database)
}

pub(super) fn on(url: &str, database: &str) -> String {
    let (address, parameters) = url.split_once('?').map_or((url, None), |(address, rest)| (address, Some(rest)));
    let (host, _) = address.rsplit_once('/').expect("the URL names a database");
    let parameters = parameters.map(|rest| format!("?{rest}")).unwrap_or_default();
    format!("{host}/{database}{parameters}")
}

pub(super) fn with_parameter(url: &str, parameter: &str) -> String {
    format!("{url}{}{parameter}", if url.contains('?') { '&' } else { '?' })
}

pub(super) async fn run(connection: &mut PgConnection, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql.clone()))
        .execute(connection)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// A database for one test; dropped with this.
pub(in crate::store::postgres) struct Database {
    pub(super) name: String,
}

impl Database {
    /// Empty.
    pub(super) async fn empty() -> Database {
        let name = format!("turnhouse_{}", Uuid::now_v7().simple());
        let mut connection = PgConnection::connect(&server()).await.expect("the tests' PostgreSQL answers");
        run(&mut connection, format!("CREATE DATABASE {name}")).await;
        Database { name }
    }

    /// With its schema: a copy of one that all tests share, which is sooner there than the migrations run.
    pub(in crate::store::postgres) async fn migrated() -> Database {
        let mut connection = PgConnection::connect(&server()).await.expect("the tests' PostgreSQL answers");
        // A name has 63 bytes at most, however many migrations there are.
        let sums = MIGRATIONS.iter().fold(Sha256::new(), |sums, migration| sums.chain_update(&migration.checksum));
        let template = format!("turnhouse_template_{}", hex::encode(&sums.finalize()[..16]));
        run(&mut connection, "SELECT pg_advisory_lock(8788)".to_owned()).await;
        let known = sqlx::query("SELECT 1 FROM pg_database WHERE datname = $1").bind(&template);
        if known.fetch_optional(&mut connection).await.unwrap().is_none() {
            let making = Database::empty().await;
            PostgresStore::open(PostgresOptions::new(url_of(&making.name))).await.unwrap().close().await;
            run(&mut connection, format!("ALTER DATABASE {} RENAME TO {template}", making.name)).await;
            // It goes with the server.
            std::mem::forget(making);
        }
        let name = format!("turnhouse_{}", Uuid::now_v7().simple());
        run(&mut connection, format!("CREATE DATABASE {name} TEMPLATE {template}")).await;
        connection.close().await.unwrap();
        Database { name }
    }

    pub(in crate::store::postgres) fn options(&self) -> PostgresOptions {
        let options = PostgresOptions::new(url_of(&self.name));
        PostgresOptions { snapshots_kept: SNAPSHOTS_KEPT, connections: 3, clock: Clock::Passed, ..options }
    }

    pub(in crate::store::postgres) async fn look(&self) -> PgConnection {
        PgConnection::connect(&url_of(&self.name)).await.unwrap()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let drop = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        let dropped = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = PgConnection::connect(&server()).await.unwrap();
                run(&mut connection, drop).await;
            });
        });
        let dropped = dropped.join();
        assert!(dropped.is_ok() || std::thread::panicking());
    }
}

/// What lies under a [`World`].
pub(super) struct Home {
    pub(super) store: Arc<PostgresStore>,
    pub(super) database: Database,
}

pub(super) async fn world() -> World {
    let database = Database::migrated().await;
    let store = Arc::new(PostgresStore::open(database.options()).await.unwrap());
    World::new(Arc::clone(&store) as Arc<dyn Store>, Box::new(Home { store, database })).await
}

pub(super) async fn pooled_world() -> World {
    let database = Database::migrated().await;
    let url = on(&variable("TURNHOUSE_TEST_POOLER_URL"), &database.name);
    let store = Arc::new(PostgresStore::open(PostgresOptions { url, ..database.options() }).await.unwrap());
    assert_eq!(store.route, Route::Pooled, "the pooler was noticed");
    World::new(Arc::clone(&store) as Arc<dyn Store>, Box::new(Home { store, database })).await
}

pub(super) fn home(world: &World) -> &Home {
    world._keep.downcast_ref().unwrap()
}

impl Home {
    /// Breaks the tables behind the store's back.
    pub(super) async fn damage(&self, sql: &str) -> u64 {
        let mut connection = self.database.look().await;
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap().rows_affected()
    }
}
