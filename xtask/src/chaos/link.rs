//! The network between a replica and its database: a proxy on a loopback port that passes bytes on, late, or not at all.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

/// What it does with the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Passes them on.
    Fair,
    /// Passes them on this much later.
    Slow(Duration),
    /// Resets every connection, and each that is made.
    Cut,
    /// Keeps them, and its connections open.
    Hole,
}

/// Several ways of one replica, under one weather. Dropping it closes them.
pub struct Link {
    weather: watch::Sender<Weather>,
    tasks: Vec<AbortHandle>,
}

impl Link {
    pub fn new() -> Link {
        Link { weather: watch::Sender::new(Weather::Fair), tasks: Vec::new() }
    }

    /// A new way to `upstream`; where it begins.
    pub async fn open(&mut self, upstream: SocketAddr) -> Result<SocketAddr> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(accept(listener, upstream, self.weather.subscribe()));
        self.tasks.push(task.abort_handle());
        Ok(address)
    }

    pub fn set(&self, weather: Weather) {
        self.weather.send_replace(weather);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

async fn accept(listener: TcpListener, upstream: SocketAddr, weather: watch::Receiver<Weather>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(carry(stream, upstream, weather.clone()));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection. It ends when a side closes it, or the link is cut.
async fn carry(near: TcpStream, upstream: SocketAddr, mut weather: watch::Receiver<Weather>) {
    let mut ways = weather.clone();
    let both = async {
        // Who connects into a hole is not answered.
        let _ = ways.wait_for(|now| *now != Weather::Hole).await;
        let far = TcpStream::connect(upstream).await?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let (from_near, to_near) = near.into_split();
        let (from_far, to_far) = far.into_split();
        let (there, back) = (pass(from_near, to_far, ways.clone()), pass(from_far, to_near, ways.clone()));
        // One direction that has ended ends the connection: PostgreSQL has no use for a half of one.
        tokio::select! {
            done = there => done,
            done = back => done,
        }
    };
    tokio::select! {
        _ = both => {}
        _ = weather.wait_for(|now| *now == Weather::Cut) => {}
    }
}

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
) -> std::io::Result<()> {
    let mut bytes = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut bytes).await?;
        let now = *weather.borrow();
        if let Weather::Slow(by) = now {
            tokio::time::sleep(by).await;
        }
        // The end of a connection is held back like everything else.
        let _ = weather.wait_for(|now| *now != Weather::Hole).await;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&bytes[..read]).await?;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);
    const NOT_YET: Duration = Duration::from_millis(50);

    /// A server that sends back what it is sent.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        address
    }

    async fn ask(stream: &mut TcpStream) -> std::io::Result<[u8; 2]> {
        stream.write_all(b"hi").await?;
        let mut answer = [0; 2];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn a_fair_link_carries_and_a_cut_one_resets() {
        let mut link = Link::new();
        let address = link.open(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(&ask(&mut stream).await.unwrap(), b"hi");
        link.set(Weather::Cut);
        assert!(timeout(SOON, ask(&mut stream)).await.unwrap().is_err());
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert!(timeout(SOON, ask(&mut stream)).await.unwrap().is_err());
        link.set(Weather::Fair);
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(&timeout(SOON, ask(&mut stream)).await.unwrap().unwrap(), b"hi");
    }

    #[tokio::test]
    async fn a_hole_keeps_bytes_and_gives_them_up_later() {
        let mut link = Link::new();
        let address = link.open(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        assert_eq!(&ask(&mut stream).await.unwrap(), b"hi");
        link.set(Weather::Hole);
        stream.write_all(b"ho").await.unwrap();
        let mut answer = [0; 2];
        assert!(timeout(NOT_YET, stream.read_exact(&mut answer)).await.is_err(), "nothing comes through");
        link.set(Weather::Fair);
        timeout(SOON, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"ho");
    }

    #[tokio::test]
    async fn large_bodies_come_through_whole() {
        const BYTES: usize = 1 << 20;
        let mut link = Link::new();
        let address = link.open(echo().await).await.unwrap();
        for _ in 0..20 {
            let (mut from, mut to) = TcpStream::connect(address).await.unwrap().into_split();
            let sent: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
            let expected = sent.clone();
            let sending = tokio::spawn(async move { to.write_all(&sent).await.map(|()| to) });
            let mut read = vec![0; BYTES];
            timeout(SOON, from.read_exact(&mut read)).await.unwrap().unwrap();
            assert!(read == expected);
            sending.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_slow_link_is_late_both_ways() {
        let mut link = Link::new();
        let address = link.open(echo().await).await.unwrap();
        link.set(Weather::Slow(Duration::from_millis(60)));
        let mut stream = TcpStream::connect(address).await.unwrap();
        let asked = std::time::Instant::now();
        assert_eq!(&timeout(SOON, ask(&mut stream)).await.unwrap().unwrap(), b"hi");
        assert!(asked.elapsed() >= Duration::from_millis(120));
    }
}
