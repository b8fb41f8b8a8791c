//! Which units to place and to take away.
//!
//! The engine follows changes: [`Engine::note`] takes what a change to the view meant, [`Engine::decide`] looks
//! only at the units that it may concern. A unit is
//!
//! - placed when it is to be loaded or launched and a machine fits (see [`crate::placement`]); it is not moved again
//!   merely because of load;
//! - moved when its place no longer fits, or its machine is gone and another one fits. While its machine still reports
//!   it running it is only taken off; it is placed again when that report is gone;
//! - taken off when it is not to be loaded any more, and when its place, though there, no longer fits and no other does.
//!
//! A unit whose machine is gone and that fits nowhere else stays on the schedule there: taking it off would gain
//! nothing, and would make a machine that was only out of reach stop it on its return.
use crate::{
    model::*,
    placement::replaces,
    plan::Plan,
    site::Places,
    view::{Effects, View, is_placeable},
};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet};

/// A decision of the engine. It is committed only if the unit's and the schedule's records still have
/// the revisions it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The unit.
    pub unit: UnitName,
    /// Where it is to be; `None`: nowhere.
    pub machine: Option<MachineId>,
    /// Why, in words for the log.
    pub reason: String,
    /// The revision of the unit's record this was decided from (0: there is none).
    pub unit_revision: Revision,
    /// The revision of its entry in the schedule this was decided from (0: there is none).
    pub schedule_revision: Revision,
}

/// The engine: remembers what may have to be decided.
#[derive(Debug)]
pub struct Engine {
    grace_until: Time,
    /// When it was last asked to decide.
    now: Time,
    /// Nothing has been looked at yet.
    fresh: bool,
    /// Units to look at.
    marked: BTreeSet<UnitName>,
    /// What was noted of machines since the last decisions, to be followed to the units it concerns.
    machines: BTreeSet<MachineId>,
    wanted: BTreeMap<MachineId, BTreeSet<UnitName>>,
    /// Machines on which a unit may fit that did not before.
    room: BTreeSet<MachineId>,
    /// Units that fit nowhere (else): looked at again when there is room.
    waiting: BTreeSet<UnitName>,
    /// Units whose machine is not there yet, within the grace.
    deferred: BTreeSet<UnitName>,
    /// The decisions made last, which come back as changes.
    proposed: BTreeMap<UnitName, Option<MachineId>>,
    replacement_epoch: u64,
}

/// With room on more machines than this, waiting units are placed as new ones are; with less, only these
/// machines are tried.
const FEW: usize = 16;

/// Decisions as they are being made.
struct Batch<'v> {
    view: &'v View,
    plan: Plan<'v>,
    /// Units still to look at.
    queue: BTreeSet<UnitName>,
    decided: BTreeSet<UnitName>,
    decisions: Vec<Decision>,
}

impl Engine {
    /// Starts at `now`; until `now + grace` no unit is taken from a machine merely because that machine
    /// is not there (yet).
    pub fn new(now: Time, grace: Time) -> Self {
        Engine {
            grace_until: now.saturating_add(grace),
            now,
            fresh: true,
            marked: BTreeSet::new(),
            machines: BTreeSet::new(),
            wanted: BTreeMap::new(),
            room: BTreeSet::new(),
            waiting: BTreeSet::new(),
            deferred: BTreeSet::new(),
            proposed: BTreeMap::new(),
            replacement_epoch: 0,
        }
    }

    /// Notes what a change to the view may ask to be decided.
    ///
    /// A decision that could not be committed though nothing about its unit changed has to be noted too, as
    /// a change of that unit.
    pub fn note(&mut self, effects: &Effects) {
        self.marked.extend(effects.units.iter().cloned());
        self.machines.extend(effects.machines.iter().cloned());
        for (machine, names) in &effects.wanted {
            match self.wanted.get_mut(machine) {
                Some(noted) => noted.extend(names.iter().cloned()),
                None => {
                    self.wanted.insert(machine.clone(), names.clone());
                }
            }
        }
    }

    /// Decides what there is to decide now, at most `limit` units. To be called again after the decisions are in the view.
    pub fn decide(&mut self, view: &View, now: Time, limit: usize) -> Vec<Decision> {
        self.now = now;
        self.follow_changes(view);
        let mut batch = Batch {
            view,
            plan: Plan::new(view),
            queue: std::mem::take(&mut self.marked),
            decided: BTreeSet::new(),
            decisions: Vec::new(),
        };
        while batch.decisions.len() < limit {
            if let Some(name) = batch.queue.pop_first() {
                for name in targets_first(view, &mut batch.queue, name) {
                    if batch.decisions.len() < limit {
                        self.look_at(&mut batch, name);
                    } else {
                        batch.queue.insert(name);
                    }
                }
            } else if !self.room.is_empty() {
                self.use_room(&mut batch, limit);
            } else {
                break;
            }
        }
        self.marked.extend(batch.queue);
        let proposed =
            batch.decisions.iter().map(|decision| (decision.unit.clone(), decision.machine.clone()));
        self.proposed = proposed.collect();
        batch.decisions
    }

    /// When [`decide`](Self::decide) has to be called again though nothing changed, if ever.
    pub fn wake_at(&self) -> Option<Time> {
        let work = self.fresh
            || !self.marked.is_empty()
            || !self.machines.is_empty()
            || !self.wanted.is_empty()
            || !self.room.is_empty();
        if work {
            return Some(self.now);
        }
        (!self.deferred.is_empty()).then_some(self.grace_until)
    }

    /// From what was noted to the units that have to be looked at.
    fn follow_changes(&mut self, view: &View) {
        let proposed = std::mem::take(&mut self.proposed);
        let machines = std::mem::take(&mut self.machines);
        let wanted = std::mem::take(&mut self.wanted);
        if self.now >= self.grace_until {
            self.marked.append(&mut self.deferred);
        }
        if std::mem::take(&mut self.fresh) {
            self.marked.extend(view.units().map(|(name, _)| name.clone()));
            self.marked.extend(view.schedule().map(|(name, _, _)| name.clone()));
            self.replacement_epoch = view.replacement_epoch();
            return;
        }
        for id in machines {
            self.marked.extend(view.scheduled_on(&id).chain(view.reported_on(&id)).cloned());
            self.room.insert(id);
        }
        for (id, names) in wanted {
            for name in names {
                let held = view.site(&id).held.contains(&name);
                let own = proposed.get(&name).is_some_and(|to| to.as_ref() == Some(&id));
                self.marked.extend(view.followers(&name).cloned());
                if !(held && own) {
                    self.room.insert(id.clone());
                }
                if let Some(unit) = view.unit(&name).filter(|_| held)
                    && !(unit.requirements.conflicts.is_empty() && unit.requirements.replaces.is_empty())
                {
                    self.marked.extend(view.site(&id).held.iter().cloned());
                }
                self.marked.insert(name);
            }
        }
        if self.replacement_epoch != view.replacement_epoch() {
            self.replacement_epoch = view.replacement_epoch();
            for name in view.replacers() {
                if let Some((id, _)) = view.place(name) {
                    self.marked.extend(view.site(id).held.iter().cloned());
                    self.room.insert(id.clone());
                }
            }
        }
    }

    /// Tries waiting units on the machines where there is room now.
    fn use_room(&mut self, batch: &mut Batch<'_>, limit: usize) {
        let mut room = std::mem::take(&mut self.room);
        room.retain(|id| batch.view.machine(id).is_some());
        if room.len() > FEW {
            batch.queue.append(&mut self.waiting);
            return;
        }
        if room.is_empty() {
            return;
        }
        for name in self.waiting.clone() {
            if batch.decisions.len() >= limit {
                self.room.append(&mut room);
                return;
            }
            let Some(unit) = placeable(batch.view, &name) else { continue };
            if batch.plan.find_among(room.iter(), &name, unit).is_some() {
                self.look_at(batch, name);
            }
        }
    }

    /// Decides on one unit, if there is anything to decide.
    fn look_at(&mut self, batch: &mut Batch<'_>, name: UnitName) {
        if batch.decided.contains(&name) {
            // One decision for a unit at a time: the next has to be made from the revisions this one makes.
            self.marked.insert(name);
            return;
        }
        self.waiting.remove(&name);
        self.deferred.remove(&name);
        let view = batch.view;
        let place = batch.plan.place_of(name.as_str()).map(|(machine, _)| machine.clone());
        let Some(unit) = placeable(view, &name) else {
            if place.is_some() {
                self.settle(batch, name.clone(), None, why_off(view, &name));
            }
            return;
        };
        let Some(at) = place else {
            match batch.plan.find(&name, unit) {
                Some(to) => {
                    let reason = format!(
                        "it is to be {}, and no fitting machine has less to do",
                        unit.desired.as_str()
                    );
                    self.settle(batch, name, Some(to), reason);
                }
                None => {
                    self.waiting.insert(name);
                }
            }
            return;
        };
        let misfit = match batch.plan.suits(&name, unit, &at) {
            Ok(()) => return,
            Err(misfit) => misfit,
        };
        let gone = view.machine(&at).is_none();
        if gone && self.now < self.grace_until {
            self.deferred.insert(name);
            return;
        }
        let to = batch.plan.find(&name, unit);
        if to.is_none() {
            self.waiting.insert(name.clone());
        }
        if to.is_some() || !gone {
            self.settle(batch, name, to, format!("it can't stay on {at}: {misfit}"));
        }
    }

    /// Takes a decision, and follows it to the units it concerns.
    fn settle(&mut self, batch: &mut Batch<'_>, name: UnitName, to: Option<MachineId>, reason: String) {
        let view = batch.view;
        let from = batch.plan.place_of(name.as_str()).map(|(machine, _)| machine.clone());
        let globals = batch.plan.relocate(&name, to.as_ref());
        batch.queue.extend(view.followers(&name).cloned());
        self.room.extend(from);
        for (id, names) in globals {
            for global in names {
                batch.queue.extend(view.followers(&global).cloned());
            }
            self.room.insert(id);
        }
        let replacer = view.unit(&name).is_some_and(|unit| !unit.requirements.replaces.is_empty());
        if let Some(to) = to.as_ref().filter(|_| replacer) {
            let held = batch.plan.site(to).held.iter();
            batch.queue.extend(held.filter(|other| replaces(view, &name, other).is_some()).cloned());
        }
        batch.decided.insert(name.clone());
        batch.decisions.push(Decision {
            unit_revision: view.unit(&name).map_or(0, |unit| unit.revision),
            schedule_revision: view.place(&name).map_or(0, |(_, revision)| revision),
            unit: name,
            machine: to,
            reason,
        });
    }
}

fn placeable<'v>(view: &'v View, name: &UnitName) -> Option<&'v Unit> {
    view.unit(name).filter(|unit| is_placeable(name, unit))
}

/// Why a unit is taken off though nothing is wrong with its place.
fn why_off(view: &View, name: &UnitName) -> String {
    match view.unit(name) {
        None => "it was destroyed".to_owned(),
        Some(unit) if unit.desired < DesiredState::Loaded => "it is to be inactive".to_owned(),
        Some(unit) if unit.requirements.global => "it is Global now".to_owned(),
        Some(_) => "it is a template".to_owned(),
    }
}

/// A unit, preceded by those it follows (MachineOf), as far as they are in the queue, too: they are taken
/// out of it.
fn targets_first(view: &View, queue: &mut BTreeSet<UnitName>, name: UnitName) -> Vec<UnitName> {
    let mut order = Vec::new();
    let mut open = vec![name];
    while let Some(name) = open.last() {
        let targets = view.unit(name).map_or(&[][..], |unit| &unit.requirements.machine_of);
        match targets.iter().find_map(|target| queue.take(target.as_str())) {
            Some(target) => open.push(target),
            None => order.extend(open.pop()),
        }
    }
    order
}
