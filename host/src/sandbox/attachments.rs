//! The attachments that one guest may read, and what of them is at hand: one piece, read when the guest first asks for something in it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use super::Control;
use crate::attachment::{Attachment, AttachmentId, PIECE_BYTES};

/// Where the bytes of attachments come from.
#[async_trait]
pub trait PieceSource: Send + Sync {
    /// A piece of one that exists, counted from 0; `None`: it is gone, or cannot be read. A source that is away for a while may take its time.
    async fn piece(&self, id: AttachmentId, piece: u32) -> Option<Bytes>;
}

/// What a turn's message and history refer to, and where it is read.
#[derive(Clone, Default)]
pub struct Attachments {
    known: Arc<[Attachment]>,
    source: Option<Arc<dyn PieceSource>>,
}

impl std::fmt::Debug for Attachments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Attachments").field(&self.known).finish()
    }
}

impl Attachments {
    /// These, read from there.
    pub fn new(known: Vec<Attachment>, source: Arc<dyn PieceSource>) -> Attachments {
        Attachments { known: known.into(), source: Some(source) }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// One of them.
    pub fn get(&self, id: AttachmentId) -> Option<&Attachment> {
        self.known.iter().find(|attachment| attachment.id == id)
    }
}

/// Why a piece is not at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unread {
    /// The turn has had as much read as it may.
    Exhausted,
    /// The store does not have it, or did not answer in time.
    Failed,
}

/// A guest's attachments while it runs.
pub(super) struct Reading {
    pub(super) all: Attachments,
    last: Option<(AttachmentId, u32, Bytes)>,
    bytes_left: u64,
    timeout: Duration,
}

impl Reading {
    pub(super) fn new(all: Attachments, bytes_max: u64, timeout_ms: u64) -> Reading {
        Reading { all, last: None, bytes_left: bytes_max, timeout: Duration::from_millis(timeout_ms) }
    }

    /// A piece of one of them: the last one that was read, or as the source has it. The turn's idle clock stands still meanwhile.
    pub(super) async fn piece(
        &mut self,
        id: AttachmentId,
        number: u32,
        control: &Arc<Control>,
    ) -> Result<Bytes, Unread> {
        match &self.last {
            Some((of, piece, bytes)) if (*of, *piece) == (id, number) => return Ok(bytes.clone()),
            _ => {}
        }
        self.bytes_left = self.bytes_left.checked_sub(PIECE_BYTES as u64).ok_or(Unread::Exhausted)?;
        let source = self.all.source.clone().ok_or(Unread::Failed)?;
        let _in_flight = control.operation();
        // A task of its own: what a store's client does is not for what is left of a guest's stack.
        let read = Aborted(tokio::spawn(async move { source.piece(id, number).await }));
        let bytes = tokio::time::timeout(self.timeout, read).await.ok().flatten().ok_or(Unread::Failed)?;
        control.progress();
        self.last = Some((id, number, bytes.clone()));
        Ok(bytes)
    }
}

/// A task that ends with whoever waits for it.
struct Aborted(tokio::task::JoinHandle<Option<Bytes>>);

impl Future for Aborted {
    type Output = Option<Bytes>;
    fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<Bytes>> {
        std::pin::Pin::new(&mut self.0).poll(cx).map(|read| read.ok().flatten())
    }
}

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}
