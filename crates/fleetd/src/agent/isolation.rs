//! Units with OnIsolation=stop: not run here while another machine may run them.
//!
//! When they are due is decided in [`fleet_cluster::fencing`]. A unit that was due is *lapsed*: whoever stopped it, the
//! agent or the guard, it is taken off this machine as one that nobody wants, and only then is it wanted again. None is brought
//! here before the guard knows of it.

use super::*;
use fleet_cluster::fencing::{self, Due, still_wanted};
use fleet_unit::{OnIsolation, Requirements};

/// How long, at most, a machine that shuts down waits for its units to stop before it keeps its presence after all.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);
/// How often their states are asked meanwhile, should systemd say nothing of itself.
const LOOK: Duration = Duration::from_millis(200);

/// The agent's part of it.
#[derive(Debug, Default)]
pub(super) struct Isolation {
    /// The units with OnIsolation=stop, wanted here or here.
    units: BTreeSet<UnitName>,
    /// Those that the guard may know, with the time each may take to stop.
    guarded: BTreeMap<UnitName, Time>,
    /// Those of them that a guard knows for certain, and it runs. What an earlier fleetd told may be all that came of it.
    armed: BTreeSet<UnitName>,
    /// Those that have to go from here before they are wanted again; with what to say of it.
    lapsed: BTreeMap<UnitName, Option<String>>,
}

impl Isolation {
    /// `guarded`: what an earlier fleetd knew.
    pub(super) fn new(guarded: BTreeMap<UnitName, Time>) -> Self {
        Isolation { guarded, ..Isolation::default() }
    }

    /// What is wanted of a unit, as far as isolation lets it.
    pub(super) fn still_wanted<'w>(&self, name: &UnitName, wanted: Option<&'w Wanted>) -> Option<&'w Wanted> {
        let due = if self.is_lapsed(name) { Due::Stop } else { Due::Nothing };
        still_wanted(wanted, due)
    }

    /// Whether a unit has to go from here, whatever is wanted of it.
    pub(super) fn is_lapsed(&self, name: &UnitName) -> bool {
        self.lapsed.contains_key(name)
    }

    /// Whether the guard has yet to be told of a unit that is about to be here, or to stay. What leads away from that needs none.
    pub(super) fn lacks_guard(&self, name: &UnitName, wanted: Option<&Wanted>, step: &Step) -> bool {
        let comes = matches!(step, Step::Install | Step::Start(_) | Step::Adopt(_) | Step::Rest);
        comes
            && self.units.contains(name)
            && !self.armed.contains(name)
            && wanted.is_some_and(|wanted| is_fenced(name, wanted.file.text()))
    }

    /// Why a unit is not here, for the user.
    pub(super) fn problem(&self, name: &UnitName) -> Option<&str> {
        self.lapsed.get(name)?.as_deref()
    }

    fn due(&self, name: &UnitName, known: presence::Known, now: Time) -> Due {
        let timeout = self.guarded.get(name).copied().unwrap_or(Time::MAX);
        fencing::due(known.renewed, known.ttl, timeout, now)
    }
}

/// Whether a unit of this text has OnIsolation=stop.
fn is_fenced(name: &UnitName, text: &str) -> bool {
    // Nearly all say nothing of it, and need not be read for that.
    text.contains("OnIsolation")
        && UnitFile::parse(text).is_ok_and(|file| {
            Requirements::of_accepted(name, &file).is_ok_and(|asks| asks.on_isolation == OnIsolation::Stop)
        })
}

impl<S: Systemd> Agent<S> {
    /// Finds out whether a unit is one of these: as it is wanted, or as it is here.
    pub(super) fn note_isolation(&mut self, name: &UnitName) {
        let wanted =
            self.wanted.as_ref().and_then(|wanted| wanted.get(name)).map(|wanted| wanted.file.text());
        let here = self.slots.get(name).and_then(|slot| slot.observed.text.as_deref());
        if [wanted, here].into_iter().flatten().any(|text| is_fenced(name, text)) {
            self.isolation.units.insert(name.clone());
        } else {
            self.isolation.units.remove(name);
        }
    }

    /// Finds out which units are due now, and which are no longer.
    pub(super) fn follow_isolation(&mut self) {
        if self.isolation.units.is_empty() && self.isolation.lapsed.is_empty() {
            return;
        }
        let (known, now) = (self.presence.known(), self.systemd.clock());
        let Isolation { units, lapsed, .. } = &self.isolation;
        let due = units.iter().filter(|name| !lapsed.contains_key(*name));
        let due: Vec<_> =
            due.filter(|name| self.isolation.due(name, known, now) > Due::Nothing).cloned().collect();
        for name in due {
            let is_here = self.slots.get(&name).is_some_and(Slot::is_here);
            let problem = is_here.then(|| why(known, now));
            if let Some(problem) = &problem {
                warn!(UNIT = %name, "{name}: {problem}");
            }
            self.isolation.lapsed.insert(name.clone(), problem);
            self.touched.insert(name.clone());
            self.dirty.insert(name);
        }
        let Isolation { units, lapsed, .. } = &self.isolation;
        let over = |name: &&UnitName| {
            let gone = !self.slots.get(*name).is_some_and(Slot::is_here);
            !units.contains(*name) || gone && self.isolation.due(name, known, now) == Due::Nothing
        };
        let over: Vec<_> = lapsed.keys().filter(over).cloned().collect();
        for name in over {
            self.isolation.lapsed.remove(&name);
            self.touched.insert(name.clone());
            self.dirty.insert(name);
        }
    }

    /// When units are due next, if presence is not renewed.
    pub(super) fn isolation_at(&self) -> Option<Instant> {
        let (known, now) = (self.presence.known(), self.systemd.clock());
        let timeout = |name| self.isolation.guarded.get(name).copied().unwrap_or(Time::MAX);
        let units = self.isolation.units.iter().map(|name| (name, timeout(name)));
        let at = fencing::isolation(units, known.renewed, known.ttl, now).wake_at?;
        Some(Instant::now() + at.saturating_sub(now))
    }

    /// Has units guarded, so that they may be brought here. How long they take to stop is asked when their files are there.
    pub(super) async fn arm(&mut self, names: Vec<UnitName>) {
        for name in &names {
            self.isolation.guarded.entry(name.clone()).or_insert(Time::MAX);
        }
        let told = async {
            self.presence.guard(self.isolation.guarded.clone()).await?;
            self.systemd.run_guard(true).await
        };
        match told.await {
            Ok(()) => {
                self.isolation.armed.extend(names.iter().cloned());
                self.dirty.extend(names);
            }
            Err(error) => {
                for name in names {
                    self.fail(&name, format!("OnIsolation=stop can't be kept without the guard: {error}"));
                }
            }
        }
    }

    /// Tells the guard how long units that were installed a moment ago may take to stop.
    pub(super) async fn tell_timeouts(&mut self, names: &[UnitName]) {
        let names: Vec<_> =
            names.iter().filter(|name| self.isolation.units.contains(*name)).cloned().collect();
        if names.is_empty() {
            return;
        }
        let mut guarded = self.isolation.guarded.clone();
        guarded.extend(self.systemd.stop_timeouts(&names).await);
        match self.presence.guard(guarded.clone()).await {
            Ok(()) => self.isolation.guarded = guarded,
            Err(error) => {
                warn!("the guard can't be told how long units take to stop: {error}");
                // It may go by either time from now on: here the one counts by which a unit is due first.
                for (name, timeout) in guarded {
                    let known = self.isolation.guarded.entry(name).or_default();
                    *known = timeout.max(*known);
                }
            }
        }
    }

    /// Sees that the guard runs, if there is anything to guard: an earlier fleetd may not have come to start it, and somebody
    /// may have stopped it.
    pub(super) async fn tend_guard(&mut self) {
        if self.isolation.guarded.is_empty() {
            return;
        }
        if let Err(error) = self.systemd.run_guard(true).await {
            warn!("the guard does not run: {error}");
            self.isolation.armed.clear();
        }
    }

    /// Systemd can be reached again: what it could not be asked for before.
    pub(super) async fn tend_missed_guard(&mut self) {
        if self.isolation.armed.is_empty() {
            self.tend_guard().await;
        }
    }

    /// Has units guarded no more that are not here any more, or may run on in isolation by the file they have now.
    pub(super) async fn disarm(&mut self) {
        let is_here = |name: &UnitName| self.slots.get(name).is_some_and(Slot::is_here);
        let is_coming = |name: &UnitName| {
            let wanted = self.wanted.as_ref().and_then(|wanted| wanted.get(name));
            self.isolation.still_wanted(name, wanted).is_some()
        };
        let keep =
            |name: &UnitName| self.isolation.units.contains(name) && (is_here(name) || is_coming(name));
        if self.wanted.is_none() || self.isolation.guarded.keys().all(keep) {
            return;
        }
        let mut guarded = self.isolation.guarded.clone();
        guarded.retain(|name, _| keep(name));
        // Whatever comes of it, one that comes back here has to be made known again.
        self.isolation.armed.retain(|name| guarded.contains_key(name));
        let told = async {
            if guarded.is_empty() {
                self.presence.guard(BTreeMap::new()).await?;
                self.systemd.tell_guard(None).await?;
                self.systemd.run_guard(false).await
            } else {
                self.presence.guard(guarded.clone()).await
            }
        };
        match told.await {
            Ok(()) => self.isolation.guarded = guarded,
            // Tried again; meanwhile it mostly looks after units that are not there.
            Err(error) => warn!("the guard can't be told that units are gone: {error}"),
        }
    }

    /// Waits, when the machine shuts down, until nothing runs that may be started elsewhere only then; false if that
    /// takes too long. `notices`: of systemd.
    pub(super) async fn may_leave(&mut self, notices: &mut mpsc::Receiver<Notice>) -> bool {
        let deadline = Instant::now() + LEAVE_PATIENCE;
        loop {
            let names: Vec<_> =
                self.isolation.units.iter().filter(|n| self.slots.contains_key(*n)).cloned().collect();
            for name in &names {
                if let Some(slot) = self.slots.get_mut(name) {
                    slot.observed.systemd = None;
                }
            }
            if !names.is_empty() {
                self.ask(&names).await;
            }
            let states = names
                .iter()
                .filter_map(|name| self.slots.get(name))
                .map(|slot| slot.observed.systemd.as_ref());
            if fencing::may_leave(states.map(|state| (OnIsolation::Stop, state))) {
                return true;
            }
            let look = (Instant::now() + LOOK).min(deadline);
            if look >= deadline {
                return false;
            }
            if let Ok(None) = tokio::time::timeout_at(look, notices.recv()).await {
                tokio::time::sleep_until(look).await;
            }
        }
    }
}

fn why(known: presence::Known, now: Time) -> String {
    match known.renewed {
        Some(renewed) => format!(
            "stopped because this machine could not reach a server for {:.1} s (OnIsolation=stop)",
            now.saturating_sub(renewed).as_secs_f64()
        ),
        None => "stopped because it is not known when this machine last reached a server (OnIsolation=stop)"
            .to_owned(),
    }
}
