//! Several hosts at once on one database, in real time: batches that meet, leases that expire while their owners go on talking, claims that race,
//! cancels and interrupts from outside. Nobody coordinates them but the database. What a history must not hold is looked for in the answers while
//! it goes on, in samples of the tables, and in the tables afterwards.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sqlx::Row;

use super::tests::Database;
use super::*;
use crate::admission::{OnBusy, Refusal};
use crate::event::EventBatch;
use crate::gate::{self, Grant};
use crate::ids::{OrgId, ReplicaId, TurnId};
use crate::lease::{Epoch, Lease};
use crate::store::conformance::{
    BOUNDS, agent, by, cancelled, conversation, deltas, failed, org, replied, user, worker,
};
use crate::store::{
    Accept, AcceptResult, Append, ClaimRequest, Claimed, Clocks, Commit, CommitResult, Fenced, Requeue, RunningBound,
    StagedSnapshot, Store, Write, Written,
};
use crate::turn::{FailureCode, Outcome};

mod flaws;

const HOSTS: usize = 4;
const TTL_MS: u64 = 250;
const ORG_RUNNING_MAX: usize = 5;
/// Of zeta's one agent; acme's has no bound of its own.
const AGENT_RUNNING_MAX: u32 = 3;
const ATTEMPTS_MAX: u32 = 40;

/// What all hosts know of the history together.
#[derive(Default)]
struct Ledger {
    accepted: Vec<(OrgId, TurnId)>,
    /// Won ends, and under which epoch they were asked for.
    ended: HashMap<(OrgId, TurnId), u32>,
    /// The newest epoch that a claim has handed out, and all of them.
    newest: HashMap<TurnId, Epoch>,
    handed_out: HashSet<(TurnId, Epoch)>,
    /// Turns that have begun an effect; they never start again.
    effects: HashSet<TurnId>,
    violations: Vec<String>,
    turns: usize,
    takeovers: usize,
    stale: usize,
}

impl Ledger {
    /// Enough has happened for a silence to mean something.
    fn is_hard(&self) -> bool {
        self.turns > 300 && self.takeovers > 10 && self.stale > 10
    }

    fn violated(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    fn claimed(&mut self, claimed: &Claimed) {
        let (turn, epoch) = (claimed.lease.turn, claimed.lease.epoch);
        if !self.handed_out.insert((turn, epoch)) {
            self.violated(format!("E1: epoch {epoch} of {turn} was handed out twice"));
        }
        let newest = self.newest.entry(turn).or_default();
        *newest = (*newest).max(epoch);
        if claimed.refused.is_some() {
            return;
        }
        if gate::decide(&claimed.envelope).is_err() {
            self.violated(format!("S1: {turn} runs, and the gate refuses it"));
        }
        if self.effects.contains(&turn) {
            self.violated(format!("R1: {turn} runs again after its effect"));
        }
        self.takeovers += usize::from(claimed.restarted);
    }
}

struct Host {
    store: Arc<PostgresStore>,
    ledger: Arc<Mutex<Ledger>>,
    random: u64,
    id: ReplicaId,
    held: Vec<Claimed>,
    /// What an earlier incarnation held, and still believes to.
    zombies: Vec<Claimed>,
}

impl Host {
    fn below(&mut self, n: usize) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.random >> 33).unwrap() % n
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn message(&mut self) -> Accept {
        let (turn, org) = (TurnId::new(), org(["acme", "zeta"][self.below(2)]));
        // Many to one conversation, and now and then more conversations than may run at once.
        let lanes = if self.chance(50) { 2 } else { 9 };
        let lane = self.below(lanes);
        let mut envelope = crate::gate::Envelope {
            run_id: Some(turn.into()),
            org: Some(org.clone()),
            conversation: Some(conversation(&format!("c-{lane}"))),
            mode: crate::gate::SessionMode::Snapshot,
        };
        if self.chance(3) {
            envelope.conversation = None;
        }
        Accept {
            org,
            turn,
            agent: agent(),
            envelope,
            user: user("ann"),
            sees_all: true,
            message: bytes::Bytes::from_static(br#"{"text":"hi"}"#),
            attachments: Vec::new(),
            dry_run: false,
            key: None,
            on_busy: if self.chance(3) { OnBusy::Interrupt } else { OnBusy::Enqueue },
            collect: None,
            bounds: BOUNDS,
            clocks: Clocks { admission_timeout_ms: 60_000, queue_timeout_ms: 60_000, turn_timeout_ms: 60_000 },
            attempts_max: ATTEMPTS_MAX,
            claim_for: self.chance(80).then_some((self.id, RunningBound(ORG_RUNNING_MAX))),
        }
    }

    fn commit(&mut self, claimed: &Claimed, outcome: Outcome) -> Write {
        let completes = matches!(outcome, Outcome::Completed { .. });
        let snapshot = match (&claimed.head, gate::decide(&claimed.envelope)) {
            (Some(head), Ok(Grant::Shared(permit))) if completes && self.chance(70) => {
                Some(StagedSnapshot { permit, parent: head.parent, body: bytes::Bytes::from_static(b"state") })
            }
            _ => None,
        };
        Write::Commit(Box::new(Commit {
            org: claimed.lease.org.clone(),
            turn: claimed.lease.turn,
            epoch: Some(claimed.lease.epoch),
            outcome,
            snapshot,
            tail: EventBatch::default(),
            usage: None,
        }))
    }

    /// One round: what this host held is spoken for, ended or given back, and something new comes.
    async fn round(&mut self, submits: bool) -> crate::store::Result<()> {
        let now = Timestamp(0);
        match self.below(10) {
            // Stopped for longer than its lease lasts, and it does not know.
            0 if submits => {
                tokio::time::sleep(Duration::from_millis(TTL_MS + 30)).await;
                self.zombies.append(&mut self.held);
            }
            _ => {
                if !self.store.renew_replica(self.id, now, TTL_MS).await? {
                    self.zombies.append(&mut self.held);
                    self.id = ReplicaId::new();
                    self.store.register_replica(self.id, now, TTL_MS).await?;
                }
            }
        }
        let mut batch = Vec::new();
        for claimed in std::mem::take(&mut self.held) {
            let lease = claimed.lease.clone();
            batch.push(Write::Append(Append { lease: lease.clone(), batch: deltas(1, &["a"]) }));
            match self.below(20) {
                0..11 => batch.push(self.commit(&claimed, replied("done"))),
                11 => {
                    batch.push(self.commit(&claimed, failed(FailureCode::TurnTimeout)));
                    batch.push(self.commit(&claimed, replied("late")));
                }
                12 | 13 => {
                    batch.push(Write::Requeue(Requeue { lease, delay_ms: 0 }));
                    self.zombies.push(claimed);
                }
                14 | 15 => {
                    batch.push(Write::BeginEffect(Append { lease: lease.clone(), batch: deltas(60, &["effect"]) }));
                    // A host that drains gives back what it has.
                    batch.push(Write::Requeue(Requeue { lease, delay_ms: 0 }));
                    self.zombies.push(claimed);
                }
                16 => self.zombies.push(claimed),
                _ => self.held.push(claimed),
            }
        }
        for claimed in std::mem::take(&mut self.zombies) {
            if self.chance(30) {
                batch.push(Write::Append(Append { lease: claimed.lease.clone(), batch: deltas(70, &["late"]) }));
                let outcome = if self.chance(50) { replied("zombie") } else { failed(FailureCode::WorkerTrapped) };
                batch.push(self.commit(&claimed, outcome));
            } else {
                self.zombies.push(claimed);
            }
        }
        if submits {
            for _ in 0..self.below(6) {
                batch.push(Write::Accept(Box::new(self.message())));
            }
            let newest = self.ledger.lock().accepted.iter().rev().take(30).cloned().collect::<Vec<_>>();
            if !newest.is_empty() && self.chance(20) {
                let (org, turn) = newest[self.below(newest.len())].clone();
                batch.push(Write::Commit(Box::new(Commit {
                    org,
                    turn,
                    epoch: None,
                    outcome: cancelled(),
                    snapshot: None,
                    tail: EventBatch::default(),
                    usage: None,
                })));
            }
        }
        batch.push(Write::Claim(ClaimRequest {
            holder: self.id,
            slots: 1 + self.below(6),
            org_running_max: RunningBound(ORG_RUNNING_MAX),
            backoff_ms: 20,
            backoff_ms_max: 40,
        }));
        // In any order: batches of two hosts meet in all ways.
        for place in (1..batch.len()).rev() {
            let other = self.below(place + 1);
            batch.swap(place, other);
        }
        self.write(batch).await?;
        self.sweep().await
    }

    async fn sweep(&mut self) -> crate::store::Result<()> {
        self.store.repair_lanes(Timestamp(0), 100).await?;
        let found = self.store.sweep(Timestamp(0), 3, 100).await?;
        let ends = found.overdue.into_iter().map(|overdue| {
            Write::Commit(Box::new(Commit {
                org: overdue.org,
                turn: overdue.turn,
                epoch: Some(overdue.epoch),
                outcome: failed(FailureCode::HostLost),
                snapshot: None,
                tail: EventBatch::default(),
                usage: None,
            }))
        });
        let ends: Vec<Write> = ends.collect();
        if ends.is_empty() { Ok(()) } else { self.write(ends).await }
    }

    async fn write(&mut self, batch: Vec<Write>) -> crate::store::Result<()> {
        // What everybody knows before this is sent: whoever speaks against it is refused, or the database is wrong.
        let known: Vec<Known> = batch.iter().map(|item| self.ledger.lock().known(item)).collect();
        let written = self.store.write(batch.clone(), Timestamp(0)).await?;
        let ledger = Arc::clone(&self.ledger);
        let mut ledger = ledger.lock();
        for ((item, written), known) in batch.iter().zip(written).zip(known) {
            match (item, written) {
                (_, Written::Failed(why)) => ledger.violated(format!("an item broke a constraint: {why}")),
                (Write::Accept(accept), Written::Accept(result)) => match result {
                    AcceptResult::Accepted { interrupted, claimed } => {
                        ledger.turns += 1;
                        ledger.accepted.push((accept.org.clone(), accept.turn));
                        for ended in interrupted {
                            *ledger.ended.entry((ended.org, ended.turn)).or_default() += 1;
                        }
                        if let Some(claimed) = claimed {
                            ledger.claimed(&claimed);
                            self.held.push(*claimed);
                        }
                    }
                    AcceptResult::Refused(Refusal::ConversationQueueFull | Refusal::OrgQueueFull { .. }) => {}
                    other => ledger.violated(format!("a message was answered with {other:?}")),
                },
                (Write::Claim(_), Written::Claim(claimed)) => {
                    for claimed in claimed {
                        ledger.claimed(&claimed);
                        if claimed.refused.is_none() {
                            self.held.push(claimed);
                        }
                    }
                }
                (Write::Append(append), Written::Append(fenced)) => ledger.spoke(&append.lease, fenced, known),
                (Write::BeginEffect(append), Written::Append(fenced)) => {
                    ledger.spoke(&append.lease, fenced, known);
                    if fenced == Fenced::Done {
                        ledger.effects.insert(append.lease.turn);
                    }
                }
                (Write::Requeue(requeue), Written::Requeue(fenced)) => {
                    ledger.spoke(&requeue.lease, fenced, known);
                    if fenced == Fenced::Done {
                        // Whoever gives back is fenced at once.
                        let newest = ledger.newest.entry(requeue.lease.turn).or_default();
                        *newest = (*newest).max(requeue.lease.epoch + 1);
                    }
                }
                (Write::Commit(commit), Written::Commit(result)) => match result {
                    CommitResult::Won(ended) => {
                        if commit.epoch.is_some_and(|epoch| epoch < known.newest) {
                            ledger.violated(format!(
                                "R2: epoch {:?} of {} ended it, and {} owns it",
                                commit.epoch, commit.turn, known.newest
                            ));
                        }
                        *ledger.ended.entry((ended.org, ended.turn)).or_default() += 1;
                    }
                    CommitResult::Lost => ledger.stale += 1,
                    CommitResult::SnapshotConflict => {
                        ledger.violated(format!("S3: {} did not start from the newest snapshot", commit.turn));
                    }
                },
                (item, written) => ledger.violated(format!("{item:?} was answered with {written:?}")),
            }
        }
        Ok(())
    }
}

impl Ledger {
    fn known(&self, item: &Write) -> Known {
        let (org, turn) = match item {
            Write::Append(append) | Write::BeginEffect(append) => (&append.lease.org, append.lease.turn),
            Write::Requeue(requeue) => (&requeue.lease.org, requeue.lease.turn),
            Write::Commit(commit) => (&commit.org, commit.turn),
            Write::Accept(_) | Write::Claim(_) => return Known::default(),
        };
        Known {
            newest: self.newest.get(&turn).copied().unwrap_or(0),
            ended: self.ended.contains_key(&(org.clone(), turn)),
        }
    }

    /// What was written under a lease.
    fn spoke(&mut self, lease: &Lease, fenced: Fenced, known: Known) {
        if fenced == Fenced::Stale {
            self.stale += 1;
            return;
        }
        if lease.epoch < known.newest {
            self.violated(format!("R2: epoch {} of {} spoke, and {} owns it", lease.epoch, lease.turn, known.newest));
        }
        if known.ended {
            self.violated(format!("E4: {} spoke after its end", lease.turn));
        }
    }
}

/// What was known of a turn before something was said for it.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    newest: Epoch,
    ended: bool,
}

/// What no moment may show. Each is one statement: one moment.
const SAMPLES: [(&str, &str); 6] = [
    (
        "an org's load is its markers",
        "SELECT 1 FROM (SELECT org_id, count(*) FILTER (WHERE state = 'waiting') AS waiting, count(*) FILTER (WHERE state = 'ready') AS ready,
                               count(*) FILTER (WHERE state = 'running') AS running FROM turn_markers GROUP BY org_id) m FULL JOIN org_load l USING (org_id)
          WHERE (coalesce(m.waiting, 0), coalesce(m.ready, 0), coalesce(m.running, 0)) IS DISTINCT FROM (l.waiting, l.ready, l.running)",
    ),
    ("O3: no more run than the org's bound allows", "SELECT 1 FROM turn_markers WHERE state = 'running' GROUP BY org_id HAVING count(*) > 5"),
    (
        "O3: no more of an agent's run or may start than its bound allows",
        "SELECT 1 FROM agent_load l WHERE l.running_max < (SELECT count(*) FROM turn_markers m WHERE m.org_id = l.org_id AND m.agent_id = l.agent_id
           AND m.state <> 'waiting' AND m.not_before < 9007199254740991)",
    ),
    (
        "O3: what is held has no room",
        "SELECT 1 FROM turn_markers m JOIN agent_load l USING (org_id, agent_id)
          WHERE m.state = 'ready' AND m.not_before = 9007199254740991 AND l.active < l.running_max",
    ),
    (
        "T9: nobody overtakes, and nobody is stranded",
        "SELECT 1 FROM turn_markers w WHERE state = 'waiting' AND NOT EXISTS (SELECT 1 FROM turn_markers a WHERE a.org_id = w.org_id
           AND a.agent_id = w.agent_id AND a.conversation_id = w.conversation_id AND a.seq < w.seq AND a.state <> 'waiting')",
    ),
    (
        "T1: a turn has its end or its marker",
        "SELECT 1 FROM turns t LEFT JOIN turn_markers m USING (org_id, turn_id) WHERE (t.outcome IS NULL) = (m.turn_id IS NULL)",
    ),
];

async fn sample(pool: &PgPool, ledger: &Mutex<Ledger>) {
    for (rule, sql) in SAMPLES {
        match sqlx::query(sql).fetch_all(pool).await {
            Ok(rows) if rows.is_empty() => {}
            Ok(rows) => ledger.lock().violated(format!("{rule}: {} times", rows.len())),
            Err(error) => ledger.lock().violated(format!("the tables cannot be read: {error}")),
        }
    }
}

/// Tortures a database for so long, or until something is wrong.
async fn torture(database: &Database, time: Duration) -> Ledger {
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let options = PostgresOptions { clock: Clock::Database, ..database.options() };
    let first = Arc::new(PostgresStore::open(options.clone()).await.unwrap());
    for id in ["acme", "zeta"] {
        first.create_org(&org(id), &user("root"), Timestamp(0), &by()).await.unwrap();
        let wasm = bytes::Bytes::from_static(b"x");
        first.put_worker(&org(id), &worker(), [7; 32], wasm, vec![], 1.0, 3, 2, Timestamp(0), &by()).await.unwrap();
        let mut settings = crate::agent::AgentSettings::of(worker());
        settings.limits.running_max = (id == "zeta").then_some(AGENT_RUNNING_MAX);
        first.put_agent(&org(id), &agent(), settings, 3, Timestamp(0), &by()).await.unwrap();
    }
    let until = Instant::now() + time;
    let mut hosts = Vec::new();
    for seed in 0..HOSTS {
        let store =
            if seed == 0 { first.clone() } else { Arc::new(PostgresStore::open(options.clone()).await.unwrap()) };
        let mut host = Host {
            store,
            ledger: ledger.clone(),
            random: (0x9E37_79B9 * (seed as u64 + 1)) ^ uuid::Uuid::now_v7().as_u128() as u64,
            id: ReplicaId::new(),
            held: Vec::new(),
            zombies: Vec::new(),
        };
        host.store.register_replica(host.id, Timestamp(0), TTL_MS).await.unwrap();
        hosts.push(tokio::spawn(async move {
            let done = |host: &Host| {
                let ledger = host.ledger.lock();
                // A busy machine is given longer, to have been through something.
                let over = Instant::now() > until && (ledger.is_hard() || Instant::now() > until + 4 * time);
                over || !ledger.violations.is_empty()
            };
            while !done(&host) {
                if let Err(error) = host.round(true).await {
                    host.ledger.lock().violated(format!("a host failed: {error}"));
                }
            }
            // No more messages: what is live ends.
            let mut rounds = 0;
            while host.ledger.lock().violations.is_empty()
                && host.store.live_counts().await.is_ok_and(|live| live.waiting + live.ready + live.running > 0)
            {
                rounds += 1;
                if rounds > 1_500 {
                    host.ledger.lock().violated("T1: turns never end");
                }
                if let Err(error) = host.round(false).await {
                    host.ledger.lock().violated(format!("a host failed: {error}"));
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }));
    }
    while hosts.iter().any(|host| !host.is_finished()) {
        sample(&first.pool, &ledger).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for host in hosts {
        host.await.unwrap();
    }
    sample(&first.pool, &ledger).await;
    let deadlocks = sqlx::query("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()");
    let deadlocks: i64 = deadlocks.fetch_one(&first.pool).await.unwrap().get(0);
    let mut ledger = std::mem::take(&mut *ledger.lock());
    if deadlocks > 0 {
        ledger.violated(format!("{deadlocks} deadlocks"));
    }
    for (turn, times) in ledger.ended.clone() {
        if times != 1 {
            ledger.violated(format!("T1: {turn:?} ended {times} times"));
        }
    }
    if ledger.violations.is_empty() && ledger.accepted.len() != ledger.ended.len() {
        let missing = format!("T1: {} were accepted and {} ended", ledger.accepted.len(), ledger.ended.len());
        ledger.violated(missing);
    }
    ledger
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_hosts_at_once_break_no_rule() {
    let database = Database::migrated().await;
    let ledger = torture(&database, Duration::from_secs(6)).await;
    println!("{} turns, {} restarts, {} late words", ledger.turns, ledger.takeovers, ledger.stale);
    assert_eq!(ledger.violations, Vec::<String>::new());
    assert!(ledger.is_hard(), "the torture was mild");
    super::tests::check_database(&database).await;
}
