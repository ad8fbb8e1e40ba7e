//! What SQLite's tables must look like whatever was written.

use super::*;

fn count(conn: &rusqlite::Connection, sql: &str) -> i64 {
    conn.query_row(&format!("SELECT count(*) FROM ({sql})"), [], |row| row.get(0)).unwrap()
}

/// What no history of writes may leave behind.
pub(super) async fn check(world: &World) {
    let home = home(world);
    let conn = home.look();
    for (rule, violations) in [
        (
            "T1: a turn has its end or its marker, never both, never neither",
            "SELECT 1 FROM turns t LEFT JOIN turn_markers m USING (org_id, turn_id) WHERE (t.outcome IS NULL) = (m.turn_id IS NULL)",
        ),
        ("a marker has its turn", "SELECT 1 FROM turn_markers LEFT JOIN turns t USING (org_id, turn_id) WHERE t.turn_id IS NULL"),
        (
            "a lane that waits has somebody to wait for",
            "SELECT 1 FROM turn_markers w WHERE state = 'waiting' AND NOT EXISTS (SELECT 1 FROM turn_markers a WHERE a.org_id = w.org_id
               AND a.agent_id = w.agent_id AND a.conversation_id = w.conversation_id AND a.seq < w.seq AND a.state <> 'waiting')",
        ),
        (
            "places are unique and were given out",
            "SELECT 1 FROM turns t LEFT JOIN conversations c USING (org_id, agent_id, conversation_id)
              WHERE t.seq IS NOT NULL AND (c.next_seq IS NULL OR t.seq >= c.next_seq)",
        ),
        (
            "a place is one turn's",
            "SELECT 1 FROM turns WHERE seq IS NOT NULL GROUP BY org_id, agent_id, conversation_id, seq HAVING count(*) > 1",
        ),
        (
            "E1: no event of an epoch that the turn never had, and none under the id of its start",
            "SELECT 1 FROM turn_events e LEFT JOIN turns t USING (org_id, turn_id) LEFT JOIN turn_markers m USING (org_id, turn_id)
              WHERE t.turn_id IS NULL OR e.epoch > coalesce(t.end_epoch, m.epoch) OR t.first_epoch IS NULL OR e.epoch < t.first_epoch",
        ),
        (
            "S2, S4: a snapshot is a completed turn's, under its own run",
            "SELECT 1 FROM snapshots s LEFT JOIN turns t USING (org_id, turn_id)
              WHERE t.outcome IS NOT 'completed' OR t.run_id IS NOT s.run_id OR t.private OR t.conversation_id IS NOT s.conversation_id",
        ),
        (
            "an idempotency key leads to its turn",
            "SELECT 1 FROM idempotency_keys k LEFT JOIN turns t USING (org_id, turn_id) WHERE t.turn_id IS NULL",
        ),
        (
            "an attachment is referred to by turns and has all its bytes",
            "SELECT 1 FROM attachment_refs r LEFT JOIN turns t USING (org_id, turn_id) LEFT JOIN attachments a USING (org_id, digest)
              WHERE t.turn_id IS NULL OR t.user_id <> r.user_id OR a.digest IS NULL
             UNION ALL
             SELECT 1 FROM attachments a WHERE a.bytes <> (
               SELECT coalesce(sum(length(p.body)), 0) FROM attachment_pieces p WHERE p.org_id = a.org_id AND p.digest = a.digest)
             UNION ALL
             SELECT 1 FROM attachment_pieces p LEFT JOIN attachments a USING (org_id, digest) WHERE a.digest IS NULL",
        ),
        (
            "an attachment that nothing refers to is the sweep's",
            "SELECT 1 FROM attachments a
              WHERE NOT EXISTS (SELECT 1 FROM attachment_refs r WHERE r.org_id = a.org_id AND r.digest = a.digest)
                AND NOT EXISTS (SELECT 1 FROM attachment_uploads u WHERE u.org_id = a.org_id AND u.digest = a.digest)
                AND NOT EXISTS (SELECT 1 FROM attachments_released l WHERE l.org_id = a.org_id AND l.digest = a.digest)
             UNION ALL
             SELECT 1 FROM attachment_uploads u LEFT JOIN attachments a USING (org_id, digest) WHERE a.digest IS NULL",
        ),
        ("O3: limits and meters are an org's", "SELECT 1 FROM org_limits l LEFT JOIN orgs o USING (org_id) WHERE o.org_id IS NULL"),
        (
            "O3: a bucket and an hour hold no more than what came",
            "SELECT 1 FROM org_limits WHERE tokens > max(1, coalesce(submit_burst, 1e9)) - 1
                OR cpu_ms > (SELECT coalesce(sum(t.cpu_ms), 0) FROM turns t WHERE t.org_id = org_limits.org_id) + 0.001
               AND NOT EXISTS (SELECT 1 FROM conversations c WHERE c.org_id = org_limits.org_id AND c.deleted_at IS NOT NULL)",
        ),
        (
            "O3: an agent's load is its markers",
            "SELECT 1 FROM agent_load l LEFT JOIN (SELECT org_id, agent_id, count(*) AS live,
                                                  count(*) FILTER (WHERE state <> 'waiting' AND not_before < 9007199254740991) AS active
                                             FROM turn_markers GROUP BY org_id, agent_id) m USING (org_id, agent_id)
              WHERE  (coalesce(m.live, 0), coalesce(m.active, 0)) <> (l.live, l.active)
             UNION ALL
             SELECT 1 FROM org_limits o WHERE limited_agents <> (SELECT count(*) FROM agent_load a WHERE a.org_id = o.org_id)",
        ),
        (
            "O3: what is held has no room",
            "SELECT 1 FROM turn_markers m LEFT JOIN agent_load l USING (org_id, agent_id)
              WHERE m.state = 'ready' AND m.not_before = 9007199254740991 AND (l.running_max IS NULL OR l.active < l.running_max)",
        ),
        (
            "an org has an owner among its members",
            "SELECT 1 FROM orgs o WHERE NOT EXISTS (SELECT 1 FROM org_members m WHERE m.org_id = o.org_id AND m.role = 'owner') AND o.deleting_at IS NULL",
        ),
        (
            "a member is of an org that is there",
            "SELECT 1 FROM org_members m LEFT JOIN orgs o USING (org_id) WHERE o.org_id IS NULL",
        ),
        ("nothing refused runs", "SELECT 1 FROM turn_markers WHERE state = 'running' AND refusal IS NOT NULL"),
    ] {
        assert_eq!(count(&conn, violations), 0, "{rule}");
    }
    check_chains(&conn);
    let counted = |stage: &str| count(&conn, &format!("SELECT 1 FROM turn_markers WHERE state = '{stage}'"));
    let live = world.store.live_counts().await.unwrap();
    assert_eq!(
        [live.waiting, live.ready, live.running].map(|count| i64::try_from(count).unwrap()),
        ["waiting", "ready", "running"].map(counted),
        "the counts in memory are the rows'"
    );
    let intact: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(intact, "ok");
}

/// S3: from the head of every conversation, parent by parent, to its generation; nothing beside the chain; the newest keep their bytes.
fn check_chains(conn: &rusqlite::Connection) {
    type Key = (String, String, String);
    type Link = (Vec<u8>, bool);
    let mut links: HashMap<Key, HashMap<Vec<u8>, Link>> = HashMap::new();
    let mut statement = conn
        .prepare("SELECT org_id, agent_id, conversation_id, run_id, parent_run, body IS NOT NULL FROM snapshots")
        .unwrap();
    let mut rows = statement.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let key = (row.get(0).unwrap(), row.get(1).unwrap(), row.get(2).unwrap());
        links.entry(key).or_default().insert(row.get(3).unwrap(), (row.get(4).unwrap(), row.get(5).unwrap()));
    }
    let mut statement =
        conn.prepare("SELECT org_id, agent_id, conversation_id, head_run, generation FROM conversations").unwrap();
    let mut rows = statement.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let key: Key = (row.get(0).unwrap(), row.get(1).unwrap(), row.get(2).unwrap());
        let (mut run, root): (Vec<u8>, Vec<u8>) = (row.get(3).unwrap(), row.get(4).unwrap());
        let links = links.remove(&key).unwrap_or_default();
        let mut seen = HashSet::new();
        while run != root {
            let (parent, has_body) =
                links.get(&run).unwrap_or_else(|| panic!("{key:?}: a link of the chain is missing"));
            assert_eq!(
                *has_body,
                seen.len() < SNAPSHOTS_KEPT as usize,
                "{key:?}: the newest keep their bytes, the others do not"
            );
            assert!(seen.insert(run), "{key:?}: the chain is a ring");
            run = parent.clone();
        }
        assert_eq!(seen.len(), links.len(), "{key:?}: a snapshot stands beside the chain");
    }
    assert!(links.is_empty(), "snapshots without a conversation");
}
