//! Fewer faults and commands that still end in the same violation: what a person has to read of a failing seed.
//!
//! Each fault and each command of a seed is drawn from a stream of its own, so that one can be left out and the others
//! stay what they are (when they happen to whom; what comes of them may change). Halves are left out first, then smaller parts, as
//! long as the same check still fails.

use crate::{Options, Outcome, Violation, run};

/// Looks for a shorter way to the violation that a run ended with, in at most so many runs. The options that give it, and what comes
/// of them; those of the run itself if there is none.
///
/// # Errors
/// As [`run`].
pub fn minimise(found: &Outcome, options: &Options, runs: usize) -> std::io::Result<(Options, Outcome)> {
    let (mut best, mut outcome) = (options.clone(), found.clone());
    let Some(kind) = found.violations.first().map(kind) else {
        return Ok((best, outcome));
    };
    let mut left = runs;
    let mut part = outcome.inputs.div_ceil(2).max(1);
    loop {
        let mut shorter = false;
        let mut begin = 0;
        while begin < outcome.inputs {
            let end = begin + part;
            let adds = (begin..end.min(outcome.inputs)).any(|input| !best.without.contains(&input));
            if adds {
                if left == 0 {
                    return Ok((best, outcome));
                }
                left -= 1;
                let mut trial = best.clone();
                trial.without.extend(begin..end);
                let tried = run(found.seed, &trial)?;
                if tried.violations.first().is_some_and(|violation| self::kind(violation) == kind) {
                    (best, outcome, shorter) = (trial, tried, true);
                }
            }
            begin = end;
        }
        if part == 1 && !shorter {
            return Ok((best, outcome));
        }
        part = part.div_ceil(2).max(1);
    }
}

/// What was violated, without which units and machines.
fn kind(violation: &Violation) -> (&'static str, Vec<&str>) {
    let is_name = |word: &&str| !word.contains(|c: char| c.is_ascii_digit() || c == '.');
    (violation.check, violation.what.split_whitespace().filter(is_name).collect())
}
