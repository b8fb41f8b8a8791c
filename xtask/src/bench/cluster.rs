//! Three machines: a start on another machine, many units on all, and the death of one.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fleet_testbed::{Cluster, Host, Options};

use super::{Figure, SINGLES, TIMING, measure, median};
use crate::steps::progress;

const HOSTS: usize = 3;
/// Units on all machines together, and rounds.
const UNITS: usize = 1000;
const ROUNDS: usize = 3;
/// Units on the machine that dies.
const LOST: usize = 300;
/// For how long machines count as there after their last sign of life: a short time, and the default.
const TTLS: [u64; 2] = [3, 30];
/// What a failover may take beyond that.
const BEYOND: f64 = 2.0;
const PATIENCE: Duration = Duration::from_secs(120);

pub(super) fn run(bin_dir: &Path) -> Result<Vec<Figure>> {
    let cluster = progress("Booting three hosts", || up(bin_dir, TTLS[0]))?;
    let mut figures = vec![
        progress(&format!("{SINGLES} single starts each on another machine"), || remote(&cluster))?,
        progress(&format!("{ROUNDS} rounds of {UNITS} units each on three machines"), || many(&cluster))?,
        progress(&format!("The death of a machine with {LOST} units"), || death(&cluster, TTLS[0]))?,
    ];
    cluster.down()?;
    let cluster = progress("Booting three hosts", || up(bin_dir, TTLS[1]))?;
    figures
        .push(progress(&format!("The death of a machine with {LOST} units"), || death(&cluster, TTLS[1]))?);
    cluster.down()?;
    Ok(figures)
}

/// Hosts whose first is the server; the others have joined.
fn up(bin_dir: &Path, ttl: u64) -> Result<Cluster> {
    let cluster = Cluster::up(Options::for_test("bench", HOSTS).fleet(bin_dir))?;
    let server = cluster.host(0);
    let conf = format!("agent_ttl=\"{ttl}s\"\n");
    server.write("/etc/fleet/fleet.conf", format!("listen=\"*\"\n{conf}"))?;
    server.start_fleet()?;
    let token = server.run(["fleetctl", "join-token", "create"])?.ok()?.stdout;
    for host in &cluster.hosts()[1..] {
        let join = format!("join=\"{}\"\njoin_token=\"{}\"\n{conf}", server.ip(), token.trim());
        host.write("/etc/fleet/fleet.conf", join)?;
        host.start_fleet()?;
    }
    for host in cluster.hosts() {
        host.write("/root/timing", TIMING)?;
    }
    until(server, &format!("{HOSTS} machines"), "fleetctl list-machines --no-legend | wc -l", |n| {
        n == HOSTS
    })?;
    Ok(cluster)
}

/// Runs a script after [`TIMING`]; its times are taken by somebody else.
fn script(host: &Host, script: &str) -> Result<()> {
    measure(host, script).map(drop)
}

/// Runs a script that prints a number until it prints the right one.
fn until(host: &Host, what: &str, script: &str, right: impl Fn(usize) -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let number: usize = host.sh(script)?.ok()?.stdout.trim().parse().context("not a number")?;
        if right(number) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "waiting for {what}: {number} after {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// One new unit on another machine, alternately by that machine's systemctl and by the server's fleetctl.
fn remote(cluster: &Cluster) -> Result<Figure> {
    let (server, other) = (cluster.host(0), cluster.host(1));
    let (mut floor, mut fleet) = (Vec::new(), Vec::new());
    for i in 1..=SINGLES {
        let times = measure(
            other,
            &format!(
                "unit /run/systemd/system/floor-{i}.service
                t floor systemctl start floor-{i}.service"
            ),
        )?;
        floor.extend(times("floor"));
        let times = measure(
            server,
            &format!(
                "cd /root; unit one-{i}.service
                printf '[X-Fleet]\\nMachineID={}\\n' >>one-{i}.service
                t fleet fleetctl start one-{i}.service",
                other.machine_id()
            ),
        )?;
        fleet.extend(times("fleet"));
    }
    let active = other.sh("systemctl list-units --no-legend --state=active 'one-*' | wc -l")?.ok()?.stdout;
    ensure!(active.trim() == SINGLES.to_string(), "{} of {SINGLES} units run there", active.trim());
    other.sh("systemctl stop 'floor-*.service'; rm /run/systemd/system/floor-*.service")?.ok()?;
    server.sh("fleetctl destroy one-*.service >/dev/null 2>&1")?.ok()?;
    let (floor, fleet) = (median(floor)?, median(fleet)?);
    Ok(Figure {
        name: "fleetctl start of one new unit on another machine".into(),
        detail: format!("median {:.1} ms; systemctl start there {:.1} ms", fleet * 1e3, floor * 1e3),
        value: fleet / floor,
        budget: 1.5,
        unit: " x systemctl",
    })
}

/// Many new units. The floor: the same files, on each machine its share with one systemctl start, all machines at
/// the same time.
fn many(cluster: &Cluster) -> Result<Figure> {
    let server = cluster.host(0);
    let (mut floor, mut fleet) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let shares: Vec<usize> =
            (0..HOSTS).map(|host| UNITS / HOSTS + usize::from(host < UNITS % HOSTS)).collect();
        for (host, share) in cluster.hosts().iter().zip(&shares) {
            script(
                host,
                &format!(
                    "for i in $(seq {share}); do unit /run/systemd/system/floor-{round}-$i.service; done"
                ),
            )?;
        }
        let start = Instant::now();
        std::thread::scope(|scope| {
            let starts: Vec<_> = cluster
                .hosts()
                .iter()
                .map(|host| {
                    scope.spawn(move || {
                        script(
                            host,
                            &format!(
                                "t floor systemctl start $(cd /run/systemd/system; ls -d floor-{round}-*.service)"
                            ),
                        )
                    })
                })
                .collect();
            starts
                .into_iter()
                .try_for_each(|start| start.join().unwrap_or_else(|_| bail!("a start broke off")))
        })?;
        floor.push(start.elapsed().as_secs_f64());
        for host in cluster.hosts() {
            host.sh(&format!(
                "systemctl stop 'floor-{round}-*.service'; rm /run/systemd/system/floor-{round}-*.service"
            ))?
            .ok()?;
        }
        script(
            server,
            &format!(
                "mkdir -p /root/many; cd /root/many; for i in $(seq {UNITS}); do unit many-{round}-$i.service; done"
            ),
        )?;
        let start = Instant::now();
        let names = format!("cd /root/many; t fleet fleetctl start $(ls many-{round}-*.service)");
        script(server, &names)?;
        fleet.push(start.elapsed().as_secs_f64());
        let mut active = 0;
        for host in cluster.hosts() {
            let count = host
                .sh(&format!("systemctl list-units --no-legend --state=active 'many-{round}-*' | wc -l"))?
                .ok()?
                .stdout;
            active += count.trim().parse::<usize>()?;
        }
        ensure!(active == UNITS, "{active} of {UNITS} units run when fleetctl says that all do");
        server
            .sh(&format!("cd /root/many; fleetctl destroy many-{round}-*.service >/dev/null 2>&1"))?
            .ok()?;
        for host in cluster.hosts() {
            until(host, "no unit left", "ls /run/fleet/units | wc -l", |n| n == 0)?;
        }
    }
    let (floor, fleet) = (median(floor)?, median(fleet)?);
    Ok(Figure {
        name: format!("{UNITS} new units on {HOSTS} machines until active"),
        detail: format!("median {fleet:.2} s; systemctl start on all three at once {floor:.2} s"),
        value: fleet / floor,
        budget: 1.1,
        unit: " x systemctl",
    })
}

/// The time from the death of a machine until all its units run elsewhere. They run there when the machines that live say so.
fn death(cluster: &Cluster, ttl: u64) -> Result<Figure> {
    let (server, dying) = (cluster.host(0), cluster.host(2));
    // All units begin on one machine, by metadata that only it has; which is taken away from none when the others get it.
    let mut edits = String::new();
    write!(edits, "fleetctl machine metadata {} role=worker", dying.machine_id())?;
    server.sh(&edits)?.ok()?;
    script(
        server,
        &format!(
            "mkdir -p /root/lost; cd /root/lost
            for i in $(seq {LOST}); do unit lost-$i.service; printf '[X-Fleet]\\nMachineMetadata=role=worker\\n' >>lost-$i.service; done
            fleetctl start $(ls) >/dev/null"
        ),
    )?;
    for host in &cluster.hosts()[..2] {
        server.sh(&format!("fleetctl machine metadata {} role=worker", host.machine_id()))?.ok()?;
    }
    until(dying, "all units on one machine", &count("lost-*"), |n| n == LOST)?;
    let start = Instant::now();
    dying.kill()?;
    let end = start + Duration::from_secs(ttl) + PATIENCE;
    loop {
        let mut active = 0;
        for host in &cluster.hosts()[..2] {
            active += host.sh(&count("lost-*"))?.ok()?.stdout.trim().parse::<usize>()?;
        }
        if active == LOST {
            break;
        }
        ensure!(Instant::now() < end, "{active} of {LOST} units run elsewhere");
        // Looking costs the processors that the starts need.
        std::thread::sleep(Duration::from_millis(100));
    }
    let took = start.elapsed().as_secs_f64();
    Ok(Figure {
        name: format!("{LOST} units of a dead machine active elsewhere, agent_ttl {ttl} s"),
        detail: format!("{took:.2} s after its power went"),
        value: took,
        budget: Duration::from_secs(ttl).as_secs_f64() + BEYOND,
        unit: " s",
    })
}

fn count(pattern: &str) -> String {
    format!("systemctl list-units --plain --no-legend --state=active '{pattern}' | wc -l")
}
