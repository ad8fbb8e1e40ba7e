//! `cargo xtask demo`: a conversation with a real host that streams, remembers, is killed in the middle of a turn, and goes on.
//!
//! It tells a newcomer what happens and checks everything that it says: an expectation that fails ends it with what was expected and what
//! was seen. It speaks to the host over HTTP only.

mod narrator;
mod stream;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::signal::unix::{SignalKind, signal};

use crate::api::{self, Api};
use crate::host::{Host, Role, Start};
use crate::setup::{self, Profile};
use narrator::{Narrator, seconds};
use stream::{Until, follow};

const STEPS: usize = 7;
const STREAMED: &str = "a story of 24 words at 60 ms";
const CRASHED: &str = "a story of 40 words at 60 ms";
/// Of the story that is cut off.
const PIECES_BEFORE_CRASH: usize = 12;

/// What the command line asks for.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// End after the last step instead of staying up
    #[arg(long)]
    exit: bool,
    /// Port of the host on 127.0.0.1; any free one when not given
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    port: u16,
}

pub async fn run(options: Options) -> Result<()> {
    let mut voice = Narrator::new(STEPS);
    println!("Turnhouse: every turn of a conversation runs in a fresh WebAssembly instance, and no turn is lost.");

    voice.step("Build the host and three workers: echo, notes and story");
    voice.note("The first time this compiles everything, which takes some minutes.");
    setup::ensure_wasm_target()?;
    let built = setup::build(Profile::Dev)?;
    voice.proven("Built. A worker is a small WebAssembly program; the host is one program with its database inside.");

    let scratch = setup::scratch_dir("demo")?;
    let mut start = Start {
        program: built.program.clone(),
        data_dir: scratch.path().join("data"),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, options.port)),
        role: Role::Dev {
            modules: ["echo", "notes", "story"].iter().map(|name| built.guest(name)).collect::<Result<_>>()?,
        },
        settings: Vec::new(),
    };
    // Ctrl-C ends the conversation wherever it stands; the host is killed when it is dropped, and `scratch` is removed.
    let host = tokio::select! {
        told = converse(&mut voice, &mut start) => told.map_err(|error| {
            let log = start.log_tail();
            if log.is_empty() { error } else { error.context(log) }
        })?,
        () = interrupted() => return Ok(()),
    };
    if options.exit {
        host.stop().await?;
        println!("\nAll of this held. The host has been stopped and its data removed.");
        return Ok(());
    }
    stay_up(host).await
}

/// The conversation, from the first start to the last proof. `start` comes to name the port that the first host got.
async fn converse(voice: &mut Narrator, start: &mut Start) -> Result<Host> {
    voice.step("Start a host and deploy the workers");
    let host = start.run().await?;
    start.listen = host.address;
    let api = Api::of(&host);
    voice.proven(&format!("A host answers at {} (process {}). It needs no other server.", host.url, host.pid));

    voice.step("Streaming: ask for a story and read it while it is told");
    voice.says("you", STREAMED);
    let events = api.submit_streaming("story", "evening", STREAMED).await?;
    let told = follow(voice, "story", events, Until::End).await?;
    told.completed()?;
    ensure!(told.statuses > 0, "expected the story to say how it stands (`status`), saw nothing of it");
    ensure!(
        told.pieces >= 8 && told.spread > Duration::from_millis(500),
        "expected many pieces over more than half a second, saw {} over {:?}",
        told.pieces,
        told.spread
    );
    let (first, spread) = (seconds(told.first_after), seconds(told.spread));
    voice.proven(&format!(
        "{} pieces: the first after {first}, the others over {spread}, each when it was said.",
        told.pieces
    ));

    voice.step("Memory: a conversation goes on where it stopped");
    remember(voice, &api, "remember the milk").await?;
    let listed = remember(voice, &api, "what do you know?").await?;
    ensure!(listed.contains("the milk"), "expected notes to know of the milk, saw {listed:?}");
    voice.proven("Two turns, two instances: what lies between them is a snapshot in the database, written together with the reply.");

    voice.step("Crash: kill -9 in the middle of a turn");
    voice.says("you", CRASHED);
    let key = "Idempotency-Key: the-story-that-is-cut-off";
    let accepted = api.submit("story", "night", CRASHED, &[key]).await?.expect(202)?;
    let turn = api::text(&accepted, "/turn_id")?.to_owned();
    let events = api.events(&turn, None).await?;
    let cut = follow(voice, "story", events, Until::Pieces(PIECES_BEFORE_CRASH)).await?;
    ensure!(cut.ends.is_empty(), "expected the turn to be in its middle, saw its end: {:?}", cut.ends);
    let pid = host.pid;
    host.kill().await?;
    voice.blow(&format!("kill -9 {pid}"));
    ensure!(
        api.get("/healthz").await.is_err(),
        "expected nobody to answer at {} any more, but someone does",
        api.address
    );
    voice.proven(&format!(
        "The host is gone after {} of 40 words. The last event that you read has the id {}.",
        cut.pieces, cut.last_event_id
    ));

    voice.step("Restart: the turn goes on by itself and ends exactly once");
    let down = Instant::now();
    let host = start.run().await?;
    ensure!(host.api_key == api.key, "expected the key to be still the same after the restart, saw another");
    voice.note(&format!(
        "A new process {} on the same data, up after {}. You ask for what follows {}.",
        host.pid,
        seconds(down.elapsed()),
        cut.last_event_id
    ));
    let events = api.events(&turn, Some(&cut.last_event_id)).await?;
    let resumed = follow(voice, "story", events, Until::End).await?;
    resumed.completed()?;
    ensure!(resumed.restarted == [2], "expected one turn.restarted with attempt 2, saw {:?}", resumed.restarted);
    ensure!(
        resumed.text.starts_with(&cut.text) && resumed.text.split_whitespace().count() == 40,
        "expected the whole story of 40 words, which begins with {:?}; saw {:?}",
        cut.text,
        resumed.text
    );
    ended_once(&api, &turn, &resumed.text, key).await?;
    voice.proven(
        "One message, one reply, one end: nobody had to send it again. You do so all the same, with the same Idempotency-Key, as a client \
         that is not sure: you get the same turn, and nothing runs twice.",
    );

    voice.step("And notes still remembers");
    let listed = remember(voice, &api, "what do you know?").await?;
    ensure!(listed.contains("the milk"), "expected notes to know of the milk after the crash, saw {listed:?}");
    voice.proven("What was answered before the crash was on disk before it was answered.");
    Ok(host)
}

/// Says something to `notes` and returns its reply.
async fn remember(voice: &mut Narrator, api: &Api, text: &str) -> Result<String> {
    voice.says("you", text);
    let events = api.submit_streaming("notes", "evening", text).await?;
    let heard = follow(voice, "notes", events, Until::End).await?;
    heard.completed()?;
    Ok(heard.text)
}

/// Holds the turn's resource, its conversation and a repeated submission against the one end that was seen.
async fn ended_once(api: &Api, turn: &str, reply: &str, key: &str) -> Result<()> {
    let resource = api.get(&format!("/v1/turns/{turn}")).await?.expect(200)?;
    let (state, attempt) = (api::text(&resource, "/state")?, &resource["attempt"]);
    ensure!(
        state == "completed" && *attempt == 2,
        "expected the turn completed in attempt 2, saw {state} in {attempt}"
    );
    let kept = api::text(&resource, "/reply/text")?;
    ensure!(kept == reply, "expected the reply to be what was streamed, saw {kept:?}");
    let again = api.submit("story", "night", CRASHED, &[key]).await?;
    ensure!(again.replayed, "expected the repeated message to be marked as replayed, saw {again:?}");
    let turns = api.get(&api::turns_path("story", "night")).await?.expect(200)?;
    let turns = turns["items"].as_array().context("expected a list of turns")?;
    ensure!(turns.len() == 1, "expected one turn in the conversation, saw {}", turns.len());
    Ok(())
}

/// Says how to go on by hand, and waits.
async fn stay_up(mut host: Host) -> Result<()> {
    println!("\nAll of this held. The host stays up; talk to it from another terminal:\n");
    println!("  address  {}\n  API key  {}\n", host.url, host.api_key);
    println!("  curl -N {}{} \\", host.url, api::turns_path("story", "mine"));
    println!("    -H 'Authorization: Bearer {}' \\", host.api_key);
    println!("    -H 'Content-Type: application/json' -H 'Accept: text/event-stream' \\");
    println!("    -d '{}'\n", api::message("a story of 30 words"));
    println!("Ctrl-C stops it and removes its data.");
    tokio::select! {
        () = interrupted() => {
            println!();
            host.stop().await
        }
        status = host.ended() => anyhow::bail!("expected the host to stay up, but it ended with {}", status?),
    }
}

/// Resolves when someone wants this program to end.
async fn interrupted() {
    let watched = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
    // Where a signal cannot be watched it keeps its usual effect, which is to end this process.
    let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = watched else { return std::future::pending().await };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
}
