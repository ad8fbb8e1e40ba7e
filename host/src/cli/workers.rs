//! `turnhouse workers`: list, show and delete workers. `turnhouse deploy` uploads them.

use clap::Subcommand;
use reqwest::Method;

use super::Result;
use super::client::{Client, PageArgs, Server};
use super::output::Output;
use turnhouse::ids::WorkerName;

const EXAMPLES: &str = "\
Examples:
  turnhouse workers list
  turnhouse workers show notes --json";

/// List, show and delete workers
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// The org's workers, each with its newest version
    #[command(after_help = "Example:\n  turnhouse workers list --limit 10")]
    List {
        #[command(flatten)]
        page: PageArgs,
        #[command(flatten)]
        server: Server,
    },
    /// A worker's versions, newest first
    #[command(after_help = "Example:\n  turnhouse workers show notes")]
    Show(One),
    /// Delete a worker with all its versions, unless an agent uses it
    #[command(after_help = "Example:\n  turnhouse workers delete notes")]
    Delete(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// The worker
    worker: WorkerName,
    #[command(flatten)]
    server: Server,
}

const COLUMNS: &[(&str, &str)] = &[
    ("WORKER", "/id"),
    ("VERSION", "/version"),
    ("BYTES", "/size_bytes"),
    ("DIGEST", "/digest"),
    ("CREATED", "/created_at"),
];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    match args.action {
        Action::List { page, server } => output.page(&Client::new(&server)?.page("v1/workers", &page).await?, COLUMNS),
        Action::Show(one) => {
            let versions = Client::new(&one.server)?.get(&format!("v1/workers/{}", one.worker)).await?;
            output.page(&versions, COLUMNS);
        }
        Action::Delete(one) => {
            let client = Client::new(&one.server)?;
            client.call(Method::DELETE, &format!("v1/workers/{}", one.worker)).await?;
            output.done("deleted", "worker", one.worker.as_str());
        }
    }
    Ok(())
}
