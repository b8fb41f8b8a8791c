//! Sessions of machines that joined, and of one that was removed at the worst moment.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use fleet_cluster::engine::Policy;
use fleet_cluster::model::{Machine, MachineId};
use fleet_link::ca::MachineKey;
use fleet_link::serve::{Joining, Membership};
use fleet_link::token::Terms;
use fleet_link::{FromAgent, Hello, ServerEnd, ToAgent, local};
use fleet_registry::EmbeddedStore;
use fleetd::server::{Server, ServerConfig};
use std::time::Duration;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
const PEER: &str = "10.0.0.2:40000";

fn machine(number: u32) -> MachineId {
    MachineId::parse(&format!("{number:032x}")).unwrap()
}

#[tokio::test]
async fn a_machine_removed_while_its_session_begins_gets_none() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let config = ServerConfig {
        machine: machine(1),
        agent_ttl: Duration::from_secs(30),
        policy: Policy::for_ttl(Duration::from_secs(30)),
        disable_engine: true,
        shared_registry: false,
        address: None,
    };
    let server = Server::new(store, config, CancellationToken::new());
    let mut tasks = JoinSet::new();
    server.start(&mut tasks);

    let (token, _) = server.create_token(Terms { ttl: DEADLINE, uses: None }).await.unwrap();
    let joining = Joining {
        token: token.id,
        secret: token.secret.clone(),
        machine: machine(2),
        key: MachineKey::generate().unwrap().id(),
        peer: PEER.parse().unwrap(),
    };
    server.join(joining).await.unwrap();
    let session = || {
        let hello = Hello { id: machine(2), machine: Machine::default() };
        let (end, agent) = local(hello);
        let end = ServerEnd { peer: Some(PEER.parse().unwrap()), ..end };
        let server = server.clone();
        (tokio::spawn(async move { server.serve_agent(end).await }), agent)
    };
    // As a member it is told what it has to hold; when it is removed, once more that this is nothing.
    let (served, mut agent) = session();
    let first = timeout(DEADLINE, agent.receive.recv()).await.unwrap();
    assert!(matches!(first, Some(ToAgent::Snapshot(units)) if units.is_empty()));
    agent.send.send(FromAgent::Snapshot(Default::default())).await.unwrap();
    server.remove_machine(&machine(2)).await.unwrap();
    let last = timeout(DEADLINE, agent.receive.recv()).await.unwrap();
    assert!(matches!(last, Some(ToAgent::Snapshot(units)) if units.is_empty()));
    timeout(DEADLINE, served).await.unwrap().unwrap().unwrap();
    assert!(timeout(DEADLINE, agent.receive.recv()).await.unwrap().is_none());
    // As who was admitted and removed before its session began it is told nothing.
    let (served, mut agent) = session();
    assert!(timeout(DEADLINE, agent.receive.recv()).await.unwrap().is_none());
    let error = timeout(DEADLINE, served).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "it was removed from the cluster meanwhile");
    assert!(!server.is_connected(&machine(2)));
}
