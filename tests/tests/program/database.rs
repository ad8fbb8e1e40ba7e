//! Commands on a data directory, beside a running host and without one; and the directories that are refused.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use turnhouse_tests::program::{self, command, run, run_with};
use turnhouse_tests::{Client, PATIENCE, Program, Tables};

use super::*;

#[test]
fn orgs_and_keys_are_made_on_the_database_beside_a_running_host() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let on = |arguments: &[&str]| run(&[arguments, &["--data-dir", text(&data_dir)]].concat());
    assert_eq!(on(&["orgs", "create", "acme", "--json"]).json()["created"], true);
    let again = on(&["orgs", "create", "acme", "--owner", "eve", "--json"]).json();
    assert_eq!((&again["created"], &again["owner_set"]), (&json!(false), &json!(false)));
    assert_eq!((&again["default_agent"], &again["default_agent_created"]), (&json!("default"), &json!(null)));
    assert_eq!(on(&["orgs", "list", "--json"]).json()["items"][0]["owner"], "owner", "it stays whose it is");
    failed(&on(&["keys", "create", "--org", "nobody", "--user", "ann"]), 1, &["nobody", "orgs create"]);
    let mut host = Program::serve(&data_dir, "127.0.0.1:0", &[]);
    let url = host.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
    let made = on(&["keys", "create", "--org", "acme", "--user", "ann", "--scopes", "admin", "--json"]).json();
    let key = made["api_key"].as_str().expect("a key");
    let list = || run(&["agents", "list", "--json", "--url", &url, "--api-key", key]);
    // A new org can be talked to: it has a default agent, once.
    let agents = list().json();
    assert_eq!((&agents["items"][0]["id"], &agents["items"][0]["default"]), (&json!("default"), &json!(true)));
    assert_eq!(agents["items"].as_array().map(Vec::len), Some(1));
    let listed = on(&["keys", "list", "--org", "acme", "--json"]);
    assert_eq!(listed.json()["items"][0]["id"], made["id"]);
    assert!(!listed.stdout.contains(key), "a secret is shown once");
    assert_eq!(on(&["orgs", "list", "--json"]).json()["items"][0]["id"], "acme");
    assert_eq!(
        (&listed.json()["items"][0]["state"], &listed.json()["items"][0]["successor"]),
        (&json!("live"), &Value::Null)
    );
    // Limits are the running host's from the next message on.
    failed(&on(&["orgs", "limits", "nobody"]), 1, &["nobody", "orgs list"]);
    failed(&on(&["orgs", "limits", "acme", "--running-max", "0"]), 2, &["from 1"]);
    failed(&on(&["orgs", "limits", "acme", "--queue-max", "off"]), 2, &["default"]);
    let limits = on(&["orgs", "limits", "acme", "--queue-max", "0", "--submits-per-second", "2.5", "--json"]).json();
    assert_eq!((&limits["own"]["queue_max"], &limits["limits"]["submit_burst"]), (&json!(0), &json!(3)));
    let mut chat = command(&["chat", "--url", &url, "--api-key", key]);
    failed(&run_with(&mut chat, b"hi\n"), 1, &["org_queue_full"]);
    let table = on(&["orgs", "limits", "acme", "--queue-max", "default"]).stdout;
    let shows =
        |row: &[&str]| table.lines().any(|line| line.split_whitespace().take(row.len()).eq(row.iter().copied()));
    assert!(shows(&["queue_max", "20000", "every", "org"]), "{table}");
    assert!(shows(&["submits_per_second", "2.5", "this", "org"]), "{table}");
    assert!(on(&["orgs", "audit", "acme"]).stdout.contains("org.limits"));
    on(&["orgs", "limits", "acme", "--submits-per-second", "default"]);
    // Rotated: the new one works at once, the old one for as long as it was given.
    let id = made["id"].as_str().expect("an id");
    let rotate = |key: &str| on(&["keys", "rotate", "--org", "acme", key, "--overlap", "2d", "--json"]);
    let next = rotate(id).json();
    assert_eq!((&next["user"], &next["scopes"], &next["state"]), (&made["user"], &made["scopes"], &json!("live")));
    assert_eq!((&next["replaces"]["id"], &next["replaces"]["state"]), (&made["id"], &json!("rotated")));
    let (next_id, next_key) = (next["id"].as_str().expect("an id"), next["api_key"].as_str().expect("a key"));
    let ran = run(&["agents", "list", "--json", "--url", &url, "--api-key", next_key]);
    assert!(ran.code == 0 && !ran.stderr.contains("ends at"), "{ran:?}");
    // Whoever uses the old one is told, once the host has looked again.
    let until = Instant::now() + PATIENCE;
    while !list().stderr.contains("ends at") {
        assert!(Instant::now() < until, "nobody is told that the old key ends");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(list().code, 0);
    failed(&rotate(id), 1, &["rotated already", next_id]);
    failed(&rotate("0000000000000000"), 1, &["0000000000000000", "keys list"]);
    let short = on(&["keys", "create", "--org", "acme", "--user", "ann", "--expires", "3d", "--json"]).json();
    let short_id = short["id"].as_str().expect("an id");
    let listed = on(&["keys", "list", "--org", "acme"]);
    assert!(listed.stdout.contains("expiring") && listed.stdout.contains("LAST USED"), "{listed:?}");
    assert!(listed.stderr.contains(&format!("keys rotate --org acme {short_id}")), "{listed:?}");
    assert!(!listed.stderr.contains(id), "its successor is there: {listed:?}");
    assert_eq!(on(&["keys", "revoke", "--org", "acme", short_id]).code, 0);
    failed(&rotate(short_id), 1, &["revoked", "keys create"]);
    assert_eq!(on(&["keys", "revoke", "--org", "acme", id]).code, 0);
    failed(&on(&["keys", "revoke", "--org", "acme", "0000000000000000"]), 1, &["0000000000000000"]);
    // The host looks again within moments.
    let until = Instant::now() + PATIENCE;
    while list().code == 0 {
        assert!(Instant::now() < until, "a revoked key still works");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(host.terminate().success());
}

#[test]
fn o6_no_key_and_no_ticket_is_in_any_log() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (data_dir, log) = (dir.path().join("data"), dir.path().join("log"));
    let key = program::member(&data_dir, "ann", "admin");
    let mut serve = command(&["serve", "--json", "--listen", "127.0.0.1:0", "--data-dir", text(&data_dir)]);
    serve.env("TURNHOUSE_LOG", "trace").stderr(std::fs::File::create(&log).expect("a file"));
    let mut host = Program::spawn(&mut serve);
    let url = host.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let tickets = runtime.block_on(async {
        let ann = Client::new(&url, &key);
        ann.deploy("echo").await;
        let turn = ann.say("echo", "c-1", "hi").await;
        turn.completed().await;
        let mut tickets = Vec::new();
        let http1 = reqwest::Client::builder().http1_only().build().expect("a client");
        let http2 = reqwest::Client::builder().http2_prior_knowledge().build().expect("a client");
        for http in [http1, http2] {
            let (ticket, path) = turn.ticket().await;
            for path in [path.clone(), format!("{path}0"), format!("/v1/agents?ticket={ticket}")] {
                let response = http.get(format!("{url}{path}")).send().await.expect("an answer");
                response.text().await.expect("a whole answer");
            }
            let response = http.get(format!("{url}/v1/agents")).bearer_auth(&key).send().await.expect("an answer");
            assert!(response.status().is_success());
            tickets.push(ticket);
        }
        tickets
    });
    assert!(host.terminate().success());
    let log = std::fs::read_to_string(&log).expect("the log");
    assert!(log.contains("\"method\":\"GET\"") && log.contains("/v1/turns/{turn}/events"), "requests are in it");
    for secret in tickets.iter().map(|ticket| ticket.rsplit_once('.').expect("a MAC").1).chain([&key[3..]]) {
        let line = log.lines().find(|line| line.contains(secret));
        assert_eq!(line, None);
    }
}

#[test]
fn status_and_doctor_say_how_it_stands_beside_a_running_host_and_without_one() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let on = |command: &str| run(&[command, "--json", "--data-dir", text(&data_dir)]);
    let mut host = Program::serve(&data_dir, "127.0.0.1:0", &[]);
    host.ready().expect("it is ready");
    let status = on("status").json();
    assert_eq!(status["store"], "sqlite");
    assert_eq!((&status["running"], &status["ready"], &status["lag_ms"]), (&json!(0), &json!(0), &json!(null)));
    let replicas = status["replicas"].as_array().expect("a list");
    assert_eq!((replicas.len(), &replicas[0]["state"]), (1, &json!("live")), "{status}");
    let told = run(&["status", "--data-dir", text(&data_dir)]);
    assert!(told.stdout.contains("0 running, 0 ready") && told.stdout.contains("LEASE"), "{told:?}");
    let healthy = |ran: turnhouse_tests::program::Ran| {
        let found = ran.json();
        assert_eq!(found["healthy"], true, "{found}");
        let findings = found["findings"].as_array().expect("a list").clone();
        let what: Vec<_> = findings.iter().map(|finding| finding["what"].as_str().expect("a word")).collect();
        assert!(["machine", "disk", "schema", "journal"].iter().all(|word| what.contains(word)), "{what:?}");
    };
    healthy(on("doctor"));
    assert!(host.terminate().success());
    assert_eq!(on("status").json()["replicas"][0]["state"], "ended");
    healthy(on("doctor"));
    std::fs::write(data_dir.join("turnhouse.db"), b"no database at all, however one looks at it").expect("damage");
    let ran = on("doctor");
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stdout.contains("\"bad\"") && ran.stderr.contains("bad"), "{ran:?}");
}

#[test]
fn a_data_directory_that_another_host_uses_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let mut host = Program::serve(&data_dir, "127.0.0.1:0", &[]);
    let url = host.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
    let serve = || run(&["serve", "--listen", "127.0.0.1:0", "--data-dir", text(&data_dir)]);
    failed(&serve(), 1, &[text(&data_dir), "another data directory"]);
    // The first one is as well as before.
    assert_eq!(run(&["agents", "list", "--url", &url, "--api-key", "th_x"]).code, 1);
    // Another's address is said to be taken.
    let address = url.strip_prefix("http://").expect("its scheme");
    let elsewhere = dir.path().join("elsewhere");
    failed(&run(&["serve", "--listen", address, "--data-dir", text(&elsewhere)]), 1, &["--listen", address]);
    // What is killed leaves nothing that keeps the next one out.
    host.kill();
    let mut next = Program::serve(&data_dir, "127.0.0.1:0", &[]);
    assert!(next.ready().is_some());
    assert!(next.terminate().success());
}

#[test]
fn a_data_directory_that_cannot_be_written_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("file");
    std::fs::write(&file, "not a directory").expect("it is written");
    let serve = |data_dir: &Path| run(&["serve", "--listen", "127.0.0.1:0", "--data-dir", text(data_dir)]);
    failed(&serve(&file), 1, &[text(&file)]);
    failed(&serve(&file.join("below")), 1, &[text(&file)]);
    let read_only = dir.path().join("read-only");
    std::fs::create_dir(&read_only).expect("it is made");
    std::fs::set_permissions(&read_only, std::fs::Permissions::from_mode(0o500)).expect("its mode");
    // Who may write everywhere is not kept out by a mode; for them a file system has to say it.
    if std::fs::write(read_only.join("probe"), "").is_err() {
        failed(&serve(&read_only), 1, &[text(&read_only), "writable"]);
    }
    failed(&serve(Path::new("/proc/turnhouse")), 1, &["/proc/turnhouse", "writable"]);
    // A file that is no database.
    let garbage = dir.path().join("garbage");
    std::fs::create_dir(&garbage).expect("it is made");
    std::fs::write(garbage.join("turnhouse.db"), "this is no database, and long enough to be one".repeat(100))
        .expect("written");
    let ran = serve(&garbage);
    failed(&ran, 1, &["turnhouse.db"]);
    let kept = std::fs::read_to_string(garbage.join("turnhouse.db")).expect("it is there");
    assert!(kept.starts_with("this is no database"), "it is left as it was");
}

#[test]
fn a_database_of_a_newer_schema_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    program::member(&data_dir, "ann", "admin");
    Tables::open(&data_dir).to_damage().execute(
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (99, 'later', 1, x'00', 0)",
    );
    let serve = || run(&["serve", "--listen", "127.0.0.1:0", "--data-dir", text(&data_dir)]);
    failed(&serve(), 1, &["99", "newer"]);
    failed(&run(&["orgs", "list", "--data-dir", text(&data_dir)]), 1, &["99", "newer"]);
    let tables = Tables::open(&data_dir).to_damage();
    assert_eq!(tables.count("SELECT count(*) FROM orgs"), 1, "nothing is changed");
    tables.execute("DELETE FROM _sqlx_migrations WHERE version = 99");
    drop(tables);
    let mut host = Program::serve(&data_dir, "127.0.0.1:0", &[]);
    assert!(host.ready().is_some());
    assert!(host.terminate().success());
}

#[test]
fn an_org_is_deleted_from_the_command_line_and_its_neighbour_stays() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let on = |arguments: &[&str]| run(&[arguments, &["--data-dir", text(&data_dir)]].concat());
    for org in ["acme", "zeta"] {
        assert_eq!(on(&["orgs", "create", org]).code, 0);
        assert_eq!(on(&["keys", "create", "--org", org, "--user", "ann", "--scopes", "admin"]).code, 0);
    }
    failed(&on(&["orgs", "delete", "acme"]), 2, &["--yes"]);
    failed(&on(&["orgs", "delete", "nowhere", "--yes"]), 1, &["there is no org nowhere", "orgs list"]);
    // Without a host beside it the command does the hosts' work.
    assert_eq!(on(&["orgs", "delete", "acme", "--yes"]).code, 0);
    let left = on(&["orgs", "list", "--json"]).json();
    let left: Vec<_> = left["items"].as_array().expect("a list").iter().map(|org| &org["id"]).collect();
    assert_eq!(left, ["zeta"]);
    failed(&on(&["orgs", "delete", "acme", "--yes"]), 1, &["there is no org acme"]);
    failed(&on(&["keys", "list", "--org", "acme"]), 1, &["acme"]);
    assert_eq!(on(&["keys", "list", "--org", "zeta", "--json"]).json()["items"].as_array().map(Vec::len), Some(1));
}
