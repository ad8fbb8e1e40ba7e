//! A host that serves: how it ends, what it survives, what it writes into its log.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::Signal;
use serde_json::{Value, json};
use turnhouse_tests::program::{self, command, run, run_with};
use turnhouse_tests::{Client, PATIENCE, Program, Tables};

use super::*;

/// A host of the real program with `slow_reply` deployed, and a member.
async fn with_slow_reply(data_dir: &Path, settings: &[(&str, &str)]) -> (Program, Client) {
    let key = program::member(data_dir, "ann", "admin");
    let (host, url) = serve(data_dir, settings);
    let ann = Client::new(&url, &key);
    ann.deploy("slow_reply").await;
    (host, ann)
}

fn serve(data_dir: &Path, settings: &[(&str, &str)]) -> (Program, String) {
    let mut host = Program::serve(data_dir, "127.0.0.1:0", settings);
    let url = host.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
    (host, url)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r6_sigterm_lets_a_turn_finish_or_gives_it_back_within_the_drain() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let (host, ann) = with_slow_reply(&data_dir, &[("TURNHOUSE_LIMITS__DRAIN_TIMEOUT_MS", "5000")]).await;
    let (short, long) = (ann.say("slow_reply", "c-1", "800").await, ann.say("slow_reply", "c-2", "9000").await);
    let behind = ann.say("slow_reply", "c-2", "1").await;
    short.reaches("running").await;
    long.reaches("running").await;
    let began = Instant::now();
    let ended = tokio::task::spawn_blocking(move || host.terminate()).await.expect("no panic");
    assert!(ended.success(), "{ended}");
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
    let tables = Tables::open(&data_dir);
    let short_id = short.id.replace('-', "");
    let finished =
        format!("SELECT count(*) FROM turns WHERE outcome = 'completed' AND hex(turn_id) = upper('{short_id}')");
    assert_eq!(tables.count(&finished), 1, "what was nearly done is done");
    assert_eq!(tables.count("SELECT count(*) FROM turn_markers"), 2);
    assert_eq!(tables.count("SELECT max(attempt) FROM turn_markers"), 0, "no attempt is spent");
    assert_eq!(tables.count("SELECT count(*) FROM turn_markers WHERE state = 'running'"), 0);
    assert_eq!(tables.count("SELECT count(*) FROM replicas WHERE expires_at > 0"), 0, "it has signed off");
    drop(tables);

    let (host, url) = serve(&data_dir, &[]);
    let again = Client::new(&url, &ann.key);
    assert_eq!(again.turn(&long.id).completed().await, "9000");
    assert_eq!(again.turn(&long.id).get().await["attempt"], 1);
    assert_eq!(again.turn(&behind.id).completed().await, "1");
    assert!(tokio::task::spawn_blocking(move || host.terminate()).await.expect("no panic").success());
    assert_eq!(Tables::open(&data_dir).faults(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_at_once_and_loses_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let (mut host, ann) = with_slow_reply(&data_dir, &[]).await;
    let turn = ann.say("slow_reply", "c-1", "3000").await;
    turn.reaches("running").await;
    host.signal(Signal::TERM);
    turnhouse_tests::eventually("it drains", async || ann.get("/readyz").await.0 == StatusCode::SERVICE_UNAVAILABLE)
        .await;
    host.signal(Signal::TERM);
    let ended = tokio::task::spawn_blocking(move || host.ends_within(PATIENCE)).await.expect("no panic");
    assert_eq!(ended.and_then(|status| status.code()), Some(1));
    let (host, url) = serve(&data_dir, &[]);
    assert_eq!(Client::new(&url, &ann.key).turn(&turn.id).completed().await, "3000");
    assert!(tokio::task::spawn_blocking(move || host.terminate()).await.expect("no panic").success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_keeps_its_version_over_its_attempts_also_when_its_agent_was_moved() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let (mut host, ann) = with_slow_reply(&data_dir, &[]).await;
    let turn = ann.say("slow_reply", "c-1", "3000").await;
    let behind = ann.say("slow_reply", "c-1", "hello").await;
    turn.reaches("running").await;
    let (status, version) = ann.upload("slow_reply", turnhouse_workers::bytes("echo")).await;
    assert_eq!((status, &version["version"]), (StatusCode::CREATED, &json!(2)), "{version}");
    ann.set_agent("slow_reply", "slow_reply", json!({ "version": 2 })).await;
    assert_eq!(turn.get().await["state"], "running");
    host.kill();

    let (host, url) = serve(&data_dir, &[]);
    let again = Client::new(&url, &ann.key);
    let turn = again.turn(&turn.id);
    assert_eq!(turn.completed().await, "3000");
    let ended = turn.get().await;
    assert_eq!((&ended["attempt"], &ended["version"]), (&json!(2), &json!(1)), "{ended}");
    let behind = again.turn(&behind.id);
    assert_eq!((behind.completed().await.as_str(), &behind.get().await["version"]), ("hello", &json!(2)));
    assert!(tokio::task::spawn_blocking(move || host.terminate()).await.expect("no panic").success());
}

#[cfg(debug_assertions)]
#[test]
fn t10_a_turn_that_takes_its_host_with_it_ends_after_its_attempts_and_the_conversation_goes_on() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let (host, ann) = runtime.block_on(with_slow_reply(&data_dir, &[]));
    assert!(host.terminate().success());
    let deadly = [("TURNHOUSE_TEST_KILL", "after_claim:1")];
    let (mut host, url) = serve(&data_dir, &deadly);
    let ann = Client::new(&url, &ann.key);
    let submit = |conversation: &str, body: Value| runtime.block_on(ann.submit("slow_reply", conversation, body));
    let _lost_answer =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| submit("c-1", json!({ "message": { "text": "1" } }))));
    assert!(host.ends_within(PATIENCE).is_some_and(|status| status.code().is_none()), "it was killed by its turn");
    for _ in 0..2 {
        // What is left is taken up as soon as the next host starts, and takes it along.
        let mut host = Program::serve(&data_dir, "127.0.0.1:0", &deadly);
        assert!(host.ends_within(PATIENCE).is_some_and(|status| status.code().is_none()));
    }
    let (host, url) = serve(&data_dir, &[]);
    let ann = Client::new(&url, &ann.key);
    runtime.block_on(async {
        let messages = ann.messages("slow_reply", "c-1").await;
        let poison = ann.turn(messages[0]["turn_id"].as_str().expect("its id"));
        let ended = poison.ended().await;
        assert_eq!(
            (&ended["failure"]["code"], &ended["attempt"]),
            (&json!("attempts_exhausted"), &json!(3)),
            "{ended}"
        );
        assert_eq!(ann.say("slow_reply", "c-1", "2").await.completed().await, "2");
    });
    assert!(host.terminate().success());
    assert_eq!(Tables::open(&data_dir).faults(), Vec::<String>::new());
}

#[test]
fn a_log_has_no_secret_and_no_message() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let key = program::member(&data_dir, "ann", "admin");
    let mut serve = command(&["serve", "--json", "--listen", "127.0.0.1:0", "--data-dir", text(&data_dir)]);
    let mut host =
        serve.env("TURNHOUSE_LOG", "debug").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let mut line = String::new();
    BufReader::new(host.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
    let url = serde_json::from_str::<Value>(&line).expect("JSON")["url"].as_str().expect("a url").to_owned();
    let mut stderr = host.stderr.take().expect("a pipe");
    let log = std::thread::spawn(move || {
        let mut log = String::new();
        stderr.read_to_string(&mut log).map(|_| log)
    });
    let with = |arguments: &[&str], stdin: &[u8]| {
        run_with(command(arguments).env("TURNHOUSE_URL", &url).env("TURNHOUSE_API_KEY", &key), stdin)
    };
    assert_eq!(with(&["deploy", &guest("echo")], b"").code, 0);
    assert_eq!(with(&["chat", "echo"], b"a word in confidence\n").code, 0);
    assert_eq!(run(&["agents", "list", "--url", &url, "--api-key", "th_a-guessed-secret"]).code, 1);
    let pid = rustix::process::Pid::from_child(&host);
    rustix::process::kill_process(pid, Signal::TERM).expect("it is there");
    assert!(host.wait().expect("it ends").success());
    let log = log.join().expect("no panic").expect("UTF-8");
    assert!(log.contains("request"), "the log does say something: {log}");
    for secret in [key.as_str(), "a-guessed-secret", "a word in confidence"] {
        assert!(!log.contains(secret), "{secret:?} is in the log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_messages_and_loses_none() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let (host, ann) = with_slow_reply(&data_dir, &[]).await;
    assert_eq!(ann.say("slow_reply", "c-0", "1").await.completed().await, "1");
    assert!(tokio::task::spawn_blocking(move || host.terminate()).await.expect("no panic").success());

    // No file may grow beyond some MiB: to the program, a disk that is full.
    let mut full = Command::new("sh");
    full.args(["-c", r#"trap "" XFSZ; ulimit -f 8192; exec "$0" "$@""#]).arg(program::path());
    full.args(["serve", "--json", "--listen", "127.0.0.1:0", "--data-dir", text(&data_dir)]);
    full.env("TURNHOUSE_METRICS_LISTEN", "127.0.0.1:0").env("TURNHOUSE_LOG", "off");
    full.env("TURNHOUSE_LIMITS__DRAIN_TIMEOUT_MS", "3500");
    let mut host = Program::spawn(&mut full);
    let url = host.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
    let full = Client::new(&url, &ann.key);
    let (mut accepted, mut refusal) = (Vec::new(), None);
    for n in 0..200 {
        let body = json!({ "message": { "text": format!("1 {}", "x".repeat(100_000)) } });
        let (status, answer) = full.submit("slow_reply", &format!("c-{n}"), body).await;
        match status {
            StatusCode::ACCEPTED => accepted.push(answer["turn_id"].as_str().expect("its id").to_owned()),
            _ => {
                refusal = Some((status, answer));
                break;
            }
        }
    }
    let (status, problem) = refusal.expect("the disk is full at last");
    assert_eq!((status, &problem["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("store_unavailable")), "{problem}");
    assert!(problem["detail"].as_str().expect("a detail").contains("Idempotency-Key"), "{problem}");
    assert!(!accepted.is_empty());
    // What is there can be read.
    assert_eq!(full.turn(&accepted[0]).get().await["id"], accepted[0].as_str());
    host.signal(Signal::TERM);
    tokio::task::spawn_blocking(move || host.ends_within(PATIENCE)).await.expect("no panic");

    let (host, url) = serve(&data_dir, &[]);
    let again = Client::new(&url, &ann.key);
    for turn in &accepted {
        assert_eq!(again.turn(turn).completed().await.len(), 100_002);
    }
    assert!(tokio::task::spawn_blocking(move || host.terminate()).await.expect("no panic").success());
    let tables = Tables::open(&data_dir);
    assert_eq!(tables.faults(), Vec::<String>::new());
    assert_eq!(tables.count("SELECT count(*) FROM turns"), accepted.len() as i64 + 1, "nothing is half done");
}
