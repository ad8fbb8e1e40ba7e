//! When a connection is idle: no answer of it is under way, and none was for a while. HTTP/1.1 has hyper's own clock for that, HTTP/2 has none: whoever answers
//! its pings would keep a place for ever.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body::{Body, Frame, SizeHint};

/// What a connection is asked.
#[derive(Clone, Default)]
pub struct Requests(Arc<Counts>);

#[derive(Default)]
struct Counts {
    /// Answers that are under way.
    open: AtomicUsize,
    /// Since the connection began.
    begun: AtomicUsize,
}

/// A request, until its answer is written.
pub struct Asked(Requests);

impl Requests {
    /// One more.
    pub fn begin(&self) -> Asked {
        self.0.begun.fetch_add(1, Ordering::Relaxed);
        self.0.open.fetch_add(1, Ordering::AcqRel);
        Asked(self.clone())
    }

    /// Waits until the connection has been idle for `patience`, and twice that at most.
    pub async fn idle(&self, patience: Duration) {
        loop {
            let begun = self.0.begun.load(Ordering::Relaxed);
            let was_open = self.0.open.load(Ordering::Acquire) > 0;
            tokio::time::sleep(patience).await;
            let still = self.0.begun.load(Ordering::Relaxed) == begun && self.0.open.load(Ordering::Acquire) == 0;
            if still && !was_open {
                return;
            }
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// An answer's body, which is under way until it is dropped.
pub struct Answering<B> {
    body: B,
    _asked: Asked,
}

impl<B> Answering<B> {
    /// The answer to `asked`.
    pub fn new(body: B, asked: Asked) -> Answering<B> {
        Answering { body, _asked: asked }
    }
}

impl<B: Body + Unpin> Body for Answering<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
