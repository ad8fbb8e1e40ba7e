-- What people write on a conversation. Beside its row, which every turn writes anew: nothing of this is copied then.
CREATE TABLE conversation_notes (
  org_id          TEXT NOT NULL,
  agent_id        TEXT NOT NULL,
  conversation_id TEXT NOT NULL,
  title           TEXT CHECK (length(title) BETWEEN 1 AND 200),
  metadata        TEXT CHECK (length(metadata) <= 65536),          -- JSON object of strings
  PRIMARY KEY (org_id, agent_id, conversation_id)
) STRICT, WITHOUT ROWID;
