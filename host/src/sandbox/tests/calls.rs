//! The functions of `turnhouse_v1`: results, the order of their errors, and that nothing is staged on an error.

use super::*;

/// How many parameters a function has.
fn parameters(function: &str) -> usize {
    match function {
        "abi_revision" => 0,
        "close" => 1,
        "input_read" | "message_read" | "snapshot_read" | "snapshot_write" | "reply" => 2,
        "log" | "error_read" | "wait" => 3,
        "emit" | "call" | "recv" => 4,
        "attachment_read" => 5,
        other => panic!("{other} is no function"),
    }
}

/// The end of the guest's one page.
const END: i32 = 65536;

/// Where a guest's results begin; data lies below.
const RESULTS: i32 = 32 * 1024;

/// Calls functions with constants, one after the other. The answers, and how the turn ended.
pub(super) fn results(turn: Turn, data: &[(i32, &[u8])], calls: &[(&str, &[i32])]) -> (Vec<i32>, Ended) {
    let mut names: Vec<&str> = calls.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    names.dedup();
    let imports: String = names
        .iter()
        .map(|name| {
            let parameters = "i32 ".repeat(parameters(name));
            format!(r#"(import "turnhouse_v1" "{name}" (func ${name} (param {parameters}) (result i32)))"#)
        })
        .collect();
    let data: String = data
        .iter()
        .map(|(at, bytes)| {
            let bytes: String = bytes.iter().map(|b| format!("\\{b:02x}")).collect();
            format!(r#"(data (i32.const {at}) "{bytes}")"#)
        })
        .collect();
    let body: String = calls
        .iter()
        .enumerate()
        .map(|(index, (name, arguments))| {
            let arguments: String = arguments.iter().map(|value| format!("(i32.const {value})")).collect();
            let at = RESULTS + 4 * i32::try_from(index).unwrap();
            format!("(i32.store (i32.const {at}) (call ${name} {arguments}))")
        })
        .collect();
    // The answers go to standard error, as they are.
    let bytes = 4 * calls.len();
    let ended = turn.run(&format!(
        r#"(module {FD_WRITE} {imports} (memory (export "memory") 1 1) {data}
          (func (export "_start") {body}
            (i32.store (i32.const 60000) (i32.const {RESULTS})) (i32.store (i32.const 60004) (i32.const {bytes}))
            (drop (call $fd_write (i32.const 2) (i32.const 60000) (i32.const 1) (i32.const 60008)))))"#
    ));
    let log = &ended.finished.log;
    let answers = log[log.len().saturating_sub(bytes)..]
        .chunks_exact(4)
        .map(|bytes| i32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    (answers, ended)
}

const FAULT: i32 = -21;
const INVAL: i32 = -28;
const ILSEQ: i32 = -25;
const PERM: i32 = -63;
const TOO_BIG: i32 = -1;
const NOENT: i32 = -44;
const NOBUFS: i32 = -42;
const BADF: i32 = -8;
const NOSYS: i32 = -52;

#[test]
fn every_pointer_of_every_function_is_checked() {
    // Past the end, straddling it, and so large that 32 bits would wrap around.
    for (ptr, len) in [(END, 1), (END - 1, 2), (-1, 1), (-4, 8), (8, -1), (0, END + 1), (i32::MIN, i32::MIN)] {
        let (answers, ended) = results(
            Turn { snapshot: Some(Bytes::from_static(b"s")), ..Turn::new() },
            &[(0, b"status"), (16, b"host.echo{}")],
            &[
                ("input_read", &[ptr, len]),
                ("message_read", &[ptr, len]),
                ("snapshot_read", &[ptr, len]),
                ("snapshot_write", &[ptr, len]),
                ("emit", &[ptr, len, 0, 1]),
                ("emit", &[0, 6, ptr, len]),
                // The pointer is looked at before the kind.
                ("emit", &[0, 3, ptr, len]),
                ("reply", &[ptr, len]),
                ("log", &[2, ptr, len]),
                ("log", &[99, ptr, len]),
                ("call", &[ptr, len, 25, 2]),
                ("call", &[16, 9, ptr, len]),
                ("recv", &[1, ptr, len, 0]),
                ("error_read", &[1, ptr, len]),
                ("attachment_read", &[ptr, len, 0, 0, 1]),
                ("attachment_read", &[0, 6, 0, ptr, len]),
            ],
        );
        assert_eq!(answers, [FAULT; 16], "({ptr}, {len})");
        assert!(ended.events.is_empty() && ended.finished.snapshot.is_none());
        assert_eq!(ended.code(), FailureCode::NoReply);
    }
}

#[test]
fn the_handles_of_wait_are_checked_in_64_bits() {
    let (answers, _) = results(
        Turn::new(),
        &[],
        &[
            ("wait", &[END - 4, 2, 0]),
            // 4 × 2³⁰ is 0 in 32 bits.
            ("wait", &[0, 1 << 30, 0]),
            ("wait", &[0, 0, 0]),
            ("wait", &[0, 9, 0]),
            ("wait", &[0, 1, 0]),
        ],
    );
    assert_eq!(answers, [FAULT, FAULT, INVAL, INVAL, BADF]);
}

#[test]
fn reads_copy_what_fits_and_answer_the_total() {
    let (answers, ended) = results(
        Turn { snapshot: Some(Bytes::from_static(b"state")), ..Turn::new() },
        &[(0, b"output.delta")],
        &[
            ("abi_revision", &[]),
            ("input_read", &[0, 0]),
            ("message_read", &[-1, 0]),
            ("message_read", &[100, 3]),
            ("snapshot_read", &[103, 100]),
            // At the very end, and longer than what is there.
            ("message_read", &[END - 5, 5]),
            ("emit", &[0, 12, 100, 9]),
            ("emit", &[0, 12, END - 5, 5]),
        ],
    );
    assert_eq!(answers, [2, 12, 5, 5, 5, 5, 0, 0]);
    assert_eq!(ended.deltas(), ["helstate\0", "hello"]);
    assert_eq!(ended.finished.usage.host_calls, 8);
}

#[test]
fn without_a_snapshot_there_is_none_and_an_empty_one_is_empty() {
    let read: &[(&str, &[i32])] = &[("snapshot_read", &[0, 0])];
    assert_eq!(results(Turn::new(), &[], read).0, [NOENT]);
    assert_eq!(results(Turn { snapshot: Some(Bytes::new()), ..Turn::new() }, &[], read).0, [0]);
    // A private turn reads nothing shared, whatever it was handed.
    let private = Turn { snapshot: Some(Bytes::from_static(b"s")), grant: Grant::Private, ..Turn::new() };
    assert_eq!(results(private, &[], read).0, [NOENT]);
}

#[test]
fn s2_without_a_permit_nothing_is_staged() {
    let mut turn = Turn { grant: Grant::Private, ..Turn::new() };
    turn.limits.snapshot_bytes_max = 4;
    // The permit is asked for before the size is looked at, and after the pointer.
    let (answers, ended) = results(
        turn,
        &[(0, b"state")],
        &[("snapshot_write", &[0, 2]), ("snapshot_write", &[0, 5]), ("snapshot_write", &[END, 5])],
    );
    assert_eq!(answers, [PERM, PERM, FAULT]);
    assert_eq!(ended.finished.snapshot, None);
    assert!(ended.events.is_empty());
}

#[test]
fn s5_a_snapshot_over_the_limit_is_refused_and_told_and_the_earlier_stays() {
    let mut turn = Turn::new();
    turn.limits.snapshot_bytes_max = 4;
    let (answers, ended) = results(
        turn,
        &[(0, b"state"), (10, br#"{"text":"ok"}"#)],
        &[("snapshot_write", &[0, 4]), ("snapshot_write", &[0, 5]), ("reply", &[10, 13])],
    );
    assert_eq!(answers, [0, TOO_BIG, 0]);
    assert_eq!(ended.finished.snapshot.as_deref(), Some(b"stat".as_slice()));
    assert_eq!(ended.of_kind("snapshot.rejected"), [&serde_json::json!({"bytes": 5, "limit_bytes": 4})]);
    assert_eq!(ended.text(), "ok");
}

#[test]
fn a_guest_is_told_of_refused_snapshots_no_more_often_than_it_may_speak() {
    let mut turn = Turn::new();
    turn.limits.snapshot_bytes_max = 4;
    turn.limits.emit_events_max = 20;
    let ended = turn.run(
        r#"(module (import "turnhouse_v1" "snapshot_write" (func $write (param i32 i32) (result i32))) (memory (export "memory") 1)
        (func (export "_start") (loop $l (br_if $l (i32.eq (call $write (i32.const 0) (i32.const 5)) (i32.const -1))))))"#,
    );
    assert_eq!((ended.code(), ended.events.len()), (FailureCode::OutputLimit, 20));
    assert_eq!(ended.finished.snapshot, None);
}

#[test]
fn the_last_snapshot_wins_and_may_be_empty() {
    let (answers, ended) =
        results(Turn::new(), &[(0, b"state")], &[("snapshot_write", &[0, 5]), ("snapshot_write", &[0, 0])]);
    assert_eq!(answers, [0, 0]);
    assert_eq!(ended.finished.snapshot, Some(Bytes::new()));
}

#[test]
fn emit_checks_kind_then_text_then_size_then_room() {
    let mut turn = Turn::new();
    turn.limits.emit_bytes_max = 8;
    turn.limits.emit_events_max = 3;
    let (answers, ended) = results(
        turn,
        &[
            (0, b"output.delta"),
            (20, b"x.tool"),
            (30, b"status"),
            (40, b"\xff\xfe"),
            (50, b"{ \"a\" :\n1}"),
            (70, b"{nonsense"),
            (80, b"x.BAD"),
        ],
        &[
            ("emit", &[0, 6, 40, 2]),   // an unknown kind, before invalid text
            ("emit", &[80, 5, 50, 2]),  // an invalid own name
            ("emit", &[0, 12, 40, 2]),  // invalid text
            ("emit", &[30, 6, 40, 2]),  // the same of a status
            ("emit", &[20, 6, 70, 9]),  // no JSON, before its size
            ("emit", &[20, 6, 50, 10]), // JSON, too big
            ("emit", &[20, 6, 52, 3]),  // `"a"`
            ("emit", &[30, 6, 0, 6]),   // a status
            ("emit", &[0, 12, 0, 0]),   // an empty delta is none
            ("emit", &[0, 12, 0, 8]),   // a delta
            ("emit", &[0, 12, 0, 9]),   // too big, before no room
            ("emit", &[0, 12, 0, 1]),   // no room
        ],
    );
    assert_eq!(answers, [INVAL, INVAL, ILSEQ, ILSEQ, INVAL, TOO_BIG, 0, 0, 0, 0, TOO_BIG, NOBUFS]);
    let kinds: Vec<&str> = ended.events.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["x.tool", "status", "output.delta"]);
    assert_eq!(ended.of_kind("x.tool"), [&serde_json::json!("a")]);
    assert_eq!(ended.of_kind("status"), [&serde_json::json!({"text": "output"})]);
    assert_eq!((ended.deltas(), ended.code()), (vec!["output.d"], FailureCode::OutputLimit));
}

#[test]
fn deltas_over_the_replys_limit_are_refused_and_a_cut_reply_is_output_limit() {
    let data: &[(i32, &[u8])] = &[(0, b"output.delta"), (20, br#"{"text":"whole"}"#)];
    let deltas: [(&str, &[i32]); 2] = [("emit", &[0, 12, 0, 6]), ("emit", &[0, 12, 0, 5])];
    let turn = || {
        let mut turn = Turn::new();
        turn.limits.reply_bytes_max = 10;
        turn
    };
    let (answers, ended) = results(turn(), data, &deltas);
    assert_eq!((answers, ended.code()), (vec![0, TOO_BIG], FailureCode::OutputLimit));
    assert!(ended.failure().detail.contains("limits.reply_bytes_max"));
    // A whole reply makes up for it.
    let (answers, ended) = results(turn(), data, &[deltas[0], deltas[1], ("reply", &[20, 16])]);
    assert_eq!((answers, ended.text().as_str()), (vec![0, TOO_BIG, 0], "whole"));
}

#[test]
fn a_guest_that_goes_on_emitting_is_ended() {
    for kind in ["output.delta", "status"] {
        let ended = Turn { turn_timeout_ms: 60_000, ..Turn::new() }.run(&format!(
            r#"(module (import "turnhouse_v1" "emit" (func $emit (param i32 i32 i32 i32) (result i32)))
            (memory (export "memory") 1) (data (i32.const 0) "{kind}")
            (func (export "_start") (loop $l
              (drop (call $emit (i32.const 0) (i32.const {}) (i32.const 0) (i32.const 6))) (br $l))))"#,
            kind.len()
        ));
        assert_eq!(ended.code(), FailureCode::OutputLimit, "{kind}");
        assert_eq!(ended.events.len(), 10_000);
        assert!(ended.failure().detail.contains("limits.emit_events_max"));
    }
}

#[test]
fn the_last_reply_wins_and_says_whether_it_replaces_the_deltas() {
    let data: &[(i32, &[u8])] = &[
        (0, b"output.delta"),
        (20, br#"{"text":"output"}"#),
        (40, br#"{"text":"no"}"#),
        (60, br#"{"parts":[{"type":"text","text":"out"},{"type":"text","text":"put"}]}"#),
        (200, br#"{"parts":[{"type":"json","data":{"a":1}}]}"#),
    ];
    let delta: (&str, &[i32]) = ("emit", &[0, 12, 0, 6]);
    for (reply, len, replaces) in [(20, 17, false), (40, 13, true), (60, 69, false), (200, 42, true)] {
        let (answers, ended) = results(Turn::new(), data, &[("reply", &[40, 13]), delta, ("reply", &[reply, len])]);
        assert_eq!(answers, [0, 0, 0]);
        let reply = ended.finished.reply.unwrap();
        assert_eq!(reply.replaces_deltas, replaces, "{reply:?}");
    }
    let (_, ended) = results(Turn::new(), data, &[delta]);
    let reply = ended.finished.reply.unwrap();
    assert!(reply.content.joined_text() == "output" && !reply.replaces_deltas);
}

#[test]
fn reply_checks_text_then_shape_then_size() {
    let mut turn = Turn::new();
    turn.limits.reply_bytes_max = 4;
    let (answers, ended) = results(
        turn,
        &[
            (0, b"\xff"),
            (10, br#"{"txt":"a"}"#),
            (30, br#"{"text":"12345"}"#),
            (50, br#"{"parts":[{"type":"blob","media_type":"image/png","base64":"!"}]}"#),
            (150, br#"{"text":"1234"}"#),
            (200, br#"{"text":"1","parts":[]}"#),
        ],
        &[
            ("reply", &[150, 15]),
            ("reply", &[0, 1]),
            ("reply", &[0, 0]),
            ("reply", &[10, 11]),
            ("reply", &[30, 16]),
            ("reply", &[200, 23]),
            // No JSON, and far longer than any reply may be written.
            ("reply", &[1000, 30_000]),
        ],
    );
    assert_eq!(answers, [0, ILSEQ, INVAL, INVAL, TOO_BIG, INVAL, INVAL]);
    assert_eq!(ended.text(), "1234", "what was staged before stays");
    let (answers, _) = results(
        Turn::new(),
        &[(50, br#"{"parts":[{"type":"blob","media_type":"image/png","base64":"!"}]}"#)],
        &[("reply", &[50, 65])],
    );
    assert_eq!(answers, [INVAL]);
}

#[test]
fn a_text_that_is_over_every_limit_is_refused_unread() {
    const MIB: i32 = 1 << 20;
    // All of it is brackets that nothing closes: no JSON, but text.
    let brackets = |call: &str| {
        let mut turn = Turn::new();
        turn.limits.reply_bytes_max = 100;
        turn.limits.operation_request_bytes_max = 100;
        turn.limits.log_bytes_max = 100;
        turn.run(&format!(
            r#"(module
            (import "turnhouse_v1" "emit" (func $emit (param i32 i32 i32 i32) (result i32)))
            (import "turnhouse_v1" "reply" (func $reply (param i32 i32) (result i32)))
            (import "turnhouse_v1" "call" (func $call (param i32 i32 i32 i32) (result i32)))
            (import "turnhouse_v1" "log" (func $log (param i32 i32 i32) (result i32)))
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 64)
            (data (i32.const 0) "output.delta") (data (i32.const 20) "x.own") (data (i32.const 30) "host.echo")
            (func (export "_start")
              (memory.fill (i32.const 100) (i32.const 0x5b) (i32.const {}))
              (call $exit (i32.sub (i32.const 0) {call}))))"#,
            3 * MIB
        ))
    };
    for (call, read, unread) in [
        ("(call $emit (i32.const 20) (i32.const 5) (i32.const 100) (i32.const LEN))", INVAL, TOO_BIG),
        ("(call $emit (i32.const 0) (i32.const 12) (i32.const 100) (i32.const LEN))", TOO_BIG, TOO_BIG),
        ("(call $emit (i32.const 100) (i32.const LEN) (i32.const 100) (i32.const 1))", INVAL, INVAL),
        ("(call $reply (i32.const 100) (i32.const LEN))", INVAL, TOO_BIG),
        ("(call $call (i32.const 30) (i32.const 9) (i32.const 100) (i32.const LEN))", INVAL, TOO_BIG),
        ("(call $call (i32.const 100) (i32.const LEN) (i32.const 100) (i32.const 1))", NOSYS, NOSYS),
    ] {
        for (len, expected) in [(MIB, read), (MIB + 1, unread)] {
            let ended = brackets(&call.replace("LEN", &len.to_string()));
            assert_eq!(ended.failure().facts["exit_code"], -expected, "{call} of {len}");
        }
    }
    let ended = brackets(&format!(
        "(i32.add (i32.const -7) (call $log (i32.const 2) (i32.const 100) (i32.const {})))",
        2 * MIB
    ));
    assert_eq!(ended.failure().facts["exit_code"], 7);
    let log = [b"info: ".as_slice(), &[b'['; 94]].concat();
    assert_eq!((ended.finished.log, ended.finished.log_bytes_dropped), (log, 2 * MIB as u64 - 94 + 1));
}

#[test]
fn a_line_is_cut_between_characters_and_what_is_kept_of_it_is_text() {
    let mut turn = Turn::new();
    turn.limits.log_bytes_max = 9;
    let line = "ééééé";
    let (_, ended) = results(turn, &[(0, line.as_bytes())], &[("log", &[2, 0, 10])]);
    assert!(ended.finished.log.starts_with("info: é".as_bytes()), "{:?}", ended.finished.log);
    let mut turn = Turn::new();
    turn.limits.log_bytes_max = 30;
    // Broken within what is kept; and only beyond it.
    let (answers, _) = results(turn, &[(0, b"a\xff")], &[("log", &[2, 0, 2])]);
    assert_eq!(answers, [ILSEQ]);
}

#[test]
fn t3_an_empty_reply_is_no_reply() {
    for reply in [br#"{"text":""}"#.as_slice(), br#"{"parts":[]}"#] {
        let len = i32::try_from(reply.len()).unwrap();
        let (answers, ended) = results(Turn::new(), &[(0, reply)], &[("reply", &[0, len])]);
        assert_eq!((answers, ended.code()), (vec![0], FailureCode::NoReply));
    }
}

#[test]
fn standard_output_of_a_speaking_guest_goes_to_the_log() {
    let ended = Turn::new().run(&format!(
        r#"(module {FD_WRITE} (import "turnhouse_v1" "reply" (func $reply (param i32 i32) (result i32)))
        (memory (export "memory") 1) (data (i32.const 0) "\64\00\00\00\05\00\00\00") (data (i32.const 100) "debug{{\"text\":\"a\"}}")
        (func (export "_start")
          (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
          (drop (call $reply (i32.const 105) (i32.const 12)))))"#
    ));
    assert_eq!((ended.text().as_str(), ended.finished.log.as_slice()), ("a", b"debug".as_slice()));
    assert!(ended.events.is_empty());
}

#[test]
fn log_lines_carry_their_level_and_are_bounded() {
    let mut turn = Turn::new();
    turn.limits.log_bytes_max = 25;
    let (_, ended) = results(turn, &[(0, b"hello\xff")], &[("log", &[2, 0, 5]), ("log", &[4, 0, 5])]);
    assert_eq!(ended.finished.log, b"info: hello\nerror: hello\n");
    assert_eq!(ended.finished.log_bytes_dropped, 8, "the answers found no room");
    let (answers, _) =
        results(Turn::new(), &[(0, b"\xff")], &[("log", &[5, 0, 1]), ("log", &[-1, 0, 1]), ("log", &[0, 0, 1])]);
    assert_eq!(answers, [INVAL, INVAL, ILSEQ]);
}

#[test]
fn host_calls_are_counted_and_end_the_guest_at_their_limit() {
    let mut turn = Turn::new();
    turn.limits.host_calls_max = 100;
    let ended = turn.run(
        r#"(module (import "turnhouse_v1" "abi_revision" (func $abi (result i32))) (memory (export "memory") 1)
        (func (export "_start") (loop $l (drop (call $abi)) (br $l))))"#,
    );
    assert_eq!(ended.code(), FailureCode::HostCallLimit);
    assert!(ended.failure().detail.contains("100 host calls"));
    assert_eq!(ended.finished.usage.host_calls, 101);
}

#[test]
fn a_guest_that_loops_inside_host_calls_uses_up_its_cpu_time() {
    let mut turn = Turn { cpu_timeout_ms: 50, ..Turn::new() };
    turn.limits.host_calls_max = u64::MAX;
    let ended = turn.run(
        r#"(module (import "turnhouse_v1" "message_read" (func $read (param i32 i32) (result i32))) (memory (export "memory") 1)
        (func (export "_start") (loop $l (drop (call $read (i32.const 0) (i32.const 5))) (br $l))))"#,
    );
    assert_eq!(ended.code(), FailureCode::CpuTimeout);
}

#[test]
fn t6_the_same_status_again_is_no_progress() {
    let mut turn = Turn { idle_timeout_ms: 60, ..Turn::new() };
    turn.limits.emit_events_max = u64::MAX;
    let ended = turn.run(        r#"(module (import "turnhouse_v1" "emit" (func $emit (param i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 1) (data (i32.const 0) "status")
        (func (export "_start") (loop $l (drop (call $emit (i32.const 0) (i32.const 6) (i32.const 0) (i32.const 6))) (br $l))))"#
    );
    assert_eq!(ended.code(), FailureCode::IdleTimeout);
}

#[test]
fn a_slow_reader_holds_emit_back() {
    let heard = Heard { behind: true, ..Heard::default() };
    let (answers, ended) = results(Turn { heard, ..Turn::new() }, &[(0, b"output.delta")], &[("emit", &[0, 12, 0, 6])]);
    assert_eq!((answers, ended.waited), (vec![0], 1));
}

#[test]
fn an_unknown_operation_is_nosys() {
    let (answers, ended) = results(
        Turn::new(),
        &[(0, b"host.echo?"), (20, b"{}")],
        &[("call", &[0, 10, 20, 2]), ("call", &[0, 0, 20, 2]), ("call", &[0, 9, 0, 1])],
    );
    assert_eq!(answers, [NOSYS, NOSYS, INVAL]);
    assert!(ended.events.is_empty());
}

#[test]
fn a_start_function_may_call_the_host() {
    let ended = Turn::new().run(
        r#"(module (import "turnhouse_v1" "emit" (func $emit (param i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 1) (data (i32.const 0) "output.delta")
        (func $init (drop (call $emit (i32.const 0) (i32.const 12) (i32.const 0) (i32.const 6))))
        (start $init) (func (export "_start")))"#,
    );
    assert_eq!(ended.text(), "output");
}
