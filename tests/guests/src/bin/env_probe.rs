//! Replies with everything that WASI tells it: arguments, environment, preopened directories, clocks, and what it sees of files.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use turnhouse_test_guests::raw::{address, wasi};

const BADF: i32 = 8;

fn main() {
    println!("args {:?}", std::env::args().collect::<Vec<_>>());
    let mut environment: Vec<(String, String)> = std::env::vars().collect();
    environment.sort();
    println!("env {environment:?}");
    let mut prestat = [0u32; 2];
    let preopens = (3..64).take_while(|fd| wasi::fd_prestat_get(*fd, address(prestat.as_mut_ptr())) != BADF).count();
    println!("preopens {preopens}");
    for path in ["/", ".", "..", "/etc/passwd", "/proc/self/environ"] {
        println!("file {path} {}", if std::fs::metadata(path).is_ok() { "exists" } else { "none" });
    }
    println!("unix_ms {}", SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis()));
    let start = Instant::now();
    while start.elapsed().is_zero() {}
    println!("monotonic runs");
}
