-- The hot path: one call writes a whole batch and commits by itself. The same steps, in the same order, as the embedded store makes them, against
-- which one conformance suite holds both.
--
-- Inside a function every statement sees what is committed when it begins, so whatever is read after the lock on org_load is true until the end.
-- A function is never changed in its meaning: hosts of two versions may call it at once. A new meaning gets a new name.

-- An item of a batch. Items of one kind that stand side by side and touch nothing in common are a run, and are written together: what a statement
-- costs is mostly its beginning. Whoever sends the batch says where runs end. Numbers that name a body count from 1.
CREATE TYPE item AS (
  ord int, run_to int, kind text, org text, turn uuid, epoch int, agent text,
  run uuid, env_org text, conv text, mode text, usr text, sees_all boolean, dry boolean, key text, hash int, msg int, on_busy text,
  conv_max bigint, org_max bigint, host_max bigint, admission_ms bigint, queue_ms bigint, turn_ms bigint, attempts_max int, holder uuid, running_max bigint,
  whole int, more int, parts int, parts_max int, bytes_max int, files_bytes bigint, files_bytes_max bigint,
  files jsonb,                                                        -- what the message refers to: [{"digest": hex, "media_type": text}]
  slots int, backoff_ms bigint, backoff_ms_max bigint,
  first_seq bigint, body int, effect boolean, delay_ms bigint,
  outcome text, reply int, replaces boolean, failure text, cancelled_by text, cpu_ms float8, wall_ms float8, memory bigint, calls bigint,
  bytes_in bigint, bytes_out bigint, instance_ms float8,
  parent uuid, permit_run uuid, permit_conv text, permit_org text, snapshot int,
  -- what is found out on the way
  seq bigint, state text, deadline bigint, not_before bigint, worker text, version int, fresh boolean, root uuid, kept uuid[], dropped uuid[]
);

-- What became of an item; several rows an item where it claimed or ended several turns. `kind` says which columns are filled.
CREATE TYPE written AS (
  ord int, kind text,
  org text, turn uuid, agent text, usr text,
  env_org text, conversation text, run uuid, mode text, seq bigint,
  epoch int, first_epoch int, attempt int, restarted boolean, refusal text, refusals int,
  worker text, version int, revision bigint,
  dry_run boolean, accepted_at bigint, at bigint, deadline bigint,
  generation uuid, head uuid, snapshot_worker text, snapshot_version int, snapshot bytea, message bytea,
  was text, promoted boolean,
  limit_max float8, wait_ms bigint      -- of a refusal: the limit that is reached, and when there is room again
);

-- Makes the next turn of a lane ready that has no active one; its admission clock begins anew. Does not touch org_load: its caller does. Of an agent with
-- bounds of its own it is held, until release_held has found room: ready, and not before a time that never comes, so that no claim finds it; its clock is still
-- the queue's.
CREATE FUNCTION promote(p_now bigint, p_org text, p_agent text, p_conversation text, p_held boolean) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  UPDATE turn_markers SET state = 'ready', not_before = CASE WHEN p_held THEN 9007199254740991 ELSE p_now END,
         deadline_at = CASE WHEN p_held THEN deadline_at ELSE p_now + admission_ms END
   WHERE org_id = p_org AND agent_id = p_agent AND conversation_id = p_conversation AND state = 'waiting'
     AND seq = (SELECT min(w.seq) FROM turn_markers w
                 WHERE w.org_id = p_org AND w.agent_id = p_agent AND w.conversation_id = p_conversation AND w.state = 'waiting');
  RETURN FOUND;
END $$;

-- Lets the oldest held turns of an agent go for which it has room, and says how many. What it calls active is running or may start. Under the org's row of
-- org_load, of which nothing changes: they were ready.
CREATE FUNCTION release_held(p_now bigint, p_org text, p_agent text) RETURNS int LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
  v_room bigint;
  n int;
BEGIN
  SELECT CASE WHEN running_max IS NULL THEN 1000000000 ELSE running_max - active END INTO v_room FROM agent_load WHERE org_id = p_org AND agent_id = p_agent;
  IF NOT FOUND OR v_room <= 0 THEN
    RETURN 0;
  END IF;
  UPDATE turn_markers SET not_before = p_now, deadline_at = p_now + admission_ms
   WHERE org_id = p_org AND turn_id = ANY (ARRAY(
     SELECT m.turn_id FROM turn_markers m
      WHERE m.org_id = p_org AND m.agent_id = p_agent AND m.state = 'ready' AND m.not_before = 9007199254740991 ORDER BY m.turn_id LIMIT v_room));
  GET DIAGNOSTICS n = ROW_COUNT;
  IF n > 0 THEN
    UPDATE agent_load SET active = active + n WHERE org_id = p_org AND agent_id = p_agent;
  END IF;
  RETURN n;
END $$;

-- A turn that has ended. `promoted`: the next of its lane is ready; `freed`: that, or one that its agent held, may start.
CREATE TYPE ended AS (ord int, org text, turn uuid, agent text, was text, accepted_at bigint, attempt int, promoted boolean, freed boolean);

-- The one way in which turns end; those that come back have. Whoever deletes the marker has ended the turn, and everything else of the end stands in the
-- same statement. No other function deletes markers. Does not touch org_load: its caller does, by `was` and `promoted`. A reply comes only from an
-- instance, and only a running turn has one. No turn may occur twice. Mostly nobody waits, and then there is nobody to look for; mostly no agent has bounds of
-- its own (p_limited: some may).
CREATE FUNCTION end_turns(p_now bigint, p_ends item[], p_bodies bytea[], p_look_for_next boolean, p_limited boolean) RETURNS SETOF ended LANGUAGE plpgsql AS $$
DECLARE
  r record;
  o ended;
  v_gone bigint := 0; v_done bigint := 0;
  v_limited boolean;
BEGIN
  FOR r IN
    WITH gone AS (
      DELETE FROM turn_markers m USING unnest(p_ends) e
       WHERE m.org_id = e.org AND m.turn_id = e.turn AND (e.epoch IS NULL OR m.epoch = e.epoch)
         AND (e.outcome <> 'completed' OR (m.state = 'running' AND e.epoch IS NOT NULL))
      RETURNING e.*, m.agent_id, m.conversation_id, m.seq AS place, m.state AS was, m.epoch AS end_epoch, m.attempt,
                (m.state = 'running' OR m.state = 'ready' AND m.not_before < 9007199254740991)::int AS active
    ), told AS (
      -- A longer tail goes to the log, so that a turn's row stays a row.
      UPDATE turns t SET outcome = g.outcome, ended_at = p_now, end_epoch = g.end_epoch, attempts = g.attempt, reply = p_bodies[g.reply],
             replaces_deltas = g.replaces, failure = g.failure, cancelled_by = g.cancelled_by, cpu_ms = g.cpu_ms, wall_ms = g.wall_ms,
             memory_peak_bytes = g.memory, host_calls = g.calls, bytes_in = g.bytes_in, bytes_out = g.bytes_out, instance_ms = g.instance_ms,
             tail_seq = CASE WHEN length(p_bodies[g.body]) <= 16384 THEN g.first_seq END,
             tail = CASE WHEN length(p_bodies[g.body]) <= 16384 THEN p_bodies[g.body] END
        FROM gone g WHERE t.org_id = g.org AND t.turn_id = g.turn AND t.outcome IS NULL
      RETURNING g.ord, g.org, g.turn, g.agent_id, g.conversation_id, g.place, g.was, g.end_epoch, g.attempt, g.first_seq, g.body, g.active, g.cpu_ms,
                t.accepted_at
    )
    SELECT n.gone, told.* FROM (SELECT count(*) AS gone FROM gone) n LEFT JOIN told ON true
  LOOP
    v_gone := r.gone;
    EXIT WHEN r.turn IS NULL;
    v_done := v_done + 1;
    IF length(p_bodies[r.body]) > 16384 THEN
      INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body) VALUES (r.org, r.turn, r.end_epoch, r.first_seq, p_bodies[r.body])
      ON CONFLICT DO NOTHING;
    END IF;
    o := (r.ord, r.org, r.turn, r.agent_id, r.was, r.accepted_at, r.attempt, false, false);
    v_limited := false;
    IF p_limited THEN
      UPDATE agent_load a SET live = a.live - 1, active = a.active - r.active,
             cpu_ms = CASE WHEN a.cpu_ms_per_hour > 0 AND r.cpu_ms IS NOT NULL
                           THEN CASE WHEN a.cpu_hour = p_now / 3600000 THEN a.cpu_ms ELSE 0 END + r.cpu_ms ELSE a.cpu_ms END,
             cpu_hour = CASE WHEN a.cpu_ms_per_hour > 0 AND r.cpu_ms IS NOT NULL THEN p_now / 3600000 ELSE a.cpu_hour END
       WHERE a.org_id = r.org AND a.agent_id = r.agent_id;
      v_limited := FOUND;
    END IF;
    IF p_look_for_next AND r.place IS NOT NULL AND r.was <> 'waiting' THEN
      o.promoted := promote(p_now, r.org, r.agent_id, r.conversation_id, v_limited);
    END IF;
    o.freed := o.promoted;
    IF v_limited THEN
      o.freed := release_held(p_now, r.org, r.agent_id) > 0;
    END IF;
    RETURN NEXT o;
  END LOOP;
  IF v_done < v_gone THEN
    RAISE EXCEPTION '% turns had a marker and no open row', v_gone - v_done USING ERRCODE = 'integrity_constraint_violation';
  END IF;
END $$;

-- A marker changes its owner: the first start, the start after a requeue and the takeover from a dead replica are the same. A row that the gate's column
-- refuses comes back to its claimer and goes on waiting; nothing starts for it. Does not touch org_load: its caller does, by `was`.
CREATE FUNCTION start_turn(p_now bigint, p_org text, p_turn uuid, p_holder uuid, p_backoff_ms bigint, p_backoff_ms_max bigint)
RETURNS written LANGUAGE plpgsql AS $$
DECLARE
  o written;
  m record;
  a record;
BEGIN
  SELECT k.*, t.user_id, t.dry_run, t.accepted_at, t.message, t.first_epoch, t.worker, t.version INTO STRICT m
    FROM turn_markers k JOIN turns t ON t.org_id = k.org_id AND t.turn_id = k.turn_id
   WHERE k.org_id = p_org AND k.turn_id = p_turn;
  o.kind := 'claimed';
  o.org := p_org; o.turn := p_turn; o.agent := m.agent_id; o.usr := m.user_id;
  o.env_org := m.env_org; o.conversation := m.conversation_id; o.run := m.run_id; o.mode := m.mode; o.seq := m.seq;
  o.epoch := m.epoch + 1; o.restarted := m.first_epoch IS NOT NULL; o.first_epoch := coalesce(m.first_epoch, o.epoch);
  o.worker := m.worker; o.version := m.version; o.dry_run := m.dry_run; o.accepted_at := m.accepted_at; o.at := p_now; o.message := m.message;
  o.was := m.state;
  IF m.refusal IS NOT NULL THEN
    -- Back to the queue with a new owner number: its claimer may end it, nobody else's lease is worth anything. No attempt is spent.
    UPDATE turn_markers SET epoch = epoch + 1, refusals = refusals + 1,
           not_before = p_now + CASE WHEN m.refusals >= 40 THEN p_backoff_ms_max ELSE least(p_backoff_ms_max, p_backoff_ms << m.refusals) END
     WHERE org_id = p_org AND turn_id = p_turn;
    o.refusal := m.refusal; o.refusals := m.refusals + 1; o.attempt := m.attempt; o.deadline := m.deadline_at; o.revision := 0;
    RETURN o;
  END IF;
  o.attempt := m.attempt + 1;
  o.deadline := p_now + m.turn_ms;
  UPDATE turn_markers SET state = 'running', holder = p_holder, epoch = epoch + 1, attempt = attempt + 1, deadline_at = o.deadline
   WHERE org_id = p_org AND turn_id = p_turn;
  SELECT worker, version, revision INTO a FROM agents WHERE org_id = p_org AND agent_id = m.agent_id;
  o.revision := coalesce(a.revision, 0);
  IF m.first_epoch IS NULL THEN
    -- Worker and version are fixed here, for all attempts.
    o.worker := a.worker;
    o.version := a.version;
    UPDATE turns SET first_epoch = o.epoch, started_at = p_now, worker = a.worker, version = a.version WHERE org_id = p_org AND turn_id = p_turn;
  ELSE
    INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body)
    VALUES (p_org, p_turn, o.epoch, 0, convert_to(format('[["turn.restarted",{"attempt":%s}]]', o.attempt), 'UTF8'));
  END IF;
  IF m.seq IS NOT NULL AND (m.mode = 'file' OR m.run_id IS NOT NULL) THEN
    SELECT generation, head_run INTO STRICT o.generation, o.head FROM conversations
     WHERE org_id = p_org AND agent_id = m.agent_id AND conversation_id = m.conversation_id;
    IF m.mode = 'snapshot' AND o.head <> o.generation THEN
      -- A point look-up: the chain is never walked. A head without its row or bytes is told as such: it never silently starts afresh.
      SELECT worker, version, body INTO o.snapshot_worker, o.snapshot_version, o.snapshot FROM snapshots
       WHERE org_id = p_org AND run_id = o.head AND agent_id = m.agent_id AND conversation_id = m.conversation_id;
    END IF;
  END IF;
  RETURN o;
END $$;

-- Whether a replica is live and not draining: only then may it hold anything.
CREATE FUNCTION may_claim(p_now bigint, p_replica uuid) RETURNS boolean LANGUAGE sql VOLATILE
AS $$ SELECT EXISTS (SELECT 1 FROM replicas WHERE replica_id = p_replica AND expires_at > p_now AND NOT draining) $$;

-- p_now: NULL is the database's clock. p_orgs: whose items there are. p_host_live: live turns of all orgs, as the host last knew them. p_cursor: the org that
-- this host's claims served last. p_rate, p_burst, p_cpu_max, p_storage_max: what an org may use that has no limit of its own; 0: any number.
CREATE FUNCTION write_batch(p_now bigint, p_orgs text[], p_items jsonb, p_bodies bytea[], p_snapshots_kept int, p_host_live bigint, p_cursor text,
                            p_rate float8, p_burst int, p_cpu_max bigint, p_storage_max bigint)
RETURNS SETOF written LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off AS $$
#variable_conflict use_column
DECLARE
  v_now bigint;
  v_waited timestamptz;
  v_claims int := 0;                    -- slots that claims of this batch would fill
  -- The orgs that are locked, sorted, and their live turns by state.
  v_org text[] := '{}'; v_waiting int[] := '{}'; v_ready int[] := '{}'; v_running int[] := '{}';
  -- Their limits, NULL where the host's hold that the items bring; their meters, which are moved only where there is a limit.
  v_running_max int[] := '{}'; v_queue_max int[] := '{}';
  v_rate float8[] := '{}'; v_burst float8[] := '{}'; v_tokens float8[] := '{}'; v_tokens_at bigint[] := '{}';
  v_cpu_max float8[] := '{}'; v_cpu float8[] := '{}'; v_cpu_hour bigint[] := '{}';
  v_storage_max bigint[] := '{}'; v_storage bigint[] := '{}';
  v_limited int[] := '{}';              -- how many of their agents have bounds of their own
  v_hour bigint; v_have float8;
  ag record; v_agent boolean; v_agent_full boolean; v_agent_have float8;   -- the message's agent, if it has bounds
  v_lock text[] := p_orgs;
  v_round text[] := '{}';               -- orgs whose turn it is to be served, in order
  v_first text; v_bound bigint;
  v_older boolean;                      -- whether something older is ready for a slot; NULL: to be looked up
  v_holder uuid; v_may boolean;         -- the holder that was asked about last
  v_items item[]; v_run item[]; v_new item[]; v_at int;
  v_done boolean[];                     -- by an item's place: what it asked for was done
  v_made int[];                         -- orgs of which this run has made a turn ready; the tables do not show it yet
  v_look boolean;                       -- whether an end may make a waiting turn ready
  v_bounded boolean;                    -- whether its agent may have bounds
  v_lanes int; v_fresh boolean; v_keyed boolean; v_staged boolean; v_files boolean;
  it item; l record; r record; e record; x record;
  o written;
  i int; n int; k int;
  v_text text; v_turn uuid; v_laned boolean; v_live int; v_active uuid; v_interrupt boolean; v_behind boolean;
  v_start boolean; v_refused boolean; v_held boolean; v_count bigint;
BEGIN
  v_items := ARRAY(SELECT j FROM jsonb_populate_recordset(NULL::item, p_items) j ORDER BY j.ord);
  v_done := array_fill(false, ARRAY[cardinality(v_items)]);
  FOREACH it IN ARRAY v_items LOOP
    IF it.kind = 'claim' THEN
      v_claims := v_claims + it.slots;
      v_bound := greatest(v_bound, it.running_max);
    END IF;
  END LOOP;
  IF v_claims > 0 THEN
    v_now := coalesce(p_now, turnhouse_now());
    -- Orgs with something to start and room for it, once round from the cursor, a few index probes each; and those whose turns the dead still hold.
    v_text := coalesce(p_cursor, '');
    v_first := NULL;
    k := 0;
    FOR n IN 1 .. 10000 LOOP
      SELECT m.org_id INTO v_text FROM turn_markers m WHERE m.state = 'ready' AND m.org_id > v_text ORDER BY m.org_id LIMIT 1;
      IF NOT FOUND THEN
        EXIT WHEN k = 1;
        k := 1;
        SELECT m.org_id INTO v_text FROM turn_markers m WHERE m.state = 'ready' ORDER BY m.org_id LIMIT 1;
        EXIT WHEN NOT FOUND;
      END IF;
      EXIT WHEN v_text = v_first OR cardinality(v_round) >= v_claims;
      v_first := coalesce(v_first, v_text);
      IF EXISTS (SELECT 1 FROM turn_markers m WHERE m.org_id = v_text AND m.state = 'ready' AND m.not_before <= v_now AND m.deadline_at > v_now
                    AND m.epoch < 1000000)
         AND EXISTS (SELECT 1 FROM org_load g WHERE g.org_id = v_text AND g.running < coalesce(g.running_max, v_bound))
      THEN
        v_round := v_round || v_text;
      END IF;
    END LOOP;
    v_lock := v_lock || v_round || ARRAY(
      SELECT m.org_id FROM replicas d JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
       WHERE d.expires_at <= v_now AND m.attempt < m.attempts_max AND NOT m.effects AND m.deadline_at > v_now AND m.epoch < 1000000 LIMIT v_claims);
  END IF;

  v_waited := clock_timestamp();
  FOR l IN SELECT g.* FROM org_load g WHERE g.org_id = ANY (v_lock) ORDER BY g.org_id FOR NO KEY UPDATE LOOP
    v_org := v_org || l.org_id; v_waiting := v_waiting || l.waiting; v_ready := v_ready || l.ready; v_running := v_running || l.running;
    v_running_max := v_running_max || l.running_max; v_queue_max := v_queue_max || l.queue_max;
    v_have := coalesce(l.submits_per_second, p_rate);
    v_rate := v_rate || v_have;
    v_burst := v_burst || greatest(1, coalesce(nullif(coalesce(l.submit_burst, p_burst), 0), ceil(v_have)));
    v_tokens := v_tokens || l.tokens; v_tokens_at := v_tokens_at || l.tokens_at;
    v_cpu_max := v_cpu_max || coalesce(l.cpu_ms_per_hour, p_cpu_max)::float8; v_cpu := v_cpu || l.cpu_ms; v_cpu_hour := v_cpu_hour || l.cpu_hour;
    v_storage_max := v_storage_max || coalesce(l.storage_bytes_max, p_storage_max); v_storage := v_storage || l.storage_bytes;
    v_limited := v_limited || l.limited_agents;
  END LOOP;
  v_now := coalesce(p_now, turnhouse_now());
  -- How long, in microseconds, others have held what this batch needs: its host sends the next one later, and more in it.
  n := least(60000000, extract(epoch FROM clock_timestamp() - v_waited) * 1000000)::int;
  IF n >= 200 THEN
    o.ord := 0; o.kind := 'waited'; o.at := n;
    RETURN NEXT o;
  END IF;
  v_hour := v_now / 3600000;

  v_at := 1;
  WHILE v_at <= cardinality(v_items) LOOP
    it := v_items[v_at];
    v_at := it.ord + 1;
    o := NULL;
    o.ord := it.ord;
    o.at := v_now;
    IF it.kind = 'claim' THEN
      IF it.holder IS DISTINCT FROM v_holder THEN
        v_holder := it.holder;
        v_may := may_claim(v_now, it.holder);
      END IF;
      CONTINUE WHEN NOT v_may OR it.slots = 0;
      n := 0;
      -- What was running already counts against its org's bound already: attempts are left, no effect had begun, its own time is not over.
      FOR x IN SELECT m.org_id, m.turn_id FROM replicas d JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
                WHERE d.expires_at <= v_now AND m.attempt < m.attempts_max AND NOT m.effects AND m.deadline_at > v_now AND m.epoch < 1000000
                  AND m.org_id = ANY (v_org) LIMIT it.slots
      LOOP
        o := start_turn(v_now, x.org_id, x.turn_id, it.holder, it.backoff_ms, it.backoff_ms_max);
        o.ord := it.ord;
        RETURN NEXT o;
        n := n + 1;
      END LOOP;
      -- One an org and round, so that nobody's backlog delays another's single turn beyond its share.
      v_lock := v_round;
      WHILE n < it.slots AND cardinality(v_lock) > 0 LOOP
        v_text := v_lock[1];
        v_lock := v_lock[2:];
        i := array_position(v_org, v_text);
        CONTINUE WHEN i IS NULL OR v_running[i] >= coalesce(v_running_max[i], it.running_max);
        SELECT m.turn_id INTO v_turn FROM turn_markers m
         WHERE m.org_id = v_text AND m.state = 'ready' AND m.not_before <= v_now AND m.deadline_at > v_now AND m.epoch < 1000000
         ORDER BY m.not_before, m.turn_id LIMIT 1;
        CONTINUE WHEN NOT FOUND;
        o := start_turn(v_now, v_text, v_turn, it.holder, it.backoff_ms, it.backoff_ms_max);
        o.ord := it.ord;
        IF o.refusal IS NULL THEN
          v_ready[i] := v_ready[i] - 1;
          v_running[i] := v_running[i] + 1;
        END IF;
        RETURN NEXT o;
        n := n + 1;
        v_lock := v_lock || v_text;
      END LOOP;
      v_older := NULL;
      CONTINUE;
    END IF;

    -- Where turns wait, an end makes another ready: there ends go one by one. So does everything where agents have bounds: each changes what the next may.
    n := it.ord;
    v_staged := false;
    WHILE n <= it.run_to LOOP
      i := array_position(v_org, (v_items[n]).org);
      IF i IS NULL THEN
        RAISE EXCEPTION 'there is no org %', (v_items[n]).org USING ERRCODE = 'integrity_constraint_violation';
      END IF;
      v_look := it.kind = 'commit' AND v_waiting[i] > 0 OR v_limited[i] > 0 AND it.kind IN ('commit', 'accept');
      v_staged := v_staged OR (v_items[n]).snapshot IS NOT NULL;
      EXIT WHEN v_look;
      n := n + 1;
    END LOOP;
    v_look := v_look AND n = it.ord;
    v_bounded := v_look AND v_limited[i] > 0;
    v_run := v_items[it.ord:greatest(n - 1, it.ord)];
    v_at := it.ord + cardinality(v_run);

    IF it.kind = 'append' THEN
      -- The fence: only the owner of a running marker says anything.
      IF it.effect THEN
        UPDATE turn_markers SET effects = true WHERE org_id = it.org AND turn_id = it.turn AND epoch = it.epoch AND state = 'running';
        v_done[it.ord] := FOUND;
      ELSE
        FOR r IN SELECT u.ord FROM unnest(v_run) u JOIN turn_markers m ON m.org_id = u.org AND m.turn_id = u.turn AND m.epoch = u.epoch AND m.state = 'running' LOOP
          v_done[r.ord] := true;
        END LOOP;
      END IF;
      -- The journal's own retry finds its row.
      INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body)
      SELECT u.org, u.turn, u.epoch, u.first_seq, p_bodies[u.body] FROM unnest(v_run) u WHERE v_done[u.ord] AND u.body IS NOT NULL
      ON CONFLICT DO NOTHING;
      FOREACH it IN ARRAY v_run LOOP
        o.ord := it.ord;
        o.kind := CASE WHEN v_done[it.ord] THEN 'done' ELSE 'stale' END;
        RETURN NEXT o;
      END LOOP;

    ELSIF it.kind = 'requeue' THEN
      -- The admission clock begins anew and outlasts the delay. Epoch + 1: the old owner's lease is worth nothing from here. What has begun an effect is
      -- never run again, and not given back.
      UPDATE turn_markers SET state = 'ready', holder = NULL, epoch = epoch + 1, attempt = attempt - 1,
             not_before = v_now + it.delay_ms, deadline_at = v_now + greatest(admission_ms, it.delay_ms + 1)
       WHERE org_id = it.org AND turn_id = it.turn AND epoch = it.epoch AND state = 'running' AND NOT effects;
      o.kind := 'stale';
      IF FOUND THEN
        o.kind := 'done';
        v_running[i] := v_running[i] - 1;
        v_ready[i] := v_ready[i] + 1;
        v_older := NULL;
      END IF;
      RETURN NEXT o;

    ELSIF it.kind = 'commit' THEN
      v_new := '{}';
      -- The permit and the head are tested against what stands now, before anything is ended.
      IF v_staged THEN
        FOR r IN
          SELECT u.ord, c.*, EXISTS (SELECT 1 FROM snapshots s WHERE s.org_id = u.org AND s.run_id = c.run_id AND s.agent_id = c.agent_id
                                        AND s.conversation_id = c.conversation_id) AS taken
            FROM unnest(v_run) u LEFT JOIN LATERAL (
              SELECT m.agent_id, m.conversation_id, m.run_id, t.worker, t.version, g.head_run, g.generation, g.kept_runs
                FROM turn_markers m
                JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id
                JOIN conversations g ON g.org_id = m.org_id AND g.agent_id = m.agent_id AND g.conversation_id = m.conversation_id
               WHERE m.org_id = u.org AND m.turn_id = u.turn AND m.mode = 'snapshot' AND m.seq IS NOT NULL AND m.run_id IS NOT NULL
                 AND m.run_id = u.permit_run AND m.org_id = u.permit_org AND m.conversation_id = u.permit_conv AND u.outcome = 'completed'
                 AND t.worker IS NOT NULL) c ON true
           WHERE u.snapshot IS NOT NULL
        LOOP
          it := v_items[r.ord];
          IF r.head_run = it.parent AND r.run_id <> r.head_run AND r.run_id <> r.generation AND NOT r.taken THEN
            it.agent := r.agent_id; it.conv := r.conversation_id; it.run := r.run_id; it.worker := r.worker; it.version := r.version;
            -- More than one goes when the bound was lowered since. The rows stay: they are links of the chain.
            k := greatest(0, cardinality(r.kept_runs) + 1 - p_snapshots_kept);
            it.dropped := r.kept_runs[:k];
            it.kept := r.kept_runs[k + 1:] || r.run_id;
            v_new := v_new || it;
          ELSE
            -- Lost comes before conflict.
            PERFORM 1 FROM turn_markers WHERE org_id = it.org AND turn_id = it.turn AND epoch = it.epoch AND state = 'running';
            o.ord := it.ord;
            o.kind := CASE WHEN FOUND THEN 'conflict' ELSE 'lost' END;
            RETURN NEXT o;
            v_run := ARRAY(SELECT u FROM unnest(v_run) u WHERE u.ord <> it.ord);
          END IF;
        END LOOP;
      END IF;
      FOR e IN SELECT * FROM end_turns(v_now, v_run, p_bodies, v_look, v_bounded) LOOP
        v_done[e.ord] := true;
        o.ord := e.ord; o.kind := 'won'; o.agent := e.agent; o.was := e.was; o.accepted_at := e.accepted_at; o.attempt := e.attempt;
        o.promoted := e.freed;
        RETURN NEXT o;
        i := array_position(v_org, e.org);
        IF e.was = 'waiting' THEN
          v_waiting[i] := v_waiting[i] - 1;
        ELSIF e.was = 'ready' THEN
          v_ready[i] := v_ready[i] - 1;
        ELSE
          v_running[i] := v_running[i] - 1;
          v_older := NULL;
        END IF;
        IF v_cpu_max[i] > 0 AND (v_items[e.ord]).cpu_ms IS NOT NULL THEN
          v_cpu[i] := CASE WHEN v_cpu_hour[i] = v_hour THEN v_cpu[i] ELSE 0 END + (v_items[e.ord]).cpu_ms;
          v_cpu_hour[i] := v_hour;
        END IF;
        IF e.promoted THEN
          v_waiting[i] := v_waiting[i] - 1;
          v_ready[i] := v_ready[i] + 1;
        END IF;
        IF o.promoted THEN
          v_older := NULL;
        END IF;
        p_host_live := p_host_live - 1;
      END LOOP;
      FOREACH it IN ARRAY v_run LOOP
        IF NOT v_done[it.ord] THEN
          o := NULL;
          o.ord := it.ord; o.at := v_now; o.kind := 'lost';
          RETURN NEXT o;
        END IF;
      END LOOP;
      IF cardinality(v_new) > 0 THEN
        INSERT INTO snapshots (org_id, agent_id, conversation_id, run_id, parent_run, turn_id, worker, version, at, body)
        SELECT s.org, s.agent, s.conv, s.run, s.parent, s.turn, s.worker, s.version, v_now, p_bodies[s.snapshot] FROM unnest(v_new) s WHERE v_done[s.ord];
        UPDATE snapshots x SET body = NULL FROM unnest(v_new) s, unnest(s.dropped) AS d (run)
         WHERE v_done[s.ord] AND x.org_id = s.org AND x.run_id = d.run AND x.agent_id = s.agent AND x.conversation_id = s.conv;
        UPDATE conversations g SET head_run = s.run, kept_runs = s.kept
          FROM unnest(v_new) s WHERE v_done[s.ord] AND g.org_id = s.org AND g.agent_id = s.agent AND g.conversation_id = s.conv;
      END IF;

    ELSIF it.kind = 'accept' THEN
      v_new := '{}'; v_made := '{}'; v_lanes := 0; v_fresh := false; v_keyed := false; v_files := false;
      -- What stands of each message's conversation, key, turn and agent; nothing of this run is written before all of it is read.
      FOR r IN
        SELECT u.ord, g.user_id, g.generation, g.head_run, g.next_seq, g.deleted_at IS NOT NULL AS deleted, m.turn_id AS active, w.waiting, w.first,
               q.turn_id AS keyed, q.request_hash = p_bodies[u.hash] AS same, t.turn_id IS NOT NULL AS known, a.worker, a.version, a.revision,
               s.worker AS snapshot_worker, s.version AS snapshot_version, s.body AS snapshot
          FROM unnest(v_run) u
          LEFT JOIN conversations g ON g.org_id = u.org AND g.agent_id = u.agent AND g.conversation_id = u.conv
          LEFT JOIN turn_markers m ON m.org_id = u.org AND m.agent_id = u.agent AND m.conversation_id = u.conv AND m.state IN ('ready', 'running')
               AND m.seq IS NOT NULL AND u.env_org IS NOT NULL
          LEFT JOIN LATERAL (
            SELECT count(*)::int AS waiting, (array_agg(b.turn_id ORDER BY b.seq))[1] AS first FROM turn_markers b
             WHERE b.org_id = u.org AND b.agent_id = u.agent AND b.conversation_id = u.conv AND b.state = 'waiting' AND u.env_org IS NOT NULL
               AND v_waiting[array_position(v_org, u.org)] > 0) w ON true
          LEFT JOIN idempotency_keys q ON q.org_id = u.org AND q.agent_id = u.agent AND q.conversation_id = coalesce(u.conv, '') AND q.idem_key = u.key
          LEFT JOIN turns t ON t.org_id = u.org AND t.turn_id = u.turn
          LEFT JOIN agents a ON a.org_id = u.org AND a.agent_id = u.agent
          LEFT JOIN snapshots s ON s.org_id = u.org AND s.run_id = g.head_run AND s.agent_id = u.agent AND s.conversation_id = u.conv
               AND u.mode = 'snapshot' AND u.run IS NOT NULL AND g.head_run <> g.generation
         ORDER BY u.ord
      LOOP
        it := v_items[r.ord];
        i := array_position(v_org, it.org);
        o := NULL;
        o.ord := it.ord;
        o.at := v_now;
        v_laned := it.conv IS NOT NULL AND it.env_org IS NOT NULL;    -- only such an envelope has a place in a conversation
        v_live := r.waiting + (r.active IS NOT NULL)::int;
        v_active := coalesce(r.active, r.first);
        v_agent := false;
        IF v_limited[i] > 0 THEN
          SELECT g.* INTO ag FROM agent_load g WHERE g.org_id = it.org AND g.agent_id = it.agent;
          v_agent := FOUND;
        END IF;
        -- The order of these checks is the contract: whose it is, then the key, then what it refers to, then busy, then what the org and then what the agent
        -- may use, then room.
        v_text := NULL;
        IF r.user_id IS NOT NULL AND NOT r.deleted AND r.user_id <> it.usr AND NOT it.sees_all THEN
          v_text := 'not_found';
        ELSIF r.keyed IS NOT NULL THEN
          IF r.same THEN
            o.kind := 'attached';
            o.turn := r.keyed;
            RETURN NEXT o;
            CONTINUE;
          END IF;
          v_text := 'idempotency_mismatch';
        END IF;
        IF v_text IS NULL AND it.files IS NOT NULL THEN
          -- Locked, so that none of them goes before this turn refers to it.
          PERFORM 1 FROM attachments f
            WHERE f.org_id = it.org AND f.digest IN (SELECT decode(j ->> 'digest', 'hex') FROM jsonb_array_elements(it.files) j)
            ORDER BY f.digest FOR KEY SHARE;
          GET DIAGNOSTICS n = ROW_COUNT;
          IF n < jsonb_array_length(it.files) THEN
            v_text := 'attachment_not_found';
          END IF;
          v_files := true;
        END IF;
        -- What was accepted before is not refused: this is the journal's own retry.
        IF v_text IS NULL AND NOT r.known AND (it.on_busy <> 'reject' OR v_active IS NULL) THEN
          IF v_cpu_max[i] > 0 AND v_cpu_hour[i] = v_hour AND v_cpu[i] >= v_cpu_max[i] THEN
            v_text := 'cpu_ms_per_hour';
            o.limit_max := v_cpu_max[i];
            o.wait_ms := (v_hour + 1) * 3600000 - v_now;
          ELSIF v_storage_max[i] > 0 AND v_storage[i] >= v_storage_max[i] THEN
            v_text := 'storage_bytes_max';
            o.limit_max := v_storage_max[i];
            o.wait_ms := 60000;                                       -- until it is measured again
          ELSIF v_rate[i] > 0 THEN
            v_have := least(v_burst[i], coalesce(v_tokens[i] + greatest(0, v_now - v_tokens_at[i])::float8 * v_rate[i] / 1000, v_burst[i]));
            IF v_have < 1 THEN
              v_text := 'submits_per_second';
              o.limit_max := v_rate[i];
              o.wait_ms := least(1e15, ceil((1 - v_have) * 1000 / v_rate[i]));
            END IF;
          END IF;
          IF v_agent AND v_text IS NULL THEN
            IF ag.cpu_ms_per_hour > 0 AND ag.cpu_hour = v_hour AND ag.cpu_ms >= ag.cpu_ms_per_hour THEN
              v_text := 'agent_cpu_ms_per_hour';
              o.limit_max := ag.cpu_ms_per_hour;
              o.wait_ms := (v_hour + 1) * 3600000 - v_now;
            ELSIF ag.storage_bytes_max > 0 AND ag.storage_bytes >= ag.storage_bytes_max THEN
              v_text := 'agent_storage_bytes_max';
              o.limit_max := ag.storage_bytes_max;
              o.wait_ms := 60000;
            ELSIF ag.submits_per_second > 0 THEN
              v_agent_have := greatest(1, coalesce(nullif(ag.submit_burst, 0), ceil(ag.submits_per_second)));
              v_agent_have := least(v_agent_have, coalesce(ag.tokens + greatest(0, v_now - ag.tokens_at)::float8 * ag.submits_per_second / 1000, v_agent_have));
              IF v_agent_have < 1 THEN
                v_text := 'agent_submits_per_second';
                o.limit_max := ag.submits_per_second;
                o.wait_ms := least(1e15, ceil((1 - v_agent_have) * 1000 / ag.submits_per_second));
              END IF;
            END IF;
          END IF;
        END IF;
        IF v_text IS NULL AND it.parts IS NOT NULL AND r.waiting > 0 THEN
          -- The last that waits, if it collects and has room. Its message is a list of parts; what joins it goes before the two bytes that end it.
          SELECT t.turn_id INTO v_turn
            FROM (SELECT b.turn_id, b.collected FROM turn_markers b
                   WHERE b.org_id = it.org AND b.agent_id = it.agent AND b.conversation_id = it.conv AND b.state = 'waiting'
                   ORDER BY b.seq DESC LIMIT 1) b
            JOIN turns t ON t.org_id = it.org AND t.turn_id = b.turn_id
           WHERE b.collected > 0 AND b.collected + it.parts + 1 <= it.parts_max AND length(t.message) + length(p_bodies[it.more]) <= it.bytes_max
             AND t.dry_run = it.dry
             AND (it.files_bytes = 0 OR it.files_bytes + (SELECT coalesce(sum(a.bytes), 0) FROM attachment_refs f
                  JOIN attachments a ON a.org_id = f.org_id AND a.digest = f.digest WHERE f.org_id = it.org AND f.turn_id = b.turn_id) <= it.files_bytes_max);
          IF FOUND THEN
            UPDATE turns SET message = substring(message FROM 1 FOR length(message) - 2) || p_bodies[it.more] WHERE org_id = it.org AND turn_id = v_turn;
            UPDATE turn_markers SET collected = collected + it.parts + 1 WHERE org_id = it.org AND turn_id = v_turn;
            IF it.key IS NOT NULL THEN
              INSERT INTO idempotency_keys (org_id, agent_id, conversation_id, idem_key, turn_id, request_hash, created_at)
              VALUES (it.org, it.agent, it.conv, it.key, v_turn, p_bodies[it.hash], v_now);
            END IF;
            IF it.files IS NOT NULL THEN
              INSERT INTO attachment_refs (org_id, turn_id, digest, user_id, media_type)
              SELECT it.org, v_turn, decode(j ->> 'digest', 'hex'), r.user_id, j ->> 'media_type' FROM jsonb_array_elements(it.files) j
              ON CONFLICT DO NOTHING;
            END IF;
            IF v_rate[i] > 0 THEN
              v_tokens[i] := v_have - 1;
              v_tokens_at[i] := v_now;
            END IF;
            IF v_agent THEN
              UPDATE agent_load SET tokens = v_agent_have - 1, tokens_at = v_now WHERE org_id = it.org AND agent_id = it.agent AND submits_per_second > 0;
            END IF;
            o.kind := 'joined';
            o.turn := v_turn;
            RETURN NEXT o;
            CONTINUE;
          END IF;
        END IF;
        v_interrupt := it.on_busy = 'interrupt' AND v_active IS NOT NULL;
        IF v_text IS NULL THEN
          n := CASE WHEN v_interrupt THEN v_live ELSE 0 END;          -- an interrupt makes room for itself
          v_agent_full := false;
          IF v_agent THEN
            v_agent_full := greatest(0, ag.live - n) >= ag.queue_max;
          END IF;
          IF it.on_busy = 'reject' AND v_active IS NOT NULL THEN
            v_text := 'conversation_busy';
            o.turn := v_active;
          ELSIF v_live - n > it.conv_max THEN
            v_text := 'conversation_queue_full';
          ELSIF greatest(0, v_waiting[i] + v_ready[i] + v_running[i] - n) >= coalesce(v_queue_max[i], it.org_max) THEN
            v_text := 'org_queue_full';
            o.limit_max := coalesce(v_queue_max[i], it.org_max);
          ELSIF v_agent_full THEN
            v_text := 'agent_queue_full';
            o.limit_max := ag.queue_max;
          ELSIF greatest(0, p_host_live - n) >= it.host_max THEN
            v_text := 'host_queue_full';
          END IF;
        END IF;
        IF v_text IS NOT NULL THEN
          o.kind := 'refused';
          o.refusal := v_text;
          RETURN NEXT o;
          CONTINUE;
        END IF;
        -- It was accepted before, and this is the journal's own retry, which must not interrupt itself.
        IF r.known THEN
          o.kind := 'attached';
          o.turn := it.turn;
          RETURN NEXT o;
          CONTINUE;
        END IF;
        IF v_rate[i] > 0 THEN
          v_tokens[i] := v_have - 1;
          v_tokens_at[i] := v_now;
        END IF;
        IF v_interrupt THEN
          -- Alone in its run. All end at once, so that nobody becomes ready.
          FOR e IN SELECT d.* FROM end_turns(v_now, ARRAY(
                SELECT jsonb_populate_record(NULL::item, jsonb_build_object('ord', row_number() OVER (ORDER BY m.state = 'waiting' DESC, m.seq), 'org', it.org,
                                             'turn', m.turn_id, 'outcome', 'cancelled', 'cancelled_by', 'interrupt'))
                  FROM turn_markers m WHERE m.org_id = it.org AND m.agent_id = it.agent AND m.conversation_id = it.conv AND m.seq IS NOT NULL), '{}', false,
                v_agent) d
              ORDER BY d.ord
          LOOP
            o.kind := 'ended'; o.turn := e.turn; o.agent := e.agent; o.was := e.was; o.accepted_at := e.accepted_at; o.promoted := e.freed;
            RETURN NEXT o;
            IF e.was = 'waiting' THEN
              v_waiting[i] := v_waiting[i] - 1;
            ELSIF e.was = 'ready' THEN
              v_ready[i] := v_ready[i] - 1;
            ELSE
              v_running[i] := v_running[i] - 1;
            END IF;
            v_older := NULL;
            p_host_live := p_host_live - 1;
          END LOOP;
          o := NULL;
          o.ord := it.ord;
          o.at := v_now;
        END IF;
        v_behind := v_live > 0 AND NOT v_interrupt;
        v_held := false;
        IF v_agent THEN
          SELECT g.active >= g.running_max INTO v_held FROM agent_load g WHERE g.org_id = it.org AND g.agent_id = it.agent;
          v_held := NOT v_behind AND coalesce(v_held, false);
          UPDATE agent_load SET live = live + 1, active = active + (NOT v_behind AND NOT v_held)::int,
                 tokens = CASE WHEN submits_per_second > 0 THEN v_agent_have - 1 ELSE tokens END,
                 tokens_at = CASE WHEN submits_per_second > 0 THEN v_now ELSE tokens_at END
           WHERE org_id = it.org AND agent_id = it.agent;
        END IF;
        v_refused := it.mode = 'snapshot' AND it.run IS NOT NULL AND (it.env_org IS NULL OR it.conv IS NULL);

        -- Started in this very write, if its lane is empty, its org under its bound and nothing older ready.
        v_start := false;
        IF it.holder IS NOT NULL AND NOT v_held AND NOT v_behind AND NOT v_refused AND v_running[i] < coalesce(v_running_max[i], it.running_max) THEN
          IF it.holder IS DISTINCT FROM v_holder THEN
            v_holder := it.holder;
            v_may := may_claim(v_now, it.holder);
          END IF;
          IF v_may AND v_older IS NULL THEN
            v_older := EXISTS (SELECT 1 FROM replicas d JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
                                WHERE d.expires_at <= v_now AND m.attempt < m.attempts_max AND NOT m.effects AND m.deadline_at > v_now AND m.epoch < 1000000);
            v_text := '';
            n := 0;
            WHILE NOT v_older LOOP
              SELECT m.org_id INTO v_text FROM turn_markers m WHERE m.state = 'ready' AND m.org_id > v_text ORDER BY m.org_id LIMIT 1;
              EXIT WHEN NOT FOUND;
              k := array_position(v_org, v_text);
              IF k IS NULL THEN
                SELECT coalesce(g.running_max, it.running_max) - g.running INTO v_count FROM org_load g WHERE g.org_id = v_text;
              ELSE
                v_count := coalesce(v_running_max[k], it.running_max) - v_running[k];
              END IF;
              IF v_count > 0 THEN
                v_older := EXISTS (SELECT 1 FROM turn_markers m WHERE m.org_id = v_text AND m.state = 'ready' AND m.not_before <= v_now
                                      AND m.deadline_at > v_now AND m.epoch < 1000000);
              END IF;
              n := n + 1;
              v_older := v_older OR n >= 64;                          -- so many orgs wait: then this one does, too
            END LOOP;
          END IF;
          v_start := v_may AND NOT v_older;
          IF v_start AND cardinality(v_made) > 0 THEN
            v_start := NOT EXISTS (SELECT 1 FROM unnest(v_made) j WHERE v_running[j] < coalesce(v_running_max[j], it.running_max));
          END IF;
        END IF;

        IF v_laned THEN
          it.seq := coalesce(r.next_seq, 1);
          it.fresh := r.user_id IS NULL OR r.deleted;
          -- A conversation begins with its first turn. One that was deleted begins again: another owner, another root, places go on.
          it.root := coalesce(r.generation, gen_random_uuid());
          v_lanes := v_lanes + (NOT it.fresh)::int;
          v_fresh := v_fresh OR it.fresh;
        END IF;
        v_keyed := v_keyed OR it.key IS NOT NULL;
        -- A turn belongs to whom its conversation belongs to, also when an admin speaks in it.
        IF v_laned AND NOT it.fresh THEN
          it.usr := r.user_id;
        END IF;
        p_host_live := p_host_live + 1;
        IF v_start THEN
          it.state := 'running'; it.deadline := v_now + it.turn_ms; it.worker := r.worker; it.version := r.version;
          v_running[i] := v_running[i] + 1;
          o.kind := 'started';
          o.usr := it.usr; o.seq := it.seq; o.worker := r.worker; o.version := r.version; o.revision := coalesce(r.revision, 0);
          IF v_laned AND (it.mode = 'file' OR it.run IS NOT NULL) THEN
            o.generation := it.root;
            o.head := CASE WHEN it.fresh THEN it.root ELSE r.head_run END;
            IF NOT it.fresh THEN
              o.snapshot_worker := r.snapshot_worker; o.snapshot_version := r.snapshot_version; o.snapshot := r.snapshot;
            END IF;
          END IF;
        ELSE
          it.holder := NULL;
          o.kind := 'accepted';
          IF v_behind THEN
            it.state := 'waiting'; it.deadline := v_now + it.queue_ms;
            v_waiting[i] := v_waiting[i] + 1;
          ELSE
            it.state := 'ready'; it.deadline := v_now + CASE WHEN v_held THEN it.queue_ms ELSE it.admission_ms END;
            v_ready[i] := v_ready[i] + 1;
            IF v_held THEN
              it.not_before := 9007199254740991;
            ELSE
              v_made := v_made || i;
            END IF;
          END IF;
        END IF;
        o.deadline := it.deadline;
        v_new := v_new || it;
        RETURN NEXT o;
      END LOOP;
      CONTINUE WHEN cardinality(v_new) = 0;
      IF cardinality(v_made) > 0 THEN
        v_older := NULL;
      END IF;

      INSERT INTO turns (org_id, turn_id, agent_id, conversation_id, seq, run_id, private, user_id, dry_run, accepted_at, message,
                         first_epoch, started_at, worker, version)
      SELECT u.org, u.turn, u.agent, u.conv, u.seq, u.run, u.mode <> 'snapshot' OR u.run IS NULL, u.usr, u.dry, v_now,
             p_bodies[CASE WHEN u.state = 'waiting' AND u.parts IS NOT NULL THEN u.whole ELSE u.msg END],
             CASE WHEN u.state = 'running' THEN 1 END, CASE WHEN u.state = 'running' THEN v_now END, u.worker, u.version
        FROM unnest(v_new) u;
      IF v_lanes > 0 THEN
        UPDATE conversations g SET next_seq = u.seq + 1 FROM unnest(v_new) u
         WHERE NOT u.fresh AND g.org_id = u.org AND g.agent_id = u.agent AND g.conversation_id = u.conv AND g.next_seq = u.seq;
        GET DIAGNOSTICS n = ROW_COUNT;
        IF n < v_lanes THEN
          RAISE EXCEPTION 'a place of a conversation was given out twice' USING ERRCODE = 'integrity_constraint_violation';
        END IF;
      END IF;
      IF v_fresh THEN
        INSERT INTO conversations AS g (org_id, agent_id, conversation_id, user_id, created_at, next_seq, generation, head_run)
        SELECT u.org, u.agent, u.conv, u.usr, v_now, u.seq + 1, u.root, u.root FROM unnest(v_new) u WHERE u.fresh
        ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE
           SET user_id = excluded.user_id, created_at = excluded.created_at, deleted_at = NULL, next_seq = greatest(g.next_seq, excluded.next_seq);
      END IF;
      IF v_keyed THEN
        INSERT INTO idempotency_keys (org_id, agent_id, conversation_id, idem_key, turn_id, request_hash, created_at)
        SELECT u.org, u.agent, coalesce(u.conv, ''), u.key, u.turn, p_bodies[u.hash], v_now FROM unnest(v_new) u WHERE u.key IS NOT NULL;
      END IF;
      IF v_files THEN
        INSERT INTO attachment_refs (org_id, turn_id, digest, user_id, media_type)
        SELECT u.org, u.turn, decode(j ->> 'digest', 'hex'), u.usr, j ->> 'media_type' FROM unnest(v_new) u, jsonb_array_elements(u.files) j;
      END IF;
      INSERT INTO turn_markers (org_id, turn_id, agent_id, env_org, conversation_id, run_id, mode, seq, state, epoch, attempt, attempts_max, holder,
                                not_before, deadline_at, admission_ms, turn_ms, collected)
      SELECT u.org, u.turn, u.agent, u.env_org, u.conv, u.run, u.mode, u.seq, u.state, (u.state = 'running')::int, (u.state = 'running')::int,
             u.attempts_max, u.holder, coalesce(u.not_before, v_now), u.deadline, u.admission_ms, u.turn_ms,
             CASE WHEN u.state = 'waiting' AND u.parts IS NOT NULL THEN u.parts ELSE 0 END FROM unnest(v_new) u;

    ELSE
      RAISE EXCEPTION 'a batch holds an unknown item %', it.kind;
    END IF;
  END LOOP;

  UPDATE org_load g SET waiting = u.waiting, ready = u.ready, running = u.running, tokens = u.tokens, tokens_at = u.tokens_at,
         cpu_ms = u.cpu_ms, cpu_hour = u.cpu_hour
    FROM unnest(v_org, v_waiting, v_ready, v_running, v_tokens, v_tokens_at, v_cpu, v_cpu_hour)
      AS u (org_id, waiting, ready, running, tokens, tokens_at, cpu_ms, cpu_hour)
   WHERE g.org_id = u.org_id AND (g.waiting, g.ready, g.running, g.tokens, g.tokens_at, g.cpu_ms, g.cpu_hour)
         IS DISTINCT FROM (u.waiting, u.ready, u.running, u.tokens, u.tokens_at, u.cpu_ms, u.cpu_hour);
END $$;
