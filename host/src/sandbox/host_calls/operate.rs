//! Operations, as a guest sees them: `call`, `recv`, `error_read`, `wait`, `close`. Only `recv` and `wait` block.

use std::borrow::Cow;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use serde::de::IgnoredAny;
use wasmtime::{Caller, Linker};

use super::{Answer, Errno, MODULE, answer, enter, hand_in, hold_against, length, range, view};
use crate::sandbox::control::Stop;
use crate::sandbox::guest::{Guest, Shared};
use crate::sandbox::operations::{self, Class, Frames, Full, Next};
use crate::sandbox::outcome::End;
use crate::sandbox::{Refused, Said};

/// Handles of one `wait`.
const WAIT_HANDLES_MAX: u32 = 8;

/// No operation has a longer name; what is too long for one is not looked through.
const NAME_BYTES_MAX: usize = 128;

/// What an effect answers in a dry run, whatever it was asked.
const DRY_RUN: &[u8] = br#"{"dry_run":true}"#;

pub(super) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.func_wrap_async(
        MODULE,
        "call",
        |mut caller: Caller<'_, Guest>, (op_ptr, op_len, req_ptr, req_len): (u32, u32, u32, u32)| {
            Box::new(async move { answer(call(&mut caller, (op_ptr, op_len), (req_ptr, req_len)).await) })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "recv",
        |mut caller: Caller<'_, Guest>, (handle, ptr, cap, timeout_ms): (i32, u32, u32, i32)| {
            Box::new(async move { answer(recv(&mut caller, handle, (ptr, cap), timeout_ms).await) })
        },
    )?;
    linker.func_wrap_async(
        MODULE,
        "wait",
        |mut caller: Caller<'_, Guest>, (ptr, count, timeout_ms): (u32, u32, i32)| {
            Box::new(async move { answer(wait(&mut caller, ptr, count, timeout_ms).await) })
        },
    )?;
    linker.func_wrap(MODULE, "error_read", |mut caller: Caller<'_, Guest>, handle: i32, ptr: u32, cap: u32| {
        answer(error_read(&mut caller, handle, ptr, cap))
    })?;
    linker
        .func_wrap(MODULE, "close", |mut caller: Caller<'_, Guest>, handle: i32| answer(close(&mut caller, handle)))?;
    Ok(())
}

async fn call(caller: &mut Caller<'_, Guest>, op: (u32, u32), request: (u32, u32)) -> Answer {
    let (memory, guest) = enter(caller)?;
    let op = range(memory, op.0, op.1)?;
    let request = range(memory, request.0, request.1)?;
    if op.len() > NAME_BYTES_MAX {
        return Err(Errno::Nosys.into());
    }
    let name = std::str::from_utf8(&memory[op]).map_err(|_| Errno::Nosys)?;
    let operation = guest.registry.get(name).ok_or(Errno::Nosys)?.clone();
    hold_against(request.len(), guest.limits.operation_request_bytes_max)?;
    let request = &memory[request];
    if request.len() > guest.limits.operation_request_bytes_max {
        // Too big to be parsed into anything; what is no JSON at all is still told apart first, in place.
        serde_json::from_slice::<IgnoredAny>(request).map_err(|_| Errno::Inval)?;
        return Err(Errno::TooBig.into());
    }
    guest.shared.control.count_out(request.len());
    let prepared = operation.prepare(request).map_err(|operations::InvalidRequest| Errno::Inval)?;
    let shared = guest.shared.clone();
    let handle = {
        let mut operations = shared.operations.lock();
        operations.room().map_err(|full| match full {
            Full::AtOnce => Errno::Mfile,
            Full::InAll => Errno::Nobufs,
        })?;
        operations.reserve()
    };
    let dry_run = guest.input.dry_run && operation.class() == Class::Effect;
    let data = operations::started(handle, &*operation, dry_run);
    let said = Said { kind: Cow::Borrowed("operation.started"), data };
    let frames = match operation.class() {
        Class::Effect if dry_run => {
            shared.speech.lock().host_event(said);
            Box::pin(futures_util::stream::iter([Ok(Bytes::from_static(DRY_RUN))])) as Frames
        }
        Class::Effect => {
            if let Err(Refused) = shared.output.begin_effect(said).await {
                shared.control.stop(Stop::Ended);
                return Err(End::LeaseLost.into());
            }
            prepared()
        }
        Class::None => {
            shared.speech.lock().host_event(said);
            prepared()
        }
    };
    shared.operations.lock().begin(handle, operation.name(), frames);
    shared.until_heard().await;
    Ok(handle.cast_signed())
}

async fn recv(caller: &mut Caller<'_, Guest>, handle: i32, into: (u32, u32), timeout_ms: i32) -> Answer {
    let (memory, guest) = enter(caller)?;
    range(memory, into.0, into.1)?;
    if !guest.shared.operations.lock().is_open(handle) {
        return Err(Errno::Badf.into());
    }
    let shared = guest.shared.clone();
    within(timeout_ms, first_ready(&shared, &[handle])).await?;
    // The memory may have moved or grown while we waited.
    let (memory, guest) = view(caller)?;
    let into = range(memory, into.0, into.1)?;
    let mut operations = shared.operations.lock();
    match operations.next(handle) {
        Some(Next::Frame(frame)) if frame.len() > into.len() => Ok(length(frame.len())),
        Some(Next::Frame(frame)) => {
            operations.consume(handle);
            Ok(hand_in(guest, memory, into, &frame))
        }
        Some(Next::End) => Ok(0),
        Some(Next::Failed) => Err(Errno::Io.into()),
        None => Err(Errno::Again.into()),
    }
}

async fn wait(caller: &mut Caller<'_, Guest>, ptr: u32, count: u32, timeout_ms: i32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let bytes = count.checked_mul(4).ok_or(Errno::Fault)?;
    let from = range(memory, ptr, bytes)?;
    if count == 0 || count > WAIT_HANDLES_MAX {
        return Err(Errno::Inval.into());
    }
    let mut handles = [0; WAIT_HANDLES_MAX as usize];
    for (handle, bytes) in handles.iter_mut().zip(memory[from].chunks_exact(4)) {
        *handle = i32::from_le_bytes(bytes.try_into().expect("four bytes each"));
    }
    let handles = &handles[..count as usize];
    let shared = guest.shared.clone();
    {
        let operations = shared.operations.lock();
        if handles.iter().any(|handle| !operations.is_open(*handle)) {
            return Err(Errno::Badf.into());
        }
    }
    let index = within(timeout_ms, first_ready(&shared, handles)).await?;
    Ok(length(index))
}

fn error_read(caller: &mut Caller<'_, Guest>, handle: i32, ptr: u32, cap: u32) -> Answer {
    let (memory, guest) = enter(caller)?;
    let into = range(memory, ptr, cap)?;
    let operations = guest.shared.operations.lock();
    if !operations.is_open(handle) {
        return Err(Errno::Badf.into());
    }
    let error = operations.error(handle).ok_or(Errno::Noent)?;
    let json = serde_json::to_vec(error).expect("plain data serialises");
    Ok(hand_in(guest, memory, into, &json))
}

fn close(caller: &mut Caller<'_, Guest>, handle: i32) -> Answer {
    let (_, guest) = enter(caller)?;
    let shared = &guest.shared;
    if shared.operations.lock().close(handle, &mut shared.speech.lock()) { Ok(0) } else { Err(Errno::Badf.into()) }
}

/// The index of the first handle that has a frame or has ended.
async fn first_ready(shared: &Arc<Shared>, handles: &[i32]) -> usize {
    poll_fn(|cx| {
        let mut operations = shared.operations.lock();
        operations.drive(cx, &mut shared.speech.lock());
        match handles.iter().position(|handle| operations.next(*handle).is_some()) {
            Some(index) => Poll::Ready(index),
            None => Poll::Pending,
        }
    })
    .await
}

/// Bounds a wait by the guest's own time-out: negative waits (the turn's clocks bound it from outside), 0 polls once.
async fn within<T>(timeout_ms: i32, ready: impl Future<Output = T>) -> Result<T, Errno> {
    match u64::try_from(timeout_ms) {
        Err(_) => Ok(ready.await),
        Ok(0) => {
            let mut ready = std::pin::pin!(ready);
            poll_fn(|cx| {
                Poll::Ready(match ready.as_mut().poll(cx) {
                    Poll::Ready(value) => Ok(value),
                    Poll::Pending => Err(Errno::Again),
                })
            })
            .await
        }
        Ok(ms) => tokio::time::timeout(Duration::from_millis(ms), ready).await.map_err(|_| Errno::TimedOut),
    }
}
