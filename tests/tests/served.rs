//! The edge of a whole process: TLS from its configuration, and what its log says of a turn.

use std::path::Path;
use std::process::Stdio;

use reqwest::StatusCode;
use serde_json::{Value, json};
use turnhouse_tests::program::{self, command, run, run_with};
use turnhouse_tests::{Client, Program};

/// A self-signed certificate for localhost and its key; the certificate in PEM, and a configuration that names both.
fn certificate(dir: &Path) -> String {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    std::fs::write(dir.join("cert.pem"), made.cert.pem()).expect("it is written");
    std::fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).expect("it is written");
    let config = format!("[tls]\ncertificate = {:?}\nkey = {:?}\n", dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(dir.join("turnhouse.toml"), config).expect("it is written");
    made.cert.pem()
}

#[tokio::test]
async fn with_a_certificate_a_host_serves_https_and_with_a_bad_one_it_does_not_start() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data = dir.path().join("data");
    let pem = certificate(dir.path());
    let key = program::member(&data, "ann", "admin");
    let config = dir.path().join("turnhouse.toml");
    let arguments =
        ["serve", "--json", "--listen", "127.0.0.1:0", "--data-dir", data.to_str().expect("a path"), "--config"];
    let serve = || {
        let mut serve = command(&arguments);
        serve.arg(&config);
        serve
    };
    let mut host = Program::spawn(&mut serve());
    let ready = host.ready().expect("it starts");
    let address = ready["url"].as_str().and_then(|url| url.strip_prefix("https://")).expect("https").to_owned();
    let address: std::net::SocketAddr = address.parse().expect("an address");
    let root = reqwest::Certificate::from_pem(pem.as_bytes()).expect("PEM");
    let http = reqwest::Client::builder().no_proxy().tls_certs_only([root]).resolve("localhost", address);
    let http = http.build().expect("a client");
    let url = format!("https://localhost:{}/v1/agents", address.port());
    let answer = http.get(&url).bearer_auth(&key).send().await.expect("an answer");
    assert_eq!((answer.status(), answer.version()), (StatusCode::OK, reqwest::Version::HTTP_2));
    assert!(answer.headers().contains_key("strict-transport-security"));
    assert!(host.terminate().success());

    std::fs::write(dir.path().join("key.pem"), "no key").expect("it is written");
    let refused = run_with(&mut serve(), b"");
    assert_eq!(refused.code, 1, "{refused:?}");
    for says in ["tls.key", "key.pem", "no private key", "help:"] {
        assert!(refused.stderr.contains(says), "{says:?} is not in {refused:?}");
    }
}

/// O6, and whose each line is: a log at its most talkative, but for what workers write into it themselves.
#[tokio::test]
async fn o6_a_log_says_whose_a_turn_is_and_nothing_that_was_said() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (data, log) = (dir.path().join("data"), dir.path().join("log"));
    let key = program::member(&data, "ann", "admin");
    let mut serve = command(&["serve", "--json", "--log-format", "json", "--listen", "127.0.0.1:0", "--data-dir"]);
    serve.arg(&data).env("TURNHOUSE_LOG", "debug,turnhouse=trace,turnhouse::guest=off");
    serve.stderr(Stdio::from(std::fs::File::create(&log).expect("a file")));
    let mut host = Program::spawn(&mut serve);
    let url = host.ready().expect("it starts")["url"].as_str().expect("its url").to_owned();
    let ann = Client::new(&url, &key);
    ann.deploy_as("echo", "echo", json!({ "environment": { "SECRET": "nightingale" } })).await;
    ann.deploy("trap").await;
    let said = ann.say("echo", "c-1", "the words of a client").await;
    assert_eq!(said.completed().await, "the words of a client");
    let trapped = ann.say("trap", "c-2", "the words of a client").await;
    assert_eq!(trapped.failed().await, "worker_trapped");
    // Refusals are logged, too.
    assert_eq!(
        ann.submit("echo", "c-1", json!({ "message": { "text": 7, "the words": 1 } })).await.0,
        StatusCode::BAD_REQUEST
    );
    let stranger = Client::new(&url, &key.replace("th_", "th_x"));
    assert_eq!(stranger.get("/v1/agents?user=the+words").await.0, StatusCode::UNAUTHORIZED);
    assert!(host.terminate().success());

    let log = std::fs::read_to_string(&log).expect("the log");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    for (turn, agent, conversation, message) in
        [(&said, "echo", "c-1", "a turn has its reply"), (&trapped, "trap", "c-2", "a turn failed")]
    {
        let of_turn = |line: &&Value| line["message"] == message && line["span"]["turn"] == turn.id;
        let line = lines.iter().find(of_turn).unwrap_or_else(|| panic!("no line of {}: {log}", turn.id));
        let span = &line["span"];
        assert_eq!(
            (&span["org"], &span["agent"], &span["conversation"]),
            (&json!("acme"), &json!(agent), &json!(conversation))
        );
    }
    assert!(lines.iter().any(|line| line["message"] == "request refused" && line["code"] == "unauthenticated"));
    for content in ["the words", "the+words", "nightingale", &key, &key[3..]] {
        let leaks: Vec<&str> = log.lines().filter(|line| line.contains(content)).collect();
        assert!(leaks.is_empty(), "{content:?} is in the log: {leaks:?}");
    }
    let id = run(&["turns", "show", &said.id, "--url", "http://127.0.0.1:1", "--api-key", &key]);
    assert!(id.code == 1 && !id.stderr.contains(&key), "{id:?}");
}
