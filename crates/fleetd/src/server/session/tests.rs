//! Sessions on a store that renews what has ended.

use super::*;
use crate::server::ServerConfig;
use fleet_cluster::engine::Policy;
use fleet_link::AgentEnd;
use fleet_registry::{EmbeddedStore, Entry, Snapshot, Watch, WatchBatch};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

/// Nobody could wait for it.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// Far longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// A store that is reached through a member which led before its machine was suspended, and does not know better: it renews every lease. What changes
/// is told when it is up to date.
#[derive(Clone)]
struct Deposed {
    store: EmbeddedStore,
    granted: Arc<Mutex<Vec<LeaseId>>>,
    renewals: Arc<AtomicUsize>,
    is_current: Arc<watch::Sender<bool>>,
}

struct LateWatch {
    watch: <EmbeddedStore as Store>::Watch,
    is_current: watch::Receiver<bool>,
    next: Option<WatchBatch>,
}

impl Watch for LateWatch {
    async fn next(&mut self) -> Result<WatchBatch, StoreError> {
        if self.next.is_none() {
            self.next = Some(self.watch.next().await?);
        }
        self.is_current.wait_for(|is_current| *is_current).await.unwrap();
        Ok(self.next.take().unwrap())
    }
}

impl Store for Deposed {
    type Watch = LateWatch;

    async fn range(&self, prefix: &str) -> Result<Snapshot, StoreError> {
        self.store.range(prefix).await
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        self.store.get(key).await
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        self.store.commit(txn).await
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let lease = self.store.grant(ttl).await?;
        if ttl == TTL {
            self.granted.lock().unwrap().push(lease);
        }
        Ok(lease)
    }

    async fn keep_alive(&self, _: LeaseId) -> Result<(), StoreError> {
        self.renewals.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), StoreError> {
        self.store.revoke(lease).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<LateWatch, StoreError> {
        let watch = self.store.watch(prefix, after).await?;
        Ok(LateWatch { watch, is_current: self.is_current.subscribe(), next: None })
    }
}

/// A sign of life, and how it is answered.
async fn beat(agent: &AgentEnd) -> Option<Held> {
    let (held, answer) = oneshot::channel();
    agent.beats.send(Beat { leaving: false, held }).await.unwrap();
    tokio::time::timeout(DEADLINE, answer).await.unwrap().ok()
}

#[tokio::test]
async fn after_a_suspension_a_renewal_is_no_proof_of_presence() {
    let directory = tempfile::tempdir().unwrap();
    let embedded = EmbeddedStore::open(directory.path()).unwrap();
    let store = Deposed {
        store: embedded.clone(),
        granted: Arc::default(),
        renewals: Arc::default(),
        is_current: Arc::new(watch::Sender::new(true)),
    };
    let id = |number: u8| MachineId::parse(&format!("{number:032x}")).unwrap();
    let config = ServerConfig {
        machine: id(1),
        agent_ttl: TTL,
        policy: Policy::for_ttl(TTL),
        disable_engine: true,
        shared_registry: false,
        address: None,
    };
    let (cancel, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let suspended = Arc::new(AtomicU64::new(1000));
    let read = suspended.clone();
    let server = Server::new(store.clone(), config, cancel.clone())
        .with_suspended(move || Duration::from_secs(read.load(Ordering::Relaxed)));
    server.start(&mut tasks);
    let (end, mut agent) = fleet_link::local(Hello { id: id(7), machine: Machine::default() });
    let serving = server.clone();
    let session = tokio::spawn(async move { serving.serve_agent(end).await });
    agent.receive.recv().await.unwrap();

    assert_eq!(beat(&agent).await, Some(Held::during(TTL)));
    suspended.fetch_add(60, Ordering::Relaxed);
    assert_eq!(beat(&agent).await, Some(Held::during(TTL)));
    assert_eq!(store.renewals.load(Ordering::Relaxed), 2, "a nap is none");

    // While it sleeps another leads, the presence runs out, and its units are placed elsewhere.
    store.is_current.send_replace(false);
    let lease = store.granted.lock().unwrap()[0];
    embedded.revoke(lease).await.unwrap();
    suspended.fetch_add(TTL.as_secs() * 2, Ordering::Relaxed);
    assert_eq!(beat(&agent).await, None, "nobody knows what was decided meanwhile");
    assert_eq!(beat(&agent).await, None);
    // With the change that its presence ended comes what was decided before.
    store.is_current.send_replace(true);
    while beat(&agent).await.is_none() {}
    assert!(embedded.get(&presence_key(&id(7))).await.unwrap().is_some());
    assert_eq!(store.renewals.load(Ordering::Relaxed), 2);
    assert_eq!(beat(&agent).await, Some(Held::during(TTL)));
    assert_eq!(store.renewals.load(Ordering::Relaxed), 3, "then it goes on as usual");

    cancel.cancel();
    session.await.unwrap().unwrap();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    embedded.close().await;
}
