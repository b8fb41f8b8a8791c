//! Which machine a unit fits on, and why not.
use crate::{model::*, view::View};
use fleet_unit::UnitName;

/// Why a unit does not fit on a machine. Display gives a sentence fragment for users.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("todo")]
pub struct Misfit;

/// Why a unit is not placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unplaced {
    /// No machine is there at all.
    NoMachines,
    /// It fits on none: the reason for each.
    NoFit(Vec<(MachineId, Misfit)>),
}

/// Why a unit that should be placed is not, or `None` when it is placed, Global, or not meant to be.
pub fn explain(_view: &View, _name: &UnitName) -> Option<Unplaced> {
    todo!()
}
