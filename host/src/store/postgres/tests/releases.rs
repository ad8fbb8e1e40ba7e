//! Schemas: hosts that make one at once, newer ones, and two releases of the program beside each other.

use super::*;

#[tokio::test]
async fn two_hosts_that_start_at_once_make_one_schema() {
    let database = Database::empty().await;
    let stores = futures_util::future::join_all((0..4).map(|_| PostgresStore::open(database.options()))).await;
    for store in stores {
        store.unwrap().close().await;
    }
    let mut connection = database.look().await;
    let known = i64::try_from(MIGRATIONS.iter().count()).unwrap();
    assert_eq!(count(&mut connection, "SELECT 1 FROM _sqlx_migrations").await, known);
}

#[tokio::test]
async fn a_newer_schema_is_used_as_long_as_it_says_so() {
    let database = Database::migrated().await;
    let mut connection = database.look().await;
    let known = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap();
    run(&mut connection, "INSERT INTO _sqlx_migrations VALUES (99, 'later', now(), true, '\\x00', 0)".to_owned()).await;
    PostgresStore::open(database.options()).await.expect("what only adds is no hindrance").close().await;
    run(&mut connection, "UPDATE schema_compat SET oldest_supported = 99".to_owned()).await;
    let refused = PostgresStore::open(database.options()).await.err();
    assert!(matches!(refused, Some(StoreError::NewerSchema { found: 99, known: k }) if k == known), "{refused:?}");
}

/// This release's migrations, and after them those of a later one.
async fn of_a_later_release(later: &[(&str, &str)]) -> Migrator {
    let dir = tempfile::tempdir().unwrap();
    let own = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations/postgres");
    for entry in std::fs::read_dir(own).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    for (name, sql) in later {
        std::fs::write(dir.path().join(name), sql).unwrap();
    }
    let mut migrations = Migrator::new(dir.path()).await.unwrap();
    migrations.set_locking(false).set_ignore_missing(true);
    migrations
}

/// Two releases of different schemas beside each other: the later one expands while the older one works, both serve one conversation in turns, and
/// only when the older one has gone does a third contract.
#[tokio::test]
async fn r6_hosts_of_two_releases_work_side_by_side_until_one_contracts() {
    const EXPAND: (&str, &str) = (
        "9001_expand.sql",
        "ALTER TABLE turns ADD COLUMN note text; ALTER TABLE turn_markers ADD COLUMN lane_hint int NOT NULL DEFAULT 0;
         CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.note := 'later'; RETURN NEW; END $$;
         CREATE TRIGGER noted BEFORE INSERT ON turns FOR EACH ROW EXECUTE FUNCTION noted();",
    );
    const CONTRACT: (&str, &str) = (
        "9002_contract.sql",
        "DROP TRIGGER noted ON turns; ALTER TABLE turn_markers DROP COLUMN lane_hint; UPDATE schema_compat SET oldest_supported = 9001;",
    );
    let world = world().await;
    let options = home(&world).database.options();
    let before = world.submit_and_start(world.message("c")).await;
    let behind = world.submit(world.message("c")).await;
    let expanded = of_a_later_release(&[EXPAND]).await;
    let later = PostgresStore::open_with(options.clone(), &expanded, false).await.unwrap();
    let theirs = ReplicaId::new();
    later.register_replica(theirs, world.now(), 1_000_000).await.unwrap();
    // What the older one had begun it ends, and the later one takes what was behind it.
    world.complete(&before, Some(b"of the older")).await;
    let request = crate::store::ClaimRequest { holder: theirs, ..world.claim_request(5) };
    let claimed = match later.write(vec![crate::store::Write::Claim(request)], world.now()).await.unwrap().pop() {
        Some(crate::store::Written::Claim(mut claimed)) => claimed.pop().expect("it is ready"),
        other => panic!("{other:?}"),
    };
    assert_eq!(claimed.lease.turn, behind);
    assert_eq!(claimed.head.as_ref().unwrap().snapshot.as_ref().unwrap().body.as_deref(), Some(&b"of the older"[..]));
    let mut commit = world.commit(&claimed, crate::store::conformance::replied("done"));
    commit.snapshot = Some(world.stage(&claimed, b"of the later"));
    let ended = later.write(vec![crate::store::Write::Commit(Box::new(commit))], world.now()).await.unwrap().pop();
    assert!(matches!(ended, Some(crate::store::Written::Commit(CommitResult::Won(_)))), "{ended:?}");
    // And back: the older one goes on from the later one's state; one that starts anew is let in, too.
    let next = world.submit_and_start(world.message("c")).await;
    assert_eq!(next.head.as_ref().unwrap().snapshot.as_ref().unwrap().body.as_deref(), Some(&b"of the later"[..]));
    world.complete(&next, None).await;
    PostgresStore::open(options.clone()).await.expect("going back is possible").close().await;
    check(&world).await;
    later.close().await;

    let contracted = of_a_later_release(&[EXPAND, CONTRACT]).await;
    let last = PostgresStore::open_with(options.clone(), &contracted, false).await.unwrap();
    assert!(last.turn(&org("acme"), behind).await.unwrap().is_some());
    last.close().await;
    let refused = PostgresStore::open(options.clone()).await.err();
    assert!(matches!(refused, Some(StoreError::NewerSchema { found: 9001, .. })), "{refused:?}");
    PostgresStore::open_with(options, &expanded, false).await.expect("the release between still works").close().await;
}
