//! A whole cluster in a test: what users, machines and agents do, and random sequences of it.
use crate::{
    engine::{Decision, Engine, Leaving, Policy},
    model::*,
    site::Places,
    view::{Effects, View},
};
use fleet_unit::{Requirements, UnitFile, UnitName};
use proptest::prelude::*;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

pub(crate) const GRACE: Time = Duration::from_secs(30);

/// This many cases, or as many as the environment (`PROPTEST_CASES`) asks for.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let default = ProptestConfig::default();
    ProptestConfig { cases: if asked { default.cases } else { cases }, ..default }
}

pub(crate) fn name(text: &str) -> UnitName {
    UnitName::parse(text).unwrap()
}

/// `id(0xa)` is `a0000000…`.
pub(crate) fn id(first: u8) -> MachineId {
    MachineId::parse(&format!("{first:x}{}", "0".repeat(31))).unwrap()
}

pub(crate) fn machine(metadata: &[(&str, &str)]) -> Machine {
    let metadata = metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Machine { metadata, version: "2.0.0".to_owned(), ..Machine::default() }
}

/// A unit with these lines in [X-Fleet].
pub(crate) fn unit(name: &UnitName, fleet: &str, desired: DesiredState, revision: Revision) -> Unit {
    let file = UnitFile::parse(&format!("[Service]\nExecStart=/bin/true\n\n[X-Fleet]\n{fleet}\n")).unwrap();
    let requirements = Arc::new(Requirements::of(name, &file).unwrap());
    Unit { file, requirements, desired, revision }
}

pub(crate) fn state(active: &str) -> SystemdState {
    SystemdState { load: "loaded".into(), active: active.into(), sub: "some".into() }
}

/// A view, its engine, and what happened.
pub(crate) struct Cluster {
    pub(crate) view: View,
    pub(crate) engine: Engine,
    pub(crate) now: Time,
    pub(crate) revision: Revision,
}

impl Cluster {
    /// Empty, with the grace over.
    pub(crate) fn new() -> Self {
        let engine = Engine::new(Duration::ZERO, GRACE);
        Cluster { view: View::default(), engine, now: GRACE, revision: 0 }
    }
    pub(crate) fn with_machines(ids: impl IntoIterator<Item = u8>) -> Self {
        let mut cluster = Cluster::new();
        for first in ids {
            cluster.machine(first, &[]);
        }
        cluster
    }
    pub(crate) fn apply(&mut self, change: Change) -> Effects {
        let effects = self.view.apply(change);
        self.engine.note(&effects);
        effects
    }
    /// With a policy that makes everything that can be limited wait after one unit.
    pub(crate) fn careful() -> Self {
        let mut cluster = Cluster::new();
        let (drain_at_once, pace_units, pace_period) = (1, 1, GRACE / 4);
        let policy = Policy { drain_at_once, pace_units, pace_period, ..Policy::for_ttl(GRACE) };
        cluster.engine = Engine::with_policy(Duration::ZERO, GRACE, policy);
        cluster
    }
    pub(crate) fn machine(&mut self, first: u8, metadata: &[(&str, &str)]) {
        self.apply(Change::Machine(id(first), Some(machine(metadata))));
    }
    pub(crate) fn cordon(&mut self, first: u8, cordoned: bool, draining: bool) {
        let machine = self.view.machine(&id(first)).unwrap().clone();
        self.apply(Change::Machine(id(first), Some(Machine { cordoned, draining, ..machine })));
    }
    pub(crate) fn farewell(&mut self, first: u8) {
        self.apply(Change::Farewell(id(first)));
        self.apply(Change::States(id(first), BTreeMap::new()));
    }
    pub(crate) fn machine_gone(&mut self, first: u8) {
        self.apply(Change::States(id(first), BTreeMap::new()));
        self.apply(Change::Machine(id(first), None));
    }
    pub(crate) fn submit(&mut self, unit_name: &str, fleet: &str, desired: DesiredState) {
        self.revision += 1;
        let unit = unit(&name(unit_name), fleet, desired, self.revision);
        self.apply(Change::Unit(name(unit_name), Some(unit)));
    }
    pub(crate) fn start(&mut self, unit_name: &str, fleet: &str) {
        self.submit(unit_name, fleet, DesiredState::Launched);
    }
    pub(crate) fn destroy(&mut self, unit_name: &str) {
        self.apply(Change::Unit(name(unit_name), None));
    }
    pub(crate) fn report_of(&self, unit: &UnitName, active: &str) -> UnitReport {
        let hash = self.view.unit(unit).map_or(fleet_unit::Hash([0; 20]), |unit| unit.file.hash());
        UnitReport { current: CurrentState::Launched, hash, systemd: state(active), problem: None }
    }
    /// A machine reports exactly these units, all in this state.
    pub(crate) fn report(&mut self, first: u8, units: &[&str], active: &str) {
        let reports = units.iter().map(|text| (name(text), self.report_of(&name(text), active))).collect();
        self.apply(Change::States(id(first), reports));
    }
    /// A machine holds and reports exactly what is wanted of it.
    pub(crate) fn obey(&mut self, id: &MachineId) {
        let held = self.view.all_wanted(id);
        self.release(id);
        let reports = held.keys().map(|unit| (unit.clone(), self.report_of(unit, "active"))).collect();
        self.apply(Change::States(id.clone(), reports));
    }
    /// Commits decisions, each only if its ground is unchanged.
    pub(crate) fn commit(&mut self, decisions: &[Decision]) {
        self.revision += 1;
        for decision in decisions {
            let unit = self.view.unit(&decision.unit).map_or(0, |unit| unit.revision);
            let place = self.view.place(&decision.unit).map_or(0, |(_, revision)| revision);
            assert_eq!((unit, place), (decision.unit_revision, decision.schedule_revision), "{decision:?}");
            let place = decision.machine.clone().map(|machine| (machine, self.revision));
            self.apply(Change::Schedule(decision.unit.clone(), place));
            match &decision.leaving {
                Leaving::None => {}
                Leaving::From(id) => {
                    let leaving = Some((id.clone(), self.revision));
                    self.apply(Change::Leaving(decision.unit.clone(), leaving));
                }
                Leaving::Over => drop(self.apply(Change::Leaving(decision.unit.clone(), None))),
            }
        }
    }
    /// A machine that is there says of all that was taken off it that nothing runs.
    pub(crate) fn release(&mut self, id: &MachineId) {
        if self.view.machine(id).is_some() {
            let names: Vec<_> = self.view.leaving_from(id).cloned().collect();
            for name in names {
                self.apply(Change::Leaving(name, None));
            }
        }
    }
    /// Lets the engine decide until there is nothing left; with `limit` units at a time.
    pub(crate) fn settle_by(&mut self, limit: usize) -> Vec<Decision> {
        let mut all = Vec::new();
        for _ in 0..200 {
            let decisions = self.engine.decide(&self.view, self.now, limit);
            assert!(decisions.len() <= limit);
            if decisions.is_empty() {
                assert!(self.engine.wake_at().is_none_or(|at| at > self.now), "work is left");
                return all;
            }
            self.commit(&decisions);
            all.extend(decisions);
        }
        panic!("no end of decisions: {:#?}", &all[all.len() - 12..]);
    }
    pub(crate) fn settle(&mut self) -> Vec<Decision> {
        self.settle_by(usize::MAX)
    }
    /// Where a unit is, as the first digit of the machine's ID.
    pub(crate) fn at(&self, unit: &str) -> Option<u8> {
        let place = self.view.place(&name(unit))?;
        u8::from_str_radix(&place.0.as_str()[..1], 16).ok()
    }
    pub(crate) fn globals_at(&self, first: u8) -> Vec<&str> {
        self.view.site(&id(first)).globals.iter().map(UnitName::as_str).collect()
    }
}

/// Something that happens.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Write {
        unit: usize,
        fleet: usize,
        desired: DesiredState,
    },
    Destroy {
        unit: usize,
    },
    /// It comes, or changes; as operators have it.
    Machine {
        machine: u8,
        metadata: usize,
        cordoned: bool,
        draining: bool,
    },
    /// It gives up its presence on purpose.
    Farewell {
        machine: u8,
    },
    MachineGone {
        machine: u8,
        with_reports: bool,
    },
    /// The agent does all that is wanted.
    Obey {
        machine: u8,
    },
    /// The agent does what is wanted, and these units are still there.
    Linger {
        machine: u8,
        units: Vec<usize>,
        live: bool,
    },
    /// The schedule is written by something else.
    Place {
        unit: usize,
        machine: Option<u8>,
    },
    /// Half a grace passes.
    Wait,
    /// A while passes, shorter than all that is waited for.
    Moment,
    /// The store was out of reach.
    Hold,
}

pub(crate) const UNITS: [&str; 9] = [
    "a.service",
    "b.service",
    "c.service",
    "d.service",
    "e.service",
    "f.service",
    "g.service",
    "t@.service",
    "t@1.service",
];
pub(crate) const MACHINES: u8 = 4;

const METADATA: [&[(&str, &str)]; 5] =
    [&[], &[("zone", "a")], &[("zone", "b")], &[("zone", "a"), ("disk", "ssd")], &[("disk", "ssd")]];

const FLEET: [&str; 36] = [
    "",
    "",
    "",
    "MachineID=00000000000000000000000000000000",
    "MachineID=10000000",
    "MachineMetadata=zone=a",
    "MachineMetadata=zone=a\nMachineMetadata=zone=b",
    "MachineMetadata=\"zone=a\" \"disk=ssd\"",
    "MachineOf=a.service",
    "MachineOf=b.service",
    "MachineOf=c.service",
    "MachineOf=d.service",
    "MachineOf=g.service",
    "MachineOf=a.service\nMachineOf=g.service",
    "MachineOf=nowhere.service",
    "Conflicts=*",
    "Conflicts=a.service",
    "Conflicts=[b-d].service",
    "Conflicts=g.service\nMachineMetadata=zone=a",
    "MachineOf=e.service\nConflicts=[c-d].service",
    "Replaces=a.service",
    "Replaces=b.service",
    "Replaces=c.service",
    "Replaces=*",
    "Replaces=[a-c].service\nMachineOf=d.service",
    "Replaces=d.service\nMachineOf=g.service",
    "OnIsolation=stop",
    "OnIsolation=stop",
    "OnIsolation=stop\nMachineMetadata=zone=a",
    "OnIsolation=stop\nConflicts=a.service",
    "Global=true",
    "Global=true",
    "Global=true\nMachineMetadata=zone=a",
    "Global=true\nConflicts=a.service",
    "Global=true\nConflicts=[f-g].service",
    "Global=true\nConflicts=*\nMachineMetadata=disk=ssd",
];

pub(crate) fn events(most: usize) -> impl Strategy<Value = Vec<Event>> {
    let unit = 0..UNITS.len();
    let machine = 0..MACHINES;
    let desired = prop_oneof![
        1 => Just(DesiredState::Inactive),
        1 => Just(DesiredState::Loaded),
        4 => Just(DesiredState::Launched)
    ];
    let event = prop_oneof![
        10 => (unit.clone(), 0..FLEET.len(), desired)
            .prop_map(|(unit, fleet, desired)| Event::Write { unit, fleet, desired }),
        2 => unit.clone().prop_map(|unit| Event::Destroy { unit }),
        6 => (machine.clone(), 0..METADATA.len(), 0..10u8).prop_map(|(machine, metadata, flags)| {
            Event::Machine { machine, metadata, cordoned: flags == 1 || flags == 2, draining: flags >= 8 }
        }),
        1 => machine.clone().prop_map(|machine| Event::Farewell { machine }),
        2 => (machine.clone(), any::<bool>())
            .prop_map(|(machine, with_reports)| Event::MachineGone { machine, with_reports }),
        4 => machine.clone().prop_map(|machine| Event::Obey { machine }),
        3 => (machine.clone(), prop::collection::vec(unit.clone(), 0..3), any::<bool>())
            .prop_map(|(machine, units, live)| Event::Linger { machine, units, live }),
        1 => (unit, prop::option::of(machine)).prop_map(|(unit, machine)| Event::Place { unit, machine }),
        1 => Just(Event::Wait),
        2 => Just(Event::Moment),
        1 => Just(Event::Hold),
    ];
    prop::collection::vec(event, 1..most)
}

impl Cluster {
    /// Lets an event happen; what the changes meant is noted, and returned.
    pub(crate) fn happen(&mut self, event: &Event) -> Vec<Effects> {
        self.changes(event).into_iter().map(|change| self.apply(change)).collect()
    }

    /// A machine that is there says of what was taken off it that nothing runs, but of these.
    fn releases(&self, first: u8, lingering: &[UnitName]) -> Vec<Change> {
        let id = id(first);
        let there = self.view.machine(&id).is_some();
        let names = self.view.leaving_from(&id).filter(|name| there && !lingering.contains(name));
        names.map(|name| Change::Leaving(name.clone(), None)).collect()
    }

    /// The changes an event makes.
    pub(crate) fn changes(&mut self, event: &Event) -> Vec<Change> {
        self.revision += 1;
        let named = |index: &usize| name(UNITS[*index]);
        match event {
            Event::Write { unit: index, fleet, desired } => {
                let unit_name = named(index);
                let mut written = unit(&unit_name, "", *desired, self.revision);
                let text = written.file.text().to_owned() + FLEET[*fleet] + "\n";
                let file = UnitFile::parse(&text).unwrap();
                // What contradicts itself is not accepted into a cluster.
                if let Ok(requirements) = Requirements::of(&unit_name, &file) {
                    written = Unit { file, requirements: Arc::new(requirements), ..written };
                }
                vec![Change::Unit(unit_name, Some(written))]
            }
            Event::Destroy { unit } => vec![Change::Unit(named(unit), None)],
            Event::Machine { machine: first, metadata, cordoned, draining } => {
                let (cordoned, draining) = (*cordoned, *draining);
                let machine = Machine { cordoned, draining, ..machine(METADATA[*metadata]) };
                vec![Change::Machine(id(*first), Some(machine))]
            }
            Event::Farewell { machine } => {
                vec![Change::Farewell(id(*machine)), Change::States(id(*machine), BTreeMap::new())]
            }
            Event::MachineGone { machine, with_reports } => {
                let mut changes = vec![Change::Machine(id(*machine), None)];
                if *with_reports {
                    changes.push(Change::States(id(*machine), BTreeMap::new()));
                }
                changes
            }
            Event::Obey { machine } => {
                let mut changes = self.releases(*machine, &[]);
                changes.push(self.states(*machine, &[], ""));
                changes
            }
            Event::Linger { machine, units, live } => {
                let lingering: Vec<_> = units.iter().filter(|_| *live).map(named).collect();
                let mut changes = self.releases(*machine, &lingering);
                changes.push(self.states(*machine, units, if *live { "deactivating" } else { "failed" }));
                changes
            }
            Event::Place { unit, machine } => {
                vec![Change::Schedule(named(unit), machine.map(|machine| (id(machine), self.revision)))]
            }
            Event::Wait => {
                self.now += GRACE / 2;
                Vec::new()
            }
            Event::Moment => {
                self.now += Duration::from_secs(1);
                Vec::new()
            }
            Event::Hold => {
                self.engine.hold_until(self.now + GRACE);
                Vec::new()
            }
        }
    }

    fn states(&self, machine: u8, more: &[usize], active: &str) -> Change {
        let id = id(machine);
        let mut reports: BTreeMap<_, _> = more
            .iter()
            .map(|index| name(UNITS[*index]))
            .map(|unit| (unit.clone(), self.report_of(&unit, active)))
            .collect();
        if self.view.machine(&id).is_none() {
            reports.clear();
        }
        reports.extend(
            self.view.all_wanted(&id).keys().map(|unit| (unit.clone(), self.report_of(unit, "active"))),
        );
        Change::States(id, reports)
    }
}
