//! `/v1/agents`: an agent's settings are put, read and deleted.

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Deploy, May, SeeAgents, missing};
use super::body::JsonBytes;
use super::page::{List, PageQuery, name_cursor};
use super::params::Ids;
use super::problem::{Code, Problem};
use super::views::{AgentView, json};
use crate::agent::{Agent, AgentSettings};
use crate::caller::{Caller, Scopes};
use crate::ids::AgentId;
use crate::registry::PutAgentError;
use crate::store::{Deleted, PutAgent};

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(list_agents)).routes(routes!(put_agent, get_agent, delete_agent))
}

/// Make or change an agent
///
/// The whole settings, each time. Without `version` it gets the worker's newest, and keeps that until the next `PUT`; rolling back is
/// naming an older one. `allowed_hosts` and `default` change only with the scope `admin`.
#[utoipa::path(put, path = "/v1/agents/{agent}", tag = "agents", params(("agent" = AgentId, Path)), request_body = AgentSettings,
    responses((status = 201, description = "It is new", body = AgentView), (status = 200, description = "It is changed", body = AgentView)))]
async fn put_agent(
    State(gateway): State<Gateway>,
    caller: May<Deploy>,
    Ids(agent): Ids<AgentId>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let body = JsonBytes::read(&parts.headers, body, gateway.host.config.limits.request_body_bytes_max).await?;
    let settings: AgentSettings = body.parse_named(Code::InvalidSetting)?;
    if !caller.scopes.include(Scopes::ADMIN) {
        let before = gateway.host.store.agent(&caller.org, &agent).await?;
        only_an_admins(before.as_ref(), &settings)?;
    }
    match gateway.host.put_agent(&caller.org, &agent, settings, &caller.actor()).await {
        Ok(PutAgent::Stored { agent, created }) => {
            let status = if created { StatusCode::CREATED } else { StatusCode::OK };
            json(status, &AgentView::new(agent, true))
        }
        Ok(PutAgent::NoSuchWorker) => Err(Problem::new(
            Code::InvalidSetting,
            "worker: this org has no such worker, or not this version of it; upload it first (PUT /v1/workers/{worker})",
        )),
        Ok(PutAgent::Full) => {
            let max = gateway.host.config.limits.org_agents_max;
            let detail = format!("this org has {max} agents, the limit; delete some first");
            Err(Problem::new(Code::QuotaExhausted, detail).over("org", "agents_max", max as f64))
        }
        Ok(PutAgent::NoFileMode) => Err(Problem::new(
            Code::InvalidSetting,
            "session_mode: \"file\" needs a directory of its own on one host, and here several hosts share a database; use \"snapshot\"",
        )),
        Err(PutAgentError::Invalid(invalid)) => Err(Problem::new(Code::InvalidSetting, invalid.0)),
        Err(PutAgentError::Store(error)) => Err(error.into()),
    }
}

/// Which outside hosts a worker reaches, and who answers strangers, is not for who merely deploys.
fn only_an_admins(before: Option<&Agent>, after: &AgentSettings) -> Result<(), Problem> {
    let before = before.map(|agent| &agent.settings);
    let hosts_before = before.map(|b| b.allowed_hosts.as_slice()).unwrap_or_default();
    let default_before = before.is_some_and(|b| b.default);
    if hosts_before != after.allowed_hosts || default_before != after.default {
        return Err(missing(&[Scopes::ADMIN])
            .with("field", if hosts_before == after.allowed_hosts { "default" } else { "allowed_hosts" }));
    }
    Ok(())
}

/// Whether all of an agent's settings are the caller's to see.
fn sees_all(caller: &Caller) -> bool {
    caller.scopes.include(Scopes::DEPLOY)
}

/// List agents
///
/// By id.
#[utoipa::path(get, path = "/v1/agents", tag = "agents", responses((status = 200, description = "A page", body = List<AgentView>)))]
async fn list_agents(
    State(gateway): State<Gateway>,
    caller: May<SeeAgents>,
    query: PageQuery,
) -> Result<Response, Problem> {
    let after: Option<AgentId> = query.after_name('a')?;
    let page = gateway.host.store.agents(&caller.org, after.as_ref(), query.limit).await?;
    let next = page.items.last().filter(|_| page.more).map(|last| name_cursor('a', &last.id));
    let items = page.items.into_iter().map(|agent| AgentView::new(agent, sees_all(&caller))).collect();
    json(StatusCode::OK, &List { items, next })
}

/// Get an agent
#[utoipa::path(get, path = "/v1/agents/{agent}", tag = "agents", params(("agent" = AgentId, Path)),
    responses((status = 200, description = "Its settings", body = AgentView)))]
async fn get_agent(
    State(gateway): State<Gateway>,
    caller: May<SeeAgents>,
    Ids(agent): Ids<AgentId>,
) -> Result<Response, Problem> {
    let agent = gateway.host.store.agent(&caller.org, &agent).await?.ok_or_else(|| Problem::not_found("agent"))?;
    json(StatusCode::OK, &AgentView::new(agent, sees_all(&caller)))
}

/// Delete an agent
///
/// Its conversations must be gone.
#[utoipa::path(delete, path = "/v1/agents/{agent}", tag = "agents", params(("agent" = AgentId, Path)),
    responses((status = 204, description = "It is gone")))]
async fn delete_agent(
    State(gateway): State<Gateway>,
    caller: May<Deploy>,
    Ids(agent): Ids<AgentId>,
) -> Result<Response, Problem> {
    if !caller.scopes.include(Scopes::ADMIN) {
        // Deleting the default is changing it.
        let before = gateway.host.store.agent(&caller.org, &agent).await?;
        if before.is_some_and(|agent| agent.settings.default) {
            return Err(missing(&[Scopes::ADMIN]).with("field", "default"));
        }
    }
    match gateway.host.delete_agent(&caller.org, &agent, &caller.actor()).await? {
        Deleted::Done => Ok(StatusCode::NO_CONTENT.into_response()),
        Deleted::NotFound => Err(Problem::not_found("agent")),
        Deleted::InUse(_) => Err(Problem::new(
            Code::AgentInUse,
            format!(
                "agent {agent} has conversations; delete them first (DELETE /v1/agents/{agent}/conversations/{{conversation}})"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

    #[test]
    fn hosts_and_the_default_are_an_admins_to_change() {
        let settings = AgentSettings::of("echo".parse().unwrap());
        let with_host = AgentSettings { allowed_hosts: vec!["example.org".to_owned()], ..settings.clone() };
        let default = AgentSettings { default: true, ..settings.clone() };
        let stored = |settings: &AgentSettings| Agent {
            id: "a".parse().unwrap(),
            settings: settings.clone(),
            revision: 1,
            created_at: Timestamp(0),
            updated_at: Timestamp(0),
        };
        assert!(only_an_admins(None, &settings).is_ok());
        for changed in [&with_host, &default] {
            assert_eq!(only_an_admins(None, changed).unwrap_err().code(), Code::ScopeMissing);
            assert_eq!(only_an_admins(Some(&stored(changed)), &settings).unwrap_err().code(), Code::ScopeMissing);
            assert!(only_an_admins(Some(&stored(changed)), changed).is_ok(), "left as it was");
        }
    }
}
