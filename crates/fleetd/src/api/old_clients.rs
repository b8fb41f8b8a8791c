//! What fleetctl 1.0 needs to get on with a server that is faster than its own was.
//!
//! Its `restart` of a launched unit asks for `loaded` and then waits for `launched`, before it asks for that: with its own server it saw the
//! old state, for agents there looked every few seconds. Here the unit has stopped by then, and it would wait for ever. So the first look
//! of such a client at a unit, after it asked for `loaded`, shows what was before: it goes on and asks for `launched`, and the unit is
//! stopped and started. Its other commands look again a quarter of a second later.

use fleet_cluster::model::DesiredState;
use fleet_unit::UnitName;
use hyper::header::{self, HeaderMap};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the client library of fleetctl 1.0 calls itself; its version follows.
const USER_AGENT: &str = "google-api-go-client/";
/// Units remembered at the same time; the oldest are forgotten first.
const LIMIT: usize = 256;
/// Such a client looks within a quarter of a second; whoever has not by then is gone.
const LIFE: Duration = Duration::from_secs(5);

/// Whether a request comes from fleetctl 1.0 or another client made with the same library.
pub(super) fn is_old(headers: &HeaderMap) -> bool {
    let agent = headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok());
    agent.is_some_and(|agent| agent.starts_with(USER_AGENT))
}

/// Units that such clients asked to be loaded, and have not looked at since.
#[derive(Debug, Default)]
pub(super) struct Stopped(Mutex<VecDeque<(UnitName, Instant)>>);

impl Stopped {
    /// A client asked for a state of a unit that was desired to be in another.
    pub(super) fn asked(&self, name: &UnitName, before: DesiredState, desired: DesiredState, now: Instant) {
        let mut units = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        units.retain(|(known, since)| known != name && now.duration_since(*since) < LIFE);
        if (before, desired) == (DesiredState::Launched, DesiredState::Loaded) {
            units.push_back((name.clone(), now));
            if units.len() > LIMIT {
                units.pop_front();
            }
        }
    }

    /// Whether a client that looks at a unit is to be shown `launched` once more.
    pub(super) fn shows_launched(&self, name: &UnitName, now: Instant) -> bool {
        let mut units = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = units.iter().position(|(known, _)| known == name);
        let taken = found.and_then(|index| units.remove(index));
        taken.is_some_and(|(_, since)| now.duration_since(since) < LIFE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DesiredState::{Inactive, Launched, Loaded};

    #[test]
    fn only_the_first_look_after_a_stop_shows_what_was() {
        let (stopped, now) = (Stopped::default(), Instant::now());
        let name = |text: &str| UnitName::parse(text).unwrap();
        let (a, b) = (name("a.service"), name("b.service"));
        stopped.asked(&a, Launched, Loaded, now);
        stopped.asked(&b, Loaded, Loaded, now);
        assert!(!stopped.shows_launched(&b, now));
        assert!(stopped.shows_launched(&a, now));
        assert!(!stopped.shows_launched(&a, now));
        // What it asks for afterwards counts.
        stopped.asked(&a, Launched, Loaded, now);
        stopped.asked(&a, Loaded, Launched, now);
        assert!(!stopped.shows_launched(&a, now));
        stopped.asked(&a, Launched, Inactive, now);
        assert!(!stopped.shows_launched(&a, now));
        stopped.asked(&a, Launched, Loaded, now);
        assert!(!stopped.shows_launched(&a, now + LIFE));
    }

    #[test]
    fn memory_is_bounded() {
        let (stopped, now) = (Stopped::default(), Instant::now());
        let name = |number: usize| UnitName::parse(&format!("u{number}.service")).unwrap();
        for number in 0..=LIMIT {
            stopped.asked(&name(number), Launched, Loaded, now);
        }
        assert!(!stopped.shows_launched(&name(0), now));
        assert!(stopped.shows_launched(&name(LIMIT), now));
    }

    #[test]
    fn old_clients_say_so() {
        let mut headers = HeaderMap::new();
        assert!(!is_old(&headers));
        headers.insert(header::USER_AGENT, header::HeaderValue::from_static("google-api-go-client/0.5"));
        assert!(is_old(&headers));
        headers.insert(header::USER_AGENT, header::HeaderValue::from_static("curl/7.88"));
        assert!(!is_old(&headers));
    }
}
