//! `cargo xtask demo`: three real systemd hosts in containers, fleet on them as the package installs it; the
//! tutorial typed as it stands on the first; then all three as a cluster, one of which loses its power. Each answer is
//! checked.

mod machines;
mod session;
mod tutorial;

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::Instant;

use anyhow::Result;
use fleet_testbed::{Cluster, Host, Options};

use self::tutorial::UNIT;
use crate::packages;
use crate::steps::{cargo, progress, root, run as run_command, target_dir};

/// What the hosts say of themselves: the database wants a fast disk, and there must be a second one to go to.
const METADATA: [&str; 3] = ["disk=hdd,region=eu", "disk=ssd,region=eu", "disk=ssd,region=us"];

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
    let cluster = progress("Booting three hosts with systemd as PID 1", || {
        let options = Options::new(name, METADATA.len()).fleet(&bin_dir);
        Cluster::up(METADATA.iter().fold(options, |options, metadata| options.metadata(*metadata)))
    })?;
    let host = cluster.host(0);
    progress(
        "Starting a registry mirror with a busybox image on the bridge, and Docker in the first host",
        || host.start_docker(&cluster.start_mirror()?),
    )?;
    progress("Starting sshd, with a user `core` whose key root of the host has", || ssh_access(host))?;
    progress("Starting fleetd", || {
        machines::configure(host)?;
        host.start_fleet()
    })?;
    host.copy_in(root().join("examples").join(UNIT), format!("/root/{UNIT}"))?;
    println!("\nOn {} ({}), in root's home:\n", host.name(), host.ip());

    let typed = tutorial::run(host, METADATA[0]).and_then(|()| {
        println!("Now the other two hosts join, and {} is the server of a cluster.\n", host.name());
        machines::run(&cluster, &METADATA)
    });
    if let Err(error) = typed {
        for host in cluster.hosts().iter().filter(|host| host.is_up()) {
            let journal = host.run(["journalctl", "-u", "fleetd.service", "-n", "30", "--no-pager"]);
            if let Ok(journal) = journal {
                let name = host.name();
                eprintln!("\n--- the last that fleetd wrote to the journal of {name}\n{}", journal.stdout);
            }
        }
        return Err(error);
    }
    println!("Every step gave what it should, in {:.0} s.", start.elapsed().as_secs_f64());

    if terminal && std::io::stdin().is_terminal() {
        go_on(host)?;
    }
    progress("Taking the hosts down", || cluster.down())
}

/// Offers a shell in the host.
fn go_on(host: &Host) -> Result<()> {
    println!(
        "\nThe hosts are still up. In a shell of the first you can go on: `fleetctl help` says how, unit files lie in\n\
         /root, `systemctl` and `journalctl` show what fleet does, and `exit` ends the shell, the hosts and the demo."
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
