//! Kill -9 in the middle of writes, many times over, loses no acknowledged write.
//!
//! The test runs itself as another process that commits as fast as it can and reports each
//! acknowledged commit; it is killed at some moment, and the registry is read. (Loss of power, where what
//! the kernel holds is lost too, is tested beside the embedded store.)
use fleet_registry::{EmbeddedStore, Op, Store as _, Txn};
use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

const ROUNDS: usize = 200;
const CLIENTS: usize = 8;
/// Each client overwrites so many keys in turn.
const KEYS: u64 = 20;
const DIRECTORY: &str = "FLEET_TEST_KILL_DIRECTORY";

fn value_of(client: usize, n: u64) -> String {
    format!("{client}.{n} ").repeat(1 + n as usize % 40)
}

/// The keys of commit `n` of a client: its counter, and one that says what the counter was.
fn keys(client: usize, n: u64) -> (String, String) {
    (format!("count/{client}"), format!("value/{client}/{}", n % KEYS))
}

/// Not a test of its own: the process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writer() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let store = EmbeddedStore::open(Path::new(&directory)).unwrap();
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..CLIENTS {
        let store = store.clone();
        clients.spawn(async move {
            let count = store.get(&keys(client, 0).0).await.unwrap();
            let mut revision = count.as_ref().map_or(0, |e| e.revision);
            let start = count.map_or(0, |e| String::from_utf8(e.value.to_vec()).unwrap().parse().unwrap());
            for n in start + 1.. {
                let (count, value) = keys(client, n);
                let txn = Txn::of(Op::put(&*count, n.to_string())).when(count, revision);
                let mut txn = txn.then(Op::put(value, value_of(client, n)));
                if n % 5 == 0 {
                    txn = txn.then(Op::put_leased(format!("leased/{client}"), "", lease));
                }
                revision = store.commit(txn).await.unwrap();
                let mut out = std::io::stdout().lock();
                writeln!(out, "\nack {client} {n} {revision}").unwrap();
                out.flush().unwrap();
            }
        });
    }
    while clients.join_next().await.is_some() {}
}

#[tokio::test]
async fn no_acknowledged_write_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("registry");
    let (mut acknowledged, mut highest, mut total) = (BTreeMap::new(), 0, 0);
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--nocapture", "--test-threads=1"])
            .env(DIRECTORY, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        // At ever other moments: after so many acknowledgements, wherever the rest is then
        let wanted = 1 + round * 7 % 23;
        let (mut seen, mut line) = (0, String::new());
        loop {
            line.clear();
            // To the end of what the child had said before it died
            if out.read_line(&mut line).unwrap() == 0 {
                break;
            }
            let Some(numbers) = line.strip_prefix("ack ").filter(|l| l.ends_with('\n')) else { continue };
            let numbers: Vec<u64> = numbers.split_whitespace().map(|n| n.parse().unwrap()).collect();
            let [client, n, revision] = numbers[..] else { panic!("{line:?}") };
            acknowledged.insert(client as usize, (n, revision));
            highest = highest.max(revision);
            seen += 1;
            if seen == wanted {
                child.kill().unwrap();
            }
        }
        let status = child.wait().unwrap();
        assert!(status.code().is_none(), "round {round}: the writer ended by itself: {status}");
        assert!(seen >= wanted);
        total += seen;

        let store = EmbeddedStore::open(&path).unwrap();
        let snapshot = store.range("").await.unwrap();
        store.close().await;
        assert!(snapshot.revision >= highest, "round {round}: revisions went back");
        let found: BTreeMap<_, _> = snapshot
            .entries
            .iter()
            .map(|e| (&*e.key, (std::str::from_utf8(&e.value).unwrap(), e.revision)))
            .collect();
        let mut expected = 0;
        for (client, (n, revision)) in &acknowledged {
            let (last, at) = found[&*keys(*client, 0).0];
            let last: u64 = last.parse().unwrap();
            // One more may have been written, and its acknowledgement not said.
            assert!(last == *n || last == n + 1, "round {round}: client {client}: {last}, not {n}");
            assert!(at >= *revision);
            // It may be the value of the round before, acknowledged or not, but never half a commit.
            for n in (1..=last).rev().take(KEYS as usize) {
                let (value, revision) = found[&*keys(*client, n).1];
                assert!(value == value_of(*client, n), "round {round}: client {client}: {n}: {value:?}");
                assert_eq!(revision == at, n == last);
                expected += 1;
            }
            expected += 1;
            highest = highest.max(at);
        }
        // Clients that were not heard of yet; and nothing of the leases.
        let others = found.keys().filter(|k| {
            let client = k.split('/').nth(1).and_then(|c| c.parse().ok());
            client.is_some_and(|c: usize| !acknowledged.contains_key(&c))
        });
        assert_eq!(found.len(), expected + others.count(), "round {round}");
        assert!(!found.keys().any(|k| k.starts_with("leased/")));
        // What was found is the measure for the next round.
        for client in 0..CLIENTS {
            if let Some((last, at)) = found.get(&*keys(client, 0).0) {
                acknowledged.insert(client, (last.parse().unwrap(), *at));
            }
        }
    }
    assert!(total >= ROUNDS);
    println!("{total} acknowledged commits in {ROUNDS} rounds");
}
