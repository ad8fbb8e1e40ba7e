//! A guest that makes the calls that its message lists, with any arguments, in a memory of any content.
//!
//! It is compiled once; an input is a message. Made here rather than by a compiler, so that it calls what no binding would.

use std::fmt::Write as _;

/// Where the listed calls are in the guest's memory, where an input's own bytes, and where known words: what a function accepts is not left to be guessed.
const CALLS_AT: usize = 16;
const DATA_AT: usize = 4_096;
const WORDS_AT: usize = 60_000;

/// A call's record: function, which arguments are the last result instead, arguments.
const RECORD_BYTES: usize = 48;
const CALLS_MAX: usize = 60;

/// A `i` is an i32, an `I` an i64; the result is an i32 unless there is none.
const TURNHOUSE: &[(&str, &str)] = &[
    ("abi_revision", ""),
    ("input_read", "ii"),
    ("message_read", "ii"),
    ("snapshot_read", "ii"),
    ("snapshot_write", "ii"),
    ("log", "iii"),
    ("call", "iiii"),
    ("recv", "iiii"),
    ("error_read", "iii"),
    ("wait", "iii"),
    ("close", "i"),
    ("attachment_read", "iiiii"),
];
/// Importing these makes a guest one that speaks through the host.
const SPEAKING: &[(&str, &str)] = &[("emit", "iiii"), ("reply", "ii")];
const WASI: &[(&str, &str)] = &[
    ("args_get", "ii"),
    ("args_sizes_get", "ii"),
    ("environ_get", "ii"),
    ("environ_sizes_get", "ii"),
    ("clock_res_get", "ii"),
    ("clock_time_get", "iIi"),
    ("fd_advise", "iIIi"),
    ("fd_allocate", "iII"),
    ("fd_close", "i"),
    ("fd_datasync", "i"),
    ("fd_fdstat_get", "ii"),
    ("fd_fdstat_set_flags", "ii"),
    ("fd_fdstat_set_rights", "iII"),
    ("fd_filestat_get", "ii"),
    ("fd_filestat_set_size", "iI"),
    ("fd_filestat_set_times", "iIIi"),
    ("fd_pread", "iiiIi"),
    ("fd_prestat_get", "ii"),
    ("fd_prestat_dir_name", "iii"),
    ("fd_pwrite", "iiiIi"),
    ("fd_read", "iiii"),
    ("fd_readdir", "iiiIi"),
    ("fd_renumber", "ii"),
    ("fd_seek", "iIii"),
    ("fd_sync", "i"),
    ("fd_tell", "ii"),
    ("fd_write", "iiii"),
    ("path_create_directory", "iii"),
    ("path_filestat_get", "iiiii"),
    ("path_filestat_set_times", "iiiiIIi"),
    ("path_link", "iiiiiii"),
    ("path_open", "iiiiiIIii"),
    ("path_readlink", "iiiiii"),
    ("path_remove_directory", "iii"),
    ("path_rename", "iiiiii"),
    ("path_symlink", "iiiii"),
    ("path_unlink_file", "iii"),
    ("poll_oneoff", "iiii"),
    ("proc_exit", "i"),
    ("proc_raise", "i"),
    ("sched_yield", ""),
    ("random_get", "ii"),
    ("sock_accept", "iii"),
    ("sock_recv", "iiiiii"),
    ("sock_send", "iiiii"),
    ("sock_shutdown", "ii"),
];

/// The attachment that there is.
pub const ATTACHMENT: &str = "sha256-0000000000000000000000000000000000000000000000000000000000000000";

/// Words that functions accept, and texts that are nearly accepted.
const WORDS: &[&str] = &[
    "output.delta",
    "status",
    "x.own",
    "host.echo",
    r#"{"text":"hello"}"#,
    r#"{"parts":[{"type":"text","text":"a"},{"type":"json","data":{"a":[1,null]}}]}"#,
    r#"{"frames":["a","bcd"],"delay_ms":1}"#,
    r#"{"frames":["a"],"fail":true}"#,
    r#"{"delay_ms":1000}"#,
    "{}",
    "/file",
    ATTACHMENT,
    "a",
    "a/b",
    "../beside",
    "b/../../beside",
];

/// The interpreter, as a module; `speaks` decides where its standard output goes.
pub fn module(speaks: bool) -> Vec<u8> {
    let functions = functions(speaks);
    let (mut imports, mut cases) = (String::new(), String::new());
    for (index, (module, name, parameters)) in functions.iter().enumerate() {
        let types: Vec<&str> = parameters.chars().map(|kind| if kind == 'i' { "i32" } else { "i64" }).collect();
        let result = if *name == "proc_exit" { "" } else { "(result i32)" };
        let _ =
            writeln!(imports, r#"(import "{module}" "{name}" (func $f{index} (param {}) {result}))"#, types.join(" "));
        let arguments: String = parameters.chars().enumerate().map(|(at, kind)| argument(at, kind)).collect();
        let call = format!("(call $f{index} {arguments})");
        let call = if *name == "proc_exit" { call } else { format!("(global.set $last {call})") };
        let _ = writeln!(cases, "(if (i32.eq (local.get $function) (i32.const {index})) (then {call}))");
    }
    let words: String = WORDS.concat().replace('\\', "\\\\").replace('"', "\\22");
    let text = format!(
        r#"(module {imports}
        (memory (export "memory") 1 4)
        (global $last (mut i32) (i32.const 0))
        (data (i32.const {WORDS_AT}) "{words}")
        (func (export "_start") (local $at i32) (local $left i32) (local $function i32) (local $last_ones i32)
          (drop (call $f2 (i32.const 0) (i32.const {WORDS_AT})))
          (local.set $left (i32.load (i32.const 0)))
          (local.set $at (i32.const {CALLS_AT}))
          (loop $next
            (if (i32.eqz (local.get $left)) (then (return)))
            (local.set $function (i32.load (local.get $at)))
            (local.set $last_ones (i32.load offset=4 (local.get $at)))
            {cases}
            (if (i32.eq (local.get $function) (i32.const {grow})) (then (global.set $last (memory.grow (i32.const 1)))))
            (local.set $at (i32.add (local.get $at) (i32.const {RECORD_BYTES})))
            (local.set $left (i32.sub (local.get $left) (i32.const 1)))
            (br $next))))"#,
        grow = functions.len(),
    );
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn functions(speaks: bool) -> Vec<(&'static str, &'static str, &'static str)> {
    let of = |module, functions: &'static [(&'static str, &'static str)]| {
        functions.iter().map(move |(name, parameters)| (module, *name, *parameters))
    };
    let speaking = if speaks { SPEAKING } else { &[] };
    // `message_read`, which it begins with, is always the third.
    of("turnhouse_v1", TURNHOUSE)
        .chain(of("turnhouse_v1", speaking))
        .chain(of("wasi_snapshot_preview1", WASI))
        .collect()
}

fn argument(at: usize, kind: char) -> String {
    let own = format!("(i32.load offset={} (local.get $at))", 8 + 4 * at);
    let value = format!("(select (global.get $last) {own} (i32.and (local.get $last_ones) (i32.const {})))", 1 << at);
    if kind == 'i' { value } else { format!("(i64.extend_i32_s {value})") }
}

/// The message that lists an input's calls: a number of them, for each a function, a byte that says which arguments are the last result, and arguments of one
/// to five bytes; the rest is data.
pub fn message(input: &[u8], speaks: bool) -> Vec<u8> {
    let functions = functions(speaks);
    let mut input = input.iter().copied();
    let mut message = vec![0; DATA_AT];
    let calls = usize::from(input.next().unwrap_or(0)) % (CALLS_MAX + 1);
    message[0] = calls as u8;
    for call in 0..calls {
        let record = CALLS_AT + call * RECORD_BYTES;
        let function = usize::from(input.next().unwrap_or(0)) % (functions.len() + 1);
        message[record] = function as u8;
        message[record + 4] = input.next().unwrap_or(0);
        let parameters = functions.get(function).map_or(0, |(_, _, parameters)| parameters.len());
        for at in 0..parameters {
            let value = value(&mut input).to_le_bytes();
            message[record + 8 + 4 * at..][..4].copy_from_slice(&value);
        }
    }
    message.extend(input.take(8 * 1024));
    message
}

fn value(input: &mut impl Iterator<Item = u8>) -> i32 {
    const EDGES: [i32; 24] = [
        0,
        1,
        -1,
        2,
        4,
        8,
        16,
        100,
        1_000,
        65_535,
        65_536,
        65_537,
        262_144,
        -8,
        -4,
        i32::MAX,
        i32::MIN,
        1 << 30,
        1 << 28,
        0x7fff,
        4_096,
        4_128,
        60_000,
        16,
    ];
    let mut next = || input.next().unwrap_or(0);
    let kind = next();
    let rest = usize::from(kind >> 2);
    match kind & 3 {
        0 => i32::from(next()),
        1 => i32::from_le_bytes([next(), next(), next(), next()]),
        2 => EDGES[rest % EDGES.len()],
        // A word's address, or its length.
        _ => {
            let word = rest / 2 % WORDS.len();
            let before: usize = WORDS[..word].iter().map(|word| word.len()).sum();
            if rest % 2 == 0 { (WORDS_AT + before) as i32 } else { WORDS[word].len() as i32 }
        }
    }
}
