//! No guest hurts its host, its neighbour or the next tenant. Every hostile guest runs one turn on a whole host while a neighbour of another org has its own
//! turns answered; each ends with the one right code, in time, and leaves nothing behind.
//!
//! `cargo test -p turnhouse-tests --test hostile -- --nocapture` prints how late each was ended, and how long the neighbour's turns took meanwhile.

mod arena;
mod guests;
mod modules;
mod neighbours;
