//! Members that die, hang and come back under load.
use super::*;
use std::collections::BTreeMap;
use tokio::time::timeout;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn quick(etcd: &Etcd) -> EtcdConfig {
    EtcdConfig { request_timeout: Duration::from_secs(1), ..config(etcd) }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("nothing came: {what}"))
}

/// The member that a store speaks to.
fn in_use(store: &EtcdStore, etcd: &Etcd) -> usize {
    let Contact::Held(endpoint) = store.contact().borrow().clone() else { panic!("no contact") };
    etcd.endpoints().iter().position(|e| *e == endpoint).unwrap()
}

/// Writes keys that are each written once, until told to stop, as a careful caller does; and tells how many are there.
async fn write(
    store: EtcdStore,
    done: tokio::sync::watch::Sender<usize>,
    stop: tokio::sync::watch::Receiver<bool>,
) -> (BTreeMap<String, Revision>, usize) {
    let (mut written, mut unknown) = (BTreeMap::new(), 0);
    while !*stop.borrow() {
        let key = format!("k/{:06}", written.len());
        let revision = loop {
            match store.commit(Txn::of(Op::put(&*key, "v")).when(&*key, 0)).await {
                Ok(revision) => break revision,
                // Nothing was written.
                Err(StoreError::Unavailable(_)) => {}
                // Read before repeating.
                Err(StoreError::Unknown(_)) => {
                    unknown += 1;
                    if let Ok(Some(entry)) = store.get(&key).await {
                        break entry.revision;
                    }
                }
                // It was carried out after it was read.
                Err(StoreError::Conflict(conflict)) => {
                    assert!(unknown > 0, "{conflict}");
                    break conflict.found;
                }
                Err(error) => panic!("{error}"),
            }
        };
        written.insert(key, revision);
        done.send_replace(written.len());
    }
    (written, unknown)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_told_twice_while_members_fail() {
    let mut etcd = Etcd::start(3).unwrap();
    let store = EtcdStore::connect(quick(&etcd), None).await.unwrap();
    let start = store.range("").await.unwrap().revision;
    let mut watch = store.watch("k/", start).await.unwrap();
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    store.commit(Txn::of(Op::put_leased("presence/m", "", lease))).await.unwrap();

    let (done, mut progress) = tokio::sync::watch::channel(0);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writer = tokio::spawn(write(store.clone(), done, stopped));
    let (told, mut telling) = tokio::sync::watch::channel(0);
    let watcher = tokio::spawn(async move {
        let mut seen = Vec::new();
        loop {
            let batch = watch.next().await.unwrap();
            for event in batch.events {
                let entry = event.entry.unwrap();
                assert_eq!(entry.revision, batch.revision);
                if &*entry.key == "k/end" {
                    return seen;
                }
                seen.push((entry.key.to_string(), entry.revision));
            }
            told.send_replace(seen.len());
        }
    });
    let mut more = async || {
        let target = *progress.borrow() + 30;
        soon("more writes", progress.wait_for(|n| *n >= target)).await.unwrap();
        soon("the watch", telling.wait_for(|n| *n >= target)).await.unwrap();
        soon("a renewal", async {
            loop {
                match store.keep_alive(lease).await {
                    Ok(()) => break,
                    Err(StoreError::Unavailable(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        })
        .await;
    };
    more().await;
    for _ in 0..2 {
        let index = in_use(&store, &etcd);
        etcd.kill(index).unwrap();
        more().await;
        etcd.boot(index).unwrap();
        more().await;

        let index = in_use(&store, &etcd);
        etcd.pause(index).unwrap();
        more().await;
        etcd.resume(index).unwrap();
        more().await;

        let index = in_use(&store, &etcd);
        etcd.stop(index).unwrap();
        more().await;
        etcd.boot(index).unwrap();
        more().await;
    }
    // All at once, with what they have on disk.
    etcd.kill_all().unwrap();
    etcd.boot_all().unwrap();
    more().await;

    stop.send_replace(true);
    let (written, _) = soon("the writer", writer).await.unwrap();
    soon("the end", async { while put(&store, "k/end", "").await.is_err() {} }).await;
    let seen = soon("the watch's end", watcher).await.unwrap();
    assert!(seen.is_sorted_by(|a, b| a.1 < b.1), "{seen:?}");
    assert_eq!(seen, written.clone().into_iter().collect::<Vec<_>>());
    let there = store.range("k/0").await.unwrap();
    let there: BTreeMap<_, _> = there.entries.into_iter().map(|e| (e.key.to_string(), e.revision)).collect();
    assert_eq!(there, written);
    assert!(store.get("presence/m").await.unwrap().is_some());
}

/// Without a quorum everything fails in time, says so, and goes on by itself afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_quorum_fails_fast_and_heals() {
    let mut etcd = Etcd::start(3).unwrap();
    let store = EtcdStore::connect(quick(&etcd), None).await.unwrap();
    let start = put(&store, "k", "0").await.unwrap();
    let mut watch = store.watch("k", start).await.unwrap();
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    for round in ["kill", "pause"] {
        for index in [0, 1] {
            match round {
                "kill" => etcd.kill(index).unwrap(),
                _ => etcd.pause(index).unwrap(),
            }
        }
        let answer = soon("an error", put(&store, "lost", round)).await.unwrap_err();
        assert!(matches!(answer, StoreError::Unavailable(_) | StoreError::Unknown(_)), "{answer:?}");
        let mut contact = store.contact();
        soon("the loss", contact.wait_for(|contact| matches!(contact, Contact::Lost { .. }))).await.unwrap();
        for answer in [
            soon("an error", store.get("k")).await.map(drop),
            soon("an error", store.range("")).await.map(drop),
            soon("an error", store.keep_alive(lease)).await,
            soon("an error", store.grant(Duration::from_secs(9))).await.map(drop),
            // No member was found to send it to: that is known to have done nothing.
            soon("an error", put(&store, "lost", round)).await.map(drop),
        ] {
            assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
        }
        // The watch is not over.
        let silent = timeout(Duration::from_millis(200), watch.next()).await;
        assert!(silent.is_err(), "{silent:?}");

        match round {
            "kill" => etcd.boot_all().unwrap(),
            _ => [0, 1].iter().for_each(|index| etcd.resume(*index).unwrap()),
        }
        soon("contact", contact.wait_for(|contact| matches!(contact, Contact::Held(_)))).await.unwrap();
        soon("a write", async { while put(&store, "k", round).await.is_err() {} }).await;
        let batch = soon("the write", watch.next()).await.unwrap();
        assert_eq!(batch.events[0].entry.as_ref().unwrap().value[..], *round.as_bytes());
        while timeout(Duration::from_millis(200), watch.next()).await.is_ok() {}
        soon("a renewal", async { while store.keep_alive(lease).await.is_err() {} }).await;
    }
}

/// A leader that has lost the others does not know it for a while, and renews leases from memory, which another leader may end meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_quorum_renews_no_lease() {
    let etcd = Etcd::start(3).unwrap();
    let store = EtcdStore::connect(config(&etcd), None).await.unwrap();
    let leads = |health: &EndpointHealth| health.member.as_ref().is_ok_and(|member| member.leads);
    let leader = store.health().await.iter().position(leads).unwrap();
    let endpoints = vec![etcd.endpoint(leader)];
    let store = EtcdStore::connect(EtcdConfig { endpoints, ..quick(&etcd) }, None).await.unwrap();
    let lease = store.grant(Duration::from_secs(600)).await.unwrap();
    soon("a renewal", store.keep_alive(lease)).await.unwrap();
    (0..3).filter(|member| *member != leader).for_each(|member| etcd.pause(member).unwrap());
    let answer = soon("an error", store.keep_alive(lease)).await;
    assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
}

/// What was compacted while a watch was away is not passed over, be it only one deletion right after where it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_comes_back_too_late_says_so() {
    let mut etcd = Etcd::start(1).unwrap();
    let store = connect(&etcd).await;
    let start = put(&store, "k", "1").await.unwrap();
    let mut watch = store.watch("k", start).await.unwrap();
    let position = put(&store, "k", "2").await.unwrap();
    assert_eq!(soon("a change", watch.next()).await.unwrap().revision, position);
    // Nobody waits for the watch while its member is away.
    etcd.stop(0).unwrap();
    etcd.boot(0).unwrap();
    let deleted = store.commit(Txn::of(Op::delete("k"))).await.unwrap();
    assert_eq!(deleted, position + 1);
    store.compact(deleted).await.unwrap();
    let answer = soon("the error", watch.next()).await;
    assert_eq!(answer, Err(StoreError::Compacted { asked: position, oldest: deleted }));
    assert_eq!(watch.next().await, answer);
    // At the compacted revision itself there is nothing missing.
    let mut watch = store.watch("k", deleted).await.unwrap();
    let next = put(&store, "k", "3").await.unwrap();
    assert_eq!(soon("a change", watch.next()).await.unwrap().revision, next);
}

/// A member that hangs is found out also by a watch alone, though its connection stays open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_leaves_a_member_that_hangs() {
    let etcd = Etcd::start(3).unwrap();
    let store = EtcdStore::connect(quick(&etcd), None).await.unwrap();
    let start = put(&store, "k", "1").await.unwrap();
    let mut watch = store.watch("k", start).await.unwrap();
    put(&store, "k", "2").await.unwrap();
    soon("a change", watch.next()).await.unwrap();
    let index = in_use(&store, &etcd);
    etcd.pause(index).unwrap();
    let others =
        etcd.endpoints().into_iter().enumerate().filter(|(n, _)| *n != index).map(|(_, e)| e).collect();
    let other = EtcdStore::new(EtcdConfig { endpoints: others, ..quick(&etcd) }, None).unwrap();
    soon("a write", async { while put(&other, "k", "3").await.is_err() {} }).await;
    let batch = soon("the change", watch.next()).await.unwrap();
    assert_eq!(batch.events[0].entry.as_ref().unwrap().value[..], b"3"[..]);
}

/// Others may write much to an etcd; a watch that has nothing to tell of that is not behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_watch_is_asked_and_kept() {
    let etcd = Etcd::start(1).unwrap();
    // An etcd on a busy machine answers before.
    let patience = Duration::from_millis(1500);
    let store = connect(&etcd).await;
    let impatient =
        EtcdStore::connect(EtcdConfig { request_timeout: patience, ..config(&etcd) }, None).await.unwrap();
    let start = put(&store, "k", "").await.unwrap();
    let mut watch = impatient.watch("k", start).await.unwrap();
    let member = impatient.0.members.member().await.unwrap();
    for _ in 0..6 {
        put_by_hand(&etcd, "/other", "");
        while impatient.get("k").await.is_err() {}
        let silent = timeout(patience / 2, watch.next()).await;
        assert!(silent.is_err(), "{silent:?}");
    }
    let asked = metric(&etcd, "etcd_debugging_mvcc_watch_stream_total");
    assert_eq!(asked, 1.0, "the watch was made anew");
    let next = put(&store, "k", "new").await.unwrap();
    assert_eq!(soon("a change", watch.next()).await.unwrap().revision, next);
    assert!(impatient.0.members.link().borrow().is(&member));
}

fn metric(etcd: &Etcd, name: &str) -> f64 {
    let metrics = etcd.metrics(0).unwrap();
    let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
    line.split(' ').next_back().unwrap().parse().unwrap()
}
