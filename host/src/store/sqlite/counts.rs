//! Live turns by org and state, kept in memory by the one writer: admission and the claim ask for them at every turn, and counting rows would
//! cost what is queued. Loaded when the store opens; undone with the transaction that moved them.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;

use crate::ids::OrgId;

/// A marker's state, as stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    Ready,
    Running,
}

impl Stage {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Stage::Waiting => "waiting",
            Stage::Ready => "ready",
            Stage::Running => "running",
        }
    }

    pub(super) fn parse(text: &str) -> Option<Stage> {
        [Stage::Waiting, Stage::Ready, Stage::Running].into_iter().find(|stage| stage.as_str() == text)
    }
}

/// How many live turns are in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ByStage {
    pub(super) waiting: usize,
    pub(super) ready: usize,
    pub(super) running: usize,
}

impl ByStage {
    pub(super) fn live(&self) -> usize {
        self.waiting + self.ready + self.running
    }

    fn of(&mut self, stage: Stage) -> &mut usize {
        match stage {
            Stage::Waiting => &mut self.waiting,
            Stage::Ready => &mut self.ready,
            Stage::Running => &mut self.running,
        }
    }
}

/// One marker's move; `None` is "no marker".
type Move = (OrgId, Option<Stage>, Option<Stage>);

/// The counts, and what the open transaction has changed of them.
#[derive(Debug, Default)]
pub(super) struct Counts {
    orgs: HashMap<OrgId, ByStage>,
    /// Orgs with a ready marker: the round of the claim.
    ready: BTreeSet<OrgId>,
    host: ByStage,
    moves: Vec<Move>,
}

impl Counts {
    /// One marker moves, comes or goes.
    pub(super) fn shift(&mut self, org: &OrgId, from: Option<Stage>, to: Option<Stage>) {
        self.apply(org, from, to);
        self.moves.push((org.clone(), from, to));
    }

    fn apply(&mut self, org: &OrgId, from: Option<Stage>, to: Option<Stage>) {
        if from == to {
            return;
        }
        let counts = self.orgs.entry(org.clone()).or_default();
        for (stage, up) in [(to, true), (from, false)] {
            let Some(stage) = stage else { continue };
            for count in [counts.of(stage), self.host.of(stage)] {
                *count =
                    if up { Some(*count + 1) } else { count.checked_sub(1) }.expect("a marker leaves where it was");
            }
        }
        let (ready, live) = (counts.ready, counts.live());
        if ready == 0 {
            self.ready.remove(org);
        } else if from == Some(Stage::Ready) || to == Some(Stage::Ready) {
            self.ready.insert(org.clone());
        }
        if live == 0 {
            self.orgs.remove(org);
        }
    }

    /// Where the transaction stands; for [`Counts::undo_to`].
    pub(super) fn mark(&self) -> usize {
        self.moves.len()
    }

    /// Takes back everything since `mark`.
    pub(super) fn undo_to(&mut self, mark: usize) {
        while self.moves.len() > mark {
            let (org, from, to) = self.moves.pop().expect("longer than mark");
            self.apply(&org, to, from);
        }
    }

    /// The transaction is durable.
    pub(super) fn settle(&mut self) {
        self.moves.clear();
    }

    pub(super) fn org(&self, org: &OrgId) -> ByStage {
        self.orgs.get(org).copied().unwrap_or_default()
    }

    pub(super) fn host(&self) -> ByStage {
        self.host
    }

    /// How many orgs have something ready.
    pub(super) fn ready_orgs(&self) -> impl Iterator<Item = &OrgId> {
        self.ready.iter()
    }

    /// Orgs with something ready, once round, beginning after `cursor`.
    pub(super) fn ready_round(&self, cursor: Option<&OrgId>) -> impl Iterator<Item = &OrgId> {
        let after = cursor.map_or(Bound::Unbounded, Bound::Excluded);
        let rest = cursor.map(|cursor| self.ready.range::<OrgId, _>((Bound::Unbounded, Bound::Included(cursor))));
        self.ready.range::<OrgId, _>((after, Bound::Unbounded)).chain(rest.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_follow_every_move_and_come_back_when_it_is_undone() {
        let [a, b] = ["a", "b"].map(|id| OrgId::parse(id).unwrap());
        let mut counts = Counts::default();
        counts.shift(&a, None, Some(Stage::Ready));
        counts.shift(&b, None, Some(Stage::Ready));
        counts.settle();
        let mark = counts.mark();
        counts.shift(&a, Some(Stage::Ready), Some(Stage::Running));
        counts.shift(&a, None, Some(Stage::Waiting));
        counts.shift(&b, Some(Stage::Ready), None);
        assert_eq!(counts.org(&a), ByStage { waiting: 1, ready: 0, running: 1 });
        assert_eq!(counts.org(&b), ByStage::default());
        assert_eq!(counts.ready_orgs().count(), 0);
        counts.undo_to(mark);
        assert_eq!(counts.host(), ByStage { waiting: 0, ready: 2, running: 0 });
        assert_eq!(counts.ready_orgs().collect::<Vec<_>>(), [&a, &b]);
    }

    #[test]
    fn o5_the_round_begins_after_the_cursor_and_names_everybody_once() {
        let ids = ["a", "b", "c"].map(|id| OrgId::parse(id).unwrap());
        let mut counts = Counts::default();
        ids.iter().for_each(|org| counts.shift(org, None, Some(Stage::Ready)));
        let round = |cursor: Option<&OrgId>| counts.ready_round(cursor).map(OrgId::as_str).collect::<String>();
        assert_eq!(round(None), "abc");
        assert_eq!(round(Some(&ids[0])), "bca");
        assert_eq!(round(Some(&ids[2])), "abc");
        assert_eq!(round(Some(&OrgId::parse("bb").unwrap())), "cab");
    }
}
