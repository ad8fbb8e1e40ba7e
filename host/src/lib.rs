//! Turnhouse runs each turn of a conversation in a fresh WebAssembly instance.

pub mod config;

pub mod clock;

pub mod ids;

pub mod limits;

pub mod content;

pub mod caller;

pub mod agent;

pub mod host;

pub mod submit;

pub mod admission;

pub mod turn;

pub mod lease;

pub mod event;

pub mod store;

pub mod gate;

pub mod sandbox;

pub mod reader;

pub mod registry;
