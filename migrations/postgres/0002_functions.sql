-- The hot path: one call writes a whole batch and commits by itself. The same steps, in the same order, as the embedded store makes them, against
-- which one conformance suite holds both.
--
-- Inside a function every statement sees what is committed when it begins, so whatever is read after the lock on org_load is true until the end.
-- A function is never changed in its meaning: hosts of two versions may call it at once. A new meaning gets a new name.

-- What became of an item; several rows an item where it claimed or ended several turns. `kind` says which columns are filled.
CREATE TYPE written AS (
  ord int, kind text,
  org text, turn uuid, agent text, usr text,
  env_org text, conversation text, run uuid, mode text, seq bigint,
  epoch int, first_epoch int, attempt int, restarted boolean, refusal text, refusals int,
  worker text, version int, revision bigint,
  dry_run boolean, accepted_at bigint, at bigint, deadline bigint,
  generation uuid, head uuid, snapshot_worker text, snapshot_version int, snapshot bytea, message bytea,
  was text, promoted boolean
);

-- Makes the next turn of a lane ready that has no active one; its admission clock begins anew. Does not touch org_load: its caller does.
CREATE FUNCTION promote(p_now bigint, p_org text, p_agent text, p_conversation text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  UPDATE turn_markers SET state = 'ready', not_before = p_now, deadline_at = p_now + admission_ms
   WHERE org_id = p_org AND agent_id = p_agent AND conversation_id = p_conversation AND state = 'waiting'
     AND seq = (SELECT min(w.seq) FROM turn_markers w
                 WHERE w.org_id = p_org AND w.agent_id = p_agent AND w.conversation_id = p_conversation AND w.state = 'waiting');
  RETURN FOUND;
END $$;

-- The one way in which a turn ends. Whoever deletes the marker has ended the turn, and everything else of the end stands in the same transaction. No
-- other function deletes markers. Does not touch org_load: its caller does, by `was` and `promoted`. A reply comes only from an instance, and only a
-- running turn has one.
CREATE FUNCTION end_turn(
  p_now bigint, p_org text, p_turn uuid, p_epoch int, p_outcome text, p_reply bytea, p_replaces boolean, p_failure text, p_cancelled_by text,
  p_cpu_ms float8, p_wall_ms float8, p_memory bigint, p_host_calls bigint, p_bytes_in bigint, p_bytes_out bigint, p_instance_ms float8,
  p_tail_seq bigint, p_tail bytea, p_look_for_next boolean,
  OUT result text, OUT agent_id text, OUT was text, OUT accepted_at bigint, OUT attempt int, OUT promoted boolean
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  m record;
BEGIN
  promoted := false;
  DELETE FROM turn_markers
   WHERE org_id = p_org AND turn_id = p_turn AND (p_epoch IS NULL OR epoch = p_epoch)
     AND (p_outcome <> 'completed' OR (state = 'running' AND p_epoch IS NOT NULL))
  RETURNING agent_id AS agent, conversation_id AS conversation, seq, state, epoch, attempt AS attempts INTO m;
  IF NOT FOUND THEN
    result := 'lost';
    RETURN;
  END IF;
  result := 'won';
  agent_id := m.agent;
  was := m.state;
  attempt := m.attempts;
  -- A longer tail goes to the log, so that a turn's row stays a row.
  IF length(p_tail) > 16384 THEN
    INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body) VALUES (p_org, p_turn, m.epoch, p_tail_seq, p_tail) ON CONFLICT DO NOTHING;
    p_tail := NULL;
    p_tail_seq := NULL;
  END IF;
  UPDATE turns t SET outcome = p_outcome, ended_at = p_now, end_epoch = m.epoch, attempts = m.attempts, reply = p_reply, replaces_deltas = p_replaces,
         failure = p_failure, cancelled_by = p_cancelled_by, cpu_ms = p_cpu_ms, wall_ms = p_wall_ms, memory_peak_bytes = p_memory,
         host_calls = p_host_calls, bytes_in = p_bytes_in, bytes_out = p_bytes_out, instance_ms = p_instance_ms, tail_seq = p_tail_seq, tail = p_tail
   WHERE t.org_id = p_org AND t.turn_id = p_turn AND t.outcome IS NULL
  RETURNING t.accepted_at INTO accepted_at;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'turn % had a marker and no open row', p_turn USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  -- Mostly nobody waits, and then there is nobody to look for.
  IF p_look_for_next AND m.seq IS NOT NULL AND m.state <> 'waiting' THEN
    promoted := promote(p_now, p_org, m.agent, m.conversation);
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
-- this host's claims served last.
CREATE FUNCTION write_batch(p_now bigint, p_orgs text[], p_items jsonb, p_bodies bytea[], p_snapshots_kept int, p_host_live bigint, p_cursor text)
RETURNS SETOF written LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
SET plan_cache_mode = force_generic_plan SET jit = off AS $$
#variable_conflict use_column
DECLARE
  v_now bigint;
  v_claims int := 0;                    -- slots that claims of this batch would fill
  -- The orgs that are locked, sorted, and their live turns by state.
  v_org text[] := '{}'; v_waiting int[] := '{}'; v_ready int[] := '{}'; v_running int[] := '{}';
  v_lock text[] := p_orgs;
  v_round text[] := '{}';               -- orgs whose turn it is to be served, in order
  v_first text; v_bound bigint;
  v_older boolean;                      -- whether something older is ready for a slot; NULL: to be looked up
  v_holder uuid; v_may boolean;         -- the holder that was asked about last
  it record; l record; lane record; e record; a record; c record; x record;
  o written;
  i int; n int; k int;
  v_text text; v_turn uuid; v_conv text; v_laned boolean; v_live int; v_active uuid; v_interrupt boolean; v_behind boolean; v_user text;
  v_seq bigint; v_start boolean; v_state text; v_deadline bigint; v_generation uuid; v_head uuid; v_refused boolean; v_count int;
  v_kept uuid[];
BEGIN
  SELECT coalesce(sum((j->>'slots')::int), 0), coalesce(max((j->>'running_max')::bigint), 0) INTO v_claims, v_bound
    FROM jsonb_array_elements(p_items) j WHERE j->>'kind' = 'claim';
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
         AND EXISTS (SELECT 1 FROM org_load g WHERE g.org_id = v_text AND g.running < v_bound)
      THEN
        v_round := v_round || v_text;
      END IF;
    END LOOP;
    v_lock := v_lock || v_round || ARRAY(
      SELECT m.org_id FROM replicas d JOIN turn_markers m ON m.holder = d.replica_id AND m.state = 'running'
       WHERE d.expires_at <= v_now AND m.attempt < m.attempts_max AND NOT m.effects AND m.deadline_at > v_now AND m.epoch < 1000000 LIMIT v_claims);
  END IF;

  FOR l IN SELECT g.org_id, g.waiting, g.ready, g.running FROM org_load g WHERE g.org_id = ANY (v_lock) ORDER BY g.org_id FOR NO KEY UPDATE LOOP
    v_org := v_org || l.org_id; v_waiting := v_waiting || l.waiting; v_ready := v_ready || l.ready; v_running := v_running || l.running;
  END LOOP;
  v_now := coalesce(p_now, turnhouse_now());

  FOR it IN SELECT * FROM ROWS FROM (jsonb_to_recordset(p_items) AS (
      kind text, org text, turn uuid, epoch int, agent text,
      run uuid, env_org text, conv text, mode text, usr text, sees_all boolean, dry boolean, key text, hash int, msg int, on_busy text,
      conv_max bigint, org_max bigint, host_max bigint, admission_ms bigint, queue_ms bigint, turn_ms bigint, attempts_max int, holder uuid, running_max bigint,
      slots int, backoff_ms bigint, backoff_ms_max bigint,
      first_seq bigint, body int, effect boolean, delay_ms bigint,
      outcome text, reply int, replaces boolean, failure text, cancelled_by text, cpu_ms float8, wall_ms float8, memory bigint, calls bigint,
      bytes_in bigint, bytes_out bigint, instance_ms float8,
      parent uuid, permit_run uuid, permit_conv text, permit_org text, snapshot int)) WITH ORDINALITY
  LOOP
    o := NULL;
    o.ord := it.ordinality;
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
        o.ord := it.ordinality;
        RETURN NEXT o;
        n := n + 1;
      END LOOP;
      -- One an org and round, so that nobody's backlog delays another's single turn beyond its share.
      v_lock := v_round;
      WHILE n < it.slots AND cardinality(v_lock) > 0 LOOP
        v_text := v_lock[1];
        v_lock := v_lock[2:];
        i := array_position(v_org, v_text);
        CONTINUE WHEN i IS NULL OR v_running[i] >= it.running_max;
        SELECT m.turn_id INTO v_turn FROM turn_markers m
         WHERE m.org_id = v_text AND m.state = 'ready' AND m.not_before <= v_now AND m.deadline_at > v_now AND m.epoch < 1000000
         ORDER BY m.not_before, m.turn_id LIMIT 1;
        CONTINUE WHEN NOT FOUND;
        o := start_turn(v_now, v_text, v_turn, it.holder, it.backoff_ms, it.backoff_ms_max);
        o.ord := it.ordinality;
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

    i := array_position(v_org, it.org);
    IF i IS NULL THEN
      RAISE EXCEPTION 'there is no org %', it.org USING ERRCODE = 'integrity_constraint_violation';
    END IF;

    IF it.kind = 'append' THEN
      -- The fence: only the owner of a running marker says anything.
      IF it.effect THEN
        UPDATE turn_markers SET effects = true WHERE org_id = it.org AND turn_id = it.turn AND epoch = it.epoch AND state = 'running';
      ELSE
        PERFORM 1 FROM turn_markers WHERE org_id = it.org AND turn_id = it.turn AND epoch = it.epoch AND state = 'running';
      END IF;
      o.kind := 'stale';
      IF FOUND THEN
        o.kind := 'done';
        IF it.body IS NOT NULL THEN
          -- The journal's own retry finds its row.
          INSERT INTO turn_events (org_id, turn_id, epoch, first_seq, body) VALUES (it.org, it.turn, it.epoch, it.first_seq, p_bodies[it.body])
          ON CONFLICT DO NOTHING;
        END IF;
      END IF;
      RETURN NEXT o;

    ELSIF it.kind = 'requeue' THEN
      -- The admission clock begins anew and outlasts the delay. Epoch + 1: the old owner's lease is worth nothing from here.
      UPDATE turn_markers SET state = 'ready', holder = NULL, epoch = epoch + 1, attempt = attempt - 1,
             not_before = v_now + it.delay_ms, deadline_at = v_now + greatest(admission_ms, it.delay_ms + 1)
       WHERE org_id = it.org AND turn_id = it.turn AND epoch = it.epoch AND state = 'running';
      o.kind := 'stale';
      IF FOUND THEN
        o.kind := 'done';
        v_running[i] := v_running[i] - 1;
        v_ready[i] := v_ready[i] + 1;
        v_older := NULL;
      END IF;
      RETURN NEXT o;

    ELSIF it.kind = 'commit' THEN
      v_refused := false;
      IF it.snapshot IS NOT NULL THEN
        -- The permit and the head are tested against what stands now, before anything is ended.
        v_refused := true;
        SELECT m.agent_id, m.conversation_id, m.run_id, t.worker, t.version, g.head_run, g.generation, g.kept_runs INTO c
          FROM turn_markers m
          JOIN turns t ON t.org_id = m.org_id AND t.turn_id = m.turn_id
          JOIN conversations g ON g.org_id = m.org_id AND g.agent_id = m.agent_id AND g.conversation_id = m.conversation_id
         WHERE m.org_id = it.org AND m.turn_id = it.turn AND m.mode = 'snapshot' AND m.seq IS NOT NULL AND m.run_id IS NOT NULL
           AND m.run_id = it.permit_run AND m.org_id = it.permit_org AND m.conversation_id = it.permit_conv AND it.outcome = 'completed'
           AND t.worker IS NOT NULL;
        IF FOUND AND c.head_run = it.parent AND c.run_id <> c.head_run AND c.run_id <> c.generation THEN
          PERFORM 1 FROM snapshots WHERE org_id = it.org AND run_id = c.run_id AND agent_id = c.agent_id AND conversation_id = c.conversation_id;
          v_refused := FOUND;
        END IF;
        IF v_refused THEN
          -- Lost comes before conflict.
          PERFORM 1 FROM turn_markers WHERE org_id = it.org AND turn_id = it.turn AND epoch = it.epoch AND state = 'running';
          o.kind := CASE WHEN FOUND THEN 'conflict' ELSE 'lost' END;
          RETURN NEXT o;
          CONTINUE;
        END IF;
      END IF;
      e := end_turn(v_now, it.org, it.turn, it.epoch, it.outcome, p_bodies[it.reply], it.replaces, it.failure, it.cancelled_by, it.cpu_ms, it.wall_ms, it.memory,
                    it.calls, it.bytes_in, it.bytes_out, it.instance_ms, it.first_seq, p_bodies[it.body], v_waiting[i] > 0);
      o.kind := e.result;
      IF e.result = 'won' THEN
        o.agent := e.agent_id; o.was := e.was; o.accepted_at := e.accepted_at; o.attempt := e.attempt; o.promoted := e.promoted;
        IF it.snapshot IS NOT NULL THEN
          INSERT INTO snapshots (org_id, agent_id, conversation_id, run_id, parent_run, turn_id, worker, version, at, body)
          VALUES (it.org, c.agent_id, c.conversation_id, c.run_id, c.head_run, it.turn, c.worker, c.version, v_now, p_bodies[it.snapshot]);
          v_kept := c.kept_runs || c.run_id;
          -- More than one when the bound was lowered since. The rows stay: they are links of the chain.
          WHILE cardinality(v_kept) > p_snapshots_kept LOOP
            UPDATE snapshots SET body = NULL WHERE org_id = it.org AND run_id = v_kept[1] AND agent_id = c.agent_id AND conversation_id = c.conversation_id;
            v_kept := v_kept[2:];
          END LOOP;
          UPDATE conversations SET head_run = c.run_id, kept_runs = v_kept
           WHERE org_id = it.org AND agent_id = c.agent_id AND conversation_id = c.conversation_id;
        END IF;
        IF e.was = 'waiting' THEN
          v_waiting[i] := v_waiting[i] - 1;
        ELSIF e.was = 'ready' THEN
          v_ready[i] := v_ready[i] - 1;
        ELSE
          v_running[i] := v_running[i] - 1;
          v_older := NULL;
        END IF;
        IF e.promoted THEN
          v_waiting[i] := v_waiting[i] - 1;
          v_ready[i] := v_ready[i] + 1;
          v_older := NULL;
        END IF;
        p_host_live := p_host_live - 1;
      END IF;
      RETURN NEXT o;

    ELSIF it.kind = 'accept' THEN
      v_conv := it.conv;
      v_laned := v_conv IS NOT NULL AND it.env_org IS NOT NULL;       -- only such an envelope has a place in a conversation
      SELECT g.user_id, g.generation, g.head_run, g.next_seq, g.deleted_at IS NOT NULL AS deleted INTO lane
        FROM conversations g WHERE g.org_id = it.org AND g.agent_id = it.agent AND g.conversation_id = v_conv;
      -- A turn belongs to whom its conversation belongs to, also when an admin speaks in it.
      v_user := CASE WHEN v_laned AND lane.user_id IS NOT NULL AND NOT lane.deleted THEN lane.user_id ELSE it.usr END;
      v_live := 0;
      v_active := NULL;
      IF v_laned AND lane.user_id IS NOT NULL AND v_waiting[i] + v_ready[i] + v_running[i] > 0 THEN
        SELECT m.turn_id INTO v_active FROM turn_markers m
         WHERE m.org_id = it.org AND m.agent_id = it.agent AND m.conversation_id = v_conv AND m.state IN ('ready', 'running') AND m.seq IS NOT NULL;
        IF FOUND THEN
          v_live := 1;
        END IF;
        IF v_waiting[i] > 0 THEN
          SELECT count(*)::int, (array_agg(m.turn_id ORDER BY m.seq))[1] INTO v_count, v_turn FROM turn_markers m
           WHERE m.org_id = it.org AND m.agent_id = it.agent AND m.conversation_id = v_conv AND m.state = 'waiting';
          v_live := v_live + v_count;
          v_active := coalesce(v_active, v_turn);
        END IF;
      END IF;
      -- The order of these checks is the contract: whose it is, then the key, then busy, then room.
      v_text := NULL;
      o.turn := NULL;
      IF lane.user_id IS NOT NULL AND NOT lane.deleted AND lane.user_id <> it.usr AND NOT it.sees_all THEN
        v_text := 'not_found';
      ELSIF it.key IS NOT NULL THEN
        SELECT q.turn_id, q.request_hash = p_bodies[it.hash] AS same INTO x FROM idempotency_keys q
         WHERE q.org_id = it.org AND q.agent_id = it.agent AND q.conversation_id = coalesce(v_conv, '') AND q.idem_key = it.key;
        IF FOUND THEN
          IF x.same THEN
            o.kind := 'attached';
            o.turn := x.turn_id;
            RETURN NEXT o;
            CONTINUE;
          END IF;
          v_text := 'idempotency_mismatch';
        END IF;
      END IF;
      v_interrupt := it.on_busy = 'interrupt' AND v_active IS NOT NULL;
      IF v_text IS NULL THEN
        n := CASE WHEN v_interrupt THEN v_live ELSE 0 END;            -- an interrupt makes room for itself
        IF it.on_busy = 'reject' AND v_active IS NOT NULL THEN
          v_text := 'conversation_busy';
          o.turn := v_active;
        ELSIF v_live - n > it.conv_max THEN
          v_text := 'conversation_queue_full';
        ELSIF greatest(0, v_waiting[i] + v_ready[i] + v_running[i] - n) >= it.org_max THEN
          v_text := 'org_queue_full';
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
      IF v_interrupt THEN
        -- The journal's own retry must not interrupt itself.
        PERFORM 1 FROM turns WHERE org_id = it.org AND turn_id = it.turn;
        IF FOUND THEN
          o.kind := 'attached';
          o.turn := it.turn;
          RETURN NEXT o;
          CONTINUE;
        END IF;
        -- Those that wait first, so that ending them one by one makes none of them ready.
        FOR x IN SELECT m.turn_id FROM turn_markers m
                  WHERE m.org_id = it.org AND m.agent_id = it.agent AND m.conversation_id = v_conv AND m.seq IS NOT NULL
                  ORDER BY m.state = 'waiting' DESC, m.seq
        LOOP
          e := end_turn(v_now, it.org, x.turn_id, NULL, 'cancelled', NULL, NULL, NULL, 'interrupt', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, false);
          o.kind := 'ended'; o.turn := x.turn_id; o.agent := e.agent_id; o.was := e.was; o.accepted_at := e.accepted_at; o.promoted := false;
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
        o.ord := it.ordinality;
        o.at := v_now;
      END IF;
      v_behind := v_live > 0 AND NOT v_interrupt;
      v_seq := CASE WHEN v_laned THEN coalesce(lane.next_seq, 1) END;
      v_refused := it.mode = 'snapshot' AND it.run IS NOT NULL AND (it.env_org IS NULL OR v_conv IS NULL);

      -- Started in this very write, if its lane is empty, its org under its bound and nothing older ready.
      v_start := false;
      IF it.holder IS NOT NULL AND NOT v_behind AND NOT v_refused AND v_running[i] < it.running_max THEN
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
              SELECT g.running INTO v_count FROM org_load g WHERE g.org_id = v_text;
            ELSE
              v_count := v_running[k];
            END IF;
            IF v_count < it.running_max THEN
              v_older := EXISTS (SELECT 1 FROM turn_markers m WHERE m.org_id = v_text AND m.state = 'ready' AND m.not_before <= v_now
                                    AND m.deadline_at > v_now AND m.epoch < 1000000);
            END IF;
            n := n + 1;
            v_older := v_older OR n >= 64;                            -- so many orgs wait: then this one does, too
          END LOOP;
        END IF;
        v_start := v_may AND NOT v_older;
      END IF;
      SELECT g.worker, g.version, g.revision INTO a FROM agents g WHERE v_start AND g.org_id = it.org AND g.agent_id = it.agent;
      v_state := CASE WHEN v_start THEN 'running' WHEN v_behind THEN 'waiting' ELSE 'ready' END;
      v_deadline := v_now + CASE v_state WHEN 'waiting' THEN it.queue_ms WHEN 'ready' THEN it.admission_ms ELSE it.turn_ms END;
      k := v_start::int;
      INSERT INTO turns (org_id, turn_id, agent_id, conversation_id, seq, run_id, private, user_id, dry_run, accepted_at, message,
                         first_epoch, started_at, worker, version)
      VALUES (it.org, it.turn, it.agent, v_conv, v_seq, it.run, it.mode <> 'snapshot' OR it.run IS NULL, v_user, it.dry, v_now,
              p_bodies[it.msg], CASE WHEN v_start THEN 1 END, CASE WHEN v_start THEN v_now END, a.worker, a.version)
      ON CONFLICT (org_id, turn_id) DO NOTHING;
      IF NOT FOUND THEN
        -- It was accepted before, and this is the journal's own retry.
        o.kind := 'attached';
        o.turn := it.turn;
        RETURN NEXT o;
        CONTINUE;
      END IF;
      IF v_laned THEN
        IF lane.user_id IS NOT NULL AND NOT lane.deleted THEN
          UPDATE conversations SET next_seq = v_seq + 1 WHERE org_id = it.org AND agent_id = it.agent AND conversation_id = v_conv AND next_seq = v_seq;
          IF NOT FOUND THEN
            RAISE EXCEPTION 'place % of a conversation was given out twice', v_seq USING ERRCODE = 'integrity_constraint_violation';
          END IF;
          v_generation := lane.generation;
          v_head := lane.head_run;
        ELSE
          -- A conversation begins with its first turn. One that was deleted begins again: another owner, another root, places go on.
          v_generation := coalesce(lane.generation, gen_random_uuid());
          v_head := v_generation;
          INSERT INTO conversations AS g (org_id, agent_id, conversation_id, user_id, created_at, next_seq, generation, head_run)
          VALUES (it.org, it.agent, v_conv, it.usr, v_now, v_seq + 1, v_generation, v_generation)
          ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE
             SET user_id = excluded.user_id, created_at = excluded.created_at, deleted_at = NULL, next_seq = greatest(g.next_seq, excluded.next_seq);
        END IF;
      END IF;
      IF it.key IS NOT NULL THEN
        INSERT INTO idempotency_keys (org_id, agent_id, conversation_id, idem_key, turn_id, request_hash, created_at)
        VALUES (it.org, it.agent, coalesce(v_conv, ''), it.key, it.turn, p_bodies[it.hash], v_now);
      END IF;
      INSERT INTO turn_markers (org_id, turn_id, agent_id, env_org, conversation_id, run_id, mode, seq, state, epoch, attempt, attempts_max, holder,
                                not_before, deadline_at, admission_ms, turn_ms)
      VALUES (it.org, it.turn, it.agent, it.env_org, v_conv, it.run, it.mode, v_seq, v_state, k, k, it.attempts_max, CASE WHEN v_start THEN it.holder END,
              v_now, v_deadline, it.admission_ms, it.turn_ms);
      p_host_live := p_host_live + 1;
      o.kind := 'accepted';
      o.deadline := v_deadline;
      IF v_start THEN
        v_running[i] := v_running[i] + 1;
        o.kind := 'started';
        o.usr := v_user; o.seq := v_seq; o.worker := a.worker; o.version := a.version; o.revision := coalesce(a.revision, 0);
        IF v_laned AND (it.mode = 'file' OR it.run IS NOT NULL) THEN
          o.generation := v_generation;
          o.head := v_head;
          IF it.mode = 'snapshot' AND v_head <> v_generation THEN
            SELECT s.worker, s.version, s.body INTO o.snapshot_worker, o.snapshot_version, o.snapshot FROM snapshots s
             WHERE s.org_id = it.org AND s.run_id = v_head AND s.agent_id = it.agent AND s.conversation_id = v_conv;
          END IF;
        END IF;
      ELSIF v_behind THEN
        v_waiting[i] := v_waiting[i] + 1;
      ELSE
        v_ready[i] := v_ready[i] + 1;
        v_older := NULL;
      END IF;
      RETURN NEXT o;

    ELSE
      RAISE EXCEPTION 'a batch holds an unknown item %', it.kind;
    END IF;
  END LOOP;

  UPDATE org_load g SET waiting = u.waiting, ready = u.ready, running = u.running
    FROM unnest(v_org, v_waiting, v_ready, v_running) AS u (org_id, waiting, ready, running)
   WHERE g.org_id = u.org_id AND (g.waiting, g.ready, g.running) IS DISTINCT FROM (u.waiting, u.ready, u.running);
END $$;
