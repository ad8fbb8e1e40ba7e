//! Loops for ever without calling anything.

fn main() {
    loop {
        std::hint::spin_loop();
    }
}
