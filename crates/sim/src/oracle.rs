//! What is true, whoever knows it, and what must never happen.
//!
//! The oracle follows the store itself, without delay, and hears of everything that happens to a unit on any machine. It
//! checks after every step. What it is told to expect is written in docs/RELIABILITY.md; here is how it tells:
//!
//! - **G1**: when a write is acknowledged, the store holds or has held it since the command was given.
//! - **G2**: fleet starts and stops a unit on a machine only if, since the unit was last touched there, the registry said something
//!   else of it at some time, or the machine could not renew its presence and the unit has OnIsolation=stop. And the schedule
//!   takes a unit from a machine that is there only if it did not fit there.
//! - **G4**: a unit that a machine reports to run is not placed on another, and one with OnIsolation=stop never
//!   runs twice; nor does a machine that is there count as having stopped one that runs there.
//! - A machine that was removed counts as having let go of its units only when none of them that must not run twice runs there; others may
//!   be about to stop. From its removal on nothing is wanted there.
//! - **G5**: only the leader of the moment changes the schedule.
//! - The view of the true state, and its indexes, are as computed from scratch.
//!
//! This file follows the store and checks what is written there; `lives` checks what runs where, and `rest` what there has to be when
//! everything works again.

mod lives;
mod rest;

pub(crate) use rest::same_views;

use crate::commands::Wrote;
use crate::process::Time;
use crate::systemd::{By, Fact, Phase};
use fleet_cluster::drain::drain_status;
use fleet_cluster::model::*;
use fleet_cluster::placement;
use fleet_cluster::view::View;
use fleet_registry::records::{PRESENCES, Reader, SCHEDULE, STATES, UNITS};
use fleet_registry::{Event, Snapshot, WatchBatch};
use fleet_unit::{Hash, OnIsolation, UnitName};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// For so long what was true counts as known to somebody: it was on its way, or a machine was busy with it.
const NEWS: Duration = Duration::from_secs(5);
/// How much longer it takes out of a slow store.
const SLOW: Duration = Duration::from_secs(8);
/// How long an agent may take to see what it was told.
const SOON: Duration = Duration::from_secs(1);
/// A report that is this old was seen by the leader before it made a decision that is committed now, however slow the store.
const SEEN: Duration = Duration::from_secs(20);
/// The index check is slow: it is made at every so many changes.
const CHECK_EVERY: u64 = 8;

/// The store's key of the leader, whose value names its server.
pub(crate) const LEADER: &str = "leader";

/// What keys of members, and of machines that were removed, begin with.
pub(crate) const MEMBERS: &str = "member/";
pub(crate) const REMOVED: &str = "removed/";

/// What was wanted of a unit, in the cluster or on a machine.
type Want = Option<(Hash, DesiredState)>;

/// A process of a unit on a machine.
#[derive(Clone, Debug)]
struct Run {
    /// When its start was asked for, and when it began.
    asked: Time,
    started: Time,
    hash: Option<Hash>,
    live: bool,
    /// fleet, or the guard, told it to stop.
    stopped: bool,
}

/// What must never happen did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// When, in simulated time.
    pub at: Duration,
    /// Which check found it.
    pub check: &'static str,
    /// What happened.
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} s: {}: {}", self.at.as_secs_f64(), self.check, self.what)
    }
}

/// See the module.
pub(crate) struct Oracle {
    view: View,
    reader: Reader,
    revision: Revision,
    checked: u64,
    ids: Vec<MachineId>,
    ttl: Duration,
    /// Several servers share the registry.
    /// A sign of life was sent up to this long before it was seen that it was: who sent it was asked a step later, and that it was
    /// sent was seen in the next.
    sent: Duration,
    shared: bool,
    leader: Option<MachineId>,
    /// What each machine was to hold, with the times from which.
    wants: BTreeMap<(MachineId, UnitName), Vec<(Time, Want)>>,
    /// What was known of each unit, with the times from which.
    units: BTreeMap<UnitName, Vec<(Time, Want)>>,
    /// When a unit last did not fit where it was placed.
    unfit: BTreeMap<UnitName, Time>,
    /// Units that are being taken off where they fitted: they have to come to not fit there at the same revision.
    taken_off: Vec<(UnitName, MachineId)>,
    /// Since when machines report units to run.
    reported: BTreeMap<(UnitName, MachineId), Time>,
    /// Commands under way that give a unit a file, by their numbers. What became of some is never known.
    asked: BTreeMap<u64, (UnitName, Hash)>,
    /// When machines came.
    came: BTreeMap<MachineId, Time>,
    runs: BTreeMap<(usize, UnitName), Run>,
    /// Files with OnIsolation=stop: what runs of one of them must not run twice.
    stops: BTreeMap<UnitName, BTreeSet<Hash>>,
    /// When units were last given a file without OnIsolation=stop after one with it.
    unbound: BTreeMap<UnitName, Time>,
    /// Something has changed of what runs since it was looked at: until then nothing of that can have become wrong.
    lives_changed: bool,
    /// When a host that goes on counts again.
    counts_at: BTreeSet<Time>,
    /// When the newest renewals that a machine was told of were sent, and when it was told.
    renewed: BTreeMap<usize, Vec<(Time, Time)>>,
    /// When a fleetd was last killed on a host: what it was about to note is lost.
    killed: BTreeMap<usize, Time>,
    /// The servers that have the sessions of machines, by the presences in the store.
    speakers: BTreeMap<MachineId, MachineId>,
    /// Since when machines are not there that were.
    gone: BTreeMap<MachineId, Time>,
    /// Machines that were removed and have not let go of their units, nor joined again.
    removed: BTreeSet<MachineId>,
    /// When machines last ceased to be that.
    let_go: BTreeMap<MachineId, Time>,
    /// Units whose records this version can't read: what was known of them stays so.
    unreadable: BTreeSet<UnitName>,
    /// Records that only newer servers can read.
    newer: BTreeSet<std::sync::Arc<str>>,
    /// Units that are, or have been, Global.
    globals: BTreeSet<UnitName>,
    /// When there was one last.
    blind: Option<Time>,
    /// Hosts that are suspended, and when those that are not any more went on.
    asleep: BTreeSet<usize>,
    woke: BTreeMap<usize, Time>,
    /// When hosts could not hear of anything last, or not do anything about it: from when until when.
    stalled: BTreeMap<usize, (Time, Time)>,
    /// Hosts on which files could not be written, until when.
    full: BTreeMap<usize, Time>,
    pub(crate) violations: Vec<Violation>,
}

impl Oracle {
    /// `step`: the longest step of time.
    pub(crate) fn new(ids: Vec<MachineId>, ttl: Duration, shared: bool, step: Duration) -> Self {
        Oracle {
            view: View::default(),
            reader: Reader::default(),
            revision: 0,
            checked: 0,
            ids,
            ttl,
            sent: step * 3,
            shared,
            leader: None,
            wants: BTreeMap::new(),
            units: BTreeMap::new(),
            unfit: BTreeMap::new(),
            taken_off: Vec::new(),
            reported: BTreeMap::new(),
            asked: BTreeMap::new(),
            came: BTreeMap::new(),
            runs: BTreeMap::new(),
            stops: BTreeMap::new(),
            unbound: BTreeMap::new(),
            lives_changed: false,
            counts_at: BTreeSet::new(),
            renewed: BTreeMap::new(),
            killed: BTreeMap::new(),
            speakers: BTreeMap::new(),
            gone: BTreeMap::new(),
            removed: BTreeSet::new(),
            let_go: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            newer: BTreeSet::new(),
            globals: BTreeSet::new(),
            blind: None,
            asleep: BTreeSet::new(),
            woke: BTreeMap::new(),
            stalled: BTreeMap::new(),
            full: BTreeMap::new(),
            violations: Vec::new(),
        }
    }

    pub(crate) fn leader(&self) -> Option<&MachineId> {
        self.leader.as_ref()
    }

    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    pub(crate) fn violate(&mut self, at: Time, check: &'static str, what: String) {
        self.violations.push(Violation { at, check, what });
    }

    /// The store came back with everything but what is under leases.
    pub(crate) fn reset(&mut self, now: Time, snapshot: &Snapshot) {
        let durable = |snapshot: &Snapshot| {
            let (changes, _) = Reader::default().snapshot(snapshot);
            let mut view = View::default();
            changes.into_iter().for_each(|change| drop(view.apply(change)));
            view
        };
        let found = durable(snapshot);
        let known = |view: &View| {
            let units = view.units().map(|(name, unit)| (name.clone(), unit.revision)).collect::<Vec<_>>();
            let places = view.schedule().map(|(name, id, at)| (name.clone(), id.clone(), at));
            (units, places.collect::<Vec<_>>())
        };
        let unreadable = |(units, places): (Vec<(UnitName, Revision)>, Vec<_>)| {
            let units = units.into_iter().filter(|(name, _)| !self.unreadable.contains(name));
            (units.collect::<Vec<_>>(), places)
        };
        let (known, found) = (unreadable(known(&self.view)), unreadable(known(&found)));
        if known != found {
            let what = format!("the store had {known:?} and has after its restart {found:?}");
            self.violate(now, "G1", what);
        }
        let gone: Vec<_> = self.view.machines().map(|(id, _)| id.clone()).collect();
        for id in gone {
            self.apply(now, Change::States(id.clone(), BTreeMap::new()));
            self.apply(now, Change::Machine(id, None));
        }
        self.leader = None;
        self.reader = Reader::default();
        self.reader.snapshot(snapshot);
        self.revision = snapshot.revision;
    }

    /// What the store did at one revision. `by`: the host whose server asked for it.
    pub(crate) fn follow(&mut self, now: Time, batch: &WatchBatch, by: Option<usize>) {
        self.revision = batch.revision;
        for event in &batch.events {
            if &*event.key == LEADER {
                let server = event.entry.as_ref().and_then(|entry| {
                    let record: serde_json::Value = serde_json::from_slice(&entry.value).ok()?;
                    MachineId::parse(record["server"].as_str()?).ok()
                });
                self.leader = server;
            }
            self.follow_sessions(now, event, by);
            self.follow_removals(now, event, by);
            if event.key.starts_with(SCHEDULE) {
                self.check_leader(now, by, batch, event.key.as_ref());
            }
            let unit = event.key.strip_prefix(UNITS).and_then(|name| UnitName::parse(name).ok());
            match self.reader.event(event) {
                Ok(change) => {
                    if let Some(change) = change {
                        self.check_change(now, &change);
                        self.apply(now, change);
                    }
                    if unit.is_some_and(|unit| self.unreadable.remove(&unit)) {
                        self.blind = Some(now);
                    }
                }
                // A newer version has written it.
                Err(_) if by.is_none() && unit.is_some() => self.unreadable.extend(unit),
                Err(error) => self.violate(now, "records", error.to_string()),
            }
        }
        for (name, at) in std::mem::take(&mut self.taken_off) {
            let known = self.view.unit(&name).is_some() && self.view.machine(&at).is_some();
            // What others ask of a unit that can't be read is not known to be so.
            let blind = self.is_blind(now) && !self.unreadable.contains(&name);
            if known && !blind && placement::fits(&self.view, &name, &at).is_ok() {
                self.violate(now, "G2", format!("{name} was taken off {at}, which is there and fits"));
            }
        }
        self.note_fit(now);
        self.checked += 1;
        if self.checked.is_multiple_of(CHECK_EVERY)
            && let Err(error) = self.view.check()
        {
            self.violate(now, "view", error);
        }
    }

    /// Which records are such that only newer servers can read them.
    pub(crate) fn follow_formats(&mut self, now: Time, batch: &WatchBatch, is_newer: impl Fn(&[u8]) -> bool) {
        for event in &batch.events {
            if event.entry.as_ref().is_some_and(|entry| is_newer(&entry.value)) {
                self.newer.insert(event.key.clone());
            } else if self.newer.remove(&event.key) {
                self.blind = Some(now);
            }
        }
    }

    /// From now on all servers can read those.
    pub(crate) fn all_is_read(&mut self, now: Time) {
        self.newer.clear();
        self.blind = Some(now);
    }

    /// A machine was removed, has let go of its units, or joined again.
    fn follow_removals(&mut self, now: Time, event: &Event, by: Option<usize>) {
        let Some(id) = event.key.strip_prefix(REMOVED).and_then(|id| MachineId::parse(id).ok()) else {
            return;
        };
        if event.entry.is_some() {
            self.removed.insert(id.clone());
        } else {
            if self.removed.remove(&id) {
                self.let_go.insert(id.clone(), now);
            }
            let host = self.ids.iter().position(|known| *known == id);
            let mut runs = self
                .runs
                .iter()
                .filter(|((on, name), run)| Some(*on) == host && run.live && self.is_stop(name, run.hash));
            if let (Some(((_, name), _)), Some(_)) = (runs.next(), by) {
                let what =
                    format!("{id} was removed and counts as having stopped its units, and runs {name}");
                self.violate(now, "removal", what);
            }
        }
        self.note_wants(now, &id);
    }

    /// Who speaks for a machine: the states of a machine are written by the server that has its newest session.
    fn follow_sessions(&mut self, now: Time, event: &Event, by: Option<usize>) {
        if let Some(id) = event.key.strip_prefix(PRESENCES).and_then(|id| MachineId::parse(id).ok()) {
            let server = event.entry.as_ref().and_then(|entry| {
                let record: serde_json::Value = serde_json::from_slice(&entry.value).ok()?;
                MachineId::parse(record["server"].as_str()?).ok()
            });
            match server {
                Some(server) => {
                    self.speakers.insert(id.clone(), server);
                    self.gone.remove(&id);
                }
                None => {
                    self.speakers.remove(&id);
                    self.gone.insert(id, now);
                }
            }
        } else if let (Some(id), Some(_), Some(by)) = (event.key.strip_prefix(STATES), &event.entry, by) {
            let speaker = MachineId::parse(id).ok().and_then(|id| self.speakers.get(&id).cloned());
            if speaker.as_ref() != Some(&self.ids[by]) {
                let what =
                    format!("the states of {id} were written by host {by}, and {speaker:?} speaks for it");
                self.violate(now, "G2", what);
            }
        }
    }

    /// G5. A user's destroy takes the unit's place along; all else of the schedule is the leader's.
    fn check_leader(&mut self, now: Time, by: Option<usize>, batch: &WatchBatch, key: &str) {
        let unit = key.strip_prefix(SCHEDULE).map(|name| format!("unit/{name}")).unwrap_or_default();
        let destroyed = batch.events.iter().any(|event| *event.key == *unit && event.entry.is_none());
        let by = by.map(|host| self.ids[host].clone());
        if self.shared && !destroyed && by != self.leader {
            let leader = self.leader.clone();
            self.violate(now, "G5", format!("{key} was written by {by:?}, and {leader:?} leads"));
        }
    }

    fn check_change(&mut self, now: Time, change: &Change) {
        match change {
            Change::Leaving(name, None) => self.check_release(now, name),
            Change::Schedule(name, to) => self.check_move(now, name, to.as_ref().map(|(id, _)| id)),
            Change::Unit(name, Some(unit)) => {
                self.check_file(now, name, unit);
                self.check_same(now, name, unit);
            }
            _ => {}
        }
    }

    /// G1: a file that was acknowledged goes only when a command brings another.
    fn check_file(&mut self, now: Time, name: &UnitName, unit: &Unit) {
        let hash = unit.file.hash();
        let kept = self.view.unit(name).is_some_and(|before| before.file.hash() == hash);
        if !kept && !self.asked.values().any(|(asked, file)| asked == name && *file == hash) {
            self.violate(now, "G1", format!("{name} got the file {hash}, for which nobody asked any more"));
        }
    }

    /// G6: who repeats a command changes nothing.
    fn check_same(&mut self, now: Time, name: &UnitName, unit: &Unit) {
        let same = self
            .view
            .unit(name)
            .is_some_and(|before| before.file.text() == unit.file.text() && before.desired == unit.desired);
        if same && !self.unreadable.contains(name) {
            self.violate(now, "G6", format!("the record of {name} was written again, as it was"));
        }
    }

    /// Units whose records can't be read now.
    pub(crate) fn unreadable(&self) -> Vec<UnitName> {
        self.unreadable.iter().cloned().collect()
    }

    /// A command that gives a unit a file is under way.
    pub(crate) fn asked(&mut self, number: u64, name: &UnitName, file: Hash) {
        self.asked.insert(number, (name.clone(), file));
    }

    /// It is known how a command ended.
    pub(crate) fn answered(&mut self, number: u64) {
        self.asked.remove(&number);
    }

    fn check_move(&mut self, now: Time, name: &UnitName, to: Option<&MachineId>) {
        let Some(unit) = self.view.unit(name) else { return };
        let meant = unit.desired >= DesiredState::Loaded && !unit.requirements.global && !name.is_template();
        let old = self.view.place(name).map(|(id, _)| id.clone());
        if !meant {
            if to.is_some() {
                self.violate(now, "G5", format!("{name} was placed though it is not to be on a machine"));
            }
            return;
        }
        // Unless somebody else has written it meanwhile, there is a reason to write it.
        if old.as_ref() == to && to.is_some() {
            self.violate(now, "G5", format!("{name} was placed again where it is"));
        }
        if let Some(at) = old.filter(|at| Some(at) != to) {
            let machine = self.view.machine(&at);
            let unfit = self.unfit.get(name).is_some_and(|at| *at + NEWS * 6 >= now);
            if machine.is_some_and(|machine| !machine.draining) && !unfit {
                self.taken_off.push((name.clone(), at));
            }
        }
        if let Some(to) = to {
            let lives = self.reported.iter().find(|((unit, id), since)| {
                unit == name
                    && id != to
                    && **since + SEEN < now
                    && self.view.machine(id).is_some()
                    && self.came.get(id).is_some_and(|came| *came + SEEN < now)
            });
            if let Some(((_, id), _)) = lives {
                let what = format!("{name} was placed on {to}, and {id} is there and reports it to run");
                self.violate(now, "G4", what);
            }
        }
    }

    fn apply(&mut self, now: Time, change: Change) {
        if let Change::Machine(id, machine) = &change {
            match machine {
                Some(_) => drop(self.came.entry(id.clone()).or_insert(now)),
                None => drop(self.came.remove(id)),
            }
        }
        if let Change::Farewell(id) = &change {
            self.came.remove(id);
        }
        let states = match &change {
            Change::States(id, _) => Some(id.clone()),
            _ => None,
        };
        let unit = match &change {
            Change::Unit(name, _) => Some(name.clone()),
            _ => None,
        };
        let stops = |unit: &Unit| unit.requirements.on_isolation == OnIsolation::Stop;
        // One that was destroyed with such a file may still be on its way off a machine.
        let stopped = unit.as_ref().is_some_and(|name| match self.view.unit(name) {
            Some(unit) => stops(unit),
            None => self.view.leaving(name).is_some(),
        });
        let effects = self.view.apply(change);
        if let Some(name) = unit {
            let unit = self.view.unit(&name);
            if stopped && unit.is_some_and(|unit| !stops(unit)) {
                self.unbound.insert(name.clone(), now);
            }
            if let Some(unit) = unit.filter(|unit| unit.requirements.on_isolation == OnIsolation::Stop) {
                self.stops.entry(name.clone()).or_default().insert(unit.file.hash());
                self.lives_changed = true;
            }
            if unit.is_some_and(|unit| unit.requirements.global) {
                self.globals.insert(name.clone());
            }
            let known = unit.map(|unit| (unit.file.hash(), unit.desired));
            self.units.entry(name).or_default().push((now, known));
        }
        if let Some(id) = states {
            let live: BTreeSet<_> = self
                .view
                .reported_on(&id)
                .filter(|name| {
                    self.view.reports_of(name).any(|(on, report)| *on == id && report.systemd.is_live())
                })
                .cloned()
                .collect();
            self.reported.retain(|(name, on), _| *on != id || live.contains(name));
            for name in live {
                self.reported.entry((name, id.clone())).or_insert(now);
            }
        }
        for (id, names) in effects.wanted {
            // What a machine that is not there has to hold is not known.
            if self.view.machine(&id).is_none() {
                continue;
            }
            for name in names {
                self.note_want(now, &id, &name);
            }
        }
        for id in effects.machines {
            if self.view.machine(&id).is_some() {
                self.note_wants(now, &id);
            }
        }
    }

    /// Notes all that is wanted on a machine.
    fn note_wants(&mut self, now: Time, id: &MachineId) {
        let names: Vec<_> =
            self.wants.keys().filter(|(on, _)| on == id).map(|(_, name)| name.clone()).collect();
        let held = self.view.all_wanted(id).into_keys();
        for name in names.into_iter().chain(held) {
            self.note_want(now, id, &name);
        }
    }

    fn note_want(&mut self, now: Time, id: &MachineId, name: &UnitName) {
        let wanted = self.view.wanted(id, name).filter(|_| !self.removed.contains(id));
        let want = wanted.map(|wanted| (wanted.file.hash(), wanted.state));
        let history = self.wants.entry((id.clone(), name.clone())).or_default();
        if history.last().is_none_or(|(_, last)| *last != want) {
            history.push((now, want));
        }
    }

    /// Notes which units do not fit where they are.
    fn note_fit(&mut self, now: Time) {
        for (name, id, _) in self.view.schedule() {
            // That its machine was away is no reason any more when it is back.
            let Some(machine) = self.view.machine(id) else { continue };
            if machine.draining || placement::fits(&self.view, name, id).is_err() {
                self.unfit.insert(name.clone(), now);
            }
        }
    }

    /// Whether something can't be read, or could not a moment ago.
    fn is_blind(&self, now: Time) -> bool {
        !self.unreadable.is_empty()
            || !self.newer.is_empty()
            || self.blind.is_some_and(|at| at + NEWS * 6 > now)
    }

    /// G1: a write was acknowledged that was asked for then.
    pub(crate) fn acknowledged(&mut self, now: Time, name: &UnitName, asked: Time, wrote: Wrote) {
        let same = |known: &Want| match (known, wrote) {
            (None, None) => true,
            (Some((hash, desired)), Some((file, state))) => {
                *desired == state && file.is_none_or(|file| file == *hash)
            }
            _ => false,
        };
        let history = self.units.get(name).map_or(&[][..], Vec::as_slice);
        let before = history.iter().rposition(|(from, _)| *from < asked);
        let was = before.and_then(|at| history[at].1);
        let after = before.map_or(0, |at| at + 1);
        if !same(&was) && !history[after..].iter().any(|(_, known)| same(known)) {
            self.violate(now, "G1", format!("{wrote:?} of {name} was acknowledged and never written"));
        }
    }
}
