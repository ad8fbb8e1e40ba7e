//! Stream tickets: what a browser's `EventSource`, which can send no header, follows one turn with.
//!
//! A ticket is a MAC over one turn, one org, one user and the credential that asked for it. It travels in a URL, where histories and proxies see
//! it, so it is worth little: it reads the events of its turn and does nothing else, it ends soon after the turn, and with its credential.
//! Nothing is stored of it. Every host makes and knows the same ones, because the MAC's keys come from the store; one that is
//! [`ROTATED_AFTER`] old is replaced, and a host that meets a key's number for the first time reads them again.
//!
//! Here is what only the MAC and the ticket's own bound say; [`crate::keys::Authenticator`] asks whether its credential is still good, and `http/`
//! whether its turn is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::caller::Credential;
use crate::clock::{Clock, Timestamp};
use crate::ids::{OrgId, TurnId, UserId};
use crate::store::{Result, Store, TicketKey};

/// What every ticket begins with: secret scanners and people recognise it.
pub const PREFIX: &str = "tt_";

/// Longer than any: the ids within have bounds.
const BYTES_MAX: usize = 1_024;

/// How old a key may be for new tickets. Longer than any ticket lives, so that the one before it has nothing to say any more when it goes.
const ROTATED_AFTER: Duration = Duration::from_secs(30 * 86_400);

/// A new key is not used before the other hosts had time to meet it.
const SETTLES: Duration = Duration::from_secs(60);

/// How long the keys are believed without a look at the store.
const BELIEVED: Duration = Duration::from_secs(3_600);

/// Between two looks for a number that nobody knows: anybody can make numbers up.
const UNKNOWN_AGAIN: Duration = Duration::from_secs(1);

/// What a ticket says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ticket {
    /// The org.
    pub org: OrgId,
    /// As whom it reads.
    pub user: UserId,
    /// What it reads.
    pub turn: TurnId,
    /// It was made by an admin, for a turn that is somebody else's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub as_admin: bool,
    /// Who asked for it.
    pub by: Credential,
    /// Milliseconds: when it ends, whatever its turn does.
    until: i64,
}

impl Ticket {
    /// A ticket that ends at `until` at the latest.
    pub fn new(org: OrgId, user: UserId, turn: TurnId, as_admin: bool, by: Credential, until: Timestamp) -> Ticket {
        Ticket { org, user, turn, as_admin, by, until: until.0 }
    }

    /// When it ends, whatever its turn does.
    pub fn until(&self) -> Timestamp {
        Timestamp(self.until)
    }
}

/// Makes tickets and knows them again.
pub struct Tickets {
    store: Arc<dyn Store>,
    clock: Clock,
    ring: Mutex<Option<Arc<Ring>>>,
    /// Held by whoever asks the store.
    reading: tokio::sync::Mutex<()>,
}

/// The keys, newest first, as of a moment.
struct Ring {
    keys: Vec<TicketKey>,
    read_at: Instant,
}

impl Ring {
    fn key(&self, number: i64) -> Option<&TicketKey> {
        self.keys.iter().find(|key| key.number == number)
    }
}

impl Tickets {
    /// Of the hosts on `store`.
    pub fn new(store: Arc<dyn Store>, clock: Clock) -> Tickets {
        Tickets { store, clock, ring: Mutex::default(), reading: tokio::sync::Mutex::default() }
    }

    /// Sees to it that there is a key. A host calls it as it starts, so that the first ticket finds one that has settled.
    pub async fn prepare(&self) -> Result<()> {
        self.signing_key().await.map(|_| ())
    }

    /// The ticket as text.
    pub async fn write(&self, ticket: &Ticket) -> Result<String> {
        let key = self.signing_key().await?;
        let says = serde_json::to_vec(ticket).expect("plain data serialises");
        let mut text = format!("{PREFIX}{}.{}", key.number, URL_SAFE_NO_PAD.encode(says));
        let mac = mac(&key.secret, &text).finalize().into_bytes();
        text.push('.');
        URL_SAFE_NO_PAD.encode_string(mac, &mut text);
        Ok(text)
    }

    /// What a text says that is a ticket of these hosts and has not reached its own bound.
    pub async fn read(&self, text: &str) -> Result<Option<Ticket>> {
        let Some((signed, says, number, given)) = parts(text) else { return Ok(None) };
        let Some(key) = self.key(number).await? else { return Ok(None) };
        // In constant time.
        if mac(&key.secret, signed).verify_slice(&given).is_err() {
            return Ok(None);
        }
        let ticket = URL_SAFE_NO_PAD.decode(says).ok().and_then(|says| serde_json::from_slice::<Ticket>(&says).ok());
        Ok(ticket.filter(|ticket| self.clock.now() < ticket.until()))
    }

    /// What new tickets are made with.
    async fn signing_key(&self) -> Result<TicketKey> {
        let mut ring = self.ring(|ring| ring.read_at.elapsed() < BELIEVED).await?;
        loop {
            let age_ms = |key: &TicketKey| u128::from(self.clock.now().since_ms(key.created_at));
            let newest = ring.keys.first();
            if newest.is_some_and(|key| age_ms(key) < ROTATED_AFTER.as_millis()) {
                let settled = ring.keys.iter().find(|key| age_ms(key) >= SETTLES.as_millis());
                return Ok(settled.or(ring.keys.last()).expect("there is a newest").clone());
            }
            let mut secret = [0; 32];
            getrandom::fill(&mut secret).expect("the system has random bytes");
            // Whether this host or another was first: there is one now.
            self.store.add_ticket_key(newest.map_or(1, |key| key.number + 1), secret, self.clock.now()).await?;
            ring = self.reread().await?;
        }
    }

    async fn key(&self, number: i64) -> Result<Option<TicketKey>> {
        let fresh = |ring: &Ring| match ring.key(number) {
            Some(_) => ring.read_at.elapsed() < BELIEVED,
            None => ring.read_at.elapsed() < UNKNOWN_AGAIN,
        };
        Ok(self.ring(fresh).await?.key(number).cloned())
    }

    /// The keys, from memory where `fresh` says that they will do.
    async fn ring(&self, fresh: impl Fn(&Ring) -> bool) -> Result<Arc<Ring>> {
        let known = || self.ring.lock().clone().filter(|ring| fresh(ring));
        if let Some(ring) = known() {
            return Ok(ring);
        }
        let _reading = self.reading.lock().await;
        match known() {
            Some(ring) => Ok(ring),
            None => self.reread().await,
        }
    }

    async fn reread(&self) -> Result<Arc<Ring>> {
        let ring = Arc::new(Ring { keys: self.store.ticket_keys().await?, read_at: Instant::now() });
        *self.ring.lock() = Some(ring.clone());
        Ok(ring)
    }
}

fn mac(secret: &[u8; 32], signed: &str) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("any length is a key");
    mac.update(b"turnhouse stream ticket\0");
    mac.update(signed.as_bytes());
    mac
}

/// `tt_<number>.<what it says>.<MAC>`: what is signed, what it says, the key's number, the MAC.
fn parts(text: &str) -> Option<(&str, &str, i64, Vec<u8>)> {
    let (signed, given) = text.rsplit_once('.').filter(|_| text.len() <= BYTES_MAX)?;
    let (number, says) = signed.strip_prefix(PREFIX)?.split_once('.')?;
    let given = URL_SAFE_NO_PAD.decode(given).ok()?;
    Some((signed, says, number.parse().ok().filter(|number| *number > 0)?, given))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::{SqliteOptions, SqliteStore};

    struct Hosts {
        store: Arc<dyn Store>,
        clock: Clock,
        _dir: tempfile::TempDir,
    }

    impl Hosts {
        async fn new() -> Hosts {
            let dir = tempfile::tempdir().unwrap();
            let store = SqliteStore::open(SqliteOptions::new(dir.path())).await.unwrap();
            Hosts { store: Arc::new(store), clock: Clock::fixed(Timestamp(1_000_000)), _dir: dir }
        }

        fn host(&self) -> Tickets {
            Tickets::new(self.store.clone(), self.clock.clone())
        }

        fn ticket(&self) -> Ticket {
            let (org, user) = ("acme".parse().unwrap(), "ann@acme.example".parse().unwrap());
            let by = Credential::Key { id: "0123456789abcdef".into() };
            Ticket::new(org, user, TurnId::new(), false, by, self.clock.now().plus_ms(1_000))
        }
    }

    #[tokio::test]
    async fn a_ticket_is_known_to_every_host_until_its_bound() {
        let hosts = Hosts::new().await;
        let ticket = hosts.ticket();
        let text = hosts.host().write(&ticket).await.unwrap();
        let other = hosts.host();
        assert_eq!(other.read(&text).await.unwrap(), Some(ticket));
        hosts.clock.advance_ms(1_000);
        assert_eq!(other.read(&text).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_ticket_with_any_character_changed_is_none() {
        let hosts = Hosts::new().await;
        let host = hosts.host();
        let text = host.write(&hosts.ticket()).await.unwrap();
        for at in 0..text.len() {
            for other in ['A', 'B', '1', '2', '.', '='] {
                let mut changed = text.clone();
                changed.replace_range(at..=at, other.encode_utf8(&mut [0; 4]));
                assert_eq!(host.read(&changed).await.unwrap().is_some(), changed == text, "{changed}");
            }
        }
        let (unsigned, _) = text.rsplit_once('.').unwrap();
        for bad in [
            "",
            "tt_",
            "tt_1",
            "tt_1.",
            "tt_1..",
            unsigned,
            &format!("{unsigned}."),
            &format!("{text}A"),
            &"x".repeat(99_999),
        ] {
            assert_eq!(host.read(bad).await.unwrap(), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn o6_a_ticket_of_other_hosts_is_none() {
        let (ours, theirs) = (Hosts::new().await, Hosts::new().await);
        let text = theirs.host().write(&theirs.ticket()).await.unwrap();
        assert_eq!(ours.host().read(&text).await.unwrap(), None);
        ours.host().prepare().await.unwrap();
        assert_eq!(ours.host().read(&text).await.unwrap(), None);
    }

    #[tokio::test]
    async fn keys_are_replaced_and_what_was_made_before_stays_good() {
        let hosts = Hosts::new().await;
        let (one, other) = (hosts.host(), hosts.host());
        let day = 86_400_000;
        let ticket = |at: &Hosts| Ticket { until: at.clock.now().plus_ms(day).0, ..at.ticket() };
        one.prepare().await.unwrap();
        other.prepare().await.unwrap();
        hosts.clock.advance_ms(30 * day as i64 - 1_000);
        let before = ticket(&hosts);
        let made_before = one.write(&before).await.unwrap();
        hosts.clock.advance_ms(2_000);
        // The first use after a month makes the next key, which is not used at once.
        let at_first = one.write(&ticket(&hosts)).await.unwrap();
        assert!(at_first.starts_with("tt_1."), "{at_first}");
        assert_eq!(hosts.store.ticket_keys().await.unwrap().len(), 2);
        hosts.clock.advance_ms(60_000);
        let later = ticket(&hosts);
        let made_later = one.write(&later).await.unwrap();
        assert!(made_later.starts_with("tt_2."), "{made_later}");
        // Whoever has not met the new key looks for it.
        other.ring.lock().as_mut().map(|ring| Arc::get_mut(ring).unwrap().read_at -= UNKNOWN_AGAIN).unwrap();
        assert_eq!(other.read(&made_later).await.unwrap(), Some(later));
        assert_eq!(other.read(&made_before).await.unwrap(), Some(before));
        // Two hosts at once make one.
        hosts.clock.advance_ms(31 * day as i64);
        let (a, b) = tokio::join!(one.prepare(), other.prepare());
        a.unwrap();
        b.unwrap();
        let numbers: Vec<i64> = hosts.store.ticket_keys().await.unwrap().iter().map(|key| key.number).collect();
        assert_eq!(numbers, [3, 2], "the first is forgotten");
    }
}
