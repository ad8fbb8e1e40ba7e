//! What is to go wrong, and when: worked out from the seed before anything starts. Pure.
//!
//! Each replica, the database and the pooler have a lane of their own. A lane does one thing after another, lanes overlap: a replica is killed while
//! another is stopped and the database restarts. A step that comes due while the one before it is still going on waits for it; none is left out.

use std::fmt;

use super::dice::Dice;

/// Whose lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    Replica(usize),
    Database,
    Pooler,
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lane::Replica(index) => write!(f, "replica {index}"),
            Lane::Database => f.write_str("database"),
            Lane::Pooler => f.write_str("pooler"),
        }
    }
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9`, and a start some time later. What starts may have a wrong clock.
    Kill { down_ms: u64, clock_ms: i64 },
    /// Restarted such that it ends itself, as `kill -9` would, when it passes this point the n-th time; and started again. Debug builds.
    KillAt { point: &'static str, times: u64, clock_ms: i64 },
    /// SIGSTOP for longer than its lease lasts, then SIGCONT.
    Pause { ms: u64 },
    /// SIGTERM; started again when it has left.
    Drain { down_ms: u64, clock_ms: i64 },
    /// Its connections to the database are reset and new ones refused.
    Cut { ms: u64 },
    /// All that goes between it and the database is late.
    Slow { ms: u64, by_ms: u64 },
    /// Nothing goes between it and the database, and nobody is told. Afterwards what was held back arrives, or the connections are reset.
    Hole { ms: u64, resets: bool },
    /// The database is stopped in the middle of whatever it does, and recovers from its log at the next start.
    DatabaseCrash { down_ms: u64 },
    /// The pooler is killed and started again.
    PoolerCrash { down_ms: u64 },
}

impl Fault {
    /// Under which it is counted.
    pub fn name(&self) -> &'static str {
        match self {
            Fault::Kill { .. } => "kill -9",
            Fault::KillAt { .. } => "kill at a point",
            Fault::Pause { .. } => "SIGSTOP",
            Fault::Drain { .. } => "drain",
            Fault::Cut { .. } => "link cut",
            Fault::Slow { .. } => "link slow",
            Fault::Hole { .. } => "link silent",
            Fault::DatabaseCrash { .. } => "database restart",
            Fault::PoolerCrash { .. } => "pooler restart",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Fault::Kill { down_ms, clock_ms } | Fault::Drain { down_ms, clock_ms } => {
                write!(f, ", away for {down_ms} ms")?;
                clock(f, *clock_ms)
            }
            Fault::KillAt { point, times, clock_ms } => {
                write!(f, ": {point}, time {times}")?;
                clock(f, *clock_ms)
            }
            Fault::Pause { ms } | Fault::Cut { ms } => write!(f, " for {ms} ms"),
            Fault::Slow { ms, by_ms } => write!(f, " by {by_ms} ms for {ms} ms"),
            Fault::Hole { ms, resets } => write!(f, " for {ms} ms{}", if *resets { ", then reset" } else { "" }),
            Fault::DatabaseCrash { down_ms } | Fault::PoolerCrash { down_ms } => write!(f, ", away for {down_ms} ms"),
        }
    }
}

fn clock(f: &mut fmt::Formatter<'_>, clock_ms: i64) -> fmt::Result {
    if clock_ms == 0 { Ok(()) } else { write!(f, ", then with a clock {:+} s wrong", clock_ms / 1000) }
}

/// A fault in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub at_ms: u64,
    pub lane: Lane,
    pub fault: Fault,
}

/// What there is to plan for.
#[derive(Debug, Clone, Copy)]
pub struct Scene {
    pub seed: u64,
    pub length_ms: u64,
    pub replicas: usize,
    pub lease_ttl_ms: u64,
    /// A database of its own, reached through links: PostgreSQL.
    pub shared_store: bool,
    pub pooler: bool,
    /// The program ends itself at named points when asked to.
    pub kill_points: bool,
}

/// Named in the host's `kill_point` module.
const KILL_POINTS: [&str; 5] = ["after_accept", "after_claim", "after_run", "mid_commit", "after_commit"];
/// Ten minutes.
const CLOCK_WRONG_MS: i64 = 600_000;

/// How often in an hour.
const KILLS: u64 = 620;
const KILLS_AT: u64 = 120;
const PAUSES: u64 = 132;
const DRAINS: u64 = 60;
const CUTS: u64 = 60;
const SLOWS: u64 = 60;
const HOLES: u64 = 80;
const DATABASE_CRASHES: u64 = 50;
const POOLER_CRASHES: u64 = 40;

/// Every step, by time.
pub fn plan(scene: &Scene) -> Vec<Step> {
    let mut dice = Dice::new(scene.seed, "plan");
    let mut faults = Vec::new();
    let mut some = |hourly: u64, wanted: bool, dice: &mut Dice, make: &dyn Fn(&mut Dice) -> Fault| {
        let times = if wanted { (hourly * scene.length_ms).div_ceil(3_600_000) } else { 0 };
        faults.extend((0..times).map(|_| make(dice)));
    };
    let down = |dice: &mut Dice| if dice.percent(70) { dice.between(0, 300) } else { dice.between(300, 4_000) };
    // The embedded store's time is its host's: there, a clock that is wrong is time that has passed.
    let clock = |dice: &mut Dice| match dice.below(6) {
        0 if scene.shared_store => CLOCK_WRONG_MS,
        1 if scene.shared_store => -CLOCK_WRONG_MS,
        _ => 0,
    };
    let (kills, kills_at) = if scene.kill_points { (KILLS, KILLS_AT) } else { (KILLS + KILLS_AT, 0) };
    some(kills, true, &mut dice, &|dice| Fault::Kill { down_ms: down(dice), clock_ms: clock(dice) });
    some(kills_at, true, &mut dice, &|dice| Fault::KillAt {
        point: dice.of(&KILL_POINTS),
        times: dice.between(1, 20),
        clock_ms: clock(dice),
    });
    let ttl = scene.lease_ttl_ms;
    some(PAUSES, true, &mut dice, &|dice| Fault::Pause { ms: dice.between(ttl + 1_000, ttl + 3_000) });
    some(DRAINS, true, &mut dice, &|dice| Fault::Drain { down_ms: down(dice), clock_ms: clock(dice) });
    let links = scene.shared_store;
    some(CUTS, links, &mut dice, &|dice| Fault::Cut { ms: dice.between(200, ttl * 2) });
    some(SLOWS, links, &mut dice, &|dice| Fault::Slow {
        ms: dice.between(1_000, ttl * 3),
        by_ms: dice.between(5, 300),
    });
    some(HOLES, links, &mut dice, &|dice| Fault::Hole { ms: dice.between(500, ttl * 2), resets: dice.percent(50) });
    dice.shuffle(&mut faults);

    let mut lanes: Vec<(Lane, Vec<Fault>)> =
        (0..scene.replicas).map(|index| (Lane::Replica(index), Vec::new())).collect();
    for (at, fault) in faults.into_iter().enumerate() {
        lanes[at % scene.replicas].1.push(fault);
    }
    let mut some = |hourly: u64, lane, dice: &mut Dice, make: &dyn Fn(u64) -> Fault| {
        let times = (hourly * scene.length_ms).div_ceil(3_600_000);
        let away =
            |dice: &mut Dice| if dice.percent(75) { dice.between(0, 1_000) } else { dice.between(1_000, 10_000) };
        lanes.push((lane, (0..times).map(|_| make(away(dice))).collect()));
    };
    if scene.shared_store {
        some(DATABASE_CRASHES, Lane::Database, &mut dice, &|down_ms| Fault::DatabaseCrash { down_ms });
    }
    if scene.pooler {
        some(POOLER_CRASHES, Lane::Pooler, &mut dice, &|down_ms| Fault::PoolerCrash { down_ms });
    }

    let mut steps = Vec::new();
    for (lane, faults) in lanes {
        let slot = scene.length_ms / (faults.len() as u64).max(1);
        for (place, fault) in (0..).zip(faults) {
            steps.push(Step { at_ms: place * slot + dice.below(slot), lane, fault });
        }
    }
    steps.sort_by_key(|step| step.at_ms);
    steps
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn scene(seed: u64, minutes: u64) -> Scene {
        Scene {
            seed,
            length_ms: minutes * 60_000,
            replicas: 3,
            lease_ttl_ms: 2_500,
            shared_store: true,
            pooler: true,
            kill_points: true,
        }
    }

    fn counts(steps: &[Step]) -> HashMap<&'static str, usize> {
        let mut counts = HashMap::new();
        for step in steps {
            *counts.entry(step.fault.name()).or_default() += 1;
        }
        counts
    }

    #[test]
    fn the_plan_follows_from_the_seed() {
        assert_eq!(plan(&scene(7, 3)), plan(&scene(7, 3)));
        assert_ne!(plan(&scene(7, 3)), plan(&scene(8, 3)));
    }

    #[test]
    fn half_an_hour_has_its_kills_stops_and_restarts() {
        let counts = counts(&plan(&scene(1, 30)));
        assert!(counts["kill -9"] >= 300, "{counts:?}");
        assert!(counts["SIGSTOP"] >= 60 && counts["database restart"] >= 25, "{counts:?}");
        assert_eq!(counts.len(), 9, "every kind is there: {counts:?}");
    }

    #[test]
    fn a_minute_has_one_of_each_kind() {
        assert_eq!(counts(&plan(&scene(1, 1))).len(), 9);
    }

    #[test]
    fn the_embedded_store_has_one_host_no_links_and_a_true_clock() {
        let embedded = Scene { replicas: 1, shared_store: false, pooler: false, ..scene(3, 5) };
        for step in plan(&embedded) {
            assert_eq!(step.lane, Lane::Replica(0));
            match step.fault {
                Fault::Kill { clock_ms, .. } | Fault::KillAt { clock_ms, .. } | Fault::Drain { clock_ms, .. } => {
                    assert_eq!(clock_ms, 0);
                }
                Fault::Pause { ms } => assert!(ms > 2_500),
                other => panic!("{other} needs a database of its own"),
            }
        }
    }

    #[test]
    fn steps_lie_within_the_run_and_in_order() {
        let steps = plan(&scene(5, 2));
        assert!(steps.is_sorted_by_key(|step| step.at_ms));
        assert!(steps.iter().all(|step| step.at_ms < 120_000));
    }
}
