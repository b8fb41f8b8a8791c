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
    files, is_named,
    jobs::{Ending, Jobs},
    path,
};
use crate::{Error, JobResult};
use fleet_unit::UnitName;
use futures_util::future::join_all;
use std::sync::Arc;
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
type Answer = (Arc<Bus>, Result<Asked, Error>);

struct Request {
    unit: UnitName,
    job: Job,
    answer: oneshot::Sender<Answer>,
}

/// Where jobs are asked for.
#[derive(Clone)]
pub(super) struct Calls(mpsc::Sender<Request>);

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
        directories: Directories,
        end: CancellationToken,
    ) -> Self {
        let (sender, queue) = mpsc::channel(WAITING);
        let caller = Caller { current, jobs, directories, count: 0 };
        tokio::spawn(async move {
            end.run_until_cancelled(caller.run(queue)).await;
        });
        Calls(sender)
    }

    /// Asks for a job, after all that were asked for before.
    ///
    /// # Errors
    /// [`Error::Unreachable`] while there is no connection.
    pub(super) async fn ask(&self, unit: &UnitName, job: Job) -> Result<Answer, Error> {
        let (answer, asked) = oneshot::channel();
        // Without a connection requests are dropped.
        let _ = self.0.send(Request { unit: unit.clone(), job, answer }).await;
        asked.await.map_err(|_| bus::lost())
    }
}

struct Caller {
    current: Current,
    jobs: Jobs,
    directories: Directories,
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
                let these = std::mem::replace(&mut rest, others);
                let alone = if job == Job::Start && these.len() >= MANY {
                    self.together(&bus, these).await
                } else {
                    these
                };
                join_all(alone.into_iter().map(|request| self.alone(&bus, request))).await;
            }
        }
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
