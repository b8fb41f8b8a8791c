//! Records that a server can't read, as a newer one has written them, cost only themselves.

use super::{MachineMark, Server, ServerConfig, gated::Gated};
use fleet_cluster::engine::Policy;
use fleet_cluster::model::{DesiredState, Machine, MachineId};
use fleet_link::{AgentEnd, Hello, Instruction, ToAgent};
use fleet_registry::records::{put_leaving, put_schedule, put_unit};
use fleet_registry::store::Conflict;
use fleet_registry::{Compare, EmbeddedStore, Op, Store, StoreError, Txn};
use fleet_unit::{UnitFile, UnitName};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

const DEADLINE: Duration = Duration::from_secs(60);
const TTL: Duration = Duration::from_secs(600);
const NEWER: &str = "{\"format\":99}";

/// What a store takes no transactions with a condition on, and how many it refused.
#[derive(Default)]
struct Refused {
    key: Option<String>,
    count: usize,
}

impl Refused {
    fn check(&mut self, txn: &Txn) -> Result<(), StoreError> {
        let Some(compare) = txn.compares.iter().find(|compare| Some(&compare.key) == self.key.as_ref())
        else {
            return Ok(());
        };
        self.count += 1;
        let Compare { key, revision } = compare.clone();
        Err(StoreError::Conflict(Conflict { key, expected: revision, found: revision + 1 }))
    }
}

/// One server and its registry.
struct Rig {
    _directory: tempfile::TempDir,
    store: Gated,
    refused: Arc<Mutex<Refused>>,
    shared: bool,
    server: Server<Gated>,
    tasks: JoinSet<anyhow::Result<()>>,
    sessions: JoinSet<anyhow::Result<()>>,
}

impl Rig {
    async fn new(shared: bool) -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(directory.path()).unwrap();
        let refused = Arc::new(Mutex::new(Refused::default()));
        let store = {
            let refused = refused.clone();
            Gated::new(store, move |txn| refused.lock().unwrap().check(txn))
        };
        let (server, tasks) = begin(&store, shared);
        server.hub().reached(1).await;
        Rig { _directory: directory, store, refused, shared, server, tasks, sessions: JoinSet::new() }
    }

    /// A machine's agent, and what it is told first.
    async fn connect(&mut self, id: &MachineId) -> (AgentEnd, BTreeMap<UnitName, Instruction>) {
        let (end, mut agent) = fleet_link::local(Hello { id: id.clone(), machine: Machine::default() });
        let server = self.server.clone();
        self.sessions.spawn(async move { server.serve_agent(end).await });
        let told = timeout(DEADLINE, agent.receive.recv()).await.unwrap();
        let Some(ToAgent::Snapshot(told)) = told else { panic!("no snapshot: {told:?}") };
        (agent, told)
    }

    async fn write(&self, ops: impl IntoIterator<Item = Op>) {
        let txn = Txn { compares: Vec::new(), ops: ops.into_iter().collect() };
        let revision = self.store.commit(txn).await.unwrap();
        self.server.hub().reached(revision).await;
    }

    async fn launch(&self, unit: &str, fleet: &str) {
        self.server.put_unit(&name(unit), Some(file(fleet)), Some(DesiredState::Launched)).await.unwrap();
    }

    fn place(&self, unit: &str) -> Option<MachineId> {
        self.server.hub().view().place(&name(unit)).map(|(id, _)| id.clone())
    }

    /// The server ends, and another lists what there is.
    async fn restart(&mut self) {
        end(&self.server, &mut self.sessions, &mut self.tasks).await;
        (self.server, self.tasks) = begin(&self.store, self.shared);
        self.server.hub().reached(1).await;
    }

    async fn end(mut self) {
        end(&self.server, &mut self.sessions, &mut self.tasks).await;
        self.store.close().await;
    }
}

fn begin(store: &Gated, shared: bool) -> (Server<Gated>, JoinSet<anyhow::Result<()>>) {
    let config = ServerConfig {
        machine: machine('1'),
        agent_ttl: TTL,
        policy: Policy::for_ttl(TTL),
        disable_engine: false,
        shared_registry: shared,
        address: None,
    };
    let mut tasks = JoinSet::new();
    let server = Server::new(store.clone(), config, CancellationToken::new());
    server.start(&mut tasks);
    (server, tasks)
}

async fn end(
    server: &Server<Gated>,
    sessions: &mut JoinSet<anyhow::Result<()>>,
    tasks: &mut JoinSet<anyhow::Result<()>>,
) {
    server.cancel.cancel();
    for set in [sessions, tasks] {
        while let Some(ended) = set.join_next().await {
            ended.unwrap().unwrap();
        }
    }
}

fn machine(digit: char) -> MachineId {
    MachineId::parse(&digit.to_string().repeat(32)).unwrap()
}

fn name(text: &str) -> UnitName {
    UnitName::parse(text).unwrap()
}

fn file(fleet: &str) -> UnitFile {
    UnitFile::parse(&format!("[Service]\nExecStart=/bin/true\n[X-Fleet]\n{fleet}\n")).unwrap()
}

/// Waits until an agent is told of a unit.
async fn told(agent: &mut AgentEnd, unit: &str) -> Option<Instruction> {
    loop {
        match timeout(DEADLINE, agent.receive.recv()).await.expect(unit).unwrap() {
            ToAgent::Changes(mut changes) => {
                if let Some(told) = changes.remove(&name(unit)) {
                    return told;
                }
            }
            _ => continue,
        }
    }
}

#[tokio::test]
async fn units_behind_one_that_cannot_be_read_are_placed() {
    for (shared, listed) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut rig = Rig::new(shared).await;
        let a = machine('a');
        let (mut agent, _) = rig.connect(&a).await;
        let zone = |value: &str| [(a.clone(), "zone".to_owned(), Some(value.to_owned()))];
        rig.server.edit_metadata(&zone("x")).await.unwrap();
        rig.launch("b.service", "MachineMetadata=zone=x").await;
        rig.launch("c.service", "MachineMetadata=zone=x").await;
        assert!(matches!(told(&mut agent, "c.service").await, Some(Instruction::Hold(_))));
        rig.write([Op::put("unit/b.service", NEWER)]).await;
        if listed {
            rig.restart().await;
            agent = rig.connect(&a).await.0;
        }
        // By what is known it does not fit there any more, or does not exist.
        rig.server.edit_metadata(&zone("y")).await.unwrap();
        rig.launch("z.service", "").await;
        assert!(matches!(told(&mut agent, "z.service").await, Some(Instruction::Hold(_))));
        assert_eq!((rig.place("b.service"), rig.place("c.service")), (Some(a.clone()), None));
        let explained = rig.server.hub().explanation(&rig.server.hub().view(), &name("b.service"));
        assert!(explained.problems[0].reason.contains("can't be read by this server"), "{explained:?}");
        rig.end().await;
    }
}

#[tokio::test]
async fn a_decision_that_is_refused_holds_up_no_other_and_is_not_made_again_and_again() {
    for shared in [false, true] {
        let mut rig = Rig::new(shared).await;
        let (mut agent, _) = rig.connect(&machine('a')).await;
        rig.launch("a.service", "").await;
        told(&mut agent, "a.service").await;
        rig.refused.lock().unwrap().key = Some("unit/b.service".to_owned());
        // The command would be refused, too.
        rig.write([put_unit(&name("b.service"), &file(""), DesiredState::Launched)]).await;
        for unit in ["x.service", "y.service", "z.service"] {
            rig.launch(unit, "").await;
            told(&mut agent, unit).await;
        }
        assert_eq!(rig.place("b.service"), None);
        // Together with what came with it, and alone.
        let refused = rig.refused.lock().unwrap().count;
        assert!((1..=2).contains(&refused), "{refused} times");
        rig.refused.lock().unwrap().key = None;
        rig.write([put_unit(&name("b.service"), &file(""), DesiredState::Launched)]).await;
        told(&mut agent, "b.service").await;
        rig.end().await;
    }
}

/// They come from a server that can read the records.
#[tokio::test]
async fn a_machine_that_comes_from_a_newer_server_keeps_what_it_was_told_there() {
    let mut rig = Rig::new(true).await;
    let (a, b) = (machine('a'), machine('b'));
    for unit in ["replaced.service", "elsewhere.service", "stopping.service"] {
        let unit = name(unit);
        rig.write([put_unit(&unit, &file(""), DesiredState::Launched), put_schedule(&unit, &a)]).await;
    }
    let launched = name("launched.service");
    rig.write([put_unit(&launched, &file(""), DesiredState::Inactive)]).await;
    let stopping = name("stopping.service");
    // It has become Global, and nobody has taken its place away yet.
    rig.write([put_schedule(&name("global.service"), &b), put_leaving(&name("global.service"), &a)]).await;
    rig.write([
        Op::put("unit/new.service", NEWER),
        Op::put("unit/global.service", NEWER),
        Op::put("unit/replaced.service", NEWER),
        Op::put("unit/launched.service", NEWER),
        Op::put("unit/elsewhere.service", NEWER),
        Op::put("unit/stopping.service", NEWER),
    ])
    .await;
    rig.write([
        put_schedule(&name("new.service"), &a),
        put_schedule(&launched, &a),
        put_schedule(&name("elsewhere.service"), &b),
        Op::delete("schedule/stopping.service"),
        put_leaving(&stopping, &a),
    ])
    .await;
    for listed in [false, true] {
        if listed {
            rig.restart().await;
        }
        let (_agent, mut told) = rig.connect(&a).await;
        let release = told.remove(&stopping);
        assert!(matches!(release, Some(Instruction::Release(_))), "listed: {listed}: {release:?}");
        let left = ["global.service", "launched.service", "new.service", "replaced.service"];
        assert_eq!(told, left.map(|unit| (name(unit), Instruction::Leave)).into(), "listed: {listed}");
        let (_agent, told) = rig.connect(&b).await;
        assert_eq!(told[&name("elsewhere.service")], Instruction::Leave);
    }
    // Nor is a unit known to be nowhere while its place can't be read.
    rig.write([
        put_unit(&name("replaced.service"), &file(""), DesiredState::Launched),
        Op::put("schedule/replaced.service", NEWER),
    ])
    .await;
    let (mut agent, told_first) = rig.connect(&a).await;
    assert_eq!(told_first[&name("replaced.service")], Instruction::Leave);
    rig.write([put_schedule(&name("replaced.service"), &b)]).await;
    assert_eq!(told(&mut agent, "replaced.service").await, None);
    rig.end().await;
}

/// Had it been lost and were back, the unit might run elsewhere by a record that this server can't read.
#[tokio::test]
async fn a_machine_does_not_go_on_holding_what_it_may_not_hold_any_more() {
    let mut rig = Rig::new(true).await;
    let a = machine('a');
    let (mut agent, _) = rig.connect(&a).await;
    let (mut other, _) = rig.connect(&machine('b')).await;
    rig.launch("u.service", "MachineID=aaaaaaaa").await;
    assert!(matches!(told(&mut agent, "u.service").await, Some(Instruction::Hold(_))));
    rig.write([Op::put("schedule/u.service", NEWER)]).await;
    assert_eq!(told(&mut agent, "u.service").await, Some(Instruction::Leave));
    rig.write([put_schedule(&name("u.service"), &a)]).await;
    assert!(matches!(told(&mut agent, "u.service").await, Some(Instruction::Hold(_))));
    // Who never held it hears nothing of that.
    rig.launch("v.service", "MachineID=bbbbbbbb").await;
    let Some(ToAgent::Changes(first)) = timeout(DEADLINE, other.receive.recv()).await.unwrap() else {
        panic!("no change")
    };
    assert_eq!(first.into_keys().collect::<Vec<_>>(), [name("v.service")]);
    rig.end().await;
}

#[tokio::test]
async fn what_operators_said_of_a_machine_in_a_newer_format_is_not_written_over() {
    let rig = Rig::new(true).await;
    let key = format!("machine/{}", machine('1'));
    let newer = r#"{"format":2,"metadata":{"zone":"x"}}"#;
    rig.write([Op::put(key.as_str(), newer)]).await;
    let edit = [(machine('1'), "zone".to_owned(), None)];
    let refused = rig.server.edit_metadata(&edit).await.unwrap_err();
    assert!(refused.to_string().contains("format 2 is unknown"), "{refused}");
    rig.server.mark_machine(&machine('1'), MachineMark::Cordon).await.unwrap_err();
    assert_eq!(&*rig.store.get(&key).await.unwrap().unwrap().value, newer.as_bytes());
    rig.end().await;
}

#[tokio::test]
async fn what_rests_on_what_operators_said_of_a_machine_stays_when_that_cannot_be_read() {
    for shared in [false, true] {
        let mut rig = Rig::new(shared).await;
        let (a, b) = (machine('a'), machine('b'));
        let (mut agent, _) = rig.connect(&a).await;
        rig.server.edit_metadata(&[(a.clone(), "zone".to_owned(), Some("x".to_owned()))]).await.unwrap();
        rig.launch("global.service", "Global=true\nMachineMetadata=zone=x").await;
        rig.launch("u.service", "MachineMetadata=zone=x").await;
        assert!(matches!(told(&mut agent, "u.service").await, Some(Instruction::Hold(_))));
        rig.write([Op::put(format!("machine/{a}").as_str(), NEWER)]).await;
        rig.restart().await;
        let (mut agent, first) = rig.connect(&a).await;
        assert_eq!(first[&name("global.service")], Instruction::Leave);
        assert!(matches!(first[&name("u.service")], Instruction::Hold(_)));
        // Others are placed, where it is known who takes them.
        let (mut other, _) = rig.connect(&b).await;
        for unit in ["v.service", "w.service"] {
            rig.launch(unit, "").await;
            told(&mut other, unit).await;
        }
        assert_eq!((rig.place("u.service"), rig.place("v.service")), (Some(a.clone()), Some(b)));
        rig.write([Op::delete(format!("machine/{a}").as_str())]).await;
        let mut gone = Vec::new();
        while gone.len() < 2 {
            let Some(ToAgent::Changes(changes)) = timeout(DEADLINE, agent.receive.recv()).await.unwrap()
            else {
                panic!("no change")
            };
            gone.extend(changes.into_iter().filter(|(_, told)| told.is_none()).map(|(name, _)| name));
        }
        assert_eq!(gone, ["global.service", "u.service"].map(name));
        rig.end().await;
    }
}
