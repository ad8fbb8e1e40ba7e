//! Session mode `file`: a conversation's private directory, over the API.

use std::path::{Path, PathBuf};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::{Client, TestHost, eventually};

/// WASI's errnos, as the guest tells them.
const DQUOT: &str = "errno 19";
const MFILE: &str = "errno 33";
const NOENT: &str = "errno 44";
const PERM: &str = "errno 63";

async fn host() -> TestHost {
    TestHost::start().await
}

/// A host whose directories hold next to nothing.
async fn narrow() -> TestHost {
    TestHost::start_with(|config| {
        config.limits.private_dir_bytes_max = 100_000;
        config.limits.private_dir_files_max = 10;
    })
    .await
}

/// A member whose agent `files` keeps its files.
async fn keeper(host: &TestHost, org: &str) -> Client {
    let client = host.member(org, "ann", "admin,ingest").await;
    client.deploy_as("files", "files", json!({ "session_mode": "file" })).await;
    client
}

/// One turn that does these things; what came of each.
async fn does(client: &Client, conversation: &str, doings: &[&str]) -> Vec<String> {
    let reply = client.say("files", conversation, &doings.join("\n")).await.completed().await;
    reply.lines().map(str::to_owned).collect()
}

/// The directories of conversations and of turns that are on the disk.
fn places(host: &TestHost) -> Vec<PathBuf> {
    let below = |path: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(path).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
    };
    below(&host.data_dir().join("files")).iter().flat_map(|shelf| below(shelf)).collect()
}

async fn delete(client: &Client, conversation: &str) {
    let path = format!("/v1/agents/files/conversations/{conversation}");
    assert_eq!(client.call(Method::DELETE, &path).await.0, StatusCode::NO_CONTENT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_finds_its_files_again_and_no_other_does() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    assert_eq!(
        does(&ann, "c-1", &["list", "write notes.txt one", "mkdir sub", "write sub/deep.txt two"]).await,
        ["[]", "ok", "ok", "ok"]
    );
    let again =
        does(&ann, "c-1", &["list", "read notes.txt", "read /sub/deep.txt", "append notes.txt !", "read ./notes.txt"]);
    assert_eq!(again.await, ["[notes.txt sub]", "one", "two", "ok", "one!"]);
    assert_eq!(does(&ann, "c-2", &["list", "read notes.txt"]).await, ["[]", NOENT]);
    // A private turn: its reply is on its own resource, and there is neither history nor snapshot.
    assert_eq!(ann.messages("files", "c-1").await, Vec::<Value>::new());
    assert_eq!(host.tables().count("SELECT count(*) FROM snapshots"), 0);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o3_what_a_directory_holds_is_counted_when_its_turn_has_left_it() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    let noted = |host: &TestHost| host.tables().count("SELECT sum(files_bytes) FROM conversations");
    let is = async |host: &TestHost, bytes: i64| {
        eventually("it is counted", async || noted(host) == bytes).await;
    };
    does(&ann, "c-1", &["fill a 60000", "write b 12345"]).await;
    is(&host, 60_005 + 2 * 512).await;
    does(&ann, "c-2", &["fill a 10000"]).await;
    is(&host, 70_005 + 3 * 512).await;
    does(&ann, "c-1", &["remove a"]).await;
    is(&host, 10_005 + 2 * 512).await;
    // What a host that crashed did not note, the next one does.
    let host =
        host.restart_after(|_, tables| tables.to_damage().execute("UPDATE conversations SET files_bytes = 0")).await;
    is(&host, 10_005 + 2 * 512).await;
    let ann = Client::new(&host.url, &ann.key);
    delete(&ann, "c-2").await;
    is(&host, 5 + 512).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_file_mode_there_is_no_directory() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy("files").await;
    let told = does(&ann, "c-1", &["write notes.txt one", "read /etc/passwd", "symlink a b"]).await;
    assert!(told.iter().all(|line| line.starts_with("errno")), "{told:?}");
    assert_eq!(places(&host), Vec::<PathBuf>::new());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_bytes_than_the_quota_are_refused_and_the_turn_goes_on() {
    let host = narrow().await;
    let ann = keeper(&host, "acme").await;
    let told = does(
        &ann,
        "c-1",
        &[
            "fill a 60000",
            "fill b 50000",
            "length b",
            "fill b 40000",
            "append b x",
            "size b 40001",
            "overwrite a 0 60000",
            "overwrite a 59999 2",
            "overwrite a 1099511627776 1",
            "size a 9223372036854775807",
            "length a",
            "symlink nowhere link",
            "remove a",
            "fill c 60000",
            "size c 10000",
            "fill d 50000",
            "append d x",
        ],
    )
    .await;
    assert_eq!(
        told,
        [
            "ok", DQUOT, "0", "ok", DQUOT, DQUOT, "ok", DQUOT, DQUOT, DQUOT, "60000", DQUOT, "ok", "ok", "ok", "ok",
            DQUOT
        ]
    );
    // And counted the same from the disk.
    assert_eq!(
        does(&ann, "c-1", &["append d x", "size d 49999", "append d x", "append d x"]).await,
        [DQUOT, "ok", "ok", DQUOT]
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_names_than_the_quota_are_refused_and_the_turn_goes_on() {
    let host = narrow().await;
    let ann = keeper(&host, "acme").await;
    let told = does(
        &ann,
        "c-1",
        &[
            "files 20",
            "mkdir d",
            "link f0 g",
            "symlink f0 s",
            "rename f0 f1",
            "link f1 g",
            "write h x",
            "write f1 still",
            "remove g",
            "mkdir d",
            "rmdir d",
            "symlink f1 s",
            "remove s",
            "write h x",
            "write i x",
        ],
    )
    .await;
    assert_eq!(
        told,
        ["10 then 19", DQUOT, DQUOT, DQUOT, "ok", "ok", DQUOT, "ok", "ok", "ok", "ok", "ok", "ok", "ok", DQUOT]
    );
    assert_eq!(
        does(&ann, "c-1", &["write i x", "remove h", "write i x", "write h x"]).await,
        [DQUOT, "ok", "ok", DQUOT]
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_file_counts_until_it_is_closed() {
    let host = narrow().await;
    let ann = keeper(&host, "acme").await;
    let told = does(
        &ann,
        "c-1",
        &[
            "fill a 60000",
            "hold a",
            "remove a",
            "list",
            "fill b 50000",
            "grow 60000",
            "grow 40001",
            "close",
            "fill b 100000",
            "hold b",
            "write c x",
            "rename c b",
            "fill d 1",
            "close",
            "fill d 99999",
        ],
    )
    .await;
    assert_eq!(told, ["ok", "ok", "ok", "[]", DQUOT, "ok", DQUOT, "ok", "ok", "ok", DQUOT, "ok", DQUOT, "ok", "ok"]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_of_two_names_is_counted_once_and_given_back_with_its_last() {
    let host = narrow().await;
    let ann = keeper(&host, "acme").await;
    let told = does(
        &ann,
        "c-1",
        &["fill a 60000", "link a b", "rename a b", "fill c 40000", "remove a", "append c x", "remove b", "append c x"],
    )
    .await;
    assert_eq!(told, ["ok", "ok", "ok", "ok", "ok", DQUOT, "ok", "ok"]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_files_are_written_and_read_in_one_piece() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("files", "files", json!({ "session_mode": "file" })).await;
    assert_eq!(does(&ann, "c-1", &["fill big 20000000", "length big"]).await, ["ok", "20000000"]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_path_leads_out_of_the_directory() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("path_tricks", "path_tricks", json!({ "session_mode": "file" })).await;
    let told = ann.say("path_tricks", "c-1", "try").await.completed().await;
    for line in told.lines() {
        let (trick, outcome) = line.split_once(' ').expect("a trick and its outcome");
        assert_eq!(outcome, if trick.ends_with("_here") { "worked" } else { "refused" }, "{told}");
    }
    assert_eq!(told.lines().count(), 13, "{told}");
    let place = places(&host).pop().expect("its place");
    assert!(!place.join("escaped").exists() && !place.parent().expect("its shelf").join("escaped").exists());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_stays_and_only_files_directories_and_links_are_made() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    let made =
        does(&ann, "c-1", &["write notes mine", "mkdir d", "write d/deep mine", "link notes d/hard", "symlink d s"]);
    assert!(made.await.iter().all(|line| line == "ok"));
    let tried = does(
        &ann,
        "c-1",
        &[
            "rename notes /",
            "rename notes .",
            "rename notes d/..",
            "rename d /",
            "rename d .",
            "rename d d/inside",
            "rename / away",
            "rename . away",
            "rename d/.. d/away",
            "rename s/.. away",
            "rename notes s/../../notes",
            "rmdir /",
            "rmdir .",
            "rmdir d/..",
            "remove /",
            "remove .",
            "link / root",
            "link d hard",
            "link . d/root",
            "link notes /",
            "symlink x /",
            "symlink x .",
            "write / x",
            "write . x",
            "write d/../../notes x",
            "size / 0",
            "mkdir /",
            "mkdir .",
            "rename notes /dev/null",
            "read /proc/self/environ",
            "read /dev/stdin",
        ],
    )
    .await;
    assert!(tried.iter().all(|line| line.starts_with("errno")), "{tried:?}");
    assert_eq!(
        does(&ann, "c-1", &["list", "read notes", "read s/deep", "read d/hard", "append notes !", "read d/hard"]).await,
        ["[d notes s]", "mine", "mine", "mine", "ok", "mine!"]
    );
    let odd = |path: &Path| !(path.is_symlink() || path.is_file() || path.is_dir());
    let mut todo = places(&host);
    while let Some(place) = todo.pop() {
        for path in std::fs::read_dir(&place).expect("a directory").flatten().map(|entry| entry.path()) {
            assert!(!odd(&path), "{}", path.display());
            if path.is_dir() && !path.is_symlink() {
                todo.push(path);
            }
        }
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_links_that_one_turn_leaves_lead_the_next_nowhere() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    let bob = keeper(&host, "other").await;
    does(&bob, "c-1", &["write secret bobs"]).await;
    let theirs = places(&host).pop().expect("bob's place");
    // As from within: up, and down again into what is another's.
    let generation = std::fs::read_dir(&theirs).expect("bob's").flatten().find(|entry| entry.path().is_dir());
    let path = generation.expect("its files").path().join("secret");
    assert_eq!(std::fs::read_to_string(&path).expect("it is there"), "bobs");
    let below = path.strip_prefix(host.data_dir().join("files")).expect("below files").display().to_string();
    let (relative, absolute) = (format!("../../../{below}"), path.display().to_string());

    let left = does(
        &ann,
        "c-1",
        &[
            &format!("symlink {relative} relative"),
            &format!("symlink {absolute} absolute"),
            "symlink relative chained",
            "symlink .. up",
            "symlink up/.. upper",
            "symlink loop loop",
            "mkdir in",
            "symlink ../notes in/fine",
            "write notes mine",
        ],
    )
    .await;
    assert_eq!((left[0].as_str(), left[1].as_str()), ("ok", PERM), "{left:?}");
    let found = does(
        &ann,
        "c-1",
        &[
            "read relative",
            "read chained",
            "read absolute",
            &format!("read up/{below}"),
            &format!("read upper/files/{below}"),
            &format!("link {relative} hard"),
            &format!("link up/../{below} hard"),
            "write relative overwritten",
            "append chained more",
            "size relative 0",
            "remove up/owner.json",
            "rename notes up/notes",
            "rename notes ../notes",
            "mkdir up/made",
            "symlink x up/made",
            "read loop",
            "read in/fine",
            "read notes",
        ],
    )
    .await;
    let (refused, fine) = found.split_at(found.len() - 2);
    assert!(refused.iter().all(|line| line.starts_with("errno")), "{found:?}");
    assert_eq!(fine, ["mine", "mine"]);
    assert_eq!(std::fs::read_to_string(&path).expect("it is there"), "bobs");
    assert_eq!(does(&bob, "c-1", &["list", "read secret"]).await, ["[secret]", "bobs"]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn o1_two_orgs_with_the_same_ids_have_two_directories() {
    let host = host().await;
    let (ann, bob) = (keeper(&host, "acme").await, keeper(&host, "other").await);
    does(&ann, "c-1", &["write mine anns"]).await;
    assert_eq!(does(&bob, "c-1", &["list", "write mine bobs"]).await, ["[]", "ok"]);
    assert_eq!(does(&ann, "c-1", &["read mine"]).await, ["anns"]);
    delete(&bob, "c-1").await;
    assert_eq!(does(&ann, "c-1", &["read mine"]).await, ["anns"]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s8_a_directory_goes_with_its_conversation_and_begins_empty_again() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    does(&ann, "c-1", &["write notes one", "deep 300"]).await;
    assert_eq!(places(&host).len(), 1);
    delete(&ann, "c-1").await;
    assert_eq!(places(&host), Vec::<PathBuf>::new());
    assert_eq!(does(&ann, "c-1", &["list", "write notes two"]).await, ["[]", "ok"]);
    // To start anew is to find it empty, too.
    let (status, _) = ann.call(Method::DELETE, "/v1/agents/files/conversations/c-1/snapshot").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_eq!(places(&host), Vec::<PathBuf>::new());
    assert_eq!(does(&ann, "c-1", &["list"]).await, ["[]"]);
    delete(&ann, "c-1").await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s8_a_directory_that_is_written_to_goes_with_its_conversation() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    for _ in 0..5 {
        let scribbles = ann.say("files", "c-1", "scribble log").await;
        scribbles.events(None).await.until("output.delta").await;
        delete(&ann, "c-1").await;
        assert_eq!(does(&ann, "c-1", &["list"]).await, ["[]"]);
        delete(&ann, "c-1").await;
        eventually("its directory is gone", async || places(&host).is_empty()).await;
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_was_stopped_writes_nothing_while_the_next_turn_runs() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    let reads = ["length log"; 200].join("\n");
    for _ in 0..5 {
        let scribbles = ann.say("files", "c-1", "scribble log").await;
        scribbles.events(None).await.until("output.delta").await;
        // Ends it and starts the next in one transaction.
        let (status, next) =
            ann.submit("files", "c-1", json!({ "message": { "text": reads }, "on_busy": "interrupt" })).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{next}");
        let told = ann.turn(next["turn_id"].as_str().expect("its id")).completed().await;
        let lengths: std::collections::HashSet<&str> = told.lines().collect();
        assert_eq!(lengths.len(), 1, "it changed under the next turn: {lengths:?}");
        assert_eq!(scribbles.ended().await["state"], "cancelled");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_without_a_place_in_a_conversation_has_a_directory_for_itself() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    does(&ann, "c-1", &["write notes mine"]).await;
    let before = places(&host);
    let envelopes = [
        json!({ "agent": "files", "message": { "text": "list\nwrite notes x\nread notes" } }),
        json!({ "agent": "files", "org": "acme", "message": { "text": "list\nwrite notes x\nread notes" } }),
        // It names a conversation, and no org: it is in no line, and may run beside the conversation's own.
        json!({ "agent": "files", "conversation": "c-1", "message": { "text": "list\nwrite notes x\nread notes" } }),
    ];
    for envelope in envelopes {
        let (status, answer) = ann.send(Method::POST, "/v1/ingest", envelope).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        let told = ann.turn(answer["turn_id"].as_str().expect("its id")).completed().await;
        assert_eq!(told, "[]\nok\nx\n");
    }
    let traps = json!({ "agent": "files", "message": { "text": "write notes x\ntrap" } });
    let (_, answer) = ann.send(Method::POST, "/v1/ingest", traps).await;
    ann.turn(answer["turn_id"].as_str().expect("its id")).failed().await;
    let hangs = json!({ "agent": "files", "message": { "text": "scribble log" } });
    let (_, answer) = ann.send(Method::POST, "/v1/ingest", hangs).await;
    let hangs = ann.turn(answer["turn_id"].as_str().expect("its id"));
    hangs.events(None).await.until("output.delta").await;
    hangs.cancel().await;
    eventually("only the conversation's is left", async || places(&host) == before).await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_run_out_for_the_guest_and_not_for_the_host() {
    let host = host().await;
    let ann = host.member("acme", "ann", "admin").await;
    ann.deploy_as("fd_exhaust", "fd_exhaust", json!({ "session_mode": "file" })).await;
    let told = ann.say("fd_exhaust", "c-1", "go").await.completed().await;
    let number = MFILE.strip_prefix("errno ").expect("its number");
    assert!(told.starts_with("60 open, then: ") && told.contains(&format!("(os error {number})")), "{told}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_keeps_what_is_somebodys_and_removes_what_is_nobodys() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    does(&ann, "c-1", &["write notes one"]).await;
    does(&ann, "c-2", &["write notes two"]).await;
    let key = ann.key.clone();
    let host = host
        .restart_after(|data_dir, _| {
            let files = data_dir.join("files");
            // As a crash leaves them: a temporary directory, and one whose conversation went without it.
            std::fs::create_dir_all(files.join("temporary/left/deep")).expect("made");
            std::fs::write(files.join("temporary/left/deep/file"), "x").expect("written");
            let tables = rusqlite::Connection::open(data_dir.join("turnhouse.db")).expect("the database");
            let deleted =
                "UPDATE conversations SET deleted_at = 1, generation = ?1, head_run = ?1 WHERE conversation_id = 'c-2'";
            assert_eq!(tables.execute(deleted, [[1_u8; 16]]).expect("it is written"), 1);
        })
        .await;
    let ann = Client::new(&host.url, &key);
    eventually("what is nobody's is gone", async || {
        let left = std::fs::read_dir(host.data_dir().join("files")).expect("files").flatten();
        let aside = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("temporary-")).count();
        places(&host).len() == 1 && aside == 0
    })
    .await;
    assert_eq!(does(&ann, "c-1", &["read notes"]).await, ["one"]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_database_knew_is_kept() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    does(&ann, "c-1", &["write notes one"]).await;
    let host = host
        .restart_after(|data_dir, _| {
            let tables = rusqlite::Connection::open(data_dir.join("turnhouse.db")).expect("the database");
            tables.execute_batch("DELETE FROM conversations; DELETE FROM turns;").expect("another database");
        })
        .await;
    // Of this place, the sweep comes to the same end again and again.
    host.host.dispatch.private_dirs.clone().expect("it has them").sweep().await;
    assert_eq!(places(&host).len(), 1);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn file_mode_is_chosen_and_has_no_history() {
    let host = host().await;
    let ann = keeper(&host, "acme").await;
    let (_, agent) = ann.get("/v1/agents/files").await;
    assert_eq!(agent["session_mode"], "file");
    let with_history = json!({ "worker": "files", "session_mode": "file", "history_messages": 3 });
    let (status, problem) = ann.send(Method::PUT, "/v1/agents/files", with_history).await;
    assert_eq!((status, &problem["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_setting")), "{problem}");
    host.stop().await;
}
