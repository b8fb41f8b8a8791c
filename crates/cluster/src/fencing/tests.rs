use super::*;
use crate::testing::{id, name, state};

const TTL: Time = Time::from_secs(30);

fn seconds(seconds: f64) -> Time {
    Time::from_secs_f64(seconds)
}

#[test]
fn a_unit_is_stopped_as_late_as_it_can_be() {
    let at = |stop_timeout| {
        let Deadlines { stop, kill, end } = deadlines(seconds(100.0), TTL, stop_timeout);
        [stop, kill, end].map(|at| at.as_secs_f64())
    };
    assert_eq!(at(seconds(5.0)), [122.4, 127.4, 129.4]);
    assert_eq!(at(Time::ZERO), [127.4, 127.4, 129.4]);
    // As systemd's default, and `infinity`: half the TTL it is left alone.
    assert_eq!(at(seconds(90.0)), [115.0, 127.4, 129.4]);
    assert_eq!(at(Time::MAX), [115.0, 127.4, 129.4]);
}

#[test]
fn isolation_says_what_is_due_and_when_to_ask_again() {
    let (a, b) = (name("a.service"), name("b.service"));
    let units = || [(&a, seconds(5.0)), (&b, seconds(90.0))];
    let ask = |now| isolation(units(), Some(seconds(100.0)), TTL, seconds(now));
    let expect = |due: &[(&UnitName, Due)], wake_at: Option<f64>| Isolation {
        due: due.iter().map(|(name, due)| ((*name).clone(), *due)).collect(),
        wake_at: wake_at.map(seconds),
    };
    assert_eq!(ask(100.0), expect(&[], Some(115.0)));
    assert_eq!(ask(115.0), expect(&[(&b, Due::Stop)], Some(122.4)));
    assert_eq!(ask(122.4), expect(&[(&a, Due::Stop), (&b, Due::Stop)], Some(127.4)));
    assert_eq!(ask(127.4), expect(&[(&a, Due::Kill), (&b, Due::Kill)], None));
    assert_eq!(isolation(units(), None, TTL, seconds(0.0)), ask(500.0), "no renewal is known");
    let file = fleet_unit::UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
    let wanted = Wanted { file, state: DesiredState::Launched };
    assert_eq!(still_wanted(Some(&wanted), Due::Nothing), Some(&wanted));
    assert_eq!(still_wanted(Some(&wanted), Due::Stop), None);
}

#[test]
fn what_a_renewal_counts_depends_on_when_its_answer_comes() {
    let of = |now, told| renewal(Some(seconds(100.0)), TTL, seconds(now), told);
    assert_eq!(of(114.9, false), Renewal::Counts);
    assert_eq!(of(115.0, false), Renewal::CountsAfter, "a unit may have been stopped");
    assert_eq!(of(129.3, false), Renewal::CountsAfter);
    assert_eq!(of(129.4, false), Renewal::Void, "its units may have been started elsewhere");
    assert_eq!(of(129.4, true), Renewal::CountsAfter);
    assert_eq!(renewal(None, TTL, seconds(0.0), false), Renewal::Void);
    assert_eq!(renewal(None, TTL, seconds(0.0), true), Renewal::CountsAfter);
    assert_eq!(untouched_until(seconds(100.0), TTL), seconds(115.0));
}

#[test]
fn a_machine_leaves_when_nothing_runs_that_must_not_run_twice() {
    let (running, failed, stopping) = (state("active"), state("failed"), state("deactivating"));
    let (keep, stop) = (OnIsolation::Keep, OnIsolation::Stop);
    assert!(may_leave([]));
    assert!(may_leave([(keep, Some(&running)), (keep, None), (stop, Some(&failed))]));
    assert!(!may_leave([(keep, Some(&running)), (stop, Some(&stopping))]));
    assert!(!may_leave([(stop, None)]));
}

#[test]
fn the_spans_allow_for_the_drift() {
    for ttl in [1.0, 3.0, 30.0, 600.0].map(seconds) {
        let drift = 1.0 / f64::from(DRIFT);
        let stopped = safe_span(ttl).as_secs_f64() / (1.0 - drift);
        let given_up = ttl.as_secs_f64() / (1.0 + drift);
        assert!(stopped < given_up, "{stopped} {given_up}");
        assert!(renewal_period(ttl) * 3 < ttl / UNTOUCHED, "two renewals may be lost");
    }
}

/// Agents, a store and an engine, each with a clock of its own, and a network between them that delays, cuts and loses.
mod world {
    use super::*;
    use crate::{
        engine::{Decision, Engine},
        testing::{machine, unit},
        view::{Effects, View},
    };
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    const AGENTS: usize = 3;
    /// How late an agent may wake.
    const LATE: Time = Time::from_nanos(TTL.as_nanos() as u64 / 100);

    #[derive(Clone, Copy, Debug)]
    pub(super) struct Clock {
        pub(super) offset: Time,
        /// Millionths by which it runs fast.
        pub(super) ppm: i64,
    }

    impl Clock {
        fn shows(self, real: Time) -> Time {
            let rate = u128::try_from(1_000_000 + self.ppm).unwrap();
            let passed = real.as_nanos() * rate / 1_000_000;
            self.offset + Time::from_nanos(u64::try_from(passed).unwrap())
        }
        /// The first moment at which it shows a time.
        fn moment(self, shown: Time) -> Time {
            let rate = u128::try_from(1_000_000 + self.ppm).unwrap();
            let passed = shown.saturating_sub(self.offset).as_nanos() * 1_000_000;
            Time::from_nanos(u64::try_from(passed.div_ceil(rate)).unwrap())
        }
    }

    /// What goes wrong, and when (real time).
    #[derive(Clone, Debug)]
    pub(super) enum Fault {
        /// Nothing gets through from, or to, an agent for that long; connections break.
        Outage { agent: usize, up: bool, down: bool, length: Time },
        /// The server restarts: all leases and connections are gone.
        Restart,
        /// Another engine leads; what the old one has decided may still arrive at the store.
        Failover,
        /// The processes of the unit take that long to stop from now on.
        Stubborn { length: Time },
    }

    #[derive(Clone, Debug)]
    pub(super) struct Script {
        pub(super) on_isolation: &'static str,
        /// Of the agents, the store and the engine.
        pub(super) clocks: Vec<Clock>,
        pub(super) faults: Vec<(Time, Fault)>,
        /// How long messages take, one after the other, over and over; and commits.
        pub(super) delays: Vec<Time>,
        /// How long it takes to kill a process.
        pub(super) killing: Time,
        pub(super) length: Time,
    }

    impl Script {
        /// Clocks are exact, messages fast, and one machine is cut off for a while.
        pub(super) fn of_one_outage(on_isolation: &'static str, at: Time, length: Time) -> Self {
            let outage = Fault::Outage { agent: 0, up: true, down: true, length };
            Script {
                on_isolation,
                clocks: vec![Clock { offset: Time::ZERO, ppm: 0 }; AGENTS + 2],
                faults: vec![(at, outage)],
                delays: vec![Time::from_millis(2)],
                killing: TTL / KILLING - LATE,
                length: Time::from_secs(600),
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Event {
        Fault(Fault),
        OutageOver(usize, bool, bool),
        Renew(usize),
        Wake(usize),
        Died(usize, u64),
        ToServer { agent: usize, session: u64, epoch: u64, message: Up },
        ToAgent { agent: usize, session: u64, message: Down },
        LeaseEnds { agent: usize, lease: u64 },
        Engine,
        Commit { epoch: u64, decisions: Vec<Decision> },
    }

    #[derive(Clone, Debug)]
    enum Up {
        Hello { sent: Time, live: bool },
        Renewal { sent: Time },
        Report { live: bool },
    }

    #[derive(Clone, Debug)]
    enum Down {
        Wanted(bool),
        Acknowledged { sent: Time },
    }

    #[derive(Debug, Default)]
    struct Agent {
        session: u64,
        wanted: bool,
        renewed: Option<Time>,
        /// Which process of the unit runs.
        runs: Option<u64>,
        stopping: bool,
        killing: bool,
        cut: [u32; 2],
        broken: BTreeSet<u64>,
        /// When the last message in each direction arrives: they keep their order.
        last: BTreeMap<(u64, bool), Time>,
    }

    pub(super) struct World {
        script: Script,
        now: Time,
        queue: BTreeMap<(Time, u64), Event>,
        count: u64,
        agents: Vec<Agent>,
        stop_takes: Time,
        view: View,
        engine: Engine,
        deciding: bool,
        revision: Revision,
        epoch: u64,
        /// The lease of a machine's presence and what the store's clock showed when it was renewed.
        leases: BTreeMap<usize, (u64, Time)>,
        sessions: BTreeMap<usize, u64>,
        untold: BTreeSet<usize>,
        reports: BTreeMap<usize, bool>,
        /// The most processes of the unit that ran at one time, and how often it was started.
        pub(super) most: usize,
        pub(super) starts: usize,
    }

    impl World {
        pub(super) fn new(script: Script) -> Self {
            let unit_name = name("u.service");
            let fleet = format!("OnIsolation={}", script.on_isolation);
            let unit = unit(&unit_name, &fleet, DesiredState::Launched, 1);
            let engine = Engine::new(script.clocks[AGENTS + 1].shows(Time::ZERO), TTL);
            let mut world = World {
                now: Time::ZERO,
                queue: BTreeMap::new(),
                count: 0,
                agents: (0..AGENTS).map(|_| Agent::default()).collect(),
                stop_takes: Time::ZERO,
                view: View::default(),
                engine,
                deciding: false,
                revision: 1,
                epoch: 0,
                leases: BTreeMap::new(),
                sessions: BTreeMap::new(),
                untold: BTreeSet::new(),
                reports: BTreeMap::new(),
                most: 0,
                starts: 0,
                script,
            };
            world.apply(Change::Unit(unit_name, Some(unit)));
            for agent in 0..AGENTS {
                world.at(Time::ZERO, Event::Renew(agent));
            }
            for (at, fault) in world.script.faults.clone() {
                world.at(at, Event::Fault(fault));
            }
            world
        }

        /// Runs the script and, with nothing going wrong any more, a while longer.
        pub(super) fn run(&mut self) {
            let calm = self.script.length;
            let end = calm + 8 * TTL;
            while let Some(((now, _), event)) = self.queue.pop_first() {
                if now > end {
                    break;
                }
                self.now = now;
                if now >= calm {
                    self.script.delays = vec![Time::from_millis(1)];
                    self.stop_takes = Time::ZERO;
                }
                self.happen(event);
                let running = self.agents.iter().filter(|agent| agent.runs.is_some()).count();
                self.most = self.most.max(running);
            }
        }

        /// Where the unit runs, and where it is scheduled.
        pub(super) fn places(&self) -> (Vec<MachineId>, Option<MachineId>) {
            let running = self.agents.iter().enumerate().filter(|(_, agent)| agent.runs.is_some());
            let running = running.map(|(index, _)| machine_id(index)).collect();
            (running, self.view.place(&name("u.service")).map(|(at, _)| at.clone()))
        }

        fn at(&mut self, moment: Time, event: Event) {
            self.count += 1;
            self.queue.insert((moment.max(self.now), self.count), event);
        }

        fn delay(&mut self) -> Time {
            self.script.delays.rotate_left(1);
            self.script.delays[0]
        }

        fn happen(&mut self, event: Event) {
            match event {
                Event::Fault(fault) => self.fault(fault),
                Event::OutageOver(agent, up, down) => {
                    let cut = &mut self.agents[agent].cut;
                    cut[0] -= u32::from(up);
                    cut[1] -= u32::from(down);
                }
                Event::Renew(agent) => self.renew(agent),
                Event::Wake(agent) => self.act(agent),
                Event::Died(agent, process) => {
                    if self.agents[agent].runs == Some(process) {
                        self.agents[agent].runs = None;
                        self.up(agent, Up::Report { live: false });
                        self.act(agent);
                    }
                }
                Event::ToServer { agent, session, epoch, message } => {
                    if epoch == self.epoch {
                        self.serve(agent, session, message);
                    }
                }
                Event::ToAgent { agent, session, message } => {
                    if session == self.agents[agent].session {
                        match message {
                            Down::Wanted(wanted) => self.agents[agent].wanted = wanted,
                            Down::Acknowledged { sent } => {
                                let renewed = &mut self.agents[agent].renewed;
                                *renewed = (*renewed).max(Some(sent));
                            }
                        }
                        self.act(agent);
                    }
                }
                Event::LeaseEnds { agent, lease } => {
                    if self.leases.get(&agent).is_some_and(|(current, _)| *current == lease) {
                        self.leases.remove(&agent);
                        self.apply(Change::Machine(machine_id(agent), None));
                        self.apply(Change::States(machine_id(agent), BTreeMap::new()));
                        self.decide();
                    }
                }
                Event::Engine => self.decide(),
                Event::Commit { epoch, decisions } => {
                    if epoch == self.epoch {
                        self.commit(decisions);
                    }
                }
            }
        }

        fn fault(&mut self, fault: Fault) {
            let shown = self.script.clocks[AGENTS + 1].shows(self.now);
            match fault {
                Fault::Outage { agent, up, down, length } => {
                    self.agents[agent].cut[0] += u32::from(up);
                    self.agents[agent].cut[1] += u32::from(down);
                    let over = (self.now + length).min(self.script.length);
                    self.at(over, Event::OutageOver(agent, up, down));
                }
                Fault::Stubborn { length } => self.stop_takes = length,
                Fault::Failover => {
                    self.engine = Engine::new(shown, TTL);
                    self.deciding = false;
                    self.decide();
                }
                Fault::Restart => {
                    self.epoch += 1;
                    self.leases.clear();
                    self.sessions.clear();
                    self.reports.clear();
                    self.untold.clear();
                    let before = std::mem::take(&mut self.view);
                    self.engine = Engine::new(shown, TTL);
                    self.deciding = false;
                    for (unit_name, unit) in before.units() {
                        self.apply(Change::Unit(unit_name.clone(), Some(unit.clone())));
                    }
                    for (unit_name, at, revision) in before.schedule() {
                        self.apply(Change::Schedule(unit_name.clone(), Some((at.clone(), revision))));
                    }
                    self.decide();
                }
            }
        }

        // The network

        fn arrival(&mut self, agent: usize, session: u64, up: bool) -> Option<Time> {
            let arrival = self.now + self.delay();
            let it = &mut self.agents[agent];
            if it.cut[usize::from(!up)] > 0 {
                it.broken.insert(session);
            }
            if it.broken.contains(&session) {
                return None;
            }
            let last = it.last.entry((session, up)).or_default();
            *last = arrival.max(*last);
            Some(*last)
        }

        fn up(&mut self, agent: usize, message: Up) {
            let (session, epoch) = (self.agents[agent].session, self.epoch);
            if let Some(at) = self.arrival(agent, session, true) {
                self.at(at, Event::ToServer { agent, session, epoch, message });
            }
        }

        fn down(&mut self, agent: usize, message: Down) {
            let Some(session) = self.sessions.get(&agent).copied() else { return };
            if let Some(at) = self.arrival(agent, session, false) {
                self.at(at, Event::ToAgent { agent, session, message });
            }
        }

        // An agent

        fn shows(&self, agent: usize) -> Time {
            self.script.clocks[agent].shows(self.now)
        }

        fn renew(&mut self, agent: usize) {
            let sent = self.shows(agent);
            let period = renewal_period(TTL);
            let it = &self.agents[agent];
            let lost = it.renewed.is_none_or(|renewed| sent > renewed + 2 * period);
            let live = it.runs.is_some();
            if lost {
                self.agents[agent].session += 1;
                self.up(agent, Up::Hello { sent, live });
            } else {
                self.up(agent, Up::Renewal { sent });
            }
            let next = self.script.clocks[agent].moment(sent + period);
            self.at(next, Event::Renew(agent));
        }

        fn act(&mut self, agent: usize) {
            let unit_name = name("u.service");
            let now = self.shows(agent);
            let fenced = self.script.on_isolation == "stop";
            let units = fenced.then_some((&unit_name, Time::MAX));
            let isolation = isolation(units, self.agents[agent].renewed, TTL, now);
            let due = isolation.due.first().map_or(Due::Nothing, |(_, due)| *due);
            if let Some(at) = isolation.wake_at {
                let late = self.delay().min(LATE);
                let at = self.script.clocks[agent].moment(at) + late;
                self.at(at, Event::Wake(agent));
            }
            let wanted = self.agents[agent].wanted && due == Due::Nothing;
            match self.agents[agent].runs {
                None if wanted => {
                    self.count += 1;
                    self.starts += 1;
                    let it = &mut self.agents[agent];
                    (it.runs, it.stopping, it.killing) = (Some(self.count), false, false);
                    self.up(agent, Up::Report { live: true });
                }
                Some(process) if !wanted && !self.agents[agent].stopping => {
                    self.agents[agent].stopping = true;
                    self.at(self.now + self.stop_takes, Event::Died(agent, process));
                }
                _ => {}
            }
            if let (Some(process), Due::Kill, false) =
                (self.agents[agent].runs, due, self.agents[agent].killing)
            {
                self.agents[agent].killing = true;
                self.at(self.now + self.script.killing, Event::Died(agent, process));
            }
        }

        // The server

        fn apply(&mut self, change: Change) {
            let effects = self.view.apply(change);
            self.engine.note(&effects);
            for agent in (0..AGENTS).filter(|agent| effects.wanted.contains_key(&machine_id(*agent))) {
                self.untold.insert(agent);
                self.tell(agent);
            }
        }

        /// Nothing is said to a machine that is not there.
        fn tell(&mut self, agent: usize) {
            if self.leases.contains_key(&agent) && self.untold.remove(&agent) {
                let wanted = self.view.wanted(&machine_id(agent), &name("u.service")).is_some();
                self.down(agent, Down::Wanted(wanted));
            }
        }

        fn serve(&mut self, agent: usize, session: u64, message: Up) {
            if matches!(message, Up::Hello { .. }) && self.sessions.get(&agent).is_none_or(|s| *s < session) {
                self.sessions.insert(agent, session);
                self.untold.insert(agent);
            }
            let current = self.sessions.get(&agent) == Some(&session);
            match message {
                Up::Hello { sent, .. } | Up::Renewal { sent } => {
                    if let (Up::Hello { live, .. }, true) = (&message, current) {
                        self.reports.insert(agent, *live);
                    }
                    let came = !self.leases.contains_key(&agent);
                    self.count += 1;
                    let (lease, shown) = (self.count, self.script.clocks[AGENTS].shows(self.now));
                    self.leases.insert(agent, (lease, shown));
                    let ends = self.script.clocks[AGENTS].moment(shown + TTL);
                    self.at(ends, Event::LeaseEnds { agent, lease });
                    if came {
                        self.apply(Change::Machine(machine_id(agent), Some(machine(&[]))));
                    }
                    self.report(agent);
                    if current {
                        self.tell(agent);
                        self.down(agent, Down::Acknowledged { sent });
                    }
                }
                Up::Report { live } if current => {
                    self.reports.insert(agent, live);
                    self.report(agent);
                }
                Up::Report { .. } => {}
            }
            self.decide();
        }

        fn report(&mut self, agent: usize) {
            if !self.leases.contains_key(&agent) {
                return;
            }
            let unit_name = name("u.service");
            let Some(unit) = self.view.unit(&unit_name) else { return };
            let hash = unit.file.hash();
            let live = self.reports.get(&agent) == Some(&true);
            let systemd = state(if live { "active" } else { "inactive" });
            let report = UnitReport { current: CurrentState::Launched, hash, systemd, problem: None };
            let reports = live.then_some((unit_name, report)).into_iter().collect();
            self.apply(Change::States(machine_id(agent), reports));
        }

        fn decide(&mut self) {
            if self.deciding {
                return;
            }
            let clock = self.script.clocks[AGENTS + 1];
            let decisions = self.engine.decide(&self.view, clock.shows(self.now), 10);
            if !decisions.is_empty() {
                self.deciding = true;
                let at = self.now + self.delay();
                self.at(at, Event::Commit { epoch: self.epoch, decisions });
            } else if let Some(at) = self.engine.wake_at() {
                self.at(clock.moment(at), Event::Engine);
            }
        }

        /// Each decision is committed only if its ground is unchanged.
        fn commit(&mut self, decisions: Vec<Decision>) {
            self.deciding = false;
            for decision in decisions {
                let unit = self.view.unit(&decision.unit).map_or(0, |unit| unit.revision);
                let place = self.view.place(&decision.unit).map_or(0, |(_, revision)| revision);
                let absent = decision.absent.as_ref().is_none_or(|id| self.view.machine(id).is_none());
                if (unit, place, absent) == (decision.unit_revision, decision.schedule_revision, true) {
                    self.revision += 1;
                    let place = decision.machine.map(|machine| (machine, self.revision));
                    self.apply(Change::Schedule(decision.unit, place));
                } else {
                    self.engine.note(&Effects { units: [decision.unit].into(), ..Effects::default() });
                }
            }
            self.decide();
        }
    }

    pub(super) fn machine_id(agent: usize) -> MachineId {
        id(u8::try_from(agent).unwrap())
    }

    pub(super) fn scripts(on_isolation: &'static str, drift: i64) -> impl Strategy<Value = Script> {
        let ppm = prop_oneof![Just(-drift), Just(drift), -drift..=drift];
        let clock =
            (0u64..1_000_000, ppm).prop_map(|(offset, ppm)| Clock { offset: Time::from_millis(offset), ppm });
        let delay = prop_oneof![
            12 => 0u64..50,
            3 => 0u64..5_000,
            1 => 0u64..100_000,
        ];
        let length = (1u64..150_000).prop_map(Time::from_millis);
        let fault = prop_oneof![
            6 => (0..AGENTS, 0..3u8, length.clone()).prop_map(|(agent, way, length)| Fault::Outage {
                agent,
                up: way != 1,
                down: way != 2,
                length,
            }),
            1 => Just(Fault::Restart),
            1 => Just(Fault::Failover),
            2 => length.prop_map(|length| Fault::Stubborn { length }),
        ];
        let faults = prop::collection::vec(((0u64..600_000).prop_map(Time::from_millis), fault), 0..16);
        let clocks = prop::collection::vec(clock, AGENTS + 2);
        let delays = prop::collection::vec(delay.prop_map(Time::from_millis), 1..40);
        (clocks, faults, delays).prop_map(move |(clocks, faults, delays)| Script {
            on_isolation,
            clocks,
            faults,
            delays,
            // Longer than there is time for, but not longer than the margin covers.
            killing: TTL / KILLING - LATE + margin(TTL) * 4 / 5,
            length: Time::from_secs(600),
        })
    }

    proptest! {
        #![proptest_config(crate::testing::cases(200))]

        /// Whatever the network does, and with clocks as bad as is allowed, a unit with OnIsolation=stop never runs twice;
        /// and when all is well again, it runs where it is scheduled.
        #[test]
        fn a_unit_with_stop_never_runs_twice(script in scripts("stop", 10_000)) {
            let mut world = World::new(script);
            world.run();
            prop_assert!(world.most <= 1);
            let (running, scheduled) = world.places();
            prop_assert_eq!(running, Vec::from_iter(scheduled));
            prop_assert_eq!(world.most, 1);
        }

        /// With OnIsolation=keep there may be two for a while, and there is one in the end.
        #[test]
        fn a_unit_with_keep_runs_once_in_the_end(script in scripts("keep", 10_000)) {
            let mut world = World::new(script);
            world.run();
            let (running, scheduled) = world.places();
            prop_assert_eq!(running, Vec::from_iter(scheduled));
        }
    }
}

#[test]
fn an_isolated_machine_stops_its_unit_before_another_starts_it() {
    use world::*;
    for (on_isolation, most) in [("keep", 2), ("stop", 1)] {
        let mut world = World::new(Script::of_one_outage(on_isolation, seconds(100.0), seconds(180.0)));
        world.run();
        assert_eq!((world.most, world.starts), (most, 2), "{on_isolation}");
        assert_eq!(world.places(), (vec![machine_id(1)], Some(machine_id(1))));
    }
}

#[test]
fn two_lost_renewals_stop_nothing() {
    use world::*;
    let mut world = World::new(Script::of_one_outage("stop", seconds(100.5), seconds(8.0)));
    world.run();
    assert_eq!((world.most, world.starts), (1, 1));
}

/// The slowest agent and the fastest server, a process that will not stop, and a machine that is cut off as soon as
/// a renewal was accepted, which is where it takes longest until that is noticed there.
#[test]
fn the_worst_clocks_and_the_slowest_end_are_allowed_for() {
    use world::*;
    let mut script = Script::of_one_outage("stop", seconds(100.0), seconds(180.0));
    script.delays = vec![Time::ZERO];
    script.faults.insert(0, (Time::ZERO, Fault::Stubborn { length: seconds(1000.0) }));
    for (index, clock) in script.clocks.iter_mut().enumerate() {
        clock.ppm = if index < 3 { -10_000 } else { 10_000 };
    }
    let mut most = Vec::new();
    for step in 0..8 {
        script.faults[1].0 = seconds(100.0 + f64::from(step) * 0.5);
        // In time, as late as the margin covers, and later.
        for killing in [TTL / KILLING, TTL / KILLING + margin(TTL) * 9 / 10, TTL / KILLING + TTL / 10] {
            let mut world = World::new(Script { killing, ..script.clone() });
            world.run();
            most.push(world.most);
        }
    }
    assert_eq!(most, [1, 1, 2].repeat(8));
}
