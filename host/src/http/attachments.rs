//! `/v1/attachments`: files that messages refer to. They come in before the message, and are read by whoever may read it.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Attach, May};
use super::body::read_attachment;
use super::params::Ids;
use super::problem::{Code, Problem};
use super::under_way::UnderWay;
use super::views::{json, located};
use crate::attachment::{Attachment, AttachmentId, PIECE_BYTES, is_media_type};
use crate::clock::Timestamp;
use crate::ids::OrgId;
use crate::quota::LimitName;
use crate::store::{PutAttachment, StoreError};

/// Uploads of one org at once on a host, and of all: each holds up to `attachment_bytes_max` in memory.
const UPLOADS_OF_ORG_MAX: usize = 4;
const UPLOADS_MAX: usize = 32;

/// Its routes.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(create_attachment)).routes(routes!(get_attachment))
}

/// An attachment as it is shown to whoever uploaded it.
#[derive(Serialize, ToSchema)]
#[schema(as = Attachment)]
struct AttachmentView {
    /// What a message's part names it by.
    id: AttachmentId,
    /// As it was uploaded.
    media_type: String,
    /// How many bytes it has.
    bytes: u64,
    /// When it was uploaded, for the last time.
    #[schema(value_type = String, format = DateTime)]
    uploaded_at: Timestamp,
    /// Until when it is kept if no message refers to it.
    #[schema(value_type = String, format = DateTime)]
    expires_at: Timestamp,
}

/// Whose uploads are under way.
pub fn uploads() -> Arc<UnderWay> {
    UnderWay::new("uploads of attachments", "attachment_uploads_max", UPLOADS_OF_ORG_MAX, UPLOADS_MAX)
}

/// Upload an attachment
///
/// The body is the file, `Content-Type` its media type (`application/octet-stream` where there is none). What is answered names it by its bytes: a part of a message,
/// `{"type": "attachment", "attachment_id": …, "name": …}`, refers to it, by whoever uploaded it. It is kept until `expires_at`, and for as long as there is a turn
/// whose message refers to it.
#[utoipa::path(post, path = "/v1/attachments", tag = "attachments",
    request_body(content_type = "application/octet-stream", content = Vec<u8>),
    responses((status = 201, description = "It is there", body = AttachmentView), (status = 200, description = "You had uploaded these bytes already", body = AttachmentView)))]
async fn create_attachment(
    State(gateway): State<Gateway>,
    caller: May<Attach>,
    request: Request,
) -> Result<Response, Problem> {
    let limits = &gateway.host.config.limits;
    let media_type = media_type(request.headers())?;
    let _under_way = gateway.attachment_uploads.begin(&caller.org)?;
    let (attachment, pieces) = read_attachment(request, limits.attachment_bytes_max).await?.finish(media_type);
    let (store, now) = (&gateway.host.store, gateway.host.clock.now());
    let bytes_max = limits.org_attachments_bytes_max;
    let put = store.put_attachment(&caller.org, &caller.user, &attachment, pieces, bytes_max, now).await?;
    let (status, uploaded_at) = match put {
        PutAttachment::Created(at) => (StatusCode::CREATED, at),
        PutAttachment::Existing(at) => (StatusCode::OK, at),
        PutAttachment::StorageFull(max) => {
            let detail = format!("the org has stored the {max} bytes that it may; delete conversations or workers");
            let limit = LimitName::StorageBytesMax.as_str();
            return Err(Problem::new(Code::QuotaExhausted, detail).over("org", limit, max as f64));
        }
        PutAttachment::NoOrg => return Err(Problem::not_found("org")),
        PutAttachment::Full => {
            let detail = format!(
                "the org's attachments have as many bytes as they may ({bytes_max}); delete conversations that refer to some"
            );
            let full = Problem::new(Code::QuotaExhausted, detail);
            return Err(full.over("org", "attachments_bytes_max", bytes_max as f64));
        }
    };
    metrics::counter!("turnhouse_attachment_uploads_total").increment(1);
    metrics::counter!("turnhouse_attachment_upload_bytes_total").increment(attachment.bytes);
    let Attachment { id, media_type, bytes } = attachment;
    let expires_at = uploaded_at.plus_ms(limits.attachment_upload_ms);
    let response = json(status, &AttachmentView { id, media_type, bytes, uploaded_at, expires_at })?;
    Ok(located(response, &format!("/v1/attachments/{id}")))
}

/// Read an attachment
///
/// Its bytes, to be saved and not shown. By whoever uploaded it within the last day, or has a turn whose message refers to it, or is an admin. Its `ETag` never
/// changes.
#[utoipa::path(get, path = "/v1/attachments/{attachment}", tag = "attachments", params(("attachment" = AttachmentId, Path)),
    responses((status = 200, description = "The bytes, with the media type that they were uploaded with", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 304, description = "`If-None-Match` names it")))]
async fn get_attachment(
    State(gateway): State<Gateway>,
    caller: May<Attach>,
    Ids(id): Ids<AttachmentId>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let user = caller.only_own();
    let found = gateway.host.store.attachments(&caller.org, user, &[id]).await?;
    let Some(attachment) = found.into_iter().next() else { return Err(Problem::not_found("attachment")) };
    let tag = format!("\"{id}\"");
    let known = headers.get(header::IF_NONE_MATCH).is_some_and(|value| value.as_bytes() == tag.as_bytes());
    let tag = HeaderValue::try_from(tag).map_err(Problem::internal)?;
    if known {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response());
    }
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::try_from(&attachment.media_type).map_err(Problem::internal)?),
        (header::CONTENT_LENGTH, HeaderValue::from(attachment.bytes)),
        (header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache")),
        (header::ETAG, tag),
    ];
    Ok((headers, Body::from_stream(pieces(gateway, caller.org.clone(), attachment))).into_response())
}

/// An attachment's bytes, a piece at a time as the client takes them.
fn pieces(
    gateway: Gateway,
    org: OrgId,
    attachment: Attachment,
) -> impl futures_util::Stream<Item = Result<bytes::Bytes, StoreError>> {
    let count = attachment.bytes.div_ceil(PIECE_BYTES as u64);
    futures_util::stream::try_unfold(0_u32, move |piece| {
        let (gateway, org) = (gateway.clone(), org.clone());
        async move {
            if u64::from(piece) >= count {
                return Ok(None);
            }
            let read = gateway.host.store.attachment_piece(&org, attachment.id, piece).await?;
            // It may have gone while it was read: the client sees a body that breaks off.
            let bytes = read.ok_or_else(|| StoreError::Unavailable("the attachment has gone".to_owned()))?;
            Ok(Some((bytes, piece + 1)))
        }
    })
}

/// What the client says that it sends.
fn media_type(headers: &HeaderMap) -> Result<String, Problem> {
    let Some(given) = headers.get(header::CONTENT_TYPE) else { return Ok("application/octet-stream".to_owned()) };
    let text = given.to_str().ok().map(str::trim).filter(|text| is_media_type(text));
    let text = text.ok_or_else(|| {
        Problem::new(
            Code::UnsupportedMediaType,
            "the Content-Type is not a media type; send one, such as `application/pdf`",
        )
    })?;
    if text.get(..10).is_some_and(|start| start.eq_ignore_ascii_case("multipart/")) {
        let detail =
            "this route takes the file alone, not a form; send its bytes as the body, with their own Content-Type";
        return Err(Problem::new(Code::UnsupportedMediaType, detail));
    }
    Ok(text.to_owned())
}
