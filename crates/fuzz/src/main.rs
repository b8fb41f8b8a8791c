//! Runs targets for as long as one likes. `cargo xtask fuzz` builds and starts this.

use anyhow::{Result, bail};
use clap::Parser;
use fleet_fuzz::{Run, TARGETS, Target, corpus, target};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Give everything of fleet that reads outside bytes inputs made from its corpora.
#[derive(Parser)]
#[command(name = "fleet-fuzz")]
struct Args {
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

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fleet-fuzz: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns how many targets broke.
fn run(args: &Args) -> Result<usize> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let seed = args.seed.unwrap_or(now);
    let chosen: Vec<&Target> = match &args.target {
        None => TARGETS.iter().collect(),
        Some(name) => match target(name) {
            Some(target) => vec![target],
            None => bail!(
                "there is no target {name}; there are {:?}",
                TARGETS.iter().map(|target| target.name).collect::<Vec<_>>()
            ),
        },
    };
    let mut broken = 0;
    for target in chosen {
        let files = corpus("corpus", target)?.into_iter().chain(corpus("crashes", target)?);
        let mut run = Run::new(seed, files.map(|(_, bytes)| bytes));
        let failure = run.go(target, u64::MAX, Duration::from_secs(args.seconds));
        println!("{}: seed {seed}: {} inputs went {} ways", target.name, run.tried, run.ways());
        if let Some(failure) = failure {
            broken += 1;
            let file = std::env::temp_dir().join(format!("fleet-fuzz-{}", target.name));
            std::fs::write(&file, &failure.input)?;
            println!(
                "{}: {}: broken by {}: \"{}\"",
                target.name,
                failure.what,
                file.display(),
                failure.input.escape_ascii()
            );
        }
    }
    println!("{broken} targets broken");
    Ok(broken)
}
