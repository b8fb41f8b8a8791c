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
    view::{Effects, Known, View, is_placeable},
};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet, HashMap};

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
    /// Units to look at, as they were noted.
    marked: BTreeSet<UnitName>,
    /// Units to look at, those that others follow first, so that each has to move but once.
    queue: BTreeSet<(usize, UnitName)>,
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
    proposed: HashMap<UnitName, Option<MachineId>>,
    replacement_epoch: u64,
}

/// With room on more machines than this, waiting units are placed as new ones are; with less, only these
/// machines are tried.
const FEW: usize = 16;

/// Decisions as they are being made.
struct Batch<'v> {
    view: &'v View,
    plan: Plan<'v>,
    decisions: Vec<Decision>,
}

/// How many units stand one after the other before this one by MachineOf, up to a bound: longer chains, and circles,
/// come last.
fn rank(view: &View, name: &UnitName) -> usize {
    const MOST: usize = 32;
    let targets = view.unit(name).map_or(&[][..], |unit| &unit.requirements.machine_of);
    let mut level: BTreeSet<&str> = targets.iter().map(String::as_str).collect();
    let mut rank = 0;
    while !level.is_empty() && rank < MOST {
        rank += 1;
        let known = level.into_iter().filter_map(|name| view.unit_named(name));
        level = known.flat_map(|(_, unit)| &unit.requirements.machine_of).map(String::as_str).collect();
    }
    rank
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
            queue: BTreeSet::new(),
            machines: BTreeSet::new(),
            wanted: BTreeMap::new(),
            room: BTreeSet::new(),
            waiting: BTreeSet::new(),
            deferred: BTreeSet::new(),
            proposed: HashMap::new(),
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
        let marked = std::mem::take(&mut self.marked).into_iter();
        self.queue.append(&mut marked.map(|name| (rank(view, &name), name)).collect());
        let mut batch = Batch { view, plan: Plan::new(view), decisions: Vec::new() };
        self.offer_room(&mut batch);
        while batch.decisions.len() < limit
            && let Some((_, name)) = self.queue.pop_first()
        {
            self.look_at(&mut batch, name);
        }
        self.proposed = batch.plan.into_moved();
        batch.decisions
    }

    /// When [`decide`](Self::decide) has to be called again though nothing changed, if ever.
    pub fn wake_at(&self) -> Option<Time> {
        let work = self.fresh
            || !self.queue.is_empty()
            || !self.marked.is_empty()
            || !self.machines.is_empty()
            || !self.wanted.is_empty();
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
            self.marked = view.names().cloned().collect();
            self.replacement_epoch = view.replacement_epoch();
            return;
        }
        for id in machines {
            self.marked.extend(view.scheduled_on(&id).chain(view.reported_on(&id)).cloned());
            self.room.insert(id);
        }
        for (id, names) in wanted {
            for name in names {
                self.marked.extend(view.followers(&name).cloned());
                let site = view.site(&id);
                let held = site.held.contains(&name);
                let own = proposed.get(&name).is_some_and(|to| to.as_ref() == Some(&id));
                // What was decided just now fits already.
                if !(held && own) {
                    self.room.insert(id.clone());
                    self.marked.extend(site.picky.iter().cloned());
                    if site.picky.contains(&name) || site.replacers.contains(&name) {
                        self.marked.extend(site.held.iter().cloned());
                    }
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

    /// Puts the waiting units for which there is room now into the queue, among the others: the order in which units
    /// are placed does not depend on which of them waited.
    fn offer_room(&mut self, batch: &mut Batch<'_>) {
        let mut room = std::mem::take(&mut self.room);
        room.retain(|id| batch.view.machine(id).is_some());
        if room.len() > FEW {
            for name in std::mem::take(&mut self.waiting) {
                self.push(batch.view, name);
            }
        } else if !room.is_empty() {
            let fits = |name: &UnitName| {
                let known = batch.view.known(name);
                let live: Vec<_> = batch.view.live(known).collect();
                let unit = placeable(name, known);
                unit.is_some_and(|unit| batch.plan.find_among(room.iter(), name, unit, &live).is_some())
            };
            let fitting: Vec<_> = self.waiting.iter().filter(|name| fits(name)).cloned().collect();
            for name in fitting {
                self.waiting.remove(&name);
                self.push(batch.view, name);
            }
        }
    }

    fn push(&mut self, view: &View, name: UnitName) {
        self.queue.insert((rank(view, &name), name));
    }

    /// Decides on one unit, if there is anything to decide.
    fn look_at(&mut self, batch: &mut Batch<'_>, name: UnitName) {
        if batch.plan.has_moved(&name) {
            // One decision for a unit at a time: the next has to be made from the revisions this one makes.
            self.marked.insert(name);
            return;
        }
        self.waiting.remove(&name);
        self.deferred.remove(&name);
        let known = batch.view.known(&name);
        let Some(unit) = placeable(&name, known) else {
            if known.place.is_some() {
                self.settle(batch, name, known, None, why_off(known).to_owned());
            }
            return;
        };
        let reason = match known.place {
            None => format!("it is to be {}, and no fitting machine has less to do", unit.desired.as_str()),
            Some((at, _)) => match batch.plan.suits(&name, unit, at) {
                Ok(()) => return,
                Err(misfit) => format!("it can't stay on {at}: {misfit}"),
            },
        };
        let gone = known.place.is_some_and(|(at, _)| batch.view.machine(at).is_none());
        if gone && self.now < self.grace_until {
            self.deferred.insert(name);
            return;
        }
        let live: Vec<_> = batch.view.live(known).collect();
        let to = batch.plan.find(&name, unit, &live);
        if to.is_none() {
            self.waiting.insert(name.clone());
        }
        if to.is_some() || (known.place.is_some() && !gone) {
            self.settle(batch, name, known, to, reason);
        }
    }

    /// Takes a decision, and follows it to the units it concerns.
    fn settle(
        &mut self,
        batch: &mut Batch<'_>,
        name: UnitName,
        known: Known<'_>,
        to: Option<MachineId>,
        reason: String,
    ) {
        let view = batch.view;
        let globals = batch.plan.relocate(&name, known, to.as_ref());
        for follower in view.followers(&name) {
            self.push(view, follower.clone());
        }
        self.room.extend(known.place.map(|(from, _)| from.clone()));
        for (id, names) in globals {
            for follower in names.iter().flat_map(|global| view.followers(global)) {
                self.push(view, follower.clone());
            }
            self.room.insert(id);
        }
        if let Some(to) = to.as_ref().filter(|to| batch.plan.site(to).replacers.contains(&name)) {
            let held = batch.plan.site(to).held.iter();
            for other in held.filter(|other| replaces(view, &name, other).is_some()) {
                self.push(view, other.clone());
            }
        }
        batch.decisions.push(Decision {
            unit_revision: known.unit.map_or(0, |unit| unit.revision),
            schedule_revision: known.place.map_or(0, |(_, revision)| revision),
            unit: name,
            machine: to,
            reason,
        });
        self.offer_room(batch);
    }
}

fn placeable<'v>(name: &UnitName, known: Known<'v>) -> Option<&'v Unit> {
    known.unit.filter(|unit| is_placeable(name, unit))
}

/// Why a unit is taken off though nothing is wrong with its place.
fn why_off(known: Known<'_>) -> &'static str {
    match known.unit {
        None => "it was destroyed",
        Some(unit) if unit.desired < DesiredState::Loaded => "it is to be inactive",
        Some(unit) if unit.requirements.global => "it is Global now",
        Some(_) => "it is a template",
    }
}

#[cfg(test)]
mod tests;
