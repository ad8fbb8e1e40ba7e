// The HTTP door of a peer that has none of its own, over one or more processes of node.
//
//   POST /{work}/{conversation} {"message": {"text": "…"}}  →  200 {"reply": "…", "seq": 1}
//
// Answered when the turn has ended and is durable, as Turnhouse's stream ends then. node:http and nothing over it: a framework would only cost the
// peer time. The processes share one port; node deals connections out to them in turn. The first line on stdout tells the address; the program
// ends when its standard input does, so that it does not outlive the bench.

import cluster from "node:cluster";
import http from "node:http";

const PROCESSES = Number(process.env.PEER_PROCESSES ?? 1);

/// `prepare` runs once, before any process serves: schemas. `start` runs in each and returns
/// `{echo, snapshot}`, each `(conversation, text) → {reply, seq}`.
export async function serve(prepare, start) {
  if (PROCESSES === 1) {
    await prepare();
    ready(await listen(await start(0)));
    process.stdin.on("end", () => process.exit(0)).resume();
  } else if (cluster.isPrimary) {
    await prepare();
    let listening = 0;
    cluster.on("listening", (_, address) => {
      listening += 1;
      if (listening === PROCESSES) ready(address.port);
    });
    cluster.on("exit", () => process.exit(1));
    for (let at = 0; at < PROCESSES; at += 1) cluster.fork({ PEER_PROCESS: at });
    process.stdin.on("end", () => process.exit(0)).resume();
  } else {
    // Also when the first process was killed and could say nothing.
    process.on("disconnect", () => process.exit(0));
    await listen(await start(Number(process.env.PEER_PROCESS)));
  }
}

function ready(port) {
  console.log(JSON.stringify({ address: `127.0.0.1:${port}`, after: "" }));
}

function listen(works) {
  const server = http.createServer((request, response) => {
    const pieces = [];
    request.on("data", (piece) => pieces.push(piece));
    request.on("end", async () => {
      let status = 200;
      let body;
      try {
        const { message } = JSON.parse(Buffer.concat(pieces));
        const [, work, conversation] = request.url.split("/");
        const turn = works[work];
        body = await turn(conversation, message.text);
      } catch (error) {
        console.error(error);
        status = 500;
        body = { error: String(error) };
      }
      const text = JSON.stringify(body);
      response.writeHead(status, { "content-type": "application/json", "content-length": Buffer.byteLength(text) });
      response.end(text);
    });
  });
  return new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(server.address().port)));
}
