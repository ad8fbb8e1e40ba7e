//! The program from outside: its commands, exit codes and messages, its signals, and the data directories that it does not take.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use rustix::process::Signal;
use serde_json::{Value, json};
use turnhouse_tests::program::{self, Ran, command, run, run_with};
use turnhouse_tests::{Client, PATIENCE, Program, Tables};

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of UTF-8")
}

fn guest(name: &str) -> String {
    text(&turnhouse_workers::path(name)).to_owned()
}

#[track_caller]
fn failed(ran: &Ran, code: i32, says: &[&str]) {
    assert_eq!(ran.code, code, "{ran:?}");
    for says in says {
        assert!(ran.stderr.contains(says), "{says:?} is not in {ran:?}");
    }
    assert!(!ran.stderr.contains("panicked") && !ran.stderr.contains("backtrace"), "{ran:?}");
}

#[test]
fn run_takes_a_program_that_plain_rustc_built() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (source, wasm) = (dir.path().join("shout.rs"), dir.path().join("shout.wasm"));
    std::fs::write(
        &source,
        r#"fn main() {
            let mut message = String::new();
            std::io::Read::read_to_string(&mut std::io::stdin(), &mut message).unwrap();
            if message == "fail" { eprintln!("as asked"); std::process::exit(3); }
            print!("{}!", message.to_uppercase());
        }"#,
    )
    .expect("the source is written");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut compile = Command::new(rustc);
    compile.args(["--edition", "2024", "--target", "wasm32-wasip1", "-O", "-o"]).arg(&wasm).arg(&source);
    assert!(compile.status().expect("rustc runs").success());

    let ran = run(&["run", text(&wasm), "--message", "hello"]);
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "HELLO!"), "{ran:?}");
    let ran = run_with(&mut command(&["run", text(&wasm)]), b"from stdin");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "FROM STDIN!"), "{ran:?}");
    let ran = run(&["run", text(&wasm), "--message", "fail"]);
    failed(&ran, 1, &["worker_exit", "3", "as asked"]);
    let turn = run(&["run", "--json", text(&wasm), "--message", "hello"]).json();
    assert_eq!((&turn["state"], &turn["reply"]["text"]), (&json!("completed"), &json!("HELLO!")));
}

#[test]
fn run_has_the_limits_of_production_and_keeps_a_state() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state = dir.path().join("state");
    for n in ["1", "2", "3"] {
        let ran = run(&["run", &guest("snapshot_counter"), "--message", "more", "--state", text(&state)]);
        assert_eq!((ran.code, ran.stdout.trim()), (0, n), "{ran:?}");
    }
    assert_eq!(std::fs::read_to_string(&state).expect("the state"), "3");
    let ran = run(&["run", &guest("snapshot_then_trap"), "--message", "dirty", "--state", text(&state)]);
    failed(&ran, 1, &["worker_trapped"]);
    assert_eq!(std::fs::read_to_string(&state).expect("the state"), "3", "as it was");
    let mut quick = command(&["run", &guest("spin"), "--message", "go"]);
    quick.env("TURNHOUSE_LIMITS__CPU_TIMEOUT_MS", "200");
    failed(&run_with(&mut quick, b""), 1, &["cpu_timeout"]);
    failed(&run(&["run", &guest("no_reply"), "--message", "go"]), 1, &["no_reply"]);
}

#[test]
fn run_gives_a_worker_files_as_attachments_of_its_message() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (one, two) = (dir.path().join("one.txt"), dir.path().join("two.bin"));
    std::fs::write(&one, "a file of five words\n").expect("it is written");
    std::fs::write(&two, "x ".repeat(200_000)).expect("it is written");
    let wasm = guest("attachment");
    let ran = run(&["run", &wasm, "--message", "count", "--attachment", text(&one), "--attachment", text(&two)]);
    let expected =
        "one.txt: text/plain, 21 bytes, 5 words\ntwo.bin: application/octet-stream, 400000 bytes, 200000 words\n";
    assert_eq!((ran.code, ran.stdout.as_str()), (0, expected), "{ran:?}");
    let mut narrow = command(&["run", &wasm, "--message", "count", "--attachment", text(&one)]);
    narrow.env("TURNHOUSE_LIMITS__ATTACHMENT_BYTES_MAX", "20");
    failed(&run_with(&mut narrow, b""), 2, &["one.txt", "20 bytes", "attachment_bytes_max"]);
    let missing = dir.path().join("missing");
    failed(&run(&["run", &wasm, "--message", "x", "--attachment", text(&missing)]), 2, &["cannot read", "missing"]);
}

#[test]
fn run_gives_a_worker_a_directory_within_the_quota_of_production() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let files = dir.path().join("new/files");
    let wasm = guest("files");
    let in_it = |message: &str| run(&["run", &wasm, "--message", message, "--dir", text(&files)]);
    let ran = in_it("list\nwrite notes.txt one");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "[]\nok\n"), "{ran:?}");
    assert_eq!(std::fs::read_to_string(files.join("notes.txt")).expect("its file"), "one");
    std::fs::write(files.join("mine.txt"), "from outside").expect("a file");
    assert_eq!(in_it("list\nread mine.txt").stdout, "[mine.txt notes.txt]\nfrom outside\n");
    let mut narrow = command(&["run", &wasm, "--message", "append mine.txt !\nfill big 1", "--dir", text(&files)]);
    narrow.env("TURNHOUSE_LIMITS__PRIVATE_DIR_BYTES_MAX", "16");
    let ran = run_with(&mut narrow, b"");
    assert_eq!(ran.stdout, "ok\nerrno 19\n", "{ran:?}");
    let state = dir.path().join("state");
    let both = run(&["run", &wasm, "--message", "list", "--dir", text(&files), "--state", text(&state)]);
    failed(&both, 2, &["--dir", "--state"]);
    let no_directory = run(&["run", &wasm, "--message", "list", "--dir", text(&files.join("notes.txt"))]);
    failed(&no_directory, 2, &["notes.txt"]);
}

#[test]
fn a_command_that_is_used_wrongly_exits_with_2_and_says_how_to_use_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let wasm = guest("echo");
    for (arguments, says) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["run"], "WASM"),
        (&["run", "missing.wasm"], "missing.wasm"),
        (&["run", &wasm, "--message", ""], "empty"),
        (&["dev", "--listen", "0.0.0.0:0", &wasm], "loopback"),
        (&["dev", "missing.wasm"], "missing.wasm"),
        (&["turns", "show", "nonsense"], "nonsense"),
        (&["keys", "create", "--org", "../x", "--user", "ann"], "../x"),
        (&["keys", "create", "--org", "acme", "--user", "ann", "--scopes", "root"], "root"),
    ] {
        let mut command = command(arguments);
        failed(&run_with(command.current_dir(dir.path()), b""), 2, &[says]);
    }
    let mut wrong = command(&["serve", "--listen", "127.0.0.1:0", "--data-dir", text(&dir.path().join("data"))]);
    wrong.env("TURNHOUSE_LIMITS__HOST_RUNNING_MAX", "many");
    failed(&run_with(&mut wrong, b""), 2, &["HOST_RUNNING_MAX", "many"]);
    assert_eq!(run(&["--help"]).code, 0);
    assert!(run(&["--version"]).stdout.starts_with("turnhouse "));
    // Nobody is there.
    let ran = run(&["agents", "list", "--url", "http://127.0.0.1:1", "--api-key", "th_x"]);
    failed(&ran, 1, &["127.0.0.1:1"]);
}

#[test]
fn inspect_says_of_every_module_whether_this_host_would_run_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for name in turnhouse_workers::wat_names() {
        let file = dir.path().join(format!("{name}.wasm"));
        std::fs::write(&file, wat::parse_str(turnhouse_workers::wat(&name)).expect("it is wat"))
            .expect("it is written");
        let ran = run(&["inspect", "--json", text(&file)]);
        let shown: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{name}: {ran:?}"));
        match ran.code {
            0 => assert_eq!((&shown["accepted"], &shown["refusal"]), (&json!(true), &Value::Null), "{name}: {shown}"),
            1 => {
                assert_eq!(shown["accepted"], json!(false), "{name}: {shown}");
                let code = shown["refusal"]["code"].as_str().expect("a code");
                assert!(code.starts_with("module_"), "{name}: {shown}");
                failed(&ran, 1, &[code]);
            }
            _ => panic!("{name}: {ran:?}"),
        }
    }
    let ran = run(&["inspect", &guest("echo")]);
    assert!(ran.code == 0 && ran.stdout.contains("accepted"), "{ran:?}");
    let garbage = dir.path().join("garbage.wasm");
    std::fs::write(&garbage, b"\x7fELF").expect("it is written");
    failed(&run(&["inspect", text(&garbage)]), 1, &["module_invalid", "ELF"]);
}

#[test]
fn inspect_names_the_import_or_the_export_that_is_wrong() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for (name, says) in [
        ("unknown_import", &["module_import_unknown", "launch_missiles"][..]),
        ("unknown_import_module", &["module_import_unknown", "emscripten_notify_memory_growth"]),
        ("import_wrong_type", &["module_import_unknown", "abi_revision"]),
        ("no_start", &["module_not_command", "_start"]),
        ("start_not_a_function", &["module_not_command", "_start"]),
        ("start_wrong_type", &["module_not_command", "_start"]),
        ("no_memory", &["module_not_command", "memory"]),
        ("initialize_present", &["module_not_command", "_initialize"]),
    ] {
        let file = dir.path().join(format!("{name}.wasm"));
        std::fs::write(&file, wat::parse_str(turnhouse_workers::wat(name)).expect("it is wat")).expect("it is written");
        failed(&run(&["inspect", text(&file)]), 1, says);
    }
}

#[test]
fn dev_prints_one_line_when_it_is_ready_and_the_commands_work_on_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let data_dir = dir.path().join("data");
    let arguments = [
        "dev",
        "--json",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        text(&data_dir),
        &guest("echo"),
        &guest("slow_reply"),
    ];
    let mut host = Program::spawn(&mut command(&arguments));
    let line = host.ready().expect("a line of JSON");
    let (url, key) = (line["url"].as_str().expect("a url"), line["api_key"].as_str().expect("a key"));
    assert_eq!(line["org"], "dev");
    assert!(key.starts_with("th_"), "{line}");
    let with = |arguments: &[&str]| {
        let mut command = command(arguments);
        command.env("TURNHOUSE_URL", url).env("TURNHOUSE_API_KEY", key);
        command
    };
    let say = |arguments: &[&str], stdin: &str| run_with(&mut with(arguments), stdin.as_bytes());

    // The first module is the default agent.
    let ran = say(&["chat"], "hello\n");
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "hello\n"), "{ran:?}");
    let ran = say(&["chat", "slow_reply", "--conversation", "c-1", "--json"], "1\n");
    let turn = ran.json();
    assert_eq!((&turn["state"], &turn["reply"]["text"]), (&json!("completed"), &json!("1")));
    let id = turn["id"].as_str().expect("its id").to_owned();

    let tail = say(&["turns", "tail", &id], "");
    assert_eq!((tail.code, tail.stdout.trim()), (0, "1"), "{tail:?}");
    let tail = say(&["turns", "tail", "--json", &id], "");
    let kinds: Vec<String> = tail
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["event"].as_str().expect("a kind").to_owned())
        .collect();
    assert_eq!(kinds.first().map(String::as_str), Some("turn.accepted"), "{tail:?}");
    assert_eq!(kinds.last().map(String::as_str), Some("turn.completed"), "{tail:?}");
    assert_eq!(say(&["turns", "cancel", "--json", &id], "").json()["state"], "completed");
    assert_eq!(say(&["turns", "show", "--json", &id], "").json()["id"], id.as_str());
    let unknown = say(&["turns", "show", "01990000-0000-7000-8000-000000000000"], "");
    failed(&unknown, 1, &["there is no such turn"]);

    // Files go with the first message, and with no other.
    let file = dir.path().join("one.txt");
    std::fs::write(&file, "three short words").expect("it is written");
    say(&["deploy", "--json", &guest("attachment"), "--agent", "attachment"], "").json();
    let ran = say(&["chat", "attachment", "--attach", text(&file)], "count\nafter 1\n");
    let counted = "one.txt: text/plain, 17 bytes, 3 words\n";
    assert!(ran.stdout.starts_with(counted) && ran.stdout.matches(counted).count() == 1, "{ran:?}");
    failed(&ran, 1, &["no_reply"]);

    // A turn that is followed is cancelled by another command.
    let mut tailed = with(&["chat", "slow_reply", "--conversation", "c-2"]);
    let mut chat =
        tailed.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    chat.stdin.take().expect("a pipe").write_all(b"60000\n").expect("it reads");
    let until = Instant::now() + PATIENCE;
    let running = loop {
        // Until it is begun there is no such conversation.
        let list = say(&["turns", "list", "--json", "slow_reply", "c-2"], "");
        let page: Value = serde_json::from_str(&list.stdout).unwrap_or_default();
        if let Some(id) = page["items"][0]["id"].as_str() {
            break id.to_owned();
        }
        assert!(Instant::now() < until, "{list:?}");
    };
    assert_eq!(say(&["turns", "cancel", "--json", &running], "").json()["state"], "cancelled");
    let chat = chat.wait_with_output().expect("it ends");
    assert_eq!(chat.status.code(), Some(1), "{chat:?}");
    assert!(String::from_utf8_lossy(&chat.stderr).contains("cancelled"), "{chat:?}");

    // Deploying is a new version of the same agent.
    let deployed = say(&["deploy", "--json", &guest("trap"), "--worker", "echo", "--agent", "echo"], "").json();
    assert_eq!(deployed["worker"]["version"], 2, "{deployed}");
    let ran = say(&["chat", "echo"], "now\n");
    failed(&ran, 1, &["worker_trapped"]);
    // And going back is one command, which says what it did.
    let ran = say(&["rollback", "echo"], "");
    assert!(ran.code == 0 && ran.stdout.contains("agent echo runs echo version 1; it ran version 2"), "{ran:?}");
    assert_eq!(say(&["chat", "echo"], "again\n").stdout, "again\n");
    failed(&say(&["rollback", "echo"], ""), 1, &["no older one", "turnhouse workers show echo"]);
    failed(&say(&["rollback", "echo", "--to", "3"], ""), 1, &["worker echo has no version 3"]);
    failed(&say(&["rollback", "nobody"], ""), 1, &["there is no agent nobody", "turnhouse agents list"]);
    let ran = say(&["rollback", "echo", "--to", "2", "--json"], "").json();
    assert_eq!((&ran["agent"]["version"], &ran["version_before"]), (&json!(2), &json!(1)), "{ran}");
    assert_eq!(ran["agent"]["default"], true, "its other settings stay: {ran}");
    failed(&say(&["rollback", "echo", "--to", "2"], ""), 1, &["version 2 already"]);
    let ran = say(&["deploy", &guest("echo"), "--worker", "no/slash"], "");
    assert_eq!(ran.code, 2, "{ran:?}");
    for list in [&["agents", "list"][..], &["workers", "list"], &["conversations", "list", "slow_reply"]] {
        let ran = say(&[list, &["--json"]].concat(), "");
        assert!(!ran.json()["items"].as_array().expect("items").is_empty(), "{list:?}");
    }
    let wrong = run(&["agents", "list", "--url", url, "--api-key", "th_wrong"]);
    failed(&wrong, 1, &["API key"]);

    // Its data is for its owner's eyes, and its key stays.
    let mode = |path: &Path| std::fs::metadata(path).expect("its mode").permissions().mode() & 0o777;
    assert_eq!(mode(&data_dir), 0o700);
    let holds_the_key = |path: &Path| std::fs::read(path).is_ok_and(|bytes| bytes.starts_with(key.as_bytes()));
    let files = std::fs::read_dir(&data_dir).expect("the data directory").flatten().map(|entry| entry.path());
    let keys: Vec<u32> = files.filter(|path| holds_the_key(path)).map(|path| mode(&path)).collect();
    assert_eq!(keys, [0o600]);
    assert!(host.terminate().success());
    let mut again = Program::spawn(&mut command(&arguments));
    assert_eq!(again.ready().expect("a line of JSON")["api_key"], key);
    assert!(again.terminate().success());
}

#[test]
fn dev_deploys_a_file_that_changes() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let worker = dir.path().join("worker.wasm");
    std::fs::copy(guest("echo"), &worker).expect("a copy");
    let data_dir = dir.path().join("data");
    let arguments = ["dev", "--json", "--listen", "127.0.0.1:0", "--data-dir", text(&data_dir), text(&worker)];
    let mut host = Program::spawn(&mut command(&arguments));
    let line = host.ready().expect("a line of JSON");
    let (url, key) = (line["url"].as_str().expect("a url"), line["api_key"].as_str().expect("a key"));
    let say = || {
        let mut chat = command(&["chat"]);
        run_with(chat.env("TURNHOUSE_URL", url).env("TURNHOUSE_API_KEY", key), b"hi\n")
    };
    assert_eq!(say().stdout, "hi\n");
    // As a linker does: another file under the same name.
    let next = dir.path().join("next");
    std::fs::copy(guest("no_reply"), &next).expect("a copy");
    std::fs::rename(&next, &worker).expect("renamed");
    let until = Instant::now() + PATIENCE;
    while say().code == 0 {
        assert!(Instant::now() < until, "it is never deployed");
        std::thread::sleep(Duration::from_millis(100));
    }
    failed(&say(), 1, &["no_reply"]);
    assert!(host.terminate().success());
}

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
    assert!(table.lines().any(|line| line.starts_with("queue_max") && line.contains("20000  every org")), "{table}");
    assert!(
        table.lines().any(|line| line.starts_with("submits_per_second") && line.contains("2.5    this org")),
        "{table}"
    );
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

/// What is PostgreSQL's alone.
mod shared {
    use turnhouse_tests::Home;
    use turnhouse_tests::database::Backing;

    use super::*;

    #[test]
    fn o1_one_role_migrates_and_another_that_owns_nothing_serves() {
        let home = Home::on(Backing::Shared);
        let database = home.database().expect("a database");
        let (owner, host) = (database.direct_url(), database.url());
        Tables::of(database).to_damage().execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public");
        let data_dir = home.path().join("data");
        let as_host = |arguments: &[&str]| {
            let place = ["--data-dir", text(&data_dir), "--database-url", host.as_str()];
            run(&[arguments, &place].concat())
        };
        failed(&as_host(&["status"]), 1, &["may not do that", "turnhouse migrate"]);
        let migrate = || run(&["migrate", "--json", "--data-dir", text(&data_dir), "--database-url", &owner]);
        let migrated = migrate().json();
        assert_eq!((&migrated["store"], migrate().json()), (&json!("postgres"), migrated.clone()), "again is no harm");
        assert_eq!(as_host(&["migrate"]).code, 0, "there is nothing left to do");

        assert_eq!(as_host(&["orgs", "create", "acme"]).code, 0);
        let key = as_host(&["keys", "create", "--json", "--org", "acme", "--user", "ann", "--scopes", "admin"]).json();
        let key = key["api_key"].as_str().expect("a key").to_owned();
        let mut serving = Program::serve(&data_dir, "127.0.0.1:0", &[("TURNHOUSE_DATABASE_URL", host.as_str())]);
        let url = serving.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
        let over = ["--url", &url, "--api-key", &key];
        let client = |arguments: &[&str]| run(&[arguments, &over].concat());
        assert_eq!(client(&["deploy", &guest("snapshot_counter")]).code, 0);
        for turn in ["1", "2"] {
            let chat = [&["chat", "snapshot_counter", "--conversation", "c"][..], &over].concat();
            let said = run_with(&mut command(&chat), b"hi\n");
            assert!(said.code == 0 && said.stdout.contains(turn), "{said:?}");
        }
        let found = as_host(&["doctor", "--json"]).json();
        let wall = found["findings"].as_array().expect("a list").iter().find(|finding| finding["what"] == "wall");
        let wall = wall.expect("a finding");
        assert!(wall["health"] == "good" && wall["text"].to_string().contains("does not own the tables"), "{wall}");
        assert!(serving.terminate().success());
    }
}
