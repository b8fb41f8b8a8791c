//! One agent on a systemd in memory, and the server's end of its session.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use fleet_cluster::model::*;
use fleet_link::{AgentEnd, FromAgent, Held, Hello, ServerEnd, ToAgent};
use fleet_systemd::memory::MemorySystemd;
use fleet_unit::{UnitFile, UnitName};
use fleetd::agent::Agent;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::sync::{mpsc, watch};
use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

pub(crate) const SLEEP: &str = "[Service]\nExecStart=/bin/sleep infinity\n";

pub(crate) fn name(text: &str) -> UnitName {
    UnitName::parse(text).unwrap()
}

pub(crate) fn wanted(text: &str, state: DesiredState) -> Wanted {
    Wanted { file: UnitFile::parse(text).unwrap(), state }
}

pub(crate) fn hello() -> Hello {
    let machine = Machine::default();
    Hello { id: MachineId::parse("4a1e0c2fb7d94e6c8f3a51d2c07e9b11").unwrap(), machine }
}

/// One agent, and the server's end of its session.
pub(crate) struct Rig {
    pub(crate) systemd: MemorySystemd,
    pub(crate) sessions: mpsc::Sender<AgentEnd>,
    pub(crate) server: Option<ServerEnd>,
    /// What the agent reported, put together.
    pub(crate) reports: BTreeMap<UnitName, UnitReport>,
    /// What it said to have stopped.
    pub(crate) released: BTreeMap<UnitName, Revision>,
    pub(crate) cancel: CancellationToken,
    pub(crate) purge: CancellationToken,
    pub(crate) task: JoinHandle<()>,
    /// The TTL with which beats are answered; they are not while there is none.
    pub(crate) ttl: watch::Sender<Option<Duration>>,
    /// How many beats came that say goodbye.
    pub(crate) farewells: watch::Sender<usize>,
}

impl Rig {
    pub(crate) async fn new(systemd: MemorySystemd) -> Rig {
        let agent = Agent::new(Arc::new(systemd.clone())).await.unwrap();
        let (sessions, ends) = mpsc::channel(1);
        let cancel = CancellationToken::new();
        let purge = CancellationToken::new();
        let agent = agent.purged_by(purge.clone());
        let task = tokio::spawn(agent.run(ends, cancel.clone()));
        let (ttl, farewells) = (watch::Sender::new(None), watch::Sender::new(0));
        let (reports, released) = (BTreeMap::new(), BTreeMap::new());
        let server = None;
        let mut rig =
            Rig { systemd, sessions, server, reports, released, cancel, purge, task, ttl, farewells };
        rig.connect().await;
        rig
    }

    pub(crate) async fn connect(&mut self) {
        let (mut server, agent) = fleet_link::local(hello());
        self.sessions.send(agent).await.unwrap();
        // Beats are answered by a task, as they come.
        let (_, none) = mpsc::channel(1);
        let mut beats = std::mem::replace(&mut server.beats, none);
        let (ttl, farewells) = (self.ttl.subscribe(), self.farewells.clone());
        tokio::spawn(async move {
            while let Some(beat) = beats.recv().await {
                if beat.leaving {
                    farewells.send_modify(|count| *count += 1);
                }
                if let Some(ttl) = *ttl.borrow() {
                    let _ = beat.held.send(Held::during(if beat.leaving { Duration::ZERO } else { ttl }));
                }
            }
        });
        self.server = Some(server);
    }

    pub(crate) async fn send(&mut self, message: ToAgent) {
        self.server.as_ref().unwrap().send.send(message).await.unwrap();
    }

    pub(crate) async fn snapshot(&mut self, units: &[(&str, Wanted)]) {
        let units = units.iter().map(|(unit, wanted)| (name(unit), wanted.clone().into())).collect();
        self.send(ToAgent::Snapshot(units)).await;
    }

    pub(crate) async fn change(&mut self, unit: &str, wanted: Option<Wanted>) {
        self.send(ToAgent::Changes([(name(unit), wanted.map(Into::into))].into())).await;
    }

    /// Takes reports until something holds for them. Time is simulated, so a deadline costs nothing.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        holds: impl Fn(&BTreeMap<UnitName, UnitReport>) -> bool,
    ) {
        while !holds(&self.reports) {
            let receive = &mut self.server.as_mut().unwrap().receive;
            let message = timeout(Duration::from_secs(120), receive.recv()).await;
            match message.unwrap_or_else(|_| panic!("never: {what}; {:?}", self.reports)) {
                Some(FromAgent::Snapshot(all)) => self.reports = all,
                Some(FromAgent::Changes(changes)) => {
                    for (unit, report) in changes {
                        match report {
                            Some(report) => self.reports.insert(unit, report),
                            None => self.reports.remove(&unit),
                        };
                    }
                }
                Some(FromAgent::Released(units)) => self.released.extend(units),
                None => panic!("the agent ended"),
            }
        }
    }

    /// Takes messages until it says that these have stopped.
    pub(crate) async fn until_released(&mut self, units: &[(&str, Revision)]) {
        let units: BTreeMap<_, _> = units.iter().map(|(unit, number)| (name(unit), *number)).collect();
        while self.released != units {
            let receive = &mut self.server.as_mut().unwrap().receive;
            let message = timeout(Duration::from_secs(120), receive.recv()).await;
            let message = message.unwrap_or_else(|_| panic!("never: {units:?}; {:?}", self.released));
            if let FromAgent::Released(units) = message.unwrap() {
                self.released.extend(units);
            }
        }
    }

    pub(crate) async fn until_active(&mut self, unit: &str, active: &str) {
        let unit = name(unit);
        self.until(&format!("{unit} {active}"), |reports| {
            reports.get(&unit).is_some_and(|report| report.systemd.active == active)
        })
        .await;
    }

    /// Lets everything that can happen happen.
    pub(crate) async fn quiet(&self) {
        tokio::time::sleep(Duration::from_secs(600)).await;
    }

    pub(crate) async fn end(self) -> MemorySystemd {
        self.cancel.cancel();
        self.task.await.unwrap();
        self.systemd
    }
}
