//! Stream tickets: made here by whoever may follow a turn, shown to `GET /v1/turns/{turn}/events` by an `EventSource`, which can send no header.
//!
//! What a ticket is and whether it is one is said in [`crate::tickets`]; here is what belongs to its turn, and what keeps it out of caches.

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Gateway;
use super::auth::{Converse, May};
use super::params::Ids;
use super::problem::{Code, Problem};
use super::turns::opened;
use super::views::json;
use crate::clock::Timestamp;
use crate::ids::TurnId;
use crate::store::TurnRecord;
use crate::tickets::Ticket;

/// Its route.
pub fn routes() -> OpenApiRouter<Gateway> {
    OpenApiRouter::new().routes(routes!(create_ticket))
}

/// What follows one turn.
#[derive(Serialize, ToSchema)]
#[schema(as = Ticket)]
struct TicketView {
    /// The ticket: a secret, though a small one.
    #[schema(example = "tt_1.eyJvcmciOiJhY21lIn0.c2VjcmV0")]
    ticket: String,
    /// What to give an `EventSource`, on this host's address.
    #[schema(
        example = "/v1/turns/01990000-0000-7000-8000-000000000000/events?ticket=tt_1.eyJvcmciOiJhY21lIn0.c2VjcmV0"
    )]
    url: String,
    /// When it ends at the latest. It ends sooner: ten minutes after its turn, and with what asked for it.
    #[schema(value_type = String, format = DateTime)]
    expires_at: Timestamp,
}

/// Make a ticket for a turn's events
///
/// For a browser's EventSource, which can send no header. It reads the events of this turn and nothing else, until ten minutes after the turn's end,
/// and stops with the key that asked for it. `Last-Event-ID` works with it.
#[utoipa::path(post, path = "/v1/turns/{turn}/ticket", tag = "turns", params(("turn" = TurnId, Path)),
    responses((status = 201, description = "A ticket", body = TicketView)))]
async fn create_ticket(
    State(gateway): State<Gateway>,
    caller: May<Converse>,
    Ids(turn): Ids<TurnId>,
) -> Result<Response, Problem> {
    let (record, own) = opened(&gateway, &caller, turn).await?;
    if outlived(&gateway, &record) {
        return Err(Problem::new(
            Code::TurnEnded,
            "the turn ended too long ago for a ticket; read its reply with `GET /v1/turns/{turn}`, or its events with your key",
        ));
    }
    let limits = &gateway.host.config.limits;
    let at_the_latest = gateway.host.clock.now().plus_ms(limits.ticket_ms_max);
    let with_its_turn = record.ended_at.map(|at| at.plus_ms(limits.ticket_grace_ms));
    // A token cannot be asked again later; a key is, and its end is told here already.
    let expires_at = [with_its_turn, caller.expires_at].into_iter().flatten().fold(at_the_latest, Timestamp::min);
    let (org, user) = (caller.org.clone(), caller.user.clone());
    let ticket = Ticket::new(org, user, turn, !own, caller.by.clone(), expires_at);
    let ticket = gateway.host.keys.tickets.write(&ticket).await?;
    let url = format!("/v1/turns/{turn}/events?ticket={ticket}");
    let mut response = json(StatusCode::CREATED, &TicketView { ticket, url, expires_at })?;
    keep_secret(&mut response);
    Ok(response)
}

/// Whether a turn ended so long ago that its tickets are no more.
pub fn outlived(gateway: &Gateway, turn: &TurnRecord) -> bool {
    let grace_ms = gateway.host.config.limits.ticket_grace_ms;
    turn.ended_at.is_some_and(|at| at.plus_ms(grace_ms) <= gateway.host.clock.now())
}

/// What was asked for with a ticket, or holds one, is kept by no cache; and no page that shows it tells the next where it came from.
pub fn keep_secret(response: &mut Response) {
    let headers: &mut HeaderMap = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
}
