//! `/openapi.json` → the requests of each operation, filled with somebody's names. What the document has and this does not know is an error that
//! says what to add: so a route is covered on the day on which it comes.

use reqwest::Method;
use serde_json::{Map, Value, json};

/// Whose things the requests name.
#[derive(Debug, Clone)]
pub struct Names {
    /// The org.
    pub org: &'static str,
    /// An agent with the conversation below.
    pub agent: &'static str,
    /// A conversation.
    pub conversation: &'static str,
    /// A worker.
    pub worker: &'static str,
    /// A turn.
    pub turn: String,
    /// An attachment.
    pub attachment: String,
    /// A run.
    pub run: String,
    /// An idempotency key.
    pub key: String,
    /// Who began the conversation and the turn.
    pub user: &'static str,
    /// Where each list's second page begins, by operation.
    pub cursors: Map<String, Value>,
}

/// The key with which every conversation's first turn was submitted.
pub const IDEMPOTENCY_KEY: &str = "k-1";

/// The message of every turn.
pub const MESSAGE: &str = "count";

/// One thing that may be set in a request.
enum Fill {
    /// It is in every request.
    Always(Value),
    /// There is one request with each of these, and it is in none else.
    Sometimes(Vec<Value>),
}

/// What a parameter or a field of a body can be. This is the place to tell of a new one: what names something has to name what is the victim's.
fn fill(names: &Names, place: &str, name: &str) -> Option<Fill> {
    use Fill::{Always, Sometimes};
    let one = |value: Value| Some(Sometimes(vec![value]));
    match (place, name) {
        ("path" | "body", "agent") => Some(Always(names.agent.into())),
        ("path" | "body", "conversation") => Some(Always(names.conversation.into())),
        ("path" | "body", "worker") => Some(Always(names.worker.into())),
        ("path", "user") => Some(Always(names.user.into())),
        ("header", "Turnhouse-Org") => one(names.org.into()),
        ("body", "role") => Some(Always("member".into())),
        ("path", "turn") => Some(Always(names.turn.clone().into())),
        ("path", "attachment") => Some(Always(names.attachment.clone().into())),
        ("query" | "body", "user") => one(names.user.into()),
        ("query", "limit") => one("1".into()),
        ("query", "direction") => one("backward".into()),
        ("header", "Idempotency-Key") => one(names.key.clone().into()),
        ("header", "Prefer") => one("wait=60".into()),
        ("header", "Accept") => one("text/event-stream".into()),
        ("header", "Last-Event-ID") => Some(Sometimes(vec!["0.0".into(), "end".into()])),
        ("body", "message") => Some(Always(json!({ "text": MESSAGE }))),
        ("body", "org") => one(names.org.into()),
        ("body", "run_id") => one(names.run.clone().into()),
        ("body", "mode" | "session_mode") => one("snapshot".into()),
        ("body", "on_busy") => one("interrupt".into()),
        ("body", "dry_run" | "default") => one(true.into()),
        ("body", "version" | "history_messages") => one(1.into()),
        ("body", "limits") => one(json!({ "turn_timeout_ms": 30_000 })),
        ("body", "environment") => one(json!({ "TONE": "dry" })),
        ("body", "allowed_hosts") => one(json!(["example.org"])),
        ("body", "model") => one("small".into()),
        ("body", "title") => one("Counting".into()),
        ("body", "metadata") => one(json!({ "ticket": "4711" })),
        ("query", "actor") => one(names.user.into()),
        ("query", "verb") => one("agent.create".into()),
        ("query", "resource") => one(format!("agent/{}", names.agent).into()),
        ("query", "since") => one("2020-01-01T00:00:00Z".into()),
        ("query", "until") => one("2100-01-01T00:00:00Z".into()),
        _ => None,
    }
}

/// A method of a route.
#[derive(Debug, Clone)]
pub struct Operation {
    /// Its name in the document.
    pub id: String,
    /// Its method.
    pub method: Method,
    /// As the document has it.
    pub path: String,
    /// Whether it needs no key.
    pub public: bool,
    parameters: Vec<(String, String)>,
    body: Option<Payload>,
}

#[derive(Debug, Clone)]
enum Payload {
    /// A JSON object with these properties.
    Json(Vec<String>),
    /// A module.
    Module,
    /// Any bytes.
    File,
}

/// What is sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its method.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// But for the key.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
    /// Something that its route always wants, or might, is left out: the answer may well be that it is missing.
    pub lacks: bool,
}

/// What makes another request of the plain one.
type Change = Box<dyn Fn(&mut Parts)>;

#[derive(Default, Clone)]
struct Parts {
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    body: Map<String, Value>,
    lacks: bool,
}

impl Operation {
    /// All of a document: reads first, deletions last and from the inside out. The error has a line for everything that is not understood.
    pub fn all(document: &Value) -> Result<Vec<Operation>, String> {
        let (mut operations, mut unknown) = (Vec::new(), Vec::new());
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("methods") {
                match Operation::read(document, path, method, operation) {
                    Ok(operation) => operations.push(operation),
                    Err(error) => unknown.push(format!("{} {path}: {error}", method.to_uppercase())),
                }
            }
        }
        let depth = |operation: &Operation| operation.path.matches('/').count();
        let rank = |method: &Method| [Method::GET, Method::POST, Method::PUT].iter().position(|m| m == method);
        operations.sort_by_key(|operation| match rank(&operation.method) {
            Some(rank) => (rank, depth(operation), operation.path.clone()),
            None => (usize::MAX, usize::MAX - depth(operation), operation.path.clone()),
        });
        if unknown.is_empty() { Ok(operations) } else { Err(unknown.join("\n")) }
    }

    fn read(document: &Value, path: &str, method: &str, operation: &Value) -> Result<Operation, String> {
        let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| format!("{value} is no text"));
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        let parameters = parameters.map(|one| Ok((text(&one["in"])?, text(&one["name"])?)));
        let parameters = parameters.collect::<Result<Vec<_>, String>>()?;
        // `Accept` is never a parameter (OpenAPI says so): that events may be had beside JSON follows from the answers.
        let answers = |kind: &str| {
            let all = operation["responses"].as_object().into_iter().flatten();
            all.filter(|(status, _)| status.starts_with('2')).any(|(_, answer)| answer["content"].get(kind).is_some())
        };
        let mut parameters = parameters;
        if answers("text/event-stream") && answers("application/json") {
            parameters.push(("header".to_owned(), "Accept".to_owned()));
        }
        for (place, name) in &parameters {
            // `after` is a cursor of the list's own.
            if (place.as_str(), name.as_str()) != ("query", "after") && fill(&Names::none(), place, name).is_none() {
                return Err(add(place, name));
            }
        }
        for name in path.split(['{', '}']).skip(1).step_by(2) {
            if !parameters.iter().any(|(place, known)| place == "path" && known == name) {
                return Err(format!("the path has {{{name}}}, which is not among the documented parameters"));
            }
        }
        let body = match operation.get("requestBody") {
            None => None,
            Some(body) => Some(Payload::read(document, body)?),
        };
        Ok(Operation {
            id: text(&operation["operationId"])?,
            method: method.to_uppercase().parse().map_err(|_| format!("{method} is no method"))?,
            path: path.to_owned(),
            public: operation["security"] == json!([{}]),
            parameters,
            body,
        })
    }

    /// Everything that is sent: the plain request; one with each thing that may be set; one without each thing of its body.
    pub fn requests(&self, names: &Names) -> Vec<Request> {
        let mut plain = Parts::default();
        let mut changes: Vec<Change> = Vec::new();
        for (place, name) in self.parameters.iter().filter(|(place, _)| place != "path") {
            let values = match fill(names, place, name) {
                Some(Fill::Always(value)) => vec![value],
                Some(Fill::Sometimes(values)) => values,
                None => names.cursors.get(&self.id).cloned().into_iter().collect(),
            };
            for value in values {
                let (place, name, value) = (place.clone(), name.clone(), value.as_str().expect("a text").to_owned());
                changes.push(Box::new(move |parts| {
                    let into = if place == "query" { &mut parts.query } else { &mut parts.headers };
                    into.push((name.clone(), value.clone()));
                }));
            }
        }
        if let Some(Payload::Json(properties)) = &self.body {
            for name in properties.clone() {
                match fill(names, "body", &name).expect("checked when it was read") {
                    Fill::Always(value) => {
                        plain.body.insert(name.clone(), value);
                        changes.push(Box::new(move |parts| {
                            parts.body.remove(&name);
                            parts.lacks = true;
                        }));
                    }
                    Fill::Sometimes(values) => changes.extend(values.into_iter().map(|value| {
                        let name = name.clone();
                        Box::new(move |parts: &mut Parts| drop(parts.body.insert(name.clone(), value.clone())))
                            as Change
                    })),
                }
            }
        }
        let mut all = vec![self.request(names, plain.clone())];
        for change in changes {
            let mut parts = plain.clone();
            change(&mut parts);
            all.push(self.request(names, parts));
        }
        all
    }

    fn request(&self, names: &Names, parts: Parts) -> Request {
        let mut path = self.path.clone();
        for (_, name) in self.parameters.iter().filter(|(place, _)| place == "path") {
            let Some(Fill::Always(Value::String(value))) = fill(names, "path", name) else {
                panic!("{name} of a path is always there, and text")
            };
            path = path.replace(&format!("{{{name}}}"), &value);
        }
        let query: Vec<String> = parts.query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if !query.is_empty() {
            path = format!("{path}?{}", query.join("&"));
        }
        let mut headers = parts.headers;
        let body = match &self.body {
            None => Vec::new(),
            Some(Payload::Json(_)) => {
                headers.push(("content-type".to_owned(), "application/json".to_owned()));
                Value::Object(parts.body).to_string().into_bytes()
            }
            Some(Payload::Module) => {
                headers.push(("content-type".to_owned(), "application/wasm".to_owned()));
                turnhouse_workers::bytes("snapshot_counter")
            }
            Some(Payload::File) => b"a file of the caller's own".to_vec(),
        };
        Request { method: self.method.clone(), path, headers, body, lacks: parts.lacks }
    }
}

impl Payload {
    fn read(document: &Value, body: &Value) -> Result<Payload, String> {
        let content = body["content"].as_object().ok_or("its body has no content")?;
        if content.contains_key("application/wasm") {
            return Ok(Payload::Module);
        }
        if content.contains_key("application/octet-stream") {
            return Ok(Payload::File);
        }
        let Some(json) = content.get("application/json") else {
            let types: Vec<&str> = content.keys().map(String::as_str).collect();
            return Err(format!("it reads {}: say in `Payload` of {} what to send", types.join(", "), file!()));
        };
        let mut names = Vec::new();
        properties(document, &json["schema"], &mut names);
        if names.is_empty() {
            return Err(format!("its body has no properties: say in `Payload` of {} what to send", file!()));
        }
        match names.iter().find(|name| fill(&Names::none(), "body", name).is_none()) {
            Some(unknown) => Err(add("body", unknown)),
            None => Ok(Payload::Json(names)),
        }
    }
}

/// The names of a schema's properties, through references and compositions.
fn properties(document: &Value, schema: &Value, names: &mut Vec<String>) {
    if let Some(to) = schema["$ref"].as_str() {
        let target = document.pointer(to.trim_start_matches('#')).unwrap_or_else(|| panic!("{to} leads nowhere"));
        return properties(document, target, names);
    }
    for part in ["allOf", "oneOf", "anyOf"].iter().filter_map(|name| schema[name].as_array()).flatten() {
        properties(document, part, names);
    }
    names.extend(schema["properties"].as_object().into_iter().flat_map(Map::keys).cloned());
}

fn add(place: &str, name: &str) -> String {
    format!(
        "no request can be made, for nobody has said what `{name}` in its {place} may be; add (\"{place}\", \"{name}\") to `fill` in {}",
        file!()
    )
}

impl Names {
    fn none() -> Names {
        let nothing = String::new;
        let (turn, run, key, attachment) = (nothing(), nothing(), nothing(), nothing());
        let cursors = Map::new();
        Names { org: "", agent: "", conversation: "", worker: "", turn, attachment, run, key, user: "", cursors }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(operation: Value) -> Value {
        json!({
            "paths": { "/v1/agents/{agent}": { "put": operation } },
            "components": { "schemas": { "New": { "allOf": [{ "properties": { "user": {} } }, { "properties": { "message": {} } }] } } },
        })
    }

    fn operation(parameter: Value, body: Value) -> Value {
        let agent = json!({ "name": "agent", "in": "path" });
        let parameters = [vec![agent], parameter.as_array().expect("some").clone()].concat();
        json!({ "operationId": "x", "parameters": parameters, "requestBody": { "content": body } })
    }

    #[test]
    fn what_the_document_has_and_nobody_can_fill_is_named_with_the_place_to_say_it() {
        let json_of = |schema: Value| json!({ "application/json": { "schema": schema } });
        let whole = json_of(json!({ "$ref": "#/components/schemas/New" }));
        for (parameters, body, says) in [
            (json!([{ "name": "colour", "in": "query" }]), whole.clone(), "(\"query\", \"colour\")"),
            (json!([]), json_of(json!({ "properties": { "colour": {} } })), "(\"body\", \"colour\")"),
            (json!([]), json_of(json!({})), "no properties"),
            (json!([]), json!({ "text/csv": {} }), "text/csv"),
        ] {
            let error = Operation::all(&document(operation(parameters, body))).unwrap_err();
            assert!(error.starts_with("PUT /v1/agents/{agent}: ") && error.contains(says), "{error}");
        }
        let undeclared = json!({ "operationId": "x" });
        assert!(Operation::all(&document(undeclared)).unwrap_err().contains("{agent}"));
    }

    #[test]
    fn each_thing_that_may_be_set_has_a_request_of_its_own() {
        let parameters = json!([{ "name": "Last-Event-ID", "in": "header" }, { "name": "limit", "in": "query" }]);
        let body = json!({ "application/json": { "schema": { "$ref": "#/components/schemas/New" } } });
        let operations = Operation::all(&document(operation(parameters, body))).expect("it is understood");
        let names = Names { agent: "a", user: "bob", ..Names::none() };
        let requests = operations[0].requests(&names);
        let bodies: Vec<String> = requests.iter().map(|r| String::from_utf8(r.body.clone()).expect("JSON")).collect();
        assert_eq!(requests.len(), 1 + 2 + 1 + 2);
        assert_eq!(bodies[0], r#"{"message":{"text":"count"}}"#);
        assert_eq!(requests[1].headers[0], ("Last-Event-ID".to_owned(), "0.0".to_owned()));
        assert_eq!(requests[3].path, "/v1/agents/a?limit=1");
        assert_eq!(bodies[4], r#"{"message":{"text":"count"},"user":"bob"}"#);
        assert_eq!((bodies[5].as_str(), requests[5].lacks), ("{}", true));
    }
}
