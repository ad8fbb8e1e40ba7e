//! Each flaw that the functions are written against is put back, one at a time, and the torture must notice. A flaw that nobody notices would be a line that
//! nobody tests.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Row};

use super::torture;
use crate::store::postgres::tests::Database;

/// A function, what is taken out of it, and what is put in its place.
struct Flaw {
    what: &'static str,
    function: &'static str,
    from: &'static str,
    to: &'static str,
}

const FLAWS: &[Flaw] = &[
    Flaw {
        what: "the org is read and not locked",
        function: "write_batch",
        from: "ORDER BY g.org_id FOR NO KEY UPDATE",
        to: "ORDER BY g.org_id",
    },
    Flaw {
        what: "batches lock orgs in different orders",
        function: "write_batch",
        from: "FOR l IN SELECT g.* FROM org_load g WHERE g.org_id = ANY (v_lock) ORDER BY g.org_id FOR NO KEY UPDATE LOOP",
        to: "PERFORM 1 FROM org_load g WHERE g.org_id = CASE WHEN random() < 0.5 THEN 'zeta' ELSE 'acme' END FOR NO KEY UPDATE; PERFORM pg_sleep(0.002);
  FOR l IN SELECT g.* FROM org_load g ORDER BY g.org_id FOR NO KEY UPDATE LOOP",
    },
    Flaw {
        what: "an end does not ask for the epoch",
        function: "end_turns",
        from: "AND (e.epoch IS NULL OR m.epoch = e.epoch)",
        to: "",
    },
    Flaw {
        what: "events are appended without a look at the epoch",
        function: "write_batch",
        from: "AND m.epoch = u.epoch AND m.state = 'running' LOOP",
        to: "LOOP",
    },
    Flaw {
        what: "a claim does not ask the gate's column",
        function: "start_turn",
        from: "IF m.refusal IS NOT NULL THEN",
        to: "IF false THEN",
    },
    Flaw {
        what: "an end makes nobody ready",
        function: "end_turns",
        from: "IF p_look_for_next AND",
        to: "IF false AND",
    },
    Flaw {
        what: "the youngest is made ready, not the oldest",
        function: "promote",
        from: "SELECT min(w.seq)",
        to: "SELECT max(w.seq)",
    },
    Flaw {
        what: "a requeue keeps the epoch",
        function: "write_batch",
        from: "SET state = 'ready', holder = NULL, epoch = epoch + 1,",
        to: "SET state = 'ready', holder = NULL,",
    },
    Flaw {
        what: "a takeover keeps the epoch",
        function: "start_turn",
        from: "SET state = 'running', holder = p_holder, epoch = epoch + 1,",
        to: "SET state = 'running', holder = p_holder,",
    },
    Flaw {
        what: "what had an effect is taken over",
        function: "write_batch",
        from: "AND m.attempt < m.attempts_max AND NOT m.effects AND m.deadline_at > v_now AND m.epoch < 1000000\n                  AND m.org_id",
        to: "AND m.attempt < m.attempts_max AND m.deadline_at > v_now AND m.epoch < 1000000\n                  AND m.org_id",
    },
    Flaw {
        what: "what had an effect is given back",
        function: "write_batch",
        from: "AND state = 'running' AND NOT effects;",
        to: "AND state = 'running';",
    },
    Flaw {
        what: "the claim does not ask for the org's bound",
        function: "write_batch",
        from: "CONTINUE WHEN i IS NULL OR v_running[i] >= coalesce(v_running_max[i], it.running_max);",
        to: "CONTINUE WHEN i IS NULL;",
    },
    Flaw {
        what: "a message does not ask for its agent's bound",
        function: "write_batch",
        from: "v_held := NOT v_behind AND coalesce(v_held, false);",
        to: "v_held := false;",
    },
    Flaw {
        what: "an end lets nobody go who is held",
        function: "end_turns",
        from: "o.freed := release_held(p_now, r.org, r.agent_id) > 0;",
        to: "",
    },
    Flaw {
        what: "a fused start does not ask who is before it",
        function: "write_batch",
        from: "AND NOT v_behind AND NOT v_refused",
        to: "AND NOT v_refused",
    },
    Flaw {
        what: "whether a turn must wait is not asked under the lock",
        function: "write_batch",
        from: "v_behind := v_live > 0",
        to: "v_behind := random() < 0.5 AND v_live > 0",
    },
    Flaw {
        what: "a snapshot does not ask for the head",
        function: "write_batch",
        from: "UPDATE conversations g SET head_run = s.run, kept_runs = s.kept",
        to: "UPDATE conversations g SET kept_runs = s.kept",
    },
    Flaw {
        what: "a place is given out twice",
        function: "write_batch",
        from: "SET next_seq = u.seq + 1 FROM",
        to: "SET next_seq = u.seq FROM",
    },
    Flaw {
        what: "the loser of an election writes all the same",
        function: "write_batch",
        from: "o.ord := it.ord; o.at := v_now; o.kind := 'lost';",
        to: "o.ord := it.ord; o.at := v_now; o.kind := 'won'; o.was := 'running'; o.agent := 'support'; o.accepted_at := 0; o.promoted := false;",
    },
];

/// Defines a function anew, with its flaw.
async fn put_back(database: &Database, flaw: &Flaw) {
    let mut connection = database.look().await;
    let defined = sqlx::query("SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = $1").bind(flaw.function);
    let defined: String = defined.fetch_one(&mut connection).await.unwrap().get(0);
    assert_eq!(
        defined.matches(flaw.from).count(),
        1,
        "{}: the functions have changed; say anew what the flaw is",
        flaw.what
    );
    let flawed = defined.replace(flaw.from, flaw.to);
    sqlx::raw_sql(AssertSqlSafe(flawed))
        .execute(&mut connection)
        .await
        .unwrap_or_else(|error| panic!("{}: {error}", flaw.what));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flaw_that_is_put_back_is_noticed() {
    let mut unnoticed = Vec::new();
    for flaw in FLAWS {
        let began = Instant::now();
        let mut noticed = None;
        // What happens in ten seconds is luck; on a slow machine a rare meeting takes several.
        for _ in 0..6 {
            let database = Database::migrated().await;
            put_back(&database, flaw).await;
            noticed = torture(&database, Duration::from_secs(10)).await.violations.into_iter().next();
            if noticed.is_some() {
                break;
            }
        }
        match noticed {
            Some(first) => println!("{} ({:?}): {first}", flaw.what, began.elapsed()),
            None => unnoticed.push(flaw.what),
        }
    }
    assert!(unnoticed.is_empty(), "{unnoticed:?}");
}
