//! Keys and the versioned records under them.
//!
//! | key | record | lease |
//! |---|---|---|
//! | `unit/NAME` | [`UnitRecord`]: text and desired state | – |
//! | `schedule/NAME` | [`ScheduleRecord`]: the machine | – |
//! | `leaving/NAME` | [`LeavingRecord`]: the machine that a unit with OnIsolation=stop was taken off, until it says that nothing of it runs | – |
//! | `machine/ID` | [`MachineRecord`]: what operators say of it: edits of the metadata, cordon, drain | – |
//! | `presence/ID` | [`PresenceRecord`]: address, metadata as configured, version | the machine's |
//! | `states/ID` | [`StatesRecord`]: all unit reports of the machine | the machine's |
//! | `format` | [`FormatRecord`] | – |
//!
//! Records are JSON objects, each with its own format number, so that servers of version N and N-1 can
//! work on one registry: fields may be added within a format, and are ignored by who does not know them;
//! what an older server would misunderstand takes a new format, which it refuses record by record.
//!
//! # How a machine leaves on purpose
//!
//! A machine whose presence record is simply gone has vanished: its lease ran out. One that leaves has said so before:
//! the server writes its presence once more with `leaving` (from then on nothing new is placed there), and then
//! revokes its lease, which takes presence and states away: that is [`Change::Farewell`]. Should the server die in between,
//! the lease runs out, and it is a farewell all the same. An agent gives notice only when none of its units with
//! OnIsolation=stop runs any more (see [`fleet_cluster::fencing::may_leave`]), since they may be started elsewhere at
//! once. A machine that comes back writes its presence without `leaving`.
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
/// What keys of units that were taken off a machine begin with, until it says that nothing of them runs there.
pub const LEAVING: &str = "leaving/";
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

/// Which machine may still run a unit with OnIsolation=stop that was taken off there. It is written with the change that takes the
/// unit off, and deleted when the machine has said, knowing of that, that nothing of it runs; or when the unit is placed again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct LeavingRecord {
    pub format: u32,
    pub machine: MachineId,
}

/// What operators say of a machine. It outlives the machine's presence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MachineRecord {
    pub format: u32,
    /// Edits of its metadata: a value sets a key, `None` hides what the machine's configuration says.
    pub metadata: BTreeMap<String, Option<String>>,
    /// No new unit is placed there.
    #[serde(default, skip_serializing_if = "is_not_set")]
    pub cordoned: bool,
    /// Its units are to move away; as good as cordoned, too.
    #[serde(default, skip_serializing_if = "is_not_set")]
    pub draining: bool,
    /// Fields of newer versions: the record is read, changed and written back, which must not lose them.
    #[serde(flatten)]
    pub unknown: BTreeMap<String, serde_json::Value>,
}

/// What a machine says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PresenceRecord {
    pub format: u32,
    pub public_ip: String,
    pub metadata: BTreeMap<String, String>,
    pub version: String,
    /// The server that has its session, by the ID of that one's machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<MachineId>,
    /// It is about to give its presence up on purpose; see the module.
    #[serde(default, skip_serializing_if = "is_not_set")]
    pub leaving: bool,
    /// The lease that it is written under, so that another server can end it: who renews it has to find out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<crate::LeaseId>,
}

/// Flags that are not set are not written, so that records look as before there were flags.
fn is_not_set(flag: &bool) -> bool {
    !flag
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
/// The key of the machine that may still run a unit that was taken off there.
pub fn leaving_key(name: &UnitName) -> String {
    format!("leaving/{name}")
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
/// Writes which machine may still run a unit that is taken off there.
pub fn put_leaving(name: &UnitName, machine: &MachineId) -> Op {
    put(leaving_key(name), &LeavingRecord { format: FORMAT, machine: machine.clone() }, None)
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
/// Writes a machine's presence, and in it the lease.
pub fn put_presence(id: &MachineId, record: &PresenceRecord, lease: crate::LeaseId) -> Op {
    let record = PresenceRecord { lease: Some(lease), ..record.clone() };
    put(presence_key(id), &record, Some(lease))
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

/// What a record with this key is about, if it is one that placement rests on. A key that fleet does not write names none.
pub fn record_of(key: &str) -> Option<Record> {
    let (kind, id) = key.split_once('/')?;
    let kind = match kind {
        "unit" => RecordKind::Unit,
        "schedule" => RecordKind::Schedule,
        "leaving" => RecordKind::Leaving,
        "machine" => RecordKind::Machine,
        "presence" => RecordKind::Presence,
        "states" => RecordKind::States,
        _ => return None,
    };
    Some(match kind {
        RecordKind::Unit | RecordKind::Schedule | RecordKind::Leaving => {
            Record::OfUnit(kind, unit_name(id).ok()?)
        }
        RecordKind::Machine | RecordKind::Presence | RecordKind::States => {
            Record::OfMachine(kind, machine_id(id).ok()?)
        }
    })
}

/// A record that can't be read; the rest goes on working.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("registry record {key}: {reason}")]
#[allow(missing_docs)]
pub struct RecordError {
    pub key: String,
    pub reason: String,
    pub revision: Revision,
}

impl RecordError {
    /// That the record can't be read, as a view is told. `None` where nothing rests on it.
    pub fn change(&self) -> Option<Change> {
        let why = Unreadable { reason: self.reason.clone(), revision: self.revision };
        Some(Change::Unread(record_of(&self.key)?, Some(why)))
    }
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
        let revision = put.map(|(_, revision)| revision).unwrap_or_default();
        self.change(key, put).map_err(|reason| RecordError { key: key.to_owned(), reason, revision })
    }

    fn change(&mut self, key: &str, put: Option<(&[u8], Revision)>) -> Result<Option<Change>, String> {
        let Some((kind, id)) = key.split_once('/') else {
            if let (FORMAT_KEY, Some((value, _))) = (key, put) {
                read_record::<FormatRecord>(value)?;
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
                    read_record::<ScheduleRecord>(value).map(|record| (record.machine, revision))
                });
                Change::Schedule(unit_name(id)?, place.transpose()?)
            }
            "leaving" => {
                let from = put.map(|(value, revision)| {
                    read_record::<LeavingRecord>(value).map(|record| (record.machine, revision))
                });
                Change::Leaving(unit_name(id)?, from.transpose()?)
            }
            "states" => {
                let reports = value.map_or(Ok(BTreeMap::new()), reports)?;
                Change::States(machine_id(id)?, reports)
            }
            "presence" => {
                let id = machine_id(id)?;
                let before = match value.map(read_record::<PresenceRecord>).transpose()? {
                    Some(record) => self.presence.insert(id.clone(), record),
                    None => self.presence.remove(&id),
                };
                match self.machine(&id) {
                    None if before.is_some_and(|before| before.leaving) => Change::Farewell(id),
                    machine => Change::Machine(id, machine),
                }
            }
            "machine" => {
                let id = machine_id(id)?;
                match value.map(read_record::<MachineRecord>).transpose()? {
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
        let PresenceRecord { public_ip, metadata, version, leaving, .. } = self.presence.get(id)?.clone();
        let edits = self.edits.get(id);
        let draining = edits.is_some_and(|edits| edits.draining);
        let cordoned = leaving || draining || edits.is_some_and(|edits| edits.cordoned);
        let mut machine = Machine { public_ip, metadata, version, cordoned, draining };
        for (key, value) in edits.iter().flat_map(|e| &e.metadata) {
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

/// As fleet writes it: a key in other letters would be another record of the same machine.
fn machine_id(text: &str) -> Result<MachineId, String> {
    let id = MachineId::parse(text).map_err(|e| e.to_string())?;
    if id.as_str() == text { Ok(id) } else { Err(format!("machine IDs are lower-case: {id}")) }
}

fn unit(name: &UnitName, value: &[u8], revision: Revision) -> Result<Unit, String> {
    let record: UnitRecord = read_record(value)?;
    let file = UnitFile::parse(&record.file).map_err(|e| format!("line {}: {e}", e.line()))?;
    let requirements = Requirements::of_accepted(name, &file).map_err(|e| e.to_string())?;
    Ok(Unit { file, requirements: Arc::new(requirements), desired: record.desired, revision })
}

fn reports(value: &[u8]) -> Result<BTreeMap<UnitName, UnitReport>, String> {
    let record: StatesRecord = read_record(value)?;
    let report = |StatesRow(name, current, hash, load, active, sub, problem)| {
        let hash = Hash::parse(&hash).ok_or_else(|| format!("{hash:?} of {name} is not a hash"))?;
        let systemd = SystemdState { load, active, sub };
        Ok((name, UnitReport { current, hash, systemd, problem }))
    };
    record.units.into_iter().map(report).collect()
}

/// Reads a record, unless it is of a newer format; the error says why it can't be read.
pub fn read_record<R: DeserializeOwned>(value: &[u8]) -> Result<R, String> {
    // Looked at first: a newer record may have the same fields and yet another meaning.
    let FormatRecord { format } = serde_json::from_slice(value).map_err(|e| format!("not a record: {e}"))?;
    if format == 0 || format > FORMAT {
        return Err(format!(
            "format {format} is unknown here (known: up to {FORMAT}); is it of a newer fleetd?"
        ));
    }
    serde_json::from_slice(value).map_err(|e| format!("not a record: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Entry, LeaseId};

    const TEXT: &str =
        "[Unit]\nDescription=é\n# kept\n\n[Service]\nExecStart=/bin/sleep \\\n  1\n[X-Fleet]\nConflicts=a*\n";

    fn name(text: &str) -> UnitName {
        UnitName::parse(text).unwrap()
    }
    fn id(digit: char) -> MachineId {
        MachineId::parse(&digit.to_string().repeat(32)).unwrap()
    }
    fn map<V: Clone>(pairs: &[(&str, V)]) -> BTreeMap<String, V> {
        pairs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect()
    }
    fn entry(op: &Op, revision: Revision) -> Entry {
        let Op::Put { key, value, .. } = op else { panic!("{op:?} writes nothing") };
        Entry { key: key.as_str().into(), value: value.clone().into(), revision }
    }
    fn put_event(op: &Op, revision: Revision) -> Event {
        let entry = entry(op, revision);
        Event { key: entry.key.clone(), entry: Some(entry) }
    }
    fn deletion(key: &str) -> Event {
        Event { key: key.into(), entry: None }
    }
    fn raw(key: &str, value: &str) -> Event {
        let entry = Entry { key: key.into(), value: value.as_bytes().into(), revision: 1 };
        Event { key: key.into(), entry: Some(entry) }
    }
    fn presence(metadata: &[(&str, &str)]) -> PresenceRecord {
        let metadata = metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let (public_ip, version) = ("10.0.0.1".into(), "2.0.0".into());
        PresenceRecord {
            format: FORMAT,
            public_ip,
            metadata,
            version,
            server: None,
            leaving: false,
            lease: None,
        }
    }
    fn edits(edits: &[(&str, Option<&str>)]) -> MachineRecord {
        let metadata = edits.iter().map(|(k, v)| (k.to_string(), v.map(str::to_owned))).collect();
        MachineRecord { format: FORMAT, metadata, ..MachineRecord::default() }
    }
    fn machine(metadata: &[(&str, &str)]) -> Option<Machine> {
        let PresenceRecord { public_ip, metadata, version, .. } = presence(metadata);
        Some(Machine { public_ip, metadata, version, ..Machine::default() })
    }
    fn report(problem: Option<&str>) -> UnitReport {
        let systemd = SystemdState { load: "loaded".into(), active: "active".into(), sub: "running".into() };
        let hash = UnitFile::parse(TEXT).unwrap().hash();
        UnitReport { current: DesiredState::Launched, hash, systemd, problem: problem.map(str::to_owned) }
    }
    fn machine_change(event: Event, reader: &mut Reader) -> Option<Machine> {
        match reader.event(&event).unwrap() {
            Some(Change::Machine(_, machine)) => machine,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn units_and_schedule_come_back_as_written() {
        let (hello, mut reader) = (name("hello@1.service"), Reader::default());
        let file = UnitFile::parse(TEXT).unwrap();
        let change = reader.event(&put_event(&put_unit(&hello, &file, DesiredState::Loaded), 7)).unwrap();
        let Some(Change::Unit(found, Some(unit))) = change else { panic!("{change:?}") };
        assert_eq!((found, unit.file.text()), (hello.clone(), TEXT));
        assert_eq!((unit.desired, unit.revision), (DesiredState::Loaded, 7));
        assert_eq!(*unit.requirements, Requirements::of(&hello, &file).unwrap());
        let change = reader.event(&deletion("unit/hello@1.service")).unwrap();
        assert_eq!(change, Some(Change::Unit(hello.clone(), None)));
        let change = reader.event(&put_event(&put_schedule(&hello, &id('a')), 9)).unwrap();
        assert_eq!(change, Some(Change::Schedule(hello.clone(), Some((id('a'), 9)))));
        let change = reader.event(&deletion(&schedule_key(&hello))).unwrap();
        assert_eq!(change, Some(Change::Schedule(hello, None)));
    }

    #[test]
    fn a_machine_has_one_key() {
        let mut reader = Reader::default();
        let key = presence_key(&id('a'));
        let record = serde_json::to_string(&presence(&[])).unwrap();
        assert!(reader.event(&raw(&key.to_uppercase().replace("PRESENCE", "presence"), &record)).is_err());
        assert!(reader.event(&raw(&key, &record)).is_ok());
    }

    #[test]
    fn states_come_back_as_written() {
        let reports: BTreeMap<_, _> =
            [(name("a.service"), report(None)), (name("b@x.socket"), report(Some("a \"problem\"\n")))].into();
        let op = put_states(&id('a'), &reports, LeaseId(5));
        assert!(matches!(&op, Op::Put { lease: Some(LeaseId(5)), .. }));
        let mut reader = Reader::default();
        let change = reader.event(&put_event(&op, 3)).unwrap();
        assert_eq!(change, Some(Change::States(id('a'), reports)));
        let change = reader.event(&deletion(&states_key(&id('a')))).unwrap();
        assert_eq!(change, Some(Change::States(id('a'), BTreeMap::new())));
    }

    #[test]
    fn the_form_on_disk_stays() {
        let value = |op: Op| match op {
            Op::Put { key, value, .. } => (key, String::from_utf8(value).unwrap()),
            op => panic!("{op:?}"),
        };
        let a = id('a');
        let key = |kind: &str| format!("{kind}/{}", "a".repeat(32));
        let file = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
        assert_eq!(
            value(put_unit(&name("a.service"), &file, DesiredState::Launched)),
            (
                "unit/a.service".into(),
                r#"{"format":1,"file":"[Service]\nExecStart=/bin/true\n","desired":"launched"}"#.into()
            )
        );
        assert_eq!(
            value(put_schedule(&name("a.service"), &a)),
            ("schedule/a.service".into(), format!(r#"{{"format":1,"machine":"{a}"}}"#))
        );
        assert_eq!(
            value(put_presence(&a, &presence(&[("disk", "ssd")]), LeaseId(1))),
            (
                key("presence"),
                r#"{"format":1,"public_ip":"10.0.0.1","metadata":{"disk":"ssd"},"version":"2.0.0","lease":1}"#.into()
            )
        );
        assert_eq!(
            value(put_machine(&a, &edits(&[("disk", None), ("zone", Some("b"))]))),
            (key("machine"), r#"{"format":1,"metadata":{"disk":null,"zone":"b"}}"#.into())
        );
        let mut one = report(None);
        one.hash = Hash([0xab; 20]);
        assert_eq!(
            value(put_states(&a, &[(name("a.service"), one)].into(), LeaseId(1))),
            (
                key("states"),
                format!(
                    r#"{{"format":1,"units":[["a.service","launched","{}","loaded","active","running",null]]}}"#,
                    "ab".repeat(20)
                )
            )
        );
        assert_eq!(value(put_format()), ("format".into(), r#"{"format":1}"#.into()));
    }

    #[test]
    fn edits_lie_over_what_a_machine_says() {
        let (a, mut reader) = (id('a'), Reader::default());
        let here =
            |metadata: &[(&str, &str)]| put_event(&put_presence(&a, &presence(metadata), LeaseId(1)), 1);
        let edit = |e: &[(&str, Option<&str>)]| put_event(&put_machine(&a, &edits(e)), 1);
        // Of a machine that is not there they are remembered.
        assert_eq!(reader.event(&edit(&[("zone", Some("b")), ("disk", None)])), Ok(None));
        assert_eq!(
            reader.edits(&a).unwrap().metadata,
            map(&[("zone", Some("b".to_owned())), ("disk", None)])
        );
        let come = machine_change(here(&[("disk", "ssd"), ("zone", "a"), ("cpu", "fast")]), &mut reader);
        assert_eq!(come, machine(&[("zone", "b"), ("cpu", "fast")]));
        let edited = machine_change(edit(&[("zone", Some("c")), ("rack", Some("1"))]), &mut reader);
        assert_eq!(edited, machine(&[("disk", "ssd"), ("zone", "c"), ("cpu", "fast"), ("rack", "1")]));
        let gone = machine_change(deletion(&presence_key(&a)), &mut reader);
        assert_eq!(gone, None);
        let again = machine_change(here(&[]), &mut reader);
        assert_eq!(again, machine(&[("zone", "c"), ("rack", "1")]));
        let plain = machine_change(deletion(&machine_key(&a)), &mut reader);
        assert_eq!((plain, reader.edits(&a)), (machine(&[]), None));
    }

    #[test]
    fn operators_cordon_and_drain() {
        let (a, mut reader) = (id('a'), Reader::default());
        reader.event(&put_event(&put_presence(&a, &presence(&[]), LeaseId(1)), 1)).unwrap();
        for (cordoned, draining, text, takes_new) in [
            (true, false, r#"{"format":1,"metadata":{},"cordoned":true}"#, false),
            (true, true, r#"{"format":1,"metadata":{},"cordoned":true,"draining":true}"#, false),
            (false, true, r#"{"format":1,"metadata":{},"draining":true}"#, false),
            (false, false, r#"{"format":1,"metadata":{}}"#, true),
        ] {
            let op = put_machine(&a, &MachineRecord { cordoned, draining, ..edits(&[]) });
            let Op::Put { value, .. } = &op else { panic!() };
            assert_eq!(str::from_utf8(value).unwrap(), text);
            let machine = machine_change(put_event(&op, 1), &mut reader).unwrap();
            assert_eq!((machine.cordoned, machine.draining), (!takes_new, draining), "{text}");
        }
        // It outlives the machine's presence.
        let drain = put_machine(&a, &MachineRecord { draining: true, ..edits(&[]) });
        reader.event(&put_event(&drain, 1)).unwrap();
        reader.event(&deletion(&presence_key(&a))).unwrap();
        let back = machine_change(put_event(&put_presence(&a, &presence(&[]), LeaseId(2)), 2), &mut reader);
        assert!(back.unwrap().draining);
    }

    #[test]
    fn writing_a_machines_record_back_keeps_what_newer_versions_put_there() {
        let (a, mut reader) = (id('a'), Reader::default());
        let text = r#"{"format":1,"metadata":{},"cordoned":true,"later":{"x":[1]}}"#;
        reader.event(&raw(&machine_key(&a), text)).unwrap();
        let op = put_machine(&a, reader.edits(&a).unwrap());
        let Op::Put { value, .. } = &op else { panic!() };
        assert_eq!(str::from_utf8(value).unwrap(), text);
    }

    #[test]
    fn who_leaves_on_purpose_has_said_so() {
        let (a, mut reader) = (id('a'), Reader::default());
        let here = |leaving| {
            let record = PresenceRecord { leaving, ..presence(&[]) };
            put_event(&put_presence(&a, &record, LeaseId(1)), 1)
        };
        let gone = deletion(&presence_key(&a));
        assert!(!machine_change(here(false), &mut reader).unwrap().cordoned);
        assert_eq!(reader.event(&gone), Ok(Some(Change::Machine(a.clone(), None))), "vanished");
        reader.event(&here(false)).unwrap();
        assert!(machine_change(here(true), &mut reader).unwrap().cordoned, "still there, takes nothing new");
        assert_eq!(reader.event(&gone), Ok(Some(Change::Farewell(a.clone()))));
        // It was about to leave, and stayed.
        reader.event(&here(true)).unwrap();
        assert!(!machine_change(here(false), &mut reader).unwrap().cordoned);
        assert_eq!(reader.event(&gone), Ok(Some(Change::Machine(a.clone(), None))));
    }

    #[test]
    fn units_with_a_value_that_older_versions_passed_over_are_read() {
        let value = r#"{"format":1,"file":"[X-Fleet]\nOnIsolation=x\n","desired":"launched"}"#;
        let change = Reader::default().event(&raw("unit/a.service", value)).unwrap();
        assert!(matches!(change, Some(Change::Unit(_, Some(_)))), "{change:?}");
    }

    #[test]
    fn a_snapshot_is_read_whole_and_from_nothing() {
        let (a, b) = (id('a'), id('b'));
        let file = UnitFile::parse(TEXT).unwrap();
        let hello = name("hello.service");
        let mut entries: Vec<_> = [
            put_machine(&a, &edits(&[("zone", Some("b"))])),
            put_machine(&b, &edits(&[("zone", Some("c"))])),
            put_presence(&a, &presence(&[]), LeaseId(1)),
            put_schedule(&hello, &a),
            put_unit(&hello, &file, DesiredState::Launched),
            put_format(),
        ]
        .iter()
        .zip(1..)
        .map(|(op, revision)| entry(op, revision))
        .collect();
        entries.push(raw("unit/bad.service", "{").entry.unwrap());
        entries.sort_by(|a, b| a.key.cmp(&b.key));
        let mut reader = Reader::default();
        reader.event(&put_event(&put_presence(&b, &presence(&[]), LeaseId(1)), 1)).unwrap();
        let (changes, errors) = reader.snapshot(&Snapshot { entries, revision: 9 });
        assert_eq!(changes.len(), 3);
        assert_eq!(changes[0], Change::Machine(a.clone(), machine(&[("zone", "b")])));
        assert_eq!(changes[1], Change::Schedule(hello, Some((a, 4))));
        assert!(matches!(&changes[2], Change::Unit(_, Some(unit)) if unit.revision == 5));
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].key, "unit/bad.service");
        // What was known of b before is not taken for known now.
        assert_eq!(reader.event(&put_event(&put_machine(&b, &edits(&[])), 1)), Ok(None));
    }

    #[test]
    fn what_can_not_be_read_is_named_and_changes_nothing() {
        let mut reader = Reader::default();
        let a = id('a');
        reader.event(&put_event(&put_presence(&a, &presence(&[]), LeaseId(1)), 1)).unwrap();
        let unit = |rest: &str| format!(r#"{{"format":1,"desired":"launched","file":{rest}}}"#);
        let cases = [
            ("unit/a.service", "{\"format\"".to_owned(), "not a record"),
            ("unit/a.service", "\u{0}".to_owned(), "not a record"),
            ("unit/a.service", "[1]".to_owned(), "not a record"),
            ("unit/a.service", r#"{"desired":"launched","file":""}"#.to_owned(), "missing field `format`"),
            (
                "unit/a.service",
                r#"{"format":2,"desired":"launched","file":""}"#.to_owned(),
                "format 2 is unknown",
            ),
            (
                "unit/a.service",
                r#"{"format":0,"desired":"launched","file":""}"#.to_owned(),
                "format 0 is unknown",
            ),
            ("unit/a.service", r#"{"format":1,"desired":"up","file":""}"#.to_owned(), "unknown variant `up`"),
            ("unit/a.service", unit(r#""[Unit\nA=b\n""#), "line 1: "),
            ("unit/a service", unit(r#""[Unit]\n""#), "unit name"),
            ("schedule/a.service", r#"{"format":1,"machine":"x"}"#.to_owned(), "\"x\" is not a machine ID"),
            ("presence/x", r#"{"format":1}"#.to_owned(), "\"x\" is not a machine ID"),
            ("machine/x", r#"{"format":1,"metadata":{}}"#.to_owned(), "\"x\" is not a machine ID"),
            (
                "states/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
                r#"{"format":1,"units":[["a.service","loaded","12","","","",null]]}"#.to_owned(),
                "\"12\" of a.service is not a hash",
            ),
            ("presence/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", r#"{"format":3}"#.to_owned(), "newer fleetd"),
            ("format", r#"{"format":2}"#.to_owned(), "format 2 is unknown"),
        ];
        for (key, value, reason) in cases {
            let error = reader.event(&raw(key, &value)).expect_err(&value);
            assert_eq!(error.key, key);
            assert!(error.reason.contains(reason), "{error}");
            assert!(error.to_string().starts_with(&format!("registry record {key}: ")), "{error}");
        }
        let edited = machine_change(put_event(&put_machine(&a, &edits(&[])), 1), &mut reader);
        assert_eq!(edited, machine(&[]), "the broken presence took the one before away");
    }

    #[test]
    fn what_newer_versions_add_is_passed_over() {
        let mut reader = Reader::default();
        assert_eq!(reader.event(&raw("leader", "{}")), Ok(None));
        assert_eq!(reader.event(&raw("secret/a", "\u{1}")), Ok(None));
        assert_eq!(reader.event(&deletion("format")), Ok(None));
        assert_eq!(reader.event(&raw("format", r#"{"format":1}"#)), Ok(None));
        let value = r#"{"format":1,"file":"","desired":"inactive","later":{"x":[1]}}"#;
        assert!(matches!(reader.event(&raw("unit/a.service", value)), Ok(Some(Change::Unit(_, Some(_))))));
    }
}
