//! The systemd of one machine: what the agent sees of it, and what really runs.
//!
//! Units take their time to start and to stop, fail, die, and some do not want to stop until they are killed. Calls take
//! their time, too, and tell how it was when they were made. All of it outlives the processes of fleetd on the machine, and
//! nothing of it a boot. What happens to units is noted as [`Fact`]s, for the checks.

use crate::process::Time;
use crate::rng::Rng;
use fleet_cluster::fencing::{self, Due};
use fleet_systemd::{Error, Found, Guarded, JobResult, Mark, Notice, Output, State, Systemd};
use fleet_unit::{Hash, UnitFile, UnitName};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// What a unit is at, as systemd calls it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Inactive,
    Activating,
    Active,
    Deactivating,
    Failed,
}

impl Phase {
    /// Whether anything of the unit runs.
    pub(crate) fn is_live(self) -> bool {
        !matches!(self, Phase::Inactive | Phase::Failed)
    }
    /// Active and sub state.
    pub(crate) fn words(self) -> (&'static str, &'static str) {
        match self {
            Phase::Inactive => ("inactive", "dead"),
            Phase::Activating => ("activating", "start"),
            Phase::Active => ("active", "running"),
            Phase::Deactivating => ("deactivating", "stop-sigterm"),
            Phase::Failed => ("failed", "failed"),
        }
    }
}

/// Who made something happen to a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// fleetd.
    Fleet,
    /// Its guard, which stops what is due when fleetd does not.
    Guard,
    /// The unit itself, or the machine.
    Itself,
}

/// Something that happened to a unit of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fact {
    /// It was started when it did not run. `noted`: it was noted on the machine that it had been started as it is now, and
    /// nobody had taken that back. `asked`: when its start was asked for.
    Started { unit: UnitName, hash: Option<Hash>, by: By, noted: bool, asked: Time },
    /// It was told to stop while it ran.
    Stopping { unit: UnitName, hash: Option<Hash>, by: By },
    /// Its phase changed otherwise.
    Changed { unit: UnitName, phase: Phase },
    /// Its file was taken away.
    Removed { unit: UnitName, live: bool },
    /// systemd read all its configuration anew. `outdated`: what it had loaded of some unit was not what its file says.
    Reloaded { outdated: bool },
}

/// How the units of a machine behave.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Manners {
    /// How likely a start fails.
    pub(crate) fails: f64,
    /// How likely a start or a stop takes seconds.
    pub(crate) slow: f64,
    /// How likely a start waits for another unit first.
    pub(crate) waits: f64,
    /// How likely another unit refers to one that ends, which stays in memory therefore.
    pub(crate) kept: f64,
    /// How likely a unit does not stop until it is killed.
    pub(crate) hangs: f64,
    /// How long a stop may take until systemd kills.
    pub(crate) stop_timeout: Duration,
    /// How likely a call fails because systemd can't be reached, or a file can't be written.
    pub(crate) trouble: f64,
}

#[derive(Debug, Default)]
struct SimUnit {
    file: Option<Arc<str>>,
    /// The text that systemd has in memory.
    loaded: Option<Arc<str>>,
    phase: Phase,
    /// The hash of the file it was started with last.
    hash: Option<Hash>,
    /// What it was noted to have been started with before the start that is noted now.
    noted: Option<Hash>,
    job: u64,
    /// Its newest job is a stop.
    stops: bool,
    /// When its newest start was asked for.
    asked: Time,
    awaited: Option<oneshot::Sender<JobResult>>,
}

/// What a machine holds.
#[derive(Debug)]
pub(crate) struct Machine {
    units: BTreeMap<UnitName, SimUnit>,
    marks: BTreeMap<UnitName, Mark>,
    /// What the guard was told, whether it runs, and when it looks again.
    guarded: Option<Guarded>,
    guard_runs: bool,
    guard_looks: Time,
    /// The units that the guard has stopped since they are due.
    guard_stopped: BTreeSet<UnitName>,
    /// Until then the guard is dead, and about to be started again.
    guard_back: Time,
    /// For how long the machine was suspended, by its own clock, and since when it is.
    pub(crate) slept: Duration,
    pub(crate) asleep: Option<Time>,
    /// Files can't be written until then.
    pub(crate) full: Time,
    /// How fast the machine's clock runs, and when it booted.
    rate: f64,
    booted: Time,
    /// Jobs under way, by when they end, or their waiting does ([`Phase::Activating`]).
    ends: BTreeMap<(Time, u64), (UnitName, Phase)>,
    jobs: u64,
    pub(crate) now: Time,
    pub(crate) manners: Manners,
    /// systemd can't be reached at all.
    pub(crate) away: bool,
    pub(crate) shutting_down: bool,
    /// It has no power.
    pub(crate) is_off: bool,
    /// Deliberate mistake: it forgets which units were started.
    pub(crate) forgetful: bool,
    /// Deliberate mistake: it does not take note of what fleetd does not know any more.
    pub(crate) sure: bool,
    /// Deliberate mistake: it says that a stop is done while the unit still runs.
    pub(crate) hasty: bool,
    /// Deliberate mistake: fleetd's and the guard's clock stands still.
    pub(crate) timeless: bool,
    /// Deliberate mistake: there is no guard.
    pub(crate) unguarded: bool,
    /// Deliberate mistake: everything is reloaded for each unit.
    pub(crate) reloads: bool,
    notices: Option<mpsc::Sender<Notice>>,
    changed: BTreeSet<UnitName>,
    facts: Vec<Fact>,
    rng: Rng,
}

impl Machine {
    pub(crate) fn new(rng: Rng, manners: Manners, rate: f64) -> Self {
        Machine {
            units: BTreeMap::new(),
            marks: BTreeMap::new(),
            guarded: None,
            guard_runs: false,
            guard_looks: Time::ZERO,
            guard_stopped: BTreeSet::new(),
            guard_back: Time::ZERO,
            slept: Duration::ZERO,
            asleep: None,
            full: Time::ZERO,
            rate,
            booted: Time::ZERO,
            ends: BTreeMap::new(),
            jobs: 0,
            now: Time::ZERO,
            manners,
            away: false,
            shutting_down: false,
            is_off: false,
            forgetful: false,
            sure: false,
            hasty: false,
            timeless: false,
            unguarded: false,
            reloads: false,
            notices: None,
            changed: BTreeSet::new(),
            facts: Vec::new(),
            rng,
        }
    }

    /// The machine lost its power.
    pub(crate) fn off(&mut self) {
        for (unit, state) in std::mem::take(&mut self.units) {
            if state.phase.is_live() {
                self.facts.push(Fact::Changed { unit, phase: Phase::Inactive });
            }
        }
        self.marks.clear();
        self.guarded = None;
        self.guard_runs = false;
        self.booted = self.now;
        self.slept = Duration::ZERO;
        self.asleep = None;
        self.full = Time::ZERO;
        self.ends.clear();
        self.notices = None;
        self.shutting_down = false;
        self.is_off = true;
        self.away = false;
    }

    /// What happened since this was asked last.
    pub(crate) fn take_facts(&mut self) -> Vec<Fact> {
        std::mem::take(&mut self.facts)
    }

    /// Its units, with the text of their files, their phase and the hash they were started with.
    pub(crate) fn units(&self) -> impl Iterator<Item = (&UnitName, Option<&str>, Phase, Option<Hash>)> {
        self.units.iter().map(|(name, unit)| (name, unit.file.as_deref(), unit.phase, unit.hash))
    }

    /// The time since it booted, by its own clock, with the time it was suspended.
    fn clock(&self) -> Duration {
        if self.timeless {
            return Duration::from_secs(1);
        }
        self.now.saturating_sub(self.booted).mul_f64(self.rate)
    }

    /// It is suspended, with all that runs on it.
    pub(crate) fn sleep(&mut self) {
        self.asleep = self.asleep.or(Some(self.now));
    }

    /// It goes on; jobs and timeouts of systemd as if no time had passed.
    pub(crate) fn wake(&mut self) {
        let Some(since) = self.asleep.take() else { return };
        let slept = self.now.saturating_sub(since);
        self.slept += slept.mul_f64(self.rate);
        let ends = std::mem::take(&mut self.ends).into_iter();
        self.ends = ends.map(|((at, job), what)| ((at + slept, job), what)).collect();
        // Timers of that clock are due on waking.
        self.guard_looks = Time::ZERO;
    }

    /// The guard dies; systemd starts it again.
    pub(crate) fn lose_guard(&mut self, back: Time) {
        self.guard_back = back;
        self.guard_looks = Time::ZERO;
    }

    /// Jobs and reloads since it booted.
    pub(crate) fn work(&self) -> u64 {
        self.jobs
    }

    /// When something happens here next by itself, if nothing else does before.
    pub(crate) fn next(&self) -> Option<Time> {
        if self.asleep.is_some() {
            return None;
        }
        let guard = self.guarded.as_ref().filter(|_| self.guard_runs).map(|_| {
            let looks = self.guard_looks.saturating_sub(self.clock());
            (self.now + looks.div_f64(self.rate)).max(self.guard_back)
        });
        let told = (!self.changed.is_empty() && !self.away).then_some(self.now);
        [guard, told, self.ends.keys().next().map(|(at, _)| *at)].into_iter().flatten().min()
    }

    /// The guard does what is due, as `fleetd::guard` does.
    fn guard(&mut self) {
        let now = self.clock();
        if !self.guard_runs || self.unguarded || now < self.guard_looks || self.now < self.guard_back {
            return;
        }
        let Some(guarded) = self.guarded.clone() else { return };
        let renewed = Some(guarded.renewed).filter(|renewed| *renewed <= now);
        let units = guarded.units.iter().map(|(name, timeout)| (name, *timeout));
        let isolation = fencing::isolation(units, renewed, guarded.ttl, now);
        let look = (guarded.ttl / 50).clamp(Duration::from_millis(50), Duration::from_secs(1));
        self.guard_looks = match isolation.due.is_empty() {
            true => isolation.wake_at.unwrap_or(now + guarded.ttl),
            false => isolation.wake_at.unwrap_or(Duration::MAX).min(now + look),
        };
        self.guard_stopped.retain(|name| isolation.due.iter().any(|(other, _)| other == name));
        for (name, due) in isolation.due {
            let phase = self.units.get(&name).map_or(Phase::Inactive, |unit| unit.phase);
            // One that is down may wait to be started.
            let first = self.guard_stopped.insert(name.clone());
            if phase.is_live() && phase != Phase::Deactivating || !phase.is_live() && first {
                self.marks.remove(&name);
                drop(self.begin_stop(&name, By::Guard));
            }
            if phase.is_live() && due == Due::Kill {
                // What is killed is gone at once.
                drop(self.begin(&name, Duration::ZERO, Phase::Failed));
            }
        }
    }

    /// Lets time pass: jobs end.
    pub(crate) fn run_to(&mut self, now: Time) {
        self.now = now;
        if self.asleep.is_some() {
            return;
        }
        self.guard();
        while let Some(entry) = self.ends.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let ((_, job), (name, phase)) = entry.remove_entry();
            let Some(unit) = self.units.get_mut(&name).filter(|unit| unit.job == job) else { continue };
            if phase == Phase::Activating {
                self.start_waiting(&name);
                continue;
            }
            unit.phase = phase;
            if phase == Phase::Inactive && !(self.manners.kept > 0.0 && self.rng.chance(self.manners.kept)) {
                unit.loaded = None;
            }
            if let Some(wait) = unit.awaited.take() {
                // Of one that is down already a stop is done at once.
                let failed = phase == Phase::Failed && !unit.stops;
                let result = if failed { JobResult::Failed("failed".to_owned()) } else { JobResult::Done };
                // Nobody waits when fleetd is gone.
                let _ = wait.send(result);
            }
            self.facts.push(Fact::Changed { unit: name.clone(), phase });
            self.changed.insert(name);
        }
        self.notify();
    }

    fn notify(&mut self) {
        if self.changed.is_empty() || self.away {
            return;
        }
        let Some(notices) = &self.notices else { return self.changed.clear() };
        match notices.try_send(Notice::Units(self.changed.clone())) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => self.changed.clear(),
            // Told when there is room.
            Err(mpsc::error::TrySendError::Full(_)) => {}
        }
    }

    /// systemd is back, or a fleetd has come.
    pub(crate) fn tell_all(&mut self) {
        if let Some(notices) = &self.notices {
            // A full queue wakes the agent just as well.
            let _ = notices.try_send(Notice::All);
        }
    }

    /// A unit that runs ends by itself.
    pub(crate) fn die(&mut self, pick: usize, phase: Phase) -> Option<UnitName> {
        let active: Vec<_> =
            self.units.iter().filter(|(_, unit)| unit.phase == Phase::Active).map(|(name, _)| name).collect();
        let name = (*active.get(pick % active.len().max(1))?).clone();
        let unit = self.units.get_mut(&name)?;
        unit.phase = phase;
        if phase == Phase::Inactive {
            unit.loaded = None;
        }
        self.facts.push(Fact::Changed { unit: name.clone(), phase });
        self.changed.insert(name.clone());
        Some(name)
    }

    /// All units are told to stop, since the machine goes down; starts that wait are taken back.
    pub(crate) fn stop_all(&mut self) {
        self.shutting_down = true;
        let live: Vec<_> = self
            .units
            .iter()
            .filter(|(_, unit)| unit.phase.is_live() || unit.awaited.is_some())
            .map(|(name, _)| name.clone())
            .collect();
        for name in live {
            drop(self.begin_stop(&name, By::Itself));
        }
    }

    fn may_write(&self) -> Result<(), Error> {
        match self.now < self.full {
            true => Err(Error::File { path: "/run/fleet".to_owned(), reason: "no space left".to_owned() }),
            false => Ok(()),
        }
    }

    /// systemd reads what it has loaded anew.
    fn reload(&mut self) {
        self.jobs += 1;
        let outdated = |unit: &SimUnit| unit.loaded.is_some() && unit.loaded != unit.file;
        let outdated = self.units.values().any(outdated);
        for unit in self.units.values_mut() {
            unit.loaded = unit.loaded.as_ref().and(unit.file.clone());
        }
        self.facts.push(Fact::Reloaded { outdated });
    }

    fn begin(&mut self, name: &UnitName, takes: Duration, then: Phase) -> oneshot::Receiver<JobResult> {
        let (send, receive) = oneshot::channel();
        self.go_on(name, takes, then);
        let unit = self.units.entry(name.clone()).or_default();
        if let Some(older) = unit.awaited.replace(send) {
            let _ = older.send(JobResult::Canceled);
        }
        receive
    }

    /// What is under way of the unit ends so; who waits for it goes on waiting.
    fn go_on(&mut self, name: &UnitName, takes: Duration, then: Phase) {
        self.jobs += 1;
        self.units.entry(name.clone()).or_default().job = self.jobs;
        self.ends.insert((self.now + takes, self.jobs), (name.clone(), then));
        self.changed.insert(name.clone());
    }

    fn begin_start(&mut self, name: &UnitName) -> Result<oneshot::Receiver<JobResult>, Error> {
        let manners = self.manners;
        let slow = self.rng.chance(manners.slow);
        let takes = if slow { self.rng.millis(500, 8_000) } else { self.rng.millis(1, 300) };
        let fails = self.rng.chance(manners.fails);
        if self.shutting_down {
            return Err(Error::Refused("Transaction is destructive: the machine shuts down.".to_owned()));
        }
        let unit = self.units.entry(name.clone()).or_default();
        let Some(text) = unit.file.clone().or(unit.loaded.clone()) else {
            return Err(Error::Refused(format!("Unit {name} not found.")));
        };
        (unit.stops, unit.asked) = (false, self.now);
        if unit.phase == Phase::Active {
            return Ok(self.begin(name, Duration::ZERO, Phase::Active));
        }
        // What is in memory counts, as long as nobody reloads.
        unit.loaded.get_or_insert(text);
        let end = if fails { Phase::Failed } else { Phase::Active };
        if !unit.phase.is_live() && manners.waits > 0.0 && self.rng.chance(manners.waits) {
            // Its state does not show that; nor does it matter then how it would have ended.
            let waits = self.rng.millis(100, 20_000);
            return Ok(self.begin(name, waits, Phase::Activating));
        }
        self.activate(name);
        Ok(self.begin(name, takes, end))
    }

    /// What a start waited for is there.
    fn start_waiting(&mut self, name: &UnitName) {
        let takes = self.rng.millis(1, 300);
        let there = self.units.get(name).is_some_and(|unit| unit.loaded.is_some() || unit.file.is_some());
        if there {
            self.activate(name);
        }
        self.go_on(name, takes, if there { Phase::Active } else { Phase::Failed });
    }

    /// A start begins.
    fn activate(&mut self, name: &UnitName) {
        let Some(unit) = self.units.get_mut(name) else { return };
        let fresh = !unit.phase.is_live();
        let text = unit.loaded.clone().or(unit.file.clone());
        unit.hash = text.and_then(|text| UnitFile::parse(&text).ok()).map(|file| file.hash());
        unit.phase = Phase::Activating;
        if fresh {
            let noted = unit.noted.is_some() && unit.noted == unit.hash;
            let (unit, hash, asked) = (name.clone(), unit.hash, unit.asked);
            self.facts.push(Fact::Started { unit, hash, by: By::Fleet, noted, asked });
        }
    }

    fn begin_stop(&mut self, name: &UnitName, by: By) -> oneshot::Receiver<JobResult> {
        let manners = self.manners;
        let takes = match () {
            () if self.rng.chance(manners.hangs) => manners.stop_timeout,
            () if self.rng.chance(manners.slow) => self.rng.millis(500, 10_000).min(manners.stop_timeout),
            () => self.rng.millis(1, 200),
        };
        let unit = self.units.entry(name.clone()).or_default();
        unit.stops = true;
        if !unit.phase.is_live() {
            let phase = unit.phase;
            return self.begin(name, Duration::ZERO, phase);
        }
        if unit.phase != Phase::Deactivating {
            self.facts.push(Fact::Stopping { unit: name.clone(), hash: unit.hash, by });
        }
        unit.phase = Phase::Deactivating;
        self.begin(name, takes, Phase::Inactive)
    }
}

/// A machine, as its processes and the world share it.
pub(crate) type SharedMachine = Arc<Mutex<Machine>>;

/// Its lock.
pub(crate) fn lock(machine: &SharedMachine) -> MutexGuard<'_, Machine> {
    machine.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one fleetd sees of its machine's systemd.
#[derive(Debug)]
pub(crate) struct SimSystemd {
    machine: SharedMachine,
    /// When the last call arrives: they keep their order on the bus.
    last: Mutex<Instant>,
    /// When this fleetd began: the machine's clock, for how long the machine had been suspended, and its own clock.
    clock: (Duration, Duration, Instant),
}

impl SimSystemd {
    pub(crate) fn new(machine: SharedMachine) -> Self {
        let clock = {
            let machine = lock(&machine);
            (machine.clock(), machine.slept, Instant::now())
        };
        SimSystemd { machine, last: Mutex::new(Instant::now()), clock }
    }

    /// A call takes a moment.
    async fn call<T>(&self, act: impl FnOnce(&mut Machine) -> Result<T, Error>) -> Result<T, Error> {
        let (before, after, trouble) = {
            let mut machine = lock(&self.machine);
            let trouble = machine.manners.trouble;
            (machine.rng.spread(1, 20), machine.rng.spread(1, 30), machine.rng.chance(trouble))
        };
        let arrives = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            *last = (*last + Duration::from_millis(1)).max(Instant::now() + before);
            *last
        };
        tokio::time::sleep_until(arrives).await;
        let result = {
            let mut machine = lock(&self.machine);
            match machine.away || trouble {
                true => Err(Error::Unreachable("the bus is away".to_owned())),
                false => act(&mut machine),
            }
        };
        tokio::time::sleep(after).await;
        result
    }

    /// A call that writes files.
    async fn write(&self, act: impl FnOnce(&mut Machine)) -> Result<(), Error> {
        self.call(|machine| {
            machine.may_write()?;
            act(machine);
            Ok(())
        })
        .await
    }

    async fn job(&self, job: oneshot::Receiver<JobResult>) -> Result<JobResult, Error> {
        job.await.map_err(|_| Error::Unreachable("the bus was lost".to_owned()))
    }
}

impl Systemd for SimSystemd {
    async fn find(&self) -> Result<Found, Error> {
        self.call(|machine| {
            let files =
                machine.units.iter().filter_map(|(name, unit)| Some((name.clone(), unit.file.clone()?)));
            let marks = if machine.forgetful { BTreeMap::new() } else { machine.marks.clone() };
            Ok(Found { files: files.collect(), marks, guarded: machine.guarded.clone() })
        })
        .await
    }

    async fn install(&self, units: &[(UnitName, UnitFile)]) -> Vec<Result<(), Error>> {
        let written = self
            .write(|machine| {
                for (name, file) in units {
                    machine.units.entry(name.clone()).or_default().file = Some(file.shared_text());
                    if machine.reloads {
                        machine.reload();
                    }
                }
            })
            .await;
        units.iter().map(|_| written.clone()).collect()
    }

    async fn remove(&self, units: &[UnitName]) -> Vec<Result<(), Error>> {
        let removed = self
            .call(|machine| {
                for name in units {
                    let unit = machine.units.entry(name.clone()).or_default();
                    unit.file = None;
                    if unit.phase == Phase::Failed {
                        unit.phase = Phase::Inactive;
                        unit.loaded = None;
                    }
                    let live = unit.phase.is_live();
                    machine.facts.push(Fact::Removed { unit: name.clone(), live });
                }
                // What is still in memory could be started by others.
                if units.iter().any(|name| machine.units.get(name).is_some_and(|unit| unit.loaded.is_some()))
                {
                    machine.reload();
                }
                Ok(())
            })
            .await;
        units.iter().map(|_| removed.clone()).collect()
    }

    async fn reload_if_needed(&self, units: &[UnitName]) -> Result<bool, Error> {
        self.call(|machine| {
            let outdated = |name: &UnitName| {
                machine.units.get(name).is_some_and(|unit| unit.loaded.is_some() && unit.loaded != unit.file)
            };
            let needed = units.iter().any(outdated);
            if needed {
                machine.reload();
            }
            Ok(needed)
        })
        .await
    }

    async fn start(&self, unit: &UnitName) -> Result<JobResult, Error> {
        let job = self.call(|machine| machine.begin_start(unit)).await?;
        self.job(job).await
    }

    async fn stop(&self, unit: &UnitName) -> Result<JobResult, Error> {
        let hasty = lock(&self.machine).hasty;
        let job = self.call(|machine| Ok(machine.begin_stop(unit, By::Fleet))).await?;
        if hasty {
            return Ok(JobResult::Done);
        }
        self.job(job).await
    }

    async fn in_memory(&self, units: &[UnitName]) -> Result<BTreeSet<UnitName>, Error> {
        self.call(|machine| {
            let known = |name: &&UnitName| {
                machine
                    .units
                    .get(*name)
                    .is_some_and(|unit| unit.loaded.is_some() || unit.phase != Phase::Inactive)
            };
            Ok(units.iter().filter(known).cloned().collect())
        })
        .await
    }

    async fn states(&self, units: &[UnitName]) -> Result<BTreeMap<UnitName, State>, Error> {
        self.call(|machine| {
            let state = |name: &UnitName| {
                let unit = machine.units.get(name);
                let phase = unit.map_or(Phase::Inactive, |unit| unit.phase);
                let phase =
                    if machine.hasty && phase == Phase::Deactivating { Phase::Inactive } else { phase };
                let (active, sub) = phase.words();
                let known = unit.is_some_and(|unit| unit.file.is_some() || unit.loaded.is_some());
                let load = if known { "loaded" } else { "not-found" };
                let [load, active, sub] = [load, active, sub].map(str::to_owned);
                (name.clone(), State { load, active, sub })
            };
            Ok(units.iter().map(state).collect())
        })
        .await
    }

    async fn mark(&self, marks: &[(UnitName, Option<Mark>)]) -> Vec<Result<(), Error>> {
        let marked = self
            .call(|machine| {
                // Deleting takes no room.
                if marks.iter().any(|(_, mark)| mark.is_some()) {
                    machine.may_write()?;
                }
                for (unit, mark) in marks {
                    let noted = match (mark, machine.marks.get(unit)) {
                        (Some(Mark::Starting(_)), Some(Mark::Launched(_))) if machine.sure => continue,
                        (Some(Mark::Starting(_)), Some(Mark::Launched(hash))) => Some(*hash),
                        _ => None,
                    };
                    machine.units.entry(unit.clone()).or_default().noted = noted;
                    match mark {
                        Some(mark) => machine.marks.insert(unit.clone(), *mark),
                        None => machine.marks.remove(unit),
                    };
                }
                Ok(())
            })
            .await;
        marks.iter().map(|_| marked.clone()).collect()
    }

    fn clock(&self) -> Duration {
        let (began, slept, own) = self.clock;
        let machine = lock(&self.machine);
        if machine.timeless {
            return began;
        }
        // What this fleetd has not seen pass, it counts all the same. Its runtime wakes it up to a millisecond late: that is
        // no time that has passed.
        (began + own.elapsed() + machine.slept.saturating_sub(slept)).min(machine.clock())
    }

    async fn stop_timeouts(&self, units: &[UnitName]) -> BTreeMap<UnitName, Duration> {
        let timeout = lock(&self.machine).manners.stop_timeout;
        units.iter().map(|unit| (unit.clone(), timeout)).collect()
    }

    async fn tell_guard(&self, guarded: Option<&Guarded>) -> Result<(), Error> {
        // A file in memory, which does not depend on the bus.
        let mut machine = lock(&self.machine);
        machine.may_write()?;
        machine.guarded = guarded.cloned();
        machine.guard_looks = Time::ZERO;
        Ok(())
    }

    async fn run_guard(&self, run: bool) -> Result<(), Error> {
        self.call(|machine| {
            machine.guard_runs = run;
            machine.guard_looks = Time::ZERO;
            Ok(())
        })
        .await
    }

    async fn is_shutting_down(&self) -> bool {
        lock(&self.machine).shutting_down
    }

    fn notices(&self) -> mpsc::Receiver<Notice> {
        let (send, receive) = mpsc::channel(64);
        lock(&self.machine).notices = Some(send);
        receive
    }

    fn status(&self, _unit: &UnitName) -> mpsc::Receiver<Output> {
        mpsc::channel(1).1
    }

    fn journal(&self, _unit: &UnitName, _lines: u32, _follow: bool, _output: &str) -> mpsc::Receiver<Output> {
        mpsc::channel(1).1
    }
}
