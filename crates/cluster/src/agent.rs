//! What to do on one machine to make it what it should be.
//!
//! [`next`] says the next step for one unit from what is wanted of it and what is known of it; the caller
//! carries it out, notes what that changed, and asks again, until the answer is [`Step::Rest`] or [`Step::Forget`].
//! Nothing else is remembered, so that fleetd may end at any point and go on where it was.
//!
//! The first line that holds says the step. *live* is [`SystemdState::is_live`]; *hash* is that of the wanted file;
//! two texts with the same hash differ in comments and blanks only. *begun*: fleet asked for a start or a stop, and does not
//! know how that ended (it was ended itself meanwhile, or systemd did not say); where the unit is not to run it counts that it may
//! run, or wait in systemd to be started, which does not show. *unsure*: what is said to be here may be something else, or
//! systemd may not have read it.
//!
//! | wanted   | file here       | started by fleet | systemd             | step |
//! |----------|-----------------|------------------|---------------------|------|
//! | *a start job of fleet is under way:* |||||
//! | nothing or loaded | any    | any              | any                 | Stop |
//! | launched | another hash    | any              | any                 | Stop |
//! | launched | this hash       | any              | not known           | Ask: how far it is is reported |
//! | launched | this hash       | any              | any                 | Rest |
//! | *a stop job of fleet is under way:* |||||
//! | any      | any             | any              | not known           | Ask |
//! | any      | any             | any              | any                 | Rest |
//! | *no job, and the file was here before fleet first ran in this life of the machine:* |||||
//! | nothing  | some            | no               | any                 | Rest: nobody has decided anything about it |
//! | nothing  | none (any more) | no               | any                 | Take |
//! | loaded, launched | any     | no               | any                 | Take: from then on it is as any other |
//! | *no job:* |||||
//! | nothing  | none            | no               | any                 | Forget: what else has that name is not ours |
//! | nothing  | any             | any              | not known           | Ask |
//! | nothing  | any             | any              | live                | Stop |
//! | nothing  | any             | begun            | not live            | Stop: a start may be waiting |
//! | nothing  | any             | yes              | not live            | Release |
//! | nothing  | some            | no               | not live            | Remove |
//! | loaded, launched | none    | no               | any                 | Install |
//! | loaded, launched | any     | any              | not known           | Ask |
//! | loaded   | any             | yes              | live                | Stop |
//! | loaded   | any             | yes              | not live            | Release |
//! | loaded   | any             | begun            | any                 | Stop |
//! | launched | any             | with another hash | live               | Stop |
//! | launched | any             | with another hash | not live           | Release |
//! | launched | another hash    | no, begun        | live                | Stop: it runs an older file |
//! | launched | another hash    | begun            | not live            | Stop: a start of the older file may be waiting |
//! | loaded, launched | another text, unsure | any | any                 | Install |
//! | loaded   | this text       | no               | any                 | Rest: what a timer or socket started is left alone |
//! | launched | this text       | with this hash   | any                 | Rest: whether it runs, failed or ended is reported, not changed |
//! | launched | this text       | no, begun        | deactivating        | Rest: until it has ended |
//! | launched | this text       | no, begun        | live                | Adopt |
//! | launched | this text       | no, begun        | not live            | Start |
//!
//! When a stop job of fleet has ended well, fleet no longer holds the unit started, whatever is wanted by then.
//!
//! After a restart of fleetd files and marks (*started by fleet*) are as they were, so a unit that is as wanted
//! rests. After a boot of the machine both are gone, and it is installed and started. What the original fleet left here
//! (files, and no marks) is *inherited*: it goes on as it is until it is wanted, and then what runs is adopted.
use crate::model::*;
use fleet_unit::{Hash, UnitFile};
use std::sync::Arc;

/// A job that fleet gave systemd and that is under way.
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
    /// Whether another file may be there by now, or systemd may not have read this one: an attempt to write one, or to have it read,
    /// failed or was cut off.
    pub unsure: bool,
    /// The hash of the file with which fleet started it since the machine booted, if it has not asked for a stop since.
    pub launched: Option<Hash>,
    /// Whether fleet has asked for a start or a stop since then and does not know how that ended.
    pub begun: bool,
    /// Whether its file was here before fleet first ran since the machine booted, and nothing was wanted of it since.
    pub inherited: bool,
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
    /// It was inherited and is wanted: from now on it is as any other unit.
    Take,
    /// It was stopped: fleet no longer holds it started.
    Release,
    /// Unlink and delete its file.
    Remove,
    /// Nothing of it is left here: forget it.
    Forget,
}

/// The next step for a unit of which `wanted` is wanted here (`None`: nothing).
pub fn next(wanted: Option<&Wanted>, observed: &Observed) -> Step {
    if let Some(job) = observed.job {
        let goes_on = wanted.is_some_and(|wanted| {
            wanted.state == DesiredState::Launched && hash_here(wanted, observed) == Some(wanted.file.hash())
        });
        return match observed.systemd {
            _ if job == Job::Start && !goes_on => Step::Stop,
            None => Step::Ask,
            Some(_) => Step::Rest,
        };
    }
    match wanted.filter(|wanted| wanted.state >= DesiredState::Loaded) {
        None if observed.inherited && observed.text.is_some() => Step::Rest,
        _ if observed.inherited => Step::Take,
        None => next_unwanted(observed),
        Some(wanted) => next_wanted(wanted, observed),
    }
}

fn next_unwanted(observed: &Observed) -> Step {
    let marked = observed.launched.is_some() || observed.begun;
    if observed.text.is_none() && !marked {
        return Step::Forget;
    }
    match &observed.systemd {
        None => Step::Ask,
        Some(state) if state.is_live() || observed.begun => Step::Stop,
        Some(_) if marked => Step::Release,
        Some(_) => Step::Remove,
    }
}

fn next_wanted(wanted: &Wanted, observed: &Observed) -> Step {
    if observed.text.is_none() && observed.launched.is_none() {
        return Step::Install;
    }
    let Some(state) = &observed.systemd else { return Step::Ask };
    let hash = wanted.file.hash();
    let launch = wanted.state == DesiredState::Launched;
    let other = match observed.launched {
        Some(launched) => !launch || launched != hash,
        None => !launch && observed.begun,
    };
    if other {
        return if state.is_live() || observed.begun { Step::Stop } else { Step::Release };
    }
    if observed.unsure || observed.text.as_deref() != Some(wanted.file.text()) {
        let outdated = launch && observed.launched.is_none() && hash_here(wanted, observed) != Some(hash);
        let may_run = state.is_live() || observed.begun;
        return if outdated && may_run { Step::Stop } else { Step::Install };
    }
    if !launch || observed.launched.is_some() {
        return Step::Rest;
    }
    match state.active.as_str() {
        "deactivating" => Step::Rest,
        _ if state.is_live() => Step::Adopt(hash),
        _ => Step::Start(hash),
    }
}

/// The hash of the file that is here; `None` also when what is there is no unit file.
fn hash_here(wanted: &Wanted, observed: &Observed) -> Option<Hash> {
    let text = observed.text.as_deref()?;
    if text == wanted.file.text() {
        return Some(wanted.file.hash());
    }
    hash_of(text)
}

fn hash_of(text: &str) -> Option<Hash> {
    UnitFile::parse(text).ok().map(|file| file.hash())
}

/// What to report of a unit, or `None` when there is nothing of it here yet, or nothing is known of it.
///
/// - What is inherited is not fleet's (yet).
/// - A state of systemd that is not known is not guessed: there is no report until it was asked.
/// - A unit counts as launched when it was started with the wanted file, and until it has stopped; as loaded when that is
///   there, and as inactive while another file is, or may be (golden/04-submit.txt: after --replace).
/// - If not even its file could be written, `problem` is reported with the state of an unknown unit.
pub fn report(wanted: Option<&Wanted>, observed: &Observed, problem: Option<&str>) -> Option<UnitReport> {
    if observed.inherited {
        return None;
    }
    let problem = problem.map(str::to_owned);
    if observed.text.is_none() && observed.launched.is_none() {
        let hash = wanted?.file.hash();
        problem.as_ref()?;
        let state = |load: &str, active: &str, sub: &str| SystemdState {
            load: load.to_owned(),
            active: active.to_owned(),
            sub: sub.to_owned(),
        };
        let systemd = state("not-found", "inactive", "dead");
        return Some(UnitReport { current: CurrentState::Inactive, hash, systemd, problem });
    }
    let systemd = observed.systemd.clone()?;
    let here = match wanted {
        Some(wanted) => hash_here(wanted, observed),
        None => observed.text.as_deref().and_then(hash_of),
    };
    let expected = wanted.map(|wanted| wanted.file.hash()).or(here);
    let launch = wanted.is_some_and(|wanted| wanted.state == DesiredState::Launched);
    let current = match observed.launched {
        _ if here.is_none() || here != expected => CurrentState::Inactive,
        Some(launched) if Some(launched) == expected => CurrentState::Launched,
        Some(_) => CurrentState::Inactive,
        None if observed.begun && !launch => CurrentState::Launched,
        None if observed.unsure => CurrentState::Inactive,
        None => CurrentState::Loaded,
    };
    // A file that was damaged on the machine has no hash of its own: then that of what runs, or of none.
    let hash = here.or(observed.launched).unwrap_or(Hash([0; 20]));
    Some(UnitReport { current, hash, systemd, problem })
}

#[cfg(test)]
mod tests;
