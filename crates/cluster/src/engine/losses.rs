//! Which machines vanished, and how fast their units may be placed elsewhere.
//!
//! One machine that vanishes has most likely died. When many vanish within one TTL, that is more likely our own network
//! than all of them, they will be back, and moving everything onto the rest would do the harm. So from more
//! than a part of all machines on ([`Policy::mass_loss`]) their units are placed elsewhere only at a certain pace. One machine
//! alone is never many, however few there are. What was placed elsewhere before the limit was reached stays there.
use super::Policy;
use crate::{model::*, view::View};
use std::collections::{BTreeMap, BTreeSet};

/// So many machines vanished at once that their units are placed elsewhere only a few at a time. Display gives a
/// sentence for the log and for events.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{lost} of {all} machines vanished within {} s; until they are back their units are placed elsewhere \
     at most {units} every {} s, since the fault may be on this side",
    .window.as_secs_f64(), .period.as_secs_f64()
)]
#[allow(missing_docs)]
pub struct MassLoss {
    pub lost: usize,
    pub all: usize,
    /// The time within which they vanished.
    pub window: Time,
    /// The pace from now on.
    pub units: usize,
    pub period: Time,
}

#[derive(Clone, Debug)]
pub(super) struct Losses {
    /// The machines that were there when last looked.
    present: BTreeSet<MachineId>,
    /// Machines that are not there though nobody said so, as long as that matters.
    lost: BTreeMap<MachineId, Loss>,
    /// When the last of all was lost, as far as is known.
    latest: Time,
    /// Something changed since they were counted last.
    recount: bool,
    /// When the present period of the pace began, and the units placed in it.
    period: Time,
    placed: usize,
}

#[derive(Clone, Copy, Debug)]
struct Loss {
    at: Time,
    limited: bool,
}

impl Losses {
    /// Before `known_from` nothing is known of who is there.
    pub(super) fn new(known_from: Time) -> Self {
        Losses {
            present: BTreeSet::new(),
            lost: BTreeMap::new(),
            latest: known_from,
            recount: true,
            period: Time::ZERO,
            placed: 0,
        }
    }

    /// The first look: machines that hold units and are not there are lost.
    pub(super) fn begin(&mut self, view: &View) {
        self.present = view.machines().map(|(id, _)| id).chain(view.unread_presences()).cloned().collect();
        let held = view.schedule().map(|(_, id, _)| id).chain(view.all_leaving().map(|(_, id)| id));
        let gone = held.filter(|id| !self.present.contains(*id));
        let loss = Loss { at: self.latest, limited: false };
        self.lost = gone.filter(|id| !view.has_left(id)).map(|id| (id.clone(), loss)).collect();
    }

    /// Looks at machines that came, changed or went; those that went are lost at `at`.
    pub(super) fn follow(&mut self, view: &View, ids: &BTreeSet<MachineId>, at: Time) {
        for id in ids {
            if view.may_be_there(id) {
                self.present.insert(id.clone());
                self.recount |= self.lost.remove(id).is_some();
            } else if view.has_left(id) {
                self.present.remove(id);
                self.recount |= self.lost.remove(id).is_some();
            } else if self.present.remove(id) {
                self.lost.insert(id.clone(), Loss { at, limited: false });
                self.latest = self.latest.max(at);
                self.recount = true;
            }
        }
    }

    /// Nothing is known of who is there before `until`: whoever is not there then counts as lost then.
    pub(super) fn hold_until(&mut self, until: Time) {
        self.latest = self.latest.max(until);
        for loss in self.lost.values_mut() {
            *loss = Loss { at: loss.at.max(until), limited: false };
        }
        self.recount = true;
    }

    /// Finds out whether units have to wait, once it is known who is there. `idle`: no unit waits.
    pub(super) fn count(&mut self, view: &View, policy: &Policy, now: Time, idle: bool) -> Option<MassLoss> {
        let window = policy.window;
        let recent = |loss: &Loss| loss.at.saturating_add(window) > now;
        if idle {
            // It is over when all are placed and a window has passed.
            for loss in self.lost.values_mut().filter(|loss| !recent(loss)) {
                loss.limited = false;
            }
        }
        let holds = |id: &MachineId| view.scheduled_on(id).chain(view.leaving_from(id)).next().is_some();
        self.lost.retain(|id, loss| recent(loss) || loss.limited || holds(id));
        if !std::mem::take(&mut self.recount) {
            return None;
        }
        let counts = |loss: &Loss| loss.limited || recent(loss);
        let lost = self.lost.values().filter(|loss| counts(loss)).count();
        let all = self.present.len() + lost;
        let (part, of) = policy.mass_loss;
        let mass = lost > 1 && lost as u128 * u128::from(of) > all as u128 * u128::from(part);
        let before = self.lost.values().any(|loss| loss.limited);
        for loss in self.lost.values_mut() {
            loss.limited = mass && counts(loss);
        }
        let (units, period) = (policy.pace_units, policy.pace_period);
        (mass && !before).then_some(MassLoss { lost, all, window, units, period })
    }

    /// When a machine that is not there was lost.
    pub(super) fn lost_at(&mut self, id: &MachineId, now: Time) -> Time {
        // One that was never seen, or so long ago that it was forgotten: its units came to it just now.
        self.lost.entry(id.clone()).or_insert(Loss { at: now, limited: false }).at
    }

    /// When the last of all was lost; one that has held a unit which is nowhere now may be among them.
    pub(super) fn latest(&self) -> Time {
        self.latest
    }

    /// Whether the pace holds at all.
    pub(super) fn is_mass(&self) -> bool {
        self.lost.values().any(|loss| loss.limited)
    }

    /// Whether the pace holds for the units of a machine.
    pub(super) fn is_limited(&self, id: &MachineId) -> bool {
        self.lost.get(id).is_some_and(|loss| loss.limited)
    }

    /// When the next unit may be placed elsewhere where the pace holds; not later than `now`: at once.
    pub(super) fn next_at(&self, policy: &Policy, now: Time) -> Time {
        if self.placed < policy.pace_units.max(1) {
            return now;
        }
        self.period.saturating_add(policy.pace_period)
    }

    /// Notes that a unit was placed elsewhere where the pace holds.
    pub(super) fn place(&mut self, policy: &Policy, now: Time) {
        if self.placed == 0 || now >= self.period.saturating_add(policy.pace_period) {
            (self.period, self.placed) = (now, 0);
        }
        self.placed += 1;
    }
}
