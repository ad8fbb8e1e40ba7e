//! Modules made to measure: valid commands that are too much of one thing. For limits whose modules would be too large to keep as files.
//!
//! Each has an exported memory of one page (or as large as it needs) and a `_start` that does nothing, unless its function says otherwise.

const PAGE_BYTES: usize = 65_536;

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
    let mut types = vec![];
    push_len(&mut types, functions);
    types.resize(types.len() + functions, 0);
    let mut memory = vec![1, 0x00];
    push_len(&mut memory, pages);
    let mut bodies = vec![];
    push_len(&mut bodies, functions);
    bodies.extend(body(start));
    bodies.extend(body(&[]).repeat(functions - 1));
    [
        b"\0asm\x01\0\0\0".to_vec(),
        section(1, &[1, 0x60, 0, 0]), // one type: no parameters, no results
        section(3, &types),
        section(5, &memory),
        section(7, b"\x02\x06memory\x02\x00\x06_start\x00\x00"),
        section(10, &bodies),
        tail.to_vec(),
    ]
    .concat()
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
