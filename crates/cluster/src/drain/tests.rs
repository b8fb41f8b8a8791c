use super::*;
use crate::testing::*;

fn names(names: &[UnitName]) -> Vec<&str> {
    names.iter().map(UnitName::as_str).collect()
}

/// Machine 1 with these units on it, running; other machines come after.
fn cluster_on_one(units: &[(&str, &str)], metadata: &[(&str, &str)]) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.machine(1, metadata);
    for (unit, fleet) in units {
        cluster.start(unit, fleet);
    }
    cluster.settle();
    cluster.obey(&id(1));
    cluster
}

/// All agents do what they are told, until nothing is left to decide. Returns how many units of machine 1 were on
/// their way at most.
fn run(cluster: &mut Cluster) -> usize {
    let mut most = 0;
    for _ in 0..100 {
        let decided = cluster.settle().len();
        most = most.max(cluster.engine.on_the_way(&id(1)).count());
        let before = cluster.view.clone();
        let ids: Vec<_> = cluster.view.machines().map(|(id, _)| id.clone()).collect();
        for id in ids {
            cluster.obey(&id);
        }
        let same = before.reports().eq(cluster.view.reports());
        if decided == 0 && same {
            return most;
        }
    }
    panic!("no end");
}

#[test]
fn a_cordoned_machine_keeps_what_it_has_and_takes_nothing_new() {
    let mut cluster = cluster_on_one(&[("a.service", ""), ("g.service", "Global=true")], &[]);
    cluster.cordon(1, true, false);
    cluster.start("b.service", "");
    cluster.start("f.service", "MachineOf=a.service");
    cluster.start("g2.service", "Global=true");
    assert_eq!(cluster.settle(), []);
    assert_eq!(cluster.at("a.service"), Some(1));
    assert_eq!(cluster.globals_at(1), ["g.service", "g2.service"], "Global units come all the same");
    for unit in ["b.service", "f.service"] {
        let why = crate::placement::explain(&cluster.view, &name(unit));
        let cordoned = vec![(id(1), Misfit::Cordoned)];
        assert_eq!(why, Some(crate::placement::Unplaced::NoFit(cordoned)), "{unit}");
    }
    assert_eq!(Misfit::Cordoned.to_string(), "it is cordoned");
    // A new file for a unit that is there moves nothing.
    cluster.start("a.service", "MachineMetadata=");
    assert_eq!(cluster.settle(), []);
    // Stopped and started again it is a new unit.
    cluster.submit("a.service", "", DesiredState::Inactive);
    cluster.settle();
    cluster.start("a.service", "");
    cluster.settle();
    assert_eq!(cluster.at("a.service"), None);
    cluster.cordon(1, false, false);
    cluster.obey(&id(1));
    cluster.settle();
    assert_eq!(["a.service", "b.service", "f.service"].map(|unit| cluster.at(unit)), [Some(1); 3]);
}

#[test]
fn a_drained_machine_gives_up_a_few_units_at_a_time() {
    let units: Vec<String> = (0..10).map(|index| format!("u{index}.service")).collect();
    let units: Vec<_> = units.iter().map(|unit| (unit.as_str(), "")).collect();
    let mut cluster = cluster_on_one(&units, &[]);
    cluster.start("g.service", "Global=true");
    cluster.machine(2, &[]);
    cluster.machine(3, &[]);
    assert_eq!(cluster.settle(), [], "load moves nothing");
    run(&mut cluster);
    let before = drain_status(&cluster.view, &id(1));
    assert_eq!((before.to_move.len(), before.stopping.len()), (10, 0), "how it would go");
    cluster.cordon(1, false, true);
    let first = cluster.settle();
    let taken: Vec<_> = first.iter().map(|decision| (decision.unit.as_str(), &decision.machine)).collect();
    assert_eq!(taken, [("u0.service", &None), ("u1.service", &None), ("u2.service", &None)]);
    assert_eq!(first[0].reason, format!("{} is being drained", id(1)));
    let status = drain_status(&cluster.view, &id(1));
    assert_eq!(names(&status.stopping), ["u0.service", "u1.service", "u2.service"]);
    assert_eq!((status.to_move.len(), status.is_at_rest()), (7, false));
    // Stopped and placed: the next goes only when one has come up.
    cluster.obey(&id(1));
    assert_eq!(cluster.settle().len(), 3);
    assert_eq!(cluster.at("u0.service"), Some(2));
    assert_eq!(drain_status(&cluster.view, &id(1)).to_move.len(), 7);
    cluster.report(2, &["u0.service"], "activating");
    assert_eq!(cluster.settle(), []);
    cluster.report(2, &["u0.service"], "failed");
    assert_eq!(cluster.settle().len(), 1, "that it does not run there is no reason to wait");
    assert_eq!(run(&mut cluster), 3);
    let status = drain_status(&cluster.view, &id(1));
    assert!(status.is_empty(), "{status:?}");
    assert!(cluster.view.reports_of(&name("g.service")).any(|(on, _)| *on == id(1)), "Global units stay");
    assert!(cluster.view.units().all(|(unit, _)| unit.as_str() == "g.service"
        || cluster.view.place(unit).is_some_and(|(at, _)| *at != id(1))));
    assert_eq!(cluster.engine.wake_at(), None);
}

#[test]
fn what_has_nowhere_to_go_stays_and_says_why() {
    let units = [("a.service", "MachineMetadata=disk=ssd"), ("b.service", ""), ("c.service", "Conflicts=x*")];
    let mut cluster = cluster_on_one(&units, &[("disk", "ssd")]);
    cluster.machine(2, &[]);
    cluster.start("x.service", "MachineID=20000000");
    run(&mut cluster);
    cluster.cordon(1, false, true);
    run(&mut cluster);
    let status = drain_status(&cluster.view, &id(1));
    assert!(status.is_at_rest() && !status.is_empty());
    let why: Vec<_> = status.undrained.iter().map(|it| format!("{}: {}", it.unit, it.why[0].1)).collect();
    assert_eq!(
        why,
        [
            "a.service: its metadata has no disk, wanted is disk=ssd (MachineMetadata)",
            "c.service: it conflicts with x.service, which is there (Conflicts=x*)"
        ]
    );
    assert_eq!(
        ["a.service", "b.service", "c.service"].map(|unit| cluster.at(unit)),
        [Some(1), Some(2), Some(1)]
    );
    // When there is room they go.
    cluster.destroy("x.service");
    cluster.machine(3, &[("disk", "ssd")]);
    run(&mut cluster);
    assert_eq!(["a.service", "c.service"].map(|unit| cluster.at(unit)), [Some(3), Some(2)]);
    // Alone, everything stays.
    let mut cluster = cluster_on_one(&[("a.service", "")], &[]);
    cluster.cordon(1, false, true);
    assert_eq!(cluster.settle(), []);
    assert_eq!(drain_status(&cluster.view, &id(1)).undrained[0].why, []);
    // Not on a machine that is being drained, too.
    cluster.machine(2, &[]);
    cluster.cordon(2, false, true);
    assert_eq!(cluster.settle(), []);
    let why = vec![(id(2), Misfit::Draining)];
    assert_eq!(drain_status(&cluster.view, &id(1)).undrained[0].why, why);
    cluster.cordon(1, false, false);
    assert_eq!(run(&mut cluster), 0);
}

#[test]
fn a_unit_goes_only_where_those_that_follow_it_fit() {
    let units = [
        ("lead.service", ""),
        ("f.service", "MachineOf=lead.service\nMachineMetadata=disk=ssd"),
        ("z.service", "MachineOf=f.service"),
    ];
    let mut cluster = cluster_on_one(&units, &[("disk", "ssd")]);
    cluster.machine(2, &[]);
    cluster.cordon(1, true, true);
    assert_eq!(cluster.settle(), []);
    let status = drain_status(&cluster.view, &id(1));
    let texts: Vec<_> = status.undrained.iter().map(|it| format!("{}: {}", it.unit, it.why[0].1)).collect();
    assert_eq!(
        texts[1],
        "lead.service: f.service, which has to be where it is (MachineOf), does not fit: \
        its metadata has no disk, wanted is disk=ssd (MachineMetadata)"
    );
    assert_eq!(texts.len(), 3);
    cluster.machine(2, &[("disk", "ssd")]);
    let status = drain_status(&cluster.view, &id(1));
    assert_eq!(names(&status.to_move), ["f.service", "lead.service", "z.service"]);
    run(&mut cluster);
    assert_eq!(units.map(|(unit, _)| cluster.at(unit)), [Some(2); 3]);
    assert!(drain_status(&cluster.view, &id(1)).is_empty());
}

#[test]
fn a_new_leader_goes_on_with_a_drain() {
    let units = [("a.service", ""), ("b.service", ""), ("c.service", ""), ("d.service", "")];
    let mut cluster = cluster_on_one(&units, &[]);
    cluster.machine(2, &[]);
    cluster.cordon(1, false, true);
    assert_eq!(cluster.settle().len(), 3);
    cluster.engine = crate::engine::Engine::new(cluster.now, GRACE);
    assert_eq!(cluster.settle(), [], "three are still being stopped");
    assert_eq!(run(&mut cluster), 3);
    assert!(drain_status(&cluster.view, &id(1)).is_empty());
}

#[test]
fn a_drain_that_is_called_off_ends() {
    let mut cluster = cluster_on_one(&[("a.service", ""), ("b.service", ""), ("c.service", "")], &[]);
    cluster.machine(2, &[]);
    let policy = crate::engine::Policy { drain_at_once: 1, ..crate::engine::Policy::for_ttl(GRACE) };
    cluster.engine = crate::engine::Engine::with_policy(cluster.now, GRACE, policy);
    cluster.cordon(1, false, true);
    assert_eq!(cluster.settle().len(), 1);
    cluster.cordon(1, false, false);
    run(&mut cluster);
    let places = ["a.service", "b.service", "c.service"].map(|unit| cluster.at(unit));
    assert_eq!((&places[1..], places[0].is_some()), (&[Some(1); 2][..], true));
}
