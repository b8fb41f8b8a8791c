//! What really happened on a cluster of real hosts, and whether that may happen.
//!
//! A [`Recorder`] writes a [`History`]: commands with their outcomes, faults, the schedule as event streams tell it, and when units ran
//! where, which the units themselves write down. [`check`](History::check) is a pure function of that, and says what broke which
//! guarantee of docs/RELIABILITY.md. It is in doubt on the side of fleet: what it reports is wrong for sure.
//!
//! | module | job |
//! |---|---|
//! | this one | the history as values; it can be kept as JSON and checked again |
//! | `check` | the checks |
//! | `record` | a cluster watched while it runs, and asked at the end |
//! | `runs` | units that write down when they ran, and what they wrote |

mod check;
mod record;
mod runs;
#[cfg(test)]
mod tests;

pub use record::{FaultId, Recorder};
pub use runs::{LOG, recorded};

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Milliseconds since this machine booted. All hosts of a testbed have this one clock; units read it from `/proc/uptime`, so in steps
/// of 10.
pub type Millis = u64;

/// All that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The machine IDs of the hosts, by index. Everything else names hosts by index.
    pub machines: Vec<String>,
    /// How long a machine may be silent before its units are placed elsewhere.
    pub ttl: Millis,
    /// The files that commands give units, by their hash.
    pub files: BTreeMap<String, File>,
    /// Commands, in any order.
    pub commands: Vec<Command>,
    /// Faults, in any order.
    pub faults: Vec<Fault>,
    /// What event streams told, in the order of each stream.
    pub seen: Vec<Seen>,
    /// When there was an event stream of which server.
    pub streams: Vec<Stream>,
    /// When units ran where.
    pub runs: Vec<Run>,
    /// When everything was at rest: all that was true before was known to everybody and carried out, and nothing was under way.
    pub rests: Vec<Millis>,
    /// How things are in the end, when nothing is broken any more.
    pub end: Option<End>,
}

/// What a unit file says, as far as the checks care.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// What a unit with this file writes down when it starts. Different for each file.
    pub marker: String,
    /// `OnIsolation=stop`.
    pub stops: bool,
    /// `Global=true`.
    pub global: bool,
    /// It ends by itself now and then.
    pub ends: bool,
    /// It fits on some machines only, or is in the way of others or they in its: other commands than those about it
    /// can move it.
    pub choosy: bool,
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// In words.
    pub what: String,
    /// What it is to do.
    pub effect: Effect,
    /// When it was given.
    pub start: Millis,
    /// When its outcome was known.
    pub end: Option<Millis>,
    /// What became of it.
    pub outcome: Outcome,
}

/// What a command is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// A unit is to be so.
    Put {
        /// The unit.
        unit: String,
        /// The hash of its file; none: the unit is there, and keeps its file.
        file: Option<String>,
        /// Only a unit that is not there gets the file, as with `fleetctl start FILE`.
        only_if_new: bool,
        /// Its desired state.
        desired: String,
    },
    /// A unit is not to be.
    Destroy {
        /// The unit.
        unit: String,
    },
    /// Machines are changed, which may move any unit: metadata, cordon, drain, removal.
    Machines,
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It is done.
    Acknowledged {
        /// A revision at which it is, if that was told.
        revision: Option<u64>,
    },
    /// It is not done, and why.
    Refused(String),
    /// It may be done, now or later, or not.
    Unknown(String),
}

/// Something was broken for a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// In words.
    pub what: String,
    /// What it does.
    pub kind: FaultKind,
    /// The host; none: no machine in particular, but the registry or the only server.
    pub host: Option<usize>,
    /// Not begun before.
    pub start: Millis,
    /// Over by then; none: it lasted to the end.
    pub end: Option<Millis>,
}

/// What a fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// The host has no power, or shuts down: nothing runs there when it is over.
    Down,
    /// The machine can't tell servers that it lives, maybe for its whole TTL.
    Silent,
    /// The machine, or all machines, can't tell servers that they live for a time well below the TTL; or the servers can't decide
    /// anything meanwhile. No reason to place anything elsewhere.
    Short,
    /// Processes of units there are killed.
    Kills,
}

/// What an event stream told of a unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// When.
    pub at: Millis,
    /// The host whose server told it.
    pub server: usize,
    /// The revision that it is of, at least.
    pub revision: u64,
    /// The unit.
    pub unit: String,
    /// What it is; none: there is no such unit.
    pub state: Option<Known>,
}

/// What servers know of a unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The hash of its file.
    pub hash: String,
    /// Its desired state.
    pub desired: String,
    /// The host it is placed on.
    pub machine: Option<usize>,
}

/// An event stream of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// The host of the server.
    pub server: usize,
    /// Since when all that changes is told.
    pub start: Millis,
    /// Until when, at most.
    pub end: Option<Millis>,
}

/// A run of a unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The unit.
    pub unit: String,
    /// The host.
    pub host: usize,
    /// The marker of the file it was started from.
    pub marker: String,
    /// Not begun before.
    pub start: Millis,
    /// Over by then; none: it goes on, or its host lost its power.
    pub stop: Option<Millis>,
    /// How it ended, in systemd's words (`SERVICE_RESULT`, `EXIT_CODE`, `EXIT_STATUS`).
    pub how: String,
}

/// How things are in the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// When.
    pub at: Millis,
    /// The revision of the units.
    pub revision: u64,
    /// All units that servers know.
    pub units: Vec<(String, Known)>,
    /// Why units are not placed.
    pub reasons: BTreeMap<String, String>,
    /// The machines that are there.
    pub present: BTreeSet<usize>,
    /// What servers say of units on hosts: (unit, host) and systemd's states.
    pub reported: BTreeMap<String, BTreeMap<usize, States>>,
    /// What systemd on each host says of units that it knows, and the hash of the file.
    pub actual: BTreeMap<String, BTreeMap<usize, Actual>>,
}

/// systemd's states of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct States {
    /// LoadState.
    pub load: String,
    /// ActiveState.
    pub active: String,
    /// SubState.
    pub sub: String,
}

/// A unit on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actual {
    /// Its states.
    pub states: States,
    /// The hash of its file there.
    pub hash: Option<String>,
}

impl States {
    /// Whether there are processes of it, or may be.
    pub fn is_live(&self) -> bool {
        !matches!(self.active.as_str(), "inactive" | "failed" | "")
    }
}

impl History {
    /// A fault is over. One that was to be short may have lasted long on a busy machine; then it was reason enough to give the machine up.
    fn heal(&mut self, fault: usize, now: Millis) {
        let fault = &mut self.faults[fault];
        fault.end = Some(now);
        let long = now.saturating_sub(fault.start) >= self.ttl / 2;
        if long && fault.kind == FaultKind::Short && fault.host.is_some() {
            fault.kind = FaultKind::Silent;
        }
    }
}

impl Effect {
    /// The unit it is about.
    pub fn unit(&self) -> Option<&str> {
        match self {
            Effect::Put { unit, .. } | Effect::Destroy { unit } => Some(unit),
            Effect::Machines => None,
        }
    }
}

/// What must not be is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The guarantee.
    pub check: &'static str,
    /// When.
    pub at: Millis,
    /// What happened.
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: at {:.2} s: {}", self.check, seconds(self.at), self.what)
    }
}

/// For people.
fn seconds(time: Millis) -> f64 {
    time as f64 / 1000.0
}
