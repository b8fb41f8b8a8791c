//! Every target on its corpus, on what once broke it, and for a moment on inputs made from these: the same ones each time, and fresh ones.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleet_fuzz::{Run, TARGETS, Target, corpus, replay};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Inputs of the fixed seed.
const INPUTS: u64 = 3000;
/// How long a target gets for each seed, at most.
const TIME: Duration = Duration::from_millis(2500);

fn inputs(target: &Target) -> Vec<Vec<u8>> {
    let files = corpus("corpus", target).unwrap().into_iter().chain(corpus("crashes", target).unwrap());
    files.map(|(_, bytes)| bytes).collect()
}

fn run(target: &Target, seed: u64, inputs_at_most: u64) {
    let mut run = Run::new(seed, inputs(target));
    let failure = run.go(target, inputs_at_most, TIME);
    println!("{}: seed {seed}: {} inputs went {} ways", target.name, run.tried, run.ways());
    if let Some(failure) = failure {
        panic!(
            "{}: seed {seed}: {}\nbroken by (to be kept in fuzz/crashes/{}): \"{}\"",
            target.name,
            failure.what,
            target.name,
            failure.input.escape_ascii()
        );
    }
}

#[test]
fn each_target_has_a_corpus_that_it_withstands() {
    for target in TARGETS {
        let files = corpus("corpus", target).unwrap();
        assert!(files.len() >= 4, "fuzz/corpus/{} has {} files", target.name, files.len());
        let mut ways = std::collections::BTreeSet::new();
        for (path, input) in files.iter().chain(&corpus("crashes", target).unwrap()) {
            assert!(input.len() <= target.longest, "{} is too long to be gone on from", path.display());
            match replay(target, input) {
                Ok(seen) => drop(ways.insert(seen)),
                Err(what) => panic!("{}: {what}", path.display()),
            }
        }
        assert!(ways.len() >= 4, "{}: the corpus goes {} ways only", target.name, ways.len());
    }
}

#[test]
fn each_target_withstands_the_same_inputs_each_time() {
    TARGETS.iter().for_each(|target| run(target, 1, INPUTS));
}

#[test]
fn each_target_withstands_fresh_inputs() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    TARGETS.iter().for_each(|target| run(target, now.as_secs(), u64::MAX));
}
