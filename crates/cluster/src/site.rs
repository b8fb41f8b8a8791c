//! What is on a machine as far as placement goes, and machines in the order in which they are tried.
//!
//! [`View`] keeps this for what is; [`crate::plan::Plan`] keeps it for what would be after the decisions
//! made so far. Both are [`Places`], so that there is one set of rules for the two.
use crate::{model::*, view::View};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet};

/// The units of one machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Site {
    /// Units scheduled here that are meant to be on a machine.
    pub(crate) held: BTreeSet<UnitName>,
    /// Those of them with Conflicts.
    pub(crate) picky: BTreeSet<UnitName>,
    /// Those of them with Replaces.
    pub(crate) replacers: BTreeSet<UnitName>,
    /// Global units wanted here.
    pub(crate) globals: BTreeSet<UnitName>,
}

impl Site {
    /// How loaded the machine is: all that is wanted on it, Global units too, as the original counts.
    pub(crate) fn load(&self) -> usize {
        self.held.len() + self.globals.len()
    }
    pub(crate) fn add(&mut self, name: &UnitName, unit: &Unit) {
        self.held.insert(name.clone());
        if !unit.requirements.conflicts.is_empty() {
            self.picky.insert(name.clone());
        }
        if !unit.requirements.replaces.is_empty() {
            self.replacers.insert(name.clone());
        }
    }
    pub(crate) fn remove(&mut self, name: &UnitName) {
        self.held.remove(name);
        self.picky.remove(name);
        self.replacers.remove(name);
    }
}

/// Where units are: really, or after the decisions made so far.
pub(crate) trait Places {
    /// The view this is or is built on: units, machines and reports.
    fn view(&self) -> &View;
    /// What is on a machine.
    fn site(&self, id: &MachineId) -> &Site;
    /// The machine a unit is placed on and the revision of that; what was decided just now is the newest.
    fn place_of(&self, name: &str) -> Option<(&MachineId, Revision)>;
}

/// Machines by load and ID, all together and by each of their metadata. Those that take no new units are not among them:
/// they have little to do and would be tried first, each time in vain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ranking {
    pub(crate) all: BTreeSet<Rank>,
    /// By key and value.
    pub(crate) by: BTreeMap<String, BTreeMap<String, BTreeSet<Rank>>>,
}

/// A machine's load and ID.
pub(crate) type Rank = (usize, MachineId);

impl Ranking {
    pub(crate) fn insert(&mut self, machine: &Machine, rank: Rank) {
        if !machine.takes_new_units() {
            return;
        }
        for (key, value) in &machine.metadata {
            let by_value = match self.by.get_mut(key) {
                Some(found) => found,
                None => self.by.entry(key.clone()).or_default(),
            };
            match by_value.get_mut(value) {
                Some(ranks) => ranks.insert(rank.clone()),
                None => by_value.entry(value.clone()).or_default().insert(rank.clone()),
            };
        }
        self.all.insert(rank);
    }
    pub(crate) fn remove(&mut self, machine: &Machine, rank: &Rank) {
        self.all.remove(rank);
        for (key, value) in &machine.metadata {
            let Some(by_value) = self.by.get_mut(key) else { continue };
            let Some(ranks) = by_value.get_mut(value) else { continue };
            ranks.remove(rank);
            if ranks.is_empty() {
                by_value.remove(value);
            }
            if by_value.is_empty() {
                self.by.remove(key);
            }
        }
    }
    /// The machines that have this value for this key.
    pub(crate) fn with(&self, key: &str, value: &str) -> Option<&BTreeSet<Rank>> {
        self.by.get(key)?.get(value)
    }
}

/// Whether one machine's metadata are what a unit asks for: for each key one of the values.
pub(crate) fn has_metadata(machine: &Machine, wants: &BTreeMap<String, BTreeSet<String>>) -> bool {
    wants.iter().all(|(key, values)| machine.metadata.get(key).is_some_and(|has| values.contains(has)))
}

/// The Global units wanted on a machine: those its metadata suit, unless they conflict with a unit that is
/// scheduled there or with a Global unit of a smaller name that is wanted there. Cordon and drain do not concern them.
pub(crate) fn globals_on(view: &View, machine: Option<&Machine>, site: &Site) -> BTreeSet<UnitName> {
    let mut wanted = BTreeSet::new();
    let Some(machine) = machine else { return wanted };
    let mut picky: Vec<(&UnitName, &Unit)> =
        site.picky.iter().filter_map(|name| Some((name, view.unit(name)?))).collect();
    for name in view.globals() {
        let Some(unit) = view.unit(name) else { continue };
        if !has_metadata(machine, &unit.requirements.metadata) {
            continue;
        }
        let own = &unit.requirements.conflicts;
        let refuses =
            !own.is_empty() && site.held.iter().chain(&wanted).any(|other| conflict(unit, other).is_some());
        if refuses || picky.iter().any(|(_, other)| conflict(other, name).is_some()) {
            continue;
        }
        if !own.is_empty() {
            picky.push((name, unit));
        }
        wanted.insert(name.clone());
    }
    wanted
}

/// The pattern by which a unit refuses to share a machine with another.
pub(crate) fn conflict<'a>(unit: &'a Unit, other: &UnitName) -> Option<&'a fleet_unit::Glob> {
    unit.requirements.conflicts.iter().find(|pattern| pattern.matches(other.as_str()))
}
