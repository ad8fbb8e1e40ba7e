//! Calls one function of WASI for ever: `sched_yield`, or the one that its message names: args, environ, random, renumber.

use turnhouse_test_guests::{
    message,
    raw::{address, wasi},
};

fn main() {
    let message = message();
    let mut page = vec![0u64; 8 * 1024];
    let (here, there) = (address(page.as_mut_ptr()), address(page[4 * 1024..].as_mut_ptr()));
    loop {
        match message.trim() {
            "args" => wasi::args_get(here, there),
            "environ" => wasi::environ_get(here, there),
            "random" => wasi::random_get(here, 64 * 1024),
            "renumber" => wasi::fd_renumber(1, 1_000),
            _ => wasi::sched_yield(),
        };
    }
}
