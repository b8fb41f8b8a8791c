use super::*;
use crate::testing::{cases, state};
use proptest::prelude::*;

const TEXTS: [&str; 3] = [
    "[Service]\nExecStart=/bin/one\n",
    "# The same with a comment.\n[Service]\nExecStart=/bin/one\n",
    "[Service]\nExecStart=/bin/two\n",
];
const DAMAGED: &str = "[Service\n";

fn file(index: usize) -> UnitFile {
    UnitFile::parse(TEXTS[index]).unwrap()
}
fn wanted(index: usize, state: DesiredState) -> Wanted {
    Wanted { file: file(index), state }
}

const LIVE: [&str; 5] = ["active", "reloading", "activating", "deactivating", "maintenance"];
const DOWN: [&str; 2] = ["inactive", "failed"];

fn observed() -> impl Strategy<Value = Observed> {
    let text =
        prop::sample::select(vec![None, Some(TEXTS[0]), Some(TEXTS[1]), Some(TEXTS[2]), Some(DAMAGED)]);
    let launched = prop::sample::select(vec![None, Some(file(0).hash()), Some(file(2).hash())]);
    let states = LIVE.iter().chain(&DOWN).map(|active| Some(state(active))).chain([None]).collect::<Vec<_>>();
    let job = prop::sample::select(vec![None, Some(Job::Start), Some(Job::Stop)]);
    let all = (text, any::<bool>(), launched, any::<bool>(), prop::sample::select(states), job);
    all.prop_map(|(text, unsure, launched, begun, systemd, job)| Observed {
        text: text.map(Arc::from),
        unsure,
        launched,
        begun,
        inherited: false,
        systemd,
        job,
    })
}

fn wish() -> impl Strategy<Value = Option<Wanted>> {
    let state = prop::sample::select(vec![DesiredState::Loaded, DesiredState::Launched]);
    prop::option::weighted(0.8, (0..TEXTS.len(), state).prop_map(|(index, state)| wanted(index, state)))
}

/// A machine, as much of it as concerns one unit: carries out steps as systemd would.
struct Machine {
    observed: Observed,
    /// What systemd would say if it were asked.
    actual: SystemdState,
    /// The hash a start job under way was begun with.
    starting: Option<Hash>,
    steps: Vec<Step>,
}

impl Machine {
    fn new(observed: &Observed, actual: &str) -> Self {
        let actual = observed.systemd.clone().unwrap_or_else(|| state(actual));
        let starting = observed.job.and(observed.text.as_deref()).and_then(hash_of);
        Machine { observed: observed.clone(), actual, starting, steps: Vec::new() }
    }

    /// One step, or, when the answer is to rest, the end of a job or of a deactivation. False: nothing moves any more.
    fn advance(&mut self, wanted: Option<&Wanted>) -> bool {
        let step = next(wanted, &self.observed);
        self.steps.push(step.clone());
        match step {
            Step::Rest if self.observed.job.is_some() => self.end_job(),
            Step::Rest if self.actual.active == "deactivating" => {
                self.actual = state("inactive");
                self.observed.systemd = None;
            }
            Step::Rest | Step::Forget => return false,
            Step::Ask => self.observed.systemd = Some(self.actual.clone()),
            Step::Install => {
                self.observed.text = wanted.map(|wanted| wanted.file.shared_text());
                self.observed.unsure = false;
                self.observed.systemd = None;
            }
            Step::Start(hash) => {
                assert!(!self.observed.unsure, "it starts what it knows");
                assert_eq!(
                    self.observed.text.as_deref().and_then(hash_of),
                    Some(hash),
                    "it starts what is there"
                );
                self.observed.job = Some(Job::Start);
                self.observed.begun = true;
                self.starting = Some(hash);
            }
            Step::Stop => {
                assert_ne!(self.observed.job, Some(Job::Stop));
                self.observed.job = Some(Job::Stop);
                self.observed.launched = None;
                self.observed.begun = true;
            }
            Step::Adopt(hash) => {
                self.observed.launched = Some(hash);
                self.observed.begun = false;
            }
            Step::Take => self.observed.inherited = false,
            Step::Release => {
                assert!(!self.actual.is_live(), "it is given up while it runs");
                self.observed.launched = None;
                self.observed.begun = false;
            }
            Step::Remove => {
                assert!(!self.actual.is_live(), "its file is taken away while it runs");
                self.observed.text = None;
            }
        }
        true
    }

    fn end_job(&mut self) {
        match self.observed.job.take() {
            Some(Job::Start) => {
                self.actual = state("active");
                self.observed.launched = self.starting.take();
                self.observed.begun = false;
            }
            Some(Job::Stop) => {
                self.actual = state("inactive");
                self.observed.launched = None;
                self.observed.begun = false;
            }
            None => {}
        }
        self.observed.systemd = None;
    }

    fn settle(&mut self, wanted: Option<&Wanted>) {
        for _ in 0..24 {
            if !self.advance(wanted) {
                return;
            }
        }
        panic!("no end: {:?}", self.steps);
    }
}

proptest! {
    #![proptest_config(cases(4000))]

    /// From anything that may be found, the steps lead to what is wanted.
    #[test]
    fn steps_lead_to_what_is_wanted(
        wanted in wish(),
        observed in observed(),
        actual in prop::sample::select(LIVE.iter().chain(&DOWN).copied().collect::<Vec<_>>()),
    ) {
        let mut machine = Machine::new(&observed, actual);
        machine.settle(wanted.as_ref());
        let end = &machine.observed;
        prop_assert_eq!(end.job, None);
        match &wanted {
            None => {
                prop_assert_eq!(machine.steps.last(), Some(&Step::Forget));
                prop_assert_eq!((end.text.as_deref(), end.launched, end.begun), (None, None, false));
            }
            Some(wanted) => {
                prop_assert_eq!(end.text.as_deref(), Some(wanted.file.text()));
                let launched = (wanted.state == DesiredState::Launched).then(|| wanted.file.hash());
                prop_assert_eq!(end.launched, launched);
                let report = report(Some(wanted), end, None).unwrap();
                prop_assert_eq!((report.current, report.hash), (wanted.state, wanted.file.hash()));
            }
        }
        // And there it rests, also after fleetd was restarted and had to ask again.
        let before = machine.steps.len();
        machine.observed.systemd = None;
        machine.settle(wanted.as_ref());
        let after = &machine.steps[before..];
        let idle = |step: &Step| matches!(step, Step::Ask | Step::Rest | Step::Forget);
        prop_assert!(after.iter().all(idle), "{:?}", after);
    }

    /// What is as wanted is not touched, whatever state it is in.
    #[test]
    fn what_is_as_wanted_is_left_alone(
        index in 0..TEXTS.len(),
        launch in any::<bool>(),
        active in prop::sample::select(LIVE.iter().chain(&DOWN).copied().collect::<Vec<_>>()),
        asked in any::<bool>(),
    ) {
        let wanted = wanted(index, if launch { DesiredState::Launched } else { DesiredState::Loaded });
        let observed = Observed {
            text: Some(wanted.file.shared_text()),
            unsure: false,
            launched: launch.then(|| wanted.file.hash()),
            begun: false,
            inherited: false,
            systemd: asked.then(|| state(active)),
            job: None,
        };
        let expected = if asked { Step::Rest } else { Step::Ask };
        prop_assert_eq!(next(Some(&wanted), &observed), expected);
    }

    /// A unit that runs is stopped only if that is wanted, or if it was started with another file.
    #[test]
    fn nothing_is_stopped_without_a_reason(wanted in wish(), observed in observed()) {
        if next(wanted.as_ref(), &observed) == Step::Stop {
            let Some(wanted) = &wanted else { return Ok(()) };
            let hash = wanted.file.hash();
            let started = observed.launched.is_some() || observed.begun || observed.job == Some(Job::Start);
            let here = observed.text.as_deref().and_then(hash_of);
            let unwanted = wanted.state == DesiredState::Loaded && started;
            let other = observed.launched.is_some_and(|launched| launched != hash) || here != Some(hash);
            prop_assert!(unwanted || other, "{:?} {:?}", wanted, observed);
        }
    }

    #[test]
    fn reports_guess_nothing(wanted in wish(), observed in observed(), problem in prop::option::of("no space")) {
        let report = report(wanted.as_ref(), &observed, problem.as_deref());
        let here = observed.text.is_some() || observed.launched.is_some();
        match (&report, here) {
            (None, true) => prop_assert_eq!(&observed.systemd, &None),
            (None, false) => prop_assert!(wanted.is_none() || problem.is_none()),
            (Some(report), true) => {
                prop_assert_eq!(Some(&report.systemd), observed.systemd.as_ref());
                let current = observed.text.as_deref().and_then(hash_of);
                prop_assert!(report.current == CurrentState::Inactive || current == Some(report.hash));
            }
            (Some(report), false) => {
                prop_assert_eq!((report.systemd.load.as_str(), report.current), ("not-found", CurrentState::Inactive));
            }
        }
        prop_assert_eq!(report.and_then(|report| report.problem.clone()), if here && observed.systemd.is_none() || !here && wanted.is_none() { None } else { problem });
    }
}

#[test]
fn a_new_unit_is_installed_and_started() {
    let wanted = wanted(0, DesiredState::Launched);
    let mut machine = Machine::new(&Observed::default(), "inactive");
    machine.settle(Some(&wanted));
    let hash = wanted.file.hash();
    assert_eq!(
        machine.steps,
        [Step::Install, Step::Ask, Step::Start(hash), Step::Rest, Step::Ask, Step::Rest]
    );
    // It fails, or somebody stops it by hand: that is reported, not changed.
    for active in ["failed", "inactive"] {
        machine.observed.systemd = Some(state(active));
        assert_eq!(next(Some(&wanted), &machine.observed), Step::Rest);
        assert_eq!(report(Some(&wanted), &machine.observed, None).unwrap().current, CurrentState::Launched);
    }
}

#[test]
fn a_changed_unit_is_stopped_with_its_old_file() {
    let (old, new) = (wanted(0, DesiredState::Launched), wanted(2, DesiredState::Launched));
    let mut machine = Machine::new(&Observed::default(), "inactive");
    machine.settle(Some(&old));
    machine.steps.clear();
    assert_eq!(report(Some(&new), &machine.observed, None).unwrap().current, CurrentState::Inactive);
    machine.settle(Some(&new));
    let steps: Vec<_> =
        machine.steps.into_iter().filter(|step| !matches!(step, Step::Ask | Step::Rest)).collect();
    assert_eq!(steps, [Step::Stop, Step::Install, Step::Start(new.file.hash())]);
}

#[test]
fn another_comment_stops_nothing() {
    for state in [DesiredState::Loaded, DesiredState::Launched] {
        let mut machine = Machine::new(&Observed::default(), "inactive");
        machine.settle(Some(&wanted(0, state)));
        machine.steps.clear();
        let commented = wanted(1, state);
        assert_eq!(report(Some(&commented), &machine.observed, None).unwrap().current, state);
        machine.settle(Some(&commented));
        assert_eq!(machine.steps, [Step::Install, Step::Ask, Step::Rest]);
        assert_eq!(machine.observed.text.as_deref(), Some(TEXTS[1]));
    }
}

#[test]
fn an_unwanted_unit_is_stopped_and_then_removed() {
    let mut machine = Machine::new(&Observed::default(), "inactive");
    machine.settle(Some(&wanted(0, DesiredState::Launched)));
    machine.steps.clear();
    machine.settle(None);
    assert_eq!(machine.steps, [Step::Stop, Step::Rest, Step::Ask, Step::Remove, Step::Forget]);
    assert_eq!(report(None, &machine.observed, None), None);
}

#[test]
fn what_the_original_left_is_adopted() {
    let found = Observed { text: Some(TEXTS[0].into()), ..Observed::default() };
    let mut machine = Machine::new(&found, "active");
    let launched = wanted(0, DesiredState::Launched);
    machine.settle(Some(&launched));
    assert_eq!(machine.steps, [Step::Ask, Step::Adopt(launched.file.hash()), Step::Rest]);
    // Only loaded: a timer may have started it.
    let mut machine = Machine::new(&found, "active");
    machine.settle(Some(&wanted(0, DesiredState::Loaded)));
    assert_eq!(machine.steps, [Step::Ask, Step::Rest]);
    // With an older file than is wanted, it has to be started anew.
    let mut machine = Machine::new(&found, "active");
    let newer = wanted(2, DesiredState::Launched);
    machine.settle(Some(&newer));
    assert!(machine.steps.contains(&Step::Stop) && machine.steps.contains(&Step::Start(newer.file.hash())));
}

#[test]
fn what_is_inherited_goes_on_until_it_is_wanted() {
    let found = Observed { text: Some(TEXTS[0].into()), inherited: true, ..Observed::default() };
    for active in LIVE.iter().chain(&DOWN) {
        let systemd = Some(state(active));
        let asked = Observed { systemd, ..found.clone() };
        for observed in [&found, &asked] {
            assert_eq!(next(None, observed), Step::Rest);
            assert_eq!(report(None, observed, None), None);
        }
    }
    let mut machine = Machine::new(&found, "active");
    let launched = wanted(0, DesiredState::Launched);
    machine.settle(Some(&launched));
    assert_eq!(machine.steps, [Step::Take, Step::Ask, Step::Adopt(launched.file.hash()), Step::Rest]);
    // From then on it is as any other.
    machine.steps.clear();
    machine.settle(None);
    assert!(machine.steps.contains(&Step::Stop) && machine.steps.contains(&Step::Remove));
    // Its file was taken away by hand: nothing is left to wait for.
    let mut machine = Machine::new(&Observed { inherited: true, ..Observed::default() }, "inactive");
    machine.settle(None);
    assert_eq!(machine.steps, [Step::Take, Step::Forget]);
}

#[test]
fn what_ends_by_itself_is_started_when_it_has_ended() {
    let ending = Observed { text: Some(TEXTS[0].into()), ..Observed::default() };
    let mut machine = Machine::new(&ending, "deactivating");
    let launched = wanted(0, DesiredState::Launched);
    machine.settle(Some(&launched));
    assert_eq!(machine.steps[..4], [Step::Ask, Step::Rest, Step::Ask, Step::Start(launched.file.hash())]);
}

/// Another file was to be written, which failed or did not; then this one is wanted again.
#[test]
fn what_may_have_been_written_over_is_written_again() {
    for state in [DesiredState::Loaded, DesiredState::Launched] {
        let torn = Observed { text: Some(TEXTS[0].into()), unsure: true, ..Observed::default() };
        let mut machine = Machine::new(&torn, "inactive");
        let wanted = wanted(0, state);
        machine.settle(Some(&wanted));
        assert_eq!(machine.steps[..3], [Step::Ask, Step::Install, Step::Ask]);
        let systemd = Some(machine.actual.clone());
        let report = report(Some(&wanted), &Observed { systemd, ..torn }, None).unwrap();
        assert_eq!(report.current, CurrentState::Inactive);
    }
}

#[test]
fn what_else_has_the_name_is_not_touched_when_nothing_is_wanted() {
    let foreign = Observed { systemd: Some(state("active")), ..Observed::default() };
    assert_eq!(next(None, &foreign), Step::Forget);
    assert_eq!(report(None, &foreign, None), None);
}

#[test]
fn a_start_that_is_no_longer_wanted_is_cut_short() {
    let starting = |text: &str| Observed {
        text: Some(text.into()),
        systemd: Some(state("activating")),
        job: Some(Job::Start),
        ..Observed::default()
    };
    assert_eq!(next(None, &starting(TEXTS[0])), Step::Stop);
    assert_eq!(next(Some(&wanted(0, DesiredState::Loaded)), &starting(TEXTS[0])), Step::Stop);
    assert_eq!(next(Some(&wanted(2, DesiredState::Launched)), &starting(TEXTS[0])), Step::Stop);
    assert_eq!(next(Some(&wanted(1, DesiredState::Launched)), &starting(TEXTS[0])), Step::Rest);
}

/// fleetd was ended while systemd carried out a start.
#[test]
fn a_start_of_which_the_end_is_not_known() {
    let of = |active: &str, begun| Observed {
        text: Some(TEXTS[0].into()),
        begun,
        systemd: Some(state(active)),
        ..Observed::default()
    };
    let (loaded, launched) = (wanted(0, DesiredState::Loaded), wanted(0, DesiredState::Launched));
    let hash = launched.file.hash();
    for active in ["active", "activating"] {
        assert_eq!(next(Some(&loaded), &of(active, true)), Step::Stop);
        assert_eq!(next(Some(&loaded), &of(active, false)), Step::Rest, "a timer may have started it");
        assert_eq!(next(Some(&launched), &of(active, true)), Step::Adopt(hash));
    }
    // It may wait in systemd for another unit, which a stop ends.
    assert_eq!(next(Some(&loaded), &of("inactive", true)), Step::Stop);
    assert_eq!(next(None, &of("inactive", true)), Step::Stop);
    // Also where another file is wanted by now, but not where that differs in comments only.
    assert_eq!(next(Some(&wanted(2, DesiredState::Launched)), &of("inactive", true)), Step::Stop);
    assert_eq!(next(Some(&wanted(2, DesiredState::Launched)), &of("inactive", false)), Step::Install);
    assert_eq!(next(Some(&wanted(1, DesiredState::Launched)), &of("inactive", true)), Step::Install);
    // It may never have reached systemd.
    assert_eq!(next(Some(&launched), &of("inactive", true)), Step::Start(hash));
    assert_eq!(report(Some(&launched), &of("activating", true), None).unwrap().current, CurrentState::Loaded);
}

/// fleetd was ended while systemd carried out a stop, or was not told how that ended.
#[test]
fn a_stop_of_which_the_end_is_not_known() {
    let of = |active: &str, job| Observed {
        text: Some(TEXTS[0].into()),
        begun: true,
        systemd: Some(state(active)),
        job,
        ..Observed::default()
    };
    let (loaded, launched) = (wanted(0, DesiredState::Loaded), wanted(0, DesiredState::Launched));
    let hash = launched.file.hash();
    // Wanted again, it has to run again, whether it has stopped meanwhile or not.
    assert_eq!(next(Some(&launched), &of("active", None)), Step::Adopt(hash));
    assert_eq!(next(Some(&launched), &of("deactivating", None)), Step::Rest);
    assert_eq!(next(Some(&launched), &of("inactive", None)), Step::Start(hash));
    assert_eq!(next(Some(&launched), &of("failed", None)), Step::Start(hash));
    // And it counts as launched until it has certainly stopped.
    for (active, job) in [("active", None), ("deactivating", Some(Job::Stop)), ("inactive", Some(Job::Stop))]
    {
        let current = |wanted| report(wanted, &of(active, job), None).map(|report| report.current);
        assert_eq!(current(Some(&loaded)), Some(CurrentState::Launched), "{active}");
        assert_eq!(current(None), Some(CurrentState::Launched), "{active}");
    }
}

#[test]
fn a_file_that_could_not_be_written_is_reported() {
    let wanted = wanted(0, DesiredState::Launched);
    let report = |problem| report(Some(&wanted), &Observed::default(), problem);
    assert_eq!(report(None), None);
    let said = report(Some("No space left on device")).unwrap();
    assert_eq!(
        (said.systemd.load.as_str(), said.problem.as_deref()),
        ("not-found", Some("No space left on device"))
    );
    assert_eq!((said.current, said.systemd.is_live()), (CurrentState::Inactive, false));
}
