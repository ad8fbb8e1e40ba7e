-- Bounds that an agent's own settings put on its turns, within its org's, and what it has used of them. A row only of an agent that has any: how many of an
-- org have is beside the org's own limits, so that nobody else pays for it.
CREATE TABLE agent_load (
  org_id             TEXT    NOT NULL,
  agent_id           TEXT    NOT NULL,
  submits_per_second REAL    CHECK (submits_per_second >= 0),   -- NULL: no bound but the org's
  submit_burst       INTEGER CHECK (submit_burst >= 0),
  running_max        INTEGER CHECK (running_max > 0),
  queue_max          INTEGER CHECK (queue_max >= 0),
  cpu_ms_per_hour    INTEGER CHECK (cpu_ms_per_hour >= 0),
  storage_bytes_max  INTEGER CHECK (storage_bytes_max >= 0),
  tokens             REAL    CHECK (tokens >= 0),               -- as in org_limits
  tokens_at          INTEGER,
  cpu_ms             REAL    NOT NULL DEFAULT 0 CHECK (cpu_ms >= 0),
  cpu_hour           INTEGER NOT NULL DEFAULT 0,
  storage_bytes      INTEGER NOT NULL DEFAULT 0,                -- as last measured
  live               INTEGER NOT NULL CHECK (live >= 0),
  active             INTEGER NOT NULL CHECK (active >= 0),      -- of these: running, or ready and not held
  PRIMARY KEY (org_id, agent_id),
  CHECK ((tokens IS NULL) = (tokens_at IS NULL))
) STRICT, WITHOUT ROWID;
ALTER TABLE org_limits ADD COLUMN limited_agents INTEGER NOT NULL DEFAULT 0 CHECK (limited_agents >= 0);

-- What an org may take of the disk, and what it took when it was last measured: in the background, since no write can tell what all that is stored comes to.
ALTER TABLE org_limits ADD COLUMN storage_bytes_max INTEGER CHECK (storage_bytes_max >= 0);
ALTER TABLE org_limits ADD COLUMN storage_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE org_limits ADD COLUMN storage_at INTEGER NOT NULL DEFAULT 0;

-- The next of an agent that is held: ready, and not before a time that never comes.
CREATE INDEX markers_held ON turn_markers (org_id, agent_id, turn_id) WHERE state = 'ready' AND not_before = 9007199254740991;
