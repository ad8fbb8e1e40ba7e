//! Several replicas on one store: what each must do when others serve, run, end and take over the same turns. Tests are named for the invariants
//! that they show.

mod chaos;
mod control;
mod limits;
mod loss;
mod shared;
mod streams;
