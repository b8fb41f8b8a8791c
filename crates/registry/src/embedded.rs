//! The store in one file under /var/lib/fleet.
use crate::store::*;
use std::{path::Path, time::Duration};

/// The embedded store. See [`Store`] for what it guarantees.
#[derive(Clone)]
pub struct EmbeddedStore {}

/// Why the store can't be opened; Display says what to do.
#[derive(Debug, thiserror::Error)]
#[error("todo")]
pub struct OpenError;

impl EmbeddedStore {
    /// Opens (or, in a directory that never had one, makes) the store `registry.redb` in `directory`.
    /// Blocking. Has to be called inside a tokio runtime (leases run on its clock).
    pub fn open(_directory: &Path) -> Result<Self, OpenError> {
        todo!()
    }
    /// Writes out what is under way and closes the file; later calls answer `Unavailable`.
    pub async fn close(&self) {
        todo!()
    }
}
/// The watch of an [`EmbeddedStore`].
pub struct EmbeddedWatch {}
impl Watch for EmbeddedWatch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        todo!()
    }
}
impl Store for EmbeddedStore {
    type Watch = EmbeddedWatch;
    async fn range(&self, _prefix: &str) -> Result<Snapshot, StoreError> {
        todo!()
    }
    async fn get(&self, _key: &str) -> Result<Option<Entry>, StoreError> {
        todo!()
    }
    async fn commit(&self, _txn: Txn) -> Result<Revision, StoreError> {
        todo!()
    }
    async fn grant(&self, _ttl: Duration) -> Result<LeaseId, StoreError> {
        todo!()
    }
    async fn keep_alive(&self, _lease: LeaseId) -> Result<(), StoreError> {
        todo!()
    }
    async fn revoke(&self, _lease: LeaseId) -> Result<(), StoreError> {
        todo!()
    }
    async fn watch(&self, _prefix: &str, _after: Revision) -> Result<EmbeddedWatch, StoreError> {
        todo!()
    }
}
