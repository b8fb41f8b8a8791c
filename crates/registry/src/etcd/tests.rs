//! Tests of the store in etcd, on real etcds of their own.
use super::*;
use crate::conformance;
use fleet_testbed::{Etcd, EtcdOptions};
use serde_json::json;
use std::sync::atomic::{AtomicUsize, Ordering};

mod faults;
mod refusals;
mod registry;

fn config(etcd: &Etcd) -> EtcdConfig {
    EtcdConfig {
        endpoints: etcd.endpoints(),
        // A machine that is busy with other tests is no outage.
        request_timeout: Duration::from_secs(10),
        ..EtcdConfig::default()
    }
}

async fn connect(etcd: &Etcd) -> EtcdStore {
    EtcdStore::connect(config(etcd), None).await.unwrap()
}

/// Stores on one etcd that don't see each other.
struct Fresh<'a> {
    etcd: &'a Etcd,
    made: AtomicUsize,
}

impl Fresh<'_> {
    async fn store(&self) -> EtcdStore {
        let prefix = format!("/test/{}/", self.made.fetch_add(1, Ordering::Relaxed));
        EtcdStore::connect(EtcdConfig { prefix, ..config(self.etcd) }, None).await.unwrap()
    }
}

async fn put(store: &EtcdStore, key: &str, value: &str) -> Result<Revision, StoreError> {
    store.commit(Txn::of(Op::put(key, value))).await
}

async fn text(store: &EtcdStore, key: &str) -> Option<String> {
    let entry = store.get(key).await.unwrap()?;
    Some(String::from_utf8(entry.value.to_vec()).unwrap())
}

fn base64(text: &str) -> String {
    data_encoding::BASE64.encode(text.as_bytes())
}

/// Writes a key as somebody else does.
fn put_by_hand(etcd: &Etcd, key: &str, value: &str) {
    etcd.api(0, "kv/put", &json!({"key": base64(key), "value": base64(value)}), None).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract_with_one_member() {
    let etcd = Etcd::start(1).unwrap();
    let fresh = Fresh { etcd: &etcd, made: AtomicUsize::new(0) };
    conformance::all(async || fresh.store().await).await;
    let compact = async |store: &EtcdStore| store.compact(store.seen()).await.unwrap();
    conformance::compaction(fresh.store().await, compact).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keeps_the_contract_with_three_members() {
    let etcd = Etcd::start(3).unwrap();
    let fresh = Fresh { etcd: &etcd, made: AtomicUsize::new(0) };
    conformance::all(async || fresh.store().await).await;
    let compact = async |store: &EtcdStore| store.compact(store.seen()).await.unwrap();
    conformance::compaction(fresh.store().await, compact).await;
}

/// Lists far larger than one answer may be are whole, and of one revision.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_what_is_larger_than_an_answer() {
    let etcd = Etcd::start(1).unwrap();
    let store = connect(&etcd).await;
    let value = vec![b'u'; 2000];
    for part in 0..100 {
        let ops = (0..100).map(|n| Op::put(format!("unit/{part:02}{n:02}"), value.clone())).collect();
        store.commit(Txn { ops, ..Txn::default() }).await.unwrap();
    }
    // Written while it is listed, again and again.
    let both = Txn::of(Op::put("unit/0000", "new")).then(Op::put("unit/9999", "new"));
    store.commit(both.clone()).await.unwrap();
    let writer = store.clone();
    let writing = tokio::spawn(async move {
        loop {
            writer.commit(both.clone()).await.unwrap();
        }
    });
    for _ in 0..5 {
        let units = store.range("unit/").await.unwrap();
        assert_eq!(units.entries.len(), 10_000);
        assert!(units.entries.is_sorted_by(|a, b| a.key < b.key));
        assert!(units.entries.iter().all(|e| e.revision <= units.revision));
        let (first, last) = (&units.entries[0], &units.entries[9_999]);
        assert_eq!(first.revision, last.revision);
    }
    writing.abort();
    // A page of such entries is more than the client takes at once.
    for n in 0..20 {
        let large = vec![b'l'; MAX_BYTES - MAX_KEY];
        store.commit(Txn::of(Op::put(format!("large/{n:02}"), large))).await.unwrap();
    }
    let large = store.range("large/").await.unwrap();
    assert_eq!(large.entries.len(), 20);
    assert!(large.entries.iter().all(|e| e.value.len() == MAX_BYTES - MAX_KEY));
    // They come through a watch as well, in fragments or not.
    let mut watch = store.watch("large/", large.entries[0].revision - 1).await.unwrap();
    for entry in &large.entries {
        let batch = watch.next().await.unwrap();
        assert_eq!((batch.revision, &batch.events[0].entry), (entry.revision, &Some(entry.clone())));
    }
}

/// One transaction near the limit arrives as one batch, though etcd sends it in fragments with what came after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn never_splits_a_revision() {
    let etcd = Etcd::start(1).unwrap();
    let store = connect(&etcd).await;
    let start = put(&store, "start", "").await.unwrap();
    let mut revisions = Vec::new();
    for n in 0..6 {
        let value = vec![b'0' + n; MAX_BYTES / MAX_OPS - 20];
        let ops = (0..MAX_OPS).map(|k| Op::put(format!("k{k:03}"), value.clone())).collect();
        revisions.push(store.commit(Txn { ops, ..Txn::default() }).await.unwrap());
    }
    let mut watch = store.watch("k", start).await.unwrap();
    for revision in revisions {
        let batch = watch.next().await.unwrap();
        assert_eq!((batch.revision, batch.events.len()), (revision, MAX_OPS));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compacts_what_is_older_than_the_retention() {
    let etcd = Etcd::start(1).unwrap();
    let store = connect(&etcd).await;
    let first = put(&store, "k", "1").await.unwrap();
    put(&store, "k", "2").await.unwrap();
    let compacting = store.clone();
    let compacting = tokio::spawn(async move { compacting.keep_compacted(Duration::from_millis(50)).await });
    loop {
        put(&store, "k", "more").await.unwrap();
        let mut watch = store.watch("k", first).await.unwrap();
        match watch.next().await {
            Ok(_) => {}
            Err(StoreError::Compacted { asked, oldest }) => {
                assert_eq!(asked, first);
                assert!(oldest > first);
                break;
            }
            Err(error) => panic!("{error}"),
        }
    }
    compacting.abort();
    // Again is no error, and the newest is never lost.
    store.compact(first).await.unwrap();
    assert_eq!(text(&store, "k").await.as_deref(), Some("more"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tells_how_the_members_are() {
    let mut etcd = Etcd::start(3).unwrap();
    let store = connect(&etcd).await;
    let revision = put(&store, "k", "").await.unwrap();
    let health = store.health().await;
    assert_eq!(
        health.iter().map(|e| &e.endpoint).collect::<Vec<_>>(),
        etcd.endpoints().iter().collect::<Vec<_>>()
    );
    assert_eq!(health.iter().filter(|e| e.in_use).count(), 1);
    let members: Vec<_> = health.iter().map(|e| e.member.clone().unwrap()).collect();
    assert_eq!(members.iter().filter(|m| m.leads).count(), 1);
    assert!(members.iter().any(|m| m.revision >= revision));
    for member in &members {
        assert!(
            member.version.starts_with("3.") && member.has_leader && member.problems.is_empty(),
            "{member:?}"
        );
        assert!(member.raft_term > 0 && member.raft_index > 0 && member.database.0 >= member.database.1);
    }
    etcd.kill(1).unwrap();
    let health = store.health().await;
    assert!(health[1].member.as_ref().unwrap_err().contains("connection refused"), "{health:?}");
    assert!(health[0].member.is_ok() && health[2].member.is_ok());
    // The last one is asked until it has noticed that it is alone.
    etcd.kill(2).unwrap();
    while store.health().await[0].member.as_ref().unwrap().has_leader {}
}
