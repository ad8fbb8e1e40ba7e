//! Starts a `host.echo` of an hour and closes it at once, uses the handle after that, starts another and leaves it open at its end; replies with what
//! it was told.

use turnhouse_test_guests::raw::{self, address, span, turnhouse};

fn main() {
    let (op, op_len) = span(b"host.echo");
    let (req, req_len) = span(br#"{"frames":["a"],"delay_ms":3600000}"#);
    let mut frame = [0u8; 16];
    let at = address(frame.as_mut_ptr());

    let handle = turnhouse::call(op, op_len, req, req_len);
    let polled = turnhouse::recv(handle, at, 16, 0);
    let closed = turnhouse::close(handle);
    let received = turnhouse::recv(handle, at, 16, 0);
    let error_read = turnhouse::error_read(handle, at, 16);
    let waited = turnhouse::wait(address([handle].as_ptr()), 1, 0);
    let closed_again = turnhouse::close(handle);
    let another = turnhouse::call(op, op_len, req, req_len);
    raw::say(&format!(
        "poll {polled} close {closed} recv {received} error_read {error_read} wait {waited} close {closed_again} another {}",
        if another > handle { "new" } else { "reused" },
    ));
}
