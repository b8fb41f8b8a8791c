//! How long to wait before the servers are tried again.
//!
//! After each round through all addresses the wait doubles, from a tenth of a second up to a limit that depends on what went
//! wrong: a host that answers "nothing listens here" costs nothing to ask and will have its server back in a moment; one
//! that does not answer is asked less often, and a server that refuses us least of all. Every wait is shortened by up to
//! half, at random, so that agents that lost the same server do not come back all at once.

use std::time::Duration;

/// What went wrong, by how soon it may be right again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    /// The host is there, its server is not; or a session ended.
    Soon,
    /// Nothing answers.
    Later,
    /// A server has refused us: somebody has to do something.
    Refused,
}

const FIRST: Duration = Duration::from_millis(100);

impl Trouble {
    fn longest(self) -> Duration {
        match self {
            Trouble::Soon => Duration::from_millis(700),
            Trouble::Later => Duration::from_secs(10),
            Trouble::Refused => Duration::from_secs(30),
        }
    }
}

#[derive(Debug)]
pub(super) struct Backoff {
    random: u64,
    round: u32,
}

impl Backoff {
    /// `seed`: another one for each machine.
    pub(super) fn new(seed: u64) -> Self {
        Backoff { random: seed, round: 0 }
    }

    /// A session has lasted: the next trouble is a new one.
    pub(super) fn reset(&mut self) {
        self.round = 0;
    }

    /// How long to wait after a round in which this was the least of the troubles.
    pub(super) fn wait(&mut self, trouble: Trouble) -> Duration {
        let full = FIRST.saturating_mul(1 << self.round.min(16)).min(trouble.longest());
        self.round = self.round.saturating_add(1);
        full.mul_f64(0.5 + self.fraction() / 2.0)
    }

    /// The next random number from 0 to 1 (SplitMix64: enough to spread waits, and the same for the same seed).
    fn fraction(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        f64::from(u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_limit_and_begin_anew_after_a_reset() {
        for trouble in [Trouble::Soon, Trouble::Later, Trouble::Refused] {
            let mut backoff = Backoff::new(1);
            let longest = trouble.longest();
            for round in 0..40 {
                let full = (FIRST * (1 << round.min(16))).min(longest);
                let wait = backoff.wait(trouble);
                assert!(wait >= full / 2 && wait <= full, "round {round}: {wait:?} of {full:?}");
            }
            backoff.reset();
            assert!(backoff.wait(trouble) <= FIRST);
        }
    }

    #[test]
    fn machines_do_not_come_back_all_at_once() {
        let mut waits: Vec<_> =
            (0..1000).map(|seed| Backoff::new(seed).wait(Trouble::Soon).as_millis()).collect();
        waits.sort_unstable();
        // Spread over the whole of the half.
        assert!(waits[0] < 52 && waits[999] > 97 && (70..80).contains(&waits[500]), "{waits:?}");
        let same = (Backoff::new(7).wait(Trouble::Soon), Backoff::new(7).wait(Trouble::Soon));
        assert_eq!(same.0, same.1);
    }
}
