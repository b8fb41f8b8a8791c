//! A fixed set of seeds without a violation, and the same seed twice.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleet_sim::{Options, run};

/// Two of them at a time, as many as there are cores in CI.
fn clean(seeds: impl Iterator<Item = u64>) {
    for seed in seeds {
        let outcome = run(seed, Options::default()).unwrap();
        assert_eq!(outcome.violations, vec![], "seed {seed}: cargo xtask sim --seed {seed} --trace");
    }
}

#[test]
fn seeds_of_one_half_are_clean() {
    clean((1..=12).step_by(2));
}

#[test]
fn seeds_of_the_other_half_are_clean() {
    clean((2..=12).step_by(2));
}

/// Nothing is decided by chance, by real time or by the order of addresses.
#[test]
fn the_same_seed_is_the_same_run() {
    for seed in [27, 63] {
        let [one, other] = [(); 2].map(|()| run(seed, Options::default()).unwrap());
        assert_eq!((one.trace, one.simulated, one.faults), (other.trace, other.simulated, other.faults));
        assert!(one.acknowledged > 0 && one.faults > 0);
    }
}
