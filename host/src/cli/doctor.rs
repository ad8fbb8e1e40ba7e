//! `turnhouse doctor`: what of this machine and its database would keep a host from working well, each with what to do.

use std::path::Path;
use std::time::Instant;

use serde_json::json;
use turnhouse::clock::{Clock, Timestamp};
use turnhouse::config::Config;
use turnhouse::sizing;
use turnhouse::store::{Finding, Health, Store};

use super::hosting::this_machine;
use super::output::{Output, Style};
use super::{CliError, Result, database};

const EXAMPLES: &str = "\
Examples:
  turnhouse doctor --data-dir /var/lib/turnhouse
  turnhouse doctor --json --config /etc/turnhouse.toml

Exit code 1 when something is bad; what is doubtful is told and passes.";

/// Look for what would keep a host from working well
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    database: database::DataArgs,
}

/// A replica's clock decides nothing where the database has one; logs and certificates still go by it.
const CLOCK_OFF_MS: u64 = 5_000;

/// Free space below which a busy host's disk is full soon.
const DISK_FREE_BYTES: u64 = 1 << 30;

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let config = args.database.load()?;
    let mut findings = machine(&config);
    findings.extend(disk(&config.data_dir));
    match args.database.open().await {
        Ok(store) => {
            findings.extend(of_store(&*store).await);
            store.close().await;
        }
        Err(error) => findings.push(Finding::bad("database", error.what(), error.advice())),
    }
    let bad = findings.iter().filter(|finding| finding.health == Health::Bad).count();
    if output.json {
        let items: Vec<_> = findings
            .iter()
            .map(|finding| {
                json!({"what": finding.what, "health": finding.health, "text": finding.text, "advice": finding.advice})
            })
            .collect();
        output.json(&json!({"healthy": bad == 0, "findings": items}));
    } else {
        let style = Style::of(&std::io::stdout());
        findings.iter().for_each(|finding| output.say(&told(finding, style)));
    }
    match bad {
        0 => Ok(()),
        1 => Err(CliError::failed("one thing is bad").help("a host does not work like this; see above")),
        more => {
            Err(CliError::failed(format!("{more} things are bad")).help("a host does not work like this; see above"))
        }
    }
}

fn told(finding: &Finding, style: Style) -> String {
    let mark = match finding.health {
        Health::Good => "good    ".to_owned(),
        Health::Doubtful => style.bold("doubtful"),
        Health::Bad => style.red("bad     "),
    };
    let mut text = format!("{mark}  {:9} {}", finding.what, finding.text);
    if !finding.advice.is_empty() {
        text.push_str(&format!("\n                    {}", finding.advice));
    }
    text
}

/// What the kernel allows, against what the limits want.
fn machine(config: &Config) -> Vec<Finding> {
    let machine = this_machine();
    let limits = config.clone().sized(&machine).limits;
    let misfits = sizing::misfits(&limits, &machine);
    if misfits.is_empty() {
        return vec![Finding::good("machine", format!("{} guests at once fit this machine", limits.host_running_max))];
    }
    let split = |misfit: String| match misfit.split_once(": ") {
        Some((text, advice)) => Finding::doubtful("machine", text, advice),
        None => Finding::doubtful("machine", misfit, ""),
    };
    misfits.into_iter().map(split).collect()
}

/// The data directory: database or not, compiled modules and their key lie there.
fn disk(data_dir: &Path) -> Vec<Finding> {
    // One that does not exist yet is made in its parent.
    let Some(there) = data_dir.ancestors().find(|dir| dir.exists()).or(Some(Path::new("."))) else { return Vec::new() };
    let mut findings = Vec::new();
    if rustix::fs::access(there, rustix::fs::Access::WRITE_OK).is_err() {
        let advice = "make it writable for this user, or name another --data-dir";
        findings.push(Finding::bad("disk", format!("{} cannot be written", there.display()), advice));
    }
    match rustix::fs::statvfs(there) {
        Ok(disk) => {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            let text = format!("{} MiB free at {}", free >> 20, there.display());
            findings.push(if free >= DISK_FREE_BYTES {
                Finding::good("disk", text)
            } else {
                Finding::doubtful("disk", text, "free some space: each turn keeps its message and its reply")
            });
        }
        Err(error) => {
            let text = format!("{}: {error}", there.display());
            findings.push(Finding::doubtful("disk", text, "look whether the data directory's disk is there"));
        }
    }
    findings
}

async fn of_store(store: &dyn Store) -> Vec<Finding> {
    let unanswered = |what, error: turnhouse::store::StoreError| {
        let error = database::failed(error);
        Finding::bad(what, error.what(), error.advice())
    };
    let mut findings = match store.examine().await {
        Ok(findings) => findings,
        Err(error) => vec![unanswered("database", error)],
    };
    let asked = Instant::now();
    match store.time().await {
        Ok(None) => {}
        Ok(Some(theirs)) => findings.push(clock(theirs, Clock::system().now(), asked.elapsed().as_millis() as u64)),
        Err(error) => findings.push(unanswered("clock", error)),
    }
    findings
}

/// Their answer lies anywhere within the round trip.
fn clock(theirs: Timestamp, ours: Timestamp, round_trip_ms: u64) -> Finding {
    let apart = theirs.0.abs_diff(ours.0).saturating_sub(round_trip_ms);
    if apart < CLOCK_OFF_MS {
        return Finding::good("clock", format!("within {} ms of the database's", apart + round_trip_ms));
    }
    Finding::doubtful(
        "clock",
        format!("{apart} ms from the database's"),
        "turns go by the database's clock, logs by this machine's: run a time daemon on both",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_is_doubtful_and_no_more() {
        assert_eq!(clock(Timestamp(10_000), Timestamp(10_900), 100).health, Health::Good);
        assert_eq!(clock(Timestamp(10_000), Timestamp(16_000), 2_000).health, Health::Good);
        let off = clock(Timestamp(10_000), Timestamp(610_000), 10);
        assert_eq!((off.health, off.text.as_str()), (Health::Doubtful, "599990 ms from the database's"));
    }

    #[test]
    fn a_disk_is_looked_at_where_its_directory_will_be() {
        let dir = tempfile::tempdir().unwrap();
        let findings = disk(&dir.path().join("not/yet/there"));
        assert!(findings.iter().all(|finding| finding.what == "disk" && finding.health != Health::Bad), "{findings:?}");
    }

    #[test]
    fn advice_stands_below_what_was_found() {
        let finding = Finding::bad("schema", "version 1", "run its migrations");
        assert_eq!(
            told(&finding, Style::plain()),
            "bad       schema    version 1\n                    run its migrations"
        );
    }
}
