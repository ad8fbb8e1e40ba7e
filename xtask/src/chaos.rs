//! `cargo xtask chaos`: breaks everything that can break around a turn, again and again, and checks that nothing of it was heard by a client that
//! should not have been.
//!
//! A durable PostgreSQL, a pooler, three replicas of the real program with a network of ours between them and the database, clients of several orgs.
//! The plan of faults and every client's choices follow from one seed. Then everything is let come to rest, and one checker reads what the clients
//! wrote down and what the tables hold. This file is the order of events; the parts are:
//!
//! - [`plan`]: what goes wrong when; [`stage`] carries it out on [`database`], [`pooler`], [`replica`] and its [`link`]
//! - [`speaker`]: what a client does, through the [`desk`]; it writes the [`record`]
//! - [`rules`] and [`check`]: what must hold of the record and of the [`tables`]; [`takeovers`]: how soon lost turns are somebody else's

mod check;
mod database;
mod desk;
mod dice;
mod link;
mod plan;
mod pooler;
mod reader;
mod record;
mod replica;
mod report;
mod rules;
mod service;
mod speaker;
mod stage;
mod tables;
mod takeovers;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tokio::task::{JoinSet, LocalSet};

use crate::setup::{self, Profile};
use check::Bounds;
use desk::{Desk, Org};
use dice::Dice;
use plan::Scene;
use record::Record;
use replica::Program;
use report::Findings;
use stage::{Cast, Stage};
use tables::Tables;
use takeovers::Watch;

const EXAMPLES: &str = "\
Examples:
  cargo xtask chaos --minutes 1              a minute of it, from a new seed
  cargo xtask chaos --seed 7 --minutes 30    half an hour: some 370 kills, 66 stops, 25 restarts of the database
  cargo xtask chaos --seed 7 --plan          what that would do, and when
  cargo xtask chaos --store sqlite           one host on its own database: kills, stops and drains";

/// Each fits several times between two faults.
const LEASE_TTL_MS: u64 = 2_500;
/// A lost turn is somebody else's so long after its holder's expiry at the latest.
const TAKEOVER_WITHIN_MS: u64 = 1_000;
/// Fewer lost replicas have no percentile.
const LOSSES_JUDGED_MIN: usize = 20;
const ATTEMPTS_MAX: i64 = 3;
const HOT_BYTES_MAX: i64 = 10 << 20;
/// What a client may still wait for once nothing is broken any more: the longest of a turn's clocks, and what comes after.
const REST_MAX: Duration = Duration::from_secs(150);

/// Where the turns are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum StoreKind {
    /// Three replicas on one database.
    Postgres,
    /// One host, whose database is a file of its own.
    Sqlite,
}

/// What the command line asks for.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// From which everything that is chosen follows; a new one when there is none
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// For how long things break; coming to rest takes a little more
    #[arg(long, value_name = "M", default_value_t = 1.0)]
    minutes: f64,
    /// Hosts on one database
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    replicas: u8,
    /// Clients of each org, of which there are three
    #[arg(long, default_value_t = 7)]
    clients: usize,
    /// Where the turns are kept
    #[arg(long, value_enum, default_value = "postgres")]
    store: StoreKind,
    /// No PgBouncer before the database
    #[arg(long)]
    no_pooler: bool,
    /// The release build: no named points at which it ends itself
    #[arg(long)]
    release: bool,
    /// This turnhouse, built already
    #[arg(long, value_name = "FILE", conflicts_with = "release")]
    program: Option<PathBuf>,
    /// Print what would be done, and do nothing
    #[arg(long)]
    plan: bool,
    /// Keep the servers' logs and files even if all is well
    #[arg(long)]
    keep: bool,
}

impl Options {
    fn scene(&self, seed: u64) -> Scene {
        let shared_store = self.store == StoreKind::Postgres;
        Scene {
            seed,
            length_ms: (self.minutes.clamp(0.1, 24.0 * 60.0) * 60_000.0) as u64,
            replicas: if shared_store { usize::from(self.replicas) } else { 1 },
            lease_ttl_ms: LEASE_TTL_MS,
            shared_store,
            pooler: shared_store && !self.no_pooler,
            kill_points: !self.release,
        }
    }

    /// The command that does the same again.
    fn again(&self, seed: u64) -> String {
        let mut command = format!("cargo xtask chaos --seed {seed} --minutes {}", self.minutes);
        let flags = [
            (self.replicas != 3, format!(" --replicas {}", self.replicas)),
            (self.clients != 7, format!(" --clients {}", self.clients)),
            (self.store == StoreKind::Sqlite, " --store sqlite".to_owned()),
            (self.no_pooler, " --no-pooler".to_owned()),
            (self.release, " --release".to_owned()),
            (
                self.program.is_some(),
                format!(" --program {}", self.program.as_deref().unwrap_or(Path::new("")).display()),
            ),
        ];
        flags.into_iter().filter(|(given, _)| *given).for_each(|(_, flag)| command.push_str(&flag));
        command
    }
}

pub async fn run(options: Options) -> Result<ExitCode> {
    let seed = options.seed.unwrap_or_else(|| {
        let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
        u64::try_from(now % 1_000_000).unwrap_or(0)
    });
    let scene = options.scene(seed);
    let steps = plan::plan(&scene);
    println!(
        "seed {seed}: {} faults in {} s; the same again: {}",
        steps.len(),
        scene.length_ms / 1_000,
        options.again(seed)
    );
    if options.plan {
        for step in &steps {
            println!("{:>9.1} s  {:<10}  {}", step.at_ms as f64 / 1_000.0, step.lane.to_string(), step.fault);
        }
        return Ok(ExitCode::SUCCESS);
    }
    setup::ensure_wasm_target()?;
    let (program, module) = build(&options)?;
    let scratch = scratch(scene.shared_store)?;
    let run = Run { options: &options, scene, steps, program, module, scratch: scratch.path().to_owned() };
    let local = LocalSet::new();
    let done = tokio::select! {
        done = local.run_until(run.all()) => done,
        // Returning ends the servers: each is killed when its handle goes.
        _ = tokio::signal::ctrl_c() => bail!("interrupted; seed {seed}"),
    };
    let well = matches!(done, Ok(true));
    if options.keep || !well {
        println!("the servers' logs and files are in {}", scratch.keep().display());
    }
    println!("seed {seed}; the same again: {}", options.again(seed));
    Ok(if done? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The program and the worker.
fn build(options: &Options) -> Result<(PathBuf, PathBuf)> {
    if let Some(program) = &options.program {
        let program = program.canonicalize().with_context(|| format!("cannot find {}", program.display()))?;
        return Ok((program, setup::build_guest(desk::AGENT)?));
    }
    let built = setup::build(if options.release { Profile::Release } else { Profile::Dev })?;
    let module = built.guest(desk::AGENT)?;
    Ok((built.program, module))
}

/// A directory that whoever runs the servers may reach, on a disk: the build's may lie in somebody's home, which is closed to them.
fn scratch(shared_store: bool) -> Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt as _;
    let scratch = if shared_store && rustix::process::geteuid().is_root() {
        tempfile::Builder::new().prefix("turnhouse-chaos-").tempdir_in("/var/tmp")?
    } else {
        setup::scratch_dir("chaos")?
    };
    std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755))?;
    Ok(scratch)
}

struct Run<'a> {
    options: &'a Options,
    scene: Scene,
    steps: Vec<plan::Step>,
    program: PathBuf,
    /// The worker's.
    module: PathBuf,
    scratch: PathBuf,
}

impl Run<'_> {
    /// From an empty directory to the verdict: whether everything held.
    async fn all(&self) -> Result<bool> {
        let began = Instant::now();
        let (stage, orgs) = self.set_up().await?;
        let mut replicas = Vec::new();
        let mut pooled = Vec::new();
        for replica in &stage.replicas {
            let replica = replica.lock().await;
            replicas.push(replica.address);
            pooled.push(replica.pooled);
        }
        let desk = Rc::new(Desk { replicas, orgs, record: RefCell::new(Record::new()), enough: Cell::new(false) });
        self.deploy(&desk).await?;
        println!(
            "{} replicas serve after {:.1} s; now things break",
            stage.replicas.len(),
            began.elapsed().as_secs_f64()
        );

        let epoch = SystemTime::UNIX_EPOCH.elapsed().context("the clock stands before 1970")?;
        *desk.record.borrow_mut() = Record::new();
        let watch = Rc::new(RefCell::new(Watch::new(i64::try_from(epoch.as_millis())?)));
        let mut background = JoinSet::new();
        background.spawn_local(takeovers::keep_looking(stage.clone(), watch.clone()));
        background.spawn_local(tell(desk.clone(), self.scene.length_ms));
        let mut speakers = JoinSet::new();
        for org in &desk.orgs {
            for index in 0..self.options.clients {
                speakers.spawn_local(speaker::Speaker::new(desk.clone(), self.scene.seed, org, index).talk());
            }
        }
        // The clients outlast the faults: who is still speaking then is heard by replicas that all stand.
        let played = stage.play(&self.steps, &desk).await;
        let left = self.scene.length_ms.saturating_sub(desk.record.borrow().now());
        if played.is_ok() {
            tokio::time::sleep(Duration::from_millis(left)).await;
        }
        played?;
        desk.enough.set(true);
        println!("nothing breaks any more; waiting for every turn's end");
        let rest = tokio::time::timeout(REST_MAX, async {
            while let Some(done) = speakers.join_next().await {
                done.context("a client panicked")?;
            }
            anyhow::Ok(())
        });
        match rest.await {
            Ok(done) => done?,
            Err(_) => {
                let what = format!("{REST_MAX:?} after the last fault {} clients still wait", speakers.len());
                desk.record.borrow_mut().violation("T1", what, vec![]);
            }
        }
        speakers.shutdown().await;
        self.look_again(&desk).await;
        let hot_bytes = self.judge(&stage, &desk).await?;
        background.shutdown().await;
        let watch = watch.borrow();
        let mut record = desk.record.borrow_mut();
        let judged = takeovers::undisturbed(&watch, &record.disturbances, &pooled, TAKEOVER_WITHIN_MS);
        let latencies = takeovers::latencies(judged.iter().copied());
        // Where the machine itself stands still for a moment, one figure says nothing.
        let p95 = report::percentile(&latencies, 95.0);
        if latencies.len() >= LOSSES_JUDGED_MIN && p95 > TAKEOVER_WITHIN_MS {
            let what = format!(
                "of one lost replica in twenty a turn was taken over later than {p95} ms after its lease had ended"
            );
            record.violation(
                "takeover",
                format!("{what}:{}", takeovers::later_than(&judged, TAKEOVER_WITHIN_MS)),
                vec![],
            );
        }
        let findings = Findings {
            takeovers: &watch.takeovers,
            stalls: &watch.stalls,
            judged,
            stops_with_takeover: takeovers::stops_with_takeover(&watch.takeovers, &record.disturbances),
            lease_ttl_ms: LEASE_TTL_MS,
            hot_bytes,
            looks: watch.looks,
        };
        println!("\n{}", report::summary(&record, &findings));
        if !record.violations.is_empty() {
            println!("{}", report::violations(&record));
        }
        Ok(record.violations.is_empty())
    }

    /// The servers, the orgs and their keys.
    async fn set_up(&self) -> Result<(Rc<Stage>, Vec<Org>)> {
        let skew = if self.scene.shared_store { stage::build_skew(&self.scratch)? } else { None };
        if skew.is_none() && self.scene.shared_store {
            println!("there is no C compiler: every clock stays right");
        }
        let program = Program { path: self.program.clone(), settings: settings(), skew };
        let cast =
            Cast { replicas: self.scene.replicas, shared_store: self.scene.shared_store, pooler: self.scene.pooler };
        let stage = Rc::new(Stage::set(&cast, &program, &self.scratch).await?);
        let mut orgs = Vec::new();
        {
            let replica = stage.replicas[0].lock().await;
            for name in ["ants", "bees", "wasps"] {
                service::output(&mut replica.command(&["orgs", "create", name, "--owner", "queen"])).await?;
                let mut create = replica.command(&["keys", "create", "--json", "--org", name, "--user", "queen"]);
                create.args(["--scopes", "turns,deploy,admin"]);
                let made: Value = serde_json::from_str(&service::output(&mut create).await?)?;
                let secret = ["secret", "key", "api_key"].iter().find_map(|field| made[field].as_str());
                let key = secret.filter(|key| key.starts_with("th_")).context("`keys create` shows no secret")?;
                orgs.push(Org { name: name.to_owned(), key: key.to_owned() });
            }
        }
        stage.start().await?;
        Ok((stage, orgs))
    }

    /// The worker, as the same agent in every org.
    async fn deploy(&self, desk: &Desk) -> Result<()> {
        let module = std::fs::read(&self.module)?;
        for org in &desk.orgs {
            let mut connection = crate::load::Connection::open(desk.replicas[0]).await?;
            let path = format!("/v1/workers/{}", desk::AGENT);
            let mut bytes = format!(
                "PUT {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Type: application/wasm\r\nContent-Length: {}\r\n\r\n",
                org.key,
                module.len()
            )
            .into_bytes();
            bytes.extend_from_slice(&module);
            let head = connection.send(&bytes).await?;
            let body = connection.body().await?;
            anyhow::ensure!(head.status < 300, "PUT {path}: {} {}", head.status, String::from_utf8_lossy(&body));
            let agent = json!({"worker": desk::AGENT, "limits": {"cpu_timeout_ms": 400}});
            desk.insist(org, ("PUT", &format!("/v1/agents/{}", desk::AGENT)), &agent).await?;
        }
        Ok(())
    }

    /// T2 and E2: what was told is told again, by whichever replica is asked; every turn's resource, and a sample of the streams from their start.
    async fn look_again(&self, desk: &Rc<Desk>) {
        let mut dice = Dice::new(self.scene.seed, "look again");
        let mut places: Vec<usize> = {
            let record = desk.record.borrow();
            let known =
                record.turns.iter().enumerate().filter(|(_, turn)| turn.id.is_some() && turn.deleted_at.is_none());
            known.map(|(place, _)| place).collect()
        };
        dice.shuffle(&mut places);
        println!("reading {} turns again", places.len().min(LOOK_AGAIN_MAX));
        let mut looking = JoinSet::new();
        let shares = 8;
        for share in 0..shares {
            let places: Vec<usize> = places.iter().copied().take(LOOK_AGAIN_MAX).skip(share).step_by(shares).collect();
            let (desk, dice) = (desk.clone(), Dice::new(self.scene.seed, &format!("look again {share}")));
            looking.spawn_local(reader::look_again(desk, dice, places));
        }
        while looking.join_next().await.is_some() {}
    }

    /// Lets everything come to rest and holds what was seen against the rules. What the hot table takes at the end.
    async fn judge(&self, stage: &Stage, desk: &Desk) -> Result<Option<i64>> {
        let mut found = check::record(&desk.record.borrow());
        let mut hot_bytes = None;
        if let Some(database) = &stage.database {
            let database = database.lock().await;
            let rested = Instant::now();
            while tables::markers(&database).await? > 0 && rested.elapsed() < Duration::from_secs(30) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let first = Tables::read(&database).await?;
            // Whoever thinks that it still holds a lease has noticed by now.
            tokio::time::sleep(Duration::from_millis(LEASE_TTL_MS + 1_000)).await;
            let left = stage.drain_all().await?;
            let second = Tables::read(&database).await?;
            found.extend(left.into_iter().map(|what| record::Violation { rule: "R6", what, turns: vec![] }));
            let bounds = Bounds { attempts_max: ATTEMPTS_MAX, hot_bytes_max: HOT_BYTES_MAX };
            found.extend(check::tables(&desk.record.borrow(), &first, bounds));
            found.extend(check::unchanged(&first, &second));
            hot_bytes = Some(first.hot_bytes);
        } else {
            let left = stage.drain_all().await?;
            found.extend(left.into_iter().map(|what| record::Violation { rule: "R6", what, turns: vec![] }));
        }
        let panics = stage.log_faults().await;
        found.extend(panics.into_iter().map(|what| record::Violation { rule: "panic", what, turns: vec![] }));
        let mut record = desk.record.borrow_mut();
        for violation in found {
            record.violation(violation.rule, violation.what, violation.turns);
        }
        Ok(hot_bytes)
    }
}

/// So many turns are read once more at the end.
const LOOK_AGAIN_MAX: usize = 6_000;

/// Clocks so short that many faults fit, and bounds so low that they are met.
fn settings() -> Vec<(String, String)> {
    let limits: [(&str, u64); 17] = [
        ("LEASE_TTL_MS", LEASE_TTL_MS),
        ("LEASE_RENEW_MS", 500),
        ("LEASE_MARGIN_MS", 700),
        ("ATTEMPTS_MAX", ATTEMPTS_MAX as u64),
        ("BACKOFF_MS", 100),
        ("BACKOFF_MS_MAX", 2_000),
        ("ADMISSION_TIMEOUT_MS", 45_000),
        ("QUEUE_TIMEOUT_MS", 90_000),
        ("TURN_TIMEOUT_MS", 15_000),
        ("IDLE_TIMEOUT_MS", 8_000),
        ("DRAIN_TIMEOUT_MS", 5_000),
        ("CANCEL_POLL_MS", 500),
        ("PING_MS", 5_000),
        ("ORG_RUNNING_MAX", 6),
        ("HOST_RUNNING_MAX", 64),
        ("CONVERSATION_QUEUE_MAX", 20),
        ("AUTH_FAILURES_PER_MINUTE", 1_000),
    ];
    let limits = limits.into_iter().map(|(name, value)| (format!("TURNHOUSE_LIMITS__{name}"), value.to_string()));
    limits.chain([("TURNHOUSE_LOG".to_owned(), "info".to_owned())]).collect()
}

/// Says now and then how far it is.
async fn tell(desk: Rc<Desk>, length_ms: u64) {
    loop {
        tokio::time::sleep(Duration::from_secs(15)).await;
        let record = desk.record.borrow();
        let ended = record.turns.iter().filter(|turn| turn.is_over()).count();
        println!(
            "{:>5} of {} s: {} faults, {} messages, {ended} ended, {} violations",
            record.now() / 1_000,
            length_ms / 1_000,
            record.disturbances.len(),
            record.turns.len(),
            record.violations.len()
        );
    }
}
