//! A host's life as a process, for `serve` and `dev`: listen, start, serve, drain on a signal, end.
//!
//! Ports are taken before the database is opened, so that a second start fails without touching anything. On SIGTERM or SIGINT the host drains while
//! its gateway still answers (running turns tell their clients how they ended), then the gateway stops. A second signal ends the process at once:
//! what was running is claimed anew at the next start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use turnhouse::config::Config;
use turnhouse::host::Host;
use turnhouse::http;
use turnhouse::sizing::{self, Machine};
use turnhouse::store::StoreError;
use turnhouse::telemetry::{self, LogFormat};

use super::{CliError, Result, database};

/// How long open connections may take to end once the host has drained. By then every turn's stream has told its end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the recorder folds what it gathered.
const UPKEEP: Duration = Duration::from_secs(5);

/// Logs as `--log-format` says; without it, text where a terminal is.
pub fn install_logs(format: Option<LogFormat>) -> Result {
    use std::io::IsTerminal as _;
    let format = format.unwrap_or(if std::io::stderr().is_terminal() { LogFormat::Text } else { LogFormat::Json });
    telemetry::install_logs(format).map_err(|error| {
        CliError::usage(format!("{} is no filter: {error}", telemetry::LOG_VARIABLE))
            .help("write a level, or targets with levels: info,turnhouse=debug")
    })
}

/// What the kernel allows this process.
pub fn this_machine() -> Machine {
    use rustix::process::{Resource, getrlimit};
    let maps = std::fs::read_to_string("/proc/sys/vm/max_map_count");
    Machine {
        memory_maps_max: maps.ok().and_then(|text| text.trim().parse().ok()),
        address_space_max: getrlimit(Resource::As).current,
        files_max: getrlimit(Resource::Nofile).current,
    }
}

/// What to start for another process of this very program. Its name may have come to mean another version since.
fn this_program() -> Result<PathBuf> {
    if cfg!(target_os = "linux") {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    Ok(std::env::current_exe().context("cannot tell where this program is")?)
}

/// A host with its listeners.
pub struct Hosting {
    host: Host,
    gateway: TcpListener,
    tls: Option<http::Tls>,
    metrics: TcpListener,
    recorder: PrometheusHandle,
    signals: Signals,
}

impl Hosting {
    /// Takes the ports, opens the database, starts the host. Nothing is answered before [`Hosting::serve`].
    pub async fn start(mut config: Config) -> Result<Hosting> {
        let machine = this_machine();
        config = config.sized(&machine);
        for misfit in sizing::misfits(&config.limits, &machine) {
            tracing::warn!("{misfit}");
        }
        config.compiler = Some(this_program()?);
        let tls = config.tls.as_ref().map(http::Tls::load).transpose().map_err(|error| {
            CliError::from(error.context("cannot serve TLS"))
                .help("name a certificate and its key in PEM, both readable for the host's user, or leave [tls] out")
        })?;
        let gateway = listen(config.listen, "--listen").await?;
        let metrics = listen(config.metrics_listen, "TURNHOUSE_METRICS_LISTEN").await?;
        let recorder = telemetry::install_metrics().context("cannot install the metrics")?;
        // From here on a signal is waited for rather than obeyed by the kernel.
        let signals = Signals::install()?;
        let host = Box::pin(Host::start(config)).await.map_err(started_not)?;
        Ok(Hosting { host, gateway, tls, metrics, recorder, signals })
    }

    /// The host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Under which clients on this machine reach it.
    pub fn url(&self) -> Result<String> {
        let address = self.gateway.local_addr().context("cannot read the address")?;
        let ip = match address.ip() {
            ip if ip.is_unspecified() && ip.is_ipv4() => std::net::Ipv4Addr::LOCALHOST.into(),
            ip if ip.is_unspecified() => std::net::Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}", SocketAddr::new(ip, address.port())))
    }

    /// Where `/metrics` is.
    pub fn metrics_address(&self) -> Result<SocketAddr> {
        Ok(self.metrics.local_addr().context("cannot read the metrics' address")?)
    }

    /// Serves until a signal comes, `beside` ends in an error, or the gateway does; drains; ends. `ready` is called once connections are answered.
    pub async fn serve(self, ready: impl FnOnce(), beside: impl Future<Output = Result>) -> Result {
        let Hosting { host, gateway, tls, metrics, recorder, mut signals } = self;
        let drain_timeout = Duration::from_millis(host.config.limits.drain_timeout_ms);
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (serving, stopping) = (host.clone(), stop.clone());
        tasks.spawn(async move {
            http::serve_on(serving, gateway, tls, stopping.cancelled_owned()).await;
            anyhow::Ok(())
        });
        tasks.spawn(serve_metrics(metrics, recorder, stop.clone()));
        ready();
        let ended = tokio::select! {
            () = signals.next() => {
                tracing::info!(drain_timeout_ms = host.config.limits.drain_timeout_ms, "draining; a second signal ends at once");
                Ok(())
            }
            ended = beside => ended,
            Some(ended) = tasks.join_next() => Err(unexpected(ended)),
        };
        let drain = async {
            // The host keeps to its own bound; this one is for the case that it does not.
            let drained = tokio::time::timeout(drain_timeout + CLOSE_TIMEOUT, host.drain()).await;
            stop.cancel();
            let closed =
                tokio::time::timeout(CLOSE_TIMEOUT, async { while tasks.join_next().await.is_some() {} }).await;
            if closed.is_err() {
                tracing::info!("closing connections that are still open");
                tasks.shutdown().await;
            }
            drained.is_ok()
        };
        let drained = tokio::select! {
            drained = drain => drained,
            () = signals.next() => return Err(CliError::failed("ended at once, by a second signal")
                .help("what was running is taken up at the next start")),
        };
        ended?;
        if !drained {
            return Err(
                CliError::failed("draining took too long").help("what was running is taken up at the next start")
            );
        }
        tracing::info!("ended");
        Ok(())
    }
}

async fn listen(address: SocketAddr, setting: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let help = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!("does another host run there? choose another address with {setting}")
            }
            std::io::ErrorKind::PermissionDenied => {
                format!("ports below 1024 need rights; choose another with {setting}")
            }
            _ => format!("choose an address of this machine with {setting}"),
        };
        CliError::failed(format!("cannot listen on {address}: {error}")).help(help)
    })
}

fn started_not(error: anyhow::Error) -> CliError {
    const DOING: &str = "cannot start the host";
    match error.downcast::<StoreError>() {
        Ok(error) => database::failed(error).context(DOING),
        Err(error) => CliError::from(error.context(DOING)),
    }
}

fn unexpected(ended: Result<anyhow::Result<()>, tokio::task::JoinError>) -> CliError {
    match ended {
        Ok(Err(error)) => CliError::from(error.context("the gateway ended")),
        Ok(Ok(())) => CliError::failed("the gateway ended"),
        Err(_) => CliError::failed("the gateway panicked").help("the log says where; this is a bug"),
    }
}

async fn serve_metrics(
    listener: TcpListener,
    recorder: PrometheusHandle,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let upkeep = async {
        let mut ticks = tokio::time::interval(UPKEEP);
        loop {
            ticks.tick().await;
            recorder.run_upkeep();
        }
    };
    let served = axum::serve(listener, http::metrics_router(recorder.clone()));
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        served = served => Ok(served?),
        () = upkeep => Ok(()),
    }
}

/// The signals that ask a process to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install() -> Result<Signals> {
        let install = |kind| signal(kind).context("cannot wait for signals");
        Ok(Signals { terminate: install(SignalKind::terminate())?, interrupt: install(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Style;
    use super::*;

    #[tokio::test]
    async fn a_taken_port_is_said_to_be_taken() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let error = listen(taken.local_addr().unwrap(), "--listen").await.unwrap_err().render(Style::plain());
        assert!(
            error.contains("cannot listen on 127.0.0.1:") && error.contains("does another host run there?"),
            "{error}"
        );
    }

    #[test]
    fn a_host_that_cannot_start_says_what_to_do() {
        let in_use = started_not(StoreError::InUse("it is in use; end the other".into()).into()).render(Style::plain());
        assert_eq!(in_use, "error: cannot start the host: it is in use\n  help: end the other");
        let newer = started_not(StoreError::NewerSchema { found: 9, known: 1 }.into()).render(Style::plain());
        assert!(newer.contains("schema version 9") && newer.contains("newer"), "{newer}");
        let other = started_not(anyhow::anyhow!("no threads")).render(Style::plain());
        assert_eq!(other, "error: cannot start the host: no threads");
    }
}
