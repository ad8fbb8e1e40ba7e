//! The snapshot-write gate: who may write a conversation's shared snapshot. Pure.
//!
//! An envelope reaches dispatch from many enqueuers, and not all of them know all of it. The gate needs three facts, all three, before a
//! shared snapshot may be written: the run id, the org and the conversation. [`SnapshotPermit`] has one constructor, here; the host call
//! that stages a snapshot and the commit that stores it both ask for one. The stores say the same table a second time, as a generated
//! column of the marker; a conformance test holds the two against each other.

use serde::{Deserialize, Serialize};

use crate::ids::{ConversationId, OrgId, RunId};

/// How a conversation keeps its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SessionMode {
    /// One snapshot per completed turn, chained.
    #[default]
    Snapshot,
    /// Files in a private directory, which stay from turn to turn. The turns are private: no snapshot, and no history.
    File,
}

impl SessionMode {
    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            SessionMode::Snapshot => "snapshot",
            SessionMode::File => "file",
        }
    }
}

/// What an enqueuer said about a turn's session. What is missing is missing until the gate has looked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The run that wants to write.
    pub run_id: Option<RunId>,
    /// The org, as the enqueuer claims it.
    pub org: Option<OrgId>,
    /// The conversation.
    pub conversation: Option<ConversationId>,
    /// How the agent keeps state.
    pub mode: SessionMode,
}

/// Proof that a turn may write its conversation's shared snapshot. Only [`decide`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPermit {
    run_id: RunId,
    org: OrgId,
    conversation: ConversationId,
}

impl SnapshotPermit {
    /// The run that the snapshot will belong to.
    pub fn run_id(&self) -> RunId {
        self.run_id
    }

    /// The org that the snapshot will belong to.
    pub fn org(&self) -> &OrgId {
        &self.org
    }

    /// The conversation that the snapshot will belong to.
    pub fn conversation(&self) -> &ConversationId {
        &self.conversation
    }
}

/// What a turn may do with shared state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grant {
    /// Starts from the conversation's snapshot and may write the next.
    Shared(SnapshotPermit),
    /// Reads nothing shared and writes nothing shared.
    Private,
}

/// Why a turn may not start. It goes back with back-off; no instance is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum GateRefusal {
    /// A run id without an org.
    #[error("the envelope has a run id and no org")]
    MissingOrg,
    /// A run id and an org, without a conversation.
    #[error("the envelope has a run id and no conversation")]
    MissingConversation,
}

impl GateRefusal {
    /// As stored, and as `reason` of `gate_refused`.
    pub fn as_str(self) -> &'static str {
        match self {
            GateRefusal::MissingOrg => "missing_org",
            GateRefusal::MissingConversation => "missing_conversation",
        }
    }
}

/// The whole table.
pub fn decide(envelope: &Envelope) -> Result<Grant, GateRefusal> {
    match (envelope.mode, &envelope.run_id, &envelope.org, &envelope.conversation) {
        (SessionMode::File, ..) | (SessionMode::Snapshot, None, ..) => Ok(Grant::Private),
        (SessionMode::Snapshot, Some(_), None, _) => Err(GateRefusal::MissingOrg),
        (SessionMode::Snapshot, Some(_), Some(_), None) => Err(GateRefusal::MissingConversation),
        (SessionMode::Snapshot, Some(run_id), Some(org), Some(conversation)) => {
            Ok(Grant::Shared(SnapshotPermit { run_id: *run_id, org: org.clone(), conversation: conversation.clone() }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gates_whole_table() {
        let run = RunId::new();
        let org = OrgId::parse("acme").unwrap();
        let conversation = ConversationId::parse("c-1").unwrap();
        let shared = Ok("shared");
        let private = Ok("private");
        #[rustfmt::skip]
        let table = [
            // mode                  run    org    conversation
            (SessionMode::Snapshot, true,  true,  true,  shared),
            (SessionMode::Snapshot, true,  true,  false, Err(GateRefusal::MissingConversation)),
            (SessionMode::Snapshot, true,  false, true,  Err(GateRefusal::MissingOrg)),
            (SessionMode::Snapshot, true,  false, false, Err(GateRefusal::MissingOrg)),
            (SessionMode::Snapshot, false, true,  true,  private),
            (SessionMode::Snapshot, false, true,  false, private),
            (SessionMode::Snapshot, false, false, true,  private),
            (SessionMode::Snapshot, false, false, false, private),
            (SessionMode::File,     true,  true,  true,  private),
            (SessionMode::File,     true,  true,  false, private),
            (SessionMode::File,     true,  false, true,  private),
            (SessionMode::File,     true,  false, false, private),
            (SessionMode::File,     false, true,  true,  private),
            (SessionMode::File,     false, true,  false, private),
            (SessionMode::File,     false, false, true,  private),
            (SessionMode::File,     false, false, false, private),
        ];
        for (mode, has_run, has_org, has_conversation, expected) in table {
            let envelope = Envelope {
                run_id: has_run.then_some(run),
                org: has_org.then(|| org.clone()),
                conversation: has_conversation.then(|| conversation.clone()),
                mode,
            };
            let decided = decide(&envelope).map(|grant| match grant {
                Grant::Shared(permit) => {
                    assert_eq!((permit.run_id(), permit.org(), permit.conversation()), (run, &org, &conversation));
                    "shared"
                }
                Grant::Private => "private",
            });
            assert_eq!(decided, expected, "{envelope:?}");
        }
    }
}
