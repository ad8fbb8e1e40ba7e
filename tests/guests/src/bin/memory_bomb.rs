//! Allocates a MiB at a time and writes to all of it, until there is no more; then it aborts, as Rust programs do.

fn main() {
    let mut held = Vec::new();
    loop {
        held.push(vec![1u8; 1024 * 1024]);
        std::hint::black_box(&held);
    }
}
