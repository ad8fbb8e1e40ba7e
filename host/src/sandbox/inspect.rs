//! What a module is, before anything of it is compiled: whether it can run here, and if not, why and what to do about that.
//!
//! The structure alone is read here, in time linear to the sections that are not code; function bodies are validated when it is compiled.

use std::collections::HashMap;

use wasmparser::{ExternalKind, FuncType, Parser, Payload, TypeRef, ValType, WasmFeatures};

use super::engine::TABLES_MAX;
use super::host_calls::{MODULE, SPEAKING};
use crate::limits::Limits;

/// Of a module's own names, in a message.
const NAME_CHARS_MAX: usize = 100;

/// Types, imports or exports of one module: far more than any program has. What is read of each is kept until the module is compiled, and an item takes more
/// room here than the three bytes that it may take in a file.
const ITEMS_MAX: u32 = 100_000;

/// Why a module cannot be a worker here. The text says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModuleRefusal {
    /// Not a core WebAssembly module, or a broken one.
    #[error("{0}")]
    Invalid(String),
    /// A module, but not a WASI command.
    #[error("{0}")]
    NotCommand(String),
    /// It imports what this host does not have.
    #[error("{0}")]
    ImportUnknown(String),
    /// More bytes than a module may have.
    #[error(
        "the module has {bytes} bytes; the limit is {bytes_max}: strip its debug information (`wasm-tools strip`), or have the operator raise limits.module_bytes_max"
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// `module_bytes_max`.
        bytes_max: usize,
    },
    /// More functions, tables or memory than a module may have, or more than the compiler takes.
    #[error("{0}")]
    TooComplex(String),
    /// Compiling it took too long.
    #[error(
        "the module was not compiled within {timeout_ms} ms: make it smaller, or have the operator raise limits.compile_timeout_ms"
    )]
    CompileTimeout {
        /// `compile_timeout_ms`.
        timeout_ms: u64,
    },
}

impl ModuleRefusal {
    /// Stable, as in problem bodies.
    pub fn code(&self) -> &'static str {
        match self {
            ModuleRefusal::Invalid(_) => "module_invalid",
            ModuleRefusal::NotCommand(_) => "module_not_command",
            ModuleRefusal::ImportUnknown(_) => "module_import_unknown",
            ModuleRefusal::TooLarge { .. } => "module_too_large",
            ModuleRefusal::TooComplex(_) => "module_too_complex",
            ModuleRefusal::CompileTimeout { .. } => "compile_timeout",
        }
    }
}

/// What is known of a module that can be a worker, as far as its structure tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// Its size.
    pub bytes: usize,
    /// Functions with a body.
    pub functions: usize,
    /// Imported functions, as `module.name`.
    pub imports: Vec<String>,
    /// It speaks through `emit` and `reply`; its standard output goes to the log.
    pub speaks: bool,
    /// Linear memory at the start.
    pub memory_bytes: u64,
}

/// The functions that a module may import, with their types.
pub(super) struct Importable(HashMap<(String, String), FuncType>);

impl Importable {
    pub(super) fn new(functions: impl Iterator<Item = (String, String, wasmtime::FuncType)>) -> Importable {
        Importable(functions.map(|(module, name, ty)| ((module, name), parser_type(&ty))).collect())
    }
}

/// The proposals that the engine has switched on; it must agree with `engine.rs`.
pub(super) fn features() -> WasmFeatures {
    WasmFeatures::MUTABLE_GLOBAL
        | WasmFeatures::SATURATING_FLOAT_TO_INT
        | WasmFeatures::SIGN_EXTENSION
        | WasmFeatures::REFERENCE_TYPES
        | WasmFeatures::MULTI_VALUE
        | WasmFeatures::BULK_MEMORY
        | WasmFeatures::SIMD
        | WasmFeatures::TAIL_CALL
        | WasmFeatures::FLOATS
        | WasmFeatures::EXTENDED_CONST
}

/// Reads a module's structure.
pub(super) fn inspect(wasm: &[u8], importable: &Importable, limits: &Limits) -> Result<Inspection, ModuleRefusal> {
    if wasm.len() > limits.module_bytes_max {
        return Err(ModuleRefusal::TooLarge { bytes: wasm.len(), bytes_max: limits.module_bytes_max });
    }
    sniff(wasm)?;
    let structure = Structure::read(wasm, limits)?;
    let mut imports = Vec::with_capacity(structure.imports.len());
    let mut speaks = false;
    for import in &structure.imports {
        check_import(import, &structure, importable)?;
        speaks |= import.module == MODULE && SPEAKING.contains(&import.name);
        imports.push(format!("{}.{}", import.module, import.name));
    }
    structure.check_command()?;
    structure.check_sizes(limits)?;
    Ok(Inspection {
        bytes: wasm.len(),
        functions: structure.functions,
        imports,
        speaks,
        memory_bytes: structure.memory_bytes(),
    })
}

/// Names what was sent instead of a module.
fn sniff(wasm: &[u8]) -> Result<(), ModuleRefusal> {
    let refuse = |what: &str| Err(ModuleRefusal::Invalid(what.to_owned()));
    match wasm {
        [] => refuse("the file is empty; send a core WebAssembly module built for wasm32-wasip1"),
        [0x00, b'a', b's', b'm', 0x01, 0x00, 0x00, 0x00, ..] => Ok(()),
        [0x00, b'a', b's', b'm', _, _, 0x01, 0x00, ..] => refuse(
            "this is a WebAssembly component; build a core module instead: target wasm32-wasip1, not wasm32-wasip2",
        ),
        [0x00, b'a', b's', b'm', ..] => {
            refuse("this WebAssembly is truncated or of another version than 1; build it again")
        }
        [0x7f, b'E', b'L', b'F', ..] => refuse(
            "this is an ELF file (a native program, or a module that was compiled already); send the .wasm built for wasm32-wasip1",
        ),
        [0xcf, 0xfa, 0xed, 0xfe, ..] | [b'M', b'Z', ..] => {
            refuse("this is a native program; build it for the target wasm32-wasip1")
        }
        _ if wasm.trim_ascii_start().starts_with(b"(") => refuse(
            "this is WebAssembly as text; translate it first, for instance with `wasm-tools parse worker.wat -o worker.wasm`",
        ),
        _ => refuse(
            "this is not WebAssembly (it does not begin with \\0asm); send a core module built for wasm32-wasip1",
        ),
    }
}

struct Import<'a> {
    module: &'a str,
    name: &'a str,
    ty: TypeRef,
}

#[derive(Default)]
struct Structure<'a> {
    types: Vec<FuncType>,
    imports: Vec<Import<'a>>,
    /// Type indices of functions, imported ones first.
    function_types: Vec<u32>,
    functions: usize,
    memory_pages: u64,
    /// Elements at the start, of each table.
    tables: Vec<u64>,
    exports: HashMap<&'a str, (ExternalKind, u32)>,
}

const PAGE_BYTES: u64 = 64 * 1024;

fn invalid(error: wasmparser::BinaryReaderError) -> ModuleRefusal {
    ModuleRefusal::Invalid(format!("the module is not valid: {}; build it again", shown(&error.to_string(), 300)))
}

fn few_enough(what: &str, count: u32) -> Result<(), ModuleRefusal> {
    if count <= ITEMS_MAX {
        return Ok(());
    }
    Err(ModuleRefusal::TooComplex(format!(
        "the module has {count} {what}; the limit is {ITEMS_MAX}: link less into it"
    )))
}

impl<'a> Structure<'a> {
    fn read(wasm: &'a [u8], limits: &Limits) -> Result<Structure<'a>, ModuleRefusal> {
        let mut structure = Structure::default();
        let mut parser = Parser::new(0);
        parser.set_features(features());
        for payload in parser.parse_all(wasm) {
            match payload.map_err(invalid)? {
                Payload::TypeSection(section) => {
                    few_enough("types", section.count())?;
                    for ty in section.into_iter_err_on_gc_types() {
                        structure.types.push(ty.map_err(invalid)?);
                    }
                }
                Payload::ImportSection(section) => {
                    few_enough("imports", section.count())?;
                    for import in section.into_imports() {
                        let import = import.map_err(invalid)?;
                        if let TypeRef::Func(index) = import.ty {
                            structure.function_types.push(index);
                        }
                        structure.imports.push(Import { module: import.module, name: import.name, ty: import.ty });
                    }
                }
                Payload::FunctionSection(section) => {
                    structure.functions = section.count() as usize;
                    if structure.functions > limits.module_functions_max {
                        return Err(ModuleRefusal::TooComplex(format!(
                            "the module has {} functions; the limit is {}: link less into it, or have the operator raise limits.module_functions_max",
                            structure.functions, limits.module_functions_max
                        )));
                    }
                    for index in section {
                        structure.function_types.push(index.map_err(invalid)?);
                    }
                }
                Payload::MemorySection(section) => {
                    for memory in section {
                        structure.memory_pages = structure.memory_pages.max(memory.map_err(invalid)?.initial);
                    }
                }
                Payload::TableSection(section) => {
                    for table in section {
                        structure.tables.push(table.map_err(invalid)?.ty.initial);
                    }
                }
                Payload::ExportSection(section) => {
                    few_enough("exports", section.count())?;
                    for export in section {
                        let export = export.map_err(invalid)?;
                        structure.exports.insert(export.name, (export.kind, export.index));
                    }
                }
                _ => {}
            }
        }
        Ok(structure)
    }

    fn memory_bytes(&self) -> u64 {
        self.memory_pages.saturating_mul(PAGE_BYTES)
    }

    fn function_type(&self, index: u32) -> Option<&FuncType> {
        self.types.get(*self.function_types.get(index as usize)? as usize)
    }

    fn check_command(&self) -> Result<(), ModuleRefusal> {
        let refuse = |what: &str| Err(ModuleRefusal::NotCommand(what.to_owned()));
        if self.exports.contains_key("_initialize") {
            return refuse(
                "the module is a WASI reactor (it exports `_initialize`); build a program with `main` instead of a library",
            );
        }
        match self.exports.get("_start") {
            None => {
                return refuse(
                    "the module exports no `_start`; build a program with `main` for wasm32-wasip1 instead of a library",
                );
            }
            Some((ExternalKind::Func, index)) => match self.function_type(*index) {
                Some(ty) if ty.params().is_empty() && ty.results().is_empty() => {}
                _ => return refuse("the module's `_start` must take nothing and give nothing"),
            },
            Some(_) => return refuse("the module's `_start` is not a function"),
        }
        match self.exports.get("memory") {
            Some((ExternalKind::Memory, _)) => Ok(()),
            _ => refuse("the module exports no `memory`; export its linear memory under that name"),
        }
    }

    fn check_sizes(&self, limits: &Limits) -> Result<(), ModuleRefusal> {
        if self.memory_bytes() > limits.memory_bytes_max as u64 {
            return Err(ModuleRefusal::TooComplex(format!(
                "the module asks for {} bytes of memory at its start; the limit is {}: link it with a smaller initial memory, or have the operator raise limits.memory_bytes_max",
                self.memory_bytes(),
                limits.memory_bytes_max
            )));
        }
        if self.tables.len() > TABLES_MAX as usize {
            return Err(ModuleRefusal::TooComplex(format!(
                "the module has {} tables; the limit is {TABLES_MAX}",
                self.tables.len()
            )));
        }
        match self.tables.iter().max() {
            Some(elements) if *elements > limits.table_elements_max as u64 => Err(ModuleRefusal::TooComplex(format!(
                "the module has a table of {elements} elements; the limit is {}: have the operator raise limits.table_elements_max",
                limits.table_elements_max
            ))),
            _ => Ok(()),
        }
    }
}

fn check_import(import: &Import<'_>, structure: &Structure<'_>, importable: &Importable) -> Result<(), ModuleRefusal> {
    let name = format!("`{}.{}`", shown(import.module, NAME_CHARS_MAX), shown(import.name, NAME_CHARS_MAX));
    let TypeRef::Func(index) = import.ty else {
        return Err(ModuleRefusal::ImportUnknown(format!(
            "the module imports {name}, which is not a function; define its memories, tables and globals in the module itself"
        )));
    };
    let Some(known) = importable.0.get(&(import.module.to_owned(), import.name.to_owned())) else {
        return Err(ModuleRefusal::ImportUnknown(format!(
            "the module imports {name}, which this host does not have; {}",
            advice(import.module)
        )));
    };
    match structure.types.get(index as usize) {
        Some(ty) if ty == known => Ok(()),
        Some(ty) => Err(ModuleRefusal::ImportUnknown(format!(
            "the module imports {name} as {}; its type is {}: correct the declaration",
            shown(&signature(ty), 200),
            signature(known)
        ))),
        None => Err(ModuleRefusal::Invalid(format!("the module imports {name} with a type that it does not define"))),
    }
}

/// What most often brings such an import about.
fn advice(module: &str) -> &'static str {
    match module {
        "wasi_unstable" => "it was built for an early WASI: build it for wasm32-wasip1",
        "env" => {
            "it was linked with undefined symbols: link what defines them, or build it for wasm32-wasip1 instead of wasm32-unknown-unknown or emscripten"
        }
        MODULE => "it may be of a newer ABI: update the host, or build against the functions of this one",
        "wasi_snapshot_preview1" => "WASI preview 1 has no such function",
        "gojs" | "go" => "it was built for a browser: set GOOS=wasip1",
        _ if module.starts_with("wasi:") => "it was built for WASI preview 2: build it for wasm32-wasip1",
        _ if module.starts_with("__wbindgen") || module == "wbg" => {
            "it was built for wasm-bindgen: build it for wasm32-wasip1"
        }
        _ => "a worker may import wasi_snapshot_preview1 and turnhouse_v1 only",
    }
}

/// A name that somebody else chose, fit for a message.
fn shown(name: &str, chars_max: usize) -> String {
    let mut shown: String = name.chars().take(chars_max).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect();
    if name.chars().nth(chars_max).is_some() {
        shown.push('…');
    }
    shown
}

fn signature(ty: &FuncType) -> String {
    let list = |types: &[ValType]| types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    format!("({}) → ({})", list(ty.params()), list(ty.results()))
}

/// Host functions use numbers alone.
fn parser_type(ty: &wasmtime::FuncType) -> FuncType {
    let number = |ty: wasmtime::ValType| match ty {
        wasmtime::ValType::I32 => ValType::I32,
        wasmtime::ValType::I64 => ValType::I64,
        wasmtime::ValType::F32 => ValType::F32,
        wasmtime::ValType::F64 => ValType::F64,
        other => unreachable!("no host function uses {other}"),
    };
    FuncType::new(ty.params().map(number), ty.results().map(number))
}
