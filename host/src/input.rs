//! What a guest is told about its turn: the JSON of `input_read`, its environment, its history. Pure.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::agent::Agent;
use crate::attachment::AttachmentId;
use crate::clock::Timestamp;
use crate::content::{Content, Part};
use crate::event::raw;
use crate::ids::{AgentId, ConversationId, RunId, TurnId, UserId, WorkerName};
use crate::sandbox::{Attachments, Input, InputJson};
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
    message: Cow<'a, RawValue>,
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
    content: Value,
}

/// A part of a message as the guest is told it, where it is an attachment.
#[derive(Serialize)]
#[serde(tag = "type", rename = "attachment")]
struct ToldAttachment<'a> {
    attachment_id: AttachmentId,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    media_type: &'a str,
    bytes: u64,
}

/// Everything that the guest is given. `deadline` is its turn's by the clock that the guest can read, whatever time the store goes by.
pub fn of(
    claimed: Claimed,
    agent: &Arc<Agent>,
    history: History,
    attachments: Attachments,
    deadline: Timestamp,
) -> Input {
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
    let (agent, known) = (agent.clone(), attachments.clone());
    let json = InputJson(Arc::new(move || document(&claimed, &agent, &history, &known, deadline)));
    Input { json, text, snapshot, environment, arguments, dry_run, attachments }
}

fn document(
    claimed: &Claimed,
    agent: &Agent,
    history: &History,
    attachments: &Attachments,
    deadline: Timestamp,
) -> Bytes {
    let null: &RawValue = serde_json::from_str("null").expect("null is JSON");
    let document = Document {
        turn_id: claimed.lease.turn,
        conversation_id: claimed.envelope.conversation.as_ref(),
        agent_id: &claimed.agent,
        user_id: &claimed.user,
        run_id: claimed.envelope.run_id,
        attempt: claimed.attempt,
        dry_run: claimed.dry_run,
        message: told(serde_json::from_slice(&claimed.message).unwrap_or(null), attachments),
        accepted_unix_ms: claimed.accepted_at.0,
        deadline_unix_ms: deadline.0,
        snapshot: claimed.head.as_ref().and_then(|head| head.snapshot.as_ref()).map(|snapshot| Origin {
            run_id: snapshot.run_id,
            worker: &snapshot.worker,
            version: snapshot.version,
        }),
        environment: &agent.settings.environment,
        history: history.iter().flat_map(|turn| spoken(turn, attachments)).collect(),
    };
    serde_json::to_vec(&document).expect("plain data serialises").into()
}

fn spoken((turn, message, reply): &(TurnId, Bytes, Bytes), attachments: &Attachments) -> impl Iterator<Item = Spoken> {
    [("user", message), ("agent", reply)].into_iter().filter_map(move |(role, content)| {
        let content = told(serde_json::from_slice(content).ok()?, attachments);
        Some(Spoken { role, turn_id: *turn, content: serde_json::from_str(content.get()).ok()? })
    })
}

/// A message as it came, its attachments with what they are.
fn told<'a>(message: &'a RawValue, attachments: &Attachments) -> Cow<'a, RawValue> {
    #[derive(Deserialize)]
    struct Parts<'a> {
        #[serde(borrow)]
        parts: Vec<&'a RawValue>,
    }
    if attachments.is_empty() {
        return Cow::Borrowed(message);
    }
    let Ok(Parts { parts }) = serde_json::from_str(message.get()) else { return Cow::Borrowed(message) };
    let parts: Vec<Cow<'_, RawValue>> = parts.into_iter().map(|part| told_part(part, attachments)).collect();
    Cow::Owned(raw(&TellParts { parts }))
}

#[derive(Serialize)]
struct TellParts<'a> {
    parts: Vec<Cow<'a, RawValue>>,
}

fn told_part<'a>(part: &'a RawValue, attachments: &Attachments) -> Cow<'a, RawValue> {
    let Ok(Part::Attachment { attachment_id, name }) = serde_json::from_str(part.get()) else {
        return Cow::Borrowed(part);
    };
    let Some(found) = attachments.get(attachment_id) else { return Cow::Borrowed(part) };
    let told =
        ToldAttachment { attachment_id, name: name.as_deref(), media_type: &found.media_type, bytes: found.bytes };
    Cow::Owned(raw(&told))
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
        let none = Attachments::default();
        let told: Vec<_> = spoken(&history, &none).map(|spoken| serde_json::to_value(spoken).unwrap()).collect();
        assert_eq!(told[0], serde_json::json!({"role": "user", "turn_id": turn, "text": "hi"}));
        assert_eq!(told[1]["role"], "agent");
        assert_eq!(told[1]["parts"][0]["text"], "ho");
    }
}
