//! Who owns the tables and who works on them: a host as a role that owns nothing, an owner who may not make roles, and gaps in the wall.

use super::*;
use crate::store::Health;

/// Who logs in as a host and owns nothing; the server's, and the same for all tests.
const HOST: &str = "turnhouse_tests_host";

/// The same database as another user.
fn as_user(url: &str, user: &str) -> String {
    let (scheme, rest) = url.split_once("://").expect("a URL");
    let rest = rest.split_once('@').map_or(rest, |(_, rest)| rest);
    format!("{scheme}://{user}:{user}@{rest}")
}

/// Makes a role that may log in, unless it is there.
async fn login(name: &str, of: &str) {
    let mut connection = PgConnection::connect(&server()).await.unwrap();
    let make = format!(
        "DO $$ BEGIN CREATE ROLE {name} LOGIN PASSWORD '{name}' {of}; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$"
    );
    run(&mut connection, make).await;
    connection.close().await.unwrap();
}

/// A login of one test; dropped with this, after what it owns.
struct Login(String);

impl Login {
    async fn new() -> Login {
        let name = format!("turnhouse_tests_{}", Uuid::now_v7().simple());
        login(&name, "").await;
        Login(name)
    }

    async fn drop(self) {
        let mut connection = PgConnection::connect(&server()).await.unwrap();
        run(&mut connection, format!("DROP ROLE {}", self.0)).await;
    }
}

async fn hosts_options(database: &Database) -> PostgresOptions {
    login(HOST, "IN ROLE turnhouse_tenant, turnhouse_host").await;
    PostgresOptions { url: as_user(&url_of(&database.name), HOST), ..database.options() }
}

async fn plain_world() -> World {
    let database = Database::migrated().await;
    let store = Arc::new(PostgresStore::open(hosts_options(&database).await).await.unwrap());
    World::new(Arc::clone(&store) as Arc<dyn Store>, Box::new(Home { store, database })).await
}

/// What hosts do for all orgs, without owning a table. What they do for one, they do as the tenants' role anyway.
mod plain {
    crate::store::conformance::rules! { @ crate::store::postgres::tests::roles::plain_world, crate::store::postgres::tests::check;
        turns: [
            t10_a_poison_turn_ends_and_the_conversation_goes_on, r2_an_expired_replica_is_dead_for_ever, r6_a_drain_spends_no_attempt_and_claims_nothing,
            a_long_tail_reads_like_a_short_one, stale_leases_are_named, progress_tells_what_has_changed,
        ]
        queue: [
            t9_what_comes_meanwhile_is_one_next_turn, what_is_old_goes_and_what_lives_stays, idempotency_keys_are_forgotten, each_clock_has_its_own_reason,
            status_tells_what_is_owed,
        ]
        snapshots: [s3_snapshots_form_one_chain, s8_deleting_ends_live_turns,]
        catalog: [
            keys_are_found_by_hash_and_revoked, ticket_keys_are_added_in_order_and_two_are_kept, orgs_are_made_once,
            s8_a_title_goes_with_its_conversation_and_stays_over_a_reset,
        ]
        audit: [o1_an_orgs_audit_is_its_own_and_the_hosts_is_nobodys, old_entries_of_the_audit_go_and_young_ones_stay,]
        orgs: [provisioning_makes_an_org_whole_once, an_org_goes_in_pieces_and_only_once_it_is_marked_and_idle, a_marked_org_is_nobodys,]
        torture: [r1_torture_leaves_no_trace,]
        model: [every_answer_is_one_that_the_protocol_allows,]
    }
}

async fn refusal(options: PostgresOptions) -> String {
    match PostgresStore::open(options).await {
        Err(StoreError::Unavailable(why)) => why,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("opened"),
    }
}

async fn wall(store: &PostgresStore) -> (Health, String) {
    let found = store.examine().await.unwrap().into_iter().find(|finding| finding.what == "wall").unwrap();
    (found.health, found.text)
}

#[tokio::test]
async fn o1_a_host_that_owns_nothing_works_behind_anothers_migrations() {
    let database = Database::empty().await;
    // The roles are there since the first schema of this server.
    drop(Database::migrated().await);
    let options = hosts_options(&database).await;
    let why = refusal(options.clone()).await;
    assert!(
        why.contains("may not do that") && why.contains("run turnhouse migrate as the role that owns the tables"),
        "{why}"
    );
    PostgresStore::migrate(database.options()).await.unwrap().close().await;
    let store = PostgresStore::open(options.clone()).await.unwrap();
    let (health, text) = wall(&store).await;
    assert!(health == Health::Good && text.contains("does not own the tables"), "{text}");
    assert!(store.create_org(&org("acme"), &user("root"), Timestamp(1), &by()).await.unwrap());
    store.close().await;
    let mut connection = PgConnection::connect(&options.url).await.unwrap();
    for sql in [
        "ALTER TABLE turns DISABLE ROW LEVEL SECURITY",
        "DROP POLICY tenant ON turns",
        "CREATE POLICY mine ON turns USING (true)",
        "TRUNCATE audit",
        "ALTER TABLE audit DISABLE TRIGGER ALL",
        "UPDATE schema_compat SET oldest_supported = 1",
        "CREATE TABLE mine ()",
    ] {
        let refused = sqlx::raw_sql(sql).execute(&mut connection).await.expect_err(sql);
        assert!(
            refused.to_string().contains("must be owner") || refused.to_string().contains("permission denied"),
            "{sql}: {refused}"
        );
    }
}

#[tokio::test]
async fn o1_nobody_works_without_the_roles_of_the_wall() {
    drop(Database::migrated().await);
    let owner = Login::new().await;
    let database = Database::empty().await;
    let mut connection = PgConnection::connect(&server()).await.unwrap();
    run(&mut connection, format!("ALTER DATABASE {} OWNER TO {}", database.name, owner.0)).await;
    let options = PostgresOptions { url: as_user(&url_of(&database.name), &owner.0), ..database.options() };
    let why = refusal(options.clone()).await;
    assert!(why.contains("may not act as turnhouse_tenant"), "{why}");
    assert!(why.ends_with(&format!("; as a role that may, run GRANT turnhouse_tenant TO {}", owner.0)), "{why}");
    // With that an owner needs to be nothing else: neither superuser nor one who makes roles.
    run(&mut connection, format!("GRANT turnhouse_tenant TO {}", owner.0)).await;
    let store = PostgresStore::open(options.clone()).await.unwrap();
    let (health, text) = wall(&store).await;
    assert!(health == Health::Good && text.contains("owns the tables"), "{text}");
    store.create_org(&org("acme"), &user("root"), Timestamp(1), &by()).await.unwrap();
    assert!(store.org(&org("acme")).await.unwrap().is_some());
    *store.walled_as.lock() = Some(org("zeta"));
    assert!(store.org(&org("acme")).await.unwrap().is_none(), "the owner's tenants have the wall around them, too");
    store.close().await;
    // Later it is taken away again.
    run(&mut connection, format!("REVOKE turnhouse_tenant FROM {}", owner.0)).await;
    let why = refusal(options).await;
    assert!(
        why.contains("may not act as turnhouse_tenant") && why.contains("GRANT turnhouse_tenant, turnhouse_host TO"),
        "{why}"
    );
    // Who is no member of the hosts' role sees nothing and is told.
    let stranger = Login::new().await;
    let only_tables = "GRANT ALL ON ALL TABLES IN SCHEMA public TO";
    let mut inside = database.look().await;
    run(&mut inside, format!("{only_tables} {0}; GRANT turnhouse_tenant TO {0}", stranger.0)).await;
    let options = PostgresOptions { url: as_user(&url_of(&database.name), &stranger.0), ..database.options() };
    let why = refusal(options).await;
    assert!(why.contains("neither owns the tables nor belongs to turnhouse_host"), "{why}");
    inside.close().await.unwrap();
    drop(database);
    stranger.drop().await;
    owner.drop().await;
}

#[tokio::test]
async fn o1_no_store_opens_with_a_gap_in_its_wall_and_migrating_mends_it() {
    for (damage, gap, mends) in [
        ("ALTER TABLE turns DISABLE ROW LEVEL SECURITY", "table turns is open to all orgs", true),
        ("DROP POLICY tenant ON audit", "table audit is open to all orgs", true),
        ("CREATE TABLE later (org_id text NOT NULL)", "table later is open to all orgs", true),
        ("CREATE POLICY all_of_it ON agents USING (true)", "table agents is open to all orgs", false),
        (
            "CREATE POLICY all_of_it ON agents TO turnhouse_tenant USING (true)",
            "table agents is open to all orgs",
            false,
        ),
    ] {
        let database = Database::migrated().await;
        let mut connection = database.look().await;
        run(&mut connection, damage.to_owned()).await;
        let why = refusal(database.options()).await;
        assert!(
            why.contains(gap) && why.ends_with("; run turnhouse migrate as the role that owns the tables"),
            "{why}"
        );
        let mended = PostgresStore::migrate(database.options()).await;
        assert_eq!(mended.is_ok(), mends, "{damage}: {:?}", mended.err());
        assert_eq!(PostgresStore::open(database.options()).await.is_ok(), mends, "{damage}");
    }
}
