//! Everything a server knows, in memory, with its indexes.
use crate::model::*;
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet};

/// The view: a value built of [`Change`]s.
#[derive(Clone, Debug, Default)]
pub struct View {}

/// What a change meant, so that work can follow it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// For every machine, the units of which what it has to hold may have changed.
    pub wanted: BTreeMap<MachineId, BTreeSet<UnitName>>,
    /// Units whose record, place, current state or reported states changed.
    pub units: BTreeSet<UnitName>,
    /// Machines that came, changed or went.
    pub machines: BTreeSet<MachineId>,
}

impl View {
    /// Applies one change.
    pub fn apply(&mut self, _change: Change) -> Effects {
        todo!()
    }
    /// A unit.
    pub fn unit(&self, _name: &UnitName) -> Option<&Unit> {
        todo!()
    }
    /// All units, by name.
    pub fn units(&self) -> impl Iterator<Item = (&UnitName, &Unit)> {
        std::iter::empty()
    }
    /// The machine a unit is placed on, with the revision of that decision.
    pub fn place(&self, _name: &UnitName) -> Option<(&MachineId, Revision)> {
        todo!()
    }
    /// The machines that are there, by ID.
    pub fn machines(&self) -> impl Iterator<Item = (&MachineId, &Machine)> {
        std::iter::empty()
    }
    /// One machine.
    pub fn machine(&self, _id: &MachineId) -> Option<&Machine> {
        todo!()
    }
    /// All reports, by unit name and machine ID.
    pub fn reports(&self) -> impl Iterator<Item = (&UnitName, &MachineId, &UnitReport)> {
        std::iter::empty()
    }
    /// The reports of one unit, by machine ID.
    pub fn reports_of(&self, _name: &UnitName) -> impl Iterator<Item = (&MachineId, &UnitReport)> {
        std::iter::empty()
    }
    /// How far a unit has come: what the machine it is placed on reports, for the file it has now; else inactive.
    pub fn current(&self, _name: &UnitName) -> CurrentState {
        todo!()
    }
    /// What a machine has to hold of a unit, if anything: placed there, or Global and fitting.
    pub fn wanted(&self, _machine: &MachineId, _name: &UnitName) -> Option<Wanted> {
        todo!()
    }
    /// All a machine has to hold.
    pub fn all_wanted(&self, _machine: &MachineId) -> BTreeMap<UnitName, Wanted> {
        todo!()
    }
}
