//! What would be after the decisions made so far: a view with some units elsewhere.
//!
//! Only the machines that decisions touch are copied, so that a plan of one decision costs next to nothing on
//! any cluster.
use crate::{
    drain::{companions, could_go},
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
    /// All machines.
    all: Class,
    /// Those with a metadata value, by key and value, as far as they were asked for.
    by: BTreeMap<String, BTreeMap<String, Class>>,
}

/// The plan's part of one ranking of machines, of which the view has the other.
#[derive(Default)]
struct Class {
    /// The machines touched by moves, ranked as they would be then.
    touched: BTreeSet<Rank>,
    cursor: Cursor,
}

/// Where in the view's ranking the first machine is that is not touched: what stands before it need not be passed over
/// again.
#[derive(Default)]
enum Cursor {
    #[default]
    Start,
    At(Rank),
    End,
}

impl Class {
    fn change(&mut self, before: Option<&Rank>, after: &Rank) {
        if let Some(before) = before {
            self.touched.remove(before);
        }
        self.touched.insert(after.clone());
    }

    /// Moves the cursor on to the first machine that is not touched.
    fn advance(&mut self, ranking: &BTreeSet<Rank>, sites: &HashMap<MachineId, Site>) {
        let mut rest = match &self.cursor {
            Cursor::Start => ranking.range(..),
            Cursor::At(first) => ranking.range(first..),
            Cursor::End => return,
        };
        let first = rest.find(|(_, id)| !sites.contains_key(id));
        self.cursor = first.map_or(Cursor::End, |first| Cursor::At(first.clone()));
    }

    /// The two parts, each in order.
    fn lists<'a>(&'a self, ranking: &'a BTreeSet<Rank>) -> impl Iterator<Item = List<'a>> {
        let untouched = match &self.cursor {
            Cursor::Start => Some(ranking.range(..)),
            Cursor::At(first) => Some(ranking.range(first..)),
            Cursor::End => None,
        };
        let untouched = untouched.map(|ranks| List::of(ranks, false));
        untouched.into_iter().chain([List::of(self.touched.range(..), true)])
    }
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
            all: Class::default(),
            by: BTreeMap::new(),
        }
    }

    pub(crate) fn has_moved(&self, name: &UnitName) -> bool {
        self.moved.contains_key(name)
    }

    /// The moves planned.
    pub(crate) fn into_moved(self) -> HashMap<UnitName, Option<MachineId>> {
        self.moved
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
        if let Some(machine) = machine.filter(|machine| machine.takes_new_units()) {
            let (before, after) = (before.map(|load| (load, id.clone())), (site.load(), id.clone()));
            self.all.change(before.as_ref(), &after);
            for (key, by_value) in &mut self.by {
                let value = machine.metadata.get(key);
                if let Some(class) = value.and_then(|value| by_value.get_mut(value)) {
                    class.change(before.as_ref(), &after);
                }
            }
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
            Restriction::None => {
                return self.find_ranked(unit, |plan, id| plan.suits(name, unit, id).is_ok());
            }
            Restriction::To(only) => only,
        };
        self.find_among(only.iter(), name, unit, live)
    }

    /// As [`find`](Self::find), for a unit that is to move away from the machine it is on, as if it ran nowhere.
    pub(crate) fn find_elsewhere(
        &mut self,
        name: &UnitName,
        unit: &Unit,
        from: &MachineId,
    ) -> Option<MachineId> {
        match self.restriction(unit, &[]) {
            Restriction::To(only) => self.find_elsewhere_among(only.iter(), name, unit, from),
            Restriction::None => {
                let along = companions(self, name, from);
                let fits = |plan: &Self, id: &MachineId| {
                    id != from && could_go(plan, name, unit, &along, id).is_ok()
                };
                self.find_ranked(unit, fits)
            }
        }
    }

    /// As [`find_elsewhere`](Self::find_elsewhere), but only of these machines.
    pub(crate) fn find_elsewhere_among<'a>(
        &self,
        ids: impl Iterator<Item = &'a MachineId>,
        name: &UnitName,
        unit: &Unit,
        from: &MachineId,
    ) -> Option<MachineId> {
        let along = companions(self, name, from);
        ids.filter(|id| *id != from && could_go(self, name, unit, &along, id).is_ok())
            .min_by_key(|id| (self.site(id).load(), *id))
            .cloned()
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
    /// it asks for any, up to the first that fits.
    fn find_ranked(&mut self, unit: &Unit, fits: impl Fn(&Self, &MachineId) -> bool) -> Option<MachineId> {
        let wants = &unit.requirements.metadata;
        let ranking = self.view.ranking();
        let size = |key: &str, values: &BTreeSet<String>| -> usize {
            values.iter().filter_map(|value| ranking.with(key, value)).map(BTreeSet::len).sum()
        };
        let mut lists: Vec<List<'_>> = Vec::new();
        match wants.iter().min_by_key(|(key, values)| size(key, values)) {
            None => {
                self.all.advance(&ranking.all, &self.sites);
                lists.extend(self.all.lists(&ranking.all));
            }
            Some((key, values)) => {
                // A machine has one value for a key, so none is in two of these classes.
                let classes = || values.iter().filter_map(|value| Some((value, ranking.with(key, value)?)));
                for (value, ranking) in classes() {
                    self.ask_for(key, value, ranking);
                }
                for (value, ranking) in classes() {
                    let class = self.by.get(key).and_then(|by_value| by_value.get(value));
                    lists.extend(class.into_iter().flat_map(|class| class.lists(ranking)));
                }
            }
        }
        loop {
            let heads = lists.iter().enumerate().filter_map(|(index, list)| Some((list.head?, index)));
            let (rank, index) = heads.min()?;
            let list = &mut lists[index];
            list.head = list.rest.next();
            let (_, id) = rank;
            if (list.touched || !self.sites.contains_key(id)) && fits(self, id) {
                return Some(id.clone());
            }
        }
    }

    /// Makes the class of a metadata value ready.
    fn ask_for(&mut self, key: &str, value: &str, ranking: &BTreeSet<Rank>) {
        if let Some(class) = self.by.get_mut(key).and_then(|by_value| by_value.get_mut(value)) {
            return class.advance(ranking, &self.sites);
        }
        let has = |id: &MachineId| {
            let machine = self.view.machine(id);
            machine.is_some_and(|machine| machine.metadata.get(key).is_some_and(|has| has == value))
        };
        let touched = self.all.touched.iter().filter(|(_, id)| has(id)).cloned().collect();
        let mut class = Class { touched, cursor: Cursor::Start };
        class.advance(ranking, &self.sites);
        self.by.entry(key.to_owned()).or_default().insert(value.to_owned(), class);
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
