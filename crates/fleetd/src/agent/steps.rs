//! Carrying out steps: jobs, marks, files, states, and what they run into.

use super::*;
use std::task::{Context, Poll, Waker};

/// Of a unit that fleet did not start, or stops.
const UNKNOWN: Hash = Hash([0; 20]);

impl<S: Systemd> Agent<S> {
    /// Starts units. First it is noted that this may have happened: should fleetd end meanwhile, the next one knows.
    pub(super) async fn start(&mut self, units: Vec<(UnitName, Hash)>) {
        let marks: Vec<_> =
            units.iter().map(|(name, hash)| (name.clone(), Some(Mark::Starting(*hash)))).collect();
        let results = self.systemd.mark(&marks).await;
        for ((name, hash), result) in units.into_iter().zip(results) {
            match result {
                Ok(()) => {
                    if let Some(slot) = self.slots.get_mut(&name) {
                        slot.observed.begun = true;
                    }
                    self.begin(name, Job::Start, hash);
                }
                Err(error) => self.fail(&name, error.to_string()),
            }
        }
    }

    /// Stops units. First it is noted that fleet does not know any more whether they run: who finds one of them stopped, and
    /// wanted by then, has to start it.
    pub(super) async fn stop(&mut self, units: Vec<UnitName>) {
        let is_noted =
            |name: &UnitName| self.slots.get(name).is_none_or(|slot| slot.observed.begun && !slot.unnoted);
        let (noted, others): (Vec<_>, Vec<_>) = units.into_iter().partition(is_noted);
        let hash_of = |name: &UnitName| self.slots.get(name).and_then(|slot| slot.observed.launched);
        let starting = |name: UnitName| {
            let mark = Mark::Starting(hash_of(&name).unwrap_or(UNKNOWN));
            (name, Some(mark))
        };
        let marks: Vec<_> = others.into_iter().map(starting).collect();
        let results = self.systemd.mark(&marks).await;
        let (mut stop, mut unnoted, mut later) = (noted, Vec::new(), BTreeSet::new());
        for ((name, _), result) in marks.into_iter().zip(results) {
            match result {
                Ok(()) => stop.push(name),
                Err(_) => unnoted.push((name, None)),
            }
        }
        // Where nothing can be written any more something can be deleted, which says nearly as much.
        let results = self.systemd.mark(&unnoted).await;
        for ((name, _), result) in unnoted.into_iter().zip(results) {
            match result {
                Ok(()) => stop.push(name),
                Err(error) if self.isolation.is_lapsed(&name) => {
                    warn!(UNIT = %name, "{name}: that it is stopped can't be noted: {error}");
                    later.insert(name.clone());
                    stop.push(name);
                }
                Err(error) => self.fail(&name, error.to_string()),
            }
        }
        for name in stop {
            if let Some(slot) = self.slots.get_mut(&name) {
                (slot.observed.launched, slot.observed.begun) = (None, true);
                slot.unnoted = later.contains(&name);
            }
            self.begin(name, Job::Stop, UNKNOWN);
        }
    }

    pub(super) fn begin(&mut self, name: UnitName, job: Job, hash: Hash) {
        self.job_count += 1;
        let number = self.job_count;
        if let Some(slot) = self.slots.get_mut(&name) {
            slot.observed.job = Some(job);
            slot.job = number;
            slot.problem = None;
            if job == Job::Stop {
                // It may be stopped while it starts; as what it was before it must not be reported any more.
                slot.observed.systemd = None;
                self.dirty.insert(name.clone());
            }
        }
        if let (Job::Start, Some((jobs, _))) = (job, &mut self.batch) {
            jobs.insert(number);
        }
        let systemd = self.systemd.clone();
        let mut work = Box::pin(async move {
            let result = match job {
                Job::Start => systemd.start(&name).await,
                Job::Stop => systemd.stop(&name).await,
            };
            (name, number, job, hash, result)
        });
        // Asked for at once: of two tasks the later one, a stop, may come first, and the start that it was meant for after it.
        let asked = work.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        self.jobs.spawn(async move {
            match asked {
                Poll::Ready(done) => done,
                Poll::Pending => work.await,
            }
        });
    }

    pub(super) async fn job_done(&mut self, done: JobEnd) {
        let (name, number, job, hash, result) = done;
        if let Some((jobs, _)) = &mut self.batch
            && jobs.remove(&number)
            && jobs.is_empty()
        {
            self.end_batch();
        }
        let Some(slot) = self.slots.get_mut(&name) else { return };
        if slot.job != number {
            debug!(UNIT = %name, "an older {job:?} of {name} ended: {result:?}");
            return;
        }
        slot.observed.job = None;
        slot.observed.systemd = None;
        self.dirty.insert(name.clone());
        let stopped = job == Job::Stop && matches!(result, Ok(JobResult::Done));
        match (job, result) {
            (_, Err(error)) => return self.fail(&name, error.to_string()),
            (Job::Stop, Ok(JobResult::Failed(word))) => {
                return self.fail(&name, format!("its stop job ended with result '{word}'"));
            }
            (Job::Start, Ok(JobResult::Done)) => info!(UNIT = %name, "started {name}"),
            (Job::Stop, Ok(JobResult::Done)) => info!(UNIT = %name, "stopped {name}"),
            (Job::Start, Ok(JobResult::Canceled)) => {
                self.problem(&name, "its start was cancelled on the machine".to_owned());
            }
            (Job::Start, Ok(JobResult::Failed(word))) => {
                self.problem(&name, format!("its start job ended with result '{word}'"));
            }
            // Somebody started it again meanwhile; the state says what to do.
            (Job::Stop, Ok(JobResult::Canceled)) => {}
        }
        self.succeed(&name);
        if job == Job::Start {
            // Also after a failure: it was started as it was asked to be, and the outcome is reported, not repeated.
            self.mark(name, Some(hash)).await;
        } else if stopped {
            // If it is wanted launched again by now, that takes a new start.
            self.mark(name, None).await;
        }
    }

    pub(super) async fn mark(&mut self, name: UnitName, hash: Option<Hash>) {
        let mark = (name.clone(), hash.map(Mark::Launched));
        match self.systemd.mark(&[mark]).await.into_iter().collect() {
            Ok(()) => {
                if let Some(slot) = self.slots.get_mut(&name) {
                    slot.observed.launched = hash;
                    slot.observed.begun = false;
                    slot.observed.inherited = false;
                    slot.unnoted = false;
                    if hash.is_none() {
                        // What its last start ran into is over with that start.
                        slot.problem = None;
                    }
                }
                self.dirty.insert(name);
            }
            Err(error) => {
                if let (Some(hash), Some(slot)) = (hash, self.slots.get_mut(&name)) {
                    // It was started all the same, and is not to be started again for want of a note.
                    slot.observed.launched = Some(hash);
                    slot.unnoted = true;
                }
                self.fail(&name, error.to_string());
            }
        }
    }

    pub(super) async fn install(&mut self, units: Vec<(UnitName, UnitFile)>) {
        let results = self.systemd.install(&units).await;
        let (mut changed, mut new) = (Vec::new(), Vec::new());
        let names: Vec<_> = units.iter().map(|(name, _)| name.clone()).collect();
        for ((name, file), result) in units.into_iter().zip(results) {
            let Some(slot) = self.slots.get_mut(&name) else { continue };
            match result {
                Ok(()) => {
                    // A unit that systemd may have loaded from an older file has to be read again.
                    let before = slot.observed.text.replace(file.shared_text());
                    let was_unsure = std::mem::take(&mut slot.observed.unsure);
                    if slot.observed.systemd.take().is_some() || before.is_some() || was_unsure {
                        changed.push(name.clone());
                    } else {
                        new.push(name.clone());
                    }
                    self.succeed(&name);
                    self.dirty.insert(name);
                }
                Err(error) => {
                    // It may have been written all the same.
                    slot.observed.unsure = true;
                    self.fail(&name, error.to_string());
                }
            }
        }
        // What was not here before can be in systemd's memory all the same: another unit refers to it, and it is known as it
        // was before somebody took its file away.
        match self.systemd.in_memory(&new).await {
            Ok(known) => {
                new.retain(|name| !known.contains(name));
                changed.extend(known);
            }
            Err(_) => changed.append(&mut new),
        }
        if !changed.is_empty() {
            match self.systemd.reload_if_needed(&changed).await {
                Ok(reloaded) => debug!(reloaded, "{} unit files changed", changed.len()),
                Err(error) => {
                    for name in changed {
                        // Written again at the next attempt, so that the reload is not forgotten.
                        if let Some(slot) = self.slots.get_mut(&name) {
                            slot.observed.unsure = true;
                        }
                        self.fail(&name, error.to_string());
                    }
                }
            }
        }
        self.know_new(new);
        self.tell_timeouts(&names).await;
    }

    /// Takes units that were just written, are not in systemd's memory and are to be started for what they certainly are:
    /// inactive. The start loads them; asking for their states would do so once more.
    fn know_new(&mut self, mut names: Vec<UnitName>) {
        let launched = |wanted: &Wanted| wanted.state == DesiredState::Launched;
        names.retain(|name| self.wanted.as_ref().and_then(|wanted| wanted.get(name)).is_some_and(launched));
        for name in names {
            if let Some(slot) = self.slots.get_mut(&name) {
                let [load, active, sub] = ["loaded", "inactive", "dead"].map(str::to_owned);
                slot.observed.systemd = Some(SystemdState { load, active, sub });
            }
        }
    }

    pub(super) async fn remove(&mut self, names: Vec<UnitName>) {
        let results = self.systemd.remove(&names).await;
        for (name, result) in names.into_iter().zip(results) {
            match result {
                Ok(()) => {
                    info!(UNIT = %name, "removed {name}");
                    if let Some(slot) = self.slots.get_mut(&name) {
                        slot.observed.text = None;
                        slot.problem = None;
                    }
                    self.succeed(&name);
                    self.dirty.insert(name);
                }
                Err(error) => self.fail(&name, error.to_string()),
            }
        }
    }

    pub(super) async fn ask(&mut self, names: &[UnitName]) {
        match self.systemd.states(names).await {
            Ok(states) => {
                for (name, state) in states {
                    if let Some(slot) = self.slots.get_mut(&name) {
                        // Its link was taken away, by hand or with those of another unit.
                        let lost = state.load == "not-found" && slot.observed.text.is_some();
                        slot.observed.systemd =
                            Some(SystemdState { load: state.load, active: state.active, sub: state.sub });
                        slot.seen = slot.observed.systemd.clone();
                        let known = slot.observed.unsure;
                        slot.observed.unsure |= lost;
                        self.dirty.insert(name.clone());
                        if lost && !known {
                            self.fail(&name, "systemd does not find its file any more".to_owned());
                        } else {
                            self.succeed(&name);
                        }
                    }
                }
            }
            Err(error) => {
                for name in names {
                    self.fail(name, error.to_string());
                }
            }
        }
    }

    /// Asks for all states that are not known.
    pub(super) async fn ask_all(&mut self) {
        let now = Instant::now();
        let unknown: Vec<_> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.observed.systemd.is_none() && slot.hold.is_none_or(|until| until <= now))
            .map(|(name, _)| name.clone())
            .collect();
        if !unknown.is_empty() {
            self.ask(&unknown).await;
        }
    }

    /// Something the unit's own start ran into: reported, not tried again.
    pub(super) fn problem(&mut self, name: &UnitName, problem: String) {
        warn!(UNIT = %name, "{name}: {problem}");
        if let Some(slot) = self.slots.get_mut(name) {
            slot.problem = Some(problem);
            self.touched.insert(name.clone());
        }
    }

    /// Something was done: the machine is well again as far as this unit goes.
    pub(super) fn succeed(&mut self, name: &UnitName) {
        if let Some(slot) = self.slots.get_mut(name) {
            slot.trouble = None;
            slot.pause = Duration::ZERO;
            self.touched.insert(name.clone());
        }
    }

    /// Something the machine ran into: reported, and tried again later.
    pub(super) fn fail(&mut self, name: &UnitName, trouble: String) {
        if let Some(slot) = self.slots.get_mut(name) {
            slot.pause = (slot.pause * 2).clamp(RETRY.0, RETRY.1);
            slot.hold = Some(Instant::now() + slot.pause);
            if slot.trouble.as_ref() != Some(&trouble) {
                warn!(UNIT = %name, "{name}: {trouble}; trying again");
            }
            slot.trouble = Some(trouble);
            self.touched.insert(name.clone());
            self.held.insert(name.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet_systemd::memory::{Behaviour, MemorySystemd};

    /// Whichever of the tasks runs first, and none does here before all have been asked.
    #[tokio::test]
    async fn jobs_are_asked_for_in_their_order() {
        let systemd = MemorySystemd::default();
        let name = UnitName::parse("a.service").unwrap();
        let file = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
        systemd.install(&[(name.clone(), file.clone())]).await.pop().unwrap().unwrap();
        systemd.behave(&name, Behaviour::Hangs, Behaviour::Works);
        let mut agent = Agent::new(Arc::new(systemd.clone())).await.unwrap();
        agent.begin(name.clone(), Job::Start, file.hash());
        assert_eq!((systemd.jobs(&name), systemd.active(&name).as_str()), ((1, 0), "activating"));
        agent.begin(name.clone(), Job::Stop, file.hash());
        assert_eq!((systemd.jobs(&name), systemd.active(&name).as_str()), ((1, 1), "inactive"));
        for _ in 0..2 {
            let (_, number, job, _, result) = agent.jobs.join_next().await.unwrap().unwrap();
            let ended =
                if number == 1 { (Job::Start, JobResult::Canceled) } else { (Job::Stop, JobResult::Done) };
            assert_eq!((job, result.unwrap()), ended);
        }
    }
}
