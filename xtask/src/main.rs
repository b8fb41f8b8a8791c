//! Developer commands: `cargo xtask demo | test | sim | torture | fuzz | bench | dist`. CONTRIBUTING.md says when to use which.
//!
//! | module | job |
//! |---|---|
//! | `steps` | named steps with their times; cargo as a child process |
//! | `packages` | Debian packages that tests and the demo need |
//! | `licences` | licences and bans of deny.toml against the dependency tree |
//! | `test`, `sim`, `torture`, `fuzz`, `demo`, `bench`, `dist` | one command each |

mod bench;
mod demo;
mod dist;
mod fuzz;
mod licences;
mod packages;
mod sim;
mod steps;
mod test;
mod torture;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of fleet.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a real systemd host in a container and run the tutorial on it (as root)
    Demo,
    /// Run every check: format, lints, licences, all tests, documentation (as root)
    Test,
    /// Simulate clusters under faults, and check after every step that nothing happens that must not
    Sim(sim::Args),
    /// Break a cluster of real hosts in all ways, at random, and check that nothing happens that must not (as root)
    Torture(torture::Args),
    /// Give everything that reads outside bytes inputs made from its corpora
    Fuzz(fuzz::Args),
    /// Measure speed against the floor of the same run and compare with the budgets (as root)
    Bench(bench::Args),
    /// Build a release and put it into a tar.gz with the package's files
    Dist,
    /// Install the Debian packages that the other commands need, as they do by themselves (as root)
    Packages,
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Demo => demo::run(),
        Command::Test => test::run(),
        Command::Sim(args) => sim::run(&args),
        Command::Torture(args) => torture::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Dist => dist::run(),
        Command::Packages => packages::ensure(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
