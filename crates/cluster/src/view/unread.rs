//! Which records can't be read as they are now: written by a newer version, or damaged.
//!
//! What a view knows of such a record, or does not know, is no ground to decide anything from. What stands beside it goes on.
use super::*;

/// The records of a view that can't be read, each with the reason.
#[derive(Clone, Debug, Default)]
pub(super) struct Unread {
    units: BTreeMap<UnitName, BTreeMap<RecordKind, Unreadable>>,
    machines: BTreeMap<MachineId, BTreeMap<RecordKind, Unreadable>>,
}

impl Unread {
    /// False when that was so before.
    fn note(&mut self, record: &Record, why: Option<Unreadable>) -> bool {
        match record {
            Record::OfUnit(kind, name) => note(&mut self.units, name, *kind, why),
            Record::OfMachine(kind, id) => note(&mut self.machines, id, *kind, why),
        }
    }
}

fn note<K: Ord + Clone>(
    all: &mut BTreeMap<K, BTreeMap<RecordKind, Unreadable>>,
    key: &K,
    kind: RecordKind,
    why: Option<Unreadable>,
) -> bool {
    let Some(why) = why else {
        let Some(kinds) = all.get_mut(key) else { return false };
        let was = kinds.remove(&kind).is_some();
        if kinds.is_empty() {
            all.remove(key);
        }
        return was;
    };
    let kinds = all.entry(key.clone()).or_default();
    let same = kinds.get(&kind) == Some(&why);
    kinds.insert(kind, why);
    !same
}

impl View {
    pub(super) fn apply_unread(&mut self, record: Record, why: Option<Unreadable>, effects: &mut Effects) {
        if !self.unread.note(&record, why) {
            return;
        }
        match record {
            Record::OfUnit(_, name) => {
                // Who follows it may have stayed for that.
                effects.units.extend(self.followers(&name).cloned());
                effects.units.insert(name.clone());
                effects.everywhere.insert(name);
            }
            Record::OfMachine(kind, id) => {
                if kind == RecordKind::Machine {
                    for name in &self.globals {
                        effects.want(&id, name);
                    }
                }
                effects.machines.insert(id);
            }
        }
    }

    /// Whether every record can be read.
    pub fn is_all_read(&self) -> bool {
        self.unread.units.is_empty() && self.unread.machines.is_empty()
    }

    /// All records that can't be read.
    pub fn all_unread(&self) -> impl Iterator<Item = Record> {
        let units = self.unread.units.iter().flat_map(|(name, kinds)| {
            kinds.keys().map(|kind| Record::OfUnit(*kind, name.clone())).collect::<Vec<_>>()
        });
        let machines = self.unread.machines.iter().flat_map(|(id, kinds)| {
            kinds.keys().map(|kind| Record::OfMachine(*kind, id.clone())).collect::<Vec<_>>()
        });
        units.chain(machines)
    }

    /// Why a record of a unit can't be read, if it can't.
    pub fn unread_record(&self, name: &str, kind: RecordKind) -> Option<&str> {
        Some(&self.unread.units.get(name)?.get(&kind)?.reason)
    }

    /// The revision of a unit's own record that can't be read, if it can't.
    pub fn unread_revision(&self, name: &str) -> Option<Revision> {
        Some(self.unread.units.get(name)?.get(&RecordKind::Unit)?.revision)
    }

    /// Why nothing is to be decided about a unit, if one of its records can't be read.
    pub fn undecidable(&self, name: &UnitName) -> Option<&str> {
        Some(&self.unread.units.get(name)?.values().next()?.reason)
    }

    /// Whether a record of a machine can't be read.
    pub fn is_unread(&self, id: &MachineId, kind: RecordKind) -> bool {
        self.unread.machines.get(id).is_some_and(|kinds| kinds.contains_key(&kind))
    }

    /// Whether a machine is there, for all that is known. A presence that can't be read has not run out.
    pub fn may_be_there(&self, id: &MachineId) -> bool {
        self.machine(id).is_some() || self.is_unread(id, RecordKind::Presence)
    }

    /// Machines whose presence can't be read.
    pub(crate) fn unread_presences(&self) -> impl Iterator<Item = &MachineId> {
        let machines = self.unread.machines.iter();
        machines.filter(|(_, kinds)| kinds.contains_key(&RecordKind::Presence)).map(|(id, _)| id)
    }

    /// Whether a machine may be there and it is not known what it is like: nothing comes to it, and what is there may stay.
    pub(crate) fn is_obscure(&self, id: &MachineId) -> bool {
        self.is_unread(id, RecordKind::Presence)
            || self.is_unread(id, RecordKind::Machine) && self.machine(id).is_some()
    }
}
