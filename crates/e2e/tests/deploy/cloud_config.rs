//! cloud-init: files are written, then commands run.

use super::{list, mode, only, put, text, with_etcd, with_one_server, yaml};
use anyhow::{Context, Result, ensure};
use fleet_testbed::Host;
use std::time::Duration;

/// What a package has that is installed already.
fn program_of(package: &str) -> Option<&'static str> {
    (package == "etcd-server").then_some("/usr/bin/etcd")
}

fn apply(host: &Host, config: &str) -> Result<()> {
    ensure!(config.starts_with("#cloud-config\n"), "cloud-init reads only what begins so");
    let config = yaml(config)?;
    only(&config, &["write_files", "packages", "runcmd"])?;
    for file in list(&config, "write_files")? {
        only(file, &["path", "permissions", "content"])?;
        put(host, text(file, "path")?, text(file, "content")?.as_bytes(), mode(&file["permissions"])?)?;
    }
    for package in list(&config, "packages")? {
        let package = package.as_str().context("a package")?;
        let program = program_of(package).with_context(|| format!("{package} is not known here"))?;
        ensure!(host.exists(program), "install the Debian package {package} for this test");
    }
    for command in list(&config, "runcmd")? {
        let command = command.as_str().context("a command")?;
        let output = host.command(["/bin/sh", "-c", command]).deadline(Duration::from_secs(180)).run()?;
        output.ok().with_context(|| command.to_owned())?;
    }
    Ok(())
}

#[test]
fn cloud_configs_make_machines_that_join() -> Result<()> {
    with_one_server("cloud", ["cloud-config/server.yaml", "cloud-config/machine.yaml"], apply)
}

#[test]
fn cloud_configs_make_machines_on_etcd() -> Result<()> {
    with_etcd("cloudetcd", "cloud-config/etcd.yaml", apply)
}
