//! Where hostile guests meet their host: runs them one after the other beside a neighbour, and measures what they leave.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};
use turnhouse_tests::{Client, TestHost, eventually};

/// A turn that is over its limit by more than this hangs. Lateness itself is shown, not asserted: it is the machine's as much as ours.
const LATE_MAX: Duration = Duration::from_secs(15);

/// The clocks of a hostile agent, in ms. The wall clock is the last of the three, so that each shows which one ended a guest.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    cpu_ms: u64,
    idle_ms: u64,
    wall_ms: u64,
}

/// For guests that only a clock ends.
pub const SHORT: Clocks = Clocks { cpu_ms: 200, idle_ms: 400, wall_ms: 700 };

/// For guests that something else ends, on a slow machine, too.
pub const LONG: Clocks = Clocks { cpu_ms: 20_000, idle_ms: 20_000, wall_ms: 30_000 };

/// The neighbour has at least so many turns beside each hostile one.
const NEIGHBOUR_TURNS_MIN: usize = 10;

/// Descriptors and memory maps of the process vary by a few: connections, the store's readers, threads that come and go.
const FDS_SPARE: usize = 16;
const MAPS_SPARE: usize = 64;

/// One hostile guest, what it is told, and how its turn must end.
pub struct Hostile {
    guest: &'static str,
    message: &'static str,
    ends: &'static str,
    check: fn(&Value),
}

impl Hostile {
    /// A guest whose turn ends with this code, or as `completed`.
    pub const fn new(guest: &'static str, message: &'static str, ends: &'static str) -> Hostile {
        Hostile { guest, message, ends, check: |_| {} }
    }

    /// The same; its turn, ended, is held against more.
    pub const fn and(self, check: fn(&Value)) -> Hostile {
        Hostile { check, ..self }
    }
}

/// A host with two tenants.
pub struct Arena {
    pub host: TestHost,
    /// Whose guests are hostile.
    pub mallory: Client,
    /// Who wants to be left alone.
    pub ann: Client,
    clocks: Clocks,
    /// What is counted is the process': one arena at a time.
    _alone: MutexGuard<'static, ()>,
}

impl Arena {
    /// Opens one whose hostile agents have these clocks.
    pub async fn open(clocks: Clocks) -> Arena {
        static ALONE: Mutex<()> = Mutex::const_new(());
        let _alone = ALONE.lock().await;
        let host = TestHost::start_with(|config| {
            config.limits.host_calls_max = 20_000_000;
            config.limits.emit_events_max = 2_000;
        })
        .await;
        let mallory = host.member("evil", "mallory", "admin").await;
        let ann = host.member("acme", "ann", "admin").await;
        ann.deploy("echo").await;
        assert_eq!(ann.say("echo", "c-1", "hi").await.completed().await, "hi");
        Arena { host, mallory, ann, clocks, _alone }
    }

    /// Uploads a guest, built or written by hand, and makes an agent of it that has little time.
    pub async fn deploy(&self, guest: &str) {
        let by_hand = turnhouse_workers::wat_names().iter().any(|name| name == guest);
        // Of both, the one with a compiler behind it.
        let built = turnhouse_workers::all_guests().any(|built| built.name == guest);
        let wasm = match by_hand && !built {
            true => wat::parse_str(turnhouse_workers::wat(guest)).expect("it is wat"),
            false => turnhouse_workers::bytes(guest),
        };
        self.deploy_bytes(guest, wasm).await;
    }

    pub async fn deploy_bytes(&self, guest: &str, wasm: Vec<u8>) {
        let (status, body) = self.mallory.upload(guest, wasm).await;
        assert!(status.is_success(), "{guest}: {status}: {body}");
        self.set_clocks(guest, self.clocks).await;
    }

    async fn set_clocks(&self, guest: &str, clocks: Clocks) {
        let Clocks { cpu_ms, idle_ms, wall_ms } = clocks;
        let limits = json!({ "cpu_timeout_ms": cpu_ms, "idle_timeout_ms": idle_ms, "turn_timeout_ms": wall_ms });
        self.mallory.set_agent(guest, guest, json!({ "limits": limits })).await;
    }

    /// The arena's for the clock that is to end it, and much of the others: on a busy machine a loop may not get its processor time before it is idle for too long.
    fn clocks_for(&self, ends: &str) -> Clocks {
        let short = self.clocks;
        match ends {
            "cpu_timeout" => Clocks { cpu_ms: short.cpu_ms, ..LONG },
            "idle_timeout" => Clocks { idle_ms: short.idle_ms, ..LONG },
            "turn_timeout" => Clocks { wall_ms: short.wall_ms, ..LONG },
            _ => short,
        }
    }

    /// Deploys and runs each, twice: the first time warms what is kept from turn to turn, the second must leave the process as it was. Then nothing may be left.
    pub async fn run(self, cases: &[Hostile]) {
        for case in cases {
            self.deploy(case.guest).await;
        }
        self.run_deployed(cases).await;
    }

    /// The same, of what is deployed.
    pub async fn run_deployed(self, cases: &[Hostile]) {
        println!(
            "{:<44} {:<22} {:>9} {:>9}   neighbour: turns, p50 ms, p99 ms",
            "guest and message", "ends", "after ms", "late ms"
        );
        for case in cases {
            self.run_one(case, true).await;
        }
        self.settled().await;
        let (files, process) = (names(self.host.data_dir()), Process::now());
        for case in cases {
            self.run_one(case, false).await;
        }
        self.settled().await;
        assert_eq!(names(self.host.data_dir()), files, "a file is left, or is gone");
        eventually("descriptors and memory maps are back", async || Process::now().is_near(process)).await;
        println!("before the second round {process:?}, after it {:?}", Process::now());
        self.host.stop().await;
    }

    async fn run_one(&self, case: &Hostile, shown: bool) {
        let name = format!("{} {:?}", case.guest, case.message);
        self.set_clocks(case.guest, self.clocks_for(case.ends)).await;
        let stop = Arc::new(AtomicBool::new(false));
        let neighbour = tokio::spawn(neighbour(self.ann.clone(), stop.clone()));
        let begun = Instant::now();
        let turn = self.mallory.say(case.guest, "c-1", case.message).await;
        let turn = turn.ended().await;
        let took = begun.elapsed();
        stop.store(true, Ordering::Relaxed);
        let mut times = neighbour.await.expect("every turn of the neighbour is answered");

        let ends = turn["failure"]["code"].as_str().or(turn["state"].as_str()).expect("a state");
        assert_eq!(ends, case.ends, "{name}: {turn}");
        let allowed_ms = match ends {
            "cpu_timeout" => self.clocks.cpu_ms,
            "idle_timeout" => self.clocks.idle_ms,
            "turn_timeout" => self.clocks.wall_ms,
            _ => 0,
        };
        let late = took.saturating_sub(Duration::from_millis(allowed_ms));
        assert!(late < LATE_MAX, "{name}: {late:?} late");
        if ends != "completed" {
            assert!(!turn["failure"]["detail"].as_str().expect("a detail").is_empty(), "{name}: {turn}");
            assert_eq!(turn["reply"], Value::Null, "{name}: {turn}");
        }
        (case.check)(&turn);
        if shown {
            times.sort();
            let ms = |time: Duration| time.as_secs_f64() * 1_000.0;
            let at = |share: f64| ms(times[((times.len() - 1) as f64 * share).round() as usize]);
            println!(
                "{name:<44} {ends:<22} {:>9.1} {:>9.1}   {:>5} {:>8.1} {:>8.1}",
                ms(took),
                ms(late),
                times.len(),
                at(0.5),
                at(0.99)
            );
        }
    }

    /// Waits until no slot is held and no turn lives.
    pub async fn settled(&self) {
        eventually("every slot is free", async || self.host.host.dispatch.slots.in_use() == 0).await;
        eventually("no turn lives", async || self.host.live().await == Default::default()).await;
        assert!(self.host.host.dispatch.running().is_empty(), "a run is still tracked");
    }
}

/// Has turns answered, one after the other, until it is told to stop; how long each took.
pub async fn neighbour(ann: Client, stop: Arc<AtomicBool>) -> Vec<Duration> {
    let mut times = Vec::new();
    while times.len() < NEIGHBOUR_TURNS_MIN || !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let said = format!("hello {}", times.len());
        assert_eq!(ann.say("echo", "c-1", &said).await.completed().await, said);
        times.push(begun.elapsed());
    }
    times
}

/// What this process holds of the machine.
#[derive(Debug, Clone, Copy)]
struct Process {
    fds: usize,
    maps: usize,
}

impl Process {
    fn now() -> Process {
        let fds = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let maps = std::fs::read_to_string("/proc/self/maps").map_or(0, |maps| maps.lines().count());
        Process { fds, maps }
    }

    fn is_near(self, before: Process) -> bool {
        self.fds <= before.fds + FDS_SPARE && self.maps <= before.maps + MAPS_SPARE
    }
}

/// Every file of a data directory.
fn names(data_dir: &Path) -> BTreeSet<std::path::PathBuf> {
    let mut names = BTreeSet::new();
    let mut todo = vec![data_dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
            match entry.path() {
                path if path.is_dir() => todo.push(path),
                // The database's own, which come and go with its connections.
                path if path.to_string_lossy().ends_with("-shm") || path.to_string_lossy().ends_with("-wal") => {}
                path => drop(names.insert(path)),
            }
        }
    }
    names
}
