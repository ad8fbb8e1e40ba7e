-- An org's own limits, where the host's do not hold, and what it has used of what is limited. NULL: the host's. A row only of an org that has a limit.
CREATE TABLE org_limits (
  org_id             TEXT    NOT NULL PRIMARY KEY,
  submits_per_second REAL    CHECK (submits_per_second >= 0),
  submit_burst       INTEGER CHECK (submit_burst >= 0),
  running_max        INTEGER CHECK (running_max > 0),
  queue_max          INTEGER CHECK (queue_max >= 0),
  cpu_ms_per_hour    INTEGER CHECK (cpu_ms_per_hour >= 0),
  tokens             REAL    CHECK (tokens >= 0),               -- in the bucket at tokens_at; NULL: full
  tokens_at          INTEGER,
  cpu_ms             REAL    NOT NULL DEFAULT 0 CHECK (cpu_ms >= 0), -- in the hour cpu_hour
  cpu_hour           INTEGER NOT NULL DEFAULT 0,                -- since 1970
  CHECK ((tokens IS NULL) = (tokens_at IS NULL))
) STRICT, WITHOUT ROWID;
