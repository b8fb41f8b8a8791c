//! `on_stop=purge`: a fleetd that is told to stop takes its units along, as the original did.

use super::SLEEP;
use anyhow::Result;
use fleet_e2e::{Fleet, until};

#[test]
fn a_fleetd_that_is_told_to_purge_takes_its_units_along() -> Result<()> {
    // Nobody could wait for this TTL.
    let fleet = Fleet::join_all("purge", 2, "agent_ttl=\"1h\"\non_stop=\"purge\"")?;
    let units: Vec<_> = (0..4).map(|number| format!("u{number}.service")).collect();
    for unit in &units {
        fleet.file(unit, SLEEP)?;
    }
    fleet.ok(&format!("start {}", units.join(" ")))?;
    let active = |host: usize| Ok::<_, anyhow::Error>(fleet.pids(host, "u")?.lines().count());
    assert_eq!((active(0)?, active(1)?), (2, 2));
    let kept = fleet.pids(0, "u")?;

    let other = fleet.cluster.host(1);
    other.run(["systemctl", "stop", "fleetd.socket", "fleetd.service"])?.ok()?;
    assert_eq!(active(1)?, 0);
    assert_eq!(other.sh("ls /run/fleet/units /run/fleet/launched | grep service || true")?.stdout, "");
    // Presence and states are given up: they are placed elsewhere without waiting.
    until("all run on the machine that is left", || {
        let list = fleet.ok("list-units --no-legend --fields=unit,machine,active")?;
        Ok(list.matches("\tactive").count() == 4 && !list.contains(other.ip()))
    })?;
    assert_eq!(fleet.ok("list-machines --no-legend")?.lines().count(), 1);
    let now = fleet.pids(0, "u")?;
    assert!(kept.lines().all(|line| now.contains(line)), "a unit that was not concerned was touched");
    other.run(["systemctl", "start", "fleetd.service"])?.ok()?;
    until("it is back", || Ok(fleet.ok("list-machines --no-legend")?.lines().count() == 2))?;
    assert_eq!((active(0)?, active(1)?), (4, 0), "nothing moves back");

    // A kill is no telling.
    let host = fleet.host();
    host.sh("systemctl kill --signal=KILL fleetd.service")?.ok()?;
    until("fleetd serves again", || Ok(fleet.ctl("list-machines")?.success()))?;
    assert_eq!(fleet.pids(0, "u")?, now);
    // The server itself: what it knows of units stays, and they are started again.
    host.run(["systemctl", "stop", "fleetd.socket", "fleetd.service"])?.ok()?;
    assert_eq!(active(0)?, 0);
    host.run(["systemctl", "start", "fleetd.service"])?.ok()?;
    until("all run again", || Ok(active(0)? + active(1)? == 4))?;
    Ok(())
}
