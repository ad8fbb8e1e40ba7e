//! What answers say beside their bodies: the document's headers.

use utoipa::openapi::path::Operation;
use utoipa::openapi::{Header, HeaderBuilder, KnownFormat, ObjectBuilder, Ref, RefOr, SchemaFormat, Type};

/// Names them in an operation's answers; they are found among the components.
pub fn add(operation: &mut Operation, id: &str, public: bool) {
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else { unreachable!("responses are written in place") };
        let mut names = vec!["x-request-id"];
        let (good, of_a_turn) = (status.starts_with('2'), matches!(id, "submit_turn" | "ingest"));
        match status.as_str() {
            "429" | "503" => names.push("Retry-After"),
            "401" => names.push("WWW-Authenticate"),
            "405" => names.push("Allow"),
            _ => {}
        }
        if good && !public {
            names.push("turnhouse-key-expires-at");
        }
        if good && (of_a_turn || matches!(id, "create_attachment" | "create_conversation")) {
            names.push("Location");
        }
        if good && of_a_turn {
            names.push("Idempotent-Replayed");
        }
        if good && id == "submit_turn" {
            names.push("Preference-Applied");
        }
        if id == "get_attachment" && (good || status == "304") {
            names.push("ETag");
        }
        for name in names {
            let named = Ref::new(format!("#/components/headers/{name}"));
            response.headers.insert(name.to_owned(), RefOr::Ref(named));
        }
    }
}

/// All of them.
pub fn all() -> impl Iterator<Item = (String, RefOr<Header>)> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let moment = text().format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)));
    let seconds = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0));
    let replayed = text().enum_values(Some(["true"]));
    let all = [
        ("x-request-id", text(), "The request's own, or a new one; the host's log names it."),
        ("Retry-After", seconds, "Seconds after which the same request may be taken."),
        ("WWW-Authenticate", text(), "`Bearer`."),
        ("Allow", text(), "The route's methods."),
        ("turnhouse-key-expires-at", moment, "When the key that was sent ends, if that is soon."),
        ("Location", text(), "The path of what was made, or is followed."),
        ("Idempotent-Replayed", replayed, "The `Idempotency-Key` had begun this turn already."),
        ("Preference-Applied", text(), "`wait=N`, as it was waited."),
        ("ETag", text(), "Of these bytes, for ever."),
    ];
    all.into_iter().map(|(name, schema, description)| {
        let header = HeaderBuilder::new().schema(Some(schema)).description(Some(description)).build();
        (name.to_owned(), header.into())
    })
}
