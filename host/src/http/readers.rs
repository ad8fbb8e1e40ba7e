//! How many readers there are: of a turn, of an org, of the host. A reader holds a [`Permit`]; dropping it makes room.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;

use super::problem::{Code, Problem};
use crate::ids::{OrgId, TurnId};
use crate::limits::Limits;

/// Counts readers against their bounds.
pub struct Readers {
    per_turn_max: usize,
    per_org_max: usize,
    host_max: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    host: usize,
    orgs: HashMap<OrgId, usize>,
    turns: HashMap<TurnId, usize>,
}

/// The right to read, of an org and then of a turn.
pub struct Permit {
    readers: Arc<Readers>,
    org: OrgId,
    turn: Option<TurnId>,
}

impl Readers {
    /// Bounds from `limits`.
    pub fn new(limits: &Limits) -> Arc<Readers> {
        Arc::new(Readers {
            per_turn_max: limits.readers_per_turn_max,
            per_org_max: limits.readers_per_org_max,
            host_max: limits.readers_host_max,
            open: Mutex::default(),
        })
    }

    /// Room for one more reader of `org`. Taken before a message is accepted, so that no stream is refused for a turn that runs.
    pub fn admit(self: &Arc<Self>, org: &OrgId) -> Result<Permit, Problem> {
        let mut open = self.open.lock();
        if open.host >= self.host_max {
            return Err(full("host", self.host_max));
        }
        take(&mut open.orgs, org.clone(), self.per_org_max).map_err(|()| full("org", self.per_org_max))?;
        open.host += 1;
        Ok(Permit { readers: self.clone(), org: org.clone(), turn: None })
    }
}

impl Permit {
    /// The same, for `turn`.
    pub fn of_turn(mut self, turn: TurnId) -> Result<Permit, Problem> {
        let max = self.readers.per_turn_max;
        take(&mut self.readers.open.lock().turns, turn, max).map_err(|()| full("turn", max))?;
        self.turn = Some(turn);
        Ok(self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.readers.open.lock();
        open.host -= 1;
        give_back(&mut open.orgs, &self.org);
        if let Some(turn) = &self.turn {
            give_back(&mut open.turns, turn);
        }
    }
}

fn take<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: K, max: usize) -> Result<(), ()> {
    let count = counts.entry(key).or_insert(0);
    if *count >= max {
        return Err(());
    }
    *count += 1;
    Ok(())
}

fn give_back<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: &K) {
    let count = counts.get_mut(key).expect("a permit was counted");
    *count -= 1;
    if *count == 0 {
        counts.remove(key);
    }
}

fn full(whose: &'static str, max: usize) -> Problem {
    let detail = format!("this {whose} has {max} open streams, the limit; close some, or poll the turn instead");
    Problem::new(Code::TooManyStreams, detail).over(whose, "readers_max", max as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_bounded_by_turn_org_and_host_and_make_room_when_they_go() {
        let limits =
            Limits { readers_per_turn_max: 1, readers_per_org_max: 2, readers_host_max: 3, ..Limits::default() };
        let readers = Readers::new(&limits);
        let (a, b) = (OrgId::parse("a").unwrap(), OrgId::parse("b").unwrap());
        let (one, two) = (TurnId::new(), TurnId::new());
        let first = readers.admit(&a).unwrap().of_turn(one).unwrap();
        assert_eq!(readers.admit(&a).unwrap().of_turn(one).err().unwrap().code(), Code::TooManyStreams);
        let second = readers.admit(&a).unwrap().of_turn(two).unwrap();
        assert!(readers.admit(&a).is_err(), "the org is full");
        let third = readers.admit(&b).unwrap();
        assert!(readers.admit(&b).is_err(), "the host is full");
        drop(first);
        readers.admit(&a).unwrap().of_turn(one).unwrap();
        drop((second, third));
        let open = readers.open.lock();
        assert!(open.host == 0 && open.orgs.is_empty() && open.turns.is_empty(), "nothing is left behind");
    }
}
