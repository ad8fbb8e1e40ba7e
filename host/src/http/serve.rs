//! Connections: accepted, served over HTTP/1.1 or HTTP/2, and let go.
//!
//! [`serve`] owns every task that it starts: one a connection, and one that writes down which keys were used. A connection is bounded in
//! what it may send as headers, in how long it may take for them, and in how long it may leave what was written to it unread.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tower::Service as _;

use super::auth::Peer;
use crate::host::Host;

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
/// How long a client may leave unread what was written to it. It comes back with `Last-Event-ID`.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections beside those that `readers_host_max` readers hold.
const CONNECTIONS_SPARE: usize = 4_096;
/// Between attempts when no connection can be accepted: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often the last use of keys is written down.
const LAST_USE_EVERY: Duration = Duration::from_secs(60);

/// Serves the gateway on `listener` until `shutdown`; then accepts nothing more, lets requests and streams end, and returns when they have,
/// or when `drain_timeout_ms` is over.
pub async fn serve(host: Host, listener: TcpListener, shutdown: impl Future<Output = ()> + Send) {
    let drain_timeout = Duration::from_millis(host.config.limits.drain_timeout_ms);
    let connections_max = host.config.limits.readers_host_max + CONNECTIONS_SPARE;
    let router = super::router(host.clone());
    let stop = CancellationToken::new();
    let mut housekeeping = JoinSet::new();
    housekeeping.spawn(record_last_use(host, stop.clone()));

    accept(listener, router, connections_max, drain_timeout, shutdown).await;

    stop.cancel();
    while housekeeping.join_next().await.is_some() {}
}

async fn accept(
    listener: TcpListener,
    router: Router,
    connections_max: usize,
    drain_timeout: Duration,
    shutdown: impl Future<Output = ()> + Send,
) {
    let builder = Arc::new(builder());
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(connections_max));
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
                    let connection = connection(&builder, stream, peer, router.clone(), &graceful);
                    connections.spawn(async move {
                        connection.await;
                        drop(permit);
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
    if tokio::time::timeout(drain_timeout, ended).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections did not end in time and are closed");
    }
    connections.shutdown().await;
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
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(30));
    builder
}

fn connection(
    builder: &Arc<auto::Builder<TokioExecutor>>,
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    graceful: &GracefulShutdown,
) -> impl Future<Output = ()> + Send + 'static {
    // Events are small and each matters now.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer.ip()));
        router.clone().call(request)
    });
    let io = TokioIo::new(Unstalled { stream, timeout: UNREAD_TIMEOUT, stalled: None });
    let connection = graceful.watch(builder.serve_connection(io, service).into_owned());
    async move {
        // What a client did to its connection is no error of ours.
        if let Err(error) = connection.await {
            tracing::debug!(error, %peer, "a connection ended early");
        }
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

/// A connection that fails when its other end reads nothing of what was written to it for `timeout`.
///
/// A stream's body is pulled, so that such a client costs little; but it would keep its permit for ever.
struct Unstalled<S> {
    stream: S,
    timeout: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Unstalled<S> {
    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let timeout = self.timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Unstalled<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Unstalled<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let written = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.watch(cx, written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn e6_a_client_that_reads_nothing_is_let_go() {
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut io = Unstalled { stream: ours, timeout: Duration::from_millis(20), stalled: None };
        let written = tokio::time::timeout(Duration::from_secs(10), io.write_all(&[0; 64])).await;
        assert_eq!(written.expect("it gives up").unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn shutdown_lets_an_open_stream_end_and_accepts_nothing_more() {
        let (release, released) = oneshot::channel::<()>();
        let released = Arc::new(parking_lot::Mutex::new(Some(released)));
        let stream = async move || {
            let released = released.lock().take();
            Body::from_stream(futures_util::stream::unfold(released, async |released| {
                released?.await.ok();
                Some((Ok::<_, io::Error>("the end"), None))
            }))
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let server = tokio::spawn(async move {
            let router = Router::new().route("/", get(stream));
            accept(listener, router, 10, Duration::from_secs(10), stopped.cancelled()).await;
        });
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut head = [0; 15];
        client.read_exact(&mut head).await.unwrap();
        assert_eq!(&head, b"HTTP/1.1 200 OK");
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(5), async {
            while TcpStream::connect(address).await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("it accepts nothing more");
        assert!(!server.is_finished(), "the stream is open");
        release.send(()).unwrap();
        let mut rest = String::new();
        client.read_to_string(&mut rest).await.unwrap();
        assert!(rest.contains("the end"), "{rest}");
        server.await.unwrap();
    }
}
