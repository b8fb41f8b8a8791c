//! fleetd as the user `fleet`, with the polkit rule that the package ships.

use super::SLEEP;
use anyhow::Result;
use fleet_e2e::Fleet;

#[test]
fn the_life_of_a_unit_without_root() -> Result<()> {
    let fleet = Fleet::installed("user")?;
    fleet
        .host()
        .write("/etc/systemd/system/fleetd.service.d/user.conf", "[Service]\nUser=fleet\nGroup=fleet\n")?;
    fleet.host().run(["systemctl", "daemon-reload"])?.ok()?;
    fleet.host().start_fleet()?;
    let user = fleet.host().sh("ps -o user= -p $(systemctl show --value -p MainPID fleetd.service)")?.ok()?;
    assert_eq!(user.stdout.trim(), "fleet");

    fleet.start("a.service", SLEEP)?;
    assert_eq!(fleet.state("a.service")?.as_deref(), Some("active running"));
    assert!(fleet.ok("status a.service")?.contains("active (running)"));
    fleet.host().sync_journal()?;
    assert!(fleet.ok("journal a.service")?.contains("Started a.service"));
    fleet.file("a.service", "[Unit]\nDescription=new\n[Service]\nExecStart=/bin/sleep infinity\n")?;
    fleet.ok("start --replace a.service")?;
    assert_eq!(fleet.property("a.service", "Description")?, "new");
    let pid = fleet.main_pid("a.service")?;
    fleet.disturb("systemctl restart fleetd.service")?;
    assert_eq!(fleet.main_pid("a.service")?, pid);
    fleet.start("wanted.service", &format!("{SLEEP}[Install]\nWantedBy=multi-user.target\n"))?;
    fleet.ok("destroy a.service wanted.service")?;
    assert!(!fleet.host().exists("/run/fleet/units/a.service"));
    assert!(!fleet.host().exists("/run/systemd/system/multi-user.target.wants/wanted.service"));
    Ok(())
}
