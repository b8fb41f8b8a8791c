use super::*;
use crate::testing::*;

#[test]
fn misfits_say_what_is_wrong() {
    let mut cluster = Cluster::new();
    cluster.machine(1, &[("zone", "c")]);
    cluster.machine(2, &[]);
    cluster.start("there.service", "MachineMetadata=zone=c\nConflicts=*noisy*");
    cluster.start("everywhere.service", "Global=true\nMachineMetadata=zone=c");
    cluster.settle();
    let mut cases = Vec::new();
    for (unit, fleet) in [
        ("a.service", "MachineID=20000000000000000000000000000000"),
        ("b.service", "MachineMetadata=zone=a\nMachineMetadata=zone=b"),
        ("c.service", "MachineMetadata=disk=ssd"),
        ("d.service", "MachineOf=nonsuch.service"),
        ("e.service", "MachineOf=d.service"),
        ("f.service", "Conflicts=t*.service"),
        ("g.service", "Conflicts=every*"),
        ("noisy.service", ""),
        ("h.service", ""),
    ] {
        cluster.submit(unit, fleet, DesiredState::Inactive);
        let why =
            fits(&cluster.view, &name(unit), &id(1)).err().map_or("fits".to_owned(), |why| why.to_string());
        cases.push(format!("{unit}: {why}"));
    }
    let expected = [
        "a.service: its ID is not 20000000000000000000000000000000 (MachineID)",
        "b.service: its metadata has zone=c, not zone=a or zone=b (MachineMetadata)",
        "c.service: its metadata has no disk, wanted is disk=ssd (MachineMetadata)",
        "d.service: nonsuch.service is not known to the cluster (MachineOf)",
        "e.service: d.service is not placed on any machine (MachineOf)",
        "f.service: it conflicts with there.service, which is there (Conflicts=t*.service)",
        "g.service: it conflicts with everywhere.service, which is there (Conflicts=every*)",
        "noisy.service: there.service, which is there, conflicts with it (Conflicts=*noisy*)",
        "h.service: fits",
    ];
    assert_eq!(cases, expected);
    cluster.submit("i.service", "MachineOf=there.service", DesiredState::Inactive);
    let why = fits(&cluster.view, &name("i.service"), &id(2)).unwrap_err();
    assert_eq!(why.to_string(), format!("there.service is on {} (MachineOf)", id(1)));
    cluster.submit("i.service", "MachineOf=everywhere.service", DesiredState::Inactive);
    assert_eq!(fits(&cluster.view, &name("i.service"), &id(1)), Ok(()));
    let why = fits(&cluster.view, &name("i.service"), &id(2)).unwrap_err();
    assert_eq!(why.to_string(), "everywhere.service is a Global unit that does not run here (MachineOf)");
    assert_eq!(fits(&cluster.view, &name("h.service"), &id(3)), Err(Misfit::Gone));
}

#[test]
fn a_machine_is_named_by_its_whole_id_or_by_eight_digits() {
    for (required, named) in [
        ("10000000000000000000000000000000", true),
        ("10000000", true),
        ("1000000", false),
        ("100000000", false),
        ("20000000", false),
        ("", false),
    ] {
        assert_eq!(is_named(&id(1), required), named, "{required:?}");
    }
}

#[test]
fn several_targets_have_to_be_together() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("a.service", "MachineID=10000000");
    cluster.start("b.service", "MachineID=20000000");
    cluster.start("f.service", "MachineOf=a.service\nMachineOf=b.service");
    cluster.settle();
    let why = vec![
        (id(1), Misfit::TargetElsewhere { target: name("b.service"), machine: id(2) }),
        (id(2), Misfit::TargetElsewhere { target: name("a.service"), machine: id(1) }),
    ];
    assert_eq!(explain(&cluster.view, &name("f.service")), Some(Unplaced::NoFit(why)));
    cluster.start("b.service", "MachineID=10000000");
    cluster.settle();
    assert_eq!(cluster.at("f.service"), Some(1));
}

#[test]
fn only_what_should_be_placed_and_is_not_is_explained() {
    let mut cluster = Cluster::new();
    cluster.submit("inactive.service", "", DesiredState::Inactive);
    cluster.start("global.service", "Global=true");
    cluster.start("t@.service", "");
    cluster.start("a.service", "");
    let explained = |cluster: &Cluster, unit: &str| explain(&cluster.view, &name(unit));
    for unit in ["inactive.service", "global.service", "t@.service", "nonsuch.service"] {
        assert_eq!(explained(&cluster, unit), None, "{unit}");
    }
    assert_eq!(explained(&cluster, "a.service"), Some(Unplaced::NoMachines));
    cluster.machine(1, &[]);
    assert_eq!(explained(&cluster, "a.service"), None, "about to be placed");
    cluster.settle();
    assert_eq!(explained(&cluster, "a.service"), None);
}
