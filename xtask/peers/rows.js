// The rows that a turn leaves in PostgreSQL, as Turnhouse's own tables have them: a conversation, a turn that holds message, reply, outcome and its few
// events, a snapshot whose body is dropped ten turns later. What Turnhouse keeps besides (the marker, the load of an org) is left out: the peers' own
// rows of jobs and workflows stand in for the marker.

import pg from "pg";

export const ORG = "dev";
export const AGENT = "bench";
const SNAPSHOTS_KEPT = 10;

const SCHEMA = `
CREATE TABLE conversations (
  org_id text COLLATE "C" NOT NULL, agent_id text COLLATE "C" NOT NULL, conversation_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL, created_at bigint NOT NULL, next_seq bigint NOT NULL, head_run uuid, kept_runs uuid[] NOT NULL DEFAULT '{}',
  PRIMARY KEY (org_id, agent_id, conversation_id)
) WITH (fillfactor = 70);
CREATE TABLE turns (
  org_id text COLLATE "C" NOT NULL, turn_id uuid NOT NULL, agent_id text COLLATE "C" NOT NULL, conversation_id text COLLATE "C" NOT NULL,
  seq bigint NOT NULL, user_id text COLLATE "C" NOT NULL, accepted_at bigint NOT NULL, message bytea NOT NULL,
  outcome text, ended_at bigint, reply bytea, tail_seq bigint, tail bytea,
  PRIMARY KEY (org_id, turn_id)
) WITH (fillfactor = 80);
CREATE INDEX turns_lane ON turns (org_id, agent_id, conversation_id, seq);
CREATE TABLE snapshots (
  org_id text COLLATE "C" NOT NULL, agent_id text COLLATE "C" NOT NULL, conversation_id text COLLATE "C" NOT NULL, run_id uuid NOT NULL,
  parent_run uuid, at bigint NOT NULL, body bytea,
  PRIMARY KEY (org_id, run_id)
);`;

export const CONVERSATION = `
  INSERT INTO conversations (org_id, agent_id, conversation_id, user_id, created_at, next_seq) VALUES ('${ORG}', '${AGENT}', $1, '${ORG}', $2, 1)
  ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE SET next_seq = conversations.next_seq + 1
  RETURNING next_seq AS seq`;

/// The state that the conversation's last turn left.
export const HYDRATE = {
  name: "hydrate",
  text: `SELECT s.run_id, s.body FROM conversations c JOIN snapshots s ON s.org_id = c.org_id AND s.run_id = c.head_run
          WHERE c.org_id = '${ORG}' AND c.agent_id = '${AGENT}' AND c.conversation_id = $1`,
};

/// The bodies that are kept, `run` now among them.
export const kept = (run) => `(kept_runs || ${run}::uuid)[greatest(1, cardinality(kept_runs) + 2 - ${SNAPSHOTS_KEPT}):]`;

/// What goes with a conversation whose head has moved, as CTEs after one called `head` that returns the conversation's id. A statement sees rows as they were before
/// it, so the body that falls out is the first of what was kept.
export function snapshotWrites({ conversation, run, parent, at, body }) {
  return `
  snapshot AS (
    INSERT INTO snapshots (org_id, agent_id, conversation_id, run_id, parent_run, at, body)
    SELECT '${ORG}', '${AGENT}', ${conversation}, ${run}::uuid, ${parent}::uuid, ${at}, ${body} FROM head),
  dropped AS (
    UPDATE snapshots SET body = NULL WHERE org_id = '${ORG}' AND run_id = (
      SELECT c.kept_runs[1] FROM conversations c, head
       WHERE cardinality(c.kept_runs) >= ${SNAPSHOTS_KEPT} AND c.org_id = '${ORG}' AND c.agent_id = '${AGENT}' AND c.conversation_id = ${conversation}))`;
}

export function pool(max) {
  const made = new pg.Pool({ connectionString: process.env.PEER_DATABASE_URL, max });
  made.on("error", (error) => console.error(error));
  return made;
}

export async function createTables() {
  const client = new pg.Client({ connectionString: process.env.PEER_DATABASE_URL });
  await client.connect();
  await client.query(SCHEMA);
  await client.end();
}
