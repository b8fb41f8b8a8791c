//! The checks are proven: each deliberate mistake is found within a fixed number of seeds.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleet_sim::{Mutation, Options, run};

/// How many seeds are tried; for each mistake far more than it takes, so that it is also found when other code changes what
/// happens in a seed.
const SEEDS: u64 = 100;

fn find(mutation: Mutation, checks: &[&str]) {
    let options = Options { mutation: Some(mutation), focus: true, ..Options::default() };
    let found = (1..=SEEDS).find_map(|seed| {
        let outcome = run(seed, &options).unwrap();
        outcome.violations.first().map(|violation| (seed, violation.clone()))
    });
    let Some((seed, violation)) = found else { panic!("{mutation:?} was not found in {SEEDS} seeds") };
    println!("{mutation:?} was found with seed {seed}: {violation}");
    assert!(checks.contains(&violation.check), "{mutation:?} was found by another check: {violation}");
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
