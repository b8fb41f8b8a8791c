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
    /// Leave out these faults and commands of it, such as 0-4,7
    #[arg(long, requires = "seed", default_value = "")]
    without: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut command = cargo(&["run", "--quiet", "--profile", "sim", "-p", "fleet-sim", "--"]);
    match args.seed {
        Some(seed) => command.arg("--seed").arg(seed.to_string()).arg("--without").arg(&args.without),
        None => command.arg("--seeds").arg(args.seeds.to_string()).arg("--from").arg(args.from.to_string()),
    };
    if args.trace {
        command.arg("--trace");
    }
    run_command(command)
}

/// For how many seconds seeds that nobody has run yet are tried in each `cargo xtask test`.
const FRESH: &str = "15";

/// Runs seeds that nobody has run yet, for a while.
pub(crate) fn fresh() -> Result<()> {
    let mut command = cargo(&["run", "--quiet", "--profile", "sim", "-p", "fleet-sim", "--"]);
    command.args(["--seeds", "1000000", "--fresh", "--within", FRESH]);
    run_command(command)
}
