//! Bulk instructions in pieces. `memory.fill`, `memory.copy` and `memory.init` look at no clock: one of 60 MiB keeps its thread for tens of milliseconds,
//! and a hundred guests that do nothing else make an honest turn wait for seconds. So a module is changed before it is compiled: where such an
//! instruction may be long, a function is called instead that does the same in a loop, whose back-edge is a place where a guest can be interrupted.
//!
//! The module is spliced, not encoded anew: everything else keeps its bytes. It must be valid; `compiler::compile_here` has seen to that. Tables need
//! none of this: the largest is half a MiB.

use std::borrow::Cow;
use std::ops::Range;

use wasmparser::{BinaryReader, BinaryReaderError, DataKind, Operator, Parser, Payload, TypeRef};

/// What one instruction may touch: with pages that nobody has touched before, a tenth of a millisecond.
const PIECE_BYTES: u32 = 256 * 1024;

/// Changes whenever this changes what is compiled, so that older code is not taken from the cache.
pub(super) const REVISION: u8 = 1;

/// What an instruction is replaced by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bulk {
    Fill,
    Copy,
    /// From this segment.
    Init(u32),
}

/// An instruction's bytes in the module, and what it does.
struct Place {
    at: Range<usize>,
    bulk: Bulk,
}

/// The module, with every bulk instruction that may be long in pieces.
pub(super) fn in_pieces(wasm: &[u8]) -> Result<Cow<'_, [u8]>, BinaryReaderError> {
    let places = places(wasm)?;
    if places.is_empty() {
        return Ok(Cow::Borrowed(wasm));
    }
    let mut bulks: Vec<Bulk> = Vec::new();
    for place in &places {
        if !bulks.contains(&place.bulk) {
            bulks.push(place.bulk);
        }
    }
    splice(wasm, &places, &bulks).map(Cow::Owned)
}

/// In the order in which they stand.
fn places(wasm: &[u8]) -> Result<Vec<Place>, BinaryReaderError> {
    let long = long_segments(wasm)?;
    let mut places = Vec::new();
    for payload in Parser::new(0).parse_all(wasm) {
        let Payload::CodeSectionEntry(body) = payload? else { continue };
        let mut operators = body.get_operators_reader()?;
        // What an instruction finds on top of the stack, where the one before it was a constant.
        let mut top: Option<i32> = None;
        while !operators.eof() {
            let begin = operators.original_position();
            let operator = operators.read()?;
            let is_long = top.is_none_or(|bytes| bytes as u32 > PIECE_BYTES);
            let bulk = match operator {
                Operator::MemoryFill { mem: 0 } if is_long => Some(Bulk::Fill),
                Operator::MemoryCopy { dst_mem: 0, src_mem: 0 } if is_long => Some(Bulk::Copy),
                Operator::MemoryInit { data_index, mem: 0 } if is_long && long.contains(&data_index) => {
                    Some(Bulk::Init(data_index))
                }
                _ => None,
            };
            top = if let Operator::I32Const { value } = operator { Some(value) } else { None };
            places.extend(bulk.map(|bulk| Place { at: begin..operators.original_position(), bulk }));
        }
    }
    Ok(places)
}

/// Of a shorter segment, more than a piece is out of bounds and traps at once.
fn long_segments(wasm: &[u8]) -> Result<Vec<u32>, BinaryReaderError> {
    let mut long = Vec::new();
    for payload in Parser::new(0).parse_all(wasm) {
        let Payload::DataSection(segments) = payload? else { continue };
        for (index, segment) in (0..).zip(segments) {
            let segment = segment?;
            if matches!(segment.kind, DataKind::Passive) && segment.data.len() > PIECE_BYTES as usize {
                long.push(index);
            }
        }
    }
    Ok(long)
}

/// The module with a call at each place, and the functions that are called at the end of its own.
fn splice(wasm: &[u8], places: &[Place], bulks: &[Bulk]) -> Result<Vec<u8>, BinaryReaderError> {
    const TYPES: u8 = 1;
    const CODE: u8 = 10;
    let added = bulks.len() as u32;
    let (mut types, mut functions) = (0, 0);
    let mut out = wasm[..8].to_vec();
    let mut code = Vec::new();
    let mut bodies_left = 0;
    for payload in Parser::new(0).parse_all(wasm) {
        let payload = payload?;
        match &payload {
            Payload::TypeSection(_) | Payload::FunctionSection(_) => {
                let (id, range) = payload.as_section().expect("it is a section");
                let (count, rest) = counted(wasm, range)?;
                let section = if id == TYPES {
                    types = count;
                    [&leb(count + 1), rest, THREE_NUMBERS].concat()
                } else {
                    functions += count;
                    [&leb(count + added), rest, &leb(types).repeat(bulks.len())].concat()
                };
                write_section(&mut out, id, &section);
            }
            Payload::CodeSectionStart { count, .. } => {
                bodies_left = *count;
                code = leb(count + added);
            }
            Payload::CodeSectionEntry(body) => {
                let range = body.range();
                let inside = places.partition_point(|place| place.at.start < range.start)
                    ..places.partition_point(|place| place.at.start < range.end);
                let mut spliced = Vec::with_capacity(range.len());
                let mut from = range.start;
                for place in &places[inside] {
                    let at = bulks.iter().position(|bulk| *bulk == place.bulk).expect("every bulk has its function");
                    spliced.extend_from_slice(&wasm[from..place.at.start]);
                    spliced.push(op::CALL);
                    spliced.extend_from_slice(&leb(functions + at as u32));
                    from = place.at.end;
                }
                spliced.extend_from_slice(&wasm[from..range.end]);
                write_sized(&mut code, &spliced);
                bodies_left -= 1;
                if bodies_left == 0 {
                    bulks.iter().for_each(|bulk| write_sized(&mut code, &bulk.body()));
                    write_section(&mut out, CODE, &code);
                }
            }
            // What a custom section says of offsets in the code would be wrong now; names are of functions by their number.
            Payload::CustomSection(custom) if custom.name() != "name" => {}
            _ => {
                if let Payload::ImportSection(imports) = &payload {
                    for import in imports.clone().into_imports() {
                        functions += u32::from(matches!(import?.ty, TypeRef::Func(_)));
                    }
                }
                if let Some((id, range)) = payload.as_section() {
                    write_section(&mut out, id, &wasm[range]);
                }
            }
        }
    }
    Ok(out)
}

/// A section's number of items, and their bytes.
fn counted(wasm: &[u8], range: Range<usize>) -> Result<(u32, &[u8]), BinaryReaderError> {
    let mut reader = BinaryReader::new(&wasm[range.clone()], range.start);
    let count = reader.read_var_u32()?;
    Ok((count, &wasm[reader.original_position()..range.end]))
}

fn write_section(out: &mut Vec<u8>, id: u8, content: &[u8]) {
    out.push(id);
    write_sized(out, content);
}

fn write_sized(out: &mut Vec<u8>, content: &[u8]) {
    out.extend_from_slice(&leb(content.len() as u32));
    out.extend_from_slice(content);
}

fn leb(mut number: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(5);
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// The type of all three instructions: three i32 in, nothing out.
const THREE_NUMBERS: &[u8] = &[0x60, 3, 0x7f, 0x7f, 0x7f, 0];

/// Instructions, as the specification numbers them.
mod op {
    pub(super) const LOOP: &[u8] = &[0x03, 0x40];
    pub(super) const IF: &[u8] = &[0x04, 0x40];
    pub(super) const END: &[u8] = &[0x0b];
    pub(super) const AGAIN: &[u8] = &[0x0d, 0];
    pub(super) const RETURN: &[u8] = &[0x0f];
    pub(super) const CALL: u8 = 0x10;
    pub(super) const SELECT: &[u8] = &[0x1b];
    pub(super) const MEMORY_SIZE: &[u8] = &[0x3f, 0];
    pub(super) const I32_GT_U: &[u8] = &[0x4b];
    pub(super) const I32_LE_U: &[u8] = &[0x4d];
    pub(super) const I64_GT_U: &[u8] = &[0x56];
    pub(super) const I32_ADD: &[u8] = &[0x6a];
    pub(super) const I32_SUB: &[u8] = &[0x6b];
    pub(super) const I32_OR: &[u8] = &[0x72];
    pub(super) const I64_ADD: &[u8] = &[0x7c];
    pub(super) const I64_SHL: &[u8] = &[0x86];
    pub(super) const I64_EXTEND_U: &[u8] = &[0xad];
    pub(super) const I64_CONST_16: &[u8] = &[0x42, 16];
    /// [`super::PIECE_BYTES`].
    pub(super) const PIECE: &[u8] = &[0x41, 0x80, 0x80, 0x10];
    /// The three parameters: where to, where from (or the byte to fill with), how many bytes.
    pub(super) const TO: &[u8] = &[0x20, 0];
    pub(super) const FROM: &[u8] = &[0x20, 1];
    pub(super) const BYTES: &[u8] = &[0x20, 2];
    pub(super) const SET_TO: &[u8] = &[0x21, 0];
    pub(super) const SET_FROM: &[u8] = &[0x21, 1];
    pub(super) const SET_BYTES: &[u8] = &[0x21, 2];
}

impl Bulk {
    fn instruction(self) -> Vec<u8> {
        match self {
            Bulk::Fill => vec![0xfc, 11, 0],
            Bulk::Copy => vec![0xfc, 10, 0, 0],
            Bulk::Init(segment) => [&[0xfc, 8], &leb(segment)[..], &[0]].concat(),
        }
    }

    /// The function's body, its locals included, of which there are none.
    fn body(self) -> Vec<u8> {
        use op::*;
        let whole = [TO, FROM, BYTES, &self.instruction()].concat();
        let mut body = vec![0];
        // What fits in a piece is one; and what would leave the memory traps whole, before it has written anything.
        let farthest = match self {
            Bulk::Copy => [TO, FROM, TO, FROM, I32_GT_U, SELECT].concat(),
            Bulk::Fill | Bulk::Init(_) => TO.to_vec(),
        };
        let end = [&farthest, I64_EXTEND_U, BYTES, I64_EXTEND_U, I64_ADD].concat();
        let size = [MEMORY_SIZE, I64_EXTEND_U, I64_CONST_16, I64_SHL].concat();
        body.extend([BYTES, PIECE, I32_LE_U, &end, &size, I64_GT_U, I32_OR].concat());
        body.extend([IF, &whole, RETURN, END].concat());
        let next = |set: &[u8], get: &[u8], step: &[u8]| [get, PIECE, step, set].concat();
        if self == Bulk::Copy {
            // Upwards over what it has still to read, it would copy what it wrote: from the end, then.
            let piece = [TO, BYTES, I32_ADD, FROM, BYTES, I32_ADD, PIECE, &self.instruction()].concat();
            body.extend([TO, FROM, I32_GT_U, IF, LOOP, &next(SET_BYTES, BYTES, I32_SUB), &piece].concat());
            body.extend([BYTES, PIECE, I32_GT_U, AGAIN, END, &whole, RETURN, END].concat());
        }
        let from = if self == Bulk::Fill { Vec::new() } else { next(SET_FROM, FROM, I32_ADD) };
        body.extend([LOOP, TO, FROM, PIECE, &self.instruction(), &next(SET_TO, TO, I32_ADD), &from].concat());
        body.extend([&next(SET_BYTES, BYTES, I32_SUB), BYTES, PIECE, I32_GT_U, AGAIN, END, &whole, END].concat());
        body
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;
    use wasmtime::{Config, Engine, Instance, Module, Store, UpdateDeadline};

    use super::*;

    const MEMORY_BYTES: u32 = 24 * 65_536;

    /// Every bulk instruction, and what may stand around it.
    fn module() -> Vec<u8> {
        let segment = "x".repeat(PIECE_BYTES as usize) + &"0123456789".repeat(40_000);
        wat::parse_str(format!(
            r#"(module
              (import "env" "nothing" (func))
              (import "env" "global" (global i32))
              (type $own (func (param i64)))
              (memory (export "memory") 24)
              (data $short "abc")
              (data $long "{segment}")
              (func (export "fill") (param i32 i32 i32) (memory.fill (local.get 0) (local.get 1) (local.get 2)))
              (func (export "copy") (param i32 i32 i32) (memory.copy (local.get 0) (local.get 1) (local.get 2)))
              (func (export "init") (param i32 i32 i32)
                (local $unused i64)
                (memory.init $long (local.get 0) (local.get 1) (local.get 2)))
              (func (export "init_short") (param i32 i32 i32)
                (memory.init $short (local.get 0) (local.get 1) (local.get 2)))
              (func (export "drop") (param i32 i32 i32) (data.drop $long))
              (func (export "twice") (param i32 i32 i32)
                (call 0)
                (memory.copy (i32.const 5) (i32.const 0) (i32.const 262144))
                (memory.fill (i32.const 5) (i32.const 1) (i32.const 262145))
                (memory.copy (i32.const 0) (i32.const 5) (i32.const -1)))
            )"#
        ))
        .unwrap()
    }

    fn valid(wasm: &[u8]) -> bool {
        wasmparser::Validator::new_with_features(super::super::inspect::features()).validate_all(wasm).is_ok()
    }

    struct Guest {
        store: Store<()>,
        instance: Instance,
        checks: Arc<AtomicU32>,
    }

    impl Guest {
        /// Its epoch is over at every place where it is looked at.
        fn new(wasm: &[u8]) -> Guest {
            let engine = Engine::new(Config::new().epoch_interruption(true)).unwrap();
            let module = Module::new(&engine, wasm).unwrap();
            let mut store = Store::new(&engine, ());
            let checks = Arc::new(AtomicU32::new(0));
            let counted = checks.clone();
            store.epoch_deadline_callback(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                Ok(UpdateDeadline::Continue(0))
            });
            let nothing = wasmtime::Func::wrap(&mut store, || {});
            let ty = wasmtime::GlobalType::new(wasmtime::ValType::I32, wasmtime::Mutability::Const);
            let global = wasmtime::Global::new(&mut store, ty, 0.into()).unwrap();
            let instance = Instance::new(&mut store, &module, &[nothing.into(), global.into()]).unwrap();
            Guest { store, instance, checks }
        }

        fn call(&mut self, name: &str, (to, from, bytes): (u32, u32, u32)) -> Option<String> {
            let func = self.instance.get_typed_func::<(i32, i32, i32), ()>(&mut self.store, name).unwrap();
            let result = func.call(&mut self.store, (to as i32, from as i32, bytes as i32));
            result.err().map(|error| error.downcast::<wasmtime::Trap>().unwrap().to_string())
        }

        fn memory(&mut self) -> Vec<u8> {
            self.instance.get_memory(&mut self.store, "memory").unwrap().data(&self.store).to_vec()
        }
    }

    #[test]
    fn a_module_without_long_instructions_stays_as_it_is() {
        for text in [
            "(module)",
            "(module (memory 1) (func (memory.fill (i32.const 0) (i32.const 0) (i32.const 262144))))",
            r#"(module (memory 1) (data "a") (func (param i32) (memory.init 0 (i32.const 0) (i32.const 0) (local.get 0))))"#,
        ] {
            let wasm = wat::parse_str(text).unwrap();
            assert!(matches!(in_pieces(&wasm).unwrap(), Cow::Borrowed(_)), "{text}");
        }
        // A constant before a block is not what the instruction after it finds.
        let wasm = wat::parse_str(
            "(module (memory 1) (func (param i32) i32.const 0 i32.const 0
               (block (result i32) local.get 0 i32.const 7 drop) memory.fill))",
        )
        .unwrap();
        assert!(matches!(in_pieces(&wasm).unwrap(), Cow::Owned(_)));
    }

    #[test]
    fn a_module_in_pieces_is_valid_and_only_what_may_be_long_is_changed() {
        let wasm = module();
        let changed = in_pieces(&wasm).unwrap().into_owned();
        assert!(valid(&wasm) && valid(&changed));
        assert_eq!(places(&wasm).unwrap().len(), 5);
        assert_eq!(functions_of(&changed), functions_of(&wasm) + 3);
        // In pieces already, but for the functions that make them: these have a bound of their own.
        assert_eq!(places(&changed).unwrap().iter().filter(|place| place.bulk == Bulk::Copy).count(), 3);
    }

    fn functions_of(wasm: &[u8]) -> u32 {
        let sections = Parser::new(0).parse_all(wasm);
        let count = sections.filter_map(|payload| match payload.unwrap() {
            Payload::CodeSectionStart { count, .. } => Some(count),
            _ => None,
        });
        count.sum()
    }

    #[test]
    fn a_long_instruction_can_be_interrupted_after_every_piece() {
        let wasm = module();
        let (mut whole, mut pieces) = (Guest::new(&wasm), Guest::new(&in_pieces(&wasm).unwrap()));
        for (name, arguments) in [
            ("fill", (0, 7, MEMORY_BYTES)),
            ("copy", (0, 1, MEMORY_BYTES - 1)),
            ("copy", (1, 0, MEMORY_BYTES - 1)),
            ("init", (0, 0, 3 * PIECE_BYTES / 2)),
        ] {
            let count = |guest: &mut Guest| {
                let before = guest.checks.load(Ordering::Relaxed);
                assert_eq!(guest.call(name, arguments), None);
                guest.checks.load(Ordering::Relaxed) - before
            };
            assert!(count(&mut whole) <= 2, "{name}");
            assert!(count(&mut pieces) > (arguments.2 - 1) / PIECE_BYTES, "{name}");
            assert_eq!(whole.memory(), pieces.memory(), "{name} {arguments:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn in_pieces_the_same_is_done_and_the_same_is_refused(
            calls in proptest::collection::vec((0usize..7, number(), number(), number()), 1..12)
        ) {
            let wasm = module();
            let (mut whole, mut pieces) = (Guest::new(&wasm), Guest::new(&in_pieces(&wasm).unwrap()));
            for (name, to, from, bytes) in calls {
                let name = ["fill", "copy", "copy", "init", "init_short", "twice", "drop"][name];
                // Part of a segment may be there before its end is missed; who has trapped sees nothing any more.
                let (one, other) = (whole.call(name, (to, from, bytes)), pieces.call(name, (to, from, bytes)));
                prop_assert_eq!(&one, &other, "{}({}, {}, {})", name, to, from, bytes);
                if one.is_some() && name == "init" {
                    break;
                }
                prop_assert!(whole.memory() == pieces.memory(), "{}({}, {}, {})", name, to, from, bytes);
            }
        }
    }

    /// Near every edge that there is.
    fn number() -> impl Strategy<Value = u32> {
        let edges = prop::sample::select(vec![0, PIECE_BYTES, 2 * PIECE_BYTES, MEMORY_BYTES / 2, MEMORY_BYTES, 0]);
        prop_oneof![
            4 => (edges, -3i32..4).prop_map(|(edge, by)| edge.wrapping_add_signed(by)),
            4 => 0..MEMORY_BYTES,
            1 => any::<u32>(),
        ]
    }
}
