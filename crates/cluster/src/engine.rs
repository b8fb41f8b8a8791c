//! Which units to place and to take away.
use crate::{
    model::*,
    view::{Effects, View},
};
use fleet_unit::UnitName;

/// A decision of the engine. It is committed only if the unit's and the schedule's records still have
/// the revisions it was made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The unit.
    pub unit: UnitName,
    /// Where it is to be; `None`: nowhere.
    pub machine: Option<MachineId>,
    /// Why, in words for the log.
    pub reason: String,
    /// The revision of the unit's record this was decided from (0: there is none).
    pub unit_revision: Revision,
    /// The revision of its entry in the schedule this was decided from (0: there is none).
    pub schedule_revision: Revision,
}

/// The engine: remembers what may have to be decided.
#[derive(Debug)]
pub struct Engine {}

impl Engine {
    /// Starts at `now`; until `now + grace` no unit is taken from a machine merely because that machine
    /// is not there (yet).
    pub fn new(_now: Time, _grace: Time) -> Self {
        todo!()
    }
    /// Notes what a change to the view may ask to be decided.
    pub fn note(&mut self, _effects: &Effects) {
        todo!()
    }
    /// Decides what there is to decide now, at most `limit` units. To be called again after the decisions are in the view.
    pub fn decide(&mut self, _view: &View, _now: Time, _limit: usize) -> Vec<Decision> {
        todo!()
    }
    /// When [`decide`](Self::decide) has to be called again though nothing changed, if ever.
    pub fn wake_at(&self) -> Option<Time> {
        todo!()
    }
}
