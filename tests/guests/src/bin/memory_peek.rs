//! Looks for anything but zeroes in memory that it never wrote: what an earlier instance may have left. Then fills that memory with a
//! mark for the next to find. Replies with the number of bytes that it found.

#[cfg(target_family = "wasm")]
#[allow(unsafe_code, reason = "memory that no allocation gave can only be read through raw pointers")]
fn main() {
    use core::arch::wasm32::memory_grow;

    const PAGES: usize = 64;
    let start = memory_grow::<0>(PAGES) * 65_536;
    // SAFETY: these pages were just added, for this program alone; nobody else knows of them.
    let memory = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, PAGES * 65_536) };
    let found = memory.iter().filter(|byte| **byte != 0).count();
    memory.fill(0xa5);
    std::hint::black_box(memory);
    println!("found {found}");
}

#[cfg(not(target_family = "wasm"))]
fn main() {}
