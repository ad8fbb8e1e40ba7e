//! Passes pointers and lengths that are not in its memory to every host function; replies with a line for each: function, case, result.

use std::fmt::Write as _;

use turnhouse_test_guests::raw::{self, address, memory_bytes, span, turnhouse};

/// A (ptr, len) that reaches outside the memory, whatever the memory's size is.
struct Case {
    name: &'static str,
    ptr: i32,
    len: i32,
}

fn main() {
    let end = memory_bytes() as u32 as i32;
    let cases = [
        Case { name: "at_the_end", ptr: end, len: 1 },
        Case { name: "over_the_end", ptr: end - 1, len: 2 },
        Case { name: "last_address", ptr: -1, len: 1 },
        Case { name: "sum_is_2_to_the_32", ptr: i32::MIN, len: i32::MIN },
        Case { name: "sum_wraps_to_small", ptr: -16, len: 32 },
        Case { name: "everything_and_more", ptr: 0, len: -1 },
    ];
    let mut lines = String::new();
    for case in &cases {
        probe(case, &mut lines);
    }
    // With length 0 the pointer is ignored: this is an empty snapshot, an empty request, a question for the size.
    let (delta, delta_len) = span(b"output.delta");
    let _ = writeln!(lines, "input_read zero_length {}", sign(turnhouse::input_read(-1, 0)));
    let _ = writeln!(lines, "snapshot_write zero_length {}", turnhouse::snapshot_write(-1, 0));
    let _ = writeln!(lines, "emit zero_length {}", turnhouse::emit(delta, delta_len, -1, 0));
    let _ = writeln!(lines, "log zero_length {}", turnhouse::log(2, -1, 0));
    // Legal, if odd: everything that it has, and one stretch of memory for two arguments.
    let _ = writeln!(lines, "snapshot_write all_memory {}", turnhouse::snapshot_write(0, end));
    let (op, op_len) = span(b"host.echo");
    let _ = writeln!(lines, "call overlapping {}", turnhouse::call(op, op_len, op, op_len));
    raw::say(&lines);
}

fn probe(case: &Case, lines: &mut String) {
    let Case { name, ptr, len } = *case;
    let ((delta, delta_len), (op, op_len)) = (span(b"output.delta"), span(b"host.echo"));
    let (req, req_len) = span(br#"{"frames":["a"],"delay_ms":0}"#);
    // A live operation with a frame that is ready, so that only the pointer can be at fault.
    let handle = turnhouse::call(op, op_len, req, req_len);
    turnhouse::wait(address([handle].as_ptr()), 1, 1_000);
    let results = [
        ("input_read", turnhouse::input_read(ptr, len)),
        ("message_read", turnhouse::message_read(ptr, len)),
        ("snapshot_read", turnhouse::snapshot_read(ptr, len)),
        ("snapshot_write", turnhouse::snapshot_write(ptr, len)),
        ("emit_kind", turnhouse::emit(ptr, len, delta, delta_len)),
        ("emit_text", turnhouse::emit(delta, delta_len, ptr, len)),
        ("reply", turnhouse::reply(ptr, len)),
        ("log", turnhouse::log(2, ptr, len)),
        ("call_operation", turnhouse::call(ptr, len, req, req_len)),
        ("call_request", turnhouse::call(op, op_len, ptr, len)),
        ("recv", turnhouse::recv(handle, ptr, len, 0)),
        ("error_read", turnhouse::error_read(handle, ptr, len)),
        // A count, of four bytes each. That it is also too many comes second.
        ("wait", turnhouse::wait(ptr, len, 0)),
        ("attachment_id", turnhouse::attachment_read(ptr, len, 0, delta, delta_len)),
        ("attachment_into", turnhouse::attachment_read(delta, delta_len, 0, ptr, len)),
    ];
    for (function, result) in results {
        let _ = writeln!(lines, "{function} {name} {result}");
    }
    turnhouse::close(handle);
}

fn sign(result: i32) -> &'static str {
    if result < 0 { "refused" } else { "size" }
}
