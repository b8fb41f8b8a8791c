//! One fleetd as `fleetd::daemon` puts it together, without sockets: the agent, and on a server's machine the server with the
//! agent's own session.

use crate::process::Process;
use crate::store::SimStore;
use crate::systemd::{SharedMachine, SimSystemd, lock};
use fleet_cluster::engine::Policy;
use fleet_cluster::model::Machine;
use fleet_link::{AgentEnd, Hello};
use fleetd::agent::Agent;
use fleetd::server::{Server, ServerConfig};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The pause before a server's own agent gets another session, as in the daemon.
const SESSION_RETRY: Duration = Duration::from_millis(500);
/// How long the daemon waits for its parts when it stops.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// A running fleetd.
pub(super) struct Life {
    pub(super) server: Option<Server<SimStore>>,
    /// SIGTERM.
    pub(super) terminate: CancellationToken,
}

/// What a machine says of itself.
pub(super) fn described(host: usize) -> Machine {
    let zone = if host.is_multiple_of(2) { "a" } else { "b" };
    Machine {
        public_ip: format!("10.0.0.{host}"),
        metadata: BTreeMap::from([("zone".to_owned(), zone.to_owned())]),
        version: "2.0.0".to_owned(),
        ..Machine::default()
    }
}

/// Begins one; sessions of an agent without a server of its own go into the sender.
pub(super) fn begin(
    process: &mut Process,
    hello: Hello,
    machine: SharedMachine,
    store: Option<SimStore>,
    agent_ttl: Duration,
    shared_registry: bool,
) -> (Life, mpsc::Sender<AgentEnd>) {
    let (sessions, ends) = mpsc::channel(1);
    let (agent_cancel, cancel, terminate) =
        (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
    let server = store.map(|store| {
        let config = ServerConfig {
            machine: hello.id.clone(),
            agent_ttl,
            policy: Policy::for_ttl(agent_ttl),
            disable_engine: false,
            shared_registry,
            address: None,
        };
        let (cancel, machine) = (cancel.clone(), machine.clone());
        process.within(|| Server::new(store, config, cancel).with_suspended(move || lock(&machine).slept))
    });
    let life = Life { server: server.clone(), terminate: terminate.clone() };
    let to_own_agent = sessions.clone();
    process.start(async move {
        let Ok(agent) = Agent::new(Arc::new(SimSystemd::new(machine))).await else { return };
        let mut tasks: JoinSet<()> = JoinSet::new();
        let agent = tokio::spawn(agent.run(ends, agent_cancel.clone()));
        tokio::pin!(agent);
        let mut parts = JoinSet::new();
        if let Some(server) = server {
            server.start(&mut parts);
            tasks.spawn(own_session(server, hello, to_own_agent, cancel.clone()));
        }
        tokio::select! {
            biased;
            () = terminate.cancelled() => {
                agent_cancel.cancel();
                // What does not end in time is left.
                let _ = tokio::time::timeout(STOP_DEADLINE, &mut agent).await;
            }
            _ = &mut agent => {}
            Some(_) = parts.join_next() => {}
        }
        cancel.cancel();
        let rest = async { while parts.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(STOP_DEADLINE, rest).await;
        agent.abort();
        tasks.abort_all();
    });
    (life, sessions)
}

/// As the daemon keeps the session between its server and its own agent.
async fn own_session(
    server: Server<SimStore>,
    hello: Hello,
    sessions: mpsc::Sender<AgentEnd>,
    cancel: CancellationToken,
) {
    loop {
        let (server_end, agent_end) = fleet_link::local(hello.clone());
        if sessions.send(agent_end).await.is_err() {
            return;
        }
        // How it ended is of no interest: another begins.
        let _ = server.serve_agent(server_end).await;
        if cancel.is_cancelled() {
            return;
        }
        tokio::time::sleep(SESSION_RETRY).await;
    }
}
