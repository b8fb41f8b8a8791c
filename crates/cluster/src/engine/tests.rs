use super::*;
use crate::{drain::*, placement::*, testing::*};
use proptest::prelude::*;
use std::time::Duration;

/// What has to hold when the engine has nothing left to decide.
pub(super) fn check_rest(cluster: &Cluster) -> Result<(), String> {
    let view = &cluster.view;
    let ids: Vec<_> = view.machines().map(|(id, _)| id.clone()).collect();
    for (unit_name, id, _) in view.schedule() {
        let Some(unit) = placeable(unit_name, view.known(unit_name)) else {
            return Err(format!("{unit_name} is on {id} and should be nowhere"));
        };
        if view.machine(id).is_some() {
            fits(view, unit_name, id).map_err(|misfit| format!("{unit_name} on {id}: {misfit}"))?;
            for target in &unit.requirements.machine_of {
                let target = name(target);
                let there = view.wanted(id, &target).is_some();
                if !there {
                    return Err(format!("{unit_name} is on {id} without {target}"));
                }
            }
            let idle = cluster.engine.on_the_way(id).next().is_none();
            if idle && drain_status(view, id).to_move.contains(unit_name) && is_draining(view, id) {
                return Err(format!("{unit_name} stays on {id} and could go"));
            }
        } else if let Some(better) = ids.iter().find(|id| fits(view, unit_name, id).is_ok())
            && cluster.engine.delay(unit_name).is_none()
        {
            return Err(format!("{unit_name} stays on {id}, which is gone, and would fit on {better}"));
        }
    }
    for (unit_name, _) in view.units().filter(|(unit_name, unit)| is_placeable(unit_name, unit)) {
        if view.place(unit_name).is_none() {
            if let Some(delay) = cluster.engine.delay(unit_name) {
                let stop = view.unit(unit_name).unwrap().requirements.on_isolation == OnIsolation::Stop;
                // A machine that may still run it is lost.
                let lost = view.leaving(unit_name).is_some_and(|(id, _)| view.machine(id).is_none());
                if !(stop && delay == Delay::Isolation || lost && delay == Delay::Grace) {
                    return Err(format!("{unit_name} is nowhere: {delay}"));
                }
                continue;
            }
            if let Some(id) = ids.iter().find(|id| fits(view, unit_name, id).is_ok()) {
                return Err(format!("{unit_name} is nowhere and fits on {id}"));
            }
            let explained = explain(view, unit_name);
            match &explained {
                Some(Unplaced::NoMachines) if ids.is_empty() => {}
                Some(Unplaced::NoFit(why)) if why.len() == ids.len() && !ids.is_empty() => {}
                _ => return Err(format!("{unit_name} is nowhere: {explained:?}")),
            }
        }
    }
    for id in &ids {
        let there = view.all_wanted(id);
        for one in there.keys() {
            for other in there.keys().filter(|other| *other != one) {
                let conflicts = &view.unit(one).unwrap().requirements.conflicts;
                if conflicts.iter().any(|pattern| pattern.matches(other.as_str())) {
                    return Err(format!("{one} and {other} are both on {id}"));
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases(600))]

    /// After anything that happens: the engine comes to rest, all is as it should be then, and it decided what an
    /// engine that looks at everything each time would have decided.
    #[test]
    fn comes_to_rest_as_one_that_looks_at_everything(events in events(40), early in any::<bool>()) {
        let mut cluster = Cluster::careful();
        if early {
            cluster.now = Duration::ZERO;
        }
        for event in &events {
            cluster.happen(event);
            let mut last = Vec::new();
            for round in 0.. {
                let mut thorough = cluster.engine.clone();
                thorough.recheck();
                let decisions = cluster.engine.decide(&cluster.view, cluster.now, usize::MAX);
                let everything = thorough.decide(&cluster.view, cluster.now, usize::MAX);
                prop_assert_eq!(&decisions, &everything, "after {:?}", event);
                if decisions.is_empty() {
                    break;
                }
                prop_assert!(round < 12, "no rest after {:?}: {:#?} {:#?}", event, last, decisions);
                cluster.commit(&decisions);
                last = decisions;
            }
            let wake = cluster.engine.wake_at();
            prop_assert!(wake.is_none_or(|at| at > cluster.now), "{:?}", wake);
            check_rest(&cluster).map_err(|wrong| TestCaseError::fail(format!("after {event:?}: {wrong}")))?;
        }
    }

    /// Each decision, seen as made after the ones before it: of all machines the unit fits on it takes the least
    /// loaded, of two such that with the smaller ID, and only where there is none it takes none.
    #[test]
    fn each_decision_is_the_best(events in events(40), burst in 1usize..6) {
        let mut cluster = Cluster::careful();
        for events in events.chunks(burst) {
            for event in events {
                cluster.happen(event);
            }
            for round in 0.. {
                let decisions = cluster.engine.decide(&cluster.view, cluster.now, usize::MAX);
                prop_assert!(round < 12);
                for decision in &decisions {
                    let (view, unit) = (&cluster.view, &decision.unit);
                    let from = view.place(unit).map(|(at, _)| at).filter(|at| {
                        is_draining(view, at) && fits(view, unit, at).is_ok()
                    });
                    let placed = view.unit(unit).filter(|known| is_placeable(unit, known));
                    if let (Some(from), Some(known)) = (from, placed) {
                        // It has somewhere to go; if it runs it has to stop first.
                        let along = companions(view, unit, from);
                        let could = |id: &MachineId| could_go(view, unit, known, &along, id).is_ok();
                        let fitting = view.machines().filter(|(id, _)| *id != from && could(id));
                        let best = fitting.map(|(id, _)| (view.all_wanted(id).len(), id)).min();
                        prop_assert!(best.is_some(), "{:?}", decision);
                        let runs = view.live(view.known(unit)).next().is_some();
                        let runs = runs || must_not_run_twice(view.known(unit));
                        let best = best.filter(|_| !runs).map(|(_, id)| id);
                        prop_assert_eq!(decision.machine.as_ref(), best, "{:?}", decision);
                        cluster.commit(std::slice::from_ref(decision));
                        continue;
                    }
                    let fitting = view.machines().filter(|(id, _)| fits(view, unit, id).is_ok());
                    let best = fitting.map(|(id, _)| (view.all_wanted(id).len(), id)).min();
                    let placeable = view.unit(unit).is_some_and(|known| is_placeable(unit, known));
                    // One that must not run twice has to have stopped first.
                    let stops = view.place(unit).is_some_and(|(at, _)| view.machine(at).is_some())
                        && must_not_run_twice(view.known(unit));
                    let best = best.filter(|_| placeable && !stops).map(|(_, id)| id);
                    prop_assert_eq!(decision.machine.as_ref(), best, "{:?}", decision);
                    cluster.commit(std::slice::from_ref(decision));
                }
                if decisions.is_empty() {
                    break;
                }
            }
        }
    }

    /// In bursts and by small batches, with agents that stop and start: in the end all is as it should be.
    #[test]
    fn comes_to_rest_in_small_batches(events in events(60), limit in 1usize..4) {
        let mut cluster = Cluster::careful();
        for events in events.chunks(5) {
            for event in events {
                cluster.happen(event);
            }
            cluster.settle_by(limit);
            check_rest(&cluster).map_err(TestCaseError::fail)?;
        }
        // When all agents have done what they were told, nothing is left that waits for one to stop.
        for _ in 0..20 {
            for first in 0..MACHINES {
                cluster.obey(&id(first));
            }
            if cluster.settle_by(limit).is_empty() {
                break;
            }
        }
        check_rest(&cluster).map_err(TestCaseError::fail)?;
        for first in 0..MACHINES {
            cluster.obey(&id(first));
        }
        prop_assert_eq!(cluster.settle(), vec![]);
        for (unit_name, _) in cluster.view.units() {
            if let Some(Unplaced::NoFit(why)) = explain(&cluster.view, unit_name) {
                let stopping = why.iter().any(|(_, misfit)| matches!(misfit, Misfit::Stopping { .. }));
                prop_assert!(!stopping, "{:?}", why);
            }
        }
    }

    /// A unit that is running is moved only when its place no longer fits: never by other units' coming and going.
    #[test]
    fn load_moves_nothing(count in 1usize..20, gone in prop::collection::vec(0usize..20, 0..20)) {
        let mut cluster = Cluster::with_machines([1, 2, 3]);
        for index in 0..count {
            cluster.start(&format!("u{index}.service"), "");
        }
        cluster.settle();
        for index in gone {
            cluster.destroy(&format!("u{index}.service"));
        }
        cluster.machine(4, &[]);
        prop_assert!(cluster.settle().iter().all(|decision| decision.machine.is_none()));
    }
}

#[test]
fn places_on_the_least_loaded_of_equal_ones_on_the_smaller_id() {
    // golden/06-load.txt: hello is on no machine; a, b, c and d follow.
    let mut cluster = Cluster::with_machines([3, 1, 2]);
    for unit in ["a", "b", "c", "d", "e", "f", "g"] {
        cluster.start(&format!("{unit}.service"), "");
    }
    let decisions = cluster.settle();
    let places: Vec<_> = decisions.iter().map(|d| (d.unit.as_str(), d.machine.clone())).collect();
    let expected = [("a", 1), ("b", 2), ("c", 3), ("d", 1), ("e", 2), ("f", 3), ("g", 1)]
        .map(|(unit, at)| (format!("{unit}.service"), Some(id(at))));
    assert_eq!(places, expected.each_ref().map(|(unit, at)| (unit.as_str(), at.clone())));
    assert_eq!(decisions[0].reason, "it is to be launched, and no fitting machine has less to do");
    // Global units count as load, inactive units do not.
    cluster.submit("b.service", "", DesiredState::Inactive);
    cluster.start("x.service", "Global=true\nMachineMetadata=zone=a");
    cluster.machine(2, &[("zone", "a")]);
    cluster.start("h.service", "");
    cluster.settle();
    assert_eq!((cluster.at("b.service"), cluster.at("h.service")), (None, Some(2)));
    cluster.start("i.service", "");
    cluster.settle();
    assert_eq!(cluster.at("i.service"), Some(3));
}

#[test]
fn decisions_carry_the_revisions_they_are_made_from() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "");
    let placed = cluster.settle();
    assert_eq!((placed[0].unit_revision, placed[0].schedule_revision), (1, 0));
    cluster.submit("a.service", "", DesiredState::Inactive);
    let off = cluster.engine.decide(&cluster.view, cluster.now, 9);
    assert_eq!((off[0].unit_revision, off[0].schedule_revision, off[0].machine.clone()), (3, 2, None));
    assert_eq!(off[0].reason, "it is to be inactive");
    cluster.destroy("a.service");
    let off = cluster.settle();
    assert_eq!((off[0].unit_revision, off[0].schedule_revision), (0, 2));
    assert_eq!(off[0].reason, "it was destroyed");
}

#[test]
fn templates_and_global_units_are_not_placed() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("t@.service", "");
    cluster.start("g.service", "Global=true");
    assert_eq!(cluster.settle(), []);
    cluster.start("a.service", "");
    cluster.settle();
    cluster.start("a.service", "Global=true");
    let off = cluster.settle();
    assert_eq!((off[0].machine.clone(), off[0].reason.as_str()), (None, "it is Global now"));
}

#[test]
fn a_lost_machines_units_go_elsewhere_after_the_grace() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("a.service", "");
    cluster.start("pinned.service", "MachineID=10000000");
    cluster.settle();
    assert_eq!(cluster.at("a.service"), Some(1));
    // A new leader, which does not see machine 1 yet.
    cluster.machine_gone(1);
    cluster.engine = Engine::new(cluster.now, GRACE);
    assert_eq!(cluster.engine.wake_at(), Some(cluster.now));
    assert_eq!(cluster.settle(), []);
    assert_eq!(cluster.engine.wake_at(), Some(cluster.now + GRACE));
    cluster.now += GRACE;
    let moved = cluster.settle();
    assert_eq!(moved.len(), 1);
    assert_eq!(moved[0].reason, format!("it can't stay on {}: it is not there", id(1)));
    assert_eq!((cluster.at("a.service"), cluster.engine.wake_at()), (Some(2), None));
    // What fits nowhere else is left where it is, and says why.
    assert_eq!(cluster.at("pinned.service"), Some(1));
    let pinned = name("pinned.service");
    let required = "10000000".to_owned();
    let why = vec![(id(2), Misfit::MachineId { required }), (id(1), Misfit::Gone)];
    assert_eq!(explain(&cluster.view, &pinned), Some(Unplaced::NoFit(why)));
    cluster.machine(1, &[]);
    assert_eq!(cluster.settle(), []);
    assert_eq!(explain(&cluster.view, &pinned), None);
}

#[test]
fn a_machine_that_comes_back_within_the_grace_keeps_its_units() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("a.service", "");
    cluster.settle();
    cluster.machine_gone(1);
    cluster.engine = Engine::new(cluster.now, GRACE);
    assert_eq!(cluster.settle(), []);
    cluster.machine(1, &[]);
    assert_eq!(cluster.settle(), []);
    cluster.now += GRACE;
    assert_eq!(cluster.settle(), []);
    assert_eq!(cluster.engine.wake_at(), None);
}

#[test]
fn there_are_never_two_of_a_unit() {
    let mut cluster = Cluster::new();
    cluster.machine(1, &[("zone", "a")]);
    cluster.machine(2, &[("zone", "a")]);
    cluster.start("a.service", "MachineMetadata=zone=a");
    cluster.settle();
    cluster.report(1, &["a.service"], "active");
    cluster.machine(1, &[("zone", "b")]);
    let off = cluster.settle();
    assert_eq!((off.len(), off[0].machine.clone()), (1, None), "it has to stop first");
    assert_eq!(
        off[0].reason,
        format!("it can't stay on {}: its metadata has zone=b, not zone=a (MachineMetadata)", id(1))
    );
    cluster.report(1, &["a.service"], "deactivating");
    assert_eq!(cluster.settle(), []);
    let Some(Unplaced::NoFit(why)) = explain(&cluster.view, &name("a.service")) else { panic!() };
    assert_eq!(why[1], (id(2), Misfit::Stopping { on: id(1) }));
    cluster.report(1, &["a.service"], "inactive");
    cluster.settle();
    assert_eq!(cluster.at("a.service"), Some(2));
}

#[test]
fn a_unit_that_is_still_stopping_comes_back_to_the_same_machine() {
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("a.service", "");
    cluster.settle();
    cluster.report(1, &["a.service"], "active");
    cluster.submit("a.service", "", DesiredState::Inactive);
    cluster.start("b.service", "");
    cluster.settle();
    // Machine 2 has less to do, but the unit still stops on machine 1.
    cluster.start("c.service", "MachineID=10000000");
    cluster.start("a.service", "");
    cluster.settle();
    assert_eq!(cluster.at("a.service"), Some(1));
}

#[test]
fn followers_follow() {
    let mut cluster = Cluster::new();
    cluster.machine(1, &[("zone", "a")]);
    cluster.machine(2, &[("zone", "b")]);
    // The followers' names come before and after that of the unit they follow.
    cluster.start("a.service", "MachineOf=m.service");
    cluster.start("z.service", "MachineOf=a.service");
    assert_eq!(cluster.settle(), []);
    let Some(Unplaced::NoFit(why)) = explain(&cluster.view, &name("a.service")) else { panic!() };
    assert_eq!(why[0].1.to_string(), "m.service is not known to the cluster (MachineOf)");
    cluster.start("m.service", "MachineMetadata=zone=b");
    assert_eq!(cluster.settle().len(), 3);
    assert_eq!((cluster.at("a.service"), cluster.at("z.service")), (Some(2), Some(2)));
    cluster.start("m.service", "MachineMetadata=zone=a");
    let decisions = cluster.settle();
    let order: Vec<_> = decisions.iter().map(|decision| decision.unit.as_str()).collect();
    assert_eq!(order, ["m.service", "a.service", "z.service"], "each goes once");
    assert_eq!((cluster.at("a.service"), cluster.at("z.service")), (Some(1), Some(1)));
    cluster.submit("m.service", "", DesiredState::Inactive);
    assert_eq!(cluster.settle().len(), 3);
}

#[test]
fn units_that_follow_each_other_are_not_placed_and_end() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "MachineOf=b.service");
    cluster.start("b.service", "MachineOf=c.service");
    cluster.start("c.service", "MachineOf=a.service");
    cluster.start("d.service", "MachineOf=d.service");
    assert_eq!(cluster.settle(), []);
    let Some(Unplaced::NoFit(why)) = explain(&cluster.view, &name("a.service")) else { panic!() };
    assert_eq!(
        why[0].1,
        Misfit::Circle { target: "b.service".to_owned() },
        "and not that b.service is not placed"
    );
}

#[test]
fn units_that_come_to_follow_each_other_do_not_chase_each_other() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("d.service", "Replaces=a.service");
    cluster.start("a.service", "MachineOf=d.service");
    cluster.start("g.service", "MachineOf=a.service");
    cluster.settle();
    let places = |cluster: &Cluster| ["a.service", "d.service", "g.service"].map(|unit| cluster.at(unit));
    assert_eq!(places(&cluster), [None, Some(1), None]);
    cluster.start("d.service", "MachineOf=g.service");
    cluster.settle();
    assert_eq!(places(&cluster), [None; 3]);
    // Where all are there already they stay, as with the original.
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "");
    cluster.start("d.service", "MachineOf=a.service");
    cluster.settle();
    cluster.start("a.service", "MachineOf=d.service");
    assert_eq!(cluster.settle(), []);
}

#[test]
fn a_long_chain_of_followers_is_placed_at_once() {
    let mut cluster = Cluster::with_machines([1, 2]);
    for index in 0..500 {
        cluster.start(&format!("u{index:04}.service"), &format!("MachineOf=u{:04}.service", index + 1));
    }
    cluster.start("u0500.service", "");
    assert_eq!(cluster.engine.decide(&cluster.view, cluster.now, usize::MAX).len(), 501);
}

#[test]
fn who_comes_to_conflict_by_its_own_file_has_to_go() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "");
    cluster.start("b.service", "");
    cluster.settle();
    cluster.start("a.service", "Conflicts=b*");
    let off = cluster.settle();
    assert_eq!((off.len(), off[0].unit.as_str()), (1, "a.service"));
    assert_eq!(
        off[0].reason,
        format!("it can't stay on {}: it conflicts with b.service, which is there (Conflicts=b*)", id(1))
    );
    // There is room again when the other leaves.
    cluster.destroy("b.service");
    cluster.settle();
    assert_eq!(cluster.at("a.service"), Some(1));
    cluster.start("b.service", "");
    assert_eq!(cluster.settle(), []);
    let Some(Unplaced::NoFit(why)) = explain(&cluster.view, &name("b.service")) else { panic!() };
    assert_eq!(why[0].1.to_string(), "a.service, which is there, conflicts with it (Conflicts=b*)");
}

#[test]
fn who_names_the_other_has_to_go_also_when_the_other_comes_back() {
    // b is to be inactive and still in the schedule when a comes; then b is started again.
    let mut cluster = Cluster::with_machines([1]);
    cluster.submit("b.service", "", DesiredState::Inactive);
    cluster.start("a.service", "Conflicts=b.service");
    cluster.settle();
    cluster.apply(Change::Schedule(name("b.service"), Some((id(1), 99))));
    assert_eq!(cluster.at("a.service"), Some(1));
    cluster.start("b.service", "");
    cluster.settle();
    assert_eq!((cluster.at("a.service"), cluster.at("b.service")), (None, Some(1)));
}

#[test]
fn a_replaced_unit_moves_away_and_stays_away() {
    // The case of the original's functional test: 0 alone on one machine, 1 and its follower 2 on the other.
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("replace.0.service", "");
    cluster.start("replace.1.service", "");
    cluster.start("replace.2.service", "MachineOf=replace.1.service");
    cluster.settle();
    cluster.obey(&id(1));
    cluster.obey(&id(2));
    cluster.start("replace-kick0.service", "Replaces=replace.0.service");
    let decisions = cluster.settle();
    assert_eq!(cluster.at("replace-kick0.service"), Some(1));
    assert_eq!(decisions.len(), 2);
    assert_eq!(cluster.at("replace.0.service"), None, "it stops first");
    cluster.obey(&id(1));
    cluster.settle();
    assert_eq!(cluster.at("replace.0.service"), Some(2));
    // Alone with the one that replaces it, it is nowhere and says why.
    cluster.machine_gone(2);
    cluster.settle();
    let Some(Unplaced::NoFit(why)) = explain(&cluster.view, &name("replace.0.service")) else { panic!() };
    assert_eq!(
        why[0].1.to_string(),
        "replace-kick0.service, which is there, replaces it (Replaces=replace.0.service)"
    );
}

#[test]
fn a_unit_that_cannot_be_placed_replaces_nothing() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "Conflicts=b.service");
    cluster.settle();
    cluster.start("b.service", "Replaces=a.service");
    assert_eq!(cluster.settle(), []);
    assert_eq!(cluster.at("a.service"), Some(1));
}

#[test]
fn circular_replacement_does_not_count() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "Replaces=b.service");
    cluster.start("b.service", "Replaces=c.service");
    cluster.settle();
    assert_eq!((cluster.at("a.service"), cluster.at("b.service")), (Some(1), None));
    cluster.start("c.service", "Replaces=a.service");
    cluster.settle();
    let places = ["a.service", "b.service", "c.service"].map(|unit| cluster.at(unit));
    assert_eq!(places, [Some(1); 3], "each would drive out the next for ever");
    cluster.destroy("a.service");
    cluster.settle();
    assert_eq!(cluster.at("c.service"), None, "b replaces c, and nothing replaces b");
    // One that follows, at one remove, the unit it would drive away.
    let mut cluster = Cluster::with_machines([1, 2]);
    cluster.start("a.service", "");
    cluster.start("b.service", "MachineOf=a.service");
    cluster.start("c.service", "MachineOf=b.service\nReplaces=a.service");
    cluster.settle();
    let places = ["a.service", "b.service", "c.service"].map(|unit| cluster.at(unit));
    assert_eq!(places, [Some(1); 3]);
}

#[test]
fn a_decision_that_was_not_committed_is_made_again() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "");
    let first = cluster.engine.decide(&cluster.view, cluster.now, 9);
    assert_eq!(first.len(), 1);
    assert_eq!(cluster.engine.decide(&cluster.view, cluster.now, 9), first);
    cluster.commit(&first);
    assert_eq!(cluster.settle(), []);
}

/// Another decision, or that there is nothing to decide, may stand on one that is not carried out in the end.
#[test]
fn what_stood_on_a_decision_that_was_dropped_is_decided_anew() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("b.service", "Global=true");
    cluster.start("c.service", "MachineOf=b.service");
    cluster.settle();
    assert_eq!(cluster.at("c.service"), Some(1));
    // It is about to be placed where it was Global, so what follows it may stay …
    cluster.start("b.service", "");
    let decisions = cluster.engine.decide(&cluster.view, cluster.now, usize::MAX);
    assert_eq!(decisions.len(), 1, "{decisions:#?}");
    // … but that is not committed, since its user has changed his mind.
    cluster.submit("b.service", "", DesiredState::Inactive);
    cluster.settle();
    assert_eq!(cluster.at("c.service"), None);
    check_rest(&cluster).unwrap();
}

/// A decision and a change of the same unit that is made before the decision is in the view are noted together.
#[test]
fn a_unit_that_changes_while_it_is_placed_leaves_room() {
    let mut cluster = Cluster::with_machines([1]);
    cluster.start("a.service", "Conflicts=b*");
    cluster.start("b.service", "");
    let decisions = cluster.engine.decide(&cluster.view, cluster.now, usize::MAX);
    assert_eq!((decisions.len(), decisions[0].unit.as_str()), (1, "a.service"));
    cluster.commit(&decisions);
    cluster.start("a.service", "");
    cluster.settle();
    assert_eq!(cluster.at("b.service"), Some(1));
    check_rest(&cluster).unwrap();
}

#[test]
fn all_is_looked_at_anew_now_and_then_where_that_is_asked_for() {
    const EVERY: Time = Time::from_secs(2);
    let policy = |recheck| Policy { recheck, ..Policy::for_ttl(GRACE) };
    let view = View::default();
    let rested = |recheck, at: Time| {
        let mut engine = Engine::with_policy(at, Time::ZERO, policy(recheck));
        assert!(engine.decide(&view, at, usize::MAX).is_empty());
        engine
    };
    assert_eq!(rested(None, Time::ZERO).wake_at(), None, "nothing happens where nothing changes");
    let mut engine = rested(Some(EVERY), EVERY * 5);
    for round in 6..9 {
        assert_eq!(engine.wake_at(), Some(EVERY * round));
        assert!(engine.decide(&view, EVERY * round, usize::MAX).is_empty());
    }
    // What nobody has told it of is found.
    let mut cluster = Cluster::with_machines([1]);
    let mut engine = Engine::with_policy(cluster.now, Time::ZERO, policy(Some(EVERY)));
    assert!(engine.decide(&cluster.view, cluster.now, usize::MAX).is_empty());
    cluster.start("a.service", "");
    assert!(engine.decide(&cluster.view, cluster.now, usize::MAX).is_empty());
    let decisions = engine.decide(&cluster.view, cluster.now + EVERY, usize::MAX);
    assert_eq!(decisions.iter().map(|it| it.machine.as_ref()).collect::<Vec<_>>(), [Some(&id(1))]);
}
