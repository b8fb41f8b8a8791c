//! Waits until views have what they lack.
//!
//! A view stands at revisions of fleet's own keys. An etcd counts its revisions over all that is in it, so where other programs write to it,
//! too, the revision that it is at may be one that no view ever comes to. So nobody waits for that, but for the revision of a record, or for a
//! [barrier](Store::barrier).

use super::Server;
use fleet_registry::{Conflict, Snapshot, Store, StoreError};
use std::time::Duration;

/// The pause before a barrier is tried again.
const RETRY: Duration = Duration::from_secs(5);

impl<S: Store> Server<S> {
    /// Waits until the view has what was in the way of a transaction.
    pub(super) async fn catch_up(&self, conflict: &Conflict) -> Result<(), StoreError> {
        let revision = match conflict.found {
            // It was deleted, and nothing says when.
            0 => self.store.barrier().await?,
            found => found,
        };
        self.hub.reached(revision).await;
        Ok(())
    }

    /// Sees to it that the other servers come to the revision at which this one listed the registry: it tells clients of it, who ask the
    /// others for no less.
    pub(super) async fn share(&self, listed: &Snapshot) {
        let known = |revision| listed.entries.iter().any(|entry| entry.revision == revision);
        if !self.config.shared_registry || known(listed.revision) {
            return;
        }
        while let Err(error) = self.store.barrier().await {
            self.trouble("letting the other servers know how far this one is", &error);
            tokio::time::sleep(RETRY).await;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
