//! Everything at once: clients at three replicas whose way to the store is cut, hangs, is slow or loses answers, each on its own, also for longer
//! than a lease. Whatever was accepted has one end, a key begins one turn, and the tables are sound.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;
use reqwest::StatusCode;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use turnhouse_tests::choices::{Choices, seed};
use turnhouse_tests::{Client, Cluster, Network, Setup};

const REPLICAS: usize = 3;
const CLIENTS: u64 = 6;
const MESSAGES: u64 = 20;

/// Sends its messages one by one, each until it is accepted; the turns that came of them, by key.
async fn client(at: Vec<Client>, who: u64, mut choices: Choices) -> HashMap<String, String> {
    let mut accepted = HashMap::new();
    for n in 0..MESSAGES {
        let agent = choices.of(&["snapshot_counter", "slow_reply", "progress_slowly"]);
        let conversation = format!("c-{}", choices.below(4));
        let text =
            if agent == "progress_slowly" { "3 ticks every 20".to_owned() } else { choices.below(200).to_string() };
        let on_busy = choices.of(&["enqueue", "enqueue", "enqueue", "interrupt"]);
        let (key, body) = (format!("k-{who}-{n}"), json!({ "message": { "text": text }, "on_busy": on_busy }));
        loop {
            let at = &at[choices.below(REPLICAS as u64) as usize];
            let (status, _, answer) = at.submit_keyed(agent, &conversation, &key, body.clone()).await;
            match status {
                StatusCode::ACCEPTED => {
                    let turn = answer["turn_id"].as_str().expect("its id").to_owned();
                    accepted.insert(key.clone(), turn.clone());
                    if choices.below(8) == 0 {
                        let _ = at.turn(&turn).cancel().await;
                    }
                    // Once more, elsewhere: it is that turn, or nobody can tell now.
                    if choices.below(4) == 0 {
                        let (status, _, again) = at.submit_keyed(agent, &conversation, &key, body.clone()).await;
                        assert!(status != StatusCode::ACCEPTED || again["turn_id"] == turn.as_str(), "{again}");
                    }
                    break;
                }
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                other => panic!("{other}: {answer}"),
            }
        }
    }
    accepted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn t1_s3_whatever_becomes_of_the_network() {
    let mut choices = Choices::new(seed());
    let setup = Setup { hints: choices.below(2) == 0, ..Setup::default() };
    let cluster = Cluster::start_with(REPLICAS, setup).await;
    let ann = cluster.member("acme", "ann", "admin").await;
    for guest in ["snapshot_counter", "slow_reply", "progress_slowly"] {
        ann.deploy(guest).await;
    }
    let done = CancellationToken::new();
    let trouble = (0..REPLICAS).map(|replica| {
        let (cluster, done, mut choices) = (&cluster, done.clone(), Choices::new(choices.next()));
        async move {
            while !done.is_cancelled() {
                let late = Network::Late(Duration::from_millis(choices.below(300)));
                let network =
                    choices.of(&[Network::Cut, Network::Hung, Network::AnswersLost, Network::AnswersLost, late]);
                cluster.network(replica, network);
                let times: &[u64] = &[20, 100, 300, 300, 1_000, 4_500];
                tokio::time::sleep(Duration::from_millis(choices.of(times))).await;
                cluster.network(replica, Network::Fine);
                tokio::time::sleep(Duration::from_millis(100 + choices.below(900))).await;
            }
        }
    });
    let trouble = join_all(trouble.collect::<Vec<_>>());
    let clients = (0..CLIENTS).map(|who| {
        let at = (0..REPLICAS).map(|replica| cluster.at(replica, &ann)).collect();
        client(at, who, Choices::new(choices.next()))
    });
    let clients = join_all(clients.collect::<Vec<_>>());
    let calm = async {
        let accepted = tokio::time::timeout(Duration::from_secs(150), clients).await.expect("all are accepted in time");
        done.cancel();
        accepted
    };
    let (accepted, _) = tokio::join!(calm, trouble);
    let accepted: HashMap<String, String> = accepted.into_iter().flatten().collect();
    assert_eq!(accepted.len() as u64, CLIENTS * MESSAGES);
    for (n, turn) in accepted.values().enumerate() {
        let turn = cluster.turn_at(n % REPLICAS, &ann.turn(turn)).ended().await;
        let code = turn["failure"]["code"].as_str();
        assert!(code.is_none() || code == Some("attempts_exhausted"), "nobody's fault: {turn}");
    }
    cluster.stop().await;
}
