//! A guest's standard streams: input from the message, output to its [`Speech`]. No tasks, no pipes, nothing of the host's.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use wasmtime_wasi::async_trait;
use wasmtime_wasi::cli::{IsTerminal, StdinStream, StdoutStream};
use wasmtime_wasi::p2::{InputStream, OutputStream, Pollable, StreamError, StreamResult};

use super::Control;
use super::guest::Shared;
use super::speech::Stdout;

/// At most this much is taken of one write; a larger one is taken in pieces.
const WRITE_BYTES_MAX: usize = 64 * 1024;

/// The message's text, once.
pub(super) struct Stdin {
    pub(super) text: Mutex<Bytes>,
    pub(super) control: Arc<Control>,
}

struct StdinReader {
    rest: Bytes,
    control: Arc<Control>,
}

impl IsTerminal for Stdin {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdinStream for Stdin {
    /// Preview 1 asks for it once, when the guest first uses a descriptor; a second reader would find the end.
    fn p2_stream(&self) -> Box<dyn InputStream> {
        Box::new(StdinReader { rest: std::mem::take(&mut *self.text.lock()), control: self.control.clone() })
    }

    fn async_stream(&self) -> Box<dyn AsyncRead + Send + Sync> {
        // Preview 1 never asks for this form.
        Box::new(tokio::io::empty())
    }
}

#[async_trait]
impl Pollable for StdinReader {
    async fn ready(&mut self) {}
}

impl InputStream for StdinReader {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        if self.rest.is_empty() {
            return Err(StreamError::Closed);
        }
        let read = self.rest.split_to(size.min(self.rest.len()));
        self.control.count_in(read.len());
        Ok(read)
    }
}

/// Standard output or standard error.
#[derive(Clone)]
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) to: Stdout,
}

impl IsTerminal for Writer {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Writer {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        // Preview 1 never asks for this form.
        Box::new(tokio::io::sink())
    }
}

#[async_trait]
impl Pollable for Writer {
    async fn ready(&mut self) {
        self.shared.until_heard().await;
    }
}

impl OutputStream for Writer {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.shared.control.count_out(bytes.len());
        let mut speech = self.shared.speech.lock();
        match self.to {
            Stdout::Reply => speech.stdout(&bytes).map_err(|end| StreamError::Trap(end.into())),
            Stdout::Log => {
                speech.log(&bytes);
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        let behind = self.to == Stdout::Reply && self.shared.speech.lock().pressed;
        Ok(if behind { 0 } else { WRITE_BYTES_MAX })
    }
}
