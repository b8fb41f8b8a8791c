//! The agent against a systemd in memory: what it does, and above all what it must never do.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use fleet_cluster::model::*;
use fleet_link::{Instruction, ToAgent};
use fleet_systemd::memory::{Behaviour, MemorySystemd};
use fleet_systemd::{Error, Mark, Systemd};
use fleet_unit::UnitFile;
use rig::{Rig, SLEEP, name, wanted};

#[tokio::test(start_paused = true)]
async fn a_unit_is_installed_started_stopped_and_removed() {
    let mut rig = Rig::new(MemorySystemd::default()).await;
    let a = name("a.service");
    rig.snapshot(&[("a.service", wanted(SLEEP, DesiredState::Loaded))]).await;
    rig.until_active("a.service", "inactive").await;
    assert_eq!(rig.reports[&a].current, CurrentState::Loaded);
    assert_eq!(rig.systemd.jobs(&a), (0, 0));
    rig.change("a.service", Some(wanted(SLEEP, DesiredState::Launched))).await;
    rig.until("launched", |reports| reports[&a].current == CurrentState::Launched).await;
    assert_eq!(rig.reports[&a].systemd.active, "active");
    assert_eq!(rig.systemd.jobs(&a), (1, 0));
    rig.change("a.service", None).await;
    rig.until("gone", |reports| reports.is_empty()).await;
    assert_eq!(rig.systemd.jobs(&a), (1, 1));
    assert!(!rig.systemd.has_file(&a));
    assert_eq!(rig.systemd.reloads(), 0, "a new unit needs no reload");
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_touched_without_a_snapshot_or_a_session() {
    let mut rig = Rig::new(MemorySystemd::default()).await;
    let a = name("a.service");
    rig.snapshot(&[("a.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until_active("a.service", "active").await;
    // The server goes away for good, for a while, and comes back without having said anything yet.
    rig.server = None;
    rig.quiet().await;
    rig.connect().await;
    rig.quiet().await;
    assert_eq!(rig.systemd.jobs(&a), (1, 0));
    // The next daemon on this machine hears nothing either.
    let systemd = rig.end().await;
    let mut rig = Rig::new(systemd.reconnect()).await;
    rig.quiet().await;
    assert_eq!(rig.systemd.jobs(&a), (1, 0));
    assert!(rig.systemd.has_file(&a));
    rig.until_active("a.service", "active").await;
    // A server that says that nothing is wanted is obeyed.
    rig.snapshot(&[]).await;
    rig.until("gone", |reports| reports.is_empty()).await;
    assert_eq!(rig.systemd.jobs(&a), (1, 1));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn restarts_of_fleetd_start_and_stop_nothing() {
    let systemd = MemorySystemd::default();
    let units = ["run.service", "dead.service", "fail.service"];
    systemd.behave(&name("fail.service"), Behaviour::Fails, Behaviour::Works);
    let all: Vec<_> = units.iter().map(|unit| (*unit, wanted(SLEEP, DesiredState::Launched))).collect();
    let mut rig = Rig::new(systemd).await;
    rig.snapshot(&all).await;
    rig.until("all launched", |reports| {
        reports.len() == 3 && reports.values().all(|report| report.current == CurrentState::Launched)
    })
    .await;
    assert!(rig.reports[&name("fail.service")].problem.as_deref().unwrap().contains("failed"));
    rig.systemd.die(&name("dead.service"));
    rig.until_active("dead.service", "failed").await;
    let mut systemd = rig.end().await;
    for _ in 0..3 {
        let mut rig = Rig::new(systemd.reconnect()).await;
        rig.snapshot(&all).await;
        rig.until("states are reported", |reports| reports.len() == 3).await;
        rig.quiet().await;
        for unit in units {
            assert_eq!(rig.systemd.jobs(&name(unit)), (1, 0), "{unit}");
        }
        systemd = rig.end().await;
    }
    // After a boot everything is started again.
    systemd.boot();
    let mut rig = Rig::new(systemd.reconnect()).await;
    rig.snapshot(&all).await;
    rig.until("all launched again", |reports| {
        reports.len() == 3 && reports.values().all(|report| report.current == CurrentState::Launched)
    })
    .await;
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_hanging_start_can_be_stopped() {
    let mut rig = Rig::new(MemorySystemd::default()).await;
    let (slow, other) = (name("slow.service"), name("other.service"));
    rig.systemd.behave(&slow, Behaviour::Hangs, Behaviour::Works);
    rig.snapshot(&[("slow.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until_active("slow.service", "activating").await;
    assert_ne!(rig.reports[&slow].current, CurrentState::Launched, "not before its start is over");
    // Others are not held up.
    rig.change("other.service", Some(wanted(SLEEP, DesiredState::Launched))).await;
    rig.until_active("other.service", "active").await;
    rig.change("slow.service", None).await;
    rig.until("slow.service is gone", |reports| !reports.contains_key(&slow)).await;
    assert_eq!(rig.systemd.active(&slow), "inactive");
    assert_eq!(rig.systemd.jobs(&other), (1, 0));
    rig.end().await;
}

/// As when a machine comes back after an outage: its unit was placed elsewhere, and is placed here again at once.
#[tokio::test(start_paused = true)]
async fn a_unit_wanted_again_while_it_stops_is_started_again() {
    let mut rig = Rig::new(MemorySystemd::default()).await;
    let a = name("a.service");
    rig.snapshot(&[("a.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until("launched", |r| r.get(&a).is_some_and(|r| r.current == CurrentState::Launched)).await;
    rig.systemd.behave(&a, Behaviour::Works, Behaviour::Hangs);
    rig.change("a.service", None).await;
    rig.until_active("a.service", "deactivating").await;
    rig.change("a.service", Some(wanted(SLEEP, DesiredState::Launched))).await;
    rig.quiet().await;
    rig.systemd.behave(&a, Behaviour::Works, Behaviour::Works);
    rig.quiet().await;
    rig.until("launched again", |r| {
        r[&a].current == CurrentState::Launched && r[&a].systemd.active == "active"
    })
    .await;
    assert_eq!(rig.systemd.jobs(&a), (2, 1));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_changed_file_is_reloaded_once_per_batch() {
    let mut rig = Rig::new(MemorySystemd::default()).await;
    let units = ["a.service", "b.service", "c.service"];
    let all = |text: &str| -> Vec<(&str, Wanted)> {
        units.iter().map(|unit| (*unit, wanted(text, DesiredState::Launched))).collect()
    };
    rig.snapshot(&all(SLEEP)).await;
    rig.until("launched", |r| r.len() == 3 && r.values().all(|r| r.current == CurrentState::Launched)).await;
    // Only comments changed: written and read again, not restarted.
    let commented = format!("# comment\n{SLEEP}");
    rig.snapshot(&all(&commented)).await;
    rig.quiet().await;
    assert_eq!(rig.systemd.reloads(), 1);
    assert_eq!(rig.systemd.jobs(&name("a.service")), (1, 0));
    // Really changed: each is stopped and started with the new file.
    let changed = "[Service]\nExecStart=/bin/sleep 1000\n";
    let hash = UnitFile::parse(changed).unwrap().hash();
    rig.snapshot(&all(changed)).await;
    rig.until("started anew", |r| r.values().all(|r| r.hash == hash && r.current == CurrentState::Launched))
        .await;
    assert_eq!(rig.systemd.jobs(&name("a.service")), (2, 1));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn trouble_is_reported_and_gone_when_it_is_over() {
    let mut rig = Rig::new(MemorySystemd::default()).await;
    let (full, well) = (name("full.service"), name("well.service"));
    let error =
        Error::File { path: "/run/fleet/units/full.service".to_owned(), reason: "No space left".to_owned() };
    rig.systemd.refuse_install(&full, Some(error));
    rig.snapshot(&[
        ("full.service", wanted(SLEEP, DesiredState::Launched)),
        ("well.service", wanted(SLEEP, DesiredState::Launched)),
    ])
    .await;
    rig.until("the problem", |reports| {
        reports.get(&full).and_then(|r| r.problem.as_deref()).is_some_and(|p| p.contains("No space left"))
    })
    .await;
    rig.until_active("well.service", "active").await;
    rig.quiet().await;
    rig.systemd.refuse_install(&full, None);
    rig.until_active("full.service", "active").await;
    rig.until("no problem is left", |reports| reports[&full].problem.is_none()).await;

    // systemd out of reach: nothing is guessed, and it goes on when it is back.
    rig.systemd.set_away(Some("the bus is gone"));
    rig.change("well.service", None).await;
    rig.until("the problem", |reports| {
        reports[&well].problem.as_deref().is_some_and(|p| p.contains("the bus is gone"))
    })
    .await;
    rig.quiet().await;
    rig.systemd.set_away(None);
    rig.until("it is gone", |reports| !reports.contains_key(&well)).await;
    assert_eq!(rig.systemd.jobs(&full), (1, 0));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn units_of_the_original_fleet_are_adopted() {
    let systemd = MemorySystemd::default();
    let old = name("old.service");
    systemd.install(&[(old.clone(), UnitFile::parse(SLEEP).unwrap())]).await.pop().unwrap().unwrap();
    systemd.start(&old).await.unwrap();
    let mut rig = Rig::new(systemd.reconnect()).await;
    rig.snapshot(&[("old.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until("it counts as launched", |r| r.get(&old).is_some_and(|r| r.current == CurrentState::Launched))
        .await;
    assert_eq!(rig.systemd.jobs(&old), (1, 0));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_the_server_cannot_tell_is_left_as_it_is() {
    let a = name("a.service");
    let mut rig = Rig::new(MemorySystemd::default()).await;
    rig.snapshot(&[("a.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until("it runs", |r| r.get(&a).is_some_and(|r| r.systemd.active == "active")).await;
    // Another server can't read its record. What else it says is done.
    let instructions =
        [(a.clone(), Instruction::Leave), (name("b.service"), wanted(SLEEP, DesiredState::Launched).into())];
    rig.send(ToAgent::Snapshot(instructions.into())).await;
    rig.until("the other runs", |r| r.get(&name("b.service")).is_some_and(|r| r.systemd.active == "active"))
        .await;
    assert_eq!(rig.systemd.jobs(&a), (1, 0));
    // Then it is known again that nothing is wanted of it.
    rig.change("a.service", None).await;
    rig.until("it is gone", |r| !r.contains_key(&a)).await;
    assert_eq!(rig.systemd.jobs(&a), (1, 1));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn that_a_unit_has_stopped_is_said_when_it_has() {
    let a = name("a.service");
    let systemd = MemorySystemd::default();
    systemd.behave(&a, Behaviour::Works, Behaviour::Hangs);
    let mut rig = Rig::new(systemd).await;
    rig.snapshot(&[("a.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until_active("a.service", "active").await;
    // Of what never was here it is said at once.
    let release = |number| Some(Instruction::Release(number));
    rig.send(ToAgent::Changes([(a.clone(), release(7)), (name("b.service"), release(3))].into())).await;
    rig.until_active("a.service", "deactivating").await;
    rig.until_released(&[("b.service", 3)]).await;
    // It was to be held again, and is not again.
    rig.change("a.service", Some(wanted(SLEEP, DesiredState::Launched))).await;
    rig.send(ToAgent::Changes([(a.clone(), release(9))].into())).await;
    rig.quiet().await;
    assert_eq!(rig.released.get(&a), None, "it is still stopping");
    rig.systemd.behave(&a, Behaviour::Works, Behaviour::Works);
    rig.until_released(&[("a.service", 9), ("b.service", 3)]).await;
    assert_eq!(rig.systemd.active(&a), "inactive");
    // Who comes after it asks again.
    rig.server = None;
    rig.connect().await;
    rig.released.clear();
    rig.send(ToAgent::Snapshot([(a.clone(), Instruction::Release(9))].into())).await;
    rig.until_released(&[("a.service", 9)]).await;
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fleetd_did_not_see_the_end_of_is_remembered() {
    let (slow, timer) = (name("slow.service"), name("timer.service"));
    let systemd = MemorySystemd::default();
    systemd.behave(&slow, Behaviour::Hangs, Behaviour::Works);
    let mut rig = Rig::new(systemd).await;
    let hash = wanted(SLEEP, DesiredState::Launched).file.hash();
    rig.snapshot(&[("slow.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until_active("slow.service", "activating").await;
    assert_eq!(rig.systemd.marked(&slow), Some(Mark::Starting(hash)));
    // fleetd is killed; systemd goes on with the start.
    rig.task.abort();
    let systemd = rig.systemd.reconnect();
    let starting = systemd.clone();
    tokio::spawn(async move { starting.start(&name("slow.service")).await });
    systemd.behave(&slow, Behaviour::Works, Behaviour::Works);
    systemd.until(|systemd| systemd.active(&name("slow.service")) == "active").await;
    // Something else started another unit that is only loaded.
    systemd.install(&[(timer.clone(), UnitFile::parse(SLEEP).unwrap())]).await.pop().unwrap().unwrap();
    systemd.start(&timer).await.unwrap();
    // Meanwhile they are to be loaded only.
    let mut rig = Rig::new(systemd).await;
    let loaded = wanted(SLEEP, DesiredState::Loaded);
    rig.snapshot(&[("slow.service", loaded.clone()), ("timer.service", loaded)]).await;
    rig.until_active("slow.service", "inactive").await;
    rig.quiet().await;
    assert_eq!(rig.systemd.marked(&slow), None);
    assert_eq!(rig.systemd.active(&timer), "active");
    rig.end().await;
}

/// Such a start does not show in the state, and would take place when nobody looks after the unit any more.
#[tokio::test(start_paused = true)]
async fn a_start_that_still_waits_is_taken_back() {
    for wanted_then in [None, Some(DesiredState::Loaded)] {
        let side = name("side.service");
        let systemd = MemorySystemd::default();
        systemd.behave(&side, Behaviour::Waits, Behaviour::Works);
        let mut rig = Rig::new(systemd).await;
        rig.snapshot(&[("side.service", wanted(SLEEP, DesiredState::Launched))]).await;
        rig.systemd.until(|systemd| systemd.jobs(&side).0 == 1).await;
        rig.task.abort();
        // systemd goes on with what it was asked for.
        let systemd = rig.systemd.reconnect();
        let waits = {
            let (systemd, side) = (systemd.clone(), side.clone());
            tokio::spawn(async move { systemd.start(&side).await })
        };
        systemd.until(|systemd| systemd.jobs(&side).0 == 2).await;
        let mut rig = Rig::new(systemd).await;
        let then: Vec<_> =
            wanted_then.map(|state| ("side.service", wanted(SLEEP, state))).into_iter().collect();
        rig.snapshot(&then).await;
        let ended = tokio::time::timeout(std::time::Duration::from_secs(60), waits).await;
        assert_eq!(
            ended.expect("it is not taken back").unwrap(),
            Ok(fleet_systemd::JobResult::Canceled),
            "{wanted_then:?}"
        );
        rig.systemd.until(|systemd| systemd.marked(&side).is_none()).await;
        rig.quiet().await;
        assert_eq!(rig.systemd.has_file(&side), wanted_then.is_some());
        rig.end().await;
    }
}

/// It stopped by fleet's doing, whoever saw the end of that: wanted again, it has to run again.
#[tokio::test(start_paused = true)]
async fn a_stop_that_fleetd_did_not_see_the_end_of_is_remembered() {
    let a = name("a.service");
    for restarted in [true, false] {
        let mut rig = Rig::new(MemorySystemd::default()).await;
        rig.snapshot(&[("a.service", wanted(SLEEP, DesiredState::Launched))]).await;
        rig.until("launched", |r| r.get(&a).is_some_and(|r| r.current == CurrentState::Launched)).await;
        rig.systemd.behave(&a, Behaviour::Works, Behaviour::Hangs);
        rig.change("a.service", Some(wanted(SLEEP, DesiredState::Loaded))).await;
        rig.until_active("a.service", "deactivating").await;
        assert_eq!(rig.reports[&a].current, CurrentState::Launched, "not before its stop is over");
        if restarted {
            let systemd = rig.end().await.reconnect();
            let stopping = systemd.clone();
            systemd.behave(&a, Behaviour::Works, Behaviour::Works);
            stopping.stop(&a).await.unwrap();
            rig = Rig::new(systemd).await;
            rig.snapshot(&[("a.service", wanted(SLEEP, DesiredState::Launched))]).await;
        } else {
            rig.change("a.service", Some(wanted(SLEEP, DesiredState::Launched))).await;
            rig.quiet().await;
            // Its job is replaced by one of somebody else's, so that it ends as if it had been taken back.
            rig.systemd.behave(&a, Behaviour::Works, Behaviour::Works);
            rig.systemd.stop(&a).await.unwrap();
        }
        rig.until("launched again", |r| {
            r.get(&a).is_some_and(|r| r.current == CurrentState::Launched && r.systemd.active == "active")
        })
        .await;
        assert_eq!(rig.systemd.jobs(&a).0, 2, "restarted: {restarted}");
        rig.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_another_fleet_left_goes_on_until_it_is_wanted() {
    let (old, other) = (name("old.service"), name("other.service"));
    let file = UnitFile::parse(SLEEP).unwrap();
    let systemd = MemorySystemd::default();
    for unit in [&old, &other] {
        systemd.install(&[(unit.clone(), file.clone())]).await.pop().unwrap().unwrap();
        systemd.start(unit).await.unwrap();
        systemd.mark(&[(unit.clone(), Some(Mark::Inherited(file.hash())))]).await.pop().unwrap().unwrap();
    }
    // Nothing is wanted, and nothing happens; nor is anything reported, also when fleetd is restarted.
    let mut rig = Rig::new(systemd).await;
    for _ in 0..2 {
        rig.snapshot(&[]).await;
        rig.quiet().await;
        assert_eq!(rig.reports.len(), 0);
        assert_eq!((rig.systemd.jobs(&old), rig.systemd.jobs(&other)), ((1, 0), (1, 0)));
        rig.task.abort();
        rig = Rig::new(rig.systemd.reconnect()).await;
    }
    // One is wanted: it is taken over as it runs.
    rig.snapshot(&[("old.service", wanted(SLEEP, DesiredState::Launched))]).await;
    rig.until_active("old.service", "active").await;
    rig.until("it counts as launched", |r| r.get(&old).is_some_and(|r| r.current == CurrentState::Launched))
        .await;
    assert_eq!(rig.systemd.jobs(&old), (1, 0));
    assert_eq!(rig.systemd.marked(&old), Some(Mark::Launched(file.hash())));
    // From then on it is as any other.
    rig.change("old.service", None).await;
    rig.until("it is gone", |r| r.is_empty()).await;
    assert_eq!(rig.systemd.jobs(&old), (1, 1));
    // A fleetd that takes its units along leaves what is not its own.
    rig.purge.cancel();
    rig.cancel.cancel();
    rig.task.await.unwrap();
    assert_eq!(rig.systemd.active(&other), "active");
    assert!(rig.systemd.has_file(&other));
}

/// Another unit refers to it: systemd knows it as it was before its file was taken away.
#[tokio::test(start_paused = true)]
async fn a_new_unit_that_systemd_remembers_is_read_anew() {
    for state in [DesiredState::Loaded, DesiredState::Launched] {
        let systemd = MemorySystemd::default();
        let unit = name("a.service");
        systemd.keep(&unit, Some("[Service]\nExecStart=/bin/false\n"));
        let mut rig = Rig::new(systemd).await;
        rig.snapshot(&[("a.service", wanted(SLEEP, state)), ("b.service", wanted(SLEEP, state))]).await;
        rig.until("there", |r| {
            let is_there = |r: &UnitReport| r.current != CurrentState::Inactive;
            r.len() == 2 && r.values().all(is_there)
        })
        .await;
        assert_eq!(rig.systemd.loaded(&unit).as_deref(), Some(SLEEP));
        assert_eq!(rig.systemd.reloads(), 1);
        rig.end().await;
    }
}

/// A fleetd was ended after it had written a file, and before it had had systemd read it.
#[tokio::test(start_paused = true)]
async fn a_restarted_fleetd_has_systemd_read_what_was_written() {
    let systemd = MemorySystemd::default();
    let unit = name("a.service");
    let write = async |text: &str| {
        let file = UnitFile::parse(text).unwrap();
        systemd.install(&[(unit.clone(), file)]).await.pop().unwrap().unwrap();
    };
    write(SLEEP).await;
    // What failed stays in systemd's memory.
    systemd.behave(&unit, Behaviour::Fails, Behaviour::Works);
    systemd.start(&unit).await.unwrap();
    systemd.behave(&unit, Behaviour::Works, Behaviour::Works);
    let newer = format!("{SLEEP}KillMode=mixed\n");
    write(&newer).await;
    let mut rig = Rig::new(systemd.reconnect()).await;
    rig.snapshot(&[("a.service", wanted(&newer, DesiredState::Launched))]).await;
    rig.until_active("a.service", "active").await;
    assert_eq!(rig.systemd.reloads(), 1);
    // Once is enough.
    let mut rig = Rig::new(rig.end().await.reconnect()).await;
    rig.snapshot(&[("a.service", wanted(&newer, DesiredState::Launched))]).await;
    rig.until_active("a.service", "active").await;
    assert_eq!((rig.systemd.reloads(), rig.systemd.jobs(&unit)), (1, (2, 0)));
    rig.end().await;
}
