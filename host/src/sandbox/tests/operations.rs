//! Operations: handles, waiting, time-outs, closing, failing, and what they do to a turn's clocks and its code.

use std::borrow::Cow;

use super::calls::results;
use super::*;
use crate::sandbox::operations::{Class, Frames, InvalidRequest, Operation, OperationError, Prepared, Registry};

const AGAIN: i32 = -6;
const BADF: i32 = -8;
const INVAL: i32 = -28;
const IO: i32 = -29;
const MFILE: i32 = -33;
const NOBUFS: i32 = -42;
const NOENT: i32 = -44;
const TIMED_OUT: i32 = -73;
const TOO_BIG: i32 = -1;

/// `host.echo` at 0, its request at 100; answers are received at 1000.
fn echo(turn: Turn, request: &str, calls: &[(&str, &[i32])]) -> (Vec<i32>, Ended) {
    results(turn, &[(0, b"host.echo"), (100, request.as_bytes()), (600, &[1, 0, 0, 0, 2, 0, 0, 0])], calls)
}

fn call(request: &str) -> [i32; 4] {
    [0, 9, 100, i32::try_from(request.len()).unwrap()]
}

#[test]
fn frames_come_in_order_then_the_end_for_ever() {
    let request = r#"{"frames":["a","bcd"],"delay_ms":20}"#;
    let (answers, ended) = echo(
        Turn::new(),
        request,
        &[
            ("call", &call(request)),
            ("recv", &[1, 1000, 100, 0]),
            ("recv", &[1, 1000, 100, 5]),
            ("recv", &[1, 1000, 100, -1]),
            ("recv", &[1, 1000, 100, -1]),
            // Too long for the buffer: told, not taken.
            ("recv", &[1, 1000, 2, -1]),
            ("recv", &[1, 1000, 0, 0]),
            ("recv", &[1, 1000, 3, 0]),
            ("recv", &[1, 1000, 100, -1]),
            ("recv", &[1, 1000, 100, 0]),
            ("error_read", &[1, 0, 0]),
            ("close", &[1]),
            ("close", &[1]),
            ("recv", &[1, 1000, 100, 0]),
        ],
    );
    assert_eq!(answers, [1, AGAIN, TIMED_OUT, 12, 1, 3, 3, 3, 0, 0, NOENT, 0, BADF, BADF]);
    let started = ended.of_kind("operation.started");
    assert_eq!(started, [&serde_json::json!({"handle": 1, "name": "host.echo", "class": "none"})]);
    let finished = ended.of_kind("operation.finished");
    assert_eq!(finished.len(), 1);
    assert_eq!(
        (&finished[0]["result"], &finished[0]["frames"], &finished[0]["bytes"]),
        (&"ok".into(), &3.into(), &16.into())
    );
    assert!(finished[0]["duration_ms"].as_u64().unwrap() >= 20);
}

#[test]
fn what_is_received_is_what_was_sent() {
    let request = r#"{"frames":["grüße"]}"#;
    let data: &[(i32, &[u8])] = &[(0, b"host.echo"), (20, b"output.delta"), (100, request.as_bytes())];
    let (_, ended) = results(
        Turn::new(),
        data,
        &[
            ("call", &call(request)),
            ("recv", &[1, 1000, 100, -1]),
            ("recv", &[1, 1012, 100, -1]),
            ("emit", &[20, 12, 1000, 19]),
        ],
    );
    assert_eq!(ended.text(), r#"{"frames":1}grüße"#);
}

#[test]
fn handles_count_from_one_and_are_never_used_again() {
    let (answers, _) = echo(
        Turn::new(),
        "{}",
        &[
            ("call", &call("{}")),
            ("close", &[1]),
            ("call", &call("{}")),
            ("recv", &[1, 1000, 100, 0]),
            ("recv", &[0, 1000, 100, 0]),
            ("recv", &[-1, 1000, 100, 0]),
            ("close", &[3]),
        ],
    );
    assert_eq!(answers, [1, 0, 2, BADF, BADF, BADF, BADF]);
}

#[test]
fn a_failed_operation_is_io_and_says_why_until_it_is_closed() {
    let request = r#"{"fail":true}"#;
    let data: &[(i32, &[u8])] = &[(0, b"host.echo"), (20, b"x.error"), (100, request.as_bytes())];
    let (answers, ended) = results(
        Turn::new(),
        data,
        &[
            ("call", &call(request)),
            ("recv", &[1, 1000, 100, -1]),
            ("error_read", &[1, 1000, 500]),
            ("emit", &[20, 7, 1000, 108]),
            ("recv", &[1, 1000, 100, -1]),
            ("close", &[1]),
            ("error_read", &[1, 1000, 500]),
        ],
    );
    let error = serde_json::json!({
        "code": "provider_unavailable", "detail": "the echo was asked to fail", "retryable": true, "retry_after_ms": 1000
    });
    let len = i32::try_from(error.to_string().len()).unwrap();
    assert_eq!(answers, [1, IO, len, 0, IO, 0, BADF]);
    assert_eq!(ended.of_kind("x.error"), [&error]);
    assert_eq!(ended.of_kind("operation.finished")[0]["result"], "provider_unavailable");
}

#[test]
fn a_failing_operation_may_have_answered_before() {
    let request = r#"{"frames":["a"],"fail":true}"#;
    let recv: (&str, &[i32]) = ("recv", &[1, 1000, 100, -1]);
    let (answers, _) = echo(Turn::new(), request, &[("call", &call(request)), recv, recv, recv]);
    assert_eq!(answers, [1, 12, 1, IO]);
}

#[test]
fn t7_a_failed_turn_takes_the_code_of_its_last_operation() {
    let fail = r#"{"fail":true}"#;
    let recv: (&str, &[i32]) = ("recv", &[1, 1000, 100, -1]);
    let (_, ended) = echo(Turn::new(), fail, &[("call", &call(fail)), recv]);
    let failure = ended.failure();
    assert_eq!(failure.code, FailureCode::ProviderUnavailable);
    assert!(failure.retryable && failure.facts["retry_after_ms"] == 1000);
    assert!(failure.cause.as_ref().unwrap().starts_with("no_reply: "));
    // One that succeeded after it clears the blame.
    let both = r#"{"fail":true}{"frames":[]}"#;
    let (_, ended) = echo(
        Turn::new(),
        both,
        &[
            ("call", &call(fail)),
            recv,
            ("call", &[0, 9, 113, 13]),
            ("recv", &[2, 1000, 100, -1]),
            ("recv", &[2, 1000, 100, -1]),
        ],
    );
    assert_eq!(ended.code(), FailureCode::NoReply);
    assert_eq!(ended.failure().cause, None);
}

#[test]
fn an_operation_over_its_time_ends_with_io_and_operation_timeout() {
    let request = r#"{"delay_ms":60000}"#;
    let mut turn = Turn::new();
    turn.limits.operation_timeout_ms = 40;
    // The guest's own time-out is another thing: the operation goes on.
    let (answers, ended) = echo(
        turn,
        request,
        &[
            ("call", &call(request)),
            ("recv", &[1, 1000, 100, 5]),
            ("recv", &[1, 1000, 100, -1]),
            ("error_read", &[1, 0, 0]),
        ],
    );
    assert_eq!(answers[..3], [1, TIMED_OUT, IO]);
    assert!(answers[3] > 0);
    assert_eq!(ended.of_kind("operation.finished")[0]["result"], "operation_timeout");
    assert_eq!(ended.code(), FailureCode::NoReply, "a time-out of the host's own is no provider's failure");
}

#[test]
fn wait_answers_the_first_that_is_ready() {
    let requests = r#"{"delay_ms":60000}{"delay_ms":20}"#;
    let (answers, ended) = echo(
        Turn::new(),
        requests,
        &[
            ("call", &[0, 9, 100, 18]),
            ("call", &[0, 9, 118, 15]),
            ("wait", &[600, 2, 0]),
            ("wait", &[600, 2, 5]),
            ("wait", &[600, 2, -1]),
            ("recv", &[2, 1000, 100, 0]),
            ("recv", &[2, 1000, 100, 0]),
            // One that has ended stays ready.
            ("wait", &[600, 2, 0]),
            ("wait", &[600, 1, 0]),
            ("wait", &[600, 3, 0]),
        ],
    );
    assert_eq!(answers, [1, 2, AGAIN, TIMED_OUT, 1, 12, 0, 1, AGAIN, BADF]);
    let results: Vec<_> = ended.of_kind("operation.finished").iter().map(|data| data["result"].clone()).collect();
    assert_eq!(results, ["ok", "closed"], "what still runs at the guest's end is closed");
}

#[test]
fn requests_are_checked_and_bounded() {
    let mut turn = Turn::new();
    turn.limits.operation_request_bytes_max = 16;
    let requests = r#"{"frames":["a","b"]}{"frame":1}{"delay_ms":-1}[]"#;
    let (answers, ended) = echo(
        turn,
        requests,
        &[
            ("call", &[0, 9, 100, 20]),
            ("call", &[0, 9, 120, 11]),
            ("call", &[0, 9, 131, 15]),
            ("call", &[0, 9, 0, 0]),
            // No JSON, before its size.
            ("call", &[0, 9, 100, 40]),
        ],
    );
    assert_eq!(answers, [TOO_BIG, INVAL, INVAL, INVAL, INVAL]);
    assert!(ended.events.is_empty());
}

#[test]
fn too_many_at_once_and_too_many_in_all_are_told_apart() {
    let request = r#"{"delay_ms":60000}"#;
    let mut turn = Turn::new();
    turn.limits.operations_concurrent_max = 2;
    turn.limits.operations_max = 3;
    let one: (&str, [i32; 4]) = ("call", call(request));
    let one: (&str, &[i32]) = (one.0, &one.1);
    let (answers, _) = echo(turn, request, &[one, one, one, ("close", &[1]), one, ("close", &[2]), one]);
    assert_eq!(answers, [1, 2, MFILE, 0, 3, 0, NOBUFS]);
}

#[test]
fn answers_over_their_limits_end_the_operation() {
    let request = r#"{"frames":["aaaaaaaa","aaaaaaaa","aaaaaaaa"]}"#;
    let recv: (&str, &[i32]) = ("recv", &[1, 1000, 100, -1]);
    for (frame_max, response_max) in [(4, 1000), (100, 25)] {
        let mut turn = Turn::new();
        turn.limits.operation_frame_bytes_max = frame_max;
        turn.limits.operation_response_bytes_max = response_max;
        let (answers, ended) = echo(turn, request, &[("call", &call(request)), recv, recv, recv, recv]);
        assert_eq!(answers.last(), Some(&IO));
        assert_eq!(ended.of_kind("operation.finished")[0]["result"], "operation_limit");
    }
}

#[test]
fn the_idle_clock_stands_still_while_an_operation_is_in_flight() {
    let request = r#"{"delay_ms":150}"#;
    let recv: (&str, &[i32]) = ("recv", &[1, 1000, 100, -1]);
    let (answers, _) =
        echo(Turn { idle_timeout_ms: 60, ..Turn::new() }, request, &[("call", &call(request)), recv, recv]);
    assert_eq!(answers, [1, 12, 0]);
}

#[test]
fn t6_a_guest_that_waits_for_ever_is_ended_by_its_turns_time() {
    let request = r#"{"delay_ms":60000}"#;
    let (_, ended) = echo(
        Turn { turn_timeout_ms: 80, ..Turn::new() },
        request,
        &[("call", &call(request)), ("recv", &[1, 1000, 100, -1])],
    );
    assert_eq!(ended.code(), FailureCode::TurnTimeout);
    assert_eq!(ended.of_kind("operation.finished")[0]["result"], "closed");
}

#[test]
fn t6_calling_a_provider_that_keeps_failing_is_no_progress() {
    let request = r#"{"fail":true,"delay_ms":5}"#;
    let mut turn = Turn { idle_timeout_ms: 60, ..Turn::new() };
    turn.limits.operations_max = u64::from(u32::MAX);
    let ended = turn.run(&format!(
        r#"(module
        (import "turnhouse_v1" "call" (func $call (param i32 i32 i32 i32) (result i32)))
        (import "turnhouse_v1" "recv" (func $recv (param i32 i32 i32 i32) (result i32)))
        (import "turnhouse_v1" "close" (func $close (param i32) (result i32)))
        (memory (export "memory") 1) (data (i32.const 0) "host.echo") (data (i32.const 100) "{}")
        (func (export "_start") (local $h i32)
          (loop $l
            (local.set $h (call $call (i32.const 0) (i32.const 9) (i32.const 100) (i32.const {})))
            (drop (call $recv (local.get $h) (i32.const 1000) (i32.const 100) (i32.const -1)))
            (drop (call $close (local.get $h)))
            (br $l))))"#,
        request.replace('"', "\\22"),
        request.len()
    ));
    assert_eq!(ended.code(), FailureCode::ProviderUnavailable);
    assert!(ended.failure().cause.as_ref().unwrap().starts_with("idle_timeout: "), "{:?}", ended.failure());
}

/// An effect that remembers whether it happened.
struct Effect(Arc<AtomicUsize>);

impl Operation for Effect {
    fn name(&self) -> &'static str {
        "test.effect"
    }

    fn class(&self) -> Class {
        Class::Effect
    }

    fn prepare(&self, _request: &[u8]) -> Result<Prepared, InvalidRequest> {
        let happened = self.0.clone();
        Ok(Box::new(move || -> Frames {
            happened.fetch_add(1, Ordering::Relaxed);
            let refused = OperationError {
                code: Cow::Borrowed("provider_rejected"),
                detail: "no".to_owned(),
                retryable: false,
                retry_after_ms: None,
            };
            Box::pin(futures_util::stream::iter([Ok(Bytes::from_static(b"{}")), Err(refused)]))
        }))
    }
}

#[test]
fn an_effect_begins_only_after_its_start_is_durable() {
    let happened: Arc<AtomicUsize> = Arc::default();
    let mut registry = Registry::standard();
    registry.add(Arc::new(Effect(happened.clone())));
    let limits = Limits { host_running_max: 2, ..Limits::default() };
    let sandbox = Sandbox::with_operations(&SandboxConfig::new(limits), registry).unwrap();
    let run = |dry_run, refuses_effects| {
        let heard = Heard { refuses_effects, ..Heard::default() };
        let turn = Turn { sandbox: sandbox.clone(), dry_run, heard, ..Turn::new() };
        let recv: (&str, &[i32]) = ("recv", &[1, 1000, 100, -1]);
        results(turn, &[(0, b"test.effect")], &[("call", &[0, 11, 0, 0]), recv, recv])
    };
    // The lease is gone: the guest ends, and nothing happened.
    let (_, ended) = run(false, true);
    assert!(ended.finished.reply.is_err() && happened.load(Ordering::Relaxed) == 0);
    let (answers, ended) = run(true, false);
    assert_eq!((answers, happened.load(Ordering::Relaxed)), (vec![1, 16, 0], 0));
    let started = serde_json::json!({"handle": 1, "name": "test.effect", "class": "none", "dry_run": true});
    assert_eq!(ended.of_kind("operation.started"), [&started], "a dry run may be run again");
    let (answers, ended) = run(false, false);
    assert_eq!((answers, happened.load(Ordering::Relaxed)), (vec![1, 2, IO], 1));
    assert_eq!(ended.of_kind("operation.started")[0]["class"], "effect");
}
