//! `cargo xtask fuzz`: the fuzz targets for longer than the tests run them. Built with optimisation, and with all assertions.

use anyhow::Result;
use clap::Parser;

use crate::steps::{cargo, run as run_command};

/// What is passed on; `fleet-fuzz --help` says more.
#[derive(Parser)]
pub(crate) struct Args {
    /// How long each target runs, seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run this target only
    #[arg(long)]
    target: Option<String>,
    /// What is tried follows from this number; another one each time unless given
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut command = cargo(&["run", "--quiet", "--profile", "sim", "-p", "fleet-fuzz", "--"]);
    command.arg("--seconds").arg(args.seconds.to_string());
    if let Some(target) = &args.target {
        command.arg("--target").arg(target);
    }
    if let Some(seed) = args.seed {
        command.arg("--seed").arg(seed.to_string());
    }
    run_command(command)
}
