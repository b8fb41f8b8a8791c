//! What a server knows, and who wants to hear of changes.
//!
//! The hub holds the [`View`] behind a lock that is held only for short, synchronous work. Consumers have mailboxes: sets of
//! names that changed since they looked. The event log remembers what changed, and at which revision, for event streams
//! to resume from; what an event says is read from the view when it is sent.
//!
//! Beside the view stands what only the leader's engine knows, and the registry does not: what it delays, and notices for operators
//! ([`super::said`]).

use super::said::Said;
use fleet_api::events::{Event, UnitEvent};
use fleet_api::types::{self, Explanation, Notice, Reason};
use fleet_cluster::engine::Delay;
use fleet_cluster::model::*;
use fleet_cluster::placement::{self, Misfit, Unplaced};
use fleet_cluster::view::{Effects, View};
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
    /// A notice, by its ID.
    Notice(String),
}

/// The place of an event stream in the log: how many entries the log has had before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventCursor(u64);

/// What is in the log after a cursor.
#[derive(Debug)]
pub struct Changed {
    /// Each once.
    pub subjects: BTreeSet<Subject>,
    /// The revision to resume from.
    pub revision: Revision,
    /// The cursor to go on from.
    pub cursor: EventCursor,
}

#[derive(Debug, Default)]
struct Log {
    /// Subjects with the revision of their change, oldest first.
    entries: VecDeque<(Revision, Subject)>,
    /// Everything after this revision is in `entries`.
    complete_after: Revision,
    /// How many entries there were before the first of `entries`.
    dropped: u64,
}

impl Log {
    fn add(&mut self, revision: Revision, subjects: impl IntoIterator<Item = Subject>) {
        self.entries.extend(subjects.into_iter().map(|subject| (revision, subject)));
        while self.entries.len() > LOG_LIMIT {
            if let Some((revision, _)) = self.entries.pop_front() {
                self.complete_after = self.complete_after.max(revision);
                self.dropped += 1;
            }
        }
    }
    /// Forgets everything: no cursor made before is good any more.
    fn clear(&mut self, revision: Revision) {
        self.dropped += self.entries.len() as u64 + 1;
        self.entries.clear();
        self.complete_after = revision;
    }
    fn end(&self) -> EventCursor {
        EventCursor(self.dropped + self.entries.len() as u64)
    }
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
    /// Told whenever that has grown.
    grown: Notify,
    engine: Mailbox<Effects>,
    sessions: Mutex<BTreeMap<MachineId, Arc<Mailbox<BTreeSet<UnitName>>>>>,
    /// What this server's engine lets know.
    own: Mutex<Said>,
    /// Told when that has changed.
    own_changed: Notify,
    /// What another server, which leads, lets know. Apart from the other, so that neither takes back what it has not said.
    heard: Mutex<Said>,
}

impl Hub {
    pub(super) fn new() -> Self {
        Hub {
            view: RwLock::default(),
            log: Mutex::default(),
            applied: watch::Sender::new(0),
            grown: Notify::new(),
            engine: Mailbox::default(),
            sessions: Mutex::default(),
            own: Mutex::default(),
            own_changed: Notify::new(),
            heard: Mutex::default(),
        }
    }

    /// Why a unit can't be changed, if one of its records can't be read as it is now.
    pub(super) fn unchangeable(&self, name: &UnitName) -> Option<String> {
        unread(&self.view(), name).map(str::to_owned)
    }

    /// Lets everybody wait who waits for the view: what it has is not what the registry has.
    pub(super) fn rewind(&self) {
        self.applied.send_replace(0);
    }

    /// The view, for reading. The guard must not be held across an await.
    pub fn view(&self) -> RwLockReadGuard<'_, View> {
        self.view.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The revision the view stands at, followed as it changes.
    pub fn applied(&self) -> watch::Receiver<Revision> {
        self.applied.subscribe()
    }

    /// Waits until the view has reached a revision. Who waits is woken in the order in which they came, which a receiver of
    /// `applied` is not.
    pub async fn reached(&self, revision: Revision) {
        loop {
            let grown = self.grown.notified();
            tokio::pin!(grown);
            // From here on nothing is missed.
            grown.as_mut().enable();
            if *self.applied.borrow() >= revision {
                return;
            }
            grown.await;
        }
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
            effects.merge(fresh.apply(change));
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
            // Also where the machine is not there: it may be back with the next change, and hold what it was told before.
            for (name, machine, _) in view.schedule() {
                effects.wanted.entry(machine.clone()).or_default().insert(name.clone());
            }
            for (name, machine) in view.all_leaving() {
                effects.wanted.entry(machine.clone()).or_default().insert(name.clone());
            }
            // What can be read now, too.
            for record in view.all_unread().collect::<Vec<_>>() {
                effects.merge(view.apply(Change::Unread(record, None)));
            }
            *view = fresh;
        }
        lock(&self.log).clear(revision);
        self.publish(effects, revision);
    }

    /// Applies the changes of one revision.
    pub(super) fn apply(&self, changes: Vec<Change>, revision: Revision) {
        let mut effects = Effects::default();
        {
            let mut view = self.view.write().unwrap_or_else(|poisoned| poisoned.into_inner());
            for change in changes {
                effects.merge(view.apply(change));
            }
        }
        let units = effects.units.iter().cloned().map(Subject::Unit);
        let machines = effects.machines.iter().cloned().map(Subject::Machine);
        lock(&self.log).add(revision, units.chain(machines));
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
            if !effects.everywhere.is_empty() {
                for mailbox in sessions.values() {
                    mailbox.post(|waiting| waiting.extend(effects.everywhere.iter().cloned()));
                }
            }
        }
        self.engine.post(|waiting| waiting.merge(effects));
        self.applied.send_replace(revision);
        self.grown.notify_waiters();
    }

    /// Takes over what the engine delays, and tells event streams of the units for which that changed.
    pub(super) fn set_delays(&self, delays: BTreeMap<UnitName, Delay>) {
        self.say(|own| own.delays = delays);
    }

    /// Says something to operators, until it is taken back.
    pub(super) fn set_notice(&self, notice: Notice) {
        self.say(|own| drop(own.notices.insert(notice.id.clone(), notice)));
    }

    /// Takes a notice back; false when there was none.
    pub(super) fn clear_notice(&self, id: &str) -> bool {
        let mut there = false;
        self.say(|own| there = own.notices.remove(id).is_some());
        there
    }

    fn say(&self, change: impl FnOnce(&mut Said)) {
        let changed = {
            let mut own = lock(&self.own);
            let before = own.clone();
            change(&mut own);
            own.differs_from(&before)
        };
        if !changed.is_empty() {
            self.own_changed.notify_waiters();
            self.tell(changed);
        }
    }

    /// Takes over what another server's engine lets know.
    pub(super) fn hear(&self, said: Said) {
        let before = std::mem::replace(&mut *lock(&self.heard), said.clone());
        self.tell(said.differs_from(&before));
    }

    /// What this server's engine lets know, as soon as it is not what was known.
    pub(super) async fn said_since(&self, known: Option<&Said>) -> Said {
        loop {
            let changed = self.own_changed.notified();
            tokio::pin!(changed);
            // From here on nothing is missed.
            changed.as_mut().enable();
            {
                let own = lock(&self.own);
                if known != Some(&*own) {
                    return own.clone();
                }
            }
            changed.await;
        }
    }

    /// All notices, by ID.
    pub fn notices(&self) -> Vec<Notice> {
        let mut all = lock(&self.heard).notices.clone();
        all.extend(lock(&self.own).notices.clone());
        all.into_values().collect()
    }

    fn notice(&self, id: &str) -> Option<Notice> {
        lock(&self.own).notices.get(id).or(lock(&self.heard).notices.get(id)).cloned()
    }

    fn delay(&self, name: &UnitName) -> Option<Delay> {
        lock(&self.own).delays.get(name).or(lock(&self.heard).delays.get(name)).copied()
    }

    /// Tells event streams of changes that the registry knows nothing of.
    fn tell(&self, subjects: impl IntoIterator<Item = Subject>) {
        let mut subjects = subjects.into_iter().peekable();
        if subjects.peek().is_none() {
            return;
        }
        lock(&self.log).add(*self.applied.borrow(), subjects);
        self.applied.send_modify(|_| {});
    }

    /// The cursor from which on everything is still to come.
    pub fn now(&self) -> EventCursor {
        lock(&self.log).end()
    }

    /// The cursor after a revision; `None` when the log does not reach back that far.
    pub fn after(&self, revision: Revision) -> Option<EventCursor> {
        let log = lock(&self.log);
        if revision < log.complete_after {
            return None;
        }
        let before = log.entries.partition_point(|(at, _)| *at <= revision);
        Some(EventCursor(log.dropped + before as u64))
    }

    /// What changed after `cursor`; `None` when the log does not reach back that far.
    pub fn changed_since(&self, cursor: EventCursor) -> Option<Changed> {
        let log = lock(&self.log);
        let start = usize::try_from(cursor.0.checked_sub(log.dropped)?).ok()?;
        let subjects = log.entries.iter().skip(start).map(|(_, subject)| subject.clone()).collect();
        let revision = log.entries.back().map_or(log.complete_after, |(revision, _)| *revision);
        Some(Changed { subjects, revision, cursor: log.end() })
    }

    /// What is to be said of a subject now.
    pub fn event(&self, subject: &Subject) -> Event {
        match subject {
            Subject::Unit(name) => self.unit_event(name),
            Subject::Machine(id) => match self.view().machine(id) {
                Some(machine) => Event::Machine(machine_resource(id, machine)),
                None => Event::MachineGone { id: id.to_string() },
            },
            Subject::Notice(id) => match self.notice(id) {
                Some(notice) => Event::Notice(notice),
                None => Event::NoticeGone { id: id.clone() },
            },
        }
    }

    fn unit_event(&self, name: &UnitName) -> Event {
        let view = self.view();
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
            explanation: self.explanation(&view, name),
            states,
        })
    }

    /// Why a unit is not (yet) what it should be.
    pub(crate) fn explanation(&self, view: &View, name: &UnitName) -> Explanation {
        let mut explanation = explanation(view, name);
        if let Some(delay) = self.delay(name) {
            explanation.delayed = delay.to_string();
        }
        explanation
    }
}

/// Why nothing can be said of a unit, if its record, or that of its place, can't be read.
pub(super) fn unread<'v>(view: &'v View, name: &UnitName) -> Option<&'v str> {
    [RecordKind::Unit, RecordKind::Schedule]
        .into_iter()
        .find_map(|kind| view.unread_record(name.as_str(), kind))
}

/// What the view tells of why a unit is not (yet) what it should be.
fn explanation(view: &View, name: &UnitName) -> Explanation {
    // What an older file ran into is no problem of the present one.
    let hash = view.unit(name).map(|unit| unit.file.hash());
    let mut problems: Vec<_> = view
        .reports_of(name)
        .filter(|(_, report)| hash.is_none_or(|hash| hash == report.hash))
        .filter_map(|(machine, report)| {
            let reason = report.problem.clone()?;
            Some(Reason { machine_id: machine.to_string(), reason })
        })
        .collect();
    let left_alone = view.undecidable(name).map(|reason| {
        format!("a record of it can't be read by this server, which leaves it as it is: {reason}")
    });
    let is_placed = view.place(name).is_some();
    if let Some(reason) = left_alone.clone().filter(|_| is_placed) {
        problems.push(Reason { machine_id: String::new(), reason });
    }
    let unplaced = match placement::explain(view, name) {
        None => Vec::new(),
        Some(Unplaced::NoMachines) => {
            vec![Reason { machine_id: String::new(), reason: "no machine is there".to_owned() }]
        }
        Some(Unplaced::NoFit(misfits)) => misfit_reasons(misfits),
    };
    Explanation {
        current_state: view.current(name).as_str().to_owned(),
        delayed: left_alone.filter(|_| !is_placed).unwrap_or_default(),
        desired_state: view.unit(name).map(|unit| unit.desired.as_str().to_owned()).unwrap_or_default(),
        machine_id: view.place(name).map(|(machine, _)| machine.to_string()).unwrap_or_default(),
        name: name.to_string(),
        problems,
        unplaced,
    }
}

/// Misfits, as the API shows them.
pub(crate) fn misfit_reasons(misfits: Vec<(MachineId, Misfit)>) -> Vec<Reason> {
    let reason = |(machine, misfit): (MachineId, Misfit)| Reason {
        machine_id: machine.to_string(),
        reason: misfit.to_string(),
    };
    misfits.into_iter().map(reason).collect()
}

/// A machine, as the API shows it.
pub(crate) fn machine_resource(id: &MachineId, machine: &Machine) -> types::Machine {
    types::Machine {
        cordoned: machine.cordoned,
        draining: machine.draining,
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

#[cfg(test)]
mod tests {
    use super::*;

    fn came(id: &str) -> Vec<Change> {
        vec![Change::Machine(MachineId::parse(id).unwrap(), Some(Machine::default()))]
    }

    #[test]
    fn cursors_see_what_the_registry_knows_nothing_of() {
        let hub = Hub::new();
        hub.reset(Vec::new(), 5);
        let before = hub.now();
        let notice = Notice { id: "massLoss".into(), since: 1, text: "many".into() };
        hub.set_notice(notice.clone());
        let changed = hub.changed_since(before).unwrap();
        assert_eq!(changed.subjects, BTreeSet::from([Subject::Notice("massLoss".into())]));
        assert_eq!(changed.revision, 5);
        assert_eq!(hub.event(&Subject::Notice("massLoss".into())), Event::Notice(notice));
        assert!(hub.changed_since(changed.cursor).unwrap().subjects.is_empty());
        hub.clear_notice("massLoss");
        hub.clear_notice("massLoss");
        let name = UnitName::parse("a.service").unwrap();
        hub.set_delays([(name.clone(), Delay::MassLoss)].into());
        hub.set_delays([(name.clone(), Delay::MassLoss)].into());
        let changed = hub.changed_since(changed.cursor).unwrap();
        assert_eq!(
            changed.subjects,
            [Subject::Unit(name.clone()), Subject::Notice("massLoss".into())].into()
        );
        assert!(hub.explanation(&hub.view(), &name).delayed.starts_with("many machines vanished"));
        hub.set_delays(BTreeMap::new());
        assert_eq!(hub.explanation(&hub.view(), &name).delayed, "");
    }

    #[test]
    fn agents_hear_of_what_can_be_read_again_also_when_changes_were_missed() {
        let hub = Hub::new();
        let name = UnitName::parse("a.service").unwrap();
        let broken = Change::Unread(
            Record::OfUnit(RecordKind::Schedule, name.clone()),
            Some(Unreadable { reason: "format 2".to_owned(), revision: 9 }),
        );
        hub.reset(vec![broken], 5);
        let mailbox = hub.open_mailbox(&MachineId::parse(&"1".repeat(32)).unwrap());
        assert!(hub.unchangeable(&name).is_some());
        assert!(hub.explanation(&hub.view(), &name).delayed.ends_with("format 2"));
        hub.reset(Vec::new(), 9);
        assert_eq!(hub.unchangeable(&name), None);
        assert_eq!(mailbox.take(), BTreeSet::from([name]));
    }

    /// Its session goes on, and knows only what it is told to look at.
    #[test]
    fn a_machine_that_is_away_hears_of_what_moved_while_changes_were_missed() {
        let hub = Hub::new();
        let name = UnitName::parse("a.service").unwrap();
        let [away, other] = ["1", "2"].map(|digit| MachineId::parse(&digit.repeat(32)).unwrap());
        let placed = |machine: &MachineId, revision| {
            let file = fleet_unit::UnitFile::parse("[Service]\nExecStart=/bin/app\n").unwrap();
            let requirements = fleet_unit::Requirements::of(&name, &file).unwrap().into();
            let unit = Unit { file, requirements, desired: DesiredState::Launched, revision: 1 };
            vec![
                Change::Unit(name.clone(), Some(unit)),
                Change::Schedule(name.clone(), Some((machine.clone(), revision))),
            ]
        };
        hub.reset(placed(&away, 3), 5);
        let mailbox = hub.open_mailbox(&away);
        mailbox.take();
        hub.reset(placed(&other, 8), 9);
        assert_eq!(mailbox.take(), BTreeSet::from([name.clone()]));
    }

    #[test]
    fn what_is_heard_and_what_is_said_stand_apart() {
        let hub = Hub::new();
        let (a, b) = (UnitName::parse("a.service").unwrap(), UnitName::parse("b.service").unwrap());
        let notice = |text: &str| Notice { id: "massLoss".into(), since: 1, text: text.into() };
        let delayed = |name| hub.explanation(&hub.view(), name).delayed;
        let before = hub.now();
        let heard = Said {
            delays: [(a.clone(), Delay::Grace)].into(),
            notices: [("massLoss".to_owned(), notice("heard"))].into(),
        };
        hub.hear(heard);
        let changed = hub.changed_since(before).unwrap();
        assert_eq!(changed.subjects, [Subject::Unit(a.clone()), Subject::Notice("massLoss".into())].into());
        assert!(delayed(&a).contains("given time to come back"));
        assert_eq!(hub.notices(), [notice("heard")]);
        // This server leads now, and what the former leader said ends only then.
        hub.set_notice(notice("own"));
        hub.set_delays([(b.clone(), Delay::MassLoss)].into());
        assert_eq!(hub.notices(), [notice("own")]);
        hub.hear(Said::default());
        assert_eq!(hub.notices(), [notice("own")]);
        assert_eq!(delayed(&a), "");
        assert!(delayed(&b).starts_with("many machines"));
        assert!(hub.changed_since(changed.cursor).unwrap().subjects.contains(&Subject::Unit(a)));
    }

    #[test]
    fn a_log_that_was_cleared_or_is_full_says_so() {
        let hub = Hub::new();
        hub.reset(Vec::new(), 5);
        let first = hub.now();
        hub.apply(came("00000000000000000000000000000001"), 6);
        assert_eq!(hub.after(5), Some(first));
        assert_eq!(hub.after(6), Some(hub.now()));
        assert_eq!(hub.after(4), None);
        hub.reset(Vec::new(), 9);
        assert!(hub.changed_since(first).is_none(), "what was before is not known any more");
        let second = hub.now();
        lock(&hub.log).add(10, (0..=LOG_LIMIT).map(|n| Subject::Notice(n.to_string())));
        assert!(hub.changed_since(second).is_none(), "it fell behind");
        assert_eq!(hub.after(9), None);
        assert!(hub.changed_since(hub.now()).unwrap().subjects.is_empty());
    }
}
