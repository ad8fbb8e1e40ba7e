// Remembers how many messages there were and the name that it was told. Its state is two lines, count and name, as in every other example:
// each goes on where another left off. A worker that shares its state with nobody saves JSON.stringify(anything) instead.
"use strict";

const memory = recall();
memory.count += 1;
const answer = answerTo(message);
save(`${memory.count}\n${memory.name}\n`);
reply(answer);

function recall() {
  if (state === null) return { count: 0, name: "" };
  const lines = /^(\d+)\n([^\n]*)\n/.exec(state);
  // What is thrown ends the turn, and the state stays as it was.
  if (!lines) throw new Error("the state is not two lines, count and name");
  return { count: Number(lines[1]), name: lines[2] };
}

function answerTo(message) {
  const told = /^my name is ([^\n]*)/.exec(message); // a name is one line of the state
  if (told) {
    memory.name = told[1];
    return `Hello ${memory.name}, this is message ${memory.count}.`;
  }
  if (message !== "what is my name?") return `You said: ${message}; this is message ${memory.count}.`;
  if (!memory.name) return `I do not know your name; this is message ${memory.count}.`;
  return `You are ${memory.name}; this is message ${memory.count}.`;
}
