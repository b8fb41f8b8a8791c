//! Runs seeds and says what was violated. `cargo xtask sim` builds and starts this.

use clap::Parser;
use fleet_sim::{Mutation, Options, Outcome, minimise};
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How many failing seeds are made shorter, in how many runs each, and how many lines are printed of them.
const SHOWN: usize = 2;
const RUNS: usize = 80;
const LINES: usize = 60;

/// Simulate whole clusters under faults.
#[derive(Parser)]
#[command(name = "fleet-sim")]
struct Args {
    /// How many seeds to run
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// Run this seed only
    #[arg(long, conflicts_with_all = ["seeds", "from", "fresh"])]
    seed: Option<u64>,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Begin with a seed that was hardly run before, by the time of day
    #[arg(long, conflicts_with = "from")]
    fresh: bool,
    /// Begin no more seeds after so many seconds
    #[arg(long, value_name = "SECONDS")]
    within: Option<u64>,
    /// Print all that happens (with --seed)
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Leave out these faults and commands, such as 0-4,7 (with --seed)
    #[arg(long, requires = "seed", value_parser = numbers, default_value = "")]
    without: Numbers,
    /// Make a deliberate mistake, to see that it is found
    #[arg(long, value_parser = mutation)]
    mutation: Option<Mutation>,
    /// Run what it takes to meet that mistake often
    #[arg(long, requires = "mutation")]
    focus: bool,
    /// How many seeds to run side by side
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Print a hash of all that happened in each seed, to compare two builds by
    #[arg(long)]
    hashes: bool,
    /// Do not look for a shorter way to what was violated
    #[arg(long)]
    as_is: bool,
}

#[derive(Default)]
struct Sum {
    seeds: u64,
    simulated: Duration,
    settled_in: Duration,
    acknowledged: u64,
    faults: u64,
    failed: Vec<Outcome>,
}

fn main() -> ExitCode {
    match simulate(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fleet-sim: a process can't be simulated: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing was violated.
fn simulate(args: &Args) -> std::io::Result<bool> {
    let options = Options {
        trace: args.trace,
        mutation: args.mutation,
        focus: args.focus,
        without: args.without.0.clone(),
        ..Options::default()
    };
    if args.trace {
        fleet_sim::trace_logs();
    }
    let first = match args.fresh {
        // A range of its own for each second.
        true => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() * 100_000,
        false => args.from,
    };
    let (from, seeds) = args.seed.map_or((first, args.seeds), |seed| (seed, 1));
    let begun = Instant::now();
    let until = args.within.map(|seconds| begun + Duration::from_secs(seconds));
    let next = AtomicU64::new(0);
    let sum = Mutex::new(Sum::default());
    let work = || -> std::io::Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= seeds || until.is_some_and(|until| Instant::now() >= until) {
                return Ok(());
            }
            let outcome = fleet_sim::run(from.wrapping_add(number), &options)?;
            if args.hashes {
                println!("seed {}: {:016x}", outcome.seed, outcome.trace);
            }
            add(&sum, outcome);
        }
    };
    std::thread::scope(|scope| {
        let jobs = args.jobs.clamp(1, usize::try_from(seeds).unwrap_or(1).max(1));
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let done = workers.into_iter().map(|worker| match worker.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        done.collect::<std::io::Result<()>>()
    })?;
    let mut sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    let took = begun.elapsed();
    sum.failed.sort_by_key(|outcome| outcome.seed);
    if !args.as_is && !args.trace {
        for outcome in sum.failed.iter().take(SHOWN) {
            show(outcome, &options)?;
        }
    }
    report(&sum, took, from);
    Ok(sum.failed.is_empty())
}

fn report(sum: &Sum, took: Duration, from: u64) {
    for outcome in &sum.failed {
        println!("failing seed: {}", outcome.seed);
    }
    let minutes = sum.simulated.as_secs_f64() / 60.0;
    println!(
        "seeds from {from}: {} faults, {} acknowledged commands, at rest within {:.0} s; {:.0} simulated minutes an hour",
        sum.faults,
        sum.acknowledged,
        sum.settled_in.as_secs_f64(),
        minutes / took.as_secs_f64() * 3600.0
    );
    println!("{} seeds, {minutes:.0} simulated minutes, {} violations", sum.seeds, sum.failed.len());
}

/// Looks for a shorter way to what a seed ended with, and prints the end of it.
fn show(outcome: &Outcome, options: &Options) -> std::io::Result<()> {
    let options = Options { tail: LINES, ..options.clone() };
    let (options, shortest) = minimise(outcome, &options, RUNS)?;
    // What was found as it is has no tail yet.
    let shortest = if shortest.tail.is_empty() { fleet_sim::run(outcome.seed, &options)? } else { shortest };
    let without = ranges(&options.without);
    println!(
        "\nseed {} with {} of {} faults and commands; all of it: cargo xtask sim --seed {} --trace --without {without}",
        outcome.seed,
        shortest.inputs - options.without.range(..shortest.inputs).count() as u64,
        outcome.inputs,
        outcome.seed,
        without = if without.is_empty() { "''" } else { &without },
    );
    for line in &shortest.tail {
        println!("  {line}");
    }
    println!();
    Ok(())
}

fn mutation(name: &str) -> Result<Mutation, String> {
    let found = Mutation::ALL.into_iter().find(|mutation| format!("{mutation:?}") == name);
    found.ok_or_else(|| format!("one of {:?}", Mutation::ALL))
}

/// Numbers as on the command line.
#[derive(Clone, Debug)]
struct Numbers(BTreeSet<u64>);

fn numbers(text: &str) -> Result<Numbers, String> {
    let mut numbers = BTreeSet::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        match (from.parse::<u64>(), to.parse::<u64>()) {
            (Ok(from), Ok(to)) if to.saturating_sub(from) < 1_000_000 => numbers.extend(from..=to),
            _ => return Err(format!("{part:?} is neither a number nor a range of them")),
        }
    }
    Ok(Numbers(numbers))
}

fn ranges(numbers: &BTreeSet<u64>) -> String {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, to)) if *to + 1 == *number => *to = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    let shown = ranges.iter().map(|(from, to)| match from == to {
        true => from.to_string(),
        false => format!("{from}-{to}"),
    });
    shown.collect::<Vec<_>>().join(",")
}

fn add(sum: &Mutex<Sum>, outcome: Outcome) {
    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
    sum.seeds += 1;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_written_as_it_is_read() {
        for text in ["", "3", "0-4,7", "1,3,5-6"] {
            assert_eq!(ranges(&numbers(text).unwrap().0), text);
        }
        for bad in ["x", "1-", "-", "1-99999999999"] {
            numbers(bad).unwrap_err();
        }
    }
}
