//! What can't be read is no ground to decide anything from, and costs nothing else.
use super::*;
use crate::{placement, testing::*};

fn unit_record(cluster: &mut Cluster, kind: RecordKind, unit: &str, unread: bool) {
    let why = unread.then(|| Unreadable { reason: "format 2".to_owned(), revision: 9 });
    cluster.apply(Change::Unread(Record::OfUnit(kind, name(unit)), why));
}

fn machine_record(cluster: &mut Cluster, kind: RecordKind, machine: u8, unread: bool) {
    let why = unread.then(|| Unreadable { reason: "format 2".to_owned(), revision: 9 });
    cluster.apply(Change::Unread(Record::OfMachine(kind, id(machine)), why));
}

/// What lists the registry anew, without what it can't read.
fn list(cluster: &mut Cluster, changes: Vec<Change>) {
    cluster.view = View::default();
    cluster.engine = Engine::new(cluster.now, GRACE);
    for change in changes {
        cluster.apply(change);
    }
}

#[test]
fn nothing_is_decided_about_a_unit_of_which_a_record_cannot_be_read() {
    for kind in [RecordKind::Unit, RecordKind::Schedule, RecordKind::Leaving] {
        let mut cluster = Cluster::with_machines([1, 2]);
        for unit in ["a.service", "b.service", "c.service"] {
            cluster.start(unit, "MachineID=1");
            cluster.submit(unit, "", DesiredState::Launched);
        }
        cluster.settle();
        unit_record(&mut cluster, kind, "b.service", true);
        let lost = cluster.at("b.service").unwrap();
        cluster.machine_gone(lost);
        cluster.settle();
        let other = 3 - lost;
        assert_eq!(cluster.at("a.service"), Some(other));
        assert_eq!(cluster.at("b.service"), Some(lost), "{kind:?}");
        assert_eq!(cluster.at("c.service"), Some(other));
        assert_eq!(cluster.engine.wake_at(), None, "nothing is tried again and again");
        // Nor is it taken off for what it was to be.
        cluster.submit("b.service", "", DesiredState::Inactive);
        assert_eq!(cluster.settle(), []);
        unit_record(&mut cluster, kind, "b.service", false);
        cluster.settle();
        assert_eq!(cluster.at("b.service"), None);
    }
}

#[test]
fn a_unit_whose_record_is_missing_for_that_is_not_destroyed() {
    let mut cluster = Cluster::new();
    list(
        &mut cluster,
        vec![
            Change::Machine(id(1), Some(machine(&[]))),
            Change::Schedule(name("b.service"), Some((id(1), 7))),
            Change::Unread(
                Record::OfUnit(RecordKind::Unit, name("b.service")),
                Some(Unreadable { reason: "format 2".to_owned(), revision: 9 }),
            ),
        ],
    );
    cluster.now += GRACE;
    cluster.start("c.service", "");
    cluster.settle();
    assert_eq!((cluster.at("b.service"), cluster.at("c.service")), (Some(1), Some(1)));
    unit_record(&mut cluster, RecordKind::Unit, "b.service", false);
    cluster.settle();
    assert_eq!(cluster.at("b.service"), None, "now it is known to be");
}

#[test]
fn who_follows_what_cannot_be_read_stays() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("b.service", "");
    cluster.start("c.service", "MachineOf=b.service");
    cluster.settle();
    assert_eq!((cluster.at("b.service"), cluster.at("c.service")), (Some(1), Some(1)));
    unit_record(&mut cluster, RecordKind::Unit, "b.service", true);
    // As after a listing.
    cluster.apply(Change::Unit(name("b.service"), None));
    assert_eq!(cluster.settle(), []);
    assert_eq!(cluster.at("c.service"), Some(1));
    // Somebody else has moved it meanwhile.
    cluster.start("b.service", "");
    let place = Some((id(2), cluster.revision));
    cluster.apply(Change::Schedule(name("b.service"), place));
    assert_eq!(cluster.settle(), []);
    unit_record(&mut cluster, RecordKind::Unit, "b.service", false);
    cluster.settle();
    assert_eq!(cluster.at("c.service"), Some(2));
}

/// Its presence can't be read, and a listing lacks it.
#[test]
fn a_machine_whose_presence_cannot_be_read_is_not_gone() {
    let units = |cluster: &mut Cluster| {
        cluster.start("keep.service", "");
        cluster.start("stop.service", "OnIsolation=stop");
    };
    let mut cluster = Cluster::with_machines([1]);
    units(&mut cluster);
    cluster.settle();
    let place = |unit: &str| Change::Schedule(name(unit), Some((id(1), 7)));
    list(
        &mut cluster,
        vec![
            Change::Machine(id(2), Some(machine(&[]))),
            place("keep.service"),
            place("stop.service"),
            Change::Leaving(name("left.service"), Some((id(1), 7))),
            Change::Unread(
                Record::OfMachine(RecordKind::Presence, id(1)),
                Some(Unreadable { reason: "format 2".to_owned(), revision: 9 }),
            ),
        ],
    );
    units(&mut cluster);
    cluster.start("left.service", "OnIsolation=stop");
    cluster.now += GRACE * 4;
    assert_eq!(cluster.settle(), []);
    assert_eq!(placement::explain(&cluster.view, &name("keep.service")), None);
    // It runs out: from then on it is.
    machine_record(&mut cluster, RecordKind::Presence, 1, false);
    cluster.settle();
    assert_eq!((cluster.at("keep.service"), cluster.at("stop.service")), (Some(2), Some(1)));
    cluster.now += fencing::margin(GRACE);
    cluster.settle();
    assert_eq!((cluster.at("stop.service"), cluster.at("left.service")), (Some(2), Some(2)));
}

#[test]
fn what_is_on_a_machine_that_cannot_be_judged_stays_and_nothing_comes() {
    let mut cluster = Cluster::new();
    cluster.machine(1, &[("zone", "a")]);
    cluster.machine(2, &[("zone", "a")]);
    for unit in ["a.service", "b.service", "c.service", "d.service"] {
        cluster.start(unit, "MachineMetadata=zone=a");
    }
    cluster.settle();
    let before = cluster.at("a.service");
    // The edits that made it fit are missing, or it is to be drained by what was written before.
    machine_record(&mut cluster, RecordKind::Machine, 1, true);
    cluster.machine(1, &[]);
    cluster.cordon(1, true, true);
    assert_eq!(cluster.settle(), []);
    for unit in ["e.service", "f.service", "g.service"] {
        cluster.start(unit, "");
        cluster.settle();
        assert_eq!(cluster.at(unit), Some(2));
    }
    cluster.start("only.service", "MachineID=10000000");
    cluster.settle();
    assert_eq!(cluster.at("only.service"), None);
    let why = placement::fits(&cluster.view, &name("only.service"), &id(1));
    assert_eq!(why, Err(placement::Misfit::Unreadable));
    cluster.machine(1, &[("zone", "a")]);
    machine_record(&mut cluster, RecordKind::Machine, 1, false);
    cluster.settle();
    assert_eq!((cluster.at("a.service"), cluster.at("only.service")), (before, Some(1)));
    // That nothing is known of what operators say of it does not keep a machine that died alive.
    machine_record(&mut cluster, RecordKind::Machine, 1, true);
    cluster.machine_gone(1);
    cluster.settle();
    assert_eq!(cluster.at("a.service"), Some(2));
}

#[test]
fn a_drain_does_not_wait_for_reports_that_cannot_be_read() {
    let mut cluster = Cluster::careful();
    cluster.machine(1, &[]);
    cluster.start("a.service", "");
    cluster.start("b.service", "");
    cluster.settle();
    cluster.machine(2, &[]);
    machine_record(&mut cluster, RecordKind::States, 2, true);
    cluster.cordon(1, true, true);
    cluster.settle();
    assert_eq!((cluster.at("a.service"), cluster.at("b.service")), (Some(2), Some(2)));
}

#[test]
fn a_decision_that_cannot_be_carried_out_holds_up_no_other() {
    let mut cluster = Cluster::with_machines([1]);
    for unit in ["a.service", "b.service", "c.service"] {
        cluster.start(unit, "");
    }
    let now = cluster.now;
    let decided = cluster.engine.decide(&cluster.view, now, 100);
    assert_eq!(decided.len(), 3);
    // The first of them is not what the view shows, and nothing was committed.
    cluster.engine.drop_decision(name("a.service"));
    let decided = cluster.engine.decide(&cluster.view, now, 100);
    assert_eq!(decided.iter().map(|d| d.unit.as_str()).collect::<Vec<_>>(), ["b.service", "c.service"]);
    cluster.commit(&decided);
    assert_eq!(cluster.settle(), []);
    assert_eq!(cluster.engine.wake_at(), None);
    // Whatever changes of it, or of a machine, is looked at.
    let mut other = Cluster { engine: cluster.engine.clone(), view: cluster.view.clone(), ..cluster };
    other.machine(2, &[]);
    other.settle();
    assert_eq!(other.at("a.service"), Some(2));
    cluster.start("a.service", "Conflicts=nothing");
    cluster.settle();
    assert_eq!(cluster.at("a.service"), Some(1));
}
