//! Several servers of one process on one registry.

use crate::server::peers::{LEADER, Leader};
use crate::server::{Server, ServerConfig};
use fleet_cluster::model::{DesiredState, Machine, MachineId};
use fleet_link::{Hello, Instruction, ToAgent};
use fleet_registry::{Compare, EmbeddedStore, Op, Store, StoreError, Txn};
use fleet_unit::{UnitFile, UnitName};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

type Tasks = JoinSet<anyhow::Result<()>>;

/// A server on the registry that the others are on, too.
fn server(
    store: &EmbeddedStore,
    number: u8,
    tasks: &mut Tasks,
) -> (Server<EmbeddedStore>, CancellationToken) {
    server_that(store, number, tasks, true)
}

/// One that may lead, or never does.
fn server_that(
    store: &EmbeddedStore,
    number: u8,
    tasks: &mut Tasks,
    may_lead: bool,
) -> (Server<EmbeddedStore>, CancellationToken) {
    let config = ServerConfig {
        machine: MachineId::parse(&format!("{number:032x}")).unwrap(),
        agent_ttl: Duration::from_secs(60),
        policy: fleet_cluster::engine::Policy::for_ttl(Duration::from_secs(60)),
        disable_engine: !may_lead,
        shared_registry: true,
        address: Some(format!("10.0.0.{number}:4919")),
    };
    let cancel = CancellationToken::new();
    let server = Server::new(store.clone(), config, cancel.clone());
    server.start(tasks);
    (server, cancel)
}

/// Who leads, as a server sees it, once it is another term than `not`.
async fn leader(server: &Server<EmbeddedStore>, not: Option<&Leader>) -> Leader {
    let mut leader = server.peers.leader();
    let found = leader.wait_for(|leader| leader.is_some() && leader.as_ref() != not).await.unwrap();
    found.clone().unwrap()
}

#[tokio::test]
async fn one_server_leads_and_another_follows_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let mut tasks = Tasks::new();
    let servers: Vec<_> = (1..=3).map(|number| server(&store, number, &mut tasks)).collect();
    let first = leader(&servers[0].0, None).await;
    for (server, _) in &servers {
        assert_eq!(leader(server, None).await, first, "all see the same leader");
    }
    let leads = |leader: &Leader| servers.iter().position(|(s, _)| s.config.machine == leader.record.server);
    let at = leads(&first).unwrap();
    servers[at].1.cancel();
    let other = &servers[(at + 1) % 3].0;
    let second = leader(other, Some(&first)).await;
    assert_ne!(leads(&second), Some(at));
    assert!(second.term > first.term);
    // All servers that are left know of each other, and soon that the first is gone.
    let mut revisions = other.hub().applied();
    while other.peers.servers().len() != 2 {
        revisions.changed().await.unwrap();
    }
    for (_, cancel) in servers {
        cancel.cancel();
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    store.close().await;
}

#[tokio::test]
async fn a_server_without_engine_never_leads() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let mut tasks = Tasks::new();
    let (without, cancel) = server_that(&store, 1, &mut tasks, false);
    without.hub().reached(1).await;
    let mut revisions = without.hub().applied();
    while without.peers.servers().is_empty() {
        revisions.changed().await.unwrap();
    }
    assert_eq!(without.peers.leader().borrow().clone(), None);
    // Who may lead does so, though the other was there first; and so does the next.
    let mut before = None;
    for number in 2..4 {
        let (next, cancel) = server(&store, number, &mut tasks);
        let elected = leader(&without, before.as_ref()).await;
        assert_eq!(elected.record.server, next.config.machine);
        assert!(next.leads() && !without.leads());
        before = Some(elected);
        cancel.cancel();
        without.peers.leader().wait_for(Option::is_none).await.unwrap();
    }
    cancel.cancel();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    store.close().await;
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_no_instruction() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    store.commit(Txn::of(Op::put("unit/odd.service", "{\"format\":99}"))).await.unwrap();
    let mut tasks = Tasks::new();
    let (server, cancel) = server(&store, 1, &mut tasks);
    server.hub().reached(1).await;
    let hello = Hello { id: MachineId::parse(&"a".repeat(32)).unwrap(), machine: Machine::default() };
    let (server_end, mut agent) = fleet_link::local(hello);
    let session = {
        let server = server.clone();
        tokio::spawn(async move { server.serve_agent(server_end).await })
    };
    let odd = UnitName::parse("odd.service").unwrap();
    let Some(ToAgent::Snapshot(told)) = agent.receive.recv().await else { panic!("no snapshot") };
    assert_eq!(told, [(odd.clone(), Instruction::Leave)].into());
    // It is not written over, but can be taken away; then the machine may do so, too.
    let file = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
    let refused = server.put_unit(&odd, Some(file), Some(DesiredState::Launched)).await.unwrap_err();
    assert!(refused.to_string().contains("can't be read"), "{refused}");
    server.delete_unit(&odd).await.unwrap();
    let Some(ToAgent::Changes(told)) = agent.receive.recv().await else { panic!("no change") };
    assert_eq!(told, [(odd, None)].into());
    cancel.cancel();
    session.await.unwrap().unwrap();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    store.close().await;
}

/// What is known of it is old: a Global unit that does not fit any more by that may fit all the same.
#[tokio::test]
async fn a_global_unit_is_not_withdrawn_for_what_an_older_record_said() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let mut tasks = Tasks::new();
    let (server, cancel) = server(&store, 1, &mut tasks);
    server.hub().reached(1).await;
    let [a, b] = ["a.service", "b.service"].map(|name| UnitName::parse(name).unwrap());
    let global = |more: &str| {
        UnitFile::parse(&format!("[Service]\nExecStart=/bin/true\n[X-Fleet]\nGlobal=true\n{more}")).unwrap()
    };
    let launched = Some(DesiredState::Launched);
    server.put_unit(&b, Some(global("Conflicts=a.service\n")), launched).await.unwrap();
    let record = store.range("unit/b.service").await.unwrap().entries[0].value.to_vec();
    let mut sessions = JoinSet::new();
    let mut connect = || {
        let hello = Hello { id: MachineId::parse(&"a".repeat(32)).unwrap(), machine: Machine::default() };
        let (server_end, agent) = fleet_link::local(hello);
        let server = server.clone();
        sessions.spawn(async move { server.serve_agent(server_end).await });
        agent
    };
    let mut agent = connect();
    let Some(ToAgent::Snapshot(told)) = agent.receive.recv().await else { panic!("no snapshot") };
    assert!(matches!(told[&b], Instruction::Hold(_)), "{told:?}");
    store.commit(Txn::of(Op::put("unit/b.service", "{\"format\":99}"))).await.unwrap();
    let Some(ToAgent::Changes(told)) = agent.receive.recv().await else { panic!("no change") };
    assert_eq!(told, [(b.clone(), Some(Instruction::Leave))].into());
    server.put_unit(&a, Some(global("")), launched).await.unwrap();
    let Some(ToAgent::Changes(told)) = agent.receive.recv().await else { panic!("no change") };
    assert!(matches!(told[&a], Some(Instruction::Hold(_))), "{told:?}");
    assert_eq!(told.len(), 1, "{told:?}");
    // Who asks anew hears the same.
    drop(agent);
    let mut agent = connect();
    let Some(ToAgent::Snapshot(told)) = agent.receive.recv().await else { panic!("no snapshot") };
    assert_eq!((told.len(), &told[&b]), (2, &Instruction::Leave));
    // It can be read again, and conflicts indeed.
    store.commit(Txn::of(Op::put("unit/b.service", record))).await.unwrap();
    let Some(ToAgent::Changes(told)) = agent.receive.recv().await else { panic!("no change") };
    assert_eq!(told, [(b, None)].into());
    cancel.cancel();
    while let Some(ended) = sessions.join_next().await {
        ended.unwrap().unwrap();
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    store.close().await;
}

#[tokio::test]
async fn a_leader_that_was_replaced_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let mut tasks = Tasks::new();
    let (first, cancel) = server(&store, 1, &mut tasks);
    let term = leader(&first, None).await.term;
    // Somebody else takes over behind its back.
    let revision = store.commit(Txn::of(Op::put(LEADER, "{}"))).await.unwrap();
    assert!(revision > term);
    let guarded = Txn {
        compares: vec![Compare { key: LEADER.to_owned(), revision: term }],
        ops: vec![Op::put("schedule/x.service", "{}")],
    };
    assert!(matches!(store.commit(guarded).await, Err(StoreError::Conflict(_))));
    // What it is asked to decide from now on stays undecided.
    let name = UnitName::parse("a.service").unwrap();
    let file = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
    first.put_unit(&name, Some(file), Some(DesiredState::Launched)).await.unwrap();
    // Its engine ends; when the key is free it is elected anew, and decides.
    store.commit(Txn::of(Op::delete(LEADER))).await.unwrap();
    let again = leader(&first, None).await;
    assert!(again.term > revision);
    cancel.cancel();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    store.close().await;
}
