//! `/openapi.json`: what the handlers say of themselves, and what is common to them: the security scheme, the problems, the pages' parameters.

mod headers;
mod links;

use std::sync::LazyLock;

use bytes::Bytes;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{AdditionalProperties, SchemaType};
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    Components, ContentBuilder, InfoBuilder, LicenseBuilder, ObjectBuilder, OpenApi, Ref, RefOr, Required,
    ResponseBuilder, Schema, SchemaFormat, Type,
};
use utoipa::{PartialSchema as _, ToSchema};

use super::problem::Code;
use crate::ids::{OrgId, UserId};

/// RFC 9457: what every refusal looks like.
#[derive(Debug, serde::Serialize, ToSchema)]
struct Problem {
    /// Always `about:blank`: `code` says it all.
    #[serde(rename = "type")]
    #[schema(example = "about:blank")]
    kind: String,
    /// The code in words.
    #[schema(example = "conversation busy")]
    title: String,
    /// The response's status.
    #[schema(example = 409)]
    status: u16,
    /// Stable.
    code: Code,
    /// For a person: what happened and what to do.
    detail: String,
    /// What `x-request-id` says; name it when you ask for help.
    request_id: String,
    /// Of `unknown_field`: the field.
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
    /// Of `scope_missing`: the scope.
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    /// Of `conversation_busy`: the turn whose turn it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    active_turn_id: Option<String>,
    /// Of `conversation_busy`: its stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    events: Option<String>,
    /// Of 429 and of `host_queue_full`: which limit is reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "submits_per_second")]
    limit: Option<String>,
    /// Whose limit that is: `org`, `agent`, `conversation`, `turn`, `worker`, `host` or `address`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "org")]
    limit_of: Option<String>,
    /// What it is, where that is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 5.0)]
    limit_value: Option<f64>,
}

/// The document as JSON.
pub fn json() -> Bytes {
    static DOCUMENT: LazyLock<Bytes> =
        LazyLock::new(|| document().to_json().expect("a document of plain data serialises").into());
    DOCUMENT.clone()
}

const EVENTS: &str = "\
Server-sent events: `event` is the kind, `data` one line of JSON, `id` is `<epoch>.<seq>`, or `end` for the last. A comment every 15 s keeps the \
connection; it has no id.\n\n\
| event | data |\n|---|---|\n\
| `turn.accepted` | `{turn_id, …}` |\n\
| `turn.started` | `{attempt, worker, version}` |\n\
| `turn.restarted` | `{attempt}`: discard this turn's deltas |\n\
| `output.delta` | `{text}` |\n\
| `status` | `{text}` |\n\
| `x.<name>` | the worker's own |\n\
| `operation.started`, `operation.finished` | `{name, …}` |\n\
| `snapshot.rejected` | `{bytes, limit_bytes}` |\n\
| `resync` | `{state, text}`: the log no longer has the id that was asked for; goes on from its own id |\n\
| `turn.completed` | `{reply, usage, replaces_deltas}` |\n\
| `turn.failed` | `{code, detail, retryable, cause?}` |\n\
| `turn.cancelled` | `{by}` |\n\n\
Exactly one of the last three ends every turn, and the stream.";

const EVENTS_EXAMPLE: &str = "event: turn.accepted\ndata: {\"turn_id\":\"01990000-0000-7000-8000-000000000000\"}\nid: 0.0\n\n\
event: output.delta\ndata: {\"text\":\"hello\"}\nid: 1.1\n\n\
event: turn.completed\ndata: {\"reply\":{\"text\":\"hello\"},\"usage\":{\"cpu_ms\":0.4,\"wall_ms\":1.9,\"memory_peak_bytes\":1179648,\"host_calls\":3,\"bytes_in\":5,\"bytes_out\":6,\"instance_ms\":0.9},\"replaces_deltas\":false}\nid: end\n\n";

/// The whole document.
pub fn document() -> OpenApi {
    let mut document = super::routes().into_openapi();
    document.info = InfoBuilder::new()
        .title("Turnhouse")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("Runs each turn of an AI agent's conversation in a fresh WebAssembly instance. Unknown fields are refused in requests; expect them in responses."))
        .license(Some(LicenseBuilder::new().name("Apache-2.0 OR MIT").identifier(Some("Apache-2.0 OR MIT")).build()))
        .build();
    let tags = [
        ("workers", "Modules and their versions. Scope `deploy`."),
        ("agents", "Named settings. Scope `deploy`; `allowed_hosts` and `default` need `admin`."),
        ("conversations", "Lines of turns. Scope `turns`."),
        ("turns", "One message in, one terminal event out. Scope `turns`."),
        ("attachments", "Files that messages refer to. Scope `turns` or `ingest`."),
        ("ingest", "For platform adapters. Scope `ingest`."),
        ("export", "All of an org, as JSON lines. Scope `admin`."),
        ("audit", "Who did what to which resource. Scope `admin`."),
        ("members", "Who belongs to the org, and as what. Scope `admin`, but for `/v1/me`."),
        ("health", "For probes; no key."),
    ];
    document.tags =
        Some(tags.map(|(name, text)| TagBuilder::new().name(name).description(Some(text)).build()).to_vec());
    document.security = Some(vec![SecurityRequirement::new("api_key", [] as [&str; 0])]);
    add_components(document.components.get_or_insert_with(Components::new));
    for item in document.paths.paths.values_mut() {
        let operations = [
            (&mut item.get, "get"),
            (&mut item.put, "put"),
            (&mut item.post, "post"),
            (&mut item.patch, "patch"),
            (&mut item.delete, "delete"),
        ];
        for (operation, method) in operations {
            if let Some(operation) = operation {
                complete(operation, method);
            }
        }
    }
    document
}

fn add_components(components: &mut Components) {
    components.headers.extend(headers::all());
    let mut schemas = Vec::new();
    Problem::schemas(&mut schemas);
    schemas.push((Problem::name().into_owned(), Problem::schema()));
    components.schemas.extend(schemas);
    // Of an enum's variants the derive does not say that they take no other fields.
    let Some(RefOr::T(Schema::OneOf(part))) = components.schemas.get_mut("Part") else {
        unreachable!("a message has parts")
    };
    for variant in &mut part.items {
        let RefOr::T(Schema::Object(object)) = variant else { unreachable!("each is an object") };
        object.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(false)));
    }
    components.security_schemes.insert(
        "api_key".to_owned(),
        RefOr::T(SecurityScheme::Http(
            HttpBuilder::new()
                .scheme(HttpAuthScheme::Bearer)
                .description(Some(
                    "`Authorization: Bearer th_…`: a key of one org and one user, made by `turnhouse keys create`; or a token (JWT) of an OpenID Connect issuer that the operator trusts. A token that names no org is for one of which its user is a member.",
                ))
                .build(),
        )),
    );
    components.security_schemes.insert(
        "stream_ticket".to_owned(),
        RefOr::T(SecurityScheme::ApiKey(ApiKey::Query(ApiKeyValue::with_description(
            "ticket",
            "`?ticket=tt_…`: follows one turn, for an EventSource; `POST /v1/turns/{turn}/ticket` makes one.",
        )))),
    );
}

/// Adds to an operation what its handler need not repeat.
fn complete(operation: &mut Operation, method: &str) {
    let id = operation.operation_id.clone().unwrap_or_default();
    let public = matches!(id.as_str(), "healthz" | "readyz" | "openapi_json");
    let parameters = operation.parameters.get_or_insert_with(Vec::new);
    if id.starts_with("list_") {
        let limit = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1)).maximum(Some(100));
        parameters.push(query("limit", limit, "At most this many items, at most 100."));
        let cursor =
            ObjectBuilder::new().schema_type(Type::String).format(Some(SchemaFormat::Custom("cursor".to_owned())));
        parameters.push(query("after", cursor, "`next` of the page before."));
        if matches!(id.as_str(), "list_messages" | "list_turns") {
            let ways = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(["forward", "backward"]));
            parameters.push(query("direction", ways, "Of the first page: `forward` (oldest first) or `backward`."));
        }
    }
    if !public {
        let org = Ref::from_schema_name(OrgId::name());
        let org = header(
            "Turnhouse-Org",
            org,
            "For which org: of a token that does not say it, whose user is a member of several.",
        );
        parameters.push(org);
        let tag = operation.tags.as_ref().and_then(|tags| tags.first());
        let of_members = ["turns", "conversations", "attachments"];
        if method != "put" && tag.is_some_and(|tag| of_members.contains(&tag.as_str())) {
            let user = Ref::from_schema_name(UserId::name());
            parameters.push(query("user", user, "As this user; needs the scope `act_as`."));
        }
    }
    if matches!(id.as_str(), "put_worker" | "create_attachment") {
        let Some(RefOr::T(body)) = operation.request_body.as_mut() else { unreachable!("bodies are written in place") };
        // Bytes, which OpenAPI 3.1 says by saying nothing of their shape.
        body.content.values_mut().for_each(|content| *content = ContentBuilder::new().build().into());
    }
    if id == "get_attachment" {
        let Some(RefOr::T(ok)) = operation.responses.responses.get_mut("200") else {
            unreachable!("it is written in place")
        };
        ok.content = [("*/*".to_owned(), ContentBuilder::new().build().into())].into_iter().collect();
    }
    for parameter in operation.parameters.iter_mut().flatten() {
        let RefOr::T(Parameter { schema: Some(RefOr::T(Schema::Object(object))), .. }) = parameter else { continue };
        // A parameter is left out, never null.
        if let SchemaType::Array(types) = &mut object.schema_type {
            types.retain(|kind| *kind != Type::Null);
            if let [one] = types.as_slice() {
                object.schema_type = SchemaType::Type(one.clone());
            }
        }
    }
    if matches!(id.as_str(), "submit_turn" | "stream_events") {
        let RefOr::T(ok) = operation.responses.responses.get_mut("200").expect("both stream") else {
            unreachable!("responses are written in place")
        };
        ok.description = format!("{}\n\n{EVENTS}", ok.description);
        let Some(RefOr::T(stream)) = ok.content.get_mut("text/event-stream") else {
            unreachable!("contents are written in place")
        };
        stream.example = Some(EVENTS_EXAMPLE.into());
    }
    links::add(operation);
    for (status, codes) in by_status(codes(&id, public)) {
        let named: Vec<String> = codes.iter().map(|code| format!("`{}`", code.as_str())).collect();
        let example = serde_json::json!({
            "type": "about:blank", "title": codes[0].as_str().replace('_', " "), "status": status, "code": codes[0].as_str(),
            "detail": "what happened, and what to do", "request_id": "01990000-0000-7000-8000-000000000001",
        });
        let content =
            ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).example(Some(example)).build();
        let response =
            ResponseBuilder::new().description(named.join(", ")).content("application/problem+json", content).build();
        operation.responses.responses.insert(status.to_string(), response.into());
    }
    headers::add(operation, &id, public);
}

fn query(name: &str, schema: impl Into<RefOr<Schema>>, description: &str) -> RefOr<Parameter> {
    optional(ParameterIn::Query, name, schema, description)
}

fn header(name: &str, schema: impl Into<RefOr<Schema>>, description: &str) -> RefOr<Parameter> {
    optional(ParameterIn::Header, name, schema, description)
}

fn optional(place: ParameterIn, name: &str, schema: impl Into<RefOr<Schema>>, description: &str) -> RefOr<Parameter> {
    let parameter = ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(schema))
        .build();
    RefOr::T(parameter)
}

fn by_status(codes: Vec<Code>) -> std::collections::BTreeMap<u16, Vec<Code>> {
    let mut all = std::collections::BTreeMap::<u16, Vec<Code>>::new();
    for code in codes {
        all.entry(code.status().as_u16()).or_default().push(code);
    }
    all
}

/// How an operation can refuse.
fn codes(operation: &str, public: bool) -> Vec<Code> {
    use Code::*;
    let own: &[Code] = match operation {
        "put_worker" => &[
            ModuleTooLarge,
            UnsupportedMediaType,
            ModuleInvalid,
            ModuleNotCommand,
            ModuleImportUnknown,
            ModuleTooComplex,
            CompileTimeout,
            QuotaExhausted,
            TooManyStreams,
        ],
        "delete_worker" => &[WorkerInUse],
        "put_agent" => {
            &[UnknownField, InvalidSetting, BodyTooLarge, UnsupportedMediaType, AgentNotReady, QuotaExhausted]
        }
        "delete_agent" => &[AgentInUse],
        "patch_conversation" => &[UnknownField, InvalidSetting, BodyTooLarge, UnsupportedMediaType],
        "create_conversation" => &[UnknownField, NoDefaultAgent, BodyTooLarge, UnsupportedMediaType],
        "list_workers" | "list_agents" | "list_conversations" | "list_messages" | "list_turns" | "list_audit"
        | "list_members" => &[UnknownField, InvalidCursor],
        "put_member" => &[
            UnknownField,
            InvalidSetting,
            BodyTooLarge,
            UnsupportedMediaType,
            OwnerRequired,
            LastOwner,
            QuotaExhausted,
        ],
        "delete_member" => &[OwnerRequired, LastOwner],
        "submit_turn" => &[
            UnknownField,
            InvalidMessage,
            InvalidIdempotencyKey,
            NotAcceptable,
            ConversationBusy,
            AgentNotReady,
            BodyTooLarge,
            UnsupportedMediaType,
            IdempotencyMismatch,
            AttachmentNotFound,
            ConversationQueueFull,
            OrgQueueFull,
            AgentQueueFull,
            QuotaExhausted,
            TooManyStreams,
            HostQueueFull,
            Draining,
        ],
        "ingest" => &[
            UnknownField,
            InvalidMessage,
            InvalidIdempotencyKey,
            OrgMismatch,
            ConversationBusy,
            AgentNotReady,
            BodyTooLarge,
            UnsupportedMediaType,
            IdempotencyMismatch,
            AttachmentNotFound,
            ConversationQueueFull,
            OrgQueueFull,
            AgentQueueFull,
            QuotaExhausted,
            HostQueueFull,
            Draining,
        ],
        "create_attachment" => &[AttachmentTooLarge, UnsupportedMediaType, TooManyStreams, QuotaExhausted],
        "create_ticket" => &[TurnEnded],
        "stream_events" => &[InvalidCursor, NotAcceptable, TooManyStreams],
        "export_org" | "export_conversation" => &[TooManyStreams],
        "readyz" => &[Draining, StoreUnavailable],
        _ => &[],
    };
    let common: &[Code] = if public {
        &[MethodNotAllowed, UriTooLong, Internal]
    } else {
        &[
            MalformedRequest,
            InvalidId,
            OrgRequired,
            Unauthenticated,
            ScopeMissing,
            NotFound,
            NoOrg,
            MethodNotAllowed,
            UriTooLong,
            RateLimited,
            Internal,
            StoreUnavailable,
            IssuerUnavailable,
        ]
    };
    let mut all = own.to_vec();
    all.extend(common.iter().filter(|code| !own.contains(code)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::BTreeSet;

    fn parsed() -> Value {
        serde_json::from_slice(&json()).unwrap()
    }

    /// The manual's table.
    const ROUTES: &[(&str, &[&str])] = &[
        ("/healthz", &["get"]),
        ("/openapi.json", &["get"]),
        ("/readyz", &["get"]),
        ("/v1/agents", &["get"]),
        ("/v1/agents/{agent}", &["delete", "get", "put"]),
        ("/v1/agents/{agent}/conversations", &["get"]),
        ("/v1/agents/{agent}/conversations/{conversation}", &["delete", "get", "patch"]),
        ("/v1/agents/{agent}/conversations/{conversation}/export", &["get"]),
        ("/v1/agents/{agent}/conversations/{conversation}/messages", &["get"]),
        ("/v1/agents/{agent}/conversations/{conversation}/snapshot", &["delete"]),
        ("/v1/agents/{agent}/conversations/{conversation}/turns", &["get", "post"]),
        ("/v1/agents/{agent}/limits", &["get"]),
        ("/v1/attachments", &["post"]),
        ("/v1/attachments/{attachment}", &["get"]),
        ("/v1/audit", &["get"]),
        ("/v1/conversations", &["post"]),
        ("/v1/export", &["get"]),
        ("/v1/ingest", &["post"]),
        ("/v1/limits", &["get"]),
        ("/v1/me", &["get"]),
        ("/v1/members", &["get"]),
        ("/v1/members/{user}", &["delete", "put"]),
        ("/v1/turns/{turn}", &["get"]),
        ("/v1/turns/{turn}/cancel", &["post"]),
        ("/v1/turns/{turn}/events", &["get"]),
        ("/v1/turns/{turn}/ticket", &["post"]),
        ("/v1/workers", &["get"]),
        ("/v1/workers/{worker}", &["delete", "get", "put"]),
    ];

    #[test]
    fn every_route_of_the_manual_is_in_the_document_and_no_other() {
        let document = parsed();
        let documented: Vec<(String, Vec<String>)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .map(|(path, item)| (path.clone(), item.as_object().unwrap().keys().cloned().collect()))
            .collect();
        let manual: Vec<(String, Vec<String>)> = ROUTES
            .iter()
            .map(|(path, methods)| ((*path).to_owned(), methods.iter().map(|m| (*m).to_owned()).collect()))
            .collect();
        assert_eq!(documented, manual);
        assert_eq!(document["openapi"], "3.1.0");
    }

    #[test]
    fn the_document_has_every_member_of_a_problem() {
        let document = parsed();
        let properties = document["components"]["schemas"]["Problem"]["properties"].as_object().unwrap();
        let of_all = ["type", "title", "status", "code", "detail", "request_id"];
        let of_all = of_all.into_iter().chain(super::super::problem::MEMBERS.iter().copied());
        assert_eq!(properties.keys().map(String::as_str).collect::<BTreeSet<_>>(), of_all.collect());
    }

    #[test]
    fn every_reference_resolves() {
        fn references<'a>(value: &'a Value, found: &mut BTreeSet<&'a str>) {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(to)) = map.get("$ref") {
                        found.insert(to);
                    }
                    map.values().for_each(|value| references(value, found));
                }
                Value::Array(items) => items.iter().for_each(|value| references(value, found)),
                _ => {}
            }
        }
        let document = parsed();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        assert!(found.len() > 10, "{found:?}");
        for to in found {
            assert!(document.pointer(to.strip_prefix('#').unwrap()).is_some(), "{to} leads nowhere");
        }
    }

    #[test]
    fn every_code_is_an_answer_of_some_operation() {
        let text = parsed()["paths"].to_string();
        for code in Code::ALL {
            assert!(text.contains(&format!("`{}`", code.as_str())), "{code:?}");
        }
    }

    #[test]
    fn operations_have_names_of_their_own_and_only_probes_need_no_key() {
        let document = parsed();
        let mut ids = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{method} {path}");
                let public = operation["security"] == serde_json::json!([{}]);
                assert_eq!(public, !path.starts_with("/v1/"), "{method} {path}");
                assert_eq!(operation["responses"].get("401").is_some(), !public, "{method} {path}");
            }
        }
    }
}
