//! How much a cluster asks of etcd, by etcd's own count: many units started on three machines, and nothing at all.
//!
//! What counts are the calls of etcd's API that write: transactions, puts and deletions (`grpc_server_handled_total`). Beside them
//! stands how many entries etcd had to agree on and sync to its disks (`etcd_server_proposals_applied_total`): that is what the
//! API v2 of fleet 1.0 can be compared by. Renewals of leases are neither.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fleet_testbed::{Cluster, Etcd, EtcdOptions, Host, Options};

use super::{Figure, IDLE, TIMING, measure};
use crate::steps::progress;

const HOSTS: usize = 3;
const UNITS: usize = 1000;
/// Transactions for a hundred units.
const BUDGET: f64 = 3.0;
const PATIENCE: Duration = Duration::from_secs(120);
/// fleet 1.0 takes its time.
const ORIGINAL_PATIENCE: Duration = Duration::from_secs(1800);
/// The variable that names the directory with fleetd and fleetctl of fleet 1.0.
pub(super) const ORIGINAL: &str = "FLEET_ORIGINAL_DIR";

/// Which machines are servers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// Each, with the same fleet.conf.
    Classic,
    /// The first one; the others joined it.
    OneServer,
    /// Each has a fleetd of fleet 1.0.
    Original,
}

/// Calls that write, and what etcd had to agree on.
struct Load {
    calls: BTreeMap<String, f64>,
    entries: f64,
}

impl Load {
    fn of(etcd: &Etcd) -> Result<Load> {
        let (mut calls, mut entries) = (BTreeMap::new(), 0.0);
        let text = etcd.metrics(0)?;
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let Some((name, value)) = line.rsplit_once(' ') else { continue };
            if name == "etcd_server_proposals_applied_total" {
                entries = value.parse()?;
            }
            // Streams, as those for watches and renewals, are counted by their messages.
            let one = name.starts_with("grpc_server_handled_total{") && name.contains("grpc_type=\"unary\"");
            if one || name.starts_with("grpc_server_msg_received_total{grpc_method=\"LeaseKeepAlive\"") {
                let method = name.split("grpc_method=\"").nth(1).and_then(|rest| rest.split('"').next());
                let method = method.with_context(|| format!("etcd counts {name}"))?;
                *calls.entry(method.to_owned()).or_insert(0.0) += value.parse::<f64>()?;
            }
        }
        ensure!(entries > 0.0, "etcd counts nothing");
        Ok(Load { calls, entries })
    }

    /// What came since.
    fn since(&self, before: &Load) -> Load {
        let grown = self.calls.iter().map(|(method, count)| {
            (method.clone(), count - before.calls.get(method).copied().unwrap_or(0.0))
        });
        Load {
            calls: grown.filter(|(_, count)| *count > 0.0).collect(),
            entries: self.entries - before.entries,
        }
    }

    fn writes(&self) -> f64 {
        ["Txn", "Put", "DeleteRange"].iter().filter_map(|method| self.calls.get(*method)).sum()
    }

    fn told(&self) -> String {
        let calls: Vec<_> = self.calls.iter().map(|(method, count)| format!("{method} {count}")).collect();
        let calls = if calls.is_empty() { "no call".to_owned() } else { calls.join(", ") };
        format!("{calls}; {} entries agreed on", self.entries)
    }
}

pub(super) fn run(bin_dir: &Path) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (layout, name) in [(Layout::Classic, "three servers"), (Layout::OneServer, "one server, two agents")]
    {
        let (cluster, etcd) = progress(&format!("Booting {name}"), || up(bin_dir, layout))?;
        figures.push(progress(&format!("{} s of doing nothing", IDLE.as_secs()), || idle(&etcd, name))?);
        let load = progress(&format!("{UNITS} new units"), || many(&cluster, &etcd, layout))?;
        figures.push(Figure {
            name: format!("transactions in etcd for 100 of {UNITS} new units, {name}"),
            detail: load.told(),
            value: load.writes() * 100.0 / UNITS as f64,
            budget: BUDGET,
            unit: "",
        });
        figures.push(progress(&format!("{} s of {UNITS} units running", IDLE.as_secs()), || {
            idle(&etcd, &format!("{name}, {UNITS} units"))
        })?);
        cluster.down()?;
    }
    if let Some(directory) = std::env::var_os(ORIGINAL) {
        // What it can't do is no reason to say nothing of this fleet.
        if let Err(error) = original(Path::new(&directory)) {
            println!("\nfleet 1.0 could not be measured: {error:#}");
        }
    } else {
        println!("\n{ORIGINAL}=DIRECTORY, with fleetd and fleetctl of fleet 1.0, has these measured, too.");
    }
    Ok(figures)
}

fn original(directory: &Path) -> Result<()> {
    let (cluster, etcd) = progress("Booting three servers of fleet 1.0", || up(directory, Layout::Original))?;
    let before = Load::of(&etcd)?;
    let start = Instant::now();
    let load = progress(&format!("{UNITS} new units"), || many(&cluster, &etcd, Layout::Original))?;
    println!(
        "\nfleet 1.0: {:.2} entries for 100 of {UNITS} new units, in {} s\n    {}; {} before",
        load.entries * 100.0 / UNITS as f64,
        start.elapsed().as_secs(),
        load.told(),
        before.entries
    );
    cluster.down()
}

fn up(bin_dir: &Path, layout: Layout) -> Result<(Cluster, Etcd)> {
    let cluster = Cluster::up(Options::for_test("bench", HOSTS).fleet(bin_dir))?;
    let arguments = if layout == Layout::Original { vec!["--enable-v2".to_owned()] } else { Vec::new() };
    let etcd =
        Etcd::start_with(EtcdOptions { members: 1, tls: None, arguments }, &[cluster.gateway().parse()?])?;
    let conf = format!("etcd_servers=[\"{}\"]\n", etcd.endpoint(0));
    let server = cluster.host(0);
    for host in cluster.hosts() {
        host.write("/root/timing", TIMING)?;
        if layout == Layout::OneServer && host.name() != server.name() {
            continue;
        }
        host.write("/etc/fleet/fleet.conf", &conf)?;
        if layout == Layout::Original {
            // It does not tell systemd when it is ready.
            host.write(
                "/etc/systemd/system/fleetd.service.d/original.conf",
                "[Service]\nType=simple\nWatchdogSec=0\nExecReload=\nExecStart=\nExecStart=/usr/bin/fleetd --config /etc/fleet/fleet.conf\n",
            )?;
            host.run(["systemctl", "daemon-reload"])?.ok()?;
        }
        host.start_fleet()?;
    }
    if layout == Layout::OneServer {
        let token = server.run(["fleetctl", "join-token", "create"])?.ok()?.stdout;
        for host in &cluster.hosts()[1..] {
            let join = format!("join=\"{}\"\njoin_token=\"{}\"\n", server.ip(), token.trim());
            host.write("/etc/fleet/fleet.conf", join)?;
            host.start_fleet()?;
        }
    }
    until(server, "fleetctl list-machines --no-legend 2>/dev/null | wc -l", HOSTS, PATIENCE)?;
    Ok((cluster, etcd))
}

fn until(host: &Host, script: &str, number: usize, patience: Duration) -> Result<()> {
    let end = Instant::now() + patience;
    loop {
        let now = host.sh(script)?.stdout.trim().to_owned();
        if now == number.to_string() {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{script}: {now}, not {number}, after {} s", patience.as_secs());
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What many units cost until all run and nothing more is said of it.
fn many(cluster: &Cluster, etcd: &Etcd, layout: Layout) -> Result<Load> {
    let patience = if layout == Layout::Original { ORIGINAL_PATIENCE } else { PATIENCE };
    let server = cluster.host(0);
    measure(
        server,
        &format!(
            "mkdir -p /root/many; cd /root/many; for i in $(seq {UNITS}); do unit many-$i.service; done"
        ),
    )
    .map(drop)?;
    let before = Load::of(etcd)?;
    let script = "cd /root/many && fleetctl start $(ls) >/dev/null";
    let end = Instant::now() + patience;
    let started = server.command(["/bin/bash", "-c", script]).deadline(patience).run()?;
    if layout != Layout::Original {
        started.ok()?;
    }
    // The fleetctl of 1.0 gives up when states are not there in 2 s; its fleetd goes on.
    while layout == Layout::Original && active(cluster)? < UNITS && Instant::now() < end {
        std::thread::sleep(Duration::from_secs(1));
    }
    let active = active(cluster)?;
    ensure!(active == UNITS, "{active} of {UNITS} units run when fleetctl says that all do");
    settle(etcd)?;
    Ok(Load::of(etcd)?.since(&before))
}

/// How many of the units run.
fn active(cluster: &Cluster) -> Result<usize> {
    let count = "systemctl list-units --plain --no-legend --state=active 'many-*' | wc -l";
    let of = |host: &Host| Ok(host.sh(count)?.ok()?.stdout.trim().parse::<usize>()?);
    cluster.hosts().iter().map(of).sum()
}

/// Waits until nothing was written for some seconds.
fn settle(etcd: &Etcd) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut before = Load::of(etcd)?;
    while Instant::now() < end {
        std::thread::sleep(Duration::from_secs(8));
        let now = Load::of(etcd)?;
        if now.writes() == before.writes() {
            return Ok(());
        }
        before = now;
    }
    bail!("etcd is written to without end: {}", before.told())
}

/// Everything but renewals while nothing happens.
fn idle(etcd: &Etcd, name: &str) -> Result<Figure> {
    settle(etcd)?;
    let before = Load::of(etcd)?;
    std::thread::sleep(IDLE);
    let load = Load::of(etcd)?.since(&before);
    let renewals = load.calls.get("LeaseKeepAlive").copied().unwrap_or(0.0);
    Ok(Figure {
        name: format!(
            "calls of etcd but renewals of leases in {} s of doing nothing, {name}",
            IDLE.as_secs()
        ),
        detail: load.told(),
        value: load.calls.values().sum::<f64>() - renewals,
        budget: 0.0,
        unit: "",
    })
}
