//! That it is still the same registry, and none of something else.
use super::*;

/// Waits for what a store says once it has looked again.
async fn settled(store: &EtcdStore) -> Result<(), StoreError> {
    let mut contact = store.contact();
    let settled = |contact: &Contact| match contact {
        Contact::Lost { error, .. } => !matches!(error, StoreError::Unavailable(_)),
        Contact::Held(_) => true,
        Contact::Trying => false,
    };
    let settled = contact.wait_for(settled).await.unwrap().clone();
    match settled {
        Contact::Lost { error, .. } => Err(error),
        _ => Ok(()),
    }
}

async fn gone(store: &EtcdStore) {
    store.contact().wait_for(|contact| matches!(contact, Contact::Lost { .. })).await.unwrap();
}

fn damaged<T: std::fmt::Debug>(answer: Result<T, StoreError>, word: &str) {
    let Err(StoreError::Damaged(message)) = answer else { panic!("{answer:?}") };
    assert!(message.contains(word) && message.contains("fleetctl registry accept"), "{message}");
}

/// An etcd that lost its data is not taken for an empty registry, while running and after a restart, until
/// somebody says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_etcd_is_refused_until_it_is_accepted() {
    let mut etcd = Etcd::start(1).unwrap();
    let store = connect(&etcd).await;
    let revision = put(&store, "unit/a.service", "a").await.unwrap();
    let mut watch = store.watch("", revision).await.unwrap();
    let before = store.identity().unwrap();
    assert!(before.revision >= revision);
    for new_id in [true, false] {
        etcd.wipe(new_id).unwrap();
        gone(&store).await;
        etcd.boot_all().unwrap();
        damaged(settled(&store).await, "no registry at /_coreos.com/fleet/ any more");
        damaged(store.range("").await, "no registry");
        damaged(store.commit(Txn::of(Op::put("k", ""))).await, "no registry");
        damaged(store.keep_alive(LeaseId(7)).await, "no registry");
    }
    damaged(watch.next().await, "no registry");
    // What can't be looked at can't be accepted, and is not accepted later.
    etcd.kill_all().unwrap();
    let lost = |c: &Contact| matches!(c, Contact::Lost { error: StoreError::Unavailable(_), .. });
    store.contact().wait_for(lost).await.unwrap();
    let impatient = EtcdConfig { request_timeout: Duration::from_millis(200), ..config(&etcd) };
    let impatient = EtcdStore::new(impatient, Some(before.clone())).unwrap();
    let answer = impatient.accept().await;
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
    etcd.boot_all().unwrap();
    damaged(settled(&impatient).await, "no registry");
    damaged(settled(&store).await, "no registry");
    // A server that is started now, and remembers
    let kept = serde_json::to_string(&before).unwrap();
    let kept: Identity = serde_json::from_str(&kept).unwrap();
    damaged(EtcdStore::connect(config(&etcd), Some(kept)).await.map(drop), "no registry");
    // Nothing was made meanwhile
    let all = json!({"key": base64("/"), "range_end": base64("0"), "count_only": true});
    assert_eq!(etcd.api(0, "kv/range", &all, None).unwrap()["count"], serde_json::Value::Null);

    let after = store.accept().await.unwrap();
    assert_ne!(after.registry, before.registry);
    let snapshot = store.range("").await.unwrap();
    assert_eq!(snapshot.entries, []);
    let mut watch = store.watch("", snapshot.revision).await.unwrap();
    put(&store, "unit/b.service", "b").await.unwrap();
    assert_eq!(&*watch.next().await.unwrap().events[0].key, "unit/b.service");
    // Another server takes it for what it is now.
    let other = EtcdStore::connect(config(&etcd), Some(after.clone())).await.unwrap();
    assert_eq!(other.identity().unwrap().registry, after.registry);
    damaged(EtcdStore::connect(config(&etcd), Some(before)).await.map(drop), "another registry");
}

/// Data of yesterday, by a backup put back, is seen by its revision.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_etcd_is_refused_until_it_is_accepted() {
    let mut etcd = Etcd::start(1).unwrap();
    let backup = tempfile::tempdir().unwrap();
    let store = connect(&etcd).await;
    put(&store, "k", "yesterday").await.unwrap();
    etcd.stop(0).unwrap();
    etcd.copy_data(backup.path(), false).unwrap();
    gone(&store).await;
    etcd.boot_all().unwrap();
    settled(&store).await.unwrap();
    for _ in 0..10 {
        put(&store, "k", "today").await.unwrap();
    }
    let identity = store.identity().unwrap();
    etcd.kill_all().unwrap();
    etcd.copy_data(backup.path(), true).unwrap();
    gone(&store).await;
    etcd.boot_all().unwrap();
    damaged(settled(&store).await, "has gone back from revision");
    damaged(EtcdStore::connect(config(&etcd), Some(identity.clone())).await.map(drop), "has gone back");
    // The lost data found again is good without a word.
    let accepted = store.accept().await.unwrap();
    assert_eq!(accepted.registry, identity.registry);
    assert!(accepted.revision < identity.revision);
    assert_eq!(text(&store, "k").await.as_deref(), Some("yesterday"));
}

/// Many servers that start at once make one registry.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_agree_on_a_new_registry() {
    let etcd = Etcd::start(3).unwrap();
    let mut servers: tokio::task::JoinSet<_> = (0..8)
        .map(|_| {
            let config = config(&etcd);
            async move { EtcdStore::connect(config, None).await.unwrap().identity().unwrap().registry }
        })
        .collect();
    let mut registries = std::collections::BTreeSet::new();
    while let Some(registry) = servers.join_next().await {
        registries.insert(registry.unwrap());
    }
    assert_eq!(registries.len(), 1);
}

/// What others have at our prefix is refused by name; what fleet 1.0 left there is not in the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_data_is_refused() {
    let etcd = Etcd::start(1).unwrap();
    put_by_hand(&etcd, "/_coreos.com/fleet/job/a.service/object", "{}");
    put_by_hand(&etcd, "/_coreos.com/fleet2/x", "beside");
    let store = connect(&etcd).await;
    assert_eq!(store.range("").await.unwrap().entries, []);

    put_by_hand(&etcd, "/shop/orders/1", "{}");
    let foreign = EtcdConfig { prefix: "/shop".into(), ..config(&etcd) };
    let error = EtcdStore::connect(foreign, None).await.err().unwrap();
    let StoreError::Unusable(message) = error else { panic!("{error:?}") };
    for word in [&etcd.endpoint(0), "etcd_key_prefix /shop/", "/shop/orders/1"] {
        assert!(message.contains(word), "{message}");
    }

    put_by_hand(&etcd, "/half/v3/entries/unit/a.service", "{}");
    let half = EtcdConfig { prefix: "/half/".into(), ..config(&etcd) };
    let error = EtcdStore::connect(half, None).await.err().unwrap();
    let StoreError::Damaged(message) = error else { panic!("{error:?}") };
    assert!(
        message.contains("/half/v3/entries/unit/a.service") && message.contains("/half/v3/registry"),
        "{message}"
    );

    put_by_hand(&etcd, "/newer/v3/registry", r#"{"format":9,"other":true}"#);
    let newer = EtcdConfig { prefix: "/newer/".into(), ..config(&etcd) };
    let error = EtcdStore::connect(newer, None).await.err().unwrap();
    let StoreError::Damaged(message) = error else { panic!("{error:?}") };
    assert!(message.contains("/newer/v3/registry says format 9"), "{message}");

    // A key that is no text, put among ours by hand, is passed over.
    put_by_hand(&etcd, "/_coreos.com/fleet/v3/entries/\u{1}ok", "");
    assert_eq!(store.range("").await.unwrap().entries.len(), 1);
}
