//! Tests of the embedded store.
use super::{
    backend::faults::{Faults, Kind, Made},
    *,
};
use crate::conformance;

mod damage;

use std::{fs, io::ErrorKind};

/// A store in a directory that goes with the test.
fn fresh(keep: &std::sync::Mutex<Vec<tempfile::TempDir>>) -> EmbeddedStore {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    keep.lock().unwrap().push(directory);
    store
}

#[tokio::test(start_paused = true)]
async fn keeps_the_contract() {
    let keep = Default::default();
    conformance::all(async || fresh(&keep)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn keeps_the_contract_on_many_threads() {
    let keep = Default::default();
    conformance::atomicity(fresh(&keep)).await;
    conformance::revisions(fresh(&keep)).await;
    conformance::counter(fresh(&keep)).await;
    conformance::watch_is_cancel_safe(fresh(&keep)).await;
    conformance::snapshot_then_watch(fresh(&keep)).await;
}

#[tokio::test(start_paused = true)]
async fn tells_a_watch_that_fell_behind() {
    let keep = Default::default();
    conformance::compaction(fresh(&keep), async |store: &EmbeddedStore| {
        // Keys under leases need no disk.
        let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
        for n in 0..=memory::LOG_EVENTS / MAX_OPS {
            let ops = (0..MAX_OPS).map(|k| Op::put_leased(format!("x/{n}/{k}"), "", lease)).collect();
            store.commit(Txn { ops, ..Txn::default() }).await.unwrap();
        }
    })
    .await;
}

fn text(entry: Option<Entry>) -> Option<String> {
    entry.map(|e| String::from_utf8(e.value.to_vec()).unwrap())
}

async fn put(store: &EmbeddedStore, key: &str, value: &str) -> Result<Revision, StoreError> {
    store.commit(Txn::of(Op::put(key, value))).await
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The error an opening gives, as text.
fn refusal(directory: &Path) -> String {
    match EmbeddedStore::open(directory) {
        Ok(_) => panic!("{} was opened", directory.display()),
        Err(e) => e.to_string(),
    }
}

/// A directory with a registry of 500 records of some 100 bytes, closed.
async fn made() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    for first in (0..500).step_by(100) {
        let ops = (first..first + 100).map(|n| Op::put(format!("unit/{n:03}"), value_of(n))).collect();
        store.commit(Txn { ops, ..Txn::default() }).await.unwrap();
    }
    store.close().await;
    directory
}

fn value_of(n: usize) -> String {
    format!("{n} {}", "value ".repeat(15))
}

#[tokio::test(start_paused = true)]
async fn restarts_with_what_is_durable_and_behind_all_revisions() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("made/by/itself");
    let (mut last, mut leases) = (0, Vec::new());
    for round in 0..4 {
        let store = EmbeddedStore::open(&path).unwrap();
        let start = store.range("").await.unwrap();
        assert!(start.revision > last, "{} after {last}", start.revision);
        assert_eq!(start.entries.len(), round * 2);
        assert!(start.entries.iter().all(|e| e.key.starts_with("durable/")));
        // A watch from before the restart is told to list anew.
        let watch = store.watch("", last).await.map(drop);
        assert_eq!(watch, Err(StoreError::Compacted { asked: last, oldest: start.revision }));
        let lease = store.grant(Duration::from_secs(9)).await.unwrap();
        assert!(!leases.contains(&lease));
        for old in &leases {
            assert_eq!(store.keep_alive(*old).await, Err(StoreError::LeaseEnded));
        }
        leases.push(lease);
        // Durable first and leased then is not durable any more, and the other way round.
        put(&store, "gone", "1").await.unwrap();
        store.commit(Txn::of(Op::put_leased("gone", "2", lease))).await.unwrap();
        let key = format!("durable/{round}");
        store.commit(Txn::of(Op::put_leased(&*key, "1", lease))).await.unwrap();
        put(&store, &key, "2").await.unwrap();
        put(&store, &format!("{key}/deleted"), "1").await.unwrap();
        store.commit(Txn::of(Op::delete(format!("{key}/deleted")))).await.unwrap();
        put(&store, &format!("{key}/kept"), &format!("{round}")).await.unwrap();
        let before = store.get(&key).await.unwrap().unwrap();
        last = store.commit(Txn::of(Op::put_leased("leased", "", lease))).await.unwrap();
        store.close().await;
        assert!(matches!(put(&store, "k", "").await, Err(StoreError::Unavailable(_))));
        assert!(matches!(store.get("k").await, Err(StoreError::Unavailable(_))));
        let store = EmbeddedStore::open(&path).unwrap();
        assert_eq!(store.get(&key).await.unwrap(), Some(before));
        assert_eq!(text(store.get(&format!("{key}/kept")).await.unwrap()), Some(format!("{round}")));
        last = last.max(store.range("").await.unwrap().revision);
        store.close().await;
    }
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    for name in names(&path) {
        let mode = fs::metadata(path.join(&name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
    assert_eq!(names(&path), ["registry.backup", "registry.made", "registry.redb"]);
}

#[tokio::test]
async fn ends_watches_and_waiting_when_closed() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let revision = put(&store, "k", "").await.unwrap();
    let mut watch = store.watch("", revision).await.unwrap();
    let waiting = tokio::spawn(async move { watch.next().await });
    let mut writers: tokio::task::JoinSet<_> = (0..20)
        .map(|n| {
            let store = store.clone();
            async move { (n, put(&store, &format!("k{n}"), "").await) }
        })
        .collect();
    store.close().await;
    match waiting.await.unwrap() {
        Ok(batch) => assert!(batch.revision > revision),
        Err(error) => assert!(matches!(error, StoreError::Unavailable(_)), "{error}"),
    }
    let mut written = Vec::new();
    while let Some(answer) = writers.join_next().await {
        match answer.unwrap() {
            (n, Ok(_)) => written.push(format!("k{n}")),
            (_, Err(e)) => assert!(matches!(e, StoreError::Unavailable(_)), "{e}"),
        }
    }
    written.push("k".into());
    written.sort();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let there: Vec<_> = store.range("").await.unwrap().entries.iter().map(|e| e.key.to_string()).collect();
    assert_eq!(there, written);
    store.close().await;
}

#[tokio::test]
async fn refuses_a_second_opening() {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let file = directory.path().join("registry.redb").display().to_string();
    for _ in 0..2 {
        let refusal = refusal(directory.path());
        assert!(refusal.contains(&file) && refusal.contains("in use by another fleetd"), "{refusal}");
        // Not even when somebody tidied the marker away
        let _ = fs::remove_file(directory.path().join("registry.made"));
    }
    assert!(matches!(check(directory.path()), Err(OpenError::InUse { .. })));
    assert!(matches!(repair(directory.path()), Err(OpenError::InUse { .. })));
    put(&store, "k", "v").await.unwrap();
    store.close().await;
    let store = EmbeddedStore::open(directory.path()).unwrap();
    assert_eq!(text(store.get("k").await.unwrap()).as_deref(), Some("v"));
    store.close().await;
}

#[tokio::test]
async fn never_takes_a_lost_or_empty_file_for_a_new_registry() {
    let directory = made().await;
    let path = directory.path();
    let file = path.join("registry.redb");
    let whole = fs::read(&file).unwrap();

    fs::write(&file, b"").unwrap();
    let text = refusal(path);
    assert!(text.contains("is empty (0 bytes); run `fleetd registry repair "), "{text}");

    fs::remove_file(&file).unwrap();
    let text = refusal(path);
    assert!(
        text.contains("is missing, though there was one") && text.contains("fleetd registry repair"),
        "{text}"
    );
    fs::remove_file(path.join("registry.made")).unwrap();
    assert!(refusal(path).contains("is missing"), "a backup is proof enough");
    assert!(!file.exists());

    fs::write(&file, b"#!/bin/sh\necho this is no registry at all\n".repeat(200)).unwrap();
    let text = refusal(path);
    assert!(text.contains("is damaged: it is not a registry file"), "{text}");
    fs::create_dir(path.join("x")).unwrap();
    fs::remove_file(&file).unwrap();
    fs::rename(path.join("x"), &file).unwrap();
    assert!(refusal(path).contains("can't open"), "{}", refusal(path));
    fs::remove_dir(&file).unwrap();

    for cut in [100, 4096, whole.len() / 2, whole.len() - 4096, whole.len() - 1] {
        fs::write(&file, &whole[..cut]).unwrap();
        let text = refusal(path);
        assert!(text.contains("is damaged"), "cut at {cut}: {text}");
    }
    fs::write(&file, &whole).unwrap();
    let store = EmbeddedStore::open(path).unwrap();
    assert_eq!(store.range("unit/").await.unwrap().entries.len(), 500);
    store.close().await;
}

#[tokio::test]
async fn says_what_the_system_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a file");
    fs::write(&file, "").unwrap();
    let text = refusal(&file);
    assert!(text.contains("can't make the directory") && text.contains("a file"), "{text}");
    // Nothing can be made there, not even by root.
    let text = refusal(Path::new("/proc/self/fleet"));
    assert!(text.contains("can't make the directory /proc/self/fleet"), "{text}");
    let text = refusal(Path::new("/proc/self"));
    assert!(text.contains("can't open /proc/self/registry.made"), "{text}");
    let text = check(directory.path()).unwrap_err().to_string();
    assert!(text.contains("there is no registry in"), "{text}");
    assert_eq!(names(directory.path()), ["a file"]);
}

#[tokio::test]
async fn refuses_a_newer_format() {
    let directory = made().await;
    rewrite_meta(directory.path(), |meta| meta.format += 1);
    let text = refusal(directory.path());
    assert!(text.contains("has format 2, and this fleetd knows formats up to 1"), "{text}");
    assert!(matches!(check(directory.path()), Err(OpenError::NewerFormat { found: 2, .. })));
    assert!(matches!(repair(directory.path()), Err(OpenError::NewerFormat { found: 2, .. })));
}

/// Changes the store's own data behind its back.
fn rewrite_meta(directory: &Path, change: impl FnOnce(&mut record::Meta)) {
    let (disk, records) = Disk::open(directory, Arc::default()).unwrap();
    let mut meta = disk.meta.clone();
    disk.close();
    change(&mut meta);
    disk::build(directory, &records, &meta, &Arc::default()).unwrap().close().unwrap();
}

fn failing(directory: &Path) -> (EmbeddedStore, Arc<Health>) {
    let health = Arc::<Health>::default();
    (EmbeddedStore::open_with(directory, health.clone(), Duration::ZERO).unwrap(), health)
}

/// Durable writes fail, nothing half is seen, all else goes on, and all is well when the disk is.
async fn survives(break_it: impl Fn(&Faults)) {
    let directory = tempfile::tempdir().unwrap();
    let (store, health) = failing(directory.path());
    let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
    let mut last = put(&store, "k", "0").await.unwrap();
    let mut watch = store.watch("", last).await.unwrap();
    for round in 0..3 {
        break_it(&health.faults);
        for attempt in 0..3 {
            let error = put(&store, "k", "lost").await.unwrap_err();
            assert!(
                matches!(&error, StoreError::Unavailable(t) | StoreError::Unknown(t) if t.contains("registry.redb")),
                "{error:?}"
            );
            assert_eq!(text(store.get("k").await.unwrap()), Some(round.to_string()));
            // What needs no disk goes on, also in one batch with what does.
            let leased = Txn::of(Op::put_leased("leased", format!("{round}.{attempt}"), lease));
            let (leased, durable) = tokio::join!(store.commit(leased), put(&store, "j", "lost"));
            let leased = leased.unwrap();
            assert!(durable.is_err());
            assert!(leased > last);
            last = leased;
            let batch = watch.next().await.unwrap();
            assert_eq!((batch.revision, &*batch.events[0].key), (leased, "leased"));
        }
        health.faults.heal();
        let revision = put(&store, "k", &(round + 1).to_string()).await.unwrap();
        assert!(revision > last);
        last = revision;
        let batch = watch.next().await.unwrap();
        assert_eq!((batch.revision, &*batch.events[0].key), (revision, "k"));
    }
    store.close().await;
    let store = EmbeddedStore::open(directory.path()).unwrap();
    let entries = store.range("").await.unwrap();
    assert_eq!(entries.entries.len(), 1);
    assert_eq!(text(store.get("k").await.unwrap()).as_deref(), Some("3"));
    assert!(entries.revision > last);
    store.close().await;
}

#[tokio::test]
async fn survives_a_full_disk() {
    for good in 0..12 {
        survives(|faults| faults.fail(Kind::Write, good % 3, ErrorKind::StorageFull)).await;
    }
}

#[tokio::test]
async fn survives_failing_syncs() {
    survives(|faults| faults.fail(Kind::Sync, 0, ErrorKind::Other)).await;
}

#[tokio::test]
async fn a_full_disk_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let (store, health) = failing(directory.path());
    health.faults.fail(Kind::Write, 0, ErrorKind::StorageFull);
    let error = put(&store, "k", "").await.unwrap_err().to_string();
    assert!(error.starts_with("registry unavailable: ") || error.starts_with("registry answer unknown: "));
    assert!(error.contains("registry.redb: disk full: free some space"), "{error}");
    store.close().await;
}

/// Small, repeatable randomness (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }
}

fn apply(image: &mut Vec<u8>, made: &Made) {
    match made {
        Made::Write(offset, data) => {
            let end = *offset as usize + data.len();
            image.resize(image.len().max(end), 0);
            image[*offset as usize..end].copy_from_slice(data);
        }
        Made::SetLen(length) => image.resize(*length as usize, 0),
        Made::Sync => {}
    }
}

/// Power fails at any moment: of what was written since the last sync an arbitrary part reaches the
/// disk. Whatever was acknowledged before is there afterwards.
#[tokio::test]
async fn survives_loss_of_power() {
    let directory = tempfile::tempdir().unwrap();
    let (store, health) = failing(directory.path());
    store.close().await;
    let mut base = fs::read(directory.path().join("registry.redb")).unwrap();
    health.faults.record();
    let store = EmbeddedStore::open_with(directory.path(), health.clone(), Duration::ZERO).unwrap();
    // For each acknowledged commit of each client, how many calls had been made by then
    let mut clients: tokio::task::JoinSet<_> = (0..4)
        .map(|client| {
            let (store, health) = (store.clone(), health.clone());
            async move {
                let mut acknowledged = Vec::new();
                for n in 0..25 {
                    let text = format!("{client}.{n} ").repeat(1 + n * 20);
                    let count = Op::put(format!("count/{client}"), n.to_string());
                    store
                        .commit(Txn::of(Op::put(format!("k/{client}/{n}"), text)).then(count))
                        .await
                        .unwrap();
                    acknowledged.push(health.faults.recorded());
                }
                (client, acknowledged)
            }
        })
        .collect();
    let mut acknowledged = vec![Vec::new(); 4];
    while let Some(done) = clients.join_next().await {
        let (client, calls) = done.unwrap();
        acknowledged[client] = calls;
    }
    store.close().await;
    let calls = health.faults.take_record();
    let marker = fs::read(directory.path().join("registry.made")).unwrap();

    let mut dice = Dice(20_261_121);
    let (mut synced, mut next) = (0, 0);
    for (cut, call) in calls.iter().enumerate() {
        if matches!(call, Made::Sync) {
            calls[synced..cut].iter().for_each(|made| apply(&mut base, made));
            synced = cut;
        }
        // Not every moment, but moments of all sorts
        if cut < next {
            continue;
        }
        next = cut + 1 + dice.roll(8);
        let mut image = base.clone();
        for made in &calls[synced..=cut] {
            match (made, dice.roll(4)) {
                (Made::SetLen(_), _) | (_, 0 | 1) => apply(&mut image, made),
                // A part of it, in whole sectors
                (Made::Write(offset, data), 2) => {
                    let length = (dice.roll(data.len() / 512 + 1) * 512).min(data.len());
                    apply(&mut image, &Made::Write(*offset, data[..length].to_vec()));
                }
                _ => {}
            }
        }
        let crashed = tempfile::tempdir().unwrap();
        fs::write(crashed.path().join("registry.redb"), &image).unwrap();
        fs::write(crashed.path().join("registry.made"), &marker).unwrap();
        let (disk, records) =
            Disk::open(crashed.path(), Arc::default()).unwrap_or_else(|e| panic!("call {cut}: {e}"));
        disk.close();
        let value = |key: String| {
            let record = records.iter().find(|r| *r.key == *key)?;
            Some(String::from_utf8(record.value.to_vec()).unwrap())
        };
        for (client, acknowledged) in acknowledged.iter().enumerate() {
            let sure = acknowledged.iter().filter(|calls| **calls <= cut).count();
            let count = value(format!("count/{client}")).map_or(0, |n| n.parse::<usize>().unwrap() + 1);
            assert!(count >= sure, "call {cut}: client {client} has {count} of {sure}");
            for n in 0..25 {
                let text = (n < count).then(|| format!("{client}.{n} ").repeat(1 + n * 20));
                assert!(value(format!("k/{client}/{n}")) == text, "call {cut}: k/{client}/{n}");
            }
        }
    }
    assert!(calls.len() > 100);
}
