//! systemd through D-Bus: [`SystemdHost`], the implementation of [`Systemd`] for a real machine.
//!
//! - `bus`: the connections, and what becomes of signals
//! - `jobs`, `changes`: the structures signals end in
//! - `calls`: how jobs are asked for
//! - `proxy`, `path`: systemd's D-Bus interface
//!
//! What happens to files is in [`crate::files`], what is run as a command in [`crate::commands`].
use crate::{
    Error, Found, Guarded, JobResult, Mark, Notice, Output, State, Systemd,
    commands::Commands,
    files::{self, Written},
    guard,
};
use bus::{Bus, Current, Keeper};
use calls::{Answer, Asked, Calls, Job};
use changes::Changes;
use fleet_unit::{UnitFile, UnitName};
use futures_util::future::join_all;
use jobs::{Ending, Jobs};
use proxy::{Listed, UnitProxy};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};
use zbus::proxy::CacheProperties;

mod bus;
mod calls;
mod changes;
mod jobs;
mod path;
mod proxy;

/// Names in one call that asks for states or makes links. Loading a unit takes systemd about half a millisecond,
/// during which it does nothing else; linking takes a tenth of that.
const NAMES_IN_A_CALL: usize = 500;
/// Names in one call that removes links, for which systemd searches all its directories: 0.8 ms each.
const REMOVALS_IN_A_CALL: usize = 100;
/// Up to so many units are looked up one by one; for more, all units in memory are listed at once, which costs
/// systemd about 10 µs for each.
const SINGLE_LOOK_UPS: usize = 8;
/// How long a job is awaited without a word before systemd is asked whether it is still there. Signals come
/// reliably; this is a net.
const RECHECK: Duration = Duration::from_secs(30);
/// How long a call waits for a connection that was lost a moment ago.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a job is awaited while systemd can't be reached.
const GONE: Duration = Duration::from_secs(60);

/// systemd of this machine.
///
/// Its tasks end when it is dropped.
pub struct SystemdHost {
    directories: Directories,
    current: Current,
    calls: Calls,
    changes: Arc<Changes>,
    notices: Mutex<Option<mpsc::Receiver<Notice>>>,
    commands: Commands,
    /// Ends the tasks when dropped.
    _end: DropGuard,
}

/// Where fleet keeps its files on a machine. The directories are fleet's alone and made when missing.
#[derive(Clone, Debug)]
pub struct Directories {
    /// Unit files; by default `/run/fleet/units`.
    pub units: PathBuf,
    /// Marks of what was launched since boot; [`guard::MARKS`], where the guard takes them away, but in tests.
    pub launched: PathBuf,
    /// What many units are started with at once; by default `/run/fleet/starts`.
    pub starts: PathBuf,
    /// What the guard has to know, a file; [`guard::PATH`], where the guard looks for it, but in tests.
    pub guard: PathBuf,
}

impl Default for Directories {
    fn default() -> Self {
        Directories {
            units: "/run/fleet/units".into(),
            launched: guard::MARKS.into(),
            starts: "/run/fleet/starts".into(),
            guard: guard::PATH.into(),
        }
    }
}

impl SystemdHost {
    /// Connects to the system bus, where systemd has to be.
    pub async fn connect(directories: Directories) -> Result<Self, Error> {
        let (jobs, changes) = (Jobs::default(), Arc::new(Changes::default()));
        let keeper = Keeper::connect(jobs.clone(), changes.clone()).await?;
        let current = keeper.current();
        let end = CancellationToken::new();
        let (sender, notices) = mpsc::channel(1);
        let passing = {
            let (changes, end) = (changes.clone(), end.clone());
            async move {
                end.run_until_cancelled(changes.pass_on(sender)).await;
            }
        };
        tokio::spawn(keeper.run(end.clone()));
        tokio::spawn(passing);
        let calls = Calls::new(current.clone(), jobs, changes.clone(), directories.clone(), end.clone());
        Ok(SystemdHost {
            directories,
            current,
            calls,
            changes,
            notices: Mutex::new(Some(notices)),
            commands: Commands::default(),
            _end: end.drop_guard(),
        })
    }

    async fn bus(&self) -> Result<Arc<Bus>, Error> {
        bus::present(&self.current, PATIENCE).await
    }

    /// Does file work where it may block.
    async fn with_files<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Directories) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let directories = self.directories.clone();
        files::off_the_runtime(move || work(&directories)).await
    }

    /// Writes the file and says whether it must be linked, and how.
    fn prepare(
        directories: &Directories,
        bus: &Bus,
        unit: &UnitName,
        file: &UnitFile,
    ) -> Result<Prepared, Error> {
        files::check_free(directories, &bus.search, unit, file)?;
        let written = files::write_unit(directories, unit, file.text())?;
        let linked = files::is_linked(directories, unit);
        let disable = match written.changed {
            // Aliases and wants of the old text would stay otherwise.
            true => written.before.as_deref().is_some_and(|text| match UnitFile::parse(text) {
                Ok(before) => before.has_install(),
                Err(_) => true,
            }),
            // What is here as it is to be is installed again when systemd does not find it: it looks whether a directory has
            // changed by its time, and misses a link that is made within one tick of the clock after it looked.
            false => linked,
        };
        let link = if file.has_install() {
            Linking::Enable
        } else if linked && !disable {
            Linking::Keep
        } else {
            Linking::Plain
        };
        Ok(Prepared { written, linked, disable, link })
    }

    /// One job from the call to its end.
    async fn job(
        &self,
        unit: &UnitName,
        job: Job,
        asked: impl Future<Output = Result<Answer, Error>>,
    ) -> Result<JobResult, Error> {
        let mut current = self.current.clone();
        current.mark_unchanged();
        let (bus, asked) = asked.await?;
        let (id, mut ending) = match asked? {
            Asked::Job(id, ending) => (id, ending),
            Asked::Ended(result) => return Ok(result),
        };
        // A connection that was replaced meanwhile is noticed at once.
        let mut replaced = !current.borrow().as_ref().is_some_and(|now| Arc::ptr_eq(now, &bus));
        loop {
            if !replaced {
                tokio::select! {
                    result = &mut ending => return Ok(result),
                    _ = current.changed() => {}
                    () = tokio::time::sleep(RECHECK) => {}
                }
            }
            replaced = false;
            let bus = bus::present(&current, GONE).await?;
            match self.recheck(&bus, unit, job, id, &mut ending).await {
                Ok(Some(result)) => return Ok(result),
                Ok(None) => {}
                // Lost again: the next round waits for the next connection.
                Err(Error::Unreachable(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// How the job ended, if it is gone: by its signal, or else as the unit's state has it.
    async fn recheck(
        &self,
        bus: &Bus,
        unit: &UnitName,
        job: Job,
        id: u32,
        ending: &mut Ending,
    ) -> Result<Option<JobResult>, Error> {
        match bus.ask(bus.manager.get_job(id)).await {
            Ok(_) => return Ok(None),
            Err(error) if is_named(&error, "NoSuchJob") => {}
            Err(error) => return Err(error.into()),
        }
        let state = self.list_by_names(bus, &[unit]).await?.pop();
        if let Some(result) = ending.now() {
            return Ok(Some(result));
        }
        let active = state.map(|state| state.active).unwrap_or_default();
        Ok(Some(match (job, active.as_str()) {
            (Job::Start, "failed") => JobResult::Failed("failed".into()),
            // Inactive is what a unit is that has done its work, too.
            (Job::Start, _) | (Job::Stop, "inactive" | "failed" | "") => JobResult::Done,
            (Job::Stop, _) => JobResult::Canceled,
        }))
    }

    /// States in the order of the names. Where systemd refuses all because of one name, that one is found by
    /// halving; its load state is `error`.
    async fn list_by_names(&self, bus: &Bus, units: &[&UnitName]) -> Result<Vec<State>, Error> {
        let mut states = Vec::with_capacity(units.len());
        // Ranges yet to be asked for, the next one last.
        let mut ranges: Vec<&[&UnitName]> = units.chunks(NAMES_IN_A_CALL).rev().collect();
        while let Some(range) = ranges.pop() {
            let names: Vec<&str> = range.iter().map(|unit| unit.as_str()).collect();
            match bus.call(bus.manager.list_units_by_names(&names)).await {
                Ok(listed) if listed.len() == names.len() => states.extend(listed.into_iter().map(state)),
                Ok(listed) => {
                    return Err(Error::Refused(format!(
                        "systemd gave {} states for {} units",
                        listed.len(),
                        names.len()
                    )));
                }
                Err(Error::Refused(reason)) => match range {
                    [unit] => {
                        tracing::warn!(%unit, reason, "systemd gives no state");
                        states.push(State {
                            load: "error".into(),
                            active: "inactive".into(),
                            sub: "dead".into(),
                        });
                    }
                    _ => {
                        let (left, right) = range.split_at(range.len() / 2);
                        ranges.extend([right, left]);
                    }
                },
                Err(error) => return Err(error),
            }
        }
        Ok(states)
    }

    /// Makes one call for many at a time, and where one is refused a call for each of its units.
    async fn together<F>(
        &self,
        units: &[&UnitName],
        at_most: usize,
        call: impl Fn(Vec<String>) -> F,
    ) -> Vec<Result<(), Error>>
    where
        F: Future<Output = Result<(), Error>>,
    {
        let mut results = Vec::with_capacity(units.len());
        let argument = |unit: &&UnitName| unit.to_string();
        for some in units.chunks(at_most) {
            match call(some.iter().map(argument).collect()).await {
                Err(Error::Refused(_)) if some.len() > 1 => {
                    for unit in some {
                        results.push(call(vec![argument(unit)]).await);
                    }
                }
                result => results.extend(std::iter::repeat_n(result, some.len())),
            }
        }
        results
    }

    /// Takes links away. What `Also=` in a file takes along of other units is given back to them.
    async fn disable(&self, bus: &Bus, units: &[&UnitName]) -> Vec<Result<(), Error>> {
        let lost = Mutex::new(BTreeSet::new());
        let gone = &lost;
        let results = self
            .together(units, REMOVALS_IN_A_CALL, |names| async move {
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                match bus.ask(bus.manager.disable_unit_files(&names, true)).await {
                    // There is neither a link of this name nor one to a file of this name.
                    Err(error) if names.len() == 1 && is_named(&error, "NoSuchUnit") => Ok(()),
                    result => {
                        let names = result?.into_iter().filter_map(|(_, path, _)| {
                            UnitName::parse(Path::new(&path).file_name()?.to_str()?).ok()
                        });
                        gone.lock().unwrap_or_else(PoisonError::into_inner).extend(names);
                        Ok(())
                    }
                }
            })
            .await;
        let mut lost = lost.into_inner().unwrap_or_else(PoisonError::into_inner);
        for unit in units {
            lost.remove(*unit);
        }
        self.give_back(bus, lost).await;
        results
    }

    /// Links those of the units that fleet has here.
    async fn give_back(&self, bus: &Bus, units: BTreeSet<UnitName>) {
        if units.is_empty() {
            return;
        }
        let read = move |directories: &Directories| {
            let read = |unit: UnitName| files::read_unit(directories, &unit).map(|file| (unit, file));
            Ok(units.into_iter().filter_map(read).collect::<Vec<_>>())
        };
        for (unit, file) in self.with_files(read).await.unwrap_or_default() {
            let mut result = self.link(bus, &[&unit], file.has_install()).await.pop();
            if file.has_install() && !matches!(result, Some(Ok(()))) {
                result = self.link(bus, &[&unit], false).await.pop();
            }
            if let Some(Err(error)) = result {
                tracing::warn!(%unit, %error, "its link went with that of another unit, and can't be made again");
            }
        }
    }

    async fn link(&self, bus: &Bus, units: &[&UnitName], enable: bool) -> Vec<Result<(), Error>> {
        self.together(units, NAMES_IN_A_CALL, |names| async move {
            let paths: Vec<String> =
                names.iter().map(|name| self.directories.units.join(name).display().to_string()).collect();
            let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
            if enable {
                bus.call(bus.manager.enable_unit_files(&paths, true, true)).await.map(drop)
            } else {
                bus.call(bus.manager.link_unit_files(&paths, true, true)).await.map(drop)
            }
        })
        .await
    }

    /// Takes back what was written for a unit that systemd would not link: the unit is as it was before.
    async fn take_back(&self, bus: &Bus, unit: &UnitName, prepared: Prepared) {
        // What was there as it is stays there; only its link may be gone.
        if let (true, false, Some(text)) =
            (prepared.linked, prepared.written.changed, &prepared.written.before)
        {
            let with_install = UnitFile::parse(text).is_ok_and(|file| file.has_install());
            let mut result = self.link(bus, &[unit], with_install).await.pop();
            if with_install && !matches!(result, Some(Ok(()))) {
                result = self.link(bus, &[unit], false).await.pop();
            }
            if let Some(Err(error)) = result {
                tracing::warn!(%unit, %error, "it can't be linked again");
            }
            return;
        }
        for result in self.disable(bus, &[unit]).await {
            if let Err(error) = result {
                tracing::warn!(%unit, %error, "can't remove links");
            }
        }
        let before = prepared.written.before.filter(|_| prepared.written.changed);
        let again = {
            let (unit, before) = (unit.clone(), before.clone());
            self.with_files(move |directories| match before {
                Some(text) => files::write_unit(directories, &unit, &text).map(drop),
                None => files::delete_unit(directories, &unit),
            })
        };
        let relinked = match (again.await, before.as_deref().map(UnitFile::parse)) {
            (Ok(()), Some(Ok(file))) => {
                self.link(bus, &[unit], file.has_install()).await.into_iter().collect::<Result<(), _>>()
            }
            (result, _) => result,
        };
        if let Err(error) = relinked {
            tracing::warn!(%unit, %error, "can't restore the unit as it was before");
        }
    }

    /// Those of the units that are in systemd's memory; loads none.
    async fn known<'a>(&self, bus: &Bus, units: &'a [UnitName]) -> Result<Vec<&'a UnitName>, Error> {
        if units.len() > SINGLE_LOOK_UPS {
            let listed = bus.call(bus.manager.list_units()).await?;
            let names: BTreeSet<&str> = listed.iter().map(|unit| unit.0.as_str()).collect();
            return Ok(units.iter().filter(|unit| names.contains(unit.as_str())).collect());
        }
        let mut loaded = Vec::new();
        for unit in units {
            match bus.ask(bus.manager.get_unit(unit.as_str())).await {
                Ok(_) => loaded.push(unit),
                Err(error) if is_named(&error, "NoSuchUnit") => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(loaded)
    }

    /// Has systemd forget units whose links are gone, and that others refer to: the next elapse of a timer would start one again.
    /// Gives those that can't be forgotten, with the reason.
    async fn make_forgotten(
        &self,
        bus: &Bus,
        units: &[UnitName],
    ) -> Result<BTreeMap<UnitName, Error>, Error> {
        let known = self.known(bus, units).await?;
        if known.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut states = self.list_by_names(bus, &known).await?;
        let is_loaded = |state: &State| state.load != "not-found";
        if states.iter().any(is_loaded) {
            if let Err(error) = bus.call(bus.manager.reload()).await {
                let loaded = known.into_iter().zip(&states).filter(|(_, state)| is_loaded(state));
                return Ok(loaded.map(|(unit, _)| (unit.clone(), error.clone())).collect());
            }
            states = self.list_by_names(bus, &known).await?;
        }
        // From now on nothing starts them; before, it may have been done.
        let is_live = |state: &State| !matches!(state.active.as_str(), "inactive" | "failed");
        let live = known.into_iter().zip(&states).filter(|(_, state)| is_live(state));
        let started = || Error::Refused("another unit has started it again".to_owned());
        Ok(live.map(|(unit, _)| (unit.clone(), started())).collect())
    }

    async fn needs_reload(&self, bus: &Bus, unit: &UnitName) -> Result<bool, Error> {
        let unit = UnitProxy::builder(&bus.connection)
            .path(path::of_unit(unit.as_str()))
            .cache_properties(CacheProperties::No)
            .build()
            .await?;
        // One that was not there is read when it is needed. Since systemd 255 any link that was made is a reason to reload, whatever
        // the unit.
        Ok(bus.call(unit.load_state()).await? != "not-found" && bus.call(unit.need_daemon_reload()).await?)
    }

    /// Whether the unit's last start was refused for coming too often (StartLimitBurst=).
    async fn hit_start_limit(&self, bus: &Bus, unit: &UnitName) -> bool {
        let result = async { self.of_type(bus, unit).await?.get_property::<String>("Result").await };
        // Targets and slices have no result, nor a limit.
        bus.ask(result).await.is_ok_and(|result| result == "start-limit-hit")
    }

    async fn stop_timeout(&self, bus: &Bus, unit: &UnitName) -> Duration {
        let Some((_, suffix)) = unit.as_str().rsplit_once('.') else { return Duration::MAX };
        let property = match suffix {
            "service" => "TimeoutStopUSec",
            "socket" | "mount" | "swap" => "TimeoutUSec",
            // These run nothing.
            _ => return Duration::ZERO,
        };
        let timeout = async { self.of_type(bus, unit).await?.get_property::<u64>(property).await };
        match bus.ask(timeout).await {
            Ok(u64::MAX) | Err(_) => Duration::MAX,
            Ok(microseconds) => Duration::from_micros(microseconds),
        }
    }

    /// The interface of the unit's own type. Asking there loads the unit for a moment if need be.
    async fn of_type<'b>(&self, bus: &'b Bus, unit: &UnitName) -> zbus::Result<zbus::Proxy<'b>> {
        let suffix = unit.as_str().rsplit_once('.').map_or("", |(_, suffix)| suffix);
        let mut letters = suffix.chars();
        let kind: String =
            letters.next().map(|c| c.to_ascii_uppercase()).into_iter().chain(letters).collect();
        zbus::proxy::Builder::<zbus::Proxy<'_>>::new(&bus.connection)
            .destination("org.freedesktop.systemd1")
            .path(path::of_unit(unit.as_str()))
            .interface(format!("org.freedesktop.systemd1.{kind}"))
            .cache_properties(CacheProperties::No)
            .build()
            .await
    }
}

async fn reset_failed(bus: &Bus, changes: &Changes, unit: &UnitName) {
    match bus.call(bus.manager.reset_failed_unit(unit.as_str())).await {
        Ok(()) => changes.saw(unit, false),
        Err(error) => tracing::debug!(%unit, %error, "the failed state was not reset"),
    }
}

struct Prepared {
    written: Written,
    /// It was linked before.
    linked: bool,
    /// Links of the old text have to go first.
    disable: bool,
    link: Linking,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Linking {
    /// It is linked.
    Keep,
    Plain,
    /// As its [Install] section says.
    Enable,
}

fn state(listed: Listed) -> State {
    State { load: listed.2, active: listed.3, sub: listed.4 }
}

/// Whether it is this error of systemd's.
fn is_named(error: &zbus::Error, name: &str) -> bool {
    matches!(error, zbus::Error::MethodError(full, ..)
        if full.as_str().strip_prefix("org.freedesktop.systemd1.") == Some(name))
}

impl Systemd for SystemdHost {
    /// A file that is not linked (its link was removed by hand, or a fleetd was killed between the two) is linked
    /// again first: then all that is here is known to whoever decides what to do with it.
    async fn find(&self) -> Result<Found, Error> {
        let bus = self.bus().await?;
        let boot = bus.boot.clone();
        let (all, marks, guarded) = self
            .with_files(move |directories| {
                let guarded = guard::read(&directories.guard);
                let units = files::list_units(directories)?;
                files::mark_inherited(directories, &boot, &units)?;
                Ok((units, files::list_marks(directories, &boot)?, guarded))
            })
            .await?;
        let (linked, unlinked): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|(unit, _)| files::is_linked(&self.directories, unit));
        let relinked = self.install(&unlinked).await;
        let mut files = BTreeMap::new();
        for (unit, file) in linked {
            self.changes.follow(&unit);
            files.insert(unit, file.shared_text());
        }
        for ((unit, file), result) in unlinked.into_iter().zip(relinked) {
            match result {
                Ok(()) => {
                    files.insert(unit, file.shared_text());
                }
                Err(error) => tracing::warn!(%unit, %error, "a unit file that is not linked can't be"),
            }
        }
        // What can't be read is not known: then nothing of it runs on.
        let guarded = guarded.unwrap_or_else(|error| {
            tracing::warn!(%error, "what the guard was told can't be read");
            None
        });
        Ok(Found { files, marks, guarded })
    }

    async fn install(&self, units: &[(UnitName, UnitFile)]) -> Vec<Result<(), Error>> {
        if units.is_empty() {
            return Vec::new();
        }
        let bus = match self.bus().await {
            Ok(bus) => bus,
            Err(error) => return vec![Err(error); units.len()],
        };
        let work = {
            let (bus, units) = (bus.clone(), units.to_vec());
            move |directories: &Directories| {
                Ok(units
                    .iter()
                    .map(|(unit, file)| SystemdHost::prepare(directories, &bus, unit, file))
                    .collect::<Vec<_>>())
            }
        };
        let prepared = match self.with_files(work).await {
            Ok(prepared) => prepared,
            Err(error) => return vec![Err(error); units.len()],
        };
        let those = |wanted: &dyn Fn(&Prepared) -> bool| -> Vec<usize> {
            (0..units.len()).filter(|i| prepared[*i].as_ref().is_ok_and(wanted)).collect()
        };
        let names = |indices: &[usize]| indices.iter().map(|i| &units[*i].0).collect::<Vec<_>>();

        let mut results: Vec<Result<(), Error>> =
            prepared.iter().map(|prepared| prepared.as_ref().map(drop).map_err(Clone::clone)).collect();
        let disable = those(&|prepared| prepared.disable);
        for (i, result) in disable.iter().zip(self.disable(&bus, &names(&disable)).await) {
            results[*i] = result;
        }
        for (how, enable) in [(Linking::Plain, false), (Linking::Enable, true)] {
            let link: Vec<usize> =
                those(&|prepared| prepared.link == how).into_iter().filter(|i| results[*i].is_ok()).collect();
            for (i, result) in link.iter().zip(self.link(&bus, &names(&link), enable).await) {
                results[*i] = result;
            }
        }
        for (i, prepared) in prepared.into_iter().enumerate() {
            match (&results[i], prepared) {
                (Ok(()), _) => self.changes.follow(&units[i].0),
                // Without systemd nothing can be taken back; the next attempt finds the file and links it.
                (Err(Error::Unreachable(_)), _) | (Err(_), Err(_)) => {}
                (Err(_), Ok(prepared)) => self.take_back(&bus, &units[i].0, prepared).await,
            }
        }
        results
    }

    async fn remove(&self, units: &[UnitName]) -> Vec<Result<(), Error>> {
        if units.is_empty() {
            return Vec::new();
        }
        let bus = match self.bus().await {
            Ok(bus) => bus,
            Err(error) => return vec![Err(error); units.len()],
        };
        let names: Vec<&UnitName> = units.iter().collect();
        let mut results = self.disable(&bus, &names).await;
        // systemd keeps failed units in memory, and drops the others by itself, ...
        match bus.call(bus.manager.list_units_filtered(&["failed"])).await {
            Ok(failed) => {
                let failed: BTreeSet<&str> = failed.iter().map(|unit| unit.0.as_str()).collect();
                let ours = units.iter().filter(|unit| failed.contains(unit.as_str()));
                join_all(ours.map(|unit| reset_failed(&bus, &self.changes, unit))).await;
            }
            Err(error) => tracing::warn!(%error, "can't find out which units are failed"),
        }
        // ... but not those that others refer to. Their files are there until they are forgotten, so that whoever finds them after
        // a crash removes them anew.
        let unlinked: Vec<UnitName> = units
            .iter()
            .zip(&results)
            .filter(|(_, result)| result.is_ok())
            .map(|(unit, _)| unit.clone())
            .collect();
        let kept = match self.make_forgotten(&bus, &unlinked).await {
            Ok(kept) => kept,
            Err(error) => return vec![Err(error); units.len()],
        };
        for (unit, result) in units.iter().zip(&mut results) {
            if let Some(error) = kept.get(unit) {
                *result = Err(error.clone());
            }
        }
        let work = {
            let (units, unlinked) = (units.to_vec(), results.clone());
            move |directories: &Directories| {
                // A unit that could not be unlinked keeps its file: systemd would find a dangling link.
                let delete = |(unit, unlinked): (&UnitName, Result<(), Error>)| {
                    unlinked.and_then(|()| files::delete_unit(directories, unit))
                };
                Ok(units.iter().zip(unlinked).map(delete).collect::<Vec<_>>())
            }
        };
        results = match self.with_files(work).await {
            Ok(results) => results,
            Err(error) => return vec![Err(error); units.len()],
        };
        for (unit, result) in units.iter().zip(&results) {
            if result.is_ok() {
                self.changes.forget(unit);
            }
        }
        results
    }

    async fn reload_if_needed(&self, units: &[UnitName]) -> Result<bool, Error> {
        if units.is_empty() {
            return Ok(false);
        }
        let bus = self.bus().await?;
        // The first that needs it is enough.
        for some in self.known(&bus, units).await?.chunks(SINGLE_LOOK_UPS) {
            for needed in join_all(some.iter().map(|unit| self.needs_reload(&bus, unit))).await {
                match needed {
                    Ok(true) => {
                        bus.call(bus.manager.reload()).await?;
                        return Ok(true);
                    }
                    Ok(false) => {}
                    // One that systemd dropped meanwhile is read afresh when it is needed.
                    Err(Error::Refused(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(false)
    }

    async fn start(&self, unit: &UnitName) -> Result<JobResult, Error> {
        let turn = self.calls.turn(unit);
        // A start that somebody asked for is not one too many, as systemd's own restarts may be.
        let reset = self.changes.was_failed(unit);
        let result = self.job(unit, Job::Start, self.calls.ask(&turn, Job::Start, reset)).await?;
        if let JobResult::Failed(_) = &result
            && self.hit_start_limit(&*self.bus().await?, unit).await
        {
            return self.job(unit, Job::Start, self.calls.start_again(&turn)).await;
        }
        Ok(result)
    }

    async fn stop(&self, unit: &UnitName) -> Result<JobResult, Error> {
        let turn = self.calls.turn(unit);
        self.job(unit, Job::Stop, self.calls.ask(&turn, Job::Stop, false)).await
    }

    async fn in_memory(&self, units: &[UnitName]) -> Result<BTreeSet<UnitName>, Error> {
        if units.is_empty() {
            return Ok(BTreeSet::new());
        }
        let bus = self.bus().await?;
        Ok(self.known(&bus, units).await?.into_iter().cloned().collect())
    }

    /// Reading the state of a unit that is not in memory loads it for a moment.
    async fn states(&self, units: &[UnitName]) -> Result<BTreeMap<UnitName, State>, Error> {
        if units.is_empty() {
            return Ok(BTreeMap::new());
        }
        let bus = self.bus().await?;
        // A template has no state of its own, and systemd refuses the question.
        let (templates, plain): (Vec<&UnitName>, Vec<&UnitName>) =
            units.iter().partition(|unit| unit.is_template());
        let mut states = BTreeMap::new();
        for (unit, state) in plain.iter().zip(self.list_by_names(&bus, &plain).await?) {
            if state.load == "not-found" && state.active == "inactive" {
                self.changes.forget(unit);
            } else {
                self.changes.saw(unit, state.active == "failed");
            }
            states.insert((*unit).clone(), state);
        }
        for unit in templates {
            let load = if files::is_linked(&self.directories, unit) { "loaded" } else { "not-found" };
            let state = State { load: load.into(), active: "inactive".into(), sub: "dead".into() };
            states.insert(unit.clone(), state);
        }
        Ok(states)
    }

    async fn mark(&self, marks: &[(UnitName, Option<Mark>)]) -> Vec<Result<(), Error>> {
        let write = async {
            let boot = self.bus().await?.boot.clone();
            let marks = marks.to_vec();
            let write = move |directories: &Directories| {
                let one =
                    |(unit, mark): &(UnitName, Option<Mark>)| files::mark(directories, &boot, unit, *mark);
                Ok(marks.iter().map(one).collect())
            };
            self.with_files(write).await
        };
        write.await.unwrap_or_else(|error| vec![Err(error); marks.len()])
    }

    fn clock(&self) -> Duration {
        guard::clock()
    }

    async fn stop_timeouts(&self, units: &[UnitName]) -> BTreeMap<UnitName, Duration> {
        let Ok(bus) = self.bus().await else {
            return units.iter().map(|unit| (unit.clone(), Duration::MAX)).collect();
        };
        let timeouts = units.iter().map(async |unit| (unit.clone(), self.stop_timeout(&bus, unit).await));
        join_all(timeouts).await.into_iter().collect()
    }

    async fn tell_guard(&self, guarded: Option<&Guarded>) -> Result<(), Error> {
        let guarded = guarded.cloned();
        self.with_files(move |directories| files::tell_guard(&directories.guard, guarded.as_ref())).await
    }

    async fn run_guard(&self, run: bool) -> Result<(), Error> {
        let unit = UnitName::parse(guard::UNIT).map_err(|error| Error::Refused(error.to_string()))?;
        let job = if run { Job::Start } else { Job::Stop };
        let turn = self.calls.turn(&unit);
        match self.job(&unit, job, self.calls.ask(&turn, job, false)).await? {
            JobResult::Failed(word) => Err(Error::Refused(format!(
                "{unit} does not start (its job ended with result '{word}'; see systemctl status {unit})"
            ))),
            JobResult::Done | JobResult::Canceled => Ok(()),
        }
    }

    async fn is_shutting_down(&self) -> bool {
        let ask = async {
            let bus = self.bus().await.ok()?;
            bus.manager.system_state().await.ok()
        };
        // Asked when fleetd ends: an answer that takes long is of no use.
        let answer = tokio::time::timeout(Duration::from_secs(2), ask).await;
        answer.is_ok_and(|state| state.as_deref() == Some("stopping"))
    }

    fn notices(&self) -> mpsc::Receiver<Notice> {
        let taken = self.notices.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The second taker gets one that has ended.
        taken.unwrap_or_else(|| mpsc::channel(1).1)
    }

    fn status(&self, unit: &UnitName) -> mpsc::Receiver<Output> {
        self.commands.status(unit)
    }

    fn journal(&self, unit: &UnitName, lines: u32, follow: bool, output: &str) -> mpsc::Receiver<Output> {
        self.commands.journal(unit, lines, follow, output)
    }
}
