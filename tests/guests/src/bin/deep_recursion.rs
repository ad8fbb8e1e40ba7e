//! Recurses without end. As it stands it uses up the stack of wasm's own frames; with "shadow" in its message, the stack in its memory.

use turnhouse_test_guests::{message, says};

fn main() {
    let message = message();
    // The length is only known at run time, so that no compiler can take the recursion out.
    let depth = u32::MAX - message.len() as u32;
    if says(&message, "shadow") {
        println!("{}", in_memory(depth));
    } else {
        println!("{}", in_frames(depth));
    }
}

/// Its value is needed after it returns and it calls itself twice, so at least the first is a real call; nothing in it has an address.
#[inline(never)]
fn in_frames(depth: u32) -> u32 {
    if depth < 2 {
        return depth;
    }
    in_frames(depth - 1).rotate_left(3) ^ in_frames(depth - 2)
}

#[inline(never)]
fn in_memory(depth: u32) -> u32 {
    let mut here = [depth; 64];
    std::hint::black_box(&mut here);
    if depth == 0 {
        return here[0];
    }
    in_memory(depth - 1).wrapping_add(here[(depth % 64) as usize])
}
