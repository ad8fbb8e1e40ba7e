//! `/v1/workers`: modules come in, are listed, and go.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use tokio::sync::Semaphore;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Deploy, May};
use super::body::read_module;
use super::page::{List, PageQuery, name_cursor};
use super::params::Ids;
use super::problem::{Code, Problem};
use super::under_way::UnderWay;
use super::views::{WorkerView, json};
use crate::ids::WorkerName;
use crate::limits::Limits;
use crate::quota::LimitName;
use crate::registry::UploadError;
use crate::store::{Deleted, PutWorker, WorkerFull};

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(list_workers)).routes(routes!(put_worker, get_worker, delete_worker))
}

/// Uploads of one org at once: one is read and compiled, the others wait for it.
const UPLOADS_OF_ORG_MAX: usize = 8;
/// And of all: so many wait.
const UPLOADS_MAX: usize = 256;
/// Modules whose bodies are read while others are compiled.
const BODIES_MAX: usize = 6;

/// Whose uploads are under way.
pub struct Uploads {
    waiting: Arc<UnderWay>,
    /// Each holds up to `module_bytes_max` in memory. An org has one of them: whoever sends slowly delays nobody else.
    bodies: Semaphore,
}

impl Uploads {
    /// Bounds from `limits`.
    pub fn new(limits: &Limits) -> Uploads {
        Uploads {
            waiting: UnderWay::new("uploads of modules", "module_uploads_max", UPLOADS_OF_ORG_MAX, UPLOADS_MAX),
            bodies: Semaphore::new(limits.compiles_concurrent_max + BODIES_MAX),
        }
    }
}

/// Upload a module
///
/// Validates, compiles and stores it as the worker's next version. The bytes of an existing version again are that version.
#[utoipa::path(put, path = "/v1/workers/{worker}", tag = "workers", params(("worker" = WorkerName, Path)),
    request_body(content_type = "application/wasm", content = Vec<u8>),
    responses((status = 201, description = "A new version", body = WorkerView), (status = 200, description = "These bytes were this version already", body = WorkerView)))]
async fn put_worker(
    State(gateway): State<Gateway>,
    caller: May<Deploy>,
    Ids(worker): Ids<WorkerName>,
    request: Request,
) -> Result<Response, Problem> {
    let uploads = &gateway.module_uploads;
    let place = uploads.waiting.begin(&caller.org)?;
    let _alone = place.alone().await;
    let _room = uploads.bodies.acquire().await.expect("it is never closed");
    let wasm = read_module(request, gateway.host.config.limits.module_bytes_max).await?;
    match gateway.host.upload_worker(&caller.org, &worker, wasm, &caller.actor()).await {
        Ok(PutWorker::Created(version)) => json(StatusCode::CREATED, &WorkerView::from(version)),
        Ok(PutWorker::Existing(version)) => json(StatusCode::OK, &WorkerView::from(version)),
        Ok(PutWorker::Full(why)) => {
            let (of, limit, max) = match why {
                WorkerFull::Storage(max) => ("org", LimitName::StorageBytesMax.as_str(), max),
                WorkerFull::Workers(max) => ("org", "workers_max", max),
                WorkerFull::Versions(max) => ("worker", "versions_max", max),
            };
            Err(Problem::new(Code::QuotaExhausted, why.to_string()).over(of, limit, max as f64))
        }
        Err(UploadError::Refused(refusal)) => {
            Err(Problem::new(Code::parse(refusal.code()).unwrap_or(Code::ModuleInvalid), refusal.to_string()))
        }
        Err(UploadError::Store(error)) => Err(error.into()),
    }
}

/// List workers
///
/// The newest version of each, by name.
#[utoipa::path(get, path = "/v1/workers", tag = "workers", responses((status = 200, description = "A page", body = List<WorkerView>)))]
async fn list_workers(
    State(gateway): State<Gateway>,
    caller: May<Deploy>,
    query: PageQuery,
) -> Result<Response, Problem> {
    let after: Option<WorkerName> = query.after_name('w')?;
    let page = gateway.host.store.workers(&caller.org, after.as_ref(), query.limit).await?;
    let next = page.items.last().filter(|_| page.more).map(|last| name_cursor('w', &last.worker));
    let items = page.items.into_iter().map(WorkerView::from).collect();
    json(StatusCode::OK, &List { items, next })
}

/// List a worker's versions
///
/// Newest first.
#[utoipa::path(get, path = "/v1/workers/{worker}", tag = "workers", params(("worker" = WorkerName, Path)),
    responses((status = 200, description = "All its versions", body = List<WorkerView>)))]
async fn get_worker(
    State(gateway): State<Gateway>,
    caller: May<Deploy>,
    Ids(worker): Ids<WorkerName>,
) -> Result<Response, Problem> {
    let versions = gateway.host.store.worker_versions(&caller.org, &worker).await?;
    if versions.is_empty() {
        return Err(Problem::not_found("worker"));
    }
    json(StatusCode::OK, &List::whole(versions.into_iter().map(WorkerView::from).collect()))
}

/// Delete a worker
///
/// With all its versions, unless an agent runs it.
#[utoipa::path(delete, path = "/v1/workers/{worker}", tag = "workers", params(("worker" = WorkerName, Path)),
    responses((status = 204, description = "It is gone")))]
async fn delete_worker(
    State(gateway): State<Gateway>,
    caller: May<Deploy>,
    Ids(worker): Ids<WorkerName>,
) -> Result<Response, Problem> {
    match gateway.host.delete_worker(&caller.org, &worker, &caller.actor()).await? {
        Deleted::Done => Ok(StatusCode::NO_CONTENT.into_response()),
        Deleted::NotFound => Err(Problem::not_found("worker")),
        Deleted::InUse(by) => Err(Problem::new(
            Code::WorkerInUse,
            format!("{by} uses worker {worker}; give that agent another worker, or delete it first"),
        )),
    }
}
