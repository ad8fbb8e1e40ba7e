//! Renumbers and closes descriptors that are not there, and then its own streams, in ways that no program would. Replies with a line for each: what and
//! the errno.

use std::fmt::Write as _;

use turnhouse_test_guests::raw::{self, address, wasi};

fn main() {
    let mut lines = String::new();
    let mut tell = |what: &str, errno: i32| {
        let _ = writeln!(lines, "{what} {errno}");
    };
    for bad in [3, 4, 1_000, i32::MAX, i32::MIN, -1] {
        tell("from_bad", wasi::fd_renumber(bad, 1));
        tell("to_bad", wasi::fd_renumber(1, bad));
        tell("bad_to_bad", wasi::fd_renumber(bad, bad));
        tell("close_bad", wasi::fd_close(bad));
    }
    tell("to_itself", wasi::fd_renumber(1, 1));
    tell("stdout_over_stdin", wasi::fd_renumber(1, 0));
    tell("stdout_is_gone", wasi::fd_close(1));
    tell("write_to_stdin", write(0, b"to the log"));
    let mut byte = [0u8];
    let vector = [address(byte.as_mut_ptr()), 1];
    let mut count = 0u32;
    tell("read_from_it", wasi::fd_read(0, address(vector.as_ptr()), 1, address(&raw mut count)));
    tell("stderr_over_it", wasi::fd_renumber(2, 0));
    tell("close_the_last", wasi::fd_close(0));
    tell("close_it_again", wasi::fd_close(0));
    tell("write_to_nothing", write(2, b"nobody hears this"));
    raw::say(&lines);
}

fn write(fd: i32, bytes: &[u8]) -> i32 {
    let vector = [address(bytes.as_ptr()), bytes.len() as i32];
    let mut count = 0u32;
    wasi::fd_write(fd, address(vector.as_ptr()), 1, address(&raw mut count))
}
