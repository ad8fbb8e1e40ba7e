//! Connections: accepted, encrypted where a certificate is configured, served over HTTP/1.1 or HTTP/2, and let go.
//!
//! [`serve`] owns every task that it starts: one a connection, and those that write down which keys were used and follow the certificate. A
//! connection is bounded in its handshake and its first words, in what it may send as headers and how long it may take for them, in how often it
//! may take requests back, and in how long it may leave what was written to it unread; an address, in how many connections it has.

mod addresses;

mod idle;

mod stall;

mod tls;

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderValue, Request, header};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::Service as _;

use super::auth::Peer;
use crate::host::Host;
use addresses::Addresses;
use idle::{Answering, Requests};
use stall::{Patience, Unstalled};

pub use tls::Tls;

/// Request line and headers of HTTP/1.1.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// How many.
const HEADERS_MAX: usize = 64;
/// Headers of HTTP/2.
const HEADER_LIST_BYTES_MAX: u32 = 32 * 1024;
/// For a request's head to be whole; also how long an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Requests of one HTTP/2 connection at once.
const STREAMS_PER_CONNECTION_MAX: u32 = 200;
/// Requests of one HTTP/2 connection that its client has taken back before they were looked at (CVE-2023-44487): who does so more often is let go.
const RESETS_PENDING_MAX: usize = 20;
/// Requests of one HTTP/2 connection that were reset for its client's errors (CVE-2025-8671).
const RESETS_FOR_ERRORS_MAX: usize = 128;
/// How long a client may stand still: before it has said anything, and with unread answers, after which it comes back with `Last-Event-ID`.
const PATIENCE: Patience = Patience { opening: HEAD_TIMEOUT, unread: Duration::from_secs(60), idle: HEAD_TIMEOUT };
/// Connections beside those that `readers_host_max` readers hold.
const CONNECTIONS_SPARE: usize = 4_096;
/// Between attempts when no connection can be accepted: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often the last use of keys is written down.
const LAST_USE_EVERY: Duration = Duration::from_secs(60);
/// To who came over TLS: a year from now, too.
const TRANSPORT_SECURITY: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// Serves the gateway on `listener` without TLS until `shutdown`; then accepts nothing more, lets requests and streams end, and returns when they
/// have, or when `drain_timeout_ms` is over.
pub async fn serve(host: Host, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) {
    serve_on(host, listener, None, shutdown).await;
}

/// The same, with TLS where there is a certificate.
pub async fn serve_on(host: Host, listener: TcpListener, tls: Option<Tls>, shutdown: impl Future<Output = ()> + Send) {
    let limits = &host.config.limits;
    let door = Door {
        router: super::router(host.clone()),
        connections_max: limits.readers_host_max + CONNECTIONS_SPARE,
        addresses: Addresses::new(limits.connections_per_address_max, false),
        tls: tls.clone(),
        patience: PATIENCE,
        drain_timeout: Duration::from_millis(limits.drain_timeout_ms),
    };
    let stop = CancellationToken::new();
    let mut housekeeping = JoinSet::new();
    housekeeping.spawn(record_last_use(host, stop.clone()));
    if let Some(tls) = tls {
        let stop = stop.clone();
        housekeeping.spawn(async move {
            stop.run_until_cancelled_owned(tls.follow()).await;
        });
    }

    door.accept(listener, shutdown).await;

    stop.cancel();
    while housekeeping.join_next().await.is_some() {}
}

/// Who comes in, and to what.
struct Door {
    router: Router,
    connections_max: usize,
    addresses: Addresses,
    tls: Option<Tls>,
    patience: Patience,
    drain_timeout: Duration,
}

impl Door {
    async fn accept(self, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) {
        let builder = Arc::new(builder());
        let graceful = GracefulShutdown::new();
        let room = Arc::new(Semaphore::new(self.connections_max));
        let mut connections = JoinSet::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            let accepted = async {
                let permit = room.clone().acquire_owned().await.expect("it is never closed");
                (listener.accept().await, permit)
            };
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(ended) = connections.join_next(), if !connections.is_empty() => log_panic(ended),
                (accepted, permit) = accepted => match accepted {
                    Ok((stream, peer)) => {
                        // It costs whoever has too many a connection, and us nothing more.
                        let Some(connected) = self.addresses.admit(peer.ip()) else {
                            metrics::counter!("turnhouse_connections_refused_total", "reason" => "address").increment(1);
                            continue;
                        };
                        let connection = self.connection(&builder, stream, peer, graceful.watcher());
                        connections.spawn(async move {
                            connection.await;
                            drop((permit, connected));
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        let ended = async {
            graceful.shutdown().await;
            while let Some(ended) = connections.join_next().await {
                log_panic(ended);
            }
        };
        if tokio::time::timeout(self.drain_timeout, ended).await.is_err() {
            tracing::warn!(connections = connections.len(), "connections did not end in time and are closed");
        }
        connections.shutdown().await;
    }

    fn connection(
        &self,
        builder: &Arc<auto::Builder<TokioExecutor>>,
        stream: TcpStream,
        peer: SocketAddr,
        watcher: Watcher,
    ) -> impl Future<Output = ()> + Send + 'static {
        // Events are small and each matters now.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let (builder, router, patience) = (builder.clone(), self.router.clone(), self.patience);
        let tls = self.tls.clone();
        async move {
            match tls {
                None => {
                    speak(&builder, Unstalled::new(stream, patience), router, peer, watcher, patience.idle, false).await
                }
                Some(tls) => match tls.accept(stream).await {
                    Some(stream) => {
                        speak(&builder, Unstalled::new(stream, patience), router, peer, watcher, patience.idle, true)
                            .await
                    }
                    None => metrics::counter!("turnhouse_connections_refused_total", "reason" => "tls").increment(1),
                },
            }
        }
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .max_pending_accept_reset_streams(RESETS_PENDING_MAX)
        .max_local_error_reset_streams(RESETS_FOR_ERRORS_MAX)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(30));
    builder
}

/// Answers a connection's requests to its end.
async fn speak(
    builder: &auto::Builder<TokioExecutor>,
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    peer: SocketAddr,
    watcher: Watcher,
    idle: Duration,
    encrypted: bool,
) {
    let requests = Requests::default();
    let asked = requests.clone();
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer.ip()));
        let (answered, asked) = (router.clone().call(request), asked.begin());
        async move {
            let mut response = answered.await?;
            if encrypted {
                response.headers_mut().insert(header::STRICT_TRANSPORT_SECURITY, TRANSPORT_SECURITY);
            }
            Ok::<_, Infallible>(response.map(|body| Answering::new(body, asked)))
        }
    });
    let connection = watcher.watch(builder.serve_connection(TokioIo::new(io), service).into_owned());
    tokio::select! {
        ended = connection => {
            // What a client did to its connection is no error of ours.
            if let Err(error) = ended {
                tracing::debug!(error, %peer, "a connection ended early");
            }
        }
        () = requests.idle(idle) => tracing::debug!(%peer, "an idle connection is let go"),
    }
}

fn log_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task failed");
    }
}

/// Once a minute until `stop`; the host's drain does it a last time, before it closes the store.
async fn record_last_use(host: Host, stop: CancellationToken) {
    while stop.run_until_cancelled(tokio::time::sleep(LAST_USE_EVERY)).await.is_some() {
        if let Err(error) = host.keys.record_last_use().await {
            tracing::warn!(%error, "the last use of keys could not be recorded");
        }
    }
}

#[cfg(test)]
mod tests;
