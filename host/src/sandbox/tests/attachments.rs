//! `attachment_read`: whole and in part, of what the turn has and of nothing else, within its bounds.

use super::calls::results;
use super::*;
use crate::attachment::{Attachment, AttachmentId, PIECE_BYTES, Pieces};

const ILSEQ: i32 = -25;
const INVAL: i32 = -28;
const IO: i32 = -29;
const NOBUFS: i32 = -42;
const NOENT: i32 = -44;

/// Attachments in memory, and what is asked of them.
#[derive(Default)]
struct Kept {
    pieces: Vec<Bytes>,
    asked: Mutex<Vec<u32>>,
    /// It answers nothing from this piece on; at all, if that is 0.
    away_from: Option<u32>,
    silent: bool,
    delay_ms: u64,
}

#[async_trait]
impl PieceSource for Kept {
    async fn piece(&self, _id: AttachmentId, piece: u32) -> Option<Bytes> {
        self.asked.lock().push(piece);
        if self.silent {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_millis(self.delay_ms)).await;
        let away = self.away_from.is_some_and(|from| piece >= from);
        self.pieces.get(piece as usize).filter(|_| !away).cloned()
    }
}

fn attachment(bytes: &[u8]) -> (Attachment, Kept) {
    let mut pieces = Pieces::default();
    pieces.push(bytes);
    let (attachment, pieces) = pieces.finish("text/plain".to_owned());
    (attachment, Kept { pieces, ..Kept::default() })
}

/// An attachment of five bytes.
pub(super) fn one() -> (AttachmentId, Attachments) {
    let (attachment, kept) = attachment(b"hello");
    (attachment.id, Attachments::new(vec![attachment], Arc::new(kept)))
}

/// Three pieces, the last of seven bytes.
fn large() -> Vec<u8> {
    (0..PIECE_BYTES * 2 + 7).map(|n| (n / 251) as u8).collect()
}

/// Reads from `offset` as much as `cap`, adds up the bytes that came, and says both numbers.
fn reader(id: AttachmentId, reads: &[(u32, u32)]) -> String {
    let reads: String =
        reads.iter().map(|(offset, cap)| format!("(call $one (i32.const {offset}) (i32.const {cap}))")).collect();
    format!(
        r#"(module {FD_WRITE}
          (import "turnhouse_v1" "attachment_read" (func $read (param i32 i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 32)
          (data (i32.const 100) "{id}")
          (func $one (param $offset i32) (param $cap i32) (local $sum i32) (local $at i32)
            (memory.fill (i32.const 65536) (i32.const 0) (i32.const 1048576))
            (i32.store (i32.const 16) (call $read (i32.const 100) (i32.const 71) (local.get $offset) (i32.const 65536) (local.get $cap)))
            (local.set $at (i32.const 65536))
            (loop $next
              (local.set $sum (i32.add (local.get $sum) (i32.load8_u (local.get $at))))
              (br_if $next (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 1))) (i32.const 1114112))))
            (i32.store (i32.const 20) (local.get $sum))
            (i32.store (i32.const 0) (i32.const 16)) (i32.store (i32.const 4) (i32.const 8))
            (drop (call $fd_write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 8))))
          (func (export "_start") {reads}))"#
    )
}

fn answers(ended: &Ended) -> Vec<(i32, u32)> {
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    ended.finished.log.chunks_exact(8).map(|pair| (number(&pair[..4]) as i32, number(&pair[4..]))).collect()
}

#[test]
fn an_attachment_is_read_whole_in_part_and_never_past_its_end() {
    let bytes = large();
    let (attachment, kept) = attachment(&bytes);
    let (id, total, kept) = (attachment.id, bytes.len(), Arc::new(kept));
    let piece = PIECE_BYTES;
    let cases = [
        (0, total),
        (0, 0),
        (total, 9),
        (total + 1, 9),
        (u32::MAX as usize, 9),
        (piece - 1, 2),
        (5, piece),
        (total - 3, 900_000),
        (7, 1),
    ];
    let reads: Vec<_> = cases.iter().map(|(offset, cap)| (*offset as u32, *cap as u32)).collect();
    let turn = Turn { attachments: Attachments::new(vec![attachment], kept.clone()), ..Turn::new() };
    let ended = turn.run(&reader(id, &reads));
    let expected: Vec<_> = cases
        .iter()
        .map(|(offset, cap)| {
            let rest = bytes.get(*offset..).unwrap_or_default();
            let sum = rest.iter().take(*cap).map(|byte| u32::from(*byte)).sum::<u32>();
            (rest.len() as i32, sum)
        })
        .collect();
    assert_eq!(answers(&ended), expected);
    let read: usize = cases.iter().map(|(offset, cap)| bytes.len().saturating_sub(*offset).min(*cap)).sum();
    assert_eq!(ended.finished.usage.bytes_in, read as u64, "what it was given is counted");
    // One piece is at hand, and is not asked for twice in a row.
    assert_eq!(*kept.asked.lock(), [0, 1, 2, 0, 1, 0, 1, 2, 0]);
}

#[test]
fn o1_what_the_turn_does_not_refer_to_is_not_there() {
    let (known, of) = one();
    let other = AttachmentId([1; 32]).to_string();
    let known = known.to_string();
    let data: [(i32, &[u8]); 3] = [(0, known.as_bytes()), (100, other.as_bytes()), (200, &[0xff; 71])];
    let read = |ptr: i32, len: i32| ("attachment_read", [ptr, len, 0, 1_000, 10]);
    let calls = [read(0, 71), read(100, 71), read(0, 70), read(0, 0), read(0, 60_000), read(1, 71), read(200, 71)];
    let calls: Vec<(&str, &[i32])> = calls.iter().map(|(name, arguments)| (*name, &arguments[..])).collect();
    let (answers, _) = results(Turn { attachments: of, ..Turn::new() }, &data, &calls);
    assert_eq!(answers, [5, NOENT, INVAL, INVAL, INVAL, INVAL, ILSEQ]);
    let (answers, _) = results(Turn::new(), &data, &calls[..1]);
    assert_eq!(answers, [NOENT], "a turn without attachments has none");
}

#[test]
fn a_turn_has_no_more_read_than_it_may() {
    let bytes = large();
    let (attachment, kept) = attachment(&bytes);
    let (id, kept) = (attachment.id, Arc::new(kept));
    let mut turn = Turn { attachments: Attachments::new(vec![attachment], kept.clone()), ..Turn::new() };
    turn.limits.attachment_read_bytes_max = 3 * PIECE_BYTES as u64;
    let read = |at: usize| (at as u32, 1);
    let ended = turn.run(&reader(id, &[read(0), read(1), read(PIECE_BYTES), read(0), read(PIECE_BYTES)]));
    let given: Vec<i32> = answers(&ended).iter().map(|(answer, _)| *answer).collect();
    let left = |at: usize| (bytes.len() - at) as i32;
    assert_eq!(given, [left(0), left(1), left(PIECE_BYTES), left(0), NOBUFS]);
    assert_eq!(*kept.asked.lock(), [0, 1, 0]);
}

#[test]
fn what_cannot_be_read_is_told_and_what_takes_too_long_ends() {
    let (attachment, mut kept) = attachment(&large());
    kept.away_from = Some(1);
    let id = attachment.id;
    let of = |kept: Kept| Attachments::new(vec![attachment.clone()], Arc::new(kept));
    let ended = Turn { attachments: of(kept), ..Turn::new() }.run(&reader(id, &[(0, 1), (0, 900_000)]));
    assert_eq!(answers(&ended)[1].0, IO);

    let silent = || Kept { silent: true, ..Kept::default() };
    let mut turn = Turn { attachments: of(silent()), ..Turn::new() };
    turn.limits.operation_timeout_ms = 100;
    let ended = turn.run(&reader(id, &[(0, 1)]));
    assert_eq!(answers(&ended)[0].0, IO, "it is bounded like an operation");
    let slow = Kept { delay_ms: 1_000, ..self::attachment(&large()).1 };
    let ended = Turn { attachments: of(slow), idle_timeout_ms: 500, ..Turn::new() }.run(&reader(id, &[(0, 1)]));
    assert_eq!(answers(&ended)[0].0, large().len() as i32, "nobody is idle who waits for the store");

    let turn = Turn { attachments: of(silent()), ..Turn::new() };
    let ended = turn.run_while(&reader(id, &[(0, 1)]), |control| {
        std::thread::sleep(Duration::from_millis(50));
        control.stop(Stop::TurnTimeout);
    });
    assert_eq!(ended.code(), FailureCode::TurnTimeout, "a wait for the store ends with its turn");
}

#[test]
fn a_reply_has_no_attachment() {
    let (id, of) = one();
    let reply = format!(r#"{{"parts":[{{"type":"attachment","attachment_id":"{id}"}}]}}"#);
    let length = reply.len() as i32;
    let (answers, _) =
        results(Turn { attachments: of, ..Turn::new() }, &[(0, reply.as_bytes())], &[("reply", &[0, length])]);
    assert_eq!(answers, [INVAL]);
}
