//! Many machines: joining, placement, the death of a machine, cut cables, and a server that goes away.

use super::SLEEP;
use anyhow::Result;
use fleet_e2e::{Fleet, until};

/// Short, since tests wait for it; and far longer than a busy machine holds up an agent, whose units must not move for that.
const TTL: &str = "agent_ttl=\"10s\"";

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix}{number}.service")).collect()
}

/// Whether each unit runs, on one machine exactly.
fn one_copy_each(fleet: &Fleet, units: &[String]) -> Result<bool> {
    for unit in units {
        if fleet.copies(unit)?.len() != 1 {
            return Ok(false);
        }
    }
    Ok(true)
}

#[test]
fn machines_join_and_units_spread() -> Result<()> {
    let fleet = Fleet::join_all("join", 3, "metadata=\"disk=ssd\"")?;
    let machines = fleet.ok("list-machines --no-legend --full")?;
    for host in fleet.cluster.hosts() {
        assert!(machines.contains(&format!("{}\t{}\tdisk=ssd", host.machine_id(), host.ip())), "{machines}");
    }
    let units = names("spread", 6);
    for unit in &units {
        fleet.file(unit, SLEEP)?;
    }
    fleet.ok(&format!("start {}", units.join(" ")))?;
    assert!(one_copy_each(&fleet, &units)?);
    let hosts: Vec<usize> =
        units.iter().map(|unit| fleet.copies(unit).map(|copies| copies[0])).collect::<Result<_>>()?;
    for host in 0..3 {
        assert_eq!(hosts.iter().filter(|found| **found == host).count(), 2, "least loaded first: {hosts:?}");
    }

    // Status and log of every unit from here, without ssh.
    fleet.cluster.hosts().iter().try_for_each(|host| host.sync_journal())?;
    for (unit, host) in units.iter().zip(&hosts) {
        let status = fleet.ok(&format!("status {unit}"))?;
        assert!(
            status.contains("active (running)") && status.contains(fleet.cluster.host(*host).name()),
            "{status}"
        );
        assert!(fleet.ok(&format!("journal {unit}"))?.contains(&format!("Started {unit}")));
    }

    // [X-Fleet] across machines.
    let third = fleet.cluster.host(2);
    fleet.start("pinned.service", &format!("{SLEEP}[X-Fleet]\nMachineID={}\n", third.machine_id()))?;
    fleet.start("follow.service", &format!("{SLEEP}[X-Fleet]\nMachineOf=pinned.service\n"))?;
    assert_eq!((fleet.copies("pinned.service")?, fleet.copies("follow.service")?), (vec![2], vec![2]));
    fleet.start("everywhere.service", &format!("{SLEEP}[X-Fleet]\nGlobal=true\n"))?;
    until("the Global unit runs everywhere", || Ok(fleet.copies("everywhere.service")? == [0, 1, 2]))?;
    let apart = names("apart", 3);
    for unit in &apart {
        fleet.file(unit, &format!("{SLEEP}[X-Fleet]\nConflicts=apart*.service\n"))?;
    }
    fleet.ok(&format!("start {}", apart.join(" ")))?;
    let mut places: Vec<usize> =
        apart.iter().map(|unit| fleet.copies(unit).map(|copies| copies[0])).collect::<Result<_>>()?;
    places.sort_unstable();
    assert_eq!(places, [0, 1, 2]);

    // A joined machine needs its token never again, and its units do not notice a restart of its fleetd.
    let before = fleet.pids(1, "spread")?;
    fleet.cluster.host(1).sh("rm /etc/fleet/join-token; systemctl restart fleetd.service")?.ok()?;
    until("it is back", || Ok(fleet.ok("status everywhere.service").is_ok()))?;
    assert_eq!(fleet.pids(1, "spread")?, before);
    Ok(())
}

#[test]
fn units_of_a_dead_machine_live_on() -> Result<()> {
    let fleet = Fleet::join_all("death", 3, TTL)?;
    let units = names("u", 9);
    for unit in &units {
        fleet.file(unit, SLEEP)?;
    }
    fleet.ok(&format!("start {}", units.join(" ")))?;
    let before = (fleet.pids(0, "u")?, fleet.pids(1, "u")?);
    fleet.cluster.host(2).kill()?;
    until("every unit runs again", || one_copy_each(&fleet, &units))?;
    for (host, before) in [(0, before.0), (1, before.1)] {
        let now = fleet.pids(host, "u")?;
        assert!(before.lines().all(|line| now.contains(line)), "a unit that was not concerned was touched");
    }
    assert_eq!(fleet.ok("list-machines --no-legend")?.lines().count(), 2);
    let before = (fleet.pids(0, "u")?, fleet.pids(1, "u")?);
    // It comes back with an empty /run: it gets nothing back, and nothing moves.
    fleet.cluster.host(2).boot()?;
    until("it is back", || Ok(fleet.ok("list-machines --no-legend")?.lines().count() == 3))?;
    fleet.file("after.service", SLEEP)?;
    fleet.ok("start after.service")?;
    assert_eq!(fleet.copies("after.service")?, [2]);
    assert_eq!((fleet.pids(0, "u")?, fleet.pids(1, "u")?), before);
    assert!(one_copy_each(&fleet, &units)?);
    Ok(())
}

#[test]
fn a_cut_cable_heals_to_one_copy() -> Result<()> {
    let fleet = Fleet::join_all("cut", 3, TTL)?;
    let units = names("u", 6);
    for unit in &units {
        fleet.file(unit, SLEEP)?;
    }
    fleet.ok(&format!("start {}", units.join(" ")))?;
    let before = fleet.pids(1, "u")?;
    // A short cut goes unnoticed.
    fleet.cluster.host(1).cut()?;
    fleet.cluster.host(1).join()?;
    until("the session is there", || Ok(fleet.ok("list-machines --no-legend")?.lines().count() == 3))?;
    assert_eq!(fleet.pids(1, "u")?, before);
    // A long one does not: its units run elsewhere, and here, until it heals.
    fleet.cluster.host(1).cut()?;
    until("its units are placed elsewhere", || {
        let list = fleet.ok("list-units --no-legend --fields=unit,machine,active")?;
        Ok(list.matches("\tactive").count() == 6 && !list.contains(fleet.cluster.host(1).ip()))
    })?;
    assert_eq!(fleet.pids(1, "u")?, before, "nothing was stopped on the machine that was cut off");
    let others = (fleet.pids(0, "u")?, fleet.pids(2, "u")?);
    fleet.cluster.host(1).join()?;
    until("one copy of each is left", || one_copy_each(&fleet, &units))?;
    assert_eq!((fleet.pids(0, "u")?, fleet.pids(2, "u")?), others, "the new copies stay");
    assert_eq!(fleet.pids(1, "u")?, "");
    Ok(())
}

#[test]
fn a_server_that_goes_away_stops_nothing() -> Result<()> {
    let fleet = Fleet::join_one_server("server", 3, TTL)?;
    let units = names("u", 6);
    for unit in &units {
        fleet.file(unit, SLEEP)?;
    }
    fleet.ok(&format!("start {}", units.join(" ")))?;
    let before: Vec<_> = (0..3).map(|host| fleet.pids(host, "u")).collect::<Result<_>>()?;
    let list = fleet.ok("list-units --no-legend")?;
    let pids = || (0..3).map(|host| fleet.pids(host, "u")).collect::<Result<Vec<_>>>();
    for how in [
        "systemctl kill -s KILL fleetd.service; sleep 1; systemctl start fleetd.service",
        "systemctl stop fleetd.socket fleetd.service; sleep 15; systemctl start fleetd.service",
    ] {
        fleet.host().sh(how)?.ok()?;
        until("all is as before", || Ok(fleet.ok("list-units --no-legend")? == list))?;
        assert_eq!(pids()?, before, "after: {how}");
    }
    // What happened meanwhile is reported.
    fleet.host().run(["systemctl", "stop", "fleetd.socket", "fleetd.service"])?.ok()?;
    let victim = before[1].split(' ').next().unwrap_or_default().to_owned();
    fleet.cluster.host(1).run(["systemctl", "kill", "-s", "KILL", &victim])?.ok()?;
    assert!(!fleet.ctl("list-units")?.success());
    fleet.host().run(["systemctl", "start", "fleetd.service"])?.ok()?;
    until("the failure is reported", || Ok(fleet.state(&victim)?.as_deref() == Some("failed failed")))?;
    Ok(())
}

#[test]
fn who_may_not_join_is_told_why() -> Result<()> {
    let fleet = Fleet::join_one_server("refused", 2, TTL)?;
    let stranger = fleet.cluster.host(1);
    let id = stranger.machine_id().to_owned();
    fleet.start("pinned.service", &format!("{SLEEP}[X-Fleet]\nMachineID={id}\n"))?;

    // Removed: its session ends, and its certificate is worth nothing.
    let remove = format!("/fleet/v1/machines/{id}");
    assert_eq!(fleet.http()?.send("DELETE", &remove, &[], "")?.status, 204);
    assert_eq!(fleet.http()?.send("DELETE", &remove, &[], "")?.status, 404);
    until("it is gone", || Ok(fleet.ok("list-machines --no-legend")?.lines().count() == 1))?;
    let log = |text: &str| until(text, || Ok(stranger.journal(Some("fleetd.service"))?.contains(text)));
    log("is not in this cluster (any more)")?;

    // Joining anew takes a token that is good.
    let restart = "rm -rf /var/lib/fleet/identity; systemctl reset-failed fleetd.service; systemctl restart --no-block fleetd.service";
    let used_up = fleet.token(r#"{"uses":1}"#)?;
    let conf = TTL;
    fleet.join(stranger, &used_up.replace("fleet1-", "fleet1-A"), conf)?;
    stranger.sh(restart)?.ok()?;
    log("join_token")?;
    fleet.join(stranger, &used_up, conf)?;
    stranger.sh(restart)?.ok()?;
    until("it has joined", || Ok(fleet.ok("list-machines --no-legend")?.lines().count() == 2))?;
    assert_eq!(fleet.http()?.send("DELETE", &remove, &[], "")?.status, 204);
    stranger.sh(restart)?.ok()?;
    log("used up")?;
    // No secret is in any log.
    for host in fleet.cluster.hosts() {
        let log = host.journal(None)?;
        assert!(!log.contains(&used_up), "the token is in the log of {}", host.name());
    }
    Ok(())
}

#[test]
fn a_machine_that_shuts_down_says_so() -> Result<()> {
    // Nobody could wait for this TTL.
    let fleet = Fleet::join_all("leave", 3, "agent_ttl=\"1h\"")?;
    let units = names("u", 6);
    for unit in &units {
        fleet.file(unit, SLEEP)?;
    }
    fleet.ok(&format!("start {}", units.join(" ")))?;
    let before = fleet.pids(1, "u")?;
    // Only fleetd stops: units run on, and presence stays.
    fleet.cluster.host(1).run(["systemctl", "stop", "fleetd.service", "fleetd.socket"])?.ok()?;
    assert_eq!(fleet.ok("list-machines --no-legend")?.lines().count(), 3);
    assert_eq!(fleet.pids(1, "u")?, before);
    fleet.cluster.host(1).run(["systemctl", "start", "fleetd.service"])?.ok()?;
    until("it is back", || {
        Ok(fleet.cluster.host(1).run(["systemctl", "is-active", "fleetd.service"])?.success())
    })?;
    assert_eq!(fleet.pids(1, "u")?, before);
    // The machine goes down: its units are placed elsewhere at once.
    fleet.cluster.host(2).shutdown()?;
    until("every unit runs again", || one_copy_each(&fleet, &units))?;
    assert_eq!(fleet.ok("list-machines --no-legend")?.lines().count(), 2);
    assert!(before.lines().all(|line| fleet.pids(1, "u").is_ok_and(|now| now.contains(line))));
    Ok(())
}
