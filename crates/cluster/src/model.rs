//! What there is: units, machines, states.
use fleet_unit::{Hash, Requirements, UnitFile, UnitName};
use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

/// A point of time: since an arbitrary but fixed start, never going back (the monotonic clock of
/// the process, or the simulator's).
pub type Time = Duration;

/// The revision of the registry at which something was written; 0 means that it does not exist.
pub type Revision = u64;

/// The ID of a machine: the content of its `/etc/machine-id`, 32 lower-case hexadecimal digits.
// The digits themselves, not a pointer to them: the ranking of machines compares IDs more than anything else.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct MachineId([u8; 32]);

/// A string that is no machine ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a machine ID (32 hexadecimal digits)")]
pub struct MachineIdError(String);

impl MachineId {
    /// Checks and keeps an ID; upper-case digits become lower-case.
    pub fn parse(text: &str) -> Result<Self, MachineIdError> {
        let wrong = || MachineIdError(text.chars().take(64).collect());
        let mut digits: [u8; 32] = text.as_bytes().try_into().map_err(|_| wrong())?;
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(wrong());
        }
        digits.make_ascii_lowercase();
        Ok(MachineId(digits))
    }
    /// The 32 digits.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("hexadecimal digits are ASCII")
    }
    /// The first 8 digits and `...`, as lists show it.
    pub fn short(&self) -> String {
        format!("{}...", &self.as_str()[..8])
    }
}
impl std::borrow::Borrow<str> for MachineId {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}
// As the text it is borrowed as.
impl std::hash::Hash for MachineId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}
impl serde::Serialize for MachineId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(self.as_str())
    }
}
impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl fmt::Debug for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl<'de> serde::Deserialize<'de> for MachineId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(d)?).map_err(serde::de::Error::custom)
    }
}

/// What a user wants of a unit.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum DesiredState {
    /// Known to the cluster, on no machine.
    #[default]
    Inactive,
    /// Placed, and known to that machine's systemd.
    Loaded,
    /// Started.
    Launched,
}

impl DesiredState {
    /// The word of the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inactive => "inactive",
            Self::Loaded => "loaded",
            Self::Launched => "launched",
        }
    }
}

/// How far a unit has come; the same words as for what is desired.
pub type CurrentState = DesiredState;

/// A unit as the cluster knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its file.
    pub file: UnitFile,
    /// What it asks of its place.
    pub requirements: Arc<Requirements>,
    /// What its user wants.
    pub desired: DesiredState,
    /// The revision it was last written at.
    pub revision: Revision,
}

/// A machine that is there (its presence has not run out).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Machine {
    /// The address others reach it by; may be empty.
    pub public_ip: String,
    /// Its metadata, with the edits made at run time.
    pub metadata: BTreeMap<String, String>,
    /// The version of its fleetd.
    pub version: String,
    /// No new unit is placed here; what is here stays.
    #[serde(default)]
    pub cordoned: bool,
    /// Its units are to move away, a few at a time; no new unit is placed here either.
    #[serde(default)]
    pub draining: bool,
}

impl Machine {
    /// Whether units that are not here yet may be placed here.
    pub fn takes_new_units(&self) -> bool {
        !self.cordoned && !self.draining
    }
}

/// What systemd says of a unit on a machine.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SystemdState {
    /// `loaded`, `not-found`, `bad-setting`, `error`, `masked`
    pub load: String,
    /// `active`, `reloading`, `inactive`, `failed`, `activating`, `deactivating`
    pub active: String,
    /// `running`, `dead`, …
    pub sub: String,
}

impl SystemdState {
    /// Whether anything of the unit may still run: all but inactive and failed.
    pub fn is_live(&self) -> bool {
        !matches!(self.active.as_str(), "inactive" | "failed")
    }
}

/// What a machine reports of a unit on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitReport {
    /// How far the agent has brought it.
    pub current: CurrentState,
    /// The hash of the file it has.
    pub hash: Hash,
    /// What systemd says.
    pub systemd: SystemdState,
    /// What went wrong with the last thing the agent did for it, in words for the user.
    pub problem: Option<String>,
}

/// One change of what the cluster knows, in the order of the registry's revisions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A unit was written, or removed.
    Unit(UnitName, Option<Unit>),
    /// A unit was placed on a machine, or taken off it; with the revision of that.
    Schedule(UnitName, Option<(MachineId, Revision)>),
    /// A unit with OnIsolation=stop was taken off a machine, which has not said yet that nothing of it runs, with the revision of
    /// that; or it has.
    Leaving(UnitName, Option<(MachineId, Revision)>),
    /// A machine came, changed, or is gone: its presence ran out.
    Machine(MachineId, Option<Machine>),
    /// A machine gave up its presence on purpose: nobody has to wait for it. How that is told from a presence that ran
    /// out is written at the registry's records.
    Farewell(MachineId),
    /// All that a machine reports of its units now.
    States(MachineId, BTreeMap<UnitName, UnitReport>),
    /// A record can't be read as it is now, for this reason: what was known of it stays, and is no ground to decide anything from; or it
    /// can be read, or is gone.
    Unread(Record, Option<Unreadable>),
}

/// Why a record can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// For people.
    pub reason: String,
    /// That of the record.
    pub revision: Revision,
}

/// A record that can't be read, by what it is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Record {
    /// One of a unit's.
    OfUnit(RecordKind, UnitName),
    /// One of a machine's.
    OfMachine(RecordKind, MachineId),
}

/// What is written in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordKind {
    /// A unit.
    Unit,
    /// Its place.
    Schedule,
    /// The machine that may still run it.
    Leaving,
    /// What operators say of a machine.
    Machine,
    /// That a machine is there.
    Presence,
    /// What it reports.
    States,
}

/// What an agent is asked to hold of one unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The file.
    pub file: UnitFile,
    /// `Loaded` or `Launched`.
    pub state: DesiredState,
}
