//! Fills a data directory, whose host is stopped, with orgs and their agents, as if each had been provisioned and had deployed what the first org there has deployed. Prints
//! a key of each of some orgs, a line each.
//!
//! `cargo run --release --example many_orgs -- DATA_DIR ORGS AGENTS_EACH KEYS`

use anyhow::Context as _;
use rusqlite::{Connection, params};
use turnhouse::caller::Scopes;
use turnhouse::clock::Clock;
use turnhouse::ids::{OrgId, UserId};
use turnhouse::keys;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [data_dir, orgs, agents, keys] = &arguments[..] else {
        anyhow::bail!("usage: many_orgs DATA_DIR ORGS AGENTS_EACH KEYS")
    };
    let (orgs, agents, keys): (usize, usize, usize) = (orgs.parse()?, agents.parse()?, keys.parse()?);
    let mut db = Connection::open(std::path::Path::new(data_dir).join("turnhouse.db"))?;
    let now = Clock::system().now();
    let first: String = db
        .query_row("SELECT org_id FROM agents WHERE agent_id = 'echo'", [], |row| row.get(0))
        .context("no org there has an agent echo")?;
    let user = UserId::parse("owner")?;
    let tx = db.transaction()?;
    {
        let mut org_new = tx.prepare("INSERT INTO orgs (org_id, owner_user, created_at) VALUES (?1, ?2, ?3)")?;
        let mut member_new = tx.prepare(
            "INSERT INTO org_members (org_id, user_id, role, added_at, added_by) VALUES (?1, ?2, 'owner', ?3, 'bench')",
        )?;
        let mut agent_new = tx.prepare(
            "INSERT INTO agents (org_id, agent_id, worker, version, is_default, settings, revision, created_at, updated_at)
             SELECT ?1, ?2, worker, version, 0, settings, revision, created_at, updated_at FROM agents WHERE org_id = ?3 AND agent_id = 'echo'",
        )?;
        for n in 0..orgs {
            let org = format!("org-{n:05}");
            org_new.execute(params![org, user.as_str(), now.0])?;
            member_new.execute(params![org, user.as_str(), now.0])?;
            agent_new.execute(params![org, "echo", first])?;
            for agent in 1..agents {
                agent_new.execute(params![org, format!("agent-{agent:03}"), first])?;
            }
        }
        for n in 0..keys.min(orgs) {
            // Spread over all of them.
            let org = format!("org-{:05}", n * orgs / keys);
            for copied in [
                "INSERT INTO modules (org_id, digest, wasm) SELECT ?1, digest, wasm FROM modules WHERE org_id = ?2",
                "INSERT INTO worker_versions (org_id, worker, version, digest, size, imports, compile_ms, created_at)
                 SELECT ?1, worker, version, digest, size, imports, compile_ms, created_at FROM worker_versions WHERE org_id = ?2",
            ] {
                tx.execute(copied, params![org, first])?;
            }
            let key = keys::mint(OrgId::parse(&org)?, user.clone(), Scopes::TURNS, "bench", None, now);
            tx.execute(
                "INSERT INTO api_keys (org_id, key_id, key_hash, user_id, scopes, name, created_at) VALUES (?1, ?2, ?3, ?4, 'turns', 'bench', ?5)",
                params![org, key.record.id, &key.hash[..], user.as_str(), now.0],
            )?;
            println!("{}", key.secret);
        }
    }
    tx.commit()?;
    Ok(())
}
