//! What operators do: files they have, and commands they give to a server.

use crate::rng::Rng;
use fleet_cluster::model::{DesiredState, MachineId};
use fleet_registry::{Store, StoreError};
use fleet_unit::{Hash, UnitFile, UnitName};
use fleetd::server::{MachineMark, MembershipError, Server, WriteError};
use std::fmt;

/// A command.
#[derive(Clone, Debug)]
pub(crate) enum Command {
    /// Make a unit, give it another file, or set what is desired of it.
    Put(UnitName, Option<UnitFile>, DesiredState),
    Destroy(UnitName),
    Metadata(MachineId, String, Option<String>),
    Mark(MachineId, MachineMark),
    /// Take a machine out of the cluster.
    Remove(MachineId),
}

/// What a command writes of a unit: the hash of the file, unless it is to stay, and what is desired; `None`: it destroys it.
pub(crate) type Wrote = Option<(Option<Hash>, DesiredState)>;

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Command::Put(name, Some(file), desired) => {
                write!(f, "{name} {desired:?}, file {}: {:?}", file.hash().short(), file.text())
            }
            Command::Put(name, None, desired) => write!(f, "{name} {desired:?}"),
            Command::Destroy(name) => write!(f, "destroy {name}"),
            Command::Mark(id, mark) => write!(f, "{mark:?} {id}"),
            Command::Remove(id) => write!(f, "remove {id}"),
            Command::Metadata(id, key, value) => write!(f, "metadata of {id}: {key} {value:?}"),
        }
    }
}

/// How it ended for who gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Acknowledged,
    /// There is no such unit, as far as the server knows, or what was asked for can't be.
    Refused(String),
    /// It may be done or not.
    Unknown,
}

impl Command {
    /// A random one.
    pub(crate) fn draw(
        rng: &mut Rng,
        names: usize,
        isolating: f64,
        machines: &[MachineId],
    ) -> Option<Command> {
        let name = name(rng.below(names))?;
        Some(match rng.below(12) {
            0..=3 => Command::Put(name, Some(file(rng, isolating, machines)?), DesiredState::Launched),
            4 => Command::Put(name, Some(file(rng, isolating, machines)?), *rng.pick(&STATES)),
            5..=7 => Command::Put(name, None, *rng.pick(&STATES)),
            8 => Command::Put(name, None, DesiredState::Launched),
            9 => Command::Destroy(name),
            10 if rng.chance(0.08) => Command::Remove(rng.pick(machines).clone()),
            10 if rng.chance(0.5) => {
                let marks = [
                    MachineMark::Cordon,
                    MachineMark::Uncordon,
                    MachineMark::Uncordon,
                    MachineMark::Drain,
                    MachineMark::EndDrain,
                ];
                Command::Mark(rng.pick(machines).clone(), *rng.pick(&marks))
            }
            _ => {
                let value = rng.pick(&[Some("a"), Some("b"), None]).map(str::to_owned);
                Command::Metadata(rng.pick(machines).clone(), "zone".to_owned(), value)
            }
        })
    }

    /// The same, about the unit that another is about; `None` where that makes no sense.
    pub(crate) fn about(self, other: &Command) -> Option<Command> {
        let (name, _) = other.writes()?;
        match self {
            Command::Put(_, file, desired) => Some(Command::Put(name.clone(), file, desired)),
            Command::Destroy(_) => Some(Command::Destroy(name.clone())),
            Command::Metadata(..) | Command::Mark(..) | Command::Remove(_) => None,
        }
    }

    /// The unit it is about, and what it writes of that.
    pub(crate) fn writes(&self) -> Option<(&UnitName, Wrote)> {
        match self {
            Command::Put(name, file, desired) => {
                Some((name, Some((file.as_ref().map(UnitFile::hash), *desired))))
            }
            Command::Destroy(name) => Some((name, None)),
            Command::Metadata(..) | Command::Mark(..) | Command::Remove(_) => None,
        }
    }

    /// Gives it to a server.
    pub(crate) async fn give<S: Store>(self, server: Server<S>) -> Ended {
        let done = match self {
            Command::Put(name, file, desired) => server.put_unit(&name, file, Some(desired)).await.map(drop),
            Command::Destroy(name) => server.delete_unit(&name).await,
            Command::Mark(id, mark) => server.mark_machine(&id, mark).await,
            Command::Remove(id) => return removed(server.remove_machine(&id).await),
            Command::Metadata(id, key, value) => server.edit_metadata(&[(id, key, value)]).await,
        };
        match done {
            Ok(()) => Ended::Acknowledged,
            Err(WriteError::Store(
                StoreError::Unavailable(_) | StoreError::Unknown(_) | StoreError::Damaged(_),
            )) => Ended::Unknown,
            Err(error) => Ended::Refused(error.to_string()),
        }
    }
}

fn removed(done: Result<(), MembershipError>) -> Ended {
    match done {
        Ok(()) => Ended::Acknowledged,
        Err(MembershipError::Store(_)) => Ended::Unknown,
        Err(error) => Ended::Refused(error.to_string()),
    }
}

const STATES: [DesiredState; 3] = [DesiredState::Inactive, DesiredState::Loaded, DesiredState::Launched];

const NAMES: [&str; 12] = [
    "a.service",
    "b.service",
    "c.service",
    "d.service",
    "e.service",
    "f.service",
    "g.service",
    "h.timer",
    "t@1.service",
    "t@2.service",
    "t@.service",
    "s.socket",
];

fn name(number: usize) -> Option<UnitName> {
    UnitName::parse(NAMES[number % NAMES.len()]).ok()
}

fn file(rng: &mut Rng, isolating: f64, machines: &[MachineId]) -> Option<UnitFile> {
    let stop = rng.chance(isolating);
    let mut section = match rng.below(14) {
        0 => "Conflicts=a.service".to_owned(),
        1 => "Conflicts=[b-d].service".to_owned(),
        2 => "MachineOf=b.service".to_owned(),
        3 => "MachineOf=a.service".to_owned(),
        4 => "MachineMetadata=zone=a".to_owned(),
        5 => "MachineMetadata=zone=a\nMachineMetadata=zone=b".to_owned(),
        6 => "Global=true".to_owned(),
        7 => "Global=true\nMachineMetadata=zone=a".to_owned(),
        8 => "Global=true\nConflicts=a.service".to_owned(),
        9 => "Replaces=c.service".to_owned(),
        10 => format!("MachineID={}", rng.pick(machines)),
        _ => String::new(),
    };
    // A Global unit is not started elsewhere, so there is nothing to stop it for.
    if stop && !section.contains("Global") {
        section.push_str("\nOnIsolation=stop");
    }
    let version = rng.below(3);
    UnitFile::parse(&format!("[Service]\nExecStart=/bin/app {version}\n[X-Fleet]\n{section}\n")).ok()
}
