//! Executes `unreachable`; with "abort" in its message it aborts, with "bounds" it reads far outside its memory.

use turnhouse_test_guests::{message, says};

fn main() {
    print!("half a sent");
    let message = message();
    if says(&message, "abort") {
        std::process::abort();
    }
    #[cfg(target_family = "wasm")]
    {
        if says(&message, "bounds") {
            wild::read();
        }
        core::arch::wasm32::unreachable();
    }
}

#[cfg(target_family = "wasm")]
#[allow(unsafe_code, reason = "to trap is the purpose")]
mod wild {
    use std::hint::black_box;

    pub fn read() {
        let nowhere = black_box(0xffff_0000_usize as *const u64);
        // SAFETY: none; the address is outside of every memory that this program can have, so the instance traps here.
        black_box(unsafe { nowhere.read_volatile() });
    }
}
