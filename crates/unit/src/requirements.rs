//! The [X-Fleet] section.
use crate::{Glob, UnitFile, UnitName};
use std::collections::{BTreeMap, BTreeSet};

/// What a unit asks of its place, read from [X-Fleet] with specifiers expanded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requirements {
    /// `MachineID=`: the machine ID it must be on.
    pub machine_id: Option<String>,
    /// `MachineOf=`: units whose machine it must be on.
    pub machine_of: Vec<String>,
    /// `MachineMetadata=`: for every key, the values of which one must be there.
    pub metadata: BTreeMap<String, BTreeSet<String>>,
    /// `Conflicts=`: patterns of units it must not share a machine with.
    pub conflicts: Vec<Glob>,
    /// `Replaces=`: patterns of units that are to move away for it.
    pub replaces: Vec<Glob>,
    /// `Global=`: on every machine that fits.
    pub global: bool,
}

/// Options that contradict each other; texts as the original's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("todo")]
pub struct RequirementError;

impl Requirements {
    /// Reads and checks the section.
    pub fn of(_name: &UnitName, _file: &UnitFile) -> Result<Self, RequirementError> {
        todo!()
    }
    /// Whether there is no requirement at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Names of options in [X-Fleet] that fleet does not know, in order.
pub fn unknown_options(_file: &UnitFile) -> Vec<String> {
    todo!()
}
