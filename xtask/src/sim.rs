//! `cargo xtask sim`: whole clusters in one process, under faults, from seeds. Built with optimisation, since it is
//! all computation.

use anyhow::Result;
use clap::Parser;

use crate::steps::{cargo, run as run_command};

/// What is passed on; `fleet-sim --help` says more.
#[derive(Parser)]
pub(crate) struct Args {
    /// How many seeds to run
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Run this seed only
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// Print all that happens in it
    #[arg(long, requires = "seed")]
    trace: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut command = cargo(&["run", "--quiet", "--profile", "sim", "-p", "fleet-sim", "--"]);
    match args.seed {
        Some(seed) => command.arg("--seed").arg(seed.to_string()),
        None => command.arg("--seeds").arg(args.seeds.to_string()).arg("--from").arg(args.from.to_string()),
    };
    if args.trace {
        command.arg("--trace");
    }
    run_command(command)
}
