//! Commands that need no host, and `dev`, which is one.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use turnhouse_tests::program::{command, run, run_with};
use turnhouse_tests::{PATIENCE, Program};

use super::*;

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
