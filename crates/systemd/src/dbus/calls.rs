//! Asks systemd for jobs: each start and stop by a call of its own, and many starts at once by one call.
//!
//! Over the bus a call is dear: systemd looks up who makes it, follows him for as long as the job lasts, and each unit it
//! loads changes others (`shutdown.target`, `basic.target`, …), which it tells everybody. Of 24 messages for the start of one
//! unit 14 are of that kind. So many starts that come together are asked for by the start of a target that wants all of these
//! units: systemd does that work once for all of them, in one transaction. The target is there for nothing else: a condition that
//! never holds keeps it inactive, and its file goes at once.
//!
//! What the call for the target does not say is asked: which unit has which job. One that has none has ended, which its signal
//! told, or never had one (its file is bad, it conflicts with another one of these): then it is asked for alone, and
//! the answer is its own.
use super::{
    Directories,
    bus::{self, Bus, Current},
    changes::Changes,
    files, is_named,
    jobs::{Ending, Jobs},
    path,
};
use crate::{Error, JobResult};
use fleet_unit::UnitName;
use futures_util::future::join_all;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// From so many starts on the target pays.
const MANY: usize = 8;
/// The most in one target. While systemd loads them it does nothing else: about a tenth of a second.
const MOST: usize = 250;
/// Requests that may wait; more wait to be put there.
const WAITING: usize = 1024;

/// What a job is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Start,
    Stop,
}

/// What became of the call for a job.
pub(super) enum Asked {
    /// This job is under way.
    Job(u32, Ending),
    /// It has ended already.
    Ended(JobResult),
}

/// Over which connection, and what systemd said.
pub(super) type Answer = (Arc<Bus>, Result<Asked, Error>);

struct Request {
    unit: UnitName,
    job: Job,
    /// Whether its failed state is to be reset before.
    reset: bool,
    /// As which of all it is asked for, if it is of no use any more once something else was asked for later.
    unless_later: Option<u64>,
    answer: oneshot::Sender<Answer>,
}

/// Where jobs are asked for.
pub(super) struct Calls {
    queue: mpsc::Sender<Request>,
    newest: Arc<Newest>,
}

/// Which request is the newest of each unit with one under way, by their numbers.
#[derive(Default)]
struct Newest(Mutex<(u64, HashMap<UnitName, u64>)>);

impl Newest {
    fn is(&self, unit: &UnitName, number: u64) -> bool {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1.get(unit) == Some(&number)
    }
}

/// The place of a request among all.
pub(super) struct Turn {
    newest: Arc<Newest>,
    unit: UnitName,
    number: u64,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.newest.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.1.get(&self.unit) == Some(&self.number) {
            state.1.remove(&self.unit);
        }
    }
}

impl Request {
    fn answer(self, bus: &Arc<Bus>, asked: Result<Asked, Error>) {
        // Who asked may have been told to end meanwhile.
        let _ = self.answer.send((bus.clone(), asked));
    }
}

impl Calls {
    /// Its task ends when cancelled.
    pub(super) fn new(
        current: Current,
        jobs: Jobs,
        changes: Arc<Changes>,
        directories: Directories,
        end: CancellationToken,
    ) -> Self {
        let (queue, requests) = mpsc::channel(WAITING);
        let newest = Arc::<Newest>::default();
        let caller = Caller { current, jobs, changes, directories, newest: newest.clone(), count: 0 };
        tokio::spawn(async move {
            end.run_until_cancelled(caller.run(requests)).await;
        });
        Calls { queue, newest }
    }

    /// Takes the next turn, for a unit of which something is asked.
    pub(super) fn turn(&self, unit: &UnitName) -> Turn {
        let mut state = self.newest.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        let number = state.0;
        state.1.insert(unit.clone(), number);
        Turn { newest: self.newest.clone(), unit: unit.clone(), number }
    }

    /// Asks for a job, after all that were asked for before. `reset`: a failed state is reset before that.
    ///
    /// # Errors
    /// [`Error::Unreachable`] while there is no connection.
    pub(super) async fn ask(&self, turn: &Turn, job: Job, reset: bool) -> Result<Answer, Error> {
        self.send(turn, job, reset, None).await
    }

    /// Asks for a start once more, unless something else was asked of the unit meanwhile: then that counts, and this one is
    /// cancelled.
    ///
    /// # Errors
    /// [`Error::Unreachable`] while there is no connection.
    pub(super) async fn start_again(&self, turn: &Turn) -> Result<Answer, Error> {
        self.send(turn, Job::Start, true, Some(turn.number)).await
    }

    async fn send(
        &self,
        turn: &Turn,
        job: Job,
        reset: bool,
        unless_later: Option<u64>,
    ) -> Result<Answer, Error> {
        let (answer, asked) = oneshot::channel();
        // Without a connection requests are dropped.
        let _ = self.queue.send(Request { unit: turn.unit.clone(), job, reset, unless_later, answer }).await;
        asked.await.map_err(|_| bus::lost())
    }
}

struct Caller {
    current: Current,
    jobs: Jobs,
    changes: Arc<Changes>,
    directories: Directories,
    newest: Arc<Newest>,
    /// Targets made by this process.
    count: u64,
}

impl Caller {
    async fn run(mut self, mut queue: mpsc::Receiver<Request>) {
        self.clean_up().await;
        let mut requests = Vec::new();
        while queue.recv_many(&mut requests, MOST).await > 0 {
            let Ok(bus) = bus::present(&self.current, super::PATIENCE).await else {
                requests.clear();
                continue;
            };
            // In the order in which they came: a stop must not overtake the start that it is meant for.
            let mut rest = std::mem::take(&mut requests);
            while let Some(first) = rest.first() {
                let job = first.job;
                let others = rest.split_off(rest.iter().take_while(|request| request.job == job).count());
                let these = self.of_use(&bus, std::mem::replace(&mut rest, others));
                join_all(these.iter().filter(|request| request.reset).map(|request| {
                    // Not before its turn: what is asked for meanwhile must not come between this and the start.
                    super::reset_failed(&bus, &self.changes, &request.unit)
                }))
                .await;
                let alone = if job == Job::Start && these.len() >= MANY {
                    self.together(&bus, these).await
                } else {
                    these
                };
                join_all(alone.into_iter().map(|request| self.alone(&bus, request))).await;
            }
        }
    }

    /// Answers those that came too late.
    fn of_use(&self, bus: &Arc<Bus>, requests: Vec<Request>) -> Vec<Request> {
        let is_late = |request: &Request| {
            request.unless_later.is_some_and(|number| !self.newest.is(&request.unit, number))
        };
        let (late, of_use): (Vec<_>, Vec<_>) = requests.into_iter().partition(is_late);
        for request in late {
            request.answer(bus, Ok(Asked::Ended(JobResult::Canceled)));
        }
        of_use
    }

    async fn alone(&self, bus: &Arc<Bus>, request: Request) {
        let announced = self.jobs.announce();
        let name = request.unit.as_str();
        let asked = match request.job {
            Job::Start => bus.ask(bus.manager.start_unit(name, "replace")).await,
            Job::Stop => bus.ask(bus.manager.stop_unit(name, "replace")).await,
        };
        let asked = match asked {
            Ok(path) => match path::job_id(path.as_str()) {
                Some(id) => Ok(Asked::Job(id, announced.job(id))),
                None => Err(Error::Refused(format!("systemd gave a job the strange path {path}"))),
            },
            Err(error) if request.job == Job::Stop && is_named(&error, "NoSuchUnit") => {
                Ok(Asked::Ended(JobResult::Done))
            }
            Err(error) => Err(error.into()),
        };
        request.answer(bus, asked);
    }

    /// Starts all that can be started together, and gives back the others.
    async fn together(&mut self, bus: &Arc<Bus>, requests: Vec<Request>) -> Vec<Request> {
        self.count += 1;
        let target = format!("fleet-start-{}-{}.target", std::process::id(), self.count);
        // systemd refuses to tell of templates, and to start them.
        let (mut alone, requests): (Vec<_>, Vec<_>) =
            requests.into_iter().partition(|request| request.unit.is_template());
        let announced = self.jobs.announce();
        let units: Vec<&str> = requests.iter().map(|request| request.unit.as_str()).collect();
        match self.start_target(bus, &target, &units).await {
            Ok(()) => match start_jobs(bus, &units).await {
                Ok(jobs) => {
                    let mut unclear = Vec::new();
                    for (request, id) in requests.into_iter().zip(jobs) {
                        match id {
                            Some(id) => request.answer(bus, Ok(Asked::Job(id, announced.job(id)))),
                            None => unclear.push(request),
                        }
                    }
                    if !unclear.is_empty() {
                        // The signal that a job has ended was sent before it was seen to be gone.
                        bus.all_sorted().await;
                    }
                    for request in unclear {
                        match announced.ended(request.unit.as_str()) {
                            Some(result) => request.answer(bus, Ok(Asked::Ended(result))),
                            None => alone.push(request),
                        }
                    }
                }
                // They may have been started: not once more.
                Err(error) => {
                    requests.into_iter().for_each(|request| request.answer(bus, Err(error.clone())))
                }
            },
            Err(error) => {
                tracing::debug!(%error, "{} units can't be started together", requests.len());
                alone.extend(requests);
            }
        }
        self.remove_targets(bus, &[target]).await;
        alone
    }

    async fn start_target(&self, bus: &Bus, target: &str, units: &[&str]) -> Result<(), Error> {
        let path = self.directories.starts.join(target);
        let text = text_of(units);
        let write = {
            let path = path.clone();
            move || files::write(&path, &text)
        };
        files::off_the_runtime(write).await?;
        bus.call(bus.manager.link_unit_files(&[&path.display().to_string()], true, true)).await?;
        bus.call(bus.manager.start_unit(target, "replace")).await.map(drop)
    }

    async fn remove_targets(&self, bus: &Bus, targets: &[String]) {
        let names: Vec<&str> = targets.iter().map(String::as_str).collect();
        match bus.ask(bus.manager.disable_unit_files(&names, true)).await {
            Err(error) if !is_named(&error, "NoSuchUnit") => tracing::debug!(%error, "a link is left"),
            _ => {}
        }
        let paths: Vec<_> = targets.iter().map(|target| self.directories.starts.join(target)).collect();
        let delete = move || paths.iter().try_for_each(|path| files::delete(path));
        if let Err(error) = files::off_the_runtime(delete).await {
            tracing::debug!(%error, "a file is left");
        }
    }

    /// Takes away what a killed fleetd left.
    async fn clean_up(&self) {
        let directory = self.directories.starts.clone();
        let left = files::off_the_runtime(move || files::entries(&directory)).await.unwrap_or_default();
        let left: Vec<String> = left.into_iter().filter_map(|name| name.into_string().ok()).collect();
        if left.is_empty() {
            return;
        }
        if let Ok(bus) = bus::present(&self.current, super::PATIENCE).await {
            self.remove_targets(&bus, &left).await;
        }
    }
}

fn text_of(units: &[&str]) -> String {
    let mut text = "[Unit]\nDefaultDependencies=no\nConditionPathExists=!/\n".to_owned();
    for unit in units {
        text.extend(["Wants=", unit, "\n"]);
    }
    text
}

/// The number of each unit's start job; none for one that has no such job (any more).
async fn start_jobs(bus: &Bus, units: &[&str]) -> Result<Vec<Option<u32>>, Error> {
    let listed = bus.call(bus.manager.list_units_by_names(units)).await?;
    if listed.len() != units.len() {
        return Err(Error::Refused(format!(
            "systemd gave {} states for {} units",
            listed.len(),
            units.len()
        )));
    }
    Ok(listed.into_iter().map(|unit| (unit.7 != 0 && unit.8 == "start").then_some(unit.7)).collect())
}
