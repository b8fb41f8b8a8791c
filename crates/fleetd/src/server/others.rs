//! What this server asks of the other servers on its registry, and what it does for them: any server answers for the whole cluster.
//!
//! A question to a machine goes to the server that has its session, which the machine's presence names. That one asks the machine and
//! nobody else ([`PeerService`] has no way to pass on), so no question runs in a circle.
//!
//! A server that is cut off from its registry can't renew the presence of its agents' machines, which would be given up for lost though they
//! are well. When another server says that it does reach the registry, the agents are sent away, and find that one. While none does, they stay:
//! elsewhere they would be no better off.

use super::{MembershipError, Server, hub::lock, session::AskError};
use fleet_cluster::model::MachineId;
use fleet_link::peer::{News, PeerAnswer, PeerDialer, PeerError, PeerRefusal, PeerService, Standing};
use fleet_link::{Ask, Chunk, KeepAlive, dial::Address};
use fleet_registry::Store;
use futures_util::future::{BoxFuture, FutureExt, join_all};
use futures_util::stream::BoxStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, warn};

/// How long another server may take to say how it is.
const STAND_DEADLINE: Duration = Duration::from_secs(2);
/// How often other servers are asked whether they reach the registry while this one does not.
const LOOK: Duration = Duration::from_secs(2);
/// A server that reached the registry so long ago does reach it: it tries every 3 s.
const REACHES: Duration = Duration::from_secs(5);

/// The answer of a machine; dropping it ends the work there.
#[derive(Debug)]
pub enum Answer {
    /// From its session here.
    Here(mpsc::Receiver<Chunk>),
    /// Through the server that has its session.
    There(Box<PeerAnswer>),
}

impl Answer {
    /// The next piece; `None`: the end, or that it was cut off. Safe to cancel.
    pub async fn recv(&mut self) -> Option<Chunk> {
        match self {
            Answer::Here(pieces) => pieces.recv().await,
            Answer::There(answer) => answer.recv().await,
        }
    }
}

impl<S: Store> Server<S> {
    /// The way to other servers; an error while the registry, which has the cluster's CA, was not reached yet.
    pub(super) async fn dialer(&self) -> Result<PeerDialer, MembershipError> {
        let made = self.dialer.get_or_try_init(|| async {
            let authority = Arc::new(self.authority().await?);
            Ok(PeerDialer::new(authority, self.config.machine.clone(), KeepAlive::default()))
        });
        made.await.cloned()
    }

    /// Asks a machine, wherever its session is; the answer comes in pieces.
    pub async fn ask(&self, machine: &MachineId, ask: Ask) -> Result<Answer, AskError> {
        match self.ask_here(machine, ask.clone()).await {
            Ok(pieces) => Ok(Answer::Here(pieces)),
            Err(AskError::NotConnected(_)) if self.config.shared_registry => {
                self.ask_there(machine, ask).await
            }
            Err(error) => Err(error),
        }
    }

    async fn ask_there(&self, machine: &MachineId, ask: Ask) -> Result<Answer, AskError> {
        let nowhere = || AskError::Nowhere(machine.clone());
        let server = self.peers.session_of(machine).ok_or_else(nowhere)?;
        if server == self.config.machine {
            return Err(AskError::NotConnected(machine.clone()));
        }
        let elsewhere = |problem: String| AskError::Elsewhere {
            machine: machine.clone(),
            server: server.clone(),
            problem,
        };
        let Some(record) = self.peers.servers().remove(&server) else {
            return Err(elsewhere("is not there (any more)".to_owned()));
        };
        let Some(address) = record.dialed() else {
            return Err(elsewhere("listens on no port (listen= in its fleet.conf)".to_owned()));
        };
        let dialer = self.dialer().await;
        let dialer = dialer
            .map_err(|error| elsewhere(format!("can't be asked before the registry is read: {error}")))?;
        match dialer.ask(&address, machine, ask).await {
            Ok(answer) => Ok(Answer::There(Box::new(answer))),
            Err(PeerError::NotHere(_)) => {
                Err(elsewhere("has none with it (any more): it may just have moved on; try again".to_owned()))
            }
            Err(PeerError::Unreachable(why)) => {
                Err(elsewhere(format!("can't be reached at {address}: {why}")))
            }
            Err(PeerError::Refused(why)) => Err(elsewhere(format!("at {address} says: {why}"))),
        }
    }

    /// How this server is.
    pub fn standing(&self) -> Standing {
        let reached = if self.config.shared_registry { self.peers.reached() } else { Some(Duration::ZERO) };
        Standing { revision: *self.hub.applied().borrow(), reached }
    }

    /// How all servers are, in the order of their IDs; of those that do not say, why.
    pub async fn standings(&self) -> Vec<(MachineId, Result<Standing, String>)> {
        if !self.config.shared_registry {
            return vec![(self.config.machine.clone(), Ok(self.standing()))];
        }
        let dialer = self.dialer().await;
        let dialer = dialer.map_err(|error| error.to_string());
        let ask = |id: MachineId, address: Option<Address>| {
            let dialer = dialer.clone();
            async move {
                if id == self.config.machine {
                    return (id, Ok(self.standing()));
                }
                let stand = async {
                    let address = address.ok_or("it listens on no port")?;
                    match timeout(STAND_DEADLINE, dialer?.stand(&address)).await {
                        Ok(standing) => standing.map_err(|error| error.to_string()),
                        Err(_) => Err("no answer".to_owned()),
                    }
                };
                let standing = stand.await;
                (id, standing)
            }
        };
        let servers = self.peers.servers().into_iter();
        join_all(servers.map(|(id, record)| ask(id, record.dialed()))).await
    }

    /// Sends joined agents away whenever this server has lost its registry and another has not, until cancelled.
    pub(super) async fn send_away(&self) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                () = self.peers.lost() => {}
            }
            if self.stale_for().is_none() || !self.has_joined_agents() {
                continue;
            }
            let others = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                others = self.standings() => others,
            };
            let reaches = |standing: &Standing| standing.reached.is_some_and(|ago| ago < REACHES);
            let well = others
                .iter()
                .find(|(id, standing)| *id != self.config.machine && standing.as_ref().is_ok_and(reaches));
            match well {
                // It may have come back meanwhile.
                Some((id, _)) if self.stale_for().is_some() => {
                    warn!(
                        "this server does not reach its registry, and server {id} does: agents are sent there"
                    );
                    self.end_joined_sessions();
                }
                _ => debug!("no other server reaches the registry either: {others:?}"),
            }
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    fn has_joined_agents(&self) -> bool {
        lock(&self.sessions).values().any(|handle| handle.joined)
    }

    fn end_joined_sessions(&self) {
        for handle in lock(&self.sessions).values().filter(|handle| handle.joined) {
            handle.sent_away.cancel();
        }
    }
}

impl<S: Store> PeerService for Server<S> {
    fn ask(
        &self,
        machine: MachineId,
        ask: Ask,
    ) -> BoxFuture<'static, Result<mpsc::Receiver<Chunk>, PeerRefusal>> {
        let server = self.clone();
        let asked = async move {
            server.ask_here(&machine, ask).await.map_err(|error| match error {
                AskError::NotConnected(_) => PeerRefusal::NotHere(error.to_string()),
                other => PeerRefusal::NotNow(other.to_string()),
            })
        };
        asked.boxed()
    }

    fn follow(&self) -> Result<BoxStream<'static, News>, PeerRefusal> {
        self.let_know()
    }

    fn stand(&self) -> Standing {
        self.standing()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::server::ServerConfig;
    use fleet_cluster::{engine::Policy, model::Machine};
    use fleet_link::Hello;
    use fleet_registry::EmbeddedStore;
    use fleet_unit::UnitName;
    use tokio::task::JoinSet;
    use tokio_util::sync::CancellationToken;

    fn id(number: u8) -> MachineId {
        MachineId::parse(&format!("{number:032x}")).unwrap()
    }

    #[tokio::test]
    async fn who_cannot_ask_a_machine_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(directory.path()).unwrap();
        let mut tasks = JoinSet::new();
        let mut server = |number| {
            let config = ServerConfig {
                machine: id(number),
                agent_ttl: Duration::from_secs(600),
                policy: Policy::for_ttl(Duration::from_secs(600)),
                disable_engine: true,
                shared_registry: true,
                address: None,
            };
            let cancel = CancellationToken::new();
            let server = Server::new(store.clone(), config, cancel.clone());
            server.start(&mut tasks);
            (server, cancel)
        };
        let ((one, gone), (two, cancel)) = (server(1), server(2));
        let ask = |machine: u8| {
            let two = &two;
            async move {
                let status = Ask::Status(UnitName::parse("a.service").unwrap());
                two.ask(&id(machine), status).await.err().map(|error| error.to_string())
            }
        };
        let says = |text: &str| Some(format!("machine {} {text}", id(7)));
        two.hub().reached(1).await;
        let nobody = "is not connected: no server is known to have a session with it";
        assert_eq!(ask(7).await, says(nobody));
        assert!(!two.is_connected(&id(7)));

        let (end, mut agent) = fleet_link::local(Hello { id: id(7), machine: Machine::default() });
        let serving = one.clone();
        let session = tokio::spawn(async move { serving.serve_agent(end).await });
        agent.receive.recv().await.unwrap();
        let mut revisions = two.hub().applied();
        while two.peers.session_of(&id(7)).is_none() || two.peers.servers().len() < 2 {
            revisions.changed().await.unwrap();
        }
        assert!(two.is_connected(&id(7)) && one.is_connected(&id(7)));
        let portless = format!(
            "has its session with server {}, which listens on no port (listen= in its fleet.conf)",
            id(1)
        );
        assert_eq!(ask(7).await, says(&portless));
        let standings = two.standings().await;
        assert_eq!(standings[0], (id(1), Err("it listens on no port".to_owned())));
        assert!(matches!(standings[1].1, Ok(standing) if standing.revision == *revisions.borrow()));
        // What another server asks is never passed on.
        let status = Ask::Status(UnitName::parse("a.service").unwrap());
        let refused = PeerService::ask(&two, id(7), status).await.err();
        assert_eq!(refused, Some(PeerRefusal::NotHere(format!("machine {} is not connected", id(7)))));

        gone.cancel();
        session.await.unwrap().unwrap();
        while two.peers.servers().len() > 1 {
            revisions.changed().await.unwrap();
        }
        assert!(!two.is_connected(&id(7)));
        let not_there = format!("has its session with server {}, which is not there (any more)", id(1));
        assert_eq!(ask(7).await, says(&not_there));
        cancel.cancel();
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap().unwrap();
        }
        store.close().await;
    }
}
