//! Follows a turn's events from a cursor to its terminal event: a first connection, a reconnect and a reader on another replica are the same code.

use crate::event::{Event, EventId};
use crate::host::Host;
use crate::ids::{OrgId, TurnId};
use crate::store::StoreError;

/// A reader of one turn. Dropping it delays and cancels nothing.
pub struct Reader {
    _private: (),
}

impl Reader {
    /// Reads after `after`, or from the start. The caller has checked that the turn is theirs to see.
    pub fn new(_host: &Host, _org: OrgId, _turn: TurnId, _after: Option<EventId>) -> Reader {
        Reader { _private: () }
    }

    /// The next event; after the terminal one `None`. Cancel-safe. An event of kind `resync` carries the id from which it resumes.
    pub async fn next(&mut self) -> Result<Option<Event>, StoreError> {
        Ok(None)
    }
}
