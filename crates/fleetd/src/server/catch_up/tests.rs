//! Servers on an etcd to which another program writes.

use crate::server::{Server, ServerConfig};
use fleet_cluster::{engine::Policy, model::DesiredState, model::MachineId, model::Revision};
use fleet_registry::etcd::{EtcdConfig, EtcdStore};
use fleet_registry::records::unit_key;
use fleet_registry::{Op, Store, StoreError, Txn};
use fleet_testbed::Etcd;
use fleet_unit::{UnitFile, UnitName};
use std::time::Duration;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

/// Far longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(600);

async fn connect(etcd: &Etcd, prefix: &str) -> EtcdStore {
    let config = EtcdConfig {
        endpoints: etcd.endpoints(),
        prefix: prefix.to_owned(),
        request_timeout: Duration::from_secs(10),
        ..EtcdConfig::default()
    };
    EtcdStore::connect(config, None).await.unwrap()
}

fn server(store: &EtcdStore, number: u8) -> Server<EtcdStore> {
    let config = ServerConfig {
        machine: MachineId::parse(&format!("{number:032x}")).unwrap(),
        agent_ttl: TTL,
        policy: Policy::for_ttl(TTL),
        disable_engine: true,
        shared_registry: true,
        address: None,
    };
    Server::new(store.clone(), config, CancellationToken::new())
}

async fn put(store: &EtcdStore, key: &str) -> Revision {
    store.commit(Txn::of(Op::put(key, "{}"))).await.unwrap()
}

/// What was in the way of a write is waited for, and not what the other program has written since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_what_others_write_to_the_same_etcd() {
    let etcd = Etcd::start(1).unwrap();
    let (store, other) = (connect(&etcd, "/fleet/").await, connect(&etcd, "/other/").await);
    let mut tasks = JoinSet::new();
    let one = server(&store, 1);
    one.start(&mut tasks);
    while one.servers().is_empty() {
        tokio::task::yield_now().await;
    }
    let soon = async |what: &str, catching_up| {
        let caught_up: Result<(), StoreError> = timeout(DEADLINE, catching_up).await.expect(what);
        caught_up.unwrap();
    };
    let name = UnitName::parse("a.service").unwrap();
    let file = UnitFile::parse("[Service]\nExecStart=/bin/true\n").unwrap();
    let key = unit_key(&name);
    one.put_unit(&name, Some(file), Some(DesiredState::Inactive)).await.unwrap();
    let conflict = async |expected| {
        let refused = store.commit(Txn::default().when(&*key, expected)).await;
        let Err(StoreError::Conflict(conflict)) = refused else { panic!("{refused:?}") };
        put(&other, "theirs").await;
        conflict
    };
    let written = conflict(0).await;
    soon("a record that was written", one.catch_up(&written)).await;
    assert!(one.hub().view().unit(&name).is_some());
    store.commit(Txn::of(Op::delete(&*key))).await.unwrap();
    let deleted = conflict(written.found).await;
    soon("a record that was deleted", one.catch_up(&deleted)).await;
    assert!(one.hub().view().unit(&name).is_none());

    // What a server tells clients that it knows, the others come to know: here another program wrote last before it listed, and it writes
    // no record of its own.
    let theirs = put(&other, "theirs").await;
    let two = server(&connect(&etcd, "/fleet/").await, 2);
    let following = two.clone();
    tasks.spawn(async move { following.follow().await });
    timeout(DEADLINE, two.hub().reached(theirs)).await.expect("the second server");
    let told = *two.hub().applied().borrow();
    timeout(DEADLINE, one.hub().reached(told)).await.expect("the first server");
    tasks.shutdown().await;
}
