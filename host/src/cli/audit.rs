//! `turnhouse audit`: what was done in the key's org, and by whom.

use turnhouse::audit::Verb;

use super::Result;
use super::client::{Client, PageArgs, Server};
use super::output::Output;

const EXAMPLES: &str = "\
Examples:
  turnhouse audit
  turnhouse audit --verb agent.pin --since 2026-11-23T00:00:00Z
  turnhouse audit --resource agent/support --json";

/// Show who did what in the org, newest first; for its admins
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Only what this user did
    #[arg(long, value_name = "USER", group = "filter")]
    actor: Option<String>,
    /// Only this, such as agent.pin
    #[arg(long, value_parser = verb, group = "filter")]
    verb: Option<Verb>,
    /// Only what was done to this, such as agent/support
    #[arg(long, value_name = "RESOURCE", group = "filter")]
    resource: Option<String>,
    /// Not what was done before; RFC 3339
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Not what was done after; RFC 3339
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    #[command(flatten)]
    page: PageArgs,
    #[command(flatten)]
    server: Server,
}

fn verb(text: &str) -> Result<Verb, String> {
    Verb::parse(text).ok_or_else(|| {
        let known: Vec<&str> = Verb::ALL.iter().map(|verb| verb.as_str()).collect();
        format!("it is one of {}", known.join(", "))
    })
}

/// The audit as a table.
pub const COLUMNS: &[(&str, &str)] = &[
    ("AT", "/at"),
    ("ACTOR", "/actor"),
    ("CREDENTIAL", "/credential"),
    ("VERB", "/verb"),
    ("RESOURCE", "/resource"),
    ("DETAIL", "/detail"),
];

/// Runs it.
pub async fn run(args: Args, output: Output) -> Result {
    let verb = args.verb.map(|verb| verb.as_str().to_owned());
    let asked = [
        ("actor", args.actor),
        ("verb", verb),
        ("resource", args.resource),
        ("since", args.since),
        ("until", args.until),
    ];
    let asked: Vec<(&str, String)> = asked.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    let page = Client::new(&args.server)?.page_of("v1/audit", &args.page, &asked).await?;
    output.page(&page, COLUMNS);
    Ok(())
}
