use super::*;
use crate::testing::*;
use proptest::prelude::*;

/// What could be asked of a view for every machine and unit.
fn answers(view: &View) -> BTreeMap<(MachineId, UnitName), Wanted> {
    let ids = (0..MACHINES).map(id);
    ids.flat_map(|id| {
        view.all_wanted(&id).into_iter().map(move |(name, wanted)| ((id.clone(), name), wanted))
    })
    .collect()
}

type At = Option<(MachineId, Revision)>;
type UnitAnswer = (Option<Unit>, At, At, CurrentState, BTreeMap<MachineId, UnitReport>);

fn unit_answers(view: &View) -> BTreeMap<UnitName, UnitAnswer> {
    let answer = |text: &str| {
        let name = name(text);
        let place = view.place(&name).map(|(id, revision)| (id.clone(), revision));
        let reports = view.reports_of(&name).map(|(id, report)| (id.clone(), report.clone())).collect();
        let leaving = view.leaving(&name).map(|(id, revision)| (id.clone(), revision));
        (name.clone(), (view.unit(&name).cloned(), place, leaving, view.current(&name), reports))
    };
    UNITS.iter().map(|text| answer(text)).collect()
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn every_index_is_kept_and_every_difference_is_told(events in events(40)) {
        let mut cluster = Cluster::new();
        for event in &events {
            for change in cluster.changes(event) {
                let (wanted, units) = (answers(&cluster.view), unit_answers(&cluster.view));
                let machines: BTreeMap<_, _> =
                    cluster.view.machines().map(|(id, machine)| (id.clone(), machine.clone())).collect();
                let effects = cluster.apply(change);
                if let Err(difference) = cluster.view.check() {
                    return Err(TestCaseError::fail(format!("after {event:?}: {difference}")));
                }
                let (wanted_now, units_now) = (answers(&cluster.view), unit_answers(&cluster.view));
                for key in wanted.keys().chain(wanted_now.keys()) {
                    let told = effects.wanted.get(&key.0).is_some_and(|names| names.contains(&key.1));
                    prop_assert!(told || wanted.get(key) == wanted_now.get(key), "{:?} after {:?}", key, event);
                }
                for (name, now) in &units_now {
                    prop_assert_eq!(effects.units.contains(name), units.get(name) != Some(now), "{} after {:?}", name, event);
                }
                for (id, machine) in machines.iter() {
                    prop_assert_eq!(effects.machines.contains(id), cluster.view.machine(id) != Some(machine));
                }
                for (id, _) in cluster.view.machines().filter(|(id, _)| !machines.contains_key(*id)) {
                    prop_assert!(effects.machines.contains(id));
                }
                for (id, names) in &effects.wanted {
                    for name in names {
                        prop_assert_eq!(cluster.view.wanted(id, name), wanted_now.get(&(id.clone(), name.clone())).cloned());
                    }
                }
            }
            let decisions = cluster.engine.decide(&cluster.view, cluster.now, 3);
            cluster.commit(&decisions);
            prop_assert_eq!(cluster.view.check(), Ok(()));
        }
    }
}

#[test]
fn a_repeated_change_means_nothing() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "");
    cluster.settle();
    cluster.report(1, &["a.service"], "active");
    let unit = cluster.view.unit(&name("a.service")).cloned();
    let place = cluster.view.place(&name("a.service")).map(|(id, revision)| (id.clone(), revision));
    let reports = [(name("a.service"), cluster.report_of(&name("a.service"), "active"))].into();
    for change in [
        Change::Unit(name("a.service"), unit),
        Change::Schedule(name("a.service"), place),
        Change::Machine(id(1), Some(machine(&[]))),
        Change::States(id(1), reports),
        Change::Unit(name("b.service"), None),
        Change::Schedule(name("b.service"), None),
        Change::Machine(id(2), None),
        Change::States(id(2), BTreeMap::new()),
    ] {
        assert_eq!(cluster.view.apply(change.clone()), Effects::default(), "{change:?}");
    }
    assert_eq!(cluster.view.check(), Ok(()));
}

#[test]
fn the_current_state_is_that_of_the_present_file_on_the_right_machine() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("a.service", "");
    cluster.settle();
    let current = |cluster: &Cluster| cluster.view.current(&name("a.service"));
    assert_eq!(current(&cluster), CurrentState::Inactive);
    cluster.report(2, &["a.service"], "active");
    assert_eq!(current(&cluster), CurrentState::Inactive);
    cluster.report(1, &["a.service"], "active");
    assert_eq!(current(&cluster), CurrentState::Launched);
    cluster.start("a.service", "MachineMetadata=");
    assert_eq!(current(&cluster), CurrentState::Inactive, "that report is of the file before");
    cluster.report(1, &["a.service"], "active");
    assert_eq!(current(&cluster), CurrentState::Launched);
    cluster.start("a.service", "Global=true");
    cluster.report(1, &["a.service"], "active");
    assert_eq!(current(&cluster), CurrentState::Inactive);
}

#[test]
fn global_units_are_wanted_where_they_fit_and_give_way() {
    let mut cluster = Cluster::new();
    cluster.machine(1, &[("zone", "a")]);
    cluster.machine(2, &[("zone", "b")]);
    cluster.start("g.service", "Global=true\nMachineMetadata=zone=a");
    assert_eq!((cluster.globals_at(1), cluster.globals_at(2)), (vec!["g.service"], vec![]));
    cluster.machine(2, &[("zone", "a")]);
    assert_eq!(cluster.globals_at(2), ["g.service"]);
    // A template is wanted nowhere, its instances are.
    cluster.start("t@.service", "Global=true");
    cluster.start("t@1.service", "Global=true\nConflicts=g.service");
    assert_eq!(
        cluster.globals_at(1),
        ["g.service"],
        "of two Global units in conflict that with the smaller name"
    );
    cluster.machine(2, &[]);
    assert_eq!(cluster.globals_at(2), ["t@1.service"]);
    cluster.submit("g.service", "Global=true", DesiredState::Inactive);
    assert_eq!(cluster.globals_at(1), ["t@1.service"]);
    // A scheduled unit goes first.
    cluster.revision += 1;
    cluster.start("a.service", "Conflicts=t@*");
    cluster.apply(Change::Schedule(name("a.service"), Some((id(1), 99))));
    assert_eq!((cluster.globals_at(1), cluster.globals_at(2)), (vec![], vec!["t@1.service"]));
    cluster.machine_gone(2);
    assert!(cluster.globals_at(2).is_empty());
}
