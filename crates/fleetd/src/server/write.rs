//! What the API writes: units and metadata edits, each guarded by the revision it was decided from.
//!
//! A change of a unit is first worked out from the view ([`Plan`]), then committed; where somebody else was faster it is worked out anew.
//! Many changes that come together are committed together, as many as fit in a transaction.

use super::{Server, membership::member_key};
use crate::metrics::Operation;
use fleet_cluster::model::*;
use fleet_registry::records::*;
use fleet_registry::store::{MAX_BYTES, MAX_OPS};
use fleet_registry::{Compare, Op, Store, StoreError, Txn};
use fleet_unit::{OnIsolation, RequirementError, Requirements, UnitFile, UnitName};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;
use tracing::info;

/// How often a write is decided again when somebody else wrote first.
pub(super) const ATTEMPTS: usize = 16;

/// The most changes in one transaction: what an engine decides of as many fits in one, too.
const TOGETHER: usize = MAX_OPS - 3;

/// What putting a unit did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// A new unit, or a new file for a known one.
    Created,
    /// The desired state was set (or was so already).
    Updated,
}

/// What is to become of a unit.
#[derive(Clone, Debug)]
pub enum UnitChange {
    /// It is made, its file is replaced, or its desired state set.
    Put {
        /// Its name.
        name: UnitName,
        /// The file, where it is new or to be replaced.
        file: Option<UnitFile>,
        /// The desired state, if it is to be set.
        desired: Option<DesiredState>,
    },
    /// It is destroyed: its record and its place go at once; its machine stops it and takes it away.
    Destroy(UnitName),
}

impl UnitChange {
    fn name(&self) -> &UnitName {
        match self {
            UnitChange::Put { name, .. } | UnitChange::Destroy(name) => name,
        }
    }
}

/// What a change comes to, as far as the view knows: if the conditions hold these writes are made, if any, and that is the outcome.
struct Plan {
    compares: Vec<Compare>,
    ops: Vec<Op>,
    outcome: Result<Put, WriteError>,
}

impl Plan {
    /// Nothing is to be written; the condition confirms it: nothing else would show that another server knows more.
    fn nothing(name: &UnitName, revision: Revision, outcome: Result<Put, WriteError>) -> Self {
        Plan { compares: vec![Compare { key: unit_key(name), revision }], ops: Vec::new(), outcome }
    }

    /// Bytes, as a transaction counts them.
    fn size(&self) -> usize {
        let values = self.ops.iter().map(|op| match op {
            Op::Put { value, .. } => op.key().len() + value.len(),
            Op::Delete { .. } => op.key().len(),
        });
        self.compares.iter().map(|compare| compare.key.len()).chain(values).sum()
    }
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
        self.change_unit(&UnitChange::Put { name: name.clone(), file, desired }).await
    }

    /// Destroys a unit.
    pub async fn delete_unit(&self, name: &UnitName) -> Result<(), WriteError> {
        self.change_unit(&UnitChange::Destroy(name.clone())).await.map(drop)
    }

    async fn change_unit(&self, change: &UnitChange) -> Result<Put, WriteError> {
        for _ in 0..ATTEMPTS {
            let Plan { compares, ops, outcome } = self.plan(change).await?;
            let writes = !ops.is_empty();
            if let Some(revision) = self.try_commit(Txn { compares, ops }).await? {
                if writes {
                    self.hub.reached(revision).await;
                }
                return outcome;
            }
        }
        Err(WriteError::Contended(change.name().to_string()))
    }

    /// Makes many changes, in order, and answers when the view has them: for each what came of it. Each stands for itself: one that is
    /// refused does not keep the others from being made.
    pub async fn change_units(&self, changes: &[UnitChange]) -> Vec<Result<Put, WriteError>> {
        let mut outcomes = Vec::with_capacity(changes.len());
        let mut newest = 0;
        while outcomes.len() < changes.len() {
            let done = outcomes.len();
            let rest = changes.get(done..).unwrap_or_default();
            let (txn, together) = self.plan_together(rest).await;
            let (taken, writes) = (together.len(), !txn.ops.is_empty());
            match self.try_commit(txn).await {
                Ok(Some(revision)) => {
                    newest = if writes { revision } else { newest };
                    outcomes.extend(together);
                }
                // Whose ground has changed shows only when each is tried by itself.
                Ok(None) | Err(WriteError::Store(StoreError::TooLarge(_))) => {
                    for change in rest.iter().take(taken) {
                        outcomes.push(self.change_unit(change).await);
                    }
                }
                // Those after them would fare no better, and somebody waits.
                Err(error) => {
                    outcomes.resize(done + taken, Err(error));
                    let left = "it was not tried, since the registry did not take what came before it";
                    let left = WriteError::Store(StoreError::Unavailable(left.to_owned()));
                    outcomes.resize(changes.len(), Err(left));
                }
            }
        }
        self.hub.reached(newest).await;
        outcomes
    }

    /// One transaction of as many changes as fit, from the first on, with what comes of each if it is committed.
    async fn plan_together(&self, changes: &[UnitChange]) -> (Txn, Vec<Result<Put, WriteError>>) {
        let (mut txn, mut outcomes, mut bytes) = (Txn::default(), Vec::new(), 0);
        let mut names = BTreeSet::new();
        for change in changes {
            // A second change of a unit is worked out when the first is in the view.
            if !names.insert(change.name()) {
                break;
            }
            let plan = match self.plan(change).await {
                Ok(plan) => plan,
                Err(refused) => {
                    outcomes.push(Err(refused));
                    continue;
                }
            };
            bytes += plan.size();
            let conditions = txn.compares.len() + plan.compares.len();
            let full =
                conditions > TOGETHER || txn.ops.len() + plan.ops.len() > TOGETHER || bytes > MAX_BYTES;
            if full && !txn.compares.is_empty() {
                break;
            }
            txn.compares.extend(plan.compares);
            txn.ops.extend(plan.ops);
            outcomes.push(plan.outcome);
        }
        (txn, outcomes)
    }

    /// What a change comes to.
    ///
    /// # Errors
    /// Why it can't be made, whatever the registry says.
    async fn plan(&self, change: &UnitChange) -> Result<Plan, WriteError> {
        match change {
            UnitChange::Put { name, file, desired } => self.plan_put(name, file.as_ref(), *desired),
            UnitChange::Destroy(name) => Ok(self.plan_destroy(name).await?),
        }
    }

    fn plan_put(
        &self,
        name: &UnitName,
        file: Option<&UnitFile>,
        desired: Option<DesiredState>,
    ) -> Result<Plan, WriteError> {
        if let Some(reason) = self.hub.unchangeable(name) {
            return Err(WriteError::Unreadable(reason));
        }
        let known = self.hub.view().unit(name).map(|unit| (unit.file.clone(), unit.desired, unit.revision));
        let (put, file, desired, revision) = match (known, file) {
            (None, None) => return Ok(Plan::nothing(name, 0, Err(WriteError::NoFile))),
            (None, Some(file)) => (Put::Created, file.clone(), desired.unwrap_or_default(), 0),
            (Some((known, _, revision)), Some(file)) if known.hash() != file.hash() => {
                (Put::Created, file.clone(), desired.unwrap_or_default(), revision)
            }
            (Some((known, before, revision)), _) => {
                let Some(desired) = desired else { return Err(WriteError::NoDesiredState) };
                if desired == before {
                    return Ok(Plan::nothing(name, revision, Ok(Put::Updated)));
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
        let compares = vec![Compare { key: unit_key(name), revision }];
        Ok(Plan { compares, ops: vec![put_unit(name, &file, desired)], outcome: Ok(put) })
    }

    async fn plan_destroy(&self, name: &UnitName) -> Result<Plan, StoreError> {
        // With the machine that has to say when it does not run any more.
        let known = if self.hub.unchangeable(name).is_some() {
            let place = self.store.get(&schedule_key(name)).await?;
            let from = place.as_ref().and_then(|entry| {
                serde_json::from_slice::<ScheduleRecord>(&entry.value).ok().map(|record| record.machine)
            });
            let place = place.map_or(0, |entry| entry.revision);
            // It may have OnIsolation=stop.
            Some((self.stored(&unit_key(name)).await?, place, from))
        } else {
            let view = self.hub.view();
            let (from, place) = view.place(name).map_or((None, 0), |(id, revision)| (Some(id), revision));
            view.unit(name).map(|unit| {
                let stop = unit.requirements.on_isolation == OnIsolation::Stop;
                (unit.revision, place, from.filter(|_| stop).cloned())
            })
        };
        // What is deleted though nothing is there has no revision that the view comes to.
        let Some((unit, place, from)) = known.filter(|(unit, place, _)| (*unit, *place) != (0, 0)) else {
            return Ok(Plan::nothing(name, 0, Err(WriteError::NoUnit)));
        };
        let mut plan = Plan {
            compares: vec![
                Compare { key: unit_key(name), revision: unit },
                Compare { key: schedule_key(name), revision: place },
            ],
            ops: vec![Op::Delete { key: unit_key(name) }],
            outcome: Ok(Put::Updated),
        };
        if place != 0 {
            plan.ops.push(Op::Delete { key: schedule_key(name) });
        }
        plan.ops.extend(from.map(|from| put_leaving(name, &from)));
        Ok(plan)
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
    ///
    /// # Errors
    /// Also when it is of a newer format: what is written back in that would not be what it was.
    async fn machine_record(&self, id: &MachineId) -> Result<(MachineRecord, Compare), StoreError> {
        let key = machine_key(id);
        let asked = Instant::now();
        let entry = self.store.get(&key).await;
        self.metrics.operation(Operation::Get, asked.elapsed(), entry.is_ok());
        let entry = entry?;
        let revision = entry.as_ref().map_or(0, |entry| entry.revision);
        let record = match entry {
            Some(entry) => {
                read_record(&entry.value).map_err(|reason| StoreError::Damaged(format!("{key}: {reason}")))?
            }
            None => MachineRecord { format: FORMAT, ..MachineRecord::default() },
        };
        Ok((record, Compare { key, revision }))
    }

    /// Commits; `None` when a guard did not hold, after the view has what was in the way.
    async fn try_commit(&self, txn: Txn) -> Result<Option<Revision>, WriteError> {
        let asked = Instant::now();
        let written = self.store.commit(txn).await;
        let answered = matches!(written, Ok(_) | Err(StoreError::Conflict(_)));
        self.metrics.operation(Operation::Set, asked.elapsed(), answered);
        match written {
            Ok(revision) => Ok(Some(revision)),
            Err(StoreError::Conflict(conflict)) => {
                self.catch_up(&conflict).await?;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}
