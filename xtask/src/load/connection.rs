//! One keep-alive connection to a host.
//!
//! It owns the bytes that have arrived and are not used yet. It has no time-outs of its own: whoever drives it bounds the whole of what it does.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::wire::{self, Body, Event, Head};

pub struct Connection {
    stream: TcpStream,
    /// Arrived, not decoded.
    input: Vec<u8>,
    /// Decoded body, not handed out.
    content: Vec<u8>,
    /// What of `content` the last event took.
    taken: usize,
    body: Body,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Result<Connection> {
        let stream =
            TcpStream::connect(address).await.with_context(|| format!("cannot reach the host at {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Connection {
            stream,
            input: Vec::with_capacity(4096),
            content: Vec::with_capacity(4096),
            taken: 0,
            body: Body::Done,
        })
    }

    /// Sends a request and reads the head of its response. The response before must have been read to its end.
    pub async fn send(&mut self, request: &[u8]) -> Result<Head> {
        ensure!(self.body == Body::Done, "the response before this one was not read to its end");
        self.content.clear();
        self.taken = 0;
        self.stream.write_all(request).await.context("the host closed the connection")?;
        loop {
            if let Some((head, used)) = Head::parse(&self.input)? {
                self.input.drain(..used);
                self.body = head.body()?;
                return Ok(head);
            }
            self.receive().await?;
        }
    }

    /// The rest of the response's body.
    pub async fn body(&mut self) -> Result<Vec<u8>> {
        while self.decode()? {
            self.receive().await?;
        }
        let body = self.content.split_off(self.taken);
        self.content.clear();
        self.taken = 0;
        Ok(body)
    }

    /// The next server-sent event, or `None` at the end of the response.
    pub async fn event(&mut self) -> Result<Option<Event<'_>>> {
        let (from, to) = loop {
            if let Some(length) = wire::block(&self.content[self.taken..]) {
                let from = self.taken;
                self.taken += length;
                if wire::parse_event(&self.content[from..self.taken])?.is_some() {
                    break (from, self.taken);
                }
                continue;
            }
            self.content.drain(..self.taken);
            self.taken = 0;
            if !self.decode()? {
                if wire::block(&self.content).is_some() {
                    continue;
                }
                ensure!(self.content.is_empty(), "the stream ended inside an event");
                return Ok(None);
            }
            if wire::block(&self.content).is_none() {
                self.receive().await?;
            }
        };
        wire::parse_event(&self.content[from..to])
    }

    /// Decodes what has arrived. Whether more is to come.
    fn decode(&mut self) -> Result<bool> {
        let used = self.body.decode(&self.input, &mut self.content)?;
        self.input.drain(..used);
        Ok(self.body != Body::Done)
    }

    async fn receive(&mut self) -> Result<()> {
        let bytes = self.stream.read_buf(&mut self.input).await.context("the connection broke")?;
        ensure!(bytes > 0, "the host closed the connection before the response's end");
        Ok(())
    }
}

/// A request's bytes. `headers` are whole lines without their end.
pub fn request(method: &str, path: &str, key: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(256 + body.len());
    bytes.extend_from_slice(format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n").as_bytes());
    if !key.is_empty() {
        bytes.extend_from_slice(format!("Authorization: Bearer {key}\r\n").as_bytes());
    }
    for line in headers {
        bytes.extend_from_slice(line.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    if !body.is_empty() {
        bytes.extend_from_slice(
            format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()).as_bytes(),
        );
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// A server that reads a request, answers with `response` in pieces of `step` bytes, and hangs up.
    async fn answer(response: Vec<u8>, step: usize) -> Connection {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).await.unwrap() > 0);
            for piece in response.chunks(step) {
                stream.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        Connection::open(address).await.unwrap()
    }

    fn stream() -> Vec<u8> {
        wire::chunked(&["id: 0.0\nevent: a\ndata: {}\n", "\n", "id: end\nevent: b\ndata: {}\n\n:", "ping\n", "\n"])
    }

    #[tokio::test]
    async fn events_arrive_in_order_however_they_are_cut() {
        for step in [1, 2, 5, 1_000] {
            let mut connection = answer(stream(), step).await;
            let head = connection.send(&request("GET", "/", "", &[], b"")).await.unwrap();
            assert_eq!(head.status, 200);
            let first = connection.event().await.unwrap().unwrap();
            assert_eq!((first.id, first.kind), ("0.0", "a"));
            let second = connection.event().await.unwrap().unwrap();
            assert_eq!((second.id, second.kind), ("end", "b"));
            assert_eq!(connection.event().await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn a_response_that_breaks_off_is_an_error() {
        let whole = stream();
        let mut connection = answer(whole[..whole.len() - 40].to_vec(), 1_000).await;
        connection.send(&request("GET", "/", "", &[], b"")).await.unwrap();
        connection.event().await.unwrap().unwrap();
        let broken = connection.event().await.unwrap_err().to_string();
        assert!(broken.contains("closed the connection"), "{broken}");
    }

    #[test]
    fn a_request_carries_its_key_and_length() {
        let bytes = request("POST", "/v1/x", "th_1", &["Accept: text/event-stream"], b"{}");
        assert_eq!(
            String::from_utf8(bytes).unwrap(),
            "POST /v1/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer th_1\r\nAccept: text/event-stream\r\n\
             Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        );
    }
}
