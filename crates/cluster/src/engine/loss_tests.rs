//! Machines that vanish, alone or with many others, that leave, and that come back.
use super::{tests::check_rest, *};
use crate::{placement::*, testing::*};
use proptest::prelude::*;
use std::time::Duration;

const SECOND: Time = Duration::from_secs(1);

/// Machines 1 to `machines`, each with `units` units; those on machine 1 are u0x.
fn cluster(machines: u8, units: usize) -> Cluster {
    let mut cluster = Cluster::with_machines(1..=machines);
    for index in 0..usize::from(machines) * units {
        cluster.start(&format!("u{index:03}.service"), "");
    }
    cluster.settle();
    for first in 1..=machines {
        cluster.obey(&id(first));
    }
    cluster.settle();
    cluster
}

fn units_on(cluster: &Cluster, machines: &[u8]) -> usize {
    machines.iter().map(|first| cluster.view.scheduled_on(&id(*first)).count()).sum()
}

#[test]
fn up_to_a_third_of_the_machines_are_replaced_at_once() {
    let mut cluster = cluster(6, 20);
    cluster.machine_gone(1);
    cluster.machine_gone(2);
    assert_eq!(cluster.settle().len(), 40);
    assert_eq!((cluster.engine.take_mass_loss(), cluster.engine.wake_at()), (None, None));
    // A machine lost in another window does not count with them.
    cluster.now += GRACE;
    cluster.machine_gone(3);
    assert_eq!(cluster.settle().len(), 30);
    assert_eq!(cluster.engine.take_mass_loss(), None);
}

#[test]
fn one_machine_alone_is_never_many() {
    let mut cluster = cluster(2, 30);
    cluster.machine_gone(1);
    assert_eq!(cluster.settle().len(), 30);
    assert_eq!(cluster.engine.take_mass_loss(), None);
}

#[test]
fn units_of_many_lost_machines_are_replaced_at_a_pace() {
    let mut cluster = cluster(5, 12);
    cluster.machine_gone(1);
    cluster.machine_gone(2);
    let first = cluster.settle();
    assert_eq!(first.len(), 10);
    assert!(first.iter().all(|decision| decision.absent == Some(id(1)) || decision.absent == Some(id(2))));
    let told = cluster.engine.take_mass_loss().unwrap();
    assert_eq!(
        told.to_string(),
        "2 of 5 machines vanished within 30 s; until they are back their units are placed elsewhere \
         at most 10 every 1 s, since the fault may be on this side"
    );
    assert_eq!(cluster.engine.wake_at(), Some(cluster.now + SECOND));
    let waiting = cluster.view.scheduled_on(&id(2)).next().unwrap().clone();
    assert_eq!(cluster.engine.delay(&waiting), Some(Delay::MassLoss));
    assert!(cluster.engine.is_mass_loss() && cluster.engine.delays().all(|(_, why)| why == Delay::MassLoss));
    assert_eq!(cluster.engine.delays().count(), 14);
    assert_eq!(cluster.settle(), []);
    // What else there is to decide does not wait.
    cluster.start("new.service", "");
    assert_eq!(cluster.settle().len(), 1);
    cluster.now += SECOND;
    assert_eq!(cluster.settle().len(), 10);
    cluster.now += 20 * SECOND;
    assert_eq!(cluster.settle().len(), 4, "what was not used is not saved up, but so many are left");
    assert_eq!((cluster.engine.take_mass_loss(), cluster.engine.wake_at()), (None, None));
    assert_eq!(cluster.engine.delays().count(), 0);
    // Later losses are new ones.
    cluster.now += GRACE;
    cluster.machine_gone(3);
    let on_three = units_on(&cluster, &[3]);
    assert_eq!((on_three > 10, cluster.settle().len()), (true, on_three));
}

#[test]
fn machines_that_come_back_keep_their_units() {
    let mut cluster = cluster(5, 12);
    for first in [1, 2, 3] {
        cluster.machine_gone(first);
    }
    assert_eq!(cluster.settle().len(), 10);
    let kept = [1, 2, 3].map(|first| units_on(&cluster, &[first]));
    cluster.machine(1, &[]);
    cluster.machine(2, &[]);
    // One of five is lost now: that is no mass loss any more.
    let moved = cluster.settle();
    assert_eq!(moved.len(), kept[2]);
    assert!(moved.iter().all(|decision| decision.absent == Some(id(3))));
    cluster.now += 10 * GRACE;
    assert_eq!((cluster.settle(), cluster.engine.wake_at()), (vec![], None));
}

#[test]
fn who_is_not_there_after_the_grace_is_lost_then() {
    let mut cluster = cluster(6, 12);
    for first in 1..=5 {
        cluster.machine_gone(first);
    }
    // A new leader in a part of the network that is cut off.
    cluster.engine = Engine::new(cluster.now, GRACE);
    assert_eq!(cluster.settle(), []);
    for first in [2, 3] {
        cluster.machine(first, &[]);
    }
    assert_eq!((cluster.settle(), cluster.engine.wake_at()), (vec![], Some(cluster.now + GRACE)));
    assert_eq!(cluster.engine.take_mass_loss(), None, "it is not known yet");
    cluster.now += GRACE;
    assert_eq!(cluster.settle().len(), 10);
    assert_eq!(cluster.engine.take_mass_loss().unwrap().lost, 3);
    // Had all but two come back in time, those would have gone at once.
    let mut cluster = self::cluster(6, 12);
    cluster.machine_gone(1);
    cluster.machine_gone(2);
    cluster.engine = Engine::new(cluster.now, GRACE);
    cluster.settle();
    cluster.now += GRACE;
    assert_eq!((cluster.settle().len(), cluster.engine.take_mass_loss()), (24, None));
}

#[test]
fn after_an_outage_of_the_store_machines_get_time_to_come_back() {
    let mut cluster = cluster(4, 12);
    cluster.now += 10 * GRACE;
    let until = cluster.now + GRACE;
    cluster.engine.hold_until(until);
    for first in [1, 2, 3] {
        cluster.machine_gone(first);
    }
    assert_eq!((cluster.settle(), cluster.engine.wake_at()), (vec![], Some(until)));
    let held = cluster.view.scheduled_on(&id(1)).next().unwrap().clone();
    assert_eq!(cluster.engine.delay(&held), Some(Delay::Grace));
    cluster.machine(1, &[]);
    cluster.machine(2, &[]);
    cluster.engine.hold_until(until - SECOND);
    cluster.now = until;
    let moved = cluster.settle();
    assert_eq!((moved.len(), cluster.engine.take_mass_loss()), (12, None));
    assert!(moved.iter().all(|decision| decision.absent == Some(id(3))));
    // It also stops what is under way.
    cluster.now += 10 * GRACE;
    cluster.machine_gone(1);
    cluster.machine_gone(2);
    assert_eq!(cluster.settle().len(), 10);
    cluster.engine.hold_until(cluster.now + GRACE);
    cluster.now += 2 * SECOND;
    assert_eq!(cluster.settle(), []);
    cluster.machine(1, &[]);
    cluster.machine(2, &[]);
    cluster.now += GRACE;
    assert_eq!((cluster.settle(), cluster.engine.wake_at()), (vec![], None));
}

#[test]
fn nobody_waits_for_who_said_farewell() {
    let mut cluster = cluster(5, 12);
    cluster.now += GRACE;
    cluster.start("stop.service", "OnIsolation=stop\nMachineID=10000000");
    cluster.settle();
    cluster.start("stop.service", "OnIsolation=stop");
    cluster.settle();
    for first in [1, 2, 3, 4] {
        cluster.farewell(first);
    }
    assert_eq!(cluster.settle().len(), 49, "no pace, no margin");
    assert_eq!((cluster.engine.take_mass_loss(), units_on(&cluster, &[5])), (None, 61));
    // Nor in the grace, when it is known.
    cluster.machine(1, &[]);
    cluster.engine.hold_until(cluster.now + GRACE);
    cluster.farewell(5);
    assert_eq!((cluster.settle().len(), units_on(&cluster, &[1])), (61, 61));
    // Who came back and vanished is lost like any other.
    cluster.machine(2, &[]);
    cluster.machine_gone(1);
    assert_eq!((cluster.settle(), cluster.view.has_left(&id(1))), (vec![], false));
}

#[test]
fn a_unit_that_must_not_run_twice_waits_for_its_machine_to_have_stopped_it() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.now += GRACE;
    cluster.start("keep.service", "MachineID=10000000");
    cluster.start("stop.service", "MachineID=10000000");
    cluster.settle();
    cluster.start("keep.service", "OnIsolation=keep");
    cluster.start("stop.service", "OnIsolation=stop");
    cluster.settle();
    cluster.obey(&id(1));
    cluster.machine_gone(1);
    let moved = cluster.settle();
    assert_eq!((moved.len(), moved[0].unit.as_str()), (1, "keep.service"));
    assert_eq!(moved[0].absent, Some(id(1)));
    let (stop, until) = (name("stop.service"), cluster.now + fencing::margin(GRACE));
    assert_eq!(
        (cluster.engine.delay(&stop), cluster.engine.wake_at()),
        (Some(Delay::Isolation), Some(until))
    );
    // Nor is it placed there when its user stops and starts it meanwhile: who knows where it was?
    cluster.submit("stop.service", "OnIsolation=stop", DesiredState::Inactive);
    assert_eq!(cluster.settle().len(), 1);
    cluster.start("stop.service", "OnIsolation=stop");
    assert_eq!(cluster.settle(), []);
    assert_eq!(
        (cluster.engine.delay(&stop), cluster.engine.wake_at()),
        (Some(Delay::Isolation), Some(until))
    );
    cluster.now = until;
    assert_eq!(cluster.settle().len(), 1);
    assert_eq!(cluster.at("stop.service"), Some(2));
    // A new leader, which knows of no machine that was there before.
    cluster.submit("stop.service", "OnIsolation=stop", DesiredState::Inactive);
    cluster.settle();
    cluster.engine = Engine::new(cluster.now, GRACE);
    cluster.start("stop.service", "OnIsolation=stop");
    assert_eq!(cluster.settle(), []);
    cluster.now += GRACE + fencing::margin(GRACE);
    assert_eq!(cluster.settle().len(), 1);
}

proptest! {
    #![proptest_config(cases(300))]

    /// However machines come and go: of units of lost machines no more are placed elsewhere than the pace allows once it holds, each
    /// machine that is back has what was not placed elsewhere, and in the end all units are on machines that are there.
    #[test]
    fn the_pace_is_kept(
        machines in 3u8..8,
        events in prop::collection::vec((1u8..8, any::<bool>(), 0u64..1500), 1..30),
    ) {
        let mut cluster = cluster(machines, 4);
        let policy = Policy { pace_units: 2, pace_period: SECOND, ..Policy::for_ttl(GRACE) };
        cluster.engine = Engine::with_policy(cluster.now, Duration::ZERO, policy);
        cluster.settle();
        let mut paced: Vec<Time> = Vec::new();
        let mut wakes = 0;
        let mut settle = |cluster: &mut Cluster, to: Time| -> Result<(), TestCaseError> {
            loop {
                for decision in cluster.settle() {
                    let from = decision.absent.clone().unwrap();
                    prop_assert!(cluster.view.machine(&from).is_none());
                    if cluster.engine.losses.is_limited(&from) {
                        paced.push(cluster.now);
                    }
                }
                check_rest(cluster).map_err(TestCaseError::fail)?;
                match cluster.engine.wake_at() {
                    Some(at) if at <= to => cluster.now = at,
                    _ => break,
                }
                wakes += 1;
                prop_assert!(wakes < 2000, "it wakes for nothing");
            }
            cluster.now = to;
            Ok(())
        };
        for (first, there, pause) in events {
            let first = (first - 1) % machines + 1;
            if there {
                cluster.machine(first, &[]);
                cluster.obey(&id(first));
            } else {
                cluster.machine_gone(first);
            }
            let to = cluster.now + Duration::from_millis(pause);
            settle(&mut cluster, to)?;
        }
        let to = cluster.now + 10 * GRACE;
        settle(&mut cluster, to)?;
        for start in &paced {
            // A period begins with a unit, so that two of them may meet.
            let in_one = paced.iter().filter(|at| (*start..*start + SECOND).contains(at)).count();
            prop_assert!(in_one <= 4, "{:?}", paced);
        }
        for (index, start) in paced.iter().enumerate() {
            let by_now = paced[..index].iter().filter(|at| **at == *start).count();
            prop_assert!(by_now < 2, "{:?}", paced);
        }
        let there = cluster.view.machines().next().is_some();
        for (unit, at, _) in cluster.view.schedule() {
            prop_assert!(!there || cluster.view.machine(at).is_some(), "{} is left on {}", unit, at);
            prop_assert_eq!(explain(&cluster.view, unit).is_some(), !there);
        }
    }
}
