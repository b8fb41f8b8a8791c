//! Moving the units of a machine away from it.
//!
//! A machine is drained by marking it so; it takes no new units from then on. The engine takes its units off a few at
//! a time: a unit whose turn it is, and that fits on another machine as things are, is taken off, and its machine stops
//! it; when that is reported it is placed as any unit is. A unit that does not run goes in one step. Units that follow it
//! by MachineOf, and those that follow these, go along, so it counts as fitting only where all of them do.
//!
//! What fits nowhere else stays and runs on; [`drain_status`] says why. Global units stay too: they
//! belong to each machine, whatever becomes of the others (see [`crate::placement`]).
use crate::{
    model::*,
    placement::{Misfit, suits, suits_along},
    site::Places,
    view::{View, is_placeable},
};
use fleet_unit::UnitName;
use std::collections::BTreeSet;

/// How far the units of a machine have moved away from it. All lists are by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DrainStatus {
    /// Units taken off that still run, or are being stopped, there.
    pub stopping: Vec<UnitName>,
    /// Units still there that fit elsewhere, and go when it is their turn; units that go along with them, too.
    pub to_move: Vec<UnitName>,
    /// Units that stay because they have nowhere to go.
    pub undrained: Vec<Undrained>,
}

/// A unit that has nowhere to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undrained {
    /// The unit.
    pub unit: UnitName,
    /// Every other machine that is there, by ID, with the reason why the unit does not fit on it.
    pub why: Vec<(MachineId, Misfit)>,
}

impl DrainStatus {
    /// Whether nothing more will happen unless something else changes. Then what is undrained stays.
    pub fn is_at_rest(&self) -> bool {
        self.stopping.is_empty() && self.to_move.is_empty()
    }
    /// Whether no unit but Global ones is left.
    pub fn is_empty(&self) -> bool {
        self.is_at_rest() && self.undrained.is_empty()
    }
}

/// How far the units of a machine have moved away; before a drain, how that would go.
pub fn drain_status(view: &View, machine: &MachineId) -> DrainStatus {
    let held = &view.site(machine).held;
    let mut moving = BTreeSet::new();
    let mut stuck = Vec::new();
    for (name, unit) in held.iter().filter_map(|name| Some((name, view.unit(name)?))) {
        let along = companions(view, name, machine);
        let others = view.machines().filter(|(id, _)| *id != machine);
        let misfits = others.map(|(id, _)| Some((id.clone(), could_go(view, name, unit, &along, id).err()?)));
        match misfits.collect::<Option<Vec<_>>>() {
            Some(why) => stuck.push(Undrained { unit: name.clone(), why }),
            None => moving.extend(along),
        }
    }
    stuck.retain(|undrained| !moving.contains(&undrained.unit));
    let stopping = view.reported_on(machine).chain(view.leaving_from(machine)).filter(|name| {
        let known = view.known(name);
        let global = known.unit.is_some_and(|unit| unit.requirements.global);
        !global && !held.contains(*name) && view.live(known).any(|on| on == machine)
    });
    let stopping: BTreeSet<_> = stopping.cloned().collect();
    DrainStatus {
        stopping: stopping.into_iter().collect(),
        to_move: moving.into_iter().collect(),
        undrained: stuck,
    }
}

/// A unit on a machine and all that have to be where it is and are there, by any number of steps.
pub(crate) fn companions(places: &impl Places, name: &UnitName, at: &MachineId) -> BTreeSet<UnitName> {
    let held = &places.site(at).held;
    let mut found = BTreeSet::from([name.clone()]);
    let mut open = vec![name.clone()];
    while let Some(name) = open.pop() {
        for follower in places.view().followers(&name).filter(|follower| held.contains(*follower)) {
            if found.insert(follower.clone()) {
                open.push(follower.clone());
            }
        }
    }
    found
}

/// Whether a unit fits on a machine it is not on, together with its [`companions`]; nothing is said of copies that
/// have to stop first.
pub(crate) fn could_go(
    places: &impl Places,
    name: &UnitName,
    unit: &Unit,
    along: &BTreeSet<UnitName>,
    to: &MachineId,
) -> Result<(), Misfit> {
    suits(places, name, unit, to)?;
    for follower in along.iter().filter(|follower| *follower != name) {
        let Some(unit) = places.view().unit(follower) else { continue };
        suits_along(places, follower, unit, to, along)
            .map_err(|why| Misfit::Follower { follower: follower.clone(), why: Box::new(why) })?;
    }
    Ok(())
}

/// Whether a unit that was taken off a machine being drained is still on its way: it has not stopped there, or
/// has not come up, or failed to, where it is now.
pub(crate) fn is_on_its_way(view: &View, name: &UnitName, from: &MachineId) -> bool {
    let known = view.known(name);
    // Others must not wait for it.
    let unread = view.undecidable(name).is_some();
    let Some(unit) = known.unit.filter(|unit| !unread && is_placeable(name, unit)) else { return false };
    let Some((to, _)) = known.place else { return true };
    if to == from || view.machine(to).is_none() || view.is_unread(to, RecordKind::States) {
        return false;
    }
    let report = view.reports_of(name).find(|(id, _)| *id == to).map(|(_, report)| report);
    let Some(report) = report.filter(|report| report.hash == unit.file.hash()) else { return true };
    let up = report.current >= unit.desired && report.systemd.active != "activating";
    !up && report.problem.is_none()
}

#[cfg(test)]
mod tests;
