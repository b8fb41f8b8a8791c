//! Whatever happens to fleetd, running units do not notice.

use super::SLEEP;
use anyhow::Result;
use fleet_e2e::{Fleet, until};

const ONCE: &str = "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo ran >> /run/once.log'\n";

#[test]
fn units_outlive_fleetd() -> Result<()> {
    let fleet = Fleet::up("outlive")?;
    fleet.start("run.service", SLEEP)?;
    fleet.start("once.service", ONCE)?;
    fleet.file(
        "fail.service",
        "[Service]\nExecStart=/bin/sh -c 'echo ran >> /run/fail.log; exit 1'\nType=oneshot\n",
    )?;
    assert!(!fleet.ctl("start fail.service")?.success());
    fleet.start("stopped.service", SLEEP)?;
    fleet.host().run(["systemctl", "stop", "stopped.service"])?.ok()?;
    until("the stop by hand is reported", || {
        Ok(fleet.state("stopped.service")?.as_deref() == Some("inactive dead"))
    })?;
    fleet.start("loaded.service", SLEEP)?;
    fleet.ok("stop loaded.service")?;
    let pid = fleet.main_pid("run.service")?;
    let before = fleet.ok("list-units --no-legend")?;
    let files = fleet.ok("list-unit-files --no-legend")?;

    for how in [
        "systemctl restart fleetd.service",
        "systemctl kill -s KILL fleetd.service; sleep 0.2; systemctl reset-failed fleetd.service; systemctl start fleetd.service",
        "systemctl stop fleetd.service; test $(systemctl is-active run.service) = active; systemctl start fleetd.service",
        "systemctl daemon-reexec",
    ] {
        fleet.disturb(how)?;
        until("states are as before", || Ok(fleet.ok("list-units --no-legend")? == before))?;
        assert_eq!(fleet.ok("list-unit-files --no-legend")?, files, "after: {how}");
        assert_eq!(fleet.main_pid("run.service")?, pid, "same process after: {how}");
        assert_eq!(fleet.host().read("/run/once.log")?, "ran\n", "not run again after: {how}");
        assert_eq!(fleet.host().read("/run/fail.log")?, "ran\n", "not run again after: {how}");
        assert_eq!(fleet.property("stopped.service", "ActiveState")?, "inactive", "after: {how}");
    }

    // What was changed while fleetd was away is carried out when it is back.
    fleet.start("after.service", SLEEP)?;
    fleet.ok("destroy run.service")?;
    assert!(!fleet.host().exists("/run/fleet/units/run.service"));
    Ok(())
}

#[test]
fn a_rebooted_machine_starts_its_units_again() -> Result<()> {
    let fleet = Fleet::up("reboot")?;
    fleet.start("run.service", SLEEP)?;
    fleet.file("loaded.service", SLEEP)?;
    fleet.ok("load loaded.service")?;
    fleet.host().kill()?;
    fleet.host().boot()?;
    until("the unit runs again", || Ok(fleet.state("run.service")?.as_deref() == Some("active running")))?;
    until("the other is loaded", || Ok(fleet.state("loaded.service")?.as_deref() == Some("inactive dead")))?;
    Ok(())
}

#[test]
fn units_left_by_an_earlier_fleet_are_adopted() -> Result<()> {
    let fleet = Fleet::installed("adopt")?;
    // The layout of the original: a file, a runtime link, no mark of ours.
    fleet.host().write("/run/fleet/units/old.service", SLEEP)?;
    fleet.host().run(["systemctl", "link", "--runtime", "/run/fleet/units/old.service"])?.ok()?;
    fleet.host().run(["systemctl", "start", "old.service"])?.ok()?;
    let pid = fleet.main_pid("old.service")?;
    fleet.host().start_fleet()?;
    // Nobody has said what is wanted of it: it goes on, also when fleetd is restarted.
    fleet.file("old.service", SLEEP)?;
    assert_eq!(fleet.ok("list-unit-files --no-legend")?, "");
    fleet.disturb("systemctl restart fleetd.service")?;
    assert_eq!(fleet.main_pid("old.service")?, pid);

    // Wanted, it is adopted, and is fleet's from then on.
    fleet.ok("start old.service")?;
    assert_eq!(fleet.main_pid("old.service")?, pid);
    fleet.host().run(["systemctl", "stop", "fleetd.service"])?.ok()?;
    fleet.host().sh("rm -rf /run/fleet/launched")?.ok()?;
    fleet.disturb("systemctl start fleetd.service")?;
    until("it is reported", || Ok(fleet.state("old.service")?.as_deref() == Some("active running")))?;
    until("it counts as launched", || {
        Ok(fleet.ok("list-unit-files --no-legend --fields=state")? == "launched\n")
    })?;
    assert_eq!(fleet.main_pid("old.service")?, pid, "adopted without a restart");
    Ok(())
}

#[test]
fn the_first_request_starts_fleetd() -> Result<()> {
    let fleet = Fleet::up("activation")?;
    fleet.start("run.service", SLEEP)?;
    let pid = fleet.main_pid("run.service")?;
    fleet.host().run(["systemctl", "stop", "fleetd.service", "fleetd.socket"])?.ok()?;
    assert!(!fleet.ctl("list-units")?.success(), "nobody listens");
    fleet.host().run(["systemctl", "start", "fleetd.socket"])?.ok()?;
    assert_eq!(fleet.host().run(["systemctl", "is-active", "fleetd.service"])?.stdout, "inactive\n");
    // At once, and right: it waits until fleetd has read its registry.
    assert!(fleet.ok("list-unit-files --no-legend")?.contains("run.service"));
    until("its state is known", || Ok(fleet.state("run.service")?.as_deref() == Some("active running")))?;
    assert_eq!(fleet.main_pid("run.service")?, pid);
    Ok(())
}

#[test]
fn a_dying_unit_is_reported_and_not_restarted() -> Result<()> {
    let fleet = Fleet::up("dying")?;
    fleet.start("run.service", SLEEP)?;
    let mut events = fleet.http()?.events("?unitName=run.service&snapshot=1")?;
    let mut wait = |text: &str| -> Result<()> {
        for line in events.by_ref() {
            if line?.contains(text) {
                return Ok(());
            }
        }
        anyhow::bail!("the event stream ended before {text:?}")
    };
    wait(r#""systemdActiveState":"active""#)?;
    fleet.host().run(["systemctl", "kill", "-s", "KILL", "run.service"])?.ok()?;
    wait(r#""systemdActiveState":"failed""#)?;
    assert_eq!(fleet.property("run.service", "ActiveState")?, "failed");
    assert!(fleet.ok("list-unit-files --no-legend")?.contains("launched\tlaunched"));
    Ok(())
}
