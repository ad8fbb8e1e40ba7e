-- What is done now and then to a whole conversation, and what keeps hosts of two versions on one database. As on the hot path: one call, which
-- commits by itself, under the org's row of org_load.

-- A program refuses a database only when it knows no migration as new as this. A migration that only adds leaves the number alone, so that hosts of the
-- version before go on beside it; one that takes away what they use sets it to its own number, and is rolled out a version later.
CREATE TABLE schema_compat (
  one              boolean PRIMARY KEY DEFAULT true CHECK (one),
  oldest_supported bigint NOT NULL
);
INSERT INTO schema_compat (oldest_supported) VALUES (3);

-- Makes a conversation; false: it is there. One that was deleted begins again: another owner, the root that the deletion gave it, places go on.
CREATE FUNCTION open_conversation(p_now bigint, p_org text, p_agent text, p_conversation text, p_user text, p_generation uuid,
                                  p_rate float8, p_burst int, p_storage_max bigint,
                                  OUT made boolean, OUT refusal text, OUT limit_max float8, OUT wait_ms bigint)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  l org_load;
  v_now bigint; v_rate float8; v_burst float8; v_have float8;
BEGIN
  SELECT g.* INTO l FROM org_load g WHERE g.org_id = p_org FOR NO KEY UPDATE;
  v_now := coalesce(p_now, turnhouse_now());
  made := false;
  PERFORM 1 FROM conversations
    WHERE org_id = p_org AND agent_id = p_agent AND conversation_id = p_conversation AND deleted_at IS NULL;
  IF FOUND THEN
    RETURN;
  END IF;
  -- As for a message (write_batch), but for what runs nothing.
  limit_max := coalesce(l.storage_bytes_max, p_storage_max);
  IF limit_max > 0 AND l.storage_bytes >= limit_max THEN
    refusal := 'storage_bytes_max';
    wait_ms := 60000;
    RETURN;
  END IF;
  v_rate := coalesce(l.submits_per_second, p_rate);
  IF v_rate > 0 THEN
    v_burst := greatest(1, coalesce(nullif(coalesce(l.submit_burst, p_burst), 0), ceil(v_rate)));
    v_have := least(v_burst, coalesce(l.tokens + greatest(0, v_now - l.tokens_at)::float8 * v_rate / 1000, v_burst));
    IF v_have < 1 THEN
      refusal := 'submits_per_second';
      limit_max := v_rate;
      wait_ms := least(1e15, ceil((1 - v_have) * 1000 / v_rate));
      RETURN;
    END IF;
    UPDATE org_load SET tokens = v_have - 1, tokens_at = v_now WHERE org_id = p_org;
  END IF;
  INSERT INTO conversations (org_id, agent_id, conversation_id, user_id, created_at, next_seq, generation, head_run)
  VALUES (p_org, p_agent, p_conversation, p_user, v_now, 1, p_generation, p_generation)
  ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE
     SET user_id = excluded.user_id, created_at = excluded.created_at, deleted_at = NULL;
  made := true;
END $$;

-- Ends a conversation's live turns and deletes all that it had, if it is there and is p_whose; null: whosever it is. Its row stays, with another root: what was
-- staged on the old chain fits nowhere any more. The first row, which has no turn, says that it was there.
CREATE FUNCTION delete_conversation(p_now bigint, p_org text, p_agent text, p_conversation text, p_whose text, p_generation uuid)
RETURNS TABLE (turn uuid, was text, accepted bigint, ended bigint) LANGUAGE plpgsql AS $$
DECLARE
  v_now bigint;
  v_waiting int := 0; v_ready int := 0; v_running int := 0;
  v_ends item[];
  v_user text;
  e record;
BEGIN
  PERFORM 1 FROM org_load l WHERE l.org_id = p_org FOR NO KEY UPDATE;
  v_now := coalesce(p_now, turnhouse_now());
  -- Also those without a place: its owner's turn that named this conversation is part of what is deleted. Another's is not: it never was in this
  -- conversation, whose owner cannot see it. All at once, so that nobody becomes ready.
  SELECT c.user_id INTO v_user FROM conversations c
   WHERE c.org_id = p_org AND c.agent_id = p_agent AND c.conversation_id = p_conversation AND c.deleted_at IS NULL AND (p_whose IS NULL OR c.user_id = p_whose);
  IF NOT FOUND THEN
    RETURN;
  END IF;
  RETURN NEXT;
  v_ends := ARRAY(SELECT jsonb_populate_record(NULL::item, jsonb_build_object('org', p_org, 'turn', t.turn_id, 'outcome', 'cancelled', 'cancelled_by', 'deleted'))
                    FROM turns t JOIN turn_markers k ON k.org_id = t.org_id AND k.turn_id = t.turn_id
                   WHERE t.org_id = p_org AND t.agent_id = p_agent AND t.conversation_id = p_conversation AND (t.seq IS NOT NULL OR t.user_id = v_user));
  FOR e IN SELECT * FROM end_turns(v_now, v_ends, '{}', false, true) LOOP
    v_waiting := v_waiting + (e.was = 'waiting')::int;
    v_ready := v_ready + (e.was = 'ready')::int;
    v_running := v_running + (e.was = 'running')::int;
    turn := e.turn; was := e.was; accepted := e.accepted_at; ended := v_now;
    RETURN NEXT;
  END LOOP;
  IF v_waiting + v_ready + v_running < cardinality(v_ends) THEN
    RAISE EXCEPTION 'a live turn could not be ended' USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  DELETE FROM turn_events v USING turns t
   WHERE t.org_id = p_org AND t.agent_id = p_agent AND t.conversation_id = p_conversation AND (t.seq IS NOT NULL OR t.user_id = v_user) AND v.org_id = p_org AND v.turn_id = t.turn_id;
  -- Files go with the last turn that refers to them: whoever uploaded one for a turn of this conversation has it no longer.
  DELETE FROM attachment_uploads u USING attachment_refs r, turns t
   WHERE t.org_id = p_org AND t.agent_id = p_agent AND t.conversation_id = p_conversation AND (t.seq IS NOT NULL OR t.user_id = v_user) AND r.org_id = p_org AND r.turn_id = t.turn_id
     AND u.org_id = p_org AND u.digest = r.digest AND u.user_id = r.user_id;
  DELETE FROM attachment_refs r USING turns t
   WHERE t.org_id = p_org AND t.agent_id = p_agent AND t.conversation_id = p_conversation AND (t.seq IS NOT NULL OR t.user_id = v_user) AND r.org_id = p_org AND r.turn_id = t.turn_id;
  DELETE FROM turns t WHERE t.org_id = p_org AND t.agent_id = p_agent AND t.conversation_id = p_conversation AND (t.seq IS NOT NULL OR t.user_id = v_user);
  DELETE FROM snapshots s WHERE s.org_id = p_org AND s.agent_id = p_agent AND s.conversation_id = p_conversation;
  DELETE FROM idempotency_keys k WHERE k.org_id = p_org AND k.agent_id = p_agent AND k.conversation_id = p_conversation
     AND NOT EXISTS (SELECT 1 FROM turns t WHERE t.org_id = p_org AND t.turn_id = k.turn_id);
  UPDATE conversations c SET generation = p_generation, head_run = p_generation, kept_runs = '{}', deleted_at = v_now
   WHERE c.org_id = p_org AND c.agent_id = p_agent AND c.conversation_id = p_conversation;
  UPDATE org_load l SET waiting = waiting - v_waiting, ready = ready - v_ready, running = running - v_running
   WHERE l.org_id = p_org AND v_waiting + v_ready + v_running > 0;
END $$;

-- Starts a conversation's chain of snapshots anew, if it is there and is p_whose; its turns stay.
CREATE FUNCTION reset_snapshot(p_org text, p_agent text, p_conversation text, p_whose text, p_generation uuid) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  PERFORM 1 FROM org_load WHERE org_id = p_org FOR NO KEY UPDATE;
  UPDATE conversations SET generation = p_generation, head_run = p_generation, kept_runs = '{}'
   WHERE org_id = p_org AND agent_id = p_agent AND conversation_id = p_conversation AND deleted_at IS NULL AND (p_whose IS NULL OR user_id = p_whose);
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  DELETE FROM snapshots WHERE org_id = p_org AND agent_id = p_agent AND conversation_id = p_conversation;
  RETURN true;
END $$;

-- Makes the next turn of a lane ready that somebody left without an active one. Looks again, under the lock.
CREATE FUNCTION repair_lane(p_now bigint, p_org text, p_agent text, p_conversation text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  v_limited boolean;
BEGIN
  PERFORM 1 FROM org_load WHERE org_id = p_org FOR NO KEY UPDATE;
  v_limited := EXISTS (SELECT 1 FROM agent_load WHERE org_id = p_org AND agent_id = p_agent);
  PERFORM 1 FROM turn_markers
    WHERE org_id = p_org AND agent_id = p_agent AND conversation_id = p_conversation AND state IN ('ready', 'running') AND seq IS NOT NULL;
  IF FOUND OR NOT promote(coalesce(p_now, turnhouse_now()), p_org, p_agent, p_conversation, v_limited) THEN
    RETURN false;
  END IF;
  PERFORM release_held(coalesce(p_now, turnhouse_now()), p_org, p_agent);
  UPDATE org_load SET waiting = waiting - 1, ready = ready + 1 WHERE org_id = p_org;
  RETURN true;
END $$;
