//! A whole host in process, on either store, through its HTTP API. Tests are named for the invariants that they show.

mod attachments;
mod audit;
mod chaos;
mod conversations;
mod edge;
mod embedded;
mod export;
mod gate;
mod isolation;
mod lanes;
mod limits;
mod members;
mod oidc;
mod org_deletion;
mod replicas;
mod snapshots;
mod streams;
mod tenants;
mod tickets;
mod turns;
