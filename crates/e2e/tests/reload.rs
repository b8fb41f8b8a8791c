//! fleetd reads its configuration again on SIGHUP (`systemctl reload fleet.service`), as the original did: units go on, who asks
//! meanwhile is answered, and a configuration that can't be used changes nothing.

use crate::SLEEP;
use anyhow::Result;
use fleet_e2e::{Fleet, until};

#[test]
fn a_reload_takes_the_new_configuration() -> Result<()> {
    let fleet = Fleet::up("reload")?;
    fleet.start("a.service", SLEEP)?;
    let (unit, daemon) = (fleet.main_pid("a.service")?, fleet.main_pid("fleetd.service")?);
    let metadata = || fleet.ok("list-machines --no-legend --fields=metadata");
    assert_eq!(metadata()?, "-\n");

    // Many requests, over and over: none may be refused while fleetd begins again.
    let asking = fleet.host().start_process([
        "/bin/sh",
        "-c",
        "for n in $(seq 40); do fleetctl list-units --no-legend || exit 1; done",
    ])?;
    fleet.host().write("/etc/fleet/fleet.conf", "metadata=\"region=eu\"\nverbosity=1\n")?;
    fleet.host().sh("systemctl reload fleet.service")?.ok()?;
    until("the new metadata is published", || Ok(metadata()? == "region=eu\n"))?;
    asking.finish(4 * fleet_e2e::PATIENCE)?.ok()?;
    assert_eq!(fleet.main_pid("fleetd.service")?, daemon, "it is the same process");
    assert_eq!(fleet.main_pid("a.service")?, unit, "the unit was not touched");
    let log = || fleet.host().journal(Some("fleetd.service"));
    assert!(log()?.contains("HTTP GET /fleet/v1/machines"), "verbosity=1 shows requests");

    // A mistake is said, and nothing changes.
    fleet.host().write("/etc/fleet/fleet.conf", "metadata=\"region=us\"\nagent_ttl=\"30\"\n")?;
    fleet.host().sh("systemctl reload fleet.service")?.ok()?;
    until("the mistake is in the log", || Ok(log()?.contains("going on with the configuration as it was")))?;
    assert!(log()?.contains("agent_ttl"), "{}", log()?);
    assert_eq!(metadata()?, "region=eu\n");
    assert_eq!((fleet.main_pid("fleetd.service")?, fleet.main_pid("a.service")?), (daemon, unit));
    Ok(())
}

/// systemd would kill in the end a fleetd that does not hear its SIGTERM.
#[test]
fn a_stop_during_a_reload_is_heard() -> Result<()> {
    let fleet = Fleet::up("reloadstop")?;
    fleet.start("a.service", SLEEP)?;
    let unit = fleet.main_pid("a.service")?;
    // Which of the two is taken first is a matter of chance.
    for _ in 0..4 {
        let daemon = fleet.main_pid("fleetd.service")?;
        fleet.host().sh(&format!("kill -HUP {daemon}; kill -TERM {daemon}"))?.ok()?;
        // systemd starts it again.
        let show = "systemctl reset-failed fleetd.service; \
                    systemctl show --property=ActiveState,MainPID fleetd.service";
        let before = format!("MainPID={daemon}\n");
        let is_new = || {
            let shown = fleet.host().sh(show)?.ok()?.stdout;
            Ok(shown.contains("ActiveState=active") && !shown.contains(&before))
        };
        until("fleetd stops, and is started again", is_new)?;
    }
    assert_eq!(fleet.main_pid("a.service")?, unit, "the unit was not touched");
    Ok(())
}
