//! The recorder and its checks, on real hosts: what is in order is found to be so, and what was tampered with is found.

use anyhow::{Context, Result, ensure};
use fleet_e2e::history::{FaultKind, File, Outcome, Recorder, recorded};
use fleet_e2e::{Fleet, until};
use std::time::Duration;

const TTL: Duration = Duration::from_secs(20);
/// Only how long is waited.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn the_history_of_a_cluster() -> Result<()> {
    let fleet = Fleet::join_all("history", 2, "agent_ttl=\"20s\"")?;
    let recorder = Recorder::new(&fleet.cluster, TTL)?;
    recorder.follow(0)?;
    let text = |marker: &str| recorded(marker, "/bin/sleep infinity", "", "");
    for marker in ["one", "two"] {
        recorder.file(&text(marker), File { marker: marker.into(), ..File::default() })?;
    }
    for unit in ["a.service", "b.service", "c.service"] {
        let outcome = recorder.put(0, unit, Some(&text("one")), "launched")?;
        ensure!(matches!(outcome, Outcome::Acknowledged { revision: Some(_) }), "{outcome:?}");
    }
    fn settled(recorder: &Recorder, patience: Duration) -> Result<Vec<String>> {
        let history = recorder.settle(&[0], patience)?;
        Ok(history.check().iter().map(ToString::to_string).collect())
    }
    assert_eq!(settled(&recorder, PATIENCE)?, [""; 0]);

    // Commands of all kinds, a server that is killed, and a machine that loses its power.
    recorder.put(0, "b.service", None, "loaded")?;
    recorder.put(0, "c.service", Some(&text("two")), "launched")?;
    recorder.destroy(0, "a.service")?;
    let refused = recorder.put(0, "nosuch.service", None, "launched")?;
    assert!(matches!(refused, Outcome::Refused(_)), "{refused:?}");
    let fault = recorder.fault("the server is killed", FaultKind::Short, None)?;
    fleet.disturb("systemctl kill -s KILL fleetd.service")?;
    // With both machines there its unit is placed where it was: one that was on a host before may be there for more reasons.
    until("both machines are there", || Ok(fleet.machines()? == 2))?;
    recorder.healed(fault)?;
    recorder.put(0, "a.service", Some(&text("two")), "launched")?;
    let fault = recorder.fault("host 1 loses its power", FaultKind::Down, Some(1))?;
    fleet.cluster.host(1).kill()?;
    fleet.cluster.host(1).boot()?;
    recorder.healed(fault)?;
    assert_eq!(settled(&recorder, PATIENCE)?, [""; 0]);
    let runs = recorder.history().runs.len();
    assert!(runs >= 5, "{runs} runs");

    // What fleet must not do, done by hand.
    let there = |unit: &str| -> Result<usize> {
        let placed = recorder.history().end.as_ref().and_then(|end| {
            end.units.iter().find(|(name, _)| name == unit).and_then(|(_, known)| known.machine)
        });
        placed.context("placed")
    };
    let (on_a, on_c) = (there("a.service")?, there("c.service")?);
    fleet.cluster.host(on_a).run(["systemctl", "restart", "a.service"])?.ok()?;
    fleet.cluster.host(on_c).run(["systemctl", "stop", "c.service"])?.ok()?;
    fleet.cluster.host(1 - on_a).write("/run/systemd/system/a.service", text("two"))?;
    fleet.cluster.host(1 - on_a).run(["systemctl", "start", "a.service"])?.ok()?;
    let tampered = [
        format!("a.service was stopped on host {on_a} without a decision"),
        format!("a.service was started on host {on_a} without a decision"),
        format!("a.service was started on host {} without a decision", 1 - on_a),
        format!("a.service is on host {} (active), and is to be on Some(Some({on_a}))", 1 - on_a),
        format!("c.service was stopped on host {on_c} without a decision"),
        format!("c.service on host {on_c} is inactive and is to run"),
    ];
    // It never settles, and the recorder follows what happens on the hosts at its own pace.
    let mut found = String::new();
    until("all of it is found", || {
        found = settled(&recorder, Duration::from_secs(1))?.join("\n");
        Ok(tampered.iter().all(|text| found.contains(text)))
    })
    .with_context(|| format!("{tampered:#?} in\n{found}"))
}
