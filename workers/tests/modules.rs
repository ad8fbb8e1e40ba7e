//! The modules that were built are what they should be: commands with a small stack, which import what they use and nothing else.

use std::collections::BTreeSet;

use turnhouse_workers::{ECHO, NOTES, STORY, all_guests, bundled, bytes, made, test_guests, wat, wat_names};
use wasmparser::{ConstExpr, Operator, Parser, Payload};

const WASI: &str = "wasi_snapshot_preview1";
const TURNHOUSE: &str = "turnhouse_v1";

#[derive(Default)]
struct Module {
    imports: BTreeSet<(String, String)>,
    exports: BTreeSet<String>,
    /// The first global is the stack pointer: LLVM's linker puts it there.
    stack_bytes: Option<i32>,
}

impl Module {
    fn parse(name: &str) -> Module {
        let bytes = bytes(name);
        let mut module = Module::default();
        for payload in Parser::new(0).parse_all(&bytes) {
            match payload.unwrap_or_else(|error| panic!("{name}: {error}")) {
                Payload::ImportSection(imports) => {
                    for import in imports.into_imports() {
                        let import = import.unwrap();
                        module.imports.insert((import.module.to_owned(), import.name.to_owned()));
                    }
                }
                Payload::ExportSection(exports) => {
                    module.exports.extend(exports.into_iter().map(|export| export.unwrap().name.to_owned()));
                }
                Payload::GlobalSection(globals) => {
                    module.stack_bytes =
                        globals.into_iter().next().and_then(|global| constant(&global.unwrap().init_expr));
                }
                _ => {}
            }
        }
        module
    }

    fn imported_from(&self, module: &str) -> Vec<&str> {
        self.imports.iter().filter(|(from, _)| from == module).map(|(_, name)| name.as_str()).collect()
    }
}

fn constant(expression: &ConstExpr<'_>) -> Option<i32> {
    match expression.get_operators_reader().read().ok()? {
        Operator::I32Const { value } => Some(value),
        _ => None,
    }
}

#[test]
fn every_guest_is_a_command_of_this_interface_with_a_small_stack() {
    for guest in all_guests() {
        let module = Module::parse(guest.name);
        assert!(module.exports.contains("memory") && module.exports.contains("_start"), "{}", guest.name);
        assert!(!module.exports.contains("_initialize"), "{}", guest.name);
        assert_eq!(module.stack_bytes, Some(131_072), "{}: the linker flag for the stack is lost", guest.name);
        let others: Vec<_> = module.imports.iter().filter(|(from, _)| from != WASI && from != TURNHOUSE).collect();
        assert!(others.is_empty(), "{} imports {others:?}", guest.name);
    }
}

#[test]
fn echo_is_plain_and_small() {
    let module = Module::parse(ECHO);
    assert_eq!(module.imported_from(TURNHOUSE), [""; 0]);
    assert!(bytes(ECHO).len() < 100_000, "{} bytes", bytes(ECHO).len());
}

#[test]
fn a_worker_imports_only_the_functions_that_it_uses() {
    assert_eq!(Module::parse(STORY).imported_from(TURNHOUSE), ["emit", "log", "message_read"]);
    assert_eq!(
        Module::parse(NOTES).imported_from(TURNHOUSE),
        ["emit", "log", "message_read", "snapshot_read", "snapshot_write"]
    );
}

#[test]
fn the_probes_between_them_import_every_function() {
    let imported: BTreeSet<String> = ["bad_pointers", "call_close", "spin_in_hostcalls"]
        .iter()
        .flat_map(|name| Module::parse(name).imports)
        .filter_map(|(from, name)| (from == TURNHOUSE).then_some(name))
        .collect();
    let functions = [
        "abi_revision",
        "attachment_read",
        "call",
        "close",
        "emit",
        "error_read",
        "input_read",
        "log",
        "message_read",
        "recv",
        "reply",
        "snapshot_read",
        "snapshot_write",
        "wait",
    ];
    assert_eq!(imported, functions.map(String::from).into());
}

#[test]
fn the_bundled_workers_are_the_three_and_every_test_guest_was_built() {
    assert_eq!(bundled().iter().map(|guest| guest.name).collect::<Vec<_>>(), [ECHO, NOTES, STORY]);
    assert!(test_guests().len() >= 30, "{}", test_guests().len());
    for guest in all_guests() {
        assert!(bytes(guest.name).starts_with(b"\0asm"), "{}", guest.name);
    }
}

#[test]
#[should_panic(expected = "no guest is called nobody")]
fn a_guest_that_is_not_there_is_named() {
    bytes("nobody");
}

#[test]
fn every_wat_file_is_well_formed_and_says_what_it_is() {
    let names = wat_names();
    assert!(names.len() >= 20, "{}", names.len());
    for name in names {
        let text = wat(&name);
        assert!(text.starts_with(";; "), "{name}");
        let module = wat::parse_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(Parser::is_component(&module), name == "component", "{name}");
    }
}

#[test]
fn modules_made_to_measure_are_valid_and_as_large_as_asked() {
    for (name, module, bytes_min) in [
        ("no functions", made::with_functions(0), 0),
        ("functions", made::with_functions(100_000), 300_000),
        ("blocks", made::with_nested_blocks(900), 2_700),
        ("long start", made::with_long_start(3_000_000), 2_999_999),
        ("types", made::with_types(10_000), 30_000),
        ("imports", made::with_imports(10_000), 370_000),
        ("exports", made::with_exports(10_000), 110_000),
        ("data", made::with_data(3_000_000), 3_000_000),
        ("no data", made::with_data(0), 0),
        ("custom section", made::with_custom_section(1_000_000), 1_000_000),
    ] {
        wasmparser::validate(&module).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(module.len() >= bytes_min, "{name}: {} bytes", module.len());
    }
}
