//! Sessions on a store that renews what has ended.

use super::*;
use crate::server::ServerConfig;
use crate::server::membership::member_key;
use fleet_cluster::engine::Policy;
use fleet_link::AgentEnd;
use fleet_registry::records::put_leaving;
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

/// An agent that systemd holds up keeps its presence, and hears then what holds by then, also if it wants its reports taken first.
#[tokio::test]
async fn a_busy_agent_is_told_all_at_once_when_it_has_room() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let id = MachineId::parse(&format!("{:032x}", 7)).unwrap();
    let config = ServerConfig {
        machine: id.clone(),
        agent_ttl: TTL,
        policy: Policy::for_ttl(TTL),
        disable_engine: true,
        shared_registry: false,
        address: None,
    };
    let (cancel, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let server = Server::new(store.clone(), config, cancel.clone());
    server.start(&mut tasks);
    let (end, mut agent) = fleet_link::local(Hello { id: id.clone(), machine: Machine::default() });
    let room = end.send.max_capacity();
    let serving = server.clone();
    let session = tokio::spawn(async move { serving.serve_agent(end).await });
    agent.receive.recv().await.unwrap();

    // One change after the other, each of which is told before the next is made.
    let name = |number: usize| UnitName::parse(&format!("unit-{number}.service")).unwrap();
    let leave = async |agent: &AgentEnd, number: usize| {
        let txn = Txn { compares: Vec::new(), ops: vec![put_leaving(&name(number), &id)] };
        let revision = store.commit(txn).await.unwrap();
        server.hub().reached(revision).await;
        let told = beat(agent).await.unwrap().told;
        (revision, told)
    };
    let mut revisions = Vec::new();
    for number in 0..room {
        let (revision, told) = leave(&agent, number).await;
        revisions.push(revision);
        assert!(told, "{number} of {room}");
    }
    for number in room..room + 10 {
        let (revision, told) = leave(&agent, number).await;
        revisions.push(revision);
        assert!(!told, "it would count a renewal without having heard all");
    }
    // More reports than its queue holds are taken while it takes nothing.
    for _ in 0..room * 2 {
        let report = agent.send.send(FromAgent::Changes(BTreeMap::new()));
        tokio::time::timeout(DEADLINE, report).await.unwrap().unwrap();
    }
    let mut heard = BTreeMap::new();
    let mut messages = 0;
    while heard.len() < revisions.len() {
        let message = tokio::time::timeout(DEADLINE, agent.receive.recv()).await.unwrap().unwrap();
        let ToAgent::Changes(changes) = message else { panic!("{message:?}") };
        heard.extend(changes);
        messages += 1;
    }
    assert_eq!(messages, room + 1, "the last ten are told as one");
    for (number, revision) in revisions.into_iter().enumerate() {
        assert_eq!(heard[&name(number)], Some(Instruction::Release(revision)));
    }
    assert_eq!(beat(&agent).await, Some(Held::during(TTL)));

    // What brings the answer to another machine's agent can't say that: there it waits for all that was to be told.
    drop(agent);
    session.await.unwrap().unwrap();
    let (mut end, mut agent) = fleet_link::local(Hello { id: id.clone(), machine: Machine::default() });
    end.peer = Some(([127, 0, 0, 1], 1).into());
    let member = Op::put(member_key(&id), "{}");
    store.commit(Txn { compares: Vec::new(), ops: vec![member] }).await.unwrap();
    let serving = server.clone();
    let session = tokio::spawn(async move { serving.serve_agent(end).await });
    agent.receive.recv().await.unwrap();
    for number in 1000..1000 + room {
        assert!(leave(&agent, number).await.1);
    }
    let txn = Txn { compares: Vec::new(), ops: vec![put_leaving(&name(2000), &id)] };
    server.hub().reached(store.commit(txn).await.unwrap()).await;
    let (held, mut answer) = oneshot::channel();
    agent.beats.send(Beat { leaving: false, held }).await.unwrap();
    let given = tokio::time::timeout(Duration::from_millis(200), &mut answer).await;
    assert!(given.is_err(), "it would count a renewal without having heard all");
    agent.receive.recv().await.unwrap();
    let answered = tokio::time::timeout(DEADLINE, answer).await.unwrap().unwrap();
    let mut last = None;
    while let Ok(ToAgent::Changes(changes)) = agent.receive.try_recv() {
        last = Some(changes);
    }
    assert!(last.unwrap().contains_key(&name(2000)), "it is there before the answer");
    assert_eq!(answered, Held::during(TTL));

    cancel.cancel();
    session.await.unwrap().unwrap();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
    store.close().await;
}
