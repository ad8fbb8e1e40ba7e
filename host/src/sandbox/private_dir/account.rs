//! The quota's arithmetic: what a directory holds, and whether it may hold more. Pure.
//!
//! The count is exact, or too high and known to be `unsure`: then whoever would refuse something counts the tree again first. It is never too
//! low.

use super::tree::Held;

/// What a private directory may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// See [`Held::bytes`].
    pub bytes_max: u64,
    /// See [`Held::files`].
    pub files_max: u64,
}

/// By how much a call makes a directory grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Growth {
    pub(super) bytes: u64,
    pub(super) files: u64,
}

/// Which bound a call would break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    Bytes,
    Files,
}

impl Over {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Over::Bytes => "bytes",
            Over::Files => "files",
        }
    }
}

/// A directory's count.
#[derive(Debug)]
pub(super) struct Account {
    quota: Quota,
    held: Held,
    unsure: bool,
}

impl Account {
    pub(super) fn new(quota: Quota, held: Held) -> Account {
        Account { quota, held, unsure: false }
    }

    /// Whether it may grow so. `nameless`: bytes of files that are open and have no name any more; they are on the disk, and not in the count.
    /// What does not grow may always be done, also where the bound was lowered below what is there.
    pub(super) fn admits(&self, growth: Growth, nameless: u64) -> Result<(), Over> {
        let within = |held: u64, more: u64, max: u64| more == 0 || held.checked_add(more).is_some_and(|sum| sum <= max);
        if !within(self.held.files, growth.files, self.quota.files_max) {
            return Err(Over::Files);
        }
        if !within(self.held.bytes.saturating_add(nameless), growth.bytes, self.quota.bytes_max) {
            return Err(Over::Bytes);
        }
        Ok(())
    }

    /// It has grown.
    pub(super) fn grew(&mut self, growth: Growth) {
        self.held.bytes = self.held.bytes.saturating_add(growth.bytes);
        self.held.files = self.held.files.saturating_add(growth.files);
    }

    /// A name is gone, and with it so many bytes.
    pub(super) fn lost(&mut self, bytes: u64) {
        self.held.files = self.held.files.saturating_sub(1);
        self.held.bytes = self.held.bytes.saturating_sub(bytes);
    }

    /// A file has another size.
    pub(super) fn resized(&mut self, before: u64, after: u64) {
        self.held.bytes = self.held.bytes.saturating_sub(before).saturating_add(after);
    }

    /// Something may have been given back that was not counted.
    pub(super) fn doubt(&mut self) {
        self.unsure = true;
    }

    pub(super) fn unsure(&self) -> bool {
        self.unsure
    }

    /// It was counted again.
    pub(super) fn counted(&mut self, held: Held) {
        (self.held, self.unsure) = (held, false);
    }

    #[cfg(test)]
    pub(super) fn held(&self) -> Held {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const QUOTA: Quota = Quota { bytes_max: 100, files_max: 3 };

    fn account(bytes: u64, files: u64) -> Account {
        Account::new(QUOTA, Held { bytes, files })
    }

    fn bytes(bytes: u64) -> Growth {
        Growth { bytes, files: 0 }
    }

    fn file() -> Growth {
        Growth { bytes: 0, files: 1 }
    }

    #[test]
    fn a_directory_may_be_filled_to_the_last_byte_and_name() {
        assert_eq!(account(90, 0).admits(bytes(10), 0), Ok(()));
        assert_eq!(account(90, 0).admits(bytes(11), 0), Err(Over::Bytes));
        assert_eq!(account(0, 2).admits(file(), 0), Ok(()));
        assert_eq!(account(0, 3).admits(file(), 0), Err(Over::Files));
        assert_eq!(account(100, 3).admits(Growth::default(), 0), Ok(()));
    }

    #[test]
    fn open_files_without_a_name_count() {
        assert_eq!(account(50, 0).admits(bytes(10), 40), Ok(()));
        assert_eq!(account(50, 0).admits(bytes(10), 41), Err(Over::Bytes));
    }

    #[test]
    fn absurd_sizes_are_over_and_wrap_nothing() {
        assert_eq!(account(1, 0).admits(bytes(u64::MAX), 0), Err(Over::Bytes));
        assert_eq!(account(1, 0).admits(bytes(1), u64::MAX), Err(Over::Bytes));
        let unbounded = Account::new(Quota { bytes_max: u64::MAX, files_max: 1 }, Held { bytes: 1, files: 0 });
        assert_eq!(unbounded.admits(bytes(u64::MAX), 0), Err(Over::Bytes));
    }

    #[test]
    fn what_is_over_a_lowered_bound_may_shrink_and_not_grow() {
        let mut account = account(500, 9);
        assert_eq!(account.admits(Growth::default(), 0), Ok(()));
        assert_eq!(account.admits(bytes(1), 0), Err(Over::Bytes));
        account.lost(450);
        assert_eq!(account.admits(bytes(1), 0), Ok(()));
        assert_eq!(account.admits(file(), 0), Err(Over::Files));
    }

    proptest! {
        /// Any files, written, truncated and removed in any order: the count is theirs.
        #[test]
        fn the_count_follows_what_is_done(steps in prop::collection::vec((0..4_usize, 0..60_u64), 0..60)) {
            let mut files: [Option<u64>; 4] = [None; 4];
            let mut account = account(0, 0);
            for (which, size) in steps {
                match (files[which], size) {
                    (None, _) => {
                        if account.admits(file(), 0).is_ok() {
                            account.grew(file());
                            files[which] = Some(0);
                        }
                    }
                    (Some(held), 0..10) => {
                        account.lost(held);
                        files[which] = None;
                    }
                    (Some(held), size) => {
                        if account.admits(bytes(size.saturating_sub(held)), 0).is_ok() {
                            account.resized(held, size);
                            files[which] = Some(size);
                        }
                    }
                }
                let held = Held { bytes: files.iter().flatten().sum(), files: files.iter().flatten().count() as u64 };
                prop_assert_eq!(account.held(), held);
                prop_assert!(held.bytes <= QUOTA.bytes_max && held.files <= QUOTA.files_max);
            }
        }
    }
}
