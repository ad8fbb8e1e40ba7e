//! Refusals that come before their request's body was read.
//!
//! hyper closes such an HTTP/1 connection once the response is written, and does not always get to say so in it: a client that sends its next
//! request on the same connection finds it gone. Here it is said.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, Version, header};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

/// Whether a request's body was read to its end. `None`: there is nothing to know.
pub struct Unread(Option<Arc<AtomicBool>>);

impl Unread {
    /// Watches `request`'s body, where it has one and its connection serves one request at a time.
    pub fn watch(request: Request) -> (Request, Unread) {
        if request.body().is_end_stream() || request.version() > Version::HTTP_11 {
            return (request, Unread(None));
        }
        let unread = Arc::new(AtomicBool::new(true));
        let watched = unread.clone();
        (request.map(|body| Body::new(Watched { body, unread: watched })), Unread(Some(unread)))
    }

    /// Tells the client that its connection ends here, where it does.
    pub fn tell(&self, response: &mut Response) {
        if self.0.as_ref().is_some_and(|unread| unread.load(Ordering::Acquire)) {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

struct Watched {
    body: Body,
    unread: Arc<AtomicBool>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.unread.store(false, Ordering::Release);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    fn request(body: &'static str, version: Version) -> Request {
        Request::builder().version(version).body(Body::from(body)).unwrap()
    }

    fn closes(unread: &Unread) -> bool {
        let mut response = Response::new(Body::empty());
        unread.tell(&mut response);
        response.headers().contains_key(header::CONNECTION)
    }

    #[tokio::test]
    async fn only_a_body_that_was_left_ends_its_connection() {
        let (left, unread) = Unread::watch(request("hello", Version::HTTP_11));
        drop(left);
        assert!(closes(&unread));
        let (read, unread) = Unread::watch(request("hello", Version::HTTP_11));
        assert_eq!(read.into_body().collect().await.unwrap().to_bytes(), "hello");
        assert!(!closes(&unread));
        for request in [request("", Version::HTTP_11), request("hello", Version::HTTP_2)] {
            assert!(!closes(&Unread::watch(request).1));
        }
    }
}
