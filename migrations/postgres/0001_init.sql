-- The whole schema of the shared store, for PostgreSQL 15 and newer.
--
-- Every key begins with org_id, so that no statement reaches another tenant's rows by forgetting a condition and so that the tables can be
-- distributed by tenant later. Times are milliseconds since 1970 by the database's clock. Bodies are bytea, and JSON that people write is text:
-- a NUL byte must not end a batch. Ids compare by their bytes (collation "C"), as the hosts compare them.
--
-- Each intention of the hot path is one call of a function and commits by itself, so that a host which stops in its midst holds no lock.
-- Locks are taken in this order, each level sorted by key: org_load, then whatever belongs to those orgs. All that changes an org's live
-- turns happens under its row of org_load: within an org, writes are one after another.

-- clock_timestamp, not now(): waiting for a lock must not stop the clock.
CREATE FUNCTION turnhouse_now() RETURNS bigint LANGUAGE sql VOLATILE
AS $$ SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint $$;

-- The tenants. `owner_user` is whoever the first key was made for.
CREATE TABLE orgs (
  org_id     text COLLATE "C" NOT NULL PRIMARY KEY,
  owner_user text COLLATE "C" NOT NULL,
  created_at bigint NOT NULL
);

-- How many live turns an org has, by state: exact, and the lock under which they change. Admission and claims ask for these numbers at every turn,
-- and counting markers would cost what is queued.
CREATE TABLE org_load (
  org_id  text COLLATE "C" NOT NULL PRIMARY KEY,
  waiting int NOT NULL DEFAULT 0 CHECK (waiting >= 0),
  ready   int NOT NULL DEFAULT 0 CHECK (ready >= 0),
  running int NOT NULL DEFAULT 0 CHECK (running >= 0)
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- API keys by the SHA-256 of their secret; the secret itself is nowhere.
CREATE TABLE api_keys (
  org_id       text COLLATE "C" NOT NULL,
  key_id       text COLLATE "C" NOT NULL,                   -- first 16 hex digits of the hash: what names a key to people
  key_hash     bytea  NOT NULL CHECK (length(key_hash) = 32),
  user_id      text COLLATE "C" NOT NULL,
  scopes       text   NOT NULL,
  name         text   NOT NULL,
  created_at   bigint NOT NULL,
  expires_at   bigint,
  revoked_at   bigint,                                      -- kept after its end: a list that says when it was revoked
  last_used_at bigint,
  PRIMARY KEY (org_id, key_id)
);
-- The one look-up that comes before an org is known: it is what tells the org.
CREATE UNIQUE INDEX api_keys_hash ON api_keys (key_hash);

-- Incarnations of hosts. A running marker names one; when it has expired, its markers may be taken over. One update an interval renews all
-- that a host holds.
CREATE TABLE replicas (
  replica_id    uuid    NOT NULL PRIMARY KEY,
  registered_at bigint  NOT NULL,
  expires_at    bigint  NOT NULL,
  draining      boolean NOT NULL DEFAULT false
) WITH (fillfactor = 50);

-- Modules by content: two versions of the same bytes share one. Per org, so that nobody learns by a digest what another org has.
CREATE TABLE modules (
  org_id text COLLATE "C" NOT NULL,
  digest bytea NOT NULL CHECK (length(digest) = 32),
  wasm   bytea NOT NULL,
  PRIMARY KEY (org_id, digest)
);
ALTER TABLE modules ALTER wasm SET STORAGE EXTERNAL;

CREATE TABLE worker_versions (
  org_id     text COLLATE "C" NOT NULL,
  worker     text COLLATE "C" NOT NULL,
  version    int    NOT NULL CHECK (version > 0),
  digest     bytea  NOT NULL,
  size       bigint NOT NULL,
  imports    text   NOT NULL,                               -- JSON array of "module.name"
  compile_ms double precision NOT NULL,
  created_at bigint NOT NULL,
  PRIMARY KEY (org_id, worker, version)
);
-- The bytes of an existing version again are that version; and whether a module is still used.
CREATE INDEX worker_versions_digest ON worker_versions (org_id, digest);

CREATE TABLE agents (
  org_id     text COLLATE "C" NOT NULL,
  agent_id   text COLLATE "C" NOT NULL,
  worker     text COLLATE "C" NOT NULL,
  version    int     NOT NULL,
  is_default boolean NOT NULL,
  settings   text    NOT NULL,                              -- JSON; worker, version and is_default are read from their columns
  revision   bigint  NOT NULL,                              -- + 1 at every change, so that a cache can tell
  created_at bigint  NOT NULL,
  updated_at bigint  NOT NULL,
  PRIMARY KEY (org_id, agent_id)
);
-- One default of an org at most, whatever the code does.
CREATE UNIQUE INDEX agents_default ON agents (org_id) WHERE is_default;
-- Who uses a worker, before it or a version of it goes.
CREATE INDEX agents_worker ON agents (org_id, worker, version);

-- One row a lane. The row stays when a conversation is deleted, so that `next_seq` never goes back.
CREATE TABLE conversations (
  org_id          text COLLATE "C" NOT NULL,
  agent_id        text COLLATE "C" NOT NULL,
  conversation_id text COLLATE "C" NOT NULL,
  user_id         text COLLATE "C" NOT NULL,                -- who began it: whose it is
  created_at      bigint NOT NULL,
  deleted_at      bigint,
  next_seq        bigint NOT NULL,
  generation      uuid   NOT NULL,                          -- root of the chain; renewed by deletion and reset. NULL roots would all be distinct
  head_run        uuid   NOT NULL,                          -- end of the chain: a run, or the generation
  kept_runs       uuid[] NOT NULL DEFAULT '{}',             -- runs whose snapshots still have their bytes, oldest first
  PRIMARY KEY (org_id, agent_id, conversation_id)
) WITH (fillfactor = 70);                                   -- one or two updates a turn, within the page
-- A member's own conversations, by id.
CREATE INDEX conversations_user ON conversations (org_id, agent_id, user_id, conversation_id) WHERE deleted_at IS NULL;

-- In a table of their own: an ended turn does not touch its key.
CREATE TABLE idempotency_keys (
  org_id          text COLLATE "C" NOT NULL,
  agent_id        text COLLATE "C" NOT NULL,
  conversation_id text COLLATE "C" NOT NULL,                -- '' for a turn without one
  idem_key        text COLLATE "C" NOT NULL,
  turn_id         uuid   NOT NULL,
  request_hash    bytea  NOT NULL CHECK (length(request_hash) = 32),
  created_at      bigint NOT NULL,
  PRIMARY KEY (org_id, agent_id, conversation_id, idem_key)
);
-- Forgetting goes by age.
CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);

-- The rules of a turn's row and of a marker are one function each: every statement that writes a row reads its table's CHECKs anew, and a page of
-- them was a quarter of the writer's time.
CREATE FUNCTION turn_is_whole(outcome text, ended boolean, end_epoch boolean, reply boolean, failure boolean, cancelled_by boolean,
                              first_epoch boolean, started boolean, tail boolean, tail_seq boolean) RETURNS boolean LANGUAGE plpgsql IMMUTABLE
AS $$ BEGIN
  RETURN (outcome IS NULL OR outcome IN ('completed', 'failed', 'cancelled'))
    AND (outcome IS NOT NULL) = ended AND ended = end_epoch
    AND (outcome IS NOT DISTINCT FROM 'completed') = reply             -- an empty success is a failure
    AND (outcome IS NOT DISTINCT FROM 'failed') = failure
    AND (outcome IS NOT DISTINCT FROM 'cancelled') = cancelled_by
    AND first_epoch = started AND tail = tail_seq;
END $$;
CREATE FUNCTION marker_is_lawful(org_id text, env_org text, conversation boolean, mode text, laned boolean, state text, epoch int, attempt int,
                                 attempts_max int, held boolean, refusal text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE
AS $$ BEGIN
  RETURN mode IN ('snapshot', 'file') AND state IN ('waiting', 'ready', 'running') AND epoch >= 0 AND attempt >= 0 AND attempts_max > 0
    AND (env_org IS NULL OR env_org = org_id)                          -- another org was refused at the door; absent passes
    AND (NOT laned OR (env_org IS NOT NULL AND conversation))
    AND (state <> 'running' OR refusal IS NULL)                        -- nothing refused ever runs
    AND (state = 'running') = held
    AND (state <> 'waiting' OR laned);                                 -- only behind another turn of its conversation
END $$;

-- Every turn for ever: message, first start and end in one row. Readers make `turn.accepted`, `turn.started` and the terminal event of it;
-- so the terminal event is unique as the row is. The id is a UUIDv7: its order is time's, and retention needs no other index.
CREATE TABLE turns (
  org_id          text COLLATE "C" NOT NULL,
  turn_id         uuid    NOT NULL,
  agent_id        text COLLATE "C" NOT NULL,
  conversation_id text COLLATE "C",
  seq             bigint,                                   -- place in the conversation; NULL where the envelope names no lane
  run_id          uuid,
  private         boolean NOT NULL,                         -- in no history
  user_id         text COLLATE "C" NOT NULL,
  dry_run         boolean NOT NULL,
  accepted_at     bigint  NOT NULL,
  message         bytea   NOT NULL,
  -- first start; fixed for all attempts
  first_epoch     int,
  started_at      bigint,
  worker          text COLLATE "C",
  version         int,
  -- end
  outcome         text,                                     -- 'completed', 'failed' or 'cancelled'
  ended_at        bigint,
  end_epoch       int,                                      -- the marker's when it ended; the tail's
  attempts        int,
  reply           bytea,
  replaces_deltas boolean,
  failure         text,                                     -- JSON
  cancelled_by    text,
  cpu_ms          double precision,
  wall_ms         double precision,
  memory_peak_bytes bigint,
  host_calls      bigint,
  bytes_in        bigint,
  bytes_out       bigint,
  instance_ms     double precision,                         -- how long its instance existed
  tail_seq        bigint,                                   -- the last events, when they are few: as if the last row of turn_events
  tail            bytea,
  PRIMARY KEY (org_id, turn_id),
  CHECK (turn_is_whole(outcome, ended_at IS NOT NULL, end_epoch IS NOT NULL, reply IS NOT NULL, failure IS NOT NULL, cancelled_by IS NOT NULL,
                       first_epoch IS NOT NULL, started_at IS NOT NULL, tail IS NOT NULL, tail_seq IS NOT NULL))
) WITH (fillfactor = 80);                                   -- room for the end, within the page
-- History by place, and all that a deletion must find.
CREATE INDEX turns_lane ON turns (org_id, agent_id, conversation_id, seq) WHERE conversation_id IS NOT NULL;

-- What the client was told of the end is not taken back.
CREATE FUNCTION turns_end_once() RETURNS trigger LANGUAGE plpgsql
AS $$ BEGIN RAISE EXCEPTION 'the turn has ended already' USING ERRCODE = 'integrity_constraint_violation'; END $$;
CREATE TRIGGER turns_end_once BEFORE UPDATE OF outcome ON turns FOR EACH ROW WHEN (OLD.outcome IS NOT NULL) EXECUTE FUNCTION turns_end_once();

-- Live turns: queue, lock, lease, deadline and election in one small row, which exists exactly while a turn owes its client an answer.
-- org_id is the org of the key that submitted it; env_org is what the envelope claims, or nothing. Vacuumed by count: it is small, and every turn
-- leaves a dead row or two.
CREATE TABLE turn_markers (
  org_id          text COLLATE "C" NOT NULL,
  turn_id         uuid     NOT NULL,
  agent_id        text COLLATE "C" NOT NULL,
  env_org         text COLLATE "C",
  conversation_id text COLLATE "C",
  run_id          uuid,
  mode            text     NOT NULL,                        -- 'snapshot' or 'file'
  seq             bigint,
  state           text     NOT NULL,                        -- 'waiting', 'ready' or 'running'
  epoch           int      NOT NULL,                        -- + 1 at every change of owner
  attempt         int      NOT NULL,
  attempts_max    int      NOT NULL,
  refusals        int      NOT NULL DEFAULT 0,              -- the gate's; no attempts
  effects         boolean  NOT NULL DEFAULT false,          -- an operation with outside effects has begun: never run again
  holder          uuid,
  not_before      bigint   NOT NULL,                        -- back-off, and the order of claims
  deadline_at     bigint   NOT NULL,                        -- of the queue, of admission or of the turn, as `state` says
  admission_ms    bigint   NOT NULL,
  turn_ms         bigint   NOT NULL,
  collected       int      NOT NULL DEFAULT 0,              -- parts of its message, where further messages may join it while it waits
  -- The gate's table a second time. Generated, so that a refused row comes back from a claim instead of failing everybody's.
  refusal text GENERATED ALWAYS AS (CASE
    WHEN mode = 'snapshot' AND run_id IS NOT NULL AND env_org IS NULL THEN 'missing_org'
    WHEN mode = 'snapshot' AND run_id IS NOT NULL AND conversation_id IS NULL THEN 'missing_conversation' END) STORED,
  PRIMARY KEY (org_id, turn_id),
  CHECK (marker_is_lawful(org_id, env_org, conversation_id IS NOT NULL, mode, seq IS NOT NULL, state, epoch, attempt, attempts_max,
                          holder IS NOT NULL, refusal))
) WITH (fillfactor = 90, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
        autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 50000);
-- A second active turn of a conversation is impossible, whatever the code does.
CREATE UNIQUE INDEX markers_active ON turn_markers (org_id, agent_id, conversation_id) WHERE state IN ('ready', 'running') AND seq IS NOT NULL;
-- The next of a conversation, in the order of acceptance.
CREATE UNIQUE INDEX markers_waiting ON turn_markers (org_id, agent_id, conversation_id, seq) WHERE state = 'waiting';
-- The next of an org.
CREATE INDEX markers_ready ON turn_markers (org_id, not_before, turn_id) WHERE state = 'ready';
-- What a replica holds.
CREATE INDEX markers_holder ON turn_markers (holder) WHERE state = 'running';
-- What is overdue.
CREATE INDEX markers_deadline ON turn_markers (deadline_at);
-- What was refused or handed round too often: next to nothing.
CREATE INDEX markers_refused ON turn_markers (refusals) WHERE refusals > 0;
CREATE INDEX markers_worn ON turn_markers (epoch) WHERE epoch >= 1000000;

-- The debt is paid in the statement in which it is struck out.
CREATE FUNCTION markers_owe() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM gone g JOIN turns t ON t.org_id = g.org_id AND t.turn_id = g.turn_id WHERE t.outcome IS NULL) THEN
    RAISE EXCEPTION 'the turn still owes its end' USING ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER markers_owe AFTER DELETE ON turn_markers REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION markers_owe();

-- One row a batch of consecutive events of one epoch; the epoch changes at every change of owner, so no id is used twice.
CREATE TABLE turn_events (
  org_id    text COLLATE "C" NOT NULL,
  turn_id   uuid   NOT NULL,
  epoch     int    NOT NULL,
  first_seq bigint NOT NULL,
  body      bytea  NOT NULL,                                -- [["kind", data], …]
  PRIMARY KEY (org_id, turn_id, epoch, first_seq)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

-- A conversation's states: one chain. Rows stay for the chain when their bytes go.
CREATE TABLE snapshots (
  org_id          text COLLATE "C" NOT NULL,
  agent_id        text COLLATE "C" NOT NULL,
  conversation_id text COLLATE "C" NOT NULL,
  run_id          uuid   NOT NULL,
  parent_run      uuid   NOT NULL,
  turn_id         uuid   NOT NULL,
  worker          text COLLATE "C" NOT NULL,
  version         int    NOT NULL,
  at              bigint NOT NULL,
  body            bytea,                                    -- NULL: no longer kept
  PRIMARY KEY (org_id, run_id, agent_id, conversation_id),  -- the run second: with it last, a planner may take the index below and walk the whole chain
  UNIQUE (org_id, agent_id, conversation_id, parent_run),   -- two runs never share a parent
  CHECK (run_id <> parent_run)
);
ALTER TABLE snapshots ALTER body SET STORAGE EXTERNAL;
