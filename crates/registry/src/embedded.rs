//! The store in one file under /var/lib/fleet.
//!
//! # What is in the directory
//!
//! | file | holds |
//! |---|---|
//! | `registry.redb` | the registry: a redb database with a checksum on every record |
//! | `registry.made` | the marker that there is a registry, so that a lost file is never taken for a new, empty registry; it also carries the lock that keeps a second fleetd out |
//! | `registry.backup` | all durable records as text, as of the last start, stop, or hour with changes |
//! | `registry.redb.damaged-N` | what a repair put aside |
//!
//! # How it works
//!
//! All entries are in memory, and reads come from there. Writes go through one [`writer`] that
//! takes all that wait, checks their conditions one after the other, writes them in one transaction of
//! the database, syncs, and only then shows them to readers and watchers and answers. Keys under leases
//! are never on disk; they end with the process, and the agents bring them back. They take revisions
//! from the same counter, so revisions are reserved on disk in blocks, and a restart goes on behind the
//! block: revisions never go back.
//!
//! When the disk fails, reads, leases and keys under leases go on, and durable writes are answered with
//! [`StoreError::Unavailable`] (or [`StoreError::Unknown`] where that is the truth) until the file has
//! been brought back to what is in memory, which is tried with later writes.
//!
//! - `memory`: the state and how transactions change it, without I/O
//! - `writer`: batches and their answers
//! - `disk`, `record`, `backend`: the file
//! - `backup`, `repair`: for bad days
mod backend;
mod backup;
mod disk;
mod error;
mod memory;
mod record;
mod repair;
mod writer;

#[cfg(test)]
mod tests;

use crate::store::*;
use backend::Health;
use disk::Disk;
use memory::{Memory, Prepared, Step};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Semaphore, oneshot, watch},
    time::Instant,
};
use writer::{BLOCK, Job, Published, Shared};

pub(crate) use disk::new_cluster_id;
pub use error::OpenError;
pub use repair::{RepairReport, Report, check, repair};

/// How much may wait to be written, KiB. More waits outside the queue.
const QUEUE_KIB: u32 = 32 << 10;
/// How long a failing disk is left alone between attempts.
const RETRY: Duration = Duration::from_secs(1);

/// The embedded store. See [`Store`] for what it guarantees.
#[derive(Clone)]
pub struct EmbeddedStore(Arc<Handle>);

/// What ends with the last clone.
struct Handle {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    next_lease: AtomicI64,
    cluster: String,
    keeper: tokio::task::JoinHandle<()>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.keeper.abort();
        self.shared.shut("the registry is closed");
    }
}

impl EmbeddedStore {
    /// Opens (or, in a directory that never had one, makes) the store `registry.redb` in `directory`.
    /// Blocking. Has to be called inside a tokio runtime (leases run on its clock).
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        Self::open_with(directory, Arc::default(), RETRY)
    }

    fn open_with(directory: &Path, health: Arc<Health>, retry: Duration) -> Result<Self, OpenError> {
        let (mut disk, records) = Disk::open(directory, health)?;
        let start = disk.meta.ceiling;
        disk.write(&[], Some(start + BLOCK)).map_err(|e| {
            OpenError::io("write", directory.join(disk::FILE))(std::io::Error::other(e.reason))
        })?;
        let cluster = disk.meta.cluster.clone();
        let shared = Arc::new(Shared::new(disk, Memory::new(start, records), retry));
        let backup = shared.clone();
        tokio::task::spawn_blocking(move || backup.back_up());
        let keeper = tokio::spawn(keep_leases(shared.clone()));
        // Each opening starts in another block, so no two openings give the same ID.
        let next_lease = AtomicI64::new(((start / BLOCK + 1) << 32) as i64);
        let room = Arc::new(Semaphore::new(QUEUE_KIB as usize));
        Ok(EmbeddedStore(Arc::new(Handle { shared, room, next_lease, cluster, keeper })))
    }

    /// What tells this registry from others: made with it, and kept for ever.
    pub fn cluster(&self) -> &str {
        &self.0.cluster
    }

    /// Writes out what is under way and closes the file; later calls answer `Unavailable`. Without it
    /// the file is closed when the last clone and watch are gone; nothing acknowledged is lost either.
    pub async fn close(&self) {
        let (reply, done) = oneshot::channel();
        if self.0.shared.push(Job::Close(reply)).is_ok() {
            // An error means that it was closed meanwhile.
            let _ = done.await;
        }
        self.0.keeper.abort();
    }

    async fn ask<T>(&self, job: impl FnOnce(writer::Reply<T>) -> Job) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        self.0.shared.push(job(reply))?;
        answer.await.unwrap_or_else(|_| Err(lost()))
    }
}

/// Whether an embedded registry was made in a directory.
pub fn exists(directory: &Path) -> bool {
    directory.join(disk::MARKER).exists() || directory.join(disk::FILE).exists()
}

fn lost() -> StoreError {
    StoreError::Unknown("the registry's writer ended without an answer".into())
}

/// Ends leases when their time is over. Sleeps until the next one can, or for good when there is none.
async fn keep_leases(shared: Arc<Shared>) {
    loop {
        // Registered before looking, so that a lease granted meanwhile is not missed.
        let granted = shared.granted.notified();
        tokio::pin!(granted);
        granted.as_mut().enable();
        let next = shared.memory().next_expiry();
        match next {
            None => granted.await,
            Some(at) if at > Instant::now() => {
                let _ = tokio::time::timeout_at(at, granted).await;
            }
            Some(_) => {
                let (reply, done) = oneshot::channel();
                if shared.push(Job::Expire(reply)).is_err() {
                    return;
                }
                if !matches!(done.await, Ok(Ok(()))) {
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

impl Store for EmbeddedStore {
    type Watch = EmbeddedWatch;

    async fn range(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        self.0.shared.check_open()?;
        Ok(self.0.shared.memory().range(prefix))
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.0.shared.check_open()?;
        Ok(self.0.shared.memory().get(key))
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        let txn = Prepared::new(txn)?;
        let kib = (txn.bytes / 1024 + 1) as u32;
        let room = self.0.room.clone().acquire_many_owned(kib).await;
        let permit = room.map_err(|_| lost())?;
        self.ask(|reply| Job::Commit(txn, permit, reply)).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.0.shared.check_open()?;
        let id = LeaseId(self.0.next_lease.fetch_add(1, Ordering::Relaxed));
        self.0.shared.memory_mut().grant(id, ttl, Instant::now());
        self.0.shared.granted.notify_one();
        Ok(id)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.0.shared.check_open()?;
        self.0.shared.memory_mut().keep_alive(lease, Instant::now())
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.ask(|reply| Job::Revoke(lease, reply)).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<EmbeddedWatch, StoreError> {
        self.0.shared.check_open()?;
        let published = self.0.shared.published.subscribe();
        self.0.shared.memory().check_watch(after)?;
        Ok(EmbeddedWatch { shared: self.0.shared.clone(), prefix: prefix.into(), after, published })
    }
}

/// The watch of an [`EmbeddedStore`]: a position in the changes all watches share.
pub struct EmbeddedWatch {
    shared: Arc<Shared>,
    prefix: Box<str>,
    /// All changes up to this revision have been given.
    after: Revision,
    published: watch::Receiver<Published>,
}

impl Watch for EmbeddedWatch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        loop {
            // Marked as seen before looking, so that a change published meanwhile wakes.
            if *self.published.borrow_and_update() == Published::Closed {
                return Err(StoreError::Unavailable("the registry is closed".into()));
            }
            let step = self.shared.memory().step(&self.prefix, self.after)?;
            match step {
                Step::Batch(batch) => {
                    self.after = batch.revision;
                    return Ok(batch);
                }
                Step::Passed(revision) => self.after = revision,
                Step::AtEnd => {
                    if self.published.changed().await.is_err() {
                        return Err(StoreError::Unavailable("the registry is closed".into()));
                    }
                }
            }
        }
    }
}
