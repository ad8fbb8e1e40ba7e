//! A turn's events as a response: server-sent events, pulled by the connection.
//!
//! The body is read only as fast as its client reads: what is ready is joined into one chunk of some [`CHUNK_BYTES`], and nothing more is
//! taken from the [`Reader`] until that is written. A client that goes away drops the reader and nothing else. A stream that the store
//! fails ends without a terminal event, and its client comes back with `Last-Event-ID`.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::ReusableBoxFuture;

use super::readers::Permit;
use crate::event::{Event, EventId};
use crate::reader::Reader;
use crate::store::StoreError;

/// Where joining stops.
const CHUNK_BYTES: usize = 32 * 1024;

/// A comment: it has no id, and an `EventSource` passes over it.
const PING: &[u8] = b": ping\n\n";

type Next = Result<Option<Event>, StoreError>;

/// Where events come from: a [`Reader`], or a test.
pub trait Source: Send + 'static {
    /// See [`Reader::next`].
    fn next(&mut self) -> impl Future<Output = Next> + Send;
}

impl Source for Reader {
    async fn next(&mut self) -> Next {
        let next = Reader::next(self).await;
        if let Err(error) = &next {
            let (org, turn) = self.of();
            tracing::warn!(%org, %turn, %error, "a stream ends before its turn: the store failed");
        }
        next
    }
}

/// The response that streams `source`, with a comment every `ping_ms`, as long as `permit` is held.
pub fn response<S: Source>(source: S, permit: Permit, ping_ms: u64) -> Response {
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // nginx would gather events until its buffer is full.
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    let body = EventStream::new(source, ping_ms, OpenStream::new(permit));
    (StatusCode::OK, headers, Body::new(body)).into_response()
}

/// Counts an open stream for as long as it is one.
struct OpenStream {
    _permit: Permit,
}

impl OpenStream {
    fn new(permit: Permit) -> OpenStream {
        metrics::gauge!("turnhouse_streams_open").increment(1.0);
        OpenStream { _permit: permit }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        metrics::gauge!("turnhouse_streams_open").decrement(1.0);
    }
}

/// `H` is held until the stream is dropped.
struct EventStream<S, H> {
    /// The source moves through its own future, so that waiting for it allocates once a stream and never restarts.
    next: ReusableBoxFuture<'static, (S, Next)>,
    ping: Interval,
    chunk: BytesMut,
    ended: bool,
    /// Something was sent already; what comes next lets what is about to come join it.
    begun: bool,
    waited: bool,
    _held: H,
}

async fn take_next<S: Source>(mut source: S) -> (S, Next) {
    let next = source.next().await;
    (source, next)
}

impl<S: Source, H> EventStream<S, H> {
    fn new(source: S, ping_ms: u64, held: H) -> Self {
        let period = Duration::from_millis(ping_ms.max(1));
        let mut ping = tokio::time::interval_at(Instant::now() + period, period);
        ping.set_missed_tick_behavior(MissedTickBehavior::Skip);
        EventStream {
            next: ReusableBoxFuture::new(take_next(source)),
            ping,
            chunk: BytesMut::new(),
            ended: false,
            begun: false,
            waited: false,
            _held: held,
        }
    }

    /// Everything that is ready.
    fn gather(&mut self, cx: &mut Context<'_>) {
        while self.chunk.len() < CHUNK_BYTES && !self.ended {
            let Poll::Ready((source, next)) = self.next.poll(cx) else { break };
            match next {
                Ok(Some(event)) => {
                    write_frame(&mut self.chunk, &event);
                    self.ended = event.id == EventId::End;
                }
                Ok(None) | Err(_) => self.ended = true,
            }
            // Also at the end: the future is not polled again, but it must not be one that has completed.
            self.next.set(take_next(source));
        }
    }
}

impl<S: Source, H: Unpin> http_body::Body for EventStream<S, H> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        this.gather(cx);
        if !this.chunk.is_empty() {
            if this.begun && !this.ended && !std::mem::replace(&mut this.waited, true) {
                // A write costs more than a turn of the runtime's queue: what other tasks say meanwhile goes with it.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            this.begun = true;
            this.waited = false;
            return Poll::Ready(Some(Ok(Frame::data(this.chunk.split().freeze()))));
        }
        if this.ended {
            return Poll::Ready(None);
        }
        ready!(this.ping.poll_tick(cx));
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(PING)))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.chunk.is_empty()
    }
}

/// `event`, `data` on one line, `id`, and an empty line.
fn write_frame(out: &mut BytesMut, event: &Event) {
    let data = event.data.get();
    out.reserve(event.kind.len() + data.len() + 48);
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(event.kind.as_bytes());
    out.extend_from_slice(b"\ndata: ");
    // JSON has line breaks only between tokens, where a space means the same; a frame has none at all.
    if data.bytes().any(|b| matches!(b, b'\n' | b'\r')) {
        out.extend(data.bytes().map(|b| if matches!(b, b'\n' | b'\r') { b' ' } else { b }));
    } else {
        out.extend_from_slice(data.as_bytes());
    }
    write!(out, "\nid: {}\n\n", event.id).expect("memory takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::raw;
    use http_body_util::BodyExt as _;
    use serde_json::json;
    use serde_json::value::RawValue;
    use tokio::sync::mpsc;

    impl Source for mpsc::UnboundedReceiver<Next> {
        async fn next(&mut self) -> Next {
            self.recv().await.unwrap_or(Ok(None))
        }
    }

    fn event(id: EventId, kind: &'static str) -> Next {
        Ok(Some(Event { id, kind: kind.into(), data: raw(&json!({"text": "a\nb"})) }))
    }

    fn stream() -> (mpsc::UnboundedSender<Next>, EventStream<mpsc::UnboundedReceiver<Next>, ()>) {
        stream_with_ping(15_000)
    }

    fn stream_with_ping(ping_ms: u64) -> (mpsc::UnboundedSender<Next>, EventStream<mpsc::UnboundedReceiver<Next>, ()>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (sender, EventStream::new(receiver, ping_ms, ()))
    }

    async fn chunk(stream: &mut EventStream<mpsc::UnboundedReceiver<Next>, ()>) -> Option<String> {
        let frame = stream.frame().await?.unwrap();
        Some(String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn what_is_ready_is_one_chunk_and_the_terminal_event_ends_the_stream() {
        let (sender, mut stream) = stream();
        sender.send(event(EventId::ACCEPTED, "turn.accepted")).unwrap();
        sender.send(event(EventId::At(1, 2), "output.delta")).unwrap();
        sender.send(event(EventId::End, "turn.completed")).unwrap();
        sender.send(event(EventId::At(9, 9), "after.the.end")).unwrap();
        assert_eq!(
            chunk(&mut stream).await.unwrap(),
            "event: turn.accepted\ndata: {\"text\":\"a\\nb\"}\nid: 0.0\n\n\
             event: output.delta\ndata: {\"text\":\"a\\nb\"}\nid: 1.2\n\n\
             event: turn.completed\ndata: {\"text\":\"a\\nb\"}\nid: end\n\n"
        );
        assert!(http_body::Body::is_end_stream(&stream));
        assert_eq!(chunk(&mut stream).await, None);
        assert_eq!(chunk(&mut stream).await, None);
    }

    #[tokio::test]
    async fn e4_a_quiet_stream_gets_a_comment_every_ping_ms_from_its_start() {
        let (sender, mut stream) = stream_with_ping(40);
        let began = Instant::now();
        assert_eq!(chunk(&mut stream).await.unwrap(), ": ping\n\n");
        assert!(began.elapsed().as_millis() >= 40);
        sender.send(event(EventId::At(1, 1), "status")).unwrap();
        assert!(chunk(&mut stream).await.unwrap().starts_with("event: status"));
        assert_eq!(chunk(&mut stream).await.unwrap(), ": ping\n\n");
        assert!(began.elapsed().as_millis() >= 80);
    }

    #[tokio::test]
    async fn a_stream_that_the_store_fails_ends_without_a_terminal_event() {
        let (sender, mut stream) = stream();
        sender.send(event(EventId::At(1, 1), "status")).unwrap();
        sender.send(Err(StoreError::Unavailable("gone".to_owned()))).unwrap();
        let text = chunk(&mut stream).await.unwrap();
        assert!(text.contains("id: 1.1") && !text.contains("id: end"));
        assert_eq!(chunk(&mut stream).await, None);
    }

    #[tokio::test]
    async fn e6_a_reader_that_never_reads_holds_one_chunk() {
        let (sender, mut stream) = stream();
        for seq in 0..500 {
            let data = raw(&json!({"text": "x".repeat(1_000)}));
            sender.send(Ok(Some(Event { id: EventId::At(1, seq), kind: "output.delta".into(), data }))).unwrap();
        }
        let text = chunk(&mut stream).await.unwrap();
        assert!((CHUNK_BYTES..CHUNK_BYTES + 1_100).contains(&text.len()), "{}", text.len());
        assert!(
            chunk(&mut stream).await.unwrap().starts_with("event: output.delta"),
            "the rest follows when it is asked for"
        );
    }

    #[test]
    fn data_is_one_line_whatever_was_stored() {
        let data = RawValue::from_string("{\n\"a\":\r\n1}".to_owned()).unwrap();
        let mut out = BytesMut::new();
        write_frame(&mut out, &Event { id: EventId::At(1, 1), kind: "x.a".into(), data });
        assert_eq!(&out[..], b"event: x.a\ndata: { \"a\":  1}\nid: 1.1\n\n");
    }
}
