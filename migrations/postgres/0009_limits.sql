-- An org's own limits, where the host's do not hold, and what it has used of what is limited. NULL: the host's. In the row that every write of the org
-- locks and reads anyhow: so they hold over all hosts together, from the next batch on, and cost no look-up.
ALTER TABLE org_load
  ADD COLUMN submits_per_second float8 CHECK (submits_per_second >= 0),
  ADD COLUMN submit_burst       int    CHECK (submit_burst >= 0),
  ADD COLUMN running_max        int    CHECK (running_max > 0),
  ADD COLUMN queue_max          int    CHECK (queue_max >= 0),
  ADD COLUMN cpu_ms_per_hour    bigint CHECK (cpu_ms_per_hour >= 0),
  ADD COLUMN tokens             float8 CHECK (tokens >= 0),                -- in the bucket at tokens_at; NULL: full
  ADD COLUMN tokens_at          bigint,
  ADD COLUMN cpu_ms             float8 NOT NULL DEFAULT 0 CHECK (cpu_ms >= 0), -- in the hour cpu_hour
  ADD COLUMN cpu_hour           bigint NOT NULL DEFAULT 0,                 -- since 1970
  ADD CHECK ((tokens IS NULL) = (tokens_at IS NULL));
