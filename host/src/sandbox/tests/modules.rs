//! What is refused as a worker, under which code, and what the refusal says.

use super::*;

fn refusal(wasm: &[u8]) -> ModuleRefusal {
    sandbox().inspect(wasm).expect_err("it is refused")
}

fn refused(wat: &str) -> (&'static str, String) {
    let refusal = refusal(&wat::parse_str(wat).unwrap());
    (refusal.code(), refusal.to_string())
}

#[test]
fn what_is_no_module_is_named() {
    let component = wat::parse_str("(component)").unwrap();
    let cases: [(&[u8], &str); 7] = [
        (b"", "empty"),
        (&component, "component"),
        (b"  (module)", "wasm-tools parse"),
        (b"\x7fELF\x02\x01\x01", "ELF"),
        (b"MZ\x90\0", "native program"),
        (b"#!/bin/sh", "not WebAssembly"),
        (b"\0asm", "truncated"),
    ];
    for (bytes, expected) in cases {
        let refusal = refusal(bytes);
        assert_eq!(refusal.code(), "module_invalid");
        assert!(refusal.to_string().contains(expected), "{refusal}");
    }
}

#[test]
fn a_truncated_or_corrupt_module_is_invalid() {
    let whole = wat::parse_str(program("")).unwrap();
    for cut in [9, whole.len() / 2, whole.len() - 1] {
        assert_eq!(refusal(&whole[..cut]).code(), "module_invalid", "at {cut}");
    }
    // Sound in its structure, unsound in a body: found before it is compiled.
    let unsound = br#"(module (memory (export "memory") 1) (func (export "_start") (i32.add)))"#;
    let wasm = Bytes::from(wat::parse_bytes(unsound).unwrap().into_owned());
    let sandbox = sandbox();
    sandbox.inspect(&wasm).unwrap();
    assert_eq!(sandbox.handle().block_on(sandbox.compile(wasm)).unwrap_err().code(), "module_invalid");
}

#[test]
fn what_is_no_command_is_told_what_is_missing() {
    for (wat, expected) in [
        (r#"(module (memory (export "memory") 1))"#, "`_start`"),
        (r#"(module (func (export "_start")))"#, "`memory`"),
        (r#"(module (memory (export "memory") 1) (func (export "_start") (param i32)))"#, "must take nothing"),
        (r#"(module (memory (export "memory") 1) (func (export "_start")) (func (export "_initialize")))"#, "reactor"),
        (r#"(module (memory (export "memory") 1) (global (export "_start") i32 (i32.const 0)))"#, "not a function"),
    ] {
        let (code, message) = refused(wat);
        assert_eq!(code, "module_not_command");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn an_unknown_import_is_named_with_what_to_do() {
    for (import, expected) in [
        (r#"(import "env" "puts" (func (param i32)))"#, "`env.puts`"),
        (r#"(import "turnhouse_v1" "telepathy" (func))"#, "newer ABI"),
        (r#"(import "wasi_unstable" "fd_write" (func))"#, "wasm32-wasip1"),
        (
            r#"(import "turnhouse_v1" "reply" (func (param i64) (result i32)))"#,
            "(i64) → (i32); its type is (i32, i32) → (i32)",
        ),
        (r#"(import "env" "memory" (memory 1))"#, "not a function"),
    ] {
        let (code, message) =
            refused(&format!(r#"(module {import} (memory (export "memory") 1) (func (export "_start")))"#).replace(
                r#"(import "env" "memory" (memory 1)) (memory (export "memory") 1)"#,
                r#"(import "env" "memory" (memory 1))"#,
            ));
        assert_eq!(code, "module_import_unknown", "{message}");
        assert!(message.contains(expected), "{message}");
    }
    let hostile = format!(r#"(module (import "{}" "a\0ab" (func)))"#, "m".repeat(100_000));
    assert!(refused(&hostile).1.len() < 1000);
}

#[test]
fn every_proposal_that_is_off_is_refused() {
    for body in [
        r#"(memory (export "memory") 1 1 shared)"#,
        r#"(memory (export "memory") i64 1)"#,
        r#"(memory (export "memory") 1) (memory 1)"#,
        r#"(memory (export "memory") 1) (tag)"#,
        r#"(memory (export "memory") 1) (type (struct))"#,
        r#"(memory (export "memory") 1) (func (param v128 v128 v128) (result v128)
            (i8x16.relaxed_laneselect (local.get 0) (local.get 1) (local.get 2)))"#,
    ] {
        let wasm = Bytes::from(wat::parse_str(format!(r#"(module {body} (func (export "_start")))"#)).unwrap());
        let sandbox = sandbox();
        let refusal = sandbox.handle().block_on(sandbox.compile(wasm)).expect_err(body);
        assert_eq!(refusal.code(), "module_invalid", "{body}: {refusal}");
    }
}

#[test]
fn sizes_over_their_limits_are_refused_by_name() {
    let sandbox = sandbox_with(Limits {
        module_bytes_max: 1000,
        module_functions_max: 3,
        host_running_max: 2,
        ..Limits::default()
    });
    let refused = |wat: &str| {
        let refusal = sandbox.inspect(&wat::parse_str(wat).unwrap()).unwrap_err();
        (refusal.code(), refusal.to_string())
    };
    let start = r#"(func (export "_start"))"#;
    let (code, message) = refused(&format!(
        r#"(module (memory (export "memory") 1) {start} (data (i32.const 0) "{}"))"#,
        "x".repeat(1000)
    ));
    assert!(code == "module_too_large" && message.contains("limits.module_bytes_max"), "{message}");
    for (body, expected) in [
        (r#"(memory (export "memory") 1) (func) (func) (func)"#, "limits.module_functions_max"),
        (r#"(memory (export "memory") 2000)"#, "limits.memory_bytes_max"),
        (r#"(memory (export "memory") 1) (table 100000 funcref)"#, "limits.table_elements_max"),
        (
            r#"(memory (export "memory") 1) (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref) (table 1 funcref)"#,
            "5 tables",
        ),
    ] {
        let (code, message) = refused(&format!("(module {body} {start})"));
        assert_eq!(code, "module_too_complex");
        assert!(message.contains(expected), "{message}");
    }
}

/// What is kept of an item while a module is looked at takes ten times the room that the item takes in a file.
#[test]
fn more_types_imports_or_exports_than_any_program_has_are_refused_before_they_are_read() {
    let header = b"\0asm\x01\0\0\0";
    // A hundred thousand and one, of which none is there.
    let section = |id: u8| [header.as_slice(), &[id, 3, 0xa1, 0x8d, 0x06]].concat();
    for (id, what) in [(1, "types"), (2, "imports"), (7, "exports")] {
        let refusal = refusal(&section(id));
        assert_eq!(refusal.code(), "module_too_complex", "{refusal}");
        assert!(refusal.to_string().contains(&format!("100001 {what}")), "{refusal}");
    }
}

#[test]
fn a_compilation_that_takes_too_long_is_a_named_refusal() {
    let sandbox = sandbox_with(Limits { compile_timeout_ms: 1, host_running_max: 2, ..Limits::default() });
    let functions: String = (0..3000)
        .map(|_| "(func (param i32) (result i32) (i32.mul (local.get 0) (i32.add (local.get 0) (i32.const 7))))")
        .collect();
    let wat = format!(r#"(module (memory (export "memory") 1) (func (export "_start")) {functions})"#);
    let wasm = Bytes::from(wat::parse_str(wat).unwrap());
    let refusal = sandbox.handle().block_on(sandbox.compile(wasm)).unwrap_err();
    assert_eq!(refusal.code(), "compile_timeout");
}

#[test]
fn a_module_speaks_when_it_imports_emit_or_reply() {
    for (import, speaks) in [
        ("", false),
        (r#"(import "turnhouse_v1" "log" (func (param i32 i32 i32) (result i32)))"#, false),
        (r#"(import "turnhouse_v1" "reply" (func (param i32 i32) (result i32)))"#, true),
        (r#"(import "turnhouse_v1" "emit" (func (param i32 i32 i32 i32) (result i32)))"#, true),
    ] {
        let wat = format!(r#"(module {import} (memory (export "memory") 1) (func (export "_start")))"#);
        let wasm = Bytes::from(wat::parse_str(wat).unwrap());
        let sandbox = sandbox();
        assert_eq!(sandbox.inspect(&wasm).unwrap().speaks, speaks);
        assert_eq!(sandbox.handle().block_on(sandbox.compile(wasm)).unwrap().speaks(), speaks);
    }
}
