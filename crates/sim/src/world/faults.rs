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

impl World {
    pub(super) fn next_fault(&mut self) {
        if !self.troubled {
            return;
        }
        let total: f64 = self.scenario.faults.iter().map(|(_, weight)| weight).sum();
        let mut at = self.rng.fraction() * total;
        let mut drawn = None;
        for (fault, weight) in &self.scenario.faults {
            drawn = Some(*fault);
            at -= weight;
            if at <= 0.0 {
                break;
            }
        }
        if let Some(fault) = drawn {
            self.faults += 1;
            self.strike(fault);
        }
        let mean = self.scenario.fault_every.as_secs_f64();
        let next = Duration::from_secs_f64(mean * -(1.0 - self.rng.fraction()).max(1e-9).ln());
        self.after(next, Event::Fault);
    }

    fn strike(&mut self, fault: Fault) {
        let host = self.rng.below(self.hosts.len());
        let lasts = self.rng.spread(300, 90_000);
        self.note(|| format!("fault {fault:?}, host {host}, {:.3} s", lasts.as_secs_f64()));
        let until = self.now + lasts;
        match fault {
            Fault::Kill => {
                if self.hosts[host].process.is_some() {
                    self.lose_process(host, true);
                    let after = self.rng.spread(100, 20_000);
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
            Fault::Reboot => {
                lock(&self.hosts[host].machine).stop_all();
                if let Some(life) = &self.hosts[host].life {
                    life.terminate.cancel();
                }
                let stopping = self.rng.spread(3_000, 15_000);
                let off = self.rng.spread(3_000, 60_000);
                self.after(stopping, Event::Off(host, off));
            }
            Fault::Pause => {
                if let Some(process) =
                    self.hosts[host].process.as_mut().filter(|process| !process.is_paused())
                {
                    process.pause();
                    let pause = self.rng.spread(100, 25_000);
                    self.after(pause, Event::Resume(host));
                }
            }
            Fault::Cut => {
                let cut = self.draw_cut(host, until);
                self.cuts.push(cut);
            }
            Fault::Flap => {
                let until = self.now + self.rng.spread(100, 8_000);
                let cut = self.draw_cut(host, until);
                self.cuts.push(cut);
                let times = 2 + u32::try_from(self.rng.below(8)).unwrap_or(0);
                self.after(
                    self.cuts[self.cuts.len() - 1].until - self.now,
                    Event::Flap(self.cuts.len() - 1, times),
                );
            }
            Fault::CutMany => {
                let (up, down) = self.directions();
                for agent in 0..self.hosts.len() {
                    if self.rng.chance(0.7) {
                        self.cuts.push(Cut { agent, server: None, up, down, from: self.now, until });
                    }
                }
            }
            Fault::CutStore => {
                let server = self.rng.below(self.scenario.servers);
                let (to, from) = self.directions();
                self.store_trouble.cuts.retain(|(.., until)| *until > self.now);
                if self.scenario.shared {
                    self.store_trouble.cuts.push((server, to, from, until));
                }
            }
            Fault::SlowStore => {
                let most = *self.rng.pick(&[100, 1_000, 8_000]);
                self.store_trouble.slow = Some((until, most));
            }
            Fault::FailingStore => {
                let probability = self.rng.fraction();
                self.store_trouble.failing = Some((until, probability));
            }
            Fault::Compact => {
                let revision = self.store.revision();
                self.store.compact(revision);
                if self.scenario.shared && self.rng.chance(0.3) {
                    let now = self.store_now();
                    self.store.refresh_leases(now);
                }
            }
            Fault::LostStore => {
                self.store_trouble.lost = Some(self.now + self.rng.spread(300, 20_000));
            }
            Fault::BusAway => {
                lock(&self.hosts[host].machine).away = true;
                self.after(lasts / 3, Event::BusBack(host));
            }
            Fault::Die => {
                let pick = self.rng.below(64);
                let phase = *self.rng.pick(&[Phase::Inactive, Phase::Failed]);
                lock(&self.hosts[host].machine).die(pick, phase);
            }
        }
        if self.mutation == Some(Mutation::EmptyListing) && self.rng.chance(0.2) {
            self.store_trouble.empty_listing = Some(self.rng.below(self.scenario.servers));
            let revision = self.store.revision();
            self.store.compact(revision);
        }
    }

    fn directions(&mut self) -> (bool, bool) {
        *self.rng.pick(&[(true, true), (true, true), (true, false), (false, true)])
    }

    fn draw_cut(&mut self, agent: usize, until: Time) -> Cut {
        let (up, down) = self.directions();
        let server = self.rng.chance(0.5).then(|| self.rng.below(self.scenario.servers));
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
