// graphile-worker: a job per turn, with the rows that Turnhouse writes.
//
// Accepting is one statement and one commit: conversation, turn with its message, job. The job reads the state it needs, does the work, and writes reply,
// events and snapshot in one statement and one commit; only then is the client answered. The job itself is struck out by graphile-worker, in batches.
//
// Settings are those of its page on performance: local queue, batched completion without delay, prepared statements. Jobs are in no named queue (the
// documentation advises against one for each conversation); the snapshot's condition keeps turns of a conversation apart instead.
//
// Client and job meet in the process that accepted the turn: each process has tasks of its own. A host that may die would need LISTEN and NOTIFY
// here; they are left out to the peer's advantage.

import { randomUUID } from "node:crypto";
import { Logger, makeWorkerUtils, run } from "graphile-worker";
import { AGENT, CONVERSATION, HYDRATE, ORG, createTables, kept, pool, snapshotWrites } from "./rows.js";
import { serve } from "./serve.js";
import { nextState, turnOf } from "./work.js";

const POOL = Number(process.env.PEER_POOL ?? 10);
const JOBS = Number(process.env.PEER_JOBS ?? 24);
const quiet = new Logger(() => (level, message) => {
  if (level === "error") console.error(message);
});

async function prepare() {
  await createTables();
  const utils = await makeWorkerUtils({ connectionString: process.env.PEER_DATABASE_URL, logger: quiet });
  await utils.migrate();
  await utils.release();
}

async function start(at) {
  const db = pool(POOL);
  const waiting = new Map();
  const tasks = { echo: `echo-${at}`, snapshot: `snapshot-${at}` };

  const accept = {
    name: "accept",
    text: `
      WITH conversation AS (${CONVERSATION}),
      turn AS (
        INSERT INTO turns (org_id, turn_id, agent_id, conversation_id, seq, user_id, accepted_at, message)
        SELECT '${ORG}', $3, '${AGENT}', $1, seq, '${ORG}', $2, $4 FROM conversation)
      SELECT seq, graphile_worker.add_job($5, json_build_object('turn', $3::uuid, 'conversation', $1::text, 'text', $6::text)) FROM conversation`,
  };
  const end = `UPDATE turns SET outcome = 'completed', ended_at = $2, reply = $3, tail_seq = 0, tail = $4 WHERE org_id = '${ORG}' AND turn_id = $1 AND outcome IS NULL`;
  const commit = { name: "commit", text: end };
  // The head is compared and set, so two turns of a conversation never both go on from the same state: who comes second ends nothing and is tried again.
  const commitSnapshot = {
    name: "commit_snapshot",
    text: `
      WITH head AS (
        UPDATE conversations SET head_run = $1, kept_runs = ${kept("$1")}
         WHERE org_id = '${ORG}' AND agent_id = '${AGENT}' AND conversation_id = $5 AND head_run IS NOT DISTINCT FROM $6::uuid
           AND EXISTS (SELECT FROM turns WHERE org_id = '${ORG}' AND turn_id = $1 AND outcome IS NULL)
        RETURNING 1),
      ${snapshotWrites({ conversation: "$5", run: "$1", parent: "$6", at: "$2", body: "$7" })}
      ${end} AND EXISTS (SELECT FROM head)`,
  };
  const ended = (turn, reply) => {
    waiting.get(turn)?.(reply);
    waiting.delete(turn);
  };
  const values = (turn, reply) => [turn, Date.now(), Buffer.from(reply), Buffer.from(JSON.stringify([["output.delta", { text: reply }]]))];

  const taskList = {
    [tasks.echo]: async ({ turn, text }) => {
      await db.query({ ...commit, values: values(turn, text) });
      ended(turn, text);
    },
    [tasks.snapshot]: async ({ turn, conversation }) => {
      const { rows } = await db.query({ ...HYDRATE, values: [conversation] });
      const [{ run_id: parent = null, body = null } = {}] = rows;
      // Already committed by an attempt whose end was not struck out.
      if (parent === turn) return;
      const state = nextState(body);
      const reply = String(turnOf(state));
      const { rowCount } = await db.query({ ...commitSnapshot, values: [...values(turn, reply), conversation, parent, state] });
      if (rowCount !== 1) throw new Error("another turn of the conversation was faster");
      ended(turn, reply);
    },
  };
  await run({
    taskList,
    preset: {
      worker: {
        connectionString: process.env.PEER_DATABASE_URL,
        concurrentJobs: JOBS,
        maxPoolSize: POOL,
        preparedStatements: true,
        pollInterval: 2000,
        localQueue: { size: JOBS + 1 },
        completeJobBatchDelay: 0,
        failJobBatchDelay: 0,
        logger: quiet,
      },
    },
    logger: quiet,
    noHandleSignals: true,
  });

  const submit = (task) => async (conversation, text) => {
    const turn = randomUUID();
    const replied = new Promise((resolve) => waiting.set(turn, resolve));
    const { rows } = await db.query({ ...accept, values: [conversation, Date.now(), turn, Buffer.from(text), task, text] });
    return { reply: await replied, seq: Number(rows[0].seq) };
  };
  return { echo: submit(tasks.echo), snapshot: submit(tasks.snapshot) };
}

await serve(prepare, start);
