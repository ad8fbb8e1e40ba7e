//! What the audit says: who did what to which resource. Pure: the store writes it, in the transaction of the change itself.
//!
//! Nothing of a secret or of a message gets in here: of an agent's settings the *names* of what changed, of a key its id and scopes. Every field is
//! bounded, because some of it (a request's id, a token's subject) is a client's to choose.

use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::agent::{Agent, AgentSettings};
use crate::caller::{Role, Scopes};
use crate::clock::Timestamp;
use crate::ids::{AgentId, ConversationId, OrgId, UserId, WorkerName};
use crate::quota::OwnLimits;
use crate::store::DefaultAgent;

/// Bytes of a name that is kept. An id is shorter; a token's subject may not be.
const NAME_BYTES_MAX: usize = 256;
/// Bytes of a request's id.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Bytes of an act's detail as JSON.
const DETAIL_BYTES_MAX: usize = 1024;

/// Whoever makes a change, as they authenticated themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// The user.
    pub user: String,
    /// By what: `key:<id>`, a token's subject, `command line`.
    pub credential: String,
    /// The request in which.
    pub request_id: Option<String>,
    /// For which user they acted, where that is another.
    pub acting_for: Option<UserId>,
}

impl Actor {
    /// A member, by a credential. What is too long is cut.
    pub fn new(user: &str, credential: &str, request_id: Option<&str>, acting_for: Option<UserId>) -> Actor {
        Actor {
            user: cut(user, NAME_BYTES_MAX),
            credential: cut(credential, NAME_BYTES_MAX),
            request_id: request_id.map(|id| cut(id, REQUEST_ID_BYTES_MAX)),
            acting_for,
        }
    }

    /// Whoever has the database and the command line: the operator.
    pub fn command_line() -> Actor {
        Actor::new("operator", "command line", None, None)
    }

    /// The host itself.
    pub fn host() -> Actor {
        Actor::new("turnhouse", "host", None, None)
    }
}

fn cut(text: &str, bytes_max: usize) -> String {
    text[..text.floor_char_boundary(bytes_max)].to_owned()
}

macro_rules! verbs {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// What can be done to a resource and is written down.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, utoipa::ToSchema)]
        pub enum Verb {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
        }

        impl Verb {
            /// All of them.
            pub const ALL: &[Verb] = &[$(Verb::$name),*];

            /// Its text.
            pub fn as_str(self) -> &'static str {
                match self { $(Verb::$name => $text,)* }
            }
        }
    };
}

verbs! {
    /// A version came in.
    WorkerUpload = "worker.upload";
    /// A worker went, with all its versions.
    WorkerDelete = "worker.delete";
    /// An agent was made.
    AgentCreate = "agent.create";
    /// Its settings were put.
    AgentChange = "agent.change";
    /// It runs another worker, or another version of it.
    AgentPin = "agent.pin";
    /// It went.
    AgentDelete = "agent.delete";
    /// The org's default is another agent, or none.
    AgentDefault = "agent.default";
    /// A key was made.
    KeyCreate = "key.create";
    /// A key was ended.
    KeyRevoke = "key.revoke";
    /// A key was replaced.
    KeyRotate = "key.rotate";
    /// Somebody became a member.
    MemberAdd = "member.add";
    /// A member has another role.
    MemberChange = "member.change";
    /// Somebody is a member no more.
    MemberRemove = "member.remove";
    /// The org was made.
    OrgCreate = "org.create";
    /// What the org lacked was filled in.
    OrgRepair = "org.repair";
    /// The org was deleted. In the host's own audit, for nothing of the org is left.
    OrgDelete = "org.delete";
    /// All of the org was read out.
    OrgExport = "org.export";
    /// The operator changed a limit of the org.
    OrgLimits = "org.limits";
    /// A conversation was deleted with its history.
    ConversationDelete = "conversation.delete";
    /// Its state was begun anew.
    ConversationReset = "conversation.reset";
    /// All of it was read out.
    ConversationExport = "conversation.export";
    /// An admin named another's conversation.
    ConversationChange = "conversation.change";
    /// An admin cancelled another's turn.
    TurnCancel = "turn.cancel";
}

impl Verb {
    /// From its text.
    pub fn parse(text: &str) -> Option<Verb> {
        Verb::ALL.iter().copied().find(|verb| verb.as_str() == text)
    }
}

/// One act, without who and when.
#[derive(Debug, Clone, PartialEq)]
pub struct Act {
    /// What was done.
    pub verb: Verb,
    /// To what: `agent/support`, `agent/support/conversation/c-42`, `worker/notes`, `key/0123456789abcdef`, `member/ann`, `org`.
    pub resource: String,
    /// What belongs to the verb: a JSON object of bounded values.
    pub detail: Value,
}

impl Act {
    /// One to a resource.
    pub fn new(verb: Verb, resource: impl Into<String>, detail: Value) -> Act {
        Act { verb, resource: resource.into(), detail }
    }

    /// A worker's version came in.
    pub fn worker_upload(worker: &WorkerName, version: u32, digest: &[u8; 32], bytes: usize) -> Act {
        let detail = json!({"version": version, "digest": hex::encode(digest), "size_bytes": bytes});
        Act::new(Verb::WorkerUpload, format!("worker/{worker}"), detail)
    }

    /// A worker went.
    pub fn worker_delete(worker: &WorkerName) -> Act {
        Act::new(Verb::WorkerDelete, format!("worker/{worker}"), json!({}))
    }

    /// An agent went; `default`: it was the org's.
    pub fn agent_delete(agent: &AgentId, default: bool) -> Vec<Act> {
        let resource = format!("agent/{agent}");
        let gone = Act::new(Verb::AgentDelete, resource.clone(), json!({}));
        let defaulted = default.then(|| Act::new(Verb::AgentDefault, resource, json!({"from": agent, "to": null})));
        [Some(gone), defaulted].into_iter().flatten().collect()
    }

    /// A key was made.
    pub fn key_create(id: &str, user: &UserId, scopes: Scopes, expires_at: Option<Timestamp>) -> Act {
        Act::new(
            Verb::KeyCreate,
            format!("key/{}", cut(id, 64)),
            json!({"user": user, "scopes": scopes, "expires_at": expires_at}),
        )
    }

    /// A key was ended.
    pub fn key_revoke(id: &str) -> Act {
        Act::new(Verb::KeyRevoke, format!("key/{}", cut(id, 64)), json!({}))
    }

    /// A key was replaced.
    pub fn key_rotate(id: &str, successor: &str) -> Act {
        Act::new(Verb::KeyRotate, format!("key/{}", cut(id, 64)), json!({"successor": cut(successor, 64)}))
    }

    /// Somebody became a member (`before`: none), or a member has another role.
    pub fn member_put(user: &UserId, before: Option<Role>, after: Role) -> Act {
        let resource = format!("member/{user}");
        match before {
            None => Act::new(Verb::MemberAdd, resource, json!({"role": after})),
            Some(before) => Act::new(Verb::MemberChange, resource, json!({"from": before, "to": after})),
        }
    }

    /// A member went, and these keys of theirs ended.
    pub fn member_remove(user: &UserId, before: Role, keys: &[String]) -> Vec<Act> {
        let gone = Act::new(Verb::MemberRemove, format!("member/{user}"), json!({"role": before, "keys": keys.len()}));
        std::iter::once(gone).chain(keys.iter().map(|key| Act::key_revoke(key))).collect()
    }

    /// An org was made.
    pub fn org_create(owner: &UserId) -> Act {
        Act::new(Verb::OrgCreate, "org", json!({"owner": owner}))
    }

    /// An org goes. Told of its name's hash: of the name nothing stays either.
    pub fn org_delete(org: &OrgId) -> Act {
        Act::new(Verb::OrgDelete, "org", json!({"org_sha256": crate::erase::name_hash(org)}))
    }

    /// An org has other limits.
    pub fn org_limits(before: &OwnLimits, after: &OwnLimits) -> Act {
        let (from, to) = before.differences(after);
        Act::new(Verb::OrgLimits, "org", json!({"from": from, "to": to}))
    }

    /// An org that was there got what it lacked.
    pub fn org_repair(owner: Option<&UserId>, default: &DefaultAgent) -> Act {
        Act::new(Verb::OrgRepair, "org", json!({"owner": owner, "default": default.provided()}))
    }

    /// Something was done to a conversation.
    pub fn conversation(verb: Verb, agent: &AgentId, conversation: &ConversationId) -> Act {
        Act::new(verb, format!("agent/{agent}/conversation/{conversation}"), json!({}))
    }

    /// An agent's settings were put: what that was, told apart. `default_before` is the org's default until then.
    pub fn agent_put(before: Option<&Agent>, after: &Agent, default_before: Option<&AgentId>) -> Vec<Act> {
        let resource = format!("agent/{}", after.id);
        let pin = |settings: &AgentSettings| json!({"worker": settings.worker, "version": settings.version});
        let mut acts = Vec::new();
        match before {
            None => acts.push(Act::new(Verb::AgentCreate, resource.clone(), pin(&after.settings))),
            Some(before) => {
                let fields = changed_fields(&before.settings, &after.settings);
                let moved = (&before.settings.worker, before.settings.version)
                    != (&after.settings.worker, after.settings.version);
                if moved {
                    let detail = json!({"from": pin(&before.settings), "to": pin(&after.settings)});
                    acts.push(Act::new(Verb::AgentPin, resource.clone(), detail));
                }
                if !fields.is_empty() || !moved {
                    acts.push(Act::new(Verb::AgentChange, resource.clone(), json!({ "fields": fields })));
                }
            }
        }
        let was_default = default_before == Some(&after.id);
        if was_default != after.settings.default {
            let to = after.settings.default.then_some(&after.id);
            acts.push(Act::new(Verb::AgentDefault, resource, json!({"from": default_before, "to": to})));
        }
        acts
    }

    /// The detail as it is stored, with whom `by` acted for; never longer than its bound.
    pub fn detail_json(&self, by: &Actor) -> String {
        let mut detail = self.detail.clone();
        if let (Some(user), Some(members)) = (&by.acting_for, detail.as_object_mut()) {
            members.insert("for".to_owned(), json!(user));
        }
        let text = detail.to_string();
        if text.len() <= DETAIL_BYTES_MAX { text } else { r#"{"omitted":"it was too long"}"#.to_owned() }
    }
}

/// Which of an agent's settings changed, by name, pin and default aside. Never what they are: an environment may hold secrets.
fn changed_fields(before: &AgentSettings, after: &AgentSettings) -> Vec<String> {
    let fields = |settings: &AgentSettings| serde_json::to_value(settings).unwrap_or_default();
    let (before, after) = (fields(before), fields(after));
    let names = [&before, &after].into_iter().filter_map(Value::as_object).flat_map(|fields| fields.keys());
    let names: std::collections::BTreeSet<&String> = names.collect();
    let changed = |name: &&String| {
        !["worker", "version", "default"].contains(&name.as_str())
            && before.get(name.as_str()) != after.get(name.as_str())
    };
    names.into_iter().filter(changed).cloned().collect()
}

/// An act as it was written down.
#[derive(Debug, Clone, PartialEq)]
pub struct AuditEntry {
    /// When.
    pub at: Timestamp,
    /// Tells apart what was done at one time.
    pub id: Uuid,
    /// Who.
    pub actor: String,
    /// By what.
    pub credential: String,
    /// In which request.
    pub request_id: Option<String>,
    /// What; a later version may know more verbs than this one.
    pub verb: String,
    /// To which resource.
    pub resource: String,
    /// What belongs to the verb.
    pub detail: Value,
}

/// Which entries are wanted. One filter at a time: each has an index, and two would make a short page of a long search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AuditFilter {
    /// All.
    All,
    /// Of this user.
    Actor(String),
    /// Of this verb.
    Verb(Verb),
    /// To this resource.
    Resource(String),
}

/// A place in the audit, newest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditPlace {
    /// The entry's time.
    pub at: Timestamp,
    /// The entry's id.
    pub id: Uuid,
}

impl AuditPlace {
    /// Before everything up to and including this time.
    pub fn until(at: Timestamp) -> AuditPlace {
        AuditPlace { at, id: Uuid::max() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(change: impl FnOnce(&mut AgentSettings)) -> Agent {
        let mut settings = AgentSettings { version: Some(1), ..AgentSettings::of("echo".parse().unwrap()) };
        change(&mut settings);
        let id = "support".parse().unwrap();
        Agent { id, settings, revision: 1, created_at: Timestamp(0), updated_at: Timestamp(0) }
    }

    #[test]
    fn o6_an_agents_settings_are_told_by_name_and_never_by_value() {
        let before = agent(|_| {});
        let after = agent(|settings| {
            settings.environment.insert("TOKEN".to_owned(), "hunter2".to_owned());
            settings.version = Some(2);
        });
        let acts = Act::agent_put(Some(&before), &after, None);
        let verbs: Vec<Verb> = acts.iter().map(|act| act.verb).collect();
        assert_eq!(verbs, [Verb::AgentPin, Verb::AgentChange]);
        assert_eq!(acts[1].detail, json!({"fields": ["environment"]}));
        assert!(!format!("{acts:?}").contains("hunter2") && !format!("{acts:?}").contains("TOKEN"));
    }

    #[test]
    fn each_thing_that_a_put_does_is_an_act_of_its_own() {
        let (plain, default) = (agent(|_| {}), agent(|settings| settings.default = true));
        let other: AgentId = "other".parse().unwrap();
        let verbs = |before: Option<&Agent>, after: &Agent, default: Option<&AgentId>| {
            Act::agent_put(before, after, default).iter().map(|act| act.verb).collect::<Vec<_>>()
        };
        assert_eq!(verbs(None, &plain, Some(&other)), [Verb::AgentCreate]);
        assert_eq!(verbs(None, &default, None), [Verb::AgentCreate, Verb::AgentDefault]);
        assert_eq!(verbs(Some(&plain), &default, Some(&other)), [Verb::AgentChange, Verb::AgentDefault]);
        assert_eq!(verbs(Some(&default), &plain, Some(&plain.id)), [Verb::AgentChange, Verb::AgentDefault]);
        assert_eq!(verbs(Some(&plain), &plain, None), [Verb::AgentChange], "also what changed nothing was done");
    }

    #[test]
    fn every_field_has_its_bound() {
        let long = "ä".repeat(1_000);
        let actor = Actor::new(&long, &long, Some(&long), None);
        assert!(actor.user.len() <= NAME_BYTES_MAX && actor.credential.len() <= NAME_BYTES_MAX);
        assert!(actor.request_id.as_ref().unwrap().len() <= REQUEST_ID_BYTES_MAX);
        let act = Act::new(Verb::OrgLimits, "org", json!({ "x": long }));
        assert!(act.detail_json(&actor).len() <= DETAIL_BYTES_MAX);
        assert!(serde_json::from_str::<Value>(&act.detail_json(&actor)).unwrap().is_object());
        let longest = "a".repeat(128);
        let act =
            Act::conversation(Verb::ConversationReset, &"a".repeat(64).parse().unwrap(), &longest.parse().unwrap());
        assert!(act.resource.len() <= 320, "the table's bound");
    }

    #[test]
    fn verbs_come_back_from_their_text() {
        for verb in Verb::ALL {
            assert_eq!(Verb::parse(verb.as_str()), Some(*verb));
            assert!(verb.as_str().len() <= 32, "the table's bound");
        }
        assert_eq!(Verb::parse("nonsense"), None);
    }

    #[test]
    fn whom_somebody_acts_for_is_told() {
        let by = Actor::new("backend", "key:1", None, Some("ann".parse().unwrap()));
        assert_eq!(Act::new(Verb::OrgExport, "org", json!({})).detail_json(&by), r#"{"for":"ann"}"#);
    }
}
