//! What a guest is told about its turn: the JSON of `input_read`, its environment, its history. Pure.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::agent::Agent;
use crate::clock::Timestamp;
use crate::content::Content;
use crate::ids::{AgentId, ConversationId, RunId, TurnId, UserId, WorkerName};
use crate::sandbox::{Input, InputJson};
use crate::store::Claimed;

/// Completed turns of the conversation, oldest first: message and reply as JSON.
pub type History = Vec<(TurnId, Bytes, Bytes)>;

/// `input_read`'s document.
#[derive(Serialize)]
struct Document<'a> {
    turn_id: TurnId,
    conversation_id: Option<&'a ConversationId>,
    agent_id: &'a AgentId,
    user_id: &'a UserId,
    run_id: Option<RunId>,
    attempt: u32,
    dry_run: bool,
    message: &'a RawValue,
    accepted_unix_ms: i64,
    /// A number, so that a guest in C needs no parser of dates.
    deadline_unix_ms: i64,
    snapshot: Option<Origin<'a>>,
    environment: &'a std::collections::BTreeMap<String, String>,
    history: Vec<Spoken>,
}

/// Where the snapshot comes from.
#[derive(Serialize)]
struct Origin<'a> {
    run_id: RunId,
    worker: &'a WorkerName,
    version: u32,
}

/// One side of a completed turn.
#[derive(Serialize)]
struct Spoken {
    role: &'static str,
    turn_id: TurnId,
    /// `text` or `parts`.
    #[serde(flatten)]
    content: Content,
}

/// Everything that the guest is given. `deadline` is its turn's by the clock that the guest can read, whatever time the store goes by.
pub fn of(claimed: Claimed, agent: &Arc<Agent>, history: History, deadline: Timestamp) -> Input {
    let text = match serde_json::from_slice::<Content>(&claimed.message) {
        Ok(content) => Bytes::from(content.joined_text().into_owned()),
        Err(_) => Bytes::new(),
    };
    let mut environment = vec![
        ("TURNHOUSE_TURN_ID".to_owned(), claimed.lease.turn.to_string()),
        ("TURNHOUSE_AGENT_ID".to_owned(), claimed.agent.to_string()),
    ];
    if let Some(conversation) = &claimed.envelope.conversation {
        environment.push(("TURNHOUSE_CONVERSATION_ID".to_owned(), conversation.to_string()));
    }
    environment.extend(agent.settings.environment.iter().map(|(name, value)| (name.clone(), value.clone())));
    let arguments = vec![claimed.worker.as_ref().map_or_else(|| "worker".to_owned(), |(name, _)| name.to_string())];
    let snapshot =
        claimed.head.as_ref().and_then(|head| head.snapshot.as_ref()).and_then(|snapshot| snapshot.body.clone());
    let dry_run = claimed.dry_run;
    let agent = agent.clone();
    let json = InputJson(Arc::new(move || document(&claimed, &agent, &history, deadline)));
    Input { json, text, snapshot, environment, arguments, dry_run }
}

fn document(claimed: &Claimed, agent: &Agent, history: &History, deadline: Timestamp) -> Bytes {
    let null: &RawValue = serde_json::from_str("null").expect("null is JSON");
    let document = Document {
        turn_id: claimed.lease.turn,
        conversation_id: claimed.envelope.conversation.as_ref(),
        agent_id: &claimed.agent,
        user_id: &claimed.user,
        run_id: claimed.envelope.run_id,
        attempt: claimed.attempt,
        dry_run: claimed.dry_run,
        message: serde_json::from_slice(&claimed.message).unwrap_or(null),
        accepted_unix_ms: claimed.accepted_at.0,
        deadline_unix_ms: deadline.0,
        snapshot: claimed.head.as_ref().and_then(|head| head.snapshot.as_ref()).map(|snapshot| Origin {
            run_id: snapshot.run_id,
            worker: &snapshot.worker,
            version: snapshot.version,
        }),
        environment: &agent.settings.environment,
        history: history.iter().flat_map(spoken).collect(),
    };
    serde_json::to_vec(&document).expect("plain data serialises").into()
}

fn spoken((turn, message, reply): &(TurnId, Bytes, Bytes)) -> impl Iterator<Item = Spoken> {
    [("user", message), ("agent", reply)].into_iter().filter_map(|(role, content)| {
        Some(Spoken { role, turn_id: *turn, content: serde_json::from_slice(content).ok()? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_told_as_both_sides_spoke() {
        let turn = TurnId::new();
        let history = (
            turn,
            Bytes::from_static(br#"{"text":"hi"}"#),
            Bytes::from_static(br#"{"parts":[{"type":"text","text":"ho"}]}"#),
        );
        let told: Vec<_> = spoken(&history).map(|spoken| serde_json::to_value(spoken).unwrap()).collect();
        assert_eq!(told[0], serde_json::json!({"role": "user", "turn_id": turn, "text": "hi"}));
        assert_eq!(told[1]["role"], "agent");
        assert_eq!(told[1]["parts"][0]["text"], "ho");
    }
}
