//! The agent role: makes its machine's systemd hold what is wanted of it.
//!
//! What to do next for a unit is decided by [`fleet_cluster::agent::next`]; this file carries it out: it gathers the steps of all
//! units that may need one, so that files are installed, states asked and reloads made once per batch, runs start and stop
//! jobs side by side, and reports what changed. Before the first snapshot from a server it touches nothing, and when a session ends
//! it goes on holding what it was last told.
//!
//! | module | does |
//! |---|---|
//! | `steps` | carries out steps: jobs, files, states, and what they run into |
//! | `report` | tells the server what changed, and answers its questions |
//! | `presence` | gives signs of life, and says goodbye |
//! | `pulse` | tells the watchdog whether the agent gets on |

use fleet_cluster::agent::{self as logic, Job, Observed, Step};
use fleet_cluster::model::*;
use fleet_link::{AgentEnd, Instruction, ToAgent};
use fleet_systemd::{Error, JobResult, Notice, Systemd};
use fleet_unit::{Hash, UnitFile, UnitName};
use std::collections::{BTreeMap, BTreeSet};
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{debug, error, info, warn};

mod presence;
mod pulse;
mod report;
mod steps;

pub use pulse::Pulse;

/// After a failure of the machine (full disk, systemd out of reach) the next attempt waits this long, doubled up
/// to the second value.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// The safety net: all states are asked anew this often, in case a signal was lost.
const FULL_PASS: Duration = Duration::from_secs(300);

/// While jobs of the last batch are under way, units to install gather for the next one, but no longer than this:
/// after each change of the unit directories systemd reads them anew, which costs it as much as several starts.
const GATHER: Duration = Duration::from_millis(200);

/// The state of a unit with a job under way is asked this often; when the job ends it is asked at once.
const PROGRESS: Duration = Duration::from_millis(500);

/// More immediate steps than this for one unit in one go mean that the machine does not do what it says.
const MOST_ROUNDS: usize = 12;

/// How a job ended: its unit, its number, what it was, the hash of the file it was for.
type JobEnd = (UnitName, u64, Job, Hash, Result<JobResult, Error>);

/// What the agent remembers of one unit.
#[derive(Debug, Default)]
struct Slot {
    observed: Observed,
    /// What its last start ran into.
    problem: Option<String>,
    /// What the machine ran into with it; gone with the next success.
    trouble: Option<String>,
    /// The number of the job under way: an answer to an older one is no longer of interest.
    job: u64,
    /// Not to be touched before then, after a failure.
    hold: Option<Instant>,
    /// How long the last failure made it wait; zero after a success.
    pause: Duration,
    /// The last state systemd told, which may be older than what is known to be outdated.
    seen: Option<SystemdState>,
    reported: Option<UnitReport>,
}

/// The agent of one machine.
pub struct Agent<S> {
    systemd: Arc<S>,
    /// What the server wants; `None` before the first snapshot.
    wanted: Option<BTreeMap<UnitName, Wanted>>,
    /// Units of which the server can't tell what is wanted: their states are reported, and nothing is done with them.
    left: BTreeSet<UnitName>,
    slots: BTreeMap<UnitName, Slot>,
    /// Units that may need a step.
    dirty: BTreeSet<UnitName>,
    /// Units of which the report may have changed.
    touched: BTreeSet<UnitName>,
    /// Units that wait after a failure.
    held: BTreeSet<UnitName>,
    /// Jobs under way, each in a task of its own: they must get on while a batch waits for systemd.
    jobs: JoinSet<JobEnd>,
    job_count: u64,
    /// The last batch of installed units, while it holds up the next: its jobs under way, and until when.
    batch: Option<(BTreeSet<u64>, Instant)>,
    /// Units that wait to be installed with the next batch.
    gathered: BTreeSet<UnitName>,
    /// Units with a job whose state changed, and when they are to be looked at.
    progress: BTreeSet<UnitName>,
    progress_at: Option<Instant>,
    questions: JoinSet<()>,
    pulse: Arc<Pulse>,
}

impl<S: Systemd> Agent<S> {
    /// An agent that knows what is on the machine from before, and has changed nothing.
    pub async fn new(systemd: Arc<S>) -> Result<Self, Error> {
        let found = systemd.find().await?;
        let mut slots: BTreeMap<UnitName, Slot> = BTreeMap::new();
        for (name, text) in found.files {
            slots.entry(name).or_default().observed.text = Some(text);
        }
        for (name, hash) in found.launched {
            slots.entry(name).or_default().observed.launched = Some(hash);
        }
        if !slots.is_empty() {
            info!("found {} units of fleet on this machine", slots.len());
        }
        let dirty = slots.keys().cloned().collect();
        Ok(Agent {
            systemd,
            wanted: None,
            left: BTreeSet::new(),
            slots,
            dirty,
            touched: BTreeSet::new(),
            held: BTreeSet::new(),
            jobs: JoinSet::new(),
            job_count: 0,
            batch: None,
            gathered: BTreeSet::new(),
            progress: BTreeSet::new(),
            progress_at: None,
            questions: JoinSet::new(),
            pulse: Arc::default(),
        })
    }

    /// How the agent gets on.
    pub fn pulse(&self) -> Arc<Pulse> {
        self.pulse.clone()
    }

    /// Works until cancelled: with one session after the other, and without one in between. Units are left as they are.
    pub async fn run(mut self, mut sessions: mpsc::Receiver<AgentEnd>, cancel: CancellationToken) {
        let mut notices = self.systemd.notices();
        let mut session: Option<AgentEnd> = None;
        let mut beating: Option<AbortOnDropHandle<()>> = None;
        let mut full_pass = tokio::time::interval_at(Instant::now() + FULL_PASS, FULL_PASS);
        self.ask_all().await;
        loop {
            self.pulse.set(Some(Instant::now()));
            self.settle().await;
            self.report(&session).await;
            self.pulse.set(None);
            let idle = session.is_none();
            let message = async {
                match &mut session {
                    Some(end) => end.receive.recv().await,
                    None => std::future::pending().await,
                }
            };
            let wake_at = self.wake_at();
            let wake = async {
                match wake_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = cancel.cancelled() => break,
                message = message => match message {
                    Some(message) => self.take(message),
                    None => {
                        warn!("the session with the server ended; units go on as they are");
                        session = None;
                        beating = None;
                    }
                },
                end = sessions.recv(), if idle => match end {
                    Some(end) => {
                        beating = Some(AbortOnDropHandle::new(tokio::spawn(presence::beat(end.beats.clone()))));
                        for slot in self.slots.values_mut() {
                            slot.reported = None;
                        }
                        self.report_all(&end).await;
                        session = Some(end);
                    }
                    None => break,
                },
                Some(done) = self.jobs.join_next() => match done {
                    Ok(done) => {
                        self.job_done(done).await;
                        // Those that ended meanwhile, too, so that their states are asked together.
                        while let Some(Ok(done)) = self.jobs.try_join_next() {
                            self.job_done(done).await;
                        }
                    }
                    Err(error) => {
                        // A task that panicked is a mistake in fleetd: it starts anew from what is on the machine.
                        error!("a job could not be carried out: {error}");
                        break;
                    }
                },
                notice = notices.recv() => match notice {
                    Some(Notice::Units(names)) => self.look_again(names),
                    Some(Notice::All) => self.look_again(self.slots.keys().cloned().collect()),
                    None => {
                        warn!("no more notices from systemd");
                        break;
                    }
                },
                () = wake => self.wake(),
                _ = full_pass.tick() => self.look_again(self.slots.keys().cloned().collect()),
                Some(_) = self.questions.join_next(), if !self.questions.is_empty() => {}
            }
        }
        drop(beating);
        if let Some(end) = &session
            && self.systemd.is_shutting_down().await
        {
            presence::leave(&end.beats).await;
        }
        self.questions.shutdown().await;
        self.jobs.shutdown().await;
    }

    /// Notes what is wanted of a unit.
    fn note(&mut self, name: UnitName, instruction: Option<Instruction>) {
        let wanted = self.wanted.get_or_insert_default();
        self.left.remove(&name);
        match instruction {
            Some(Instruction::Hold(unit)) => {
                wanted.insert(name, unit);
            }
            Some(Instruction::Leave) => {
                warn!(UNIT = %name, "the server can't tell what is wanted of {name}; left as it is");
                wanted.remove(&name);
                self.left.insert(name);
            }
            None => {
                wanted.remove(&name);
            }
        }
    }

    fn take(&mut self, message: ToAgent) {
        match message {
            ToAgent::Snapshot(instructions) => {
                self.dirty.extend(self.slots.keys().cloned());
                self.dirty.extend(instructions.keys().cloned());
                self.wanted = Some(BTreeMap::new());
                self.left.clear();
                for (name, instruction) in instructions {
                    self.note(name, Some(instruction));
                }
            }
            ToAgent::Changes(changes) => {
                for (name, change) in changes {
                    self.note(name.clone(), change);
                    if let Some(slot) = self.slots.get_mut(&name) {
                        slot.hold = None;
                    }
                    self.dirty.insert(name);
                }
            }
            ToAgent::Request(request) => self.answer(request),
        }
    }

    /// Their states may have changed.
    fn look_again(&mut self, names: BTreeSet<UnitName>) {
        for name in names {
            match self.slots.get_mut(&name) {
                Some(slot) if slot.observed.job.is_some() => {
                    self.progress.insert(name);
                    self.progress_at.get_or_insert_with(|| Instant::now() + PROGRESS);
                }
                Some(slot) => {
                    slot.observed.systemd = None;
                    self.dirty.insert(name);
                }
                None => {}
            }
        }
    }

    /// When there is something to do though nothing comes.
    fn wake_at(&self) -> Option<Instant> {
        let holds = self.held.iter().filter_map(|name| self.slots.get(name)?.hold);
        let batch = self.batch.as_ref().filter(|_| !self.gathered.is_empty()).map(|(_, ends)| *ends);
        holds.chain(batch).chain(self.progress_at).min()
    }

    fn wake(&mut self) {
        let now = Instant::now();
        if self.progress_at.is_some_and(|at| at <= now) {
            self.progress_at = None;
            for name in std::mem::take(&mut self.progress) {
                if let Some(slot) = self.slots.get_mut(&name) {
                    slot.observed.systemd = None;
                    self.dirty.insert(name);
                }
            }
        }
        if self.batch.as_ref().is_some_and(|(_, ends)| *ends <= now) {
            self.end_batch();
        }
        self.end_holds(now);
    }

    /// The next batch may begin.
    fn end_batch(&mut self) {
        self.batch = None;
        self.dirty.append(&mut self.gathered);
    }

    fn end_holds(&mut self, now: Instant) {
        let (slots, dirty) = (&mut self.slots, &mut self.dirty);
        self.held.retain(|name| match slots.get_mut(name) {
            Some(slot) if slot.hold.is_some_and(|until| until > now) => true,
            Some(slot) => {
                slot.hold = None;
                dirty.insert(name.clone());
                false
            }
            None => false,
        });
    }

    /// Carries out steps until every unit rests or has a job under way.
    async fn settle(&mut self) {
        // Before a server has said what is wanted, only states are looked at.
        if self.wanted.is_none() {
            return self.ask_all().await;
        }
        for _ in 0..MOST_ROUNDS {
            if self.dirty.is_empty() {
                return;
            }
            self.round().await;
        }
        let stuck: Vec<_> = std::mem::take(&mut self.dirty).into_iter().collect();
        for name in &stuck {
            self.fail(name, "systemd does not do what it says; see the log of fleetd".to_owned());
        }
        warn!("no end of steps for {stuck:?}");
    }

    async fn round(&mut self) {
        let now = Instant::now();
        let (mut ask, mut install, mut remove) = (Vec::new(), Vec::new(), Vec::new());
        self.touched.extend(self.dirty.iter().cloned());
        for name in std::mem::take(&mut self.dirty) {
            let wanted = self.wanted.as_ref().and_then(|wanted| wanted.get(&name));
            let slot = self.slots.entry(name.clone()).or_default();
            if slot.hold.is_some_and(|until| until > now) {
                continue;
            }
            if self.left.contains(&name) {
                if slot.observed.systemd.is_none() {
                    ask.push(name);
                }
                continue;
            }
            match logic::next(wanted, &slot.observed) {
                Step::Rest => {}
                Step::Ask => ask.push(name),
                Step::Install
                    if self.batch.as_ref().is_some_and(|(jobs, ends)| !jobs.is_empty() && *ends > now) =>
                {
                    self.gathered.insert(name);
                }
                Step::Install => install.extend(wanted.map(|wanted| (name, wanted.file.clone()))),
                Step::Start(hash) => self.begin(name, Job::Start, hash),
                Step::Stop => {
                    let hash = slot.observed.launched.unwrap_or(Hash([0; 20]));
                    self.begin(name, Job::Stop, hash);
                }
                Step::Adopt(hash) => {
                    info!(UNIT = %name, "{name} runs already as wanted; left as it is");
                    self.mark(name, Some(hash)).await;
                }
                Step::Release => self.mark(name, None).await,
                Step::Remove => remove.push(name),
                Step::Forget => {
                    // What was reported has to be taken back, so the slot goes when that is done.
                    if slot.reported.is_none() {
                        self.slots.remove(&name);
                    }
                }
            }
        }
        if !install.is_empty() {
            self.batch = Some((BTreeSet::new(), now + GATHER));
            self.install(install).await;
        }
        if !remove.is_empty() {
            self.remove(remove).await;
        }
        if !ask.is_empty() {
            self.ask(&ask).await;
        }
    }
}
