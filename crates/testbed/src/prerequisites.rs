//! What a machine needs to carry hosts, checked before anything is made.

use std::path::Path;

use anyhow::{Result, bail};

/// Programs that must be on the machine, with the Debian package that has them.
const PROGRAMS: &[(&str, &str)] = &[
    ("systemd-nspawn", "systemd-container"),
    ("dbus-daemon", "dbus"),
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("nsenter", "util-linux"),
    ("setsid", "util-linux"),
    ("mount", "mount"),
];

/// Fails with what to install or change when this machine cannot carry hosts.
pub fn check() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("booting hosts needs root (overlay mounts, containers, a network bridge): run it with sudo");
    }
    let mut packages: Vec<&str> = Vec::new();
    let mut missing: Vec<&str> = Vec::new();
    for (program, package) in PROGRAMS {
        if find_program(program).is_none() {
            missing.push(program);
            if !packages.contains(package) {
                packages.push(package);
            }
        }
    }
    if !missing.is_empty() {
        bail!(
            "missing {}: install with `apt-get install --no-install-recommends {}`",
            missing.join(", "),
            packages.join(" ")
        );
    }
    Ok(())
}

/// inotify instances that root may have; hosts have no user namespace of their own, so all of them share it. The kernel's
/// default, 128, is used up by some fifteen hosts, and then systemd and D-Bus in further ones fail in odd ways.
const INOTIFY_INSTANCES: (&str, u32) = ("/proc/sys/fs/inotify/max_user_instances", 1024);

/// Lifts the limits of the kernel that many hosts run into, and says so. Where that is not allowed a few hosts work all the same.
pub(crate) fn lift_limits() {
    let (path, enough) = INOTIFY_INSTANCES;
    let now = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u32>().ok());
    let Some(now) = now.filter(|now| *now < enough) else { return };
    match std::fs::write(path, enough.to_string()) {
        Ok(()) => {
            eprintln!("testbed: {path} was {now} and is {enough}, so that many hosts fit on this machine")
        }
        Err(error) => {
            eprintln!("testbed: {path} is {now} and can't be set to {enough} ({error}): about 15 hosts fit")
        }
    }
}

/// Fails with what to install when a file that some part needs is missing.
pub(crate) fn need_file(path: &str, package: &str) -> Result<()> {
    if Path::new(path).exists() {
        return Ok(());
    }
    bail!("{path} is missing: install with `apt-get install --no-install-recommends {package}`")
}

/// Full path of a program of the system, whatever the caller's PATH holds.
pub(crate) fn find_program(name: &str) -> Option<std::path::PathBuf> {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
}
