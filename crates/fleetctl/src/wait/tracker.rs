//! What a waiting command makes of events: which units have come where they should, which never
//! will, and what the others wait for. Pure: time comes in as an argument.
use fleet_api::events::{Event, UnitEvent};
use fleet_api::types::{Explanation, Reason, UnitState};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Where the units are to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// On a machine, known to its systemd.
    Loaded,
    /// Started: systemd's start job has ended, and well.
    Launched,
    /// No longer running.
    Stopped,
    /// On no machine.
    Unloaded,
    /// Forgotten, and nothing of it left on any machine.
    Gone,
}

impl Goal {
    /// The desired state that goes with it.
    fn desired(self) -> &'static str {
        match self {
            Goal::Launched => "launched",
            Goal::Loaded | Goal::Stopped => "loaded",
            Goal::Unloaded | Goal::Gone => "inactive",
        }
    }

    /// The state as the original's messages name it.
    pub(crate) fn state(self) -> &'static str {
        if self == Goal::Gone { "gone" } else { self.desired() }
    }

    /// Whether a machine is needed for it.
    fn needs_machine(self) -> bool {
        matches!(self, Goal::Loaded | Goal::Launched)
    }
}

/// How a unit ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is where it should be.
    Reached {
        /// Its current state.
        state: String,
        /// The machine it is on; empty when on none.
        machine_id: String,
    },
    /// It will not get there.
    Failed {
        /// Why.
        why: String,
        /// The machine on which that happened; empty when on none.
        machine_id: String,
        /// What systemd said of it there.
        state: Option<UnitState>,
    },
}

/// What a unit waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// Nothing is known of it yet.
    Unheard,
    /// No machine has been found for it; the reasons by machine.
    Unplaced(Vec<Reason>),
    /// A machine fits, and the cluster does not place it there yet: why.
    Delayed(String),
    /// A machine works on it.
    OnMachine {
        /// The machine; empty when it is several.
        machine_id: String,
        /// What systemd says of it there.
        state: Option<UnitState>,
        /// What went wrong there.
        problems: Vec<Reason>,
    },
}

impl Waiting {
    /// Whether there is a reason why it will not come by itself. Where no machine is out of the question, one is about to be found.
    pub(crate) fn is_lasting(&self) -> bool {
        match self {
            Waiting::Unplaced(reasons) => !reasons.is_empty(),
            Waiting::Delayed(_) => true,
            Waiting::Unheard | Waiting::OnMachine { .. } => false,
        }
    }
}

/// Where the events come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The server's events: a unit counts as launched only when its start job has ended.
    Events,
    /// Polling the original's server, which calls a unit launched as soon as it has asked for it.
    Polling,
}

/// One unit that is waited for.
#[derive(Debug)]
struct Tracked {
    /// Created by this command, so that every problem is of now.
    fresh: bool,
    /// Problems that were there at first: they may be left over from what was done before.
    old_problems: Option<Vec<Reason>>,
    latest: Option<UnitEvent>,
    /// Whether the present snapshot has had it.
    seen: bool,
    /// Since when no machine has been found for it.
    unplaced_since: Option<Instant>,
    done: bool,
}

/// Follows units to their goal.
#[derive(Debug)]
pub(crate) struct Tracker {
    goal: Goal,
    source: Source,
    units: BTreeMap<String, Tracked>,
    /// How long a unit may be without a machine.
    unplaced_limit: Option<Duration>,
    /// In a snapshot, what is not there does not exist.
    in_snapshot: bool,
}

impl Tracker {
    /// Follows these units; `true` stands with those that were created just now.
    pub(crate) fn new(
        goal: Goal,
        units: impl IntoIterator<Item = (String, bool)>,
        unplaced_limit: Option<Duration>,
    ) -> Self {
        let tracked = |fresh| Tracked {
            fresh,
            old_problems: None,
            latest: None,
            seen: false,
            unplaced_since: None,
            done: false,
        };
        let units = units.into_iter().map(|(name, fresh)| (name, tracked(fresh))).collect();
        Tracker { goal, source: Source::Events, units, unplaced_limit, in_snapshot: true }
    }

    /// A new snapshot begins.
    pub(crate) fn begin(&mut self, source: Source) {
        self.source = source;
        self.in_snapshot = true;
        self.units.values_mut().for_each(|unit| unit.seen = false);
    }

    /// Takes an event in; the units that it decides.
    pub(crate) fn take(&mut self, now: Instant, event: &Event) -> Vec<(String, Verdict)> {
        match event {
            Event::Unit(event) => self.unit(now, event).into_iter().collect(),
            Event::UnitGone { name } => self.gone(name).into_iter().collect(),
            Event::Ready if self.in_snapshot => {
                self.in_snapshot = false;
                let unseen = self.units.iter().filter(|(_, unit)| !unit.seen && !unit.done);
                let unseen: Vec<String> = unseen.map(|(name, _)| name.clone()).collect();
                unseen.iter().filter_map(|name| self.gone(name)).collect()
            }
            Event::Ready
            | Event::Reset
            | Event::Machine(_)
            | Event::MachineGone { .. }
            | Event::Notice(_)
            | Event::NoticeGone { .. } => Vec::new(),
        }
    }

    fn unit(&mut self, now: Instant, event: &UnitEvent) -> Option<(String, Verdict)> {
        let name = &event.explanation.name;
        let (goal, source) = (self.goal, self.source);
        let unit = self.units.get_mut(name).filter(|unit| !unit.done)?;
        unit.seen = true;
        let problems: Vec<Reason> = problems(&event.explanation).cloned().collect();
        let old =
            unit.old_problems.get_or_insert_with(|| if unit.fresh { Vec::new() } else { problems.clone() });
        let stale = problems == *old;
        if !stale {
            // They have changed: whatever comes now is of now.
            old.clear();
        }
        let verdict = judge(goal, source, event, stale);
        unit.done = verdict.is_some();
        unit.latest = Some(event.clone());
        // What the cluster holds up for a while is not given up for that.
        let explanation = &event.explanation;
        let nowhere = explanation.machine_id.is_empty() && explanation.delayed.is_empty();
        let unplaced = goal.needs_machine() && nowhere && !event.global;
        unit.unplaced_since = if unplaced { unit.unplaced_since.or(Some(now)) } else { None };
        verdict.map(|verdict| (name.clone(), verdict))
    }

    fn gone(&mut self, name: &str) -> Option<(String, Verdict)> {
        let unit = self.units.get_mut(name).filter(|unit| !unit.done)?;
        unit.done = true;
        let verdict = match self.goal {
            Goal::Gone | Goal::Unloaded => {
                Verdict::Reached { state: self.goal.state().to_owned(), machine_id: String::new() }
            }
            _ => failed("it was destroyed meanwhile", ""),
        };
        Some((name.to_owned(), verdict))
    }

    /// Whether all is decided.
    pub(crate) fn is_done(&self) -> bool {
        self.units.values().all(|unit| unit.done)
    }

    /// How many units there are in all.
    pub(crate) fn len(&self) -> usize {
        self.units.len()
    }

    /// The units that are not decided, and what each waits for.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (&str, Waiting)> {
        let goal = self.goal;
        let undecided = self.units.iter().filter(|(_, unit)| !unit.done);
        undecided.map(move |(name, unit)| (name.as_str(), waiting(goal, unit.latest.as_ref())))
    }

    /// When the next unit will have been without a machine for too long.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let limit = self.unplaced_limit?;
        let undecided = self.units.values().filter(|unit| !unit.done);
        undecided.filter_map(|unit| unit.unplaced_since).map(|since| since + limit).min()
    }

    /// Gives up the units that have been without a machine for too long, or all of them.
    pub(crate) fn give_up(&mut self, now: Instant, all: bool) -> Vec<(String, Waiting)> {
        let (goal, limit) = (self.goal, self.unplaced_limit);
        let late = |unit: &Tracked| {
            let unplaced = unit.unplaced_since.zip(limit);
            unplaced.is_some_and(|(since, limit)| now >= since + limit)
        };
        let given_up = self.units.iter_mut().filter(|(_, unit)| !unit.done && (all || late(unit)));
        given_up
            .map(|(name, unit)| {
                unit.done = true;
                (name.clone(), waiting(goal, unit.latest.as_ref()))
            })
            .collect()
    }
}

fn waiting(goal: Goal, latest: Option<&UnitEvent>) -> Waiting {
    let Some(event) = latest else { return Waiting::Unheard };
    let it = &event.explanation;
    if goal.needs_machine() && !it.delayed.is_empty() {
        return Waiting::Delayed(it.delayed.clone());
    }
    if goal.needs_machine() && it.machine_id.is_empty() {
        return Waiting::Unplaced(it.unplaced.clone());
    }
    let state = event.states.iter().find(|state| state.machine_id == it.machine_id);
    let state = state.or(event.states.first()).cloned();
    let machine_id = match (&state, it.machine_id.is_empty()) {
        (Some(state), true) => state.machine_id.clone(),
        _ => it.machine_id.clone(),
    };
    Waiting::OnMachine { machine_id, state, problems: it.problems.clone() }
}

fn failed(why: impl Into<String>, machine_id: &str) -> Verdict {
    Verdict::Failed { why: why.into(), machine_id: machine_id.to_owned(), state: None }
}

/// Whether a unit has come to its goal, or never will. `stale` says that its problems were there
/// before this command did anything.
pub(crate) fn judge(goal: Goal, source: Source, event: &UnitEvent, stale: bool) -> Option<Verdict> {
    let it = &event.explanation;
    let reached =
        || Some(Verdict::Reached { state: it.current_state.clone(), machine_id: it.machine_id.clone() });
    if goal == Goal::Gone {
        // Known: someone has submitted it anew, so the one to be destroyed is gone.
        return if event.known { reached() } else { None };
    }
    if !event.known {
        return match goal {
            Goal::Unloaded if event.states.is_empty() => reached(),
            Goal::Unloaded => None,
            _ => Some(failed("it was destroyed meanwhile", &it.machine_id)),
        };
    }
    if it.desired_state != goal.desired() {
        let why = format!("its desired state was set to {} meanwhile", it.desired_state);
        return Some(failed(why, &it.machine_id));
    }
    let state = event.states.iter().find(|state| state.machine_id == it.machine_id);
    // A report of the file that was there before says nothing.
    let state = state.filter(|s| s.hash.is_empty() || event.hash.is_empty() || s.hash == event.hash);
    let at_goal = it.current_state == goal.desired();
    let problem = || {
        let reason = problems(it).next()?;
        Some(Verdict::Failed {
            why: reason.reason.clone(),
            machine_id: reason.machine_id.clone(),
            state: state.cloned(),
        })
    };
    match goal {
        Goal::Launched | Goal::Loaded if !at_goal => {
            if stale {
                return None;
            }
            problem()
        }
        Goal::Launched => {
            if let Some(failure) = problem() {
                return Some(failure);
            }
            if let Some(failure) = state.and_then(unloadable) {
                return Some(failure);
            }
            let state = state?;
            match state.systemd_active_state.as_str() {
                "failed" => Some(of_systemd(state, "it has failed".to_owned())),
                "activating" | "deactivating" if source == Source::Polling => None,
                _ => reached(),
            }
        }
        Goal::Loaded => problem().or_else(|| state.and_then(unloadable)).or_else(reached),
        Goal::Stopped => {
            // A machine that it was taken off may be at work on it still.
            if (!at_goal && !event.global) || event.states.iter().any(is_live) {
                return None;
            }
            reached()
        }
        Goal::Unloaded | Goal::Gone => {
            if (!at_goal && !event.global) || !it.machine_id.is_empty() || !event.states.is_empty() {
                return None;
            }
            reached()
        }
    }
}

/// The problems that count: a unit that has a machine cannot be held up by another one, which it
/// was taken off.
fn problems(it: &Explanation) -> impl Iterator<Item = &Reason> {
    it.problems.iter().filter(|problem| {
        it.machine_id.is_empty() || problem.machine_id.is_empty() || problem.machine_id == it.machine_id
    })
}

/// The failure of a unit that systemd does not take.
fn unloadable(state: &UnitState) -> Option<Verdict> {
    let load = state.systemd_load_state.as_str();
    let refused = matches!(load, "bad-setting" | "error" | "masked");
    refused.then(|| of_systemd(state, format!("systemd does not load it: {load}")))
}

fn of_systemd(state: &UnitState, why: String) -> Verdict {
    Verdict::Failed { why, machine_id: state.machine_id.clone(), state: Some(state.clone()) }
}

/// Whether anything of the unit may still run.
fn is_live(state: &UnitState) -> bool {
    !matches!(state.systemd_active_state.as_str(), "inactive" | "failed" | "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worth_a_line_in_a_log() {
        let reason = Reason { reason: "its metadata has no disk".into(), ..Default::default() };
        assert!(Waiting::Unplaced(vec![reason]).is_lasting());
        assert!(Waiting::Delayed("many machines vanished".into()).is_lasting());
        // It is not placed yet, and can be.
        assert!(!Waiting::Unplaced(Vec::new()).is_lasting());
        assert!(!Waiting::Unheard.is_lasting());
    }

    /// An event from `desired current active/sub`, on machine m.
    fn event(desired: &str, current: &str, active: &str) -> UnitEvent {
        let states = match active {
            "" => Vec::new(),
            active => vec![UnitState {
                hash: "h".into(),
                machine_id: "m".into(),
                name: "a.service".into(),
                systemd_active_state: active.into(),
                systemd_load_state: "loaded".into(),
                systemd_sub_state: "sub".into(),
            }],
        };
        UnitEvent {
            known: true,
            hash: "h".into(),
            global: false,
            explanation: Explanation {
                current_state: current.into(),
                desired_state: desired.into(),
                machine_id: "m".into(),
                name: "a.service".into(),
                ..Default::default()
            },
            states,
        }
    }

    fn with_problem(mut event: UnitEvent, text: &str) -> UnitEvent {
        event.explanation.problems = vec![Reason { machine_id: "m".into(), reason: text.into() }];
        event
    }

    fn tracker(goal: Goal, fresh: bool) -> Tracker {
        Tracker::new(goal, [("a.service".to_owned(), fresh)], Some(Duration::from_secs(30)))
    }

    /// What the tracker makes of events, in a few words.
    fn verdicts(goal: Goal, fresh: bool, events: &[UnitEvent]) -> Vec<String> {
        let mut tracker = tracker(goal, fresh);
        let now = Instant::now();
        let mut words = |event: &Event| {
            tracker
                .take(now, event)
                .into_iter()
                .map(|(_, verdict)| match verdict {
                    Verdict::Reached { state, machine_id } => format!("{state}@{machine_id}"),
                    Verdict::Failed { why, .. } => format!("failed: {why}"),
                })
                .collect::<Vec<_>>()
                .join(",")
        };
        events.iter().map(|event| words(&Event::Unit(event.clone()))).collect()
    }

    #[test]
    fn a_start() {
        let events = [
            event("launched", "inactive", ""),
            event("launched", "loaded", "inactive"),
            event("launched", "loaded", "activating"),
            event("launched", "launched", "active"),
            event("launched", "launched", "failed"),
        ];
        assert_eq!(verdicts(Goal::Launched, true, &events), ["", "", "", "launched@m", ""]);
    }

    /// A oneshot unit is inactive when its start job has ended.
    #[test]
    fn a_oneshot() {
        assert_eq!(
            verdicts(Goal::Launched, true, &[event("launched", "launched", "inactive")]),
            ["launched@m"]
        );
    }

    #[test]
    fn a_start_that_fails() {
        let failed = event("launched", "launched", "failed");
        assert_eq!(verdicts(Goal::Launched, true, std::slice::from_ref(&failed)), ["failed: it has failed"]);
        assert_eq!(
            verdicts(Goal::Launched, true, &[with_problem(failed, "start job failed")]),
            ["failed: start job failed"]
        );
        let early = with_problem(event("launched", "loaded", "inactive"), "cannot write the file");
        assert_eq!(
            verdicts(Goal::Launched, true, std::slice::from_ref(&early)),
            ["failed: cannot write the file"]
        );
        // Left over from before, until another comes.
        let again = with_problem(event("launched", "loaded", "inactive"), "disk full");
        assert_eq!(
            verdicts(Goal::Launched, false, &[early.clone(), early, again]),
            ["", "", "failed: disk full"]
        );
    }

    #[test]
    fn a_problem_that_went_and_came_again_counts() {
        let problem = with_problem(event("launched", "loaded", "inactive"), "no");
        let without = event("launched", "loaded", "inactive");
        assert_eq!(
            verdicts(Goal::Launched, false, &[problem.clone(), without, problem]),
            ["", "", "failed: no"]
        );
    }

    #[test]
    fn a_replaced_unit_is_not_judged_by_its_old_file() {
        let mut old = event("launched", "launched", "active");
        old.hash = "new".into();
        let mut new = old.clone();
        new.states[0].hash = "new".into();
        assert_eq!(verdicts(Goal::Launched, true, &[old, new]), ["", "launched@m"]);
    }

    #[test]
    fn others_may_interfere() {
        assert_eq!(
            verdicts(Goal::Launched, true, &[event("inactive", "inactive", "")]),
            ["failed: its desired state was set to inactive meanwhile"]
        );
        let gone = UnitEvent { known: false, ..event("launched", "inactive", "active") };
        assert_eq!(verdicts(Goal::Launched, true, &[gone]), ["failed: it was destroyed meanwhile"]);
    }

    #[test]
    fn a_stop_is_over_when_nothing_runs() {
        let events = [
            event("loaded", "launched", "active"),
            event("loaded", "launched", "deactivating"),
            event("loaded", "loaded", "active"),
            event("loaded", "loaded", "failed"),
        ];
        assert_eq!(verdicts(Goal::Stopped, false, &events), ["", "", "", "loaded@m"]);
    }

    /// What is left of a unit on a machine that it was taken off.
    #[test]
    fn another_machine_does_not_decide_a_start() {
        let elsewhere = |mut event: UnitEvent, text: &str| {
            event.explanation.problems.push(Reason { machine_id: "old".into(), reason: text.into() });
            event
        };
        let events = [
            elsewhere(event("launched", "loaded", "inactive"), "cannot be removed"),
            elsewhere(event("launched", "launched", "active"), "cannot be removed"),
        ];
        assert_eq!(verdicts(Goal::Launched, true, &events), ["", "launched@m"]);
        // Nor does it make an old problem a new one.
        let old = with_problem(event("launched", "loaded", "inactive"), "left over");
        let events = [old.clone(), elsewhere(old, "cannot be removed")];
        assert_eq!(verdicts(Goal::Launched, false, &events), ["", ""]);
    }

    #[test]
    fn a_stop_waits_for_every_machine() {
        let mut moved = event("loaded", "loaded", "inactive");
        let mut left = moved.states[0].clone();
        left.machine_id = "old".into();
        left.systemd_active_state = "deactivating".into();
        moved.states.push(left);
        let mut done = moved.clone();
        done.states.pop();
        assert_eq!(verdicts(Goal::Stopped, false, &[moved, done]), ["", "loaded@m"]);
    }

    #[test]
    fn an_unload_is_over_when_nothing_is_left() {
        let mut left = event("inactive", "inactive", "deactivating");
        left.explanation.machine_id.clear();
        let mut done = event("inactive", "inactive", "");
        done.explanation.machine_id.clear();
        assert_eq!(verdicts(Goal::Unloaded, false, &[left, done]), ["", "inactive@"]);
    }

    #[test]
    fn a_destroyed_unit_is_gone_when_the_server_says_so() {
        let now = Instant::now();
        let mut it = tracker(Goal::Gone, false);
        let stopping = UnitEvent { known: false, ..event("inactive", "inactive", "deactivating") };
        assert_eq!(it.take(now, &Event::Unit(stopping)), []);
        assert_eq!(it.take(now, &Event::Ready), []);
        assert_eq!(it.take(now, &Event::UnitGone { name: "a.service".into() }).len(), 1);
        assert!(it.is_done());
        // Gone already when the snapshot was made.
        let mut it = tracker(Goal::Gone, false);
        assert_eq!(it.take(now, &Event::Ready).len(), 1);
        // Submitted anew.
        assert_eq!(verdicts(Goal::Gone, false, &[event("inactive", "inactive", "")]).len(), 1);
    }

    #[test]
    fn only_the_first_ready_ends_the_snapshot() {
        let now = Instant::now();
        let mut it = tracker(Goal::Launched, true);
        it.take(now, &Event::Unit(event("launched", "loaded", "")));
        assert_eq!(it.take(now, &Event::Ready), []);
        assert_eq!(it.take(now, &Event::Ready), []);
        it.begin(Source::Events);
        let lost = it.take(now, &Event::Ready);
        assert_eq!(lost, [("a.service".to_owned(), failed("it was destroyed meanwhile", ""))]);
    }

    #[test]
    fn a_unit_without_a_machine_is_given_up() {
        let now = Instant::now();
        let mut it = tracker(Goal::Launched, true);
        let mut nowhere = event("launched", "inactive", "");
        nowhere.explanation.machine_id.clear();
        nowhere.explanation.unplaced = vec![Reason { machine_id: "m".into(), reason: "no ssd".into() }];
        it.take(now, &Event::Unit(nowhere.clone()));
        let later = now + Duration::from_secs(20);
        it.take(later, &Event::Unit(nowhere.clone()));
        assert_eq!(it.deadline(), Some(now + Duration::from_secs(30)));
        assert_eq!(it.give_up(later, false), []);
        // Once placed, there is no limit.
        it.take(later, &Event::Unit(event("launched", "inactive", "")));
        assert_eq!(it.deadline(), None);
        it.take(later, &Event::Unit(nowhere.clone()));
        let unplaced = Waiting::Unplaced(nowhere.explanation.unplaced);
        let given_up = it.give_up(later + Duration::from_secs(30), false);
        assert_eq!(given_up, [("a.service".to_owned(), unplaced)]);
        assert!(it.is_done());
    }

    #[test]
    fn what_the_cluster_holds_up_is_said() {
        let mut it = tracker(Goal::Launched, true);
        let mut held = event("launched", "inactive", "");
        held.explanation.machine_id.clear();
        held.explanation.delayed = "many machines vanished at once".into();
        it.take(Instant::now(), &Event::Unit(held));
        assert_eq!(it.deadline(), None, "it has an end");
        let waiting: Vec<_> = it.waiting().map(|(_, what)| what).collect();
        assert_eq!(waiting, [Waiting::Delayed("many machines vanished at once".into())]);
    }

    /// The original's server says launched before systemd has done it.
    #[test]
    fn polling_waits_for_the_start_job() {
        let mut it = tracker(Goal::Launched, true);
        it.begin(Source::Polling);
        let now = Instant::now();
        assert_eq!(it.take(now, &Event::Unit(event("launched", "launched", "activating"))), []);
        assert_eq!(it.take(now, &Event::Unit(event("launched", "launched", "active"))).len(), 1);
    }
}
