//! The servers of a run, and what is done to them: carries out the plan, lane by lane, and writes down when what was disturbed and stood again.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tokio::sync::Mutex;

use super::database::Database;
use super::desk::Desk;
use super::link::Weather;
use super::plan::{Fault, Lane, Step};
use super::pooler::Pooler;
use super::record::{Disturbance, Record};
use super::replica::{Program, Replica};
use super::service;
use crate::postgres::{self, User};

/// A replica that was to end itself at a point it does not pass is killed from outside after this.
const ENDS_ITSELF_WITHIN: Duration = Duration::from_secs(4);
/// A replica that has nothing to do and is asked to leave.
const LEAVES_WITHIN: Duration = Duration::from_secs(3);

pub struct Stage {
    pub replicas: Vec<Mutex<Replica>>,
    pub database: Option<Mutex<Database>>,
    pub pooler: Option<Mutex<Pooler>>,
}

/// What to put on it.
#[derive(Debug, Clone)]
pub struct Cast {
    pub replicas: usize,
    pub shared_store: bool,
    pub pooler: bool,
}

impl Stage {
    /// Puts everything there and starts the servers; the replicas not yet.
    pub async fn set(cast: &Cast, program: &Program, scratch: &Path) -> Result<Stage> {
        let mut replicas = Vec::new();
        for index in 0..cast.replicas {
            replicas.push(Replica::new(index, program.clone(), scratch)?);
        }
        let (mut database, mut pooler) = (None, None);
        if cast.shared_store {
            let user = User::that_serves()?;
            let (programs, pgbouncer) = match (cast.pooler, postgres::programs()) {
                (false, Some(programs)) => (programs, None),
                _ => postgres::ensure_programs().map(|(programs, pgbouncer)| (programs, Some(pgbouncer)))?,
            };
            let made = Database::make(user, programs, scratch).await?;
            if let (true, Some(pgbouncer)) = (cast.pooler, pgbouncer) {
                pooler = Some(Pooler::make(user, pgbouncer, scratch, made.address).await?);
            }
            for (index, replica) in replicas.iter_mut().enumerate() {
                // Every other one, so that both ways are there with two replicas already.
                match pooler.as_ref().filter(|_| index % 2 == 1) {
                    Some(pooler) => replica.connect(pooler.address, true).await?,
                    None => replica.connect(made.address, false).await?,
                }
            }
            database = Some(made);
        }
        Ok(Stage {
            replicas: replicas.into_iter().map(Mutex::new).collect(),
            database: database.map(Mutex::new),
            pooler: pooler.map(Mutex::new),
        })
    }

    /// Starts every replica.
    pub async fn start(&self) -> Result<()> {
        for (index, replica) in self.replicas.iter().enumerate() {
            replica.lock().await.start(0, None).await.with_context(|| format!("replica {index}"))?;
        }
        Ok(())
    }

    /// Does what the plan says, each lane on its own. Ends when every lane is through and everything stands.
    pub async fn play(self: &Rc<Self>, steps: &[Step], desk: &Rc<Desk>) -> Result<()> {
        let mut lanes: Vec<(Lane, Vec<Step>)> = Vec::new();
        for step in steps {
            match lanes.iter_mut().find(|(lane, _)| *lane == step.lane) {
                Some((_, steps)) => steps.push(step.clone()),
                None => lanes.push((step.lane, vec![step.clone()])),
            }
        }
        let mut playing = tokio::task::JoinSet::new();
        for (lane, steps) in lanes {
            playing.spawn_local(self.clone().play_lane(lane, steps, desk.clone()));
        }
        while let Some(done) = playing.join_next().await {
            done.context("a lane panicked")??;
        }
        Ok(())
    }

    async fn play_lane(self: Rc<Self>, lane: Lane, steps: Vec<Step>, desk: Rc<Desk>) -> Result<()> {
        for step in steps {
            let now = desk.record.borrow().now();
            tokio::time::sleep(Duration::from_millis(step.at_ms.saturating_sub(now))).await;
            self.disturb(lane, &step.fault, &desk.record).await.with_context(|| format!("{lane}: {}", step.fault))?;
        }
        Ok(())
    }

    /// Does it, and undoes it.
    async fn disturb(&self, lane: Lane, fault: &Fault, record: &RefCell<Record>) -> Result<()> {
        let place = {
            let mut record = record.borrow_mut();
            let from = record.now();
            record.disturbances.push(Disturbance { lane, kind: fault.name(), what: fault.to_string(), from, to: None });
            record.disturbances.len() - 1
        };
        match lane {
            Lane::Replica(index) => self.disturb_replica(index, fault, record).await?,
            Lane::Database => {
                let Fault::DatabaseCrash { down_ms } = fault else { bail!("this is not done to a database") };
                let mut database = self.database.as_ref().context("there is no database")?.lock().await;
                database.crash().await?;
                tokio::time::sleep(Duration::from_millis(*down_ms)).await;
                database.start().await?;
            }
            Lane::Pooler => {
                let Fault::PoolerCrash { down_ms } = fault else { bail!("this is not done to a pooler") };
                let mut pooler = self.pooler.as_ref().context("there is no pooler")?.lock().await;
                pooler.crash().await?;
                tokio::time::sleep(Duration::from_millis(*down_ms)).await;
                pooler.start().await?;
            }
        }
        let mut record = record.borrow_mut();
        let now = record.now();
        record.disturbances[place].to = Some(now);
        Ok(())
    }

    async fn disturb_replica(&self, index: usize, fault: &Fault, record: &RefCell<Record>) -> Result<()> {
        let replica = &mut *self.replicas[index].lock().await;
        if let Some(status) = replica.ended_by_itself()? {
            let what = format!(
                "replica {index} ended, {status}, and nobody had asked it to; {}",
                service::log_tail(&replica.log())
            );
            record.borrow_mut().violation("R4", what, vec![]);
            start(replica, 0, None).await?;
        }
        let wait = |ms: u64| tokio::time::sleep(Duration::from_millis(ms));
        match *fault {
            Fault::Kill { down_ms, clock_ms } => {
                replica.kill().await?;
                wait(down_ms).await;
                start(replica, clock_ms, None).await
            }
            Fault::KillAt { point, times, clock_ms } => {
                replica.kill().await?;
                // It may pass its point before it says that it serves.
                match replica.start(0, Some((point, times))).await {
                    Ok(()) => {
                        if replica.ends(ENDS_ITSELF_WITHIN).await? {
                            record.borrow_mut().count("kills at their point");
                        }
                    }
                    Err(_) => record.borrow_mut().count("kills at their point"),
                }
                start(replica, clock_ms, None).await
            }
            Fault::Pause { ms } => {
                replica.signal(Signal::STOP)?;
                wait(ms).await;
                replica.signal(Signal::CONT)
            }
            Fault::Drain { down_ms, clock_ms } => {
                match replica.drain().await? {
                    Some(status) if status.success() => {}
                    Some(status) => {
                        // It says so when its store kept it from giving its turns back.
                        record.borrow_mut().count("drains that ended with an error");
                        eprintln!("  replica {index} left with {status} when it was drained");
                    }
                    None => {
                        let what =
                            format!("replica {index} had not left 20 s after SIGTERM, with drain_timeout_ms at 5 000");
                        record.borrow_mut().violation("R6", what, vec![]);
                    }
                }
                wait(down_ms).await;
                start(replica, clock_ms, None).await
            }
            Fault::Cut { ms } => weather(replica, Weather::Cut, ms, false).await,
            Fault::Slow { ms, by_ms } => weather(replica, Weather::Slow(Duration::from_millis(by_ms)), ms, false).await,
            Fault::Hole { ms, resets } => weather(replica, Weather::Hole, ms, resets).await,
            Fault::DatabaseCrash { .. } | Fault::PoolerCrash { .. } => bail!("this is not done to a replica"),
        }
    }

    /// Asks every replica to leave, one after the other, and says which did not do so well. None has anything to do.
    pub async fn drain_all(&self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for replica in &self.replicas {
            let mut replica = replica.lock().await;
            if !replica.running() {
                continue;
            }
            let (name, asked) = (replica.name.clone(), Instant::now());
            match replica.drain().await? {
                Some(status) if status.success() => {}
                Some(status) => {
                    wrong.push(format!("{name}, idle, left with {status}; {}", service::log_tail(&replica.log())));
                }
                None => wrong.push(format!("{name}, idle, did not leave")),
            }
            if asked.elapsed() > LEAVES_WITHIN {
                wrong.push(format!("{name}, idle, took {:.1} s to leave", asked.elapsed().as_secs_f64()));
            }
        }
        Ok(wrong)
    }

    /// What the replicas' logs have of panics and of errors of ours.
    pub async fn log_faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for replica in &self.replicas {
            let replica = replica.lock().await;
            let text = std::fs::read_to_string(replica.log()).unwrap_or_default();
            let panics = text.lines().filter(|line| line.contains("this is a bug of the host"));
            faults.extend(panics.map(|line| format!("{}: {line}", replica.name)));
        }
        faults
    }
}

/// A database that is away keeps a host from starting: that is no fault of its own, so it is started again until the database is back.
async fn start(replica: &mut Replica, clock_ms: i64, kill: Option<(&str, u64)>) -> Result<()> {
    const TRIES: usize = 60;
    for _ in 1..TRIES {
        if replica.start(clock_ms, kill).await.is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    replica.start(clock_ms, kill).await
}

async fn weather(replica: &Replica, weather: Weather, ms: u64, resets: bool) -> Result<()> {
    replica.weather(weather);
    tokio::time::sleep(Duration::from_millis(ms)).await;
    if resets {
        replica.weather(Weather::Cut);
        // Long enough that every connection has noticed.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    replica.weather(Weather::Fair);
    Ok(())
}

/// Builds the library that makes a replica's clock wrong. `None` where there is no C compiler for it.
pub fn build_skew(scratch: &Path) -> Result<Option<PathBuf>> {
    let source = scratch.join("skew.c");
    std::fs::write(&source, include_str!("skew.c"))?;
    let library = scratch.join("skew.so");
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
    match compiler.status() {
        Ok(status) => {
            ensure!(status.success(), "the C compiler failed; its message is above");
            Ok(Some(library))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("cannot run the C compiler"),
    }
}
