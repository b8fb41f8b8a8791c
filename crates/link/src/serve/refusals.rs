//! Which refusals are worth a line in the log: each once a minute per address, so that whoever keeps trying does not fill
//! the log.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

const QUIET: Duration = Duration::from_secs(60);
/// Addresses and reasons remembered; beyond that nothing more is logged until some are forgotten.
const MOST: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Refusals {
    seen: HashMap<(IpAddr, String), (Instant, u64)>,
}

impl Refusals {
    /// Whether to log this one; the number says how many like it were not logged since the last.
    pub(super) fn note(&mut self, address: IpAddr, reason: &str, now: Instant) -> Option<u64> {
        if self.seen.len() >= MOST {
            self.seen.retain(|_, (since, _)| now.duration_since(*since) < QUIET);
        }
        let full = self.seen.len() >= MOST;
        match self.seen.get_mut(&(address, reason.to_owned())) {
            Some((since, untold)) if now.duration_since(*since) < QUIET => {
                *untold += 1;
                None
            }
            Some(entry) => {
                let (_, untold) = std::mem::replace(entry, (now, 0));
                Some(untold)
            }
            None if full => None,
            None => {
                self.seen.insert((address, reason.to_owned()), (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_refusal_is_told_once_a_minute() {
        let (one, other): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let mut refusals = Refusals::default();
        let start = Instant::now();
        assert_eq!(refusals.note(one, "wrong token", start), Some(0));
        assert_eq!(refusals.note(one, "wrong token", start + QUIET / 2), None);
        assert_eq!(refusals.note(one, "no TLS", start), Some(0));
        assert_eq!(refusals.note(other, "wrong token", start), Some(0));
        assert_eq!(refusals.note(one, "wrong token", start + QUIET), Some(1));
        assert_eq!(refusals.note(one, "wrong token", start + QUIET), None);
    }

    #[test]
    fn many_addresses_take_bounded_memory() {
        let mut refusals = Refusals::default();
        let start = Instant::now();
        let told =
            (0..5000u32).filter(|n| refusals.note(IpAddr::V4((*n).into()), "x", start).is_some()).count();
        assert_eq!((told, refusals.seen.len()), (MOST, MOST));
        assert_eq!(refusals.note([1, 2, 3, 4].into(), "x", start + QUIET), Some(0), "old ones are forgotten");
    }
}
