//! With the programs of fleet 1.0 themselves, which can't be had everywhere: each of the two fleetctl drives each of the two
//! fleetd, over the unix socket and over TCP, with every command; and a running cluster of fleet 1.0 is taken over.
//!
//! `FLEET_ORIGINAL_DIR=DIRECTORY cargo test -p fleet-e2e --test e2e -- --ignored original` runs these; the directory has its
//! `fleetd` and `fleetctl` (version 1.0.0). What can be tested without them is in [`crate::moving`], [`crate::recorded`],
//! the golden suite and `crates/fleetctl/tests/old_server.rs`.

use crate::moving::{self, Layout, Old};
use anyhow::{Context, Result, ensure};
use fleet_e2e::{Fleet, until};
use fleet_testbed::{Cluster, Host, Output};
use std::path::PathBuf;
use std::time::Duration;

/// Where the programs are.
const DIRECTORY: &str = "FLEET_ORIGINAL_DIR";
/// The API on all addresses, as its documentation does it.
const TCP: &str = "[Socket]\nListenStream=49153\n";
/// How every way to reach the API is written.
const ENDPOINTS: [&str; 2] = ["unix:///var/run/fleet.sock", "http://127.0.0.1:49153"];

fn program(name: &str) -> Result<PathBuf> {
    let directory = std::env::var_os(DIRECTORY).with_context(|| {
        format!("set {DIRECTORY} to the directory that has fleetd and fleetctl of fleet 1.0.0")
    })?;
    let path = PathBuf::from(directory).join(name);
    ensure!(path.is_file(), "{DIRECTORY} has no {name}: {} is no file", path.display());
    Ok(path)
}

/// Puts fleet 1.0 on all hosts of a cluster and starts it, with the units that CoreOS had.
fn start_original(cluster: &Cluster) -> Result<()> {
    for host in cluster.hosts() {
        for name in ["fleetd", "fleetctl"] {
            host.copy_in(program(name)?, format!("/usr/bin/{name}"))?;
        }
        host.write(
            "/etc/systemd/system/fleet.service",
            "[Unit]\nDescription=fleet daemon\nWants=fleet.socket\nAfter=fleet.socket\n\n\
             [Service]\nExecStart=/usr/bin/fleetd\nRestart=always\nRestartSec=10s\n",
        )?;
        host.write("/etc/systemd/system/fleet.socket", "[Socket]\nListenStream=/var/run/fleet.sock\n")?;
        host.write("/etc/systemd/system/fleet.socket.d/30-ListenStream.conf", TCP)?;
        host.sh("systemctl daemon-reload; systemctl start fleet.socket fleet.service")?.ok()?;
    }
    let first = cluster.host(0);
    until("all machines are there", || {
        Ok(first.run(["fleetctl", "list-machines", "--no-legend"])?.stdout.lines().count()
            == cluster.hosts().len())
    })
}

/// sshd on all hosts, and an agent with a key on the first.
fn with_ssh(cluster: &Cluster) -> Result<()> {
    for host in cluster.hosts() {
        let key = host.start_sshd()?;
        host.sh("getent group fleet > /dev/null || groupadd fleet; usermod -aG fleet,systemd-journal core")?
            .ok()?;
        cluster.host(0).copy_in(key, "/root/key")?;
    }
    let add = "chmod 600 key; ssh-agent -a /run/agent.sock > /dev/null; SSH_AUTH_SOCK=/run/agent.sock ssh-add -q key";
    cluster.host(0).sh(add)?.ok().map(drop)
}

/// Types every command; all must do what they are for.
fn drive(host: &Host, fleetctl: &str, endpoint: &str, machines: usize) -> Result<()> {
    const UNIT: &str = "[Service]\nExecStart=/bin/sh -c \"echo hello; exec sleep 1000\"\n";
    host.write("/root/u/a.service", UNIT)?;
    host.write("/root/u/t@.service", format!("{UNIT}\n[X-Fleet]\nConflicts=t@*.service\n"))?;
    host.write("/root/u/g.service", format!("{UNIT}\n[X-Fleet]\nGlobal=true\n"))?;
    let typed = |line: &str| -> Result<Output> {
        let command =
            host.command_in("/root/u", ["/bin/bash", "-c", line]).env("SSH_AUTH_SOCK", "/run/agent.sock");
        command.env("FLEETCTL_STRICT_HOST_KEY_CHECKING", "false").deadline(Duration::from_secs(120)).run()
    };
    let run = |words: &str| -> Result<Output> {
        let output = typed(&format!("{fleetctl} --endpoint={endpoint} {words}"))?;
        eprintln!("$ {words}: exit {}\n{}{}", output.code(), output.stdout, output.stderr);
        Ok(output)
    };
    let says = |words: &str, expected: &[&str]| -> Result<()> {
        let out = run(words)?.ok()?;
        let text = out.stdout + &out.stderr;
        ensure!(expected.iter().all(|part| text.contains(part)), "{words}: no {expected:?} in {text}");
        Ok(())
    };
    // Servers of 1.0 show states some seconds later.
    let comes = |words: &str, expected: &[&str]| until(words, || Ok(says(words, expected).is_ok()));

    ensure!(run("list-machines --no-legend")?.ok()?.stdout.lines().count() == machines);
    says("submit a.service t@.service", &[])?;
    comes("list-unit-files", &["a.service", "t@.service", "inactive"])?;
    ensure!(run("cat a.service")?.ok()?.stdout == UNIT);
    says("load a.service", &["Unit a.service loaded on "])?;
    // With several units fleetctl 1.0 now and then leaves out the machine.
    says("start a.service t@1.service", &["Unit a.service launched", "Unit t@1.service launched"])?;
    comes("list-units", &["a.service", "t@1.service", "active", "running"])?;
    says("start --no-block g.service", &["Triggered global unit g.service start"])?;
    comes("list-units --no-legend --full --fields=unit,active,load,sub,hash", &["g.service\tactive"])?;
    says("status a.service", &["active (running)"])?;
    says("journal --lines=5 t@1.service", &["hello"])?;
    says("ssh --unit=t@1.service id -un", &["core"])?;
    says("ssh t@1.service systemctl is-active t@1.service", &["active"])?;
    says("stop a.service", &["Unit a.service loaded on "])?;
    says("start a.service", &["Unit a.service launched on "])?;
    says("restart a.service", &["Unit a.service launched on "])?;
    comes("list-unit-files --no-legend --fields=unit,dstate,state", &["a.service\tlaunched\tlaunched"])?;
    host.write("/root/u/a.service", UNIT.replace("1000", "2000"))?;
    says("start --replace a.service", &["Unit a.service launched on "])?;
    ensure!(run("cat a.service")?.ok()?.stdout.contains("2000"));
    says("unload a.service", &["Unit a.service inactive"])?;
    comes("list-unit-files --no-legend --fields=unit,dstate,state", &["a.service\tinactive\tinactive"])?;
    says(
        "destroy a.service t@1.service t@.service g.service",
        &["Destroyed a.service", "Destroyed t@1.service"],
    )?;
    until("nothing is left", || Ok(run("list-units --no-legend")?.stdout.is_empty()))?;

    ensure!(run("start nonsuch.service")?.code() == 1);
    ensure!(run("status nonsuch.service")?.stderr.contains("Unit nonsuch.service does not exist."));
    says("version", &["fleetctl version"])?;
    says("help", &["list-machines"])?;
    ensure!(run("verify a.service")?.stderr.contains("deprecated"));
    let request = "(printf 'GET /fleet/v1/machines HTTP/1.0\\r\\n\\r\\n'; sleep 2)";
    let answer = typed(&format!("{request} | {fleetctl} fd-forward /var/run/fleet.sock"))?.stdout;
    ensure!(answer.contains("200 OK") && answer.contains("primaryIP"), "{answer}");
    let tunnelled = typed(&format!("{fleetctl} --tunnel={} list-machines --no-legend", host.ip()))?;
    ensure!(tunnelled.ok()?.stdout.lines().count() == machines);
    Ok(())
}

#[test]
#[ignore = "needs the programs of fleet 1.0: FLEET_ORIGINAL_DIR"]
fn the_originals_fleetctl_drives_our_fleetd() -> Result<()> {
    let fleet = Fleet::join_all("origctl", 2, "")?;
    with_ssh(&fleet.cluster)?;
    let host = fleet.host();
    // The drop-in and the commands of its documentation, with the names of its units.
    host.write("/etc/systemd/system/fleet.socket.d/30-ListenStream.conf", TCP)?;
    host.sh("systemctl daemon-reload; systemctl stop fleet.service; systemctl restart fleet.socket; systemctl start fleet.service")?.ok()?;
    host.copy_in(program("fleetctl")?, "/root/fleetctl")?;
    until("both machines are there", || {
        Ok(fleet.ctl("list-machines --no-legend")?.stdout.lines().count() == 2)
    })?;
    ENDPOINTS.iter().try_for_each(|endpoint| drive(host, "/root/fleetctl", endpoint, 2).context(*endpoint))
}

#[test]
#[ignore = "needs the programs of fleet 1.0: FLEET_ORIGINAL_DIR"]
fn our_fleetctl_drives_the_originals_fleetd() -> Result<()> {
    let fleet = moving::machines("origd")?;
    let _etcd = moving::etcd(&fleet.cluster, &["--enable-v2=true"])?;
    start_original(&fleet.cluster)?;
    with_ssh(&fleet.cluster)?;
    let host = fleet.host();
    host.copy_in(fleet_testbed::bin_dir()?.join("fleetctl"), "/root/fleetctl")?;
    ENDPOINTS.iter().try_for_each(|endpoint| drive(host, "/root/fleetctl", endpoint, 3).context(*endpoint))
}

/// A cluster of fleet 1.0 with running units.
fn running_original(name: &str) -> Result<(Fleet, fleet_testbed::Etcd, Vec<Old>)> {
    let fleet = moving::machines(name)?;
    let etcd = moving::etcd(&fleet.cluster, &["--enable-v2=true"])?;
    start_original(&fleet.cluster)?;
    let host = fleet.host();
    let mut units = moving::units(fleet.cluster.hosts());
    for unit in &units {
        host.write(format!("/root/u/{}", unit.name), &unit.text)?;
    }
    host.sh("cd u && fleetctl submit *")?.ok()?;
    for (state, command) in [("loaded", "load"), ("launched", "start")] {
        let names: Vec<_> = units.iter().filter(|unit| unit.desired == state).map(|unit| unit.name).collect();
        host.sh(&format!("fleetctl {command} --no-block {}", names.join(" ")))?.ok()?;
    }
    let lines = || -> Result<Vec<Vec<String>>> {
        let list = fleet.ok("list-unit-files --no-legend --full --fields=unit,state,target")?;
        Ok(list.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect())
    };
    until("every unit is what it is to be", || {
        let lines = lines()?;
        let there = |unit: &Old| {
            lines.iter().any(|line| line[0] == unit.name && (line[1] == unit.desired || line[2] == "global"))
        };
        let active = fleet.ok("list-units --no-legend --fields=active,unit")?;
        let running = active.lines().filter(|line| line.starts_with("active")).count();
        let expected = units.iter().filter(|unit| unit.desired == "launched").count() + 2;
        Ok(units.iter().all(there) && running == expected)
    })?;
    // Where its engine put them.
    for line in lines()? {
        let host = fleet.cluster.hosts().iter().position(|host| line[2].starts_with(host.machine_id()));
        units.iter_mut().filter(|unit| unit.name == line[0]).for_each(|unit| unit.host = host);
    }
    Ok((fleet, etcd, units))
}

#[test]
#[ignore = "needs the programs of fleet 1.0: FLEET_ORIGINAL_DIR"]
fn a_cluster_of_the_original_becomes_machines_that_join() -> Result<()> {
    let (fleet, _etcd, units) = running_original("origjoin")?;
    moving::take_over(&fleet, &units, Layout::Joined, false)
}

#[test]
#[ignore = "needs the programs of fleet 1.0: FLEET_ORIGINAL_DIR"]
fn a_cluster_of_the_original_goes_on_on_its_etcd() -> Result<()> {
    let (fleet, _etcd, units) = running_original("origetcd")?;
    moving::take_over(&fleet, &units, Layout::Etcd, false)
}
