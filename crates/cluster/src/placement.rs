//! Which machine a unit fits on, and why not.
//!
//! The rules, each decided here and nowhere else:
//!
//! - MachineID: the machine's whole ID, or its first 8 digits, as the original took them.
//! - MachineMetadata: for every key named, the machine has one of the values named for it.
//! - MachineOf: every unit named is placed on that machine, or is Global and wanted there. A unit that is not
//!   placed keeps its followers off. Units that follow each other in a circle are not placed at all, even if
//!   some of them are somewhere from before: they would chase each other.
//! - Conflicts: neither unit may name the other by a pattern. Who is there first stays. If a unit that is placed
//!   comes to conflict because its file changed, it is the one that names the other that has to go; if both name
//!   each other, the one placed later, then the one with the greater name. A Global unit gives way to any unit that
//!   is scheduled, but a unit is not placed where a Global unit that conflicts with it is.
//! - Replaces: a unit is placed as if those it replaces were not there; they then have to go, and stay away from
//!   that machine while it is there. Where units replace each other in a circle, or a unit would replace one that it has
//!   to follow, none could rest: there Replaces does not count, as in the original for two units.
//! - A machine that is cordoned or being drained takes no unit that is not on it already; what is there stays (and
//!   moves away from a machine being drained, see [`crate::drain`]). This does not concern Global units: as with the
//!   daemon sets of Kubernetes, they stay, and new ones come.
//! - A unit that a machine which is there still reports as running or stopping is placed on no other, so that
//!   there are not two of it.
//! - Where a record can't be read, what it says is not known: of a machine of which that is so no unit has to go, and none comes to it; and
//!   no unit has to go for want of a unit that it follows and of which that is so.
use crate::{
    model::*,
    site::{Places, conflict},
    view::{View, is_placeable},
};
use fleet_unit::UnitName;
use std::collections::BTreeSet;

/// Why a unit does not fit on a machine. Display gives a sentence fragment for users, to stand after the
/// machine's name and a colon.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The machine is gone.
    #[error("it is not there")]
    Gone,
    /// A newer version has written what the machine is like, or that is damaged.
    #[error("what is written of it can't be read by this server")]
    Unreadable,
    /// The machine takes no new units.
    #[error("it is cordoned")]
    Cordoned,
    /// The machine's units are to move away.
    #[error("it is being drained")]
    Draining,
    /// MachineID names another machine.
    #[error("its ID is not {required} (MachineID)")]
    MachineId {
        /// The ID asked for.
        required: String,
    },
    /// The machine's metadata are not what MachineMetadata asks for.
    #[error("{}", metadata_text(.key, .wants, .has))]
    Metadata {
        /// The key.
        key: String,
        /// The values of which it has to have one.
        wants: BTreeSet<String>,
        /// The value it has.
        has: Option<String>,
    },
    /// MachineOf names a unit that is not known.
    #[error("{target} is not known to the cluster (MachineOf)")]
    TargetUnknown {
        /// The unit named.
        target: String,
    },
    /// MachineOf names a unit that is on no machine.
    #[error("{target} is not placed on any machine (MachineOf)")]
    TargetUnplaced {
        /// The unit named.
        target: UnitName,
    },
    /// MachineOf names a unit that is on another machine.
    #[error("{target} is on {machine} (MachineOf)")]
    TargetElsewhere {
        /// The unit named.
        target: UnitName,
        /// Where it is.
        machine: MachineId,
    },
    /// MachineOf names a Global unit that is not wanted on this machine.
    #[error("{target} is a Global unit that does not run here (MachineOf)")]
    TargetNotHere {
        /// The unit named.
        target: UnitName,
    },
    /// A unit that MachineOf names follows, directly or not, this one in turn.
    #[error("{target} in turn has to be where this unit is (MachineOf)")]
    Circle {
        /// The unit named.
        target: String,
    },
    /// A unit there conflicts with it, or it with that.
    #[error("{}", conflict_text(.with, .pattern, *.theirs))]
    Conflict {
        /// The unit there.
        with: UnitName,
        /// The pattern that matches.
        pattern: String,
        /// Whether the pattern is in the other unit's file.
        theirs: bool,
    },
    /// A unit there replaces it.
    #[error("{by}, which is there, replaces it (Replaces={pattern})")]
    Replaced {
        /// The unit there.
        by: UnitName,
        /// The pattern that matches.
        pattern: String,
    },
    /// A unit that has to go along when it moves does not fit.
    #[error("{follower}, which has to be where it is (MachineOf), does not fit: {why}")]
    Follower {
        /// The unit that goes along.
        follower: UnitName,
        /// Why that does not fit.
        why: Box<Misfit>,
    },
    /// It still runs, or is being stopped, on another machine.
    #[error("the unit has not stopped yet on {on}")]
    Stopping {
        /// Where.
        on: MachineId,
    },
}

fn metadata_text(key: &str, wants: &BTreeSet<String>, has: &Option<String>) -> String {
    let wants = wants.iter().map(|value| format!("{key}={value}")).collect::<Vec<_>>().join(" or ");
    match has {
        Some(has) => format!("its metadata has {key}={has}, not {wants} (MachineMetadata)"),
        None => format!("its metadata has no {key}, wanted is {wants} (MachineMetadata)"),
    }
}

fn conflict_text(with: &UnitName, pattern: &str, theirs: bool) -> String {
    if theirs {
        format!("{with}, which is there, conflicts with it (Conflicts={pattern})")
    } else {
        format!("it conflicts with {with}, which is there (Conflicts={pattern})")
    }
}

/// Why a unit is not placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unplaced {
    /// No machine is there at all.
    NoMachines,
    /// It fits on none: the reason for each.
    NoFit(Vec<(MachineId, Misfit)>),
}

/// Why a unit that should be placed is not, or `None` when it is placed, Global, or not meant to be.
///
/// `None` also when a machine fits and it is about to be placed; why that may take a while, the leading engine knows
/// ([`crate::engine::Engine::delay`]). A unit whose machine is gone counts as not
/// placed: it stays on the schedule there until it fits elsewhere or the machine is back.
pub fn explain(view: &View, name: &UnitName) -> Option<Unplaced> {
    let unit = view.unit(name).filter(|unit| is_placeable(name, unit))?;
    let place = view.place(name).map(|(machine, _)| machine);
    if place.is_some_and(|machine| view.may_be_there(machine)) {
        return None;
    }
    if view.machines().next().is_none() {
        return Some(Unplaced::NoMachines);
    }
    let gone = place.map(|machine| (machine.clone(), Misfit::Gone));
    let misfits =
        view.machines().map(|(id, _)| fits_on(view, name, unit, id).err().map(|why| (id.clone(), why)));
    let mut misfits: Vec<_> = misfits.collect::<Option<_>>()?;
    misfits.extend(gone);
    Some(Unplaced::NoFit(misfits))
}

/// Whether a unit fits on a machine, as things are; if it is on it already, whether it may stay.
pub fn fits(view: &View, name: &UnitName, machine: &MachineId) -> Result<(), Misfit> {
    match view.unit(name) {
        Some(unit) => fits_on(view, name, unit, machine),
        None => Ok(()),
    }
}

fn fits_on(places: &impl Places, name: &UnitName, unit: &Unit, id: &MachineId) -> Result<(), Misfit> {
    suits(places, name, unit, id)?;
    if places.site(id).held.contains(name) {
        return Ok(());
    }
    let view = places.view();
    match view.live(view.known(name)).find(|on| *on != id) {
        Some(on) => Err(Misfit::Stopping { on: on.clone() }),
        None => Ok(()),
    }
}

/// Whether all that a unit asks of its place holds on a machine, and the machine takes it.
pub(crate) fn suits(
    places: &impl Places,
    name: &UnitName,
    unit: &Unit,
    id: &MachineId,
) -> Result<(), Misfit> {
    suits_along(places, name, unit, id, &BTreeSet::new())
}

/// As [`suits`], as if the units `along` were on that machine for MachineOf.
pub(crate) fn suits_along(
    places: &impl Places,
    name: &UnitName,
    unit: &Unit,
    id: &MachineId,
    along: &BTreeSet<UnitName>,
) -> Result<(), Misfit> {
    let view = places.view();
    let site = places.site(id);
    let stays = site.held.contains(name);
    if view.is_obscure(id) {
        return if stays { Ok(()) } else { Err(Misfit::Unreadable) };
    }
    let machine = view.machine(id).ok_or(Misfit::Gone)?;
    let requirements = &unit.requirements;
    if let Some(required) = requirements.machine_id.as_ref().filter(|required| !is_named(id, required)) {
        return Err(Misfit::MachineId { required: required.clone() });
    }
    for (key, wants) in &requirements.metadata {
        let has = machine.metadata.get(key);
        if !has.is_some_and(|has| wants.contains(has)) {
            return Err(Misfit::Metadata { key: key.clone(), wants: wants.clone(), has: has.cloned() });
        }
    }
    if !stays && !machine.takes_new_units() {
        return Err(if machine.draining { Misfit::Draining } else { Misfit::Cordoned });
    }
    // First, since "not placed" of each would send the reader round that circle.
    if let Some(target) = in_circle(view, name, unit).filter(|_| !stays) {
        return Err(Misfit::Circle { target: target.to_owned() });
    }
    for target in &requirements.machine_of {
        let target = target.as_str();
        // What it follows may be there.
        if stays
            && [RecordKind::Unit, RecordKind::Schedule]
                .iter()
                .any(|kind| view.unread_record(target, *kind).is_some())
        {
            continue;
        }
        if !site.held.contains(target) && !site.globals.contains(target) && !along.contains(target) {
            return Err(target_misfit(places, target));
        }
    }
    let clash = |other: &UnitName, theirs_only: bool| {
        let own = if theirs_only { None } else { conflict(unit, other) };
        let theirs = view.unit(other).and_then(|unit| conflict(unit, name));
        let pattern = own.or(theirs)?;
        if stays && !yields(places, name, other, own.is_some(), theirs.is_some()) {
            return None;
        }
        let pattern = pattern.as_str().to_owned();
        Some(Misfit::Conflict { with: other.clone(), pattern, theirs: own.is_none() })
    };
    let found = if requirements.conflicts.is_empty() {
        let picky = view.picky_globals().iter().filter(|other| site.globals.contains(*other));
        site.picky.iter().chain(picky).filter(|other| *other != name).find_map(|other| clash(other, true))
    } else {
        let all = site.held.iter().chain(&site.globals);
        all.filter(|other| *other != name).find_map(|other| clash(other, false))
    };
    if let Some(misfit) = found {
        return Err(misfit);
    }
    for by in site.replacers.iter().filter(|by| *by != name) {
        if let Some(pattern) = replaces(view, by, name) {
            return Err(Misfit::Replaced { by: by.clone(), pattern: pattern.to_owned() });
        }
    }
    Ok(())
}

/// Whether a machine is the one named: by its whole ID or, as the original allowed, its first 8 digits.
fn is_named(id: &MachineId, required: &str) -> bool {
    required == id.as_str() || (required.len() == SHORT && id.as_str().starts_with(required))
}

/// Digits of the short form of a machine's ID.
const SHORT: usize = 8;

/// The machines that are there and that MachineID may mean.
pub(crate) fn named_machines<'a>(view: &'a View, required: &'a str) -> impl Iterator<Item = &'a MachineId> {
    view.machines_like(required).map(|(id, _)| id).filter(move |id| is_named(id, required))
}

fn target_misfit(places: &impl Places, target: &str) -> Misfit {
    let Some((name, unit)) = places.view().unit_named(target) else {
        return Misfit::TargetUnknown { target: target.to_owned() };
    };
    if unit.requirements.global {
        return Misfit::TargetNotHere { target: name.clone() };
    }
    match places.place_of(target).filter(|_| is_placeable(name, unit)) {
        Some((machine, _)) => Misfit::TargetElsewhere { target: name.clone(), machine: machine.clone() },
        None => Misfit::TargetUnplaced { target: name.clone() },
    }
}

/// The unit named in MachineOf that in turn follows this one, if there is one.
fn in_circle<'a>(view: &View, name: &UnitName, unit: &'a Unit) -> Option<&'a str> {
    let targets = &unit.requirements.machine_of;
    if targets.is_empty() || view.followers(name).next().is_none() {
        return None;
    }
    targets.iter().map(String::as_str).find(|target| follows(view, target, name))
}

/// Whether a unit is, or has to be where, directly or not, another one is.
fn follows(view: &View, name: &str, other: &UnitName) -> bool {
    let mut seen = BTreeSet::from([name]);
    let mut open = vec![name];
    while let Some(name) = open.pop() {
        if name == other.as_str() {
            return true;
        }
        let targets = view.unit_named(name).map_or(&[][..], |(_, unit)| &unit.requirements.machine_of);
        open.extend(targets.iter().map(String::as_str).filter(|target| seen.insert(target)));
    }
    false
}

/// Of two units that are both on a machine and conflict, whether this one has to go. `own`: it names the other;
/// `theirs`: the other names it.
fn yields(places: &impl Places, name: &UnitName, other: &UnitName, own: bool, theirs: bool) -> bool {
    if places.view().unit(other).is_some_and(|unit| unit.requirements.global) {
        return false;
    }
    let age = |name: &UnitName| places.place_of(name.as_str()).map(|(_, revision)| revision);
    match (own, theirs) {
        (true, false) => true,
        (false, true) => false,
        _ => (age(name), name) > (age(other), other),
    }
}

/// The pattern by which a unit replaces another, if that counts: not where the other, through Replaces and
/// MachineOf, decides over the place of the first.
pub(crate) fn replaces<'a>(view: &'a View, by: &UnitName, name: &UnitName) -> Option<&'a str> {
    let mut patterns = view.unit(by)?.requirements.replaces.iter();
    let pattern = patterns.find(|pattern| pattern.matches(name.as_str()))?;
    (by != name && !decides_over(view, name, by)).then_some(pattern.as_str())
}

/// Whether a unit's place, directly or not, decides over that of another.
fn decides_over(view: &View, name: &UnitName, other: &UnitName) -> bool {
    let mut seen = BTreeSet::from([name]);
    let mut open = vec![name];
    while let Some(name) = open.pop() {
        let mut next: Vec<&UnitName> = view.followers(name).collect();
        if let Some(unit) = view.unit(name).filter(|unit| !unit.requirements.replaces.is_empty()) {
            // Of all that it may replace only these can lead further.
            let followed = view.followed().filter_map(|name| Some(view.unit_named(name)?.0));
            let leading = view.replacers().iter().chain(followed).chain([other]);
            let matches = |name: &&UnitName| {
                unit.requirements.replaces.iter().any(|pattern| pattern.matches(name.as_str()))
            };
            next.extend(leading.filter(matches));
        }
        for name in next {
            if name == other {
                return true;
            }
            if seen.insert(name) {
                open.push(name);
            }
        }
    }
    false
}

#[cfg(test)]
mod tests;
