//! Tortures clusters and says what was violated. `cargo xtask torture` builds and starts this.

use clap::{Parser, ValueEnum};
use fleet_e2e::torture::{self, Options};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Break clusters of real hosts in all ways, at random, and check that nothing happened that must not.
#[derive(Parser)]
#[command(name = "fleet-torture")]
struct Args {
    /// How long to go on
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// What happens follows from this number; another one each time unless given
    #[arg(long)]
    seed: Option<u64>,
    /// Where the registry is
    #[arg(long, value_enum, default_value_t = Registry::Embedded)]
    registry: Registry,
    /// Where the history and the journals are kept when something is wrong
    #[arg(long, value_name = "DIR", default_value = "target/torture")]
    keep: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Registry {
    Embedded,
    Etcd,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let options = Options {
        seed: args.seed.unwrap_or(now),
        takes: Duration::from_secs_f64(args.minutes.clamp(0.0, 1e6) * 60.0),
        round: None,
        registry: match args.registry {
            Registry::Embedded => torture::Registry::Embedded,
            Registry::Etcd => torture::Registry::Etcd,
        },
        keep: args.keep,
    };
    println!("seed {}", options.seed);
    match torture::run(&options) {
        Ok(report) => {
            println!("{report}");
            if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("fleet-torture: seed {}: {error:#}", options.seed);
            ExitCode::FAILURE
        }
    }
}
