// What a turn does, the same for every peer: `echo` repeats its message; `snapshot`, as Turnhouse's guest `snapshot_8k`, saves a new state in every turn and replies
// with the turn's number.

const STATE_BYTES = 8 * 1024;

/// A state of 8 KiB that differs in every turn and is hard to compress; `before` is the one of the turn before, or null.
export function nextState(before) {
  const count = (before ? turnOf(before) : 0) + 1;
  const state = Buffer.allocUnsafe(STATE_BYTES);
  let word = Math.imul(count, 0x9e3779b9) | 1;
  for (let at = 4; at < STATE_BYTES; at += 4) {
    word ^= word << 13;
    word ^= word >>> 17;
    word ^= word << 5;
    state.writeInt32LE(word, at);
  }
  state.writeUInt32LE(count, 0);
  return state;
}

/// The number of the turn that left this state.
export function turnOf(state) {
  return state.readUInt32LE(0);
}
