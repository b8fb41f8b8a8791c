//! What the API writes: units and metadata edits, each guarded by the revision it was decided from.

use super::{Server, membership::member_key};
use crate::metrics::Operation;
use fleet_cluster::model::*;
use fleet_registry::records::*;
use fleet_registry::{Compare, Op, Store, StoreError, Txn};
use fleet_unit::{RequirementError, Requirements, UnitFile, UnitName};
use std::collections::BTreeMap;
use std::time::Instant;
use tracing::info;

/// How often a write is decided again when somebody else wrote first.
pub(super) const ATTEMPTS: usize = 16;

/// What putting a unit did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// A new unit, or a new file for a known one.
    Created,
    /// The desired state was set (or was so already).
    Updated,
}

/// Why a write was refused. Texts as the original's where it had one (golden/19-api.txt).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// A unit must have a file when it is made.
    #[error("unit does not exist and options field empty")]
    NoFile,
    /// Nothing to change was given.
    #[error("must provide DesiredState to update existing unit")]
    NoDesiredState,
    /// Only instances of a template can be on a machine.
    #[error("cannot activate template \"{0}\"")]
    Template(UnitName),
    /// The [X-Fleet] section contradicts itself.
    #[error("{0}")]
    Requirements(#[from] RequirementError),
    /// There is no such unit.
    #[error("unit does not exist")]
    NoUnit,
    /// There is a record of it that makes no sense to this server.
    #[error(
        "its record in the registry can't be read ({0}); it is left as it is, and `fleetctl destroy` removes it"
    )]
    Unreadable(String),
    /// There is no such machine.
    #[error("machine {0} is not in this cluster")]
    NoMachine(MachineId),
    /// Others kept writing at the same time.
    #[error("{0} is being changed by others; try again")]
    Contended(String),
    /// The registry did not take it.
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// An edit of a machine's metadata: set, or remove with `None`.
pub type MetadataEdit = (MachineId, String, Option<String>);

/// What operators can say of a machine. It stays until it is taken back, whether the machine is there or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineMark {
    /// No new unit is placed there.
    Cordon,
    /// Neither cordoned nor to be drained.
    Uncordon,
    /// Its units are to move away.
    Drain,
    /// They need not any more; cordoned it stays if it was so before.
    EndDrain,
}

impl MachineMark {
    fn apply(self, record: &mut MachineRecord) {
        match self {
            MachineMark::Cordon => record.cordoned = true,
            MachineMark::Uncordon => (record.cordoned, record.draining) = (false, false),
            MachineMark::Drain => record.draining = true,
            MachineMark::EndDrain => record.draining = false,
        }
    }

    fn done(self) -> &'static str {
        match self {
            MachineMark::Cordon => "cordoned",
            MachineMark::Uncordon => "uncordoned",
            MachineMark::Drain => "began to drain",
            MachineMark::EndDrain => "ended the drain of",
        }
    }
}

impl<S: Store> Server<S> {
    /// Makes a unit, replaces its file, or sets its desired state. Answers when the view has it.
    pub async fn put_unit(
        &self,
        name: &UnitName,
        file: Option<UnitFile>,
        desired: Option<DesiredState>,
    ) -> Result<Put, WriteError> {
        if let Some(reason) = self.hub.unchangeable(name) {
            return Err(WriteError::Unreadable(reason));
        }
        for _ in 0..ATTEMPTS {
            let known =
                self.hub.view().unit(name).map(|unit| (unit.file.clone(), unit.desired, unit.revision));
            let (put, file, desired, guard) = match (known, &file) {
                (None, None) => match self.is_current(name, 0).await? {
                    true => return Err(WriteError::NoFile),
                    false => continue,
                },
                (None, Some(file)) => (Put::Created, file.clone(), desired.unwrap_or_default(), 0),
                (Some((known, _, revision)), Some(file)) if known.hash() != file.hash() => {
                    (Put::Created, file.clone(), desired.unwrap_or_default(), revision)
                }
                (Some((known, before, revision)), _) => {
                    let Some(desired) = desired else { return Err(WriteError::NoDesiredState) };
                    if desired == before {
                        match self.is_current(name, revision).await? {
                            true => return Ok(Put::Updated),
                            false => continue,
                        }
                    }
                    (Put::Updated, known, desired, revision)
                }
            };
            if name.is_template() && desired != DesiredState::Inactive {
                return Err(WriteError::Template(name.clone()));
            }
            if put == Put::Created {
                Requirements::of(name, &file)?;
            }
            let compares = vec![Compare { key: unit_key(name), revision: guard }];
            let ops = vec![put_unit(name, &file, desired)];
            if let Some(revision) = self.try_commit(Txn { compares, ops }).await? {
                self.hub.reached(revision).await;
                return Ok(put);
            }
        }
        Err(WriteError::Contended(name.to_string()))
    }

    /// Destroys a unit: its record and its place go at once; its machine stops it and takes it away.
    pub async fn delete_unit(&self, name: &UnitName) -> Result<(), WriteError> {
        for _ in 0..ATTEMPTS {
            let known = if self.hub.unchangeable(name).is_some() {
                Some((self.stored(&unit_key(name)).await?, self.stored(&schedule_key(name)).await?))
            } else {
                let view = self.hub.view();
                let place = view.place(name).map_or(0, |(_, revision)| revision);
                view.unit(name).map(|unit| (unit.revision, place))
            };
            let (unit, place) = match known {
                Some(known) => known,
                None if self.is_current(name, 0).await? => return Err(WriteError::NoUnit),
                None => continue,
            };
            let mut txn = Txn {
                compares: vec![
                    Compare { key: unit_key(name), revision: unit },
                    Compare { key: schedule_key(name), revision: place },
                ],
                ops: vec![Op::Delete { key: unit_key(name) }],
            };
            if place != 0 {
                txn.ops.push(Op::Delete { key: schedule_key(name) });
            }
            if let Some(revision) = self.try_commit(txn).await? {
                self.hub.reached(revision).await;
                return Ok(());
            }
        }
        Err(WriteError::Contended(name.to_string()))
    }

    /// The revision of a record, as the store has it.
    async fn stored(&self, key: &str) -> Result<Revision, StoreError> {
        Ok(self.store.get(key).await?.map_or(0, |entry| entry.revision))
    }

    /// Edits metadata of machines, all together or not at all.
    pub async fn edit_metadata(&self, edits: &[MetadataEdit]) -> Result<(), WriteError> {
        if edits.is_empty() {
            return Ok(());
        }
        for _ in 0..ATTEMPTS {
            let mut records: BTreeMap<&MachineId, MachineRecord> = BTreeMap::new();
            let mut txn = Txn::default();
            for (id, key, value) in edits {
                if !records.contains_key(id) {
                    let (record, guard) = self.machine_record(id).await?;
                    txn.compares.push(guard);
                    records.insert(id, record);
                }
                if let Some(record) = records.get_mut(id) {
                    record.metadata.insert(key.clone(), value.clone());
                }
            }
            txn.ops = records.iter().map(|(id, record)| put_machine(id, record)).collect();
            if let Some(revision) = self.try_commit(txn).await? {
                self.hub.reached(revision).await;
                return Ok(());
            }
        }
        Err(WriteError::Contended("machine metadata".to_owned()))
    }

    /// Sets or takes away a mark of a machine. Answers when the view has it.
    pub async fn mark_machine(&self, id: &MachineId, mark: MachineMark) -> Result<(), WriteError> {
        if !self.knows_machine(id).await? {
            return Err(WriteError::NoMachine(id.clone()));
        }
        for _ in 0..ATTEMPTS {
            let (before, guard) = self.machine_record(id).await?;
            let mut record = before.clone();
            mark.apply(&mut record);
            if record == before {
                self.hub.reached(guard.revision).await;
                return Ok(());
            }
            let txn = Txn { compares: vec![guard], ops: vec![put_machine(id, &record)] };
            if let Some(revision) = self.try_commit(txn).await? {
                self.hub.reached(revision).await;
                info!(machine = %id, "{} machine {id}", mark.done());
                return Ok(());
            }
        }
        Err(WriteError::Contended(format!("machine {id}")))
    }

    /// Whether a machine is there, or may come back. What operators say of others would stay in the registry for ever.
    pub async fn knows_machine(&self, id: &MachineId) -> Result<bool, WriteError> {
        let there = self.hub.view().machine(id).is_some() || *id == self.config.machine;
        Ok(there || self.store.get(&member_key(id)).await?.is_some())
    }

    /// What operators said of a machine, and the guard to change it.
    async fn machine_record(&self, id: &MachineId) -> Result<(MachineRecord, Compare), StoreError> {
        let key = machine_key(id);
        let asked = Instant::now();
        let entry = self.store.get(&key).await;
        self.metrics.operation(Operation::Get, asked.elapsed(), entry.is_ok());
        let entry = entry?;
        let revision = entry.as_ref().map_or(0, |entry| entry.revision);
        let record = match entry {
            Some(entry) => serde_json::from_slice(&entry.value)
                .map_err(|error| StoreError::Damaged(format!("{key}: {error}")))?,
            None => MachineRecord { format: FORMAT, ..MachineRecord::default() },
        };
        Ok((record, Compare { key, revision }))
    }

    /// Whether the view is right about a unit: where nothing is written, nothing else would show that another server knows more.
    async fn is_current(&self, name: &UnitName, revision: Revision) -> Result<bool, WriteError> {
        Ok(self.try_commit(Txn::default().when(unit_key(name), revision)).await?.is_some())
    }

    /// Commits; `None` when a guard did not hold, after the view has caught up with the store.
    async fn try_commit(&self, txn: Txn) -> Result<Option<Revision>, WriteError> {
        let asked = Instant::now();
        let written = self.store.commit(txn).await;
        let answered = matches!(written, Ok(_) | Err(StoreError::Conflict(_)));
        self.metrics.operation(Operation::Set, asked.elapsed(), answered);
        match written {
            Ok(revision) => Ok(Some(revision)),
            Err(StoreError::Conflict(_)) => {
                // The revision of now, so that a deletion is seen, too.
                let revision = self.store.commit(Txn::default()).await?;
                self.hub.reached(revision).await;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}
