//! Keys and the versioned records under them.
//!
//! | key | record | lease |
//! |---|---|---|
//! | `unit/NAME` | [`UnitRecord`]: text and desired state | – |
//! | `schedule/NAME` | [`ScheduleRecord`]: the machine | – |
//! | `machine/ID` | [`MachineRecord`]: edits of the metadata | – |
//! | `presence/ID` | [`PresenceRecord`]: address, metadata as configured, version | the machine's |
//! | `states/ID` | [`StatesRecord`]: all unit reports of the machine | the machine's |
//! | `format` | [`FormatRecord`] | – |
use crate::store::{Event, Op, Snapshot};
use fleet_cluster::model::*;
use fleet_unit::{UnitFile, UnitName};
use std::collections::{BTreeMap, HashMap};

/// Edits of a machine's metadata made at run time: a value sets a key, `None` hides what the machine's
/// configuration says.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub struct MachineRecord {
    pub format: u32,
    pub metadata: BTreeMap<String, Option<String>>,
}

/// What a machine says of itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs)]
pub struct PresenceRecord {
    pub format: u32,
    pub public_ip: String,
    pub metadata: BTreeMap<String, String>,
    pub version: String,
}

/// The key of a unit's record.
pub fn unit_key(name: &UnitName) -> String {
    format!("unit/{name}")
}
/// The key of a unit's entry in the schedule.
pub fn schedule_key(name: &UnitName) -> String {
    format!("schedule/{name}")
}
/// The key of a machine's metadata edits.
pub fn machine_key(id: &MachineId) -> String {
    format!("machine/{id}")
}
/// The key of a machine's presence.
pub fn presence_key(id: &MachineId) -> String {
    format!("presence/{id}")
}
/// The key of what a machine reports.
pub fn states_key(id: &MachineId) -> String {
    format!("states/{id}")
}

/// Writes a unit's record.
pub fn put_unit(_name: &UnitName, _file: &UnitFile, _desired: DesiredState) -> Op {
    todo!()
}
/// Writes a unit's entry in the schedule.
pub fn put_schedule(_name: &UnitName, _machine: &MachineId) -> Op {
    todo!()
}
/// Writes what a machine reports.
pub fn put_states(_id: &MachineId, _reports: &BTreeMap<UnitName, UnitReport>, _lease: crate::LeaseId) -> Op {
    todo!()
}
/// Writes a machine's presence.
pub fn put_presence(_id: &MachineId, _record: &PresenceRecord, _lease: crate::LeaseId) -> Op {
    todo!()
}
/// Writes a machine's metadata edits.
pub fn put_machine(_id: &MachineId, _record: &MachineRecord) -> Op {
    todo!()
}

/// Turns entries and events of the store into [`Change`]s of the view. It keeps what it needs to put
/// records together (a machine is its presence with its edits).
#[derive(Debug, Default)]
pub struct Reader {
    presence: HashMap<MachineId, PresenceRecord>,
    edits: HashMap<MachineId, MachineRecord>,
}

/// A record that can't be read; the rest goes on working.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("registry record {key}: {reason}")]
#[allow(missing_docs)]
pub struct RecordError {
    pub key: String,
    pub reason: String,
}

impl Reader {
    /// Reads a snapshot: the changes that lead from an empty view to it.
    pub fn snapshot(&mut self, _snapshot: &Snapshot) -> (Vec<Change>, Vec<RecordError>) {
        todo!()
    }
    /// Reads one event.
    pub fn event(&mut self, _event: &Event) -> Result<Option<Change>, RecordError> {
        todo!()
    }
    /// A machine's edits, with the revision guard left to the caller.
    pub fn edits(&self, id: &MachineId) -> Option<&MachineRecord> {
        self.edits.get(id)
    }
}
