//! Everything a server knows, in memory, with its indexes.
//!
//! A [`View`] is built of [`Change`]s, one after the other. Every index is kept by the change itself, so
//! that a change costs as much as it touches; [`View::check`] recomputes them all for tests.
use crate::{
    model::*,
    site::{Places, Ranking, Site, globals_on},
};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet};

mod check;
#[cfg(test)]
mod tests;
mod unread;

/// The view: a value built of [`Change`]s.
#[derive(Clone, Debug, Default)]
pub struct View {
    entries: BTreeMap<UnitName, Entry>,
    hosts: BTreeMap<MachineId, Host>,
    /// Global units that are to be loaded or launched.
    globals: BTreeSet<UnitName>,
    /// Those of them with Conflicts.
    picky_globals: BTreeSet<UnitName>,
    /// All units with Replaces.
    replacers: BTreeSet<UnitName>,
    /// For a unit named in MachineOf (it need not exist), the units that name it.
    followers: BTreeMap<String, BTreeSet<UnitName>>,
    /// The machines that are there and take new units, least loaded first.
    ranking: Ranking,
    /// Machines that gave up their presence on purpose and are not back.
    left: BTreeSet<MachineId>,
    unread: unread::Unread,
    replacement_epoch: u64,
}

/// All about one unit name.
#[derive(Clone, Debug, Default)]
struct Entry {
    unit: Option<Unit>,
    place: Option<(MachineId, Revision)>,
    /// The machine it was taken off and that has not said yet that nothing of it runs.
    leaving: Option<(MachineId, Revision)>,
    reports: BTreeMap<MachineId, UnitReport>,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.unit.is_none() && self.place.is_none() && self.leaving.is_none() && self.reports.is_empty()
    }
}

/// All about one machine, which may be gone and still be named by the schedule.
#[derive(Clone, Debug, Default)]
struct Host {
    machine: Option<Machine>,
    site: Site,
    /// Everything scheduled here, meant to be on a machine or not.
    scheduled: BTreeSet<UnitName>,
    /// Units that were taken off here and of which it has not said yet that nothing runs.
    leaving: BTreeSet<UnitName>,
    reported: BTreeSet<UnitName>,
}

impl Host {
    fn is_empty(&self) -> bool {
        self.machine.is_none()
            && self.scheduled.is_empty()
            && self.leaving.is_empty()
            && self.reported.is_empty()
    }
}

/// What a change meant, so that work can follow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// For every machine, the units of which what it has to hold may have changed.
    pub wanted: BTreeMap<MachineId, BTreeSet<UnitName>>,
    /// Units whose record, place, current state or reported states changed.
    pub units: BTreeSet<UnitName>,
    /// Machines that came, changed or went.
    pub machines: BTreeSet<MachineId>,
    /// Units of which a record can't be read, or can be again: what any machine has to hold of them is not known, or may be now.
    pub everywhere: BTreeSet<UnitName>,
}

impl Effects {
    /// Adds what another change meant.
    pub fn merge(&mut self, more: Effects) {
        self.units.extend(more.units);
        self.machines.extend(more.machines);
        self.everywhere.extend(more.everywhere);
        for (machine, names) in more.wanted {
            self.wanted.entry(machine).or_default().extend(names);
        }
    }
    fn want(&mut self, machine: &MachineId, name: &UnitName) {
        match self.wanted.get_mut(machine) {
            Some(names) => names.insert(name.clone()),
            None => self.wanted.entry(machine.clone()).or_default().insert(name.clone()),
        };
    }
}

/// Whether a unit is one the engine places: neither Global nor a template, and to be loaded or launched.
pub(crate) fn is_placeable(name: &UnitName, unit: &Unit) -> bool {
    unit.desired >= DesiredState::Loaded && !unit.requirements.global && !name.is_template()
}

/// Whether a unit is one that every fitting machine has to hold.
fn is_active_global(name: &UnitName, unit: &Unit) -> bool {
    unit.desired >= DesiredState::Loaded && unit.requirements.global && !name.is_template()
}

/// What is known of one unit name, looked up once.
#[derive(Clone, Copy, Default)]
pub(crate) struct Known<'v> {
    pub(crate) unit: Option<&'v Unit>,
    pub(crate) place: Option<(&'v MachineId, Revision)>,
    /// The machine that may still run it though it was taken off there.
    pub(crate) leaving: Option<&'v MachineId>,
    reports: Option<&'v BTreeMap<MachineId, UnitReport>>,
}

impl View {
    /// Applies one change.
    pub fn apply(&mut self, change: Change) -> Effects {
        let mut effects = Effects::default();
        match change {
            Change::Unit(name, unit) => self.apply_unit(name, unit, &mut effects),
            Change::Schedule(name, place) => self.apply_schedule(name, place, &mut effects),
            Change::Leaving(name, from) => self.apply_leaving(name, from, &mut effects),
            Change::Machine(id, machine) => self.apply_machine(id, machine, &mut effects),
            Change::Farewell(id) => {
                if self.left.insert(id.clone()) {
                    effects.machines.insert(id.clone());
                }
                self.apply_machine(id, None, &mut effects);
            }
            Change::States(id, reports) => self.apply_states(id, reports, &mut effects),
            Change::Unread(record, reason) => self.apply_unread(record, reason, &mut effects),
        }
        effects
    }

    fn apply_unit(&mut self, name: UnitName, new: Option<Unit>, effects: &mut Effects) {
        let entry = self.entries.entry(name.clone()).or_default();
        if entry.unit == new {
            return self.drop_empty_entry(&name);
        }
        effects.units.insert(name.clone());
        let old = std::mem::replace(&mut entry.unit, new.clone());
        let place = entry.place.as_ref().map(|(machine, _)| machine.clone());
        if new.is_none() {
            self.drop_empty_entry(&name);
        }

        self.index_followers(&name, old.as_ref(), new.as_ref());
        self.index_replacers(&name, old.as_ref(), new.as_ref());

        if let Some(id) = place {
            let was = old.as_ref().is_some_and(|unit| is_placeable(&name, unit));
            let is = new.as_ref().filter(|unit| is_placeable(&name, unit));
            self.change_site(&id, |site| {
                site.remove(&name);
                if let Some(unit) = is {
                    site.add(&name, unit);
                }
            });
            if (was || is.is_some()) && !same_to_agent(old.as_ref(), new.as_ref()) {
                effects.want(&id, &name);
            }
            let picky =
                [&old, &new].into_iter().flatten().any(|unit| !unit.requirements.conflicts.is_empty());
            self.site_changed(&id, picky, effects);
        }
        self.change_global(&name, old.as_ref(), new.as_ref(), effects);
    }

    fn apply_schedule(&mut self, name: UnitName, new: Option<(MachineId, Revision)>, effects: &mut Effects) {
        let entry = self.entries.entry(name.clone()).or_default();
        if entry.place == new {
            return self.drop_empty_entry(&name);
        }
        effects.units.insert(name.clone());
        let old = std::mem::replace(&mut entry.place, new.clone());
        let unit = entry.unit.clone().filter(|unit| is_placeable(&name, unit));
        if new.is_none() {
            self.drop_empty_entry(&name);
        }
        let (old, new) = (old.map(|(id, _)| id), new.map(|(id, _)| id));
        if old == new {
            return;
        }
        let picky = unit.as_ref().is_some_and(|unit| !unit.requirements.conflicts.is_empty());
        if let Some(id) = &old {
            if let Some(host) = self.hosts.get_mut(id) {
                host.scheduled.remove(&name);
            }
            if unit.is_some() {
                self.change_site(id, |site| site.remove(&name));
                effects.want(id, &name);
                self.site_changed(id, picky, effects);
            }
            self.drop_empty_host(id);
        }
        if let Some(id) = &new {
            self.hosts.entry(id.clone()).or_default().scheduled.insert(name.clone());
            if let Some(unit) = &unit {
                self.change_site(id, |site| site.add(&name, unit));
                effects.want(id, &name);
                self.site_changed(id, picky, effects);
            }
        }
    }

    fn apply_leaving(&mut self, name: UnitName, new: Option<(MachineId, Revision)>, effects: &mut Effects) {
        let entry = self.entries.entry(name.clone()).or_default();
        if entry.leaving == new {
            return self.drop_empty_entry(&name);
        }
        effects.units.insert(name.clone());
        let old = std::mem::replace(&mut entry.leaving, new.clone());
        self.drop_empty_entry(&name);
        if let Some((id, _)) = &old {
            effects.want(id, &name);
            if let Some(host) = self.hosts.get_mut(id) {
                host.leaving.remove(&name);
            }
            self.drop_empty_host(id);
        }
        if let Some((id, _)) = new {
            effects.want(&id, &name);
            self.hosts.entry(id).or_default().leaving.insert(name);
        }
    }

    fn apply_machine(&mut self, id: MachineId, new: Option<Machine>, effects: &mut Effects) {
        let host = self.hosts.entry(id.clone()).or_default();
        if host.machine == new {
            return self.drop_empty_host(&id);
        }
        effects.machines.insert(id.clone());
        if let Some(old) = std::mem::replace(&mut host.machine, new.clone()) {
            self.ranking.remove(&old, &(host.site.load(), id.clone()));
        }
        if let Some(new) = &new {
            self.left.remove(&id);
            self.ranking.insert(new, (host.site.load(), id.clone()));
        }
        self.refresh_globals(&id, effects);
        self.drop_empty_host(&id);
    }

    fn apply_states(
        &mut self,
        id: MachineId,
        reports: BTreeMap<UnitName, UnitReport>,
        effects: &mut Effects,
    ) {
        let host = self.hosts.entry(id.clone()).or_default();
        let before = std::mem::replace(&mut host.reported, reports.keys().cloned().collect());
        for name in before {
            if reports.contains_key(&name) {
                continue;
            }
            if let Some(entry) = self.entries.get_mut(&name) {
                entry.reports.remove(&id);
            }
            self.drop_empty_entry(&name);
            effects.units.insert(name);
        }
        for (name, report) in reports {
            let entry = self.entries.entry(name.clone()).or_default();
            if entry.reports.get(&id) != Some(&report) {
                entry.reports.insert(id.clone(), report);
                effects.units.insert(name);
            }
        }
        self.drop_empty_host(&id);
    }

    fn drop_empty_entry(&mut self, name: &UnitName) {
        if self.entries.get(name).is_some_and(Entry::is_empty) {
            self.entries.remove(name);
        }
    }

    fn drop_empty_host(&mut self, id: &MachineId) {
        if self.hosts.get(id).is_some_and(Host::is_empty) {
            self.hosts.remove(id);
        }
    }

    fn index_followers(&mut self, name: &UnitName, old: Option<&Unit>, new: Option<&Unit>) {
        for target in old.iter().flat_map(|unit| &unit.requirements.machine_of) {
            if let Some(names) = self.followers.get_mut(target) {
                names.remove(name);
                if names.is_empty() {
                    self.followers.remove(target);
                }
            }
        }
        for target in new.iter().flat_map(|unit| &unit.requirements.machine_of) {
            self.followers.entry(target.clone()).or_default().insert(name.clone());
        }
    }

    fn index_replacers(&mut self, name: &UnitName, old: Option<&Unit>, new: Option<&Unit>) {
        let replaces = |unit: Option<&Unit>| unit.is_some_and(|unit| !unit.requirements.replaces.is_empty());
        if replaces(new) {
            self.replacers.insert(name.clone());
        } else {
            self.replacers.remove(name);
        }
        // Only a unit that pushes others, or is followed, can open or close a circle of replacements.
        let pushes = replaces(old) || replaces(new) || self.followers.contains_key(name.as_str());
        let some = !self.replacers.is_empty() || replaces(old);
        let same = old.map(|unit| &unit.requirements) == new.map(|unit| &unit.requirements);
        if pushes && some && !same {
            self.replacement_epoch += 1;
        }
    }

    /// Changes what is on a machine, and its rank with it.
    fn change_site(&mut self, id: &MachineId, change: impl FnOnce(&mut Site)) {
        let Some(host) = self.hosts.get_mut(id) else { return };
        let before = host.site.load();
        change(&mut host.site);
        let after = host.site.load();
        if let Some(machine) = host.machine.as_ref().filter(|_| before != after) {
            self.ranking.remove(machine, &(before, id.clone()));
            self.ranking.insert(machine, (after, id.clone()));
        }
    }

    /// After the units scheduled on a machine changed: that may let Global units in or keep them out, if any of
    /// them or the changed unit itself (`picky`) has Conflicts.
    fn site_changed(&mut self, id: &MachineId, picky: bool, effects: &mut Effects) {
        if !self.globals.is_empty() && (picky || !self.picky_globals.is_empty()) {
            self.refresh_globals(id, effects);
        }
    }

    fn refresh_globals(&mut self, id: &MachineId, effects: &mut Effects) {
        let Some(host) = self.hosts.get(id) else { return };
        let globals = globals_on(self, host.machine.as_ref(), &host.site);
        if globals == host.site.globals {
            return;
        }
        for name in globals.symmetric_difference(&host.site.globals) {
            effects.want(id, name);
        }
        self.change_site(id, |site| site.globals = globals);
    }

    fn change_global(
        &mut self,
        name: &UnitName,
        old: Option<&Unit>,
        new: Option<&Unit>,
        effects: &mut Effects,
    ) {
        let was = old.filter(|unit| is_active_global(name, unit));
        let is = new.filter(|unit| is_active_global(name, unit));
        let requirements = |unit: &Unit| unit.requirements.clone();
        if was.map(requirements) != is.map(requirements) {
            self.globals.remove(name);
            self.picky_globals.remove(name);
            if let Some(unit) = is {
                self.globals.insert(name.clone());
                if !unit.requirements.conflicts.is_empty() {
                    self.picky_globals.insert(name.clone());
                }
            }
            let ids: Vec<_> = self.machines().map(|(id, _)| id.clone()).collect();
            for id in ids {
                self.refresh_globals(&id, effects);
            }
        }
        if was.is_some() && is.is_some() && !same_to_agent(old, new) {
            for (id, host) in &self.hosts {
                if host.site.globals.contains(name) {
                    effects.want(id, name);
                }
            }
        }
    }

    pub(crate) fn known(&self, name: &UnitName) -> Known<'_> {
        let Some(entry) = self.entries.get(name) else { return Known::default() };
        Known {
            unit: entry.unit.as_ref(),
            place: entry.place.as_ref().map(|(machine, revision)| (machine, *revision)),
            leaving: entry.leaving.as_ref().map(|(machine, _)| machine),
            reports: Some(&entry.reports),
        }
    }
    /// The machines that are there and report that something of a unit still runs, by ID; and the one that has not said yet
    /// that nothing of it does.
    pub(crate) fn live<'v>(&'v self, known: Known<'v>) -> impl Iterator<Item = &'v MachineId> {
        let reports = known.reports.into_iter().flatten();
        let reporting = reports.filter(|(_, report)| report.systemd.is_live()).map(|(id, _)| id);
        let reporting = reporting.filter(move |id| known.leaving != Some(*id));
        reporting.chain(known.leaving).filter(|id| self.may_be_there(id))
    }
    /// All names there are, of units, in the schedule and in reports.
    pub(crate) fn names(&self) -> impl Iterator<Item = &UnitName> {
        self.entries.keys()
    }
    /// A unit.
    pub fn unit(&self, name: &UnitName) -> Option<&Unit> {
        self.entries.get(name)?.unit.as_ref()
    }
    /// A unit by a name from elsewhere, which need not be a valid one.
    pub(crate) fn unit_named(&self, name: &str) -> Option<(&UnitName, &Unit)> {
        let (name, entry) = self.entries.get_key_value(name)?;
        Some((name, entry.unit.as_ref()?))
    }
    /// All units, by name.
    pub fn units(&self) -> impl Iterator<Item = (&UnitName, &Unit)> {
        self.entries.iter().filter_map(|(name, entry)| Some((name, entry.unit.as_ref()?)))
    }
    /// The machine a unit is placed on, with the revision of that decision.
    pub fn place(&self, name: &UnitName) -> Option<(&MachineId, Revision)> {
        self.place_of(name.as_str())
    }
    /// The whole schedule, by unit name: also of units that are gone and on machines that are gone.
    pub fn schedule(&self) -> impl Iterator<Item = (&UnitName, &MachineId, Revision)> {
        self.entries.iter().filter_map(|(name, entry)| {
            let (machine, revision) = entry.place.as_ref()?;
            Some((name, machine, *revision))
        })
    }
    /// What is scheduled on a machine, by name; the machine may be gone.
    pub fn scheduled_on(&self, id: &MachineId) -> impl Iterator<Item = &UnitName> {
        self.hosts.get(id).into_iter().flat_map(|host| &host.scheduled)
    }
    /// The machine that may still run a unit that was taken off there, with the revision at which it was asked to say when
    /// nothing of it runs. Only of units with OnIsolation=stop this is asked.
    pub fn leaving(&self, name: &UnitName) -> Option<(&MachineId, Revision)> {
        self.entries.get(name)?.leaving.as_ref().map(|(machine, revision)| (machine, *revision))
    }
    /// The units a machine, which may be gone, may still run though they were taken off there, by name.
    pub fn leaving_from(&self, id: &MachineId) -> impl Iterator<Item = &UnitName> {
        self.hosts.get(id).into_iter().flat_map(|host| &host.leaving)
    }
    /// All machines that may still run a unit that was taken off there.
    pub fn all_leaving(&self) -> impl Iterator<Item = (&UnitName, &MachineId)> {
        self.entries.iter().filter_map(|(name, entry)| Some((name, &entry.leaving.as_ref()?.0)))
    }
    /// The units a machine reports, by name.
    pub fn reported_on(&self, id: &MachineId) -> impl Iterator<Item = &UnitName> {
        self.hosts.get(id).into_iter().flat_map(|host| &host.reported)
    }
    /// The machines that are there, by ID.
    pub fn machines(&self) -> impl Iterator<Item = (&MachineId, &Machine)> {
        self.hosts.iter().filter_map(|(id, host)| Some((id, host.machine.as_ref()?)))
    }
    /// The machines that are there whose IDs start like this, by ID.
    pub(crate) fn machines_like(&self, prefix: &str) -> impl Iterator<Item = (&MachineId, &Machine)> {
        self.hosts
            .range::<str, _>((std::ops::Bound::Included(prefix), std::ops::Bound::Unbounded))
            .take_while(move |(id, _)| id.as_str().starts_with(prefix))
            .filter_map(|(id, host)| Some((id, host.machine.as_ref()?)))
    }
    /// One machine.
    pub fn machine(&self, id: &MachineId) -> Option<&Machine> {
        self.hosts.get(id)?.machine.as_ref()
    }
    /// Whether a machine that is not there gave up its presence on purpose.
    pub fn has_left(&self, id: &MachineId) -> bool {
        self.left.contains(id)
    }
    /// All reports, by unit name and machine ID.
    pub fn reports(&self) -> impl Iterator<Item = (&UnitName, &MachineId, &UnitReport)> {
        self.entries
            .iter()
            .flat_map(|(name, entry)| entry.reports.iter().map(move |(id, report)| (name, id, report)))
    }
    /// The reports of one unit, by machine ID.
    pub fn reports_of(&self, name: &UnitName) -> impl Iterator<Item = (&MachineId, &UnitReport)> {
        self.entries.get(name).into_iter().flat_map(|entry| &entry.reports)
    }
    /// The units that have to be on this one's machine (MachineOf), by name.
    pub fn followers(&self, name: &UnitName) -> impl Iterator<Item = &UnitName> {
        self.followers.get(name.as_str()).into_iter().flatten()
    }
    /// The Global units that are to be loaded or launched, by name.
    pub fn globals(&self) -> impl Iterator<Item = &UnitName> {
        self.globals.iter()
    }
    /// The Global units with Conflicts.
    pub(crate) fn picky_globals(&self) -> &BTreeSet<UnitName> {
        &self.picky_globals
    }
    /// All units with Replaces.
    pub(crate) fn replacers(&self) -> &BTreeSet<UnitName> {
        &self.replacers
    }
    /// The names of all units that are named in MachineOf.
    pub(crate) fn followed(&self) -> impl Iterator<Item = &str> {
        self.followers.keys().map(String::as_str)
    }
    pub(crate) fn ranking(&self) -> &Ranking {
        &self.ranking
    }
    /// Grows when a unit came, changed or went that may make another unit's Replaces count, or no longer count
    /// (see [`crate::placement`]).
    pub(crate) fn replacement_epoch(&self) -> u64 {
        self.replacement_epoch
    }
    /// How far a unit has come: what the machine it is placed on reports, for the file it has now; else inactive.
    /// A Global unit is always inactive here, as in the original's API: it has no single place.
    pub fn current(&self, name: &UnitName) -> CurrentState {
        let current = || {
            let entry = self.entries.get(name)?;
            let unit = entry.unit.as_ref().filter(|unit| !unit.requirements.global)?;
            let report = entry.reports.get(&entry.place.as_ref()?.0)?;
            (report.hash == unit.file.hash()).then_some(report.current)
        };
        current().unwrap_or_default()
    }
    /// What a machine has to hold of a unit, if anything: placed there, or Global and fitting.
    ///
    /// Which Global units a machine has to hold is known only while it is there. So do not take the answer for a
    /// machine that is not there as an instruction.
    pub fn wanted(&self, machine: &MachineId, name: &UnitName) -> Option<Wanted> {
        let site = &self.hosts.get(machine)?.site;
        if !site.held.contains(name) && !site.globals.contains(name) {
            return None;
        }
        let unit = self.unit(name)?;
        Some(Wanted { file: unit.file.clone(), state: unit.desired })
    }
    /// All a machine has to hold; as [`wanted`](Self::wanted), only while it is there.
    pub fn all_wanted(&self, machine: &MachineId) -> BTreeMap<UnitName, Wanted> {
        let Some(host) = self.hosts.get(machine) else { return BTreeMap::new() };
        host.site
            .held
            .iter()
            .chain(&host.site.globals)
            .filter_map(|name| Some((name.clone(), self.wanted(machine, name)?)))
            .collect()
    }
}

/// Whether a unit's record changed in nothing that concerns the agents.
fn same_to_agent(old: Option<&Unit>, new: Option<&Unit>) -> bool {
    match (old, new) {
        (Some(old), Some(new)) => {
            old.file == new.file && old.desired == new.desired && old.requirements == new.requirements
        }
        (None, None) => true,
        _ => false,
    }
}

impl Places for View {
    fn view(&self) -> &View {
        self
    }
    fn site(&self, id: &MachineId) -> &Site {
        const NOTHING: &Site = &Site {
            held: BTreeSet::new(),
            picky: BTreeSet::new(),
            replacers: BTreeSet::new(),
            globals: BTreeSet::new(),
        };
        self.hosts.get(id).map_or(NOTHING, |host| &host.site)
    }
    fn place_of(&self, name: &str) -> Option<(&MachineId, Revision)> {
        self.entries.get(name)?.place.as_ref().map(|(machine, revision)| (machine, *revision))
    }
}
