//! Transactions of an engine that arrive when it has long decided otherwise.

use super::FENCE;
use crate::server::{Server, ServerConfig, gated::Gated, peers::LEADER};
use fleet_cluster::engine::Policy;
use fleet_cluster::model::{DesiredState, Machine, MachineId};
use fleet_link::{AgentEnd, Hello, ToAgent};
use fleet_registry::{EmbeddedStore, Store, StoreError, Txn};
use fleet_unit::{UnitFile, UnitName};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
const TTL: Duration = Duration::from_secs(600);

/// The way to a store on which what an engine writes can be held up. The engine is told that nobody knows what became of it.
#[derive(Default)]
struct Way {
    /// How many of the next transactions are held up.
    next: usize,
    held: Vec<Txn>,
}

impl Way {
    fn hold(&mut self, txn: &Txn) -> Result<(), StoreError> {
        if self.next > 0 && txn.compares.iter().any(|compare| compare.key == LEADER) {
            self.next -= 1;
            self.held.push(txn.clone());
            return Err(StoreError::Unknown("no answer".to_owned()));
        }
        Ok(())
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
    let way = Arc::new(Mutex::new(Way::default()));
    let store = {
        let way = way.clone();
        Gated::new(embedded.clone(), move |txn| way.lock().unwrap().hold(txn))
    };
    let arrives = async |number: usize| {
        let txn = way.lock().unwrap().held[number].clone();
        embedded.commit(txn).await
    };
    let config = ServerConfig {
        machine: MachineId::parse(&"1".repeat(32)).unwrap(),
        agent_ttl: TTL,
        policy: Policy::for_ttl(TTL),
        disable_engine: false,
        shared_registry: true,
        address: None,
    };
    let (cancel, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let server = Server::new(store, config, cancel.clone());
    server.start(&mut tasks);
    let hello = Hello { id: MachineId::parse(&"a".repeat(32)).unwrap(), machine: Machine::default() };
    let (end, mut agent) = fleet_link::local(hello);
    let serving = server.clone();
    let session = tokio::spawn(async move { serving.serve_agent(end).await });
    server.hub().reached(1).await;

    // Neither where the unit goes nor the fence comes through at first; then it is decided and written anew.
    way.lock().unwrap().next = 2;
    let file = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
    let (first, second) = (UnitName::parse("a.service").unwrap(), UnitName::parse("b.service").unwrap());
    server.put_unit(&first, Some(file.clone()), Some(DesiredState::Launched)).await.unwrap();
    told(&mut agent, &first).await;
    // It rests on a unit that has not changed, and this server still leads.
    let late = arrives(0).await;
    assert!(matches!(&late, Err(StoreError::Conflict(conflict)) if conflict.key == FENCE), "{late:?}");
    // A fence that comes after its successor is known from then on, and stops no decision for good.
    arrives(1).await.unwrap();
    server.put_unit(&second, Some(file), Some(DesiredState::Launched)).await.unwrap();
    told(&mut agent, &second).await;

    cancel.cancel();
    session.await.unwrap().unwrap();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    embedded.close().await;
}
