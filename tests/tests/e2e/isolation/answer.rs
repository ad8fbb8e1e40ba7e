//! What a caller is told, without what differs between any two answers: request ids, dates, ids that were made for it, what was measured.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    headers: BTreeMap<String, String>,
    body: String,
    /// The turn that it accepted.
    pub accepted: Option<String>,
}

impl Answer {
    /// Reads it to its end.
    pub async fn read(response: reqwest::Response) -> Answer {
        let status = response.status().as_u16();
        let mut headers: BTreeMap<String, String> = response
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), masked(&String::from_utf8_lossy(value.as_bytes()))))
            .collect();
        for differs in ["x-request-id", "date"] {
            headers.remove(differs);
        }
        if status < 400 {
            // What was measured has more or fewer digits.
            headers.remove("content-length");
        }
        let text = response.text().await.expect("a whole answer");
        let parsed: Option<Value> = serde_json::from_str(&text).ok();
        let accepted = parsed.as_ref().and_then(|body| body["turn_id"].as_str()).filter(|_| status == 202);
        let accepted = accepted.map(str::to_owned);
        let body = match parsed {
            Some(body) => plain(body).to_string(),
            None => text.lines().map(frame_line).collect::<Vec<_>>().join("\n"),
        };
        Answer { status, headers, body, accepted }
    }

    /// Status and code, for people.
    pub fn shown(&self) -> String {
        let body: Value = serde_json::from_str(&self.body).unwrap_or_default();
        match body["code"].as_str().filter(|_| self.status >= 400) {
            Some(code) => format!("{} `{code}`", self.status),
            None => self.status.to_string(),
        }
    }

    /// Whether the two tell the same.
    pub fn tells_as(&self, other: &Answer) -> bool {
        (self.status, &self.headers, &self.body) == (other.status, &other.headers, &other.body)
    }
}

/// A line of an event stream, or of an export.
fn frame_line(line: &str) -> String {
    if let Ok(Value::Object(object)) = serde_json::from_str(line) {
        return plain(Value::Object(object)).to_string();
    }
    let data = line.strip_prefix("data: ").and_then(|data| serde_json::from_str(data).ok());
    data.map_or_else(|| line.to_owned(), |data| format!("data: {}", plain(data)))
}

fn plain(mut value: Value) -> Value {
    match &mut value {
        Value::Object(map) => {
            map.remove("request_id");
            for (name, value) in map.iter_mut().filter(|(_, value)| !value.is_null()) {
                // A cursor may hold an id that was made, a credential is a key's, and what is stored is measured now and then.
                let measured = name.ends_with("_at")
                    || ["at", "compile_ms", "usage", "next", "credential", "storage_bytes"].contains(&name.as_str());
                *value = if measured { json!("…") } else { plain(value.take()) };
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = plain(item.take())),
        // A key's id is made from its secret.
        Value::String(text) if text.starts_with("key/") => *text = "key/…".to_owned(),
        Value::String(text) => *text = masked(text),
        _ => {}
    }
    value
}

/// Without the UUIDs.
fn masked(text: &str) -> String {
    let mut rest = text;
    let mut out = String::new();
    while !rest.is_empty() {
        let id = rest.get(..36).filter(|id| id.contains('-') && uuid::Uuid::try_parse(id).is_ok());
        let len = if id.is_some() { 36 } else { rest.chars().next().map_or(1, char::len_utf8) };
        out.push_str(if id.is_some() { "…" } else { &rest[..len] });
        rest = &rest[len..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_between_any_two_answers_is_left_out() {
        let id = "01990000-0000-7000-8000-000000000000";
        assert_eq!(masked(&format!("/v1/turns/{id}/events")), "/v1/turns/…/events");
        assert_eq!(masked("é01990000"), "é01990000");
        let body = json!({ "request_id": "r", "id": id, "usage": null, "ended_at": "1970", "items": [{ "compile_ms": 0.1, "text": "a" }] });
        assert_eq!(
            plain(body),
            json!({ "id": "…", "usage": null, "ended_at": "…", "items": [{ "compile_ms": "…", "text": "a" }] })
        );
        assert_eq!(
            frame_line("data: {\"turn_id\":\"x\",\"accepted_at\":1}"),
            "data: {\"accepted_at\":\"…\",\"turn_id\":\"x\"}"
        );
        assert_eq!(frame_line("id: 0.0"), "id: 0.0");
    }
}
