//! What PostgreSQL's tables must look like whatever was written.

use super::*;

pub(super) async fn count(connection: &mut PgConnection, sql: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM ({sql}) AS violations");
    let row = sqlx::query(AssertSqlSafe(sql.clone())).fetch_one(connection).await;
    row.and_then(|row| row.try_get(0)).unwrap_or_else(|error| panic!("{sql}: {error}"))
}

/// What no history of writes may leave behind.
pub(super) async fn check(world: &World) {
    check_database(&home(world).database).await;
}

pub(in crate::store::postgres) async fn check_database(database: &Database) {
    let mut connection = database.look().await;
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
            "SELECT 1 FROM snapshots s LEFT JOIN turns t USING (org_id, turn_id) WHERE t.outcome IS DISTINCT FROM 'completed'
                OR t.run_id IS DISTINCT FROM s.run_id OR t.private OR t.conversation_id IS DISTINCT FROM s.conversation_id",
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
        (
            "O3: a bucket and an hour hold no more than what came",
            "SELECT 1 FROM org_load l WHERE tokens > greatest(1, coalesce(submit_burst, 1e9)) - 1
                OR cpu_ms > (SELECT coalesce(sum(t.cpu_ms), 0) FROM turns t WHERE t.org_id = l.org_id) + 0.001
               AND NOT EXISTS (SELECT 1 FROM conversations c WHERE c.org_id = l.org_id AND c.deleted_at IS NOT NULL)",
        ),
        (
            "O3: an agent's load is its markers",
            "SELECT 1 FROM agent_load l LEFT JOIN (SELECT org_id, agent_id, count(*) AS live,
                                                  count(*) FILTER (WHERE state <> 'waiting' AND not_before < 9007199254740991) AS active
                                             FROM turn_markers GROUP BY org_id, agent_id) m USING (org_id, agent_id)
              WHERE  (coalesce(m.live, 0), coalesce(m.active, 0)) IS DISTINCT FROM (l.live, l.active)
             UNION ALL
             SELECT 1 FROM org_load o WHERE limited_agents <> (SELECT count(*) FROM agent_load a WHERE a.org_id = o.org_id)",
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
        (
            "an org's load is its markers",
            "SELECT 1 FROM (SELECT org_id, count(*) FILTER (WHERE state = 'waiting') AS waiting, count(*) FILTER (WHERE state = 'ready') AS ready,
                                   count(*) FILTER (WHERE state = 'running') AS running FROM turn_markers GROUP BY org_id) m
               FULL JOIN org_load l USING (org_id)
              WHERE (coalesce(m.waiting, 0), coalesce(m.ready, 0), coalesce(m.running, 0)) IS DISTINCT FROM (l.waiting, l.ready, l.running)",
        ),
        ("an org has its load", "SELECT 1 FROM orgs o LEFT JOIN org_load l USING (org_id) WHERE l.org_id IS NULL"),
        (
            "R9: whoever runs a turn is known",
            "SELECT 1 FROM turn_markers m WHERE state = 'running' AND NOT EXISTS (SELECT 1 FROM replicas r WHERE r.replica_id = m.holder)",
        ),
    ] {
        assert_eq!(count(&mut connection, violations).await, 0, "{rule}");
    }
    check_chains(&mut connection).await;
}

/// S3: from the head of every conversation, parent by parent, to its generation; nothing beside the chain; the newest keep their bytes.
async fn check_chains(connection: &mut PgConnection) {
    type Key = (String, String, String);
    let key = |row: &PgRow| -> Key { (row.get(0), row.get(1), row.get(2)) };
    let mut links: HashMap<Key, HashMap<Uuid, (Uuid, bool)>> = HashMap::new();
    let snapshots =
        sqlx::query("SELECT org_id, agent_id, conversation_id, run_id, parent_run, body IS NOT NULL FROM snapshots");
    for row in snapshots.fetch_all(&mut *connection).await.unwrap() {
        links.entry(key(&row)).or_default().insert(row.get(3), (row.get(4), row.get(5)));
    }
    let chains =
        sqlx::query("SELECT org_id, agent_id, conversation_id, head_run, generation, kept_runs FROM conversations");
    for row in chains.fetch_all(&mut *connection).await.unwrap() {
        let key = key(&row);
        let (mut run, root): (Uuid, Uuid) = (row.get(3), row.get(4));
        let links = links.remove(&key).unwrap_or_default();
        let mut seen = Vec::new();
        while run != root {
            let (parent, has_body) =
                links.get(&run).unwrap_or_else(|| panic!("{key:?}: a link of the chain is missing"));
            assert_eq!(
                *has_body,
                seen.len() < SNAPSHOTS_KEPT as usize,
                "{key:?}: the newest keep their bytes, the others do not"
            );
            assert!(!seen.contains(&run), "{key:?}: the chain is a ring");
            seen.push(run);
            run = *parent;
        }
        assert_eq!(seen.len(), links.len(), "{key:?}: a snapshot stands beside the chain");
        let kept: HashSet<Uuid> = row.get::<Vec<Uuid>, _>(5).into_iter().collect();
        assert_eq!(kept, seen.into_iter().take(SNAPSHOTS_KEPT as usize).collect(), "{key:?}: the runs that are kept");
    }
    assert!(links.is_empty(), "snapshots without a conversation");
}
