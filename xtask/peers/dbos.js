// DBOS: a durable workflow per turn, on PostgreSQL.
//
// The workflow's own row is the turn's: DBOS keeps the message as its input and the reply as its output. One step writes what DBOS has no place for, in one
// statement: the conversation's row and the snapshot. So DBOS writes fewer rows than Turnhouse does, and no table of turns beside its own. The workflow is called
// directly, so it starts in the process that accepted it, without a queue and its polling. A plain step costs a commit less than one of the SDK's data sources.

import { DBOS } from "@dbos-inc/dbos-sdk";
import { AGENT, CONVERSATION, HYDRATE, ORG, createTables, kept, pool, snapshotWrites } from "./rows.js";
import { serve } from "./serve.js";
import { nextState, turnOf } from "./work.js";

const POOL = Number(process.env.PEER_POOL ?? 10);

const config = {
  name: "peer",
  systemDatabaseUrl: process.env.PEER_DATABASE_URL,
  systemDatabasePoolSize: POOL,
  applicationVersion: "1",
  logLevel: "error",
};

async function prepare() {
  await createTables();
  // Makes DBOS's own tables, which several processes at once cannot.
  DBOS.setConfig(config);
  await DBOS.launch();
  await DBOS.shutdown();
}

async function start(at) {
  const db = pool(POOL);
  DBOS.setConfig({ ...config, executorID: `peer-${at}` });

  const touch = { name: "touch", text: CONVERSATION };
  // Nothing of it is written unless the head is still the one that was read.
  const move = {
    name: "move",
    text: `
      WITH head AS (
        INSERT INTO conversations AS c (org_id, agent_id, conversation_id, user_id, created_at, next_seq, head_run, kept_runs)
        VALUES ('${ORG}', '${AGENT}', $1, '${ORG}', $2, 1, $3, ARRAY[$3::uuid])
        ON CONFLICT (org_id, agent_id, conversation_id) DO UPDATE SET next_seq = c.next_seq + 1, head_run = $3, kept_runs = ${kept("$3").replaceAll("kept_runs", "c.kept_runs")}
          WHERE c.head_run IS NOT DISTINCT FROM $4::uuid
        RETURNING next_seq),
      ${snapshotWrites({ conversation: "$1", run: "$3", parent: "$4", at: "$2", body: "$5" })}
      SELECT next_seq AS seq FROM head`,
  };

  const write = {
    echo: async (run, conversation, text) => {
      const { rows } = await db.query({ ...touch, values: [conversation, Date.now()] });
      return { reply: text, seq: Number(rows[0].seq) };
    },
    snapshot: async (run, conversation) => {
      const { rows: before } = await db.query({ ...HYDRATE, values: [conversation] });
      const [{ run_id: parent = null, body = null } = {}] = before;
      // Already committed by an attempt that could not record it.
      if (parent === run) return { reply: String(turnOf(body)), seq: turnOf(body) };
      const state = nextState(body);
      const { rows } = await db.query({ ...move, values: [conversation, Date.now(), run, parent, state] });
      if (rows.length !== 1) throw new Error("another turn of the conversation was faster");
      return { reply: String(turnOf(state)), seq: Number(rows[0].seq) };
    },
  };
  const workflow = (work) =>
    DBOS.registerWorkflow((conversation, text) => DBOS.runStep(() => write[work](DBOS.workflowID, conversation, text), { name: "write" }), { name: work });
  const works = { echo: workflow("echo"), snapshot: workflow("snapshot") };
  await DBOS.launch();
  return works;
}

await serve(prepare, start);
