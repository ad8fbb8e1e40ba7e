// Restate: a virtual object per conversation, in a server of one node that this driver starts and ends.
//
// Restate's own ingress is the door (POST /{work}/{conversation}/turn): it makes the message durable, runs one turn of an object at a time, and answers
// when the reply is durable. The service behind it runs in this process, over HTTP/2 as Restate recommends. The object's state is the conversation's row (the
// number of its turns) or the snapshot, which has that number in it; message and reply stay in the invocation for Restate's default retention of a day, as they stay
// in Turnhouse's row of the turn.
//
// The server has its defaults, which its documentation calls sized for production: 24 partitions, and a replicated log of one replica whose every write is
// fsynced. The bench also has it with 4 partitions, which nearly double its rate on two cores. Not its defaults: no telemetry, TCP only, and no log below
// warnings. (It looks for a newer release once as it starts; that it may find no network then delays nothing.)

import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { createServer } from "node:http2";
import { createRequire } from "node:module";
import net from "node:net";
import * as restate from "@restatedev/restate-sdk";
import { nextState, turnOf } from "./work.js";

const bytes = restate.serde.binary;

const echo = restate.object({
  name: "echo",
  handlers: {
    turn: async (ctx, { message }) => {
      const seq = ((await ctx.get("seq")) ?? 0) + 1;
      ctx.set("seq", seq);
      return { reply: message.text, seq };
    },
  },
});

const snapshot = restate.object({
  name: "snapshot",
  handlers: {
    turn: async (ctx) => {
      const before = await ctx.get("state", bytes);
      const state = nextState(before && Buffer.from(before.buffer, before.byteOffset, before.length));
      ctx.set("state", state, bytes);
      return { reply: String(turnOf(state)), seq: turnOf(state) };
    },
  },
});

const [service, ingress, admin, node] = await Promise.all([listen(endpoint()), freePort(), freePort(), freePort()]);

const program = createRequire(createRequire(import.meta.url).resolve("@restatedev/restate-server/package.json")).resolve(
  `@restatedev/restate-server-${process.platform}-${process.arch}/bin/restate-server`,
);
// Where the system can, it goes with this process however that ends.
const bound = existsSync("/usr/bin/setpriv") ? ["/usr/bin/setpriv", "--pdeathsig=KILL", "--", program] : [program];
const server = spawn(bound[0], bound.slice(1), {
  env: {
    ...process.env,
    RESTATE_BASE_DIR: process.env.PEER_DATA_DIR,
    RESTATE_NODE_NAME: "bench",
    RESTATE_LISTEN_MODE: "tcp",
    RESTATE_DEFAULT_NUM_PARTITIONS: process.env.PEER_PARTITIONS ?? "24",
    RESTATE_BIND_ADDRESS: `127.0.0.1:${node}`,
    RESTATE_INGRESS__BIND_ADDRESS: `127.0.0.1:${ingress}`,
    RESTATE_ADMIN__BIND_ADDRESS: `127.0.0.1:${admin}`,
    RESTATE_DISABLE_TELEMETRY: "true",
    RESTATE_LOG_FILTER: "warn",
    RESTATE_LOG_DISABLE_ANSI_CODES: "true",
  },
  stdio: ["ignore", 2, 2],
});
server.on("exit", () => process.exit(1));
process.stdin.on("end", () => server.kill("SIGKILL")).resume();

// Registering succeeds once the node is up.
for (;;) {
  const registered = await fetch(`http://127.0.0.1:${admin}/deployments`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ uri: `http://127.0.0.1:${service}` }),
  }).catch(() => null);
  if (registered?.ok) break;
  await new Promise((resolve) => setTimeout(resolve, 200));
}
console.log(JSON.stringify({ address: `127.0.0.1:${ingress}`, after: "/turn" }));

function endpoint() {
  return createServer(restate.createEndpointHandler({ services: [echo, snapshot] }));
}

function listen(server) {
  return new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(server.address().port)));
}

async function freePort() {
  const probe = net.createServer();
  const port = await listen(probe);
  await new Promise((resolve) => probe.close(resolve));
  return port;
}
