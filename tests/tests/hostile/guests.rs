//! The guests, by what they go for: time, stack, memory, output, the host's functions, files; and ends that are none.

use serde_json::Value;

use crate::arena::{Arena, Hostile, LONG, SHORT};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_loops_is_ended_by_its_cpu_time_wherever_it_loops() {
    Arena::open(SHORT)
        .await
        .run(&[
            Hostile::new("spin", "go", "cpu_timeout"),
            Hostile::new("spin_in_hostcalls", "go", "cpu_timeout"),
            Hostile::new("spin_in_hostcalls", "clock", "cpu_timeout"),
            Hostile::new("start_function_loops", "go", "cpu_timeout"),
            Hostile::new("tail_calls", "go", "cpu_timeout"),
            Hostile::new("unrolled", "go", "cpu_timeout"),
            Hostile::new("fill_memory", "go", "cpu_timeout"),
            Hostile::new("copy_memory", "go", "cpu_timeout"),
            Hostile::new("fill_table", "go", "cpu_timeout"),
            Hostile::new("bulk", "fill", "cpu_timeout"),
            Hostile::new("bulk", "copy", "cpu_timeout"),
            Hostile::new("huge_text", "go", "cpu_timeout"),
            Hostile::new("huge_text", "reply", "cpu_timeout"),
            Hostile::new("huge_text", "call", "cpu_timeout"),
            Hostile::new("huge_text", "log", "cpu_timeout"),
            Hostile::new("huge_text", "delta", "cpu_timeout"),
            Hostile::new("wasi_loop", "yield", "cpu_timeout"),
            Hostile::new("wasi_loop", "args", "cpu_timeout"),
            Hostile::new("wasi_loop", "environ", "cpu_timeout"),
            Hostile::new("wasi_loop", "random", "cpu_timeout"),
            Hostile::new("wasi_loop", "renumber", "cpu_timeout"),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_reads_or_writes_nothing_for_ever_is_ended() {
    Arena::open(SHORT)
        .await
        .run(&[
            Hostile::new("empty_io", "write", "cpu_timeout"),
            Hostile::new("empty_io", "read", "cpu_timeout"),
            Hostile::new("empty_io", "vectors", "cpu_timeout"),
            Hostile::new("empty_io", "read vectors", "cpu_timeout"),
            Hostile::new("empty_io", "emit", "cpu_timeout"),
            Hostile::new("stdin_forever", "go", "cpu_timeout"),
            Hostile::new("stderr_flood", "go", "cpu_timeout"),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_waits_is_ended_by_its_idle_time_however_far_away_its_clock_is() {
    Arena::open(SHORT)
        .await
        .run(&[
            Hostile::new("sleep_day", "go", "idle_timeout"),
            Hostile::new("many_tables", "go", "idle_timeout"),
            Hostile::new("poll_tricks", "0", "idle_timeout"),
            Hostile::new("poll_tricks", "1", "idle_timeout"),
            Hostile::new("poll_tricks", "2", "idle_timeout"),
            Hostile::new("status_loop", "10", "idle_timeout"),
            Hostile::new("progress_slowly", "1000 ticks every 50", "turn_timeout"),
            Hostile::new("wait_echo", "3600000", "turn_timeout"),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscriptions_beyond_number_are_refused() {
    let refused = |turn: &Value| {
        let reply = reply(turn);
        assert!(reply.starts_with("errno ") && reply.trim() != "errno 0", "{reply}");
    };
    Arena::open(SHORT)
        .await
        .run(&[
            Hostile::new("poll_tricks", "3", "completed").and(refused),
            Hostile::new("poll_tricks", "4", "completed").and(refused),
            Hostile::new("poll_tricks", "5", "completed").and(refused),
            // More than the table of its resources holds.
            Hostile::new("poll_tricks", "6", "worker_trapped"),
            Hostile::new("poll_tricks", "7", "worker_trapped"),
            Hostile::new("poll_tricks", "8", "completed").and(refused),
            Hostile::new("poll_tricks", "9", "cpu_timeout"),
            Hostile::new("poll_tricks", "10", "cpu_timeout"),
            Hostile::new("poll_tricks", "11", "completed").and(refused),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_wants_too_much_memory_or_stack_is_told_so_by_name() {
    Arena::open(LONG)
        .await
        .run(&[
            Hostile::new("memory_bomb", "go", "worker_out_of_memory"),
            Hostile::new("memory_grow_steps", "go", "completed").and(|turn| assert_eq!(reply(turn), "67108864\n")),
            Hostile::new("table_bomb", "go", "no_reply"),
            Hostile::new("deep_recursion", "frames", "worker_stack_overflow"),
            Hostile::new("deep_recursion", "shadow", "worker_trapped"),
            Hostile::new("big_reply", "1073741824", "worker_out_of_memory"),
            Hostile::new("big_stdout", "1073741824", "worker_out_of_memory"),
            Hostile::new("memory_peek", "go", "completed").and(|turn| assert_eq!(reply(turn), "found 0\n")),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_says_too_much_is_ended_and_none_of_it_is_its_reply() {
    Arena::open(LONG)
        .await
        .run(&[
            Hostile::new("stdout_flood", "go", "output_limit"),
            Hostile::new("emit_flood", "deltas", "output_limit"),
            Hostile::new("emit_flood", "status", "output_limit"),
            Hostile::new("emit_flood", "events", "output_limit"),
            Hostile::new("snapshot_flood", "go", "output_limit"),
            Hostile::new("big_stdout", "1048577", "output_limit"),
            Hostile::new("big_reply", "1048577", "worker_exit"),
            Hostile::new("big_reply", "1073741824 deltas 60000", "output_limit"),
            Hostile::new("panic", "10485760", "worker_trapped").and(|turn| {
                assert!(turn["failure"]["detail"].as_str().expect("a detail").len() < 1_000, "{turn}");
            }),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_of_absurd_length_is_refused_unread() {
    let too_big = |turn: &Value| assert_eq!(reply(turn), "result -1");
    Arena::open(LONG)
        .await
        .run(&[
            Hostile::new("huge_text", "once", "completed").and(too_big),
            Hostile::new("huge_text", "reply once", "completed").and(too_big),
            Hostile::new("huge_text", "call once", "completed").and(too_big),
            Hostile::new("huge_text", "delta once", "completed").and(too_big),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_text_reaches_the_client_as_it_is_and_breaks_no_stream() {
    Arena::open(LONG)
        .await
        .run(&[
            Hostile::new("odd_reply", "nul", "completed").and(|turn| assert_eq!(reply(turn), "a\0b\0\0c")),
            Hostile::new("odd_reply", "nul stdout", "completed").and(|turn| assert_eq!(reply(turn), "a\0b\0\0c")),
            Hostile::new("odd_reply", "ansi", "completed").and(|turn| assert!(reply(turn).contains("\u{1b}[2J"))),
            Hostile::new("odd_reply", "ansi stdout", "completed").and(|turn| assert!(reply(turn).contains('\u{9b}'))),
            Hostile::new("odd_reply", "lines stdout", "completed")
                .and(|turn| assert!(reply(turn).contains("\r\n\r\n"))),
            Hostile::new("odd_reply", "bidi", "completed").and(|turn| assert!(reply(turn).contains('\u{202e}'))),
            Hostile::new("odd_reply", "deep", "completed").and(|turn| assert_eq!(reply(turn), "result -28")),
            Hostile::new("bad_utf8_stdout", "go", "completed")
                .and(|turn| assert_eq!(reply(turn), "caf\u{fffd} \u{fffd}")),
            Hostile::new("bad_utf8_reply", "go", "completed")
                .and(|turn| assert!(reply(turn).contains("reply_utf8 -25\nreply_json -28"), "{turn}")),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hosts_functions_and_wasis_take_nothing_for_granted() {
    Arena::open(LONG)
        .await
        .run(&[
            Hostile::new("bad_pointers", "go", "completed").and(|turn| {
                let reply = reply(turn);
                let wild = reply.lines().filter(|line| !line.contains("zero_length") && !line.contains("memory 0"));
                let told: Vec<&str> = wild.filter(|line| !line.ends_with(" -21")).collect();
                assert!(
                    told.iter().all(|line| line.starts_with("snapshot_write all") || line.starts_with("call over")),
                    "{told:?}"
                );
            }),
            Hostile::new("bad_iovecs", "0", "completed").and(not_success),
            Hostile::new("bad_iovecs", "1", "completed").and(not_success),
            Hostile::new("bad_iovecs", "2", "worker_trapped"),
            Hostile::new("bad_iovecs", "3", "worker_trapped"),
            Hostile::new("bad_iovecs", "4", "worker_trapped"),
            Hostile::new("bad_iovecs", "5", "completed").and(not_success),
            // Its input has ended: nothing is read, so nothing is written to where it must not be.
            Hostile::new("bad_iovecs", "6", "completed"),
            Hostile::new("bad_iovecs", "7", "worker_trapped"),
            Hostile::new("random_1gib", "1073741824", "worker_trapped"),
            Hostile::new("random_1gib", "1048576", "completed").and(not_success),
            Hostile::new("hundred_thousand_calls", "100000", "completed"),
            Hostile::new("call_many", "1000 100", "completed")
                .and(|turn| assert!(reply(turn).starts_with("started 8 "), "{turn}")),
            Hostile::new("call_close", "go", "completed"),
            Hostile::new("renumber", "go", "completed").and(|turn| {
                let reply = reply(turn);
                assert_eq!(
                    reply.lines().filter(|line| line.contains("bad")).filter(|line| !line.ends_with(" 8")).count(),
                    0,
                    "{reply}"
                );
                for line in ["to_itself 0", "stdout_is_gone 8", "close_it_again 8", "write_to_nothing 8"] {
                    assert!(reply.contains(line), "{line}: {reply}");
                }
            }),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_the_machine_is_there_for_a_guest() {
    Arena::open(LONG)
        .await
        .run(&[
            Hostile::new("env_probe", "go", "completed").and(|turn| {
                let reply = reply(turn);
                assert!(!reply.contains("exists") && !reply.contains("CARGO") && !reply.contains("PATH"), "{reply}");
            }),
            Hostile::new("path_tricks", "go", "completed").and(|turn| {
                let out = ["parent", "absolute", "dot_dot", "_out", "symlink", "nul_in_name"];
                let reply = reply(turn);
                let mut got_out = reply.lines().filter(|line| line.ends_with("worked"));
                assert!(got_out.all(|line| !out.iter().any(|trick| line.contains(trick))), "{reply}");
            }),
            Hostile::new("fd_exhaust", "go", "completed").and(|turn| {
                let open: usize = reply(turn).split(' ').next().and_then(|n| n.parse().ok()).expect("a number");
                assert!(open <= 64, "{turn}");
            }),
        ])
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trap_or_an_exit_is_the_end_whatever_was_said_before() {
    let exit_code = |turn: &Value| assert_eq!(turn["failure"]["exit_code"], 7, "{turn}");
    Arena::open(SHORT)
        .await
        .run(&[
            Hostile::new("trap", "now", "worker_trapped"),
            Hostile::new("trap", "abort", "worker_trapped"),
            Hostile::new("trap", "bounds", "worker_trapped"),
            Hostile::new("unreachable_in_start", "go", "worker_trapped"),
            Hostile::new("start_function_traps", "go", "worker_trapped"),
            Hostile::new("data_out_of_bounds", "go", "worker_trapped"),
            Hostile::new("divide_by_zero", "go", "worker_trapped"),
            Hostile::new("indirect_call_wrong_type", "go", "worker_trapped"),
            Hostile::new("indirect_call_of_null", "go", "worker_trapped"),
            Hostile::new("reply_then_trap", "trap", "worker_trapped"),
            Hostile::new("reply_then_trap", "spin", "cpu_timeout"),
            Hostile::new("reply_then_trap", "exit", "worker_exit").and(exit_code),
            Hostile::new("snapshot_then_trap", "save", "worker_trapped"),
            Hostile::new("exit_code", "0", "completed"),
            Hostile::new("exit_code", "1", "worker_exit"),
            Hostile::new("exit_code", "255", "worker_exit"),
            Hostile::new("no_reply", "go", "no_reply"),
        ])
        .await;
}

fn reply(turn: &Value) -> &str {
    turn["reply"]["text"].as_str().expect("a reply")
}

fn not_success(turn: &Value) {
    assert!(reply(turn).starts_with("errno ") && reply(turn) != "errno 0\n", "{turn}");
}
