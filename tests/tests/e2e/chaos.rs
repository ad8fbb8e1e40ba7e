//! Everything at once, on few conversations: whatever clients do to each other, nothing of ours fails and the tables stay sound.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::json;
use turnhouse_tests::choices::{Choices, seed};
use turnhouse_tests::{Client, TestHost, Turn};

const AGENTS: [&str; 4] = ["snapshot_counter", "slow_reply", "trap", "progress_slowly"];

/// One client's doings; what was accepted of them.
async fn client(ann: Client, mut choices: Choices, steps: u32) -> Vec<String> {
    let mut accepted: Vec<String> = Vec::new();
    for step in 0..steps {
        let (agent, conversation) = (choices.of(&AGENTS), format!("c-{}", choices.below(2)));
        let path = format!("/v1/agents/{agent}/conversations/{conversation}");
        let known = (!accepted.is_empty()).then(|| accepted[choices.below(accepted.len() as u64) as usize].clone());
        let (status, body) = match (choices.below(20), known) {
            (0, _) => ann.call(Method::DELETE, &path).await,
            (1, _) => ann.call(Method::DELETE, &format!("{path}/snapshot")).await,
            (2, _) => ann.get(&format!("{path}/messages")).await,
            (3 | 4, Some(turn)) => ann.call(Method::POST, &format!("/v1/turns/{turn}/cancel")).await,
            (5, Some(turn)) => {
                // Looks in, and leaves.
                let request = ann.request(Method::GET, &format!("/v1/turns/{turn}/events"));
                let response = request.timeout(Duration::from_millis(1 + choices.below(20))).send().await;
                (response.map_or(StatusCode::OK, |response| response.status()), json!(null))
            }
            (6, _) => {
                let version = choices.below(2) == 0;
                let settings = json!({ "worker": agent, "history_messages": if version { 3 } else { 0 } });
                ann.send(Method::PUT, &format!("/v1/agents/{agent}"), settings).await
            }
            (what, _) => {
                let text = if agent == "progress_slowly" { "3 ticks every 2" } else { "5" };
                let on_busy = choices.of(&["enqueue", "enqueue", "enqueue", "reject", "interrupt"]);
                let body = json!({ "message": { "text": text }, "on_busy": on_busy });
                let key =
                    if what > 16 { format!("k-{}", choices.below(5)) } else { format!("{step}-{}", choices.next()) };
                let (status, _, answer) = ann.submit_keyed(agent, &conversation, &key, body).await;
                if status == StatusCode::ACCEPTED {
                    accepted.push(answer["turn_id"].as_str().expect("its id").to_owned());
                }
                (status, answer)
            }
        };
        assert!(!status.is_server_error(), "{status}: {body}");
    }
    accepted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t1_s3_whatever_clients_do_to_each_other() {
    let mut choices = Choices::new(seed());
    let host = TestHost::start_with(|config| config.limits.host_running_max = 4).await;
    let ann = host.member("acme", "ann", "admin").await;
    for agent in AGENTS {
        ann.deploy(agent).await;
    }
    let clients = (0..8).map(|_| tokio::spawn(client(ann.clone(), Choices::new(choices.next()), 120)));
    let ended = tokio::time::timeout(Duration::from_secs(120), join_all(clients)).await.expect("all are answered");
    let accepted: Vec<String> = ended.into_iter().flat_map(|accepted| accepted.expect("no panic")).collect();
    let ann = Arc::new(ann);
    for id in accepted {
        let turn = Turn { client: (*ann).clone(), id };
        // What was deleted with its conversation is not there any more.
        let (status, _) = ann.get(&format!("/v1/turns/{}", turn.id)).await;
        if status != StatusCode::NOT_FOUND {
            turn.ended().await;
        }
    }
    host.stop().await;
}
