//! A throwaway PostgreSQL server, for the tests with PgBouncer in transaction mode beside it: started in a temporary directory, reached over sockets in it,
//! gone with its owner.
//!
//! The tests' has its durability switched off: what they ask for is what is written, not whether it survives a power cut. The bench's is durable. Whoever
//! starts one needs no PostgreSQL running, only its programs; where they are missing they are installed, or it is said how.

use std::ffi::OsString;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// What names the server to the tests.
pub const URL_VARIABLE: &str = "TURNHOUSE_TEST_DATABASE_URL";
/// What names the pooler before it.
pub const POOLER_VARIABLE: &str = "TURNHOUSE_TEST_POOLER_URL";
/// The oldest that the shared store uses.
const VERSION_MIN: u32 = 15;
const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// A socket's path must be shorter than 108 bytes, and its own name is some 20 of them.
const SOCKET_DIR_MAX: usize = 60;
const POOLER_PORT: u16 = 6432;

/// Nothing of it survives a power cut.
const HASTY: &[&str] = &["fsync=off", "full_page_writes=off", "shared_buffers=128MB"];
/// What is committed is on the disk. Memory, and room for a write-ahead log that no short run fills, are a small server's; a compiler of queries would
/// be an hour's gain and a turn's loss.
const DURABLE: &[&str] = &[
    "fsync=on",
    "synchronous_commit=on",
    "full_page_writes=on",
    "shared_buffers=1GB",
    "max_wal_size=2GB",
    "checkpoint_timeout=15min",
    "jit=off",
];

/// A running server and its pooler, if it has one; stopped and removed when dropped.
pub struct Server {
    // In this order: the pooler's sessions end with it.
    _pooler: Option<Process>,
    _server: Process,
    /// Sockets and logs.
    dir: TempDir,
    _data: TempDir,
    programs: PathBuf,
}

/// Stopped when dropped.
struct Process(Child);

impl Server {
    /// Makes a cluster and starts a server on it, and the pooler. Installs PostgreSQL where it is missing and that can be done.
    pub fn start() -> Result<Server> {
        let server = Server::with(HASTY, None)?;
        let pooler = server.pooler()?;
        Ok(Server { _pooler: Some(pooler), ..server })
    }

    /// A server alone, with every commit on the disk: the one that holds `data_dir`, where the server's user can reach that, or else `/var/tmp`, which is no
    /// memory.
    pub fn start_durable(data_dir: &Path) -> Result<Server> {
        let reachable = User::that_serves()?.is_none() || data_dir.ancestors().all(others_may_enter);
        Server::with(DURABLE, Some(if reachable { data_dir } else { Path::new("/var/tmp") }))
    }

    fn with(settings: &[&str], data_dir: Option<&Path>) -> Result<Server> {
        let (programs, _) = ensure_programs()?;
        let user = User::that_serves()?;
        let dir = socket_dir()?;
        let beside = data_dir.unwrap_or(dir.path());
        let data = tempfile::Builder::new().prefix("postgres-").tempdir_in(beside);
        let data = data.with_context(|| format!("cannot make a directory in {}", beside.display()))?;
        for dir in [&dir, &data] {
            if let Some(user) = &user {
                chown(dir.path(), Some(user.uid), Some(user.gid)).context("cannot give the directory away")?;
            }
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700))?;
        }
        let log = dir.path().join("postgres.log");
        let mut initdb = run_as(user.as_ref(), &programs.join("initdb"));
        initdb.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "--pgdata"]);
        let made = initdb.arg(data.path()).current_dir(dir.path()).stdin(Stdio::null()).output();
        let made = made.context("cannot run initdb")?;
        ensure!(made.status.success(), "initdb failed: {}", String::from_utf8_lossy(&made.stderr).trim());

        let mut postgres = run_as(user.as_ref(), &programs.join("postgres"));
        postgres.current_dir(dir.path()).arg("-D").arg(data.path());
        let sockets = format!("unix_socket_directories={}", dir.path().display());
        let usual = ["listen_addresses=", &sockets, "max_connections=300", "log_min_messages=warning"];
        for setting in usual.iter().chain(settings) {
            postgres.args(["-c", setting]);
        }
        let mut server = Process::spawn(&mut postgres, &log)?;
        // Its eighth line is the server's state.
        let state = data.path().join("postmaster.pid");
        let is_ready = |text: String| text.lines().nth(7).is_some_and(|line| line.trim() == "ready");
        server.wait_until(&log, || std::fs::read_to_string(&state).is_ok_and(is_ready))?;

        Ok(Server { _pooler: None, _server: server, dir, _data: data, programs })
    }

    fn pooler(&self) -> Result<Process> {
        let dir = &self.dir;
        // Its own settings, and what it refuses, are Debian's.
        let (config, users) = (dir.path().join("pgbouncer.ini"), dir.path().join("users"));
        let place = dir.path().display();
        std::fs::write(&users, "\"postgres\" \"\"\n")?;
        let text = format!(
            "[databases]\n* = host={place} port=5432\n\n[pgbouncer]\nlisten_addr =\nlisten_port = {POOLER_PORT}\nunix_socket_dir = {place}\n\
             auth_type = trust\nauth_file = {}\npool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 500\nserver_idle_timeout = 5\n",
            users.display()
        );
        std::fs::write(&config, text)?;
        let log = dir.path().join("pgbouncer.log");
        let mut pooler = run_as(User::that_serves()?.as_ref(), &pgbouncer().context("there is no pgbouncer")?);
        let mut pooler = Process::spawn(pooler.arg("--quiet").arg(&config).current_dir(dir.path()), &log)?;
        let socket = dir.path().join(format!(".s.PGSQL.{POOLER_PORT}"));
        pooler.wait_until(&log, || socket.exists())?;
        Ok(pooler)
    }

    /// What tells the tests where they are: the server's and the pooler's URL.
    pub fn variables(&self) -> [(&'static str, String); 2] {
        let url = self.database("postgres");
        let pooler = format!("{url}&port={POOLER_PORT}");
        [(URL_VARIABLE, url), (POOLER_VARIABLE, pooler)]
    }

    /// The administrator's URL of a database.
    pub fn database(&self, name: &str) -> String {
        format!("postgres://postgres@localhost/{name}?host={}", self.dir.path().display())
    }

    /// Runs statements in a database and returns what they answer: a line a row, columns apart by `|`.
    pub fn query(&self, database: &str, statements: &str) -> Result<String> {
        let mut psql = Command::new(self.programs.join("psql"));
        psql.args(["--no-psqlrc", "--no-align", "--tuples-only", "--quiet", "--set=ON_ERROR_STOP=1", "--command"]);
        let output = psql.arg(statements).arg(self.database(database)).stdin(Stdio::null()).output();
        let output = output.context("cannot run psql")?;
        ensure!(output.status.success(), "{statements}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}

impl Process {
    fn spawn(command: &mut Command, log: &Path) -> Result<Process> {
        let file = std::fs::File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let command = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Ok(Process(command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?))
    }

    fn wait_until(&mut self, log: &Path, is_ready: impl Fn() -> bool) -> Result<()> {
        let began = Instant::now();
        while !is_ready() {
            let ended = self.0.try_wait()?;
            if ended.is_some() || began.elapsed() > START_TIMEOUT {
                let name = log.file_stem().unwrap_or_default().display();
                bail!("{name} did not start: {}", std::fs::read_to_string(log).unwrap_or_default().trim());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Ok(pid) = i32::try_from(self.0.id()) else { return };
        // Fast shutdown: it ends its sessions itself.
        if let Some(pid) = Pid::from_raw(pid) {
            let _ = kill_process(pid, Signal::INT);
        }
        let began = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) {
            if began.elapsed() > STOP_TIMEOUT {
                let _ = self.0.kill();
                let _ = self.0.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The directory of PostgreSQL's programs, and PgBouncer; installed where they are missing and that can be done.
pub fn ensure_programs() -> Result<(PathBuf, PathBuf)> {
    if programs().is_none() || pgbouncer().is_none() {
        install()?;
    }
    let missing = "they were installed, and their programs are not where they were expected";
    programs().zip(pgbouncer()).context(missing)
}

/// Whom the server runs as: it refuses to run as root.
#[derive(Debug, Clone, Copy)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

impl User {
    /// `None`: whoever we are will do.
    pub fn that_serves() -> Result<Option<User>> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let users = std::fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        let user = ["postgres", "nobody"].iter().find_map(|name| User::parse(&users, name));
        user.map(Some)
            .context("PostgreSQL does not run as root, and this machine has neither a user postgres nor nobody")
    }

    fn parse(users: &str, name: &str) -> Option<User> {
        let fields: Vec<&str> =
            users.lines().map(|line| line.split(':').collect()).find(|f: &Vec<&str>| f[0] == name)?;
        Some(User { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? })
    }
}

/// A command that runs as this user, and gets SIGINT when we die: not even `kill -9` leaves a server behind.
pub fn run_as(user: Option<&User>, program: &Path) -> Command {
    use std::os::unix::process::CommandExt as _;
    let setpriv = which("setpriv");
    let mut command = match &setpriv {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            if let Some(User { uid, gid }) = user {
                command.arg(format!("--reuid={uid}")).arg(format!("--regid={gid}")).arg("--clear-groups");
            }
            command.args(["--pdeathsig=INT", "--"]).arg(program);
            command
        }
        None => {
            let mut command = Command::new(program);
            if let Some(user) = user {
                command.uid(user.uid).gid(user.gid);
            }
            command
        }
    };
    command.env_remove("PGDATA").env_remove("PGPORT").env_remove("PGHOST");
    command
}

fn others_may_enter(dir: &Path) -> bool {
    std::fs::metadata(dir).is_ok_and(|dir| dir.permissions().mode() & 0o001 != 0)
}

/// In the usual place for temporary files, or a shorter one.
fn socket_dir() -> Result<TempDir> {
    let usual = std::env::temp_dir();
    let short = if usual.as_os_str().len() <= SOCKET_DIR_MAX { usual } else { PathBuf::from("/tmp") };
    let made = tempfile::Builder::new().prefix("turnhouse-postgres-").tempdir_in(&short);
    made.with_context(|| format!("cannot make a directory in {}", short.display()))
}

pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin"));
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The directory of `initdb` and `postgres`: the newest of Debian's, which keeps them off the path, or the path's.
pub fn programs() -> Option<PathBuf> {
    let debians = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let versions = debians.filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path())));
    let newest = versions.filter(|(version, _)| *version >= VERSION_MIN).max().map(|(_, path)| path.join("bin"));
    let on_path = || which("postgres").and_then(|postgres| postgres.parent().map(Path::to_path_buf));
    newest.into_iter().chain(on_path()).find(|dir| dir.join("initdb").is_file() && dir.join("postgres").is_file())
}

fn pgbouncer() -> Option<PathBuf> {
    which("pgbouncer").or_else(|| Some(PathBuf::from("/usr/sbin/pgbouncer")).filter(|file| file.is_file()))
}

/// From Debian's packages, without the cluster and the running server that they would set up.
fn install() -> Result<()> {
    let advice = "the tests of the shared store need PostgreSQL 15 or newer and PgBouncer: install their servers (Debian and Ubuntu: postgresql \
                  pgbouncer; Fedora: postgresql-server pgbouncer; macOS: brew install postgresql pgbouncer), or name running ones in \
                  TURNHOUSE_TEST_DATABASE_URL, whose user may make databases and roles, and TURNHOUSE_TEST_POOLER_URL";
    ensure!(rustix::process::geteuid().is_root() && which("apt-get").is_some(), "{advice}");
    eprintln!("Installing PostgreSQL and PgBouncer, which the tests of the shared store start.");
    let apt = |arguments: &[&str]| -> Result<()> {
        let mut apt = Command::new("apt-get");
        apt.args(["-qq", "-y", "-o", "Dpkg::Use-Pty=0"]).args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        let status = apt.stdin(Stdio::null()).stdout(Stdio::null()).status().context("cannot run apt-get")?;
        ensure!(status.success(), "apt-get {} failed; {advice}", arguments.join(" "));
        Ok(())
    };
    apt(&["update"])?;
    apt(&["install", "--no-install-recommends", "postgresql-common"])?;
    let config = "/etc/postgresql-common/createcluster.conf";
    let text = std::fs::read_to_string(config).unwrap_or_default();
    std::fs::write(config, format!("{text}\ncreate_main_cluster = false\n"))
        .with_context(|| format!("cannot write {config}"))?;
    // A package starts what it installs unless this file says no.
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let ours = !policy.exists();
    if ours {
        std::fs::write(policy, "#!/bin/sh\nexit 101\n")?;
        std::fs::set_permissions(policy, std::fs::Permissions::from_mode(0o755))?;
    }
    let installed = apt(&["install", "--no-install-recommends", "postgresql", "pgbouncer"]);
    if ours {
        std::fs::remove_file(policy)?;
    }
    installed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_its_whole_name() {
        let users = "root:x:0:0::/root:/bin/sh\npostgres2:x:7:8::/:/bin/sh\npostgres:x:101:104:admin:/var:/bin/sh\n";
        let user = User::parse(users, "postgres").unwrap();
        assert_eq!((user.uid, user.gid), (101, 104));
        assert!(User::parse(users, "nobody").is_none());
    }
}
