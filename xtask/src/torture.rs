//! `cargo xtask torture`: a cluster of real hosts under faults, from a seed.

use anyhow::Result;
use clap::Parser;

use crate::packages;
use crate::steps::{cargo, run as run_command, target_dir};

/// What is passed on; `fleet-torture --help` says more.
#[derive(Parser)]
pub(crate) struct Args {
    /// How long to go on
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// What happens follows from this number; another one each time unless given
    #[arg(long)]
    seed: Option<u64>,
    /// Where the registry is
    #[arg(long, default_value = "embedded", value_parser = ["embedded", "etcd"])]
    registry: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    packages::ensure()?;
    run_command(cargo(&["build", "-p", "fleetd", "-p", "fleetctl"]))?;
    let target = target_dir()?;
    let mut command = cargo(&["run", "--quiet", "-p", "fleet-e2e", "--bin", "fleet-torture", "--"]);
    command.arg("--minutes").arg(args.minutes.to_string()).arg("--registry").arg(&args.registry);
    command.arg("--keep").arg(target.join("torture"));
    if let Some(seed) = args.seed {
        command.arg("--seed").arg(seed.to_string());
    }
    command.env("FLEET_BIN_DIR", target.join("debug"));
    run_command(command)
}
