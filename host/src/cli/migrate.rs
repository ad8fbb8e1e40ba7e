//! `turnhouse migrate`: brings the schema up to date without serving. A host does that itself where its role owns the tables; where it does not, this is run
//! as the role that does.

use serde_json::json;
use turnhouse::clock::Clock;

use super::output::Output;
use super::{Result, database};

const EXAMPLES: &str = "\
Examples:
  turnhouse migrate --database-url postgres://owner@db/turnhouse
  turnhouse migrate --data-dir /var/lib/turnhouse

On PostgreSQL it also mends the wall between orgs: the roles turnhouse_tenant and turnhouse_host,
their grants and policies, as after a restore into another cluster.";

/// Bring the database's schema up to date, as the role that owns it
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    database: database::DataArgs,
}

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let store = args.database.migrate().await?;
    let status = store.status(Clock::system().now()).await.map_err(database::failed);
    store.close().await;
    let status = status?;
    if output.json {
        output.json(&json!({"store": status.kind, "place": status.place, "schema_version": status.schema_version}));
    } else {
        output.say(&format!("{} {}: schema {}", status.kind, status.place, status.schema_version));
    }
    Ok(())
}
