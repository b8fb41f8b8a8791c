//! What runs where: what fleet may start and stop there (G2), and what must not run twice (G4).

use super::*;

impl Oracle {
    /// A host is suspended, or goes on.
    pub(crate) fn sleeps(&mut self, now: Time, host: usize, sleeps: bool) {
        self.lives_changed = true;
        if sleeps {
            self.asleep.insert(host);
        } else if self.asleep.remove(&host) {
            self.woke.insert(host, now);
            self.counts_at.insert(now + SOON);
        }
    }

    /// A host is paused, suspended, cut off a server, or can't reach its systemd.
    pub(crate) fn stalls(&mut self, now: Time, host: usize) {
        let stalled = self.stalled.entry(host).or_insert((now, now));
        if stalled.1 + NEWS < now {
            stalled.0 = now;
        }
        stalled.1 = now;
    }

    /// Files can't be written on a host until then: no renewal counts there.
    pub(crate) fn full(&mut self, host: usize, until: Time) {
        self.full.insert(host, until);
    }

    /// Whether something was true of what a machine had to hold, at any time since then.
    fn was_wanted(&self, host: usize, name: &UnitName, since: Time, holds: impl Fn(&Want) -> bool) -> bool {
        let Some(history) = self.wants.get(&(self.ids[host].clone(), name.clone())) else {
            return holds(&None);
        };
        if history.first().is_some_and(|(from, _)| *from > since) && holds(&None) {
            return true;
        }
        let before = history.iter().rposition(|(from, _)| *from <= since).unwrap_or(0);
        history[before..].iter().any(|(_, want)| holds(want))
    }

    /// Whether, after a unit was wanted as it was started then, something else was wanted at any time. Who started it may have heard
    /// of an earlier time at which it was wanted.
    fn was_dropped(
        &self,
        host: usize,
        name: &UnitName,
        started: Time,
        wanted: impl Fn(&Want) -> bool,
    ) -> bool {
        let Some(history) = self.wants.get(&(self.ids[host].clone(), name.clone())) else { return true };
        let known = self.heard_from(host, started);
        let until = |at: usize| history.get(at + 1).map_or(Time::MAX, |(until, _)| *until);
        let first = (0..history.len()).find(|at| {
            let (from, want) = &history[*at];
            wanted(want) && *from <= started && until(*at) >= known
        });
        first.is_none_or(|first| history[first..].iter().any(|(_, want)| !wanted(want)))
    }

    /// Since when what was known then on a host may have been known. What was on its way to a host that could not hear it counts from
    /// before that.
    fn heard_from(&self, host: usize, then: Time) -> Time {
        let stalled = self.stalled.get(&host).filter(|(_, until)| *until + NEWS >= then);
        stalled.map_or(then, |(from, _)| then.min(*from)).saturating_sub(NEWS + SLOW)
    }

    /// Since when it may have been known on a host that a unit that runs there was to be started.
    fn known_from(&self, host: usize, name: &UnitName) -> Time {
        let run = self.runs.get(&(host, name.clone()));
        self.heard_from(host, run.map_or(Time::ZERO, |run| run.started))
    }

    /// An answer to a sign of life sent then reached a machine.
    pub(crate) fn renewed(&mut self, now: Time, host: usize, sent: Time) {
        // Presence was held at some time since it was asked for.
        let id = &self.ids[host];
        if self.gone.get(id).is_some_and(|gone| *gone + self.sent < sent) {
            self.violate(
                now,
                "G4",
                format!("host {host} was told that its presence is renewed, and it has none"),
            );
        }
        let known = self.renewed.entry(host).or_default();
        known.retain(|(sent, _)| *sent + self.ttl > now);
        // Of answers that come together only the first may count.
        if known.last().is_none_or(|(_, told)| *told + SOON < now) {
            known.push((sent, now));
        }
    }

    pub(crate) fn killed(&mut self, now: Time, host: usize) {
        self.killed.insert(host, now);
    }

    /// A machine was switched off.
    pub(crate) fn off(&mut self, host: usize) {
        self.runs.retain(|(on, _), _| *on != host);
        self.lives_changed = true;
        self.asleep.remove(&host);
    }

    pub(super) fn is_stop(&self, name: &UnitName, hash: Option<Hash>) -> bool {
        hash.is_some_and(|hash| self.stops.get(name).is_some_and(|hashes| hashes.contains(&hash)))
    }

    /// Whether a machine may stop a unit because it could not renew its presence.
    fn fenced(&self, now: Time, host: usize, name: &UnitName) -> bool {
        // The file it is to have counts as much as the one it runs with.
        if !self.stops.contains_key(name) {
            return false;
        }
        // An agent may still be busy with what it was told a moment ago, or have been stopped over it.
        let seen = |told: Time| {
            let stalled = self.stalled.get(&host);
            let stalled = stalled.is_some_and(|(from, until)| *from <= told + SOON && told <= *until);
            told + SOON < now && !stalled
        };
        let known = self.renewed.get(&host).map_or(&[][..], Vec::as_slice);
        let renewed = known.iter().filter(|(_, told)| seen(*told)).map(|(sent, _)| *sent).max();
        // Nor does a renewal count that can't be noted.
        let full = self.full.get(&host).is_some_and(|until| *until + self.ttl > now);
        let due = (self.ttl / 2).mul_f64(0.97);
        full || renewed.is_none_or(|renewed| now.saturating_sub(renewed) + self.sent >= due)
    }

    /// What happened on a machine.
    pub(crate) fn happened(&mut self, now: Time, host: usize, fact: &Fact) {
        self.lives_changed = true;
        match fact {
            Fact::Started { unit, hash, by, noted, asked } => {
                if *by == By::Fleet {
                    self.check_start(now, host, unit, *hash, *noted);
                }
                let run = Run { asked: *asked, started: now, hash: *hash, live: true, stopped: false };
                self.runs.insert((host, unit.clone()), run);
            }
            Fact::Stopping { unit, hash, by } => {
                if *by != By::Itself {
                    self.check_stop(now, host, unit, *hash);
                    if let Some(run) = self.runs.get_mut(&(host, unit.clone())) {
                        run.stopped = true;
                    }
                }
            }
            Fact::Changed { unit, phase } => {
                if let Some(run) = self.runs.get_mut(&(host, unit.clone())) {
                    run.live = phase.is_live();
                    run.stopped &= *phase != Phase::Active;
                }
            }
            Fact::Removed { unit, live } => {
                if *live {
                    self.violate(
                        now,
                        "G2",
                        format!("the file of {unit} was removed on host {host} while it runs"),
                    );
                }
                self.runs.remove(&(host, unit.clone()));
            }
            Fact::Reloaded { outdated } => {
                if !outdated {
                    self.violate(now, "work", format!("host {host} reloaded systemd for nothing"));
                }
            }
        }
    }

    fn check_start(&mut self, now: Time, host: usize, name: &UnitName, hash: Option<Hash>, noted: bool) {
        let wanted =
            |want: &Want| matches!(want, Some((wanted, DesiredState::Launched)) if Some(*wanted) == hash);
        // A Global unit may be where one that can't be read does not want it.
        // Nor does every server hear of a removal at once.
        let id = &self.ids[host];
        let removed = self.removed.contains(id) || self.let_go.get(id).is_some_and(|at| *at + NEWS * 6 > now);
        let blind = self.is_blind(now) && self.globals.contains(name);
        if !self.was_wanted(host, name, Time::ZERO, wanted) && !blind && !removed {
            self.violate(now, "G2", format!("{name} was started on host {host}, where it was never wanted"));
            return;
        }
        let Some(run) = self.runs.get(&(host, name.clone())).cloned() else { return };
        // The next fleetd may not know how a start ended that the one before could not note.
        let forgotten = !noted && self.killed.get(&host).is_some_and(|killed| *killed >= run.asked);
        let fenced = self.is_stop(name, hash);
        // A Global unit may have gone, and come back, for one that could not be read.
        let excused = forgotten || fenced || blind && !self.unreadable.contains(name);
        if run.hash == hash && !excused && !self.was_dropped(host, name, run.started, wanted) {
            self.violate(now, "G2", format!("{name} was started again on host {host} without a decision"));
        }
    }

    fn check_stop(&mut self, now: Time, host: usize, name: &UnitName, hash: Option<Hash>) {
        let started = self.runs.get(&(host, name.clone())).map_or(Time::ZERO, |run| run.started);
        let wanted =
            |want: &Want| matches!(want, Some((wanted, DesiredState::Launched)) if Some(*wanted) == hash);
        // A Global unit may have to go where one that can't be read does not want it.
        let blind = self.is_blind(now) && self.globals.contains(name) && !self.unreadable.contains(name);
        // What a machine that is removed is told may be on its way until it has joined again, and longer if it could not hear it.
        let id = &self.ids[host];
        let heard = self.heard_from(host, now);
        let removed = self.removed.contains(id) || self.let_go.get(id).is_some_and(|at| *at > heard);
        let excused = removed || blind || self.fenced(now, host, name);
        if !excused && !self.was_dropped(host, name, started, wanted) {
            self.violate(now, "G2", format!("{name} was stopped on host {host} without a decision"));
        }
    }

    /// G4: a unit with OnIsolation=stop must not run twice, at no time.
    pub(crate) fn check_lifetimes(&mut self, now: Time) {
        let before = self.counts_at.len();
        self.counts_at.retain(|at| *at >= now);
        let counts = self.counts_at.len() < before;
        if !(std::mem::take(&mut self.lives_changed) || counts) || self.stops.is_empty() {
            return;
        }
        let mut lives: BTreeMap<&UnitName, Vec<usize>> = BTreeMap::new();
        for ((host, name), run) in &self.runs {
            // What is suspended runs again until it has seen what time it is.
            let awake = !self.asleep.contains(host) && self.woke.get(host).is_none_or(|at| *at + SOON < now);
            if run.live && awake && self.is_stop(name, run.hash) {
                lives.entry(name).or_default().push(*host);
            }
        }
        lives.retain(|_, on| on.len() > 1);
        let twice: Vec<_> = lives.into_iter().map(|(name, on)| (name.clone(), on)).collect();
        for (name, on) in twice {
            // What counts is the file it had when it was taken off.
            let unbound = self.unbound.get(&name);
            if unbound.is_some_and(|at| on.iter().any(|host| self.known_from(*host, &name) <= *at)) {
                continue;
            }
            self.violate(now, "G4", format!("{name} has OnIsolation=stop and runs on hosts {on:?}"));
        }
    }

    /// G4: what a machine that is there counts as having stopped does not run there.
    pub(super) fn check_release(&mut self, now: Time, name: &UnitName) {
        let Some((id, _)) = self.view.leaving(name) else { return };
        let again = self.view.place(name).is_some_and(|(at, _)| at == id);
        if again || self.view.machine(id).is_none() {
            return;
        }
        let host = self.ids.iter().position(|known| known == id);
        let run = host.and_then(|host| self.runs.get(&(host, name.clone())));
        if run.is_some_and(|run| run.live && self.is_stop(name, run.hash)) {
            let what = format!("{name} counts as stopped on {id}, where it runs");
            self.violate(now, "G4", what);
        }
    }
}
