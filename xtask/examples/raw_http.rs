//! A part of the bench: the gateway's HTTP stack with nothing behind it. Says its address, serves until its standard input ends.
//!
//! `/json` reads a message and answers with it; `/stream` answers with the events that a turn of `echo` has, in one piece.

use std::convert::Infallible;
use std::io::Read as _;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::post;
use axum::{Json, Router};
use futures_util::stream;
use serde_json::{Value, json};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let router = Router::new().route("/json", post(answer_json)).route("/stream", post(answer_stream));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let parent_is_gone = async {
        // A thread of its own: reading blocks, and nothing ever arrives.
        tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()).ok()).await.ok();
    };
    tokio::select! {
        served = axum::serve(listener, router).into_future() => Ok(served?),
        () = parent_is_gone => Ok(()),
    }
}

async fn answer_json(Json(message): Json<Value>) -> impl IntoResponse {
    Json(json!({"reply": {"text": text(&message)}}))
}

async fn answer_stream(Json(message): Json<Value>) -> impl IntoResponse {
    let reply = json!({"text": text(&message)});
    let events = format!(
        "event: turn.accepted\ndata: {{}}\nid: 0.0\n\n\
         event: turn.started\ndata: {{\"attempt\":1,\"worker\":\"echo\",\"version\":1}}\nid: 1.0\n\n\
         event: output.delta\ndata: {reply}\nid: 1.1\n\n\
         event: turn.completed\ndata: {}\nid: end\n\n",
        json!({"reply": reply, "usage": {"cpu_ms": 0.1}, "replaces_deltas": false})
    );
    // A stream, not a text: it is sent in chunks, as a turn's events are.
    let body = Body::from_stream(stream::iter([Ok::<_, Infallible>(Bytes::from(events))]));
    ([(CONTENT_TYPE, "text/event-stream")], body)
}

fn text(message: &Value) -> &str {
    message["message"]["text"].as_str().unwrap_or_default()
}
