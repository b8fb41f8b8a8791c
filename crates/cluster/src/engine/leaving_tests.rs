//! Units that must not run twice, moving between machines that are there.
use super::*;
use crate::testing::*;

const STOP: &str = "OnIsolation=stop\nMachineMetadata=zone=a";

/// Two machines, and a unit on the first that fits on it no more; nothing was ever reported of it.
fn unfit(fleet: &str) -> Cluster {
    let mut cluster = Cluster::new();
    cluster.machine(1, &[("zone", "a")]);
    cluster.machine(2, &[("zone", "a")]);
    cluster.now += GRACE;
    cluster.start("u.service", fleet);
    cluster.settle();
    assert_eq!(cluster.at("u.service"), Some(1));
    cluster.machine(1, &[("zone", "b")]);
    cluster
}

fn leaving(cluster: &Cluster) -> Option<MachineId> {
    cluster.view.leaving(&name("u.service")).map(|(id, _)| id.clone())
}

#[test]
fn it_is_placed_again_when_its_machine_has_said_that_it_stopped() {
    let mut cluster = unfit("MachineMetadata=zone=a");
    cluster.settle();
    assert_eq!(cluster.at("u.service"), Some(2), "one that may run twice moves at once");
    // Its machine has a new session, and has reported nothing in it yet.
    let mut cluster = unfit(STOP);
    let decided = cluster.settle();
    assert_eq!((decided.len(), &decided[0].machine), (1, &None));
    assert_eq!(leaving(&cluster), Some(id(1)));
    let stopping = crate::placement::fits(&cluster.view, &name("u.service"), &id(2));
    assert_eq!(stopping, Err(crate::placement::Misfit::Stopping { on: id(1) }));
    // A report may be older than what it was told.
    cluster.report(1, &["u.service"], "active");
    cluster.report(1, &[], "");
    assert_eq!(cluster.settle(), []);
    cluster.release(&id(1));
    cluster.settle();
    assert_eq!((cluster.at("u.service"), leaving(&cluster)), (Some(2), None));
}

#[test]
fn it_may_come_back_to_a_machine_that_has_said_nothing_yet() {
    let mut cluster = unfit(STOP);
    cluster.settle();
    cluster.machine(1, &[("zone", "a")]);
    let decided = cluster.settle();
    assert_eq!((cluster.at("u.service"), &decided[0].leaving), (Some(1), &Leaving::Over));
    assert_eq!(leaving(&cluster), None);
}

#[test]
fn a_machine_that_is_lost_before_it_has_said_so_is_given_its_time() {
    let mut cluster = unfit(STOP);
    cluster.settle();
    cluster.machine_gone(1);
    assert_eq!(cluster.settle(), []);
    let until = cluster.now + fencing::margin(GRACE);
    assert_eq!(cluster.engine.wake_at(), Some(until));
    assert_eq!(cluster.engine.delay(&name("u.service")), Some(Delay::Isolation));
    cluster.now = until;
    let decided = cluster.settle();
    assert_eq!((&decided[0].absent, &decided[0].leaving), (&Some(id(1)), &Leaving::Over));
    assert_eq!((cluster.at("u.service"), leaving(&cluster)), (Some(2), None));
    // Who said farewell runs nothing.
    let mut cluster = unfit(STOP);
    cluster.settle();
    cluster.farewell(1);
    cluster.settle();
    assert_eq!((cluster.at("u.service"), leaving(&cluster)), (Some(2), None));
}

/// Whoever destroys it writes which machine has to say that it has stopped.
#[test]
fn one_that_was_destroyed_is_remembered_until_its_machine_has_said_so() {
    let destroyed = || {
        let mut cluster = unfit(STOP);
        cluster.destroy("u.service");
        cluster.apply(Change::Schedule(name("u.service"), None));
        cluster.apply(Change::Leaving(name("u.service"), Some((id(1), 7))));
        assert_eq!(cluster.settle(), []);
        cluster
    };
    let mut cluster = destroyed();
    cluster.start("u.service", STOP);
    assert_eq!(cluster.settle(), []);
    cluster.release(&id(1));
    cluster.settle();
    assert_eq!(cluster.at("u.service"), Some(2));
    // Nobody makes it again, and the machine is lost.
    let mut cluster = destroyed();
    cluster.machine_gone(1);
    assert_eq!(cluster.settle(), []);
    cluster.now = cluster.engine.wake_at().unwrap();
    let decided = cluster.settle();
    assert_eq!((decided.len(), &decided[0].absent), (1, &Some(id(1))));
    assert_eq!((leaving(&cluster), cluster.engine.wake_at()), (None, None));
}

#[test]
fn a_drain_is_over_when_the_machine_has_said_that_it_stopped() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.now += GRACE;
    cluster.start("u.service", "OnIsolation=stop");
    cluster.settle();
    cluster.cordon(1, false, true);
    cluster.settle();
    assert_eq!((cluster.at("u.service"), leaving(&cluster)), (None, Some(id(1))));
    assert_eq!(crate::drain::drain_status(&cluster.view, &id(1)).stopping, [name("u.service")]);
    cluster.release(&id(1));
    cluster.settle();
    assert_eq!(cluster.at("u.service"), Some(2));
    assert!(crate::drain::drain_status(&cluster.view, &id(1)).is_empty());
}
