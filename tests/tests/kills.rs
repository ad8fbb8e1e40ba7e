//! R1: the real program is killed again and again, at named points and at any moment, while clients talk to it; then one checker reads the
//! tables and what the clients saw. `TURNHOUSE_TEST_SEED` repeats a run's choices. On PostgreSQL it is killed less often: the suite is there for what
//! differs, that the next program takes over what the killed one held once its lease has expired.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use eventsource_stream::Eventsource as _;
use futures_util::StreamExt as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use turnhouse_tests::choices::{Choices, seed};
use turnhouse_tests::{Client, Home, Program, SeenEvent, Tables, on_postgres, program};

/// How often the program is killed.
const KILLS: u64 = 200;
/// The same on PostgreSQL.
const KILLS_ON_POSTGRES: u64 = 100;

/// A kill that was to come by itself is made from outside when this is over.
const KILLS_ITSELF_WITHIN: Duration = Duration::from_secs(3);

/// A turn as its client saw it, over all connections.
#[derive(Default)]
struct Seen {
    turn: Option<String>,
    message: String,
    events: Vec<SeenEvent>,
    connections: u32,
}

/// What the clients share.
struct Talk {
    client: Client,
    enough: AtomicBool,
    accepted: AtomicU64,
}

impl Talk {
    /// A client of one conversation: one message after the other, each followed to its end over as many connections as that takes.
    async fn follow_all(self: Arc<Self>, agent: &'static str, conversation: String, mut choices: Choices) -> Vec<Seen> {
        let mut all = Vec::new();
        while !self.enough.load(Ordering::SeqCst) {
            let key = format!("{conversation}-{}", all.len());
            let message = match agent {
                "slow_reply" => format!("{} {key}", choices.below(40)),
                "progress_slowly" => format!("{} ticks every {} {key}", 2 + choices.below(8), 1 + choices.below(12)),
                _ => format!("hello {key}"),
            };
            let mut seen = Seen { message, ..Seen::default() };
            let streams = choices.below(2) == 0;
            // Until it is accepted: the key makes it one turn, however often it is sent.
            while !self.submit(agent, &conversation, &key, streams, &mut seen).await {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            self.accepted.fetch_add(1, Ordering::SeqCst);
            while seen.events.last().is_none_or(|event| event.id != "end") {
                self.read_on(&mut seen).await;
            }
            all.push(seen);
        }
        all
    }

    /// A client that sends and forgets, without a key: what was accepted of it.
    async fn forget_all(self: Arc<Self>, agent: &'static str, mut choices: Choices) -> Vec<Seen> {
        let mut all = Vec::new();
        let mut sent = 0;
        while !self.enough.load(Ordering::SeqCst) {
            sent += 1;
            let conversation = format!("forgotten-{}", choices.below(3));
            let message = format!("{} forgotten-{sent}", choices.below(30));
            let body =
                json!({ "message": { "text": message }, "on_busy": choices.of(&["enqueue", "interrupt", "reject"]) });
            let request = self.client.request(Method::POST, &Client::turns(agent, &conversation)).json(&body);
            if let Ok(response) = request.send().await
                && response.status() == StatusCode::ACCEPTED
                && let Ok(body) = response.json::<Value>().await
            {
                let turn = body["turn_id"].as_str().expect("its id").to_owned();
                if choices.below(4) == 0 {
                    let _ = self.client.request(Method::POST, &format!("/v1/turns/{turn}/cancel")).send().await;
                }
                all.push(Seen { turn: Some(turn), message, ..Seen::default() });
            }
            tokio::time::sleep(Duration::from_millis(20 + choices.below(40))).await;
        }
        all
    }

    async fn submit(&self, agent: &str, conversation: &str, key: &str, streams: bool, seen: &mut Seen) -> bool {
        let mut request = self.client.request(Method::POST, &Client::turns(agent, conversation));
        request = request.header("idempotency-key", key).json(&json!({ "message": { "text": seen.message } }));
        if streams {
            request = request.header("accept", "text/event-stream");
        }
        let Ok(response) = request.send().await else { return false };
        match response.status() {
            StatusCode::OK => {
                // The turn's name is in its first event and in this header: the connection may break before the one, not before the other.
                let location = response.headers()["location"].to_str().expect("a path").to_owned();
                seen.turn = location.strip_prefix("/v1/turns/").map(str::to_owned);
                read(response, seen).await;
                true
            }
            StatusCode::ACCEPTED => match response.json::<Value>().await {
                Ok(body) => {
                    seen.turn = Some(body["turn_id"].as_str().expect("its id").to_owned());
                    true
                }
                Err(_) => false,
            },
            StatusCode::SERVICE_UNAVAILABLE => false,
            status => panic!("{status}: {}", response.text().await.unwrap_or_default()),
        }
    }

    async fn read_on(&self, seen: &mut Seen) {
        let path = format!("/v1/turns/{}/events", seen.turn.as_deref().expect("accepted"));
        let mut request = self.client.request(Method::GET, &path);
        if let Some(last) = seen.events.last() {
            request = request.header("last-event-id", &last.id);
        }
        match request.send().await {
            Ok(response) if response.status() == StatusCode::OK => read(response, seen).await,
            Ok(response) if response.status() == StatusCode::SERVICE_UNAVAILABLE => {}
            Ok(response) => panic!("{path}: {}: an accepted turn is not lost", response.status()),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Reads what comes, until the stream ends or breaks off.
async fn read(response: reqwest::Response, seen: &mut Seen) {
    seen.connections += 1;
    let mut stream = response.bytes_stream().eventsource();
    // What broke off in the middle of an event was not seen.
    while let Some(Ok(event)) = stream.next().await {
        let data = serde_json::from_str(&event.data).expect("data is JSON");
        seen.events.push(SeenEvent { id: event.id, kind: event.event, data });
    }
}

/// Everything that is wrong with what the clients saw, given the tables.
fn faults(tables: &Tables, followed: &[Seen], forgotten: &[Seen]) -> Vec<String> {
    let mut faults = tables.faults();
    let turns: HashMap<String, _> = tables.turns().into_iter().map(|turn| (turn.id.clone(), turn)).collect();
    for seen in followed.iter().chain(forgotten) {
        let id = seen.turn.as_deref().expect("accepted");
        let Some(outcome) = turns.get(id).and_then(|turn| turn.outcome.as_deref()) else {
            faults.push(format!("turn {id} was accepted and has no end"));
            continue;
        };
        if forgotten.iter().any(|one| std::ptr::eq(one, seen)) {
            continue;
        }
        let terminal: Vec<&SeenEvent> = seen.events.iter().filter(|event| event.is_terminal()).collect();
        if terminal.len() != 1 || terminal[0].kind != format!("turn.{outcome}") {
            faults.push(format!("turn {id} ended {outcome}; its client saw {terminal:?}"));
        }
        let mut had = HashSet::new();
        // A resync carries the id from which it resumes: it may be one that was seen before a crash took what came after it.
        for event in seen.events.iter().filter(|event| event.kind != "resync") {
            if !had.insert(event.id.as_str()) {
                faults.push(format!("turn {id}: event {} came twice: {:?}", event.id, seen.events));
            }
        }
        if let Some(fault) = told_wrong(seen) {
            faults.push(format!("turn {id}: {fault}: {:?}", seen.events));
        }
    }
    let mut messages = HashMap::new();
    for message in tables.messages() {
        *messages.entry(message).or_insert(0) += 1;
    }
    for seen in followed {
        let times = messages.get(&seen.message).copied().unwrap_or(0);
        if times != 1 {
            faults.push(format!("{:?} was accepted {times} times", seen.message));
        }
    }
    let mut counters: HashMap<String, Vec<(i64, String)>> = HashMap::new();
    for turn in turns.values().filter(|turn| turn.lane.contains("/snapshot_counter/")) {
        if turn.outcome.as_deref() == Some("completed") {
            let reply: Value = serde_json::from_str(turn.reply.as_deref().expect("a reply")).expect("JSON");
            let count = reply["text"].as_str().expect("a text").to_owned();
            counters.entry(turn.lane.clone()).or_default().push((turn.seq.expect("a place"), count));
        }
    }
    for (lane, mut counts) in counters {
        counts.sort();
        for (index, (seq, count)) in counts.iter().enumerate() {
            if *count != (index + 1).to_string() {
                faults.push(format!("{lane}: turn {seq} counted {count}, as the {}th that completed", index + 1));
                break;
            }
        }
    }
    faults
}

/// E3: what was streamed is the reply, or the end says that it is not.
fn told_wrong(seen: &Seen) -> Option<String> {
    let mut text = String::new();
    for event in &seen.events {
        match event.kind.as_str() {
            "turn.restarted" => text.clear(),
            "resync" => event.data["text"].as_str()?.clone_into(&mut text),
            "output.delta" => text.push_str(event.data["text"].as_str()?),
            "turn.completed"
                if event.data["replaces_deltas"] == json!(false) && event.data["reply"]["text"] != text =>
            {
                return Some(format!("{text:?} was streamed, and is not the reply"));
            }
            _ => {}
        }
    }
    None
}

/// The points that this store has.
fn points() -> Vec<&'static str> {
    // A commit has no middle there: it is one call of the database's.
    turnhouse::kill_point::ALL.iter().copied().filter(|point| !(on_postgres() && *point == "mid_commit")).collect()
}

/// The settings with which the program starts on this store, whatever is asked of it: they lie in its data directory.
fn settle(home: &Home, data_dir: &Path) {
    let Some(database) = home.database() else { return };
    std::fs::create_dir_all(data_dir).expect("a directory");
    // Nobody may take over before a lease is over: a short one, so that many are.
    let limits = "[limits]\nlease_ttl_ms = 1500\nlease_renew_ms = 300\nlease_margin_ms = 500\n";
    let text = format!("database_url = {:?}\n{limits}", database.url().as_str());
    std::fs::write(data_dir.join("turnhouse.toml"), text).expect("it is written");
}

fn deploy(data_dir: &Path) -> String {
    let key = program::member(data_dir, "ann", "admin");
    let mut host = Program::serve(data_dir, "127.0.0.1:0", &[]);
    let url = host.ready().expect("it is ready")["url"].as_str().expect("a url").to_owned();
    for agent in ["echo", "snapshot_counter", "slow_reply", "progress_slowly"] {
        let wasm = turnhouse_workers::path(agent);
        let ran = program::run(&["deploy", wasm.to_str().expect("a path"), "--url", &url, "--api-key", &key]);
        assert_eq!(ran.code, 0, "{ran:?}");
    }
    assert!(host.terminate().success());
    key
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r1_kills_lose_no_accepted_message_and_repeat_no_terminal_event() {
    let mut choices = Choices::new(seed());
    let kills = if on_postgres() { KILLS_ON_POSTGRES } else { KILLS };
    let (home, points) = (Home::new(), points());
    let data_dir = home.path().join("data");
    settle(&home, &data_dir);
    let key = deploy(&data_dir);
    let address = program::free_address();
    let client = Client::new(&format!("http://{address}"), &key);
    let talk = Arc::new(Talk { client, enough: AtomicBool::new(false), accepted: AtomicU64::new(0) });
    let followers: Vec<_> = ["echo", "snapshot_counter", "snapshot_counter", "slow_reply", "progress_slowly"]
        .into_iter()
        .enumerate()
        .map(|(n, agent)| tokio::spawn(talk.clone().follow_all(agent, format!("c-{n}"), Choices::new(choices.next()))))
        .collect();
    let forgetful = tokio::spawn(talk.clone().forget_all("slow_reply", Choices::new(choices.next())));

    let began = Instant::now();
    let mut by_themselves = HashMap::<String, u32>::new();
    for kill in 0..kills {
        let (at, data_dir) = (address.clone(), data_dir.clone());
        // A release has no such points.
        if kill % 2 == 0 && cfg!(debug_assertions) {
            let point = choices.of(&points);
            let spec = format!("{point}:{}", 1 + choices.below(6));
            let ended = tokio::task::spawn_blocking(move || {
                let settings = [("TURNHOUSE_TEST_KILL", spec.as_str())];
                Program::serve(&data_dir, &at, &settings).ends_within(KILLS_ITSELF_WITHIN)
            });
            if let Some(status) = ended.await.expect("no panic") {
                assert!(!status.success() && status.code().is_none(), "it was to be killed, not to end: {status}");
                *by_themselves.entry(point.to_owned()).or_default() += 1;
            }
        } else {
            // Now and then before it is ready.
            let (early, after) = (choices.below(8) == 0, Duration::from_micros(choices.below(150_000)));
            let killed = tokio::task::spawn_blocking(move || {
                let mut host = Program::serve(&data_dir, &at, &[]);
                if !early {
                    host.ready().expect("it starts again, whatever was interrupted");
                }
                std::thread::sleep(after);
                host.kill();
            });
            killed.await.expect("no panic");
        }
    }
    println!("{kills} kills in {:?}, of which at their points: {by_themselves:?}", began.elapsed());

    let (at, dir_of_last) = (address.clone(), data_dir.clone());
    let host = tokio::task::spawn_blocking(move || {
        let mut host = Program::serve(&dir_of_last, &at, &[]);
        host.ready().expect("it starts again");
        host
    });
    let host = host.await.expect("no panic");
    talk.enough.store(true, Ordering::SeqCst);
    let all = async {
        let mut followed = Vec::new();
        for follower in followers {
            followed.extend(follower.await.expect("no panic"));
        }
        (followed, forgetful.await.expect("no panic"))
    };
    let (followed, forgotten) =
        tokio::time::timeout(Duration::from_secs(60), all).await.expect("every client is answered");
    let drained = home.tables(&data_dir);
    turnhouse_tests::eventually("everything ends", async || drained.count("SELECT count(*) FROM turn_markers") == 0)
        .await;
    assert!(host.terminate().success());

    let faults = faults(&home.tables(&data_dir), &followed, &forgotten);
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    let broken = followed.iter().filter(|seen| seen.connections > 1).count();
    println!(
        "{} turns followed, {broken} of them over several connections; {} forgotten",
        followed.len(),
        forgotten.len()
    );
    // What was not exercised was not shown.
    if cfg!(debug_assertions) {
        assert!(u64::from(by_themselves.values().sum::<u32>()) * 10 >= kills * 3, "{by_themselves:?}");
        assert_eq!(by_themselves.len(), points.len(), "{by_themselves:?}");
    }
    let accepted = talk.accepted.load(Ordering::SeqCst);
    assert!(broken as u64 * 10 >= kills && accepted * 2 >= kills, "{accepted} turns, {broken} streams broke");
}
