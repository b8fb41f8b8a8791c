//! The test-suite every store must pass: one function for each sentence of the contract in
//! [`store`](crate::store), usable by whoever implements [`Store`].
//!
//! Each function wants an empty store and panics where the store breaks the contract. Those about leases
//! sleep for some seconds, or for no time at all where the runtime's time is paused.
// This is test code, made a library so that every store can run it.
#![allow(clippy::unwrap_used)]
use crate::store::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    time::Duration,
};
use tokio::{task::JoinSet, time::timeout};

/// Long enough for anything a working store does.
const PATIENCE: Duration = Duration::from_secs(60);
/// The TTL of leases in these tests.
const TTL: Duration = Duration::from_secs(3);

/// Runs all of it, each part on a store of its own. `make` gives an empty one.
pub async fn all<S: Store>(make: impl AsyncFn() -> S) {
    get_and_range(make().await).await;
    conditions(make().await).await;
    atomicity(make().await).await;
    last_write_counts(make().await).await;
    deletions(make().await).await;
    nothing_to_do(make().await).await;
    sizes(make().await).await;
    revisions(make().await).await;
    counter(make().await).await;
    watch_by_prefix(make().await).await;
    watch_from_the_past(make().await).await;
    watch_is_cancel_safe(make().await).await;
    watch_from_the_future(make().await).await;
    snapshot_then_watch(make().await).await;
    barriers(make().await).await;
    lease_expiry(make().await).await;
    lease_keep_alive(make().await).await;
    lease_revocation(make().await).await;
    lease_unknown(make().await).await;
    lease_changes_hands(make().await).await;
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("nothing came: {what}"))
}

async fn put<S: Store>(store: &S, key: &str, value: &str) -> Revision {
    store.commit(Txn::of(Op::put(key, value))).await.unwrap()
}

async fn value<S: Store>(store: &S, key: &str) -> Option<(String, Revision)> {
    let entry = store.get(key).await.unwrap()?;
    assert_eq!(&*entry.key, key);
    Some((String::from_utf8(entry.value.to_vec()).unwrap(), entry.revision))
}

async fn keys<S: Store>(store: &S, prefix: &str) -> Vec<String> {
    store.range(prefix).await.unwrap().entries.iter().map(|e| e.key.to_string()).collect()
}

fn described(batch: &WatchBatch) -> Vec<(String, Option<String>)> {
    let text = |e: &Entry| String::from_utf8(e.value.to_vec()).unwrap();
    batch.events.iter().map(|e| (e.key.to_string(), e.entry.as_ref().map(text))).collect()
}

fn event(key: &str, value: Option<&str>) -> (String, Option<String>) {
    (key.to_owned(), value.map(str::to_owned))
}

/// `get` and `range` give what was committed, in key order, by prefix, at one revision.
pub async fn get_and_range<S: Store>(store: S) {
    assert_eq!(value(&store, "a/1").await, None);
    let empty = store.range("").await.unwrap();
    assert_eq!(empty.entries, []);
    let mut at = BTreeMap::new();
    for key in ["b", "a/2", "a/10", "a/1", "a", "a0"] {
        at.insert(key, put(&store, key, &format!("value of {key}")).await);
    }
    for (key, revision) in &at {
        assert_eq!(value(&store, key).await, Some((format!("value of {key}"), *revision)));
    }
    let snapshot = store.range("a/").await.unwrap();
    let found: Vec<_> = snapshot.entries.iter().map(|e| (&*e.key, e.revision)).collect();
    assert_eq!(found, [("a/1", at["a/1"]), ("a/10", at["a/10"]), ("a/2", at["a/2"])]);
    assert!(snapshot.revision >= at["a0"]);
    assert!(empty.revision < at["b"]);
    assert_eq!(keys(&store, "").await, ["a", "a/1", "a/10", "a/2", "a0", "b"]);
    assert_eq!(keys(&store, "none").await, [""; 0]);
    let rewritten = put(&store, "a", "new").await;
    assert_eq!(value(&store, "a").await, Some(("new".into(), rewritten)));
    // Any bytes are a value, none too.
    let bytes: Vec<u8> = (0..=255).collect();
    store.commit(Txn::of(Op::put("bytes", bytes.clone())).then(Op::put("none", ""))).await.unwrap();
    assert_eq!(&*store.get("bytes").await.unwrap().unwrap().value, bytes);
    assert_eq!(&*store.get("none").await.unwrap().unwrap().value, b"");
}

/// Conditions hold by the revision of the last write, 0 for no key; the first that fails is told.
pub async fn conditions<S: Store>(store: S) {
    let first = store.commit(Txn::of(Op::put("k", "1")).when("k", 0)).await.unwrap();
    let conflict =
        |key: &str, expected, found| Err(StoreError::Conflict(Conflict { key: key.into(), expected, found }));
    let again = store.commit(Txn::of(Op::put("k", "2")).when("k", 0)).await;
    assert_eq!(again, conflict("k", 0, first));
    let second = store.commit(Txn::of(Op::put("k", "2")).when("k", first)).await.unwrap();
    assert!(second > first);
    let stale = Txn::of(Op::put("other", "x")).when("k", second).when("absent", 7).when("k", first);
    assert_eq!(store.commit(stale).await, conflict("absent", 7, 0));
    assert_eq!(value(&store, "other").await, None);
    assert_eq!(value(&store, "k").await, Some(("2".into(), second)));
    // A key that was deleted does not exist, and made anew it is another.
    store.commit(Txn::of(Op::delete("k")).when("k", second)).await.unwrap();
    assert_eq!(store.commit(Txn::of(Op::put("k", "3")).when("k", second)).await, conflict("k", second, 0));
    store.commit(Txn::of(Op::put("k", "3")).when("k", 0)).await.unwrap();
}

/// All writes of a transaction happen, at one revision, or none.
pub async fn atomicity<S: Store>(store: S) {
    put(&store, "old", "x").await;
    let txn = Txn::of(Op::put("a", "1")).then(Op::put("b", "2")).then(Op::delete("old"));
    let revision = store.commit(txn).await.unwrap();
    assert_eq!(value(&store, "a").await, Some(("1".into(), revision)));
    assert_eq!(value(&store, "b").await, Some(("2".into(), revision)));
    assert_eq!(value(&store, "old").await, None);
    let before = store.range("").await.unwrap();
    let refused = Txn::of(Op::put("a", "9")).then(Op::delete("b")).then(Op::put("c", "9")).when("a", 0);
    assert!(matches!(store.commit(refused).await, Err(StoreError::Conflict(_))));
    assert_eq!(store.range("").await.unwrap().entries, before.entries);

    // Nobody ever sees a half: two keys are always written together, with the same value.
    let writers = (0..4).map(|w| {
        let store = store.clone();
        async move {
            for n in 0..25 {
                let text = format!("{w}.{n}");
                let txn = Txn::of(Op::put("pair/1", text.as_str())).then(Op::put("pair/2", text));
                store.commit(txn).await.unwrap();
            }
        }
    });
    let mut writers: JoinSet<()> = writers.collect();
    let readers = async {
        loop {
            let entries = store.range("pair/").await.unwrap().entries;
            if let [one, two] = &entries[..] {
                assert_eq!((&one.value, one.revision), (&two.value, two.revision));
            } else {
                assert_eq!(entries, []);
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = readers => {}
        () = async { while let Some(done) = writers.join_next().await { done.unwrap(); } } => {}
    }
}

/// Of several writes of one key in one transaction only the last counts.
pub async fn last_write_counts<S: Store>(store: S) {
    let start = put(&store, "start", "").await;
    let txn = Txn::of(Op::put("k", "1")).then(Op::put("k", "2")).then(Op::put("gone", "1"));
    let first = store.commit(txn.then(Op::delete("gone"))).await.unwrap();
    assert_eq!(value(&store, "k").await, Some(("2".into(), first)));
    assert_eq!(value(&store, "gone").await, None);
    let second = store.commit(Txn::of(Op::delete("k")).then(Op::put("k", "3"))).await.unwrap();
    let mut watch = store.watch("", start).await.unwrap();
    let batch = soon("the first transaction", watch.next()).await.unwrap();
    assert_eq!((batch.revision, described(&batch)), (first, vec![event("k", Some("2"))]));
    let batch = soon("the second transaction", watch.next()).await.unwrap();
    assert_eq!((batch.revision, described(&batch)), (second, vec![event("k", Some("3"))]));
}

/// Deleted keys are gone, and only what was there gives an event.
pub async fn deletions<S: Store>(store: S) {
    put(&store, "a", "1").await;
    let start = put(&store, "b", "1").await;
    let gone = store.commit(Txn::of(Op::delete("a")).then(Op::delete("absent"))).await.unwrap();
    assert!(gone > start);
    assert_eq!(value(&store, "a").await, None);
    assert_eq!(keys(&store, "").await, ["b"]);
    let end = put(&store, "b", "2").await;
    let mut watch = store.watch("", start).await.unwrap();
    let batch = soon("the deletion", watch.next()).await.unwrap();
    assert_eq!((batch.revision, described(&batch)), (gone, vec![event("a", None)]));
    let batch = soon("the write after it", watch.next()).await.unwrap();
    assert_eq!((batch.revision, described(&batch)), (end, vec![event("b", Some("2"))]));
}

/// A transaction that changes nothing checks its conditions and answers the current revision.
pub async fn nothing_to_do<S: Store>(store: S) {
    let revision = put(&store, "a", "1").await;
    assert_eq!(store.commit(Txn::default()).await, Ok(revision));
    assert_eq!(store.commit(Txn::default().when("a", revision).when("b", 0)).await, Ok(revision));
    assert_eq!(store.commit(Txn::of(Op::delete("absent"))).await, Ok(revision));
    let conflict = store.commit(Txn::default().when("b", revision)).await;
    let expected = Conflict { key: "b".into(), expected: revision, found: 0 };
    assert_eq!(conflict, Err(StoreError::Conflict(expected)));
    assert_eq!(store.range("").await.unwrap().revision, revision);
}

/// Up to the limits everything is taken, beyond them nothing.
pub async fn sizes<S: Store>(store: S) {
    let full = (0..MAX_OPS).fold(Txn::default(), |txn, n| txn.then(Op::put(format!("k{n:03}"), "v")));
    let revision = store.commit(full.clone()).await.unwrap();
    assert_eq!(keys(&store, "").await.len(), MAX_OPS);
    let mixed = (0..MAX_OPS).fold(full.clone(), |txn, n| txn.when(format!("k{n:03}"), revision));
    store.commit(mixed.clone()).await.unwrap();
    let too_large = async |txn: Txn| {
        let before = store.range("").await.unwrap();
        let answer = store.commit(txn).await;
        assert!(matches!(answer, Err(StoreError::TooLarge(_))), "{answer:?}");
        assert_eq!(store.range("").await.unwrap(), before);
    };
    too_large(full.then(Op::put("one more", "v"))).await;
    too_large(mixed.when("one more", 0)).await;

    let long = "k".repeat(MAX_KEY);
    let large = vec![7; MAX_BYTES - MAX_KEY];
    store.commit(Txn::of(Op::put(&*long, large.clone()))).await.unwrap();
    assert_eq!(&*store.get(&long).await.unwrap().unwrap().value, large);
    too_large(Txn::of(Op::put(format!("{long}k"), "v"))).await;
    too_large(Txn::of(Op::delete(format!("{long}k")))).await;
    too_large(Txn::default().when(format!("{long}k"), 0)).await;
    too_large(Txn::of(Op::put("", "v"))).await;
    too_large(Txn::of(Op::put("k", vec![7; MAX_BYTES + 1]))).await;
    let half = vec![7; MAX_BYTES / 2];
    too_large(Txn::of(Op::put("k1", half.clone())).then(Op::put("k2", half))).await;
}

/// Each commit gets a revision of its own, higher than all before it, whoever commits.
pub async fn revisions<S: Store>(store: S) {
    let mut last = store.range("").await.unwrap().revision;
    for n in 0..20 {
        let revision = put(&store, &format!("{n}"), "").await;
        assert!(revision > last, "{revision} after {last}");
        assert_eq!(store.range("none").await.unwrap().revision, revision);
        last = revision;
    }
    let mut writers: JoinSet<_> = (0..8)
        .map(|w| {
            let store = store.clone();
            async move {
                let mut mine = Vec::new();
                for n in 0..20 {
                    mine.push(put(&store, &format!("{w}/{n}"), "").await);
                }
                mine
            }
        })
        .collect();
    let mut all = BTreeSet::new();
    while let Some(mine) = writers.join_next().await {
        let mine = mine.unwrap();
        assert!(mine.is_sorted_by(|a, b| a < b), "{mine:?}");
        all.extend(mine);
    }
    assert_eq!(all.len(), 8 * 20);
    assert!(all.first() > Some(&last));
}

/// Commits are serialised: a counter that many increment by compare-and-swap loses none.
pub async fn counter<S: Store>(store: S) {
    const WRITERS: usize = 16;
    const EACH: usize = 12;
    let mut writers: JoinSet<()> = (0..WRITERS)
        .map(|_| {
            let store = store.clone();
            async move {
                let mut done = 0;
                while done < EACH {
                    let (text, revision) = value(&store, "counter").await.unwrap_or(("0".into(), 0));
                    let next = (text.parse::<usize>().unwrap() + 1).to_string();
                    match store.commit(Txn::of(Op::put("counter", next)).when("counter", revision)).await {
                        Ok(_) => done += 1,
                        Err(StoreError::Conflict(c)) => {
                            assert_eq!((c.key.as_str(), c.expected), ("counter", revision));
                            assert!(c.found > revision);
                        }
                        Err(e) => panic!("{e}"),
                    }
                }
            }
        })
        .collect();
    while let Some(done) = soon("a writer's end", writers.join_next()).await {
        done.unwrap();
    }
    assert_eq!(value(&store, "counter").await.unwrap().0, (WRITERS * EACH).to_string());
}

/// A watch gives changes under its prefix only, those of one revision together and in order.
pub async fn watch_by_prefix<S: Store>(store: S) {
    let start = put(&store, "a/0", "before").await;
    let mut watch = store.watch("a/", start).await.unwrap();
    let waiting = tokio::spawn(async move { (watch.next().await, watch) });
    for key in ["a", "a0", "b/1", "b"] {
        put(&store, key, "not mine").await;
    }
    let txn = Txn::of(Op::put("a/2", "2")).then(Op::put("b/2", "2"));
    let first = store.commit(txn.then(Op::put("a/1", "1")).then(Op::delete("a/0"))).await.unwrap();
    let (batch, mut watch) = soon("the transaction", waiting).await.unwrap();
    let batch = batch.unwrap();
    assert_eq!(batch.revision, first);
    let expected = [event("a/2", Some("2")), event("a/1", Some("1")), event("a/0", None)];
    assert_eq!(described(&batch), expected);
    for event in &batch.events {
        assert!(event.entry.as_ref().is_none_or(|e| e.revision == first && e.key == event.key));
    }
    let second = put(&store, "a/3", "3").await;
    let batch = soon("the next write", watch.next()).await.unwrap();
    assert_eq!((batch.revision, described(&batch)), (second, vec![event("a/3", Some("3"))]));
}

/// A watch from an earlier revision gives all since then, and two watches the same.
pub async fn watch_from_the_past<S: Store>(store: S) {
    let start = put(&store, "start", "").await;
    let mut expected = Vec::new();
    for n in 0..50 {
        expected.push(put(&store, &format!("k{}", n % 7), &n.to_string()).await);
    }
    for skip in [0, 20, 49] {
        let after = if skip == 0 { start } else { expected[skip - 1] };
        let mut watch = store.watch("k", after).await.unwrap();
        for (n, revision) in expected.iter().enumerate().skip(skip) {
            let batch = soon("a past change", watch.next()).await.unwrap();
            assert_eq!(batch.revision, *revision);
            assert_eq!(described(&batch), [event(&format!("k{}", n % 7), Some(&n.to_string()))]);
        }
    }
}

/// Giving up waiting loses nothing.
pub async fn watch_is_cancel_safe<S: Store>(store: S) {
    let start = put(&store, "start", "").await;
    let mut watch = store.watch("k", start).await.unwrap();
    let writer = store.clone();
    let writer = tokio::spawn(async move {
        for n in 0..40 {
            put(&writer, "k", &n.to_string()).await;
        }
    });
    let mut next = 0;
    while next < 40 {
        let taken = soon("the next change", async {
            loop {
                tokio::select! {
                    biased;
                    batch = watch.next() => break batch,
                    () = tokio::task::yield_now() => {}
                }
            }
        });
        assert_eq!(described(&taken.await.unwrap()), [event("k", Some(&next.to_string()))]);
        next += 1;
    }
    writer.await.unwrap();
}

/// A revision that has not been yet is no place to watch from: the store may have lost its data.
pub async fn watch_from_the_future<S: Store>(store: S) {
    let now = put(&store, "k", "").await;
    expect_compacted(&store, now + 1_000_000).await;
}

async fn expect_compacted<S: Store>(store: &S, after: Revision) {
    let error = match store.watch("", after).await {
        Err(error) => error,
        Ok(mut watch) => soon("the error", watch.next()).await.expect_err("changes that are not all"),
    };
    let StoreError::Compacted { asked, .. } = error else { panic!("{error:?}") };
    assert_eq!(asked, after);
}

/// Changes that are no longer kept are not passed over in silence, neither at the start of a watch nor
/// under way; and listing anew helps. `compact` makes the store forget all changes so far.
pub async fn compaction<S: Store>(store: S, compact: impl AsyncFn(&S)) {
    let start = put(&store, "k", "1").await;
    let mut slow = store.watch("k", start).await.unwrap();
    put(&store, "k", "2").await;
    assert_eq!(described(&soon("a change", slow.next()).await.unwrap()), [event("k", Some("2"))]);
    put(&store, "k", "3").await;
    compact(&store).await;
    expect_compacted(&store, start).await;
    // The one under way had perhaps fetched the last change already; then it must give it.
    match soon("the change or the error", slow.next()).await {
        Ok(batch) => assert_eq!(described(&batch), [event("k", Some("3"))]),
        Err(error) => assert!(matches!(error, StoreError::Compacted { .. }), "{error:?}"),
    }
    let snapshot = store.range("k").await.unwrap();
    assert_eq!(snapshot.entries.len(), 1);
    assert_eq!(&*snapshot.entries[0].value, b"3");
    let mut watch = store.watch("k", snapshot.revision).await.unwrap();
    put(&store, "k", "4").await;
    assert_eq!(described(&soon("a change", watch.next()).await.unwrap()), [event("k", Some("4"))]);
}

/// Who watches everything comes to a barrier, with all that was committed before; who does not is not told of it.
pub async fn barriers<S: Store>(store: S) {
    let start = store.range("").await.unwrap();
    let mut all = store.watch("", start.revision).await.unwrap();
    let mut some = store.watch("k", start.revision).await.unwrap();
    let (mut reached, mut changes) = (start.revision, 0);
    for n in 0..4 {
        // Where nothing was written since, too
        if n != 2 {
            put(&store, "k", "v").await;
        }
        let barrier = store.barrier().await.unwrap();
        while reached < barrier {
            let batch = soon("a barrier", all.next()).await.unwrap();
            assert!(batch.revision > reached);
            (reached, changes) = (batch.revision, changes + batch.events.len());
        }
        assert_eq!(changes, [1, 2, 2, 3][n]);
    }
    for _ in 0..3 {
        assert_eq!(soon("a change", some.next()).await.unwrap().events.len(), 1);
    }
    assert_eq!(keys(&store, "").await, ["k"]);
    assert_eq!(store.range("").await.unwrap().revision, reached);
}

/// A snapshot followed by a watch from its revision misses nothing, however much is written meanwhile.
pub async fn snapshot_then_watch<S: Store>(store: S) {
    const WRITERS: usize = 6;
    const EACH: usize = 30;
    let mut writers: JoinSet<()> = (0..WRITERS)
        .map(|w| {
            let store = store.clone();
            async move {
                for n in 0..EACH {
                    let own = format!("k/{w}/{}", n % 5);
                    let txn = match n % 3 {
                        0 => Txn::of(Op::delete(own)).then(Op::put("k/all", format!("{w}.{n}"))),
                        1 => Txn::of(Op::put(own, format!("{n}"))).then(Op::put("other", "")),
                        _ => Txn::of(Op::put(own, format!("{n}"))),
                    };
                    store.commit(txn).await.unwrap();
                }
            }
        })
        .collect();
    let mut readers: JoinSet<usize> = (0..4)
        .map(|reader| {
            let store = store.clone();
            async move {
                for _ in 0..reader * 10 {
                    tokio::task::yield_now().await;
                }
                let snapshot = store.range("k/").await.unwrap();
                let mut state: BTreeMap<_, _> =
                    snapshot.entries.into_iter().map(|e| (e.key.clone(), e)).collect();
                let mut watch = store.watch("k/", snapshot.revision).await.unwrap();
                let (mut last, mut batches) = (snapshot.revision, 0);
                loop {
                    let batch = soon("the end of the changes", watch.next()).await.unwrap();
                    assert!(batch.revision > last, "{} after {last}", batch.revision);
                    assert!(!batch.events.is_empty());
                    (last, batches) = (batch.revision, batches + 1);
                    for Event { key, entry } in batch.events {
                        match entry {
                            Some(entry) => state.insert(key, entry),
                            None => state.remove(&key),
                        };
                    }
                    if state.contains_key("k/end") {
                        break;
                    }
                }
                let truth = store.range("k/").await.unwrap().entries;
                assert_eq!(state.into_values().collect::<Vec<_>>(), truth);
                batches
            }
        })
        .collect();
    while let Some(done) = soon("a writer's end", writers.join_next()).await {
        done.unwrap();
    }
    put(&store, "k/end", "").await;
    while let Some(batches) = soon("a reader's end", readers.join_next()).await {
        assert!(batches.unwrap() > 0);
    }
}

/// A lease that is not kept alive ends, and its keys go with it, at one revision.
pub async fn lease_expiry<S: Store>(store: S) {
    let lease = store.grant(TTL).await.unwrap();
    let txn = Txn::of(Op::put_leased("l/1", "1", lease)).then(Op::put_leased("l/2", "2", lease));
    let start = store.commit(txn.then(Op::put("durable", "3"))).await.unwrap();
    assert_eq!(keys(&store, "").await, ["durable", "l/1", "l/2"]);
    let mut watch = store.watch("", start).await.unwrap();
    let batch = soon("the end of the lease", watch.next()).await.unwrap();
    assert_eq!(described(&batch), [event("l/1", None), event("l/2", None)]);
    let snapshot = store.range("").await.unwrap();
    assert!(snapshot.revision >= batch.revision);
    assert_eq!(keys(&store, "").await, ["durable"]);
    assert_eq!(store.keep_alive(lease).await, Err(StoreError::LeaseEnded));
    // The keys are free for others, by the usual conditions.
    store.commit(Txn::of(Op::put("l/1", "new")).when("l/1", 0)).await.unwrap();
}

/// A lease that is kept alive stays, and ends its whole TTL after the last time.
pub async fn lease_keep_alive<S: Store>(store: S) {
    let (kept, left) = (store.grant(TTL).await.unwrap(), store.grant(TTL).await.unwrap());
    let txn = Txn::of(Op::put_leased("kept", "", kept)).then(Op::put_leased("left", "", left));
    let start = store.commit(txn).await.unwrap();
    let mut watch = store.watch("", start).await.unwrap();
    let keeping = async {
        loop {
            store.keep_alive(kept).await.unwrap();
            tokio::time::sleep(TTL / 3).await;
        }
    };
    let batch = tokio::select! {
        () = keeping => return,
        batch = soon("the end of the other lease", watch.next()) => batch.unwrap(),
    };
    assert_eq!(described(&batch), [event("left", None)]);
    store.keep_alive(kept).await.unwrap();
    assert_eq!(keys(&store, "").await, ["kept"]);
    let batch = soon("the end of the lease", watch.next()).await.unwrap();
    assert_eq!(described(&batch), [event("kept", None)]);
}

/// A revoked lease ends at once.
pub async fn lease_revocation<S: Store>(store: S) {
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    let start = store.commit(Txn::of(Op::put_leased("l", "", lease))).await.unwrap();
    store.revoke(lease).await.unwrap();
    assert_eq!(value(&store, "l").await, None);
    let mut watch = store.watch("", start).await.unwrap();
    assert_eq!(described(&soon("the end", watch.next()).await.unwrap()), [event("l", None)]);
    assert_eq!(store.revoke(lease).await, Err(StoreError::LeaseEnded));
    assert_eq!(store.keep_alive(lease).await, Err(StoreError::LeaseEnded));
}

/// Nothing is written under a lease that is not there.
pub async fn lease_unknown<S: Store>(store: S) {
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    store.revoke(lease).await.unwrap();
    for ended in [lease, LeaseId(lease.0.wrapping_add(12_345))] {
        let txn = Txn::of(Op::put("durable", "")).then(Op::put_leased("l", "", ended));
        assert_eq!(store.commit(txn).await, Err(StoreError::LeaseEnded));
    }
    assert_eq!(keys(&store, "").await, [""; 0]);
}

/// A key belongs to the lease of its last write, or to none.
pub async fn lease_changes_hands<S: Store>(store: S) {
    let long = Duration::from_secs(3600);
    let (one, two) = (store.grant(long).await.unwrap(), store.grant(long).await.unwrap());
    assert_ne!(one, two);
    for key in ["to none", "to two", "stays", "gone"] {
        store.commit(Txn::of(Op::put_leased(key, "1", one))).await.unwrap();
    }
    put(&store, "to one", "1").await;
    store.commit(Txn::of(Op::put("to none", "2")).then(Op::delete("gone"))).await.unwrap();
    store.commit(Txn::of(Op::put_leased("to two", "2", two))).await.unwrap();
    store.commit(Txn::of(Op::put_leased("to one", "2", one))).await.unwrap();
    put(&store, "gone", "back").await;
    store.revoke(one).await.unwrap();
    assert_eq!(keys(&store, "").await, ["gone", "to none", "to two"]);
    assert_eq!(value(&store, "to none").await.unwrap().0, "2");
    store.revoke(two).await.unwrap();
    assert_eq!(keys(&store, "").await, ["gone", "to none"]);
}
