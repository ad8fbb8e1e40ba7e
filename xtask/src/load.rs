//! The load tool: clients that each hold one connection and send their next request when the last is answered, and a record of how long that took.
//!
//! It owns no rows and knows no hosts: the bench says what to send and what counts as an answer. Everything runs on the caller's single-threaded
//! runtime, so that it takes one core at most from the host beside it.

mod connection;
mod histogram;
mod wire;

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::task::JoinSet;

pub use connection::{Connection, request};
pub use histogram::Histogram;

/// How much longer than planned a run may take before it counts as stuck.
const GRACE: Duration = Duration::from_secs(60);

/// What a client waits for before its next request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// A response with this status, to its end.
    Status(u16),
    /// A stream of events that holds this one and ends.
    Event(&'static str),
}

/// Writes the n-th request of a client; the buffer is empty.
pub type Requests = Rc<dyn Fn(usize, u64, &mut Vec<u8>)>;

/// A closed loop of clients.
#[derive(Clone)]
pub struct Load {
    /// Several share the clients out among them, as a load balancer would.
    pub addresses: Vec<SocketAddr>,
    pub clients: usize,
    /// Not recorded.
    pub warm_up: Duration,
    pub measured: Duration,
    /// Ends a run early, all clients together; no end when `None`.
    pub requests_max: Option<u64>,
    pub answer: Answer,
    /// Between an answer and the next request.
    pub pause: Duration,
    pub requests: Requests,
}

impl Load {
    /// As fast as it goes.
    pub fn new(address: SocketAddr, clients: usize, measured: Duration, answer: Answer, requests: Requests) -> Load {
        let warm_up = (measured / 4).min(Duration::from_secs(1));
        let addresses = vec![address];
        Load { addresses, clients, warm_up, measured, requests_max: None, answer, pause: Duration::ZERO, requests }
    }

    /// Runs it. The first unexpected answer ends it with an error: a figure with failures in it measures nothing.
    pub async fn run(&self) -> Result<Sample> {
        let begin = Instant::now() + self.warm_up;
        let end = begin + self.measured;
        let local = tokio::task::LocalSet::new();
        let clients = async {
            let mut running = JoinSet::new();
            for client in 0..self.clients {
                running.spawn_local(self.clone().client(client, begin, end));
            }
            let mut latency = Histogram::new();
            while let Some(done) = running.join_next().await {
                latency.merge(&done.context("a client panicked")??);
            }
            ensure!(latency.count() > 0, "not one request was answered in {:?}", self.measured);
            let elapsed = begin.elapsed().min(self.measured);
            Ok(Sample { per_second: latency.count() as f64 / elapsed.as_secs_f64(), latency })
        };
        let limit = self.warm_up + self.measured + GRACE;
        match tokio::time::timeout(limit, local.run_until(clients)).await {
            Ok(sample) => sample,
            Err(_) => bail!("the run did not end within {limit:?}: some request has no answer"),
        }
    }

    async fn client(self, client: usize, begin: Instant, end: Instant) -> Result<Histogram> {
        let share = self.requests_max.map_or(u64::MAX, |max| max.div_ceil(self.clients as u64));
        let mut connection = Connection::open(self.addresses[client % self.addresses.len()]).await?;
        let mut latency = Histogram::new();
        let mut request = Vec::new();
        for n in 0..share {
            request.clear();
            (self.requests)(client, n, &mut request);
            let sent = Instant::now();
            if sent >= end {
                break;
            }
            let answered = exchange(&mut connection, &request, self.answer).await?;
            if sent >= begin && answered <= end {
                latency.record(answered - sent);
            }
            if !self.pause.is_zero() {
                tokio::time::sleep(self.pause).await;
            }
        }
        Ok(latency)
    }
}

/// One request and the moment of its answer; reads the response to its end, which may come later.
pub async fn exchange(connection: &mut Connection, request: &[u8], answer: Answer) -> Result<Instant> {
    let head = connection.send(request).await?;
    match answer {
        Answer::Status(status) if head.status == status => {
            connection.body().await?;
            Ok(Instant::now())
        }
        Answer::Event(kind) if head.status == 200 => {
            let mut answered = None;
            while let Some(event) = connection.event().await? {
                if event.kind == kind {
                    answered = Some(Instant::now());
                } else if event.is_terminal() {
                    bail!("expected {kind}, saw {}: {}", event.kind, event.data);
                }
            }
            answered.with_context(|| format!("the stream ended without {kind}"))
        }
        _ => {
            let body = connection.body().await?;
            bail!("expected {answer:?}, saw status {}: {}", head.status, String::from_utf8_lossy(&body))
        }
    }
}

/// What a run measured.
#[derive(Debug)]
pub struct Sample {
    pub per_second: f64,
    pub latency: Histogram,
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// A server that answers every request of a connection with the same bytes; the third request of a connection with `third`.
    async fn server(usual: Vec<u8>, third: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (usual, third) = (usual.clone(), third.clone());
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    for n in 1.. {
                        match stream.read(&mut buffer).await {
                            Ok(0) | Err(_) => return,
                            Ok(_) => drop(stream.write_all(if n == 3 { &third } else { &usual }).await),
                        }
                    }
                });
            }
        });
        address
    }

    fn ended(kind: &str) -> Vec<u8> {
        wire::chunked(&["id: 0.0\nevent: turn.accepted\n\n", &format!("id: end\nevent: {kind}\ndata: {{}}\n\n")])
    }

    fn load(address: SocketAddr, requests_max: u64) -> Load {
        let requests: Requests = Rc::new(|_, _, out| out.extend(request("GET", "/", "", &[], b"")));
        let mut load = Load::new(address, 4, Duration::from_secs(5), Answer::Event("turn.completed"), requests);
        load.warm_up = Duration::ZERO;
        load.requests_max = Some(requests_max);
        load
    }

    #[tokio::test]
    async fn every_answer_is_counted() {
        let sample = load(server(ended("turn.completed"), ended("turn.completed")).await, 40).run().await.unwrap();
        assert_eq!(sample.latency.count(), 40);
        assert!(sample.per_second > 8.0);
    }

    #[tokio::test]
    async fn one_failed_turn_spoils_the_run() {
        let error =
            load(server(ended("turn.completed"), ended("turn.failed")).await, 40).run().await.unwrap_err().to_string();
        assert!(error.contains("turn.failed"), "{error}");
    }

    #[tokio::test]
    async fn an_unexpected_status_is_shown_with_its_body() {
        let busy = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nfull".to_vec();
        let error = load(server(busy.clone(), busy).await, 40).run().await.unwrap_err().to_string();
        assert!(error.contains("503") && error.contains("full"), "{error}");
    }
}
