//! Between a host and its server: sessions, poolers, what is said when something is in the way, and a server that goes away and comes back.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::either::Either;

use super::*;

#[tokio::test]
async fn every_session_has_its_settings() {
    let database = Database::migrated().await;
    let store = PostgresStore::open(database.options()).await.unwrap();
    assert_eq!(store.route, Route::Direct);
    let pooled =
        PostgresOptions { url: with_parameter(&url_of(&database.name), "pgbouncer=true"), ..database.options() };
    let pooled = PostgresStore::open(pooled).await.unwrap();
    assert_eq!(pooled.route, Route::Pooled);
    for store in [store, pooled] {
        for (name, value) in SETTINGS {
            let row = store.one_hostwide(store.query("SELECT current_setting($1)").bind(name)).await.unwrap();
            assert_eq!(row.get::<String, _>(0), value, "{name}, {:?}", store.route);
        }
        let named = store.one_hostwide(store.query("SELECT count(*) FROM pg_prepared_statements")).await.unwrap();
        assert_eq!(named.get::<i64, _>(0) == 0, store.route == Route::Pooled, "no statement outlives its transaction");
        store.close().await;
    }
}

#[test]
fn a_poolers_parameter_is_taken_out() {
    for (url, without, pooled) in [
        ("postgres://a@b/c", "postgres://a@b/c", false),
        ("postgres://a@b/c?pgbouncer=true", "postgres://a@b/c", true),
        ("postgres://a@b/c?sslmode=require&pgbouncer=1&host=/x", "postgres://a@b/c?sslmode=require&host=/x", true),
        ("postgres://a@b/c?pgbouncer=false", "postgres://a@b/c", false),
    ] {
        assert_eq!(without_pooler(url), (without.to_owned(), pooled));
    }
}

#[tokio::test]
async fn what_is_in_the_way_is_said_and_no_password_with_it() {
    let place = url_of("no_such_database");
    for (url, says) in [
        (place.as_str(), "there is no such database"),
        ("postgres://ann:s3cret@127.0.0.1:1/turnhouse", "cannot connect to PostgreSQL at 127.0.0.1:1/turnhouse"),
        ("postgres://ann:s3cret@[/turnhouse", "cannot be read"),
        ("ann:s3cret", "cannot be read"),
    ] {
        let options = PostgresOptions::new(url);
        assert!(!format!("{options:?}").contains("s3cret"));
        let Err(StoreError::Unavailable(why)) = PostgresStore::open(options).await else { panic!("opened {url}") };
        assert!(why.contains(says), "{url}: {why}");
        assert!(why.contains("; "), "{url}: {why} advises nothing");
        assert!(!why.contains("s3cret"), "{why}");
    }
}

#[tokio::test]
async fn r4_a_restarted_server_is_found_again() {
    let world = world().await;
    let claimed = world.submit_and_start(world.message("c")).await;
    let home = home(&world);
    // Two of the pool's connections and the journal's.
    let (one, other) = tokio::join!(home.store.ping(), home.store.ping());
    one.and(other).unwrap();
    let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";
    home.damage(cut).await;
    // Whatever was asked first may fail, and no other: neither the pool's next connection nor the journal's.
    let mut failures = Vec::new();
    for _ in 0..6 {
        failures.extend(home.store.ping().await.err());
    }
    let nothing = vec![Write::Claim(world.claim_request(0))];
    failures.extend(home.store.write(nothing, world.now()).await.err());
    assert!(failures.len() <= 1, "{failures:?}");
    assert!(failures.iter().all(|error| matches!(error, StoreError::Unavailable(_))), "{failures:?}");
    world.complete(&claimed, None).await;
    check(&world).await;
}

/// A way to the server that can be closed: who connects there then is refused. And it can be hushed: who is connected then hears nothing any more, not even
/// that the connection is over.
async fn passage(listen: std::net::SocketAddr, hush: Arc<tokio::sync::Notify>) -> tokio::task::JoinHandle<()> {
    let listener = tokio::net::TcpListener::bind(listen).await.unwrap();
    let to = PgConnectOptions::from_str(&server()).unwrap();
    tokio::spawn(async move {
        let mut open = tokio::task::JoinSet::new();
        while let Ok((mut near, _)) = listener.accept().await {
            let (to, hush) = (to.clone(), hush.clone());
            open.spawn(async move {
                let copied = async { tokio::io::copy_bidirectional(&mut near, &mut far_end(&to).await).await };
                tokio::pin!(copied);
                tokio::select! {
                    _ = &mut copied => {}
                    () = hush.notified() => std::future::pending().await,
                }
            });
        }
    })
}

/// A connection to the server itself.
async fn far_end(to: &PgConnectOptions) -> Either<tokio::net::UnixStream, tokio::net::TcpStream> {
    match to.get_socket() {
        Some(dir) => {
            let socket = dir.join(format!(".s.PGSQL.{}", to.get_port()));
            Either::Left(tokio::net::UnixStream::connect(socket).await.unwrap())
        }
        None => Either::Right(tokio::net::TcpStream::connect((to.get_host(), to.get_port())).await.unwrap()),
    }
}

fn url_through(passage: std::net::SocketAddr, database: &Database) -> String {
    let server = server();
    let (_, address) = server.split_once("://").unwrap();
    let who = address.split_once('@').map_or("postgres", |(who, _)| who);
    format!("postgres://{who}@{passage}/{}", database.name)
}

/// What a server says comes through for so long, and then no more, as when a network has just failed.
struct Answers {
    left: AtomicUsize,
    /// One was withheld.
    held: tokio::sync::Notify,
}

/// A way to the server that counts answers. A server that waits for its client says what it has to say in one piece.
async fn counting_passage(answers: Arc<Answers>) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, to) = (listener.local_addr().unwrap(), PgConnectOptions::from_str(&server()).unwrap());
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let (to, answers) = (to.clone(), answers.clone());
            tokio::spawn(async move {
                let (mut from_near, mut to_near) = near.split();
                let (mut from_far, mut to_far) = tokio::io::split(far_end(&to).await);
                let back = async move {
                    let mut bytes = vec![0; 1 << 20];
                    loop {
                        let read = from_far.read(&mut bytes).await?;
                        let less = |left: usize| left.checked_sub(1);
                        if answers.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_err() {
                            answers.held.notify_one();
                            std::future::pending::<()>().await;
                        }
                        to_near.write_all(&bytes[..read]).await?;
                        if read == 0 {
                            return std::io::Result::Ok(());
                        }
                    }
                };
                tokio::select! {
                    _ = tokio::io::copy(&mut from_near, &mut to_far) => {}
                    _ = back => {}
                }
            });
        }
    });
    address
}

/// A host behind a pooler that goes silent, at whatever moment of a batch, is in no other host's way: it holds no lock while it is waited for.
#[tokio::test]
async fn r2_a_batch_behind_a_pooler_holds_no_lock_over_the_network() {
    let world = world().await;
    let database = &home(&world).database;
    let mut look = database.look().await;
    let (mut waits, mut written) = (0, false);
    for answers in 0.. {
        let passage = Arc::new(Answers { left: AtomicUsize::new(usize::MAX), held: tokio::sync::Notify::new() });
        let url = url_through(counting_passage(passage.clone()).await, database);
        let url = with_parameter(&url, "pgbouncer=true");
        let store = Arc::new(PostgresStore::open(PostgresOptions { url, ..database.options() }).await.unwrap());
        store.write(vec![Write::Claim(world.claim_request(0))], world.now()).await.unwrap();
        passage.left.store(answers, Ordering::Relaxed);
        let message = vec![Write::Accept(Box::new(world.message(&format!("c-{answers}"))))];
        let batch = store.write(message, world.now());
        tokio::pin!(batch);
        tokio::select! {
            done = &mut batch => {
                done.unwrap();
                written = true;
            }
            () = passage.held.notified() => {
                let idle = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'";
                waits += count(&mut look, idle).await;
                assert_eq!(count(&mut look, &format!("{idle} AND backend_xid IS NOT NULL")).await, 0, "after {answers} answers");
            }
        }
        if written {
            break;
        }
    }
    // It was begun, its values were prepared and laid down: three answers that it might have waited for, and the last.
    assert_eq!(waits, 3, "in how many places a transaction waited for its host");
}

#[tokio::test]
async fn r5_a_listener_whose_connection_went_silent_connects_again() {
    let database = Database::migrated().await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let hush = Arc::new(tokio::sync::Notify::new());
    let open = passage(free, hush.clone()).await;
    let (heard, mut hints) = tokio::sync::broadcast::channel(64);
    let listen = PgConnectOptions::from_str(&url_through(free, &database)).unwrap();
    let listening = tokio::spawn(hints::hear(listen, heard, "me".to_owned(), Duration::from_millis(300)));
    let mut connection = database.look().await;
    let mut told = async |hints: &mut tokio::sync::broadcast::Receiver<crate::store::Hint>| {
        for _ in 0..100 {
            run(&mut connection, format!("NOTIFY {}, 'you r '", hints::CHANNEL)).await;
            if tokio::time::timeout(Duration::from_millis(100), hints.recv()).await.is_ok() {
                return true;
            }
        }
        false
    };
    assert!(told(&mut hints).await, "it listens");
    hush.notify_waiters();
    // What was on its way.
    while tokio::time::timeout(Duration::from_millis(200), hints.recv()).await.is_ok() {}
    assert!(told(&mut hints).await, "it listens again, though nobody told it that it was cut off");
    listening.abort();
    open.abort();
    drop(connection);
}

#[tokio::test]
async fn r4_the_journal_waits_for_a_server_that_comes_back() {
    let database = Database::migrated().await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let passage = || passage(free, Arc::default());
    let open = passage().await;
    let url = url_through(free, &database);
    let store = PostgresStore::open(PostgresOptions { url, ..database.options() }).await.unwrap();
    let asked = || store.rows_for_journal(store.query("SELECT 1"), None);
    asked().await.unwrap();
    open.abort();
    assert!(open.await.is_err_and(|ended| ended.is_cancelled()));
    // What has been sent over the old connection, if anything has, has had no answer.
    let twice = async { (asked().await, asked().await) };
    let back = tokio::time::sleep(Duration::from_millis(700));
    let ((_, second), open) = tokio::join!(twice, back.then(|()| passage()));
    second.expect("it was not sent before there was somebody to send it to");
    open.abort();
    let began = Instant::now();
    let _ = asked().await;
    assert!(asked().await.is_err(), "not for ever");
    assert!(began.elapsed() < ACQUIRE_TIMEOUT * 2, "{:?}", began.elapsed());
    let began = Instant::now();
    assert!(asked().await.is_err());
    assert!(began.elapsed() < ACQUIRE_TIMEOUT / 2, "it is known to be away: {:?}", began.elapsed());
}
