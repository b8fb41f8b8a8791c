//! `cargo xtask dist`: a release as tar.gz, laid out as a package lays it out, with its SHA-256.

use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::steps::{cargo, metadata, output, root, run as run_command, step};

/// Texts that go along.
const DOCS: &[&str] = &[
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "docs/CONFIGURATION.md",
    "docs/ISOLATION.md",
    "docs/COMPATIBILITY.md",
    "docs/MIGRATING.md",
];

pub(crate) fn run() -> Result<()> {
    let metadata = metadata(&["--no-deps"])?;
    let target = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let fleetd = packages.iter().find(|package| package["name"] == "fleetd").context("there is no fleetd")?;
    let version = fleetd["version"].as_str().context("fleetd has no version")?;
    let name = format!("fleet-{version}-linux-{}", std::env::consts::ARCH);
    let dist = std::path::Path::new(target).join("dist");
    let tree = dist.join(&name);

    step("release build", || run_command(cargo(&["build", "--release", "-p", "fleetd", "-p", "fleetctl"])))?;
    step("tree", || {
        if tree.exists() {
            fs::remove_dir_all(&tree)?;
        }
        fs::create_dir_all(&tree)?;
        fleet_testbed::install(&tree, &std::path::Path::new(target).join("release"), "")?;
        let docs = tree.join("usr/share/doc/fleet");
        fs::create_dir_all(&docs)?;
        for file in DOCS {
            let from = root().join(file);
            let to = docs.join(from.file_name().context("no name")?);
            fs::copy(&from, to).with_context(|| format!("cannot copy {file}"))?;
        }
        Ok(())
    })?;
    let archive = step("archive", || {
        // Same commit, same archive.
        let mut log = Command::new("git");
        log.args(["log", "-1", "--format=%ct"]).current_dir(root());
        let time = output(log)?;
        let archive = dist.join(format!("{name}.tar.gz"));
        let mut tar = Command::new("tar");
        tar.args([
            "--sort=name",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--use-compress-program=gzip -n9",
        ]);
        // The modes of directories are those of this machine otherwise, and unpacking would spread them.
        tar.arg("--mode=u=rwX,go=rX");
        tar.arg(format!("--mtime=@{}", time.trim()));
        tar.arg("-C").arg(&dist).arg("-cf").arg(&archive).arg(&name);
        run_command(tar)?;
        fs::remove_dir_all(&tree)?;
        let mut sum = Command::new("sha256sum");
        sum.arg(format!("{name}.tar.gz")).current_dir(&dist);
        fs::write(dist.join(format!("{name}.tar.gz.sha256")), output(sum)?)?;
        Ok(archive)
    })?;
    println!("{}", archive.display());
    Ok(())
}
