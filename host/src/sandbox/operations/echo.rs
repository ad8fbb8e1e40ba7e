//! `host.echo`: answers its request in frames after a delay. It harms nobody, and is real enough to try handles, waiting, time-outs and
//! closing with.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use serde::Deserialize;
use tokio::time::Sleep;

use super::{Class, Frames, InvalidRequest, Operation, OperationError, Prepared};

/// `{"frames":["a","b"],"delay_ms":50,"fail":false}` → after the delay `{"frames":2}`, then each text as a frame; `fail` ends it with an
/// error; without frames that is all that comes, so that it is no progress.
pub struct Echo;

/// What is held for an answer must not be many times its request.
const FRAMES_MAX: usize = 1_024;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    #[serde(default)]
    frames: Vec<String>,
    #[serde(default)]
    delay_ms: u64,
    #[serde(default)]
    fail: bool,
}

impl Operation for Echo {
    fn name(&self) -> &'static str {
        "host.echo"
    }

    fn class(&self) -> Class {
        Class::None
    }

    fn prepare(&self, request: &[u8]) -> Result<Prepared, InvalidRequest> {
        let request: Request = serde_json::from_slice(request).map_err(|_| InvalidRequest)?;
        if request.frames.len() > FRAMES_MAX {
            return Err(InvalidRequest);
        }
        Ok(Box::new(move || -> Frames { Box::pin(Answer::new(request)) }))
    }
}

struct Answer {
    delay: Option<Pin<Box<Sleep>>>,
    left: VecDeque<Result<Bytes, OperationError>>,
}

impl Answer {
    fn new(request: Request) -> Answer {
        let delay =
            (request.delay_ms > 0).then(|| Box::pin(tokio::time::sleep(Duration::from_millis(request.delay_ms))));
        let mut left = VecDeque::new();
        if !request.fail || !request.frames.is_empty() {
            let head = format!("{{\"frames\":{}}}", request.frames.len());
            left.extend(std::iter::once(head).chain(request.frames).map(|text| Ok(Bytes::from(text))));
        }
        if request.fail {
            left.push_back(Err(OperationError {
                code: Cow::Borrowed("provider_unavailable"),
                detail: "the echo was asked to fail".to_owned(),
                retryable: true,
                retry_after_ms: Some(1000),
            }));
        }
        Answer { delay, left }
    }
}

impl Stream for Answer {
    type Item = Result<Bytes, OperationError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(delay) = &mut self.delay {
            ready!(delay.as_mut().poll(cx));
            self.delay = None;
        }
        Poll::Ready(self.left.pop_front())
    }
}
