//! Every function that a guest can call, in any order, with any arguments: the turn ends with an outcome that is the guest's, within its bounds.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use turnhouse::sandbox::Worker;
use turnhouse_fuzz::{Begun, guest, run, sandbox};

fn workers() -> &'static [Worker; 2] {
    static WORKERS: OnceLock<[Worker; 2]> = OnceLock::new();
    WORKERS.get_or_init(|| {
        [false, true].map(|speaks| {
            let compiled = sandbox().compile(guest::module(speaks).into());
            sandbox().handle().block_on(compiled).expect("the interpreter is a worker")
        })
    })
}

fuzz_target!(|input: &[u8]| {
    let Some((how, input)) = input.split_first() else { return };
    let speaks = how & 1 == 1;
    // A directory is made and removed for it: for a quarter of the inputs.
    let begun = Begun { shared: how & 2 == 2, snapshot: how & 4 == 4, dry_run: how & 8 == 8, files: how & 48 == 48 };
    run(&workers()[usize::from(speaks)], guest::message(input, speaks), begun);
});
