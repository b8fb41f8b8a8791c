//! `cargo xtask bench`: speed as a ratio to a floor of the same run, against the budgets.
//!
//! The pure parts bring their own benchmarks as examples of their crates; end to end is measured here, on
//! a booted host, each figure beside what systemd alone takes for the same work.

mod cluster;
mod etcd;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use fleet_testbed::{Cluster, Host, Options};

use crate::packages;
use crate::steps::{cargo, progress, run as run_command, step, target_dir};

/// Single starts that the median is taken of.
const SINGLES: usize = 21;
/// Units in one batch, and how many batches.
const BATCH: usize = 300;
const ROUNDS: usize = 3;
/// How long the daemon is watched doing nothing.
const IDLE: Duration = Duration::from_secs(30);

/// What `bench` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these (all unless given)
    what: Vec<What>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// The placement of many units on many machines, pure
    Placement,
    /// Commits to the embedded registry
    Commits,
    /// fleetctl and fleetd against systemctl, on a booted host
    E2e,
    /// The same on three machines, and the death of one
    Cluster,
    /// Many simulated agents on one server
    Agents,
    /// What a cluster asks of etcd, and fleet 1.0 beside it if FLEET_ORIGINAL_DIR has its programs
    Etcd,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let wanted = |what| args.what.is_empty() || args.what.contains(&what);
    if wanted(What::Placement) {
        step("placement", || example("fleet-cluster", "placement", &[]))?;
    }
    if wanted(What::Commits) {
        // On the disk that is built on, not in memory.
        let target = target_dir()?.to_string_lossy().into_owned();
        step("commits", || example("fleet-registry", "commits", &[&target]))?;
    }
    if wanted(What::E2e) {
        step("packages", packages::ensure)?;
        step("end to end", end_to_end)?;
    }
    if wanted(What::Cluster) {
        step("packages", packages::ensure)?;
        step("three machines", || report(&cluster::run(&release()?)?))?;
    }
    if wanted(What::Etcd) {
        step("packages", packages::ensure)?;
        step("load on etcd", || report(&etcd::run(&release()?)?))?;
    }
    if wanted(What::Agents) {
        step("packages", packages::ensure)?;
        step("many agents", || example("fleet-e2e", "agents", &[&release()?.to_string_lossy()]))?;
    }
    Ok(())
}

fn example(package: &str, name: &str, args: &[&str]) -> Result<()> {
    let mut command = cargo(&["run", "--release", "--quiet", "-p", package, "--example", name, "--"]);
    command.args(args);
    run_command(command)
}

/// A figure and what it may be.
struct Figure {
    name: String,
    detail: String,
    value: f64,
    budget: f64,
    unit: &'static str,
}

/// Builds what is measured, and says where it is; `FLEET_BIN_DIR` names something else.
fn release() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("FLEET_BIN_DIR") {
        return Ok(directory.into());
    }
    run_command(cargo(&["build", "--release", "-p", "fleetd", "-p", "fleetctl"]))?;
    Ok(target_dir()?.join("release"))
}

fn end_to_end() -> Result<()> {
    let bin_dir = release()?;
    let cluster = progress("Booting a host", || Cluster::up(Options::for_test("bench", 1).fleet(&bin_dir)))?;
    let host = cluster.host(0);
    host.start_fleet()?;
    host.write("/root/timing", TIMING)?;

    let mut figures = Vec::new();
    figures.push(progress(&format!("{SINGLES} single starts each"), || singles(host))?);
    figures.push(progress(&format!("{ROUNDS} rounds of {BATCH} units each"), || batches(host))?);
    figures.extend(progress(&format!("{} s of doing nothing", IDLE.as_secs()), || idle(host))?);
    report(&figures)
}

/// Prints figures; an error names those over their budgets.
fn report(figures: &[Figure]) -> Result<()> {
    let mut over = Vec::new();
    println!();
    for figure in figures {
        let Figure { name, detail, value, budget, unit } = figure;
        let within = value <= budget;
        println!(
            "{name}: {value:.2}{unit} (budget {budget}{unit}){}\n    {detail}",
            if within { "" } else { "  OVER BUDGET" }
        );
        if !within {
            over.push(name.as_str());
        }
    }
    ensure!(over.is_empty(), "over budget: {}", over.join(", "));
    Ok(())
}

/// Shell that measures inside the host, so that entering it counts for nobody: `t NAME CMD…` prints
/// NAME and microseconds. `unit NAME` writes a trivial unit file.
const TIMING: &str = r#"
t() {
    local name=$1 s e
    shift
    s=${EPOCHREALTIME/./}
    "$@" >/tmp/out 2>&1 || { cat /tmp/out >&2; exit 1; }
    e=${EPOCHREALTIME/./}
    echo "$name $((e - s))"
}
unit() {
    printf '[Unit]\nDescription=Trivial\n\n[Service]\nExecStart=/bin/sleep infinity\n' >"$1"
}
"#;

/// Runs a script after [`TIMING`], and returns the seconds it printed under a name.
fn measure(host: &Host, script: &str) -> Result<impl Fn(&str) -> Vec<f64> + use<>> {
    let script = format!("set -e\n. /root/timing\n{script}");
    let output = host.command(["/bin/bash", "-c", &script]).deadline(Duration::from_secs(300)).run()?.ok()?;
    Ok(move |name: &str| {
        let lines = output.stdout.lines().filter_map(|line| line.split_once(' '));
        lines
            .filter(|(n, _)| *n == name)
            .filter_map(|(_, us)| us.parse::<f64>().ok())
            .map(|us| us / 1e6)
            .collect()
    })
}

/// One new trivial unit until it is active, alternately by systemctl and by fleetctl.
fn singles(host: &Host) -> Result<Figure> {
    let times = measure(
        host,
        &format!(
            "mkdir -p /root/singles; cd /root/singles
            for i in $(seq {SINGLES}); do
                unit /run/systemd/system/floor-$i.service
                t floor systemctl start floor-$i.service
                unit one-$i.service
                t fleet fleetctl start one-$i.service
                [ \"$(systemctl is-active one-$i.service)\" = active ]
            done
            systemctl stop 'floor-*.service'
            rm /run/systemd/system/floor-*.service
            fleetctl destroy one-*.service >/dev/null 2>&1"
        ),
    )?;
    let (floor, fleet) = (median(times("floor"))?, median(times("fleet"))?);
    Ok(Figure {
        name: "fleetctl start of one new unit".into(),
        detail: format!("median {:.1} ms; systemctl start {:.1} ms", fleet * 1e3, floor * 1e3),
        value: fleet / floor,
        budget: 1.5,
        unit: " x systemctl",
    })
}

/// Many new units with one command each. The last round's stay, for [`idle`].
fn batches(host: &Host) -> Result<Figure> {
    let times = measure(
        host,
        &format!(
            "mkdir -p /root/batch; cd /root/batch
            for r in $(seq {ROUNDS}); do
                for i in $(seq {BATCH}); do unit /run/systemd/system/floor-$r-$i.service; unit many-$r-$i.service; done
                t floor systemctl start $(cd /run/systemd/system; ls -d floor-$r-*.service)
                systemctl stop \"floor-$r-*.service\"
                rm /run/systemd/system/floor-$r-*.service
                t fleet fleetctl start many-$r-*.service
                [ $(systemctl list-units --no-legend --state=active \"many-$r-*\" | wc -l) = {BATCH} ]
                [ $r = {ROUNDS} ] || fleetctl destroy many-$r-*.service >/dev/null 2>&1
            done"
        ),
    )?;
    let (floor, fleet) = (median(times("floor"))?, median(times("fleet"))?);
    Ok(Figure {
        name: format!("{BATCH} new units until active"),
        detail: format!("median {fleet:.2} s; one systemctl start {floor:.2} s"),
        value: fleet / floor,
        budget: 1.1,
        unit: " x systemctl",
    })
}

/// CPU time and memory of the daemon while nothing changes, with the last batch running.
fn idle(host: &Host) -> Result<[Figure; 2]> {
    let pid = host.run(["systemctl", "show", "--value", "-p", "MainPID", "fleetd.service"])?.ok()?;
    let pid = pid.stdout.trim().to_owned();
    // User and system time of all threads, those that ended too, in ticks of 10 ms.
    let cpu = || -> Result<f64> {
        let stat = host.read(format!("/proc/{pid}/stat"))?;
        // The second field is the program's name in brackets and may hold anything.
        let fields =
            stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().skip(11).take(2);
        let ticks: Vec<u32> = fields.map(str::parse).collect::<Result<_, _>>()?;
        ensure!(ticks.len() == 2, "the kernel says nothing of fleetd's times");
        Ok(f64::from(ticks[0] + ticks[1]) / 100.0)
    };
    let before = cpu()?;
    std::thread::sleep(IDLE);
    let used = cpu()? - before;
    let status = host.read(format!("/proc/{pid}/status"))?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_ascii_whitespace().next());
    let rss: f64 = rss.context("the kernel names no VmRSS")?.parse()?;
    Ok([
        Figure {
            name: "idle CPU of fleetd".into(),
            detail: format!("{:.0} ms in {} s, {BATCH} units running", used * 1e3, IDLE.as_secs()),
            value: used / IDLE.as_secs_f64() * 100.0,
            budget: 0.1,
            unit: " % of a core",
        },
        Figure {
            name: "memory of fleetd".into(),
            detail: format!("resident, {BATCH} units running"),
            value: rss / 1024.0,
            budget: 20.0,
            unit: " MB",
        },
    ])
}

fn median(mut values: Vec<f64>) -> Result<f64> {
    values.sort_by(f64::total_cmp);
    let Some(middle) = values.get(values.len() / 2) else { bail!("nothing was measured") };
    Ok(*middle)
}
