//! The store alone: accept (fused with the claim) and commit, in batches, on a directory of its own. What the whole host is measured against.
//!
//! `cargo run --release --example raw_store -- [TURNS] [SNAPSHOT_BYTES] [CLIENTS] [DIR]`

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use turnhouse::admission::{OnBusy, QueueBounds};
use turnhouse::clock::Clock;
use turnhouse::content::Content;
use turnhouse::event::{EventBatch, raw};
use turnhouse::gate::{self, Envelope, Grant, SessionMode};
use turnhouse::ids::{AgentId, ConversationId, OrgId, ReplicaId, TurnId, UserId};
use turnhouse::store::sqlite::{SqliteOptions, SqliteStore};
use turnhouse::store::{
    Accept, AcceptResult, Claimed, Clocks, Commit, CommitResult, RunningBound, StagedSnapshot, Store, Write, Written,
};
use turnhouse::turn::{Outcome, Usage};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = |default: usize| args.next().map_or(Ok(default), |text| text.parse());
    let (turns, snapshot_bytes, clients) = (number(50_000)?, number(0)?, number(64)?);
    let dir = tempfile::tempdir()?;
    let data_dir = std::env::args().nth(4).map_or_else(|| dir.path().to_owned(), PathBuf::from);
    let (elapsed, slowest) = push(turns, snapshot_bytes, clients, data_dir).await?;
    let rate = turns as f64 / elapsed.as_secs_f64();
    println!(
        "{turns} turns, snapshots of {snapshot_bytes} bytes, {clients} conversations: {rate:.0} turns/s, slowest write {slowest:?}"
    );
    Ok(())
}

/// Each write accepts one turn of every conversation and ends those of the write before, as a journal under load does.
async fn push(
    turns: usize,
    snapshot_bytes: usize,
    clients: usize,
    data_dir: PathBuf,
) -> anyhow::Result<(Duration, Duration)> {
    let store = SqliteStore::open(SqliteOptions::new(data_dir)).await?;
    let clock = Clock::system();
    let holder = ReplicaId::new();
    store.register_replica(holder, clock.now(), 3_600_000).await?;
    let org = OrgId::parse("bench")?;
    let agent = AgentId::parse("echo")?;
    let user = UserId::parse("load")?;
    let body = Bytes::from(vec![0x5a; snapshot_bytes]);
    let accept = |client: usize| {
        let turn = TurnId::new();
        Accept {
            org: org.clone(),
            turn,
            agent: agent.clone(),
            envelope: Envelope {
                run_id: Some(turn.into()),
                org: Some(org.clone()),
                conversation: ConversationId::parse(&format!("c-{client}")).ok(),
                mode: SessionMode::Snapshot,
            },
            user: user.clone(),
            sees_all: false,
            message: Bytes::from_static(br#"{"text":"hello there, this is a message of some length"}"#),
            attachments: Vec::new(),
            dry_run: false,
            key: None,
            on_busy: OnBusy::Enqueue,
            collect: None,
            bounds: QueueBounds { conversation_queue_max: 20, org_queue_max: 20_000, host_queue_max: 100_000 },
            clocks: Clocks { admission_timeout_ms: 120_000, queue_timeout_ms: 3_600_000, turn_timeout_ms: 60_000 },
            attempts_max: 3,
            claim_for: Some((holder, RunningBound(250))),
        }
    };
    let commit = |claimed: &Claimed| -> Write {
        let snapshot = match (gate::decide(&claimed.envelope), &claimed.head, &claimed.worker) {
            (Ok(Grant::Shared(permit)), Some(head), Some(_)) if snapshot_bytes > 0 => {
                Some(StagedSnapshot { permit, parent: head.parent, body: body.clone() })
            }
            _ => None,
        };
        Write::Commit(Box::new(Commit {
            org: claimed.lease.org.clone(),
            turn: claimed.lease.turn,
            epoch: Some(claimed.lease.epoch),
            outcome: Outcome::Completed {
                reply: Content::text("hello there, this is a reply"),
                replaces_deltas: false,
            },
            snapshot,
            tail: EventBatch {
                first_seq: 1,
                events: vec![(
                    "output.delta".into(),
                    raw(&serde_json::json!({"text": "hello there, this is a reply"})),
                )],
            },
            usage: Some(Usage {
                cpu_ms: 0.1,
                wall_ms: 0.5,
                memory_peak_bytes: 1 << 20,
                host_calls: 2,
                ..Usage::default()
            }),
        }))
    };
    deploy(&store, &org, &agent, &clock).await?;

    let begin = Instant::now();
    let (mut done, mut running, mut slowest) = (0, Vec::<Claimed>::new(), Duration::ZERO);
    while done < turns {
        // The ends of the last write come before the accepts that need their lanes.
        let mut batch: Vec<Write> = running.iter().map(&commit).collect();
        batch.extend((0..clients).map(|client| Write::Accept(Box::new(accept(client)))));
        let wrote = Instant::now();
        let written = store.write(batch, clock.now()).await?;
        slowest = slowest.max(wrote.elapsed());
        running.clear();
        for written in written {
            match written {
                Written::Commit(CommitResult::Won(_)) => done += 1,
                Written::Accept(AcceptResult::Accepted { claimed: Some(claimed), .. }) => running.push(*claimed),
                other => anyhow::bail!("{other:?}"),
            }
        }
    }
    let elapsed = begin.elapsed();
    store.close().await;
    Ok((elapsed, slowest))
}

async fn deploy(store: &SqliteStore, org: &OrgId, agent: &AgentId, clock: &Clock) -> anyhow::Result<()> {
    use turnhouse::agent::AgentSettings;
    let worker = turnhouse::ids::WorkerName::parse("echo")?;
    let wasm = Bytes::from_static(b"\0asm");
    let by = turnhouse::audit::Actor::command_line();
    store.put_worker(org, &worker, [0; 32], wasm, Vec::new(), 0.0, 10, 10, clock.now(), &by).await?;
    store.put_agent(org, agent, AgentSettings::of(worker), 10, clock.now(), &by).await?;
    Ok(())
}
