//! `turnhouse status`: who is there and what is owed, asked of the database directly: also when no host answers.

use serde_json::json;
use turnhouse::clock::Clock;
use turnhouse::store::StoreStatus;

use super::output::Output;
use super::{Result, database};

const EXAMPLES: &str = "\
Examples:
  turnhouse status --data-dir /var/lib/turnhouse
  turnhouse status --json --database-url postgres://turnhouse@db/turnhouse";

/// Show replicas and queues, from the database directly
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    database: database::DataArgs,
}

const REPLICAS: &[(&str, &str)] =
    &[("REPLICA", "/id"), ("STATE", "/state"), ("RUNNING", "/running"), ("LEASE", "/lease")];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let store = args.database.open().await?;
    let status = store.status(Clock::system().now()).await.map_err(database::failed);
    store.close().await;
    let status = document(&status?);
    if output.json {
        output.json(&status);
        return Ok(());
    }
    let number = |name: &str| status[name].as_u64().unwrap_or_default();
    let age = |name: &str| status[name].as_u64().map_or("-".to_owned(), span);
    output.say(&format!(
        "{} {}, schema {}",
        status["store"].as_str().unwrap_or_default(),
        status["place"].as_str().unwrap_or_default(),
        status["schema_version"]
    ));
    output.say(&format!(
        "{} running, {} ready for a slot, {} waiting behind others; {} overdue",
        number("running"),
        number("ready"),
        number("waiting"),
        number("overdue")
    ));
    output.say(&format!("the oldest is {} old, the next has been ready for {}", age("oldest_ms"), age("lag_ms")));
    output.page(&json!({"items": status["replicas"], "next": null}), REPLICAS);
    Ok(())
}

fn document(status: &StoreStatus) -> serde_json::Value {
    let replicas: Vec<_> = status
        .replicas
        .iter()
        .map(|replica| {
            let (state, lease) = match (replica.expires_in_ms, replica.draining) {
                // It has drained; a sweep forgets its row.
                (left, true) if left <= 0 && replica.running == 0 => ("ended", "-".to_owned()),
                (left, _) if left <= 0 => ("lost", format!("over for {}", span(left.unsigned_abs()))),
                (left, true) => ("draining", format!("{} left", span(left.unsigned_abs()))),
                (left, false) => ("live", format!("{} left", span(left.unsigned_abs()))),
            };
            json!({
                "id": replica.id, "state": state, "running": replica.running,
                "lease": lease, "expires_in_ms": replica.expires_in_ms,
            })
        })
        .collect();
    json!({
        "store": status.kind,
        "place": status.place,
        "schema_version": status.schema_version,
        "now": status.now,
        "running": status.live.running,
        "ready": status.live.ready,
        "waiting": status.live.waiting,
        "overdue": status.overdue,
        "oldest_ms": status.oldest_live_ms,
        "lag_ms": status.oldest_ready_ms,
        "replicas": replicas,
    })
}

/// As a person says it: `840 ms`, `12 s`, `3 min`, `5 h`, `2 days`.
fn span(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..120_000 => format!("{} s", ms / 1_000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} days", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use turnhouse::clock::Timestamp;
    use turnhouse::ids::ReplicaId;
    use turnhouse::store::{LiveCounts, ReplicaStatus};

    use super::*;

    #[test]
    fn a_replica_is_live_draining_ended_or_lost() {
        let replica = |expires_in_ms, draining, running| {
            let id = ReplicaId::new();
            ReplicaStatus { id, expires_in_ms, draining, running }
        };
        let status = StoreStatus {
            kind: "postgres",
            place: "db/turnhouse".to_owned(),
            schema_version: 3,
            schema_known: 3,
            now: Timestamp(0),
            replicas: vec![
                replica(-4_000, false, 2),
                replica(-9_000_000, true, 0),
                replica(9_000, true, 2),
                replica(9_000, false, 2),
            ],
            live: LiveCounts { waiting: 1, ready: 2, running: 6 },
            oldest_live_ms: Some(61_000),
            oldest_ready_ms: None,
            overdue: 0,
        };
        let document = document(&status);
        let states: Vec<_> = (0..4).map(|n| document["replicas"][n]["state"].clone()).collect();
        assert_eq!(states, ["lost", "ended", "draining", "live"]);
        assert_eq!(document["replicas"][0]["lease"], "over for 4 s");
        assert_eq!((&document["oldest_ms"], &document["lag_ms"]), (&json!(61_000), &json!(null)));
    }

    #[test]
    fn spans_are_said_in_one_unit() {
        let said = [0, 999, 61_000, 600_000, 7_200_000, 400_000_000].map(span);
        assert_eq!(said, ["0 ms", "999 ms", "61 s", "10 min", "2 h", "4 days"]);
    }
}
