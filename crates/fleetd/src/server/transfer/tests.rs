//! Imports that are cut off, repeated or refused, on servers of one process.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;
use crate::server::{Role, Server, ServerConfig, UnitChange, gated::Gated};
use fleet_cluster::model::{DesiredState, Machine, MachineId};
use fleet_link::token::Terms;
use fleet_link::{Hello, ToAgent};
use fleet_registry::EmbeddedStore;
use fleet_registry::records::{MachineRecord, put_machine, put_schedule};
use fleet_unit::{UnitFile, UnitName};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
const TTL: Duration = Duration::from_secs(60);

fn machine(number: u32) -> MachineId {
    MachineId::parse(&format!("{number:032x}")).unwrap()
}

fn name(number: usize) -> UnitName {
    UnitName::parse(&format!("u{number}.service")).unwrap()
}

fn file() -> UnitFile {
    UnitFile::parse("# kept\n[Service]\nExecStart=/bin/sleep infinity\n").unwrap()
}

/// A server on a store, and what ends it.
fn server<S: Store>(store: &S, tasks: &mut JoinSet<anyhow::Result<()>>) -> (Server<S>, CancellationToken) {
    let config = ServerConfig {
        machine: machine(1),
        agent_ttl: TTL,
        policy: fleet_cluster::engine::Policy::for_ttl(TTL),
        disable_engine: false,
        shared_registry: false,
        address: None,
    };
    let cancel = CancellationToken::new();
    let server = Server::new(store.clone(), config, cancel.clone());
    server.start(tasks);
    (server, cancel)
}

async fn end(cancel: CancellationToken, mut tasks: JoinSet<anyhow::Result<()>>) {
    cancel.cancel();
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap().unwrap();
    }
}

/// A registry with something of every kind, made by a server.
async fn furnished(store: &EmbeddedStore, units: usize) {
    let mut tasks = JoinSet::new();
    let (server, cancel) = server(store, &mut tasks);
    server.hub().reached(1).await;
    let put = |number| UnitChange::Put {
        name: name(number),
        file: Some(file()),
        desired: Some(DesiredState::Launched),
    };
    let made = server.change_units(&(0..units).map(put).collect::<Vec<_>>()).await;
    assert!(made.iter().all(Result::is_ok), "{made:?}");
    server.create_token(Terms { ttl: TTL, uses: Some(3) }).await.unwrap();
    let ann = fleet_link::user::UserName::parse("ann").unwrap();
    server.create_user(&ann, Role::Viewer, TTL, None).await.unwrap();
    let marks = MachineRecord { format: 1, cordoned: true, ..MachineRecord::default() };
    let lease = store.grant(DEADLINE).await.unwrap();
    let member = r#"{"format":1,"key":"KEY","joined":1}"#.replace("KEY", &"ab".repeat(32));
    let removed = r#"{"format":1,"key":"KEY","joined":1,"removed":2}"#.replace("KEY", &"ab".repeat(32));
    let txn = Txn::of(put_machine(&machine(2), &marks))
        .then(put_schedule(&name(0), &machine(2)))
        .then(Op::put(format!("member/{}", machine(2)), member))
        .then(Op::put(format!("removed/{}", machine(3)), removed))
        .then(Op::put("later/kind", "{\"of\":\"a newer fleetd\"}"))
        .then(Op::put_leased(LEADER, "{}", lease))
        .then(Op::put_leased(format!("{SERVERS}{}", machine(1)), "{}", lease));
    store.commit(txn).await.unwrap();
    end(cancel, tasks).await;
}

/// Waits until something is so.
async fn until(holds: impl AsyncFn() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(DEADLINE, waiting).await.unwrap();
}

async fn records<S: Store>(store: &S) -> BTreeMap<String, String> {
    let entries = store.range("").await.unwrap().entries;
    entries.iter().map(|e| (e.key.to_string(), String::from_utf8_lossy(&e.value).into_owned())).collect()
}

fn open() -> (tempfile::TempDir, EmbeddedStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(directory.path()).unwrap();
    (directory, store)
}

#[tokio::test]
async fn a_registry_comes_back_from_its_file() {
    let (_first, from) = open();
    furnished(&from, 300).await;
    let (archive, wrong) = export(&from).await.unwrap();
    assert_eq!(wrong, [""; 0]);
    let text = archive.to_text();
    for kind in [
        "ca",
        "later/kind",
        "machine/",
        "member/",
        "removed/",
        "schedule/u0",
        "token/",
        "unit/u299",
        "user/ann",
    ] {
        assert!(text.contains(&format!("\n{{\"key\":\"{kind}")), "{kind}");
    }
    for passing in [LEADER, SERVERS, PRESENCES] {
        assert!(!text.contains(&format!("\"key\":\"{passing}")), "{passing}");
    }

    let (_second, to) = open();
    // What a server that was just started made by itself is no obstacle.
    to.commit(Txn::of(Op::put("ca", "{}"))).await.unwrap();
    let archive = read(text.as_bytes()).unwrap();
    let done = import(&to, &archive, false).await.unwrap();
    assert_eq!(done, Imported { records: archive.records.len(), changed: archive.records.len() });
    let (again, _) = export(&to).await.unwrap();
    assert!(again.records == archive.records);
    assert!(!records(&to).await.contains_key(IMPORT));
    // Repeating it changes nothing.
    let revision = to.range("").await.unwrap().revision;
    assert_eq!(import(&to, &archive, false).await.unwrap().changed, 0);
    assert_eq!(to.range("").await.unwrap().revision, revision);
}

#[tokio::test]
async fn what_is_there_is_not_replaced_unasked() {
    let (_first, from) = open();
    furnished(&from, 2).await;
    let (archive, _) = export(&from).await.unwrap();
    let (_second, to) = open();
    furnished(&to, 3).await;
    let before = records(&to).await;
    let refused = import(&to, &archive, false).await.unwrap_err();
    assert!(refused.to_string().contains("3 units, 1 units' places, 1 machines' metadata"), "{refused}");
    assert_eq!(records(&to).await, before);
    let done = import(&to, &archive, true).await.unwrap();
    assert!(done.changed > 0);
    assert!(export(&to).await.unwrap().0.records == archive.records);
    // What goes with leases is not touched, but for who leads.
    let after = records(&to).await;
    assert!(after.contains_key(&format!("{SERVERS}{}", machine(1))) && !after.contains_key(LEADER));
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_named_with_its_line() {
    let (_directory, store) = open();
    for (key, value, what) in [
        ("unit/a.service", r#"{"format":2}"#, "line 2: unit/a.service: format 2 is unknown here"),
        ("unit/a service", r#"{"format":1,"file":"","desired":"loaded"}"#, "line 2: unit/a service: "),
        ("schedule/a.service", r#"{"format":1,"machine":"x"}"#, "is not a machine ID"),
        ("user/ann", r#"{"format":1}"#, "line 2: user/ann: missing field"),
        ("user/a b", r#"{"format":1}"#, "line 2: user/a b: "),
        ("member/x", r#"{"format":1}"#, "line 2: member/x: "),
        ("token/x", r#"{"format":7}"#, "line 2: token/x: format 7 is unknown here"),
        ("ca", r#"{"format":1,"certificate":"","key":""}"#, "line 2: ca: "),
        ("leader", "{}", "line 2: leader: this is no record that lasts"),
        ("presence/x", "{}", "line 2: presence/x: this is no record that lasts"),
        ("import", "{}", "line 2: import: this is no record that lasts"),
    ] {
        let entry = Entry { key: key.into(), value: value.as_bytes().into(), revision: 1 };
        let text = Archive::of([&entry], 1, 1).to_text();
        let error = read(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(what), "{key}: {error}");
        assert!(!error.contains(value), "a record is not shown");
        if !passes(key) {
            // It is exported as it is all the same, and that is said.
            store.commit(Txn::of(Op::put(key, value))).await.unwrap();
            let (archive, wrong) = export(&store).await.unwrap();
            assert_eq!((archive.records.len(), wrong.len()), (1, 1));
            store.commit(Txn::of(Op::delete(key))).await.unwrap();
        }
    }
}

/// A store that takes so many more transactions and then is away.
fn failing(store: &EmbeddedStore, commits: usize) -> Gated {
    let left = AtomicUsize::new(commits);
    Gated::new(store.clone(), move |_| {
        let taken = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        taken.map(drop).map_err(|_| StoreError::Unavailable("the test says so".to_owned()))
    })
}

#[tokio::test]
async fn an_import_that_was_cut_off_is_acted_on_by_nobody_until_it_is_repeated() {
    let (_first, from) = open();
    furnished(&from, 400).await;
    let (archive, _) = export(&from).await.unwrap();
    for commits in 1..5 {
        let (_second, to) = open();
        let store = failing(&to, commits);
        let cut = import(&store, &archive, false).await.unwrap_err();
        assert!(matches!(cut, TransferError::Store(StoreError::Unavailable(_))), "{cut}");
        assert_eq!(export(&to).await.unwrap_err(), TransferError::Incomplete);

        // A server that is started now knows nothing, and tells its agent nothing.
        let mut tasks = JoinSet::new();
        let (server, cancel) = server(&to, &mut tasks);
        let (end_of_server, mut agent) =
            fleet_link::local(Hello { id: machine(1), machine: Machine::default() });
        let session = {
            let server = server.clone();
            tokio::spawn(async move { server.serve_agent(end_of_server).await })
        };
        let mut other = archive.clone();
        other.records.remove("user/ann");
        assert_eq!(import(&to, &other, false).await.unwrap_err(), TransferError::Another);
        until(async || server.is_importing()).await;
        assert_eq!(*server.hub().applied().borrow(), 0);
        assert!(agent.receive.try_recv().is_err());

        // Repeated, it is complete; the server goes on with all of it.
        let done = import(&to, &archive, false).await.unwrap();
        assert!(done.changed < archive.records.len() || commits == 1, "{done:?} after {commits}");
        assert!(export(&to).await.unwrap().0.records == archive.records);
        let told = timeout(DEADLINE, agent.receive.recv()).await.unwrap();
        assert!(matches!(told, Some(ToAgent::Snapshot(_))));
        assert_eq!(server.hub().view().units().count(), 400);
        assert!(!server.exchanged().is_cancelled(), "it knew nothing before");
        end(cancel, tasks).await;
        session.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_server_that_runs_stops_acting_and_is_begun_anew() {
    let (_first, from) = open();
    furnished(&from, 2).await;
    let (archive, _) = export(&from).await.unwrap();
    let (_second, to) = open();
    let mut tasks = JoinSet::new();
    let (server, cancel) = server(&to, &mut tasks);
    server.hub().reached(1).await;
    let hello = |number| Hello { id: machine(number), machine: Machine::default() };
    let (own_end, mut own) = fleet_link::local(hello(1));
    let serve = |end| {
        let server = server.clone();
        tokio::spawn(async move { server.serve_agent(end).await })
    };
    let first = serve(own_end);
    assert!(matches!(own.receive.recv().await, Some(ToAgent::Snapshot(told)) if told.is_empty()));

    // Half of it is there: a machine that is known again already must not hear that it has to hold nothing.
    let store = failing(&to, 2);
    import(&store, &archive, false).await.unwrap_err();
    let (other_end, mut other) = fleet_link::local(hello(2));
    let second = serve(other_end);
    until(async || server.is_connected(&machine(2)) && *server.hub().applied().borrow() == 0).await;
    assert!(other.receive.try_recv().is_err() && own.receive.try_recv().is_err());
    assert!(!server.exchanged().is_cancelled());

    import(&to, &archive, false).await.unwrap();
    timeout(DEADLINE, server.exchanged().cancelled()).await.unwrap();
    assert!(other.receive.try_recv().is_err() && own.receive.try_recv().is_err());
    end(cancel, tasks).await;
    first.await.unwrap().unwrap();
    second.await.unwrap().unwrap();

    // The one that takes its place tells the machine what it held before.
    let mut tasks = JoinSet::new();
    let (server, cancel) = super::tests::server(&to, &mut tasks);
    let (end_of_server, mut agent) = fleet_link::local(hello(2));
    let session = tokio::spawn(async move { server.serve_agent(end_of_server).await });
    let told = timeout(DEADLINE, agent.receive.recv()).await.unwrap();
    assert!(matches!(told, Some(ToAgent::Snapshot(told)) if told.contains_key(&name(0))));
    end(cancel, tasks).await;
    session.await.unwrap().unwrap();
}

#[test]
fn transactions_take_what_fits() {
    let guard = Compare { key: IMPORT.to_owned(), revision: 7 };
    let write = |number: usize, size: usize| {
        let key = format!("unit/{number}");
        (Compare { key: key.clone(), revision: 0 }, Op::put(key, vec![b'x'; size]))
    };
    for size in [10, 100_000, 1_400_000] {
        let writes: Vec<_> = (0..300).map(|number| write(number, size)).collect();
        let txns = transactions(writes, &guard);
        for txn in &txns {
            fleet_registry::store::check_size(txn).unwrap();
            assert_eq!(txn.compares[0], guard);
            assert_eq!(txn.compares.len(), txn.ops.len() + 1);
        }
        assert_eq!(txns.iter().map(|txn| txn.ops.len()).sum::<usize>(), 300);
        let most = 300usize.div_ceil(MAX_OPS - 1).max(300usize.div_ceil(MAX_BYTES / (size + 20)));
        assert_eq!(txns.len(), most, "{size}");
    }
}
