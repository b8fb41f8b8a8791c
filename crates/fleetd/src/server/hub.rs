//! What a server knows, and who wants to hear of changes.
//!
//! The hub holds the [`View`] behind a lock that is held only for short, synchronous work. Consumers have mailboxes: sets of
//! names that changed since they looked. The event log remembers which names changed at which revision, for event streams
//! to resume from; what an event says is read from the view when it is sent.

use fleet_api::events::{Event, UnitEvent};
use fleet_api::types::{self, Explanation, Reason};
use fleet_cluster::model::*;
use fleet_cluster::placement::{self, Unplaced};
use fleet_cluster::view::{Effects, View};
use fleet_registry::records::{RecordError, SCHEDULE, UNITS, schedule_key, unit_key};
use fleet_unit::UnitName;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard};
use tokio::sync::{Notify, watch};

/// How many changed names the event log keeps. An event stream that is further behind has to list anew.
const LOG_LIMIT: usize = 16_384;

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// A unit.
    Unit(UnitName),
    /// A machine.
    Machine(MachineId),
}

/// The place of an event stream in the log.
pub type EventCursor = Revision;

#[derive(Debug, Default)]
struct Log {
    /// Subjects with the revision of their change, oldest first.
    entries: VecDeque<(Revision, Subject)>,
    /// Everything after this revision is in `entries`.
    complete_after: Revision,
}

/// A consumer's mailbox.
#[derive(Debug, Default)]
pub(crate) struct Mailbox<T> {
    content: Mutex<T>,
    wake: Notify,
}

impl<T: Default> Mailbox<T> {
    /// Adds something.
    pub(crate) fn post(&self, add: impl FnOnce(&mut T)) {
        add(&mut lock(&self.content));
        self.wake.notify_one();
    }
    /// Waits until something was added since the last [`take`](Self::take). Cancel-safe.
    pub(crate) async fn wait(&self) {
        self.wake.notified().await;
    }
    /// Takes everything.
    pub(crate) fn take(&self) -> T {
        std::mem::take(&mut lock(&self.content))
    }
}

/// A poisoned lock only means that a task panicked while holding it; the values here are changed in single
/// steps, so they are whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// See the module.
#[derive(Debug)]
pub struct Hub {
    view: RwLock<View>,
    log: Mutex<Log>,
    /// The revision up to which the view is complete; 0 before the first snapshot.
    applied: watch::Sender<Revision>,
    engine: Mailbox<Effects>,
    sessions: Mutex<BTreeMap<MachineId, Arc<Mailbox<BTreeSet<UnitName>>>>>,
    /// Records of units that can't be read, by key, with the reason. What the view lacks for that is no instruction.
    unreadable: Mutex<BTreeMap<Arc<str>, String>>,
}

impl Hub {
    pub(super) fn new() -> Self {
        Hub {
            view: RwLock::default(),
            log: Mutex::default(),
            applied: watch::Sender::new(0),
            engine: Mailbox::default(),
            sessions: Mutex::default(),
            unreadable: Mutex::default(),
        }
    }

    /// Takes which records can't be read, before a snapshot without them replaces the view.
    pub(super) fn set_unreadable(&self, broken: &[RecordError]) {
        let broken = broken.iter().map(|error| (error.key.as_str().into(), error.reason.clone()));
        *lock(&self.unreadable) = broken.collect();
    }

    /// A record was written that can be read, or is gone, and the view has that: every agent that was told to leave the unit
    /// alone is to be told anew.
    pub(super) fn set_readable(&self, key: &str) {
        if lock(&self.unreadable).remove(key).is_none() {
            return;
        }
        let Some(name) = unit_of(key) else { return };
        for mailbox in lock(&self.sessions).values() {
            mailbox.post(|waiting| waiting.extend([name.clone()]));
        }
    }

    /// Why nothing can be said of a unit, if one of its records can't be read.
    pub fn unreadable(&self, name: &UnitName) -> Option<String> {
        let unreadable = lock(&self.unreadable);
        if unreadable.is_empty() {
            return None;
        }
        [unit_key(name), schedule_key(name)].iter().find_map(|key| unreadable.get(key.as_str()).cloned())
    }

    /// All units of which a record can't be read.
    pub(super) fn all_unreadable(&self) -> BTreeSet<UnitName> {
        let unreadable = lock(&self.unreadable);
        unreadable.keys().filter_map(|key| unit_of(key)).collect()
    }

    /// The view, for reading. The guard must not be held across an await.
    pub fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The revision the view stands at, followed as it changes.
    pub fn applied(&self) -> watch::Receiver<Revision> {
        self.applied.subscribe()
    }

    /// Waits until the view has reached a revision.
    pub async fn reached(&self, revision: Revision) {
        // The sender lives as long as the hub, so this can't fail.
        let _ = self.applied.subscribe().wait_for(|applied| *applied >= revision).await;
    }

    pub(super) fn engine_mailbox(&self) -> &Mailbox<Effects> {
        &self.engine
    }

    /// A mailbox of names whose wanted state on a machine may have changed. Replaces one there was before.
    pub(super) fn open_mailbox(&self, machine: &MachineId) -> Arc<Mailbox<BTreeSet<UnitName>>> {
        let mailbox = Arc::new(Mailbox::default());
        lock(&self.sessions).insert(machine.clone(), mailbox.clone());
        mailbox
    }

    pub(super) fn close_mailbox(&self, machine: &MachineId, mailbox: &Arc<Mailbox<BTreeSet<UnitName>>>) {
        let mut sessions = lock(&self.sessions);
        if sessions.get(machine).is_some_and(|current| Arc::ptr_eq(current, mailbox)) {
            sessions.remove(machine);
        }
    }

    /// Replaces the whole view (at start, and when changes were missed). Event streams have to list anew.
    pub(super) fn reset(&self, changes: Vec<Change>, revision: Revision) {
        let mut fresh = View::default();
        let mut effects = Effects::default();
        for change in changes {
            merge(&mut effects, fresh.apply(change));
        }
        {
            let mut view = self.view.write().unwrap_or_else(|poisoned| poisoned.into_inner());
            // What was there before and is no longer has changed, too.
            for (name, _) in view.units() {
                effects.units.insert(name.clone());
            }
            for (name, machine, _) in view.reports() {
                effects.units.insert(name.clone());
                effects.wanted.entry(machine.clone()).or_default().insert(name.clone());
            }
            for (id, _) in view.machines() {
                effects.machines.insert(id.clone());
                effects.wanted.entry(id.clone()).or_default().extend(view.all_wanted(id).into_keys());
            }
            *view = fresh;
        }
        {
            let mut log = lock(&self.log);
            log.entries.clear();
            log.complete_after = revision;
        }
        self.publish(effects, revision);
    }

    /// Applies the changes of one revision.
    pub(super) fn apply(&self, changes: Vec<Change>, revision: Revision) {
        let mut effects = Effects::default();
        {
            let mut view = self.view.write().unwrap_or_else(|poisoned| poisoned.into_inner());
            for change in changes {
                merge(&mut effects, view.apply(change));
            }
        }
        {
            let mut log = lock(&self.log);
            let subjects = effects.units.iter().cloned().map(Subject::Unit);
            let machines = effects.machines.iter().cloned().map(Subject::Machine);
            log.entries.extend(subjects.chain(machines).map(|subject| (revision, subject)));
            while log.entries.len() > LOG_LIMIT {
                if let Some((dropped, _)) = log.entries.pop_front() {
                    log.complete_after = log.complete_after.max(dropped);
                }
            }
        }
        self.publish(effects, revision);
    }

    fn publish(&self, effects: Effects, revision: Revision) {
        {
            let sessions = lock(&self.sessions);
            for (machine, names) in &effects.wanted {
                if let Some(mailbox) = sessions.get(machine) {
                    mailbox.post(|waiting| waiting.extend(names.iter().cloned()));
                }
            }
        }
        self.engine.post(|waiting| merge(waiting, effects));
        self.applied.send_replace(revision);
    }

    /// The subjects that changed after `cursor`, each once, and the cursor to go on from; `None` when the log
    /// does not reach back that far.
    pub fn changed_since(&self, cursor: EventCursor) -> Option<(BTreeSet<Subject>, EventCursor)> {
        let log = lock(&self.log);
        if cursor < log.complete_after {
            return None;
        }
        let newest = log.entries.back().map_or(log.complete_after, |(revision, _)| *revision);
        let start = log.entries.partition_point(|(revision, _)| *revision <= cursor);
        let subjects = log.entries.iter().skip(start).map(|(_, subject)| subject.clone()).collect();
        Some((subjects, newest.max(cursor)))
    }

    /// What is to be said of a subject now.
    pub fn event(&self, subject: &Subject) -> Event {
        let view = self.view();
        match subject {
            Subject::Unit(name) => unit_event(&view, name),
            Subject::Machine(id) => match view.machine(id) {
                Some(machine) => Event::Machine(machine_resource(id, machine)),
                None => Event::MachineGone { id: id.to_string() },
            },
        }
    }
}

/// The unit whose record a key is of.
fn unit_of(key: &str) -> Option<UnitName> {
    UnitName::parse(key.strip_prefix(UNITS).or_else(|| key.strip_prefix(SCHEDULE))?).ok()
}

fn merge(into: &mut Effects, more: Effects) {
    into.units.extend(more.units);
    into.machines.extend(more.machines);
    for (machine, names) in more.wanted {
        into.wanted.entry(machine).or_default().extend(names);
    }
}

fn unit_event(view: &View, name: &UnitName) -> Event {
    let states: Vec<_> =
        view.reports_of(name).map(|(machine, report)| state_resource(name, machine, report)).collect();
    let unit = view.unit(name);
    if unit.is_none() && states.is_empty() {
        return Event::UnitGone { name: name.to_string() };
    }
    Event::Unit(UnitEvent {
        known: unit.is_some(),
        hash: unit.map(|unit| unit.file.hash().to_string()).unwrap_or_default(),
        global: unit.is_some_and(|unit| unit.requirements.global),
        explanation: explanation(view, name),
        states,
    })
}

/// Why a unit is not (yet) what it should be.
pub(crate) fn explanation(view: &View, name: &UnitName) -> Explanation {
    // What an older file ran into is no problem of the present one.
    let hash = view.unit(name).map(|unit| unit.file.hash());
    let problems = view
        .reports_of(name)
        .filter(|(_, report)| hash.is_none_or(|hash| hash == report.hash))
        .filter_map(|(machine, report)| {
            let reason = report.problem.clone()?;
            Some(Reason { machine_id: machine.to_string(), reason })
        })
        .collect();
    let unplaced = match placement::explain(view, name) {
        None => Vec::new(),
        Some(Unplaced::NoMachines) => {
            vec![Reason { machine_id: String::new(), reason: "no machine is there".to_owned() }]
        }
        Some(Unplaced::NoFit(misfits)) => misfits
            .into_iter()
            .map(|(machine, misfit)| Reason { machine_id: machine.to_string(), reason: misfit.to_string() })
            .collect(),
    };
    Explanation {
        current_state: view.current(name).as_str().to_owned(),
        desired_state: view.unit(name).map(|unit| unit.desired.as_str().to_owned()).unwrap_or_default(),
        machine_id: view.place(name).map(|(machine, _)| machine.to_string()).unwrap_or_default(),
        name: name.to_string(),
        problems,
        unplaced,
    }
}

/// A machine, as the API shows it.
pub(crate) fn machine_resource(id: &MachineId, machine: &Machine) -> types::Machine {
    types::Machine {
        id: id.to_string(),
        metadata: machine.metadata.clone(),
        primary_ip: machine.public_ip.clone(),
    }
}

/// A unit's state on a machine, as the API shows it.
pub(crate) fn state_resource(name: &UnitName, machine: &MachineId, report: &UnitReport) -> types::UnitState {
    types::UnitState {
        hash: report.hash.to_string(),
        machine_id: machine.to_string(),
        name: name.to_string(),
        systemd_active_state: report.systemd.active.clone(),
        systemd_load_state: report.systemd.load.clone(),
        systemd_sub_state: report.systemd.sub.clone(),
    }
}
