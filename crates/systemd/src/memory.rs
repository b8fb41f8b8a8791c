//! A systemd in memory, for tests and simulation of what stands on [`Systemd`].
//!
//! It keeps what the real one keeps (files, links, jobs, states, what is loaded from which text) and can be told to
//! misbehave: jobs that fail or hang, files that can't be written, a bus that is away.
use crate::*;
use std::sync::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};

/// How long every unit may take to stop.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What a job of a unit does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Behaviour {
    /// It is done at once.
    #[default]
    Works,
    /// It fails.
    Fails,
    /// It is under way until another job takes its place or [`MemorySystemd::behave`] says otherwise.
    Hangs,
    /// As [`Behaviour::Hangs`], and the state does not show it: as a start that waits for another unit.
    Waits,
}

#[derive(Clone, Debug, Default)]
struct Unit {
    file: Option<Arc<str>>,
    loaded: Option<Arc<str>>,
    /// Another unit refers to it: it stays loaded.
    kept: bool,
    active: Phase,
    start: Behaviour,
    stop: Behaviour,
    refuse_install: Option<Error>,
    /// Counts jobs: an older one finds that another took its place.
    job: u64,
    starts: usize,
    stops: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Inactive,
    Activating,
    Active,
    Deactivating,
    Failed,
}

#[derive(Debug)]
struct Inner {
    units: BTreeMap<UnitName, Unit>,
    marks: BTreeMap<UnitName, Mark>,
    guarded: Option<Guarded>,
    guard_runs: bool,
    guard_trouble: Option<Error>,
    booted: Instant,
    away: Option<String>,
    reloads: usize,
    notices: Option<mpsc::Receiver<Notice>>,
}

impl Inner {
    fn reload(&mut self) {
        self.reloads += 1;
        for unit in self.units.values_mut() {
            unit.loaded = unit.loaded.as_ref().and(unit.file.clone());
        }
    }
}

/// A systemd in memory. Clones share it: keep one to play the machine.
#[derive(Clone, Debug)]
pub struct MemorySystemd {
    inner: Arc<Mutex<Inner>>,
    send: mpsc::Sender<Notice>,
    changed: Arc<Notify>,
}

impl Default for MemorySystemd {
    fn default() -> Self {
        let (send, notices) = mpsc::channel(1024);
        let inner = Inner {
            units: BTreeMap::new(),
            marks: BTreeMap::new(),
            guarded: None,
            guard_runs: false,
            guard_trouble: None,
            booted: Instant::now(),
            away: None,
            reloads: 0,
            notices: Some(notices),
        };
        MemorySystemd { inner: Arc::new(Mutex::new(inner)), send, changed: Arc::default() }
    }
}

impl MemorySystemd {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn edit<T>(&self, unit: &UnitName, edit: impl FnOnce(&mut Unit) -> T) -> T {
        edit(self.lock().units.entry(unit.clone()).or_default())
    }

    fn notify(&self, unit: &UnitName) {
        // A full queue has notices enough to wake whoever reads it; states are read then.
        let _ = self.send.try_send(Notice::Units(BTreeSet::from([unit.clone()])));
        self.changed.notify_waiters();
    }

    /// Sets what starting and stopping a unit does.
    pub fn behave(&self, unit: &UnitName, start: Behaviour, stop: Behaviour) {
        self.edit(unit, |unit| (unit.start, unit.stop) = (start, stop));
        self.changed.notify_waiters();
    }

    /// Makes installing a unit fail, or work again.
    pub fn refuse_install(&self, unit: &UnitName, error: Option<Error>) {
        self.edit(unit, |unit| unit.refuse_install = error);
    }

    /// Another unit refers to this one, which stays in memory from now on, with this text if it is not there yet.
    pub fn keep(&self, unit: &UnitName, text: Option<&str>) {
        self.edit(unit, |unit| {
            unit.kept = true;
            unit.loaded = unit.loaded.take().or(text.map(Arc::from));
        });
    }

    /// The text of a unit that systemd has in memory.
    pub fn loaded(&self, unit: &UnitName) -> Option<Arc<str>> {
        self.lock().units.get(unit)?.loaded.clone()
    }

    /// Takes systemd out of reach for this reason, or brings it back.
    pub fn set_away(&self, reason: Option<&str>) {
        self.lock().away = reason.map(str::to_owned);
        if reason.is_none() {
            let _ = self.send.try_send(Notice::All);
        }
        self.changed.notify_waiters();
    }

    /// The unit's process ends.
    pub fn die(&self, unit: &UnitName) {
        self.edit(unit, |unit| unit.active = Phase::Failed);
        self.notify(unit);
    }

    /// Boots the machine: what lives in memory is gone.
    pub fn boot(&self) {
        let mut inner = self.lock();
        inner.units.clear();
        inner.marks.clear();
        inner.guarded = None;
        inner.guard_runs = false;
        inner.booted = Instant::now();
    }

    /// What a unit's mark says.
    pub fn marked(&self, unit: &UnitName) -> Option<Mark> {
        self.lock().marks.get(unit).copied()
    }

    /// What the guard was told, if it runs.
    pub fn guarded(&self) -> Option<Guarded> {
        let inner = self.lock();
        inner.guarded.clone().filter(|_| inner.guard_runs)
    }

    /// Makes starting the guard fail, or work again.
    pub fn refuse_guard(&self, trouble: Option<Error>) {
        self.lock().guard_trouble = trouble;
    }

    /// For the next daemon on the same machine: its notices.
    pub fn reconnect(&self) -> MemorySystemd {
        let (send, notices) = mpsc::channel(1024);
        self.lock().notices = Some(notices);
        MemorySystemd { inner: self.inner.clone(), send, changed: self.changed.clone() }
    }

    /// How often a unit was started and stopped.
    pub fn jobs(&self, unit: &UnitName) -> (usize, usize) {
        self.lock().units.get(unit).map_or((0, 0), |unit| (unit.starts, unit.stops))
    }

    /// How often systemd reloaded its files.
    pub fn reloads(&self) -> usize {
        self.lock().reloads
    }

    /// A unit's active state, as systemd says it.
    pub fn active(&self, unit: &UnitName) -> String {
        self.lock().units.get(unit).map_or("inactive", |unit| words(unit.active).0).to_owned()
    }

    /// Whether a unit's file is there.
    pub fn has_file(&self, unit: &UnitName) -> bool {
        self.lock().units.get(unit).is_some_and(|unit| unit.file.is_some())
    }

    /// Waits until something holds.
    pub async fn until(&self, holds: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if holds(self) {
                return;
            }
            changed.await;
        }
    }

    fn reachable(&self) -> Result<(), Error> {
        self.lock().away.clone().map_or(Ok(()), |reason| Err(Error::Unreachable(reason)))
    }

    /// Waits while the job `number` of a unit hangs; false when another job took its place.
    async fn job(&self, unit: &UnitName, number: u64, behaviour: impl Fn(&Unit) -> Behaviour) -> bool {
        self.until(|systemd| {
            systemd.lock().units.get(unit).is_none_or(|unit| {
                unit.job != number || !matches!(behaviour(unit), Behaviour::Hangs | Behaviour::Waits)
            })
        })
        .await;
        self.edit(unit, |unit| unit.job) == number
    }
}

fn words(active: Phase) -> (&'static str, &'static str) {
    match active {
        Phase::Inactive => ("inactive", "dead"),
        Phase::Activating => ("activating", "start"),
        Phase::Active => ("active", "running"),
        Phase::Deactivating => ("deactivating", "stop-sigterm"),
        Phase::Failed => ("failed", "failed"),
    }
}

impl Systemd for MemorySystemd {
    async fn find(&self) -> Result<Found, Error> {
        self.reachable()?;
        let inner = self.lock();
        let files = inner.units.iter().filter_map(|(name, unit)| Some((name.clone(), unit.file.clone()?)));
        Ok(Found { files: files.collect(), marks: inner.marks.clone(), guarded: inner.guarded.clone() })
    }

    async fn install(&self, units: &[(UnitName, UnitFile)]) -> Vec<Result<(), Error>> {
        let install = |(name, file): &(UnitName, UnitFile)| {
            self.reachable()?;
            self.edit(name, |unit| match &unit.refuse_install {
                Some(error) => Err(error.clone()),
                None => {
                    unit.file = Some(file.shared_text());
                    Ok(())
                }
            })
        };
        let results = units.iter().map(install).collect();
        self.changed.notify_waiters();
        results
    }

    async fn remove(&self, units: &[UnitName]) -> Vec<Result<(), Error>> {
        let remove = |name: &UnitName| {
            self.reachable()?;
            self.edit(name, |unit| {
                unit.file = None;
                if unit.active == Phase::Failed {
                    unit.active = Phase::Inactive;
                    unit.loaded.take_if(|_| !unit.kept);
                }
            });
            Ok(())
        };
        let results: Vec<_> = units.iter().map(remove).collect();
        let mut inner = self.lock();
        if units.iter().any(|name| inner.units.get(name).is_some_and(|unit| unit.loaded.is_some())) {
            inner.reload();
        }
        drop(inner);
        self.changed.notify_waiters();
        results
    }

    async fn reload_if_needed(&self, units: &[UnitName]) -> Result<bool, Error> {
        self.reachable()?;
        let mut inner = self.lock();
        let outdated = |name: &UnitName| {
            inner.units.get(name).is_some_and(|unit| unit.loaded.is_some() && unit.loaded != unit.file)
        };
        let needed = units.iter().any(outdated);
        if needed {
            inner.reload();
        }
        Ok(needed)
    }

    async fn start(&self, name: &UnitName) -> Result<JobResult, Error> {
        self.reachable()?;
        let number = self.edit(name, |unit| {
            let file = unit.file.clone()?;
            unit.loaded.get_or_insert(file);
            unit.job += 1;
            if unit.active != Phase::Active {
                unit.starts += 1;
                if unit.start != Behaviour::Waits {
                    unit.active = Phase::Activating;
                }
            }
            Some(unit.job)
        });
        let Some(number) = number else { return Err(Error::Refused(format!("Unit {name} not found."))) };
        self.notify(name);
        if !self.job(name, number, |unit| unit.start).await {
            return Ok(JobResult::Canceled);
        }
        let failed = self.edit(name, |unit| {
            let failed = unit.start == Behaviour::Fails;
            unit.active = if failed { Phase::Failed } else { Phase::Active };
            failed
        });
        self.notify(name);
        Ok(if failed { JobResult::Failed("failed".to_owned()) } else { JobResult::Done })
    }

    async fn stop(&self, name: &UnitName) -> Result<JobResult, Error> {
        self.reachable()?;
        let number = self.edit(name, |unit| {
            unit.job += 1;
            if !matches!(unit.active, Phase::Inactive | Phase::Failed) {
                unit.stops += 1;
                unit.active = Phase::Deactivating;
            }
            unit.job
        });
        self.notify(name);
        if !self.job(name, number, |unit| unit.stop).await {
            return Ok(JobResult::Canceled);
        }
        self.edit(name, |unit| {
            unit.active = Phase::Inactive;
            unit.loaded.take_if(|_| !unit.kept);
        });
        self.notify(name);
        Ok(JobResult::Done)
    }

    async fn in_memory(&self, units: &[UnitName]) -> Result<BTreeSet<UnitName>, Error> {
        self.reachable()?;
        let inner = self.lock();
        let is_there = |name: &&UnitName| {
            inner.units.get(*name).is_some_and(|unit| unit.loaded.is_some() || unit.active != Phase::Inactive)
        };
        Ok(units.iter().filter(is_there).cloned().collect())
    }

    async fn states(&self, units: &[UnitName]) -> Result<BTreeMap<UnitName, State>, Error> {
        self.reachable()?;
        let mut inner = self.lock();
        let mut states = BTreeMap::new();
        for name in units {
            let unit = inner.units.entry(name.clone()).or_default();
            let (active, sub) = words(unit.active);
            let load = if unit.file.is_some() { "loaded" } else { "not-found" };
            let [load, active, sub] = [load, active, sub].map(str::to_owned);
            states.insert(name.clone(), State { load, active, sub });
        }
        Ok(states)
    }

    async fn mark(&self, marks: &[(UnitName, Option<Mark>)]) -> Vec<Result<(), Error>> {
        // Which boot of the machine it is, systemd says.
        if let Err(error) = self.reachable() {
            return vec![Err(error); marks.len()];
        }
        let mut inner = self.lock();
        for (unit, mark) in marks {
            match mark {
                Some(mark) => inner.marks.insert(unit.clone(), *mark),
                None => inner.marks.remove(unit),
            };
        }
        vec![Ok(()); marks.len()]
    }

    fn clock(&self) -> Duration {
        self.lock().booted.elapsed()
    }

    async fn stop_timeouts(&self, units: &[UnitName]) -> BTreeMap<UnitName, Duration> {
        units.iter().map(|unit| (unit.clone(), STOP_TIMEOUT)).collect()
    }

    async fn tell_guard(&self, guarded: Option<&Guarded>) -> Result<(), Error> {
        self.lock().guarded = guarded.cloned();
        self.changed.notify_waiters();
        Ok(())
    }

    async fn run_guard(&self, run: bool) -> Result<(), Error> {
        {
            let mut inner = self.lock();
            if let Some(trouble) = inner.guard_trouble.clone() {
                return Err(trouble);
            }
            inner.guard_runs = run;
        }
        self.changed.notify_waiters();
        Ok(())
    }

    async fn is_shutting_down(&self) -> bool {
        false
    }

    fn notices(&self) -> mpsc::Receiver<Notice> {
        // The second one to ask gets a stream that is over.
        self.lock().notices.take().unwrap_or_else(|| mpsc::channel(1).1)
    }

    fn status(&self, unit: &UnitName) -> mpsc::Receiver<Output> {
        let (send, receive) = mpsc::channel(2);
        let _ = send.try_send(Output::Out(Bytes::from(format!("{unit}: {}\n", self.active(unit)))));
        let _ = send.try_send(Output::Exit(if self.active(unit) == "active" { 0 } else { 3 }));
        receive
    }

    fn journal(&self, unit: &UnitName, lines: u32, _follow: bool, _output: &str) -> mpsc::Receiver<Output> {
        let (send, receive) = mpsc::channel(2);
        let _ = send.try_send(Output::Out(Bytes::from(format!("{lines} lines of {unit}\n"))));
        let _ = send.try_send(Output::Exit(0));
        receive
    }
}
