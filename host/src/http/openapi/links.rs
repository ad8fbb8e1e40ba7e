//! What an answer's ids are for: the document's links. Generators make methods of them, and whoever tests against the document follows them.

use utoipa::openapi::RefOr;
use utoipa::openapi::link::LinkBuilder;
use utoipa::openapi::path::Operation;

/// Of an answer: the operations that take its ids, and which of their parameters is what.
struct Links {
    from: &'static [(&'static str, &'static str)],
    to: &'static [&'static str],
    parameters: &'static [(&'static str, &'static str)],
}

const LINKS: &[Links] = &[
    Links {
        from: &[("submit_turn", "202"), ("ingest", "202")],
        to: &["get_turn", "stream_events", "cancel_turn"],
        parameters: &[("turn", "$response.body#/turn_id")],
    },
    Links {
        from: &[("create_conversation", "201"), ("create_conversation", "200")],
        to: &[
            "submit_turn",
            "get_conversation",
            "patch_conversation",
            "export_conversation",
            "list_messages",
            "list_turns",
            "reset_snapshot",
            "delete_conversation",
        ],
        parameters: &[("agent", "$response.body#/agent_id"), ("conversation", "$response.body#/id")],
    },
    Links {
        from: &[("create_attachment", "201"), ("create_attachment", "200")],
        to: &["get_attachment"],
        parameters: &[("attachment", "$response.body#/id")],
    },
    Links {
        from: &[("put_agent", "201"), ("put_agent", "200")],
        to: &["get_agent", "list_conversations", "delete_agent"],
        parameters: &[("agent", "$response.body#/id")],
    },
    Links {
        from: &[("put_worker", "201"), ("put_worker", "200")],
        to: &["get_worker", "delete_worker"],
        parameters: &[("worker", "$response.body#/id")],
    },
];

/// Adds to an operation's answers where their ids lead.
pub fn add(operation: &mut Operation) {
    let id = operation.operation_id.clone().unwrap_or_default();
    for links in LINKS {
        for (_, status) in links.from.iter().filter(|(from, _)| *from == id) {
            let Some(RefOr::T(response)) = operation.responses.responses.get_mut(*status) else {
                unreachable!("the table names answers that there are")
            };
            for to in links.to {
                let mut link = LinkBuilder::new().operation_id(*to);
                for (name, expression) in links.parameters {
                    link = link.parameter(*name, *expression);
                }
                response.links.insert((*to).to_owned(), RefOr::T(link.build()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    #[test]
    fn every_link_leads_to_an_operation_with_its_parameters() {
        let document: Value = serde_json::from_slice(&super::super::json()).unwrap();
        let operations: Vec<&Value> = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|item| item.as_object().unwrap().values())
            .collect();
        let mut followed = 0;
        for operation in &operations {
            for response in operation["responses"].as_object().unwrap().values() {
                for link in response["links"].as_object().into_iter().flatten().map(|(_, link)| link) {
                    let target = operations.iter().find(|other| other["operationId"] == link["operationId"]).unwrap();
                    for name in link["parameters"].as_object().unwrap().keys() {
                        let parameters = target["parameters"].as_array().unwrap();
                        assert!(parameters.iter().any(|one| one["name"] == name.as_str()), "{name} of {link}");
                    }
                    followed += 1;
                }
            }
        }
        assert_eq!(followed, super::LINKS.iter().map(|links| links.from.len() * links.to.len()).sum::<usize>());
    }
}
