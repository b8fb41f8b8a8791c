//! For tests: an embedded store with a gate in front of its transactions.

use fleet_cluster::model::Revision;
use fleet_registry::store::Health;
use fleet_registry::{EmbeddedStore, Entry, LeaseId, Snapshot, Store, StoreError, Txn};
use std::sync::Arc;
use std::time::Duration;

/// What lets a transaction through, or says what becomes of it.
type Gate = dyn Fn(&Txn) -> Result<(), StoreError> + Send + Sync;

/// The store behind its gate.
#[derive(Clone)]
pub(super) struct Gated {
    store: EmbeddedStore,
    gate: Arc<Gate>,
}

impl Gated {
    pub(super) fn new(
        store: EmbeddedStore,
        gate: impl Fn(&Txn) -> Result<(), StoreError> + Send + Sync + 'static,
    ) -> Self {
        Gated { store, gate: Arc::new(gate) }
    }

    pub(super) async fn close(&self) {
        self.store.close().await;
    }
}

impl Store for Gated {
    type Watch = <EmbeddedStore as Store>::Watch;

    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        (self.gate)(&txn)?;
        self.store.commit(txn).await
    }

    async fn range(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        self.store.range(prefix).await
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.grant(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke(lease).await
    }

    async fn health(&self) -> Vec<Health> {
        self.store.health().await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Self::Watch, StoreError> {
        self.store.watch(prefix, after).await
    }
}
