//! When an isolated machine stops a unit, and when another may start it (OnIsolation=stop).
//!
//! A machine is *there* as long as the server has accepted a renewal of its presence within the TTL. Agent and server
//! each know one side of that only, by clocks of their own, and both take the careful side:
//!
//! - The agent counts from when it *sent* the newest renewal that was acknowledged. The server accepted that
//!   later, and gives the machine up at least a TTL after that. The agent has the unit stopped [`safe_span`] after sending.
//! - The server counts from when it accepted the newest renewal: then the lease begins anew. When it has run out
//!   the engine sees the machine gone, and waits for [`margin`] more before it places the unit elsewhere.
//!
//! **What the clocks may do.** Only spans of one monotonic clock are ever compared with one another: no clock has to show the
//! right time, and none is set by another. Each clock of the cluster, agents', store's and engine's, may run fast or slow
//! by one part in [`DRIFT`] at most, steadily or not. It has to go on while the machine is suspended (`CLOCK_BOOTTIME`).
//! What stands still unseen, as a virtual machine that is paused does together with its clocks, is beyond this: on waking it
//! may run the unit for as long as its agent takes to look at the clock.
//!
//! With a TTL *T* and drift *d* = 1/[`DRIFT`]: the unit is stopped at most *T*(1 − 2*d*)/(1 − *d*) of true time after sending,
//! and the machine is given up at the earliest *T*/(1 + *d*) after accepting, which is later; the margin comes on
//! top, for an agent that is woken late or a process that is slow to die.
//!
//! **What the agent has to do.**
//!
//! - It asks [`isolation`] at the times that this names. A unit that is due is to it as one that nobody wants
//!   ([`still_wanted`]): [`crate::agent::next`] stops it and takes its file away, so that nothing else on the machine starts it. Where
//!   that did not end it in time, its processes are killed.
//! - It renews every [`renewal_period`], so that two lost renewals do not stop anything yet.
//! - It keeps the time of the newest acknowledged renewal where a restarted fleetd finds it: who does not know it
//!   has to stop at once. For a fleetd that ends for good, or hangs, there is the guard, which asks the same questions.
//! - It starts a unit again when a newer renewal is acknowledged, if it is still wanted. It listens to one
//!   session at a time, the newest.
//!
//! **What the server has to do.** The acknowledgement of a renewal is sent on the agent's session behind all changes of what
//! is wanted there that were committed before the presence was written. So an agent that is told that its machine is
//! there again has been told first what was moved elsewhere meanwhile. And the engine's decision to do so is committed only if the
//! machine has no presence then ([`crate::engine::Decision::absent`]): of the two, presence and decision, one comes first.
//!
//! A machine that is there is asked ([`crate::model::Change::Leaving`]): a unit that was taken off it is placed elsewhere when its agent has
//! answered that nothing of it runs, which it does once it knows that the unit was taken off.
//!
//! **What the engine does.** A unit whose machine vanished is placed elsewhere at once with OnIsolation=keep, and
//! after [`margin`] with OnIsolation=stop. Where the engine does not know since when a machine is gone, as after its own start or an outage of
//! the store, it counts from the end of its grace, which is a TTL at least.
use crate::model::*;
use fleet_unit::{OnIsolation, UnitName};

/// A clock counts at most this much less or more than the time that passes: one part in so many.
pub const DRIFT: u32 = 100;

/// How long after sending a renewal that was acknowledged no other machine can have got the unit, by the agent's clock.
pub fn safe_span(ttl: Time) -> Time {
    ttl - ttl / (DRIFT / 2)
}

/// How long after it saw a machine gone the engine waits before it places a unit elsewhere that must not run twice.
pub fn margin(ttl: Time) -> Time {
    ttl / 20
}

/// How often an agent with such units renews its presence.
pub fn renewal_period(ttl: Time) -> Time {
    ttl / 8
}

/// The part of the TTL in which processes that would not stop are killed, as its reciprocal.
const KILLING: u32 = 15;

/// The part of the TTL for which a unit is left alone in any case, as its reciprocal: otherwise one that may take long
/// to stop would have to be stopped whenever a renewal is a little late.
const UNTOUCHED: u32 = 2;

/// What isolation asks to be done with a unit now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// Nothing.
    #[default]
    Nothing,
    /// It has to be stopped, and not to be started.
    Stop,
    /// What still runs of it has to be killed.
    Kill,
}

/// When a unit is due, if no newer renewal is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// When it has to be stopped.
    pub stop: Time,
    /// When what still runs has to be killed.
    pub kill: Time,
    /// When nothing may run any more.
    pub end: Time,
}

/// When a unit is due that may take `stop_timeout` to stop (systemd's TimeoutStopSec). `renewed`: when the newest
/// acknowledged renewal was sent.
///
/// It is stopped as late as it can be, but never before half the TTL has passed; so it may get less time than it asks
/// for before it is killed: 12 of the 30 seconds of the usual TTL.
pub fn deadlines(renewed: Time, ttl: Time, stop_timeout: Time) -> Deadlines {
    let end = renewed.saturating_add(safe_span(ttl));
    let kill = end.saturating_sub(ttl / KILLING);
    let stop = kill.saturating_sub(stop_timeout).max(renewed.saturating_add(ttl / UNTOUCHED));
    Deadlines { stop, kill, end }
}

/// What isolation asks of the units of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Isolation {
    /// Units that are due, and what for.
    pub due: Vec<(UnitName, Due)>,
    /// When to ask again, if no newer renewal is acknowledged.
    pub wake_at: Option<Time>,
}

/// What isolation asks of these units at `now`: all with OnIsolation=stop that are wanted here or run here, with the time
/// each may take to stop. `renewed` as in [`deadlines`]; `None`: it is not known that there ever was one.
pub fn isolation<'a>(
    units: impl IntoIterator<Item = (&'a UnitName, Time)>,
    renewed: Option<Time>,
    ttl: Time,
    now: Time,
) -> Isolation {
    let mut isolation = Isolation::default();
    for (name, stop_timeout) in units {
        let due = due(renewed, ttl, stop_timeout, now);
        if due > Due::Nothing {
            isolation.due.push((name.clone(), due));
        }
        if let Some(renewed) = renewed {
            let Deadlines { stop, kill, .. } = deadlines(renewed, ttl, stop_timeout);
            let next = [stop, kill].into_iter().find(|at| *at > now);
            isolation.wake_at = [isolation.wake_at, next].into_iter().flatten().min();
        }
    }
    isolation
}

/// What isolation asks of one unit; see [`isolation`].
pub fn due(renewed: Option<Time>, ttl: Time, stop_timeout: Time, now: Time) -> Due {
    let Some(renewed) = renewed else { return Due::Kill };
    let Deadlines { stop, kill, .. } = deadlines(renewed, ttl, stop_timeout);
    if now >= kill {
        Due::Kill
    } else if now >= stop {
        Due::Stop
    } else {
        Due::Nothing
    }
}

/// What an agent makes of an acknowledged renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// It counts at once: no unit was due yet.
    Counts,
    /// It counts when all units have been looked at that were due before.
    CountsAfter,
    /// It can't be made use of: what was moved elsewhere meanwhile may not have been told yet.
    Void,
}

/// What to make, at `now`, of the acknowledgement of a renewal, when the one before was sent at `renewed`. `told`: all that
/// the server said before has been looked at.
///
/// Presence was renewed without a gap if the acknowledgement is here within the safe span: it was accepted before that.
/// Otherwise the machine may have counted as lost in between.
pub fn renewal(renewed: Option<Time>, ttl: Time, now: Time, told: bool) -> Renewal {
    let within = |span: Time| renewed.is_some_and(|renewed| now < renewed.saturating_add(span));
    if within(ttl / UNTOUCHED) {
        Renewal::Counts
    } else if told || within(safe_span(ttl)) {
        Renewal::CountsAfter
    } else {
        Renewal::Void
    }
}

/// Before this no unit is due, whatever time it may take to stop.
pub fn untouched_until(renewed: Time, ttl: Time) -> Time {
    renewed.saturating_add(ttl / UNTOUCHED)
}

/// What is wanted of a unit here, with regard to isolation.
pub fn still_wanted(wanted: Option<&Wanted>, due: Due) -> Option<&Wanted> {
    wanted.filter(|_| due == Due::Nothing)
}

/// Whether a machine may give up its presence on purpose: nothing with OnIsolation=stop runs there (or may run: `None`, its
/// state is not known), since that may be started elsewhere at once. The units: all on the machine.
pub fn may_leave<'a>(units: impl IntoIterator<Item = (OnIsolation, Option<&'a SystemdState>)>) -> bool {
    let blocks = |(on_isolation, state): (OnIsolation, Option<&SystemdState>)| {
        on_isolation == OnIsolation::Stop && state.is_none_or(SystemdState::is_live)
    };
    !units.into_iter().any(blocks)
}

#[cfg(test)]
mod tests;
