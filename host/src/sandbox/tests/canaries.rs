//! What one guest leaves in memory, tables, globals and on its stack is never seen by the next, however the pool is set up.
//!
//! A pool gives a module the slot that it had before, and an unknown one a slot that was never used, while it has one. So that each look is at what
//! another module has left, as many guests of different modules as there are slots hold all of them at once.

use tokio::task::JoinHandle;

use super::*;

/// With room for one turn, the pool has this many slots.
const SLOTS: usize = 17;

/// What is filled and looked at, of a guest's memory and of each of its tables.
const PAGES: usize = 192;
const ELEMENTS: usize = 40_000;

/// Every way in which the pool can be set up, and no pool at all.
fn settings() -> Vec<(String, SandboxConfig)> {
    let mut settings = Vec::new();
    for memory_keep_resident_bytes in [0, 256 * 1024, 2 * 1024 * 1024] {
        for stack_zeroing in [true, false] {
            let limits = Limits { host_running_max: 1, ..Limits::default() };
            let config = SandboxConfig { memory_keep_resident_bytes, stack_zeroing, ..SandboxConfig::new(limits) };
            settings.push((format!("{memory_keep_resident_bytes} bytes kept, stacks zeroed: {stack_zeroing}"), config));
        }
    }
    // More slots than a process can address.
    let limits = Limits { host_running_max: 100_000, ..Limits::default() };
    settings.push(("on demand".to_owned(), SandboxConfig::new(limits)));
    settings
}

/// Marks everything that it has, and everything that it can get, then calls `$done`.
const MARK: &str = r#"
    (func $mark (local $i i32)
      (drop (memory.grow (i32.sub (i32.const PAGES) (memory.size))))
      (memory.fill (i32.const 0) (i32.const 0xa5) (i32.const BYTES))
      (drop (table.grow $t0 (ref.func $mark) (i32.const 100)))
      (table.fill $t0 (i32.const 0) (ref.func $mark) (i32.const ELEMENTS))
      (table.fill $t1 (i32.const 0) (ref.func $mark) (i32.const ELEMENTS))
      (table.fill $t2 (i32.const 0) (ref.func $mark) (i32.const ELEMENTS))
      (table.fill $t3 (i32.const 0) (ref.func $mark) (i32.const ELEMENTS))
      (global.set $g0 (i64.const 0xa5a5a5a5)) (global.set $g1 (i64.const 0xa5a5a5a5))
      (drop (call $mark_stack (i32.const 500) (i64.const 0xa5a5a5a5a5a5a5a5))))
    (func $mark_stack (param $left i32) (param $mark i64) (result i64) (local $a i64) (local $b i64) (local $c i64)
      (local.set $a (i64.mul (local.get $mark) (i64.extend_i32_u (local.get $left))))
      (local.set $b (i64.xor (local.get $a) (local.get $mark)))
      (local.set $c (i64.add (local.get $a) (local.get $b)))
      (if (local.get $left) (then
        (local.set $c (i64.add (local.get $c) (call $mark_stack (i32.sub (local.get $left) (i32.const 1)) (local.get $mark))))))
      (i64.add (i64.add (local.get $a) (local.get $b)) (local.get $c)))"#;

/// Traps if anything that it has, or can get, is other than it should be at the start.
const LOOK: &str = r#"
    (func $look (local $i i32)
      (drop (memory.grow (i32.sub (i32.const PAGES) (memory.size))))
      (loop $more
        (if (i64.ne (i64.load (local.get $i)) (select (i64.const OWN) (i64.const 0) (i32.eq (local.get $i) (i32.const OWN_AT)))) (then (unreachable)))
        (br_if $more (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 8))) (i32.const BYTES))))
      (local.set $i (i32.const 0))
      (drop (table.grow $t0 (ref.null func) (i32.const 100)))
      (if (i32.eqz (ref.is_null (table.get $t0 (i32.const ELEMENTS)))) (then (unreachable)))
      (loop $more
        (if (i32.eqz (ref.is_null (table.get $t0 (local.get $i)))) (then (unreachable)))
        (if (i32.eqz (ref.is_null (table.get $t1 (local.get $i)))) (then (unreachable)))
        (if (i32.eqz (ref.is_null (table.get $t2 (local.get $i)))) (then (unreachable)))
        (if (i32.eqz (ref.is_null (table.get $t3 (local.get $i)))) (then (unreachable)))
        (br_if $more (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const ELEMENTS))))
      (if (i64.ne (i64.or (global.get $g0) (global.get $g1)) (i64.const 0)) (then (unreachable)))
      (if (i64.ne (call $look_at_stack (i32.const 500)) (i64.const 0)) (then (unreachable))))
    ;; Locals that nothing has set.
    (func $look_at_stack (param $left i32) (result i64) (local $a i64) (local $b i64) (local $c i64) (local $d i64) (local $v v128)
      (if (local.get $left) (then
        (local.set $d (call $look_at_stack (i32.sub (local.get $left) (i32.const 1))))))
      (i64.or (i64x2.extract_lane 1 (local.get $v)) (i64.or (i64.or (local.get $a) (local.get $b)) (i64.or (local.get $c) (local.get $d)))))"#;

/// A program of both; `number` makes its module another than every other. Odd ones have data of their own, so that their memory begins as an image.
fn guest(number: usize, start: &str) -> String {
    let own = 0x1122_3344_0000_0000_u64 + number as u64;
    // In the second page; or nowhere.
    let own_at: i64 = if number % 2 == 1 { 65_536 + 64 } else { -1 };
    let data: String = own.to_le_bytes().iter().map(|byte| format!("\\{byte:02x}")).collect();
    let data = if number % 2 == 1 { format!(r#"(data (i32.const {own_at}) "{data}")"#) } else { String::new() };
    format!(
        r#"(module
        (import "turnhouse_v1" "emit" (func $emit (param i32 i32 i32 i32) (result i32)))
        (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 3)
        {data}
        (table $t0 ELEMENTS funcref) (table $t1 ELEMENTS funcref) (table $t2 ELEMENTS funcref) (table $t3 ELEMENTS funcref)
        (global $g0 (mut i64) (i64.const 0)) (global $g1 (mut i64) (i64.const 0))
        (elem declare func $mark)
        {MARK} {LOOK}
        ;; Says `status` as a status.
        (func $done
          (i64.store (i32.const 0) (i64.const 0x737574617473))
          (drop (call $emit (i32.const 0) (i32.const 6) (i32.const 0) (i32.const 6))))
        (func $sleep
          (memory.fill (i32.const 0) (i32.const 0) (i32.const 64))
          (i32.store (i32.const 16) (i32.const 1))
          (i64.store (i32.const 24) (i64.const 86400000000000))
          (drop (call $poll (i32.const 0) (i32.const 100) (i32.const 1) (i32.const 200))))
        (func (export "number") (drop (i32.const {number})))
        (func (export "_start") {start}))"#
    )
    .replace("OWN_AT", &own_at.to_string())
    .replace("OWN", &own.to_string())
    .replace("PAGES", &PAGES.to_string())
    .replace("BYTES", &(PAGES * 65_536).to_string())
    .replace("ELEMENTS", &ELEMENTS.to_string())
}

/// A guest that has been started.
struct Begun {
    control: Arc<Control>,
    heard: Arc<Heard>,
    task: JoinHandle<Finished>,
}

fn begin(sandbox: &Arc<Sandbox>, wat: &str) -> Begun {
    let wasm = Bytes::from(wat::parse_str(wat).unwrap_or_else(|error| panic!("{error}\n{wat}")));
    let worker = sandbox.handle().block_on(sandbox.compile(wasm)).unwrap();
    let minute = Duration::from_secs(60);
    let control = Arc::new(Control::new(minute, minute, minute));
    let heard: Arc<Heard> = Arc::default();
    let job = Job {
        org: "acme".parse().unwrap(),
        directory: None,
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
        limits: Arc::new(GuestLimits::from(&sandbox.limits)),
        control: control.clone(),
        output: heard.clone(),
    };
    let running = sandbox.clone();
    let task = sandbox.spawn(async move { running.run(&worker, job).await });
    Begun { control, heard, task }
}

/// Guests of `SLOTS` different modules hold every slot at once; each does `first`, says so and waits until all are stopped. Where there is a pool, one guest more
/// finds no room: the proof that all of it was in use.
fn in_every_slot(sandbox: &Arc<Sandbox>, from: usize, first: &str) {
    let start = format!("{first} (call $done) (call $sleep)");
    let begun: Vec<Begun> = (0..SLOTS).map(|n| begin(sandbox, &guest(from + n, &start))).collect();
    for guest in &begun {
        while guest.heard.events.lock().is_empty() && !guest.task.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    if sandbox.allocator() == Allocator::Pooling {
        let one_more = begin(sandbox, &guest(from + SLOTS, &start));
        let failure = sandbox.handle().block_on(one_more.task).unwrap().reply.unwrap_err();
        assert!(failure.detail.contains("no free instance"), "{failure:?}");
    }
    for guest in &begun {
        guest.control.stop(Stop::CpuTimeout);
    }
    for Begun { task, .. } in begun {
        // It was ended where it waited, not by a trap of its own.
        let failure = sandbox.handle().block_on(task).unwrap().reply.unwrap_err();
        assert_eq!(failure.code, FailureCode::CpuTimeout, "{failure:?}");
    }
}

#[test]
fn nothing_that_a_guest_left_is_seen_by_the_next_of_another_module_whatever_the_pools_settings() {
    for (name, config) in settings() {
        let sandbox = Sandbox::new(&config).unwrap();
        assert_eq!(sandbox.allocator() == Allocator::OnDemand, name == "on demand", "{name}");
        in_every_slot(&sandbox, 0, "(call $mark)");
        in_every_slot(&sandbox, 100, "(call $look) (call $mark)");
        in_every_slot(&sandbox, 201, "(call $look)");
    }
}

#[test]
fn nothing_that_a_guest_left_is_seen_by_the_next_of_its_own_module_however_it_ended() {
    for (_, config) in settings() {
        let sandbox = Sandbox::new(&config).unwrap();
        for (number, end, code) in [
            (1, "(unreachable)", FailureCode::WorkerTrapped),
            (2, "", FailureCode::NoReply),
            (3, "(drop (call $mark_stack (i32.const 0x7fffffff) (i64.const 1)))", FailureCode::WorkerStackOverflow),
            (4, "(loop $l (br $l))", FailureCode::CpuTimeout),
        ] {
            let wat = guest(number, &format!("(call $look) (call $mark) (call $done) {end}"));
            for round in 0..6 {
                let guest = begin(&sandbox, &wat);
                while guest.heard.events.lock().is_empty() && !guest.task.is_finished() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert!(!guest.heard.events.lock().is_empty(), "guest {number} found something in round {round}");
                if code == FailureCode::CpuTimeout {
                    guest.control.stop(Stop::CpuTimeout);
                }
                let failure = sandbox.handle().block_on(guest.task).unwrap().reply.unwrap_err();
                assert_eq!(failure.code, code, "{failure:?}");
            }
        }
    }
}

#[test]
fn a_look_finds_what_is_there() {
    for look in [
        "(i64.store8 (i32.const 12345) (i64.const 1)) (call $look)",
        "(table.set $t3 (i32.const 39999) (ref.func $mark)) (call $look)",
        "(global.set $g1 (i64.const 1)) (call $look)",
        "(call $mark) (call $look)",
    ] {
        assert_eq!(Turn::new().run(&guest(1, look)).code(), FailureCode::WorkerTrapped, "{look}");
    }
    assert_eq!(Turn::new().run(&guest(1, "(call $look)")).code(), FailureCode::NoReply);
}
