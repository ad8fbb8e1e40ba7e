//! What of one OpenAPI document a client of an older one would trip over. Pure.
//!
//! Clients were told to expect fields and kinds that they do not know, so more in an answer is no break. Less in an answer is one, and so is whatever is
//! no longer taken in a request: a field that is gone is refused here, not ignored. Enums are codes that clients compare with: none goes.

use std::collections::{BTreeSet, HashSet};

use serde_json::{Map, Value};

/// Every break, one a line: where, and what.
pub fn breaks(old: &Value, new: &Value) -> Vec<String> {
    let mut comparison = Comparison { old, new, found: Vec::new(), seen: HashSet::new() };
    for (path, methods) in entries(&old["paths"]) {
        for (method, operation) in entries(methods) {
            let at = format!("{} {path}", method.to_uppercase());
            match new["paths"][path].get(method) {
                Some(now) => comparison.operation(&at, operation, now),
                None => comparison.found.push(format!("{at}: is gone")),
            }
        }
    }
    comparison.found
}

/// Who reads what a schema describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Way {
    /// The host: it must take whatever it took.
    Request,
    /// The client: it must find whatever it found.
    Answer,
}

struct Comparison<'a> {
    old: &'a Value,
    new: &'a Value,
    found: Vec<String>,
    /// Schemas refer to themselves.
    seen: HashSet<(String, String, Way)>,
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn texts(value: &Value) -> BTreeSet<&str> {
    match value {
        Value::String(one) => BTreeSet::from([one.as_str()]),
        other => other.as_array().into_iter().flatten().filter_map(Value::as_str).collect(),
    }
}

fn public(operation: &Value) -> bool {
    operation["security"].as_array().is_some_and(|ways| ways.contains(&Value::Object(Map::new())))
}

impl<'a> Comparison<'a> {
    fn tell(&mut self, at: &str, what: impl std::fmt::Display) {
        self.found.push(format!("{at}: {what}"));
    }

    fn operation(&mut self, at: &str, old: &'a Value, new: &'a Value) {
        if public(old) && !public(new) {
            self.tell(at, "needs a key now");
        }
        let parameters = |operation: &'a Value| operation["parameters"].as_array().map_or(&[][..], Vec::as_slice);
        let same = |a: &Value, b: &Value| a["in"] == b["in"] && a["name"] == b["name"];
        let named = |one: &Value| {
            format!("{at} {} `{}`", one["in"].as_str().unwrap_or("?"), one["name"].as_str().unwrap_or("?"))
        };
        for parameter in parameters(old) {
            match parameters(new).iter().find(|now| same(parameter, now)) {
                Some(now) => self.schema(&named(parameter), &parameter["schema"], &now["schema"], Way::Request),
                None => self.tell(&named(parameter), "is gone"),
            }
        }
        for now in parameters(new).iter().filter(|now| now["required"] == true) {
            if !parameters(old).iter().any(|parameter| same(parameter, now) && parameter["required"] == true) {
                self.tell(&named(now), "is required now");
            }
        }
        self.body(at, &old["requestBody"], &new["requestBody"]);
        for (status, answer) in entries(&old["responses"]).filter(|(status, _)| status.starts_with('2')) {
            match new["responses"].get(status) {
                Some(now) => self.contents(&format!("{at} {status}"), answer, now, Way::Answer),
                None => self.tell(at, format_args!("is no longer answered with {status}")),
            }
        }
        // A refusal may go; while there is one, it says beside itself what it said.
        for (status, answer) in entries(&old["responses"]) {
            let Some(now) = new["responses"].get(status) else { continue };
            for (name, _) in entries(&answer["headers"]).filter(|(name, _)| now["headers"].get(name).is_none()) {
                self.tell(at, format_args!("has no header {name} with {status} any more"));
            }
        }
    }

    fn body(&mut self, at: &str, old: &'a Value, new: &'a Value) {
        match (old.is_null(), new.is_null()) {
            (false, true) => self.tell(at, "takes no body any more"),
            (_, false) if new["required"] == true && old["required"] != true => self.tell(at, "needs a body now"),
            _ => {}
        }
        if !old.is_null() && !new.is_null() {
            self.contents(at, old, new, Way::Request);
        }
    }

    fn contents(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        for (kind, content) in entries(&old["content"]) {
            match new["content"].get(kind) {
                Some(now) => self.schema(&format!("{at} {kind}"), &content["schema"], &now["schema"], way),
                None => self.tell(at, format_args!("has no {kind} any more")),
            }
        }
    }

    fn schema(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        if let (Some(before), Some(now)) = (old["$ref"].as_str(), new["$ref"].as_str())
            && !self.seen.insert((before.to_owned(), now.to_owned(), way))
        {
            return;
        }
        let (old, new) = (resolved(self.old, old), resolved(self.new, new));
        let (before, now) = (variants(old), variants(new));
        if before.len() > 1 || now.len() > 1 {
            return self.variants(at, &before, &now, way);
        }
        self.types(at, old, new, way);
        self.values(at, old, new, way);
        if way == Way::Request {
            self.bounds(at, old, new);
        }
        self.fields(at, old, new, way);
        if !old["items"].is_null() && !new["items"].is_null() {
            self.schema(&format!("{at}[]"), &old["items"], &new["items"], way);
        }
        for part in old["allOf"].as_array().into_iter().flatten() {
            let whole = new["allOf"].as_array().map_or(&[][..], Vec::as_slice);
            if !whole.iter().any(|now| self.fits(part, now, way)) {
                self.tell(at, "lacks a part that it was composed of");
            }
        }
    }

    /// One of several: what was taken must fit into something that is, what is told must fit into something that was.
    fn variants(&mut self, at: &str, old: &[&'a Value], new: &[&'a Value], way: Way) {
        let (wanted, offered) = if way == Way::Request { (old, new) } else { (new, old) };
        for (index, form) in wanted.iter().copied().enumerate() {
            let pair = |other: &'a Value| if way == Way::Request { (form, other) } else { (other, form) };
            if offered.iter().any(|other| self.fits(pair(other).0, pair(other).1, way)) {
                continue;
            }
            let name = form["$ref"].as_str();
            // One of the same name has changed: what of it, is told.
            match offered.iter().find(|other| name.is_some() && other["$ref"].as_str() == name) {
                Some(other) => self.schema(at, pair(other).0, pair(other).1, way),
                None => {
                    let name = name
                        .and_then(|to| to.rsplit('/').next())
                        .map_or_else(|| format!("number {}", index + 1), str::to_owned);
                    let what =
                        if way == Way::Request { "no longer takes its form" } else { "has a form that it had not:" };
                    self.tell(at, format_args!("{what} {name}"));
                }
            }
        }
    }

    /// Whether nothing would be told of the two.
    fn fits(&self, old: &'a Value, new: &'a Value, way: Way) -> bool {
        let mut alone = Comparison { old: self.old, new: self.new, found: Vec::new(), seen: self.seen.clone() };
        alone.seen.clear();
        alone.schema("", old, new, way);
        alone.found.is_empty()
    }

    fn types(&mut self, at: &str, old: &Value, new: &Value, way: Way) {
        let (before, now) = (texts(&old["type"]), texts(&new["type"]));
        // What has no type may be anything.
        let within = |inner: &BTreeSet<&str>, outer: &BTreeSet<&str>| {
            let one = |kind: &&str| outer.contains(*kind) || (*kind == "integer" && outer.contains("number"));
            outer.is_empty() || (!inner.is_empty() && inner.iter().all(one))
        };
        let kept = if way == Way::Request { within(&before, &now) } else { within(&now, &before) };
        if !kept {
            self.tell(at, format_args!("was {before:?} and is {now:?}"));
        }
    }

    fn values(&mut self, at: &str, old: &Value, new: &Value, way: Way) {
        let values = |schema: &Value| {
            let one = schema.get("const").cloned().map(|value| vec![value]);
            one.or_else(|| schema["enum"].as_array().cloned())
        };
        match (values(old), values(new)) {
            (Some(before), Some(now)) => {
                for value in before.iter().filter(|value| !now.contains(value)) {
                    self.tell(at, format_args!("no longer has the value {value}"));
                }
            }
            (None, Some(_)) if way == Way::Request => self.tell(at, "takes certain values only now"),
            _ => {}
        }
    }

    fn bounds(&mut self, at: &str, old: &Value, new: &Value) {
        let number = |schema: &Value, name: &str| schema[name].as_f64();
        for name in ["minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"] {
            if number(new, name).is_some_and(|now| number(old, name).is_none_or(|before| now > before)) {
                self.tell(at, format_args!("{name} is {} now", new[name]));
            }
        }
        for name in ["maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"] {
            if number(new, name).is_some_and(|now| number(old, name).is_none_or(|before| now < before)) {
                self.tell(at, format_args!("{name} is {} now", new[name]));
            }
        }
        for name in ["pattern", "format"] {
            if !new[name].is_null() && new[name] != old[name] {
                self.tell(at, format_args!("{name} is {} now", new[name]));
            }
        }
    }

    fn fields(&mut self, at: &str, old: &'a Value, new: &'a Value, way: Way) {
        for (name, field) in entries(&old["properties"]) {
            match new["properties"].get(name) {
                Some(now) => self.schema(&format!("{at} .{name}"), field, now, way),
                None => self.tell(at, format_args!("`{name}` is gone")),
            }
        }
        let (before, now) = (texts(&old["required"]), texts(&new["required"]));
        match way {
            Way::Request => {
                for name in now.difference(&before) {
                    self.tell(at, format_args!("`{name}` is required now"));
                }
                if new["additionalProperties"] == false && old["additionalProperties"] != false {
                    self.tell(at, "takes no other fields any more");
                }
            }
            Way::Answer => {
                for name in before.difference(&now) {
                    self.tell(at, format_args!("`{name}` may be missing now"));
                }
            }
        }
        let others = [&old["additionalProperties"], &new["additionalProperties"]];
        if others.iter().all(|schema| schema.is_object()) {
            self.schema(&format!("{at} .*"), others[0], others[1], way);
        }
    }
}

fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let mut schema = schema;
    while let Some(to) = schema["$ref"].as_str() {
        let Some(target) = to.strip_prefix('#').and_then(|pointer| document.pointer(pointer)) else { return schema };
        schema = target;
    }
    schema
}

fn variants(schema: &Value) -> Vec<&Value> {
    let several = ["oneOf", "anyOf"].iter().find_map(|name| schema[name].as_array());
    several.map_or_else(|| vec![schema], |all| all.iter().collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document() -> Value {
        json!({
            "paths": { "/things/{thing}": { "put": {
                "security": [{}],
                "parameters": [
                    { "in": "path", "name": "thing", "required": true, "schema": { "type": "string" } },
                    { "in": "query", "name": "way", "schema": { "type": "string", "enum": ["up", "down"] } },
                ],
                "requestBody": { "required": false, "content": { "application/json": { "schema": { "$ref": "#/s/New" } } } },
                "responses": {
                    "200": { "content": { "application/json": { "schema": { "$ref": "#/s/Thing" } } } },
                    "404": { "content": {}, "headers": { "x-id": {} } },
                },
            } } },
            "s": {
                "New": { "type": "object", "required": ["size"], "properties": {
                    "size": { "type": ["integer", "null"], "maximum": 10 },
                    "name": { "type": "string" },
                    "shape": { "oneOf": [{ "type": "string" }, { "type": "number" }] },
                    "kind": { "oneOf": [{ "$ref": "#/s/Kind" }, { "type": "null" }] },
                } },
                "Kind": { "type": "object", "properties": { "a": { "type": "string" } } },
                "Thing": { "type": "object", "required": ["id", "state"], "properties": {
                    "id": { "type": "string" },
                    "state": { "type": "string", "enum": ["new", "old"] },
                    "parts": { "type": "array", "items": { "$ref": "#/s/Thing" } },
                    "shape": { "oneOf": [{ "type": "string" }, { "type": "number" }] },
                    "marks": { "type": "object", "additionalProperties": { "type": "string" } },
                } },
            },
        })
    }

    /// The breaks of a document of which one thing is changed; `None` takes it away.
    fn changed(pointer: &str, value: Option<Value>) -> Vec<String> {
        let mut new = document();
        let (parent, last) = pointer.rsplit_once('/').unwrap();
        let last = last.replace("~1", "/");
        match (new.pointer_mut(parent).unwrap(), value) {
            (Value::Object(map), Some(value)) => drop(map.insert(last, value)),
            (Value::Object(map), None) => drop(map.remove(&last).unwrap()),
            (Value::Array(all), Some(value)) => all.push(value),
            (Value::Array(all), None) => drop(all.remove(last.parse().unwrap())),
            _ => panic!("{parent} holds nothing"),
        }
        breaks(&document(), &new)
    }

    const PUT: &str = "/paths/~1things~1{thing}/put";

    #[test]
    fn what_a_client_would_trip_over_is_named() {
        let put = |rest: &str| format!("{PUT}{rest}");
        for (pointer, value, says) in [
            ("/paths/~1things~1{thing}".to_owned(), None, "PUT /things/{thing}: is gone"),
            (PUT.to_owned(), None, "PUT /things/{thing}: is gone"),
            (put("/security"), Some(json!([{ "key": [] }])), "needs a key now"),
            (put("/parameters/1"), None, "query `way`: is gone"),
            (
                put("/parameters/-"),
                Some(json!({ "in": "query", "name": "x", "required": true })),
                "query `x`: is required now",
            ),
            (put("/parameters/1/required"), Some(json!(true)), "query `way`: is required now"),
            (put("/parameters/1/schema/enum"), Some(json!(["up"])), "no longer has the value \"down\""),
            (put("/parameters/0/schema/pattern"), Some(json!("^a$")), "pattern is \"^a$\" now"),
            (put("/parameters/0/schema/enum"), Some(json!(["a"])), "takes certain values only now"),
            (put("/requestBody"), None, "takes no body any more"),
            (put("/requestBody/required"), Some(json!(true)), "needs a body now"),
            (put("/requestBody/content"), Some(json!({ "text/csv": {} })), "has no application/json any more"),
            (put("/responses/200"), None, "is no longer answered with 200"),
            (put("/responses/200/content"), Some(json!({})), "has no application/json any more"),
            (put("/responses/404/headers"), Some(json!({})), "has no header x-id with 404 any more"),
            ("/s/New/required/-".to_owned(), Some(json!("name")), "`name` is required now"),
            ("/s/New/properties/name".to_owned(), None, "`name` is gone"),
            ("/s/New/properties/size/type".to_owned(), Some(json!("integer")), ".size: was"),
            ("/s/New/properties/size/maximum".to_owned(), Some(json!(9)), "maximum is 9 now"),
            ("/s/New/properties/name/minLength".to_owned(), Some(json!(1)), "minLength is 1 now"),
            ("/s/New/additionalProperties".to_owned(), Some(json!(false)), "takes no other fields any more"),
            ("/s/New/properties/shape/oneOf/1".to_owned(), None, "no longer takes its form number 2"),
            ("/s/Thing/properties/id".to_owned(), None, "`id` is gone"),
            ("/s/Thing/required/1".to_owned(), None, "`state` may be missing now"),
            ("/s/Thing/properties/state/enum/0".to_owned(), None, "no longer has the value \"new\""),
            ("/s/Thing/properties/id/type".to_owned(), Some(json!(["string", "null"])), ".id: was"),
            ("/s/Thing/properties/id/type".to_owned(), Some(json!("integer")), ".id: was"),
            (
                "/s/Thing/properties/shape/oneOf/-".to_owned(),
                Some(json!({ "type": "boolean" })),
                "a form that it had not: number 3",
            ),
            (
                "/s/Thing/properties/marks/additionalProperties".to_owned(),
                Some(json!({ "type": "integer" })),
                ".marks .*: was",
            ),
            ("/s/New/properties/kind/oneOf/0".to_owned(), None, "no longer takes its form Kind"),
            ("/s/Kind/required".to_owned(), Some(json!(["a"])), "json .kind: `a` is required now"),
        ] {
            let found = changed(&pointer, value.clone());
            assert!(found.iter().any(|line| line.contains(says)), "{pointer} {value:?}: {found:?}");
        }
    }

    #[test]
    fn what_only_adds_or_takes_more_breaks_nobody() {
        assert_eq!(breaks(&document(), &document()), Vec::<String>::new());
        let put = |rest: &str| format!("{PUT}{rest}");
        for (pointer, value) in [
            ("/paths/~1new".to_owned(), Some(json!({ "get": {} }))),
            (put("/parameters/-"), Some(json!({ "in": "query", "name": "x" }))),
            (put("/parameters/1/schema/enum/-"), Some(json!("left"))),
            (put("/responses/201"), Some(json!({}))),
            (put("/responses/404"), None),
            ("/s/New/properties/colour".to_owned(), Some(json!({ "type": "string" }))),
            ("/s/New/required/0".to_owned(), None),
            ("/s/New/properties/size/maximum".to_owned(), Some(json!(11))),
            ("/s/New/properties/size/type".to_owned(), Some(json!(["number", "null"]))),
            ("/s/New/properties/shape/oneOf/-".to_owned(), Some(json!({ "type": "boolean" }))),
            ("/s/Thing/properties/colour".to_owned(), Some(json!({ "type": "string" }))),
            ("/s/Thing/required/-".to_owned(), Some(json!("parts"))),
            ("/s/Thing/properties/state/enum/-".to_owned(), Some(json!("broken"))),
            ("/s/Thing/properties/shape/oneOf/1".to_owned(), None),
        ] {
            assert_eq!(changed(&pointer, value), Vec::<String>::new(), "{pointer}");
        }
    }
}
