//! Hints between hosts: what one has just written, another may be waiting for. LISTEN on a connection of its own, past any pooler; NOTIFY in a
//! transaction of its own, after the commit and never inside it, because those that notify commit one after another. Gathered for a few
//! milliseconds; lost when the network or the database is away. Whoever waits for a hint looks by itself after half a second anyway.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions};
use tokio::sync::{Notify, broadcast};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

use super::Route;
use crate::ids::TurnId;
use crate::store::{AcceptResult, CommitResult, Hint, Write, Written};

pub(super) const CHANNEL: &str = "turnhouse";
/// How long hints are gathered before they are told.
const GATHER: Duration = Duration::from_millis(10);
/// Turns that are named in one message: a message has 8 000 bytes at most.
const TURNS_MAX: usize = 200;
/// Turns that wait to be told; more are left to the readers' own looks.
const WAITING_MAX: usize = 10_000;
/// How often it is asked whether there is another host to tell.
const ALONE_FOR: Duration = Duration::from_secs(2);
/// Before the listener connects again.
const AGAIN: Duration = Duration::from_secs(1);
/// After so long without a word the listener asks the server for one: a connection whose other end is gone may never say so.
const QUIET: Duration = Duration::from_secs(15);

/// Not durable, so that it waits for no disk.
const TELL: &str = "-- tell
SELECT set_config('synchronous_commit', 'off', true), pg_notify($1, $2)";
const OTHERS: &str = "-- others
SELECT EXISTS (SELECT 1 FROM replicas WHERE expires_at > turnhouse_now() OFFSET 1)";

/// Both directions.
pub(super) struct Hints {
    heard: broadcast::Sender<Hint>,
    outbox: Arc<Outbox>,
    _stop: DropGuard,
}

#[derive(Default)]
struct Outbox {
    told: Mutex<(bool, HashSet<TurnId>)>,
    wake: Notify,
}

impl Hints {
    /// Begins to listen and to tell. `listen`: a way to the server past any pooler.
    pub(super) fn start(pool: PgPool, route: Route, listen: PgConnectOptions) -> Hints {
        let stop = CancellationToken::new();
        let heard = broadcast::Sender::new(4_096);
        let outbox = Arc::new(Outbox::default());
        let own = Uuid::new_v4().simple().to_string();
        tokio::spawn(stop.clone().run_until_cancelled_owned(hear(listen, heard.clone(), own.clone(), QUIET)));
        tokio::spawn(stop.clone().run_until_cancelled_owned(tell(pool, route, outbox.clone(), own)));
        Hints { heard, outbox, _stop: stop.drop_guard() }
    }

    pub(super) fn receiver(&self) -> broadcast::Receiver<Hint> {
        self.heard.subscribe()
    }

    /// What a batch may mean to other hosts. A turn that started where it was accepted has no reader elsewhere yet.
    pub(super) fn after(&self, batch: &[Write], written: &[Written]) {
        let mut told = self.outbox.told.lock();
        let (ready, turns) = &mut *told;
        for (item, written) in batch.iter().zip(written) {
            match (item, written) {
                (_, Written::Accept(AcceptResult::Accepted { interrupted, claimed })) => {
                    *ready |= claimed.is_none() || interrupted.iter().any(|ended| ended.promoted);
                    turns.extend(interrupted.iter().map(|ended| ended.turn));
                }
                (_, Written::Claim(claimed)) => turns.extend(claimed.iter().map(|claimed| claimed.lease.turn)),
                (_, Written::Commit(CommitResult::Won(ended))) => {
                    *ready |= ended.promoted;
                    turns.insert(ended.turn);
                }
                (Write::Append(append) | Write::BeginEffect(append), _) => {
                    turns.insert(append.lease.turn);
                }
                (Write::Requeue(_), _) => *ready = true,
                _ => {}
            }
        }
        if turns.len() > WAITING_MAX {
            turns.clear();
        }
        if *ready || !turns.is_empty() {
            self.outbox.wake.notify_one();
        }
    }
}

async fn tell(pool: PgPool, route: Route, outbox: Arc<Outbox>, own: String) {
    let (mut others, mut asked) = (false, None::<Instant>);
    loop {
        outbox.wake.notified().await;
        tokio::time::sleep(GATHER).await;
        let (ready, turns) = std::mem::take(&mut *outbox.told.lock());
        if asked.is_none_or(|asked| asked.elapsed() > ALONE_FOR) {
            let found = async {
                let mut tx = pool.begin().await?;
                sqlx::query_scalar(OTHERS).persistent(route == Route::Direct).fetch_one(&mut *tx).await
            };
            (others, asked) = (found.await.unwrap_or(false), Some(Instant::now()));
        }
        if !others {
            continue;
        }
        let turns: Vec<TurnId> = turns.into_iter().collect();
        let mut parts: Vec<&[TurnId]> = turns.chunks(TURNS_MAX).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        for part in parts {
            let message = encode(&own, ready, part);
            let asked = sqlx::query(TELL).persistent(route == Route::Direct).bind(CHANNEL).bind(message);
            let told = async {
                if route == Route::Direct {
                    return asked.execute(&pool).await.map(drop);
                }
                // Behind a pooler the statement is prepared and executed in one transaction: both meet the same session.
                let mut tx = pool.begin().await?;
                asked.execute(&mut *tx).await?;
                tx.commit().await
            };
            if let Err(error) = told.await {
                tracing::debug!(%error, "a hint was not told");
                break;
            }
        }
    }
}

pub(super) async fn hear(listen: PgConnectOptions, heard: broadcast::Sender<Hint>, own: String, quiet: Duration) {
    loop {
        let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(listen.clone());
        let listened = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(CHANNEL).await?;
            loop {
                let Ok(message) = tokio::time::timeout(quiet, listener.recv()).await else {
                    let asked = tokio::time::timeout(quiet, sqlx::query("SELECT 1").execute(&mut listener)).await;
                    asked.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
                    continue;
                };
                let message = message?;
                for hint in decode(&own, message.payload()) {
                    // Nobody listens: then nobody has to know.
                    let _ = heard.send(hint);
                }
            }
        };
        let Err::<std::convert::Infallible, sqlx::Error>(error) = listened.await;
        tracing::debug!(%error, "hints from other hosts are not heard for a while");
        tokio::time::sleep(AGAIN).await;
    }
}

/// `<teller> <r or -> <turn><turn>…`, each turn 32 hex digits.
fn encode(own: &str, ready: bool, turns: &[TurnId]) -> String {
    let mut message = format!("{own} {} ", if ready { 'r' } else { '-' });
    turns.iter().for_each(|turn| message.push_str(turn.0.simple().encode_lower(&mut Uuid::encode_buffer())));
    message
}

/// Anybody who may connect may notify: what does not read like a hint is none.
fn decode(own: &str, message: &str) -> Vec<Hint> {
    let mut parts = message.splitn(3, ' ');
    let (Some(teller), Some(ready), Some(turns)) = (parts.next(), parts.next(), parts.next()) else {
        return Vec::new();
    };
    if teller == own || !turns.is_ascii() {
        return Vec::new();
    }
    let ready = (ready == "r").then_some(Hint::Ready);
    let turns = turns.as_bytes().chunks_exact(32).filter_map(|turn| Uuid::try_parse_ascii(turn).ok());
    ready.into_iter().chain(turns.map(|turn| Hint::Turn(TurnId(turn)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_told_and_by_others_alone() {
        let turns = [TurnId::new(), TurnId::new()];
        let message = encode("me", true, &turns);
        assert_eq!(decode("you", &message), [Hint::Ready, Hint::Turn(turns[0]), Hint::Turn(turns[1])]);
        assert_eq!(decode("me", &message), []);
        assert_eq!(decode("you", &encode("me", false, &[])), []);
        let many: Vec<TurnId> = (0..TURNS_MAX).map(|_| TurnId::new()).collect();
        assert!(encode(&Uuid::new_v4().simple().to_string(), true, &many).len() < 8_000);
        for odd in ["", " ", "x r é", "x r zz", "x"] {
            assert!(decode("you", odd).into_iter().all(|hint| hint == Hint::Ready), "{odd}");
        }
    }
}
