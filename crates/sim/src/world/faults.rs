//! What goes wrong, and how.

use super::*;
use crate::scenario::Fault;
use crate::systemd::Phase;

/// A cut between agents and servers.
#[derive(Clone, Debug)]
pub(super) struct Cut {
    /// One agent's host.
    agent: usize,
    /// One server's; none: all.
    server: Option<usize>,
    /// What agents say does not arrive.
    pub(super) up: bool,
    /// What servers say does not.
    pub(super) down: bool,
    from: Time,
    until: Time,
}

impl Cut {
    pub(super) fn is_on(&self, now: Time, agent: usize, server: usize) -> bool {
        self.agent == agent
            && self.server.is_none_or(|cut| cut == server)
            && self.from <= now
            && now < self.until
    }
}

/// Which directions a cut cuts.
fn directions(rng: &mut Rng) -> (bool, bool) {
    *rng.pick(&[(true, true), (true, true), (true, false), (false, true)])
}

impl World {
    pub(super) fn next_fault(&mut self) {
        if !self.troubled {
            return;
        }
        let total: f64 = self.scenario.faults.iter().map(|(_, weight)| weight).sum();
        let (is_in, mut rng) = self.draw_input();
        let mut at = rng.fraction() * total;
        let mut drawn = None;
        for (fault, weight) in &self.scenario.faults {
            drawn = Some(*fault);
            at -= weight;
            if at <= 0.0 {
                break;
            }
        }
        if let Some(fault) = drawn.filter(|_| is_in) {
            self.faults += 1;
            self.strike(fault, &mut rng);
        }
        let mean = self.scenario.fault_every.as_secs_f64();
        let next = Duration::from_secs_f64(mean * -(1.0 - rng.fraction()).max(1e-9).ln());
        self.after(next, Event::Fault);
    }

    fn strike(&mut self, fault: Fault, rng: &mut Rng) {
        let host = rng.below(self.hosts.len());
        let lasts = match rng.chance(0.3) {
            // About as long as it takes until a machine counts as lost.
            true => self.scenario.ttl.mul_f64(0.9) + rng.millis(0, 5_000),
            false => rng.spread(300, 90_000),
        };
        self.note(|| format!("fault {fault:?}, host {host}, {:.3} s", lasts.as_secs_f64()));
        let until = self.now + lasts;
        // Nothing but its end changes what a suspended machine does, or one that goes down.
        let busy = {
            let machine = lock(&self.hosts[host].machine);
            machine.asleep.is_some() || machine.is_off || machine.shutting_down
        };
        let elsewhere = matches!(
            fault,
            Fault::PowerCut
                | Fault::PowerCutMany
                | Fault::Cut
                | Fault::CutMany
                | Fault::Flap
                | Fault::CutStore
                | Fault::FlapStore
                | Fault::LossyStore
                | Fault::SlowStore
                | Fault::FailingStore
                | Fault::LostStore
                | Fault::Compact
                | Fault::NewerRecord
        );
        if busy && !elsewhere {
            return;
        }
        match fault {
            Fault::Kill => {
                if self.hosts[host].process.is_some() {
                    self.lose_process(host, true);
                    let after = rng.spread(100, 20_000);
                    self.after(after, Event::Begin(host));
                }
            }
            Fault::Restart => {
                if let Some(life) = &self.hosts[host].life {
                    life.terminate.cancel();
                }
            }
            Fault::PowerCut => {
                self.power_off(host);
                self.after(lasts, Event::Begin(host));
            }
            Fault::PowerCutMany => {
                for host in 0..self.hosts.len() {
                    if rng.chance(0.6) {
                        self.power_off(host);
                        self.after(lasts + rng.millis(0, 5_000), Event::Begin(host));
                    }
                }
            }
            Fault::Suspend => {
                if let Some(process) = &mut self.hosts[host].process {
                    process.sleep(self.now);
                    lock(&self.hosts[host].machine).sleep();
                    self.oracle.sleeps(self.now, host, true);
                    self.after(lasts, Event::Wake(host));
                    if self.scenario.shared && self.hosts[host].is_server {
                        let elected = rng.millis(1_000, 2_500);
                        self.after(elected, Event::Elect(host));
                    }
                }
            }
            Fault::GuardDies => {
                let back = self.now + rng.millis(100, 300);
                lock(&self.hosts[host].machine).lose_guard(back);
            }
            Fault::FullDisk => {
                lock(&self.hosts[host].machine).full = until;
                self.oracle.full(host, until);
            }
            Fault::Reset => {
                let (agent, server) = (rng.chance(0.8), rng.chance(0.8));
                for session in self.sessions.values_mut().filter(|session| session.agent == host) {
                    // Each side finds out at once, or when the other has been silent for long.
                    session.reset(agent, server);
                }
            }
            Fault::NewerRecord => {
                if let Some(name) = self.make_unreadable(rng.below(64)) {
                    self.after(lasts, Event::Readable(name));
                }
            }
            Fault::Reboot => {
                lock(&self.hosts[host].machine).stop_all();
                if let Some(life) = &self.hosts[host].life {
                    life.terminate.cancel();
                }
                let stopping = rng.spread(3_000, 15_000);
                let off = rng.spread(3_000, 60_000);
                self.after(stopping, Event::Off(host, off));
            }
            Fault::Pause => {
                if let Some(process) =
                    self.hosts[host].process.as_mut().filter(|process| !process.is_paused())
                {
                    process.pause();
                    let pause = rng.spread(100, 25_000);
                    self.after(pause, Event::Resume(host));
                }
            }
            Fault::Cut => {
                let cut = self.draw_cut(host, until, rng);
                self.cuts.push(cut);
            }
            Fault::Flap => {
                let until = self.now + rng.spread(100, 8_000);
                let cut = self.draw_cut(host, until, rng);
                self.cuts.push(cut);
                let times = 2 + u32::try_from(rng.below(8)).unwrap_or(0);
                self.after(
                    self.cuts[self.cuts.len() - 1].until - self.now,
                    Event::Flap(self.cuts.len() - 1, times),
                );
            }
            Fault::CutMany => {
                let (up, down) = directions(rng);
                for agent in 0..self.hosts.len() {
                    if rng.chance(0.7) {
                        self.cuts.push(Cut { agent, server: None, up, down, from: self.now, until });
                    }
                }
            }
            Fault::CutStore => {
                let server = self.draw_server(rng);
                self.cut_store(server, directions(rng), until);
            }
            Fault::FlapStore => {
                let (server, times) = (self.draw_server(rng), 2 + u32::try_from(rng.below(8)).unwrap_or(0));
                self.flap_store(server, times);
            }
            Fault::LossyStore => {
                let most = if self.scenario.shared { *rng.pick(&[0.05, 0.3]) } else { 0.0 };
                self.store_trouble.lossy = Some((until, most * rng.fraction()));
            }
            Fault::SlowStore => {
                self.store_trouble.slow = Some((until, *rng.pick(self.scenario.slow)));
            }
            Fault::FailingStore => {
                let probability = rng.fraction();
                self.store_trouble.failing = Some((until, probability));
            }
            Fault::Compact => {
                let revision = self.store.revision();
                self.store.compact(revision);
                if self.scenario.shared && rng.chance(0.3) {
                    let now = self.store_now();
                    self.store.refresh_leases(now);
                }
            }
            Fault::LostStore => {
                self.store_trouble.lost = Some(self.now + rng.spread(300, 20_000));
            }
            Fault::BusAway => {
                lock(&self.hosts[host].machine).away = true;
                self.after(lasts / 3, Event::BusBack(host));
            }
            Fault::Die => {
                let pick = rng.below(64);
                let phase = *rng.pick(&[Phase::Inactive, Phase::Failed]);
                lock(&self.hosts[host].machine).die(pick, phase);
            }
        }
        if self.mutation == Some(Mutation::EmptyListing) && rng.chance(0.2) {
            self.store_trouble.empty_listing = Some(rng.below(self.scenario.servers));
            let revision = self.store.revision();
            self.store.compact(revision);
        }
    }

    fn draw_cut(&self, agent: usize, until: Time, rng: &mut Rng) -> Cut {
        let (up, down) = directions(rng);
        let server = rng.chance(0.5).then(|| rng.below(self.scenario.servers));
        Cut { agent, server, up, down, from: self.now, until }
    }

    /// The cut is on again after a pause.
    pub(super) fn flap(&mut self, cut: usize, left: u32) {
        if left == 0 || !self.troubled {
            return;
        }
        let (pause, lasts) = (self.rng.spread(50, 12_000), self.rng.spread(100, 8_000));
        let now = self.now;
        if let Some(cut) = self.cuts.get_mut(cut) {
            cut.from = now + pause;
            cut.until = cut.from + lasts;
        }
        self.after(pause + lasts, Event::Flap(cut, left - 1));
    }

    /// A server of which something is to go wrong with the store: more often than not the one that leads.
    fn draw_server(&self, rng: &mut Rng) -> usize {
        let any = rng.below(self.scenario.servers);
        let leader = self.oracle.leader().and_then(|id| self.hosts.iter().position(|host| host.id == *id));
        if rng.chance(0.5) { leader.unwrap_or(any) } else { any }
    }

    /// Calls to the store, and answers, do not arrive.
    fn cut_store(&mut self, server: usize, (to, from): (bool, bool), until: Time) {
        let now = self.now;
        self.store_trouble.cuts.retain(|(.., until)| *until > now);
        if self.scenario.shared {
            self.store_trouble.cuts.push((server, to, from, until));
        }
    }

    /// A cut between a server and the store, and another one after a pause.
    pub(super) fn flap_store(&mut self, server: usize, left: u32) {
        if left == 0 || !self.troubled {
            return;
        }
        let (pause, lasts) = (self.rng.spread(50, 12_000), self.rng.spread(100, 8_000));
        let directions = directions(&mut self.rng);
        self.cut_store(server, directions, self.now + lasts);
        self.after(lasts + pause, Event::FlapStore(server, left - 1));
    }

    /// A suspended machine goes on.
    pub(super) fn wake(&mut self, host: usize) {
        let now = self.now;
        let mut machine = lock(&self.hosts[host].machine);
        if machine.asleep.is_none() {
            return;
        }
        machine.now = now;
        machine.wake();
        drop(machine);
        if let Some(process) = &mut self.hosts[host].process {
            process.wake(now);
        }
        self.oracle.sleeps(now, host, false);
        self.note(|| format!("host {host} wakes up"));
        self.believes_to_lead(host);
    }

    pub(super) fn resume(&mut self, host: usize) {
        let now = self.now;
        if let Some(process) = self.hosts[host].process.as_mut().filter(|process| process.is_paused()) {
            process.resume(now);
            self.note(|| format!("host {host}: fleetd goes on"));
        }
    }

    pub(super) fn power_off(&mut self, host: usize) {
        self.note(|| format!("host {host} is off"));
        self.lose_process(host, false);
        lock(&self.hosts[host].machine).off();
        self.take_facts(host);
        self.oracle.off(host);
    }

    /// A fleetd is gone. `told`: its kernel tells those it was connected with.
    pub(super) fn lose_process(&mut self, host: usize, told: bool) {
        if self.hosts[host].process.take().is_none() {
            return;
        }
        self.oracle.killed(self.now, host);
        self.hosts[host].life = None;
        self.hosts[host].ends = None;
        let mut broken = Vec::new();
        for (key, session) in &mut self.sessions {
            if !told && (session.agent == host || session.server == host) {
                session.kill();
            }
            if session.agent == host {
                session.break_agent();
                if told {
                    session.break_server();
                }
            }
            if session.server == host {
                session.break_server();
                if told {
                    broken.push(*key);
                }
            }
        }
        for key in broken {
            let delay = self.rng.spread(1, 300);
            self.after(delay, Event::Broken(key));
        }
        if self.hosts[host].is_server && !self.scenario.shared {
            self.restart_store();
        }
    }
}
