//! Every way in which a guest can end, and the limits that end it.

use super::*;

#[test]
fn a_plain_program_reads_the_message_and_its_output_is_the_reply() {
    let ended = Turn { text: "grüße", ..Turn::new() }.run(
        r#"(module
          (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
          (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
          (memory (export "memory") 1)
          (func (export "_start")
            (i32.store (i32.const 0) (i32.const 100))
            (i32.store (i32.const 4) (i32.const 3))
            (loop $more
              (drop (call $fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
              (if (i32.load (i32.const 8)) (then
                (i32.store (i32.const 16) (i32.const 100))
                (i32.store (i32.const 20) (i32.load (i32.const 8)))
                (drop (call $fd_write (i32.const 1) (i32.const 16) (i32.const 1) (i32.const 24)))
                (br $more))))))"#,
    );
    assert_eq!(ended.text(), "grüße");
    assert!(!ended.finished.reply.as_ref().unwrap().replaces_deltas);
    // Reads of three bytes split the characters; what is told never does.
    assert_eq!(ended.deltas().concat(), "grüße");
    assert!(ended.finished.usage.memory_peak_bytes == 65536 && ended.finished.usage.cpu_ms > 0.0);
}

#[test]
fn bytes_that_are_not_utf_8_become_replacement_characters() {
    let ended = Turn::new().run(&program("(call $write (i32.const 1) (i32.const 100) (i32.const 9))"));
    // The last byte begins a character that never ends.
    assert_eq!(ended.text(), "helloé\u{FFFD}\u{FFFD}");
    assert_eq!(ended.deltas().concat(), ended.text());
}

#[test]
fn standard_error_goes_to_the_log_and_its_excess_is_counted() {
    let mut turn = Turn::new();
    turn.limits.log_bytes_max = 7;
    let ended = turn.run(&program(
        "(call $write (i32.const 2) (i32.const 100) (i32.const 5)) (call $write (i32.const 2) (i32.const 100) (i32.const 5))
         (call $write (i32.const 1) (i32.const 100) (i32.const 1))",
    ));
    assert_eq!(ended.text(), "h");
    assert_eq!((ended.finished.log.as_slice(), ended.finished.log_bytes_dropped), (b"hellohe".as_slice(), 3));
}

#[test]
fn t3_exit_0_without_a_reply_is_no_reply() {
    assert_eq!(Turn::new().run(&program("")).code(), FailureCode::NoReply);
    let exit_0 = r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (memory (export "memory") 1) (func (export "_start") (call $exit (i32.const 0))))"#;
    assert_eq!(Turn::new().run(exit_0).code(), FailureCode::NoReply);
}

#[test]
fn every_other_exit_code_is_worker_exit_with_its_code() {
    for code in [1, 101, 125, 126, 255, -1] {
        let ended = Turn::new().run(&format!(
            r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1) (func (export "_start") (call $exit (i32.const {code}))))"#
        ));
        assert_eq!(ended.code(), FailureCode::WorkerExit);
        assert_eq!(ended.failure().facts["exit_code"], code);
    }
}

#[test]
fn exit_0_after_output_completes() {
    let ended = Turn::new().run(&format!(
        r#"(module {FD_WRITE} (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
        (memory (export "memory") 1) (data (i32.const 0) "\64\00\00\00\02\00\00\00") (data (i32.const 100) "ok")
        (func (export "_start")
          (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
          (call $exit (i32.const 0))))"#
    ));
    assert_eq!(ended.text(), "ok");
}

#[test]
fn a_trap_names_itself_and_its_function_on_one_bounded_line() {
    let long = "n".repeat(5000);
    let ended = Turn::new().run(&format!(
        r#"(module (memory (export "memory") 1) (func ${long} (unreachable)) (func (export "_start") (call ${long})))"#
    ));
    assert_eq!(ended.code(), FailureCode::WorkerTrapped);
    assert!(ended.failure().detail.contains("unreachable"), "{:?}", ended.failure());
    assert!(ended.failure().detail.len() < 500 && !ended.failure().detail.contains('\n'), "{:?}", ended.failure());
}

#[test]
fn deep_recursion_is_a_stack_overflow() {
    let wat = r#"(module (memory (export "memory") 1)
        (func $deep (param i32) (result i32) (i32.add (i32.const 1) (call $deep (local.get 0))))
        (func (export "_start") (drop (call $deep (i32.const 0)))))"#;
    assert_eq!(Turn::new().run(wat).code(), FailureCode::WorkerStackOverflow);
}

#[test]
fn a_memory_bomb_is_out_of_memory_and_names_the_setting() {
    let bomb = |end: &str| {
        format!(
            r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1)
            (func (export "_start")
              (loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))
              {end}))"#
        )
    };
    for end in ["(unreachable)", "(call $exit (i32.const 134))"] {
        let mut turn = Turn::new();
        turn.limits.memory_bytes_max = 8 << 20;
        let ended = turn.run(&bomb(end));
        assert_eq!(ended.code(), FailureCode::WorkerOutOfMemory);
        assert!(ended.failure().detail.contains("limits.memory_bytes_max"));
        assert!(ended.finished.usage.memory_peak_bytes > 7 << 20);
        assert!(ended.finished.usage.memory_peak_bytes <= 8 << 20);
    }
    // A refusal that the guest takes well is nobody's fault.
    assert_eq!(Turn::new().run(&bomb("")).code(), FailureCode::NoReply);
}

#[test]
fn a_memory_larger_than_the_agents_limit_is_out_of_memory_at_the_start() {
    let mut turn = Turn::new();
    turn.limits.memory_bytes_max = 1 << 20;
    let ended = turn.run(r#"(module (memory (export "memory") 100) (func (export "_start")))"#);
    assert_eq!(ended.code(), FailureCode::WorkerOutOfMemory);
}

#[test]
fn a_table_bomb_is_refused() {
    let mut turn = Turn::new();
    turn.limits.table_elements_max = 100;
    let ended = turn.run(
        r#"(module (memory (export "memory") 1) (table $t 10 funcref)
        (func (export "_start")
          (loop $more (br_if $more (i32.ne (table.grow $t (ref.null func) (i32.const 50)) (i32.const -1))))
          (unreachable)))"#,
    );
    assert_eq!(ended.code(), FailureCode::WorkerOutOfMemory);
}

#[test]
fn a_spinning_guest_uses_up_its_cpu_time() {
    let ended = Turn { cpu_timeout_ms: 50, ..Turn::new() }
        .run(r#"(module (memory (export "memory") 1) (func (export "_start") (loop $l (br $l))))"#);
    assert_eq!(ended.code(), FailureCode::CpuTimeout);
    assert!(ended.failure().detail.contains("50 ms") && ended.failure().detail.contains("limits.cpu_timeout_ms"));
    assert!(ended.finished.usage.cpu_ms >= 50.0);
}

#[test]
fn a_spinning_start_function_is_ended_as_well() {
    let ended = Turn { cpu_timeout_ms: 50, ..Turn::new() }.run(
        r#"(module (memory (export "memory") 1) (func $init (loop $l (br $l))) (start $init) (func (export "_start")))"#,
    );
    assert_eq!(ended.code(), FailureCode::CpuTimeout);
}

/// Sleeps for a day in `poll_oneoff`.
const SLEEPER: &str = r#"(module
    (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
    (memory (export "memory") 1)
    (func (export "_start")
      (i32.store8 (i32.const 8) (i32.const 0))
      (i32.store (i32.const 16) (i32.const 1))
      (i64.store (i32.const 24) (i64.const 86400000000000))
      (drop (call $poll (i32.const 0) (i32.const 100) (i32.const 1) (i32.const 200)))))"#;

#[test]
fn t6_a_sleeping_guest_is_ended_by_its_idle_time() {
    let begun = Instant::now();
    let ended = Turn { idle_timeout_ms: 60, ..Turn::new() }.run(SLEEPER);
    assert_eq!(ended.code(), FailureCode::IdleTimeout);
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn t6_a_sleeping_guest_is_ended_by_its_turns_time() {
    let ended = Turn { turn_timeout_ms: 60, ..Turn::new() }.run(SLEEPER);
    assert_eq!(ended.code(), FailureCode::TurnTimeout);
    assert!(ended.failure().detail.contains("60 ms"));
}

#[test]
fn t8_a_sleeping_guest_is_gone_when_it_is_stopped_from_outside() {
    let ended = Turn::new().run_while(SLEEPER, |control| {
        std::thread::sleep(Duration::from_millis(20));
        control.stop(Stop::Ended);
    });
    assert!(ended.finished.reply.is_err());
    assert!(ended.finished.usage.wall_ms < 10_000.0);
}

#[test]
fn t8_a_spinning_guest_is_gone_when_it_is_stopped_from_outside() {
    let wat = r#"(module (memory (export "memory") 1) (func (export "_start") (loop $l (br $l))))"#;
    let ended = Turn::new().run_while(wat, |control| {
        std::thread::sleep(Duration::from_millis(20));
        control.stop(Stop::TurnTimeout);
    });
    assert_eq!(ended.code(), FailureCode::TurnTimeout);
}

#[test]
fn a_flood_on_standard_output_is_output_limit() {
    let mut turn = Turn::new();
    turn.limits.reply_bytes_max = 10_000;
    let ended = turn.run(&program("(loop $l (call $write (i32.const 1) (i32.const 1000) (i32.const 3000)) (br $l))"));
    assert_eq!(ended.code(), FailureCode::OutputLimit);
    assert!(ended.failure().detail.contains("10000"));
}

#[test]
fn a_byte_by_byte_writer_is_gathered_once_its_events_are_used_up() {
    let mut turn = Turn::new();
    turn.limits.emit_events_max = 10;
    let ended = turn.run(&program(
        "(local $i i32) (loop $l (call $write (i32.const 1) (i32.const 100) (i32.const 1))
         (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 5000))))",
    ));
    assert_eq!(ended.text(), "h".repeat(5000));
    assert_eq!(ended.deltas().concat(), ended.text());
    assert_eq!(ended.deltas().len(), 10 + 1 + 1);
}

#[test]
fn a_slow_reader_holds_a_guest_back_and_loses_nothing() {
    let heard = Heard { behind: true, ..Heard::default() };
    let ended = Turn { heard, ..Turn::new() }.run(&program(
        "(call $write (i32.const 1) (i32.const 100) (i32.const 5)) (call $write (i32.const 1) (i32.const 100) (i32.const 5))",
    ));
    assert_eq!(ended.text(), "hellohello");
    assert!(ended.waited >= 2);
}

#[test]
fn a_request_for_too_many_random_bytes_ends_the_guest() {
    let ended = Turn::new().run(
        r#"(module (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (memory (export "memory") 1)
        (func (export "_start") (drop (call $random (i32.const 0) (i32.const 1073741824)))))"#,
    );
    assert_eq!(ended.code(), FailureCode::WorkerTrapped);
    assert!(ended.failure().detail.contains("1048576 random bytes"));
}

#[test]
fn an_iovec_list_of_absurd_length_is_an_error_to_the_guest() {
    let ended = Turn::new().run(&format!(
        r#"(module {FD_WRITE} (memory (export "memory") 1)
        (func (export "_start")
          (if (i32.eqz (call $fd_write (i32.const 1) (i32.const 0) (i32.const 0x7fffffff) (i32.const 8))) (then (unreachable)))))"#
    ));
    assert_eq!(ended.code(), FailureCode::NoReply, "{:?}", ended.failure());
}

#[test]
fn no_directory_no_host_environment_and_no_terminal_is_there() {
    // Descriptor 3 would be the first directory; the environment has the one variable of the job.
    let ended = Turn::new().run(&format!(
        r#"(module {FD_WRITE}
        (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "environ_sizes_get" (func $sizes (param i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "environ_get" (func $environ (param i32 i32) (result i32)))
        (memory (export "memory") 1)
        (func (export "_start")
          (if (i32.ne (call $prestat (i32.const 3) (i32.const 0)) (i32.const 8)) (then (unreachable)))
          (drop (call $sizes (i32.const 0) (i32.const 4)))
          (if (i32.ne (i32.load (i32.const 0)) (i32.const 1)) (then (unreachable)))
          (drop (call $environ (i32.const 200) (i32.const 300)))
          (i32.store (i32.const 8) (i32.const 300))
          (i32.store (i32.const 12) (i32.sub (i32.load (i32.const 4)) (i32.const 1)))
          (drop (call $fd_write (i32.const 1) (i32.const 8) (i32.const 1) (i32.const 16)))))"#
    ));
    assert_eq!(ended.text(), "TURNHOUSE_TURN_ID=t");
}

#[test]
fn a_full_pool_is_our_failure_and_retryable() {
    let sandbox = sandbox_with(Limits { host_running_max: 1, ..Limits::default() });
    let wasm = Bytes::from(wat::parse_str(SLEEPER).unwrap());
    let worker = Arc::new(sandbox.handle().block_on(sandbox.compile(wasm)).unwrap());
    let control = Arc::new(Control::new(Duration::from_secs(30), Duration::from_secs(30), Duration::from_secs(30)));
    // More than the pool has, its spare slots included.
    let tasks: Vec<_> = (0..40)
        .map(|_| {
            let job = Job {
                org: "acme".parse().expect("an org"),
                input: Input {
                    json: InputJson(Arc::new(Bytes::new)),
                    text: Bytes::new(),
                    snapshot: None,
                    environment: Vec::new(),
                    arguments: Vec::new(),
                    dry_run: false,
                    attachments: Attachments::default(),
                },
                grant: Grant::Private,
                directory: None,
                limits: Arc::new(GuestLimits::from(&sandbox.limits)),
                control: control.clone(),
                output: Arc::new(Heard::default()),
            };
            let (sandbox, worker) = (sandbox.clone(), worker.clone());
            sandbox.clone().spawn(async move { sandbox.run(&worker, job).await })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    control.stop(Stop::Ended);
    let mut full = 0;
    for task in tasks {
        let finished = sandbox.handle().block_on(task).unwrap();
        let failure = finished.reply.unwrap_err();
        assert!(failure.retryable && failure.code == FailureCode::Internal);
        full += usize::from(failure.detail.contains("no free instance"));
    }
    assert_eq!(full, 40 - 17);
}

#[test]
fn without_a_ticker_no_guest_starts() {
    let sandbox = sandbox_with(Limits { host_running_max: 4, ..Limits::default() });
    assert!(sandbox.ticker_alive());
    sandbox.ticker.stop_for_test();
    assert!(!sandbox.ticker_alive());
    let ended =
        Turn { sandbox, ..Turn::new() }.run(&program("(call $write (i32.const 1) (i32.const 100) (i32.const 1))"));
    assert_eq!(ended.code(), FailureCode::Internal);
    assert!(ended.failure().retryable);
}

#[test]
fn without_address_space_for_the_pool_guests_still_run() {
    // A hundred thousand slots of 4 GiB are more than a process can address.
    let sandbox = sandbox_with(Limits { host_running_max: 100_000, ..Limits::default() });
    assert_eq!(sandbox.allocator(), Allocator::OnDemand);
    let ended =
        Turn { sandbox, ..Turn::new() }.run(&program("(call $write (i32.const 1) (i32.const 100) (i32.const 5))"));
    assert_eq!(ended.text(), "hello");
}

#[test]
fn a_sandbox_shuts_down_with_guests_in_it() {
    let sandbox = sandbox_with(Limits { host_running_max: 4, ..Limits::default() });
    let wasm = Bytes::from(wat::parse_str(SLEEPER).unwrap());
    let heard: Arc<Heard> = Arc::default();
    let job = Job {
        org: "acme".parse().expect("an org"),
        input: Input {
            json: InputJson(Arc::new(Bytes::new)),
            text: Bytes::new(),
            snapshot: None,
            environment: Vec::new(),
            arguments: Vec::new(),
            dry_run: false,
            attachments: Attachments::default(),
        },
        grant: Grant::Private,
        directory: None,
        limits: Arc::new(GuestLimits::from(&sandbox.limits)),
        control: Arc::new(Control::new(Duration::from_secs(90), Duration::from_secs(90), Duration::from_secs(90))),
        output: heard.clone(),
    };
    let task = sandbox.spawn({
        let sandbox = sandbox.clone();
        async move {
            let worker = sandbox.compile(wasm).await.unwrap();
            sandbox.run(&worker, job).await
        }
    });
    sandbox.shutdown(Duration::from_secs(10));
    assert!(task.is_finished());
    assert_eq!(Arc::strong_count(&heard), 1, "the guest's state is gone");
}

#[test]
fn a_guest_that_is_dropped_gives_its_slot_back() {
    let sandbox = sandbox_with(Limits { host_running_max: 1, ..Limits::default() });
    let wasm = Bytes::from(wat::parse_str(SLEEPER).unwrap());
    let worker = Arc::new(sandbox.handle().block_on(sandbox.compile(wasm)).unwrap());
    for _ in 0..200 {
        let heard: Arc<Heard> = Arc::default();
        let job = Job {
            org: "acme".parse().expect("an org"),
            input: Input {
                json: InputJson(Arc::new(Bytes::new)),
                text: Bytes::new(),
                snapshot: None,
                environment: Vec::new(),
                arguments: Vec::new(),
                dry_run: false,
                attachments: Attachments::default(),
            },
            grant: Grant::Private,
            directory: None,
            limits: Arc::new(GuestLimits::from(&sandbox.limits)),
            control: Arc::new(Control::new(Duration::from_secs(90), Duration::from_secs(90), Duration::from_secs(90))),
            output: heard.clone(),
        };
        let run = sandbox.run(&worker, job);
        let asleep = sandbox.handle().block_on(async { tokio::time::timeout(Duration::from_millis(1), run).await });
        assert!(asleep.is_err(), "it slept, and was dropped: {:?}", asleep.map(|finished| finished.reply));
        assert_eq!(Arc::strong_count(&heard), 1, "the guest's state is gone");
    }
}
