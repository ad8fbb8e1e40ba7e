//! Choices that look random and are the same again from the same seed.

/// splitmix64.
pub struct Choices(u64);

impl Choices {
    /// From a seed.
    pub fn new(seed: u64) -> Choices {
        Choices(seed)
    }

    /// Any number.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number from 0 to below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// `TURNHOUSE_TEST_SEED`, or one that was never used; printed, so that a failure can be had again.
///
/// # Panics
/// When the variable is no number.
pub fn seed() -> u64 {
    let seed = match std::env::var("TURNHOUSE_TEST_SEED") {
        Ok(text) => text.parse().expect("TURNHOUSE_TEST_SEED is a number"),
        Err(_) => u64::from(std::process::id()) ^ std::time::UNIX_EPOCH.elapsed().expect("a time").as_nanos() as u64,
    };
    println!("TURNHOUSE_TEST_SEED={seed}");
    seed
}
