//! Subscribes to what `poll_oneoff` should not be asked for: which trick, 0 to 11, is the number in its message. Replies with the errno, where the host
//! answers at all.

use turnhouse_test_guests::{
    message, number,
    raw::{address, wasi},
};

/// As WASI lays a subscription out: 48 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct Subscription {
    userdata: u64,
    tag: u64,
    /// A clock's id, or a descriptor.
    of: u64,
    timeout: u64,
    precision: u64,
    flags: u64,
}

const EVENT_BYTES: usize = 32;
const ABSTIME: u64 = 1;
const REALTIME: u64 = 0;
const MONOTONIC: u64 = 1;

fn clock(of: u64, timeout: u64, flags: u64) -> Subscription {
    Subscription { userdata: 7, tag: 0, of, timeout, precision: 0, flags }
}

fn descriptor(tag: u64, of: u64) -> Subscription {
    Subscription { userdata: 7, tag, of, timeout: 0, precision: 0, flags: 0 }
}

/// One call. Whether `claimed` subscriptions are really there is the caller's affair.
fn poll(subscriptions: &[Subscription], claimed: u32) -> i32 {
    let mut events = vec![0u8; subscriptions.len() * EVENT_BYTES];
    let mut count = 0u32;
    wasi::poll_oneoff(
        address(subscriptions.as_ptr()),
        address(events.as_mut_ptr()),
        claimed as i32,
        address(&raw mut count),
    )
}

fn all(subscription: Subscription, count: u32) -> i32 {
    poll(&vec![subscription; count as usize], count)
}

fn forever(subscription: Subscription) -> ! {
    loop {
        all(subscription, 1);
    }
}

fn main() {
    let far = u64::MAX;
    let now = clock(MONOTONIC, 0, 0);
    let errno = match number(&message(), 0) {
        // At the end of time, in three ways.
        0 => all(clock(MONOTONIC, far, ABSTIME), 1),
        1 => all(clock(REALTIME, far, ABSTIME), 1),
        2 => all(clock(MONOTONIC, far, 0), 1),
        // More than there are, than the memory holds, and than 32 bits can count in bytes.
        3 => poll(&[now], 1 << 31),
        4 => poll(&[now], u32::MAX),
        5 => poll(&[now], 1 << 27),
        6 => all(now, 50_000),
        7 => all(clock(MONOTONIC, far, ABSTIME), 2_000),
        8 => poll(&[now], 0),
        // What is ready at once, again and again.
        9 => forever(clock(MONOTONIC, 1, ABSTIME)),
        10 => forever(descriptor(1, 0)),
        _ => all(descriptor(2, 4_000_000_000), 1),
    };
    println!("errno {errno}");
}
