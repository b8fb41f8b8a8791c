//! The tutorial of fleet 1.0, typed as it stands on one host, each answer checked.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fleet_testbed::{Host, Signal};

use super::session::{Session, contains, table};

/// The tutorial's unit, and its hash as `list-unit-files` shows it.
pub(super) const UNIT: &str = "hello.service";
const HASH: &str = "0d1c468";
/// How long the container's first words may take to arrive in the journal.
const FIRST_WORDS: Duration = Duration::from_secs(60);

/// Types the tutorial; `metadata` is the host's, as tables show it.
pub(super) fn run(host: &Host, metadata: &str) -> Result<()> {
    let session = Session { host, prompt: "" };
    let id = format!("{}...", &host.machine_id()[..8]);
    let place = format!("{id}/{}", host.ip());
    let files = ["UNIT", "HASH", "DSTATE", "STATE", "TMACHINE"];
    let units = ["UNIT", "MACHINE", "ACTIVE", "SUB"];

    session.says("fleetctl version", "fleetctl version ")?;
    session.says("fleetctl help", "list-unit-files")?;
    session.says("fleetctl help start", "start")?;
    session.check("fleetctl list-machines", |o| {
        table(&o.stdout, &["MACHINE", "IP", "METADATA"], &[&[&id, host.ip(), metadata]])
    })?;

    let text = host.read(format!("/root/{UNIT}"))?;
    session.check(&format!("cat {UNIT}"), |o| contains(&o.stdout, "/usr/bin/docker pull busybox"))?;
    session.says(&format!("fleetctl submit {UNIT}"), &format!("Unit {UNIT} inactive"))?;
    session.check(&format!("fleetctl submit {UNIT}"), |o| {
        ensure!(o.stdout.is_empty(), "submitting the same again must change nothing");
        Ok(())
    })?;
    session.check("fleetctl list-unit-files", |o| {
        table(&o.stdout, &files, &[&[UNIT, HASH, "inactive", "inactive", "-"]])
    })?;
    session.check(&format!("fleetctl cat {UNIT}"), |o| {
        ensure!(o.stdout == text, "it is not the file, byte for byte");
        Ok(())
    })?;
    // Without effect since fleet 1.0, which says so and ends with 2.
    session.ends(&format!("fleetctl verify {UNIT}"), 2)?;

    session.says(&format!("fleetctl load {UNIT}"), &format!("Unit {UNIT} loaded on {place}"))?;
    session
        .check("fleetctl list-units", |o| table(&o.stdout, &units, &[&[UNIT, &place, "inactive", "dead"]]))?;

    session.says(&format!("fleetctl start {UNIT}"), &format!("Unit {UNIT} launched on {place}"))?;
    session.check("fleetctl list-units", |o| {
        table(&o.stdout, &units, &[&[UNIT, &place, "active", "running"]])
    })?;
    session.check("fleetctl list-unit-files", |o| {
        table(&o.stdout, &files, &[&[UNIT, HASH, "launched", "launched", &place]])
    })?;
    session.check(&format!("fleetctl status {UNIT}"), |o| {
        contains(&o.stdout, "hello.service; linked-runtime")?;
        contains(&o.stdout, "Active: active (running)")
    })?;

    follow(host)?;
    session.says(&format!("fleetctl journal {UNIT}"), "Hello World")?;
    session.check(&format!("fleetctl journal --lines 2 {UNIT}"), |o| {
        let lines = o.stdout.lines().filter(|line| line.contains("Hello World")).count();
        ensure!(lines <= 2, "{lines} lines, not 2");
        contains(&o.stdout, "Hello World")
    })?;

    session.says(&format!("fleetctl ssh {UNIT} hostname"), host.name())?;
    session.ends(&format!("fleetctl ssh {UNIT} exit 3"), 3)?;

    session.says(&format!("fleetctl stop {UNIT}"), &format!("Unit {UNIT} loaded on {place}"))?;
    session.check("/usr/bin/docker ps --quiet", |o| {
        ensure!(o.stdout.is_empty(), "the container still runs");
        Ok(())
    })?;
    session.says(&format!("fleetctl unload {UNIT}"), &format!("Unit {UNIT} inactive"))?;
    session.says(&format!("fleetctl destroy {UNIT}"), &format!("Destroyed {UNIT}"))?;
    session.check("fleetctl list-unit-files", |o| table(&o.stdout, &files, &[]))?;
    ensure!(!host.exists(format!("/run/fleet/units/{UNIT}")), "the unit's file is still on the machine");
    Ok(())
}

/// `journal -f` until the container has spoken, then an interrupt, as Ctrl-C gives one.
fn follow(host: &Host) -> Result<()> {
    let line = format!("fleetctl journal -f {UNIT}");
    Session { host, prompt: "" }.show(&line);
    let followed = || -> Result<()> {
        let mut running = host.start_process(["fleetctl", "journal", "-f", UNIT])?;
        let end = Instant::now() + FIRST_WORDS;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Some(line) = running.read_line(left)? else {
                bail!("it ended by itself: {}", running.finish(Duration::from_secs(5))?.stderr);
            };
            println!("{line}");
            if line.contains("Hello World") {
                break;
            }
        }
        running.signal(Signal::INT)?;
        running.finish(Duration::from_secs(10))?;
        println!("^C\n");
        Ok(())
    };
    followed().with_context(|| format!("`{line}` did not give what it should"))
}
