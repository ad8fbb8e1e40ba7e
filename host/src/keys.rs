//! API keys: how one is made, what is kept of it, and who a presented key stands for.
//!
//! A key is `th_` and 256 random bits in hex. It is shown once; only its SHA-256 is kept, which needs no salt because nobody can guess 256 bits.
//! [`Authenticator`] answers from memory for [`TRUSTED_FOR`], so that a warm path makes no round trip to the store and a revoked key stops
//! within two seconds. It knows nothing of HTTP; `http/` asks it; `http::serve` and the
//! host's drain drive [`Authenticator::record_last_use`].

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use crate::caller::{Caller, Credential, Scopes};
use crate::clock::{Clock, Timestamp};
use crate::ids::{OrgId, TurnId, UserId};
use crate::limits::Limits;
use crate::members::{Asked, Memberships, OrgError};
use crate::oidc::{self, Issuers, Of, TokenError, Verified, is_among};
use crate::store::{KeyRecord, KeyState, Store, StoreError};
use crate::tickets::{Ticket, Tickets};

/// What every key begins with: secret scanners and people recognise it.
pub const PREFIX: &str = "th_";

/// How long a key's record is believed before the store is asked again.
pub const TRUSTED_FOR: Duration = Duration::from_secs(1);

/// How long a token's signature is believed without being checked again. Its own end is looked at each time.
const VERIFIED_FOR: Duration = Duration::from_secs(60);

/// How long an address is counted from its first failure.
const FAILURES_WINDOW: Duration = Duration::from_secs(60);

/// How long a key that was good is looked up even for an address that failed too often: whoever shares a proxy with an attacker goes on.
const VOUCHED_FOR: Duration = Duration::from_secs(3600);

/// How often the log says that a key which is in use ends soon.
const WARNED_EVERY: Duration = Duration::from_secs(86_400);

/// Keys and addresses that are remembered at once.
pub(crate) const REMEMBERED_MAX: u64 = 20_000;

/// A key that has just been made. Its secret is nowhere else: show it now.
pub struct NewKey {
    /// What the client sends.
    pub secret: String,
    /// What [`Store::create_key`] is given.
    pub hash: [u8; 32],
    /// What is kept beside it.
    pub record: KeyRecord,
}

impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKey").field("record", &self.record).finish_non_exhaustive()
    }
}

/// Makes a key. Nothing is stored.
pub fn mint(
    org: OrgId,
    user: UserId,
    scopes: Scopes,
    name: impl Into<String>,
    expires_at: Option<Timestamp>,
    now: Timestamp,
) -> NewKey {
    let mut random = [0; 32];
    getrandom::fill(&mut random).expect("the system has random bytes");
    let secret = format!("{PREFIX}{}", hex::encode(random));
    let hash = hash(&secret).expect("it has the form of a key");
    let record = KeyRecord {
        id: hex::encode(&hash[..8]),
        org,
        user,
        scopes,
        name: name.into(),
        created_at: now,
        expires_at,
        revoked_at: None,
        last_used_at: None,
        successor: None,
    };
    NewKey { secret, hash, record }
}

/// The SHA-256 under which a key is kept. `None`: it has not the form of a key, and no store need be asked.
pub fn hash(secret: &str) -> Option<[u8; 32]> {
    let digits = secret.strip_prefix(PREFIX)?;
    let formed = digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    formed.then(|| Sha256::digest(secret.as_bytes()).into())
}

/// Why a request is nobody's. Which of wrong, expired and revoked it was is not told.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuthError {
    /// No key, or none that works.
    #[error("unauthenticated")]
    Unauthenticated,
    /// This address failed too often.
    #[error("too many failed authentications")]
    TooManyFailures {
        /// When its count begins anew.
        retry_after_s: u64,
    },
    /// Nobody can tell whether the token is good.
    #[error("the keys of the token's issuer cannot be had")]
    IssuerUnavailable,
    /// The store does not answer.
    #[error("{0}")]
    Store(Arc<StoreError>),
}

/// Which of them it was: for the operator alone.
#[derive(Debug, Clone, Copy)]
enum Refused {
    /// Nothing was shown, or nothing that has a known form.
    None,
    /// A key: unknown, over or revoked.
    Key,
    /// A ticket: wrong, over, of another turn, or its maker is over.
    Ticket,
    /// A token.
    Token(oidc::Reason),
    /// A token of an org that is not here.
    Org,
    /// A token of somebody who is no member of its org, where they must be one.
    Member,
}

impl Refused {
    fn as_str(self) -> &'static str {
        match self {
            Refused::None => "none",
            Refused::Key => "key",
            Refused::Ticket => "ticket",
            Refused::Token(reason) => reason.as_str(),
            Refused::Org => "token_org",
            Refused::Member => "token_member",
        }
    }
}

/// Who somebody has been found to be. For which org they speak is [`Authenticator::caller`]'s to say.
#[derive(Debug, Clone)]
pub struct Bearer {
    /// Who.
    pub user: UserId,
    /// For which org.
    pub of: Of,
    /// What they may do at most.
    pub scopes: Scopes,
    /// For the audit: `key:<id>`. No secret.
    pub credential: Arc<str>,
    /// By what.
    pub by: Credential,
    /// When that ends.
    pub expires_at: Option<Timestamp>,
}

impl Bearer {
    /// Of a key that works, but for its end.
    fn of_key(key: KeyRecord) -> Bearer {
        let (credential, by) = (format!("key:{}", key.id).into(), Credential::Key { id: key.id.into() });
        let (of, expires_at) = (Of::Org(key.org), key.expires_at);
        Bearer { user: key.user, of, scopes: key.scopes, credential, by, expires_at }
    }

    /// Of a token that is good.
    fn of_token(token: Verified) -> Bearer {
        let (credential, by) = (format!("token:{}", token.issuer).into(), Credential::Token { issuer: token.issuer });
        let expires_at = Some(token.until);
        Bearer { user: token.user, of: token.of, scopes: token.scopes, credential, by, expires_at }
    }

    fn is_over(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

struct Failures {
    since: Instant,
    count: AtomicU32,
}

/// Turns what is presented into a [`Bearer`], and a request of theirs into a [`Caller`]'s.
pub struct Authenticator {
    store: Arc<dyn Store>,
    clock: Clock,
    failures_per_minute: u32,
    /// Also remembers, as `None`, what is no key: guessing does not reach the store twice.
    trusted: moka::future::Cache<[u8; 32], Option<Arc<Bearer>>>,
    /// The same by org and id, for tickets: each names the key that asked for it.
    named: moka::future::Cache<(OrgId, Arc<str>), Option<Arc<Bearer>>>,
    /// Makes stream tickets and knows them again.
    pub tickets: Tickets,
    issuers: Arc<Issuers>,
    /// Tokens that were good, by their SHA-256.
    verified: moka::sync::Cache<[u8; 32], Arc<Bearer>>,
    /// Whether there is such an org. A key is an org's by its row; a token only says so.
    orgs: moka::future::Cache<OrgId, bool>,
    /// Who belongs to which org.
    pub members: Memberships,
    vouched: moka::sync::Cache<[u8; 32], ()>,
    failures: moka::sync::Cache<IpAddr, Arc<Failures>>,
    used: Mutex<HashSet<(OrgId, String)>>,
    /// How long before its end a key is warned of, and of which it was.
    warning_ms: u64,
    warned: moka::sync::Cache<String, ()>,
}

impl Authenticator {
    /// One for `store`. An address that fails more than `auth_failures_per_minute` times a minute is told to wait.
    pub fn new(store: Arc<dyn Store>, clock: Clock, limits: &Limits, issuers: Arc<Issuers>) -> Authenticator {
        Authenticator {
            tickets: Tickets::new(store.clone(), clock.clone()),
            members: Memberships::new(store.clone()),
            store,
            clock,
            failures_per_minute: limits.auth_failures_per_minute,
            warning_ms: limits.key_warning_ms(),
            warned: moka::sync::Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(WARNED_EVERY).build(),
            trusted: moka::future::Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(TRUSTED_FOR).build(),
            named: moka::future::Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(TRUSTED_FOR).build(),
            vouched: moka::sync::Cache::builder().max_capacity(REMEMBERED_MAX).time_to_idle(VOUCHED_FOR).build(),
            failures: moka::sync::Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(FAILURES_WINDOW).build(),
            used: Mutex::default(),
            issuers,
            verified: moka::sync::Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(VERIFIED_FOR).build(),
            orgs: moka::future::Cache::builder().max_capacity(REMEMBERED_MAX).time_to_live(TRUSTED_FOR).build(),
        }
    }

    /// Whose key or token this is. `from` is the address that presents it, where there is one.
    pub async fn authenticate(&self, secret: Option<&str>, from: Option<IpAddr>) -> Result<Bearer, AuthError> {
        match secret {
            Some(key) if key.starts_with(PREFIX) => self.by_key(key, from).await,
            Some(token) if !self.issuers.is_empty() => self.by_token(token, from).await,
            _ => Err(self.failed(from, Refused::None)),
        }
    }

    async fn by_key(&self, key: &str, from: Option<IpAddr>) -> Result<Bearer, AuthError> {
        let Some(hash) = hash(key) else { return Err(self.failed(from, Refused::None)) };
        let known = match self.trusted.get(&hash).await {
            Some(known) => known,
            None => self.look_up(hash, from).await?,
        };
        match known {
            Some(known) if !known.is_over(self.clock.now()) => Ok(Bearer::clone(&known)),
            _ => Err(self.failed(from, Refused::Key)),
        }
    }

    /// A signature cannot be guessed, and costs no look at the store: so that a good token goes on where somebody else has failed too often.
    async fn by_token(&self, token: &str, from: Option<IpAddr>) -> Result<Bearer, AuthError> {
        let (hash, now): ([u8; 32], _) = (Sha256::digest(token.as_bytes()).into(), self.clock.now());
        let known = match self.verified.get(&hash) {
            Some(known) => known,
            None => match self.issuers.verify(token, now).await {
                Ok(verified) => {
                    let known = Arc::new(Bearer::of_token(verified));
                    self.verified.insert(hash, known.clone());
                    known
                }
                Err(TokenError::Refused(reason)) => return Err(self.failed(from, Refused::Token(reason))),
                Err(TokenError::Unavailable) => return Err(AuthError::IssuerUnavailable),
            },
        };
        if known.is_over(now) {
            return Err(self.failed(from, Refused::Token(oidc::Reason::Expired)));
        }
        let mut known = Bearer::clone(&known);
        match &known.of {
            Of::Org(org) if !self.is_org(org).await? => return Err(self.failed(from, Refused::Org)),
            Of::MembersOf(org) => match self.members.role(org, &known.user).await.map_err(AuthError::Store)? {
                Some(role) => known.scopes = known.scopes.shared_with(role.scopes()),
                None => return Err(self.failed(from, Refused::Member)),
            },
            Of::Org(_) | Of::Membership(_) => {}
        }
        Ok(known)
    }

    /// For which org somebody speaks in a request, and what they may do there.
    pub async fn caller(&self, who: &Bearer, asked: &Asked) -> Result<Caller, OrgError> {
        let (org, scopes) = match &who.of {
            // Whether the other one is there makes no difference.
            Of::Org(org) | Of::MembersOf(org) if asked.org.as_ref().is_some_and(|named| named != org) => {
                return Err(OrgError::NotThere);
            }
            Of::Org(org) | Of::MembersOf(org) => (org.clone(), who.scopes),
            Of::Membership(among) => {
                let found = self.members.find(&who.user, among, asked).await?;
                (found.org, who.scopes.shared_with(found.role.scopes()))
            }
        };
        Ok(Caller { org, user: who.user.clone(), scopes, credential: who.credential.clone() })
    }

    async fn is_org(&self, org: &OrgId) -> Result<bool, AuthError> {
        if let Some(known) = self.orgs.get(org).await {
            return Ok(known);
        }
        let read = async { Ok(self.store.org(org).await?.is_some_and(|org| org.deleting_at.is_none())) };
        self.orgs.try_get_with(org.clone(), read).await.map_err(AuthError::Store)
    }

    /// Who may follow `turn` with this ticket. Whether the turn is there and live is for the caller to see, with what this answers.
    pub async fn follower(&self, ticket: &str, turn: TurnId, from: Option<IpAddr>) -> Result<Caller, AuthError> {
        let read = self.tickets.read(ticket).await.map_err(|error| AuthError::Store(Arc::new(error)))?;
        match read.filter(|ticket| ticket.turn == turn) {
            Some(ticket) if self.still_good(&ticket).await? => {
                let scopes = reads_with(&ticket);
                Ok(Caller { org: ticket.org, user: ticket.user, scopes, credential: "ticket".into() })
            }
            _ => Err(self.failed(from, Refused::Ticket)),
        }
    }

    /// Whether what asked for the ticket still works.
    async fn still_good(&self, ticket: &Ticket) -> Result<bool, AuthError> {
        let id = match &ticket.by {
            Credential::Key { id } => id,
            // Its end is the ticket's; before that nobody can revoke a token, but its user may be a member no more.
            Credential::Token { issuer } => match self.issuers.settings(issuer) {
                None => return Ok(false),
                Some(settings) if settings.by_membership() => {
                    let role = self.members.role(&ticket.org, &ticket.user).await.map_err(AuthError::Store)?;
                    let reads = role.is_some_and(|role| role.scopes().include(reads_with(ticket)));
                    return Ok(reads && is_among(&settings.orgs, &ticket.org));
                }
                Some(_) => return self.is_org(&ticket.org).await,
            },
        };
        let read = async { Ok(self.store.key_by_id(&ticket.org, id).await?.and_then(|key| self.found(key))) };
        let known = self.named.try_get_with((ticket.org.clone(), id.clone()), read).await.map_err(AuthError::Store)?;
        Ok(known.is_some_and(|known| !known.is_over(self.clock.now())))
    }

    /// Asks the store, once for all requests that want to know at the same moment.
    async fn look_up(&self, hash: [u8; 32], from: Option<IpAddr>) -> Result<Option<Arc<Bearer>>, AuthError> {
        if self.blocked(from).is_some() && !self.vouched.contains_key(&hash) {
            return Err(self.failed(from, Refused::Key));
        }
        let read = async {
            let known = self.store.key(hash).await?.and_then(|key| self.found(key));
            if known.is_some() {
                self.vouched.insert(hash, ());
            }
            Ok(known)
        };
        self.trusted.try_get_with(hash, read).await.map_err(AuthError::Store)
    }

    /// What is kept in memory of a key that the store has; `None` when it was revoked.
    fn found(&self, key: KeyRecord) -> Option<Arc<Bearer>> {
        if key.revoked_at.is_some() {
            return None;
        }
        // A record is read when its key is used, once a second at most: that is the place to note the use.
        self.used.lock().insert((key.org.clone(), key.id.clone()));
        if key.state(self.clock.now(), self.warning_ms) == KeyState::Expiring {
            let (org, id, at) = (key.org.as_str(), key.id.as_str(), key.expires_at.map(Timestamp::rfc3339));
            self.warned.get_with(format!("{org}/{id}"), || {
                tracing::info!(
                    org,
                    key = id,
                    expires_at = at,
                    "a key that is in use ends soon; `turnhouse keys rotate` makes its successor"
                );
            });
        }
        Some(Arc::new(Bearer::of_key(key)))
    }

    /// Counts a failure and says how it is answered.
    fn failed(&self, from: Option<IpAddr>, why: Refused) -> AuthError {
        metrics::counter!("turnhouse_auth_refusals_total", "reason" => why.as_str()).increment(1);
        let Some(from) = from.map(counted_as) else { return AuthError::Unauthenticated };
        let failures =
            self.failures.get_with(from, || Arc::new(Failures { since: Instant::now(), count: AtomicU32::new(0) }));
        if failures.count.fetch_add(1, Ordering::Relaxed) < self.failures_per_minute {
            return AuthError::Unauthenticated;
        }
        AuthError::TooManyFailures { retry_after_s: wait_s(&failures) }
    }

    fn blocked(&self, from: Option<IpAddr>) -> Option<u64> {
        let failures = self.failures.get(&counted_as(from?))?;
        (failures.count.load(Ordering::Relaxed) >= self.failures_per_minute).then(|| wait_s(&failures))
    }

    /// Writes down which keys were used since the last time; call it once a minute. What cannot be written is kept for the next time.
    pub async fn record_last_use(&self) -> Result<(), StoreError> {
        let used: Vec<_> = self.used.lock().drain().collect();
        if used.is_empty() {
            return Ok(());
        }
        let written = self.store.touch_keys(&used, self.clock.now()).await;
        if written.is_err() {
            self.used.lock().extend(used);
        }
        written
    }
}

/// As whom a ticket reads: its user, or an admin for what is another's.
fn reads_with(ticket: &Ticket) -> Scopes {
    if ticket.as_admin { Scopes::ADMIN } else { Scopes::TURNS }
}

fn wait_s(failures: &Failures) -> u64 {
    FAILURES_WINDOW.saturating_sub(failures.since.elapsed()).as_secs() + 1
}

/// Who has one IPv6 address has its /64.
pub(crate) fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> NewKey {
        let org = OrgId::parse("acme").unwrap();
        mint(org, UserId::parse("ann").unwrap(), Scopes::TURNS, "laptop", None, Timestamp(1))
    }

    #[test]
    fn a_key_is_256_random_bits_and_only_its_hash_is_kept() {
        let (one, two) = (key(), key());
        assert_ne!(one.secret, two.secret);
        assert_eq!(one.secret.len(), 3 + 64);
        assert_eq!(hash(&one.secret), Some(one.hash));
        assert_eq!(one.record.id, hex::encode(one.hash)[..16]);
        assert!(!format!("{one:?}").contains(&one.secret[3..]));
    }

    #[test]
    fn what_is_not_formed_like_a_key_has_no_hash() {
        let good = key().secret;
        for bad in ["", "th_", "th_abc", &good[3..], &good[..66], &good.to_uppercase(), &format!("{good} ")] {
            assert_eq!(hash(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_address_is_counted_by_its_network() {
        let same = |a: &str, b: &str| counted_as(a.parse().unwrap()) == counted_as(b.parse().unwrap());
        assert!(same("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"));
        assert!(!same("2001:db8:1:2::1", "2001:db8:1:3::1"));
        assert!(same("::ffff:192.0.2.1", "192.0.2.1"));
        assert!(!same("192.0.2.1", "192.0.2.2"));
    }
}
