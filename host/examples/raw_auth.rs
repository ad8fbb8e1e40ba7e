//! Who is calling, for which org, and whether what was found is theirs: what every request asks before its handler does anything, on a warm path and on one thread.
//!
//! `cargo run --release --example raw_auth -- [SECONDS]`

use std::collections::BTreeMap;
use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use turnhouse::audit::Actor;
use turnhouse::caller::{Owned, Scopes};
use turnhouse::clock::Clock;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::keys::{self, Authenticator};
use turnhouse::limits::Limits;
use turnhouse::members::Asked;
use turnhouse::oidc::Issuers;
use turnhouse::store::Store;
use turnhouse::store::sqlite::{SqliteOptions, SqliteStore};

/// Keys that take turns.
const KEYS: usize = 64;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let seconds = std::env::args().nth(1).map_or(Ok(3), |text| text.parse())?;
    let dir = tempfile::tempdir()?;
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(SqliteOptions::new(dir.path().to_owned())).await?);
    let (clock, by) = (Clock::system(), Actor::command_line());
    let mut secrets = Vec::new();
    for n in 0..KEYS {
        let (org, user) = (OrgId::parse(&format!("org-{n}"))?, UserId::parse("ann")?);
        store.create_org(&org, &user, clock.now(), &by).await?;
        let key = keys::mint(org, user, Scopes::TURNS, "bench", None, clock.now());
        store.create_key(key.hash, &key.record, &by).await?;
        secrets.push(key.secret);
    }
    let issuers = Arc::new(Issuers::new(&BTreeMap::new())?);
    let authenticator = Authenticator::new(store, clock, &Limits::default(), issuers);
    let (from, asked) = (Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), Asked { org: None, turn: None });
    let (begun, mut checks) = (Instant::now(), 0_u64);
    while begun.elapsed() < Duration::from_secs(seconds) {
        for secret in &secrets {
            let bearer = authenticator.authenticate(Some(black_box(secret)), from).await?;
            let caller = authenticator.caller(&bearer, &asked).await?;
            let owned = Owned::new(caller.org.clone(), caller.user.clone(), checks);
            black_box(owned.open(&caller)).context("it is theirs")?;
            checks += 1;
        }
    }
    let elapsed = begun.elapsed().as_secs_f64();
    println!("{checks} checks in {elapsed:.2} s: {:.0}/s on one thread", checks as f64 / elapsed);
    Ok(())
}
