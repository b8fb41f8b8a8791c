//! The checks are proven: each deliberate mistake is found within a fixed number of seeds.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleet_sim::{Mutation, Options, run};
use std::collections::BTreeSet;

/// How many seeds are tried; for each mistake far more than it takes, so that it is also found when other code changes what
/// happens in a seed.
const SEEDS: u64 = 400;

fn find(mutation: Mutation, checks: &[&str]) {
    let options = Options { mutation: Some(mutation), focus: true, ..Options::default() };
    // Another check may be the first to complain in a seed; one that is about it has to in some seed.
    let mut others = BTreeSet::new();
    let found = (1..=SEEDS).find_map(|seed| {
        let violation = run(seed, &options).unwrap().violations.into_iter().next()?;
        if checks.contains(&violation.check) {
            return Some((seed, violation));
        }
        others.insert(violation.check);
        None
    });
    match found {
        Some((seed, violation)) => println!("{mutation:?} was found with seed {seed}: {violation}"),
        None => panic!("{mutation:?} was not found in {SEEDS} seeds by {checks:?}, but by {others:?}"),
    }
}

macro_rules! mutations {
    ($($test:ident: $mutation:ident by $checks:expr;)*) => {
        $(
            #[test]
            fn $test() {
                find(Mutation::$mutation, &$checks);
            }
        )*

        #[test]
        fn mutation_tests_are_complete() {
            assert_eq!(Mutation::ALL, [$(Mutation::$mutation),*]);
        }
    };
}

// With the checks that may find it.
mutations! {
    mutation_no_unit_guard: NoUnitGuard by ["G1", "G2", "G3", "G4"];
    mutation_no_fence: NoFence by ["G2", "G4", "G5"];
    mutation_no_term_guard: NoTermGuard by ["G5"];
    mutation_no_absence_guard: NoAbsenceGuard by ["G2", "G4"];
    mutation_no_session_guard: NoSessionGuard by ["G2", "G3", "G4"];
    mutation_lost_change: LostChange by ["G1", "G2", "G3", "G4"];
    mutation_empty_listing: EmptyListing by ["G2", "G3"];
    mutation_empty_snapshot: EmptySnapshot by ["G2", "G3"];
    mutation_forgotten_marks: ForgottenMarks by ["G2"];
    mutation_unnoted_stop: UnnotedStop by ["G3"];
    mutation_hasty_stop: HastyStop by ["G2", "G4"];
    mutation_unknown_is_done: UnknownIsDone by ["G1"];
    mutation_lost_writes: LostWrites by ["G1"];
    mutation_early_expiry: EarlyExpiry by ["G2", "G4"];
    mutation_early_answer: EarlyAnswer by ["G2", "G4"];
    mutation_no_fencing: NoFencing by ["G4"];
    mutation_no_guard: NoGuard by ["G4"];
    mutation_reload_per_unit: ReloadPerUnit by ["work"];
    mutation_unreadable_is_gone: UnreadableIsGone by ["G2"];
    mutation_unknown_fields_lost: UnknownFieldsLost by ["G9"];
    mutation_early_release: EarlyRelease by ["G4"];
}
