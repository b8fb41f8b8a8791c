//! Connections that have not become a session yet, of which there are only so many.
//!
//! Who opens connections and never finishes the handshake must not keep others out, so no connection ever waits for
//! a place: one too many pushes out the oldest one of the address that has the most. A peer that does what it should is
//! through in a moment, and never the oldest one of many.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio_util::sync::CancellationToken;

#[derive(Debug)]
pub(super) struct Waiting {
    most: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// In the order of their coming.
    places: BTreeMap<u64, (IpAddr, CancellationToken)>,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    number: u64,
    /// Cancelled when others push it out.
    pub(super) pushed_out: CancellationToken,
    waiting: Arc<Waiting>,
}

impl Waiting {
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Waiting { most: most.max(1), inner: Mutex::default() })
    }

    pub(super) fn add(self: &Arc<Self>, address: IpAddr) -> Place {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.places.len() >= self.most {
            inner.push_out();
        }
        let number = inner.next;
        inner.next += 1;
        let pushed_out = CancellationToken::new();
        inner.places.insert(number, (address, pushed_out.clone()));
        Place { number, pushed_out, waiting: self.clone() }
    }
}

impl Inner {
    fn push_out(&mut self) {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for (address, _) in self.places.values() {
            *counts.entry(*address).or_default() += 1;
        }
        let Some(most) = counts.values().copied().max() else { return };
        let victim = self.places.iter().find(|(_, (address, _))| counts.get(address) == Some(&most));
        if let Some(number) = victim.map(|(number, _)| *number)
            && let Some((_, pushed_out)) = self.places.remove(&number)
        {
            pushed_out.cancel();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.waiting.inner.lock().unwrap_or_else(PoisonError::into_inner).places.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn the_oldest_of_the_busiest_address_goes() {
        let waiting = Waiting::new(4);
        let early = waiting.add(address(1));
        let flood: Vec<_> = (0..3).map(|_| waiting.add(address(2))).collect();
        let late = waiting.add(address(3));
        assert!(flood[0].pushed_out.is_cancelled());
        let more = waiting.add(address(2));
        assert!(flood[1].pushed_out.is_cancelled());
        for place in [&early, &flood[2], &late, &more] {
            assert!(!place.pushed_out.is_cancelled());
        }
    }

    #[test]
    fn a_place_given_back_is_free() {
        let waiting = Waiting::new(2);
        let kept = waiting.add(address(1));
        for _ in 0..10 {
            drop(waiting.add(address(2)));
        }
        assert!(!kept.pushed_out.is_cancelled());
        assert_eq!(waiting.inner.lock().unwrap().places.len(), 1);
    }
}
