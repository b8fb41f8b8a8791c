//! What would be after the decisions made so far: a view with some units elsewhere.
//!
//! Only the machines that decisions touch are copied, so that a plan of one decision costs next to nothing on
//! any cluster.
use crate::{
    model::*,
    placement::{Misfit, named_machines, suits},
    site::{Places, Rank, Site, globals_on},
    view::{Known, View, is_placeable},
};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet, HashMap, btree_set::Range};

/// A view and the moves planned on it.
pub(crate) struct Plan<'v> {
    view: &'v View,
    moved: HashMap<UnitName, Option<MachineId>>,
    /// The machines touched by moves, as they would be then.
    sites: HashMap<MachineId, Site>,
    /// Those of them that are there, ranked as they would be then.
    ranks: BTreeSet<Rank>,
    /// The same by metadata key and value, of those that were asked for.
    ranks_by: BTreeMap<String, BTreeMap<String, BTreeSet<Rank>>>,
    /// For the ranking of all machines, and by metadata, the first in the view's that is not touched: what stands
    /// before it need not be passed over again. `None`: there is none left.
    cursors: BTreeMap<Option<(String, String)>, Option<Rank>>,
}

impl Places for Plan<'_> {
    fn view(&self) -> &View {
        self.view
    }
    fn site(&self, id: &MachineId) -> &Site {
        self.sites.get(id).unwrap_or_else(|| self.view.site(id))
    }
    fn place_of(&self, name: &str) -> Option<(&MachineId, Revision)> {
        match self.moved.get(name) {
            Some(place) => place.as_ref().map(|machine| (machine, Revision::MAX)),
            None => self.view.place_of(name),
        }
    }
}

impl<'v> Plan<'v> {
    pub(crate) fn new(view: &'v View) -> Self {
        Plan {
            view,
            moved: HashMap::new(),
            sites: HashMap::new(),
            ranks: BTreeSet::new(),
            ranks_by: BTreeMap::new(),
            cursors: BTreeMap::new(),
        }
    }

    pub(crate) fn has_moved(&self, name: &UnitName) -> bool {
        self.moved.contains_key(name)
    }

    /// Plans the move of a unit that has not been moved yet. Returns the Global units that are let in or kept out
    /// by that, by machine.
    pub(crate) fn relocate(
        &mut self,
        name: &UnitName,
        known: Known<'_>,
        to: Option<&MachineId>,
    ) -> Vec<(MachineId, BTreeSet<UnitName>)> {
        self.moved.insert(name.clone(), to.cloned());
        let Some(unit) = known.unit.filter(|unit| is_placeable(name, unit)) else { return Vec::new() };
        let mut changed = Vec::new();
        if let Some((from, _)) = known.place {
            changed.extend(self.touch(from, unit, |site| site.remove(name)));
        }
        if let Some(to) = to {
            changed.extend(self.touch(to, unit, |site| site.add(name, unit)));
        }
        changed
    }

    fn touch(
        &mut self,
        id: &MachineId,
        unit: &Unit,
        change: impl FnOnce(&mut Site),
    ) -> Option<(MachineId, BTreeSet<UnitName>)> {
        let machine = self.view.machine(id);
        let (site, before) = match self.sites.get_mut(id) {
            Some(site) => {
                let before = site.load();
                (site, Some(before))
            }
            None => (self.sites.entry(id.clone()).or_insert(self.view.site(id).clone()), None),
        };
        change(site);
        let mut changed = BTreeSet::new();
        let picky = !unit.requirements.conflicts.is_empty() || !self.view.picky_globals().is_empty();
        if picky && self.view.globals().next().is_some() {
            let globals = globals_on(self.view, machine, site);
            changed = globals.symmetric_difference(&site.globals).cloned().collect();
            site.globals = globals;
        }
        let after = (site.load(), id.clone());
        if let Some(machine) = machine {
            let before = before.map(|load| (load, id.clone()));
            for (key, by_value) in &mut self.ranks_by {
                let value = machine.metadata.get(key);
                if let Some(ranks) = value.and_then(|value| by_value.get_mut(value)) {
                    before.as_ref().map(|before| ranks.remove(before));
                    ranks.insert(after.clone());
                }
            }
            before.as_ref().map(|before| self.ranks.remove(before));
            self.ranks.insert(after);
        }
        (!changed.is_empty()).then(|| (id.clone(), changed))
    }

    /// Whether a unit may stay on the machine it is on, or may come to it; nothing is said of copies still
    /// stopping elsewhere.
    pub(crate) fn suits(&self, name: &UnitName, unit: &Unit, id: &MachineId) -> Result<(), Misfit> {
        suits(self, name, unit, id)
    }

    /// The least loaded machine a unit can be placed on, of two equal ones that with the smaller ID. `live`: the
    /// machines on which it runs.
    pub(crate) fn find(&mut self, name: &UnitName, unit: &Unit, live: &[&MachineId]) -> Option<MachineId> {
        let only = match self.restriction(unit, live) {
            Restriction::None => return self.find_ranked(name, unit),
            Restriction::To(only) => only,
        };
        self.find_among(only.iter(), name, unit, live)
    }

    /// As [`find`](Self::find), but only of these machines.
    pub(crate) fn find_among<'a>(
        &self,
        ids: impl Iterator<Item = &'a MachineId>,
        name: &UnitName,
        unit: &Unit,
        live: &[&MachineId],
    ) -> Option<MachineId> {
        ids.filter(|id| live.iter().all(|on| on == id) && self.suits(name, unit, id).is_ok())
            .min_by_key(|id| (self.site(id).load(), *id))
            .cloned()
    }

    /// The machines that alone come into question, where that can be said without looking at all.
    fn restriction(&self, unit: &Unit, live: &[&MachineId]) -> Restriction {
        let view = self.view;
        if let Some(on) = live.first() {
            return Restriction::To(vec![(*on).clone()]);
        }
        if let Some(required) = &unit.requirements.machine_id {
            return Restriction::To(named_machines(view, required).cloned().collect());
        }
        for target in &unit.requirements.machine_of {
            let Some((target, followed)) = view.unit_named(target) else {
                return Restriction::To(Vec::new());
            };
            if !followed.requirements.global {
                let place = self.place_of(target.as_str()).map(|(machine, _)| machine.clone());
                return Restriction::To(place.into_iter().collect());
            }
        }
        Restriction::None
    }

    /// Goes through the machines from the least loaded on, only those with a metadata value the unit asks for, if
    /// it asks for any, up to the first that suits it.
    fn find_ranked(&mut self, name: &UnitName, unit: &Unit) -> Option<MachineId> {
        let wants = &unit.requirements.metadata;
        let ranking = self.view.ranking();
        let size = |key: &str, values: &BTreeSet<String>| -> usize {
            values.iter().filter_map(|value| ranking.with(key, value)).map(BTreeSet::len).sum()
        };
        // Each list is in order; a machine is in at most one of the untouched and one of the touched ones.
        let mut lists: Vec<List<'_>> = Vec::new();
        match wants.iter().min_by_key(|(key, values)| size(key, values)) {
            None => {
                lists.extend(self.untouched(None));
                lists.push(List::of(self.ranks.range(..), true));
            }
            Some((key, values)) => {
                for value in values {
                    lists.extend(self.untouched(Some((key, value))));
                }
                for value in values {
                    self.ask_for(key, value);
                }
                let touched = values.iter().filter_map(|value| self.ranks_by.get(key)?.get(value));
                lists.extend(touched.map(|ranks| List::of(ranks.range(..), true)));
            }
        }
        loop {
            let heads = lists.iter().enumerate().filter_map(|(index, list)| Some((list.head?, index)));
            let (rank, index) = heads.min()?;
            let list = &mut lists[index];
            list.head = list.rest.next();
            let (_, id) = rank;
            if list.touched == self.sites.contains_key(id) && self.suits(name, unit, id).is_ok() {
                return Some(id.clone());
            }
        }
    }

    /// Ranks the touched machines by a metadata value, if that is not done yet.
    fn ask_for(&mut self, key: &str, value: &str) {
        if self.ranks_by.get(key).is_some_and(|by_value| by_value.contains_key(value)) {
            return;
        }
        let has = |id: &MachineId| {
            let machine = self.view.machine(id);
            machine.is_some_and(|machine| machine.metadata.get(key).is_some_and(|has| has == value))
        };
        let ranks = self.ranks.iter().filter(|(_, id)| has(id)).cloned().collect();
        self.ranks_by.entry(key.to_owned()).or_default().insert(value.to_owned(), ranks);
    }

    /// The view's ranking, or that of the machines with a metadata value, from the first machine on that no move has
    /// touched; `None` when there is none.
    fn untouched(&mut self, class: Option<(&str, &str)>) -> Option<List<'v>> {
        let ranking = self.view.ranking();
        let all = match class {
            None => &ranking.all,
            Some((key, value)) => ranking.with(key, value)?,
        };
        let class = class.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let mut list = match self.cursors.get(&class) {
            Some(first) => List::of(all.range(first.as_ref()?..), false),
            None => List::of(all.range(..), false),
        };
        let start = list.head;
        while list.head.is_some_and(|(_, id)| self.sites.contains_key(id)) {
            list.head = list.rest.next();
        }
        if list.head != start {
            self.cursors.insert(class, list.head.cloned());
        }
        Some(list)
    }
}

/// Ranked machines, untouched ones of the view or those touched by moves.
struct List<'a> {
    head: Option<&'a Rank>,
    rest: Range<'a, Rank>,
    touched: bool,
}

impl<'a> List<'a> {
    fn of(mut ranks: Range<'a, Rank>, touched: bool) -> Self {
        List { head: ranks.next(), rest: ranks, touched }
    }
}

/// Whether only certain machines can come into question.
enum Restriction {
    None,
    To(Vec<MachineId>),
}
