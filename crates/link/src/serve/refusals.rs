//! Which refusals are worth a line in the log: each once a minute per address, so that whoever keeps trying does not fill
//! the log. What is said of one address is bounded too: a peer that varies what it does wrong, since reasons quote some of it, must
//! neither fill the log nor keep it from telling of others.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::warn;

const QUIET: Duration = Duration::from_secs(60);
/// Addresses remembered; beyond that nothing is logged of new ones until some are forgotten.
const MOST_ADDRESSES: usize = 1024;
/// Reasons remembered of one address; the last of them stands for all further ones.
const MOST_REASONS: usize = 32;
/// The longest reason that is remembered and logged, bytes.
const LONGEST: usize = 300;

/// What stands for the reasons beyond [`MOST_REASONS`].
const MANY: &str = "and for many other reasons";

/// Writes refusals to the log.
#[derive(Debug, Default)]
pub(super) struct RefusalLog(Mutex<Refusals>);

impl RefusalLog {
    /// Says that a peer was refused, and why.
    pub(super) fn refused(&self, address: SocketAddr, reason: &str) {
        let noted = {
            let mut refusals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            refusals.note(address.ip(), reason, Instant::now())
        };
        match noted {
            Some((reason, 0)) => warn!(peer = %address, "refused {address}: {reason}"),
            Some((reason, more)) => {
                warn!(peer = %address, "refused {address}: {reason} ({more} times more before this)")
            }
            None => {}
        }
    }
}

#[derive(Debug, Default)]
struct Refusals {
    seen: HashMap<IpAddr, HashMap<String, Seen>>,
}

#[derive(Debug)]
struct Seen {
    since: Instant,
    /// Not logged since then.
    untold: u64,
}

impl Refusals {
    /// What to log of this one, if anything; the number says how many like it were not logged since the last.
    fn note(&mut self, address: IpAddr, reason: &str, now: Instant) -> Option<(String, u64)> {
        let fresh = |seen: &Seen| now.duration_since(seen.since) < QUIET;
        if self.seen.len() >= MOST_ADDRESSES && !self.seen.contains_key(&address) {
            self.seen.retain(|_, reasons| reasons.values().any(fresh));
            if self.seen.len() >= MOST_ADDRESSES {
                return None;
            }
        }
        let reasons = self.seen.entry(address).or_default();
        let mut reason = shortened(reason);
        if !reasons.contains_key(&reason) && reasons.len() + 1 >= MOST_REASONS {
            reasons.retain(|_, seen| fresh(seen));
            if reasons.len() + 1 >= MOST_REASONS {
                reason = MANY.to_owned();
            }
        }
        match reasons.get_mut(&reason) {
            Some(seen) if fresh(seen) => {
                seen.untold += 1;
                None
            }
            Some(seen) => {
                let before = std::mem::replace(seen, Seen { since: now, untold: 0 });
                Some((reason, before.untold))
            }
            None => {
                reasons.insert(reason.clone(), Seen { since: now, untold: 0 });
                Some((reason, 0))
            }
        }
    }
}

/// Some of it comes from outside: no control characters into logs and terminals, and no more than a line.
fn shortened(reason: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = reason.chars().map(clean).take(LONGEST).collect();
    while short.len() > LONGEST {
        short.pop();
    }
    if short.len() < reason.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(reason: &str, before: u64) -> Option<(String, u64)> {
        Some((reason.to_owned(), before))
    }

    #[test]
    fn the_same_refusal_is_told_once_a_minute() {
        let (one, other): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let mut refusals = Refusals::default();
        let start = Instant::now();
        assert_eq!(refusals.note(one, "wrong token", start), told("wrong token", 0));
        assert_eq!(refusals.note(one, "wrong token", start + QUIET / 2), None);
        assert_eq!(refusals.note(one, "no TLS", start), told("no TLS", 0));
        assert_eq!(refusals.note(other, "wrong token", start), told("wrong token", 0));
        assert_eq!(refusals.note(one, "wrong token", start + QUIET), told("wrong token", 1));
        assert_eq!(refusals.note(one, "wrong token", start + QUIET), None);
    }

    #[test]
    fn many_addresses_take_bounded_memory() {
        let mut refusals = Refusals::default();
        let start = Instant::now();
        let note =
            |refusals: &mut Refusals, n: u32, at| refusals.note(IpAddr::V4(n.into()), "x", at).is_some();
        let told = (0..5000).filter(|n| note(&mut refusals, *n, start)).count();
        assert_eq!((told, refusals.seen.len()), (MOST_ADDRESSES, MOST_ADDRESSES));
        assert!(note(&mut refusals, 1 << 30, start + QUIET), "old ones are forgotten");
    }

    #[test]
    fn a_peer_of_many_reasons_does_not_silence_what_is_said_of_others() {
        let (one, other): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let mut refusals = Refusals::default();
        let start = Instant::now();
        let said: Vec<_> =
            (0..5000).filter_map(|n| refusals.note(one, &format!("bad name {n}"), start)).collect();
        assert_eq!(said.len(), MOST_REASONS);
        assert_eq!(said.last(), told(MANY, 0).as_ref());
        assert_eq!(refusals.note(other, "wrong token", start), told("wrong token", 0));
        let later = refusals.note(one, "something else", start + QUIET);
        assert_eq!(later, told("something else", 0));
    }

    #[test]
    fn what_a_peer_sent_is_told_in_a_short_line() {
        let mut refusals = Refusals::default();
        let reason = format!("machine \u{1b}[2J\n{}", "ü".repeat(1 << 20));
        let (said, _) = refusals.note([10, 0, 0, 1].into(), &reason, Instant::now()).unwrap();
        assert!(said.len() <= LONGEST + '…'.len_utf8() && said.ends_with("ü…"), "{said}");
        assert!(!said.contains(char::is_control));
    }
}
