//! Each kind of violation is found, and what may happen is not taken for one.

use super::*;

/// Two hosts, and a unit that was started on the first and runs there. Times of these stories are in seconds.
struct Story(History);

const TTL: Millis = 20_000;

fn ms(seconds: f64) -> Millis {
    (seconds * 1000.0) as Millis
}

impl Story {
    fn new(stops: bool) -> Story {
        let mut story =
            Story(History { machines: vec!["m0".into(), "m1".into()], ttl: TTL, ..History::default() });
        for (hash, marker) in [("h1", "one"), ("h2", "two")] {
            let file = File { marker: marker.into(), stops, ..File::default() };
            story.0.files.insert(hash.into(), file);
        }
        story.0.streams.push(Stream { server: 0, start: 0, end: None });
        story.put(1.0, "h1", "launched").seen(2.0, 5, "h1", "launched", Some(0)).run(0, "one", 3.0, None)
    }

    fn give(mut self, at: f64, effect: Effect, outcome: Outcome) -> Story {
        let (start, end) = (ms(at), Some(ms(at + 0.5)));
        self.0.commands.push(Command { what: "a command".into(), effect, start, end, outcome });
        self
    }

    fn put(self, at: f64, file: &str, desired: &str) -> Story {
        self.put_so(at, file, desired, Outcome::Acknowledged { revision: Some(at as u64 * 2) })
    }

    fn put_so(self, at: f64, file: &str, desired: &str, outcome: Outcome) -> Story {
        let file = (!file.is_empty()).then(|| file.to_owned());
        let effect = Effect::Put { unit: "a".into(), file, only_if_new: false, desired: desired.into() };
        self.give(at, effect, outcome)
    }

    fn seen(mut self, at: f64, revision: u64, hash: &str, desired: &str, machine: Option<usize>) -> Story {
        let state = (!hash.is_empty()).then(|| Known { hash: hash.into(), desired: desired.into(), machine });
        self.0.seen.push(Seen { at: ms(at), server: 0, revision, unit: "a".into(), state });
        self
    }

    fn run(mut self, host: usize, marker: &str, start: f64, stop: Option<f64>) -> Story {
        let run = Run {
            unit: "a".into(),
            host,
            marker: marker.into(),
            start: ms(start),
            stop: stop.map(ms),
            how: "success exited 0".into(),
        };
        self.0.runs.push(run);
        self
    }

    /// The run of the beginning ends.
    fn stop(mut self, at: f64) -> Story {
        self.0.runs[0].stop = Some(ms(at));
        self
    }

    fn fault(mut self, kind: FaultKind, host: Option<usize>, start: f64, end: f64) -> Story {
        self.0.faults.push(Fault {
            what: "a fault".into(),
            kind,
            host,
            start: ms(start),
            end: Some(ms(end)),
        });
        self
    }

    fn unwatched(mut self, from: f64, to: f64) -> Story {
        self.0.streams[0].end = Some(ms(from));
        self.0.streams.push(Stream { server: 0, start: ms(to), end: None });
        self
    }

    /// Everything is as the unit's last state says, and runs where it is placed.
    fn end(mut self, change: impl FnOnce(&mut End)) -> Story {
        let mut end = End { at: ms(500.0), revision: 900, present: [0, 1].into(), ..End::default() };
        if let Some(known) = self.0.seen.last().and_then(|seen| seen.state.clone()) {
            let running = States { load: "loaded".into(), active: "active".into(), sub: "running".into() };
            if let Some(host) = known.machine {
                let there = Actual { states: running.clone(), hash: Some(known.hash.clone()) };
                end.actual.insert("a".into(), [(host, there)].into());
                end.reported.insert("a".into(), [(host, running)].into());
            }
            end.units.push(("a".into(), known));
        }
        change(&mut end);
        self.0.end = Some(end);
        self
    }

    #[track_caller]
    fn fine(self) {
        let found = self.0.check();
        assert!(found.is_empty(), "{found:#?}");
    }

    #[track_caller]
    fn found(self, check: &str, text: &str) {
        let found = self.0.check();
        let fits =
            found.iter().any(|violation| violation.check == check && violation.to_string().contains(text));
        assert!(fits, "{check} {text:?} is not in {found:#?}");
    }
}

fn story() -> Story {
    Story::new(false)
}

#[test]
fn all_is_well() {
    story().end(|_| {}).fine();
    story()
        .put(50.0, "", "loaded")
        .seen(50.2, 100, "h1", "loaded", Some(0))
        .stop(50.4)
        .put(100.0, "h2", "launched")
        .seen(100.3, 200, "h2", "launched", Some(0))
        .run(0, "two", 100.4, None)
        .end(|_| {})
        .fine();
}

#[test]
fn a_lost_write() {
    story().end(|end| end.units.clear()).found("G1", "the file of a is none");
    story()
        .put(50.0, "h2", "launched")
        .end(|_| {})
        .found("G1", "is h1 at revision 900, and can only be [\"h2\"]");
    story().put(50.0, "", "loaded").end(|_| {}).found("G1", "the desired state of a is launched");
    story()
        .give(50.0, Effect::Destroy { unit: "a".into() }, Outcome::Acknowledged { revision: None })
        .end(|_| {})
        .found("G1", "a is h1");
    // Seen on the way, though it was written again later.
    story()
        .put(50.0, "h2", "launched")
        .seen(60.0, 100, "h1", "launched", Some(0))
        .found("G1", "at revision 100");
    story()
        .put(50.0, "h2", "launched")
        .seen(60.0, 101, "", "", None)
        .put(70.0, "h2", "launched")
        .found("G1", "none");
    // A server that is not that far yet.
    story().put(50.0, "h2", "launched").seen(60.0, 99, "h1", "launched", Some(0)).fine();
    // What nobody ever wrote.
    story().seen(60.0, 100, "h3", "launched", Some(0)).found("G1", "is h3");
}

#[test]
fn writes_whose_outcome_is_not_known() {
    let unknown = || Outcome::Unknown("cut off".into());
    for change in [|_: &mut End| {}, |end: &mut End| end.units[0].1.hash = "h2".into()] {
        let found = story().put_so(50.0, "h2", "launched", unknown()).end(change).0.check();
        assert!(found.iter().all(|violation| violation.check != "G1"), "{found:?}");
    }
    // It may come late, but a refused one does not.
    let late = |end: &mut End| end.units[0].1.desired = "loaded".into();
    let story = |outcome| story().put_so(50.0, "", "loaded", outcome).put(60.0, "", "launched").end(late);
    assert!(story(unknown()).0.check().iter().all(|violation| violation.check != "G1"));
    story(Outcome::Refused("no".into())).found("G1", "the desired state of a is loaded");
    let mut rested = story(unknown());
    rested.0.rests.push(ms(55.0));
    rested.found("G1", "the desired state of a is loaded");
}

#[test]
fn commands_at_the_same_time() {
    // Either may be the last.
    for hash in ["h1", "h2"] {
        let found = story()
            .put(50.0, "h2", "launched")
            .put(50.4, "h1", "launched")
            .end(|end| end.units[0].1.hash = hash.into());
        assert!(found.0.check().iter().all(|violation| violation.check != "G1"));
    }
}

#[test]
fn a_view_that_goes_back() {
    story().seen(5.0, 4, "h1", "launched", Some(0)).found("order", "revision 4 after 5");
}

#[test]
fn a_stop_for_no_reason() {
    story().stop(50.0).found("G2", "a was stopped on host 0 without a decision after 47.00 s");
    story().stop(50.0).put(10.0, "", "launched").found("G2", "without a decision");
    // Not even when a server was away, or the machine for a moment.
    story().stop(50.0).unwatched(45.0, 55.0).fault(FaultKind::Short, None, 45.0, 55.0).found("G2", "stopped");
    // Other hosts' faults do not matter.
    story().stop(50.0).fault(FaultKind::Silent, Some(1), 10.0, 60.0).found("G2", "stopped");
    story().stop(50.0).fault(FaultKind::Kills, Some(0), 20.0, 30.0).found("G2", "stopped");
}

#[test]
fn reasons_for_a_stop() {
    story().stop(50.0).fault(FaultKind::Kills, Some(0), 49.0, 50.0).fine();
    story().stop(50.0).fault(FaultKind::Down, Some(0), 49.0, 55.0).fine();
    story().stop(50.0).put(48.0, "h2", "launched").fine();
    story().stop(50.0).give(48.0, Effect::Destroy { unit: "a".into() }, Outcome::Unknown("?".into())).fine();
    // The machine was cut off when its unit was placed elsewhere.
    story()
        .fault(FaultKind::Silent, Some(0), 10.0, 50.0)
        .seen(31.0, 6, "h1", "launched", Some(1))
        .stop(51.0)
        .fine();
    story().fault(FaultKind::Silent, Some(0), 10.0, 50.0).unwatched(20.0, 50.0).stop(51.0).fine();
    Story::new(true).stop(50.0).fault(FaultKind::Silent, None, 40.0, 60.0).fine();
    Story::new(false).stop(50.0).fault(FaultKind::Silent, None, 40.0, 60.0).found("G2", "stopped");
}

#[test]
fn a_start_for_no_reason() {
    story().run(1, "one", 50.0, None).found("G2", "a was started on host 1 without a decision");
    story()
        .stop(50.0)
        .fault(FaultKind::Kills, Some(0), 49.0, 50.0)
        .run(0, "one", 60.0, None)
        .found("G2", "a was started on host 0");
    story().run(0, "one", 60.0, None).found("G4", "started on host 0 while it ran there");
    story().fault(FaultKind::Down, Some(0), 50.0, 55.0).run(0, "one", 60.0, None).fine();
    story()
        .stop(50.0)
        .fault(FaultKind::Kills, Some(0), 49.0, 50.0)
        .put(59.0, "", "launched")
        .run(0, "one", 60.0, None)
        .fine();
}

#[test]
fn what_was_before_a_rest_is_no_reason() {
    let rest = |mut story: Story, at: f64| {
        story.0.rests.push(ms(at));
        story
    };
    rest(story().stop(4.0), 3.5).found("G2", "stopped");
    rest(story().run(1, "one", 5.0, None), 4.5).found("G2", "a was started on host 1");
    rest(story().put(4.0, "h2", "launched").stop(5.0), 4.7).found("G2", "stopped");
    rest(story().put(4.0, "h2", "launched").stop(5.0), 3.7).fine();
    let cut = || Story::new(true).fault(FaultKind::Silent, Some(0), 10.0, 50.0).stop(51.0);
    cut().fine();
    rest(cut(), 50.5).found("G2", "stopped");
    let killed = || story().stop(20.0).fault(FaultKind::Down, Some(0), 20.0, 25.0).run(0, "one", 30.0, None);
    killed().fine();
    rest(killed(), 29.0).found("G2", "started");
    let moved = || {
        story()
            .fault(FaultKind::Silent, Some(0), 10.0, 40.0)
            .seen(50.0, 6, "h1", "launched", Some(1))
            .stop(51.0)
    };
    moved().fine();
    rest(moved(), 49.0).found("G2", "taken");
    // It was nowhere at the rest, and comes back.
    let back = story()
        .give(19.0, Effect::Machines, Outcome::Acknowledged { revision: None })
        .seen(20.0, 6, "h1", "launched", None)
        .stop(20.5)
        .seen(50.0, 7, "h1", "launched", Some(0))
        .run(0, "one", 50.1, None);
    rest(back, 40.0).fine();
}

#[test]
fn a_move_for_no_reason() {
    let moved = || story().seen(50.0, 6, "h1", "launched", Some(1)).stop(50.5).run(1, "one", 50.2, None);
    moved().found("G2", "a was taken from host 0, which was there");
    moved().fault(FaultKind::Short, Some(0), 20.0, 45.0).found("G2", "taken");
    moved().fault(FaultKind::Silent, Some(0), 20.0, 45.0).fine();
    moved().give(45.0, Effect::Machines, Outcome::Acknowledged { revision: None }).fine();
    moved().give(45.0, Effect::Machines, Outcome::Refused("no".into())).found("G2", "taken");
    let mut choosy = moved().put(49.0, "h1", "launched");
    choosy.0.files.values_mut().for_each(|file| file.choosy = true);
    choosy.fine();
}

#[test]
fn two_copies_at_a_time() {
    let both = |stops| {
        Story::new(stops)
            .fault(FaultKind::Silent, Some(0), 10.0, 60.0)
            .seen(31.0, 6, "h1", "launched", Some(1))
            .run(1, "one", 32.0, None)
    };
    both(true)
        .stop(32.5)
        .found("G4", "a has OnIsolation=stop and ran on hosts 0 and 1 at a time, for 0.50 s");
    both(true).found("G4", "to the end");
    both(true).stop(32.0).fine();
    both(false).stop(61.0).fine();
    // Lost with its power: then at the latest.
    let mut dead = both(true);
    dead.0.faults[0].kind = FaultKind::Down;
    dead.fine();
    // From a machine that is there, for a moment.
    let drained = || {
        let drain = Effect::Machines;
        let story = Story::new(true).give(30.0, drain, Outcome::Acknowledged { revision: None });
        story.seen(31.0, 6, "h1", "launched", Some(1)).run(1, "one", 32.0, None)
    };
    drained().stop(32.5).fine();
    drained().stop(52.5).found("G4", "for 20.50 s");
}

#[test]
fn a_bad_end() {
    story().end(|end| end.present.retain(|host| *host != 1)).found("G3", "host 1 is not there");
    story().end(|end| end.units.push(end.units[0].clone())).found("G4", "twice");
    story().end(|end| end.units[0].1.machine = None).found("G3", "nowhere and nothing says why");
    let stray = |end: &mut End| {
        let there = end.actual["a"][&0].clone();
        end.actual.get_mut("a").unwrap().insert(1, there);
    };
    story().end(stray).found("G4", "a is on host 1 (active), and is to be on Some(Some(0))");
    story().end(stray).found("states", "is reported as None");
    story().end(|end| end.actual.clear()).found("G3", "not on host 0, where it is to be");
    let state = |active: &'static str| {
        move |end: &mut End| {
            end.actual.get_mut("a").unwrap().get_mut(&0).unwrap().states.active = active.into()
        }
    };
    story().end(state("inactive")).found("G3", "is inactive and is to run");
    story().end(state("activating")).found("G3", "is activating and is to run");
    story().end(state("inactive")).found("states", "reported as Some");
    let file = |end: &mut End| end.actual.get_mut("a").unwrap().get_mut(&0).unwrap().hash = Some("h2".into());
    story().end(file).found("G3", "has the file");
    story()
        .put(50.0, "", "loaded")
        .seen(51.0, 101, "h1", "loaded", Some(0))
        .end(|_| {})
        .found("G3", "is to be loaded");
    story()
        .put(50.0, "h2", "launched")
        .seen(51.0, 101, "h2", "launched", Some(0))
        .end(|_| {})
        .found("G3", "another file");
    let mut global = story().end(|_| {});
    global.0.files.values_mut().for_each(|file| file.global = true);
    global.found("G3", "a is global and is not on host 1");
    // One that ended by itself, or was killed, is as it is to be.
    let failed = |end: &mut End| {
        end.actual.get_mut("a").unwrap().get_mut(&0).unwrap().states.active = "failed".into();
        end.reported.get_mut("a").unwrap().get_mut(&0).unwrap().active = "failed".into();
    };
    story().end(failed).found("G3", "is failed and is to run");
    story().stop(50.0).fault(FaultKind::Kills, Some(0), 49.0, 50.0).end(failed).fine();
}

#[test]
fn what_units_wrote() {
    let mut history = History::default();
    history
        .take_runs(
            1,
            "a",
            "start 10.01 one\nstop 12.50 success killed TERM\nstart 13.00 two\nstart 20.00 two\n",
        )
        .unwrap();
    let stops: Vec<_> = history.runs.iter().map(|run| (run.marker.as_str(), run.start, run.stop)).collect();
    assert_eq!(stops, [("one", 10_010, Some(12_500)), ("two", 13_000, None), ("two", 20_000, None)]);
    assert_eq!(history.runs[0].how, "success killed TERM");
    // What systemd said counts for those that could not write down their end, and only for the run that it was the end of.
    let ends = [12_400, 20_500, 30_000].map(|at| ("a".to_owned(), at));
    history.take_ends(0, &ends);
    history.take_ends(1, &[("b".to_owned(), 15_000)]);
    history.take_ends(1, &ends);
    let stops: Vec<_> = history.runs.iter().map(|run| run.stop).collect();
    assert_eq!(stops, [Some(12_500), None, Some(20_500)]);
    assert!(history.take_runs(1, "a", "rubbish\n").is_err());
    let text = recorded("one", "/bin/true", "Type=simple\n", "OnIsolation=stop");
    fleet_unit::UnitFile::parse(&text).unwrap();
    assert!(text.ends_with("Type=simple\n\n[X-Fleet]\nOnIsolation=stop"), "{text}");
}

#[test]
fn a_fault_that_was_short_only_by_intention_is_not() {
    let kind = |host, end| {
        let mut story = Story::new(false).fault(FaultKind::Short, host, 10.0, 10.0);
        story.0.heal(0, ms(end));
        (story.0.faults[0].kind, story.0.faults[0].end)
    };
    assert_eq!(kind(Some(0), 12.0), (FaultKind::Short, Some(ms(12.0))));
    assert_eq!(kind(Some(0), 25.0), (FaultKind::Silent, Some(ms(25.0))));
    // Of the registry: who can't decide moves nothing, however long that is.
    assert_eq!(kind(None, 25.0), (FaultKind::Short, Some(ms(25.0))));
}

#[test]
fn what_answers_say() {
    let answer = |status| crate::Answer {
        status,
        headers: vec![("fleet-revision".into(), "7".into())],
        body: "b".into(),
    };
    assert_eq!(record::outcome(Ok(answer(201))), Outcome::Acknowledged { revision: Some(7) });
    assert_eq!(record::outcome(Ok(answer(409))), Outcome::Refused("409: b".into()));
    assert!(matches!(record::outcome(Ok(answer(503))), Outcome::Unknown(_)));
    assert!(matches!(record::outcome(Err(anyhow::anyhow!("cut off"))), Outcome::Unknown(_)));
}
