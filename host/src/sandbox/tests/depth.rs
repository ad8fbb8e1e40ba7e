//! Host functions run on what a guest has left of its native stack: with as little of it as a guest can leave, each of them still works. Where one did not, the
//! whole process would end.

use super::*;

const IMPORTS: &str = r#"
    (import "turnhouse_v1" "abi_revision" (func $abi (result i32)))
    (import "turnhouse_v1" "input_read" (func $input (param i32 i32) (result i32)))
    (import "turnhouse_v1" "message_read" (func $message (param i32 i32) (result i32)))
    (import "turnhouse_v1" "snapshot_read" (func $read (param i32 i32) (result i32)))
    (import "turnhouse_v1" "snapshot_write" (func $write (param i32 i32) (result i32)))
    (import "turnhouse_v1" "emit" (func $emit (param i32 i32 i32 i32) (result i32)))
    (import "turnhouse_v1" "reply" (func $reply (param i32 i32) (result i32)))
    (import "turnhouse_v1" "log" (func $log (param i32 i32 i32) (result i32)))
    (import "turnhouse_v1" "call" (func $call (param i32 i32 i32 i32) (result i32)))
    (import "turnhouse_v1" "recv" (func $recv (param i32 i32 i32 i32) (result i32)))
    (import "turnhouse_v1" "error_read" (func $error (param i32 i32 i32) (result i32)))
    (import "turnhouse_v1" "wait" (func $wait (param i32 i32 i32) (result i32)))
    (import "turnhouse_v1" "close" (func $close (param i32) (result i32)))
    (import "turnhouse_v1" "attachment_read" (func $attachment (param i32 i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "environ_get" (func $environ (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_renumber" (func $renumber (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "fd_readdir" (func $readdir (param i32 i32 i32 i64 i32) (result i32)))
    (import "wasi_snapshot_preview1" "path_open" (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
    (import "wasi_snapshot_preview1" "sched_yield" (func $yield (result i32)))"#;

/// Recurses `depth` times, then calls everything, with what makes it go deepest: JSON in as many brackets as are read, and one more. Replies `deep`.
fn guest(depth: u32) -> String {
    let nested = |brackets: usize| format!("{}1{}", "[".repeat(brackets), "]".repeat(brackets));
    // Of the 128 that the parser goes down, the reply's own frame has four.
    let (accepted, refused) = (nested(123), nested(200));
    let reply =
        |json: &str| format!(r#"{{"parts":[{{"type":"json","data":{json}}},{{"type":"text","text":"deep"}}]}}"#);
    let (accepted, refused, emitted) = (reply(&accepted), reply(&refused), nested(127));
    let request = r#"{"frames":["a"],"fail":true}"#;
    let data = |at: u32, text: &str| format!(r#"(data (i32.const {at}) "{}")"#, text.replace('"', "\\22"));
    format!(
        r#"(module {IMPORTS} (memory (export "memory") 2)
        {} {} {} {} {} {} {}
        (func $all (local $h i32)
          (drop (call $abi)) (drop (call $input (i32.const 60000) (i32.const 100))) (drop (call $message (i32.const 60000) (i32.const 100)))
          (drop (call $read (i32.const 60000) (i32.const 100))) (drop (call $write (i32.const 60000) (i32.const 100)))
          (if (call $emit (i32.const 0) (i32.const 5) (i32.const 20000) (i32.const {emitted_len})) (then (unreachable)))
          (if (i32.ne (call $reply (i32.const 2000) (i32.const {refused_len})) (i32.const -28)) (then (unreachable)))
          (if (call $reply (i32.const 1000) (i32.const {accepted_len})) (then (unreachable)))
          (drop (call $log (i32.const 2) (i32.const 1000) (i32.const 100)))
          (local.set $h (call $call (i32.const 10) (i32.const 9) (i32.const 100) (i32.const {request_len})))
          (i32.store (i32.const 60000) (local.get $h))
          (drop (call $wait (i32.const 60000) (i32.const 1) (i32.const -1)))
          (drop (call $recv (local.get $h) (i32.const 60100) (i32.const 100) (i32.const -1)))
          (drop (call $recv (local.get $h) (i32.const 60100) (i32.const 100) (i32.const 1000)))
          (if (i32.ne (call $recv (local.get $h) (i32.const 60100) (i32.const 100) (i32.const -1)) (i32.const -29)) (then (unreachable)))
          (if (i32.lt_s (call $error (local.get $h) (i32.const 60100) (i32.const 100)) (i32.const 0)) (then (unreachable)))
          (if (call $close (local.get $h)) (then (unreachable)))
          (if (i32.ne (call $attachment (i32.const 40000) (i32.const 71) (i32.const 0) (i32.const 60100) (i32.const 100)) (i32.const 5)) (then (unreachable)))
          (drop (call $args (i32.const 61000) (i32.const 61100))) (drop (call $environ (i32.const 61000) (i32.const 61100)))
          (drop (call $clock (i32.const 0) (i64.const 1) (i32.const 61000)))
          (i32.store (i32.const 60000) (i32.const 1000)) (i32.store (i32.const 60004) (i32.const 20))
          (drop (call $fd_write (i32.const 2) (i32.const 60000) (i32.const 1) (i32.const 60016)))
          (drop (call $fd_read (i32.const 0) (i32.const 60000) (i32.const 1) (i32.const 60016)))
          (drop (call $renumber (i32.const 2) (i32.const 0)))
          (drop (call $readdir (i32.const 3) (i32.const 61000) (i32.const 100) (i64.const 0) (i32.const 60016)))
          (drop (call $open (i32.const 3) (i32.const 0) (i32.const 10) (i32.const 9) (i32.const 0) (i64.const 0) (i64.const 0) (i32.const 0) (i32.const 60016)))
          (memory.fill (i32.const 62000) (i32.const 0) (i32.const 48))
          (i32.store (i32.const 62016) (i32.const 1)) (i64.store (i32.const 62024) (i64.const 1000))
          (drop (call $poll (i32.const 62000) (i32.const 63000) (i32.const 1) (i32.const 60016)))
          (drop (call $random (i32.const 64000) (i32.const 100))) (drop (call $yield)))
        (func $deep (param i32) (result i32)
          (if (result i32) (local.get 0)
            (then (i32.add (i32.const 1) (call $deep (i32.sub (local.get 0) (i32.const 1)))))
            (else (call $all) (i32.const 0))))
        (func (export "_start") (drop (call $deep (i32.const {depth})))))"#,
        data(0, "x.own"),
        data(10, "host.echo"),
        data(100, request),
        data(1000, &accepted),
        data(2000, &refused),
        data(20_000, &emitted),
        data(40_000, &attachments::one().0.to_string()),
        emitted_len = emitted.len(),
        refused_len = refused.len(),
        accepted_len = accepted.len(),
        request_len = request.len(),
    )
}

#[test]
fn every_host_call_works_with_as_little_stack_as_a_guest_can_leave() {
    let turn = || Turn { attachments: attachments::one().1, ..Turn::new() };
    let runs = |depth| match turn().run(&guest(depth)).finished.reply {
        Ok(reply) => {
            assert_eq!(reply.content.joined_text(), "deep");
            true
        }
        Err(failure) => {
            assert_eq!(failure.code, FailureCode::WorkerStackOverflow, "at a depth of {depth}: {failure:?}");
            false
        }
    };
    // A wasm frame takes 16 bytes at least.
    let (mut deepest, mut too_deep) = (0, u32::try_from(Limits::default().wasm_stack_bytes_max).unwrap() / 16 + 1);
    assert!(runs(deepest) && !runs(too_deep));
    while too_deep - deepest > 1 {
        let depth = deepest.midpoint(too_deep);
        if runs(depth) { deepest = depth } else { too_deep = depth }
    }
    assert!(deepest > 1_000, "it went down {deepest} calls");
    println!("every host call was made {deepest} calls deep");
}
