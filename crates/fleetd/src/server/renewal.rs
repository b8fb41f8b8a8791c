//! Whether it can be believed that a lease was renewed.
//!
//! The member of etcd that leads renews leases by itself, without asking the others (etcd 3.4, and 3.5 for long). One whose machine was suspended believes for
//! a moment after waking that it still leads, and its clock has stood still: it renews a lease that has ended long ago. A server beside it has missed that,
//! too. So after the machine was suspended, or when the last renewal is longer ago than a lease lives, a presence is not renewed but written anew, which
//! takes a majority, and the view has to come so far. Nothing of that is done after a shorter outage: a new leader gives each lease its whole time.
//!
//! How long the machine was suspended is what its servers are told ([`super::Server::with_suspended`]): their own clocks stand still meanwhile.

use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// For how long the machine has been suspended since it booted.
pub(super) type Suspended = Arc<dyn Fn() -> Duration + Send + Sync>;

/// When something was, by both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    at: Instant,
    suspended: Duration,
}

impl Moment {
    pub(super) fn now(suspended: &Suspended) -> Moment {
        Moment { at: Instant::now(), suspended: suspended() }
    }

    /// Whether a lease that was renewed at this moment may have ended by `now` without anybody here knowing. It is believed over a suspension
    /// that is no longer than what an engine waits before it goes by the end of a presence.
    pub(super) fn is_doubtful(self, now: Moment, ttl: Duration) -> bool {
        let asleep = now.suspended.saturating_sub(self.suspended);
        let awake = now.at.saturating_duration_since(self.at);
        asleep > ttl / 20 || asleep + awake > ttl
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_time_asleep_nor_awake_may_be_long() {
        let (at, ttl) = (Instant::now(), Duration::from_secs(40));
        let after = |awake: u64, asleep: u64| Moment {
            at: at + Duration::from_secs(awake),
            suspended: Duration::from_secs(100 + asleep),
        };
        let doubtful = |awake, asleep| after(0, 0).is_doubtful(after(awake, asleep), ttl);
        assert!(!doubtful(0, 0) && !doubtful(40, 0) && !doubtful(38, 2));
        assert!(doubtful(41, 0) && doubtful(0, 3) && doubtful(39, 2));
    }
}
