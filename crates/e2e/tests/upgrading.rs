//! What docs/UPGRADING.md says, step by step, and what goes wrong when a step is left out; backups.

use super::SLEEP;
use anyhow::{Result, ensure};
use fleet_e2e::{Fleet, Members, until};
use fleet_testbed::{Cluster, Options, bin_dir};
use std::os::unix::fs::PermissionsExt;

const CONF: &str = "/etc/fleet/fleet.conf";
const STOP: &str = "systemctl stop fleetd.socket fleetd.service";
const START: &str = "systemctl start fleetd.socket fleetd.service";

/// Tries to start a server, which has to refuse, and why it did.
fn refusal(fleet: &Fleet) -> Result<String> {
    let host = fleet.host();
    let before = host.journal(Some("fleetd.service"))?.lines().count();
    ensure!(!host.sh("systemctl start fleetd.service")?.success(), "it starts");
    let log = host.journal(Some("fleetd.service"))?;
    // Others than us try again, too.
    host.sh(&format!("{STOP}; systemctl reset-failed fleetd.service"))?.ok()?;
    Ok(log.lines().skip(before).collect::<Vec<_>>().join("\n"))
}

/// What is known besides units: the same whatever the registry is in.
fn others(fleet: &Fleet) -> Result<String> {
    let mut known = String::new();
    for words in ["user list --no-legend", "join-token list --no-legend", "machine list --no-legend --full"] {
        for line in fleet.ok(words)?.lines() {
            // How long something is good for yet changes as time goes by.
            let columns = line.split('\t').map(|column| column.split(" (in ").next().unwrap_or_default());
            known += &columns.collect::<Vec<_>>().join("\t");
            known.push('\n');
        }
    }
    Ok(known)
}

#[test]
fn one_server_becomes_three_and_one_again_and_no_unit_notices() -> Result<()> {
    let fleet = Fleet::of(Cluster::up(Options::for_test("upgrade", 3).fleet(bin_dir()?))?);
    let hosts = fleet.cluster.hosts();
    fleet.host().write(CONF, "listen=\"*\"\n")?;
    fleet.host().start_fleet()?;
    let token = fleet.token("{}")?;
    for host in &hosts[1..] {
        fleet.join(host, &token, "")?;
        host.start_fleet()?;
    }
    until("all machines are there", || Ok(fleet.machines()? == 3))?;
    let all: Vec<String> = (0..9).map(|number| format!("u{number}.service")).collect();
    let before = fleet.start_all(&all, SLEEP)?;
    fleet.ok("user create ann --role viewer")?;
    fleet.ok(&format!("machine metadata {} disk=ssd", hosts[1].machine_id()))?;
    fleet.ok(&format!("machine cordon {}", hosts[2].machine_id()))?;
    let known = others(&fleet)?;
    let unchanged = |what: &str| -> Result<()> {
        let now = fleet.running(&all)?;
        ensure!(now == before, "{what}: {:?} were touched", now.changed_since(&before));
        Ok(())
    };

    // One server → three servers on etcd.
    let members = Members::start(hosts)?;
    let etcd = format!("etcd_servers={}\n", members.quoted());
    fleet.host().sh(&format!("{STOP}; fleetd registry export /root/registry.export"))?.ok()?;
    let mode = fleet.host().sh("stat -c %a /root/registry.export")?.ok()?.stdout;
    ensure!(mode.trim() == "600", "{mode}");
    fleet.host().write(CONF, &etcd)?;
    let why = refusal(&fleet)?;
    ensure!(why.contains("the embedded one that this server had until now has 9 units"), "{why}");
    unchanged("an import that was forgotten")?;
    let import = "fleetd registry import /root/registry.export";
    let done = fleet.host().sh(import)?.ok()?;
    ensure!(done.stderr.contains("records of the file"), "{done:?}");
    let again = fleet.host().sh(import)?.ok()?;
    ensure!(again.stderr.contains("(0 changed)"), "{again:?}");
    fleet.host().sh(START)?.ok()?;
    until("the machines are back", || Ok(fleet.machines()? == 3))?;
    until("it knows what it knew", || Ok(others(&fleet)? == known))?;
    unchanged("the first server on etcd")?;
    for host in &hosts[1..] {
        host.write(CONF, &etcd)?;
        host.run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    }
    until("there are three servers", || Ok(fleet.ok("servers --no-legend")?.matches(":4919").count() == 3))?;
    until("every server knows that all run", || {
        for host in 0..3 {
            let list = fleet.ctl_on(host, "list-units --no-legend --fields=unit,active")?;
            if !list.success() || list.stdout.matches("\tactive").count() != 9 {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    unchanged("three servers on etcd")?;
    // They serve, each of them, and place nothing where it was said not to.
    hosts[1].write("/root/more.service", SLEEP)?;
    fleet.ctl_on(1, "start more.service")?.ok()?;
    ensure!(fleet.copies("more.service")? != [2]);

    // And back.
    for host in &hosts[1..] {
        host.write(CONF, format!("join=\"{}\"\n", fleet.host().ip()))?;
        host.run(["systemctl", "restart", "fleetd.service"])?.ok()?;
    }
    until("they are agents", || Ok(fleet.ok("servers --no-legend")?.matches(":4919").count() == 1))?;
    until("all machines are there", || Ok(fleet.machines()? == 3))?;
    fleet.ok("destroy more.service")?;
    fleet.host().sh(&format!("{STOP}; fleetd registry export /root/registry.export"))?.ok()?;
    fleet.host().write(CONF, "listen=\"*\"\n")?;
    let why = refusal(&fleet)?;
    ensure!(why.contains("this server's registry was in etcd until now"), "{why}");
    unchanged("an import that was forgotten on the way back")?;
    // What the embedded registry has is older, and not the same: it is not replaced unasked.
    fleet.host().sh("fleetd registry import --replace /root/registry.export")?.ok()?;
    fleet.host().sh(START)?.ok()?;
    until("the machines are back", || Ok(fleet.machines()? == 3))?;
    until("it knows what it knew", || Ok(others(&fleet)? == known))?;
    until("all run", || {
        let list = fleet.ok("list-units --no-legend --fields=unit,active")?;
        Ok(list.matches("\tactive").count() == 9)
    })?;
    unchanged("one server again")?;
    fleet.ok("stop u0.service")?;
    ensure!(fleet.copies("u0.service")?.is_empty(), "it can be stopped as ever");
    Ok(())
}

#[test]
fn a_backup_is_put_back_while_the_server_runs() -> Result<()> {
    let fleet = Fleet::up("backup")?;
    for unit in ["stays.service", "comes-back.service"] {
        fleet.start(unit, SLEEP)?;
    }
    let pid = fleet.main_pid("stays.service")?;
    fleet.ok("registry export /root/backup")?;
    let path = fleet.host().root_path("/root/backup")?;
    ensure!(std::fs::metadata(&path)?.permissions().mode() & 0o777 == 0o600);
    let text = std::fs::read_to_string(&path)?;
    ensure!(fleet.ok("registry export -")?.lines().count() == text.lines().count());

    fleet.ok("destroy comes-back.service")?;
    fleet.start("newer.service", SLEEP)?;
    // What is damaged, cut, foreign or not asked for changes nothing.
    fleet.host().write("/root/damaged", text.replace("/bin/sleep infinity", "/bin/sleep infinite"))?;
    fleet.host().write("/root/cut", &text[..text.len() / 2])?;
    for (file, flags, why) in [
        ("damaged", "--replace", "line "),
        ("cut", "--replace", "it is damaged"),
        ("newer.service", "--replace", "line 1: this is no export of a fleet registry"),
        ("backup", "", "the registry is not empty (2 units, 2 units' places)"),
    ] {
        let refused = fleet.ctl(&format!("registry import {flags} {file}"))?;
        ensure!(refused.code() == 1 && refused.stderr.contains(why), "{file}: {refused:?}");
    }
    let offline = fleet.host().sh("fleetd registry import --replace /root/damaged")?;
    ensure!(!offline.success() && offline.stderr.contains("/root/damaged: line "), "{offline:?}");
    ensure!(fleet.state("newer.service")?.as_deref() == Some("active running"));

    let done = fleet.ok("registry import --replace backup")?;
    ensure!(done.contains("records of the file"), "{done}");
    until("it is as it was", || {
        let back = fleet.state("comes-back.service").unwrap_or_default();
        Ok(back.as_deref() == Some("active running") && fleet.state("newer.service")?.is_none())
    })?;
    ensure!(fleet.main_pid("stays.service")? == pid, "it was touched");
    let again = fleet.ok("registry import backup")?;
    ensure!(again.contains("(0 changed)"), "{again}");
    Ok(())
}
