//! What still has to be passed on, of units or reports: never more than the newest of each.
//!
//! Both ends of a session take messages as they come and keep them here until the other side takes them. What comes in
//! faster than it goes out is merged, so a slow reader is told less often but nothing wrong, no queue grows with
//! time, and neither side ever waits for the other before it reads on: the two can't block each other.

use fleet_unit::UnitName;
use std::collections::{BTreeMap, btree_map};

/// A message of units or reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Update<T> {
    /// All there is.
    Snapshot(BTreeMap<UnitName, T>),
    /// What changed; `None`: it is gone.
    Changes(BTreeMap<UnitName, Option<T>>),
}

/// Updates that were not passed on yet, merged.
#[derive(Debug)]
pub(crate) struct Pending<T> {
    snapshot: Option<BTreeMap<UnitName, T>>,
    changes: BTreeMap<UnitName, Option<T>>,
}

impl<T> Default for Pending<T> {
    fn default() -> Self {
        Pending { snapshot: None, changes: BTreeMap::new() }
    }
}

impl<T> Pending<T> {
    pub(crate) fn is_empty(&self) -> bool {
        self.snapshot.is_none() && self.changes.is_empty()
    }

    /// Units that are waiting.
    pub(crate) fn len(&self) -> usize {
        self.snapshot.as_ref().map_or(0, BTreeMap::len) + self.changes.len()
    }

    pub(crate) fn push(&mut self, update: Update<T>) {
        match (update, &mut self.snapshot) {
            (Update::Snapshot(all), _) => {
                self.snapshot = Some(all);
                self.changes.clear();
            }
            (Update::Changes(changes), Some(all)) => {
                for (name, change) in changes {
                    match change {
                        Some(value) => all.insert(name, value),
                        None => all.remove(&name),
                    };
                }
            }
            (Update::Changes(changes), None) => self.changes.extend(changes),
        }
    }

    pub(crate) fn take(&mut self) -> Option<Update<T>> {
        if let Some(all) = self.snapshot.take() {
            return Some(Update::Snapshot(all));
        }
        (!self.changes.is_empty()).then(|| Update::Changes(std::mem::take(&mut self.changes)))
    }
}

/// A part of an update, as one message holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part<T> {
    pub(crate) snapshot: bool,
    /// The first and the last part of a snapshot; of changes, each part stands for itself.
    pub(crate) first: bool,
    pub(crate) last: bool,
    pub(crate) entries: Vec<(UnitName, Option<T>)>,
}

/// An update being cut into parts.
#[derive(Debug)]
pub(crate) struct Parts<T> {
    rest: Rest<T>,
    begun: bool,
}

#[derive(Debug)]
enum Rest<T> {
    Snapshot(std::iter::Peekable<btree_map::IntoIter<UnitName, T>>),
    Changes(std::iter::Peekable<btree_map::IntoIter<UnitName, Option<T>>>),
}

impl<T> Parts<T> {
    pub(crate) fn of(update: Update<T>) -> Self {
        let rest = match update {
            Update::Snapshot(all) => Rest::Snapshot(all.into_iter().peekable()),
            Update::Changes(changes) => Rest::Changes(changes.into_iter().peekable()),
        };
        Parts { rest, begun: false }
    }

    /// The next part: as many entries as have `limit` bytes together, but at least one. The second value says whether
    /// it was the last.
    pub(crate) fn next(
        &mut self,
        limit: usize,
        size: impl Fn(&UnitName, Option<&T>) -> usize,
    ) -> (Part<T>, bool) {
        let mut entries = Vec::new();
        let mut sum = 0;
        let mut fits = |name: &UnitName, value: Option<&T>, count: usize| {
            sum += size(name, value);
            count == 0 || sum <= limit
        };
        let (snapshot, last) = match &mut self.rest {
            Rest::Snapshot(rest) => {
                while let Some((name, value)) = rest.next_if(|(n, v)| fits(n, Some(v), entries.len())) {
                    entries.push((name, Some(value)));
                }
                (true, rest.peek().is_none())
            }
            Rest::Changes(rest) => {
                while let Some((name, value)) = rest.next_if(|(n, v)| fits(n, v.as_ref(), entries.len())) {
                    entries.push((name, value));
                }
                (false, rest.peek().is_none())
            }
        };
        let first = snapshot && !std::mem::replace(&mut self.begun, true);
        (Part { snapshot, first, last: snapshot && last, entries }, last)
    }
}

/// Parts being put together again.
#[derive(Debug)]
pub(crate) struct Assembler<T> {
    /// The snapshot under way.
    partial: Option<BTreeMap<UnitName, T>>,
    most: usize,
}

impl<T> Assembler<T> {
    /// Takes snapshots of at most so many units.
    pub(crate) fn new(most: usize) -> Self {
        Assembler { partial: None, most }
    }

    /// Takes a part in; gives an update when one is complete.
    ///
    /// # Errors
    /// Parts that do not follow each other, and units twice.
    pub(crate) fn push(&mut self, part: Part<T>) -> Result<Option<Update<T>>, String> {
        if !part.snapshot {
            if self.partial.is_some() {
                return Err("changes within a snapshot".to_owned());
            }
            let mut changes = BTreeMap::new();
            for (name, value) in part.entries {
                if let Some((name, _)) = changes.get_key_value(&name) {
                    return Err(format!("{name} is named twice"));
                }
                changes.insert(name, value);
            }
            return Ok((!changes.is_empty()).then_some(Update::Changes(changes)));
        }
        let mut all = match (part.first, self.partial.take()) {
            (true, _) => BTreeMap::new(),
            (false, Some(all)) => all,
            (false, None) => return Err("a snapshot without its first part".to_owned()),
        };
        for (name, value) in part.entries {
            let Some(value) = value else { return Err(format!("{name} is in a snapshot, but absent")) };
            if let Some((name, _)) = all.get_key_value(&name) {
                return Err(format!("{name} is named twice"));
            }
            all.insert(name, value);
        }
        if all.len() > self.most {
            return Err(format!("more than {} units", self.most));
        }
        if part.last {
            return Ok(Some(Update::Snapshot(all)));
        }
        self.partial = Some(all);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(number: u8) -> UnitName {
        UnitName::parse(&format!("u{number}.service")).unwrap()
    }

    fn all(units: &[(u8, u32)]) -> Update<u32> {
        Update::Snapshot(units.iter().map(|(n, v)| (name(*n), *v)).collect())
    }

    fn changes(units: &[(u8, Option<u32>)]) -> Update<u32> {
        Update::Changes(units.iter().map(|(n, v)| (name(*n), *v)).collect())
    }

    /// What somebody holds who was told of these updates.
    fn apply(held: &mut BTreeMap<UnitName, u32>, update: Update<u32>) {
        match update {
            Update::Snapshot(all) => *held = all,
            Update::Changes(changes) => {
                for (name, value) in changes {
                    match value {
                        Some(value) => held.insert(name, value),
                        None => held.remove(&name),
                    };
                }
            }
        }
    }

    #[test]
    fn the_newest_of_each_unit_is_kept() {
        let mut pending = Pending::default();
        assert!(pending.is_empty());
        pending.push(changes(&[(1, Some(1)), (2, Some(1))]));
        pending.push(changes(&[(1, None), (3, Some(3))]));
        assert_eq!(pending.len(), 3);
        assert_eq!(pending.take(), Some(changes(&[(1, None), (2, Some(1)), (3, Some(3))])));
        assert_eq!(pending.take(), None);
    }

    #[test]
    fn a_snapshot_outdates_changes_before_it_and_takes_in_those_after_it() {
        let mut pending = Pending::default();
        pending.push(changes(&[(1, Some(1))]));
        pending.push(all(&[(2, 2), (3, 3)]));
        pending.push(changes(&[(3, None), (4, Some(4))]));
        assert_eq!(pending.take(), Some(all(&[(2, 2), (4, 4)])));
        assert!(pending.is_empty());
    }

    #[test]
    fn an_empty_snapshot_is_a_part_too() {
        let (part, last) = Parts::of(all(&[])).next(10, |_, _| 1);
        assert!(last && part.first && part.last && part.entries.is_empty());
        assert_eq!(Assembler::new(10).push(part), Ok(Some(all(&[]))));
    }

    #[test]
    fn parts_out_of_order_are_refused() {
        let part = |snapshot, first, last, entries: &[(u8, Option<u32>)]| Part {
            snapshot,
            first,
            last,
            entries: entries.iter().map(|(n, v)| (name(*n), *v)).collect(),
        };
        let mut assembler = Assembler::new(2);
        assert!(assembler.push(part(true, false, true, &[])).is_err(), "no first part");
        assert!(assembler.push(part(true, true, true, &[(1, None)])).is_err(), "absent");
        assert!(assembler.push(part(true, true, true, &[(1, Some(1)), (1, Some(1))])).is_err(), "twice");
        assert!(assembler.push(part(false, false, false, &[(1, Some(1)), (1, None)])).is_err(), "twice");
        assert!(
            assembler.push(part(true, true, false, &[(1, Some(1)), (2, Some(1)), (3, Some(1))])).is_err()
        );
        assert_eq!(assembler.push(part(true, true, false, &[(1, Some(1))])), Ok(None));
        assert!(assembler.push(part(false, false, false, &[(2, Some(1))])).is_err(), "changes within");
        // A snapshot that begins anew replaces the one under way.
        assert_eq!(assembler.push(part(true, true, true, &[(2, Some(2))])), Ok(Some(all(&[(2, 2)]))));
    }

    fn update() -> impl Strategy<Value = Update<u32>> {
        prop_oneof![
            prop::collection::btree_map(0u8..9, 0u32..9, 0..9)
                .prop_map(|units| all(&units.into_iter().collect::<Vec<_>>())),
            prop::collection::btree_map(0u8..9, prop::option::of(0u32..9), 1..9)
                .prop_map(|units| changes(&units.into_iter().collect::<Vec<_>>())),
        ]
    }

    proptest! {
        /// Whenever the other side takes something, and however it is cut up: it ends up with the same.
        #[test]
        fn merging_and_cutting_change_nothing(
            updates in prop::collection::vec((update(), any::<bool>()), 0..20),
            limit in 1usize..6,
        ) {
            let (mut told, mut held) = (BTreeMap::new(), BTreeMap::new());
            let mut pending = Pending::default();
            let mut assembler = Assembler::new(100);
            let count = updates.len();
            for (number, (update, take)) in updates.into_iter().enumerate() {
                apply(&mut told, update.clone());
                pending.push(update);
                while let Some(update) = if take || number + 1 == count { pending.take() } else { None } {
                    let mut parts = Parts::of(update);
                    loop {
                        let (part, last) = parts.next(limit, |_, _| 1);
                        prop_assert!(part.entries.len() <= limit);
                        if let Some(update) = assembler.push(part).unwrap() {
                            apply(&mut held, update);
                        }
                        if last { break }
                    }
                }
            }
            prop_assert_eq!(told, held);
        }
    }
}
