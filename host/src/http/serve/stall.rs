//! A connection that fails when its other end stands still: says nothing at first, or reads nothing of what was written to it.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// HTTP/2's preface. Who has sent less has not begun, and hyper waits for it without a clock of its own.
const OPENING_BYTES: usize = 24;

/// How long the other end may stand still.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Until it has said enough to tell which protocol it speaks.
    pub opening: Duration,
    /// Until it reads what was written to it.
    pub unread: Duration,
    /// Without a request.
    pub idle: Duration,
}

/// A connection with its clocks.
///
/// A stream's body is pulled, so that a client that does not read costs little; but it would keep its permit for ever.
pub struct Unstalled<S> {
    stream: S,
    patience: Patience,
    stalled: Option<Pin<Box<Sleep>>>,
    /// Until the connection has begun: what was read so far.
    opening: Option<(Pin<Box<Sleep>>, usize)>,
}

impl<S> Unstalled<S> {
    /// Watches `stream`.
    pub fn new(stream: S, patience: Patience) -> Unstalled<S> {
        let opening = Some((Box::pin(tokio::time::sleep(patience.opening)), 0));
        Unstalled { stream, patience, stalled: None, opening }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            // Who is answered has begun.
            self.opening = None;
            return written;
        }
        let patience = self.patience.unread;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Unstalled<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some((clock, so_far)) = &mut self.opening else { return read };
        *so_far += buf.filled().len() - before;
        if *so_far >= OPENING_BYTES {
            self.opening = None;
            return read;
        }
        match (read, clock.as_mut().poll(cx)) {
            (Poll::Pending, Poll::Ready(())) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            (read, _) => read,
        }
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const SOON: Duration = Duration::from_millis(20);
    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn e6_a_client_that_reads_nothing_is_let_go() {
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut io = Unstalled::new(ours, Patience { opening: NEVER, unread: SOON, idle: NEVER });
        let written = tokio::time::timeout(Duration::from_secs(10), io.write_all(&[0; 64])).await;
        assert_eq!(written.expect("it gives up").unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_or_too_little_is_let_go() {
        for said in ["", "PRI * HTTP/2.0"] {
            let (ours, mut theirs) = tokio::io::duplex(64);
            theirs.write_all(said.as_bytes()).await.unwrap();
            let mut io = Unstalled::new(ours, Patience { opening: SOON, unread: NEVER, idle: SOON });
            let read = tokio::time::timeout(Duration::from_secs(10), io.read_to_end(&mut Vec::new())).await;
            assert_eq!(read.expect("it gives up").unwrap_err().kind(), io::ErrorKind::TimedOut, "{said:?}");
        }
    }

    #[tokio::test]
    async fn who_has_begun_may_be_silent() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut io = Unstalled::new(ours, Patience { opening: SOON, unread: NEVER, idle: SOON });
        theirs.write_all(&[b'a'; OPENING_BYTES]).await.unwrap();
        io.read_exact(&mut [0; OPENING_BYTES]).await.unwrap();
        let silent = tokio::time::timeout(SOON * 5, io.read_u8()).await;
        assert!(silent.is_err(), "it is still waited for");
    }
}
