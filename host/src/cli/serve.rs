//! `turnhouse serve`: a host, from its configuration to its drain.

use std::net::SocketAddr;

use serde_json::json;
use turnhouse::telemetry::LogFormat;

use super::Result;
use super::database::load_config;
use super::hosting::{Hosting, install_logs};
use super::output::Output;

const EXAMPLES: &str = "\
Examples:
  turnhouse serve --data-dir /var/lib/turnhouse
  turnhouse serve --database-url postgres://turnhouse@db.internal/turnhouse?sslmode=verify-full
  turnhouse serve --listen 0.0.0.0:8787 --config /etc/turnhouse.toml --log-format json

Every setting of the file is a variable too: TURNHOUSE_LIMITS__HOST_RUNNING_MAX=200. TURNHOUSE_LOG filters the log: info,turnhouse=debug,turnhouse::guest=off;\nwithout the last of these, what workers write into their own log is in it.
SIGTERM drains; a second one ends at once.";

/// Run a host
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Where the gateway listens; 127.0.0.1:8787 unless configured
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,

    #[command(flatten)]
    database: super::database::DataArgs,

    /// How log lines look; text on a terminal, else JSON
    #[arg(long, value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

/// Runs until it is told to end.
pub async fn run(args: Args, output: Output) -> Result {
    install_logs(args.log_format)?;
    let mut overrides = args.database.overrides();
    if let Some(listen) = args.listen {
        overrides.push(("listen", listen.to_string().into()));
    }
    let config = load_config(args.database.config_file().as_deref(), overrides)?;
    let hosting = Box::pin(Hosting::start(config)).await?;
    let (url, metrics) = (hosting.url()?, hosting.metrics_address()?);
    let ready = || {
        tracing::info!(%url, %metrics, "listening");
        if output.json {
            super::output::line(&json!({"url": url, "metrics": format!("http://{metrics}/metrics")}).to_string());
        } else {
            output.say(&format!("listening on {url}, metrics on http://{metrics}/metrics"));
        }
    };
    hosting.serve(ready, std::future::pending()).await
}
