//! Runs targets on inputs made from their corpora.

use crate::mutate::{Rng, mutated};
use crate::targets::{Seen, Target};
use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::{Duration, Instant};

/// Seconds that an input may take of a processor, without being optimised; one that takes more is a way to keep a server busy.
const SLOW: i64 = 5;
/// How many inputs are kept to go on from.
const POOL: usize = 2000;

/// The files of a target in `fuzz/KIND`, `corpus` or `crashes`, with their contents.
pub fn corpus(kind: &str, target: &Target) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz").join(kind).join(target.name);
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry?.path();
        let bytes = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        files.push((path, bytes));
    }
    files.sort();
    Ok(files)
}

/// An input that breaks a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The input, as short as it was made to be.
    pub input: Vec<u8>,
    /// What happened.
    pub what: String,
}

thread_local! {
    /// Whether panics of this thread are nobody's business.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Lets a target's panics be told once, by who runs it, and not for each input on the way.
fn quietly<T>(run: impl FnOnce() -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                told(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = run();
    QUIET.set(false);
    result
}

/// Runs a target on one input.
pub fn replay(target: &Target, input: &[u8]) -> Result<Seen, String> {
    let begun = clock_gettime(ClockId::ThreadCPUTime);
    // A target keeps nothing from one input to the next.
    let seen = quietly(|| catch_unwind(AssertUnwindSafe(|| (target.run)(input)))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
    })?;
    let took = clock_gettime(ClockId::ThreadCPUTime) - begun;
    if took.tv_sec >= SLOW { Err(format!("it took {} s", took.tv_sec)) } else { Ok(seen) }
}

/// A run of a target.
#[derive(Debug)]
pub struct Run {
    rng: Rng,
    pool: Vec<Vec<u8>>,
    seen: BTreeSet<Seen>,
    /// How many inputs were tried.
    pub tried: u64,
}

impl Run {
    /// From these inputs. The same seed tries the same.
    pub fn new(seed: u64, corpus: impl IntoIterator<Item = Vec<u8>>) -> Run {
        let mut pool: Vec<Vec<u8>> = corpus.into_iter().collect();
        pool.push(Vec::new());
        Run { rng: Rng::new(seed), pool, seen: BTreeSet::new(), tried: 0 }
    }

    /// How many different ways inputs went.
    pub fn ways(&self) -> usize {
        self.seen.len()
    }

    /// Tries so many inputs, or as many as this time allows, and returns the first that breaks the target.
    pub fn go(&mut self, target: &Target, inputs: u64, time: Duration) -> Option<Failure> {
        let until = Instant::now() + time;
        for number in 0..self.pool.len() {
            let input = self.pool[number].clone();
            if let Err(what) = self.one(target, &input) {
                return Some(Failure { input, what });
            }
        }
        for _ in 0..inputs {
            if Instant::now() >= until {
                break;
            }
            let input = mutated(&mut self.rng, &self.pool, target.words, target.longest);
            match self.one(target, &input) {
                Err(what) => return Some(shortened(target, Failure { input, what })),
                Ok(true) if self.pool.len() < POOL => self.pool.push(input),
                Ok(_) => {}
            }
        }
        None
    }

    /// Whether the input went a new way.
    fn one(&mut self, target: &Target, input: &[u8]) -> Result<bool, String> {
        self.tried += 1;
        replay(target, input).map(|seen| self.seen.insert(seen))
    }
}

/// The same failure from less.
fn shortened(target: &Target, mut failure: Failure) -> Failure {
    let mut step = failure.input.len() / 2;
    while step > 0 {
        let mut at = 0;
        while at + step <= failure.input.len() {
            let mut input = failure.input.clone();
            input.drain(at..at + step);
            match replay(target, &input) {
                Err(what) => failure = Failure { input, what },
                Ok(_) => at += step,
            }
        }
        step /= 2;
    }
    failure
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragile(input: &[u8]) -> Seen {
        let text = String::from_utf8_lossy(input);
        assert!(!text.contains("[[[["), "too deep");
        Seen::of(text.matches('[').count())
    }

    #[test]
    fn a_weak_spot_is_found_and_shortened() {
        let target = Target { name: "fragile", run: fragile, words: &[], longest: 4096 };
        let failure = Run::new(1, [b"a[b]c".to_vec()]).go(&target, 1_000_000, Duration::from_secs(60));
        let failure = failure.expect("it is found");
        assert_eq!((failure.input.as_slice(), failure.what.as_str()), (&b"[[[["[..], "too deep"));
    }
}
