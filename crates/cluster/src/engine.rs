//! Which units to place and to take away.
//!
//! The engine follows changes: [`Engine::note`] takes what a change to the view meant, [`Engine::decide`] looks
//! only at the units that it may concern. A unit is
//!
//! - placed when it is to be loaded or launched and a machine fits (see [`crate::placement`]); it is not moved again
//!   merely because of load;
//! - moved when its place no longer fits, or its machine is gone and another one fits. While its machine still reports
//!   it running it is only taken off; it is placed again when that report is gone. One with OnIsolation=stop is only taken off
//!   in any case: that its machine reports nothing of it does not say that it does not run, or is not started, there. It is
//!   placed again when the machine has said, knowing that, that nothing of it runs ([`Change::Leaving`]);
//! - taken off when it is not to be loaded any more, and when its place, though there, no longer fits and no other does.
//!
//! A unit whose machine is gone and that fits nowhere else stays on the schedule there: taking it off would gain
//! nothing, and would make a machine that was only out of reach stop it on its return.
//!
//! Not each of these is done at once:
//!
//! - What is not known yet is waited for: from the start of an engine, and from the end of an outage of the store
//!   ([`Engine::hold_until`]), machines have a grace to show that they are there.
//! - A unit with OnIsolation=stop is placed elsewhere only when its machine has certainly stopped it
//!   (see [`crate::fencing`]). As nobody remembers what was on a machine before it vanished, this holds for such a unit that is nowhere
//!   just as well, after any machine vanished and after the grace.
//! - When many machines vanish at once their units are placed elsewhere at a certain pace ([`MassLoss`]).
//! - A machine being drained gives up a few units at a time (see [`crate::drain`]).
//!
//! Of a unit one of whose records can't be read nothing is decided, nor from what is not known of a machine ([`Change::Unread`]).
//!
//! None of these but the last concerns a machine that gave up its presence on purpose ([`Change::Farewell`]): its
//! units are placed elsewhere at once.
use crate::{
    drain::is_on_its_way,
    fencing,
    model::*,
    placement::replaces,
    plan::Plan,
    site::Places,
    view::{Effects, Known, View, is_placeable},
};
use fleet_unit::{OnIsolation, UnitName};
use losses::Losses;
pub use losses::MassLoss;
use std::collections::{BTreeMap, BTreeSet, HashMap};

mod losses;

/// How carefully the engine goes about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How many units of one machine that is being drained are on their way at a time (at least 1).
    pub drain_at_once: usize,
    /// Many machines are more than this part of all: numerator and denominator.
    pub mass_loss: (u32, u32),
    /// The time within which they have to vanish to count together.
    pub window: Time,
    /// Then at most so many units (at least 1) are placed elsewhere
    pub pace_units: usize,
    /// in a period of this length. Periods do not overlap; each begins with a unit.
    pub pace_period: Time,
    /// How long after a machine was seen to be gone a unit with OnIsolation=stop may be placed elsewhere. See
    /// [`fencing::margin`].
    pub margin: Time,
    /// How often all units are looked at though nothing changed. Nothing needs that; without it they never are.
    pub recheck: Option<Time>,
}

impl Policy {
    /// What is usual where machines are lost after `ttl`: 3 units at a time from each machine being drained; 10 units a
    /// second when more than a third of all machines vanish within one TTL.
    pub fn for_ttl(ttl: Time) -> Self {
        Policy {
            drain_at_once: 3,
            mass_loss: (1, 3),
            window: ttl,
            pace_units: 10,
            pace_period: Time::from_secs(1),
            margin: fencing::margin(ttl),
            recheck: None,
        }
    }
}

/// Why a unit that fits somewhere is not placed there yet. Display gives a sentence fragment for users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Delay {
    /// Its machine may yet turn out to be there.
    #[error("its machine is not there (yet) and is given time to come back")]
    Grace,
    /// A machine that vanished may still run it.
    #[error("a machine that is not there is given time to stop it (OnIsolation=stop)")]
    Isolation,
    /// Many machines vanished.
    #[error("many machines vanished at once, and their units are placed elsewhere a few at a time")]
    MassLoss,
}

/// A decision of the engine. It is committed only if the unit's and the schedule's records still have
/// the revisions it was made from, and the machine in `absent` has no presence; and with it what it says of the unit's leaving.
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
    /// The machine it was on and that was not there when this was decided. That it came back meanwhile does not
    /// change the other two records, and yet it may be starting the unit at this moment.
    pub absent: Option<MachineId>,
    /// What becomes of the record of the machine that may still run it.
    pub leaving: Leaving,
}

/// What a decision does to the record of the machine that may still run a unit ([`Change::Leaving`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Leaving {
    /// Nothing: there is none.
    #[default]
    None,
    /// It is written: this machine has to say when nothing of the unit runs there.
    From(MachineId),
    /// It is deleted: the unit is placed there again, or that machine was lost, and has certainly stopped it.
    Over,
}

/// The engine: remembers what may have to be decided.
#[derive(Clone, Debug)]
pub struct Engine {
    policy: Policy,
    grace_until: Time,
    /// When it was last asked to decide.
    now: Time,
    /// Nothing has been looked at yet.
    first: bool,
    /// All units have to be looked at.
    fresh: bool,
    /// When all were last.
    looked_at_all: Time,
    losses: Losses,
    mass_loss: Option<MassLoss>,
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
    /// Units about which decisions could not be carried out, though nothing has changed of them or of machines since.
    dropped: BTreeSet<UnitName>,
    /// Units whose machine is not there yet, within the grace.
    deferred: BTreeSet<UnitName>,
    /// Units with OnIsolation=stop that a lost machine may still run, up to that time.
    isolated: BTreeMap<UnitName, Time>,
    /// Units of machines that vanished with many others: they keep to the pace.
    paced: BTreeSet<UnitName>,
    /// Units that were taken off machines being drained and are on their way, by those machines.
    on_the_way: BTreeMap<MachineId, BTreeSet<UnitName>>,
    /// The decisions made last, which come back as changes.
    proposed: HashMap<UnitName, Proposed>,
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

/// A place that a unit is to get, or is to lose.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Proposed {
    to: Option<MachineId>,
    /// The revision of the unit's record that was decided from.
    unit: Revision,
}

impl Proposed {
    fn is(&self, id: &MachineId, unit: Revision) -> bool {
        self.to.as_ref() == Some(id) && self.unit == unit
    }
}

impl Engine {
    /// Starts at `now`; until `now + grace` no unit is taken from a machine merely because that machine
    /// is not there (yet). The grace has to be the TTL of machines at least; all else is as usual with that TTL.
    pub fn new(now: Time, grace: Time) -> Self {
        Self::with_policy(now, grace, Policy::for_ttl(grace))
    }

    /// As [`new`](Self::new), with a policy of its own.
    pub fn with_policy(now: Time, grace: Time, policy: Policy) -> Self {
        let grace_until = now.saturating_add(grace);
        Engine {
            policy,
            grace_until,
            now,
            first: true,
            fresh: true,
            looked_at_all: now,
            losses: Losses::new(grace_until),
            mass_loss: None,
            marked: BTreeSet::new(),
            queue: BTreeSet::new(),
            machines: BTreeSet::new(),
            wanted: BTreeMap::new(),
            room: BTreeSet::new(),
            waiting: BTreeSet::new(),
            dropped: BTreeSet::new(),
            deferred: BTreeSet::new(),
            isolated: BTreeMap::new(),
            paced: BTreeSet::new(),
            on_the_way: BTreeMap::new(),
            proposed: HashMap::new(),
            replacement_epoch: 0,
        }
    }

    /// Notes what a change to the view may ask to be decided. Decisions that were not carried out need not be noted: those
    /// that are not in the view the next time count as such.
    pub fn note(&mut self, effects: &Effects) {
        if !effects.machines.is_empty() {
            self.marked.append(&mut self.dropped);
        }
        for name in &effects.units {
            self.dropped.remove(name);
        }
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

    /// A decision about a unit could not be carried out: its ground is not what the view shows. Others must not wait for that, so nothing
    /// is decided about it before something is noted of it, or of a machine.
    pub fn drop_decision(&mut self, name: UnitName) {
        self.dropped.insert(name);
    }

    /// Until then no unit is taken from a machine merely because that machine is not there: to be called when the store
    /// is back after an outage in which presences could not be renewed, with that time plus the TTL of machines. Never makes
    /// a grace shorter.
    pub fn hold_until(&mut self, time: Time) {
        if time > self.grace_until {
            self.grace_until = time;
            self.losses.hold_until(time);
            self.marked.append(&mut self.paced);
            self.marked.extend(std::mem::take(&mut self.isolated).into_keys());
        }
    }

    /// Has all units looked at with the next decisions. Nothing ever needs this; it is a net for what nobody thought of.
    pub fn recheck(&mut self) {
        self.fresh = true;
    }

    /// What there is to tell since this was asked last: that many machines vanished at once. Told once for each time.
    pub fn take_mass_loss(&mut self) -> Option<MassLoss> {
        self.mass_loss.take()
    }

    /// Whether many machines vanished at once and that still holds up their units.
    pub fn is_mass_loss(&self) -> bool {
        self.losses.is_mass()
    }

    /// All units that fit somewhere and are not placed there yet, with the reason.
    pub fn delays(&self) -> impl Iterator<Item = (&UnitName, Delay)> {
        let names = self.deferred.iter().chain(self.isolated.keys()).chain(&self.paced);
        names.filter_map(|name| Some((name, self.delay(name)?)))
    }

    /// Why a unit that fits somewhere is not placed there yet, if the engine delays that.
    pub fn delay(&self, name: &UnitName) -> Option<Delay> {
        if self.deferred.contains(name) {
            Some(Delay::Grace)
        } else if self.isolated.contains_key(name) {
            Some(Delay::Isolation)
        } else {
            self.paced.contains(name).then_some(Delay::MassLoss)
        }
    }

    /// Units that were taken off a machine being drained and have not come up elsewhere yet, by name.
    pub fn on_the_way(&self, from: &MachineId) -> impl Iterator<Item = &UnitName> {
        self.on_the_way.get(from).into_iter().flatten()
    }

    /// Decides what there is to decide now, at most `limit` units. To be called again after the decisions are in the view.
    pub fn decide(&mut self, view: &View, now: Time, limit: usize) -> Vec<Decision> {
        self.now = now;
        self.fresh |=
            self.policy.recheck.is_some_and(|every| now >= self.looked_at_all.saturating_add(every));
        if self.fresh {
            self.looked_at_all = now;
        }
        self.follow_changes(view);
        let marked = std::mem::take(&mut self.marked).into_iter();
        self.queue.append(&mut marked.map(|name| (rank(view, &name), name)).collect());
        let mut batch = Batch { view, plan: Plan::new(view), decisions: Vec::new() };
        self.offer_room(&mut batch);
        while batch.decisions.len() < limit {
            if let Some((_, name)) = self.queue.pop_first() {
                self.look_at(&mut batch, name, false);
            } else if self.losses.next_at(&self.policy, now) <= now
                && let Some(name) = self.paced.pop_first()
            {
                self.look_at(&mut batch, name, true);
            } else {
                break;
            }
        }
        let moved = batch.plan.into_moved().into_iter();
        let proposed = |(name, to)| {
            let unit = view.unit(&name).map_or(0, |unit| unit.revision);
            (name, Proposed { to, unit })
        };
        self.proposed = moved.map(proposed).collect();
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
        let recheck = self.policy.recheck.map(|every| self.looked_at_all.saturating_add(every));
        let grace = (!self.deferred.is_empty()).then_some(self.grace_until);
        let isolated = self.isolated.values().min().copied();
        let paced = (!self.paced.is_empty()).then(|| self.losses.next_at(&self.policy, self.now));
        [recheck, grace, isolated, paced].into_iter().flatten().min()
    }

    /// From what was noted to the units that have to be looked at.
    fn follow_changes(&mut self, view: &View) {
        let proposed = std::mem::take(&mut self.proposed);
        let machines = std::mem::take(&mut self.machines);
        let wanted = std::mem::take(&mut self.wanted);
        self.follow_time(view, &machines);
        self.follow_drains(view);
        if std::mem::take(&mut self.fresh) {
            self.dropped.clear();
            self.marked = view.names().cloned().collect();
            self.replacement_epoch = view.replacement_epoch();
            return;
        }
        for (name, Proposed { to, .. }) in &proposed {
            let place = view.place(name).map(|(id, _)| id);
            if place == to.as_ref() {
                continue;
            }
            // It was not carried out. What was decided with it, or left as it is, was so for nothing.
            self.marked.insert(name.clone());
            self.marked.extend(view.followers(name).cloned());
            for id in place.into_iter().chain(to.as_ref()) {
                self.marked.extend(view.site(id).held.iter().cloned());
                self.room.insert(id.clone());
            }
        }
        for id in machines {
            let held = view.scheduled_on(&id).chain(view.leaving_from(&id)).chain(view.reported_on(&id));
            self.marked.extend(held.cloned());
            self.room.insert(id);
        }
        for (id, names) in wanted {
            if is_draining(view, &id) {
                // Whether a unit can go depends on those that go along.
                self.marked.extend(view.site(&id).held.iter().cloned());
            }
            for name in names {
                self.marked.extend(view.followers(&name).cloned());
                let site = view.site(&id);
                let held = site.held.contains(&name);
                let revision = view.unit(&name).map_or(0, |unit| unit.revision);
                let own = proposed.get(&name).is_some_and(|own| own.is(&id, revision));
                // What was decided just now fits already. Unless it has another file by now: that may leave room for others.
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

    /// What has become of machines that are not there, and whose time has come by that.
    fn follow_time(&mut self, view: &View, machines: &BTreeSet<MachineId>) {
        if self.first {
            self.losses.begin(view);
        } else {
            self.losses.follow(view, machines, self.now.max(self.grace_until));
        }
        if self.now < self.grace_until {
            return;
        }
        self.marked.append(&mut self.deferred);
        let due: Vec<_> = self.isolated.iter().filter(|(_, until)| **until <= self.now).collect();
        self.marked.extend(due.into_iter().map(|(name, _)| name.clone()));
        let mass_loss = self.losses.count(view, &self.policy, self.now, self.paced.is_empty());
        self.mass_loss = mass_loss.or(self.mass_loss.take());
        if !self.losses.is_mass() {
            self.marked.append(&mut self.paced);
        }
    }

    /// Which units have left the machines being drained for good, so that others may go.
    fn follow_drains(&mut self, view: &View) {
        if std::mem::take(&mut self.first) {
            for (id, _) in view.machines().filter(|(_, machine)| machine.draining) {
                let running = view.reported_on(id).chain(view.leaving_from(id)).filter(|name| {
                    let known = view.known(name);
                    placeable(name, known).is_some()
                        && known.place.is_none_or(|(at, _)| at != id)
                        && view.live(known).any(|on| on == id)
                });
                self.on_the_way.insert(id.clone(), running.cloned().collect());
            }
        }
        self.on_the_way.retain(|from, names| {
            if !view.machine(from).is_some_and(|machine| machine.draining) {
                return false;
            }
            let before = names.len();
            names.retain(|name| is_on_its_way(view, name, from));
            if names.len() < before {
                self.marked.extend(view.site(from).held.iter().cloned());
            }
            !names.is_empty()
        });
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
                let Some(unit) = placeable(name, known) else { return false };
                let found = match known.place.filter(|(at, _)| is_draining(batch.view, at)) {
                    Some((at, _)) => batch.plan.find_elsewhere_among(room.iter(), name, unit, at),
                    None => batch.plan.find_among(room.iter(), name, unit, &live),
                };
                found.is_some()
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

    /// Decides on one unit, if there is anything to decide. `in_turn`: it keeps to the pace, and it is its turn.
    fn look_at(&mut self, batch: &mut Batch<'_>, name: UnitName, in_turn: bool) {
        if batch.plan.has_moved(&name) {
            // One decision for a unit at a time: the next has to be made from the revisions this one makes.
            self.marked.insert(name);
            return;
        }
        self.waiting.remove(&name);
        self.deferred.remove(&name);
        self.isolated.remove(&name);
        self.paced.remove(&name);
        if self.dropped.contains(&name) || batch.view.undecidable(&name).is_some() {
            return;
        }
        let known = batch.view.known(&name);
        let Some(unit) = placeable(&name, known) else {
            if known.place.is_some() {
                self.settle(batch, name, known, None, why_off(known).to_owned());
            } else if let Some(from) = known.leaving.filter(|from| !batch.view.may_be_there(from)) {
                self.give_up_leaving(batch, name, known, from);
            }
            return;
        };
        let reason = match known.place {
            None => format!("it is to be {}, and no fitting machine has less to do", unit.desired.as_str()),
            Some((at, _)) => match batch.plan.suits(&name, unit, at) {
                Ok(()) if is_draining(batch.view, at) => return self.drain(batch, name, known, unit, at),
                Ok(()) => return,
                Err(misfit) => format!("it can't stay on {at}: {misfit}"),
            },
        };
        let held = known.place.map(|(at, _)| at);
        let gone = held.or(known.leaving).filter(|at| !batch.view.may_be_there(at));
        let lost = gone.filter(|at| !batch.view.has_left(at));
        if lost.is_some() && self.now < self.grace_until {
            self.deferred.insert(name);
            return;
        }
        if let Some(until) = self.isolated_until(known, unit, lost).filter(|until| *until > self.now) {
            self.isolated.insert(name, until);
            return;
        }
        let paced = lost.is_some_and(|at| self.losses.is_limited(at));
        if paced && !in_turn {
            self.paced.insert(name);
            return;
        }
        let live: Vec<_> = batch.view.live(known).collect();
        let mut to = batch.plan.find(&name, unit, &live);
        if to.is_none() {
            self.waiting.insert(name.clone());
        }
        if let Some((at, _)) = known.place.filter(|(at, _)| is_draining(batch.view, at)) {
            self.on_the_way.entry(at.clone()).or_default().insert(name.clone());
        } else if to.is_none() && known.place.is_none() && live.is_empty() {
            self.give_up_way(batch, &name);
        }
        if gone.is_none() && known.place.is_some() && must_not_run_twice(known) {
            // First its machine has to say that it does not run.
            to = None;
        }
        if to.is_some() || (known.place.is_some() && gone.is_none()) {
            if paced {
                self.losses.place(&self.policy, self.now);
            }
            self.settle(batch, name, known, to, reason);
        }
    }

    /// Until when a machine that is lost may run a unit that must not run twice.
    fn isolated_until(&mut self, known: Known<'_>, unit: &Unit, lost: Option<&MachineId>) -> Option<Time> {
        if unit.requirements.on_isolation != OnIsolation::Stop {
            return None;
        }
        let since = match (known.place, lost) {
            (_, Some(at)) => self.losses.lost_at(at, self.now),
            (None, None) => self.losses.latest(),
            (Some(_), None) => return None,
        };
        Some(since.saturating_add(self.policy.margin))
    }

    /// Of a unit that is not to be on any machine: a machine that may still run it is lost. When it has certainly stopped it, it
    /// need not say so any more.
    fn give_up_leaving(&mut self, batch: &mut Batch<'_>, name: UnitName, known: Known<'_>, from: &MachineId) {
        let known_from = self.losses.lost_at(from, self.now).max(self.grace_until);
        let until = known_from.saturating_add(self.policy.margin);
        if until > self.now && !batch.view.has_left(from) {
            self.isolated.insert(name, until);
            return;
        }
        batch.plan.relocate(&name, known, None);
        batch.decisions.push(Decision {
            unit_revision: known.unit.map_or(0, |unit| unit.revision),
            schedule_revision: 0,
            absent: Some(from.clone()),
            leaving: Leaving::Over,
            unit: name,
            machine: None,
            reason: format!("{from}, which may have run it still, is gone"),
        });
    }

    /// Takes a unit off a machine being drained, if it is its turn and it has somewhere to go.
    fn drain(
        &mut self,
        batch: &mut Batch<'_>,
        name: UnitName,
        known: Known<'_>,
        unit: &Unit,
        at: &MachineId,
    ) {
        if self.on_the_way(at).count() >= self.policy.drain_at_once.max(1) {
            return;
        }
        let Some(to) = batch.plan.find_elsewhere(&name, unit, at) else {
            self.waiting.insert(name);
            return;
        };
        let runs = must_not_run_twice(known) || batch.view.live(known).next().is_some();
        if runs {
            self.waiting.insert(name.clone());
        }
        self.on_the_way.entry(at.clone()).or_default().insert(name.clone());
        self.settle(batch, name, known, (!runs).then_some(to), format!("{at} is being drained"));
    }

    /// A unit that was on its way found no place: others go on.
    fn give_up_way(&mut self, batch: &Batch<'_>, name: &UnitName) {
        let mut freed = Vec::new();
        for (from, names) in &mut self.on_the_way {
            if names.remove(name) {
                freed.extend(batch.plan.site(from).held.iter().cloned());
            }
        }
        for name in freed {
            self.push(batch.view, name);
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
        let from = known.place.map(|(from, _)| from);
        let leaving = match from.filter(|_| to.is_none()) {
            Some(from) if must_not_run_twice(known) => Leaving::From(from.clone()),
            _ if to.is_some() && known.leaving.is_some() => Leaving::Over,
            _ => Leaving::None,
        };
        batch.decisions.push(Decision {
            unit_revision: known.unit.map_or(0, |unit| unit.revision),
            schedule_revision: known.place.map_or(0, |(_, revision)| revision),
            absent: from.or(known.leaving).filter(|from| to.is_some() && !view.may_be_there(from)).cloned(),
            leaving,
            unit: name,
            machine: to,
            reason,
        });
        self.offer_room(batch);
    }
}

fn is_draining(view: &View, id: &MachineId) -> bool {
    view.machine(id).is_some_and(|machine| machine.draining) && !view.is_obscure(id)
}

fn placeable<'v>(name: &UnitName, known: Known<'v>) -> Option<&'v Unit> {
    known.unit.filter(|unit| is_placeable(name, unit))
}

/// Whether a unit has OnIsolation=stop. Who destroys one says himself which machine it leaves.
fn must_not_run_twice(known: Known<'_>) -> bool {
    known.unit.is_some_and(|unit| unit.requirements.on_isolation == OnIsolation::Stop)
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
mod leaving_tests;
#[cfg(test)]
mod loss_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod unread_tests;
