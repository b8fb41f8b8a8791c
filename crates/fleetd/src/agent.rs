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
//! | `isolation` | looks after units with OnIsolation=stop |
//! | `pulse` | tells the watchdog whether the agent gets on |

use fleet_cluster::agent::{self as logic, Job, Observed, Step};
use fleet_cluster::model::*;
use fleet_link::{AgentEnd, Instruction, ToAgent};
use fleet_systemd::{Error, JobResult, Mark, Notice, Systemd};
use fleet_unit::{Hash, UnitFile, UnitName};
use std::collections::{BTreeMap, BTreeSet};
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

mod isolation;
mod presence;
mod pulse;
mod report;
mod steps;

pub use pulse::Pulse;

use isolation::Isolation;
use presence::Presence;

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

/// Stopping and unloading everything may take this long; the service's TimeoutStopSec= has to be longer.
const PURGE_DEADLINE: Duration = Duration::from_secs(60);

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
    /// That it was started, or is stopped, is not noted on the machine yet: the next fleetd would not know.
    unnoted: bool,
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

impl Slot {
    /// Whether anything of the unit is on the machine, or may be, that is fleet's.
    fn is_here(&self) -> bool {
        let Observed { text, launched, begun, job, inherited, .. } = &self.observed;
        !inherited && (text.is_some() || launched.is_some() || *begun || job.is_some())
    }
}

/// The agent of one machine.
pub struct Agent<S> {
    systemd: Arc<S>,
    /// What the server wants; `None` before the first snapshot.
    wanted: Option<BTreeMap<UnitName, Wanted>>,
    /// Units of which the server can't tell what is wanted: their states are reported, and nothing is done with them.
    left: BTreeSet<UnitName>,
    /// Units of which the server has to know when nothing runs any more, with the number to answer with.
    releasing: BTreeMap<UnitName, Revision>,
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
    presence: Presence,
    isolation: Isolation,
    /// Cancelled before the agent is when it has to take everything off the machine.
    purge: CancellationToken,
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
        for (name, mark) in found.marks {
            let observed = &mut slots.entry(name).or_default().observed;
            match mark {
                Mark::Launched(hash) => observed.launched = Some(hash),
                Mark::Starting(_) => observed.begun = true,
                Mark::Inherited(_) => observed.inherited = true,
            }
        }
        let inherited: Vec<_> =
            slots.iter().filter(|(_, slot)| slot.observed.inherited).map(|(name, _)| name.as_str()).collect();
        if slots.len() > inherited.len() {
            info!("found {} units of fleet on this machine", slots.len() - inherited.len());
        }
        if !inherited.is_empty() {
            info!(
                "found {} units that another fleet left on this machine; they go on as they are, and are taken over when they \
                 are wanted here: {}",
                inherited.len(),
                inherited.join(" ")
            );
        }
        // Whether systemd was had to read a file before the fleetd that wrote it ended is known only of what was started with it.
        let unread = slots.iter().filter(|(_, Slot { observed, .. })| {
            observed.text.is_some() && observed.launched.is_none() && !observed.inherited
        });
        let unread: Vec<_> = unread.map(|(name, _)| name.clone()).collect();
        if !unread.is_empty()
            && let Err(error) = systemd.reload_if_needed(&unread).await
        {
            warn!("not known whether systemd has read all unit files: {error}");
            for name in &unread {
                if let Some(slot) = slots.get_mut(name) {
                    slot.observed.unsure = true;
                }
            }
        }
        let names: Vec<_> = slots.keys().cloned().collect();
        let guarded = found.guarded.as_ref().map(|guarded| guarded.units.clone()).unwrap_or_default();
        let mut agent = Agent {
            presence: Presence::new(systemd.clone(), found.guarded),
            isolation: Isolation::new(guarded),
            purge: CancellationToken::new(),
            systemd,
            wanted: None,
            left: BTreeSet::new(),
            releasing: BTreeMap::new(),
            slots,
            dirty: names.iter().cloned().collect(),
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
        };
        for name in &names {
            agent.note_isolation(name);
        }
        Ok(agent)
    }

    /// With a token that is cancelled before the agent is when it has to take all its units off the machine, and give up
    /// its presence.
    pub fn purged_by(mut self, purge: CancellationToken) -> Self {
        self.purge = purge;
        self
    }

    /// How the agent gets on.
    pub fn pulse(&self) -> Arc<Pulse> {
        self.pulse.clone()
    }

    /// Works until cancelled: with one session after the other, and without one in between. Units are left as they are,
    /// unless they are to be purged.
    pub async fn run(mut self, mut sessions: mpsc::Receiver<AgentEnd>, cancel: CancellationToken) {
        let mut notices = self.systemd.notices();
        let mut session: Option<AgentEnd> = None;
        let mut full_pass = tokio::time::interval_at(Instant::now() + FULL_PASS, FULL_PASS);
        self.tend_guard().await;
        self.ask_all().await;
        loop {
            self.pulse.set(Some(Instant::now()));
            self.settle().await;
            self.report(&session).await;
            self.tell_released(&session).await;
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
            // What was done comes first, then what is wanted now, then the rest: each of them waits for the agent, so none can keep
            // it busy for long.
            tokio::select! {
                biased;
                () = cancel.cancelled() => break,
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
                message = message => match message {
                    Some(message) => self.take(message),
                    None => {
                        warn!("the session with the server ended; units go on as they are");
                        session = None;
                        self.presence.session(None).await;
                    }
                },
                end = sessions.recv(), if idle => match end {
                    Some(end) => {
                        self.presence.session(Some(end.beats.clone())).await;
                        for slot in self.slots.values_mut() {
                            slot.reported = None;
                        }
                        self.report_all(&end).await;
                        session = Some(end);
                    }
                    None => break,
                },
                notice = notices.recv() => match notice {
                    Some(Notice::Units(names)) => self.look_again(names),
                    Some(Notice::All) => {
                        self.look_again(self.slots.keys().cloned().collect());
                        // What failed is mostly what could not be asked of systemd; no unit is held for longer than that.
                        self.end_holds(Instant::now() + RETRY.1);
                        self.tend_missed_guard().await;
                    }
                    None => {
                        warn!("no more notices from systemd");
                        break;
                    }
                },
                () = wake => self.wake(),
                () = self.presence.changed() => {
                    if let Some(sent) = self.presence.known().waiting {
                        // What was said before the renewal was acknowledged comes first.
                        while let Some(Ok(message)) = session.as_mut().map(|end| end.receive.try_recv()) {
                            self.take(message);
                        }
                        let looked = self.systemd.clock();
                        self.follow_isolation();
                        self.presence.looked_at(sent, looked).await;
                    }
                }
                _ = full_pass.tick() => {
                    self.look_again(self.slots.keys().cloned().collect());
                    self.tend_guard().await;
                }
                Some(_) = self.questions.join_next(), if !self.questions.is_empty() => {}
            }
        }
        self.end(session, notices).await;
    }

    /// Ends as it is asked to: leaves units and presence as they are, gives up presence, or takes everything away.
    async fn end(mut self, session: Option<AgentEnd>, mut notices: mpsc::Receiver<Notice>) {
        let why = if self.purge.is_cancelled() {
            self.purge(&session, &mut notices).await;
            Some("fleetd stops and takes its units along")
        } else {
            self.systemd.is_shutting_down().await.then_some("the machine shuts down")
        };
        if let (Some(why), Some(end)) = (why, &session) {
            if self.may_leave(&mut notices).await {
                // No sign of life after the farewell.
                drop(self.presence);
                presence::leave(&end.beats, why).await;
            } else {
                warn!("{why}, but units with OnIsolation=stop still run: its presence runs out by itself");
            }
        }
        self.questions.shutdown().await;
        self.jobs.shutdown().await;
    }

    /// Stops all units and takes them off the machine, as far as that can be done in time.
    async fn purge(&mut self, session: &Option<AgentEnd>, notices: &mut mpsc::Receiver<Notice>) {
        let deadline = Instant::now() + PURGE_DEADLINE;
        let names: Vec<_> = self.slots.keys().cloned().collect();
        info!("stopping and unloading {} units", names.len());
        self.wanted = Some(BTreeMap::new());
        self.left.clear();
        self.dirty.extend(names);
        loop {
            self.settle().await;
            self.report(session).await;
            if !self.slots.values().any(Slot::is_here) {
                return;
            }
            let look = self.wake_at().unwrap_or(deadline).min(deadline);
            tokio::select! {
                biased;
                Some(Ok(done)) = self.jobs.join_next() => self.job_done(done).await,
                Some(notice) = notices.recv() => match notice {
                    Notice::Units(names) => self.look_again(names),
                    Notice::All => self.look_again(self.slots.keys().cloned().collect()),
                },
                () = tokio::time::sleep_until(look) => self.wake(),
            }
            if Instant::now() >= deadline {
                let left = self.slots.values().filter(|slot| slot.is_here()).count();
                warn!(
                    "{left} units could not be unloaded within {} s; they are left",
                    PURGE_DEADLINE.as_secs()
                );
                return;
            }
        }
    }

    /// Notes what is wanted of a unit.
    fn note(&mut self, name: UnitName, instruction: Option<Instruction>) {
        let wanted = self.wanted.get_or_insert_default();
        self.left.remove(&name);
        self.releasing.remove(&name);
        match instruction {
            Some(Instruction::Hold(unit)) => {
                wanted.insert(name.clone(), unit);
            }
            Some(Instruction::Leave) => {
                warn!(UNIT = %name, "the server can't tell what is wanted of {name}; left as it is");
                wanted.remove(&name);
                self.left.insert(name.clone());
            }
            Some(Instruction::Release(number)) => {
                wanted.remove(&name);
                self.releasing.insert(name.clone(), number);
            }
            None => {
                wanted.remove(&name);
            }
        }
        self.note_isolation(&name);
    }

    fn take(&mut self, message: ToAgent) {
        match message {
            ToAgent::Snapshot(instructions) => {
                self.dirty.extend(self.slots.keys().cloned());
                self.dirty.extend(instructions.keys().cloned());
                self.wanted = Some(BTreeMap::new());
                self.left.clear();
                self.releasing.clear();
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
            ToAgent::Request(request) => self.answer(*request),
            // The business of what carries the session.
            ToAgent::Servers(_) => {}
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
        holds.chain(batch).chain(self.progress_at).chain(self.isolation_at()).min()
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

    /// Units that are held until then, or less long, are looked at.
    fn end_holds(&mut self, by: Instant) {
        let (slots, dirty) = (&mut self.slots, &mut self.dirty);
        self.held.retain(|name| match slots.get_mut(name) {
            Some(slot) if slot.hold.is_some_and(|until| until > by) => true,
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
            self.follow_isolation();
            if self.dirty.is_empty() {
                return self.disarm().await;
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
        let (mut start, mut stop, mut arm) = (Vec::new(), Vec::new(), Vec::new());
        self.touched.extend(self.dirty.iter().cloned());
        for name in std::mem::take(&mut self.dirty) {
            self.note_isolation(&name);
            let wanted = self.wanted.as_ref().and_then(|wanted| wanted.get(&name));
            let wanted = self.isolation.still_wanted(&name, wanted);
            let slot = self.slots.entry(name.clone()).or_default();
            if slot.hold.is_some_and(|until| until > now) {
                continue;
            }
            if self.left.contains(&name) && !self.isolation.is_lapsed(&name) {
                if slot.observed.systemd.is_none() {
                    ask.push(name);
                }
                continue;
            }
            let step = logic::next(wanted, &slot.observed);
            if self.isolation.lacks_guard(&name, wanted, &step) {
                arm.push(name);
                continue;
            }
            match step {
                Step::Rest if slot.unnoted && slot.observed.job.is_none() => {
                    let launched = slot.observed.launched;
                    self.mark(name, launched).await;
                }
                Step::Rest => {}
                Step::Ask => ask.push(name),
                Step::Install
                    if self.batch.as_ref().is_some_and(|(jobs, ends)| !jobs.is_empty() && *ends > now) =>
                {
                    self.gathered.insert(name);
                }
                Step::Install => install.extend(wanted.map(|wanted| (name, wanted.file.clone()))),
                Step::Start(hash) => start.push((name, hash)),
                Step::Stop => stop.push(name),
                Step::Adopt(hash) => {
                    info!(UNIT = %name, "{name} runs already as wanted; left as it is");
                    self.mark(name, Some(hash)).await;
                }
                Step::Take | Step::Release => self.mark(name, None).await,
                Step::Remove => remove.push(name),
                Step::Forget => {
                    // What was reported has to be taken back, so the slot goes when that is done.
                    if slot.reported.is_none() {
                        self.slots.remove(&name);
                    }
                }
            }
        }
        if !stop.is_empty() {
            self.stop(stop).await;
        }
        if !arm.is_empty() {
            self.arm(arm).await;
        }
        if !start.is_empty() {
            // One that may run on in isolation now must not be stopped for what its older file said.
            self.disarm().await;
            self.start(start).await;
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
