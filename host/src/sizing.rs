//! How large a host's pool is, from one memory budget; and what of this machine does not fit it, with what to change. Pure: the facts come in.

use crate::config::Config;
use crate::limits::Limits;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// What a host takes beside its guests: program, store, connections.
const HOST_BYTES: u64 = 192 * MIB;

/// What a running guest takes of memory, all in all: a typical one has one or two MiB. A budget for the worst (`memory_bytes_max` each) would leave a
/// machine idle; the bound on each guest and the kernel's on the process stand for that case.
const GUEST_BYTES: u64 = 2 * MIB;

/// The part of the budget that slots may keep between guests.
const KEPT_PART: u64 = 4;

/// Slots are kept between these, whatever the budget.
const SLOTS: (u64, u64) = (16, 20_000);

/// Less is not worth its bookkeeping; more costs longer to clear than it saves.
const KEEP_RESIDENT: (u64, u64) = (64 * KIB, 2 * MIB);

/// Memory maps of a live guest, and of everything else.
const MAPS: (u64, u64) = (6, 4_000);

/// File descriptors beside those of clients: database, listeners, cache.
const FILES_SPARE: u64 = 200;

/// What this machine allows. `None`: unknown, or no bound.
#[derive(Debug, Clone, Copy, Default)]
pub struct Machine {
    /// `vm.max_map_count`.
    pub memory_maps_max: Option<u64>,
    /// `ulimit -v`, bytes.
    pub address_space_max: Option<u64>,
    /// `ulimit -n`.
    pub files_max: Option<u64>,
}

/// The size of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Guests at once: `limits.host_running_max`.
    pub slots: usize,
    /// Kept of each slot's memory between guests.
    pub keep_resident_bytes: usize,
}

impl Pool {
    /// For a budget on this machine.
    pub fn of(budget_bytes: u64, machine: &Machine) -> Pool {
        let for_guests = budget_bytes.saturating_sub(HOST_BYTES);
        let by_maps = machine.memory_maps_max.map_or(u64::MAX, |maps| maps.saturating_sub(MAPS.1) / MAPS.0);
        let slots = (for_guests / GUEST_BYTES).min(by_maps).clamp(SLOTS.0, SLOTS.1);
        let kept = (for_guests / KEPT_PART / slots).clamp(KEEP_RESIDENT.0, KEEP_RESIDENT.1);
        // Whole pages of 64 KiB.
        let kept = kept / (64 * KIB) * (64 * KIB);
        Pool {
            slots: usize::try_from(slots).expect("a few thousand"),
            keep_resident_bytes: usize::try_from(kept).expect("a few MiB"),
        }
    }
}

impl Config {
    /// Where a budget is set, it decides how many guests run at once and what their slots keep.
    pub fn sized(mut self, machine: &Machine) -> Config {
        if let Some(budget) = self.memory_budget_bytes {
            let pool = Pool::of(budget, machine);
            self.limits.host_running_max = pool.slots;
            // Half of them at most: the guests of one org can sleep, and others' turns would wait.
            self.limits.org_running_max = self.limits.org_running_max.min(pool.slots.div_ceil(2));
            self.keep_resident_bytes = pool.keep_resident_bytes;
        }
        self
    }
}

/// What does not fit, each with what to change.
pub fn misfits(limits: &Limits, machine: &Machine) -> Vec<String> {
    let mut misfits = Vec::new();
    let slots = limits.host_running_max as u64;
    let maps_needed = slots * MAPS.0 + MAPS.1;
    if let Some(maps) = machine.memory_maps_max.filter(|maps| *maps < maps_needed) {
        misfits.push(format!(
            "{slots} guests at once need {maps_needed} memory maps and vm.max_map_count is {maps}: `sysctl -w vm.max_map_count={maps_needed}`, or lower limits.host_running_max"
        ));
    }
    // A slot reserves 4 GiB and guards, so that no access needs a check.
    let space_needed = slots * 6 * KIB * MIB;
    if let Some(space) = machine.address_space_max.filter(|space| *space < space_needed) {
        misfits.push(format!(
            "{slots} guests at once reserve {} GiB of address space and `ulimit -v` allows {}: `ulimit -v unlimited`, or lower limits.host_running_max; until then instances are mapped on demand, several times slower",
            space_needed / (KIB * MIB),
            space / (KIB * MIB)
        ));
    }
    let files_needed = limits.readers_host_max as u64 + FILES_SPARE;
    if let Some(files) = machine.files_max.filter(|files| *files < files_needed) {
        misfits.push(format!(
            "{} streams at once need {files_needed} file descriptors and `ulimit -n` is {files}: raise it (LimitNOFILE= in a systemd unit), or lower limits.readers_host_max",
            limits.readers_host_max
        ));
    }
    misfits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_decides_slots_and_what_they_keep() {
        let machine = Machine::default();
        for (budget, slots, keep) in [
            // Too little for anything: the least there is.
            (64 * MIB, 16, 64 * KIB),
            (512 * MIB, 160, 512 * KIB),
            (4 * KIB * MIB, 1_952, 512 * KIB),
            (1_024 * KIB * MIB, 20_000, 2 * MIB),
        ] {
            let pool = Pool::of(budget, &machine);
            assert_eq!((pool.slots as u64, pool.keep_resident_bytes as u64), (slots, keep), "{budget}");
        }
        let few_maps = Machine { memory_maps_max: Some(10_000), ..machine };
        assert_eq!(Pool::of(4 * KIB * MIB, &few_maps).slots, 1_000);
    }

    #[test]
    fn what_a_budget_gives_fits_its_machine() {
        let machine = Machine { memory_maps_max: Some(65_530), ..Machine::default() };
        for budget in (0..200).map(|n| n * 256 * MIB) {
            let config = Config { memory_budget_bytes: Some(budget), ..Config::default() }.sized(&machine);
            assert_eq!(misfits(&config.limits, &machine), Vec::<String>::new(), "{budget}");
            config.limits.check().unwrap();
            assert!(config.limits.org_running_max * 2 <= config.limits.host_running_max, "no org has all slots");
        }
        assert_eq!(Config::default().sized(&machine), Config::default(), "without a budget nothing changes");
    }

    #[test]
    fn what_does_not_fit_is_named_with_what_to_change() {
        let limits = Limits::default();
        assert!(misfits(&limits, &Machine::default()).is_empty());
        let tight =
            Machine { memory_maps_max: Some(5_000), address_space_max: Some(8 * KIB * MIB), files_max: Some(1_024) };
        let text = misfits(&limits, &tight).join("\n");
        for words in ["sysctl -w vm.max_map_count=10000", "ulimit -v unlimited", "LimitNOFILE="] {
            assert!(text.contains(words), "{text}");
        }
    }
}
