//! Runs seeds and says what was violated. `cargo xtask sim` builds and starts this.

use clap::Parser;
use fleet_sim::{Mutation, Options, Outcome};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Simulate whole clusters under faults.
#[derive(Parser)]
#[command(name = "fleet-sim")]
struct Args {
    /// How many seeds to run
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// Run this seed only
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Print all that happens (with --seed)
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Make a deliberate mistake, to see that it is found
    #[arg(long, value_parser = mutation)]
    mutation: Option<Mutation>,
    /// How many seeds to run side by side
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

#[derive(Default)]
struct Sum {
    simulated: Duration,
    settled_in: Duration,
    acknowledged: u64,
    faults: u64,
    failed: Vec<Outcome>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let options = Options { trace: args.trace, mutation: args.mutation };
    if args.trace {
        fleet_sim::trace_logs();
    }
    let (from, seeds) = args.seed.map_or((args.from, args.seeds), |seed| (seed, 1));
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let sum = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.clamp(1, usize::try_from(seeds).unwrap_or(1).max(1)) {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= seeds {
                        return;
                    }
                    let seed = from.wrapping_add(number);
                    match fleet_sim::run(seed, options) {
                        Ok(outcome) => add(&sum, outcome),
                        Err(error) => {
                            eprintln!("fleet-sim: seed {seed}: {error}");
                            std::process::exit(2);
                        }
                    }
                }
            });
        }
    });
    let mut sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    sum.failed.sort_by_key(|outcome| outcome.seed);
    for outcome in &sum.failed {
        println!("failing seed: {}", outcome.seed);
    }
    let took = begun.elapsed().as_secs_f64();
    let minutes = sum.simulated.as_secs_f64() / 60.0;
    println!(
        "{} faults, {} acknowledged commands, at rest within {:.0} s; {:.0} simulated minutes an hour",
        sum.faults,
        sum.acknowledged,
        sum.settled_in.as_secs_f64(),
        minutes / took * 3600.0
    );
    println!("{seeds} seeds, {minutes:.0} simulated minutes, {} violations", sum.failed.len());
    if sum.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn mutation(name: &str) -> Result<Mutation, String> {
    let found = Mutation::ALL.into_iter().find(|mutation| format!("{mutation:?}") == name);
    found.ok_or_else(|| format!("one of {:?}", Mutation::ALL))
}

fn add(sum: &Mutex<Sum>, outcome: Outcome) {
    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
    sum.simulated += outcome.simulated;
    sum.settled_in = sum.settled_in.max(outcome.settled_in);
    sum.acknowledged += outcome.acknowledged;
    sum.faults += outcome.faults;
    if !outcome.violations.is_empty() {
        for violation in &outcome.violations {
            println!("seed {}: {violation}", outcome.seed);
        }
        sum.failed.push(outcome);
    }
}
