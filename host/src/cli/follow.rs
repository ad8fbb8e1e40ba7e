//! Follows a turn over HTTP to its terminal event, through lost connections and restarts of its host.
//!
//! What it yields is the turn's log, each event once: after a break it goes on from the last id that it saw.

use std::pin::Pin;
use std::time::Duration;

use eventsource_stream::Eventsource as _;
use futures_util::{Stream, StreamExt as _};
use reqwest::StatusCode;
use serde_json::Value;

use super::client::{Client, RequestError};
use super::output::note;
use super::{CliError, Result};

/// How often in a row it connects, and is told nothing, before it gives up: with the delays below some two minutes, longer than a host's restart.
const ATTEMPTS_MAX: u32 = 32;
const DELAY_MAX: Duration = Duration::from_secs(4);

/// One event of a turn.
#[derive(Debug, Clone)]
pub struct TurnEvent {
    /// `<epoch>.<seq>` or `end`.
    pub id: String,
    /// `output.delta`, ….
    pub kind: String,
    /// As in the API.
    pub data: Value,
}

impl TurnEvent {
    fn is_terminal(&self) -> bool {
        self.id == "end" || matches!(self.kind.as_str(), "turn.completed" | "turn.failed" | "turn.cancelled")
    }
}

type Events = Pin<Box<dyn Stream<Item = Option<eventsource_stream::Event>> + Send>>;

/// A reader of one turn.
pub struct Follower<'a> {
    client: &'a Client,
    path: String,
    last_id: Option<String>,
    events: Option<Events>,
    /// Connections in a row that brought nothing.
    failed: u32,
    ended: bool,
}

impl<'a> Follower<'a> {
    /// Follows `turn` from its first event.
    pub fn new(client: &'a Client, turn: &str) -> Follower<'a> {
        Follower {
            client,
            path: format!("v1/turns/{turn}/events"),
            last_id: None,
            events: None,
            failed: 0,
            ended: false,
        }
    }

    /// The next event; after the terminal one `None`. Cancel-safe: an event is taken from the stream and remembered in the same step.
    pub async fn next(&mut self) -> Result<Option<TurnEvent>> {
        while !self.ended {
            let Some(events) = self.events.as_mut() else {
                self.connect().await?;
                continue;
            };
            // The end of a stream, or its break: both are answered by connecting again.
            let Some(Some(event)) = events.next().await else {
                self.events = None;
                self.failed += 1;
                continue;
            };
            let Ok(data) = serde_json::from_str(&event.data) else { continue };
            let event = TurnEvent { id: event.id, kind: event.event, data };
            self.failed = 0;
            self.last_id = Some(event.id.clone()).filter(|id| !id.is_empty()).or(self.last_id.take());
            self.ended = event.is_terminal();
            return Ok(Some(event));
        }
        Ok(None)
    }

    async fn connect(&mut self) -> Result {
        if self.failed > ATTEMPTS_MAX {
            return Err(CliError::failed("the stream breaks again and again").help("the host's log may say why"));
        }
        if self.failed > 0 {
            if self.failed == 3 {
                note("the connection is lost; trying again");
            }
            tokio::time::sleep(delay(self.failed)).await;
        }
        match self.client.events(&self.path, self.last_id.as_deref()).await {
            Ok(Some(response)) => {
                let events = response.bytes_stream().eventsource().map(|event| event.ok());
                self.events = Some(Box::pin(events));
            }
            Ok(None) => self.ended = true,
            Err(error) if self.failed >= ATTEMPTS_MAX || !passes(&error) => return Err(CliError::from(error)),
            Err(_) => self.failed += 1,
        }
        Ok(())
    }
}

/// Whether another attempt may well succeed. A first connection that is refused is told at once by the request before it.
fn passes(error: &RequestError) -> bool {
    match error {
        RequestError::Unreachable(_) => true,
        RequestError::Problem { status, .. } => *status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error(),
    }
}

fn delay(failed: u32) -> Duration {
    DELAY_MAX.min(Duration::from_millis(100 << failed.min(8)))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::TcpListener;

    use super::super::client::Server;
    use super::*;

    /// Serves each of `answers` to one connection, and returns the `Last-Event-ID`s that were sent.
    fn serve(answers: Vec<&'static str>) -> (Server, std::thread::JoinHandle<Vec<Option<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let server = std::thread::spawn(move || {
            let mut seen = Vec::new();
            for body in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(std::result::Result::ok);
                let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
                seen.push(head.iter().find_map(|line| line.strip_prefix("last-event-id: ")).map(str::to_owned));
                // No length and no chunks: the body ends with the connection, as after a crash.
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
                stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            }
            seen
        });
        (Server { url, api_key: Some("th_x".to_owned().into()), org: None }, server)
    }

    #[tokio::test]
    async fn e2_a_broken_stream_goes_on_from_the_last_event() {
        let (server, seen) = serve(vec![
            "event: turn.accepted\ndata: {}\nid: 0.0\n\nevent: output.delta\ndata: {\"text\":\"a\"}\nid: 1.1\n\nevent: output.del",
            ": ping\n\nevent: turn.completed\ndata: {\"reply\":{\"text\":\"ab\"}}\nid: end\n\n",
        ]);
        let client = Client::new(&server).unwrap();
        let mut follower = Follower::new(&client, "t");
        let mut kinds = Vec::new();
        while let Some(event) = follower.next().await.unwrap() {
            kinds.push(event.kind);
        }
        assert_eq!(kinds, ["turn.accepted", "output.delta", "turn.completed"]);
        assert_eq!(seen.join().unwrap(), [None, Some("1.1".to_owned())]);
    }

    #[test]
    fn waiting_grows_and_stays_bounded() {
        assert!(delay(1) < delay(2) && delay(ATTEMPTS_MAX) == DELAY_MAX);
    }
}
