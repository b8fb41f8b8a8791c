//! Transactions of an engine that arrive when it has long decided otherwise.

use super::FENCE;
use crate::server::{Server, ServerConfig, peers::LEADER};
use fleet_cluster::engine::Policy;
use fleet_cluster::model::{DesiredState, Machine, MachineId, Revision};
use fleet_link::{AgentEnd, Hello, ToAgent};
use fleet_registry::store::Health;
use fleet_registry::{EmbeddedStore, Entry, LeaseId, Snapshot, Store, StoreError, Txn};
use fleet_unit::{UnitFile, UnitName};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
const TTL: Duration = Duration::from_secs(600);

/// A store on the way to which what an engine writes can be held up. The engine is told that nobody knows what became of it.
#[derive(Clone)]
struct Slow {
    store: EmbeddedStore,
    way: Arc<Mutex<Way>>,
}

#[derive(Default)]
struct Way {
    /// How many of the next transactions are held up.
    next: usize,
    held: Vec<Txn>,
}

impl Slow {
    /// A transaction that was held up arrives after all.
    async fn arrives(&self, number: usize) -> Result<Revision, StoreError> {
        let txn = self.way.lock().unwrap().held[number].clone();
        self.store.commit(txn).await
    }
}

impl Store for Slow {
    type Watch = <EmbeddedStore as Store>::Watch;

    async fn commit(&self, txn: Txn) -> Result<Revision, StoreError> {
        if txn.compares.iter().any(|compare| compare.key == LEADER) {
            let mut way = self.way.lock().unwrap();
            if way.next > 0 {
                way.next -= 1;
                way.held.push(txn);
                return Err(StoreError::Unknown("no answer".to_owned()));
            }
        }
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

/// Waits until an agent is told of a unit.
async fn told(agent: &mut AgentEnd, unit: &UnitName) {
    loop {
        match timeout(DEADLINE, agent.receive.recv()).await.unwrap().unwrap() {
            ToAgent::Changes(changes) if changes.contains_key(unit) => return,
            _ => {}
        }
    }
}

#[tokio::test]
async fn what_arrives_late_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let embedded = EmbeddedStore::open(directory.path()).unwrap();
    let store = Slow { store: embedded.clone(), way: Arc::default() };
    let config = ServerConfig {
        machine: MachineId::parse(&"1".repeat(32)).unwrap(),
        agent_ttl: TTL,
        policy: Policy::for_ttl(TTL),
        disable_engine: false,
        shared_registry: true,
        address: None,
    };
    let (cancel, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let server = Server::new(store.clone(), config, cancel.clone());
    server.start(&mut tasks);
    let hello = Hello { id: MachineId::parse(&"a".repeat(32)).unwrap(), machine: Machine::default() };
    let (end, mut agent) = fleet_link::local(hello);
    let serving = server.clone();
    let session = tokio::spawn(async move { serving.serve_agent(end).await });
    server.hub().reached(1).await;

    // Neither where the unit goes nor the fence comes through at first; then it is decided and written anew.
    store.way.lock().unwrap().next = 2;
    let file = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
    let (first, second) = (UnitName::parse("a.service").unwrap(), UnitName::parse("b.service").unwrap());
    server.put_unit(&first, Some(file.clone()), Some(DesiredState::Launched)).await.unwrap();
    told(&mut agent, &first).await;
    // It rests on a unit that has not changed, and this server still leads.
    let late = store.arrives(0).await;
    assert!(matches!(&late, Err(StoreError::Conflict(conflict)) if conflict.key == FENCE), "{late:?}");
    // A fence that comes after its successor is known from then on, and stops no decision for good.
    store.arrives(1).await.unwrap();
    server.put_unit(&second, Some(file), Some(DesiredState::Launched)).await.unwrap();
    told(&mut agent, &second).await;

    cancel.cancel();
    session.await.unwrap().unwrap();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    embedded.close().await;
}
