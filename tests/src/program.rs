//! The real program, as a child process: what only a whole process shows — kills, signals, exit codes, the command line.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::PATIENCE;

/// The program of the profile that this test was built with. Built first, so that no test runs yesterday's.
pub fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let test = std::env::current_exe().expect("this test's own path");
        let profile_dir = test.parent().and_then(Path::parent).expect("target/<profile>/deps/<test>");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--package", "turnhouse", "--bin", "turnhouse"]);
        if profile_dir.ends_with("release") {
            build.arg("--release");
        }
        build.arg("--target-dir").arg(profile_dir.parent().expect("target"));
        build.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
        assert!(build.status().expect("cargo runs").success(), "the program builds");
        profile_dir.join("turnhouse")
    })
}

/// A command of the program, without anything of this process' own settings.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(path());
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TURNHOUSE_")) {
        command.env_remove(name);
    }
    command.args(arguments).env("TURNHOUSE_LOG", "warn").env("TURNHOUSE_METRICS_LISTEN", "127.0.0.1:0");
    command
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; −1 for a signal.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ran {
    /// Its standard output as JSON, having succeeded.
    #[track_caller]
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(self.stdout.trim()).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Runs a command to its end.
pub fn run(arguments: &[&str]) -> Ran {
    run_with(&mut command(arguments), b"")
}

/// The same, with something on its standard input.
pub fn run_with(command: &mut Command, stdin: &[u8]) -> Ran {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    // A program that does not read its input is no failure.
    let _ = child.stdin.take().expect("a pipe").write_all(stdin);
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A host in a process of its own. Dropping it kills it.
pub struct Program {
    child: Child,
    stdout: Option<BufReader<std::process::ChildStdout>>,
}

impl Program {
    /// Starts `turnhouse serve` on a data directory, with settings as variables.
    pub fn serve(data_dir: &Path, listen: &str, settings: &[(&str, &str)]) -> Program {
        let mut command = command(&["serve", "--json", "--listen", listen, "--data-dir"]);
        Program::spawn(command.arg(data_dir).envs(settings.iter().copied()))
    }

    /// Starts a command that goes on.
    pub fn spawn(command: &mut Command) -> Program {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it starts");
        let stdout = child.stdout.take().map(BufReader::new);
        Program { child, stdout }
    }

    /// Waits for the line that it prints when it is ready; `None` when it ends without one.
    pub fn ready(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.stdout.as_mut().expect("not read before").read_line(&mut line).expect("its output");
        serde_json::from_str(&line).ok()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id")).expect("a process id");
        // That it has ended meanwhile is as good.
        let _ = rustix::process::kill_process(pid, signal);
    }

    /// Waits for its end; kills it when it takes longer. Whether it ended by itself.
    pub fn ends_within(&mut self, time: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + time;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().expect("its state") {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.kill();
        None
    }

    /// Kills it, as `kill -9` does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end, and waits.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ends_within(PATIENCE).expect("it drains in time")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A free port of the loopback interface, for a host that comes back to it.
pub fn free_address() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").to_string()
}

/// Makes the org `acme` in a data directory, and a key of these scopes for one of its members.
pub fn member(data_dir: &Path, user: &str, scopes: &str) -> String {
    let data_dir = data_dir.to_str().expect("a path");
    let org = run(&["orgs", "create", "acme", "--data-dir", data_dir]);
    assert_eq!(org.code, 0, "{org:?}");
    let key =
        run(&["keys", "create", "--json", "--org", "acme", "--user", user, "--scopes", scopes, "--data-dir", data_dir]);
    key.json()["api_key"].as_str().expect("a key").to_owned()
}
