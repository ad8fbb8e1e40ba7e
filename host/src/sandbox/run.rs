//! One guest, from its store to its [`Finished`].
//!
//! The future that [`run`] makes drives the guest, polls its operations and watches its clocks, all in one task: dropping it ends the guest.
//! A guest is left at its next yield (an epoch tick, or a wait) once its [`Control`] is stopped, by whomever.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::time::Sleep;
use wasmtime::{Store, UpdateDeadline};

use super::guest::{Guest, Shared};
use super::module::Worker;
use super::operations::{OperationError, Registry};
use super::outcome::{self, Circumstances};
use super::run_queue::Seat;
use super::speech::{Spoken, Stdout};
use super::{Control, Finished, Job, Reply, Stop};
use crate::content::{Content, Part};
use crate::turn::Failure;

/// What one host call may copy out of a guest's lists.
const HOSTCALL_FUEL_BYTES: usize = 8 * 1024 * 1024;

/// A guest that has run for less is not asked to yield: a short turn would otherwise go to the end of those that spin, for a tick that began before it.
const SLICE_MIN: Duration = Duration::from_micros(500);

thread_local! {
    /// When the poll that runs on this thread began. A guest's epoch callback runs inside the poll of its own future, on its thread.
    static POLL_BEGAN: Cell<Option<Instant>> = const { Cell::new(None) };
    /// The poll ends because the guest's tick is over; it could go on.
    static TICK_OVER: Cell<bool> = const { Cell::new(false) };
}

/// How the drive ended: the guest by itself, or stopped.
type Ended = Result<wasmtime::Result<()>, Stop>;

pub(super) async fn run(worker: &Worker, registry: Arc<Registry>, mut seat: Seat, job: Job) -> Finished {
    let control = job.control.clone();
    let stdout = if worker.speaks() { Stdout::Log } else { Stdout::Reply };
    let guest = Guest::new(job, Some(worker.memory), stdout, registry);
    let shared = guest.shared.clone();
    control.instance_begins();
    let mut store = Store::new(worker.pre.module().engine(), guest);
    store.limiter(|guest| &mut guest.limiter);
    store.set_hostcall_fuel(HOSTCALL_FUEL_BYTES);
    // Before instantiation: a module's start function runs there, and the default of 0 would trap at once.
    store.set_epoch_deadline(1);
    store.epoch_deadline_callback(epoch_callback(control.clone()));
    let ended = drive(call(&mut store, worker), &shared, &control, &mut seat).await;
    drop(seat);
    let mut guest = store.into_data();
    let leaving = guest.leave_directory();
    let finished = finish(guest, ended);
    leaving.done().await;
    finished
}

async fn call(store: &mut Store<Guest>, worker: &Worker) -> wasmtime::Result<()> {
    let instance = worker.pre.instantiate_async(&mut *store).await?;
    let start = instance
        .get_module_export(&mut *store, &worker.start)
        .and_then(wasmtime::Extern::into_func)
        .ok_or_else(|| wasmtime::Error::msg("the module's `_start` was checked at upload and is gone"))?;
    start.typed::<(), ()>(&*store)?.call_async(&mut *store, ()).await
}

/// Runs at every tick that meets the guest in its own code: says whether it may go on.
fn epoch_callback(
    control: Arc<Control>,
) -> impl FnMut(wasmtime::StoreContextMut<'_, Guest>) -> wasmtime::Result<UpdateDeadline> + Send + Sync + 'static {
    move |_| {
        let now = Instant::now();
        let running = POLL_BEGAN.get().map_or(Duration::ZERO, |began| now - began);
        if control.stopped().is_none() {
            if control.cpu() + running > control.cpu_timeout() {
                control.stop(Stop::CpuTimeout);
            } else if let Err(why) = control.check(now) {
                control.stop(why);
            } else if running < SLICE_MIN {
                // Its tick began while it waited for its permit.
                return Ok(UpdateDeadline::Continue(1));
            } else {
                TICK_OVER.set(true);
                return Ok(UpdateDeadline::YieldCustom(1, Box::pin(OnceMore { pending: true })));
            }
        }
        Ok(UpdateDeadline::Interrupt)
    }
}

/// Pending once. It wakes nobody: the run queue does, when the guest is to go on.
struct OnceMore {
    pending: bool,
}

impl Future for OnceMore {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::take(&mut self.pending) { Poll::Pending } else { Poll::Ready(()) }
    }
}

async fn drive(
    call: impl Future<Output = wasmtime::Result<()>>,
    shared: &Shared,
    control: &Control,
    seat: &mut Seat,
) -> Ended {
    let mut call = pin!(call);
    let mut stopped = pin!(control.until_stopped());
    let mut clock = None;
    poll_fn(|cx| {
        // Before the guest, which looks at what has come; and after it, for what it has just begun.
        shared.drive_operations(cx);
        if control.stopped().is_none() && seat.poll_take(cx).is_ready() {
            let (polled, used) = timed(control, || call.as_mut().poll(cx));
            if polled.is_pending() && TICK_OVER.take() {
                super::breathe();
                seat.offer(used, cx);
            } else {
                seat.leave(used);
            }
            if let Poll::Ready(result) = polled {
                return Poll::Ready(Ok(result));
            }
            if shared.drive_operations(cx) {
                cx.waker().wake_by_ref();
            }
        }
        if let Poll::Ready(why) = stopped.as_mut().poll(cx) {
            return Poll::Ready(Err(why));
        }
        match watch_clocks(control, &mut clock, cx) {
            Poll::Ready(why) => {
                control.stop(why);
                Poll::Ready(Err(control.stopped().unwrap_or(why)))
            }
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Counts a poll of the guest as its CPU time.
fn timed<T>(control: &Control, poll: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    POLL_BEGAN.set(Some(began));
    let result = poll();
    POLL_BEGAN.set(None);
    let used = began.elapsed();
    control.add_cpu(used);
    (result, used)
}

/// Ready when wall time or the idle clock has run out. The timer stands at the earliest such moment: progress only makes it later.
fn watch_clocks(control: &Control, clock: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> Poll<Stop> {
    loop {
        if let Some(clock) = clock
            && clock.as_mut().poll(cx).is_pending()
        {
            return Poll::Pending;
        }
        match control.check(Instant::now()) {
            Err(why) => return Poll::Ready(why),
            Ok(at) => match clock {
                Some(clock) => clock.as_mut().reset(at.into()),
                None => *clock = Some(Box::pin(tokio::time::sleep_until(at.into()))),
            },
        }
    }
}

impl Shared {
    /// Polls the operations that run. Whether any of them has got somewhere.
    fn drive_operations(&self, cx: &mut Context<'_>) -> bool {
        let mut operations = self.operations.lock();
        !operations.is_empty() && operations.drive(cx, &mut self.speech.lock())
    }
}

fn finish(guest: Guest, ended: Ended) -> Finished {
    let shared = &guest.shared;
    let control = &shared.control;
    let (spoken, provider) = {
        let mut operations = shared.operations.lock();
        let mut speech = shared.speech.lock();
        let provider = operations.finish(&mut speech);
        (speech.finish(), provider)
    };
    let around = Circumstances {
        control,
        limits: &guest.limits,
        growth_refused: guest.limiter.refused,
        cut: if guest.reply.is_some() { None } else { spoken.cut },
        provider: provider.as_ref(),
    };
    let failure = match (&ended, control.stopped()) {
        (&Err(why), _) | (Ok(_), Some(why)) => Some(outcome::stopped(why, &around)),
        (Ok(Ok(())), None) => outcome::cut(&around),
        (Ok(Err(error)), None) => outcome::failure(error, &around),
    };
    let Spoken { said, log, log_bytes_dropped, .. } = spoken;
    let reply = match failure {
        Some(failure) => Err(failure),
        None => reply(guest.reply, said, provider.as_ref()),
    };
    Finished { reply, snapshot: guest.snapshot, usage: control.usage(), log, log_bytes_dropped }
}

/// What the guest answered; an empty success is a failure.
fn reply(staged: Option<Content>, said: String, provider: Option<&OperationError>) -> Result<Reply, Failure> {
    let reply = match staged {
        Some(content) => {
            let only_text = match &content {
                Content::Text(_) => true,
                Content::Parts(content) => content.parts.iter().all(|part| matches!(part, Part::Text { .. })),
            };
            let replaces_deltas = !only_text || content.joined_text() != said;
            Reply { content, replaces_deltas }
        }
        None => Reply { content: Content::text(said), replaces_deltas: false },
    };
    if reply.content.is_empty() { Err(outcome::no_reply(provider)) } else { Ok(reply) }
}
