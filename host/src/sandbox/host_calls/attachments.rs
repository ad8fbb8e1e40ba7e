//! Attachments, as a guest sees them: `attachment_read`. It waits for the store where what is asked for is not at hand.

use wasmtime::{Caller, Linker};

use super::{Answer, Errno, MODULE, answer, enter, length, range, view};
use crate::attachment::{AttachmentId, PIECE_BYTES};
use crate::sandbox::attachments::Unread;
use crate::sandbox::guest::Guest;

pub(super) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.func_wrap_async(
        MODULE,
        "attachment_read",
        |mut caller: Caller<'_, Guest>, (id_ptr, id_len, offset, ptr, cap): (u32, u32, u32, u32, u32)| {
            Box::new(async move { answer(attachment_read(&mut caller, (id_ptr, id_len), offset, (ptr, cap)).await) })
        },
    )?;
    Ok(())
}

/// Copies from `offset` on, a piece at a time, and answers how much there is from there.
async fn attachment_read(caller: &mut Caller<'_, Guest>, id: (u32, u32), offset: u32, into: (u32, u32)) -> Answer {
    let (memory, guest) = enter(caller)?;
    let id = range(memory, id.0, id.1)?;
    let room = range(memory, into.0, into.1)?.len();
    if id.len() != AttachmentId::TEXT_BYTES {
        return Err(Errno::Inval.into());
    }
    let id = std::str::from_utf8(&memory[id]).map_err(|_| Errno::Ilseq)?;
    let id: AttachmentId = id.parse().map_err(|_| Errno::Inval)?;
    let bytes = guest.attachments.all.get(id).ok_or(Errno::Noent)?.bytes;
    let offset = offset as usize;
    let left = usize::try_from(bytes).unwrap_or(usize::MAX).saturating_sub(offset);
    let wanted = room.min(left);
    let control = guest.shared.control.clone();
    let mut copied = 0;
    while copied < wanted {
        let (number, within) = ((offset + copied) / PIECE_BYTES, (offset + copied) % PIECE_BYTES);
        let number = u32::try_from(number).map_err(|_| Errno::Io)?;
        let read = caller.data_mut().attachments.piece(id, number, &control).await;
        let piece = read.map_err(|why| match why {
            Unread::Exhausted => Errno::Nobufs,
            Unread::Failed => Errno::Io,
        })?;
        // The memory may have moved while we waited.
        let (memory, _) = view(caller)?;
        let into = range(memory, into.0, into.1)?;
        let part = piece.get(within..).filter(|part| !part.is_empty()).ok_or(Errno::Io)?;
        let part = &part[..part.len().min(wanted - copied)];
        memory[into.start + copied..][..part.len()].copy_from_slice(part);
        control.count_in(part.len());
        copied += part.len();
    }
    Ok(length(left))
}
