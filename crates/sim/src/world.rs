//! Time, and all that happens in it.
//!
//! The world goes on in short steps. In each, every process runs up to the end of the step by its own clock; then what they
//! have said is collected and, after its delay, brought to where it belongs, and what is due happens. So processes can't
//! hear of each other within a step, and the order of everything is the order of (time, number).

mod calls;
mod faults;
mod fleetd;

use crate::commands::{Command, Ended};
use crate::network::{Passed, Session, Way};
use crate::oracle::{Oracle, same_views};
use crate::process::{Process, Time, note_panics, take_panic};
use crate::rng::Rng;
use crate::scenario::Scenario;
use crate::store::{Call, Calls, SimStore, StoreModel};
use crate::systemd::{Machine, Manners, SharedMachine, lock};
use crate::{Mutation, Options, Outcome};
use calls::{Reply, StoreTrouble, Watcher};
use faults::Cut;
use fleet_cluster::model::MachineId;
use fleet_link::{AgentEnd, Hello};
use fleet_unit::UnitName;
use fleetd::Life;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;

/// How long a step is while something is under way: nothing between processes is faster.
const STEP: Duration = Duration::from_millis(10);
/// How often, when all should come to rest, it is looked whether it has.
const LOOK: Duration = Duration::from_secs(1);
/// All has to stay at rest for so long.
const REST: Duration = Duration::from_secs(20);

/// Something that is to happen.
enum Event {
    /// A call arrives at the store.
    Call(Call),
    /// An answer of the store arrives.
    Reply(Reply),
    /// What changed is brought to a watcher.
    Flush(usize),
    /// The fleetd of a host begins.
    Begin(usize),
    /// A machine that was told to shut down is off; it comes back after a time.
    Off(usize, Duration),
    /// A paused process goes on.
    Resume(usize),
    /// An agent's side of a session is found broken.
    Broken(u64),
    /// A machine that was suspended goes on.
    Wake(usize),
    /// Of a store with a member on a machine that was suspended another member leads.
    Elect(usize),
    /// The bus of a machine is back.
    BusBack(usize),
    /// A cut between a server and the store that comes and goes: how often yet.
    FlapStore(usize, u32),
    /// A record can be read again.
    Readable(UnitName),
    /// A machine that was removed joins again.
    Join(usize),
    /// A cut that comes and goes: how often yet.
    Flap(usize, u32),
    Fault,
    Command,
    /// A command is given again.
    Again(Command),
}

struct Host {
    id: MachineId,
    machine: SharedMachine,
    is_server: bool,
    rate: f64,
    /// Its fleetd is of the version before.
    is_older: bool,
    /// Counts the processes there were.
    incarnation: u64,
    process: Option<Process>,
    life: Option<Life>,
    /// When its agent dials next, and how often it has in vain.
    dial_at: Time,
    dialled: u32,
    /// A session that waits for its agent to take it.
    ends: Option<mpsc::Sender<AgentEnd>>,
}

/// Work that nobody does while nothing changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Work {
    /// Changes of the registry.
    revision: u64,
    /// Jobs and reloads of systemd, on all machines.
    jobs: u64,
}

/// A command that was given.
struct Given {
    command: Command,
    asked: Time,
}

type Answers = Arc<Mutex<Vec<(u64, Ended)>>>;

/// See the module.
pub(crate) struct World {
    seed: u64,
    options: Options,
    scenario: Scenario,
    now: Time,
    rng: Rng,
    /// For what is of which version.
    versions: Rng,
    hosts: Vec<Host>,
    events: BTreeMap<(Time, u64), Event>,
    numbered: u64,
    store: StoreModel,
    store_rate: f64,
    store_trouble: StoreTrouble,
    /// What a store that is not there was asked.
    unanswered: Vec<Call>,
    calls: Calls,
    watchers: Vec<Watcher>,
    sessions: BTreeMap<u64, Session>,
    /// Something was said or brought in the last step: what comes of it may come at once.
    busy: bool,
    /// When it is looked next whether all is as it should be.
    look_at: Time,
    cuts: Vec<Cut>,
    given: BTreeMap<u64, Given>,
    answers: Answers,
    oracle: Oracle,
    trace: u64,
    acknowledged: u64,
    faults: u64,
    /// Whether things still go wrong.
    troubled: bool,
    mutation: Option<Mutation>,
    /// Faults and commands that were drawn.
    inputs: u64,
    tail: VecDeque<String>,
}

impl World {
    pub(crate) fn new(seed: u64, options: Options) -> std::io::Result<Self> {
        let mut rng = Rng::new(seed);
        let mut versions = Rng::of(seed, u64::MAX);
        let mut scenario = Scenario::new(&mut rng, &mut versions, &mut Rng::of(seed, u64::MAX - 1));
        if let Some(mutation) = options.mutation.filter(|_| options.focus) {
            scenario.focus(mutation);
        }
        let rate = |rng: &mut Rng| 1.0 + scenario.drift * (rng.fraction() * 2.0 - 1.0);
        let mut hosts = Vec::new();
        for number in 0..scenario.servers + scenario.agents {
            let id = MachineId::parse(&format!("{:032x}", (number + 1) * 0x1111))
                .map_err(std::io::Error::other)?;
            let rate = rate(&mut rng);
            hosts.push(Host {
                id,
                machine: Arc::new(Mutex::new(Machine::new(rng.fork(), scenario.manners, rate))),
                is_server: number < scenario.servers,
                rate,
                is_older: number >= scenario.servers && versions.chance(scenario.older),
                incarnation: 0,
                process: None,
                life: None,
                dial_at: Time::ZERO,
                dialled: 0,
                ends: None,
            });
        }
        let ids = hosts.iter().map(|host| host.id.clone()).collect();
        let store_rate = rate(&mut rng);
        let mut world = World {
            seed,
            now: Time::ZERO,
            hosts,
            events: BTreeMap::new(),
            numbered: 0,
            store: StoreModel::new(scenario.shared),
            store_rate,
            store_trouble: StoreTrouble::default(),
            unanswered: Vec::new(),
            calls: Calls::default(),
            watchers: Vec::new(),
            sessions: BTreeMap::new(),
            busy: true,
            look_at: Time::ZERO,
            cuts: Vec::new(),
            given: BTreeMap::new(),
            answers: Answers::default(),
            oracle: Oracle::new(ids, scenario.ttl, scenario.shared, scenario.step),
            trace: 0xcbf2_9ce4_8422_2325,
            acknowledged: 0,
            faults: 0,
            troubled: false,
            mutation: options.mutation,
            inputs: 0,
            tail: VecDeque::new(),
            options,
            rng,
            versions,
            scenario,
        };
        for host in &world.hosts {
            let mut machine = lock(&host.machine);
            machine.sure = world.mutation == Some(Mutation::UnnotedStop);
            machine.forgetful = world.mutation == Some(Mutation::ForgottenMarks);
            machine.hasty = world.mutation == Some(Mutation::HastyStop);
            machine.timeless = world.mutation == Some(Mutation::NoFencing);
            machine.unguarded = world.mutation == Some(Mutation::NoGuard);
            machine.reloads = world.mutation == Some(Mutation::ReloadPerUnit);
        }
        let text = format!("{:?}", world.scenario);
        world.note(|| text);
        world.format_store();
        for host in 0..world.hosts.len() {
            let after = world.rng.spread(10, 3_000);
            world.after(after, Event::Begin(host));
        }
        Ok(world)
    }

    pub(crate) fn run(mut self) -> std::io::Result<Outcome> {
        note_panics();
        take_panic();
        let mut settled_in = Duration::ZERO;
        let mut rounds = 0;
        while rounds < self.scenario.rounds && self.is_well() {
            rounds += 1;
            self.troubled = true;
            let first = self.rng.spread(1_000, 20_000);
            self.after(first, Event::Fault);
            self.after(first, Event::Command);
            let until = self.now + first + self.scenario.trouble;
            while self.now < until && self.is_well() {
                self.step()?;
            }
            self.heal();
            let healed = self.now;
            let bound = self.bound();
            let mut resting: Option<(Time, Work)> = None;
            while self.is_well() {
                self.step()?;
                if self.now < self.look_at {
                    continue;
                }
                self.look_at = self.now + LOOK;
                match self.unsettled(resting.as_ref().map(|(_, work)| work)) {
                    None => {
                        let (since, _) = *resting.get_or_insert_with(|| (self.now, self.work()));
                        settled_in = settled_in.max(since - healed);
                        if self.now >= since + REST {
                            break;
                        }
                    }
                    Some(what) if self.now > healed + bound => {
                        self.violate("G3", format!("not at rest: {what}"))
                    }
                    Some(_) => resting = None,
                }
            }
        }
        Ok(Outcome {
            seed: self.seed,
            simulated: self.now,
            trace: self.trace,
            violations: self.oracle.violations,
            settled_in,
            acknowledged: self.acknowledged,
            faults: self.faults,
            inputs: self.inputs,
            tail: self.tail.into(),
        })
    }

    fn is_well(&self) -> bool {
        self.oracle.violations.is_empty()
    }

    fn violate(&mut self, check: &'static str, what: String) {
        self.oracle.violate(self.now, check, what);
    }

    /// When all has to be at rest after the end of all faults: machines that were lost in it have run out, units that did not
    /// want to stop were killed, everybody who waits before the next attempt has made it, and what was done so far may have been
    /// the ground for something else to be done.
    fn bound(&self) -> Duration {
        self.scenario.ttl * 4 + self.scenario.manners.stop_timeout * 2 + Duration::from_secs(120)
    }

    /// Notes what happened, for the hash, and for who wants to read it.
    fn note(&mut self, text: impl FnOnce() -> String) {
        let line = format!("{:>9.3} {}", self.now.as_secs_f64(), text());
        for byte in line.bytes() {
            self.trace = (self.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.options.trace {
            println!("{line}");
        }
        if self.options.tail > 0 {
            if self.tail.len() == self.options.tail {
                self.tail.pop_front();
            }
            self.tail.push_back(line);
        }
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.numbered += 1;
        self.events.insert((self.now + delay, self.numbered), event);
    }

    fn step(&mut self) -> std::io::Result<()> {
        let before = self.now;
        self.now += self.next_step();
        self.busy = false;
        for host in &mut self.hosts {
            lock(&host.machine).now = self.now;
            if let Some(process) = &mut host.process {
                process.run_to(self.now, before, self.scenario.step);
            }
        }
        if let Some(panic) = take_panic() {
            self.violate("panic", panic);
        }
        self.take_calls();
        self.take_answers();
        self.pass_messages();
        let now = self.store_now();
        if self.store.next_expiry().is_some_and(|at| at <= now) {
            self.in_store(None, |store| store.expire(now));
        }
        while let Some(entry) = self.events.first_entry() {
            if entry.key().0 > self.now {
                break;
            }
            let event = entry.remove();
            self.busy = true;
            self.happen(event)?;
        }
        for host in 0..self.hosts.len() {
            let is_away = {
                let mut machine = lock(&self.hosts[host].machine);
                machine.run_to(self.now);
                machine.away
            };
            if is_away || self.hosts[host].process.as_ref().is_some_and(Process::is_paused) {
                self.oracle.stalls(self.now, host);
            }
            self.take_facts(host);
            self.look_after(host);
        }
        self.oracle.check_lifetimes(self.now);
        if self.troubled && self.now >= self.look_at {
            self.look_at = self.now + LOOK;
            self.check_a_view();
        }
        for violation in self.oracle.violations.clone() {
            self.note(|| format!("VIOLATION {violation}"));
        }
        Ok(())
    }

    fn happen(&mut self, event: Event) -> std::io::Result<()> {
        match event {
            Event::Call(call) => self.called(call),
            Event::Reply(reply) => self.replied(reply),
            Event::Flush(watcher) => self.flush(watcher),
            Event::Begin(host) => self.begin(host)?,
            Event::Off(host, pause) => {
                self.power_off(host);
                self.after(pause, Event::Begin(host));
            }
            Event::Resume(host) => self.resume(host),
            Event::Broken(session) => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    session.break_agent();
                }
            }
            Event::BusBack(host) => {
                let mut machine = lock(&self.hosts[host].machine);
                machine.away = false;
                machine.tell_all();
            }
            Event::Wake(host) => self.wake(host),
            Event::Elect(host) => self.elect(host),
            Event::Flap(cut, left) => self.flap(cut, left),
            Event::FlapStore(server, left) => self.flap_store(server, left),
            Event::Readable(name) => self.make_readable(&name),
            Event::Join(host) => self.join(host),
            Event::Fault => self.next_fault(),
            Event::Command => self.next_command(),
            Event::Again(command) => self.give(command),
        }
        Ok(())
    }

    /// What happened to units of a machine.
    fn take_facts(&mut self, host: usize) {
        let facts = lock(&self.hosts[host].machine).take_facts();
        self.busy |= !facts.is_empty();
        for fact in facts {
            self.note(|| format!("host {host}: {fact:?}"));
            self.oracle.happened(self.now, host, &fact);
        }
    }

    /// A process that ended is begun again; an agent without a session gets one.
    fn look_after(&mut self, host: usize) {
        let ended = self.hosts[host].process.as_ref().is_some_and(Process::has_ended);
        if ended {
            self.note(|| format!("host {host}: fleetd ended"));
            self.lose_process(host, true);
            if !lock(&self.hosts[host].machine).shutting_down {
                let after = self.rng.spread(100, 2_000);
                self.after(after, Event::Begin(host));
            }
        }
        let has_session = self.sessions.values().any(|session| session.agent == host && session.has_agent());
        let host_state = &self.hosts[host];
        if host_state.is_server || has_session || host_state.dial_at > self.now {
            return;
        }
        if host_state.process.as_ref().is_none_or(Process::is_paused) {
            return;
        }
        self.dial(host);
    }

    /// An agent tries a server, as the dialer does: each in turn, with growing pauses.
    fn dial(&mut self, host: usize) {
        let dialled = self.hosts[host].dialled;
        let server = (host + dialled as usize) % self.scenario.servers;
        self.hosts[host].dialled = dialled.wrapping_add(1);
        let way = self.way(host, server);
        let delay = self.rng.spread(5, 100);
        let full = self.hosts[host].ends.as_ref().is_none_or(|ends| ends.capacity() == 0);
        if !(way.up && way.down && way.answered) || full {
            let pause = if self.troubled { self.rng.spread(100, 10_000) } else { self.rng.spread(100, 700) };
            self.hosts[host].dial_at = self.now + pause;
            return;
        }
        self.hosts[host].dial_at = self.now + delay;
        let hello = Hello { id: self.hosts[host].id.clone(), machine: fleetd::described(host) };
        let (mut session, agent_end, server_end) = Session::new(host, server, hello, self.now, &mut self.rng);
        session.older = self.hosts[host].is_older;
        session.mutation = self.mutation.map(|mutation| (mutation, self.scenario.ttl));
        // A newer session of a machine replaces the older one at the same server.
        for older in self.sessions.values_mut().filter(|older| older.agent == host && older.server == server)
        {
            older.break_server();
        }
        self.numbered += 1;
        self.sessions.insert(self.numbered, session);
        self.note(|| format!("session of host {host} with host {server} begins"));
        if let Some(ends) = &self.hosts[host].ends {
            // There was room.
            let _ = ends.try_send(agent_end);
        }
        let host = &self.hosts[server];
        if let (Some(process), Some(Life { server: Some(server), .. })) = (&host.process, &host.life) {
            let server = server.clone();
            process.spawn(async move {
                // How it ended shows at the other end.
                let _ = server.serve_agent(server_end).await;
            });
        }
    }

    /// How the way between an agent and a server is.
    fn way(&self, agent: usize, server: usize) -> Way {
        let cuts = || self.cuts.iter().filter(|cut| cut.is_on(self.now, agent, server));
        let runs = |host: usize| {
            self.hosts[host]
                .process
                .as_ref()
                .is_some_and(|process| !process.is_paused() && !process.has_ended())
        };
        Way {
            up: !cuts().any(|cut| cut.up),
            down: !cuts().any(|cut| cut.down),
            answered: runs(agent) && runs(server),
            delay: self.scenario.delay,
        }
    }

    fn pass_messages(&mut self) {
        // None begins meanwhile.
        let mut sessions = std::mem::take(&mut self.sessions);
        sessions.retain(|_, session| {
            let way = self.way(session.agent, session.server);
            if !(way.up && way.down && way.answered) {
                self.oracle.stalls(self.now, session.agent);
            }
            let passed = session.pass(self.now, way, &mut self.rng);
            self.busy |= !passed.is_empty();
            let (agent, server) = (session.agent, session.server);
            for what in passed {
                match what {
                    Passed::Renewed { sent, ttl } => {
                        // It counts when the guard knows of it.
                        if !ttl.is_zero() && lock(&self.hosts[agent].machine).full <= self.now {
                            self.oracle.renewed(self.now, agent, sent);
                        }
                        self.note(|| format!("host {agent} renewed by {server}"));
                    }
                    Passed::Told(text) => self.note(|| format!("host {agent} is told by {server}: {text}")),
                    Passed::Reported(text) => {
                        self.note(|| format!("host {agent} reports to {server}: {text}"))
                    }
                }
            }
            if session.is_over() {
                self.note(|| format!("session of host {agent} with host {server} is over"));
                let pause = self.rng.spread(50, 200);
                let host = &mut self.hosts[agent];
                host.dial_at = host.dial_at.max(self.now + pause);
                return false;
            }
            true
        });
        self.sessions = sessions;
    }

    fn next_command(&mut self) {
        if !self.troubled {
            return;
        }
        let ids: Vec<_> = self.hosts.iter().map(|host| host.id.clone()).collect();
        let (names, isolating) = (self.scenario.names, self.scenario.isolating);
        let (is_in, mut rng) = self.draw_input();
        let rng = &mut rng;
        if let Some(command) = Command::draw(rng, names, isolating, &ids).filter(|_| is_in) {
            // Now and then several operators work on the same unit at once.
            for _ in 0..if rng.chance(0.2) { 1 + rng.below(3) } else { 0 } {
                let other = Command::draw(rng, names, isolating, &ids);
                let after = rng.spread(1, 200);
                if let Some(other) = other.and_then(|other| other.about(&command)) {
                    self.after(after, Event::Again(other));
                }
            }
            self.give(command);
        }
        let mean = self.scenario.command_every.as_secs_f64();
        let next = Duration::from_secs_f64(mean * -(1.0 - rng.fraction()).max(1e-9).ln());
        self.after(next, Event::Command);
    }

    /// Gives a command to some server that is there.
    fn give(&mut self, command: Command) {
        if !self.troubled {
            return;
        }
        let host = self.rng.below(self.scenario.servers);
        let Host { process: Some(process), life: Some(Life { server: Some(server), .. }), .. } =
            &self.hosts[host]
        else {
            return;
        };
        self.numbered += 1;
        let number = self.numbered;
        let (server, answers, given) = (server.clone(), self.answers.clone(), command.clone());
        process.spawn(async move {
            let ended = given.give(server).await;
            answers.lock().unwrap_or_else(PoisonError::into_inner).push((number, ended));
        });
        self.note(|| format!("command {number} to host {host}: {command}"));
        if let Some((name, Some((Some(file), _)))) = command.writes() {
            self.oracle.asked(number, name, file);
        }
        self.given.insert(number, Given { command, asked: self.now });
    }

    fn take_answers(&mut self) {
        let answers = std::mem::take(&mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner));
        self.busy |= !answers.is_empty();
        for (number, ended) in answers {
            let Some(Given { command, asked }) = self.given.remove(&number) else { continue };
            self.note(|| format!("command {number} ended: {ended:?}"));
            let mut again = self.rng.chance(0.05);
            if ended != Ended::Unknown {
                self.oracle.answered(number);
            }
            match ended {
                Ended::Acknowledged => {
                    self.acknowledged += 1;
                    if let Some((name, wrote)) = command.writes() {
                        self.oracle.acknowledged(self.now, name, asked, wrote);
                    }
                }
                Ended::Unknown => again |= self.rng.chance(0.5),
                Ended::Refused(_) => {}
            }
            if again {
                let after = self.rng.spread(10, 5_000);
                self.after(after, Event::Again(command));
            }
        }
    }

    /// Ends all faults.
    fn heal(&mut self) {
        self.note(|| "all faults end".to_owned());
        self.troubled = false;
        self.cuts.clear();
        self.store_trouble = StoreTrouble::default();
        for host in 0..self.hosts.len() {
            self.wake(host);
            self.resume(host);
            let mut machine = lock(&self.hosts[host].machine);
            let stop_timeout = self.scenario.manners.stop_timeout;
            machine.manners = Manners { stop_timeout, ..Manners::default() };
            machine.away = false;
            machine.full = Time::ZERO;
            machine.tell_all();
            drop(machine);
            self.update(host);
        }
        for name in self.oracle.unreadable() {
            self.make_readable(&name);
        }
        self.update_servers();
        for host in self.scenario.servers..self.hosts.len() {
            self.join(host);
        }
    }

    /// All servers are of the newer version from now on.
    fn update_servers(&mut self) {
        let newer = self.scenario.newer.min(self.scenario.servers);
        if std::mem::take(&mut self.scenario.formats) == 0.0 || newer == 0 {
            return;
        }
        self.scenario.newer = self.scenario.servers;
        self.oracle.all_is_read(self.now);
        for host in 0..self.scenario.servers - newer {
            if self.hosts[host].process.is_some() {
                self.note(|| format!("host {host}: fleetd is updated to what the others are"));
                self.lose_process(host, true);
                let after = self.rng.spread(100, 2_000);
                self.after(after, Event::Begin(host));
            }
        }
    }

    /// A fleetd of an older version is replaced by one of this.
    fn update(&mut self, host: usize) {
        if std::mem::take(&mut self.hosts[host].is_older) && self.hosts[host].process.is_some() {
            self.note(|| format!("host {host}: fleetd is updated"));
            self.lose_process(host, true);
            let after = self.rng.spread(100, 2_000);
            self.after(after, Event::Begin(host));
        }
    }

    /// The work that was done so far.
    fn work(&self) -> Work {
        let jobs = self.hosts.iter().map(|host| lock(&host.machine).work()).sum();
        Work { revision: self.store.revision(), jobs }
    }

    /// A server's view is whole at any time, whatever it has missed.
    fn check_a_view(&mut self) {
        let host = self.rng.below(self.scenario.servers);
        let Some(Life { server: Some(server), .. }) = &self.hosts[host].life else { return };
        let checked = server.hub().view().check();
        if let Err(error) = checked {
            self.violate("view", format!("of host {host}: {error}"));
        }
    }

    /// How long the next step is. While nothing is under way only the clocks of processes make anything happen, and what they say is
    /// heard of a little later, as in a network that is a little slower.
    fn next_step(&self) -> Duration {
        if self.busy || self.scenario.step <= STEP {
            return STEP;
        }
        let expiry = self.store.next_expiry().map(|at| at.div_f64(self.store_rate));
        let event = self.events.keys().next().map(|(at, _)| *at);
        // What is overdue waits for the end of a cut.
        let messages = self.sessions.values().filter_map(Session::next).filter(|at| *at > self.now);
        let machines = self.hosts.iter().filter_map(|host| lock(&host.machine).next());
        let next = messages.chain(machines).chain(expiry).chain(event).min();
        let until = next.map_or(self.scenario.step, |next| next.saturating_sub(self.now));
        until.clamp(STEP, self.scenario.step)
    }

    /// Another fault or command: whether it is not left out, and what it is drawn from.
    fn draw_input(&mut self) -> (bool, Rng) {
        let number = self.inputs;
        self.inputs += 1;
        (!self.options.without.contains(&number), Rng::of(self.seed, number))
    }

    /// What is not at rest; what work there was before, if all was at rest before.
    fn unsettled(&self, before: Option<&Work>) -> Option<String> {
        if let Some(host) = self.hosts.iter().position(|host| host.process.is_none()) {
            return Some(format!("host {host} has no fleetd"));
        }
        let machines: Vec<_> = self.hosts.iter().map(|host| lock(&host.machine)).collect();
        let units = machines.iter().enumerate().map(|(host, machine)| (host, machine.units().collect()));
        let unsettled = self.oracle.unsettled(units);
        drop(machines);
        if unsettled.is_some() {
            return unsettled;
        }
        for (number, host) in self.hosts.iter().enumerate() {
            let Some(Life { server: Some(server), .. }) = &host.life else { continue };
            let view = server.hub().view();
            if let Err(what) = same_views(self.oracle.view(), &view).and_then(|()| view.check()) {
                return Some(format!("the view of host {number}: {what}"));
            }
        }
        let work = self.work();
        before.filter(|before| **before != work).map(|before| format!("{before:?} has become {work:?}"))
    }

    fn begin(&mut self, number: usize) -> std::io::Result<()> {
        if self.hosts[number].process.is_some() {
            return Ok(());
        }
        if lock(&self.hosts[number].machine).asleep.is_some() {
            self.after(Duration::from_secs(1), Event::Begin(number));
            return Ok(());
        }
        lock(&self.hosts[number].machine).is_off = false;
        // As good a time as any for an update.
        if self.hosts[number].is_older && self.versions.chance(0.3) {
            self.hosts[number].is_older = false;
        }
        let version = if self.hosts[number].is_older { " of an older version" } else { "" };
        self.note(|| format!("host {number}: fleetd{version} begins"));
        let host = &mut self.hosts[number];
        host.incarnation += 1;
        let mut process = Process::new(number, self.now, host.rate)?;
        let store = host.is_server.then(|| SimStore {
            calls: self.calls.clone(),
            host: number,
            incarnation: host.incarnation,
            patience: self.scenario.shared.then_some(Duration::from_secs(5)),
            unknown_is_done: self.mutation == Some(Mutation::UnknownIsDone),
        });
        let (life, ends) = fleetd::begin(
            &mut process,
            Hello { id: host.id.clone(), machine: fleetd::described(number) },
            host.machine.clone(),
            store,
            self.scenario.ttl,
            self.scenario.shared,
        );
        host.process = Some(process);
        host.life = Some(life);
        host.ends = Some(ends);
        host.dial_at = self.now + Duration::from_millis(20);
        Ok(())
    }
}
