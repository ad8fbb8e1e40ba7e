//! A client of the real HTTP API, in the words of a test.

use std::time::Duration;

use eventsource_stream::Eventsource as _;
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::PATIENCE;

/// A member of an org.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// Where the host is.
    pub url: String,
    /// The member's key.
    pub key: String,
}

/// A submitted turn.
pub struct Turn {
    /// Who submitted it.
    pub client: Client,
    /// Its id.
    pub id: String,
}

/// An event as a client saw it.
#[derive(Debug, Clone, PartialEq)]
pub struct SeenEvent {
    /// `id:`, empty when there was none.
    pub id: String,
    /// `event:`.
    pub kind: String,
    /// `data:`, parsed.
    pub data: Value,
}

impl SeenEvent {
    /// Whether it is one of the three with which a stream ends.
    pub fn is_terminal(&self) -> bool {
        matches!(self.kind.as_str(), "turn.completed" | "turn.failed" | "turn.cancelled")
    }
}

/// Events but for the moment of acceptance, which whoever accepted the turn tells from just before it was written, and everybody else as it was.
pub fn told(mut events: Vec<SeenEvent>) -> Vec<SeenEvent> {
    for event in events.iter_mut().filter(|event| event.kind == "turn.accepted") {
        event.data["accepted_at"] = json!(null);
    }
    events
}

/// An open stream of a turn's events.
pub struct Events(BoxStream<'static, SeenEvent>);

impl Events {
    fn of(response: reqwest::Response) -> Events {
        let stream = response.bytes_stream().eventsource().map(|event| {
            let event = event.expect("the stream is well-formed");
            let data = serde_json::from_str(&event.data).expect("data is JSON");
            SeenEvent { id: event.id, kind: event.event, data }
        });
        Events(stream.boxed())
    }

    /// The next event, however the stream breaks off.
    pub async fn try_next(&mut self) -> Option<SeenEvent> {
        self.0.next().await
    }

    /// The next event; `None` when the stream has ended.
    pub async fn next(&mut self) -> Option<SeenEvent> {
        tokio::time::timeout(PATIENCE, self.0.next()).await.expect("an event in time")
    }

    /// Reads until an event of this kind, and returns it.
    ///
    /// # Panics
    /// When the stream ends first.
    pub async fn until(&mut self, kind: &str) -> SeenEvent {
        loop {
            let event = self.next().await.unwrap_or_else(|| panic!("the stream ended before {kind}"));
            if event.kind == kind {
                return event;
            }
            assert!(!event.is_terminal(), "the turn ended before {kind}: {event:?}");
        }
    }

    /// Everything to the stream's end.
    pub async fn all(mut self) -> Vec<SeenEvent> {
        let mut all = Vec::new();
        while let Some(event) = self.next().await {
            all.push(event);
        }
        all
    }
}

impl Client {
    /// A client of the host at `url`, with a key.
    pub fn new(url: &str, key: &str) -> Client {
        let http = reqwest::Client::builder().timeout(PATIENCE * 2).build().expect("a client");
        Client { http, url: url.to_owned(), key: key.to_owned() }
    }

    /// A request with the member's key.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(&self.key)
    }

    /// A request without a key.
    pub fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    /// The events at a URL that says by itself who may read them, as an `EventSource` asks for them.
    pub async fn follow(&self, path: &str, last_event_id: Option<&str>) -> Events {
        let mut request = self.anonymous(Method::GET, path).header("accept", "text/event-stream");
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        let response = request.send().await.expect("an answer");
        if response.status() != StatusCode::OK {
            panic!("{}: {}", response.status(), response.text().await.unwrap_or_default());
        }
        Events::of(response)
    }

    /// Sends a request without a body; status and JSON (`null` when there is none).
    pub async fn call(&self, method: Method, path: &str) -> (StatusCode, Value) {
        answer(self.request(method, path)).await
    }

    /// Sends JSON.
    pub async fn send(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        answer(self.request(method, path).json(&body)).await
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::GET, path).await
    }

    /// Uploads the built guest `name` as a worker, and makes the agent `name` of it.
    pub async fn deploy(&self, name: &str) {
        self.deploy_as(name, name, json!({})).await;
    }

    /// The same with settings of the agent's own: `{"limits": {…}}`.
    pub async fn deploy_as(&self, guest: &str, agent: &str, settings: Value) {
        let (status, body) = self.upload(guest, turnhouse_workers::bytes(guest)).await;
        assert!(status.is_success(), "{status}: {body}");
        self.set_agent(agent, guest, settings).await;
    }

    /// Uploads bytes as a worker.
    pub async fn upload(&self, worker: &str, wasm: Vec<u8>) -> (StatusCode, Value) {
        let request = self.request(Method::PUT, &format!("/v1/workers/{worker}"));
        answer(request.header("content-type", "application/wasm").body(wasm)).await
    }

    /// Uploads an attachment; its id.
    ///
    /// # Panics
    /// When it is not taken.
    pub async fn attach(&self, media_type: &str, bytes: impl Into<Vec<u8>>) -> String {
        let request = self.request(Method::POST, "/v1/attachments");
        let (status, body) = answer(request.header("content-type", media_type).body(bytes.into())).await;
        assert!(status.is_success(), "{status}: {body}");
        body["id"].as_str().expect("its id").to_owned()
    }

    /// Makes or changes an agent.
    pub async fn set_agent(&self, agent: &str, worker: &str, settings: Value) {
        let mut body = json!({ "worker": worker });
        body.as_object_mut().expect("an object").extend(settings.as_object().expect("an object").clone());
        let (status, answer) = self.send(Method::PUT, &format!("/v1/agents/{agent}"), body).await;
        assert!(status.is_success(), "{status}: {answer}");
    }

    /// The path of a conversation's turns.
    pub fn turns(agent: &str, conversation: &str) -> String {
        format!("/v1/agents/{agent}/conversations/{conversation}/turns")
    }

    /// Submits a text.
    ///
    /// # Panics
    /// When it is not accepted.
    pub async fn say(&self, agent: &str, conversation: &str, text: &str) -> Turn {
        let (status, body) = self.submit(agent, conversation, json!({ "message": { "text": text } })).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{body}");
        self.turn(body["turn_id"].as_str().expect("a turn id"))
    }

    /// Submits a body as it is.
    pub async fn submit(&self, agent: &str, conversation: &str, body: Value) -> (StatusCode, Value) {
        self.send(Method::POST, &Self::turns(agent, conversation), body).await
    }

    /// Submits a text under an `Idempotency-Key`; status, whether it is said to be a replay, and the answer.
    pub async fn submit_keyed(
        &self,
        agent: &str,
        conversation: &str,
        key: &str,
        body: Value,
    ) -> (StatusCode, bool, Value) {
        let request = self.request(Method::POST, &Self::turns(agent, conversation)).header("idempotency-key", key);
        let response = request.json(&body).send().await.expect("an answer");
        let (status, replayed) = (response.status(), response.headers().contains_key("idempotent-replayed"));
        (status, replayed, response.json().await.expect("JSON"))
    }

    /// The history of a conversation, oldest first.
    pub async fn messages(&self, agent: &str, conversation: &str) -> Vec<Value> {
        let (status, body) =
            self.get(&format!("/v1/agents/{agent}/conversations/{conversation}/messages?limit=100")).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body["items"].as_array().expect("items").clone()
    }

    /// Submits a text and streams the answer from the same response.
    pub async fn stream(&self, agent: &str, conversation: &str, text: &str) -> Events {
        let request = self.request(Method::POST, &Self::turns(agent, conversation));
        let request = request.header("accept", "text/event-stream").json(&json!({ "message": { "text": text } }));
        let response = request.send().await.expect("an answer");
        if response.status() != StatusCode::OK {
            panic!("{}: {}", response.status(), response.text().await.unwrap_or_default());
        }
        Events::of(response)
    }

    /// A turn by its id.
    pub fn turn(&self, id: &str) -> Turn {
        Turn { client: self.clone(), id: id.to_owned() }
    }
}

impl Turn {
    /// Its resource.
    pub async fn get(&self) -> Value {
        let (status, body) = self.client.get(&format!("/v1/turns/{}", self.id)).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        body
    }

    /// Its events, from the start or after an id.
    pub async fn events(&self, last_event_id: Option<&str>) -> Events {
        let mut request = self.client.request(Method::GET, &format!("/v1/turns/{}/events", self.id));
        if let Some(id) = last_event_id {
            request = request.header("last-event-id", id);
        }
        let response = request.send().await.expect("an answer");
        if response.status() != StatusCode::OK {
            panic!("{}: {}", response.status(), response.text().await.unwrap_or_default());
        }
        Events::of(response)
    }

    /// A ticket for its events: the ticket and its URL.
    pub async fn ticket(&self) -> (String, String) {
        let (status, body) = self.client.call(Method::POST, &format!("/v1/turns/{}/ticket", self.id)).await;
        assert_eq!(status, StatusCode::CREATED, "{body}");
        let text = |name: &str| body[name].as_str().expect("a text").to_owned();
        (text("ticket"), text("url"))
    }

    /// Waits for its end; its resource then.
    pub async fn ended(&self) -> Value {
        let events = self.events(None).await.all().await;
        let terminal: Vec<_> = events.iter().filter(|event| event.is_terminal()).collect();
        assert_eq!(terminal.len(), 1, "exactly one terminal event: {events:?}");
        assert_eq!(terminal[0].id, "end");
        self.get().await
    }

    /// Waits for its reply's text.
    pub async fn completed(&self) -> String {
        let turn = self.ended().await;
        assert_eq!(turn["state"], "completed", "{turn}");
        turn["reply"]["text"].as_str().expect("a text").to_owned()
    }

    /// Waits for its failure; the code.
    pub async fn failed(&self) -> String {
        let turn = self.ended().await;
        assert_eq!(turn["state"], "failed", "{turn}");
        turn["failure"]["code"].as_str().expect("a code").to_owned()
    }

    /// Waits until it is in this state.
    pub async fn reaches(&self, state: &str) {
        let patience = tokio::time::Instant::now() + PATIENCE;
        loop {
            let now = self.get().await["state"].as_str().expect("a state").to_owned();
            if now == state {
                return;
            }
            assert!(tokio::time::Instant::now() < patience, "{} is {now}, not {state}", self.id);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Cancels it; status and answer.
    pub async fn cancel(&self) -> (StatusCode, Value) {
        self.client.call(Method::POST, &format!("/v1/turns/{}/cancel", self.id)).await
    }
}

/// Sends; status and JSON.
pub async fn answer(request: RequestBuilder) -> (StatusCode, Value) {
    let response = request.send().await.expect("an answer");
    let status = response.status();
    let body = response.bytes().await.expect("a whole answer");
    (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
}
