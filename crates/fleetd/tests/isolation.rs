//! The agent and units with OnIsolation=stop, and what it does when it ends on purpose; against a systemd in memory.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use fleet_cluster::{fencing, model::*};
use fleet_link::ToAgent;
use fleet_systemd::memory::{Behaviour, MemorySystemd, STOP_TIMEOUT};
use fleet_systemd::{Error, Mark, Systemd};
use rig::{Rig, SLEEP, name, wanted};
use std::time::Duration;
use tokio::time::{Instant, sleep};

const TTL: Duration = Duration::from_secs(30);
const S: &str = "stop.service";
const K: &str = "keep.service";

fn fenced(state: DesiredState) -> Wanted {
    wanted(&format!("{SLEEP}[X-Fleet]\nOnIsolation=stop\n"), state)
}

fn both() -> [(&'static str, Wanted); 2] {
    [(S, fenced(DesiredState::Launched)), (K, wanted(SLEEP, DesiredState::Launched))]
}

/// A machine with a unit of each kind running.
async fn running(systemd: MemorySystemd) -> Rig {
    let mut rig = Rig::new(systemd).await;
    rig.ttl.send_replace(Some(TTL));
    rig.snapshot(&both()).await;
    rig.until_active(S, "active").await;
    rig.until_active(K, "active").await;
    rig
}

fn jobs(rig: &Rig) -> [(usize, usize); 2] {
    [rig.systemd.jobs(&name(S)), rig.systemd.jobs(&name(K))]
}

#[tokio::test(start_paused = true)]
async fn none_runs_before_a_server_acknowledged_and_the_guard_knows_it() {
    let mut rig = Rig::new(MemorySystemd::default()).await;
    rig.snapshot(&both()).await;
    rig.until_active(K, "active").await;
    rig.quiet().await;
    assert_eq!((jobs(&rig), rig.systemd.guarded()), ([(0, 0), (1, 0)], None));
    // The guard can't be had.
    rig.systemd.refuse_guard(Some(Error::Refused("Unit fleet-guard.service not found.".to_owned())));
    rig.ttl.send_replace(Some(TTL));
    rig.until("the problem", |reports| {
        let problem = reports.get(&name(S)).and_then(|report| report.problem.as_deref());
        problem.is_some_and(|p| p.contains("without the guard") && p.contains("not found"))
    })
    .await;
    rig.quiet().await;
    assert_eq!(jobs(&rig)[0], (0, 0));
    rig.systemd.refuse_guard(None);
    rig.until_active(S, "active").await;
    let guarded = rig.systemd.guarded().unwrap();
    assert_eq!((guarded.ttl, guarded.units), (TTL, [(name(S), STOP_TIMEOUT)].into()));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_cut_off_stops_the_unit_in_time_and_starts_it_again() {
    let mut rig = running(MemorySystemd::default()).await;
    let renewed = rig.systemd.guarded().unwrap().renewed;
    sleep(TTL * 3).await;
    let later = rig.systemd.guarded().unwrap().renewed;
    assert!(later >= renewed + TTL * 2, "renewals are told to the guard");
    // Answers stay out, or the session breaks: the same.
    for broken in [false, true] {
        let before = jobs(&rig);
        rig.ttl.send_replace(None);
        if broken {
            rig.server = None;
        }
        let last = rig.systemd.guarded().unwrap().renewed;
        rig.systemd.until(|systemd| systemd.active(&name(S)) != "active").await;
        let stopped = rig.systemd.clock();
        assert!(stopped >= last + TTL / 2 && stopped < last + TTL * 9 / 10, "{last:?} {stopped:?}");
        rig.systemd.until(|systemd| !systemd.has_file(&name(S))).await;
        rig.quiet().await;
        assert_eq!(jobs(&rig), [(before[0].0, before[0].1 + 1), before[1]], "and so it stays");
        assert_eq!(rig.systemd.active(&name(K)), "active");
        if !broken {
            // There is a session to tell it in.
            let text = "stopped because this machine could not reach a server for ";
            rig.until("the problem", |reports| {
                reports[&name(S)].problem.as_deref().is_some_and(|problem| problem.starts_with(text))
            })
            .await;
        } else {
            rig.connect().await;
            rig.snapshot(&both()).await;
        }
        rig.ttl.send_replace(Some(TTL));
        rig.systemd.until(|systemd| systemd.jobs(&name(S)).0 > before[0].0).await;
        rig.until("it runs again", |reports| {
            reports
                .get(&name(S))
                .is_some_and(|report| report.systemd.active == "active" && report.problem.is_none())
        })
        .await;
        rig.until_active(K, "active").await;
        assert_eq!(jobs(&rig), [(before[0].0 + 1, before[0].1 + 1), before[1]]);
    }
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn half_a_ttl_of_silence_stops_nothing() {
    let rig = running(MemorySystemd::default()).await;
    for _ in 0..20 {
        rig.ttl.send_replace(None);
        // What was acknowledged last is up to an eighth older.
        sleep(TTL / 2 - TTL / 4).await;
        rig.ttl.send_replace(Some(TTL));
        sleep(TTL / 4).await;
    }
    assert_eq!(jobs(&rig), [(1, 0), (1, 0)]);
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_was_moved_elsewhere_meanwhile_is_not_started_again() {
    let mut rig = running(MemorySystemd::default()).await;
    rig.ttl.send_replace(None);
    rig.systemd.until(|systemd| !systemd.has_file(&name(S))).await;
    sleep(TTL).await;
    // What a server does: first it tells what changed, then it answers.
    rig.send(ToAgent::Changes([(name(S), None)].into())).await;
    rig.ttl.send_replace(Some(TTL));
    rig.until("it is gone", |reports| !reports.contains_key(&name(S))).await;
    rig.quiet().await;
    assert_eq!(jobs(&rig), [(1, 1), (1, 0)]);
    assert_eq!(rig.systemd.guarded(), None, "there is nothing left to guard");
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_restarted_fleetd_knows_what_it_has_to() {
    // Soon enough: nothing happens.
    let systemd = running(MemorySystemd::default()).await.end().await;
    sleep(TTL / 4).await;
    let mut rig = running(systemd.reconnect()).await;
    assert_eq!(jobs(&rig), [(1, 0), (1, 0)]);
    // Too late, and cut off: the guard has stopped the unit, or has not.
    for guard_acted in [true, false] {
        let before = jobs(&rig);
        let systemd = rig.end().await;
        sleep(TTL * 2).await;
        assert!(systemd.guarded().is_some(), "it goes on guarding");
        if guard_acted {
            systemd.stop(&name(S)).await.unwrap();
        }
        rig = Rig::new(systemd.reconnect()).await;
        rig.snapshot(&both()).await;
        rig.systemd.until(|systemd| !systemd.has_file(&name(S))).await;
        rig.quiet().await;
        assert_eq!(
            jobs(&rig),
            [(before[0].0, before[0].1 + 1), before[1]],
            "it is not started before an answer"
        );
        rig.ttl.send_replace(Some(TTL));
        rig.systemd.until(|systemd| systemd.jobs(&name(S)).0 > before[0].0).await;
        rig.quiet().await;
        assert_eq!(jobs(&rig), [(before[0].0 + 1, before[0].1 + 1), before[1]]);
    }
    rig.end().await;
}

/// A fleetd that ended between telling the guard and starting it leaves the file of one that does not run.
#[tokio::test(start_paused = true)]
async fn a_restarted_fleetd_takes_no_guard_on_trust() {
    let lacks = |rig: &Rig| (rig.systemd.jobs(&name(S)).0, rig.systemd.guarded());
    let trouble = || Some(Error::Unreachable("the bus is away".to_owned()));
    let systemd = MemorySystemd::default();
    systemd.refuse_guard(trouble());
    let mut rig = Rig::new(systemd).await;
    for restarted in [false, true] {
        if restarted {
            rig = Rig::new(rig.end().await.reconnect()).await;
        }
        rig.ttl.send_replace(Some(TTL));
        rig.snapshot(&both()).await;
        rig.until("the problem", |reports| {
            reports.get(&name(S)).is_some_and(|report| report.problem.is_some())
        })
        .await;
        rig.quiet().await;
        assert_eq!(lacks(&rig), (0, None), "restarted: {restarted}");
        assert!(rig.systemd.find().await.unwrap().guarded.is_some(), "the file is there");
    }
    rig.systemd.refuse_guard(None);
    rig.until_active(S, "active").await;
    assert!(rig.systemd.guarded().is_some());
    // Something else stops it, and fleetd is restarted without a server: it runs again when systemd can be reached.
    let systemd = rig.end().await;
    systemd.run_guard(false).await.unwrap();
    systemd.refuse_guard(trouble());
    let rig = Rig::new(systemd.reconnect()).await;
    rig.quiet().await;
    assert_eq!(rig.systemd.guarded(), None);
    rig.systemd.refuse_guard(None);
    rig.systemd.set_away(None);
    rig.systemd.until(|systemd| systemd.guarded().is_some()).await;
    rig.end().await;
}

/// What leads away from a unit that can't be guarded needs no guard.
#[tokio::test(start_paused = true)]
async fn without_a_guard_a_unit_can_be_stopped_and_replaced() {
    let rig = running(MemorySystemd::default()).await;
    rig.systemd.refuse_guard(Some(Error::Refused("Unit fleet-guard.service is masked.".to_owned())));
    // Then it is not known any more that a guard runs.
    let systemd = rig.end().await;
    let mut rig = Rig::new(systemd.reconnect()).await;
    rig.ttl.send_replace(Some(TTL));
    rig.snapshot(&both()).await;
    rig.until("the problem", |reports| {
        let problem = reports.get(&name(S)).and_then(|report| report.problem.as_deref());
        problem.is_some_and(|problem| problem.contains("masked"))
    })
    .await;
    assert_eq!(jobs(&rig), [(1, 0), (1, 0)], "it runs on");
    rig.change(S, Some(fenced(DesiredState::Loaded))).await;
    rig.until_active(S, "inactive").await;
    rig.change(S, Some(wanted(SLEEP, DesiredState::Launched))).await;
    rig.until_active(S, "active").await;
    assert_eq!(jobs(&rig), [(2, 1), (1, 0)]);
    rig.end().await;
}

/// The guard was told to go, and can't be stopped: a unit that comes back is made known to it again before it runs.
#[tokio::test(start_paused = true)]
async fn a_guard_that_was_dismissed_halfway_is_called_again() {
    let mut rig = running(MemorySystemd::default()).await;
    rig.systemd.refuse_guard(Some(Error::Unreachable("the bus is away".to_owned())));
    rig.change(S, None).await;
    rig.until("it is gone", |reports| !reports.contains_key(&name(S))).await;
    rig.quiet().await;
    rig.change(S, Some(fenced(DesiredState::Launched))).await;
    rig.until("the problem", |reports| {
        let problem = reports.get(&name(S)).and_then(|report| report.problem.as_deref());
        problem.is_some_and(|problem| problem.contains("without the guard"))
    })
    .await;
    rig.quiet().await;
    assert_eq!(rig.systemd.jobs(&name(S)), (1, 1));
    // It never came here: nothing of it is left with the guard, which would stop it for what its file said once.
    rig.change(S, None).await;
    rig.until("it is gone", |reports| !reports.contains_key(&name(S))).await;
    rig.systemd.refuse_guard(None);
    rig.quiet().await;
    assert_eq!(rig.systemd.find().await.unwrap().guarded, None);
    rig.change(S, Some(fenced(DesiredState::Launched))).await;
    rig.until_active(S, "active").await;
    assert!(rig.systemd.guarded().is_some());
    rig.end().await;
}

/// fleetd was paused: when it goes on an answer is there already, and the guard has acted.
#[tokio::test(start_paused = true)]
async fn a_unit_that_the_guard_stopped_is_started_again() {
    let mut rig = running(MemorySystemd::default()).await;
    rig.ttl.send_replace(None);
    let renewed = rig.systemd.guarded().unwrap().renewed;
    let deadlines = fencing::deadlines(renewed, TTL, STOP_TIMEOUT);
    sleep(deadlines.stop - rig.systemd.clock() - Duration::from_millis(1)).await;
    // The guard stops it, and the next beat is answered, before the machine counts as lost.
    rig.systemd.stop(&name(S)).await.unwrap();
    tokio::time::advance(Duration::from_millis(2)).await;
    rig.ttl.send_replace(Some(TTL));
    rig.systemd.until(|systemd| systemd.jobs(&name(S)).0 == 2).await;
    assert!(rig.systemd.clock() < deadlines.end, "it was not lost");
    rig.until_active(S, "active").await;
    assert_eq!(rig.systemd.jobs(&name(K)), (1, 0));
    rig.end().await;
}

/// Its stop is noted as soon as that can be done: otherwise the next fleetd would take it for one that ended by itself.
#[tokio::test(start_paused = true)]
async fn a_stop_that_could_not_be_noted_is_noted_later() {
    let rig = running(MemorySystemd::default()).await;
    rig.systemd.behave(&name(S), Behaviour::Works, Behaviour::Hangs);
    sleep(TTL).await;
    rig.systemd.set_away(Some("the bus is gone"));
    rig.ttl.send_replace(None);
    sleep(TTL).await;
    assert!(matches!(rig.systemd.marked(&name(S)), Some(Mark::Launched(_))));
    rig.systemd.set_away(None);
    rig.systemd.until(|systemd| systemd.jobs(&name(S)).1 == 1).await;
    assert!(matches!(rig.systemd.marked(&name(S)), Some(Mark::Starting(_))));
    rig.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_purge_takes_everything_along() {
    let systemd = MemorySystemd::default();
    systemd.behave(&name("hangs.service"), Behaviour::Works, Behaviour::Hangs);
    for hangs in [false, true] {
        let mut rig = running(systemd.reconnect()).await;
        if hangs {
            rig.change("hangs.service", Some(wanted(SLEEP, DesiredState::Launched))).await;
            rig.until_active("hangs.service", "active").await;
        }
        let begun = Instant::now();
        rig.purge.cancel();
        rig.cancel.cancel();
        (&mut rig.task).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(65), "it is bounded in time");
        for unit in [S, K] {
            assert!(!rig.systemd.has_file(&name(unit)) && rig.systemd.active(&name(unit)) == "inactive");
        }
        rig.until("states are taken back", |reports| reports.len() == usize::from(hangs)).await;
        assert_eq!(*rig.farewells.borrow(), 1, "presence is given up");
    }
    // Without a purge units and presence stay.
    let rig = running(MemorySystemd::default()).await;
    rig.cancel.cancel();
    let farewells = rig.farewells.clone();
    let systemd = rig.end().await;
    assert_eq!((systemd.active(&name(K)), *farewells.borrow()), ("active".to_owned(), 0));
}
