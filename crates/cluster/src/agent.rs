//! What to do on one machine to make it what it should be.
use crate::model::*;
use fleet_unit::Hash;
use std::sync::Arc;

/// A job of systemd that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Job {
    Start,
    Stop,
}

/// What is known of one unit on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The text of its file in the units directory, if it is there and linked.
    pub text: Option<Arc<str>>,
    /// The hash of the file with which fleet started it since the machine booted.
    pub launched: Option<Hash>,
    /// What systemd says; `None` before it was asked.
    pub systemd: Option<SystemdState>,
    /// What is under way.
    pub job: Option<Job>,
}

/// The next thing to do for one unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do; it is as it should be (or nothing can be done before something else ends).
    Rest,
    /// Ask systemd for its state.
    Ask,
    /// Write its file and link it; systemd has to reload afterwards when it has the unit loaded.
    Install,
    /// Start it, with this file.
    Start(Hash),
    /// Stop it.
    Stop,
    /// It runs already with this file: note that, start nothing.
    Adopt(Hash),
    /// It was stopped: fleet no longer holds it started.
    Release,
    /// Unlink and delete its file.
    Remove,
    /// Nothing of it is left here: forget it.
    Forget,
}

/// The next step for a unit of which `wanted` is wanted here (`None`: nothing).
pub fn next(_wanted: Option<&Wanted>, _observed: &Observed) -> Step {
    todo!()
}

/// What to report of a unit, or `None` when there is nothing of it here yet.
pub fn report(_wanted: Option<&Wanted>, _observed: &Observed, _problem: Option<&str>) -> Option<UnitReport> {
    todo!()
}
