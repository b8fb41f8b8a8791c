//! The Debian packages that tests and the demo need: checked, and installed where they are missing.
//!
//! Installing one starts nothing here and leaves nothing that starts at the next boot.

use std::fs;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::steps::{output, run};

/// For hosts and what runs in them.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "curl",
    "dbus",
    "docker-registry",
    "docker.io",
    "etcd-server",
    "iproute2",
    "iptables",
    "openssh-client",
    "openssh-server",
    "polkitd",
    "procps",
    "systemd-container",
];
/// What these packages would start at the machine's next boot.
const SERVICES: &[(&str, &[&str])] = &[
    ("docker-registry", &["docker-registry.service"]),
    ("docker.io", &["docker.service", "docker.socket", "containerd.service"]),
    ("etcd-server", &["etcd.service"]),
    ("openssh-server", &["ssh.service"]),
];
/// Debian's way to say whether a package may start services.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Makes sure that all packages are there.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing()?;
    if missing.is_empty() {
        println!("All Debian packages are here: {}", PACKAGES.join(" "));
        return Ok(());
    }
    println!("Missing Debian packages: {}", missing.join(" "));
    if !rustix::process::geteuid().is_root() {
        bail!("installing them needs root: apt-get install --no-install-recommends {}", missing.join(" "));
    }
    let policy = Policy::deny()?;
    run(apt(&["update"]))?;
    // Never at the price of another package, such as a Docker from elsewhere.
    let mut install = apt(&["install", "-y", "--no-install-recommends", "--no-remove"]);
    install.args(&missing);
    run(install)?;
    drop(policy);
    for (package, services) in SERVICES {
        if missing.contains(package) && Path::new("/usr/bin/systemctl").exists() {
            let mut disable = Command::new("systemctl");
            disable.args(["disable", "--quiet"]).args(*services).stdin(Stdio::null());
            run(disable).with_context(|| format!("{package} would start at the next boot"))?;
        }
    }
    Ok(())
}

fn missing() -> Result<Vec<&'static str>> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Package} ${db:Status-Status}\\n"]).stdin(Stdio::null());
    let list = output(query).with_context(|| {
        format!("this is no Debian system: install what these packages have by hand: {}", PACKAGES.join(" "))
    })?;
    let there = |package: &str| list.lines().any(|line| line == format!("{package} installed"));
    Ok(PACKAGES.iter().copied().filter(|package| !there(package)).collect())
}

fn apt(args: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    command
}

/// A policy-rc.d that forbids starting services, while this lives. One that is there stays: it is how the
/// machine's owner decided.
struct Policy {
    ours: bool,
}

impl Policy {
    fn deny() -> Result<Policy> {
        let mut options = fs::File::options();
        match options.write(true).create_new(true).mode(0o755).open(POLICY) {
            Ok(mut file) => {
                let policy = Policy { ours: true };
                std::io::Write::write_all(&mut file, b"#!/bin/sh\nexit 101\n")
                    .with_context(|| format!("cannot write {POLICY}"))?;
                Ok(policy)
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(Policy { ours: false }),
            Err(error) => Err(error).with_context(|| format!("cannot write {POLICY}")),
        }
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("xtask: cannot remove {POLICY}, which keeps packages from starting services: {error}");
        }
    }
}
