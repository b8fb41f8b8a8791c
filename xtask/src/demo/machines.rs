//! Three hosts as one cluster: joining, placement by [X-Fleet], and what becomes of the units when a machine dies.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fleet_testbed::{Cluster, Host};

use super::session::{Session, contains};
use crate::steps::{progress, root};

/// For how long a machine counts as alive after its last sign of life: shorter than the default of 30 s, since people watch.
const TTL: &str = "5s";
/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(90);
/// The unit files that are typed about, and where they come from.
const FILES: [&str; 4] = ["watch.service", "web@.service", "db.service", "backup.service"];

/// Prepares the server's fleet.conf: other machines may join it.
pub(super) fn configure(host: &Host) -> Result<()> {
    host.sh(&format!("printf 'listen=\"*\"\\nagent_ttl=\"{TTL}\"\\n' >> /etc/fleet/fleet.conf"))?.ok()?;
    Ok(())
}

/// Where units run: pairs of unit and machine of those that systemd calls active.
struct Active(Vec<(String, String)>);

impl Active {
    fn list(host: &Host) -> Result<Active> {
        let output =
            host.run(["fleetctl", "list-units", "--no-legend", "--full", "--fields=unit,machine,active"])?;
        let lines = output.ok()?.stdout;
        let rows = lines.lines().filter_map(|line| {
            let mut cells = line.split_whitespace();
            let (unit, machine, active) = (cells.next()?, cells.next()?, cells.next()?);
            let machine = machine.split('/').next().unwrap_or(machine);
            (active == "active").then(|| (unit.to_owned(), machine.to_owned()))
        });
        Ok(Active(rows.collect()))
    }

    /// The machines a unit runs on.
    fn of(&self, unit: &str) -> Vec<&str> {
        self.0.iter().filter(|(name, _)| name == unit).map(|(_, machine)| machine.as_str()).collect()
    }

    /// The one machine a unit runs on.
    fn one(&self, unit: &str) -> Result<&str> {
        match self.of(unit)[..] {
            [machine] => Ok(machine),
            ref other => bail!("{unit} runs on {} machines", other.len()),
        }
    }
}

/// Asks until something holds of the running units.
fn until(host: &Host, what: &str, holds: impl Fn(&Active) -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !holds(&Active::list(host)?) {
        ensure!(Instant::now() < end, "not within {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Types the second part of the demo.
pub(super) fn run(cluster: &Cluster, metadata: &[&str]) -> Result<()> {
    let server = cluster.host(0);
    join(cluster, metadata)?;
    for file in FILES {
        server.copy_in(root().join("examples/cluster").join(file), format!("/root/{file}"))?;
    }
    let session = Session { host: server, prompt: server.name() };
    let launched = |unit: &str| format!("Unit {unit} launched on ");

    println!("A Global unit runs on every machine:\n");
    session.check("tail -n 2 watch.service", |o| contains(&o.stdout, "Global=true"))?;
    session.says("fleetctl start watch.service", "Triggered global unit watch.service start")?;

    println!("Instances of a template that don't share a machine with each other:\n");
    session.check("tail -n 2 web@.service", |o| contains(&o.stdout, "Conflicts=web@*.service"))?;
    session.says("fleetctl start web@1 web@2 web@3", &launched("web@3.service"))?;

    println!("A unit that needs a fast disk, and one that goes where that is:\n");
    session.check("tail -n 2 db.service backup.service", |o| {
        contains(&o.stdout, "MachineMetadata=disk=ssd")?;
        contains(&o.stdout, "MachineOf=db.service")
    })?;
    session.says("fleetctl start db.service backup.service", &launched("backup.service"))?;
    session.says("fleetctl list-units", "db.service")?;

    let before = Active::list(server)?;
    ensure!(before.of("watch.service").len() == 3, "watch.service does not run on all three machines");
    let mut webs =
        vec![before.one("web@1.service")?, before.one("web@2.service")?, before.one("web@3.service")?];
    webs.sort_unstable();
    webs.dedup();
    ensure!(webs.len() == 3, "two instances of web@ share a machine");
    let home = before.one("db.service")?;
    ensure!(before.one("backup.service")? == home, "backup.service is not where db.service is");
    let dying = cluster.hosts()[1..].iter().find(|host| host.machine_id() == home);
    let dying = dying.context("db.service is on a machine without a fast disk")?;
    session.says("fleetctl journal db.service", "Started db.service")?;

    plug(cluster, dying, &before)
}

/// Lets the other hosts join with a token.
fn join(cluster: &Cluster, metadata: &[&str]) -> Result<()> {
    let server = cluster.host(0);
    let session = Session { host: server, prompt: server.name() };
    let mut token = String::new();
    session.check("fleetctl join-token create --uses 2", |o| {
        token = o.stdout.trim().to_owned();
        ensure!(token.starts_with("fleet1-"), "that is not a join token");
        Ok(())
    })?;
    for host in &cluster.hosts()[1..] {
        let session = Session { host, prompt: host.name() };
        let line = format!(
            "printf 'join=\"{}\"\\njoin_token=\"{token}\"\\n' >> /etc/fleet/fleet.conf && systemctl enable --quiet --now fleetd",
            server.ip()
        );
        session.check(&line, |_| Ok(()))?;
    }
    session.check("fleetctl list-machines", |o| {
        for (host, metadata) in cluster.hosts().iter().zip(metadata) {
            let id = &host.machine_id()[..8];
            contains(&o.stdout, &format!("{id}...\t{}\t{metadata}\n", host.ip()))?;
        }
        Ok(())
    })
}

/// Takes the power from a machine, shows where its units go, and gives it back.
fn plug(cluster: &Cluster, dying: &Host, before: &Active) -> Result<()> {
    let server = cluster.host(0);
    let session = Session { host: server, prompt: server.name() };
    let id = dying.machine_id();
    println!(
        "Now {} loses its power. {TTL} after its last sign of life it is gone for the others:\n",
        dying.name()
    );
    dying.kill()?;
    progress(&format!("Waiting for what ran on {} to arrive elsewhere", dying.name()), || {
        until(server, "db.service and backup.service run elsewhere", |now| {
            ["db.service", "backup.service"].iter().all(|unit| now.one(unit).is_ok_and(|on| on != id))
        })
    })?;
    println!();
    session.check("fleetctl list-machines", |o| {
        ensure!(!o.stdout.contains(&id[..8]), "the dead machine is still listed");
        Ok(())
    })?;
    session.says("fleetctl list-units", "db.service")?;
    let now = Active::list(server)?;
    ensure!(now.one("db.service")? == now.one("backup.service")?, "backup.service did not follow db.service");
    let webs = ["web@1.service", "web@2.service", "web@3.service"];
    let stuck = webs.into_iter().find(|unit| before.one(unit).is_ok_and(|on| on == id));
    let stuck = stuck.context("no instance of web@ ran on the machine that died")?;

    println!("{stuck} has nowhere to go while the others hold theirs, and says why:\n");
    session.says(&format!("fleetctl explain {stuck}"), "web@*.service")?;

    println!("{} gets its power back, and what waited for a machine is placed on it:\n", dying.name());
    progress(&format!("Booting {}", dying.name()), || {
        dying.boot()?;
        until(server, "what waited runs", |now| {
            now.one(stuck).is_ok_and(|on| on == id) && now.of("watch.service").len() == 3
        })
    })?;
    println!();
    session.says("fleetctl list-units", stuck)?;
    // Nothing that ran elsewhere was touched by the return.
    let back = Active::list(server)?;
    for unit in ["db.service", "backup.service"] {
        ensure!(back.one(unit)? == now.one(unit)?, "{unit} moved back although nothing asked it to");
    }
    session.says(
        "fleetctl destroy watch.service web@1 web@2 web@3 backup.service db.service",
        "Destroyed db.service",
    )
}
