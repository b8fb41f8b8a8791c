//! Moving from fleet 1.0 to ours by docs/MIGRATING.md: its blocks of commands are run as they stand, on three machines whose
//! units were left running by fleet 1.0, and no unit notices.
//!
//! What fleet 1.0 leaves is made here by hand, the way it did it; [`crate::original`] does the same with the real one.

use anyhow::{Context, Result};
use fleet_e2e::{Fleet, Running, until};
use fleet_testbed::{Cluster, Etcd, EtcdOptions, Host, Options, bin_dir};
use std::net::Ipv4Addr;

/// How the machines are to find each other from now on.
pub(crate) enum Layout {
    /// The first is the server, the others join it.
    Joined,
    /// All are servers, on etcd.
    Etcd,
}

/// A unit of the old cluster.
pub(crate) struct Old {
    pub(crate) name: &'static str,
    pub(crate) desired: &'static str,
    /// The host it is on; none: on all, or nowhere.
    pub(crate) host: Option<usize>,
    pub(crate) text: String,
}

/// The units of the old cluster: what tutorials have, and what could go wrong.
pub(crate) fn units(hosts: &[Host]) -> Vec<Old> {
    let run = "[Service]\nExecStart=/bin/sleep infinity\n";
    let unit = |name, desired, host, fleet: &str| {
        let section = if fleet.is_empty() { String::new() } else { format!("\n[X-Fleet]\n{fleet}\n") };
        Old { name, desired, host, text: format!("{run}{section}") }
    };
    vec![
        unit("app@.service", "inactive", None, "Conflicts=app@*.service"),
        unit("app@1.service", "launched", Some(0), "Conflicts=app@*.service"),
        unit("app@2.service", "launched", Some(1), "Conflicts=app@*.service"),
        unit("app@3.service", "launched", Some(2), "Conflicts=app@*.service"),
        unit("side@1.service", "launched", Some(0), "MachineOf=app@%i.service"),
        unit("side@3.service", "launched", Some(2), "MachineOf=app@%i.service"),
        // All on one machine: by load ours would place them elsewhere.
        unit("a.service", "launched", Some(1), ""),
        unit("b.service", "launched", Some(1), ""),
        unit("c.service", "launched", Some(1), ""),
        unit("db.service", "launched", Some(2), "MachineMetadata=disk=ssd"),
        unit("pinned.service", "launched", Some(0), &format!("MachineID={}", hosts[0].machine_id())),
        unit("agent.service", "launched", None, "Global=true"),
        unit("known.service", "inactive", None, ""),
        Old {
            name: "enabled.service",
            desired: "launched",
            host: Some(1),
            text: format!("{run}\n[Install]\nWantedBy=multi-user.target\n"),
        },
        Old {
            name: "tick.timer",
            desired: "launched",
            host: Some(2),
            text: "[Timer]\nOnActiveSec=1h\n\n[X-Fleet]\nMachineOf=tick.service\n".into(),
        },
        unit("tick.service", "loaded", Some(2), ""),
    ]
}

/// Whether systemd is to have it running.
fn runs(unit: &Old) -> bool {
    unit.desired == "launched"
}

/// Three machines without fleet.
pub(crate) fn machines(name: &str) -> Result<Fleet> {
    let cluster = Cluster::up(Options::for_test(name, 3))?;
    for (host, metadata) in cluster.hosts().iter().zip(["", "disk=hdd", "disk=ssd"]) {
        host.write("/etc/fleet/fleet.conf", conf(&cluster, metadata))?;
    }
    Ok(Fleet::of(cluster))
}

/// The fleet.conf of the old cluster.
fn conf(cluster: &Cluster, metadata: &str) -> String {
    format!(
        "# as it was\netcd_servers=[\"http://{}:2379\"]\nmetadata=\"{metadata}\"\nagent_ttl=\"30s\"\n",
        cluster.gateway()
    )
}

/// An etcd that all machines reach, at the address of the machine outside of the cluster.
pub(crate) fn etcd(cluster: &Cluster, arguments: &[&str]) -> Result<Etcd> {
    let address: Ipv4Addr = cluster.gateway().parse().context("the address of the gateway")?;
    let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    Etcd::start_with(EtcdOptions { members: 1, tls: None, arguments }, &[address])
}

/// The blocks of docs/MIGRATING.md, in their order.
fn blocks() -> Result<Vec<String>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/MIGRATING.md");
    let text = std::fs::read_to_string(path).context("docs/MIGRATING.md")?;
    let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("\n```").next());
    Ok(blocks.map(str::to_owned).collect())
}

/// Types a block as root; it must succeed.
fn type_block(host: &Host, block: &str) -> Result<String> {
    let script = format!("set -e; export HOME=/root\n{block}\n");
    let output = host.command(["/bin/bash", "-c", &script]).deadline(fleet_e2e::PATIENCE * 3).run()?;
    Ok(output.ok().with_context(|| block.to_owned())?.stdout)
}

/// What runs of the units that are to run, on all machines.
pub(crate) fn running(fleet: &Fleet, units: &[Old]) -> Result<Running> {
    let names: Vec<_> = units.iter().filter(|unit| runs(unit)).map(|unit| unit.name).collect();
    fleet.running(&names)
}

/// Moves a cluster of fleet 1.0 (`write_down` does the first step of the document on its first machine) to ours.
pub(crate) fn take_over(fleet: &Fleet, units: &[Old], layout: Layout, saved: bool) -> Result<()> {
    let [save, end, start, hand_over] =
        blocks()?.try_into().ok().context("docs/MIGRATING.md has four blocks")?;
    let hosts = fleet.cluster.hosts();
    let before = running(fleet, units)?;
    if !saved {
        type_block(&hosts[0], &save)?;
    }
    std::thread::scope(|scope| {
        let ends: Vec<_> = hosts.iter().map(|host| scope.spawn(|| type_block(host, &end))).collect();
        ends.into_iter().try_for_each(|end| end.join().expect("no panic").map(drop))
    })?;
    assert_eq!(running(fleet, units)?, before, "the end of the old fleetds is no unit's end");

    for host in hosts {
        host.sh("rm -f /etc/systemd/system/fleet.service /etc/systemd/system/fleet.socket /usr/bin/fleetd /usr/bin/fleetctl")?.ok()?;
        let conf = host.read("/etc/fleet/fleet.conf")?;
        host.install_fleet(bin_dir()?)?;
        // A package leaves the file that is there.
        host.write("/etc/fleet/fleet.conf", conf)?;
    }
    let other = |host: &Host, line: &str| {
        let conf = host.read("/etc/fleet/fleet.conf")?;
        let kept: String = conf
            .lines()
            .filter(|kept| !kept.starts_with("etcd_servers"))
            .map(|kept| format!("{kept}\n"))
            .collect();
        host.write("/etc/fleet/fleet.conf", format!("{kept}{line}\n"))
    };
    match layout {
        Layout::Etcd => {
            for host in hosts {
                type_block(host, &start)?;
            }
        }
        Layout::Joined => {
            other(&hosts[0], "listen=\"*\"")?;
            type_block(&hosts[0], &start)?;
            let token = fleet.token("{}")?;
            for host in &hosts[1..] {
                other(host, &format!("join=\"{}\"\njoin_token=\"{token}\"", hosts[0].ip()))?;
                type_block(host, &start)?;
            }
        }
    }
    until("all machines are there", || {
        Ok(fleet.ctl("list-machines --no-legend")?.stdout.lines().count() == 3)
    })?;
    let log = hosts[1].journal(Some("fleetd.service"))?;
    assert!(log.contains("that another fleet left on this machine"), "{log}");
    hosts[2].sh("systemctl restart fleetd.service")?.ok()?;
    assert_eq!(running(fleet, units)?, before, "nobody has said what is wanted: units go on");

    until("all machines are there", || {
        Ok(fleet.ctl("list-machines --no-legend")?.stdout.lines().count() == 3)
    })?;
    type_block(&hosts[0], &hand_over)?;
    until("each is where and what it was", || {
        let list = fleet.ok("list-unit-files --no-legend --full --fields=unit,dstate,state,target")?;
        let states = fleet.ok("list-units --no-legend --full --fields=unit,machine,active")?;
        Ok(units.iter().all(|unit| {
            let line = |table: &str, rest: String| {
                table.lines().any(|line| {
                    line.split_whitespace().collect::<Vec<_>>().join(" ") == format!("{} {rest}", unit.name)
                })
            };
            let place = |host: &Host| format!("{}/{}", host.machine_id(), host.ip());
            match unit.host.map(|host| place(&hosts[host])) {
                Some(place) => {
                    line(&list, format!("{0} {0} {place}", unit.desired))
                        && (!runs(unit) || line(&states, format!("{place} active")))
                }
                None if runs(unit) => {
                    hosts.iter().all(|host| line(&states, format!("{} active", place(host))))
                }
                None => line(&list, format!("{0} {0} -", unit.desired)),
            }
        }))
    })?;
    assert_eq!(running(fleet, units)?, before, "adopted without a restart");

    // From now on they are as any other: also over restarts, and until the end.
    hosts[1].sh("systemctl restart fleetd.service")?.ok()?;
    until("it is back", || Ok(fleet.ctl("list-machines --no-legend")?.stdout.lines().count() == 3))?;
    assert_eq!(running(fleet, units)?, before);
    let names: Vec<_> = units.iter().map(|unit| unit.name).collect();
    fleet.ok(&format!("destroy {}", names.join(" ")))?;
    for host in hosts {
        let left = host
            .sh("ls /run/fleet/units; find /run/systemd/system -lname '/run/fleet/units/*'")?
            .ok()?
            .stdout;
        assert_eq!(left, "", "nothing is left on {}", host.name());
    }
    Ok(())
}

/// Three machines as fleet 1.0 leaves them, and what the first step of the document wrote down.
fn left_by_the_original(name: &str) -> Result<(Fleet, Vec<Old>)> {
    let fleet = machines(name)?;
    let hosts = fleet.cluster.hosts();
    let units = units(hosts);
    let (mut list, mut ids) = (String::new(), String::new());
    hosts[0].sh("mkdir -p /root/move/units")?.ok()?;
    for unit in &units {
        let targets: Vec<&Host> = match unit.host {
            Some(host) => vec![&hosts[host]],
            None if runs(unit) => hosts.iter().collect(),
            None => vec![],
        };
        let target = match targets[..] {
            [] => "-".to_owned(),
            [host] => format!("{}/{}", host.machine_id(), host.ip()),
            _ => "global".to_owned(),
        };
        list += &format!("{}\t{}\t{target}\n", unit.name, unit.desired);
        hosts[0].write(format!("/root/move/units/{}", unit.name), &unit.text)?;
        for host in targets {
            // The file in the units directory, LinkUnitFiles(runtime), EnableUnitFiles(runtime) where it has [Install]; then the start.
            let path = format!("/run/fleet/units/{}", unit.name);
            host.write(&path, &unit.text)?;
            host.run(["systemctl", "link", "--runtime", "--quiet", &path])?.ok()?;
            if unit.text.contains("[Install]") {
                host.run(["systemctl", "enable", "--runtime", "--quiet", &path])?.ok()?;
            }
        }
    }
    for host in hosts {
        ids += &format!("{}\n", host.machine_id());
        host.run(["systemctl", "daemon-reload"])?.ok()?;
        // Its service, which its end leaves as it is.
        host.write(
            "/etc/systemd/system/fleet.service",
            "[Service]\nExecStart=/bin/sleep infinity\nRestart=always\nRestartSec=10s\n",
        )?;
        host.write("/etc/systemd/system/fleet.socket", "[Socket]\nListenStream=/var/run/fleet.sock\n")?;
        host.sh("systemctl start fleet.socket fleet.service")?.ok()?;
    }
    for unit in units.iter().filter(|unit| runs(unit)) {
        let there = hosts.iter().enumerate().filter(|(index, _)| unit.host.is_none_or(|host| host == *index));
        for (_, host) in there {
            host.run(["systemctl", "start", unit.name])?.ok()?;
        }
    }
    hosts[0].write("/root/move/list", list)?;
    hosts[0].write("/root/move/machines", ids)?;
    Ok((fleet, units))
}

#[test]
fn units_of_fleet_1_0_go_on_on_machines_that_join() -> Result<()> {
    let (fleet, units) = left_by_the_original("move")?;
    take_over(&fleet, &units, Layout::Joined, true)
}

#[test]
fn units_of_fleet_1_0_go_on_with_the_same_fleet_conf() -> Result<()> {
    let (fleet, units) = left_by_the_original("moveetcd")?;
    let _etcd = etcd(&fleet.cluster, &[])?;
    take_over(&fleet, &units, Layout::Etcd, true)
}
