//! `cargo xtask demo`: a real systemd host in a container, fleet on it as the package installs it, and
//! the tutorial typed as it stands, each answer checked.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use fleet_testbed::{Cluster, Host, Options, Output, Signal};

use crate::packages;
use crate::steps::{cargo, progress, root, run as run_command, target_dir};

/// The tutorial's unit, and its hash as `list-unit-files` shows it.
const UNIT: &str = "hello.service";
const HASH: &str = "0d1c468";
/// How long the container's first words may take to arrive in the journal.
const FIRST_WORDS: Duration = Duration::from_secs(60);

pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    packages::ensure()?;
    fleet_testbed::check_prerequisites()?;
    let terminal = std::io::stdout().is_terminal();
    println!("Building fleetd and fleetctl (dev profile)");
    let mut build = cargo(&["build", "-p", "fleetd", "-p", "fleetctl"]);
    if !terminal {
        build.arg("--quiet");
    }
    run_command(build)?;
    let bin_dir = target_dir()?.join("debug");

    let name = if fleet_testbed::list()?.iter().any(|name| name == "demo") {
        format!("demo-{}", std::process::id())
    } else {
        "demo".to_owned()
    };
    let cluster = progress("Booting a host with systemd as PID 1", || {
        Cluster::up(Options::new(name, 1).fleet(&bin_dir))
    })?;
    let host = cluster.host(0);
    progress(
        "Starting a registry mirror with a busybox image on the bridge, and Docker in the host",
        || host.start_docker(&cluster.start_mirror()?),
    )?;
    progress("Starting sshd, with a user `core` whose key root of the host has", || ssh_access(host))?;
    progress("Starting fleetd", || host.start_fleet())?;
    host.copy_in(root().join("examples").join(UNIT), format!("/root/{UNIT}"))?;
    println!("\nOn {} ({}), in root's home:\n", host.name(), host.ip());

    if let Err(error) = tutorial(host) {
        let journal = host.run(["journalctl", "-u", "fleetd.service", "-n", "30", "--no-pager"]);
        if let Ok(journal) = journal {
            eprintln!("\n--- the last that fleetd wrote to the journal\n{}", journal.stdout);
        }
        return Err(error);
    }
    println!("Every step gave what it should, in {:.0} s.", start.elapsed().as_secs_f64());

    if terminal && std::io::stdin().is_terminal() {
        go_on(host)?;
    }
    progress("Taking the host down", || cluster.down())
}

/// Offers a shell in the host.
fn go_on(host: &Host) -> Result<()> {
    println!(
        "\nThe host is still up. In a shell of its own you can go on: `fleetctl help` says how, {UNIT} lies in\n\
         /root, `systemctl` and `journalctl` show what fleet does, and `exit` ends the shell, the host and the demo."
    );
    print!("Open the shell? [Y/n] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if answer.is_empty() || answer.trim_start().to_ascii_lowercase().starts_with('n') {
        return Ok(());
    }
    host.shell()?;
    Ok(())
}

/// sshd for the user core, and root's key, configuration and known hosts to get there.
fn ssh_access(host: &Host) -> Result<()> {
    let key = host.start_sshd()?;
    host.copy_in(&key, "/root/.ssh/id_ed25519")?;
    let public = host.read("/etc/ssh/ssh_host_ed25519_key.pub")?;
    let known = format!("{} {}", host.ip(), public);
    for file in ["/root/.ssh/known_hosts", "/root/.fleetctl/known_hosts"] {
        host.write(file, &known)?;
    }
    host.sh("chmod 700 /root/.ssh /root/.fleetctl && chmod 600 /root/.ssh/id_ed25519")?.ok()?;
    Ok(())
}

/// A session in the host that shows what it types and what comes back.
struct Session<'a> {
    host: &'a Host,
}

impl Session<'_> {
    /// Types a line and returns what it gave, whatever the exit code.
    fn type_line(&self, line: &str) -> Result<Output> {
        prompt(line);
        let deadline = Duration::from_secs(120);
        let output = self.host.command(["/bin/sh", "-c", line]).deadline(deadline).run()?;
        print!("{}{}", output.stdout, output.stderr);
        println!();
        Ok(output)
    }

    /// Types a line that must succeed, and checks what it gave.
    fn check(&self, line: &str, check: impl FnOnce(&Output) -> Result<()>) -> Result<()> {
        let checked = || -> Result<()> {
            let output = self.type_line(line)?;
            ensure!(output.success(), "it ended with code {}", output.code());
            check(&output)
        };
        checked().with_context(|| format!("`{line}` did not give what it should"))
    }

    /// Types a line that must end with this exit code.
    fn ends(&self, line: &str, code: i32) -> Result<()> {
        let output = self.type_line(line)?;
        ensure!(output.code() == code, "`{line}` ended with code {}, not {code}", output.code());
        Ok(())
    }

    /// Types a line that must succeed and say `text`, on whichever stream.
    fn says(&self, line: &str, text: &str) -> Result<()> {
        self.check(line, |output| contains(&format!("{}{}", output.stdout, output.stderr), text))
    }
}

fn prompt(line: &str) {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) {
        println!("\x1b[1m$ {line}\x1b[0m");
    } else {
        println!("$ {line}");
    }
}

fn contains(text: &str, part: &str) -> Result<()> {
    ensure!(text.contains(part), "there is no {part:?} in it");
    Ok(())
}

/// Checks a table: its header, and that it has exactly these rows, columns in order.
fn table(text: &str, header: &[&str], rows: &[&[&str]]) -> Result<()> {
    let mut lines =
        text.lines().map(|line| line.split('\t').filter(|cell| !cell.is_empty()).collect::<Vec<_>>());
    let first = lines.next().unwrap_or_default();
    ensure!(first == header, "the header is {first:?}, not {header:?}");
    let found: Vec<_> = lines.collect();
    ensure!(found == rows, "the rows are {found:?}, not {rows:?}");
    Ok(())
}

fn tutorial(host: &Host) -> Result<()> {
    let session = Session { host };
    let id = format!("{}...", &host.machine_id()[..8]);
    let place = format!("{id}/{}", host.ip());
    let files = ["UNIT", "HASH", "DSTATE", "STATE", "TMACHINE"];
    let units = ["UNIT", "MACHINE", "ACTIVE", "SUB"];

    session.says("fleetctl version", "fleetctl version ")?;
    session.says("fleetctl help", "list-unit-files")?;
    session.says("fleetctl help start", "start")?;
    session.check("fleetctl list-machines", |o| {
        table(&o.stdout, &["MACHINE", "IP", "METADATA"], &[&[&id, host.ip(), "-"]])
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
    prompt(&line);
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
