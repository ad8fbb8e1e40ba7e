-- The whole schema of the embedded store.
--
-- Every key begins with org_id, so that no statement reaches another tenant's rows by forgetting a condition and so that the tables can be
-- distributed by tenant later. Times are milliseconds since 1970, always given by the host. Ids that the host makes are 16 bytes.
-- Bodies are BLOBs: a NUL byte in a text must not end a batch.

-- The tenants. `owner_user` is whoever the first key was made for.
CREATE TABLE orgs (
  org_id     TEXT    NOT NULL PRIMARY KEY,
  owner_user TEXT    NOT NULL,
  created_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- API keys by the SHA-256 of their secret; the secret itself is nowhere.
CREATE TABLE api_keys (
  org_id       TEXT    NOT NULL,
  key_id       TEXT    NOT NULL,                            -- first 16 hex digits of the hash: what names a key to people
  key_hash     BLOB    NOT NULL CHECK (length(key_hash) = 32),
  user_id      TEXT    NOT NULL,
  scopes       TEXT    NOT NULL,
  name         TEXT    NOT NULL,
  created_at   INTEGER NOT NULL,
  expires_at   INTEGER,
  revoked_at   INTEGER,                                     -- kept after its end: a list that says when it was revoked
  last_used_at INTEGER,
  PRIMARY KEY (org_id, key_id)
) STRICT, WITHOUT ROWID;
-- The one look-up that comes before an org is known: it is what tells the org.
CREATE UNIQUE INDEX api_keys_hash ON api_keys (key_hash);

-- Incarnations of hosts. A running marker names one; when it has expired, its markers may be taken over.
CREATE TABLE replicas (
  replica_id BLOB    NOT NULL PRIMARY KEY CHECK (length(replica_id) = 16),
  expires_at INTEGER NOT NULL,
  draining   INTEGER NOT NULL DEFAULT 0 CHECK (draining IN (0, 1))
) STRICT, WITHOUT ROWID;
-- Every claim asks who is dead.
CREATE INDEX replicas_expiry ON replicas (expires_at);

-- Modules by content: two versions of the same bytes share one. Per org, so that nobody learns by a digest what another org has.
CREATE TABLE modules (
  org_id TEXT NOT NULL,
  digest BLOB NOT NULL CHECK (length(digest) = 32),
  wasm   BLOB NOT NULL,
  PRIMARY KEY (org_id, digest)
) STRICT;

CREATE TABLE worker_versions (
  org_id     TEXT    NOT NULL,
  worker     TEXT    NOT NULL,
  version    INTEGER NOT NULL CHECK (version > 0),
  digest     BLOB    NOT NULL,
  size       INTEGER NOT NULL,
  imports    TEXT    NOT NULL,                              -- JSON array of "module.name"
  compile_ms REAL    NOT NULL,
  created_at INTEGER NOT NULL,
  PRIMARY KEY (org_id, worker, version)
) STRICT, WITHOUT ROWID;
-- The bytes of an existing version again are that version; and whether a module is still used.
CREATE INDEX worker_versions_digest ON worker_versions (org_id, digest);

CREATE TABLE agents (
  org_id     TEXT    NOT NULL,
  agent_id   TEXT    NOT NULL,
  worker     TEXT    NOT NULL,
  version    INTEGER NOT NULL,
  is_default INTEGER NOT NULL CHECK (is_default IN (0, 1)),
  settings   TEXT    NOT NULL,                              -- JSON; worker, version and is_default are read from their columns
  revision   INTEGER NOT NULL,                              -- + 1 at every change, so that a cache can tell
  created_at INTEGER NOT NULL,
  updated_at INTEGER NOT NULL,
  PRIMARY KEY (org_id, agent_id)
) STRICT, WITHOUT ROWID;
-- One default of an org at most, whatever the code does.
CREATE UNIQUE INDEX agents_default ON agents (org_id) WHERE is_default = 1;
-- Who uses a worker, before it or a version of it goes.
CREATE INDEX agents_worker ON agents (org_id, worker, version);

-- One row a lane. The row stays when a conversation is deleted, so that `next_seq` never goes back.
CREATE TABLE conversations (
  org_id          TEXT    NOT NULL,
  agent_id        TEXT    NOT NULL,
  conversation_id TEXT    NOT NULL,
  user_id         TEXT    NOT NULL,                         -- who began it: whose it is
  created_at      INTEGER NOT NULL,
  deleted_at      INTEGER,
  next_seq        INTEGER NOT NULL,
  generation      BLOB    NOT NULL CHECK (length(generation) = 16), -- root of the chain; renewed by deletion and reset. NULL roots would all be distinct
  head_run        BLOB    NOT NULL CHECK (length(head_run) = 16),   -- end of the chain: a run, or the generation
  kept_runs       BLOB    NOT NULL DEFAULT x'' CHECK (length(kept_runs) % 16 = 0), -- runs whose snapshots still have their bytes, oldest first
  PRIMARY KEY (org_id, agent_id, conversation_id)
) STRICT, WITHOUT ROWID;
-- A member's own conversations, by id.
CREATE INDEX conversations_user ON conversations (org_id, agent_id, user_id, conversation_id) WHERE deleted_at IS NULL;

-- In a table of their own: an ended turn does not touch its key.
CREATE TABLE idempotency_keys (
  org_id          TEXT    NOT NULL,
  agent_id        TEXT    NOT NULL,
  conversation_id TEXT    NOT NULL,                         -- '' for a turn without one
  idem_key        TEXT    NOT NULL,
  turn_id         BLOB    NOT NULL CHECK (length(turn_id) = 16),
  request_hash    BLOB    NOT NULL CHECK (length(request_hash) = 32),
  created_at      INTEGER NOT NULL,
  PRIMARY KEY (org_id, agent_id, conversation_id, idem_key)
) STRICT, WITHOUT ROWID;
-- Forgetting goes by age.
CREATE INDEX idempotency_keys_age ON idempotency_keys (created_at);

-- Every turn for ever: message, first start and end in one row. Readers make `turn.accepted`, `turn.started` and the terminal event of it;
-- so the terminal event is unique as the row is. With rowids: bodies in a WITHOUT ROWID tree would sit in its inner nodes.
CREATE TABLE turns (
  org_id          TEXT    NOT NULL,
  turn_id         BLOB    NOT NULL CHECK (length(turn_id) = 16),
  agent_id        TEXT    NOT NULL,
  conversation_id TEXT,
  seq             INTEGER,                                  -- place in the conversation; NULL where the envelope names no lane
  run_id          BLOB    CHECK (length(run_id) = 16),
  private         INTEGER NOT NULL CHECK (private IN (0, 1)), -- in no history
  user_id         TEXT    NOT NULL,
  dry_run         INTEGER NOT NULL CHECK (dry_run IN (0, 1)),
  accepted_at     INTEGER NOT NULL,
  message         BLOB    NOT NULL,
  -- first start; fixed for all attempts
  first_epoch     INTEGER,
  started_at      INTEGER,
  worker          TEXT,
  version         INTEGER,
  -- end
  outcome         TEXT    CHECK (outcome IN ('completed', 'failed', 'cancelled')),
  ended_at        INTEGER,
  end_epoch       INTEGER,                                  -- the marker's when it ended; the tail's
  attempts        INTEGER,
  reply           BLOB,
  replaces_deltas INTEGER CHECK (replaces_deltas IN (0, 1)),
  failure         TEXT,                                     -- JSON
  cancelled_by    TEXT,
  cpu_ms          REAL,
  wall_ms         REAL,
  memory_peak_bytes INTEGER,
  host_calls      INTEGER,
  tail_seq        INTEGER,                                  -- the last events, when they are few: as if the last row of turn_events
  tail            BLOB,
  PRIMARY KEY (org_id, turn_id),
  CHECK ((outcome IS NULL) = (ended_at IS NULL)),
  CHECK ((outcome IS NULL) = (end_epoch IS NULL)),
  CHECK ((outcome IS 'completed') = (reply IS NOT NULL)),   -- an empty success is a failure
  CHECK ((outcome IS 'failed') = (failure IS NOT NULL)),
  CHECK ((outcome IS 'cancelled') = (cancelled_by IS NOT NULL)),
  CHECK ((first_epoch IS NULL) = (started_at IS NULL)),
  CHECK ((tail IS NULL) = (tail_seq IS NULL))
) STRICT;
-- History by place, and all that a deletion must find.
CREATE INDEX turns_lane ON turns (org_id, agent_id, conversation_id, seq) WHERE conversation_id IS NOT NULL;
-- What the client was told of the end is not taken back. FAIL, not ABORT: the writer rolls back anyway, and a statement that may abort keeps
-- a journal of its own.
CREATE TRIGGER turns_end_once BEFORE UPDATE OF outcome ON turns WHEN OLD.outcome IS NOT NULL
BEGIN SELECT RAISE(FAIL, 'the turn has ended already'); END;

-- Live turns: queue, lock, lease, deadline and election in one small row, which exists exactly while a turn owes its client an answer.
-- org_id is the org of the key that submitted it; env_org is what the envelope claims, or nothing.
CREATE TABLE turn_markers (
  org_id          TEXT    NOT NULL,
  turn_id         BLOB    NOT NULL CHECK (length(turn_id) = 16),
  agent_id        TEXT    NOT NULL,
  env_org         TEXT,
  conversation_id TEXT,
  run_id          BLOB,
  mode            TEXT    NOT NULL CHECK (mode IN ('snapshot', 'file')),
  seq             INTEGER,
  state           TEXT    NOT NULL CHECK (state IN ('waiting', 'ready', 'running')),
  epoch           INTEGER NOT NULL CHECK (epoch BETWEEN 0 AND 4294967295),
  attempt         INTEGER NOT NULL CHECK (attempt >= 0),
  attempts_max    INTEGER NOT NULL CHECK (attempts_max > 0),
  refusals        INTEGER NOT NULL DEFAULT 0,               -- the gate's; no attempts
  effects         INTEGER NOT NULL DEFAULT 0 CHECK (effects IN (0, 1)), -- an operation with outside effects has begun: never run again
  holder          BLOB,
  not_before      INTEGER NOT NULL,                         -- back-off, and the order of claims
  deadline_at     INTEGER NOT NULL,                         -- of the queue, of admission or of the turn, as `state` says
  admission_ms    INTEGER NOT NULL,
  turn_ms         INTEGER NOT NULL,
  -- The gate's table a second time. Generated, so that a refused row comes back from a claim instead of failing everybody's.
  refusal TEXT GENERATED ALWAYS AS (CASE
    WHEN mode = 'snapshot' AND run_id IS NOT NULL AND env_org IS NULL THEN 'missing_org'
    WHEN mode = 'snapshot' AND run_id IS NOT NULL AND conversation_id IS NULL THEN 'missing_conversation' END) VIRTUAL,
  PRIMARY KEY (org_id, turn_id),
  CHECK (env_org = org_id),                                 -- another org was refused at the door; absent passes
  CHECK (seq IS NULL OR (env_org IS NOT NULL AND conversation_id IS NOT NULL)),
  CHECK (state <> 'running' OR refusal IS NULL),            -- nothing refused ever runs
  CHECK ((state = 'running') = (holder IS NOT NULL)),
  CHECK (state <> 'waiting' OR seq IS NOT NULL)             -- only behind another turn of its conversation
) STRICT, WITHOUT ROWID;
-- A second active turn of a conversation is impossible, whatever the code does.
CREATE UNIQUE INDEX markers_active ON turn_markers (org_id, agent_id, conversation_id) WHERE state IN ('ready', 'running') AND seq IS NOT NULL;
-- The next of a conversation, in the order of acceptance.
CREATE UNIQUE INDEX markers_waiting ON turn_markers (org_id, agent_id, conversation_id, seq) WHERE state = 'waiting';
-- The next of an org.
CREATE INDEX markers_ready ON turn_markers (org_id, not_before) WHERE state = 'ready';
-- What a replica holds.
CREATE INDEX markers_holder ON turn_markers (holder) WHERE state = 'running';
-- What is overdue.
CREATE INDEX markers_deadline ON turn_markers (deadline_at);
-- What was refused or handed round too often: next to nothing.
CREATE INDEX markers_refused ON turn_markers (refusals) WHERE refusals > 0;
CREATE INDEX markers_worn ON turn_markers (epoch) WHERE epoch >= 1000000;
-- The debt is paid before it is struck out.
CREATE TRIGGER markers_owe AFTER DELETE ON turn_markers
WHEN EXISTS (SELECT 1 FROM turns WHERE org_id = OLD.org_id AND turn_id = OLD.turn_id AND outcome IS NULL)
BEGIN SELECT RAISE(FAIL, 'the turn still owes its end'); END;

-- One row a batch of consecutive events of one epoch; the epoch changes at every change of owner, so no id is used twice.
CREATE TABLE turn_events (
  org_id    TEXT    NOT NULL,
  turn_id   BLOB    NOT NULL,
  epoch     INTEGER NOT NULL,
  first_seq INTEGER NOT NULL,
  body      BLOB    NOT NULL,                               -- [["kind", data], …]
  PRIMARY KEY (org_id, turn_id, epoch, first_seq)
) STRICT;

-- A conversation's states: one chain. Rows stay for the chain when their bytes go.
CREATE TABLE snapshots (
  org_id          TEXT    NOT NULL,
  agent_id        TEXT    NOT NULL,
  conversation_id TEXT    NOT NULL,
  run_id          BLOB    NOT NULL CHECK (length(run_id) = 16),
  parent_run      BLOB    NOT NULL CHECK (length(parent_run) = 16),
  turn_id         BLOB    NOT NULL,
  worker          TEXT    NOT NULL,
  version         INTEGER NOT NULL,
  at              INTEGER NOT NULL,
  body            BLOB,                                     -- NULL: no longer kept
  PRIMARY KEY (org_id, agent_id, conversation_id, run_id),
  UNIQUE (org_id, agent_id, conversation_id, parent_run),   -- two runs never share a parent
  CHECK (run_id <> parent_run)
) STRICT;
