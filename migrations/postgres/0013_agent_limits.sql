-- Bounds that an agent's own settings put on its turns, within its org's, and what it has used of them. A row only of an agent that has any: how many of an
-- org have is in the row that every write of the org locks, so that nobody else pays for it.
CREATE TABLE agent_load (
  org_id             text COLLATE "C" NOT NULL,
  agent_id           text COLLATE "C" NOT NULL,
  submits_per_second float8 CHECK (submits_per_second >= 0),               -- NULL: no bound but the org's
  submit_burst       int    CHECK (submit_burst >= 0),
  running_max        int    CHECK (running_max > 0),
  queue_max          int    CHECK (queue_max >= 0),
  cpu_ms_per_hour    bigint CHECK (cpu_ms_per_hour >= 0),
  storage_bytes_max  bigint CHECK (storage_bytes_max >= 0),
  tokens             float8 CHECK (tokens >= 0),                           -- as in org_load
  tokens_at          bigint,
  cpu_ms             float8 NOT NULL DEFAULT 0 CHECK (cpu_ms >= 0),
  cpu_hour           bigint NOT NULL DEFAULT 0,
  storage_bytes      bigint NOT NULL DEFAULT 0,                            -- as last measured
  live               int    NOT NULL CHECK (live >= 0),
  active             int    NOT NULL CHECK (active >= 0),                  -- of these: running, or ready and not held
  PRIMARY KEY (org_id, agent_id),
  CHECK ((tokens IS NULL) = (tokens_at IS NULL))
) WITH (fillfactor = 50);
ALTER TABLE org_load ADD COLUMN limited_agents int NOT NULL DEFAULT 0 CHECK (limited_agents >= 0);

-- What an org may take of the disk, and what it took when it was last measured: in the background, since no write can tell what all that is stored comes to.
ALTER TABLE org_load
  ADD COLUMN storage_bytes_max bigint CHECK (storage_bytes_max >= 0),
  ADD COLUMN storage_bytes     bigint NOT NULL DEFAULT 0,
  ADD COLUMN storage_at        bigint NOT NULL DEFAULT 0;

-- The next of an agent that is held.
CREATE INDEX markers_held ON turn_markers (org_id, agent_id, turn_id) WHERE state = 'ready' AND not_before = 9007199254740991;

-- Sets an agent's bounds; none at all: it has no row. From here on: what runs goes on, and what was held starts where there is room now. False: nothing was
-- there, and nothing is.
CREATE FUNCTION limit_agent(p_now bigint, p_org text, p_agent text, p_rate float8, p_burst int, p_running_max int, p_queue_max int, p_cpu_max bigint,
                            p_storage_max bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  v_limited boolean := p_rate IS NOT NULL OR p_burst IS NOT NULL OR p_running_max IS NOT NULL OR p_queue_max IS NOT NULL OR p_cpu_max IS NOT NULL
                       OR p_storage_max IS NOT NULL;
  v_known boolean;
BEGIN
  PERFORM 1 FROM org_load WHERE org_id = p_org FOR NO KEY UPDATE;
  UPDATE agent_load SET submits_per_second = p_rate, submit_burst = p_burst, running_max = p_running_max, queue_max = p_queue_max,
         cpu_ms_per_hour = p_cpu_max, storage_bytes_max = p_storage_max
   WHERE org_id = p_org AND agent_id = p_agent;
  v_known := FOUND;
  IF NOT v_known AND NOT v_limited THEN
    RETURN false;
  END IF;
  IF NOT v_known THEN
    INSERT INTO agent_load (org_id, agent_id, submits_per_second, submit_burst, running_max, queue_max, cpu_ms_per_hour, storage_bytes_max, live, active)
    SELECT p_org, p_agent, p_rate, p_burst, p_running_max, p_queue_max, p_cpu_max, p_storage_max, count(*), count(*) FILTER (WHERE m.state <> 'waiting')
      FROM turn_markers m WHERE m.org_id = p_org AND m.agent_id = p_agent;
    UPDATE org_load SET limited_agents = limited_agents + 1, storage_at = 0 WHERE org_id = p_org;
    RETURN true;
  END IF;
  PERFORM release_held(coalesce(p_now, turnhouse_now()), p_org, p_agent);
  IF NOT v_limited THEN
    DELETE FROM agent_load WHERE org_id = p_org AND agent_id = p_agent;
    UPDATE org_load SET limited_agents = limited_agents - 1 WHERE org_id = p_org;
  END IF;
  RETURN true;
END $$;

-- What the guest of a turn used that ended without it: by an interrupt, with its conversation, by another host. p_cpu_max: what an org may use that has no
-- limit of its own; 0: any. False: it was known, or the turn has not ended.
CREATE FUNCTION add_usage(p_now bigint, p_org text, p_agent text, p_turn uuid, p_cpu_ms float8, p_wall_ms float8, p_memory bigint, p_calls bigint,
                          p_bytes_in bigint, p_bytes_out bigint, p_instance_ms float8, p_cpu_max bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  v_hour bigint := coalesce(p_now, turnhouse_now()) / 3600000;
BEGIN
  -- Where nothing is metered the org's row is left alone: nobody's claim waits for a host that stops in the midst of this.
  PERFORM 1 FROM org_load WHERE org_id = p_org AND (coalesce(cpu_ms_per_hour, p_cpu_max) > 0 OR limited_agents > 0) FOR NO KEY UPDATE;
  IF NOT EXISTS (SELECT 1 FROM org_load WHERE org_id = p_org) THEN
    RETURN false;
  END IF;
  UPDATE turns SET cpu_ms = p_cpu_ms, wall_ms = p_wall_ms, memory_peak_bytes = p_memory, host_calls = p_calls, bytes_in = p_bytes_in,
         bytes_out = p_bytes_out, instance_ms = p_instance_ms
   WHERE org_id = p_org AND turn_id = p_turn AND outcome IS NOT NULL AND cpu_ms IS NULL;
  IF NOT FOUND AND EXISTS (SELECT 1 FROM turns WHERE org_id = p_org AND turn_id = p_turn) THEN
    RETURN false;
  END IF;
  UPDATE org_load SET cpu_ms = CASE WHEN cpu_hour = v_hour THEN cpu_ms ELSE 0 END + p_cpu_ms, cpu_hour = v_hour
   WHERE org_id = p_org AND coalesce(cpu_ms_per_hour, p_cpu_max) > 0;
  UPDATE agent_load SET cpu_ms = CASE WHEN cpu_hour = v_hour THEN cpu_ms ELSE 0 END + p_cpu_ms, cpu_hour = v_hour
   WHERE org_id = p_org AND agent_id = p_agent AND cpu_ms_per_hour > 0;
  RETURN true;
END $$;

SELECT build_wall();
