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
//!
//! Records are JSON objects, each with its own format number, so that servers of version N and N-1 can
//! work on one registry: fields may be added within a format, and are ignored by who does not know them;
//! what an older server would misunderstand takes a new format, which it refuses record by record.
use crate::store::{Event, Op, Snapshot};
use fleet_cluster::model::*;
use fleet_unit::{Hash, Requirements, UnitFile, UnitName};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// The format of the records this code writes, and the newest it reads.
pub const FORMAT: u32 = 1;

/// What keys of units begin with.
pub const UNITS: &str = "unit/";
/// What keys of the schedule begin with.
pub const SCHEDULE: &str = "schedule/";
/// What keys of metadata edits begin with.
pub const MACHINES: &str = "machine/";
/// What keys of machines' presences begin with.
pub const PRESENCES: &str = "presence/";
/// What keys of machines' reports begin with.
pub const STATES: &str = "states/";
/// The key of the [`FormatRecord`].
pub const FORMAT_KEY: &str = "format";

/// A unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct UnitRecord {
    pub format: u32,
    /// The text of its file, byte for byte.
    pub file: Arc<str>,
    pub desired: DesiredState,
}

/// Where a unit is placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ScheduleRecord {
    pub format: u32,
    pub machine: MachineId,
}

/// Edits of a machine's metadata made at run time: a value sets a key, `None` hides what the machine's
/// configuration says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MachineRecord {
    pub format: u32,
    pub metadata: BTreeMap<String, Option<String>>,
}

/// What a machine says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PresenceRecord {
    pub format: u32,
    pub public_ip: String,
    pub metadata: BTreeMap<String, String>,
    pub version: String,
}

/// All that a machine reports of its units. The reports are rows without field names, since there can
/// be many and they are written often.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct StatesRecord {
    pub format: u32,
    pub units: Vec<StatesRow>,
}

/// One unit's report: name, current state, hash of the file (40 hexadecimal digits), load, active and
/// sub state, problem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatesRow(
    pub UnitName,
    pub CurrentState,
    pub String,
    pub String,
    pub String,
    pub String,
    pub Option<String>,
);

/// The format of the registry as a whole: what servers that join have to know at least.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct FormatRecord {
    pub format: u32,
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
pub fn put_unit(name: &UnitName, file: &UnitFile, desired: DesiredState) -> Op {
    put(unit_key(name), &UnitRecord { format: FORMAT, file: file.shared_text(), desired }, None)
}
/// Writes a unit's entry in the schedule.
pub fn put_schedule(name: &UnitName, machine: &MachineId) -> Op {
    put(schedule_key(name), &ScheduleRecord { format: FORMAT, machine: machine.clone() }, None)
}
/// Writes what a machine reports.
pub fn put_states(id: &MachineId, reports: &BTreeMap<UnitName, UnitReport>, lease: crate::LeaseId) -> Op {
    let row = |(name, report): (&UnitName, &UnitReport)| {
        let SystemdState { load, active, sub } = report.systemd.clone();
        let problem = report.problem.clone();
        StatesRow(name.clone(), report.current, report.hash.to_string(), load, active, sub, problem)
    };
    let units = reports.iter().map(row).collect();
    put(states_key(id), &StatesRecord { format: FORMAT, units }, Some(lease))
}
/// Writes a machine's presence.
pub fn put_presence(id: &MachineId, record: &PresenceRecord, lease: crate::LeaseId) -> Op {
    put(presence_key(id), record, Some(lease))
}
/// Writes a machine's metadata edits.
pub fn put_machine(id: &MachineId, record: &MachineRecord) -> Op {
    put(machine_key(id), record, None)
}
/// Writes the format of the registry as a whole.
pub fn put_format() -> Op {
    put(FORMAT_KEY.to_owned(), &FormatRecord { format: FORMAT }, None)
}

fn put(key: String, record: &impl Serialize, lease: Option<crate::LeaseId>) -> Op {
    // Structs of strings, numbers and maps with string keys: there is nothing JSON can't hold.
    let value = serde_json::to_vec(record).expect("a record is always valid JSON");
    Op::Put { key, value, lease }
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
    /// Reads a snapshot: the changes that lead from an empty view to it. What was read before is
    /// forgotten.
    pub fn snapshot(&mut self, snapshot: &Snapshot) -> (Vec<Change>, Vec<RecordError>) {
        *self = Self::default();
        let (mut changes, mut errors) = (Vec::with_capacity(snapshot.entries.len()), Vec::new());
        // In key order edits come before presences, so that each machine is one change.
        for entry in &snapshot.entries {
            match self.read(&entry.key, Some((&entry.value, entry.revision))) {
                Ok(change) => changes.extend(change),
                Err(error) => errors.push(error),
            }
        }
        (changes, errors)
    }

    /// Reads one event. `None`: it changes nothing a view shows. After an error the view keeps what it had
    /// under that key.
    pub fn event(&mut self, event: &Event) -> Result<Option<Change>, RecordError> {
        self.read(&event.key, event.entry.as_ref().map(|e| (&*e.value, e.revision)))
    }

    /// A machine's edits, with the revision guard left to the caller.
    pub fn edits(&self, id: &MachineId) -> Option<&MachineRecord> {
        self.edits.get(id)
    }

    fn read(&mut self, key: &str, put: Option<(&[u8], Revision)>) -> Result<Option<Change>, RecordError> {
        self.change(key, put).map_err(|reason| RecordError { key: key.to_owned(), reason })
    }

    fn change(&mut self, key: &str, put: Option<(&[u8], Revision)>) -> Result<Option<Change>, String> {
        let Some((kind, id)) = key.split_once('/') else {
            if let (FORMAT_KEY, Some((value, _))) = (key, put) {
                parse::<FormatRecord>(value)?;
            }
            return Ok(None);
        };
        let value = put.map(|(value, _)| value);
        let change = match kind {
            "unit" => {
                let name = unit_name(id)?;
                let unit = put.map(|(value, revision)| unit(&name, value, revision)).transpose()?;
                Change::Unit(name, unit)
            }
            "schedule" => {
                let place = put.map(|(value, revision)| {
                    parse::<ScheduleRecord>(value).map(|record| (record.machine, revision))
                });
                Change::Schedule(unit_name(id)?, place.transpose()?)
            }
            "states" => {
                let reports = value.map_or(Ok(BTreeMap::new()), reports)?;
                Change::States(machine_id(id)?, reports)
            }
            "presence" => {
                let id = machine_id(id)?;
                match value.map(parse::<PresenceRecord>).transpose()? {
                    Some(record) => self.presence.insert(id.clone(), record),
                    None => self.presence.remove(&id),
                };
                let machine = self.machine(&id);
                Change::Machine(id, machine)
            }
            "machine" => {
                let id = machine_id(id)?;
                match value.map(parse::<MachineRecord>).transpose()? {
                    Some(record) => self.edits.insert(id.clone(), record),
                    None => self.edits.remove(&id),
                };
                match self.machine(&id) {
                    Some(machine) => Change::Machine(id, Some(machine)),
                    // Not there: only remembered for when it comes.
                    None => return Ok(None),
                }
            }
            // Of a newer version, which knows what it is for
            _ => return Ok(None),
        };
        Ok(Some(change))
    }

    /// A machine that is there: what it says of itself, with the edits over it.
    fn machine(&self, id: &MachineId) -> Option<Machine> {
        let PresenceRecord { public_ip, metadata, version, .. } = self.presence.get(id)?.clone();
        let mut machine = Machine { public_ip, metadata, version };
        for (key, value) in self.edits.get(id).iter().flat_map(|e| &e.metadata) {
            match value {
                Some(value) => machine.metadata.insert(key.clone(), value.clone()),
                None => machine.metadata.remove(key),
            };
        }
        Some(machine)
    }
}

fn unit_name(text: &str) -> Result<UnitName, String> {
    UnitName::parse(text).map_err(|e| e.to_string())
}

fn machine_id(text: &str) -> Result<MachineId, String> {
    MachineId::parse(text).map_err(|e| e.to_string())
}

fn unit(name: &UnitName, value: &[u8], revision: Revision) -> Result<Unit, String> {
    let record: UnitRecord = parse(value)?;
    let file = UnitFile::parse(&record.file).map_err(|e| format!("line {}: {e}", e.line()))?;
    let requirements = Requirements::of(name, &file).map_err(|e| e.to_string())?;
    Ok(Unit { file, requirements: Arc::new(requirements), desired: record.desired, revision })
}

fn reports(value: &[u8]) -> Result<BTreeMap<UnitName, UnitReport>, String> {
    let record: StatesRecord = parse(value)?;
    let report = |StatesRow(name, current, hash, load, active, sub, problem)| {
        let hash = Hash::parse(&hash).ok_or_else(|| format!("{hash:?} of {name} is not a hash"))?;
        let systemd = SystemdState { load, active, sub };
        Ok((name, UnitReport { current, hash, systemd, problem }))
    };
    record.units.into_iter().map(report).collect()
}

/// Reads a record, unless it is of a newer format.
fn parse<R: DeserializeOwned>(value: &[u8]) -> Result<R, String> {
    // Looked at first: a newer record may have the same fields and yet another meaning.
    let FormatRecord { format } = serde_json::from_slice(value).map_err(|e| format!("not a record: {e}"))?;
    if format == 0 || format > FORMAT {
        return Err(format!(
            "format {format} is unknown here (known: up to {FORMAT}); is it of a newer fleetd?"
        ));
    }
    serde_json::from_slice(value).map_err(|e| format!("not a record: {e}"))
}
