//! The writer: takes what waits, works it out, makes it durable in one go, shows it, answers.
//!
//! There is no thread that waits: whoever adds the first job to the empty queue starts the writer on the
//! runtime's blocking pool, and it ends when the queue is empty. While it syncs one batch the next one
//! gathers, which is the group commit.
use super::{
    backup,
    disk::{Disk, WriteError},
    memory::{Memory, Outcome, Plan, Prepared},
};
use crate::store::*;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, oneshot, watch},
    time::Instant,
};

/// Revisions reserved at once; a restart skips what is left of them.
pub(super) const BLOCK: Revision = 1 << 20;
/// The most transactions written in one go.
const BATCH_JOBS: usize = 1024;
/// The most bytes of keys and values written in one go.
const BATCH_BYTES: usize = 8 << 20;
/// How old a backup may get while there are changes.
const BACKUP_AGE: Duration = Duration::from_secs(3600);

/// Where an answer goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

pub(super) enum Job {
    /// The permit bounds how much waits; it is given back with the answer.
    Commit(Prepared, OwnedSemaphorePermit, Reply<Revision>),
    /// Ends the leases that have run out.
    Expire(Reply<()>),
    Revoke(LeaseId, Reply<()>),
    Close(oneshot::Sender<()>),
}

#[derive(Default)]
pub(super) struct Queue {
    jobs: VecDeque<Job>,
    /// A writer runs, and will see what is added.
    running: bool,
    /// Why nothing is taken any more.
    closed: Option<String>,
}

/// What only the writer touches.
pub(super) struct Written {
    /// `None` after closing.
    disk: Option<Disk>,
    /// The next revision to give. Ahead of what is published where a write failed, since revisions that
    /// may have reached the disk are never given again.
    next: Revision,
    /// The last failure, and when it was.
    failed: Option<(String, Instant)>,
    /// When a backup was last begun.
    backup: Instant,
}

/// All the parts of a store, shared by its handles, watches and the writer.
pub(super) struct Shared {
    memory: RwLock<Memory>,
    queue: Mutex<Queue>,
    written: Mutex<Written>,
    /// Held while a backup is written; whether the last one has been. Never wait for `written` while
    /// holding it: closing takes them the other way round.
    last_backup: Mutex<bool>,
    /// The last published revision; closed with the store.
    pub(super) published: watch::Sender<Published>,
    /// There is a lease that may end before those known to the keeper.
    pub(super) granted: Notify,
    runtime: tokio::runtime::Handle,
    /// How long to leave a failing disk alone between attempts.
    retry: Duration,
}

/// What watches wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Published {
    Revision(Revision),
    Closed,
}

impl Shared {
    pub(super) fn new(disk: Disk, memory: Memory, retry: Duration) -> Self {
        let revision = memory.revision;
        let written = Written { disk: Some(disk), next: revision + 1, failed: None, backup: Instant::now() };
        Shared {
            memory: RwLock::new(memory),
            queue: Mutex::default(),
            written: Mutex::new(written),
            last_backup: Mutex::new(false),
            published: watch::Sender::new(Published::Revision(revision)),
            granted: Notify::new(),
            runtime: tokio::runtime::Handle::current(),
            retry,
        }
    }

    // A panic while one of these is held leaves its value as it was before or after one whole step.
    pub(super) fn memory(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }
    pub(super) fn memory_mut(&self) -> RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the store is closed, if it is.
    pub(super) fn check_open(&self) -> Result<(), StoreError> {
        match &self.queue().closed {
            Some(reason) => Err(StoreError::Unavailable(reason.clone())),
            None => Ok(()),
        }
    }

    /// Adds a job, and starts the writer when none runs.
    pub(super) fn push(self: &Arc<Self>, job: Job) -> Result<(), StoreError> {
        let mut queue = self.queue();
        if let Some(reason) = &queue.closed {
            return Err(StoreError::Unavailable(reason.clone()));
        }
        queue.jobs.push_back(job);
        if !queue.running {
            queue.running = true;
            let shared = self.clone();
            self.runtime.spawn_blocking(move || shared.run());
        }
        Ok(())
    }

    fn run(self: &Arc<Self>) {
        let guard = OnPanic(self);
        loop {
            let jobs = {
                let mut queue = self.queue();
                let jobs = queue.take();
                if jobs.is_empty() {
                    queue.running = false;
                    break;
                }
                jobs
            };
            self.process(jobs);
        }
        std::mem::forget(guard);
    }

    /// No more jobs are taken, those that wait are not carried out, and watches end.
    pub(super) fn shut(&self, reason: &str) {
        let jobs = {
            let mut queue = self.queue();
            queue.closed.get_or_insert_with(|| reason.to_owned());
            queue.running = false;
            std::mem::take(&mut queue.jobs)
        };
        for job in jobs {
            let error = || StoreError::Unavailable(reason.to_owned());
            match job {
                Job::Commit(_, _, reply) => drop(reply.send(Err(error()))),
                Job::Expire(reply) | Job::Revoke(_, reply) => drop(reply.send(Err(error()))),
                Job::Close(reply) => drop(reply.send(())),
            }
        }
        self.published.send_replace(Published::Closed);
    }

    fn process(self: &Arc<Self>, jobs: Vec<Job>) {
        let mut written = self.written();
        let mut commits = Vec::new();
        let mut ends: Vec<(Vec<LeaseId>, Reply<()>)> = Vec::new();
        let mut close = None;
        for job in jobs {
            match job {
                Job::Commit(txn, permit, reply) => commits.push((txn, permit, reply)),
                Job::Expire(reply) => ends.push((self.memory_mut().expire(Instant::now()), reply)),
                Job::Revoke(id, reply) if self.memory_mut().revoke(id) => ends.push((vec![id], reply)),
                Job::Revoke(_, reply) => drop(reply.send(Err(StoreError::LeaseEnded))),
                Job::Close(reply) => close = Some(reply),
            }
        }

        let leases: Vec<LeaseId> = ends.iter().flat_map(|(ids, _)| ids).copied().collect();
        let txns: Vec<&Prepared> = commits.iter().map(|(txn, _, _)| txn).collect();
        let (answers, ended) = self.carry_out(&mut written, &txns, &leases);

        let failed: Vec<(LeaseId, StoreError)> =
            leases.into_iter().zip(ended).filter_map(|(id, r)| r.err().map(|e| (id, e))).collect();
        for (id, _) in &failed {
            self.memory_mut().unmark(*id);
        }
        for (ids, reply) in ends {
            let error = failed.iter().find(|(id, _)| ids.contains(id)).map(|(_, e)| e.clone());
            // Whoever asked may have gone; it is done all the same.
            let _ = reply.send(error.map_or(Ok(()), Err));
        }
        for ((_, permit, reply), answer) in commits.into_iter().zip(answers) {
            drop(permit);
            let _ = reply.send(answer);
        }
        if let Some(reply) = close {
            self.close(&mut written);
            let _ = reply.send(());
        }
    }

    /// Carries a batch out: all of it, or, when the disk fails, what need not go there.
    #[allow(clippy::type_complexity)]
    fn carry_out(
        self: &Arc<Self>,
        written: &mut Written,
        txns: &[&Prepared],
        leases: &[LeaseId],
    ) -> (Vec<Result<Revision, StoreError>>, Vec<Result<(), StoreError>>) {
        let mut refusal = None;
        loop {
            let Some(disk) = &written.disk else {
                let closed = || StoreError::Unavailable("the registry is closed".into());
                return (
                    txns.iter().map(|_| Err(closed())).collect(),
                    leases.iter().map(|_| Err(closed())).collect(),
                );
            };
            // Room for the whole batch, whatever becomes of it
            let room = disk.meta.ceiling.saturating_sub(written.next);
            let needed = (txns.len() + leases.len()) as Revision;
            let (ceiling, raise) = match room {
                r if refusal.is_none() && r < needed => (written.next + needed + BLOCK, true),
                r => (disk.meta.ceiling, refusal.is_none() && r < BLOCK / 2),
            };
            let memory = self.memory();
            let mut plan = Plan::new(&memory, written.next, ceiling, refusal.clone());
            let ended: Vec<_> = leases.iter().map(|id| plan.end_lease(*id)).collect();
            let answers: Vec<_> = txns.iter().map(|txn| plan.commit(txn)).collect();
            let (outcome, next) = plan.finish();
            drop(memory);

            // A block that runs low is filled up along with something else, if possible.
            let raise = raise && (room < needed || !outcome.durable.is_empty());
            if !outcome.durable.is_empty() || raise {
                let ceiling = raise.then_some(ceiling.max(next + BLOCK));
                if let Err(error) = self.write(written, &outcome, ceiling) {
                    // Those revisions may be on disk.
                    written.next = next;
                    refusal = Some(error);
                    continue;
                }
            }
            written.next = next;
            if !outcome.is_empty() {
                let revision = outcome.revision;
                self.memory_mut().publish(outcome);
                self.published.send_replace(Published::Revision(revision));
            }
            self.back_up_if_old(written);
            return (answers, ended);
        }
    }

    /// Makes the durable part of a batch durable, or says whether it may be so all the same.
    fn write(&self, written: &mut Written, batch: &Outcome, ceiling: Option<u64>) -> Result<(), StoreError> {
        let Some(disk) = &mut written.disk else {
            return Err(StoreError::Unavailable("the registry is closed".into()));
        };
        if let Some((reason, at)) = &written.failed
            && at.elapsed() < self.retry
        {
            return Err(StoreError::Unavailable(reason.clone()));
        }
        if !disk.is_open() {
            let truth = self.memory().durable();
            if let Err(reason) = disk.recover(&truth) {
                written.failed = Some((reason.clone(), Instant::now()));
                return Err(StoreError::Unavailable(reason));
            }
        }
        let Err(WriteError { reason, unsure }) = disk.write(&batch.durable, ceiling) else {
            if written.failed.take().is_some() {
                tracing::info!("the registry can be written again");
            }
            return Ok(());
        };
        tracing::error!("writing the registry failed: {reason}");
        // Brought back to what it was before, it is certain that nothing was written.
        let truth = self.memory().durable();
        let recovered = disk.recover(&truth);
        written.failed = Some((reason.clone(), Instant::now()));
        match recovered {
            Err(_) if unsure => Err(StoreError::Unknown(reason)),
            _ => Err(StoreError::Unavailable(reason)),
        }
    }

    /// Begins a backup when the last one is old; nothing is done for it when nothing changes.
    fn back_up_if_old(self: &Arc<Self>, written: &mut Written) {
        if written.backup.elapsed() >= BACKUP_AGE {
            written.backup = Instant::now();
            let shared = self.clone();
            self.runtime.spawn_blocking(move || shared.back_up());
        }
    }

    /// Writes a backup, unless the one there is the same. Blocking.
    pub(super) fn back_up(&self) {
        let (directory, meta) = {
            let written = self.written();
            let Some(disk) = &written.disk else { return };
            (disk.directory().to_owned(), disk.meta.clone())
        };
        let last = self.last_backup.lock().unwrap_or_else(PoisonError::into_inner);
        if *last {
            return;
        }
        let records = self.memory().durable();
        if let Err(e) = backup::write(&directory, &meta, &records) {
            tracing::warn!("the registry's backup was not written: {e}");
        }
    }

    fn close(&self, written: &mut Written) {
        self.shut("the registry is closed");
        let mut last = self.last_backup.lock().unwrap_or_else(PoisonError::into_inner);
        *last = true;
        let Some(disk) = written.disk.take() else { return };
        let records = self.memory().durable();
        if let Err(e) = backup::write(disk.directory(), &disk.meta, &records) {
            tracing::warn!("the registry's backup was not written: {e}");
        }
        disk.close();
    }
}

impl Queue {
    /// The jobs of the next batch. A closing ends a batch.
    fn take(&mut self) -> Vec<Job> {
        let (mut jobs, mut bytes) = (Vec::new(), 0);
        while jobs.len() < BATCH_JOBS && bytes < BATCH_BYTES {
            let Some(job) = self.jobs.pop_front() else { break };
            if let Job::Commit(txn, _, _) = &job {
                bytes += txn.bytes;
            }
            let last = matches!(job, Job::Close(_));
            jobs.push(job);
            if last {
                break;
            }
        }
        jobs
    }
}

/// Closes the store when the writer panics, so that nobody waits for ever.
struct OnPanic<'a>(&'a Shared);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        self.0.shut("the registry's writer failed; restart fleetd");
    }
}
