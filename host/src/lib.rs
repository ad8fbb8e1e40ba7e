//! Turnhouse runs each turn of a conversation in a fresh WebAssembly instance.

pub mod config;

pub mod clock;

pub mod ids;

pub mod limits;

pub mod sizing;

pub mod attachment;

pub mod content;

pub mod caller;

pub mod agent;

pub mod notes;

pub mod audit;

pub mod host;

pub mod submit;

pub mod admission;

pub mod quota;

pub mod turn;

pub mod lease;

pub mod event;

pub mod store;

pub mod journal;

pub mod slots;

pub mod turnstile;

pub mod dispatch;

pub mod gate;

pub mod input;

pub mod runner;

pub mod private_dirs;

pub mod sandbox;

pub mod events;

pub mod watch;

pub mod reader;

pub mod registry;

pub mod keys;

pub mod members;

pub mod tickets;

pub mod oidc;

pub mod supervisor;

pub mod sweep;

pub mod tidy;

pub mod erase;

pub mod replica;

pub mod kill_point;

pub mod http;

pub mod meters;

pub mod telemetry;
