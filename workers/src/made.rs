//! Modules made to measure: valid commands that are too much of one thing. For limits whose modules would be too large to keep as files.
//!
//! Each has an exported memory of one page (or as large as it needs) and a `_start` that does nothing, unless its function says otherwise.

const PAGE_BYTES: usize = 65_536;

const HEADER: &[u8] = b"\0asm\x01\0\0\0";

/// A module with so many functions beside `_start`, all of them empty.
pub fn with_functions(count: u32) -> Vec<u8> {
    module(1 + count as usize, 1, &[], &[])
}

/// A module whose `_start` has so many blocks, each inside the one before: small to upload, slow to compile.
pub fn with_nested_blocks(depth: usize) -> Vec<u8> {
    const BLOCK: [u8; 2] = [0x02, 0x40];
    const END: u8 = 0x0b;
    let mut code = BLOCK.repeat(depth);
    code.resize(code.len() + depth, END);
    module(1, 1, &code, &[])
}

/// A module whose `_start` has so many bytes of code, one instruction after the other: no loop, so no clock is looked at.
pub fn with_long_start(bytes: usize) -> Vec<u8> {
    const CONST_AND_DROP: [u8; 3] = [0x41, 0x00, 0x1a];
    module(1, 1, &CONST_AND_DROP.repeat(bytes / 3), &[])
}

/// A module of so many types, all of them the same; its functions have the first.
pub fn with_types(count: usize) -> Vec<u8> {
    [HEADER, &types(count), &section(3, &[1, 0]), &memory(1), &exports(0), &section(10, &[1, 2, 0, 0x0b])].concat()
}

/// A module that imports `sched_yield` so many times: each time is allowed.
pub fn with_imports(count: usize) -> Vec<u8> {
    let import = b"\x16wasi_snapshot_preview1\x0bsched_yield\x00\x00";
    // One type for the import, () → i32; functions have the other.
    let types = section(1, &[2, 0x60, 0, 1, 0x7f, 0x60, 0, 0]);
    let imports = section(2, &many(count, |_| import.to_vec()));
    [HEADER, &types, &imports, &section(3, &[1, 1]), &memory(1), &exports(count), &section(10, &[1, 2, 0, 0x0b])]
        .concat()
}

/// A module that exports its `_start` under so many names more.
pub fn with_exports(count: usize) -> Vec<u8> {
    let mut names = vec![];
    push_len(&mut names, count + 2);
    names.extend(b"\x06memory\x02\x00\x06_start\x00\x00");
    for n in 0..count {
        names.extend(format!("\x08{n:08}\0\0").into_bytes());
    }
    [HEADER, &types(1), &section(3, &[1, 0]), &memory(1), &section(7, &names), &section(10, &[1, 2, 0, 0x0b])].concat()
}

/// A module whose memory starts with so many bytes of data, none of them zero.
pub fn with_data(bytes: usize) -> Vec<u8> {
    // One segment for memory 0, at `i32.const 0`.
    let mut data = vec![1, 0x00, 0x41, 0x00, 0x0b];
    push_len(&mut data, bytes);
    data.resize(data.len() + bytes, 0xd7);
    module(1, bytes.div_ceil(PAGE_BYTES).max(1), &[], &section(11, &data))
}

/// A module with a custom section of so many bytes, which no engine reads: an upload of any size that is cheap to compile.
pub fn with_custom_section(bytes: usize) -> Vec<u8> {
    let mut custom = b"\x07padding".to_vec();
    custom.resize(custom.len() + bytes, 0);
    module(1, 1, &[], &section(0, &custom))
}

/// Function 0 is `_start` and has this code, the others have none; `tail` is what comes after the code section.
fn module(functions: usize, pages: usize, start: &[u8], tail: &[u8]) -> Vec<u8> {
    let functions_of_type_0 = many(functions, |_| vec![0]);
    let bodies = many(functions, |n| body(if n == 0 { start } else { &[] }));
    [HEADER, &types(1), &section(3, &functions_of_type_0), &memory(pages), &exports(0), &section(10, &bodies), tail]
        .concat()
}

/// So many types: no parameters, no results.
fn types(count: usize) -> Vec<u8> {
    section(1, &many(count, |_| vec![0x60, 0, 0]))
}

fn memory(pages: usize) -> Vec<u8> {
    let mut memory = vec![1, 0x00];
    push_len(&mut memory, pages);
    section(5, &memory)
}

/// The memory, and the function of this index as `_start`.
fn exports(start: usize) -> Vec<u8> {
    let mut exports = b"\x02\x06memory\x02\x00\x06_start\x00".to_vec();
    push_len(&mut exports, start);
    section(7, &exports)
}

/// A count, and so many items.
fn many(count: usize, item: impl Fn(usize) -> Vec<u8>) -> Vec<u8> {
    let mut items = vec![];
    push_len(&mut items, count);
    (0..count).for_each(|n| items.extend(item(n)));
    items
}

fn section(id: u8, content: &[u8]) -> Vec<u8> {
    let mut section = vec![id];
    push_len(&mut section, content.len());
    section.extend(content);
    section
}

/// A function without locals.
fn body(code: &[u8]) -> Vec<u8> {
    let mut body = vec![];
    push_len(&mut body, code.len() + 2);
    body.push(0);
    body.extend(code);
    body.push(0x0b);
    body
}

/// Unsigned LEB128.
fn push_len(into: &mut Vec<u8>, mut len: usize) {
    while len >= 0x80 {
        into.push(len as u8 | 0x80);
        len >>= 7;
    }
    into.push(len as u8);
}
